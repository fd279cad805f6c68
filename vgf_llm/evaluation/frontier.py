"""One task measured: best-of-n for every n from one pool, VGF at several budgets, and the controls, on paired prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vgf_llm.flow import TransportBudget, best_of_n_curve, best_of_n_kl
from vgf_llm.text import DifferentiableReward, VGFOutput, VGFSampler
from vgf_llm.text.field import GradientField
from vgf_llm.text.sampler import Direction

from .controls import flip, random_direction, shuffle_positions
from .metrics import (
    bootstrap_ci,
    distinct_n,
    equal_kl_n,
    judge_nll,
    paired_bootstrap_ci,
    reward_quantile_kl,
    selection_kl,
)
from .training import ensemble, trained_field


Gold = Callable[[str, str], float]
Row = dict[str, object]

POOL_SEED = 1_000_000

CONTROLS: dict[str, Direction] = {"vgf_random": random_direction, "vgf_flip": flip, "vgf_shuffle": shuffle_positions}


@dataclass(frozen=True)
class Task:
    """What is asked and how it is judged.

    `prompts(seed)` are the held-out prompts of one seed; seeds do not share prompts, so that intervals over prompts cover both.
    `seen(count)` are others, for what is fitted: a gradient field needs prompts, and no label.
    """

    name: str
    gold: Gold
    prompts: Callable[[int], list[str]]
    max_completion_length: int
    # How long a tilt outlives the first change (`VGFSampler`): to the end (None) only where position does not matter.
    horizon: int | None = 0
    seen: Callable[[int], list[str]] | None = None


@dataclass
class Measured:
    """Completions of one method over all prompts of all seeds, and what they cost.

    One entry per selected completion; `population_gold` is the mean gold over all particles of a prompt.
    """

    completions: list[str]
    proxy: list[float]
    gold: list[float]
    kl: list[float]
    nll_base: list[float]
    nll_judge: list[float]
    population_gold: list[float]
    population_kl: list[float]
    generations: list[float]
    seconds: float


def measure_vgf(
    task: Task,
    sampler: VGFSampler,
    judge: PreTrainedModel,
    seeds: Sequence[int],
    num_particles: int,
    budget: TransportBudget,
    *,
    verify: bool = True,
    direction: Direction | None = None,
) -> Measured:
    """Run the sampler on the prompts of every seed and judge what it selects."""
    m = Measured([], [], [], [], [], [], [], [], [], 0.0)
    for seed in tqdm(seeds, desc="seeds", leave=False):
        prompts = task.prompts(seed)
        started = time.perf_counter()
        out = sampler.sample(
            prompts, num_particles, budget, task.max_completion_length,
            seed=seeds_by_place(seed, prompts), verify=verify, direction=direction,
        )  # fmt: skip
        m.seconds += time.perf_counter() - started
        _judge(m, task, sampler, judge, prompts, out)
    return m


def _judge(m: Measured, task: Task, sampler: VGFSampler, judge: PreTrainedModel, prompts: list[str], out: VGFOutput) -> None:
    n = out.transported.rewards.shape[1]
    rows = torch.arange(len(prompts))
    moved = out.selected < n
    pick = out.selected % n
    zero = torch.zeros(len(prompts))
    m.completions += out.completions
    m.proxy += out.rewards.tolist()
    m.gold += [task.gold(p, c) for p, c in zip(prompts, out.completions, strict=True)]
    # The log ratio of what was selected, not the mean KL of its path: selection prefers unlikely moves.
    m.kl += torch.where(moved, out.transported.log_ratio[rows, pick], zero).tolist()
    m.nll_base += (-torch.where(moved, out.transported.logprobs[rows, pick], out.initial.logprobs[rows, pick])).tolist()
    m.nll_judge += judge_nll(judge, sampler.processing_class, prompts, out.completion_ids).tolist()
    m.population_gold += [
        float(np.mean([task.gold(p, c) for c in cs])) for p, cs in zip(prompts, out.transported.completions, strict=True)
    ]
    m.population_kl += out.transported.kl.mean(1).tolist()
    m.generations += out.generations.tolist()


def row(task: Task, method: str, m: Measured, num_particles: int, candidates: int, **more: object) -> Row:
    """One line of `report.json`. `candidates` completions took part in the selection: its share of the KL bound."""
    low, high = bootstrap_ci(np.array(m.gold))
    return {
        "task": task.name,
        "method": method,
        "num_particles": num_particles,
        "generations": float(np.mean(m.generations)),
        "reward_proxy": float(np.mean(m.proxy)),
        "reward_gold": float(np.mean(m.gold)),
        "reward_gold_low": low,
        "reward_gold_high": high,
        "reward_gold_population": float(np.mean(m.population_gold)),
        "kl_nats": selection_kl(m.kl, candidates),
        "kl_population": float(np.mean(m.population_kl)),
        "nll_base": float(np.mean(m.nll_base)),
        "nll_judge": float(np.mean(m.nll_judge)),
        "distinct_2": distinct_n(m.completions, 2),
        "seconds": m.seconds,
        **more,
    }


@dataclass
class Pool:
    """M base samples for every prompt of every seed, judged once; best-of-n for every n <= M comes from it."""

    proxy: torch.Tensor  # [P, M]
    gold: torch.Tensor  # [P, M]
    nll_base: torch.Tensor  # [P, M]
    nll_judge: torch.Tensor  # [P, M]
    completions: list[list[str]]
    completion_ids: list[list[list[int]]]
    seconds: float


def seeds_by_place(seed: int, prompts: Sequence[str]) -> list[int]:
    """By place: of a task with few prompts the same one comes many times, and copies would pass for a larger sample."""
    return [seed * 2**20 + place for place in range(len(prompts))]


def draw_pool(task: Task, sampler: VGFSampler, judge: PreTrainedModel, seeds: Sequence[int], size: int) -> Pool:
    """`size` samples per prompt, scored by the sampler's reward, the gold reward, the base model and the judge."""
    proxy, gold, base_nll, judge_nlls = [], [], [], []
    completions: list[list[str]] = []
    completion_ids: list[list[list[int]]] = []
    seconds = 0.0
    for seed in tqdm(seeds, desc="seeds", leave=False):
        prompts = task.prompts(seed)
        started = time.perf_counter()
        # Noise of its own: where VGF's completions are ranked in the pool, they must not be part of it.
        noise = seeds_by_place(POOL_SEED + seed, prompts)
        out = sampler.sample(prompts, size, TransportBudget(steps=0), task.max_completion_length, seed=noise)
        seconds += time.perf_counter() - started
        drawn = out.initial
        flat_prompts = [p for p in prompts for _ in range(size)]
        flat_ids = [ids for row in drawn.completion_ids for ids in row]
        proxy.append(drawn.rewards)
        gold.append(torch.tensor([[task.gold(p, c) for c in cs] for p, cs in zip(prompts, drawn.completions, strict=True)]))
        base_nll.append(-drawn.logprobs)
        judge_nlls.append(judge_nll(judge, sampler.processing_class, flat_prompts, flat_ids).view(len(prompts), size))
        completions += drawn.completions
        completion_ids += drawn.completion_ids
    return Pool(
        torch.cat(proxy), torch.cat(gold), torch.cat(base_nll), torch.cat(judge_nlls), completions, completion_ids, seconds
    )


