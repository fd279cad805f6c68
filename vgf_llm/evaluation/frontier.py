"""One task measured: best-of-n for every n from one pool, VGF at several budgets, and the controls, on paired prompts."""

from __future__ import annotations

import json
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
from vgf_llm.text.sampler import Direction

from .controls import flip, random_direction, shuffle_positions
from .metrics import bootstrap_ci, distinct_n, judge_nll, paired_bootstrap_ci, reward_quantile_kl, selection_kl


Gold = Callable[[str, str], float]
Row = dict[str, object]

POOL_SEED = 1_000_000

CONTROLS: dict[str, Direction] = {"vgf_random": random_direction, "vgf_flip": flip, "vgf_shuffle": shuffle_positions}


@dataclass(frozen=True)
class Task:
    """What is asked and how it is judged.

    `prompts(seed)` are the held-out prompts of one seed; seeds do not share prompts, so that intervals over prompts cover both.
    """

    name: str
    gold: Gold
    prompts: Callable[[int], list[str]]
    max_completion_length: int
    # How long a tilt outlives the first change (`VGFSampler`): to the end (None) only where position does not matter.
    horizon: int | None = 0


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
            prompts, num_particles, budget, task.max_completion_length, seed=seed, verify=verify, direction=direction
        )
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
        out = sampler.sample(prompts, size, TransportBudget(steps=0), task.max_completion_length, seed=POOL_SEED + seed)
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


def best_of_n_rows(task: Task, pool: Pool, ns: Sequence[int], **more: object) -> list[Row]:
    """Unbiased best-of-n by the pool's proxy, for gold, proxy and both likelihoods. `base` is n = 1."""
    size = pool.proxy.shape[1]
    curves = {
        name: best_of_n_curve(pool.proxy, values, ns).numpy()
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
        chosen = [texts[int(p[:n].argmax())] for texts, p in zip(pool.completions, pool.proxy, strict=True)]
        rows.append(
            {
                "task": task.name,
                "method": "base" if n == 1 else "best_of_n",
                "num_particles": n,
                "generations": float(n),
                "steps": 0,
                **{name: float(curve[:, i].mean()) for name, curve in curves.items()},
                "reward_gold_low": low,
                "reward_gold_high": high,
                "kl_nats": best_of_n_kl(n),
                "distinct_2": distinct_n(chosen, 2),
                "seconds": pool.seconds * n / size,
                **more,
            }
        )
    return rows


def over_best_of_n(measured: Measured, pool: Pool) -> Row:
    """Gold above best-of-n on the same prompts, at equal generations and in equal time: mean and 95 % interval of the paired
    difference.

    n is what the generations, or the seconds, would have paid for, rounded up in favour of best-of-n and at most the pool.
    """
    size = pool.proxy.shape[1]
    result: Row = {}
    for key, n in (("", np.mean(measured.generations)), ("_in_equal_time", size * measured.seconds / pool.seconds)):
        n = min(math.ceil(n), size)
        baseline = best_of_n_curve(pool.proxy, pool.gold, [n])[:, 0].numpy()
        low, high = paired_bootstrap_ci(measured.gold, baseline)
        result |= {
            f"equal_n{key}": n,
            f"gold_over_best_of_n{key}": float(np.mean(measured.gold) - baseline.mean()),
            f"gold_over_best_of_n{key}_low": low,
            f"gold_over_best_of_n{key}_high": high,
        }
    return result


NS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Plan:
    """What is run for every task. The defaults are those of the demonstration, chosen on the proxy reward of other prompts."""

    pool: int = 64
    num_particles: int = 8
    steps: int = 3
    step_size: float = 0.5
    rounds: int = 6
    movers: int = 2
    kl_budgets: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
    kl_budget: float = 4.0  # of the controls and of the comparison of one member with several


def measure_task(
    task: Task,
    base: Path,
    judge: Path,
    members: Sequence[Path],
    seeds: Sequence[int],
    plan: Plan | None = None,
    *,
    calibration: Sequence[tuple[float, float]] | None = None,
    log: Callable[[str], None],
) -> list[Row]:
    """All rows of one task: base, best-of-n, VGF over budgets, its controls; with all members and with one.

    Every row names its `members`; `verified` rows accept and select as a user would, the others show the raw transported
    population, which is where a control has to show itself.
    """
    plan = Plan() if plan is None else plan
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    judge_model = AutoModelForCausalLM.from_pretrained(judge).eval()
    if calibration is None:
        calibration = [tuple(json.loads((Path(m) / "calibration.json").read_text())) for m in members]
    ensemble = DifferentiableReward(list(members), tokenizer, calibration=calibration)
    single = DifferentiableReward(members[0], tokenizer, calibration=calibration[:1])

    def sampler(reward: DifferentiableReward, movers: int | None) -> VGFSampler:
        return VGFSampler(model, reward, tokenizer, horizon=task.horizon, movers=movers, flow_batch_size=64 * plan.num_particles)

    rows: list[Row] = []
    log(f"{task.name}: a pool of {plan.pool} samples per prompt")
    pool = draw_pool(task, sampler(ensemble, plan.movers), judge_model, seeds, plan.pool)
    for reward, size in ((ensemble, len(members)), (single, 1)):
        if reward is single:
            pool = rescored(pool, task, sampler(single, plan.movers), seeds)
        rows += best_of_n_rows(task, pool, [n for n in NS if n <= plan.pool], members=size, seeds=len(seeds))
        whole = TransportBudget(steps=plan.steps, step_size=plan.step_size, kl_budget=plan.kl_budget, rounds=plan.rounds)
        # Budget 0 is the same particles unmoved: what the flow adds is the difference to this row.
        of_nats = [replace(whole, kl_budget=b, steps=plan.steps if b else 0) for b in plan.kl_budgets]
        runs: list[tuple[str, TransportBudget, bool, Direction | None]] = [("vgf", whole, True, None)]
        if reward is ensemble:
            # Raw rows move every particle once: moving the best alone, unverified, would throw away their selection and say
            # nothing about the direction.
            raw = replace(whole, rounds=1)
            runs = [("vgf", budget, True, None) for budget in of_nats]
            runs += [("vgf_auto", TransportBudget.auto(2 * plan.num_particles), True, None), ("vgf", raw, False, None)]
            runs += [(name, raw, False, direction) for name, direction in CONTROLS.items()]
            runs += [("vgf_random", whole, True, CONTROLS["vgf_random"])]
        for method, budget, verify, direction in runs:
            log(f"{task.name}: {method}, {budget.kl_budget:g} nats per decode{'' if verify else ', raw'}, {size} reward model(s)")
            auto = budget.generations is not None
            movers = None if auto or not verify else plan.movers
            measured = measure_vgf(
                task, sampler(reward, movers), judge_model, seeds, plan.num_particles, budget, verify=verify, direction=direction
            )
            candidates = plan.num_particles
            if auto:
                candidates = math.ceil(float(np.max(measured.generations)))
            elif verify and budget.steps:
                candidates += budget.rounds * plan.movers
            rows.append(
                row(
                    task,
                    method,
                    measured,
                    plan.num_particles,
                    candidates,
                    steps=budget.steps,
                    rounds=None if auto else budget.rounds,
                    kl_budget=budget.kl_budget,
                    verified=verify,
                    members=size,
                    seeds=len(seeds),
                    kl_lower=reward_quantile_kl(torch.tensor(measured.proxy), pool.proxy),
                    **over_best_of_n(measured, pool),
                )
            )
    return rows
