"""VGFSampler by its contract: best-of-N at budget zero, never worse, independent of the call, and loud on errors."""

import inspect
import itertools
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFSampler, decode


TOKENIZER = tiny.tokenizer(chat=True)
VOCAB, EOS, PAD = len(TOKENIZER), TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
PROMPTS = ["the food was", "good", "a bad room and the staff", "but the nice staff were", "poor food", "fine"]
LENGTH = 7


def build(family="llama", reward="llama", processing_class=TOKENIZER, **arguments):
    model = tiny.language_model(family, VOCAB, eos=EOS, seed=3)
    if reward == "count":
        reward = tiny.counting_reward(processing_class)
    elif isinstance(reward, str):
        reward = tiny.reward_model(reward, VOCAB)
    return VGFSampler(model, reward, processing_class, **arguments)


SAMPLERS = {family: build(family, reward) for family, reward in zip(tiny.FAMILIES, tiny.FAMILIES[::-1], strict=True)}
ENSEMBLE = build(reward=DifferentiableReward([tiny.reward_model("llama", VOCAB, seed=s) for s in range(3)], TOKENIZER))
REWARD_ALONE = build(likelihood_weight=0.0)
COUNT = build(reward="count")
BUDGET = TransportBudget(steps=3, step_size=0.3, kl_budget=1.0, rounds=2)


def flat(rows):
    return [item for row in rows for item in row]


def random_budget(rng):
    svgd = rng.random() < 0.3
    return TransportBudget(
        steps=rng.randint(1, 4), step_size=rng.choice([0.1, 0.5]), kl_budget=rng.choice([0.3, 2.0]),
        rounds=rng.randint(1, 3), normalize=rng.choice(["none", "particle", "prompt"]),
        coupling="svgd" if svgd else "none", temperature=rng.choice([0.0, 0.5]) if svgd else 0.0,
    )  # fmt: skip


def result_of(output, prompt):
    """Everything of one prompt that is text or an index."""
    return (
        output.completions[prompt],
        output.completion_ids[prompt],
        int(output.selected[prompt]),
        output.initial.completion_ids[prompt],
        output.transported.completion_ids[prompt],
        output.transported.completions[prompt],
    )


def numbers_of(output, prompt):
    return torch.stack(
        [
            *(getattr(p, name)[prompt] for p in (output.initial, output.transported) for name in PARTICLE_NUMBERS),
            output.generations[prompt].expand(output.initial.rewards.shape[1]),
        ]
    )


PARTICLE_NUMBERS = ("rewards", "logprobs", "kl", "log_ratio")


# Budget zero and the promise of selection


@pytest.mark.parametrize("zero", [TransportBudget(steps=0), TransportBudget(kl_budget=0.0)], ids=["steps", "kl_budget"])
@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), ENSEMBLE], ids=[*SAMPLERS, "ensemble"])
def test_budget_zero_is_best_of_n_bit_for_bit(sampler, zero):
    output = sampler.sample(PROMPTS, 6, zero, LENGTH, seed=4)
    for b in range(len(PROMPTS)):
        best = int(output.initial.rewards[b].argmax())
        assert output.completion_ids[b] == output.initial.completion_ids[b][best]
        assert output.completions[b] == output.initial.completions[b][best]
        assert output.rewards[b] == output.initial.rewards[b, best]
    assert output.transported.completion_ids == output.initial.completion_ids
    assert torch.equal(output.transported.rewards, output.initial.rewards)
    assert (output.transported.kl == 0).all() and output.trace == []
    torch.testing.assert_close(output.generations, torch.full((len(PROMPTS),), 6.0))


@given(case=st.integers(0, 10**9))
@settings(max_examples=25)
def test_initial_particles_do_not_depend_on_the_budget_and_nothing_gets_worse(case):
    rng = random.Random(case)
    sampler = rng.choice([*SAMPLERS.values(), ENSEMBLE, REWARD_ALONE, REWARD_ALONE])
    prompts, n, seed = rng.sample(PROMPTS, 3), rng.randint(1, 5), rng.randrange(1000)
    zero = sampler.sample(prompts, n, TransportBudget(steps=0), LENGTH, seed)
    output = sampler.sample(prompts, n, random_budget(rng), LENGTH, seed)
    assert output.initial.completion_ids == zero.initial.completion_ids
    assert torch.equal(output.initial.rewards, zero.initial.rewards)
    assert (output.rewards >= zero.rewards).all()
    # The density that a particle climbs never falls; with the reward alone that is the reward.
    weight = sampler.likelihood_weight * output.initial.rewards.std(1, correction=0, keepdim=True)
    before, after = (p.rewards + weight * p.logprobs for p in (output.initial, output.transported))
    assert (after >= before - 1e-4).all()
    if not sampler.likelihood_weight:
        assert (output.transported.rewards >= output.initial.rewards).all()
        assert torch.equal(output.rewards, output.transported.rewards.amax(1))


