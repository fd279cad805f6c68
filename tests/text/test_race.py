"""The race between moving and drawing: expected gains, who takes which turn, and when it is over."""

import math

import pytest
import torch

from vgf_llm.text.race import Race, expected_gain


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.5, 0.7), (2.0, 0.5), (-8.0, 1.0)])
def test_expected_gain_is_the_integral_it_says(mean, std):
    x = torch.linspace(0, mean + 12 * std + 12, 400_001, dtype=torch.float64)
    density = torch.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    expected = torch.trapezoid(x * density, x)
    found = expected_gain(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-12)


def test_expected_gain_without_spread_is_the_gain_itself():
    assert expected_gain(torch.tensor([-1.0, 2.0]), torch.zeros(2)).tolist() == [0.0, 2.0]


REWARDS = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.5, 4.5, 5.0]])
BOTH = torch.arange(2)


def test_the_first_turn_is_a_move():
    moving, drawing = Race(REWARDS, 16, 2).turns()
    assert moving.tolist() == [0, 1] and drawing.tolist() == []


def test_a_prompt_whose_moves_fail_draws_and_one_whose_moves_succeed_moves_on():
    race = Race(REWARDS, 16, 2)
    race.moved(BOTH, torch.tensor([[-6.0, -7.0], [6.0, 5.8]]), torch.tensor([1.0, 1.0]))
    moving, drawing = race.turns()
    assert moving.tolist() == [1] and drawing.tolist() == [0]
    assert race.best.tolist() == [3.0, 6.0]


def test_moves_that_change_nothing_promise_nothing():
    race = Race(REWARDS, 16, 2)
    race.moved(BOTH, torch.full((2, 2), torch.nan), torch.zeros(2))
    assert race.turns()[1].tolist() == [0, 1]
    assert race.best.tolist() == REWARDS.amax(1).tolist()


def test_a_cheap_move_is_preferred_to_a_dear_one():
    def draws(price):
        race = Race(REWARDS[:1], 60, 2)
        race.moved(torch.tensor([0]), torch.tensor([[2.0, 1.5]]), torch.tensor([price]))
        return race.turns()[1].tolist()

    assert draws(0.3) == [] and draws(40.0) == [0]


def test_what_is_spent_ends_the_race_and_the_rest_too_small_to_draw_is_moved():
    race = Race(REWARDS, 8.0, 2)
    race.moved(BOTH, torch.tensor([[-6.0, -7.0], [-6.0, -7.0]]), torch.tensor([2.5, 3.5]))
    moving, drawing = race.turns()
    assert (moving.tolist(), drawing.tolist()) == ([0], [])  # 1.5 and 0.5 are left
    race.moved(torch.tensor([0]), torch.tensor([[0.0, 0.0]]), torch.tensor([0.0]))
    race.moved(torch.tensor([0]), torch.tensor([[0.0, 0.0]]), torch.tensor([0.9]))
    assert [len(who) for who in race.turns()] == [0, 0]


def test_draws_are_counted_and_change_what_is_expected_of_the_next():
    race = Race(REWARDS, 16, 2)
    race.moved(BOTH, torch.full((2, 2), torch.nan), torch.zeros(2))
    race.drew(torch.tensor([1]), torch.tensor([[9.0, 4.0]]), torch.tensor([2.0]))
    assert race.draws.tolist() == [0, 2] and race.best[1] == 9.0 and race.spent[1] == 6.25


def test_prompts_do_not_see_each_other():
    generator = torch.Generator().manual_seed(0)
    rewards, moved = torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator)
    price = torch.rand(40, generator=generator)
    together = Race(rewards, 16, 2)
    together.moved(torch.arange(40), moved, price)
    drawing = together.turns()[1].tolist()
    assert 0 < len(drawing) < 40
    for b in range(40):
        alone = Race(rewards[b : b + 1], 16, 2)
        alone.moved(torch.tensor([0]), moved[b : b + 1], price[b : b + 1])
        assert alone.turns()[1].tolist() == ([0] if b in drawing else [])