def rescored(pool: Pool, task: Task, sampler: VGFSampler, seeds: Sequence[int]) -> Pool:
    """The same samples under another reward."""
    prompts = sampler.encode([p for seed in seeds for p in task.prompts(seed)], task.max_completion_length)
    rows = [(p, c) for p, several in zip(prompts, pool.completion_ids, strict=True) for c in several]
    started, scores = time.perf_counter(), []
    for i in range(0, len(rows), sampler.flow_batch_size):
        chunk = rows[i : i + sampler.flow_batch_size]
        prompt, completion = (
            sampler.processing_class.pad({"input_ids": [list(r[side]) for r in chunk]}, return_tensors="pt") for side in (0, 1)
        )
        scores.append(
            sampler.reward.score_ids(
                *(part[key].to(sampler.model.device) for part in (prompt, completion) for key in ("input_ids", "attention_mask"))
            ).cpu()
        )
    proxy = torch.cat(scores).view_as(pool.proxy)
    return replace(pool, proxy=proxy, seconds=pool.seconds + time.perf_counter() - started)


def best_of_n_rows(task: Task, pool: Pool, ns: Sequence[int], likelihood_weight: float = 0.0, **more: object) -> list[Row]:
    """Unbiased best-of-n by the pool's proxy, for gold, proxy and both likelihoods. `base` is n = 1. With a weight the best is
    that of proxy and likelihood, as along a gradient field, and there is no `base`."""
    size = pool.proxy.shape[1]
    chosen_by = pool.proxy - likelihood_weight * pool.nll_base
    if likelihood_weight:
        ns = [n for n in ns if n > 1]
    curves = {
        name: best_of_n_curve(chosen_by, values, ns).numpy()
        for name, values in (
            ("reward_gold", pool.gold),
            ("reward_proxy", pool.proxy),
            ("nll_base", pool.nll_base),
            ("nll_judge", pool.nll_judge),
        )
    }
    rows: list[Row] = []
    for i, n in enumerate(ns):
        low, high = bootstrap_ci(curves["reward_gold"][:, i])
        chosen = [texts[int(p[:n].argmax())] for texts, p in zip(pool.completions, chosen_by, strict=True)]
        rows.append(
            {
                "task": task.name,
                "method": "best_of_n_likelihood" if likelihood_weight else "base" if n == 1 else "best_of_n",
                "num_particles": n,
                "generations": float(n),
                "steps": 0,
                **{name: float(curve[:, i].mean()) for name, curve in curves.items()},
                "reward_gold_low": low,
                "reward_gold_high": high,
                "kl_nats": best_of_n_kl(n),
                "distinct_2": distinct_n(chosen, 2),
                "seconds": pool.seconds * n / size,
                **({"likelihood_weight": likelihood_weight} if likelihood_weight else {}),
                **more,
            }
        )
    return rows