def test_initial_particles_are_a_prefix_of_more_particles_and_a_longer_limit_only_appends():
    few, many = (SAMPLERS["gpt2"].sample(PROMPTS, n, TransportBudget(steps=0), LENGTH, 1) for n in (3, 7))
    assert [row[:3] for row in many.initial.completion_ids] == few.initial.completion_ids
    longer = SAMPLERS["gpt2"].sample(PROMPTS, 3, TransportBudget(steps=0), LENGTH + 4, 1).initial.completion_ids
    for short_row, long_row in zip(few.initial.completion_ids, longer, strict=True):
        assert all(b[: len(a)] == a for a, b in zip(short_row, long_row, strict=True))
        assert all(len(a) == LENGTH or a == b for a, b in zip(short_row, long_row, strict=True))


def test_rewards_are_those_of_the_emitted_tokens():
    """Scored again from the returned ids alone, one by one."""
    for sampler in (SAMPLERS["llama"], ENSEMBLE):
        output = sampler.sample(PROMPTS, 3, BUDGET, LENGTH, 0)
        for b, prompt in enumerate(PROMPTS):
            ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
            for particles in (output.initial, output.transported):
                for n, completion in enumerate(particles.completion_ids[b]):
                    tokens = torch.tensor([completion])
                    score = sampler.reward.score_ids(ids, ids >= 0, tokens, tokens >= 0)
                    assert float(particles.rewards[b, n]) == pytest.approx(float(score), abs=1e-4)


# Completions that another engine drew


@given(case=st.integers(0, 10**9))
@settings(max_examples=15)
def test_completions_of_another_engine_are_moved_as_if_they_had_been_drawn_here(case):
    """Given what the sampler itself would have drawn, whatever else is in the call."""
    rng = random.Random(case)
    sampler = rng.choice([*SAMPLERS.values(), ENSEMBLE])
    prompts, n, seed, budget = rng.sample(PROMPTS, 3), rng.randint(1, 4), rng.randrange(1000), random_budget(rng)
    drawn = sampler.sample(prompts, n, budget, LENGTH, seed)
    order = rng.sample(range(3), rng.randint(1, 3))  # other batch mates
    given_ids = [drawn.initial.completion_ids[b] for b in order]
    output = sampler.sample([prompts[b] for b in order], n, budget, LENGTH, seed, initial=given_ids)
    for place, b in enumerate(order):
        assert result_of(output, place) == result_of(drawn, b)
        torch.testing.assert_close(numbers_of(output, place), numbers_of(drawn, b), atol=2e-4, rtol=2e-4)


def test_given_completions_do_not_depend_on_the_chunk_and_fresh_ones_follow_them():
    budget = TransportBudget(steps=2, step_size=0.3, kl_budget=1.0, rounds=8, generations=12.0)
    drawn = SAMPLERS["llama"].sample(PROMPTS, 4, budget, LENGTH, 5)
    for size in (4, 8, 64):
        sampler = build(flow_batch_size=size)
        sampler.model, sampler.reward = SAMPLERS["llama"].model, SAMPLERS["llama"].reward
        output = sampler.sample(PROMPTS, 4, budget, LENGTH, 5, initial=drawn.initial.completion_ids)
        for b in range(len(PROMPTS)):
            assert result_of(output, b) == result_of(drawn, b)


