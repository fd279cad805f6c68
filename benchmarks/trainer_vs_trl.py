"""VGFTrainer beside TRL's trainers: what a nat of KL buys in gold, and how long it takes.

    python -m benchmarks.trainer_vs_trl                              embedded tasks, all methods, 3 seeds, LoRA and full
    python -m benchmarks.trainer_vs_trl --quick                      shows that everything runs, measures nothing
    python -m benchmarks.trainer_vs_trl --tasks e2e --e2e-data DIR   after `python -m benchmarks.e2e_nlg --data DIR`

Every method starts from the same base model and is trained on the same reward (the proxy ensemble) and the same prompts, with 8
completions per prompt and `PROMPTS_PER_STEP` prompts per optimizer step. Along the way it is measured on fresh samples of
held-out prompts: gold reward, proxy reward, and KL(student || base) as the mean of log student - log base over these samples.
The clock stands still meanwhile.

Goals: the highest gold at every KL in `KLS`, RLOO's gold at KL 2 in a quarter of its time, and a step at most 1.25 times as long
as RLOO's. The report says which hold.

Methods: VGFTrainer with each target, particles of the reference and of the policy; best-of-n distillation (VGFTrainer with
flow_steps=0); RLOO and GRPO; DPO on the best and the worst of 8 samples of the base model, drawn within its time.

Writes benchmarks/results/trainer_vs_trl.json and docs/img/trainer_vs_trl.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from vgf_llm.data import reviews
from vgf_llm.evaluation.metrics import judge_nll
from vgf_llm.evaluation.report import write_report
from vgf_llm.evaluation.world import Settings, build_world
from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFSampler
from vgf_llm.trainer import VGFConfig, VGFTrainer


ROOT = Path(__file__).resolve().parents[1]
KLS = (1.0, 2.0, 4.0)
PROMPTS_PER_STEP, GENERATIONS = 16, 8
# Optimizer steps after which a student is measured.
SCHEDULE = (0, 2, 4, 8, 12, 16, 24, 32, 48)
# Not tuned per method: those of the likelihood are the demonstration's, those of policy gradients the ones RLOO was measured
# with in docs/method.md, and adapters take more, as is usual.
LEARNING_RATE = {
    "full": {"likelihood": 5e-4, "gradient": 1e-4, "pairs": 1e-4},
    "lora": {"likelihood": 2e-3, "gradient": 1e-3, "pairs": 1e-3},
}
VGF = {
    "best_of_n": {"flow_steps": 0},
    "vgf_sft": {},
    "vgf_weighted": {"target": "weighted", "target_temperature": 0.3},
    "vgf_tilt": {"target": "tilt"},
    "vgf_dpo": {"target": "dpo"},
    "vgf_sft_policy": {"particle_source": "policy"},
    "vgf_tilt_policy": {"target": "tilt", "particle_source": "policy"},
}
METHODS = (*VGF, "rloo", "grpo", "dpo")


@dataclass(frozen=True)
class Job:
    """A task with its models: what a method is given.

    `train(count, seed)` are prompts to train on, `test(count, seed)` held-out ones.
    """

    name: str
    gold: Callable[[str, str], float]
    base: Path
    rewards: list[Path]
    calibration: list[tuple[float, float]] | None
    train: Callable[[int, int], list[str]]
    test: Callable[[int, int], list[str]]
    max_completion_length: int
    horizon: int | None

    def reward(self, tokenizer: PreTrainedTokenizerBase) -> DifferentiableReward:
        return DifferentiableReward(self.rewards, tokenizer, calibration=self.calibration)


def embedded_jobs(directory: Path, settings: Settings, tasks: list[str], log: Callable[[str], None]) -> list[Job]:
    """The tasks of the embedded data, on the world of the demonstration."""
    world = build_world(directory, settings, log)
    return [
        Job(
            task, reviews.GOLD[task], world.base, world.rewards[task], world.calibration[task],
            lambda count, seed, task=task: reviews.generate_prompts(count, 10_000 + seed, task),
            lambda count, seed, task=task: reviews.generate_prompts(count, seed, task),
            64, None if task == "tone" else 0,
        )
        for task in tasks
    ]  # fmt: skip


def e2e_job(data: Path, models: Path) -> Job:
    """The E2E task, on the models that `benchmarks.e2e_nlg` left in `models`."""
    from benchmarks.e2e_nlg import MAX_COMPLETION, gold
    from vgf_llm.data.e2e import format_prompt, load_e2e, split_by_mr, spoken_order

    train, held_out = split_by_mr(load_e2e(data), seed=0, held_out=72)
    asked = [format_prompt(spoken_order(e.slots, e.reference)) for e in train]
    unseen = sorted({format_prompt(e.slots) for e in held_out})

    def some(prompts: list[str], count: int, seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        return [prompts[i] for i in torch.randint(len(prompts), (count,), generator=generator).tolist()]

    (base,) = models.glob("base-*")
    rewards = sorted(models.glob("reward-*"))
    return Job("e2e", gold, base, rewards, None, partial(some, asked), partial(some, unseen), MAX_COMPLETION, 0)


class Probe(TrainerCallback):
    """Measures the student at the steps of the schedule and stops the clock meanwhile."""

    def __init__(self, job: Job, schedule: tuple[int, ...], prompts: list[str], seed: int, spent: float) -> None:
        self.job, self.schedule, self.prompts, self.seed, self.seconds = job, schedule, prompts, seed, spent
        self.points: list[dict[str, float]] = []
        self.tokenizer = AutoTokenizer.from_pretrained(job.base)
        self.base = AutoModelForCausalLM.from_pretrained(job.base).eval()
        self.reward = job.reward(self.tokenizer)
        self.since: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.measure(0, model)
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.since is not None
        self.seconds += time.perf_counter() - self.since
        if state.global_step in self.schedule:
            self.measure(state.global_step, model)
        self.since = time.perf_counter()

    def measure(self, step: int, model: Any) -> None:
        training = model.training
        policy = model.get_base_model() if isinstance(model, PeftModel) else model
        sampler = VGFSampler(policy, self.reward, self.tokenizer, flow_batch_size=256)
        # Noise of its own: a student is not measured on what it was fitted to.
        out = sampler.sample(
            self.prompts, 4, TransportBudget(steps=0), self.job.max_completion_length, seed=2**50 + self.seed
        ).initial
        model.train(training)
        flat = [prompt for prompt in self.prompts for _ in range(4)]
        nll = judge_nll(self.base, self.tokenizer, flat, [ids for row in out.completion_ids for ids in row])
        gold = [self.job.gold(p, c) for p, c in zip(flat, (c for row in out.completions for c in row), strict=True)]
        self.points.append(
            {
                "step": step,
                "seconds": self.seconds,
                "gold": statistics.fmean(gold),
                "proxy": float(out.rewards.mean()),
                "kl": float((out.logprobs.double().flatten() + nll).mean()),
                "nll_base": float(nll.mean()),
            }
        )


def shared(out: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Arguments that all trainers are given."""
    return {
        "output_dir": out, "learning_rate": rate, "max_steps": steps, "seed": seed, "lr_scheduler_type": "constant",
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False,
        "dataloader_pin_memory": False, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def run(job: Job, method: str, adaptation: str, seed: int, steps: int, held_out: int) -> dict[str, Any]:
    """Train one student, measured along the way."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    reward = job.reward(tokenizer)
    schedule = tuple(step for step in SCHEDULE if step <= steps)
    prompts = job.train(steps * PROMPTS_PER_STEP, seed)
    peft_config = None
    if adaptation == "lora":
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    kind = "gradient" if method in ("rloo", "grpo") else "pairs" if "dpo" in method else "likelihood"
    rate = LEARNING_RATE[adaptation][kind]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        common = shared(out, rate, steps, seed)
        pairs = best_and_worst(job, reward, tokenizer, prompts, seed) if method == "dpo" else []
        probe = Probe(job, schedule, job.test(held_out, seed), seed, time.perf_counter() - started)
        given: dict[str, Any] = {"callbacks": [probe], "peft_config": peft_config}
        trainer: Any
        if method in VGF:
            extra = VGF[method]
            rows = {"weighted": GENERATIONS, "tilt": GENERATIONS, "dpo": 2}.get(extra.get("target", ""), 1)
            args = VGFConfig(
                num_generations=GENERATIONS, max_completion_length=job.max_completion_length, flow_horizon=job.horizon,
                flow_batch_size=PROMPTS_PER_STEP * GENERATIONS, per_device_train_batch_size=PROMPTS_PER_STEP * rows,
                activation_checkpointing=False, **extra, **common,
            )  # fmt: skip
            dataset = Dataset.from_dict({"prompt": prompts})
            trainer = VGFTrainer(str(job.base), reward, args, dataset, processing_class=tokenizer, **given)
        elif method == "dpo":
            config = DPOConfig(per_device_train_batch_size=PROMPTS_PER_STEP, gradient_checkpointing=False, **common)
            trainer = DPOTrainer(
                str(job.base), args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, **given
            )
        else:
            config_class, trainer_class = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[method]
            config = config_class(
                num_generations=GENERATIONS, max_completion_length=job.max_completion_length, beta=0.0,
                per_device_train_batch_size=PROMPTS_PER_STEP * GENERATIONS, gradient_checkpointing=False, **common,
            )  # fmt: skip
            trainer = trainer_class(
                str(job.base), as_function(reward, tokenizer), config, Dataset.from_dict({"prompt": prompts}),
                processing_class=tokenizer, **given,
            )  # fmt: skip
        trainer.train()
    # The first steps of a process compile and allocate; they are in the clock of the curves, not in that of a step.
    first, last = probe.points[min(1, len(probe.points) - 1)], probe.points[-1]
    return {
        "task": job.name, "method": method, "adaptation": adaptation, "seed": seed, "learning_rate": rate,
        "seconds_per_step": (last["seconds"] - first["seconds"]) / max(last["step"] - first["step"], 1), "points": probe.points,
    }  # fmt: skip


def as_function(reward: DifferentiableReward, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """The same reward, through the same token path, as TRL calls it."""

    def proxy(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        width = max(map(len, completion_ids))
        ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in completion_ids])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in completion_ids])
        rows = (encoded["input_ids"], encoded["attention_mask"].bool(), ids, mask)
        return reward.score_ids(*(x.to(reward.device) for x in rows)).tolist()

    return proxy


def best_and_worst(
    job: Job, reward: DifferentiableReward, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int
) -> list[dict[str, str]]:
    """Best and worst of 8 samples of the base model for every prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampler = VGFSampler(
        AutoModelForCausalLM.from_pretrained(job.base).to(device),
        reward,
        tokenizer,
        flow_batch_size=PROMPTS_PER_STEP * GENERATIONS,
    )
    out = sampler.sample(prompts, GENERATIONS, TransportBudget(steps=0), job.max_completion_length, seed=seed).initial
    rows = zip(prompts, out.completions, out.rewards.argmax(1).tolist(), out.rewards.argmin(1).tolist(), strict=True)
    return [{"prompt": p, "chosen": " " + texts[best], "rejected": " " + texts[worst]} for p, texts, best, worst in rows]


# ---- What it comes to -----------------------------------------------------------------------------------------------


def at_kl(points: list[dict[str, float]], kl: float, field: str) -> float | None:
    """`field` where the run first crosses a KL, between the two measurements around it; None if it never does."""
    for before, after in pairwise(points):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / max(after["kl"] - before["kl"], 1e-9)
            return before[field] + share * (after[field] - before[field])
    return None


def seconds_to(points: list[dict[str, float]], gold: float) -> float | None:
    """Seconds until a gold reward is first reached."""
    for before, after in pairwise(points):
        if before["gold"] < gold <= after["gold"]:
            share = (gold - before["gold"]) / (after["gold"] - before["gold"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of each method on each task, None where a seed does not get there."""

    def mean(values: list[float | None]) -> float | None:
        return statistics.fmean(v for v in values if v is not None) if values and None not in values else None

    rows = []
    keys = dict.fromkeys((r["task"], r["adaptation"], r["method"]) for r in runs)
    for task, adaptation, method in keys:
        own = [r for r in runs if (r["task"], r["adaptation"], r["method"]) == (task, adaptation, method)]
        rloo = {r["seed"]: r for r in runs if (r["task"], r["adaptation"], r["method"]) == (task, adaptation, "rloo")}
        row: dict[str, Any] = {"task": task, "adaptation": adaptation, "method": method, "seeds": len(own)}
        for kl in KLS:
            row[f"gold_at_kl_{kl:g}"] = mean([at_kl(r["points"], kl, "gold") for r in own])
        row["final_gold"] = mean([r["points"][-1]["gold"] for r in own])
        row["final_kl"] = mean([r["points"][-1]["kl"] for r in own])
        row["seconds_per_step"] = mean([r["seconds_per_step"] for r in own])
        paired = [(r, rloo[r["seed"]]) for r in own if r["seed"] in rloo]
        row["step_time_ratio_to_rloo"] = mean([r["seconds_per_step"] / b["seconds_per_step"] for r, b in paired])
        ratios: list[float | None] = []
        for r, b in paired:
            gold, time_of_rloo = at_kl(b["points"], 2.0, "gold"), at_kl(b["points"], 2.0, "seconds")
            ours = None if gold is None else seconds_to(r["points"], gold)
            ratios.append(None if ours is None or not time_of_rloo else ours / time_of_rloo)
        row["time_ratio_to_rloo_gold_at_kl_2"] = mean(ratios)
        rows.append(row)
    return rows


def goals(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    """Which goals hold on every task and adaptation; None where nothing can be said."""
    verdicts: dict[str, bool | None] = {}
    ours = [r for r in rows if r["method"].startswith("vgf_")]
    groups = dict.fromkeys((r["task"], r["adaptation"]) for r in rows)
    for kl in KLS:
        wins = []
        for group in groups:
            best = {
                who: max((r[f"gold_at_kl_{kl:g}"] for r in rows if (r["task"], r["adaptation"]) == group
                          and r["method"].startswith("vgf_") == who and r[f"gold_at_kl_{kl:g}"] is not None), default=None)
                for who in (True, False)
            }  # fmt: skip
            if best[True] is not None and best[False] is not None:
                wins.append(best[True] > best[False])
        verdicts[f"highest gold at KL {kl:g}"] = all(wins) if wins else None
    quick = [[r["time_ratio_to_rloo_gold_at_kl_2"] for r in ours if (r["task"], r["adaptation"]) == g] for g in groups]
    reached = [min((v for v in values if v is not None), default=math.inf) for values in quick]
    verdicts["RLOO's gold at KL 2 in a quarter of its time"] = all(v <= 0.25 for v in reached) if reached else None
    steps = [r["step_time_ratio_to_rloo"] for r in ours if r["step_time_ratio_to_rloo"] is not None]
    verdicts["a step at most 1.25 times RLOO's"] = all(v <= 1.25 for v in steps) if steps else None
    return verdicts


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Gold against KL above, against seconds below; one line per method, its points the means over seeds."""
    groups = list(dict.fromkeys((r["task"], r["adaptation"]) for r in runs))
    figure = Figure(figsize=(5 * len(groups), 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(groups), squeeze=False)
    colours = dict(
        zip(
            METHODS,
            ("#777777", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#009E73", "#0072B2", "#56B4E9", "#333333"),
            strict=True,
        )
    )
    for column, group in enumerate(groups):
        for row, x in enumerate(("kl", "seconds")):
            ax = axes[row][column]
            for method in METHODS:
                own = [r["points"] for r in runs if (r["task"], r["adaptation"]) == group and r["method"] == method]
                if own:
                    at = [[statistics.fmean(p[f] for p in points) for points in zip(*own, strict=True)] for f in (x, "gold")]
                    style = ":" if method.endswith("_policy") else "-"
                    ax.plot(*at, style, marker=".", color=colours[method], label=method.replace("_", " "))
            ax.set_xlabel("KL(student || base), nats per completion" if x == "kl" else "seconds of training")
            ax.set_ylabel("gold reward")
            ax.set_title(f"{group[0]}, {group[1]}")
    axes[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["content", "tone"], choices=["content", "tone", "e2e"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--adaptations", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of every method")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts a student is measured on, 4 samples each")
    parser.add_argument("--models", type=Path, default=ROOT / "outputs" / "demo" / "models", help="world of the demonstration")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument(
        "--e2e-models", type=Path, default=ROOT / "outputs" / "e2e", help="where benchmarks.e2e_nlg put its models"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "trainer_vs_trl.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "img" / "trainer_vs_trl.png")
    parser.add_argument("--quick", action="store_true", help="2 steps, 8 prompts, 1 seed: shows that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.prompts, args.seeds = 2, 8, args.seeds[:1]
    if "e2e" in args.tasks and args.e2e_data is None:
        parser.error("--tasks e2e needs --e2e-data")
    console = Console(width=140)
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    settings = Settings(steps=300, judge_steps=100, content_pairs=600, tone_pairs=400, members=2) if args.quick else Settings()
    embedded = [task for task in args.tasks if task != "e2e"]
    jobs = embedded_jobs(args.models, settings, embedded, console.log) if embedded else []
    if "e2e" in args.tasks:
        jobs.append(e2e_job(args.e2e_data, args.e2e_models))
    runs = []
    # Seeds outermost: what is on disk after an interruption is a whole comparison.
    for seed in args.seeds:
        for job in jobs:
            for adaptation in args.adaptations:
                for method in args.methods:
                    result = run(job, method, adaptation, seed, args.steps, args.prompts)
                    runs.append(result)
                    first, last = result["points"][0], result["points"][-1]
                    console.log(
                        f"{job.name} {adaptation} {method} seed {seed}: "
                        f"gold {first['gold']:.3f} -> {last['gold']:.3f} at KL {last['kl']:.2f}, "
                        f"{result['seconds_per_step']:.2f} s a step"
                    )
        rows = summarise(runs)
        write_report(
            args.output,
            {
                "rows": rows,
                "goals": goals(rows),
                "runs": runs,
                "settings": {k: v for k, v in vars(args).items() if isinstance(v, (int, list))},
                "seconds": time.perf_counter() - started,
                "machine": {
                    "processor": platform.machine(),
                    "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.is_available(),
                },
                "versions": {
                    "python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__, "trl": trl.__version__,
                },
            },
        )  # fmt: skip
        plot(runs, args.figure)
    console.print_json(json.dumps({"rows": rows, "goals": goals(rows)}))


if __name__ == "__main__":
    main()
