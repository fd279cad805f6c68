"""Over-optimisation with one reward model, with three and with four: gold against the proxy that was optimised.

    python -m benchmarks.ensembles --e2e-models DIR --e2e-data DIR

The tasks that over-optimise with labels of one round, content and E2E: prompts, budgets and cells of `benchmarks.labels`, reward
models *as given* there, and a fourth that is trained as they were on comparisons of its own. Each ensemble has its own gradient
field and its own best-of-n.

Writes benchmarks/results/ensembles.json and docs/img/ensembles.png; what was measured is kept in `--work`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.cells import BLUE, VERMILION, World, new_figure, save_figure, shared_legend, summarise
from benchmarks.labels import DRAWN, NAMES, VARIANTS, Task, asked_for, publish


BUDGETS = {name: variant for name, variant in VARIANTS.items() if name.endswith(("nat", "nats"))}
SIZES = (1, 3, 4)


def of_size(task: Task, size: int) -> World:
    """The task with so many reward models; those as given are three."""
    given = task.given(max(size, 3))
    return given if size == 3 else replace(given, name=f"{task.world.name}_{size}", rewards=given.rewards[:size])


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """A panel for every task and ensemble: gold against its proxy, along budgets of VGF and along n."""
    tasks = [task for task in NAMES if any(r["task"] == task for r in rows)]
    figure, axes = new_figure(3.8 * len(SIZES), 3.2 * len(tasks), len(tasks), len(SIZES), "Gold against proxy, by reward models")
    for line, task in zip(axes, tasks, strict=True):
        for ax, size in zip(line, SIZES, strict=True):
            here = [r for r in rows if r["task"] == task and r["members"] == size]
            for colour, marker, label, points in (
                (BLUE, "o", "best-of-n, n to 64", [r for r in here if r["method"] == "best_of_n"]),
                (VERMILION, "D", "VGF, 16 completions, 0.5 to 16 nats", [r for r in here if r["method"].startswith("ensembles")]),
            ):
                proxy, gold, low, high = (
                    [r[key] for r in points] for key in ("reward_proxy", "reward_gold", "reward_gold_low", "reward_gold_high")
                )
                ax.plot(proxy, gold, marker=marker, markersize=4, color=colour, label=label)
                ax.fill_between(proxy, low, high, color=colour, alpha=0.15, linewidth=0)
            said = "1 reward model" if size == 1 else f"{size} reward models"
            ax.set(title=f"{NAMES[task]}, {said}", xlabel="proxy reward", ylabel="gold reward")
            ax.sharey(line[0])
            ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 2)
    save_figure(figure, path)


def main() -> None:
    tasks, cells = asked_for(__doc__.splitlines()[0])
    rows = []
    for task in (t for t in tasks if t.world.name != "tone"):
        for size in SIZES:
            found, _ = summarise(cells(of_size(task, size)), {"ensembles": BUDGETS}, DRAWN)
            rows += [{**r, "task": task.world.name} for r in found]
    publish(rows, "ensembles", plot)


if __name__ == "__main__":
    main()