def test_given_completions_need_not_be_likely_and_are_verified_like_others():
    sampler = SAMPLERS["qwen2"]
    texts = [[TOKENIZER(text)["input_ids"] + [EOS] for text in ("bad bad", "good")] for _ in PROMPTS]
    output = sampler.sample(PROMPTS, 2, BUDGET, LENGTH, 0, initial=texts)
    assert output.initial.completion_ids == texts
    assert (output.rewards >= output.initial.rewards.amax(1)).all()
    ids = torch.tensor([TOKENIZER(PROMPTS[0])["input_ids"] + texts[0][0]])
    with torch.no_grad():
        log_mu = sampler.model(ids).logits[0, -len(texts[0][0]) - 1 : -1].log_softmax(-1)
    expected = log_mu.gather(-1, torch.tensor(texts[0][0])[:, None]).sum()
    torch.testing.assert_close(output.initial.logprobs[0, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ([[[8, EOS]]], r"2 completions \(num_particles\) for each of 2 prompts, got \[1\] completions for 1 prompts"),
        ([[[8, EOS]] * 2, [[8, EOS]]], r"got \[2, 1\]"),
        ([[[8, EOS]] * 2, [[8, EOS], []]], r"initial\[1\]\[1\] has 0 tokens; it must have 1 to 7"),
        ([[[8] * 8] * 2] * 2, r"initial\[0\]\[0\] has 8 tokens"),
        ([[[8, VOCAB, EOS]] * 2] * 2, rf"has the token {VOCAB}, but the tokenizer has {VOCAB} tokens"),
        ([[[-1, EOS]] * 2] * 2, "has the token -1"),
        ([[[8, EOS, 8, 8, 8, 8, 8]] * 2] * 2, "goes on after an end-of-sequence token"),
        ([[[8, 8]] * 2] * 2, r"ends after 2 of 7 tokens without an end-of-sequence token \(\[2\]\)"),
    ],
)
def test_given_completions_that_nothing_can_have_drawn_are_refused(initial, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS["llama"].sample(PROMPTS[:2], 2, BUDGET, LENGTH, 0, initial=initial)


def test_given_completions_outside_of_the_base_distribution_are_refused():
    sampler = build(top_k=1, flow_batch_size=1)
    likeliest = sampler.sample(PROMPTS[:2], 1, BUDGET, LENGTH, 0).initial.completion_ids
    sampler.sample(PROMPTS[:2], 1, BUDGET, LENGTH, 0, initial=likeliest)
    other = 8 if likeliest[1][0][2] != 8 else 9
    likeliest[1][0] = [*likeliest[1][0][:2], other, EOS]
    with pytest.raises(ValueError, match=rf"initial\[1\]\[0\] has the token {other} at position 2, .* never says.*top_k=1"):
        sampler.sample(PROMPTS[:2], 1, BUDGET, LENGTH, 0, initial=likeliest)


# Independence


@given(case=st.integers(0, 10**9))
@settings(max_examples=35)
def test_a_prompts_result_does_not_depend_on_the_rest_of_the_call(case):
    rng = random.Random(case)
    family = rng.choice(tiny.FAMILIES)
    sampler, n, budget = SAMPLERS[family], rng.randint(1, 4), random_budget(rng)
    seed, verify = rng.randrange(1000), rng.random() < 0.7
    prompts = rng.sample(PROMPTS, rng.randint(2, len(PROMPTS)))
    try:
        sampler.flow_batch_size = rng.choice([1, 2 * n, 3 * n + 1, 32])
        sampler.horizon = rng.choice([0, 0, 1, None])
        sampler.gradient_at = rng.choice(["token", "mixture", "path"])
        sampler.movers = rng.choice([None, 1, 2])
        together = sampler.sample(prompts, n, budget, LENGTH, seed, verify=verify)
        sampler.flow_batch_size = 32
        some = rng.sample(range(len(prompts)), rng.randint(1, 2))
        apart = sampler.sample([prompts[i] for i in some], n, budget, LENGTH, seed, verify=verify)
    finally:
        sampler.flow_batch_size, sampler.horizon, sampler.gradient_at = 32, 0, "mixture"
        sampler.movers = None
    for k, b in enumerate(some):
        assert result_of(apart, k) == result_of(together, b)
        torch.testing.assert_close(numbers_of(apart, k), numbers_of(together, b), atol=2e-3, rtol=2e-3)


def test_the_same_seed_gives_the_same_result_and_another_seed_another():
    first, again, other = (COUNT.sample(PROMPTS, 4, BUDGET, LENGTH, seed) for seed in (0, 0, 1))
    for b in range(len(PROMPTS)):
        assert result_of(first, b) == result_of(again, b)
        assert first.initial.completion_ids[b] != other.initial.completion_ids[b]


def test_one_seed_per_prompt_is_the_same_as_one_call_per_seed():
    together = COUNT.sample(["good", "fine", "good", "good"], 3, BUDGET, LENGTH, [5, 6, 7, 5])
    for b, (prompt, seed) in enumerate([("good", 5), ("fine", 6), ("good", 7), ("good", 5)]):
        assert result_of(COUNT.sample([prompt], 3, BUDGET, LENGTH, seed), 0) == result_of(together, b)
    assert result_of(together, 0) != result_of(together, 2)
    with pytest.raises(ValueError, match="one number or one per prompt, got 2 for 1"):
        COUNT.sample(["good"], 3, BUDGET, LENGTH, [5, 6])


def test_sampling_leaves_the_state_of_the_caller_alone():
    before = torch.get_rng_state()
    grad = {name: p.requires_grad for name, p in COUNT.model.named_parameters()}
    weights = {name: p.clone() for name, p in COUNT.model.named_parameters()}
    COUNT.sample(PROMPTS[:2], 2, BUDGET, LENGTH)
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert {name: p.requires_grad for name, p in COUNT.model.named_parameters()} == grad
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in COUNT.model.named_parameters())


# The flow does what it says


def raw_gain(direction=None, budget=BUDGET, sampler=COUNT):
    """Mean reward of the raw transported population minus that of the initial one."""
    output = sampler.sample(PROMPTS, 24, budget, LENGTH, 0, verify=False, direction=direction)
    return float((output.transported.rewards - output.initial.rewards).mean())


def random_direction(gradient, mask, keys):
    generator = torch.Generator().manual_seed(int(keys[0]) % 2**31)
    return torch.randn(gradient.shape, generator=generator) * mask[..., None]


