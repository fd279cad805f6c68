"""Where labels should be spent: all on what the base model says, or a part of them on where a first reward model's flow leads?

    python -m benchmarks.labels --e2e-models DIR --e2e-data DIR

Models, prompts and cells of `benchmarks.ablations --field`. *Along the flow* are the reward models of the demonstration and of
benchmarks/e2e_nlg.py, trained in two rounds (vgf_llm/evaluation/labels.py); *as given* three others on as many comparisons, from
the same start, none of them of moved texts. Nothing else differs.

Writes benchmarks/results/labels.json and docs/img/labels.png; what was measured is kept in `--work`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
import transformers
from matplotlib.ticker import FuncFormatter

from benchmarks import e2e_nlg
from benchmarks.ablations import with_field
from benchmarks.cells import (
    BLUE,
    CONFIRMING_POOL,
    CONFIRMING_PROMPTS,
    CONFIRMING_SEEDS,
    ROOT,
    VERMILION,
    Cells,
    N,
    World,
    e2e_world,
    embedded_worlds,
    environment,
    new_figure,
    over_reference,
    save_figure,
    shared_legend,
    summarise,
)
from benchmarks.diagnose import E2E_HELD_OUT, newest
from vgf_llm.data.e2e import format_prompt, load_e2e, split_by_mr, spoken_order
from vgf_llm.evaluation.demo import SCALES
from vgf_llm.evaluation.labels import Labels, train_members
from vgf_llm.evaluation.report import write_report
from vgf_llm.evaluation.world import content_labels, tone_labels


DRAWN = with_field()["field"]["learned, 2 x 8, 1 nat"]
VARIANTS = {
    **{f"{nats:g} nat{'' if nats == 1 else 's'}": replace(DRAWN, kl_budget=nats) for nats in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)},
    "1 nat, random direction": replace(DRAWN, random=True),
    "automatic": replace(DRAWN, kl_budget=2.0, generations=16.0),
}
NAMES = {"tone": "tone", "content": "content and order", "e2e": "E2E"}


@dataclass(frozen=True)
class Task:
    """A task with the reward models that it is measured with elsewhere; `labels` are as many in one round."""

    world: World
    labels: Labels

    def given(self, members: int = 3) -> World:
        """The task with reward models on labels as given."""
        name = f"{self.world.name}_given"
        return replace(
            self.world,
            name=name,
            rewards=train_members(self.world.work / name, self.world.name, self.world.base, self.labels, members, "given", print),
            fitted=None,
        )


def measured(given: Cells, moved: Cells) -> list[dict]:
    """Rows of both; those along the flow are compared with the same budget as given, paired by prompt."""
    rows = []
    for cells in (given, moved):
        found, _ = summarise(cells, {"labels": VARIANTS}, DRAWN)
        for name, variant in VARIANTS.items():
            row = next(r for r in found if r["method"] == f"labels: {name}")
            cell, reference = cells.of(variant), given.of(variant)
            assert cell is not None and reference is not None
            row |= over_reference(cell[str(variant.rounds)], reference[str(variant.rounds)])
        rows += found
    return rows


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Gold against the budget with both kinds of labels, beside best-of-16 with the same reward models."""
    tasks = [task for task in NAMES if any(r["task"] == task for r in rows)]
    figure, axes = new_figure(4.6 * len(tasks), 3.4, 1, len(tasks), "What labels of moved texts are worth")
    for ax, task in zip(axes.flat, tasks, strict=True):
        for kind, label, colour in (("_given", "labels as given", VERMILION), ("", "some of them along the flow", BLUE)):
            of_kind = [r for r in rows if r["task"] == task + kind]
            points = [r for r in of_kind if r["method"].startswith("labels: ") and r["method"].endswith(("nat", "nats"))]
            nats = [r["setting"]["kl_budget"] for r in points]
            gold, low, high = ([r[f"reward_gold{end}"] for r in points] for end in ("", "_low", "_high"))
            ax.plot(nats, gold, marker="o", color=colour, label=f"VGF, 16 completions, {label}")
            ax.fill_between(nats, low, high, color=colour, alpha=0.15, linewidth=0)
            best = next(r for r in of_kind if r["method"] == "best_of_n" and r["num_particles"] == 16)
            ax.axhline(best["reward_gold"], color=colour, linestyle=":", label=f"best-of-16, {label}")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set(title=NAMES[task], xlabel="budget, nats", ylabel="gold reward")
        ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 2)
    save_figure(figure, path)


def asked_for(description: str) -> tuple[list[Task], Callable[[World], Cells]]:
    """From the command line: the tasks, and where cells of a task are kept."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", type=Path, help="models of the demonstration; default: outputs/full/models")
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py; default: none, and no E2E")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument(
        "--work",
        default=ROOT / "outputs" / "ablations" / "field",
        type=Path,
        help="where cells are kept; another one for other models",
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    seeds, s = list(CONFIRMING_SEEDS), SCALES["full"].settings
    one_round = replace(
        s, content_edits=s.content_edits + s.content_moved, content_moved=0, tone_pairs=s.tone_pairs + s.tone_moved, tone_moved=0
    )
    tasks = []
    for world in embedded_worlds(args.models, False, CONFIRMING_PROMPTS, args.work):
        trunk = newest(world.base.parent, "reward-trunk")
        of = tone_labels(one_round, world.base) if world.name == "tone" else content_labels(one_round, world.base, trunk)
        tasks.append(Task(world, of))
    if args.e2e_models:
        # 24 for each of four seeds are all that is held out.
        e2e = e2e_world(args.e2e_models, args.e2e_data, min(CONFIRMING_PROMPTS, 24), seeds, args.work)
        examples, _ = split_by_mr(load_e2e(args.e2e_data), seed=0, held_out=E2E_HELD_OUT)
        prompts = [format_prompt(spoken_order(e.slots, e.reference)) for e in examples]
        trunk = newest(args.e2e_models, "reward-trunk")
        tasks.append(Task(e2e, e2e_nlg.labels(e2e.base, trunk, prompts, e2e_nlg.PAIRS, 0)))
    return tasks, lambda world: Cells(world, seeds, CONFIRMING_POOL, args.work)


def publish(rows: list[dict], name: str, plot: Callable[[Sequence[Mapping], Path], None]) -> None:
    """Report and figure of this benchmark or of benchmarks/ensembles.py."""
    settings = {"prompts": CONFIRMING_PROMPTS, "seeds": list(CONFIRMING_SEEDS), "pool": CONFIRMING_POOL, "num_particles": N}
    write_report(ROOT / "benchmarks" / "results" / f"{name}.json", {"rows": rows, "settings": settings, **environment()})
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        plot(rows, ROOT / "docs" / "img" / f"{name}.png")


def main() -> None:
    tasks, cells = asked_for(__doc__.splitlines()[0])
    publish([r for task in tasks for r in measured(cells(task.given()), cells(task.world))], "labels", plot)


if __name__ == "__main__":
    main()
