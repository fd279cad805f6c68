"""Over-optimisation with one reward model, with three and with four: gold against the proxy that was optimised.

    python -m benchmarks.ensembles --e2e-models DIR --e2e-data DIR

The tasks that over-optimise, content and E2E, with the prompts, budgets and cells of `benchmarks.labels`. Three reward models are
those of the demonstration and of benchmarks/e2e_nlg.py, one is the first of them, and the fourth is trained as they were, on
comparisons of its own. Each ensemble has its own gradient field and its own best-of-n.

Writes benchmarks/results/ensembles.json and docs/img/ensembles.png; what was measured is kept in `--work`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.cells import BLUE, VERMILION, World, new_figure, save_figure, shared_legend, summarise
from benchmarks.labels import DRAWN, NAMES, VARIANTS, Labels, over_optimised, publish, trained
from vgf_llm.evaluation.demo import SCALES


BUDGETS = {name: variant for name, variant in VARIANTS.items() if name.endswith(("nat", "nats"))}
SIZES = (1, 3, 4)


def ensemble(world: World, labels: Labels, size: int) -> World:
    """The task with so many reward models; three are there."""
    if size == len(world.rewards):
        return world
    rewards = world.rewards[:size]
    if size > len(rewards):
        member = len(rewards)
        path = world.work / f"{world.name}_more" / f"reward-{member}"
        rewards = [*rewards, trained(path, lambda at: labels.train(at, labels.plain(member), member))]
    assert len(rewards) == size
    return replace(world, name=f"{world.name}_{size}", rewards=rewards)


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
    # As many labels as those of the others, none of moved texts; of 8,000 pairs of E2E half are.
    tasks, cells = over_optimised(__doc__.splitlines()[0], SCALES["full"].settings.content_edits, 8_000)
    rows = []
    for world, labels in tasks:
        for size in SIZES:
            found, _ = summarise(cells(ensemble(world, labels, size)), {"ensembles": BUDGETS}, DRAWN)
            rows += [{**r, "task": world.name} for r in found]
    publish(rows, "ensembles", plot)


if __name__ == "__main__":
    main()
