"""What a nat of likelihood is worth in selection: gold of the completion with the highest R + w log mu, for many w and budgets.

    python -m benchmarks.likelihood --models DIR --e2e-models DIR --e2e-data DIR

Tasks and models are those of `benchmarks.ablations --field`, the prompts are not: 128 of each task that nothing is reported on,
on E2E of the sentences that the base model was trained on, since the default of `fit_field` was chosen here. Sixteen completions
of each prompt are drawn along the field, once per budget, and selected by every w. Beside it stands the w of the field, which
comparisons have set that its reward models had not seen (`likelihood_worth`).

Writes benchmarks/results/likelihood.json and docs/img/likelihood.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
import transformers
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cells import (
    BLUE,
    CONFIRMING_PROMPTS,
    CONFIRMING_SEEDS,
    GREEN,
    GREY,
    PURPLE,
    ROOT,
    VERMILION,
    Variant,
    World,
    e2e_world,
    embedded_worlds,
    environment,
    new_figure,
    save_figure,
    shared_legend,
)
from vgf_llm.data import reviews
from vgf_llm.evaluation.frontier import seeds_by_place
from vgf_llm.evaluation.metrics import bootstrap_ci
from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.flow import TransportBudget, best_of_n
from vgf_llm.text.field import LIKELIHOOD_WEIGHT


PROMPTS, COMPLETIONS, SEED = 128, 16, 5
KL_BUDGETS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
WEIGHTS = (0.0, 0.0025, LIKELIHOOD_WEIGHT, 0.01, 0.02, 0.04, 0.08)  # in standard deviations of the reward per nat
STYLES = {0.0: GREY, LIKELIHOOD_WEIGHT: BLUE, 0.01: GREEN, 0.02: PURPLE, 0.04: VERMILION}
NAMES = {"tone": "tone", "content": "content and order", "e2e": "E2E"}


def prompts_of(world: World) -> list[str]:
    """128 prompts that no result is reported on."""
    if world.name in reviews.GOLD:
        return reviews.generate_prompts(PROMPTS, 90_777, world.name)
    return world.seen()[:PROMPTS]


def measured(world: World, work: Path) -> list[dict]:
    """A row for every budget and weight. What was drawn is kept."""
    sampler = world.sampler(Variant(gradient_at="field"))
    assert sampler.field is not None
    prompts, spread = prompts_of(world), float(sampler.field.spread)
    rows = []
    for nats in KL_BUDGETS:
        kept = work / f"{world.field_at().name}-{nats:g}.json"
        if not kept.is_file():
            budget = TransportBudget(kl_budget=nats)
            noise = seeds_by_place(SEED, prompts)
            drawn = sampler.sample(prompts, COMPLETIONS, budget, world.length, seed=noise, verify=False).transported
            gold = [[world.gold(p, c) for c in cs] for p, cs in zip(prompts, drawn.completions, strict=True)]
            cell = {"gold": gold, "proxy": drawn.rewards.tolist(), "logprobs": drawn.logprobs.tolist()}
            write_atomically(kept, json.dumps(cell).encode())
            print(f"{world.name}: {nats:g} nats", flush=True)
        gold, proxy, logprobs = (torch.tensor(json.loads(kept.read_bytes())[key]) for key in ("gold", "proxy", "logprobs"))
        of_field = float(sampler.field.likelihood_weight) / spread
        for weight, its_own in (*((w, False) for w in WEIGHTS), (of_field, True)):
            best = best_of_n(proxy + weight * spread * logprobs)[:, None]
            own, likelihood = gold.gather(1, best)[:, 0], logprobs.gather(1, best)
            low, high = bootstrap_ci(own.numpy())
            rows.append(
                {
                    "task": world.name, "kl_budget": nats, "likelihood_weight": weight, "of_field": its_own,
                    "reward_gold": float(own.mean()), "reward_gold_low": low, "reward_gold_high": high,
                    "reward_proxy": float(proxy.gather(1, best).mean()), "nll_base": -float(likelihood.mean()),
                }
            )  # fmt: skip
    return rows


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Gold and NLL against the budget, one line per weight."""
    tasks = [task for task in NAMES if any(r["task"] == task for r in rows)]
    figure, axes = new_figure(
        3.6 * len(tasks),
        6.4,
        2,
        len(tasks),
        "Selected from 16 by R + w log mu, w in standard deviations of R per nat",
        sharex=True,
    )
    for column, task in enumerate(tasks):
        for row, (key, label) in enumerate((("reward_gold", "gold reward"), ("nll_base", "NLL under the base model (nats)"))):
            ax = axes[row][column]
            here = [r for r in rows if r["task"] == task and r["kl_budget"] > 0]
            for weight, colour in STYLES.items():
                line = [r for r in here if r["likelihood_weight"] == weight and not r["of_field"]]
                ax.plot(
                    [r["kl_budget"] for r in line],
                    [r[key] for r in line],
                    "o-",
                    color=colour,
                    markersize=4,
                    label=f"w = {weight:g}",
                )
            line = [r for r in here if r["of_field"]]
            ax.plot(
                [r["kl_budget"] for r in line],
                [r[key] for r in line],
                "--",
                color="black",
                label="w of the field, by comparisons",
            )
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_locator(FixedLocator(KL_BUDGETS[1:]))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.grid(color="#E4E4E4")
            ax.set(title=NAMES[task] if row == 0 else None, ylabel=label if column == 0 else None)
            if row:
                ax.set_xlabel("nats of a completion")
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="models of the demonstration; default: outputs/full/models")
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py; default: none, and no E2E")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument("--work", default=ROOT / "outputs" / "likelihood", type=Path, help="where what was drawn is kept")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    worlds = embedded_worlds(args.models, False, CONFIRMING_PROMPTS, args.work)
    if args.e2e_models:
        worlds.append(e2e_world(args.e2e_models, args.e2e_data, 24, list(CONFIRMING_SEEDS), args.work))
    rows = [row for world in worlds for row in measured(world, args.work)]
    write_report(ROOT / "benchmarks" / "results" / "likelihood.json", {"rows": rows, **environment()})
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        plot(rows, ROOT / "docs" / "img" / "likelihood.png")


if __name__ == "__main__":
    main()
