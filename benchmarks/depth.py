"""How many layers of its own a gradient field wants where the base model has eight: what it learns, and gold along it.

    python -m benchmarks.depth --models DIR

Content and order, the task on which a field with fewer layers learns less (benchmarks/layers.py). The base model is trained
here by the recipe of the demonstration at full scale, but with eight layers for three; reward models are those of `--models`,
prompts and cells those of benchmarks/labels.py. Fields are fitted to 4,000 completions of 500 prompts.

Writes benchmarks/results/depth.json; models and what was measured are kept in `--work`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from benchmarks.cells import (
    CONFIRMING_POOL,
    CONFIRMING_PROMPTS,
    CONFIRMING_SEEDS,
    ROOT,
    Cells,
    N,
    embedded_worlds,
    environment,
)
from benchmarks.labels import VARIANTS
from benchmarks.layers import measured
from vgf_llm.evaluation.demo import SCALES
from vgf_llm.evaluation.report import write_report
from vgf_llm.evaluation.world import base_model


DEPTH = 8
LAYERS = {"1 of 8": 1, "2 of 8": 2, "4 of 8": 4, "the reward model's": 0}
ALONG = {
    f"{name}, {budget}": replace(VARIANTS[budget], layers=layers)
    for budget in ("1 nat", "4 nats")
    for name, layers in LAYERS.items()
} | {"1 of 8, 1 nat, random direction": replace(VARIANTS["1 nat, random direction"], layers=1)}
FIELD_PROMPTS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="models of the demonstration; default: outputs/full/models")
    parser.add_argument("--work", default=ROOT / "outputs" / "depth", type=Path, help="where models and cells are kept")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    seeds = list(CONFIRMING_SEEDS)
    world = next(w for w in embedded_worlds(args.models, False, CONFIRMING_PROMPTS, args.work) if w.name == "content")
    base, seen = base_model(args.work, replace(SCALES["full"].settings, layers=DEPTH), print), world.seen()[:FIELD_PROMPTS]
    cells = Cells(replace(world, base=base, seen=lambda: seen, fitted=None), seeds, CONFIRMING_POOL, args.work)
    rows = measured(cells, ALONG, reference=1)
    write_report(
        ROOT / "benchmarks" / "results" / "depth.json",
        {
            "rows": rows,
            "settings": {
                "prompts": CONFIRMING_PROMPTS, "seeds": seeds, "pool": CONFIRMING_POOL, "num_particles": N, "depth": DEPTH,
                "field_prompts": FIELD_PROMPTS,
            },
            **environment(),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
