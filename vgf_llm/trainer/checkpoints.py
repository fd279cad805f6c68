"""When a run saves because it has to, and from what it may resume."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback


if TYPE_CHECKING:
    from .vgf_trainer import VGFTrainer

# What a checkpoint must agree on with the run that resumes from it: anything else would change what is sampled or in which order.
RESUMED = (
    "world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations",
    "shuffle_dataset", "seed", "data_seed", "num_generations", "max_completion_length", "temperature", "top_p", "top_k",
    "particle_source", "policy_kl_cap", "flow_steps", "flow_step_size", "flow_kl_budget", "flow_rounds", "flow_movers",
    "flow_horizon", "target", "best_k", "target_temperature", "tilt_kl_cap", "dpo_beta", "mask_truncated_completions",
    "reward_weights", "reward_kappa", "reward_clip_range", "value_heads", "value_lora_rank", "value_learning_rate",
    "value_replay_size", "value_warmup_samples", "value_batch_size", "value_update_ratio",
)  # fmt: skip
SETTINGS_FILE = "vgf_settings.json"


class SaveOnSigterm(TrainerCallback):
    """SIGTERM, as schedulers send it before they take the machine away, saves at the next step boundary and ends training.

    Processes agree on the step: they need not get the signal at once, or all of them.
    """

    def __init__(self, trainer: VGFTrainer) -> None:
        self.trainer, self.asked = trainer, False
        self.before: Any = None

    def _ask(self, signum: int, frame: Any) -> None:
        self.asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # the only one that may
            self.before = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = torch.tensor(float(self.asked), device=args.device)
        if self.trainer.accelerator.reduce(asked, reduction="sum") > 0:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Path of the newest checkpoint in a folder that was written to its end, or None."""
    numbered = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(numbered, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            world = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))["world_size"]
        except (FileNotFoundError, json.JSONDecodeError):  # the run was killed while it wrote this one
            continue
        random = [path / "rng_state.pth"] if world == 1 else [path / f"rng_state_{r}.pth" for r in range(world)]
        if all(file.exists() for file in [*random, *(path / f"vgf_state_{r}.pt" for r in range(world))]):
            return str(path)
    return None
