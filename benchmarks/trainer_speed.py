"""Seconds of an optimizer step of `VGFTrainer` beside TRL's `RLOOTrainer`, on the same random models, prompts and numbers.

    python -m benchmarks.trainer_speed                     small models, on whatever torch finds
    python -m benchmarks.trainer_speed --preset 2.8b       Pythia-2.8B shapes for policy and reward, for a GPU of 141 GB

LoRA of rank 16 on all linear layers, one pass over every phase of generation. Both generate with transformers' models, no vLLM:
`RLOOTrainer` by `generate`, `VGFTrainer` by its own decoding. Completions end at the limit only. The first step, which sets up
kernels and memory, is not counted; the figure is the median of the others. What a step is worth is another question:
docs/comparison.md.

Writes benchmarks/results/trainer_speed.json; trainer_speed_2.8b_cuda.json and so on for another preset and on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from dataclasses import replace
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from benchmarks.speed import PRESETS, ROOT, VOCABULARY, build, named, now, prompts_of
from benchmarks.trainer_vs_trl import as_function
from vgf_llm import VGFConfig, VGFTrainer
from vgf_llm.evaluation.report import write_report


# Rows of a forward and backward of the update; the rest of a step is accumulated.
MICRO = 16
METHODS: dict[str, dict[str, Any]] = {
    "VGF: tilt, along a field of half the layers": {"target": "tilt"},
    "VGF: sft, best of N": {"target": "sft", "best_k": 8, "flow_steps": 0},
    "RLOO (TRL)": {},
}


class Clock(TrainerCallback):
    """Seconds of every step and its peak of memory, from the end of the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, 0.0
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = now(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        ended = now(self.device)
        self.seconds.append(ended - self.last)
        if self.device.type == "cuda":
            self.peaks.append(torch.cuda.max_memory_allocated(self.device) / 2**30)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.last = now(self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, load, _ = PRESETS[args.preset]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in METHODS.items():
            clock, logs = step(settings, args, device, dtype, folder)
            rows[name] = {
                "seconds": statistics.median(clock.seconds[1:]), "all": clock.seconds, "peak_gib": max(clock.peaks, default=None),
                "parts": {key: logs[key] for key in sorted(logs) if key.startswith("seconds/")},
            }  # fmt: skip
            if device.type == "cuda":
                torch.cuda.empty_cache()
    report = {
        "preset": args.preset, "prompts": load.prompts, "num_generations": load.num_particles, "length": load.length,
        "prompt_length": load.prompt_length, "micro_batch": MICRO, "precision": str(dtype).removeprefix("torch."), "steps": rows,
        "machine": {
            "processor": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, trl, peft)},
        },
    }  # fmt: skip
    write_report(ROOT / "benchmarks" / "results" / named("trainer_speed", args.preset, device.type), report)
    table = Table(title=f"seconds of a step, {load.prompts} prompts, {load.num_particles} completions each", box=None)
    for column in ("", "seconds", "peak GiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.2f}", "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}")
    Console(width=140).print(table)


def step(
    settings: dict[str, Any], args: argparse.Namespace, device: torch.device, dtype: torch.dtype, folder: str
) -> tuple[Clock, dict[str, float]]:
    """Train for a few steps; the clock, and what the trainer logged last."""
    shape, load, _ = PRESETS[args.preset]
    sampler, fields, words = build(shape, VOCABULARY[args.preset], device.type, 1, dtype)
    policy, reward, tokenizer = sampler.model, sampler.reward, sampler.processing_class
    prompts = prompts_of(words, replace(load, prompts=load.prompts * args.steps))
    dataset, completions = Dataset.from_dict({"prompt": prompts}), load.prompts * load.num_particles
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": args.steps, "num_generations": load.num_particles, "report_to": "none",
        "max_completion_length": load.length, "per_device_train_batch_size": MICRO, "learning_rate": 1e-5, "logging_steps": 1,
        "gradient_accumulation_steps": completions // MICRO, "bf16": dtype == torch.bfloat16, "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": device.type == "cpu", "dataloader_pin_memory": False,
    }  # fmt: skip
    clock = Clock(device)
    given: dict[str, Any] = {
        "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        "processing_class": tokenizer, "callbacks": [clock],
    }  # fmt: skip
    trainer: Any
    if settings.get("target") == "tilt":
        fields["a field of half the layers"].save_pretrained(f"{folder}/field")
        settings = {**settings, "flow_field": f"{folder}/field"}
    del fields  # they are as large as the models
    if settings:
        config = VGFConfig(flow_batch_size=completions, **settings, **common)
        trainer = VGFTrainer(policy, reward, config, dataset, **given)
    else:
        trainer = RLOOTrainer(policy, as_function(reward, tokenizer), RLOOConfig(beta=0.0, **common), dataset, **given)
    trainer.train()
    last: dict[str, float] = {}
    for entry in trainer.state.log_history:
        last.update({key: value for key, value in entry.items() if isinstance(value, float)})
    return clock, last


if __name__ == "__main__":
    main()
