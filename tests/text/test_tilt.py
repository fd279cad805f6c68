"""Dense token targets: normalised, capped, climbing, independent of what else is in the call."""

import pytest
import torch

from tests import tiny
from vgf_llm import VGFSampler
from vgf_llm.flow import diagnostics
from vgf_llm.text import decode
from vgf_llm.text.tilt import substitution_fidelity, token_targets


PROMPTS = [[6, 7], [8], [9, 10, 11]]
COMPLETIONS = [[8, 9, 10, 12], [13, 6], [7, 14, 15]]


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def sampler(tokenizer):
    lm = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
    return VGFSampler(lm, tiny.reward_model("llama", len(tokenizer)), tokenizer, candidates=6)


def rows(prompts, completions, extra=0):
    return *tiny.pad_left(prompts, 1, extra), *tiny.pad_right(completions, 1, extra)


def log_mu(sampler, prompt_ids, prompt_mask, ids, mask):
    prefix = decode.read_prompts(sampler.model, prompt_ids, prompt_mask)
    return decode.read(sampler.model, prefix, ids, mask, sampler.base).log_mu


def test_targets_are_distributions_over_the_likeliest_tokens_and_the_rest(sampler):
    batch = rows(PROMPTS, COMPLETIONS)
    targets = token_targets(sampler, *batch, torch.full((3,), 0.5), kl_cap=0.2)
    assert targets.ids.shape == (3, 4, 6) and targets.log_q.shape == (3, 4, 7)
    torch.testing.assert_close(targets.log_q.exp().sum(-1), torch.ones(3, 4))
    mu = log_mu(sampler, *batch)
    assert torch.equal(targets.ids, mu.topk(6, -1).indices)
    assert (targets.kl[batch[3]] <= 0.2 * 1.01).all() and (targets.kl[~batch[3]] == 0).all()
    assert targets.kl.max() > 0.01


def test_a_high_temperature_leaves_the_base_distribution_and_a_low_one_stops_at_the_cap(sampler):
    batch = rows(PROMPTS, COMPLETIONS)
    mu = log_mu(sampler, *batch)
    inside, _ = mu.topk(6, -1)
    still = token_targets(sampler, *batch, torch.full((3,), torch.inf), kl_cap=0.2)
    torch.testing.assert_close(still.log_q[..., :6], inside)
    assert still.kl.abs().max() < 1e-5
    cold = token_targets(sampler, *batch, torch.full((3,), 1e-6), kl_cap=0.05)
    assert cold.kl[batch[3]].max() == pytest.approx(0.05, rel=0.02)


def test_a_known_reward_raises_its_token_by_the_formula(tokenizer):
    lm = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
    sampler = VGFSampler(lm, tiny.counting_reward(tokenizer), tokenizer, candidates=len(tokenizer))
    good = tokenizer.convert_tokens_to_ids("good")
    batch = rows([[6, 7]], [[8, 9, 10]])
    alpha = 0.7
    targets = token_targets(sampler, *batch, torch.tensor([alpha]), kl_cap=10.0)
    mu = log_mu(sampler, *batch)
    q = torch.full_like(mu, -torch.inf).scatter(-1, targets.ids, targets.log_q[..., :-1])
    # The reward counts "good", so its advantage is 1 more than that of every other token but end of sequence and padding.
    others = [t for t in range(len(tokenizer)) if t not in (good, *sampler.eos_ids.tolist(), tokenizer.pad_token_id)]
    gain = (q - mu)[..., good, None] - (q - mu)[..., others]
    torch.testing.assert_close(gain, torch.full_like(gain, 1 / alpha), atol=2e-3, rtol=1e-3)


def test_other_rows_and_padding_change_nothing(sampler):
    together = token_targets(sampler, *rows(PROMPTS, COMPLETIONS, extra=2), torch.full((3,), 0.5), kl_cap=0.2)
    for row in range(3):
        alone = token_targets(sampler, *rows(PROMPTS[row : row + 1], COMPLETIONS[row : row + 1]), torch.tensor([0.5]), kl_cap=0.2)
        length = len(COMPLETIONS[row])
        torch.testing.assert_close(together.log_q[row, :length].exp(), alone.log_q[0, :length].exp(), atol=2e-4, rtol=1e-3)


def test_fidelity_is_one_for_a_linear_reward_and_high_for_a_model(tokenizer, sampler):
    lm = sampler.model
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(5, len(tokenizer), (48, 5), generator=generator).tolist()
    batch = rows([[6, 7]] * 48, completions)
    keys = decode.row_keys(0, [[6, 7]], 48)
    linear = VGFSampler(lm, tiny.SumOfEmbeddings(torch.randn(len(tokenizer), generator=generator).tolist()), tokenizer)
    predicted, actual = substitution_fidelity(linear, *batch, keys)
    torch.testing.assert_close(predicted, actual, atol=1e-4, rtol=1e-4)
    assert actual.abs().min() > 0
    predicted, actual = substitution_fidelity(sampler, *batch, keys)
    assert 0.2 < diagnostics.fidelity(predicted, actual) < 1
    again, _ = substitution_fidelity(sampler, *(x[:7] for x in batch), keys[:7])
    torch.testing.assert_close(again, predicted[:7], atol=1e-4, rtol=1e-4)