@pytest.mark.parametrize("horizon", [0, None])
def test_the_flow_raises_the_raw_population_and_its_mirror_image_lowers_it(horizon):
    sampler = build(reward="count", horizon=horizon)
    up = raw_gain(sampler=sampler)
    down = raw_gain(lambda gradient, mask, keys: -gradient, sampler=sampler)
    blind = raw_gain(random_direction, sampler=sampler)
    assert up > 0.3 and down < -0.1 and down < blind < up / 2


def test_a_larger_budget_and_more_rounds_carry_the_population_further():
    gains = [raw_gain(budget=TransportBudget(kl_budget=b)) for b in (0.1, 0.5, 2.0)]
    assert 0 < gains[0] < gains[1] < gains[2]
    assert raw_gain(budget=TransportBudget(kl_budget=0.5, rounds=4)) > gains[1]


def test_the_direction_replaces_the_gradient_and_is_told_where_it_may_point():
    seen = []

    def still(gradient, mask, keys):
        seen.append((gradient.shape, mask, keys))
        assert mask.dtype == torch.bool
        return torch.zeros_like(gradient)

    output = COUNT.sample(PROMPTS[:2], 3, BUDGET, LENGTH, 0, verify=False, direction=still)
    assert output.transported.completion_ids == output.initial.completion_ids
    assert len(seen) == BUDGET.steps * BUDGET.rounds
    for shape, mask, keys in seen:
        assert shape[:2] == mask.shape and shape[0] == 6 and keys.shape == (6,)
    # The end of a sequence never moves.
    lengths = [len(ids) - (ids[-1] == EOS) for row in output.initial.completion_ids for ids in row]
    assert seen[0][1].sum(1).tolist() == lengths


def changes(before, after):
    """[B][N] whether the tokens of a particle differ."""
    return [[a != b for a, b in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)]


def test_one_decode_may_spend_the_kl_budget_and_spends_no_more(monkeypatch):
    seen, plain = [], decode.redecode

    def spy(*args, **kwargs):
        seen.append(inspect.signature(plain).bind(*args, **kwargs).arguments)
        return plain(*args, **kwargs)

    monkeypatch.setattr(decode, "redecode", spy)
    sampler = build(reward="count", flow_batch_size=100)
    output = sampler.sample(PROMPTS, 16, TransportBudget(steps=2, kl_budget=0.7), 12, 0, verify=False)
    (given,) = seen
    log_mu, tilt = given["tables"].log_mu, given["tilt"]
    tilted = decode.tilted(log_mu, torch.zeros_like(log_mu).scatter(-1, tilt.ids, tilt.values))
    price = (decode.kl(tilted, log_mu) * given["mask"][:, : log_mu.shape[1]]).sum(1)
    long = given["mask"].sum(1) > 3
    assert long.any() and price[long].tolist() == pytest.approx([0.7] * int(long.sum()), rel=0.01)
    # Up to the first change, and only where there is one.
    assert (output.transported.kl <= 0.7 * 1.01).all()
    moved = torch.tensor(changes(output.initial.completion_ids, output.transported.completion_ids))
    assert moved.any() and not moved.all()
    assert torch.equal(output.transported.kl > 0, moved)


def test_a_particle_that_says_the_same_as_before_has_spent_nothing_where_moves_are_verified():
    for sampler in (*SAMPLERS.values(), ENSEMBLE):
        output = sampler.sample(PROMPTS, 6, TransportBudget(steps=2, kl_budget=0.3), LENGTH, 2)
        for b in range(len(PROMPTS)):
            for n in range(6):
                same = output.initial.completion_ids[b][n] == output.transported.completion_ids[b][n]
                assert same == (float(output.transported.kl[b, n]) == 0)
                if same:
                    assert output.transported.rewards[b, n] == output.initial.rewards[b, n]


def tilts_of(sampler, monkeypatch, **arguments):
    """(tables, ids, mask, tilt, keys) of every decode of one call."""
    seen, plain = [], decode.redecode

    def spy(*args, **kwargs):
        given = inspect.signature(plain).bind(*args, **kwargs).arguments
        seen.append([given[name] for name in ("tables", "ids", "mask", "tilt", "keys")])
        return plain(*args, **kwargs)

    monkeypatch.setattr(decode, "redecode", spy)
    sampler.sample(PROMPTS, 6, BUDGET, LENGTH, 0, **arguments)
    return seen


@pytest.mark.parametrize("candidates", [1, 4, 64])
def test_a_tilt_favours_the_base_models_own_candidates_and_never_the_end_or_padding(candidates, monkeypatch):
    sampler = build(candidates=candidates)
    for tables, ids, mask, tilt, _ in tilts_of(sampler, monkeypatch):
        ranks = tables.log_mu.argsort(-1, descending=True).argsort(-1)
        width, values = tilt.ids.shape[1], tilt.values
        assert (ranks.gather(-1, tilt.ids) < candidates).all() and tilt.ids.shape[2] == min(candidates, ranks.shape[-1])
        assert (values[(tilt.ids == EOS) | (tilt.ids == PAD)] == 0).all()
        assert (values[~mask[:, :width]] == 0).all() and (values[ids[:, :width] == EOS] == 0).all()
        assert (values != 0).any()


