"""Diversity, intervals over prompts, a judge's NLL, and KL from both sides, against known values."""

import math

import numpy as np
import pytest
import torch

from tests import tiny
from vgf_llm.evaluation.metrics import (
    bootstrap_ci,
    distinct_n,
    judge_nll,
    paired_bootstrap_ci,
    reward_quantile_kl,
    selection_kl,
)
from vgf_llm.flow import best_of_n_kl


def test_distinct_n_counts_over_the_corpus_and_not_across_texts():
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a b", "b a"], 1) == 2 / 4
    assert distinct_n(["a b", "c d"], 2) == 1.0
    assert distinct_n(["a", ""], 2) == 0.0
    with pytest.raises(ValueError, match="n must"):
        distinct_n(["a"], 0)
    with pytest.raises(TypeError, match="one string"):
        distinct_n("a b", 1)


def test_bootstrap_interval_is_that_of_the_central_limit_theorem_and_repeats():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_ci(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_ci(torch.tensor(values), seed=1) == (low, high)
    narrow = bootstrap_ci(values, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_ci([2.5]) == (2.5, 2.5)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(5)
    intervals = [bootstrap_ci(rng.normal(size=60), seed=s, resamples=300, level=0.9) for s in range(300)]
    share = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.84 < share < 0.95


def test_pairing_takes_out_what_prompts_have_in_common():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 100)
    a, b = hard + 0.5 + rng.normal(0, 0.1, 100), hard + rng.normal(0, 0.1, 100)
    low, high = paired_bootstrap_ci(a, b)
    assert 0.4 < low < 0.5 < high < 0.6
    single = bootstrap_ci(a)
    assert single[1] - single[0] > 10 * (high - low)
    assert paired_bootstrap_ci(a, a) == (0.0, 0.0)
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap_ci(a, b[:-1])


@pytest.mark.parametrize("bad", [[], [[1.0, 2.0]], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_is_not_one_number_per_prompt(bad):
    with pytest.raises(ValueError, match="values_by_prompt"):
        bootstrap_ci(bad)


def test_bootstrap_refuses_levels_and_counts_out_of_range():
    with pytest.raises(ValueError, match="level"):
        bootstrap_ci([1.0], level=1.0)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_ci([1.0], resamples=0)


PROMPTS = ["the food was", "a room", "a room", "staff", "the food was"]
COMPLETIONS = [[5, 6, 7, 8], [9], [], [6, 6, 10, 11, 12, 13], [8, 2]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_judge_nll_is_the_chain_rule_token_by_token(family, batch_size):
    tokenizer = tiny.tokenizer()
    model = tiny.language_model(family, len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    model.train()
    nll = judge_nll(model, tokenizer, PROMPTS, COMPLETIONS, batch_size)
    assert model.training
    model.eval()
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids, total = list(tokenizer(prompt)["input_ids"]), 0.0
        for token in completion:
            with torch.no_grad():
                total -= model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        expected.append(total)
    assert nll.dtype == torch.float64 and not nll.requires_grad
    torch.testing.assert_close(nll, torch.tensor(expected).double(), atol=1e-4, rtol=1e-4)


def test_judge_nll_names_what_does_not_fit():
    tokenizer = tiny.tokenizer()
    model = tiny.language_model("llama", len(tokenizer), positions=8)
    with pytest.raises(ValueError, match="one prompt per completion"):
        judge_nll(model, tokenizer, ["a"], [[1], [2]])
    with pytest.raises(ValueError, match="completion 1 holds a token outside"):
        judge_nll(model, tokenizer, ["a", "a"], [[1], [len(tokenizer)]])
    with pytest.raises(ValueError, match="context holds 8"):
        judge_nll(model, tokenizer, ["a"], [[1] * 8])
    with pytest.raises(ValueError, match="no tokens"):
        judge_nll(model, tokenizer, [""], [[1]])
    with pytest.raises(ValueError, match="batch_size"):
        judge_nll(model, tokenizer, ["a"], [[1]], 0)


def test_selection_kl_adds_the_path_to_best_of_n():
    assert selection_kl(torch.zeros(3), 8) == best_of_n_kl(8)
    assert selection_kl([1.0, 3.0], 4) == pytest.approx(2 + math.log(4) - 3 / 4)
    assert selection_kl([1.5], 1) == 1.5
    with pytest.raises(ValueError, match="n >= 1"):
        selection_kl([1.0], 0)
    with pytest.raises(ValueError, match="kl_selected"):
        selection_kl([math.nan], 2)


def test_selection_kl_bounds_the_kl_of_a_tilted_best_of_n_known_exactly():
    # Base: N(0, 1). Every candidate is drawn from N(shift, 1), the largest of n is kept.
    shift, n, draws = 0.8, 4, 200_000
    rng = np.random.default_rng(0)
    y = shift + rng.normal(size=(draws, n)).max(1)
    log_ratio = shift * y - shift**2 / 2
    below = 0.5 * (1 + torch.special.erf(torch.tensor((y - shift) / math.sqrt(2)))).numpy()
    exact = (math.log(n) + (n - 1) * np.log(below) + log_ratio).mean()
    assert selection_kl(log_ratio, n) == pytest.approx(exact, abs=0.02)
    assert selection_kl(np.full(8, shift**2 / 2), n) < exact  # the path's own KL does not see the selection


def best_of(n, prompts, pool, seed):
    """Rewards of best-of-n and of an independent pool, at another location and scale for each prompt."""
    rng = np.random.default_rng(seed)
    location, spread = rng.normal(0, 10, (prompts, 1)), np.exp(rng.normal(0, 1, (prompts, 1)))
    selected = location + spread * rng.normal(size=(prompts, n)).max(1, keepdims=True)
    return selected[:, 0], location + spread * rng.normal(size=(prompts, pool))


@pytest.mark.parametrize("n", [1, 2, 4, 16, 32])
def test_quantile_kl_of_best_of_n_is_the_known_value(n):
    estimates = [reward_quantile_kl(*best_of(n, 400, 512, seed)) for seed in range(10)]
    # 400 prompts: standard error about 0.05 nats each; smoothing and clipping at 0 stay below 0.12.
    assert np.mean(estimates) == pytest.approx(best_of_n_kl(n), abs=0.12)
    assert np.std(estimates) < 0.12


def test_quantile_kl_cannot_see_more_than_its_pool():
    selected, pool = best_of(1, 200, 15, 0)
    estimate = reward_quantile_kl(selected + 1e6, pool)
    assert math.log(16) - 0.4 < estimate <= math.log(16) + 0.15


def test_quantile_kl_sees_rewards_that_fall_as_well():
    selected, pool = best_of(8, 400, 256, 1)
    assert reward_quantile_kl(-selected, -pool) == pytest.approx(best_of_n_kl(8), abs=0.2)


def test_equal_rewards_carry_no_kl():
    rng = np.random.default_rng(0)
    selected, pool = rng.integers(2, size=500), rng.integers(2, size=(500, 64))
    assert reward_quantile_kl(selected, pool) < 0.15
    assert reward_quantile_kl(np.ones(500), np.ones((500, 64))) < 0.15
    assert reward_quantile_kl(selected, pool, seed=3) == reward_quantile_kl(selected, torch.tensor(pool), seed=3)


def test_quantile_kl_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match=r"\[P, M\]"):
        reward_quantile_kl(np.zeros(10), np.zeros((9, 4)))
    with pytest.raises(ValueError, match="at least 8"):
        reward_quantile_kl(np.zeros(7), np.zeros((7, 4)))
    with pytest.raises(ValueError, match="nan"):
        reward_quantile_kl(np.zeros(8), np.full((8, 4), np.nan))
