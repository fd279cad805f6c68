"""Choosing the budget by a handful of gold labels, with best-of-n as the answer where the flow does not pay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vgf_llm.flow import TransportBudget, best_of_n_curve
from vgf_llm.text import VGFSampler

from .fidelity import Gold
from .metrics import bootstrap_ci, paired_bootstrap_ci
from .report import Row


ENOUGH = 50


@dataclass(frozen=True)
class Candidates:
    """C budgets on P prompts, all from the same initial particles.

    Attributes:
        budgets: [C] what was tried. The first is L = 0.
        num_particles: N of all of them.
        gold: [C, P] gold reward of the selected completions.
        generations: [C] mean completions decoded per prompt.
        equal: [C] `generations` rounded up, in favour of best-of-n.
        best_of_n: [C, P] unbiased gold of best-of-`equal`, from one pool that begins with the same particles.
    """

    budgets: list[TransportBudget]
    num_particles: int
    gold: np.ndarray
    generations: np.ndarray
    equal: list[int]
    best_of_n: np.ndarray


@dataclass(frozen=True)
class Tuned:
    """What to sample with: `sampler.sample(prompts, tuned.num_particles, tuned.budget)`.

    Attributes:
        budget: the chosen one; `steps=0` is best-of-`num_particles`.
        num_particles: N.
        rows: one per candidate: `kl_budget`, `generations`, `gold` and best-of-n's at `best_of_n_equal` completions; `over`, the
            paired difference, with its 95 % interval `over_low`, `over_high` and the one-sided `bound` the choice is made by.
    """

    budget: TransportBudget
    num_particles: int
    rows: list[Row]

    @property
    def is_best_of_n(self) -> bool:
        return self.budget.is_zero


def tune_budget(
    sampler: VGFSampler,
    prompts: Sequence[str],
    gold: Gold,
    *,
    num_particles: int = 8,
    budget: TransportBudget | None = None,
    kl_budgets: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    max_completion_length: int = 64,
    seed: int = 0,
    level: float = 0.8,
) -> Tuned:
    """Try budgets on prompts with a gold reward, and choose one, or best-of-n.

    The candidate with the highest mean gold is chosen if, on the same prompts, it earns more than best-of-n with as many
    completions: if the lower end of the bootstrap distribution of the paired difference is above zero at the one-sided
    `level`. Otherwise the choice is that best-of-n.

    Args:
        prompts: P of them, with which nothing was trained. Below 50 there is a warning: the choice is mostly noise.
        gold: the true reward of (prompt, completion). Asked at most P (3 N + C) times, never twice for one text.
        num_particles: N.
        budget: steps, rounds and whatever else is not tried; default `TransportBudget()`.
        kl_budgets: nats of a decode, what is tried besides L = 0.
        level: between 0.5, where the higher mean wins, and 1. Default 0.8: labels are few, and of two errors neither is dear.
            Where the truth is near zero either choice is right; 0.95 would turn down most gains that 50 prompts can show.

    Raises:
        ValueError: those of `VGFSampler.sample`; no budget to try, or a level out of range.
    """
    candidates = measure_budgets(
        sampler, prompts, gold, num_particles=num_particles, budget=budget, kl_budgets=kl_budgets,
        max_completion_length=max_completion_length, seed=seed,
    )  # fmt: skip
    return choose_budget(candidates, level)


def measure_budgets(
    sampler: VGFSampler,
    prompts: Sequence[str],
    gold: Gold,
    *,
    num_particles: int = 8,
    budget: TransportBudget | None = None,
    kl_budgets: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    max_completion_length: int = 64,
    seed: int = 0,
) -> Candidates:
    """The measurement behind `tune_budget`."""
    if not kl_budgets or min(kl_budgets) <= 0:
        raise ValueError("kl_budgets must be positive, at least one: L = 0 is always tried")
    if len(prompts) < ENOUGH:
        warnings.warn(f"{len(prompts)} prompts are few to choose a budget by: give at least {ENOUGH}", stacklevel=2)
    asked: dict[tuple[str, str], float] = {}

    def ask(prompt: str, completion: str) -> float:
        if (prompt, completion) not in asked:
            asked[prompt, completion] = gold(prompt, completion)
        return asked[prompt, completion]

    base = TransportBudget() if budget is None else budget
    # A particle's noise depends on its number: the pool begins with the particles that are moved.
    pool = sampler.sample(prompts, 3 * num_particles, replace(base, steps=0), max_completion_length, seed).initial
    proxy = pool.rewards.cpu()
    golds = torch.tensor([[ask(p, c) for c in cs] for p, cs in zip(prompts, pool.completions, strict=True)])
    unmoved = golds.gather(1, proxy[:, :num_particles].argmax(1)[:, None])[:, 0]
    budgets, earned, generations = [replace(base, steps=0)], [unmoved.tolist()], [float(num_particles)]
    for kl_budget in kl_budgets:
        budgets.append(replace(base, kl_budget=kl_budget))
        out = sampler.sample(prompts, num_particles, budgets[-1], max_completion_length, seed)
        earned.append([ask(p, c) for p, c in zip(prompts, out.completions, strict=True)])
        generations.append(float(out.generations.mean()))
    equal = [min(math.ceil(n), proxy.shape[1]) for n in generations]
    curve = best_of_n_curve(proxy, golds, equal)
    return Candidates(budgets, num_particles, np.array(earned), np.array(generations), equal, curve.T.numpy())


def choose_budget(candidates: Candidates, level: float = 0.8) -> Tuned:
    """The rule of `tune_budget` on what was measured."""
    if not 0.5 < level < 1:
        raise ValueError(f"level must lie between 0.5 and 1, got {level!r}")
    rows: list[Row] = []
    for k, budget in enumerate(candidates.budgets):
        mine, theirs = candidates.gold[k], candidates.best_of_n[k]
        low, high = paired_bootstrap_ci(mine, theirs)
        gold_low, gold_high = bootstrap_ci(mine)
        rows.append(
            {
                "kl_budget": 0.0 if budget.is_zero else budget.kl_budget, "generations": float(candidates.generations[k]),
                "gold": float(mine.mean()), "gold_low": gold_low, "gold_high": gold_high,
                "best_of_n_equal": candidates.equal[k], "best_of_n": float(theirs.mean()),
                "over": float((mine - theirs).mean()), "over_low": low, "over_high": high,
                # The lower end of a two-sided interval of 2 level - 1 is the one-sided bound at level.
                "bound": paired_bootstrap_ci(mine, theirs, level=2 * level - 1)[0],
            }
        )  # fmt: skip
    # L = 0 is best-of-N itself, and no rival of it.
    best = 1 + int(candidates.gold[1:].mean(1).argmax())
    if float(rows[best]["bound"]) > 0:
        return Tuned(candidates.budgets[best], candidates.num_particles, rows)
    return Tuned(candidates.budgets[0], candidates.equal[best], rows)
