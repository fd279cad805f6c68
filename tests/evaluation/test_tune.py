"""The budget is chosen by gold, and only where it beats best-of-n."""

import warnings

import numpy as np
import pytest

from tests import tiny
from vgf_llm import TransportBudget, VGFSampler
from vgf_llm.evaluation.tune import Candidates, choose_budget, measure_budgets, tune_budget
from vgf_llm.text import DifferentiableReward


PROMPTS = [f"{a} {b} {c}" for a in ("the", "a") for b in ("food", "room", "staff") for c in ("was", "were", "but")]


@pytest.fixture(scope="module")
def sampler():
    tok = tiny.tokenizer()
    model = tiny.language_model("llama", len(tok), eos=tok.eos_token_id, pad=tok.pad_token_id)
    reward = DifferentiableReward(tiny.counting_reward(tok), tok)
    return VGFSampler(model, reward, tok, horizon=None, flow_batch_size=128)


def good(prompt, text):
    return float(text.split().count("good"))


def nonsense(prompt, text):
    return float(len(text) % 5)


OPTIONS = {
    "num_particles": 4, "budget": TransportBudget(steps=2, step_size=0.5, rounds=2), "kl_budgets": (0.01, 4.0),
    "max_completion_length": 10,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:18 prompts")
def test_a_true_gradient_is_followed_and_a_false_one_is_not(sampler):
    tuned = tune_budget(sampler, PROMPTS, good, **OPTIONS)
    assert not tuned.is_best_of_n and tuned.budget.kl_budget >= 2.0
    false = tune_budget(sampler, PROMPTS, lambda prompt, text: -good(prompt, text), **OPTIONS)
    # A little of what harms is better than the automatic budget of it; what is left is no better than best-of-n.
    assert false.is_best_of_n or false.budget.kl_budget == 0.01
    for found in (tuned, false):  # what was chosen can be used as it is
        assert len(sampler.sample(PROMPTS[:2], found.num_particles, found.budget, 10).completions) == 2


@pytest.mark.filterwarnings("ignore:18 prompts")
def test_all_candidates_start_from_the_same_particles(sampler):
    found = measure_budgets(sampler, PROMPTS, nonsense, **OPTIONS)
    unmoved = sampler.sample(PROMPTS, 4, TransportBudget(steps=0), 10, seed=range(len(PROMPTS)))
    assert found.gold[0].tolist() == [nonsense(p, c) for p, c in zip(PROMPTS, unmoved.completions, strict=True)]
    assert found.equal[0] == found.generations[0] == 4
    assert found.gold.shape == found.best_of_n.shape == (4, len(PROMPTS))
    automatic = sampler.sample(PROMPTS, 2, TransportBudget.auto(8), 10, seed=range(len(PROMPTS)))
    assert found.gold[1].tolist() == [nonsense(p, c) for p, c in zip(PROMPTS, automatic.completions, strict=True)]
    assert found.num_particles == [4, 2, 4, 4]


def test_no_text_is_judged_twice(sampler):
    asked = []

    def gold(prompt, text):
        asked.append((prompt, text))
        return good(prompt, text)

    with pytest.warns(UserWarning, match="give at least 50"):
        measure_budgets(sampler, PROMPTS[:3], gold, **OPTIONS)
    assert len(asked) == len(set(asked))


def test_fifty_prompts_are_enough(sampler):
    many = [f"{a} {b}" for a in PROMPTS for b in ("nice", "good", "bad")]
    options = OPTIONS | {"num_particles": 1, "kl_budgets": (1.0,), "max_completion_length": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_budgets(sampler, many, good, **options)


def candidates(over_automatic, over_best_of_n=1.0, prompts=60):
    """One budget that beats the automatic one, and an automatic one that beats best-of-n, on average by so much, with a standard
    deviation of 1."""
    noise = np.random.default_rng(1).standard_normal((2, prompts))
    noise = (noise - noise.mean(1, keepdims=True)) / noise.std(1, keepdims=True)
    best_of_n = np.zeros((3, prompts))
    automatic = noise[0] + over_best_of_n
    gold = np.stack([best_of_n[0], automatic, automatic + noise[1] + over_automatic])
    budgets = [TransportBudget(steps=0), TransportBudget.auto(), TransportBudget()]
    return Candidates(budgets, [8, 4, 8], gold, np.array([8.0, 15.2, 12.3]), [8, 16, 13], best_of_n)


def test_the_automatic_budget_stands_unless_the_labels_speak_against_it():
    # The standard error is 0.13: 0.15 is above zero at 0.8 and not at 0.99.
    assert choose_budget(candidates(0.15), 0.8).budget == TransportBudget()
    assert choose_budget(candidates(0.15), 0.99).budget == TransportBudget.auto()
    assert choose_budget(candidates(-0.15), 0.8).num_particles == 4


def test_best_of_n_is_chosen_where_it_earns_more():
    level = {"over_automatic": -1.0, "over_best_of_n": -0.05}
    assert choose_budget(candidates(**level), 0.8).budget == TransportBudget.auto()
    lost = choose_budget(candidates(-1.0, -0.15), 0.8)
    assert (lost.is_best_of_n, lost.num_particles) == (True, 16)
    lost = choose_budget(candidates(0.15, -1.0), 0.8)
    assert (lost.is_best_of_n, lost.num_particles) == (True, 13)


@pytest.mark.parametrize("level", [0.5, 1.0, float("nan")])
def test_levels_out_of_range(level):
    with pytest.raises(ValueError, match="level"):
        choose_budget(candidates(1.0), level)


def test_nothing_to_try(sampler):
    with pytest.raises(ValueError, match="kl_budgets"):
        tune_budget(sampler, PROMPTS, good, kl_budgets=())
