"""VGFTrainer beside TRL's trainers: what a nat of KL buys in gold, and how long it takes.

    python -m benchmarks.trainer_vs_trl                              embedded tasks, all methods, 3 seeds, full weights
    python -m benchmarks.trainer_vs_trl --quick                      shows that everything runs, measures nothing
    python -m benchmarks.trainer_vs_trl --tasks e2e --e2e-data DIR   after benchmarks.e2e_nlg, see below
    python -m benchmarks.trainer_vs_trl --report                     table and figure of all runs that are there

Reward models are of one round of labels, as `Settings` has them; those of E2E come from
`python -m benchmarks.e2e_nlg --data DIR --moved 0 --work outputs/e2e_one_round`.

Every method starts from the same base model and is trained on the same reward (the proxy ensemble) and the same prompts, with 8
completions per prompt and `PROMPTS_PER_STEP` prompts per optimizer step, at a rate that falls to zero over the run, as is
transformers' and TRL's default. Along the way it is measured on fresh samples of held-out prompts: gold reward, proxy reward, and
KL(student || base) as the mean of log student - log base over these samples. A run ends after `--steps`, or where the KL passes
`KL_END`.

How far a student goes is set by its rate, or by its budget. No rate is tuned: what a method attains at a KL is read between
the ends of all its runs, at each of `RATES` and, for `tilt`, at each of `TILT`; of a method with one run, along that run.

The clock stands still during measurements. It counts seconds of the process's CPU time, so that what else the machine does is
not measured (with one thread that is the wall-clock of a machine of its own); on a GPU it is the wall-clock.

Goals: the highest gold at every KL in `KLS`, RLOO's gold at KL 2 in a quarter of the time that the quickest of RLOO's runs takes,
and a step at most 1.25 times as long as RLOO's. The report says which hold.

Methods: VGFTrainer with each target along a learned gradient, particles of the reference but for `advantage`, which takes those
of the policy; `sft` along the reward's own gradient; best-of-n distillation from reference and policy (VGFTrainer with
flow_steps=0); RLOO and GRPO; DPO on the best and the worst of 8 samples of the base model, drawn within its time. The learned
gradient is fitted once per task, to prompts that are not held out: its seconds are stated below the table and are in no time.

Every run is a file under `--runs` and is not repeated: a cut benchmark goes on where it was. Delete the folder after a change
of what is measured. Writes benchmarks/results/trainer_vs_trl.json, its table beside it, and docs/img/trainer_vs_trl.png.
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
from vgf_llm.evaluation.frontier import seeds_by_place
from vgf_llm.evaluation.metrics import judge_nll
from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.evaluation.training import ensemble
from vgf_llm.evaluation.world import Settings, build_world
from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFSampler
from vgf_llm.text.field import fit_field
from vgf_llm.trainer import VGFConfig, VGFTrainer


ROOT = Path(__file__).resolve().parents[1]
KLS = (1.0, 2.0, 4.0)
PROMPTS_PER_STEP, GENERATIONS = 8, 8
# Optimizer steps after which a student is measured.
SCHEDULE = (0, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48)
# Beyond the largest KL that is read: at a high rate a student may come back from there.
KL_END = 8.0
# 0.975 quantiles of Student's t by the number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
# Students' samples per held-out prompt.
SAMPLES = 4
# What a field is fitted to: prompts to train on, of a seed that no run has, and samples of each.
FIELD_PROMPTS, FIELD_SAMPLES, FIELD_SEED = 1_000, 8, 31_000
# Peaks. Those of policy gradients are spread so that students end between KL 1 and beyond 4: on content it takes larger ones. A
# likelihood takes that of the demonstration's students, `tilt` one at which it has come to rest.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "content": {"likelihood": (5e-4,), "tilt": (1e-3,), "gradient": (3e-4, 6e-4, 1.2e-3), "pairs": (5e-4,)},
    "tone": {"likelihood": (5e-4,), "tilt": (1e-3,), "gradient": (1e-4, 2e-4, 4e-4), "pairs": (5e-4,)},
    "e2e": {"likelihood": (5e-4,), "tilt": (3e-4,), "gradient": (1e-4, 2e-4, 4e-4), "pairs": (5e-4,)},
}
# Adapters are given that many times the rate of full weights, with which students of a pilot seed ended as far.
LORA_RATE = {"likelihood": 6.0, "tilt": 10.0, "gradient": 3.0, "pairs": 6.0}
POLICY = {"particle_source": "policy", "policy_kl_cap": KL_END}
# Budgets of `tilt`: nats of a draw, and the temperature of what selection adds, which alone is worth a nat at 0.5.
TILT = {
    "mild": (0.5, 2.0),
    "mild_1": (1.0, 2.0),
    "0.5": (0.5, 0.5),
    "1": (1.0, 0.5),
    "2": (2.0, 0.5),
    "4": (4.0, 0.5),
    "8": (8.0, 0.5),
}
VGF: dict[str, dict[str, Any]] = {
    "best_of_n": {"flow_steps": 0},
    "best_of_n_policy": {"flow_steps": 0, **POLICY},
    # Along the gradient of the reward, at a budget that a step can afford.
    "vgf_sft_gradient": {"flow_steps": 1, "flow_step_size": 0.5, "flow_movers": 2, "flow_rounds": 2},
    "vgf_sft": {"flow_kl_budget": 2.0},
    "vgf_weighted": {"flow_kl_budget": 2.0, "target": "weighted", "target_temperature": 0.5},
    **{
        f"vgf_tilt_{name}": {"flow_kl_budget": nats, "target": "tilt", "target_temperature": temperature}
        for name, (nats, temperature) in TILT.items()
    },
    "vgf_dpo": {"flow_kl_budget": 2.0, "target": "dpo"},
    "vgf_advantage": {"flow_steps": 0, "target": "advantage", **POLICY},
}
# Whose particles or targets follow a learned gradient, the folder of which `run` is given.
ALONG_FIELD = tuple(method for method in VGF if method.startswith("vgf_") and method != "vgf_sft_gradient")
METHODS = (*VGF, "rloo", "grpo", "dpo")
NAMED = {"tilt": "tilt", "advantage": "gradient", "dpo": "pairs", "rloo": "gradient", "grpo": "gradient"}
FAMILY = {method: next((family for name, family in NAMED.items() if name in method), "likelihood") for method in METHODS}


def shown(method: str) -> str:
    """The name that a method has in the report: the budgets of `tilt` are runs of one method."""
    return "vgf_tilt" if method.startswith("vgf_tilt_") else method


def clock() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


@dataclass(frozen=True)
class Job:
    """A task with its models: what a method is given.

    `train(count, seed)` are prompts to train on, `test(count, seed)` held-out ones.
    """

    name: str
    gold: Callable[[str, str], float]
    base: Path
    reward: Callable[[PreTrainedTokenizerBase], DifferentiableReward]
    train: Callable[[int, int], list[str]]
    test: Callable[[int, int], list[str]]
    max_completion_length: int
    horizon: int | None


def embedded_jobs(directory: Path, settings: Settings, tasks: list[str], log: Callable[[str], None]) -> list[Job]:
    """The tasks of the embedded data, on the world of the demonstration."""
    world = build_world(directory, settings, log)
    return [
        Job(
            task, reviews.GOLD[task], world.base, partial(ensemble, world.rewards[task]),
            lambda count, seed, task=task: reviews.generate_prompts(count, 10_000 + seed, task),
            lambda count, seed, task=task: reviews.generate_prompts(count, seed, task),
            64, None if task == "tone" else 0,
        )
        for task in tasks
    ]  # fmt: skip


def e2e_job(data: Path, models: Path) -> Job:
    """The E2E task, on the models that `benchmarks.e2e_nlg` left in `models`."""
    from benchmarks.diagnose import E2E_HELD_OUT
    from benchmarks.e2e_nlg import MAX_COMPLETION, gold
    from vgf_llm.data.e2e import format_prompt, load_e2e, split_by_mr, spoken_order

    train, held_out = split_by_mr(load_e2e(data), seed=0, held_out=E2E_HELD_OUT)
    asked = [format_prompt(spoken_order(e.slots, e.reference)) for e in train]
    unseen = sorted({format_prompt(e.slots) for e in held_out})

    def some(prompts: list[str], count: int, seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        return [prompts[i] for i in torch.randint(len(prompts), (count,), generator=generator).tolist()]

    (base,) = models.glob("base-*")
    # Not calibrated: members trained alike have like scales.
    reward = partial(DifferentiableReward, sorted(models.glob("reward-e2e-*")))
    return Job("e2e", gold, base, reward, partial(some, asked), partial(some, unseen), MAX_COMPLETION, 0)


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
        self.since = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.since is not None
        self.seconds += clock() - self.since
        if state.global_step in self.schedule:
            self.measure(state.global_step, model)
            control.should_training_stop |= self.points[-1]["kl"] > KL_END
        self.since = clock()

    def measure(self, step: int, model: Any) -> None:
        training = model.training
        policy = model.get_base_model() if isinstance(model, PeftModel) else model
        sampler = VGFSampler(policy, self.reward, self.tokenizer, flow_batch_size=256)
        # Noise of its own: a student is not measured on what it was fitted to.
        seeds = seeds_by_place(2**30 + self.seed, self.prompts)
        out = sampler.sample(self.prompts, SAMPLES, TransportBudget(steps=0), self.job.max_completion_length, seed=seeds).initial
        model.train(training)
        flat = [prompt for prompt in self.prompts for _ in range(SAMPLES)]
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
                "tokens": statistics.fmean(len(ids) for row in out.completion_ids for ids in row),
            }
        )


def shared(out: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Arguments that all trainers are given."""
    return {
        "output_dir": out, "learning_rate": rate, "max_steps": steps, "seed": seed, "lr_scheduler_type": "linear",
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False,
        "dataloader_pin_memory": False, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def run(
    job: Job, method: str, adaptation: str, seed: int, rate: float, steps: int, held_out: int, field: Path | None
) -> dict[str, Any]:
    """Train one student, measured along the way. `field`: folder of the gradient that its particles follow, if it was learned."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    reward = job.reward(tokenizer)
    schedule = tuple(step for step in SCHEDULE if step <= steps)
    prompts = job.train(steps * PROMPTS_PER_STEP, seed)
    peft_config = None
    if adaptation == "lora":
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    started = clock()
    with tempfile.TemporaryDirectory() as out:
        common = shared(out, rate, steps, seed)
        pairs = best_and_worst(job, reward, tokenizer, prompts, seed) if method == "dpo" else []
        probe = Probe(job, schedule, job.test(held_out, seed), seed, clock() - started)
        given: dict[str, Any] = {"callbacks": [probe], "peft_config": peft_config}
        trainer: Any
        if method in VGF:
            extra = VGF[method]
            rows = {"sft": 1, "dpo": 2}.get(extra.get("target", "sft"), GENERATIONS)
            args = VGFConfig(
                num_generations=GENERATIONS, max_completion_length=job.max_completion_length, flow_horizon=job.horizon,
                flow_batch_size=PROMPTS_PER_STEP * GENERATIONS, per_device_train_batch_size=PROMPTS_PER_STEP * rows,
                activation_checkpointing=False, flow_field=None if field is None else str(field), **extra, **common,
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
    if probe.points[-1]["kl"] <= KL_END and probe.points[-1]["step"] < schedule[-1]:
        raise RuntimeError(f"{job.name} {method}: stopped at step {probe.points[-1]['step']} of {steps}; nothing of it is kept")
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


def of_base(job: Job, reward: DifferentiableReward, tokenizer: PreTrainedTokenizerBase, flow_batch_size: int) -> VGFSampler:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job.base).to(device)
    return VGFSampler(model, reward, tokenizer, flow_batch_size=flow_batch_size)


def best_and_worst(
    job: Job, reward: DifferentiableReward, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int
) -> list[dict[str, str]]:
    """Best and worst of 8 samples of the base model for every prompt."""
    sampler = of_base(job, reward, tokenizer, PROMPTS_PER_STEP * GENERATIONS)
    seeds = seeds_by_place(seed, prompts)
    out = sampler.sample(prompts, GENERATIONS, TransportBudget(steps=0), job.max_completion_length, seed=seeds).initial
    rows = zip(prompts, out.completions, out.rewards.argmax(1).tolist(), out.rewards.argmin(1).tolist(), strict=True)
    return [{"prompt": p, "chosen": " " + texts[best], "rejected": " " + texts[worst]} for p, texts, best, worst in rows]


# ---- Runs that are kept ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Runs as files of a folder; what is there is not run again. So are fields, each fitted to `field_prompts` prompts."""

    folder: Path
    steps: int
    held_out: int
    log: Callable[[str], None]
    field_prompts: int = FIELD_PROMPTS

    def run(self, job: Job, method: str, adaptation: str, seed: int, rate: float) -> dict[str, Any]:
        path = self.folder / f"{job.name}-{adaptation}-{method}-{seed}-{rate:g}-{self.steps}-{self.held_out}.json"
        if not path.exists():
            field, seconds = self.field(job) if method in ALONG_FIELD else (None, None)
            result = run(job, method, adaptation, seed, rate, self.steps, self.held_out, field)
            write_report(path, {**result, "field_seconds": seconds} if field else result)
            first, last = result["points"][0], result["points"][-1]
            self.log(
                f"{job.name} {adaptation} {method} seed {seed} rate {rate:g}: gold {first['gold']:.3f} -> {last['gold']:.3f}, "
                f"proxy {last['proxy']:.3f}, KL {last['kl']:.2f} at step {last['step']}, {result['seconds_per_step']:.2f} s/step"
            )
        return json.loads(path.read_text())

    def field(self, job: Job) -> tuple[Path, float]:
        """Folder of the learned gradient of a job's reward, fitted once, and the seconds that took."""
        kept = self.folder / f"field-{job.name}-{self.field_prompts}"
        if not kept.is_dir():
            begun, making = clock(), kept.with_name(f"{kept.name}.part")
            tokenizer = AutoTokenizer.from_pretrained(job.base)
            field = fit_field(
                of_base(job, job.reward(tokenizer), tokenizer, 512), job.train(self.field_prompts, FIELD_SEED),
                num_samples=FIELD_SAMPLES, max_completion_length=job.max_completion_length, seed=FIELD_SEED,
            )  # fmt: skip
            field.save_pretrained(making)
            (making / "seconds.json").write_text(json.dumps(clock() - begun))
            making.rename(kept)
            self.log(f"{job.name} field fitted in {json.loads((kept / 'seconds.json').read_text()):.0f} s")
        return kept, json.loads((kept / "seconds.json").read_text())

    def all(self) -> list[dict[str, Any]]:
        files = sorted(self.folder.glob(f"*-{self.steps}-{self.held_out}.json"))
        runs = [json.loads(path.read_text()) for path in files]
        return sorted(runs, key=lambda r: (r["task"], r["adaptation"], METHODS.index(r["method"]), r["seed"], r["learning_rate"]))


def rates(task: str, method: str, adaptation: str) -> list[float]:
    family = FAMILY[method]
    return [rate * (LORA_RATE[family] if adaptation == "lora" else 1.0) for rate in RATES[task][family]]


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


def interval(values: list[float | None]) -> dict[str, Any]:
    """Mean over the seeds that have a value, with the half-width of Student's 95 % interval, and how many these are."""
    there = [v for v in values if v is not None]
    half = None
    if len(there) > 1:
        half = STUDENT[len(there)] * statistics.stdev(there) / math.sqrt(len(there))
    return {"mean": statistics.fmean(there) if there else None, "half_width": half, "seeds": len(there)}


def frontier(runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What a method attains with one seed, by KL: the base model and the ends of its runs; of a single run its whole path."""
    if len(runs) == 1:
        return runs[0]["points"]
    return [runs[0]["points"][0], *sorted((r["points"][-1] for r in runs), key=lambda point: point["kl"])]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of each method on each task."""
    groups: dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]] = {}
    for r in runs:
        groups.setdefault((r["task"], r["adaptation"], shown(r["method"])), {}).setdefault(r["seed"], []).append(r)
    rows = []
    for (task, adaptation, method), own in groups.items():
        rloo = groups.get((task, adaptation, "rloo"), {})
        every = [r for several in own.values() for r in several]
        ours, theirs = ({seed: frontier(several) for seed, several in of.items()} for of in (own, rloo))
        row: dict[str, Any] = {
            "task": task, "adaptation": adaptation, "method": method, "seeds": len(own), "runs_per_seed": len(every) / len(own),
            "learning_rates": sorted({r["learning_rate"] for r in every}),
            "field_seconds": every[0].get("field_seconds"),
        }  # fmt: skip
        both = [(points, theirs[seed]) for seed, points in ours.items() if seed in theirs]
        for kl in KLS:
            row[f"gold_at_kl_{kl:g}"] = interval([at_kl(points, kl, "gold") for points in ours.values()])
            row[f"proxy_at_kl_{kl:g}"] = interval([at_kl(points, kl, "proxy") for points in ours.values()])
            row[f"tokens_at_kl_{kl:g}"] = interval([at_kl(points, kl, "tokens") for points in ours.values()])
            # On the same prompts with the same noise: what of their difficulty differs between seeds is in neither.
            pairs = [tuple(at_kl(points, kl, "gold") for points in pair) for pair in both]
            row[f"gold_over_rloo_at_kl_{kl:g}"] = interval([None if None in pair else pair[0] - pair[1] for pair in pairs])
        row["largest_kl"] = interval([points[-1]["kl"] for points in ours.values()])
        row["largest_kl_gold"] = interval([points[-1]["gold"] for points in ours.values()])
        row["seconds_per_step"] = interval([statistics.fmean(r["seconds_per_step"] for r in several) for several in own.values()])
        step = {
            seed: [statistics.fmean(r["seconds_per_step"] for r in of[seed]) for of in (own, rloo)]
            for seed in own
            if seed in rloo
        }
        row["step_time_ratio_to_rloo"] = interval([mine / its for mine, its in step.values()])
        ratios: list[float | None] = []
        for seed in step:
            gold = at_kl(theirs[seed], 2.0, "gold")
            quickest = [
                None
                if gold is None
                else min((t for r in of[seed] if (t := seconds_to(r["points"], gold)) is not None), default=None)
                for of in (own, rloo)
            ]
            ratios.append(None if None in quickest else quickest[0] / quickest[1])  # type: ignore[operator]
        row["time_ratio_to_rloo_gold_at_kl_2"] = interval(ratios)
        rows.append(row)
    return rows


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the goals come to on each task, counting what every seed of a method reached."""

    def whole(row: dict[str, Any], field: str) -> float | None:
        return row[field]["mean"] if row[field]["seeds"] == row["seeds"] else None

    verdicts = []
    for task, adaptation in dict.fromkeys((r["task"], r["adaptation"]) for r in rows):
        group = [r for r in rows if (r["task"], r["adaptation"]) == (task, adaptation)]
        ours = [r for r in group if r["method"].startswith("vgf_")]
        verdict: dict[str, Any] = {"task": task, "adaptation": adaptation}
        for kl in KLS:
            reached = [r for r in group if whole(r, f"gold_at_kl_{kl:g}") is not None]
            reached.sort(key=lambda r: -r[f"gold_at_kl_{kl:g}"]["mean"])
            verdict[f"methods by gold at KL {kl:g}"] = [r["method"] for r in reached]
        fast = [r for r in ours if whole(r, "time_ratio_to_rloo_gold_at_kl_2") is not None]
        if fast:
            best = min(fast, key=lambda r: r["time_ratio_to_rloo_gold_at_kl_2"]["mean"])
            verdict["shortest time to RLOO's gold at KL 2, in RLOO's"] = [
                best["method"],
                best["time_ratio_to_rloo_gold_at_kl_2"]["mean"],
            ]
        verdict["step time in RLOO's"] = {r["method"]: r["step_time_ratio_to_rloo"]["mean"] for r in ours}
        verdicts.append(verdict)
    return verdicts


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per method, what docs/trainer.md is about."""

    def cell(value: dict[str, Any], seeds: int, digits: int = 2) -> str:
        if value["mean"] is None:
            return "-"
        text = f"{value['mean']:.{digits}f}"
        if value["half_width"] is not None:
            text += f" ± {value['half_width']:.{digits}f}"
        return text + (f" ({value['seeds']}/{seeds})" if value["seeds"] < seeds else "")

    head = ["task", "weights", "method", "runs", *(f"gold at KL {kl:g}" for kl in KLS)]
    head += [f"over RLOO's at {kl:g}" for kl in KLS]
    head += ["largest KL", "gold there", "time of a step / RLOO's", "time to RLOO's gold at KL 2 / RLOO's"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        n = r["seeds"]
        fields = [f"{name}_at_kl_{kl:g}" for name in ("gold", "gold_over_rloo") for kl in KLS]
        fields += ["largest_kl", "largest_kl_gold", "step_time_ratio_to_rloo", "time_ratio_to_rloo_gold_at_kl_2"]
        lines.append(
            f"| {r['task']} | {r['adaptation']} | {r['method']} | {r['runs_per_seed']:.0f} | "
            + " | ".join(cell(r[field], n) for field in fields)
            + " |"
        )
    fits = {r["task"]: r["field_seconds"] for r in rows if r["field_seconds"] is not None}
    if fits:
        each = ", ".join(f"{task} {seconds:.0f}" for task, seconds in fits.items())
        lines += ["", f"Seconds of fitting the learned gradient, once per task and in no time above: {each}."]
    return "\n".join(lines) + "\n"


STYLE = {
    "best_of_n": ("#999999", "-"),
    "best_of_n_policy": ("#999999", "--"),
    "vgf_sft_gradient": ("#8C2D04", ":"),
    "vgf_sft": ("#D55E00", "-"),
    "vgf_weighted": ("#E69F00", "-"),
    "vgf_tilt": ("#009E73", "-"),
    "vgf_dpo": ("#CC79A7", "-"),
    "vgf_advantage": ("#7F00FF", "--"),
    "rloo": ("#0072B2", "-"),
    "grpo": ("#56B4E9", "-"),
    "dpo": ("#222222", ":"),
}


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """A column per task; for full weights and for LoRA gold against KL, between the ends of a method's runs, and below gold
    against seconds along every run: faint lines are single seeds and runs, the strong one above is the mean over seeds."""
    groups = list(dict.fromkeys((r["task"], r["adaptation"]) for r in runs))
    tasks, adaptations = (list(dict.fromkeys(names)) for names in zip(*groups, strict=True))
    figure = Figure(figsize=(5 * len(tasks) + 2, 7 * len(adaptations) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 * len(adaptations), len(tasks), squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)  # until there is something to see
    for group in groups:
        above, below = (axes[2 * adaptations.index(group[1]) + row][tasks.index(group[0])] for row in (0, 1))
        for method, (colour, line) in STYLE.items():
            own: dict[int, list[dict[str, Any]]] = {}
            for r in runs:
                if (r["task"], r["adaptation"]) == group and shown(r["method"]) == method:
                    own.setdefault(r["seed"], []).append(r)
            if not own:
                continue
            seeds = [frontier(several) for several in own.values()]
            for points in seeds:
                above.plot([p["kl"] for p in points], [p["gold"] for p in points], line, color=colour, alpha=0.2, linewidth=0.8)
            together = list(zip(*seeds, strict=False))
            at = [[statistics.fmean(p[f] for p in points) for points in together] for f in ("kl", "gold")]
            above.plot(*at, line, marker=".", color=colour, label=method.replace("_", " "))
            for r in (r for several in own.values() for r in several):
                at = [[p[f] for p in r["points"]] for f in ("seconds", "gold")]
                below.plot(*at, line, color=colour, alpha=0.5, linewidth=0.9)
        above.set_xlim(-0.1, 5.0)
        above.set_xlabel("KL(student || base), nats per completion")
        below.set_xscale("symlog", linthresh=10)
        below.set_xlabel("seconds of training (linear to 10, then logarithmic)")
        for ax in (above, below):
            ax.set_visible(True)
            ax.set_ylabel("gold reward")
            ax.set_title(f"{group[0]}, {'LoRA' if group[1] == 'lora' else 'full weights'}")
            ax.grid(alpha=0.3)
    handles = {t: h for ax in axes.flat for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["content", "tone"], choices=["content", "tone", "e2e"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--adaptations", nargs="+", default=["full"], choices=["full", "lora"])
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[10, 11, 12], help="lower ones were seen while settings were tried"
    )
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of every method")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts a student is measured on")
    parser.add_argument("--models", type=Path, default=ROOT / "outputs" / "demo" / "models", help="world of the demonstration")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument(
        "--e2e-models", type=Path, default=ROOT / "outputs" / "e2e_one_round", help="where benchmarks.e2e_nlg put its models"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "trainer_vs_trl", help="one file per run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "trainer_vs_trl.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "img" / "trainer_vs_trl.png")
    parser.add_argument("--report", action="store_true", help="run nothing: report all runs of this size that are there")
    parser.add_argument(
        "--quick", action="store_true", help="2 steps, 8 prompts, 1 seed, 1 rate, small field: shows that it runs"
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.prompts, args.seeds = 2, 8, args.seeds[:1]
        for of_task in RATES.values():
            of_task.update({family: several[:1] for family, several in of_task.items()})
    if "e2e" in args.tasks and args.e2e_data is None and not args.report:
        parser.error("--tasks e2e needs --e2e-data")
    console = Console(width=160)
    transformers.logging.set_verbosity_error()
    kept = Kept(args.runs, args.steps, args.prompts, console.log, 16 if args.quick else FIELD_PROMPTS)
    if not args.report:
        settings = (
            Settings(steps=300, judge_steps=100, content_pairs=600, tone_pairs=400, members=2) if args.quick else Settings()
        )
        embedded = [task for task in args.tasks if task != "e2e"]
        jobs = embedded_jobs(args.models, settings, embedded, console.log) if embedded else []
        if "e2e" in args.tasks:
            jobs.append(e2e_job(args.e2e_data, args.e2e_models))
        # Seeds outermost: what is there after an interruption is a whole comparison.
        for seed in args.seeds:
            for job in jobs:
                for adaptation in args.adaptations:
                    for method in args.methods:
                        for rate in rates(job.name, method, adaptation):
                            kept.run(job, method, adaptation, seed, rate)
    runs = kept.all()
    rows = summarise(runs)
    write_report(
        args.output,
        {
            "rows": rows,
            "goals": goals(rows),
            "runs": runs,
            "settings": {
                "steps": args.steps, "held_out_prompts": args.prompts, "samples_per_prompt": SAMPLES, "kl_end": KL_END,
                "prompts_per_step": PROMPTS_PER_STEP, "num_generations": GENERATIONS, "rates": RATES, "lora_rate": LORA_RATE,
                "vgf": VGF,
                "field_prompts": kept.field_prompts, "field_samples": FIELD_SAMPLES,
            },
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.is_available(),
                "clock": "wall" if torch.cuda.is_available() else "cpu time of the process",
            },
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "trl": trl.__version__,
            },
        },
    )  # fmt: skip
    write_atomically(args.output.with_suffix(".md"), markdown(rows).encode())
    plot(runs, args.figure)
    console.print(markdown(rows), markup=False)
    console.print_json(json.dumps(goals(rows)))


if __name__ == "__main__":
    main()
