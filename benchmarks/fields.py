"""How many completions a gradient field wants: what it agrees with on held-out prompts, and what fitting it costs.

    python -m benchmarks.fields --models DIR --e2e-models DIR --e2e-data DIR

Tasks and models are those of `benchmarks.ablations --field`, and so is the largest field. The others are fitted to the first of
its prompts, at the defaults of `fit_field`. No label takes part. One fit each; what was fitted is kept in `--work`.

Writes benchmarks/results/fields.json and docs/img/fields.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
import transformers
from matplotlib.ticker import FuncFormatter

from benchmarks.cells import (
    BLUE,
    CONFIRMING_PROMPTS,
    CONFIRMING_SEEDS,
    FIELD_PROMPTS,
    GREEN,
    ROOT,
    VERMILION,
    Variant,
    World,
    e2e_world,
    embedded_worlds,
    environment,
    new_figure,
    save_figure,
)
from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.evaluation.world import FIELD_SEED
from vgf_llm.text.field import fit_field


# Prompts, completions of each: more prompts, and as many completions of more prompts.
SIZES = ((250, 8), (500, 8), (1_000, 8), (2_000, 4), (FIELD_PROMPTS, 8))
STYLES = {"tone": ("tone", BLUE), "content": ("content and order", VERMILION), "e2e": ("E2E", GREEN)}


def measured(world: World, prompts: int, samples: int, work: Path) -> dict:
    """Held-out correlation of one fit, and the seconds it took on one core."""
    kept = work / f"{world.name}-{prompts}x{samples}.json"
    if not kept.is_file():
        sampler = world.sampler(Variant())
        if (prompts, samples) == (FIELD_PROMPTS, 8):
            field = world.field(sampler)
            seconds = json.loads((world.field_at() / "seconds.json").read_text())
        else:
            begun = time.process_time()
            field = fit_field(
                sampler, world.seen()[:prompts], num_samples=samples, max_completion_length=world.length, seed=FIELD_SEED
            )
            seconds = time.process_time() - begun
        row = {
            "task": world.name, "prompts": prompts, "num_samples": samples, "correlation": float(field.correlation),
            "seconds": seconds,
        }  # fmt: skip
        write_atomically(kept, json.dumps(row).encode())
        print(row, flush=True)
    return json.loads(kept.read_bytes())


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Correlation against completions, one line per task; four of each prompt stand apart."""
    figure, axes = new_figure(6.4, 4.2, 1, 1, "What a gradient field has learned")
    ax = axes[0][0]
    for task, (label, colour) in STYLES.items():
        here = [r for r in rows if r["task"] == task]
        if not here:
            continue
        eight = [r for r in here if r["num_samples"] == 8]
        ax.plot([8 * r["prompts"] for r in eight], [r["correlation"] for r in eight], "o-", color=colour, label=label)
        four = [r for r in here if r["num_samples"] == 4]
        ax.plot([4 * r["prompts"] for r in four], [r["correlation"] for r in four], "x", color=colour, markersize=8)
    ax.plot([], [], "x", color="#777777", markersize=8, label="4 of each prompt instead of 8")
    ax.set_xscale("log", base=2)
    ticks = [prompts * samples for prompts, samples in SIZES if samples == 8]
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.set(xlabel="completions it was fitted to", ylabel="correlation with the reward, held-out prompts", ylim=(0, 1))
    ax.grid(color="#E4E4E4")
    ax.legend(frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="models of the demonstration; default: outputs/full/models")
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py; default: none, and no E2E")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument("--work", default=ROOT / "outputs" / "fields", type=Path, help="where fits are kept")
    parser.add_argument(
        "--cells", default=ROOT / "outputs" / "ablations" / "field", type=Path, help="where those of the ablations are kept"
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    worlds = embedded_worlds(args.models, False, CONFIRMING_PROMPTS, args.cells)
    if args.e2e_models:
        worlds.append(e2e_world(args.e2e_models, args.e2e_data, 24, list(CONFIRMING_SEEDS), args.cells))
    rows = [measured(world, *size, args.work) for world in worlds for size in SIZES]
    write_report(ROOT / "benchmarks" / "results" / "fields.json", {"rows": rows, **environment()})
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        plot(rows, ROOT / "docs" / "img" / "fields.png")


if __name__ == "__main__":
    main()
