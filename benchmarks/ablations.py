"""What the defaults of text sampling are worth: gradient, decoder, rounds, coupling, ensemble, each against its alternatives.

    python -m benchmarks.ablations                                     models of `vgf demo --scale full`, trained if missing
    python -m benchmarks.ablations --e2e-models DIR --e2e-data DIR     also those of benchmarks/e2e_nlg.py
    python -m benchmarks.ablations --confirm                           where to take the gradient, on 128 other prompts a task
    python -m benchmarks.ablations --field                             a learned gradient field beside the reward's own, on these
    python -m benchmarks.ablations --quick                             shows that everything runs, and measures nothing

Every variant differs from one reference (`Variant`) in what its name says, and meets the same prompts with the same initial
particles; none was tuned. Best-of-n for every n up to 256 comes from one pool of samples. Moves that the library does not have
are in benchmarks/moves.py. Every cell is kept in `--work`, so that a cut run goes on.

Writes benchmarks/results/ablations.json and docs/img/ablations*.png; with `--confirm`
and `--field`, ablations_confirmed.json and ablations_field.json alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from matplotlib.axes import Axes

from benchmarks.cells import (
    BLUE,
    CONFIRMING_POOL,
    CONFIRMING_PROMPTS,
    CONFIRMING_SEEDS,
    GREEN,
    GREY,
    ONCE,
    PURPLE,
    REFERENCE,
    ROOT,
    VERMILION,
    Cells,
    Groups,
    N,
    Variant,
    e2e_world,
    embedded_worlds,
    environment,
    new_figure,
    save_figure,
    shared_legend,
    summarise,
)
from vgf_llm.evaluation.report import write_report


RECORDED = (1, 2, 4, 7, 12)


def shortened(groups: Groups) -> Groups:
    """The same with at most two rounds, and fewer variants."""
    return {
        group: {
            name: replace(v, rounds=min(v.rounds, 2), record=tuple(r for r in v.record if r <= 2))
            for name, v in of_group.items()
            if v.kl_budget in (2.0, 32.0)
        }
        for group, of_group in groups.items()
    }


def variants() -> dict[str, dict[str, Variant]]:
    """Groups of variants to be compared, by what a reader calls them."""
    crowd = replace(REFERENCE, movers=N, rounds=1)
    edits = {
        "edits by chance": Variant(move="edit_random"),
        "edits by gradient": Variant(move="edit_gradient"),
        "Metropolis-Hastings, gradient, 2 rounds": Variant(move="edit_gradient", accept="metropolis", rounds=2, movers=N),
        "Metropolis-Hastings, chance, 2 rounds": Variant(move="edit_random", accept="metropolis", rounds=2, movers=N),
    }
    grid = {
        f"{rounds} x {movers}, L = {steps}, {kl:g} nat{'' if kl == 1 else 's'}": replace(
            REFERENCE, rounds=rounds, movers=movers, steps=steps, kl_budget=kl
        )
        for rounds, movers, steps in ((1, 8, 1), (3, 4, 1), (7, 2, 1), (7, 2, 3))
        for kl in ((1.0, 2.0, 4.0) if steps == 1 else (2.0, 4.0))
    }
    far = {
        f"w = {weight:g}, {kl:g} nats / {members or 'all'}": replace(
            REFERENCE, move="embeddings", members=members, likelihood_weight=weight, kl_budget=kl, rounds=RECORDED[-1],
            record=RECORDED,
        )
        for members in (0, 1)
        for weight, kl in ((0.02, 2.0), (0.02, 32.0), (0.0, 32.0))
    }  # fmt: skip
    return {
        "space": {
            "path": REFERENCE,
            "token": replace(REFERENCE, gradient_at="token"),
            "mixture": replace(REFERENCE, gradient_at="mixture"),
            "hidden states": replace(REFERENCE, move="hidden"),
            "path, one decode": ONCE,
            "token, one decode": replace(ONCE, gradient_at="token"),
            "hidden states, one decode": replace(ONCE, move="hidden"),
            "random, one decode": replace(ONCE, random=True),
        },
        "decoder": {
            "coupled": REFERENCE,
            "coupled, horizon 0": replace(REFERENCE, horizon=0),
            "coupled, no horizon": replace(REFERENCE, horizon=None),
            "coupled, random direction": replace(REFERENCE, random=True),
            **edits,
            "nearest token, step 4": replace(REFERENCE, move="nearest", step_size=4.0),
            "nearest token, one decode": replace(ONCE, move="nearest"),
            "nearest token, step 4, one decode": replace(ONCE, move="nearest", step_size=4.0),
        },
        "rounds": grid,
        "coupling": {
            "none, 1 nat": replace(crowd, kl_budget=1.0),
            "none, 2 nats": crowd,
            "none, 4 nats": replace(crowd, kl_budget=4.0),
            "pooled repulsion 0.5, 2 nats": replace(crowd, repulsion=0.5),
            "pooled repulsion 2, 2 nats": replace(crowd, repulsion=2.0),
            "SVGD on positions, 2 nats": replace(crowd, coupling="svgd"),
        },
        "far": far,
    }


# What `variants` suggested, on prompts that had no part in it.
def confirming() -> Groups:
    """Where the gradient is taken, with one step and with several."""
    places = {
        "path": {},
        "mixture": {"gradient_at": "mixture"},
        "hidden states": {"move": "hidden"},
    }
    return {
        "confirmed": {
            f"{name}, L = {steps}, {kl:g} nats": replace(REFERENCE, steps=steps, kl_budget=kl, **place)  # type: ignore[arg-type]
            for name, place in places.items()
            for steps, kl in ((1, 2.0), (1, 4.0), (3, 4.0))
        }
    }


def with_field() -> Groups:
    """A learned gradient, along which particles are drawn, beside rounds of the reward's own: one setting for all tasks."""
    own = replace(REFERENCE, horizon=None, gradient_at="mixture")
    drawn = replace(own, gradient_at="field", rounds=2, movers=N)
    return {
        "field": {
            **{
                f"learned, 2 x 8, {kl:g} nat{'' if kl == 1 else 's'}": replace(drawn, kl_budget=kl)
                for kl in (0.5, 1.0, 2.0, 4.0, 8.0)
            },
            "learned, 2 x 8, 1 nat, random direction": replace(drawn, kl_budget=1.0, random=True),
            "learned, automatic": replace(drawn, generations=16.0),
            "own, 7 x 2, 2 nats": own,
            "own, 7 x 2, 4 nats": replace(own, kl_budget=4.0),
            "own, 7 x 2, L = 3, 4 nats": replace(own, kl_budget=4.0, steps=3),
            "own, 7 x 2, 2 nats, random direction": replace(own, random=True),
            "own, automatic": replace(own, generations=16.0),
        }
    }


