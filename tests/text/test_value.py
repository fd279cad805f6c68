"""The value model: it learns a reward it was only told values of, gives its gradient, and resumes to the bit."""

import pytest
import torch

from tests import tiny
from vgf_llm import TransportBudget, VGFSampler
from vgf_llm.text.value import RewardSum, ValueModel


PROMPT = [6, 7]


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def good(tokenizer):
    return tokenizer.convert_tokens_to_ids("good")


def model(tokenizer, family="llama"):
    return tiny.language_model(family, len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)


def texts(tokenizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [torch.randint(5, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]


def feed(value, rows, good):
    value.add([PROMPT] * len(rows), rows, [3.0 * row.count(good) - 1.0 for row in rows])


def scores(value, rows):
    prompt_ids, prompt_mask = tiny.pad_left([PROMPT] * len(rows), 1)
    return value.score_ids(prompt_ids, prompt_mask, *tiny.pad_right(rows, 1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_learns_a_reward_in_its_units(tokenizer, good, family):
    value = ValueModel(model(tokenizer, family), tokenizer, batch_size=64, learning_rate=3e-3)
    rows = texts(tokenizer, 512)
    feed(value, rows, good)
    first = value.fit(10)
    value.fit(60)
    assert value.fit(10) < 0.5 * first
    fresh = texts(tokenizer, 64, seed=1)
    true = torch.tensor([3.0 * row.count(good) - 1.0 for row in fresh])
    said = scores(value, fresh)
    assert torch.corrcoef(torch.stack([true, said]))[0, 1] > 0.8
    assert (said - true).abs().mean() < 1.2  # in the units of the reward, not of a normalised target


def test_its_gradient_points_to_better_tokens(tokenizer, good):
    value = ValueModel(model(tokenizer), tokenizer, batch_size=64, learning_rate=3e-3)
    feed(value, texts(tokenizer, 512), good)
    value.fit(80)
    fresh = texts(tokenizer, 64, seed=1)
    prompt_ids, prompt_mask = tiny.pad_left([PROMPT] * len(fresh), 1)
    ids, mask = tiny.pad_right(fresh, 1)
    _, gradient = value.value_and_grad(prompt_ids, prompt_mask, value.embed(ids), mask)
    advantage = (gradient @ value.table.T)[mask]
    rank = (advantage > advantage[:, good, None]).sum(1).float().mean()
    assert rank < 0.35 * len(tokenizer), rank  # chance is the half


def test_heads_differ_and_doubt_lowers_the_value(tokenizer, good):
    value = ValueModel(model(tokenizer), tokenizer, kappa=0.0)
    feed(value, texts(tokenizer, 128), good)
    value.fit(20)
    rows = texts(tokenizer, 8, seed=2)
    mean = scores(value, rows)
    value.kappa = 1.0
    assert (scores(value, rows) < mean).all()
    value.kappa = 0.0
    prompt_ids, prompt_mask = tiny.pad_left([PROMPT] * len(rows), 1)
    assert value.member_scores_ids(prompt_ids, prompt_mask, *tiny.pad_right(rows, 1)).shape == (4, len(rows))


def test_the_backbone_is_copied_and_the_flow_leaves_no_gradient(tokenizer, good):
    policy = model(tokenizer)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    value = ValueModel(policy, tokenizer)
    feed(value, texts(tokenizer, 64), good)
    value.fit(5)
    assert all(torch.equal(before[name], p) and p.requires_grad for name, p in policy.named_parameters())
    assert not any(p.requires_grad for p in value.parameters())
    prompt_ids, prompt_mask = tiny.pad_left([PROMPT], 1)
    ids, mask = tiny.pad_right([[good]], 1)
    value.value_and_grad(prompt_ids, prompt_mask, value.embed(ids), mask)
    assert all(p.grad is None for p in value.parameters())


def test_two_and_two_updates_are_four(tokenizer, good):
    whole, first, second = (ValueModel(model(tokenizer), tokenizer, replay_size=96, seed=3) for _ in range(3))
    rows = texts(tokenizer, 128)
    for value in (whole, first):
        feed(value, rows[:64], good)
        value.fit(2)
    second.load_state(first.state())
    for value in (whole, second):
        feed(value, rows[64:], good)
        value.fit(2)
    assert len(second.replay) == 96 and second.seen == 128
    assert torch.equal(scores(whole, rows[:8]), scores(second, rows[:8]))
    assert whole.fit(1) == second.fit(1)


def test_heads_alone_can_be_trained(tokenizer, good):
    value = ValueModel(model(tokenizer), tokenizer, lora_rank=0, heads=1)
    assert list(value.trained) == ["score.weight"]
    feed(value, texts(tokenizer, 64), good)
    assert value.fit(60) > value.fit(10)


def test_what_cannot_work_is_refused(tokenizer):
    with pytest.raises(RuntimeError, match="has no samples"):
        ValueModel(model(tokenizer), tokenizer).fit(1)
    for name in ("heads", "replay_size", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            ValueModel(model(tokenizer), tokenizer, **{name: 0})


def test_the_sampler_flows_along_the_value_and_selects_by_the_true_reward(tokenizer, good):
    value = ValueModel(model(tokenizer), tokenizer, batch_size=64, learning_rate=3e-3)
    rows = texts(tokenizer, 512)
    feed(value, rows, good)
    value.fit(80)
    asked = []

    def count(index, prompt_ids, prompt_mask, ids, mask):
        asked.extend(index.tolist())
        return ((ids == good) & mask).sum(1).float() + 10 * index

    sampler = VGFSampler(model(tokenizer), value, tokenizer, flow_batch_size=8)
    prompts = ["the food was", "a room", "and", "nice"]
    budget = TransportBudget(steps=5, step_size=1.0, kl_budget=4.0)
    out = sampler.sample(prompts, 4, budget, 8, scorer=count)
    counted = [[row.count(good) + 10 * i for row in rows] for i, rows in enumerate(out.transported.completion_ids)]
    assert out.transported.rewards.tolist() == counted  # every row was asked for under the index of its own prompt
    assert set(asked) == {0, 1, 2, 3}
    assert (out.transported.rewards - out.initial.rewards).mean() > 0.2
    assert (out.transported.rewards >= out.initial.rewards).all()


def test_a_sum_of_rewards_has_the_sum_of_values_and_gradients(tokenizer):
    from vgf_llm.text import DifferentiableReward

    parts = [DifferentiableReward(tiny.reward_model("llama", len(tokenizer), seed=seed), tokenizer) for seed in (0, 1)]
    both = RewardSum(parts, [2.0, -0.5])
    prompt_ids, prompt_mask = tiny.pad_left([PROMPT, PROMPT], 1)
    ids, mask = tiny.pad_right([[8, 9, 10], [11, 6]], 1)
    values, gradient = both.value_and_grad(prompt_ids, prompt_mask, both.embed(ids), mask)
    each = [part.value_and_grad(prompt_ids, prompt_mask, part.embed(ids), mask) for part in parts]
    torch.testing.assert_close(values, 2 * each[0][0] - 0.5 * each[1][0])
    torch.testing.assert_close(gradient, torch.cat([2 * each[0][1], -0.5 * each[1][1]], -1))
    assert both.width == sum(part.width for part in parts) == both.table.shape[1]
    with pytest.raises(ValueError, match="got 2 and 1"):
        RewardSum(parts, [1.0])
