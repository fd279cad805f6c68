"""What reward training does to the gradient: edits of the model's own texts among the comparisons, embeddings between tokens.

    python -m benchmarks.reward_training

Content task of the embedded data. From one base model and one reward model trained on minimal pairs, four recipes are
continued for the same number of comparisons: more minimal pairs, a share of edits instead, mixed embeddings, and both. Each
is trained three times on other comparisons. Reported per recipe: best-of-n on one pool of samples, how well gradient and
reward model foresee what one other token does (`vgf_llm.evaluation.fidelity`), and what edits proposed by the gradient and
by chance earn.

Writes benchmarks/results/reward_training.json and .md.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from vgf_llm.data import reviews
from vgf_llm.evaluation.controls import random_direction
from vgf_llm.evaluation.fidelity import substitution_fidelity
from vgf_llm.evaluation.frontier import Task, draw_pool, rescored
from vgf_llm.evaluation.metrics import bootstrap_ci
from vgf_llm.evaluation.preferences import preference_pairs
from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.evaluation.training import artefact, ensemble, train_reward_model
from vgf_llm.evaluation.world import Settings, build_world, trunk_model
from vgf_llm.flow import TransportBudget, best_of_n_curve
from vgf_llm.text import VGFSampler


ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"minimal pairs": (False, False), "edits": (True, False), "mixtures": (False, True), "edits and mixtures": (True, True)}
NS = (1, 8, 16, 64)


def comparisons(settings: Settings, base: Path, edits: bool, seed: int) -> list[tuple[str, str, str]]:
    """`content_pairs + content_edits` comparisons, of which `content_edits` are edits or minimal pairs."""
    minimal = settings.content_pairs + (0 if edits else settings.content_edits)
    pairs = [
        (p.prompt, p.chosen, p.rejected)
        for p in reviews.generate_preferences(minimal, 1 + seed, "content", settings.content_noise)
    ]
    if edits:
        prompts = reviews.generate_prompts(1_000, 30_000 + seed, "content")
        pairs += preference_pairs(
            base, prompts, reviews.content_gold, samples=0, edits=settings.content_edits, noise=settings.content_noise,
            max_completion_length=64, seed=seed,
        )  # fmt: skip
    random.Random(seed).shuffle(pairs)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default=ROOT / "outputs" / "demo" / "models", type=Path, help="where trained models are kept")
    parser.add_argument("--prompts", default=48, type=int)
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    args = parser.parse_args()
    console, started, settings = Console(), time.perf_counter(), Settings()
    world = build_world(args.work, settings, console.log, tasks=["content"])
    trunk = trunk_model(args.work, settings, console.log)
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model, judge = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (world.base, world.judge))
    task = Task("content", reviews.content_gold, lambda seed: reviews.generate_prompts(args.prompts, seed, "content"), 64)

    def sampler(paths: list[Path]) -> VGFSampler:
        return VGFSampler(model, ensemble(paths, tokenizer), tokenizer, movers=2, flow_batch_size=512)

    pool = None
    rows = []
    for name, (edits, mixtures) in RECIPES.items():

        def train(out: Path, recipe: tuple[str, int], edits: bool = edits, mixtures: bool = mixtures) -> None:
            kind, seed = recipe
            pairs = comparisons(settings, world.base, edits, seed)
            train_reward_model(
                out, trunk, pairs, learning_rate=settings.reward_learning_rate,
                matrix_learning_rate=settings.content_matrix_learning_rate, seed=seed, name=f"{kind}, {seed}", max_length=128,
                mixtures=(world.base, ":") if mixtures else None,
            )  # fmt: skip

        members = [
            artefact(args.work, f"recipe-{name.replace(' ', '-')}-{seed}", (name, seed), train, console.log)
            for seed in args.seeds
        ]
        several = sampler(members)
        pool = draw_pool(task, several, judge, [7], 64) if pool is None else rescored(pool, task, several, [7])
        curve = best_of_n_curve(pool.proxy, pool.gold, NS).mean(0)
        single = [
            substitution_fidelity(sampler([m]), task.prompts(8), task.gold, max_completion_length=64, seed=8) for m in members
        ]
        row: dict[str, object] = {"recipe": name, **{f"best_of_{n}": float(c) for n, c in zip(NS, curve, strict=True)}}
        row |= {key: float(np.mean([s[key] for s in single])) for key in single[0]}
        for kind, direction in (("gradient", None), ("chance", random_direction)):
            out = several.sample(
                task.prompts(9),
                8,
                TransportBudget(steps=3, step_size=0.5, kl_budget=2.0, rounds=6),
                64,
                seed=9,
                direction=direction,
            )
            golds = np.array([task.gold(p, c) for p, c in zip(task.prompts(9), out.completions, strict=True)])
            row |= {
                f"edits_by_{kind}_gold": float(golds.mean()),
                f"edits_by_{kind}_interval": bootstrap_ci(golds),
                f"edits_by_{kind}_proxy": float(out.rewards.mean()),
                f"edits_by_{kind}_generations": float(out.generations.mean()),
            }
        rows.append(row)
        console.log(row)
    report = {"rows": rows, "seconds": time.perf_counter() - started, "prompts": args.prompts, "torch": torch.__version__}
    write_report(ROOT / "benchmarks" / "results" / "reward_training.json", report)
    write_atomically(ROOT / "benchmarks" / "results" / "reward_training.md", markdown(rows).encode())


def markdown(rows: list[dict]) -> str:
    """The rows that docs/method.md quotes, one column per recipe."""

    def several(*keys: str, digits: int = 2) -> Callable[[dict], str]:
        return lambda row: " / ".join(f"{row[key]:.{digits}f}" for key in keys)

    names = [
        ("best-of-8 / 16 / 64, gold", several("best_of_8", "best_of_16", "best_of_64")),
        ("gradient and proxy: at token / mixture / path", several("token_proxy", "mixture_proxy", "path_proxy")),
        ("gradient (path) and gold", several("path_gold")),
        ("proxy and gold", several("proxy_gold")),
        ("sign right where gold changes: gradient (path) / proxy", several("path_sign", "proxy_sign")),
        ("edits by gradient: gold [95 %]", lambda row: _interval(row, "gradient")),
        ("edits by chance: gold [95 %]", lambda row: _interval(row, "chance")),
        ("edits by gradient / chance: proxy", several("edits_by_gradient_proxy", "edits_by_chance_proxy")),
        (
            "edits by gradient / chance: generations",
            several("edits_by_gradient_generations", "edits_by_chance_generations", digits=1),
        ),
    ]
    lines = ["| | " + " | ".join(r["recipe"] for r in rows) + " |", "|:--|" + "--:|" * len(rows)]
    lines += [f"| {name} | " + " | ".join(cell(r) for r in rows) + " |" for name, cell in names]
    return "\n".join(lines) + "\n"


def _interval(row: dict, kind: str) -> str:
    low, high = row[f"edits_by_{kind}_interval"]
    return f"{row[f'edits_by_{kind}_gold']:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