AUTO = TransportBudget.auto(12)


def test_a_budget_in_generations_is_spent_and_not_overspent():
    for sampler in (SAMPLERS["llama"], ENSEMBLE, COUNT):
        output = sampler.sample(PROMPTS, 6, AUTO, LENGTH, 3)
        # The last turn may begin with one completion left and take two, each longer than the mean; idle turns count as well.
        assert (output.generations >= 9).all() and (output.generations <= 15).all()
        assert output.trace == []
        assert (output.rewards >= output.initial.rewards.amax(1)).all()


def test_a_budget_in_generations_without_moves_is_best_of_as_many(monkeypatch):
    """Where the gradient leads nowhere, fresh samples are drawn: the particles that a larger N would have had."""
    sampler = build(movers=2, flow_batch_size=100)
    budget = replace(AUTO, generations=12.0)
    output = sampler.sample(PROMPTS, 6, budget, LENGTH, 3, direction=lambda g, mask, keys: torch.zeros_like(g))
    large = sampler.sample(PROMPTS, 12, TransportBudget(steps=0), LENGTH, 3).initial
    for b in range(len(PROMPTS)):
        # A turn that changed nothing counts a quarter, so that four or five samples were drawn behind the first six.
        most = max(large.rewards[b, :10].max(), output.initial.rewards[b].max())
        assert output.rewards[b] >= most - 1e-5
        assert any(output.completion_ids[b] == ids for ids in large.completion_ids[b])
        assert (output.transported.kl[b] == 0).all()


def test_under_a_budget_in_generations_a_prompt_does_not_depend_on_its_batch_mates():
    together = ENSEMBLE.sample(PROMPTS, 4, AUTO, LENGTH, 5)
    for b, prompt in enumerate(PROMPTS):
        alone = ENSEMBLE.sample([prompt], 4, AUTO, LENGTH, 5)
        assert result_of(alone, 0) == result_of(together, b)
        assert alone.generations[0].item() == pytest.approx(together.generations[b].item())


def test_every_round_has_noise_of_its_own(monkeypatch):
    keys = torch.cat([decoded[-1] for decoded in tilts_of(COUNT, monkeypatch)])
    assert len(keys) == len(keys.unique()) == BUDGET.rounds * len(PROMPTS) * 6


def test_greedy_particles_have_nowhere_to_go():
    output = build(reward="count", top_k=1).sample(PROMPTS, 3, BUDGET, LENGTH, 0, verify=False)
    assert output.transported.completion_ids == output.initial.completion_ids
    assert all(row[0] == row[1] == row[2] for row in output.initial.completion_ids)


def test_nothing_leaves_the_support_of_the_base_distribution():
    sampler = build(reward="count", top_k=3)
    output = sampler.sample(PROMPTS, 8, TransportBudget(kl_budget=5.0, rounds=2), LENGTH, 0, verify=False)
    for b, prompt in enumerate(PROMPTS):
        for completion in output.transported.completion_ids[b]:
            tokens = TOKENIZER(prompt)["input_ids"] + completion
            with torch.no_grad():
                logits = sampler.model(torch.tensor([tokens])).logits[0]
            for t in range(len(completion)):
                at = len(tokens) - len(completion) + t
                assert (logits[at - 1] > logits[at - 1, tokens[at]] + 1e-4).sum() < 3


# Movers


def states(sampler, rounds, n, verify):
    """Outputs with 0, 1, ... rounds: the populations that one call with all of them passes through."""
    budgets = [TransportBudget(steps=0), *(TransportBudget(steps=2, rounds=r + 1) for r in range(rounds))]
    return [sampler.sample(PROMPTS, n, budget, LENGTH, 0, verify=verify) for budget in budgets]


@pytest.mark.parametrize("verify", [True, False])
def test_a_round_moves_the_best_particles_and_no_more_than_the_movers(verify):
    n, movers = 6, 2
    sampler = build(reward="count", movers=movers)
    passed = states(sampler, 3, n, verify)
    for before, after in itertools.pairwise(passed):
        best = before.transported.rewards.topk(movers, 1).values[:, -1:]
        moved = torch.tensor(changes(before.transported.completion_ids, after.transported.completion_ids))
        assert moved.any() and (moved.sum(1) <= movers).all()
        assert (before.transported.rewards >= best)[moved].all()
        assert torch.equal(after.transported.rewards[~moved], before.transported.rewards[~moved])
        assert torch.equal(after.transported.kl[~moved], before.transported.kl[~moved])
    assert [trace.displacement.shape for trace in passed[-1].trace] == [(2, len(PROMPTS), movers)] * 3
    everyone = COUNT.sample(PROMPTS, n, TransportBudget(steps=2), LENGTH, 0, verify=verify)
    assert (passed[1].generations <= everyone.generations).all()
    assert passed[1].generations.sum() < everyone.generations.sum()