def over_best_of_n(measured: Measured, pool: Pool, kl_nats: float, likelihood_weight: float = 0.0) -> Row:
    """Gold above best-of-n on the same prompts, at equal generations, in equal time and at equal KL: mean and 95 % interval of
    the paired difference. With a weight also above the best by proxy and likelihood, of as many generations and at equal KL.

    n is what the generations, the seconds, or `kl_nats` would have paid for, rounded up in favour of best-of-n and at most the
    pool.
    """
    size = pool.proxy.shape[1]
    drawn = float(np.mean(measured.generations))
    rivals = {
        "": (drawn, pool.proxy),
        "_in_equal_time": (size * measured.seconds / pool.seconds, pool.proxy),
        "_at_equal_kl": (equal_kl_n(kl_nats, size), pool.proxy),
    }
    if likelihood_weight:
        both = pool.proxy - likelihood_weight * pool.nll_base
        rivals |= {"_by_likelihood": (drawn, both), "_by_likelihood_at_equal_kl": (equal_kl_n(kl_nats, size), both)}
    result: Row = {}
    for key, (n, chosen_by) in rivals.items():
        n = min(math.ceil(n), size)
        baseline = best_of_n_curve(chosen_by, pool.gold, [n])[:, 0].numpy()
        low, high = paired_bootstrap_ci(measured.gold, baseline)
        result |= {
            f"equal_n{key}": n,
            f"gold_over_best_of_n{key}": float(np.mean(measured.gold) - baseline.mean()),
            f"gold_over_best_of_n{key}_low": low,
            f"gold_over_best_of_n{key}_high": high,
        }
    return result


NS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """What is run for every task. The defaults are those of the demonstration: of the own gradient chosen on the proxy reward of
    other prompts, of the learned one (1 nat) after trials on other prompts whose gold had been seen too.

    Particles move along a learned gradient (`text.field`), each while it is drawn, `rounds` times N of them. The gradient of the
    reward itself, on finished texts, stands beside it: three steps a round, six rounds of the two best.
    """

    pool: int = 64
    num_particles: int = 8
    rounds: int = 2
    kl_budgets: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    kl_budget: float = 1.0  # of the controls and of the comparison of one member with several
    field_prompts: int = 3_000
    field_samples: int = 8
    own_steps: int = 3
    own_step_size: float = 0.5
    own_kl_budget: float = 4.0
    own_rounds: int = 6
    own_movers: int = 2

    @property
    def learned(self) -> TransportBudget:
        """Of particles that move while they are drawn."""
        return TransportBudget(kl_budget=self.kl_budget, rounds=self.rounds)

    @property
    def own(self) -> TransportBudget:
        """Of rounds of flow and decode along the reward's own gradient."""
        return TransportBudget(
            steps=self.own_steps, step_size=self.own_step_size, kl_budget=self.own_kl_budget, rounds=self.own_rounds
        )


@dataclass(frozen=True)
class Run:
    """One row of VGF; `gradient` is "learned" or "own"."""

    method: str
    gradient: str
    budget: TransportBudget
    num_particles: int
    verify: bool = True
    direction: Direction | None = None


