"""Does a budget chosen by 50 gold labels hold elsewhere, and does the choice fall back to best-of-n where the flow does not pay?

    python -m benchmarks.tune --models outputs/demo/models

Tasks and models are those of benchmarks/diagnose.py, with the gradient fields that are kept beside them. Three sets of 50
prompts, each with noise of its own. The budget is chosen on one set and judged on the other two, beside what is best there, of
all budgets and of best-of-n: by the labels of that set, or without any by `TransportBudget.auto`. What was measured is kept in
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
from vgf_llm.evaluation.tune import AUTOMATIC, Candidates, choose_budget, measure_budgets
from vgf_llm.flow import TransportBudget


ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SEEDS, N = 50, (0, 1, 2), 8
# Sixteen completions per prompt: two rounds of eight, drawn along the field.
BUDGET = TransportBudget(rounds=2)
KL_BUDGETS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def judged(folds: list[Candidates], chosen_on: int) -> dict:
    """The choice of one set of prompts, and what it earns on the others."""
    tuned = choose_budget(folds[chosen_on])
    others = [fold for k, fold in enumerate(folds) if k != chosen_on]
    # Gold on the other sets: of every candidate, and of best-of-n with as many completions.
    gold = np.concatenate([fold.gold for fold in others], 1)
    best_of_n = np.concatenate([fold.best_of_n for fold in others], 1)
    names = ["best-of-8", "automatic", *(f"{budget.kl_budget:g} nats" for budget in others[0].budgets[2:])]
    if tuned.is_best_of_n:
        name, index = f"best-of-{tuned.num_particles}", folds[chosen_on].equal.index(tuned.num_particles)
        mine = best_of_n[index]
    else:
        index = others[0].budgets.index(tuned.budget)
        name, mine = names[index], gold[index]
    rivals = dict(zip(names, gold, strict=True)) | {"best-of-16": best_of_n[AUTOMATIC]}
    best_name, best = max(rivals.items(), key=lambda rival: rival[1].mean())
    low, high = paired_bootstrap_ci(mine, best_of_n[index])
    return {
        "seed": chosen_on,
        "choice": name,
        "table": tuned.rows,
        "gold_elsewhere": float(mine.mean()),
        "best_elsewhere": float(best.mean()),
        "best_elsewhere_is": best_name,
        "share_of_best": float(mine.mean() / best.mean()),
        "automatic_elsewhere": float(gold[AUTOMATIC].mean()),
        "automatic_share_of_best": float(gold[AUTOMATIC].mean() / best.mean()),
        "over_best_of_n_elsewhere": float((mine - best_of_n[index]).mean()),
        "over_best_of_n_elsewhere_low": low,
        "over_best_of_n_elsewhere_high": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--work", default=ROOT / "outputs" / "tune", type=Path, help="where measurements are kept")
    args = parser.parse_args()
    started, results = time.perf_counter(), {}
    for task in known_tasks(args):
        name = task.name
        field = task.field()
        sampler = task.sampler(gradient_field=str(field))
        folds = []
        for seed in SEEDS:
            # The name of the field's folder follows from all models that it was fitted to.
            kept = args.work / f"{field.name}-{seed}.pickle"
            if not kept.is_file():
                begun = time.process_time()
                found = measure_budgets(
                    sampler, task.prompts(PROMPTS, 500 + seed), task.gold, num_particles=N, budget=BUDGET,
                    kl_budgets=KL_BUDGETS, max_completion_length=task.max_completion_length, seed=seed,
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
            "budget": {"rounds": BUDGET.rounds, "gradient": "learned", "kl_budgets": KL_BUDGETS},
            "num_particles": N,
            "seconds": time.perf_counter() - started,
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    )


if __name__ == "__main__":
    main()