def test_all_particles_as_movers_are_the_default():
    plain = COUNT.sample(PROMPTS, 4, BUDGET, LENGTH, 0)
    for movers in (4, 9):
        all_of_them = build(reward="count", movers=movers).sample(PROMPTS, 4, BUDGET, LENGTH, 0)
        for b in range(len(PROMPTS)):
            assert result_of(all_of_them, b) == result_of(plain, b)
            assert torch.equal(numbers_of(all_of_them, b), numbers_of(plain, b))


@pytest.mark.parametrize("movers", [1, 3])
def test_movers_of_a_prompt_do_not_depend_on_the_rest_of_the_call(movers):
    sampler = build(reward="llama", movers=movers)
    together = sampler.sample(PROMPTS, 5, BUDGET, LENGTH, 0)
    assert any(flat(changes(together.initial.completion_ids, together.transported.completion_ids)))
    for b, prompt in enumerate(PROMPTS):
        alone = sampler.sample([prompt], 5, BUDGET, LENGTH, 0)
        assert result_of(alone, 0) == result_of(together, b)
        torch.testing.assert_close(numbers_of(alone, 0), numbers_of(together, b), atol=2e-3, rtol=2e-3)


# What a move costs in likelihood


def test_a_dear_move_is_refused_and_a_cheap_one_taken():
    plain, dear = (build(reward="llama", likelihood_weight=w).sample(PROMPTS, 6, BUDGET, LENGTH, 0) for w in (0.0, 1e6))
    rises = plain.transported.logprobs - plain.initial.logprobs
    moved = torch.tensor(changes(plain.initial.completion_ids, plain.transported.completion_ids))
    assert (rises[moved] < 0).any()
    assert (dear.transported.logprobs >= dear.initial.logprobs - 1e-4).all()
    assert any(flat(changes(dear.initial.completion_ids, dear.transported.completion_ids)))


def test_the_scale_of_the_reward_changes_nothing():
    model = tiny.reward_model("llama", VOCAB)
    one, hundred = (
        build(reward=DifferentiableReward([model], TOKENIZER, calibration=[(0.0, s)]), likelihood_weight=0.5) for s in (1.0, 0.01)
    )
    outputs = [sampler.sample(PROMPTS, 6, BUDGET, LENGTH, 0) for sampler in (one, hundred)]
    assert outputs[0].transported.completion_ids == outputs[1].transported.completion_ids


def test_a_single_particle_is_judged_by_its_reward_alone():
    outputs = [build(reward="llama", likelihood_weight=w).sample(PROMPTS, 1, BUDGET, LENGTH, 0) for w in (0.0, 10.0)]
    assert outputs[0].completion_ids == outputs[1].completion_ids
    assert (outputs[0].transported.rewards >= outputs[0].initial.rewards).all()


# Shapes and bookkeeping


@pytest.mark.parametrize("flow_batch_size", [4, 100])
def test_the_output_has_the_shapes_it_documents(flow_batch_size):
    sampler = build(reward="count", flow_batch_size=flow_batch_size)
    b, n = len(PROMPTS), 3
    output = sampler.sample(PROMPTS, n, BUDGET, LENGTH, 0)
    assert len(output.completions) == len(output.completion_ids) == b
    assert output.rewards.shape == output.selected.shape == output.generations.shape == (b,)
    for particles in (output.initial, output.transported):
        assert [len(row) for row in particles.completions] == [len(row) for row in particles.completion_ids] == [n] * b
        assert all(getattr(particles, name).shape == (b, n) for name in PARTICLE_NUMBERS)
        for ids, text in zip(
            flat(particles.completion_ids),
            flat(particles.completions),
            strict=True,
        ):
            assert 1 <= len(ids) <= LENGTH and EOS not in ids[:-1]
            assert text == TOKENIZER.decode(ids, skip_special_tokens=True) and "<eos>" not in text
    assert len(output.trace) == BUDGET.rounds
    for trace in output.trace:
        assert trace.values.shape == trace.score_norm.shape == trace.displacement.shape == (BUDGET.steps, b, n)
        assert trace.bandwidth.shape == (BUDGET.steps, b)
    for row in range(b):
        k = int(output.selected[row])
        chosen = output.transported if k < n else output.initial
        assert output.completion_ids[row] == chosen.completion_ids[row][k % n]
        assert output.completions[row] == chosen.completions[row][k % n]
        assert output.rewards[row] == chosen.rewards[row, k % n]
    assert ((output.generations >= n - 1e-4) & (output.generations < n * (1 + BUDGET.rounds) * 3)).all()