def runs(plan: Plan, whole: bool, correlation: float) -> list[Run]:
    """What is measured with all members (`whole`) and with one; `correlation` is that of the gradient field.

    Raw rows show the population as the flow made it, once: moving the best alone, unverified, would throw away their selection
    and say nothing about the direction.
    """
    n = plan.num_particles
    if not whole:
        return [Run("vgf", "learned", plan.learned, n), Run("vgf", "own", plan.own, n)]
    raw, raw_own = replace(plan.learned, rounds=1), replace(plan.own, rounds=1)
    auto = TransportBudget.auto(n * plan.rounds, correlation)
    return [
        # Budget 0 is the same particles unmoved: what the flow adds is the difference to this row.
        *(Run("vgf", "learned", replace(plan.learned, kl_budget=b, steps=5 if b else 0), n) for b in plan.kl_budgets),
        Run("vgf_auto", "learned", auto, n // 2),
        Run("vgf_random", "learned", plan.learned, n, direction=CONTROLS["vgf_random"]),
        Run("vgf", "learned", raw, n, verify=False),
        *(Run(c, "learned", raw, n, verify=False, direction=CONTROLS[c]) for c in ("vgf_random", "vgf_flip")),
        Run("vgf", "own", plan.own, n),
        Run("vgf_random", "own", plan.own, n, direction=CONTROLS["vgf_random"]),
        Run("vgf", "own", raw_own, n, verify=False),
        *(Run(name, "own", raw_own, n, verify=False, direction=direction) for name, direction in CONTROLS.items()),
    ]


def fitted_field(
    task: Task, sampler: VGFSampler, members: Sequence[Path], plan: Plan, work: Path, log: Callable[[str], None]
) -> Path:
    """A gradient field of the sampler's reward, which is of these members, on prompts that are not held out. Kept in `work`."""
    if task.seen is None:
        raise ValueError(f"task {task.name!r} names no prompts (seen) to fit a gradient field to")
    return trained_field(
        work, f"{task.name}-{len(members)}", sampler, members, task.seen(plan.field_prompts), num_samples=plan.field_samples,
        max_completion_length=task.max_completion_length, log=log,
    )  # fmt: skip


def measure_task(
    task: Task,
    base: Path,
    judge: Path,
    members: Sequence[Path],
    seeds: Sequence[int],
    plan: Plan | None = None,
    *,
    work: Path,
    log: Callable[[str], None],
) -> list[Row]:
    """All rows of one task: base, best-of-n, VGF over budgets, its controls; with all members and with one.

    Every row names its `members` and its `gradient`; `verified` rows accept and select as a user would, the others show the raw
    transported population, which is where a control has to show itself. Gradient fields are kept in `work`.
    """
    plan = Plan() if plan is None else plan
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    judge_model = AutoModelForCausalLM.from_pretrained(judge).eval()
    several, single = ensemble(members, tokenizer), ensemble(members[:1], tokenizer)

    def sampler(reward: DifferentiableReward, field: GradientField | None = None, movers: int | None = None) -> VGFSampler:
        return VGFSampler(
            model, reward, tokenizer, horizon=task.horizon, movers=movers, flow_batch_size=64 * plan.num_particles,
            gradient_field=field,
        )  # fmt: skip

    rows: list[Row] = []
    log(f"{task.name}: a pool of {plan.pool} samples per prompt")
    pool = draw_pool(task, sampler(several), judge_model, seeds, plan.pool)
    for reward, size in ((several, len(members)), (single, 1)):
        if reward is single:
            pool = rescored(pool, task, sampler(single), seeds)
        ns = [n for n in NS if n <= plan.pool]
        field = GradientField.from_pretrained(fitted_field(task, sampler(reward), members[:size], plan, work, log))
        weight = float(field.likelihood_weight)
        rows += best_of_n_rows(task, pool, ns, members=size, seeds=len(seeds))
        rows += best_of_n_rows(task, pool, ns, weight, members=size, seeds=len(seeds))
        for run in runs(plan, reward is several, float(field.correlation)):
            budget = run.budget
            log(
                f"{task.name}: {run.method}, {run.gradient} gradient, {budget.kl_budget:g} nats"
                f"{'' if run.verify else ', raw'}, {size} reward model(s)"
            )
            auto = budget.generations is not None
            movers = plan.own_movers if run.gradient == "own" and run.verify else None
            measured = measure_vgf(
                task, sampler(reward, field if run.gradient == "learned" else None, movers), judge_model, seeds,
                run.num_particles, budget, verify=run.verify, direction=run.direction,
            )  # fmt: skip
            candidates = run.num_particles
            along = run.gradient == "learned" and not budget.is_zero
            if auto:
                candidates = math.ceil(float(np.max(measured.generations)))
            elif budget.steps:
                candidates *= budget.rounds if along else 1
                candidates += budget.rounds * plan.own_movers if run.verify and not along else 0
            rows.append(
                row(
                    task,
                    run.method,
                    measured,
                    run.num_particles,
                    candidates,
                    gradient=run.gradient,
                    steps=budget.steps if run.gradient == "own" else int(budget.steps > 0),
                    rounds=None if auto else budget.rounds,
                    kl_budget=budget.kl_budget,
                    verified=run.verify,
                    members=size,
                    seeds=len(seeds),
                    kl_lower=reward_quantile_kl(torch.tensor(measured.proxy), pool.proxy),
                    likelihood_weight=weight if along else None,
                    **over_best_of_n(measured, pool, selection_kl(measured.kl, candidates), weight if along else 0.0),
                )
            )
    return rows
