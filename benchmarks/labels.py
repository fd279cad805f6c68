"""Where labels should be spent: on what the base model says, or half of them on where a first reward model's flow leads?

    python -m benchmarks.labels --e2e-models DIR --e2e-data DIR

The tasks that over-optimise, content and E2E, with the models, prompts and cells of `benchmarks.ablations --field`. *As given*:
the reward models of the demonstration and of benchmarks/e2e_nlg.py. *Along the flow*: three others on as many comparisons, of
which a third (content) or a half (E2E) are of texts drawn along a gradient field (`moved_pairs`). That field is of reward models
on the remaining comparisons alone; what is used was trained on all, from the same start. Nothing else differs.

Writes benchmarks/results/labels.json and docs/img/labels.png; what was measured is kept in `--work`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import matplotlib
import torch
import transformers
from matplotlib.ticker import FuncFormatter

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
from benchmarks.e2e_nlg import CONTEXT as E2E_CONTEXT
from benchmarks.e2e_nlg import MAX_COMPLETION as E2E_LENGTH
from benchmarks.e2e_nlg import gold as e2e_gold
from vgf_llm.data import reviews
from vgf_llm.data.e2e import PROMPT_SEPARATOR, format_prompt, load_e2e, split_by_mr, spoken_order
from vgf_llm.evaluation.demo import MAX_COMPLETION, SCALES
from vgf_llm.evaluation.preferences import Pair, moved_pairs, preference_pairs
from vgf_llm.evaluation.report import write_report
from vgf_llm.evaluation.training import train_reward_model


MEMBERS = 3
DRAWN = with_field()["field"]["learned, 2 x 8, 1 nat"]
VARIANTS = {
    **{f"{nats:g} nat{'' if nats == 1 else 's'}": replace(DRAWN, kl_budget=nats) for nats in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)},
    "1 nat, random direction": replace(DRAWN, random=True),
    "automatic": replace(DRAWN, kl_budget=2.0, generations=16.0),
}
NAMES = {"content": "content and order", "e2e": "E2E"}


@dataclass(frozen=True)
class Labels:
    """Where the comparisons of one task come from.

    Attributes:
        plain: member -> those of texts that no reward model had a part in.
        prompts: member -> what the moved texts are written to.
        count: moved pairs, as many as were left out of the plain ones.
        noise: of the labels, in units of gold.
        train: directory, pairs, member -> a reward model there.
    """

    plain: Callable[[int], list[Pair]]
    prompts: Callable[[int], Sequence[str]]
    count: int
    noise: float
    train: Callable[[Path, list[Pair], int], None]


def along_the_flow(world: World, labels: Labels) -> World:
    """The task with reward models that have seen where the flow of reward models on the plain labels alone leads."""
    plain = cache(labels.plain)
    first = [
        trained(world.work / f"{world.name}_first" / f"reward-{k}", lambda at, k=k: labels.train(at, plain(k), k))
        for k in range(MEMBERS)
    ]
    sampler = replace(world, name=f"{world.name}_first", rewards=first).sampler(DRAWN)

    def train(at: Path, member: int) -> None:
        moved = moved_pairs(
            sampler, labels.prompts(member), world.gold, count=labels.count, noise=labels.noise,
            max_completion_length=world.length, seed=member,
        )  # fmt: skip
        pairs = plain(member) + moved
        random.Random(member).shuffle(pairs)
        labels.train(at, pairs, member)

    name = f"{world.name}_moved"
    return replace(
        world,
        name=name,
        rewards=[trained(world.work / name / f"reward-{k}", lambda at, k=k: train(at, k)) for k in range(MEMBERS)],
    )


def trained(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made if it is not there; what was cut off is made again."""
    if not path.is_dir():
        print(f"training {path.parent.name}/{path.name}", flush=True)
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        make(part)
        os.replace(part, path)
    return path