E2E = {
    "space": ("path", "token", "mixture", "hidden states"),
    "decoder": ("coupled", "coupled, no horizon", "coupled, random direction", "edits by chance", "edits by gradient"),
}


def _bars(value: float, low: float, high: float) -> list[list[float]]:
    """Lengths of an error bar; an interval of few prompts need not hold its mean."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def plot_differences(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gold above best-of-n at equal generations, one line per variant, one column per task."""
    groups = ("space", "decoder")
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    there = {r["method"] for r in rows}
    names = [f"{group}: {name}" for group in groups for name in variants()[group] if f"{group}: {name}" in there]
    figure, axes = new_figure(
        3.4 + 3.4 * len(tasks), 1.6 + 0.3 * len(names), 1, len(tasks), "Gold above best-of-n at equal generations, 95 % intervals"
    )
    for column, (ax, task) in enumerate(zip(axes[0], tasks, strict=True)):
        ax.axvline(0, color=BLUE, linewidth=1.2)
        for r in rows:
            if r["task"] != task or r["method"] not in names:
                continue
            value, low, high = (r[f"gold_over_best_of_n{end}"] for end in ("", "_low", "_high"))
            reference = r["method"] in ("space: path", "decoder: coupled")
            colour = VERMILION if reference else GREEN if r["verified"] else GREY
            y = names.index(r["method"])
            ax.errorbar(value, y, xerr=_bars(value, low, high), fmt="o", color=colour, capsize=2, markersize=5)
        ax.set(title=task, ylim=(len(names) - 0.5, -0.5), xlabel="gold reward")
        ax.set_yticks(range(len(names)), [name.replace(": ", ":  ") for name in names] if column == 0 else [""] * len(names))
        ax.grid(axis="x", color="#E4E4E4")
    for colour, label in ((VERMILION, "reference"), (GREEN, "verified variant"), (GREY, "one decode, not verified")):
        axes[0][0].plot([], [], "o", color=colour, label=label)
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def plot_rounds(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gold against generations: best-of-n up to the size of the pool, and the grid of rounds, movers and steps."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["method"].startswith("rounds")))
    figure, axes = new_figure(
        5.4 * len(tasks), 4.8, 1, len(tasks), "Rounds x movers and flow steps L, each at 1, 2 and 4 nats (L = 3: 2 and 4)"
    )
    styles = {
        (1, 8, 1): (GREY, "s"),
        (3, 4, 1): (GREEN, "^"),
        (7, 2, 1): (PURPLE, "D"),
        (7, 2, 3): (VERMILION, "o"),
    }
    for ax, task in zip(axes[0], tasks, strict=True):
        _best_of_n(ax, [r for r in rows if r["task"] == task], "generations")
        for (rounds, movers, steps), (colour, marker) in styles.items():
            name = f"rounds: {rounds} x {movers}, L = {steps},"
            series = sorted(
                (r for r in rows if r["task"] == task and r["method"].startswith(name)), key=lambda r: r["generations"]
            )
            for index, r in enumerate(series):
                edges = _bars(r["reward_gold"], r["reward_gold_low"], r["reward_gold_high"])
                ax.errorbar(
                    r["generations"], r["reward_gold"], yerr=edges, fmt=marker, color=colour, markersize=6, elinewidth=0.8,
                    label=f"{rounds} x {movers}, L = {steps}" if index == 0 else None,
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        ticks = sorted({r["num_particles"] for r in rows if r["task"] == task and r["method"] == "best_of_n"})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set(title=task, xlabel="generations per prompt", ylabel="gold reward")
        ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def _best_of_n(ax: Axes, rows: Sequence[Mapping[str, Any]], x: str, several: bool = True) -> None:
    most = max(r["members"] for r in rows)
    curve = [r for r in rows if r["method"] == "best_of_n" and (r["members"] == most) == several]
    xs, gold = [r[x] for r in curve], [r["reward_gold"] for r in curve]
    if not curve:
        return
    said = f"best-of-n (n up to {curve[-1]['num_particles']})"
    low, high = ([r[f"reward_gold_{end}"] for r in curve] for end in ("low", "high"))
    ax.fill_between(xs, low, high, color=BLUE, alpha=0.15, linewidth=0)
    ax.plot(xs, gold, "o-", color=BLUE, markersize=4, label=said)


def plot_far(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gold against the proxy that was optimised, round after round, with all reward models above and with one below."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["method"].startswith("far")))
    most = max(r["members"] for r in rows)
    figure, axes = new_figure(5.4 * len(tasks), 7.6, 2, len(tasks), "Over-optimisation: gold against proxy, 1 to 12 rounds")
    styles = {(0.02, 2.0): (VERMILION, "o"), (0.02, 32.0): (GREEN, "D"), (0.0, 32.0): (GREY, "x")}
    for column, task in enumerate(tasks):
        for line, members in enumerate((most, 1)):
            ax = axes[line][column]
            here = [r for r in rows if r["task"] == task]
            _best_of_n(ax, here, "reward_proxy", several=members == most)
            for (weight, kl), (colour, marker) in styles.items():
                series = [
                    r
                    for r in here
                    if r["method"].startswith("far") and r["members"] == members
                    and (r["setting"]["likelihood_weight"], r["setting"]["kl_budget"]) == (weight, kl)
                ]  # fmt: skip
                label = f"VGF, likelihood_weight {weight:g}, {kl:g} nats"
                xs, ys = [r["reward_proxy"] for r in series], [r["reward_gold"] for r in series]
                ax.plot(xs, ys, marker=marker, color=colour, markersize=5, linewidth=1.2, label=label)
            ax.set_title(f"{task}, {members} reward model{'' if members == 1 else 's'}", fontsize=11)
            ax.set(xlabel="proxy reward", ylabel="gold reward")
            ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def plot_coupling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean gold of all particles against how much they repeat each other."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["method"].startswith("coupling")))
    figure, axes = new_figure(5.4 * len(tasks), 4.6, 1, len(tasks), "Coupling: gold of all particles against their diversity")
    styles = {
        "none": (VERMILION, "o-"),
        "pooled repulsion 0.5": (GREEN, "D"),
        "pooled repulsion 2": (PURPLE, "s"),
        "SVGD on positions": (GREY, "x"),
    }
    for ax, task in zip(axes[0], tasks, strict=True):
        for name, (colour, marker) in styles.items():
            series = [r for r in rows if r["task"] == task and r["method"].startswith(f"coupling: {name},")]
            ax.plot(
                [r["self_bleu_of_all"] for r in series], [r["gold_of_all"] for r in series], marker, color=colour, markersize=7,
                label="none, at 1, 2 and 4 nats" if name == "none" else name,
            )  # fmt: skip
            for r in series:
                nats = r["setting"]["kl_budget"]
                ax.annotate(
                    f"{nats:g}", (r["self_bleu_of_all"], r["gold_of_all"]), xytext=(6, 4), textcoords="offset points", fontsize=8
                )
        ax.set(
            title=task, xlabel="self-BLEU of a prompt's particles (less is more diverse)", ylabel="gold, mean of all particles"
        )
        ax.margins(0.12)
        ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 4)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", type=Path, help="models of the demonstration; default: outputs/full/models, trained if missing"
    )
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument("--prompts", default=16, type=int, help="held-out prompts per seed; at most 10 of E2E")
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    parser.add_argument("--pool", default=256, type=int, help="samples per prompt for best-of-n")
    parser.add_argument(
        "--work", type=Path, help="where cells are kept, another one for other models; default: a directory of outputs/ablations"
    )
    parser.add_argument("--publish", action="store_true", help="measure nothing more; what is absent is named in the report")
    parser.add_argument("--confirm", action="store_true", help="where to take the gradient, on prompts of other seeds")
    parser.add_argument("--field", action="store_true", help="a learned gradient field, on the prompts of --confirm")
    parser.add_argument("--quick", action="store_true", help="one task, tiny models, few prompts; writes to --work only")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.quick:
        args.prompts, args.seeds, args.pool = 2, [0], 16
    elif args.confirm or args.field:
        args.prompts, args.seeds = CONFIRMING_PROMPTS, list(CONFIRMING_SEEDS)
        args.pool = CONFIRMING_POOL if args.confirm else args.pool
    other = "confirmed" if args.confirm else "field" if args.field else None
    kind = "quick" if args.quick else other or f"{args.prompts}x{len(args.seeds)}"
    work = args.work or ROOT / "outputs" / "ablations" / kind
    results, images = (work, work) if args.quick else (ROOT / "benchmarks" / "results", ROOT / "docs" / "img")

    groups: Groups = confirming() if args.confirm else with_field() if args.field else variants()
    if args.quick:
        groups = shortened(groups)
    tasks = [
        (Cells(world, args.seeds, args.pool, work, not args.publish), groups)
        for world in embedded_worlds(args.models, args.quick, args.prompts, work)
        if world.name == "content" or not args.quick
    ]
    if args.e2e_models:
        # 24 for each of four seeds are all that is held out.
        world = e2e_world(args.e2e_models, args.e2e_data, min(args.prompts, 24 if other else 10), args.seeds, work)
        some = groups if other else {group: {name: groups[group][name] for name in names} for group, names in E2E.items()}
        tasks.append((Cells(world, args.seeds, args.pool if other else min(args.pool, 64), work, not args.publish), some))
    rows, absent = [], []
    against = groups["field"]["own, 7 x 2, 2 nats"] if args.field and not args.quick else REFERENCE
    for cells, of_task in tasks:
        found, missing = summarise(cells, of_task, against)
        rows, absent = rows + found, absent + missing
    spent = sum(cells.pool(0)["seconds"] for cells, _ in tasks if cells.pool(0))
    spent += sum({str(r["setting"]) + r["task"]: r["cpu_seconds"] for r in rows if "setting" in r}.values())
    write_report(
        results / (f"ablations_{other}.json" if other else "ablations.json"),
        {
            "rows": rows,
            "reference": asdict(against),
            "settings": {"prompts": args.prompts, "seeds": args.seeds, "pool": args.pool, "num_particles": N},
            "not_measured": absent,
            "forecasts": {cells.world.name: cells.forecasts() for cells, _ in tasks} if args.field and not args.quick else None,
            "field_seconds": {
                cells.world.name: json.loads(kept.read_text())
                for cells, _ in tasks
                if (kept := cells.world.field_at() / "seconds.json").is_file()
            },
            "cpu_seconds": spent,
            **environment(),
        },
    )
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        for group, plot, name in (
            ("space", plot_differences, "ablations"),
            ("rounds", plot_rounds, "ablations_rounds"),
            ("far", plot_far, "ablations_overoptimisation"),
            ("coupling", plot_coupling, "ablations_coupling"),
        ):
            if any(r["method"].startswith(f"{group}:") for r in rows):
                plot(rows, images / f"{name}.png")


if __name__ == "__main__":
    main()