def test_generations_count_the_tokens_that_were_decoded_one_by_one():
    budget = TransportBudget(kl_budget=3.0)
    output = COUNT.sample(PROMPTS, 8, budget, LENGTH, 0, verify=False)
    for b in range(len(PROMPTS)):
        old, new = output.initial.completion_ids[b], output.transported.completion_ids[b]
        redone = 0
        for a, c in zip(old, new, strict=True):
            same = next((t for t, (x, y) in enumerate(zip(a, c, strict=False)) if x != y), None)
            redone += 0 if same is None else len(c) - same - 1
        mean = sum(map(len, old)) / len(old)
        assert float(output.generations[b]) == pytest.approx(8 + redone / mean, rel=1e-4)


def test_chat_messages_are_read_through_the_template():
    messages = [{"role": "user", "content": "good food"}]
    chat = COUNT.sample([messages], 3, BUDGET, LENGTH, 0)
    plain = COUNT.sample(["user good food assistant"], 3, BUDGET, LENGTH, 0)
    assert result_of(chat, 0) == result_of(plain, 0)
    mixed = COUNT.sample(["fine", messages], 3, BUDGET, LENGTH, 0)
    assert result_of(mixed, 1) == result_of(plain, 0)


def test_the_chat_template_is_given_its_arguments():
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template + "{% if nice %} nice{% endif %}"
    sampler = build(reward="count", processing_class=tokenizer, chat_template_kwargs={"nice": True})
    messages = [{"role": "user", "content": "good food"}]
    assert tokenizer.decode(sampler.encode([messages], LENGTH)[0]) == "user good food assistant nice"
    assert sampler.encode(["good food"], LENGTH) == COUNT.encode(["good food"], LENGTH)


def test_all_end_of_sequence_tokens_of_the_generation_config_end_a_completion():
    model = tiny.language_model("llama", VOCAB, eos=EOS, seed=3)
    good = TOKENIZER.convert_tokens_to_ids("good")
    model.generation_config.eos_token_id = [good]
    output = VGFSampler(model, tiny.counting_reward(TOKENIZER), TOKENIZER).sample(PROMPTS, 12, BUDGET, 10, 0)
    rows = flat(output.initial.completion_ids + output.transported.completion_ids)
    assert all(not {EOS, good} & set(ids[:-1]) for ids in rows)
    assert {ids[-1] for ids in rows} >= {EOS, good}


def test_paths_give_what_objects_give(saved):
    by_path = VGFSampler(str(saved["lm"]), saved["reward"]).sample(PROMPTS[:3], 3, BUDGET, LENGTH, 0)
    tokenizer = tiny.tokenizer()
    objects = VGFSampler(
        tiny.language_model("llama", len(tokenizer), eos=EOS, pad=PAD),
        tiny.reward_model("llama", len(tokenizer), pad=PAD),
        tokenizer,
    ).sample(PROMPTS[:3], 3, BUDGET, LENGTH, 0)
    for b in range(3):
        assert result_of(by_path, b) == result_of(objects, b)


def test_padding_with_the_end_of_sequence_token_changes_nothing():
    same = tiny.tokenizer(chat=True)
    same.pad_token = same.eos_token
    a = build(reward="gpt2").sample(PROMPTS, 3, BUDGET, LENGTH, 0)
    b = build(reward="gpt2", processing_class=same).sample(PROMPTS, 3, BUDGET, LENGTH, 0)
    assert a.initial.completion_ids == b.initial.completion_ids
    torch.testing.assert_close(a.initial.rewards, b.initial.rewards)


def test_a_prompt_that_just_fits_the_context_is_sampled():
    """Learned positions: one more would be out of range."""
    model = tiny.language_model("gpt2", VOCAB, eos=EOS, positions=12)
    sampler = VGFSampler(model, tiny.reward_model("gpt2", VOCAB, positions=12), TOKENIZER)
    output = sampler.sample(["good bad fine poor"], 8, BUDGET, 8, 0)
    assert max(len(ids) for ids in output.initial.completion_ids[0]) == 8
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens.*max_completion_length=8.*context of 12.*shorten"):
        sampler.sample(["good", "good bad fine poor the"], 2, BUDGET, 8)


def test_the_default_budget_moves_something_for_the_better():
    output = COUNT.sample(PROMPTS, 6, max_completion_length=LENGTH)
    assert (output.transported.rewards >= output.initial.rewards).all()
    assert (output.transported.rewards > output.initial.rewards).any()


# Bad input: the type of the exception, and a message that says what to do


def test_a_reward_model_with_another_vocabulary_is_refused(saved):
    with pytest.raises(ValueError, match="another vocabulary than the policy.*use a reward model trained with"):
        VGFSampler(saved["lm"], saved["other_reward"])
    with pytest.raises(ValueError, match="gradients need one vocabulary; use a reward model"):
        build(reward=tiny.reward_model("llama", VOCAB - 1))


