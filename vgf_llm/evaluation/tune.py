"""Choosing the budget by a handful of gold labels: the automatic one, unless the labels speak for another or for best-of-n."""

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
from .frontier import seeds_by_place
from .metrics import bootstrap_ci, paired_bootstrap_ci
from .report import Row


ENOUGH = 50
# Places among the candidates.
UNMOVED, AUTOMATIC = 0, 1


@dataclass(frozen=True)
class Candidates:
    """C budgets on P prompts, all from the same initial particles.

    Attributes:
        budgets: [C] what was tried. The first is L = 0, the second `TransportBudget.auto`.
        num_particles: [C] N of each. The automatic one begins with half as many and decodes up to twice as many.
        gold: [C, P] gold reward of the selected completions.
        generations: [C] mean completions decoded per prompt.
        equal: [C] `generations` rounded up, in favour of best-of-n.
        best_of_n: [C, P] unbiased gold of best-of-`equal`, from one pool that begins with the same particles.
    """

    budgets: list[TransportBudget]
    num_particles: list[int]
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
        rows: one per candidate: `kl_budget`, whether it is the `automatic` one, `generations`, `gold` and best-of-n's at
            `best_of_n_equal` completions; `over`, the paired difference, with its 95 % interval `over_low`, `over_high`;
            `over_automatic`, and what the choice is made by: `bound_automatic` and `bound_best_of_n`, the one-sided lower bounds
            of this candidate above the automatic one, and of best-of-n above this candidate.
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
    kl_budgets: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    max_completion_length: int = 64,
    seed: int = 0,
    level: float = 0.8,
) -> Tuned:
    """Try budgets on prompts with a gold reward, and choose one, or best-of-n.

    The choice is `TransportBudget.auto`, unless the labels speak against it: the candidate with the highest mean gold is chosen
    if it earns more on the same prompts, and best-of-n with as many completions if it earns more than what was chosen so far. To
    earn more is that the lower end of the bootstrap distribution of the paired difference is above zero at the one-sided
    `level`. Of fifty labels the highest mean alone is often luck (docs/diagnose.md).

    Args:
        prompts: P of them, with which nothing was trained. Below 50 there is a warning: the choice is mostly noise.
        gold: the true reward of (prompt, completion). Asked at most P (3 N + C) times, never twice for one text.
        num_particles: N.
        budget: steps, rounds and whatever else is not tried; default `TransportBudget()`.
        kl_budgets: nats of a decode, what is tried besides L = 0 and the automatic budget.
        level: between 0.5, where the higher mean wins, and 1. Default 0.8: labels are few, and of two errors neither is dear.

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
    kl_budgets: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
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
    correlation = None if sampler.field is None else float(sampler.field.correlation)
    tried = [(TransportBudget.auto(2 * num_particles, correlation), max(1, num_particles // 2))]
    tried += [(replace(base, kl_budget=kl_budget), num_particles) for kl_budget in kl_budgets]
    seeds = seeds_by_place(seed, prompts)
    # A particle's noise depends on its number: the pool begins with the particles that are moved.
    pool = sampler.sample(prompts, 3 * num_particles, replace(base, steps=0), max_completion_length, seeds).initial
    proxy = pool.rewards.cpu()
    golds = torch.tensor([[ask(p, c) for c in cs] for p, cs in zip(prompts, pool.completions, strict=True)])
    unmoved = golds.gather(1, proxy[:, :num_particles].argmax(1)[:, None])[:, 0]
    earned, generations = [unmoved.tolist()], [float(num_particles)]
    for candidate, n in tried:
        out = sampler.sample(prompts, n, candidate, max_completion_length, seeds)
        earned.append([ask(p, c) for p, c in zip(prompts, out.completions, strict=True)])
        generations.append(float(out.generations.mean()))
    equal = [min(math.ceil(n), proxy.shape[1]) for n in generations]
    curve = best_of_n_curve(proxy, golds, equal)
    budgets, sizes = zip((replace(base, steps=0), num_particles), *tried, strict=True)
    return Candidates(list(budgets), list(sizes), np.array(earned), np.array(generations), equal, curve.T.numpy())


def choose_budget(candidates: Candidates, level: float = 0.8) -> Tuned:
    """The rule of `tune_budget` on what was measured."""
    if not 0.5 < level < 1:
        raise ValueError(f"level must lie between 0.5 and 1, got {level!r}")

    def bound(x: np.ndarray, y: np.ndarray) -> float:
        # The lower end of a two-sided interval of 2 level - 1 is the one-sided bound at level.
        return paired_bootstrap_ci(x, y, level=2 * level - 1)[0]

    rows: list[Row] = []
    automatic = candidates.gold[AUTOMATIC]
    for k, budget in enumerate(candidates.budgets):
        mine, theirs = candidates.gold[k], candidates.best_of_n[k]
        low, high = paired_bootstrap_ci(mine, theirs)
        gold_low, gold_high = bootstrap_ci(mine)
        rows.append(
            {
                "kl_budget": 0.0 if budget.is_zero else budget.kl_budget, "automatic": k == AUTOMATIC,
                "generations": float(candidates.generations[k]),
                "gold": float(mine.mean()), "gold_low": gold_low, "gold_high": gold_high,
                "best_of_n_equal": candidates.equal[k], "best_of_n": float(theirs.mean()),
                "over": float((mine - theirs).mean()), "over_low": low, "over_high": high,
                "over_automatic": float((mine - automatic).mean()), "bound_automatic": bound(mine, automatic),
                "bound_best_of_n": bound(theirs, mine),
            }
        )  # fmt: skip
    # L = 0 is best-of-N itself, and no rival of it.
    best = 1 + int(candidates.gold[1:].mean(1).argmax())
    chosen = best if float(rows[best]["bound_automatic"]) > 0 else AUTOMATIC
    if float(rows[chosen]["bound_best_of_n"]) > 0:
        return Tuned(candidates.budgets[UNMOVED], candidates.equal[chosen], rows)
    return Tuned(candidates.budgets[chosen], candidates.num_particles[chosen], rows)
