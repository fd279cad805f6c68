"""Settings of all tests, and tiny models saved to disk."""

import os


# Before transformers is imported anywhere: no test may reach for the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings


# Random cases are the same in every run, so that a failure is the fault of a change. A busy core is no reason to fail.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Paths of a language model, a reward model and a reward model of another vocabulary, each with its tokenizer."""
    from tests import tiny

    root = tmp_path_factory.mktemp("tiny")
    ours, other = tiny.tokenizer(), tiny.tokenizer(tiny.WORDS[::-1])
    eos, pad = ours.eos_token_id, ours.pad_token_id
    models = {
        "lm": (tiny.language_model("llama", len(ours), eos=eos, pad=pad), ours),
        "reward": (tiny.reward_model("llama", len(ours), pad=pad), ours),
        "other_reward": (tiny.reward_model("llama", len(ours), pad=pad), other),
    }
    for name, (model, processing_class) in models.items():
        model.save_pretrained(root / name)
        processing_class.save_pretrained(root / name)
    return {name: root / name for name in models}
