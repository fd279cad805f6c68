"""Models by path or hub id, as the commands take them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vgf_llm.text import DifferentiableReward, VGFSampler
from vgf_llm.text.field import GradientField
from vgf_llm.text.loading import load_whole


def load_language_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, on the GPU if there is one, and its tokenizer, with a padding token.

    A directory of adapters is a model too: they are merged into the base model that it names.

    Raises:
        ValueError: it cannot be loaded; the message names it.
    """
    check_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:  # whose message need not name the model
        raise ValueError(f"cannot load the tokenizer of {name}: {error}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any
    if _is_adapter(name):
        from peft import AutoPeftModelForCausalLM  # without adapters, torch and transformers are enough

        model = AutoPeftModelForCausalLM.from_pretrained(name).merge_and_unload()
    else:
        model = load_whole(AutoModelForCausalLM, name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def load_reward(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> DifferentiableReward:
    """Reward model(s) in the vocabulary of `tokenizer`; several are an ensemble.

    A `calibration.json` (mean and standard deviation of the score) beside every one of them makes an ensemble comparable.

    Raises:
        ValueError: one cannot be loaded, has another vocabulary, or a broken calibration; the message names it.
    """
    for name in names:
        check_model(name)
    beside = [Path(name) / "calibration.json" for name in names]
    calibration = [_read_calibration(path) for path in beside] if all(path.is_file() for path in beside) else None
    return DifferentiableReward(list(names), tokenizer, calibration=calibration)


def load_sampler(
    model: str, reward_models: Sequence[str], *, gradient_field: str | Path | None = None, **options: Any
) -> VGFSampler:
    """A sampler from paths or hub ids.

    Args:
        model, reward_models: see `load_language_model` and `load_reward`.
        gradient_field: folder of a learned gradient, along which particles are drawn. Default: none.
        options: the others of `VGFSampler`.

    Raises:
        ValueError: those of `load_language_model`, `load_reward`, `GradientField.from_pretrained` and `VGFSampler`.
        OSError: the folder holds no field.
    """
    for name in (model, *reward_models):  # before anything large is read
        check_model(name)
    field = None if gradient_field is None else GradientField.from_pretrained(gradient_field)
    language_model, tokenizer = load_language_model(model)
    return VGFSampler(language_model, load_reward(reward_models, tokenizer), tokenizer, gradient_field=field, **options)


def check_model(name: str) -> None:
    """Raises ValueError, naming the model, where there is none of this name."""
    if _is_adapter(name):
        return
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:  # whose message need not name the model
        raise ValueError(f"cannot load {name}: {error}") from None


def _is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def _read_calibration(path: Path) -> tuple[float, float]:
    try:
        mean, std = map(float, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} does not hold [mean, standard deviation] of the reward model's score") from None
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"{path}: mean {mean} and standard deviation {std} must be finite, the latter positive")
    return mean, std
