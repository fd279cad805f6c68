"""When a run saves because it has to, and from what it may resume."""

from __future__ import annotations

import json
import os
import shutil
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
    "chat_template_kwargs",
    "particle_source", "policy_kl_cap", "flow_steps", "flow_step_size", "flow_kl_budget", "flow_rounds", "flow_movers",
    "flow_horizon", "flow_field", "target", "best_k", "target_temperature", "tilt_kl_cap", "dpo_beta",
    "mask_truncated_completions", "reward_weights", "reward_kappa", "reward_clip_range", "value_heads", "value_lora_rank",
    "value_learning_rate", "value_replay_size", "value_warmup_samples", "value_batch_size", "value_update_ratio",
)  # fmt: skip
SETTINGS_FILE = "vgf_settings.json"
MANIFEST_FILE = "vgf_manifest.json"


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


def check_writable(folder: Path) -> None:
    """Raises OSError, naming it, where no file can be made: known before models are loaded, not at the first checkpoint."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"output_dir {folder} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {folder} cannot be written: {existing} is read-only for this user; choose another")


def write_manifest(folder: Path) -> None:
    """The last word on a checkpoint: the size of every file in it. What is not whole has none, or does not agree with it."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if _counts(path)}
    partial = folder / f"{MANIFEST_FILE}.partial"
    partial.write_text(json.dumps(files, indent=1), encoding="utf-8")
    partial.replace(folder / MANIFEST_FILE)  # there at once, or not at all


def _counts(path: Path) -> bool:
    # A model card may be edited; it is not loaded.
    return path.is_file() and path.name != "README.md" and not path.name.startswith(MANIFEST_FILE)


def check_whole(checkpoint: str | Path) -> None:
    """Raises ValueError, saying what is wrong, unless this is a checkpoint of VGFTrainer that was written to its end."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint {folder}: give its folder, or resume from 'auto'")
    if not (folder / SETTINGS_FILE).exists():
        raise ValueError(f"{folder} was not made by VGFTrainer: it has no {SETTINGS_FILE}")
    other = "resume from another one, or from 'auto', which takes the newest that is whole"
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} was not written to its end: it has no {MANIFEST_FILE}; {other}") from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST_FILE} is broken ({error}); {other}") from None
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{folder} is damaged: {name} {what}; {other}")


def whole_checkpoints(folder: str | Path) -> list[str]:
    """Paths of the checkpoints in a folder that were written to their end, newest first."""
    numbered = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    whole = []
    for path in sorted(numbered, key=_step, reverse=True):
        try:
            check_whole(path)
        except ValueError:  # the run was killed while it wrote or deleted this one
            continue
        whole.append(str(path))
    return whole


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Path of the newest checkpoint in a folder that was written to its end, or None."""
    return next(iter(whole_checkpoints(folder)), None)


def delete_old_checkpoints(folder: Path, keep: int, protected: str | None) -> None:
    """Delete all but the newest `keep` whole checkpoints, and what older runs left unfinished.

    By step and not by time of modification, as `transformers` has it: a clock that was set back would make the checkpoint just
    written the oldest. `protected` stays, and counts.
    """
    whole = [Path(path) for path in whole_checkpoints(folder)]
    stay = set(whole[:1])  # the one to resume from
    stay |= {path for path in whole if protected is not None and path.resolve() == Path(protected).resolve()}
    stay |= set([path for path in whole if path not in stay][: max(0, keep - len(stay))])
    numbered = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    ours = [path for path in numbered if any(path.glob("vgf_*"))]  # another trainer's are not ours to delete
    for path in ours:
        if path not in stay:
            (path / MANIFEST_FILE).unlink(missing_ok=True)  # no longer whole, from here on
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[-1])
