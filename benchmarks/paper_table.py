"""The paper's table in our terms: base, RLOO, DPO, best-of-n, VGF and a student of VGF, against reference and chosen answers.

    python -m benchmarks.paper_table                    trains the models of the embedded data first, as `vgf demo --scale full`
    python -m benchmarks.paper_table --models DIR       with `base`, `judge` and `reward-content-*` that are there already
    python -m benchmarks.paper_table --quick            shows that everything runs, measures nothing

The paper has Pythia-2.8B on TL;DR and Anthropic-HH judged by GPT-4. Here it is the content task of the embedded data, whose gold
reward is exact. Reference: what the data set's own writer says to the prompt. Chosen: the better of two base samples by gold,
as a preference set holds them. All students start from the same base model and are trained on the same prompts for the same
number of optimizer steps; only the proxy ensemble is optimised. Settings of VGF are the demonstration's, learning rates those
that `benchmarks.trainer_vs_trl` found on the proxy; neither is tuned here.

Writes benchmarks/results/paper_table.json and .md; the page is in `--work`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.diagnose import newest
from benchmarks.trainer_vs_trl import GENERATIONS, PROMPTS_PER_STEP, RATES, Job, as_function, best_and_worst, shared
from vgf_llm.data import reviews
from vgf_llm.evaluation.demo import SCALES
from vgf_llm.evaluation.evaluate import evaluate
from vgf_llm.evaluation.evaluation_config import EvaluationConfig
from vgf_llm.evaluation.report import markdown_table, write_atomically, write_report
from vgf_llm.evaluation.world import build_world
from vgf_llm.flow import TransportBudget
from vgf_llm.text import VGFSampler
from vgf_llm.trainer import VGFConfig, VGFTrainer


ROOT = Path(__file__).resolve().parents[1]
TASK, LENGTH = "content", 64


def exact(prompts: Any, answers: Any) -> list[float]:
    return [reviews.GOLD[TASK](prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def test_rows(job: Job, count: int) -> list[dict[str, str]]:
    """Held-out prompts with a reference and a chosen answer."""
    prompts = job.test(count, 0)
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    sampler = VGFSampler(AutoModelForCausalLM.from_pretrained(job.base), job.reward(tokenizer), tokenizer, flow_batch_size=64)
    # Noise of their own: no method is compared with its own samples.
    pairs = sampler.sample(prompts, 2, TransportBudget(steps=0), LENGTH, seed=2**40).initial.completions
    rng = random.Random(0)
    return [
        {
            "prompt": prompt,
            "reference": " " + reviews.write_review(rng, *reviews.parse_prompt(prompt)),
            "chosen": " " + max(pair, key=partial(reviews.GOLD[TASK], prompt)),
        }
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]


def student(job: Job, method: str, steps: int, out: Path) -> float:
    """Train a policy and save it; seconds it took."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    reward, prompts = job.reward(tokenizer), job.train(steps * PROMPTS_PER_STEP, 0)
    started = time.perf_counter()
    trainer: Any
    if method == "VGF":
        args = VGFConfig(
            num_generations=GENERATIONS, max_completion_length=LENGTH, flow_steps=3, flow_step_size=0.5, flow_rounds=2,
            flow_batch_size=64, per_device_train_batch_size=PROMPTS_PER_STEP, activation_checkpointing=False,
            **shared(str(out), RATES["full"]["likelihood"][0], steps, 0),
        )  # fmt: skip
        trainer = VGFTrainer(str(job.base), reward, args, Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer)
    elif method == "DPO":
        pairs = Dataset.from_list(best_and_worst(job, reward, tokenizer, prompts, 0))
        common = shared(str(out), RATES["full"]["pairs"][0], steps, 0)
        args = DPOConfig(per_device_train_batch_size=PROMPTS_PER_STEP, gradient_checkpointing=False, **common)
        trainer = DPOTrainer(str(job.base), args=args, train_dataset=pairs, processing_class=tokenizer)
    else:
        args = RLOOConfig(
            num_generations=GENERATIONS, max_completion_length=LENGTH, beta=0.0, gradient_checkpointing=False,
            per_device_train_batch_size=PROMPTS_PER_STEP * GENERATIONS,
            **shared(str(out), RATES["full"]["gradient"][0], steps, 0),
        )  # fmt: skip
        dataset = Dataset.from_dict({"prompt": prompts})
        trainer = RLOOTrainer(str(job.base), as_function(reward, tokenizer), args, dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="directory with base, judge and reward-content-*; default: trained")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "paper_table")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of every student")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="shows that everything runs, measures nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.prompts, args.seeds = 1, 4, [0]
    if args.models is None:
        world = build_world(ROOT / "outputs" / "full" / "models", SCALES["full"].settings, print)
        base, judge, rewards = world.base, world.judge, world.rewards[TASK]
    else:
        base, judge = newest(args.models, "base"), newest(args.models, "judge")
        rewards = [newest(args.models, f"reward-{TASK}-{k}") for k in range(3)]
    calibration = [tuple(json.loads((path / "calibration.json").read_text())) for path in rewards]
    job = Job(
        TASK, reviews.GOLD[TASK], base, rewards, calibration,
        lambda count, seed: reviews.generate_prompts(count, 10_000 + seed, TASK),
        lambda count, seed: reviews.generate_prompts(count, seed, TASK),
        LENGTH, 0,
    )  # fmt: skip
    args.work.mkdir(parents=True, exist_ok=True)
    data = args.work / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in test_rows(job, args.prompts)), encoding="utf-8")
    seconds = {}
    for method in ("RLOO", "DPO", "VGF"):
        out = args.work / method
        shutil.rmtree(out, ignore_errors=True)
        seconds[method] = student(job, method, args.steps, out)
        print(f"{method}: {seconds[method]:.0f} s", flush=True)
    config = EvaluationConfig(
        model_name_or_path=str(base), reward_model_name_or_path=[str(path) for path in rewards], judge_lm_name_or_path=str(judge),
        student_name_or_path=[f"{method}={args.work / method}" for method in seconds], dataset_name=str(data),
        output_dir=str(args.work), seeds=args.seeds, max_prompts=args.prompts, pool_size=32, num_particles=8,
        max_completion_length=LENGTH, flow_steps=3, flow_step_size=0.5, flow_kl_budgets=[1.0, 2.0, 4.0], flow_rounds=6,
        flow_movers=2, flow_batch_size=128, title="Embedded data, content",
    )  # fmt: skip
    report = evaluate(config, gold=exact)
    report = {key: value for key, value in report.items() if key not in ("examples", "config")}
    report["seconds_of_students"] = seconds
    names = (
        "pool_size",
        "num_particles",
        "seeds",
        "flow_steps",
        "flow_step_size",
        "flow_rounds",
        "flow_movers",
        "flow_kl_budgets",
    )
    report["settings"] = {name: getattr(config, name) for name in names} | {
        "steps": args.steps,
        "threads": torch.get_num_threads(),
    }
    if not args.quick:
        write_report(ROOT / "benchmarks" / "results" / "paper_table.json", report)
        write_atomically(ROOT / "benchmarks" / "results" / "paper_table.md", markdown_table(report["rows"]).encode())


if __name__ == "__main__":
    main()
