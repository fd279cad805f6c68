import pytest
import torch

from tests import tiny
from vgf_llm import VGFSampler
from vgf_llm.evaluation.fidelity import substitution_fidelity
from vgf_llm.text import DifferentiableReward


PROMPTS = ["the food was", "the staff were", "a room was", "the room was"]


@pytest.fixture(scope="module")
def sampler():
    tok = tiny.tokenizer()
    model = tiny.language_model("llama", len(tok), eos=tok.eos_token_id, pad=tok.pad_token_id)
    return VGFSampler(model, tiny.reward_model("llama", len(tok), pad=tok.pad_token_id), tok)


class BagOfWords(DifferentiableReward):
    """A reward that is linear in the embeddings, whose gradient must predict every substitution exactly."""

    def forward(self, prompt_ids, prompt_mask, embeds, mask, prefix=None):
        direction = torch.linspace(-1, 1, embeds.shape[-1])
        return ((embeds @ direction) * mask).sum(1)


def test_the_gradient_of_a_linear_reward_predicts_every_substitution(sampler):
    linear = VGFSampler(sampler.model, BagOfWords(sampler.reward._models[0], sampler.processing_class), sampler.processing_class)
    result = substitution_fidelity(linear, PROMPTS, max_completion_length=12)
    assert result["token_proxy"] == pytest.approx(1.0, abs=1e-3)
    assert result["mixture_proxy"] == pytest.approx(1.0, abs=1e-3)
    assert result["path_proxy"] == pytest.approx(1.0, abs=1e-3)
    assert result["substitutions"] > 50


def test_a_gold_reward_equal_to_the_proxy_is_agreed_with(sampler):
    tok = sampler.processing_class

    def gold(prompt, text):
        ids = tok(text)["input_ids"]
        # A text that filled its length has no end of sequence.
        ids = torch.tensor([ids + [tok.eos_token_id] if len(ids) < 44 else ids])
        prompt_ids = torch.tensor([tok(prompt)["input_ids"]])
        ones = torch.ones_like
        return float(sampler.reward.score_ids(prompt_ids, ones(prompt_ids).bool(), ids, ones(ids).bool()))

    result = substitution_fidelity(sampler, PROMPTS, gold, max_completion_length=44, substitutions=8)
    # Not 1: special tokens that an untrained model says are no part of the text.
    assert result["proxy_gold"] > 0.8
    assert result["proxy_sign"] > 0.8
    assert result["path_gold"] == pytest.approx(result["path_proxy"], abs=0.1)


def test_the_same_seed_gives_the_same_figures(sampler):
    first = substitution_fidelity(sampler, PROMPTS, max_completion_length=10, seed=3)
    assert substitution_fidelity(sampler, PROMPTS, max_completion_length=10, seed=3) == first
    assert substitution_fidelity(sampler, PROMPTS, max_completion_length=10, seed=4) != first