def test_a_reward_without_gradient_can_select_but_not_drive():
    reward = tiny.reward_model("llama", VOCAB)
    reward.model.forward = torch.no_grad()(reward.model.forward)
    sampler = build(reward=reward)
    assert len(sampler.sample(PROMPTS, 2, TransportBudget(steps=0), LENGTH).completions) == len(PROMPTS)
    with pytest.raises(ValueError, match="no gradient at its input embeddings.*steps=0 to select by reward only"):
        sampler.sample(PROMPTS, 2, BUDGET, LENGTH)


@pytest.mark.parametrize("prompts", [[], (), "the food was"])
def test_no_prompts_or_a_bare_string_are_refused(prompts):
    with pytest.raises(ValueError, match="prompts must be a non-empty list of strings or of lists of chat messages"):
        COUNT.sample(prompts)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has no tokens.*at least one"):
        COUNT.sample(["good", ""], 2, BUDGET, LENGTH)


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_particle_is_refused(n):
    with pytest.raises(ValueError, match=f"num_particles must be at least 1, got {n}"):
        COUNT.sample(PROMPTS, n, BUDGET, LENGTH)


def test_no_room_for_a_completion_is_refused():
    with pytest.raises(ValueError, match="max_completion_length must be at least 1, got 0"):
        COUNT.sample(PROMPTS, 2, BUDGET, 0)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        COUNT.sample(PROMPTS, 2, TransportBudget(steps=-1), LENGTH)


@pytest.mark.parametrize(("worth", "says"), [(float("nan"), "nan"), (3e38, "inf"), (-3e38, "-inf")])
def test_a_reward_that_is_not_finite_is_refused_with_the_text_it_was_given_to(worth, says):
    reward = tiny.counting_reward(TOKENIZER)
    with torch.no_grad():
        reward.score.weight[0, TOKENIZER.convert_tokens_to_ids("good")] = worth
    sampler = build(reward=reward)
    for budget in (TransportBudget(steps=0), BUDGET):
        with pytest.raises(ValueError, match=f"reward of a completion is {says}: check the reward model.*completion was '"):
            sampler.sample(["good good good"], 4, budget, LENGTH)


def test_a_tokenizer_without_padding_token_is_refused():
    tokenizer = tiny.tokenizer(pad=None)
    model = tiny.language_model("llama", len(tokenizer), eos=1)
    with pytest.raises(ValueError, match="no padding token: set one, e.g. `tokenizer.pad_token = tokenizer.eos_token`"):
        VGFSampler(model, tiny.reward_model("llama", len(tokenizer)), tokenizer)


def test_no_end_of_sequence_token_anywhere_is_refused_and_one_of_the_model_is_enough():
    tokenizer = tiny.tokenizer(eos=None)
    reward = tiny.reward_model("llama", len(tokenizer))
    with pytest.raises(ValueError, match="neither the model nor the tokenizer names an end-of-sequence token: set"):
        VGFSampler(tiny.language_model("llama", len(tokenizer)), reward, tokenizer)
    sampler = VGFSampler(tiny.language_model("llama", len(tokenizer), eos=5), reward, tokenizer)
    assert sampler.sample(["the"], 2, BUDGET, LENGTH).completions


def test_a_model_object_without_tokenizer_is_refused():
    with pytest.raises(ValueError, match="give processing_class, the tokenizer of the model"):
        VGFSampler(tiny.language_model("llama", VOCAB), tiny.reward_model("llama", VOCAB))


def test_the_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match=f"writes {VOCAB - 2} tokens, but its tokenizer has {VOCAB}"):
        VGFSampler(tiny.language_model("llama", VOCAB - 2), tiny.reward_model("llama", VOCAB), TOKENIZER)


@pytest.mark.parametrize(
    "arguments",
    [
        {"candidates": 0}, {"flow_batch_size": 0}, {"movers": 0}, {"horizon": -1}, {"temperature": 0.0}, {"top_p": 2.0},
        {"likelihood_weight": -0.1}, {"likelihood_weight": float("nan")},
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="must be|must lie"):
        build(**arguments)


# Without trl


WITHOUT_TRL = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "trl" or name.startswith("trl."):
            raise ModuleNotFoundError("No module named 'trl'")

sys.meta_path.insert(0, Blocked())
from tests import tiny
from vgf_llm import TransportBudget, VGFSampler

tokenizer = tiny.tokenizer()
model = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
sampler = VGFSampler(model, tiny.reward_model("llama", len(tokenizer)), tokenizer)
output = sampler.sample(["the food"], 2, TransportBudget(steps=1, kl_budget=1.0), 4)
assert len(output.completions) == 1
assert not any(name == "trl" or name.startswith("trl.") for name in sys.modules)
"""


def test_the_sampler_works_where_trl_is_not_installed():
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRL], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