def content_labels(world: World, plain_edits: int) -> Labels:
    """As evaluation/world.py makes those of the demonstration, with so many of the edits plain."""
    s = SCALES["full"].settings
    trunk = newest(world.base.parent, "reward-trunk")

    def seed(member: int) -> int:
        return s.seed * 1000 + member + 1

    def prompts(member: int) -> list[str]:
        return reviews.generate_prompts(1_000, 20_000 + seed(member), "content")

    def plain(member: int) -> list[Pair]:
        given = reviews.generate_preferences(s.content_pairs, seed(member), "content", s.content_noise)
        edits = preference_pairs(
            world.base, prompts(member), world.gold, samples=0, edits=plain_edits, noise=s.content_noise,
            max_completion_length=MAX_COMPLETION, seed=seed(member),
        )  # fmt: skip
        pairs = [(p.prompt, p.chosen, p.rejected) for p in given] + edits
        random.Random(seed(member)).shuffle(pairs)
        return pairs

    def train(at: Path, pairs: list[Pair], member: int) -> None:
        train_reward_model(
            at, trunk, pairs, learning_rate=s.reward_learning_rate, seed=seed(member), name=at.parent.name, max_length=128,
            mixtures=(world.base, ":"),
        )  # fmt: skip

    return Labels(plain, prompts, s.content_edits - plain_edits, s.content_noise, train)


def e2e_labels(world: World, data: Path, count: int) -> Labels:
    """As benchmarks/e2e_nlg.py makes its own, with half of the samples and of the edits."""
    examples, _ = split_by_mr(load_e2e(data), seed=0, held_out=E2E_HELD_OUT)
    asked = [format_prompt(spoken_order(e.slots, e.reference)) for e in examples]

    def plain(member: int) -> list[Pair]:
        return preference_pairs(
            world.base, asked, e2e_gold, samples=count // 4, edits=count // 4, noise=0.5, max_completion_length=E2E_LENGTH,
            seed=member,
        )  # fmt: skip

    def train(at: Path, pairs: list[Pair], member: int) -> None:
        train_reward_model(
            at, world.base, pairs, learning_rate=5e-4, seed=member, name=at.parent.name, max_length=E2E_CONTEXT,
            mixtures=(world.base, PROMPT_SEPARATOR),
        )  # fmt: skip

    return Labels(plain, lambda member: asked, count // 2, 0.5, train)


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
        for kind, label, colour in (("", "labels as given", VERMILION), ("_moved", "some of them along the flow", BLUE)):
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


def over_optimised(
    description: str, plain_edits: int = SCALES["full"].settings.content_edits // 2, e2e_pairs: int = 4_000
) -> tuple[list[tuple[World, Labels]], Callable[[World], Cells]]:
    """From the command line: the tasks with their labels, and where cells of a task are kept."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", type=Path, help="models of the demonstration; default: outputs/full/models")
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py; default: none, and no E2E")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument("--work", default=ROOT / "outputs" / "ablations" / "field", type=Path, help="where cells are kept")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    seeds = list(CONFIRMING_SEEDS)
    content = next(w for w in embedded_worlds(args.models, False, CONFIRMING_PROMPTS, args.work) if w.name == "content")
    tasks = [(content, content_labels(content, plain_edits))]
    if args.e2e_models:
        # 24 for each of four seeds are all that is held out.
        e2e = e2e_world(args.e2e_models, args.e2e_data, min(CONFIRMING_PROMPTS, 24), seeds, args.work)
        tasks.append((e2e, e2e_labels(e2e, args.e2e_data, e2e_pairs)))
    return tasks, lambda world: Cells(world, seeds, CONFIRMING_POOL, args.work)


def publish(rows: list[dict], name: str, plot: Callable[[Sequence[Mapping], Path], None]) -> None:
    """Report and figure of this benchmark or of benchmarks/ensembles.py."""
    settings = {"prompts": CONFIRMING_PROMPTS, "seeds": list(CONFIRMING_SEEDS), "pool": CONFIRMING_POOL, "num_particles": N}
    write_report(ROOT / "benchmarks" / "results" / f"{name}.json", {"rows": rows, "settings": settings, **environment()})
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        plot(rows, ROOT / "docs" / "img" / f"{name}.png")


def main() -> None:
    tasks, cells = over_optimised(__doc__.splitlines()[0])
    publish([r for w, labels in tasks for r in measured(cells(w), cells(along_the_flow(w, labels)))], "labels", plot)


if __name__ == "__main__":
    main()
