"""Best-of-n from a pool, and gold above it: paired by prompt, at equal generations and in equal time."""

import random
from dataclasses import replace

import pytest
import torch

from tests import tiny
from vgf_llm import VGFSampler
from vgf_llm.evaluation.frontier import Measured, Pool, Task, best_of_n_rows, draw_pool, over_best_of_n, rescored
from vgf_llm.flow import best_of_n_kl


def pool(prompts=20, size=8, seconds=40.0):
    proxy = torch.arange(size, dtype=torch.float64).expand(prompts, size)
    # A prompt's own level plus what its samples are worth: best-of-n of size samples is known.
    gold = torch.linspace(-5, 5, prompts, dtype=torch.float64)[:, None] + proxy
    return Pool(proxy, gold, gold, gold, [], [], seconds)


def measured(gold, generations, seconds):
    nothing = [0.0] * len(gold)
    return Measured([], nothing, gold, nothing, nothing, nothing, nothing, nothing, [generations] * len(gold), seconds)


def test_the_difference_is_paired_and_n_rounded_up():
    drawn = pool()
    row = over_best_of_n(measured((drawn.gold[:, -1] + 1).tolist(), 7.2, 10.0), drawn, 1.0)
    assert (row["equal_n"], row["equal_n_in_equal_time"], row["equal_n_at_equal_kl"]) == (8, 2, 7)
    # What prompts have in common drops out: no spread is left although their levels differ by 10.
    for end in ("", "_low", "_high"):
        assert row[f"gold_over_best_of_n{end}"] == pytest.approx(1.0)
    # The better of two of the numbers 0 to 7 is 5 in the mean; ours is 8.
    assert row["gold_over_best_of_n_in_equal_time"] == pytest.approx(3.0)


def test_n_is_at_most_the_pool():
    drawn = pool(seconds=1.0)
    row = over_best_of_n(measured(drawn.gold[:, -1].tolist(), 30.0, 50.0), drawn, 9.0)
    assert (row["equal_n"], row["equal_n_in_equal_time"], row["equal_n_at_equal_kl"]) == (8, 8, 8)
    assert row["gold_over_best_of_n"] == pytest.approx(0.0)


def test_best_of_n_rows_rise_with_n_where_the_proxy_is_the_gold_reward():
    generator = torch.Generator().manual_seed(0)
    gold = torch.randn(12, 16, generator=generator)
    rng = random.Random(0)
    texts = [[f"a b {rng.random()}" for _ in range(16)] for _ in range(12)]
    task = Task("numbers", lambda prompt, text: 0.0, lambda seed: [], 8)
    rows = best_of_n_rows(task, Pool(gold, gold, -gold, -gold, texts, [], seconds=16.0), [1, 2, 4, 16])
    values = [row["reward_gold"] for row in rows]
    assert values == sorted(values)
    assert values[0] == pytest.approx(gold.mean().item(), abs=1e-5)
    assert values[-1] == pytest.approx(gold.amax(1).mean().item(), abs=1e-5)
    assert [row["method"] for row in rows] == ["base", "best_of_n", "best_of_n", "best_of_n"]
    assert [row["seconds"] for row in rows] == [1.0, 2.0, 4.0, 16.0]
    assert rows[2]["kl_nats"] == best_of_n_kl(4)
    assert all(row["reward_gold_low"] < row["reward_gold"] < row["reward_gold_high"] for row in rows)


def test_best_of_n_by_likelihood_too_is_best_of_n_of_another_proxy():
    generator = torch.Generator().manual_seed(0)
    proxy, gold, nll = (torch.randn(12, 16, generator=generator) for _ in range(3))
    task = Task("numbers", lambda prompt, text: 0.0, lambda seed: [], 8)
    pool = Pool(proxy, gold, nll, nll, [["a"] * 16] * 12, [], seconds=16.0)
    rows = best_of_n_rows(task, pool, [1, 4, 16], 0.7)
    by_both = best_of_n_rows(task, replace(pool, proxy=proxy - 0.7 * nll), [4, 16])
    assert [row["method"] for row in rows] == ["best_of_n_likelihood"] * 2 and [r["num_particles"] for r in rows] == [4, 16]
    assert [row["reward_gold"] for row in rows] == [row["reward_gold"] for row in by_both]
    assert rows[1]["nll_base"] < best_of_n_rows(task, pool, [16])[0]["nll_base"] and rows[0]["likelihood_weight"] == 0.7
    drawn = measured(gold[:, 0].tolist(), 4.0, 1.0)
    over = over_best_of_n(drawn, pool, 1.0, 0.7)
    mean = gold[:, 0].mean().item()
    assert over["gold_over_best_of_n_by_likelihood"] == pytest.approx(mean - by_both[0]["reward_gold"], abs=1e-5)
    assert over["equal_n_by_likelihood_at_equal_kl"] == over["equal_n_at_equal_kl"]
    assert over["equal_n_by_likelihood"] == 4 and "gold_over_best_of_n_by_likelihood" not in over_best_of_n(drawn, pool, 1.0)


def test_a_pool_under_another_reward_is_the_pool_drawn_with_that_reward():
    tok = tiny.tokenizer()
    model = tiny.language_model("llama", len(tok), eos=tok.eos_token_id, pad=tok.pad_token_id)
    one, other = (
        VGFSampler(model, tiny.reward_model(family, len(tok), pad=tok.pad_token_id), tok, flow_batch_size=5)
        for family in ("llama", "gpt_neox")
    )
    task = Task("words", lambda prompt, text: float(len(text)), lambda seed: ["the food was", "a room"], 8)
    drawn = draw_pool(task, one, model, (0, 1), 6)
    expected = draw_pool(task, other, model, (0, 1), 6)
    found = rescored(drawn, task, other, (0, 1))
    assert not torch.allclose(drawn.proxy, expected.proxy)
    torch.testing.assert_close(found.proxy, expected.proxy, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.gold, drawn.gold)
