"""Gold above best-of-n: paired by prompt, at equal generations and in equal time."""

import pytest
import torch

from vgf_llm.evaluation.frontier import Measured, Pool, over_best_of_n


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
