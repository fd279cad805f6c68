"""What a gradient field loses by sharing all layers of the base model but the last: gold beside a field that has all its own.

    python -m benchmarks.layers --e2e-models DIR --e2e-data DIR

Prompts, budgets and cells of `benchmarks.labels`, reward models *along the flow* there. *Shared* is the field that is kept beside
the models, one layer of three on the states that the base model has behind its second; *its own* a copy of a reward model, fitted
to as many completions of the same prompts. Two budgets more lie far beyond what is worth choosing.

Writes benchmarks/results/layers.json and docs/img/layers.png; what was measured is kept in `--work`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from benchmarks.cells import (
    BLUE,
    GREEN,
    VERMILION,
    Cells,
    Variant,
    new_figure,
    over_reference,
    save_figure,
    shared_legend,
    summarise,
)
from benchmarks.labels import DRAWN, NAMES, VARIANTS, asked_for, publish


LAYERS = {"its own": 0, "shared": 1}
FAR = {f"{nats:g} nats": replace(DRAWN, kl_budget=nats) for nats in (32.0, 64.0)}
ALONG = {
    f"{name}, {budget}": replace(variant, layers=layers)
    for budget, variant in (VARIANTS | FAR).items()
    for name, layers in LAYERS.items()
}


def measured(cells: Cells, variants: Mapping[str, Variant], reference: int) -> list[dict]:
    """Rows of one task, each compared with the field of `reference` layers at the same budget, paired by prompt."""
    rows, _ = summarise(cells, {"layers": variants}, DRAWN)
    sampler = cells.world.sampler(Variant())
    for row in (r for r in rows if r["method"].startswith("layers: ")):
        variant = variants[row["method"].removeprefix("layers: ")]
        cell, other = cells.of(variant), cells.of(replace(variant, layers=reference))
        assert cell is not None and other is not None
        row |= over_reference(cell[str(variant.rounds)], other[str(variant.rounds)])
        row |= {
            "correlation": float(cells.world.field(sampler, variant.layers).correlation),
            "field_seconds": json.loads((cells.world.field_at(variant.layers) / "seconds.json").read_text()),
        }
    return rows


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Gold against the KL account, one panel per task: along either field, and of best-of-n."""
    tasks = [task for task in NAMES if any(r["task"] == task for r in rows)]
    figure, axes = new_figure(
        4.2 * len(tasks), 4.0, 1, len(tasks), "Gold along a field with layers of its own and with shared ones"
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        here = [r for r in rows if r["task"] == task]
        budgets = [r for r in here if r["method"].startswith("layers: ") and r["method"].endswith(("nat", "nats"))]
        along = {name: [r for r in budgets if r["setting"]["layers"] == layers] for name, layers in LAYERS.items()}
        for colour, marker, label, points in (
            (BLUE, "o", "best-of-n, n to 64", [r for r in here if r["method"] == "best_of_n"]),
            (VERMILION, "D", "VGF, three layers of its own", along["its own"]),
            (GREEN, "^", "VGF, two layers shared, one of its own", along["shared"]),
        ):
            nats, gold, low, high = (
                [r[key] for r in points] for key in ("kl_nats", "reward_gold", "reward_gold_low", "reward_gold_high")
            )
            ax.plot(nats, gold, marker=marker, markersize=4, color=colour, label=label)
            ax.fill_between(nats, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set(title=NAMES[task], xlabel="KL account, nats (log scale)", ylabel="gold reward")
        ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def main() -> None:
    tasks, cells = asked_for(__doc__.splitlines()[0])
    publish([r for task in tasks for r in measured(cells(task.world), ALONG, LAYERS["its own"])], "layers", plot)


if __name__ == "__main__":
    main()
