"""Where the next completion of a prompt is spent: on moving its best particles, or on a fresh sample of the base model.

A gradient may be good for one prompt and worthless for the next, and nobody knows before it was tried. Both ways of spending a
completion have a record, the rewards they led to, and the one that promises more above the best so far is taken (expected
improvement, Jones et al. 1998). Where moves do not pay, what remains is best-of-n. Every prompt decides for itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expected_gain(mean: Tensor, std: Tensor) -> Tensor:
    """E max(X, 0) of X ~ N(mean, std^2)."""
    z = mean / std.clamp_min(1e-12)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return std * density + mean * torch.special.ndtr(z)


class Race:
    """Records of B prompts, and the completions they have left.

    Args:
        rewards: [B, N] of the initial particles, or what else is to rise.
        generations: completions that each prompt may decode in all, N of them spent.
        turn: completions that a fresh turn draws, and particles that a turn moves.
    """

    def __init__(self, rewards: Tensor, generations: float, turn: int) -> None:
        self.generations, self.turn = generations, turn
        self.spent = torch.full_like(rewards[:, 0], rewards.shape[1])
        self.best = rewards.amax(1)
        self.drawn = rewards
        # Rewards of particles that changed, less the best before, [B, K]; nan where nothing changed.
        self.deviations = rewards.new_empty(len(rewards), 0)
        self.price = torch.zeros_like(self.spent)
        self.tried = torch.zeros_like(self.spent, dtype=torch.bool)
        self.draws = torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)
        self.moves = torch.zeros_like(self.draws)

    def turns(self) -> tuple[Tensor, Tensor]:
        """Which prompts [B'] move next, and which [B''] draw; a prompt that has spent its completions does neither."""
        left = self.generations - self.spent
        wide = _spread(self.drawn)
        draw = expected_gain(_mean(self.drawn) - self.best, wide)
        # One deviation as wide as that of fresh samples is counted in: two moves alone may agree by chance.
        changed = (~self.deviations.isnan()).sum(1)
        move = expected_gain(_mean(self.deviations), _spread(self.deviations, wide)) * changed / self.price.clamp_min(1e-6)
        # Until a prompt has tried, nothing is known of its moves: the first turn is theirs.
        draws = self.tried & (draw > move) & (left >= self.turn)
        return ((left >= 1) & ~draws).nonzero()[:, 0], draws.nonzero()[:, 0]

    def moved(self, who: Tensor, rewards: Tensor, price: Tensor) -> None:
        """Prompts `who` [B'] have moved particles to rewards [B', M], nan where one stayed as it was, at a price [B'] in
        completions."""
        self.deviations = torch.cat([self.deviations, self._new(who, rewards - self.best[who, None])], 1)
        # A turn that changes nothing has cost no completion; without a floor it would go on for ever.
        price = price.clamp_min(0.25)
        self.price[who] += price
        self.tried[who] = True
        self.moves[who] += rewards.shape[1]
        self._record(who, rewards, price)

    def drew(self, who: Tensor, rewards: Tensor, price: Tensor) -> None:
        """Prompts `who` [B'] have drawn samples with rewards [B', M]."""
        self.drawn = torch.cat([self.drawn, self._new(who, rewards)], 1)
        self.draws[who] += rewards.shape[1]
        self._record(who, rewards, price)

    def _new(self, who: Tensor, values: Tensor) -> Tensor:
        return values.new_full((len(self.best), values.shape[1]), torch.nan).index_copy(0, who, values)

    def _record(self, who: Tensor, rewards: Tensor, price: Tensor) -> None:
        self.spent[who] += price
        self.best[who] = torch.maximum(self.best[who], rewards.nan_to_num(-torch.inf).amax(1))


def _mean(x: Tensor) -> Tensor:
    return x.nanmean(1).nan_to_num(0.0)


def _spread(x: Tensor, prior: Tensor | None = None) -> Tensor:
    """Standard deviation [B] of x [B, K] without its nan, with one more deviation `prior` [B] counted in."""
    there = ~x.isnan()
    square, count = torch.where(there, (x - _mean(x)[:, None]).square(), 0.0).sum(1), there.sum(1)
    if prior is not None:
        square, count = square + prior.square(), count + 1
    return (square / count.clamp_min(1)).sqrt()
