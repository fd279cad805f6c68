"""Does a budget chosen by 50 gold labels hold elsewhere, and does the choice fall back to best-of-n where the flow does not pay?

    python -m benchmarks.tune --models outputs/demo/models

Tasks and models are those of benchmarks/diagnose.py. Three sets of 50 prompts, each with noise of its own. The budget is
chosen on one set and judged on the other two, beside the budget that would have been best there. What was measured is kept in
`--work`, so that a killed run goes on.

Writes benchmarks/results/tune.json.
"""

from __future__ import annotations

import argparse
import pickle
import platform
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.diagnose import add_arguments, known_tasks
from vgf_llm.evaluation.metrics import paired_bootstrap_ci
from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.evaluation.tune import Candidates, choose_budget, measure_budgets
from vgf_llm.flow import TransportBudget


ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SEEDS = 50, (0, 1, 2)
BUDGET = TransportBudget(steps=3, step_size=0.5, kl_budget=2.0, rounds=7)


def judged(folds: list[Candidates], chosen_on: int) -> dict:
    """The choice of one set of prompts, and what it earns on the others."""
    tuned = choose_budget(folds[chosen_on])
    others = [fold for k, fold in enumerate(folds) if k != chosen_on]
    # Gold on the other sets: of every candidate, and of best-of-n with as many completions.
    gold = np.concatenate([fold.gold for fold in others], 1)
    best_of_n = np.concatenate([fold.best_of_n for fold in others], 1)
    index = next(k for k, budget in enumerate(others[0].budgets) if budget == tuned.budget)
    tried = int(1 + folds[chosen_on].gold[1:].mean(1).argmax())
    mine = best_of_n[tried] if tuned.is_best_of_n else gold[index]
    rivals = {f"vgf {b.kl_budget:g}": g for b, g in zip(others[0].budgets[1:], gold[1:], strict=True)}
    rivals |= {f"best-of-n as {b.kl_budget:g}": g for b, g in zip(others[0].budgets[1:], best_of_n[1:], strict=True)}
    name, best = max(rivals.items(), key=lambda rival: rival[1].mean())
    over_low, over_high = paired_bootstrap_ci(mine, best_of_n[tried])
    return {
        "seed": chosen_on,
        "choice": "best_of_n" if tuned.is_best_of_n else "vgf",
        "kl_budget": None if tuned.is_best_of_n else tuned.budget.kl_budget,
        "num_particles": tuned.num_particles,
        "table": tuned.rows,
        "gold_elsewhere": float(mine.mean()),
        "best_elsewhere": float(best.mean()),
        "best_elsewhere_is": name,
        "share_of_best": float(mine.mean() / best.mean()),
        "over_best_of_n_elsewhere": float((mine - best_of_n[tried]).mean()),
        "over_best_of_n_elsewhere_low": over_low,
        "over_best_of_n_elsewhere_high": over_high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--work", default=ROOT / "outputs" / "tune", type=Path, help="where measurements are kept")
    args = parser.parse_args()
    started, results = time.perf_counter(), {}
    for task in known_tasks(args):
        name = task.name
        sampler = task.sampler(horizon=None if name == "tone" else 0, movers=2)
        folds = []
        for seed in SEEDS:
            kept = args.work / f"{name}-{seed}.pickle"
            if not kept.is_file():
                begun = time.process_time()
                found = measure_budgets(
                    sampler, task.prompts(PROMPTS, 500 + seed), task.gold, budget=BUDGET,
                    max_completion_length=task.max_completion_length, seed=seed,
                )  # fmt: skip
                write_atomically(kept, pickle.dumps(found))
                print(f"{name}, seed {seed}: {time.process_time() - begun:.0f} s of CPU", flush=True)
            folds.append(pickle.loads(kept.read_bytes()))
        results[name] = [judged(folds, seed) for seed in SEEDS]
        for result in results[name]:
            print(name, {key: value for key, value in result.items() if key != "table"}, flush=True)
    write_report(
        ROOT / "benchmarks" / "results" / "tune.json",
        {
            "tasks": results,
            "prompts": PROMPTS,
            "budget": {"steps": BUDGET.steps, "step_size": BUDGET.step_size, "rounds": BUDGET.rounds, "movers": 2},
            "num_particles": 8,
            "seconds": time.perf_counter() - started,
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    )


if __name__ == "__main__":
    main()
