"""What the defaults of text sampling are worth: gradient, decoder, rounds, coupling, ensemble, each against its alternatives.

    python -m benchmarks.ablations                                     models of `vgf demo --scale full`, trained if missing
    python -m benchmarks.ablations --e2e-models DIR --e2e-data DIR     also those of benchmarks/e2e_nlg.py
    python -m benchmarks.ablations --confirm                           where to take the gradient, on 128 other prompts a task
    python -m benchmarks.ablations --field                             a learned gradient field beside the reward's own, on these
    python -m benchmarks.ablations --quick                             shows that everything runs, and measures nothing

Every variant differs from one reference (`Variant`) in what its name says, and meets the same prompts with the same initial
particles; none was tuned. Best-of-n for every n up to 256 comes from one pool of samples. Moves that the library does not have
are in benchmarks/moves.py. Every cell is kept in `--work`, so that a cut run goes on.

Writes benchmarks/results/ablations.json and docs/img/ablations*.png; with `--confirm`
and `--field`, ablations_confirmed.json and ablations_field.json alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import moves
from benchmarks.diagnose import E2E_HELD_OUT, newest
from benchmarks.e2e_nlg import MAX_COMPLETION as E2E_LENGTH
from benchmarks.e2e_nlg import gold as e2e_gold
from vgf_llm.data import reviews
from vgf_llm.data.e2e import format_prompt, load_e2e, split_by_mr, spoken_order
from vgf_llm.evaluation.controls import random_direction
from vgf_llm.evaluation.demo import MAX_COMPLETION, SCALES
from vgf_llm.evaluation.fidelity import measure_substitutions
from vgf_llm.evaluation.frontier import POOL_SEED, seeds_by_place
from vgf_llm.evaluation.metrics import (
    bootstrap_ci,
    distinct_n,
    equal_kl_n,
    paired_bootstrap_ci,
    reward_quantile_kl,
    selection_kl,
    self_bleu,
)
from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.evaluation.world import Settings, build_world
from vgf_llm.flow import TransportBudget, best_of_n, best_of_n_curve, best_of_n_kl, fidelity
from vgf_llm.text import DifferentiableReward, VGFSampler
from vgf_llm.text.field import GradientField, fit_field
from vgf_llm.text.prefix import left_pad


ROOT = Path(__file__).resolve().parents[1]
N = 8
QUICK = Settings(
    texts=1_600, steps=60, judge_steps=1, trunk_pairs=240, content_pairs=200, content_edits=60, tone_pairs=260, members=2
)
RECORDED = (1, 2, 4, 7, 12)
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"


@dataclass(frozen=True)
class Variant:
    """One way to move particles. The defaults are the reference: those of the demonstration at its default scale.

    `move`: "library" is `VGFSampler.sample`; the others are made by benchmarks/moves.py. `horizon` "task" is None for tone, 0
    elsewhere. `record`: after which rounds the outcome is looked at; empty is after the last.
    """

    move: str = "library"
    gradient_at: str = "path"  # or "field": learned on completions that cost no label
    horizon: int | None | str = "task"
    kl_budget: float = 2.0
    steps: int = 1
    step_size: float = 0.5
    rounds: int = 7
    movers: int = 2
    likelihood_weight: float = 0.02
    members: int = 0  # 0: all there are
    verify: bool = True
    random: bool = False
    coupling: str = "none"
    repulsion: float = 0.0
    accept: str = "rises"
    record: tuple[int, ...] = ()
    generations: float = 0.0  # 16: `TransportBudget.auto(16)`, whatever else is set
    layers: int | None = None  # of the reward model's, that the field has; None: all


REFERENCE = Variant()
ONCE = replace(REFERENCE, rounds=1, movers=N, verify=False)
# A particle drawn and left alone.
STILL = replace(REFERENCE, steps=0, kl_budget=0.0, rounds=1)


Groups = Mapping[str, Mapping[str, Variant]]


def shortened(groups: Groups) -> Groups:
    """The same with at most two rounds, and fewer variants."""
    return {
        group: {
            name: replace(v, rounds=min(v.rounds, 2), record=tuple(r for r in v.record if r <= 2))
            for name, v in of_group.items()
            if v.kl_budget in (2.0, 32.0)
        }
        for group, of_group in groups.items()
    }


def variants() -> dict[str, dict[str, Variant]]:
    """Groups of variants to be compared, by what a reader calls them."""
    crowd = replace(REFERENCE, movers=N, rounds=1)
    edits = {
        "edits by chance": Variant(move="edit_random"),
        "edits by gradient": Variant(move="edit_gradient"),
        "Metropolis-Hastings, gradient, 2 rounds": Variant(move="edit_gradient", accept="metropolis", rounds=2, movers=N),
        "Metropolis-Hastings, chance, 2 rounds": Variant(move="edit_random", accept="metropolis", rounds=2, movers=N),
    }
    grid = {
        f"{rounds} x {movers}, L = {steps}, {kl:g} nat{'' if kl == 1 else 's'}": replace(
            REFERENCE, rounds=rounds, movers=movers, steps=steps, kl_budget=kl
        )
        for rounds, movers, steps in ((1, 8, 1), (3, 4, 1), (7, 2, 1), (7, 2, 3))
        for kl in ((1.0, 2.0, 4.0) if steps == 1 else (2.0, 4.0))
    }
    far = {
        f"w = {weight:g}, {kl:g} nats / {members or 'all'}": replace(
            REFERENCE, move="embeddings", members=members, likelihood_weight=weight, kl_budget=kl, rounds=RECORDED[-1],
            record=RECORDED,
        )
        for members in (0, 1)
        for weight, kl in ((0.02, 2.0), (0.02, 32.0), (0.0, 32.0))
    }  # fmt: skip
    return {
        "space": {
            "path": REFERENCE,
            "token": replace(REFERENCE, gradient_at="token"),
            "mixture": replace(REFERENCE, gradient_at="mixture"),
            "hidden states": replace(REFERENCE, move="hidden"),
            "path, one decode": ONCE,
            "token, one decode": replace(ONCE, gradient_at="token"),
            "hidden states, one decode": replace(ONCE, move="hidden"),
            "random, one decode": replace(ONCE, random=True),
        },
        "decoder": {
            "coupled": REFERENCE,
            "coupled, horizon 0": replace(REFERENCE, horizon=0),
            "coupled, no horizon": replace(REFERENCE, horizon=None),
            "coupled, random direction": replace(REFERENCE, random=True),
            **edits,
            "nearest token, step 4": replace(REFERENCE, move="nearest", step_size=4.0),
            "nearest token, one decode": replace(ONCE, move="nearest"),
            "nearest token, step 4, one decode": replace(ONCE, move="nearest", step_size=4.0),
        },
        "rounds": grid,
        "coupling": {
            "none, 1 nat": replace(crowd, kl_budget=1.0),
            "none, 2 nats": crowd,
            "none, 4 nats": replace(crowd, kl_budget=4.0),
            "pooled repulsion 0.5, 2 nats": replace(crowd, repulsion=0.5),
            "pooled repulsion 2, 2 nats": replace(crowd, repulsion=2.0),
            "SVGD on positions, 2 nats": replace(crowd, coupling="svgd"),
        },
        "far": far,
    }


# What `variants` suggested, on prompts that had no part in it.
CONFIRMING_SEEDS, CONFIRMING_PROMPTS, CONFIRMING_POOL = (600, 601, 602, 603), 32, 64


def confirming() -> Groups:
    """Where the gradient is taken, with one step and with several."""
    places = {
        "path": {},
        "mixture": {"gradient_at": "mixture"},
        "hidden states": {"move": "hidden"},
    }
    return {
        "confirmed": {
            f"{name}, L = {steps}, {kl:g} nats": replace(REFERENCE, steps=steps, kl_budget=kl, **place)  # type: ignore[arg-type]
            for name, place in places.items()
            for steps, kl in ((1, 2.0), (1, 4.0), (3, 4.0))
        }
    }


# What the field is fitted to: prompts of yet another seed.
FIELD_PROMPTS, FIELD_SEED = 1_000, 31_000


def with_field() -> Groups:
    """A learned gradient, along which particles are drawn, beside rounds of the reward's own: one setting for all tasks."""
    own = replace(REFERENCE, horizon=None, gradient_at="mixture")
    drawn = replace(own, gradient_at="field", rounds=2, movers=N)
    return {
        "field": {
            **{
                f"learned, 2 x 8, {kl:g} nat{'' if kl == 1 else 's'}": replace(drawn, kl_budget=kl)
                for kl in (0.5, 1.0, 2.0, 4.0, 8.0)
            },
            "learned, 2 x 8, 1 nat, random direction": replace(drawn, kl_budget=1.0, random=True),
            # All have three layers.
            **{
                f"learned, {layers} of 3 layers, {kl:g} nat{'' if kl == 1 else 's'}": replace(drawn, layers=layers, kl_budget=kl)
                for layers in (1, 2)
                for kl in (1.0, 2.0, 4.0)
            },
            "learned, automatic": replace(drawn, generations=16.0),
            "own, 7 x 2, 2 nats": own,
            "own, 7 x 2, 4 nats": replace(own, kl_budget=4.0),
            "own, 7 x 2, L = 3, 4 nats": replace(own, kl_budget=4.0, steps=3),
            "own, 7 x 2, 2 nats, random direction": replace(own, random=True),
            "own, automatic": replace(own, generations=16.0),
        }
    }


E2E = {
    "space": ("path", "token", "mixture", "hidden states"),
    "decoder": ("coupled", "coupled, no horizon", "coupled, random direction", "edits by chance", "edits by gradient"),
}


@dataclass(frozen=True)
class World:
    """One task with its models; `prompts(seed)` are held out, and no two seeds share one. A field is fitted to `seen`."""

    name: str
    base: Path
    rewards: list[Path]
    gold: Callable[[str, str], float]
    prompts: Callable[[int], list[str]]
    length: int
    horizon: int | None
    work: Path
    seen: Callable[[], list[str]]

    def field(self, sampler: VGFSampler, layers: int | None = None) -> GradientField:
        """Fitted once, its CPU seconds beside it."""
        kept = self.work / self.name / ("field" if layers is None else f"field-{layers}")
        if not kept.is_dir():
            begun, making = time.process_time(), kept.with_name("field.part")
            fitted = fit_field(sampler, self.seen(), layers=layers, max_completion_length=self.length, seed=FIELD_SEED)
            fitted.save_pretrained(making)
            (making / "seconds.json").write_text(json.dumps(time.process_time() - begun))
            making.rename(kept)
        return GradientField.from_pretrained(kept)

    def sampler(self, variant: Variant) -> VGFSampler:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        members = self.rewards[: variant.members or None]
        beside = [path / "calibration.json" for path in members]
        calibration = [tuple(json.loads(path.read_text())) for path in beside]
        reward = DifferentiableReward(list(members), tokenizer, calibration=calibration)
        if variant.repulsion:
            reward = moves.PooledRepulsion(reward, tokenizer, variant.movers, variant.repulsion)
        model = AutoModelForCausalLM.from_pretrained(self.base).eval()
        learned = variant.gradient_at == "field"
        field = self.field(VGFSampler(model, reward, tokenizer, flow_batch_size=512), variant.layers) if learned else None
        return VGFSampler(
            model,
            reward,
            tokenizer,
            gradient_at="mixture" if learned else variant.gradient_at,  # type: ignore[arg-type]
            horizon=self.horizon if variant.horizon == "task" else variant.horizon,  # type: ignore[arg-type]
            movers=variant.movers,
            likelihood_weight=variant.likelihood_weight,
            flow_batch_size=512,
            gradient_field=field,
        )


def measure(world: World, variant: Variant, seeds: Sequence[int]) -> dict[str, dict]:
    """By number of rounds, one entry per prompt of each of: text, gold, proxy, log_ratio, nll_base, generations; the particles'
    texts and their mean gold; and CPU seconds in all, on one thread: other programs do not count."""
    sampler, result = world.sampler(variant), {}
    prompts = [p for seed in seeds for p in world.prompts(seed)]
    # All in one call, which is faster: a result depends on the prompt and its seed alone.
    noise = [own for seed in seeds for own in seeds_by_place(seed, world.prompts(seed))]
    begun, judging = time.process_time(), 0.0
    for rounds, outcome in _outcomes(world, sampler, variant, prompts, noise):
        seconds = time.process_time() - begun - judging
        gold = [world.gold(p, c) for p, c in zip(prompts, outcome["text"], strict=True)]
        of_all = [float(np.mean([world.gold(p, c) for c in cs])) for p, cs in zip(prompts, outcome["texts"], strict=True)]
        result[str(rounds)] = {**outcome, "gold": gold, "gold_of_all": of_all, "seconds": seconds}
        judging = time.process_time() - begun - seconds
    return result


def _outcomes(
    world: World, sampler: VGFSampler, variant: Variant, prompts: list[str], seeds: list[int]
) -> Iterator[tuple[int, dict[str, list]]]:
    """Number of rounds and what they ended in, prompt by prompt."""
    budget = TransportBudget(
        steps=variant.steps, step_size=variant.step_size, kl_budget=variant.kl_budget, rounds=variant.rounds,
        coupling=variant.coupling,  # type: ignore[arg-type]
    )  # fmt: skip
    if variant.generations:
        along = None if sampler.field is None else float(sampler.field.correlation)
        budget = TransportBudget.auto(variant.generations, along)
    if variant.move == "library":
        direction = random_direction if variant.random else None
        out = sampler.sample(prompts, N, budget, world.length, seed=seeds, verify=variant.verify, direction=direction)
        row, moved = torch.arange(len(prompts)), out.selected < N
        pick, first, last = out.selected % N, out.initial, out.transported
        yield (
            variant.rounds,
            {
                "text": out.completions,
                "proxy": out.rewards.tolist(),
                "log_ratio": torch.where(moved, last.log_ratio[row, pick], 0.0).tolist(),
                "nll_base": (-torch.where(moved, last.logprobs[row, pick], first.logprobs[row, pick])).tolist(),
                "generations": out.generations.tolist(),
                "texts": last.completions,
            },
        )
        return
    move: moves.Move = {
        "embeddings": moves.embeddings(budget),
        "hidden": moves.hidden_states(budget),
        "nearest": moves.nearest_token(budget),
        "edit_random": moves.single_site(False, variant.kl_budget),
        "edit_gradient": moves.single_site(True, variant.kl_budget),
    }[variant.move]
    accept = moves.metropolis(variant.kl_budget) if variant.accept == "metropolis" else moves.rises(variant.likelihood_weight)
    chains = moves.Chains(sampler, prompts, N, world.length, seeds)
    first, shape = chains.initial, chains.shape
    drawn = first.text.mask.sum(1).view(shape).float().mean(1)
    run = chains.run(move, accept if variant.verify else moves.always, variant.rounds, variant.movers)
    for index, (now, cost) in enumerate(run, start=1):
        if index not in (variant.record or (variant.rounds,)):
            continue
        pool = torch.cat([now.rewards.view(shape), first.rewards.view(shape)], 1) if variant.verify else now.rewards.view(shape)
        best = best_of_n(pool)[:, None]

        def chosen(name: str, now: moves.Rows = now, best: torch.Tensor = best) -> torch.Tensor:
            parts = [getattr(rows.text, name).view(shape) for rows in (now, first)]
            return torch.cat(parts, 1).gather(1, best)[:, 0]

        texts = [
            sampler.processing_class.batch_decode([i[m] for i, m in zip(t.ids, t.mask, strict=True)], skip_special_tokens=True)
            for t in (now.text, first.text)
        ]
        each = [[part[b * N : b * N + N] for b in range(len(prompts))] for part in texts]
        yield (
            index,
            {
                "text": [(a + b)[k] for a, b, k in zip(*each, best[:, 0].tolist(), strict=True)],
                "proxy": pool.gather(1, best)[:, 0].tolist(),
                "log_ratio": chosen("log_ratio").tolist(),
                "nll_base": (-chosen("logprobs")).tolist(),
                "generations": (cost.view(shape).sum(1) / drawn).tolist(),
                "texts": each[0],
            },
        )


def forecasts(world: World, seed: int) -> dict[str, dict[str, float]]:
    """Rank correlation of what each gradient says about another token with what it does, the rest kept and written anew, on 24
    held-out prompts."""
    sampler = world.sampler(replace(REFERENCE, gradient_at="field"))
    found = measure_substitutions(
        sampler, world.prompts(seed)[:24], max_completion_length=world.length, substitutions=12, regenerations=16, seed=seed
    )
    changes = {"rest kept": found.fixed, "rest written anew": found.regenerated}
    return {at: {rest: fidelity(said, change) for rest, change in changes.items()} for at, said in found.predicted.items()}


def draw_pool(world: World, seeds: Sequence[int], size: int) -> dict[str, Any]:
    """Base samples [P, size] of every prompt, judged once, by noise of their own."""
    sampler = world.sampler(STILL)
    pool: dict[str, Any] = {"proxy": [], "gold": [], "nll_base": [], "ids": [], "seconds": 0.0}
    for seed in seeds:
        prompts, started = world.prompts(seed), time.process_time()
        noise = seeds_by_place(POOL_SEED + seed, prompts)
        drawn = sampler.sample(prompts, size, TransportBudget(steps=0), world.length, seed=noise).initial
        pool["seconds"] += time.process_time() - started
        pool["proxy"] += drawn.rewards.tolist()
        pool["nll_base"] += (-drawn.logprobs).tolist()
        pool["ids"] += drawn.completion_ids
        pool["gold"] += [[world.gold(p, c) for c in cs] for p, cs in zip(prompts, drawn.completions, strict=True)]
    return pool


@torch.no_grad()
def judged_by_one(world: World, seeds: Sequence[int], pool: Mapping[str, Any]) -> dict[str, Any]:
    """The same samples under the first reward model alone. Its seconds are those of all, and too many by what the others took."""
    sampler = world.sampler(replace(STILL, members=1))
    pad, proxy = sampler.processing_class.pad_token_id, []
    encoded = sampler.encode([p for seed in seeds for p in world.prompts(seed)], world.length)
    for prompt, several in zip(encoded, pool["ids"], strict=True):
        ids, mask = left_pad([prompt], pad, sampler.model.device)
        width = max(map(len, several))
        texts = torch.tensor([row + [pad] * (width - len(row)) for row in several], device=ids.device)
        inside = torch.arange(width) < torch.tensor([len(row) for row in several])[:, None]
        prefix = sampler.reward.read(ids, mask).deal(torch.zeros(len(several), dtype=torch.int64, device=ids.device))
        rows = len(several)
        proxy.append(
            sampler.reward.score_ids(ids.expand(rows, -1), mask.expand(rows, -1), texts, inside.to(ids.device), prefix).tolist()
        )
    return {**pool, "proxy": proxy, "ids": None}


# ---- rows


def best_of_n_rows(pool: Mapping[str, Any], size: int, members: int) -> list[dict]:
    """Unbiased best-of-n for n = 1, 2, 4, ... from a pool of `size` samples per prompt."""
    ns = [2**k for k in range(int(math.log2(size)) + 1)]
    proxy = torch.tensor(pool["proxy"])
    curves = {key: best_of_n_curve(proxy, torch.tensor(pool[key]), ns).numpy() for key in ("gold", "proxy", "nll_base")}
    rows = []
    for i, n in enumerate(ns):
        low, high = bootstrap_ci(curves["gold"][:, i])
        rows.append(
            {
                "method": "base" if n == 1 else "best_of_n",
                "members": members,
                "num_particles": n,
                "generations": float(n),
                "reward_gold": float(curves["gold"][:, i].mean()),
                "reward_gold_low": low,
                "reward_gold_high": high,
                "reward_proxy": float(curves["proxy"][:, i].mean()),
                "nll_base": float(curves["nll_base"][:, i].mean()),
                "kl_nats": best_of_n_kl(n),
                "cpu_seconds": pool["seconds"] * n / size,
            }
        )
    return rows


def row(method: str, cell: Mapping[str, Any], variant: Variant, pool: Mapping[str, Any], members: int, rounds: int) -> dict:
    """One variant beside best-of-n of the same prompts."""
    gold = np.array(cell["gold"])
    low, high = bootstrap_ci(gold)
    edges = {key: bootstrap_ci(cell[key]) for key in ("proxy", "nll_base", "generations")}
    still = not (variant.steps and variant.kl_budget)
    # Rounding has no likelihood ratio: there is nothing to account.
    spent = None if variant.move == "nearest" else cell["log_ratio"]
    candidates = N * (rounds if variant.gradient_at == "field" else 1)
    if variant.verify and not still and variant.gradient_at != "field":
        candidates += rounds * variant.movers
    result = {
        "method": method,
        "members": members,
        "num_particles": N,
        "verified": variant.verify,
        "setting": asdict(variant),
        "rounds": rounds,
        "generations": float(np.mean(cell["generations"])),
        "reward_gold": float(gold.mean()),
        "reward_gold_low": low,
        "reward_gold_high": high,
        "reward_proxy": float(np.mean(cell["proxy"])),
        "nll_base": float(np.mean(cell["nll_base"])),
        **{f"{key}_interval": list(edge) for key, edge in edges.items()},
        "kl_nats": None if spent is None else selection_kl(spent, candidates),
        "kl_nats_interval": None if spent is None else [edge + best_of_n_kl(candidates) for edge in bootstrap_ci(spent)],
        "kl_lower": reward_quantile_kl(cell["proxy"], pool["proxy"]) if len(gold) >= 8 else None,
        "distinct_2": distinct_n(cell["text"], 2),
        "gold_of_all": float(np.mean(cell["gold_of_all"])),
        "cpu_seconds": cell["seconds"],
        **over_best_of_n(cell, pool, None if spent is None else selection_kl(spent, candidates)),
        **at_equal_proxy(cell, pool),
    }
    return result


def over_best_of_n(cell: Mapping[str, Any], pool: Mapping[str, Any], kl_nats: float | None) -> dict:
    """Gold above best-of-n with as many generations, in as many CPU seconds, and at as many nats, rounded up; mean and interval,
    paired."""
    proxy, gold = torch.tensor(pool["proxy"]), torch.tensor(pool["gold"])
    size, result = proxy.shape[1], {}
    rivals = {"": np.mean(cell["generations"]), "_in_equal_time": size * cell["seconds"] / pool["seconds"]}
    if kl_nats is not None:
        rivals["_at_equal_kl"] = equal_kl_n(kl_nats, size)
    for key, n in rivals.items():
        n = min(max(math.ceil(n), 1), size)
        rival = best_of_n_curve(proxy, gold, [n])[:, 0].numpy()
        low, high = paired_bootstrap_ci(cell["gold"], rival)
        name = f"gold_over_best_of_n{key}"
        result |= {
            f"equal_n{key}": n,
            name: float(np.mean(cell["gold"]) - rival.mean()),
            f"{name}_low": low,
            f"{name}_high": high,
        }
    return result


def over_reference(cell: Mapping[str, Any], reference: Mapping[str, Any]) -> dict:
    """Gold and likelihood beside those of the reference on the same prompts: mean and interval, paired."""
    result = {}
    for key in ("gold", "nll_base"):
        low, high = paired_bootstrap_ci(cell[key], reference[key])
        name = f"{key}_over_reference"
        result |= {name: float(np.mean(cell[key]) - np.mean(reference[key])), f"{name}_low": low, f"{name}_high": high}
    return result


def at_equal_proxy(cell: Mapping[str, Any], pool: Mapping[str, Any]) -> dict:
    """Gold above that of the best-of-n which has the same mean proxy, in units of the within-prompt standard deviation of gold.

    None where the largest best-of-n of the pool has a lower proxy.
    """
    proxy, gold = torch.tensor(pool["proxy"]), torch.tensor(pool["gold"])
    ns = list(range(1, proxy.shape[1] + 1))
    proxies = best_of_n_curve(proxy, proxy, ns).numpy()
    golds = best_of_n_curve(proxy, gold, ns).numpy()
    unit = float(gold.double().var(1).mean().sqrt())
    mine = float(np.mean(cell["proxy"]))
    if mine > proxies.mean(0)[-1]:
        return {"over_at_equal_proxy": None, "equal_proxy_n": None}
    # The means rise with n: between two neighbours the share that meets ours.
    where = float(np.interp(mine, proxies.mean(0), ns))
    low_n = min(int(where), len(ns) - 1)
    share = where - low_n
    rival = (1 - share) * golds[:, low_n - 1] + share * golds[:, low_n]
    low, high = paired_bootstrap_ci(np.array(cell["gold"]) / unit, rival / unit)
    return {
        "over_at_equal_proxy": float(np.mean(cell["gold"]) - rival.mean()) / unit,
        "over_at_equal_proxy_low": low,
        "over_at_equal_proxy_high": high,
        "equal_proxy_n": where,
    }


def diversity(cell: Mapping[str, Any], gold_of_all: Sequence[float]) -> dict:
    """How much the particles of a prompt differ, and their gold above that of `gold_of_all`, the uncoupled ones."""
    distinct = [distinct_n(texts, 2) for texts in cell["texts"]]
    repeated = [self_bleu(texts) for texts in cell["texts"]]
    low, high = paired_bootstrap_ci(cell["gold_of_all"], gold_of_all)
    name = "gold_of_all_over_uncoupled"
    result = {
        name: float(np.mean(cell["gold_of_all"]) - np.mean(gold_of_all)), f"{name}_low": low, f"{name}_high": high,
    }  # fmt: skip
    for key, values in (("distinct_2_of_all", distinct), ("self_bleu_of_all", repeated)):
        result |= {key: float(np.mean(values)), f"{key}_interval": list(bootstrap_ci(values))}
    return result


# ---- figures


def new_figure(width: float, height: float, rows: int, columns: int, title: str, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def shared_legend(figure: Figure, axes: Any, columns: int) -> None:
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _bars(value: float, low: float, high: float) -> list[list[float]]:
    """Lengths of an error bar; an interval of few prompts need not hold its mean."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def plot_differences(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gold above best-of-n at equal generations, one line per variant, one column per task."""
    groups = ("space", "decoder")
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    there = {r["method"] for r in rows}
    names = [f"{group}: {name}" for group in groups for name in variants()[group] if f"{group}: {name}" in there]
    figure, axes = new_figure(
        3.4 + 3.4 * len(tasks), 1.6 + 0.3 * len(names), 1, len(tasks), "Gold above best-of-n at equal generations, 95 % intervals"
    )
    for column, (ax, task) in enumerate(zip(axes[0], tasks, strict=True)):
        ax.axvline(0, color=BLUE, linewidth=1.2)
        for r in rows:
            if r["task"] != task or r["method"] not in names:
                continue
            value, low, high = (r[f"gold_over_best_of_n{end}"] for end in ("", "_low", "_high"))
            reference = r["method"] in ("space: path", "decoder: coupled")
            colour = VERMILION if reference else GREEN if r["verified"] else GREY
            y = names.index(r["method"])
            ax.errorbar(value, y, xerr=_bars(value, low, high), fmt="o", color=colour, capsize=2, markersize=5)
        ax.set(title=task, ylim=(len(names) - 0.5, -0.5), xlabel="gold reward")
        ax.set_yticks(range(len(names)), [name.replace(": ", ":  ") for name in names] if column == 0 else [""] * len(names))
        ax.grid(axis="x", color="#E4E4E4")
    for colour, label in ((VERMILION, "reference"), (GREEN, "verified variant"), (GREY, "one decode, not verified")):
        axes[0][0].plot([], [], "o", color=colour, label=label)
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def plot_rounds(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gold against generations: best-of-n up to the size of the pool, and the grid of rounds, movers and steps."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["method"].startswith("rounds")))
    figure, axes = new_figure(
        5.4 * len(tasks), 4.8, 1, len(tasks), "Rounds x movers and flow steps L, each at 1, 2 and 4 nats (L = 3: 2 and 4)"
    )
    styles = {
        (1, 8, 1): (GREY, "s"),
        (3, 4, 1): (GREEN, "^"),
        (7, 2, 1): (PURPLE, "D"),
        (7, 2, 3): (VERMILION, "o"),
    }
    for ax, task in zip(axes[0], tasks, strict=True):
        _best_of_n(ax, [r for r in rows if r["task"] == task], "generations")
        for (rounds, movers, steps), (colour, marker) in styles.items():
            name = f"rounds: {rounds} x {movers}, L = {steps},"
            series = sorted(
                (r for r in rows if r["task"] == task and r["method"].startswith(name)), key=lambda r: r["generations"]
            )
            for index, r in enumerate(series):
                edges = _bars(r["reward_gold"], r["reward_gold_low"], r["reward_gold_high"])
                ax.errorbar(
                    r["generations"], r["reward_gold"], yerr=edges, fmt=marker, color=colour, markersize=6, elinewidth=0.8,
                    label=f"{rounds} x {movers}, L = {steps}" if index == 0 else None,
                )  # fmt: skip
        ax.set_xscale("log", base=2)
        ticks = sorted({r["num_particles"] for r in rows if r["task"] == task and r["method"] == "best_of_n"})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set(title=task, xlabel="generations per prompt", ylabel="gold reward")
        ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def _best_of_n(ax: Axes, rows: Sequence[Mapping[str, Any]], x: str, several: bool = True) -> None:
    most = max(r["members"] for r in rows)
    curve = [r for r in rows if r["method"] == "best_of_n" and (r["members"] == most) == several]
    xs, gold = [r[x] for r in curve], [r["reward_gold"] for r in curve]
    if not curve:
        return
    said = f"best-of-n (n up to {curve[-1]['num_particles']})"
    low, high = ([r[f"reward_gold_{end}"] for r in curve] for end in ("low", "high"))
    ax.fill_between(xs, low, high, color=BLUE, alpha=0.15, linewidth=0)
    ax.plot(xs, gold, "o-", color=BLUE, markersize=4, label=said)


def plot_far(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Gold against the proxy that was optimised, round after round, with all reward models above and with one below."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["method"].startswith("far")))
    most = max(r["members"] for r in rows)
    figure, axes = new_figure(5.4 * len(tasks), 7.6, 2, len(tasks), "Over-optimisation: gold against proxy, 1 to 12 rounds")
    styles = {(0.02, 2.0): (VERMILION, "o"), (0.02, 32.0): (GREEN, "D"), (0.0, 32.0): (GREY, "x")}
    for column, task in enumerate(tasks):
        for line, members in enumerate((most, 1)):
            ax = axes[line][column]
            here = [r for r in rows if r["task"] == task]
            _best_of_n(ax, here, "reward_proxy", several=members == most)
            for (weight, kl), (colour, marker) in styles.items():
                series = [
                    r
                    for r in here
                    if r["method"].startswith("far") and r["members"] == members
                    and (r["setting"]["likelihood_weight"], r["setting"]["kl_budget"]) == (weight, kl)
                ]  # fmt: skip
                label = f"VGF, likelihood_weight {weight:g}, {kl:g} nats"
                xs, ys = [r["reward_proxy"] for r in series], [r["reward_gold"] for r in series]
                ax.plot(xs, ys, marker=marker, color=colour, markersize=5, linewidth=1.2, label=label)
            ax.set_title(f"{task}, {members} reward model{'' if members == 1 else 's'}", fontsize=11)
            ax.set(xlabel="proxy reward", ylabel="gold reward")
            ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 3)
    save_figure(figure, path)


def plot_coupling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean gold of all particles against how much they repeat each other."""
    tasks = list(dict.fromkeys(r["task"] for r in rows if r["method"].startswith("coupling")))
    figure, axes = new_figure(5.4 * len(tasks), 4.6, 1, len(tasks), "Coupling: gold of all particles against their diversity")
    styles = {
        "none": (VERMILION, "o-"),
        "pooled repulsion 0.5": (GREEN, "D"),
        "pooled repulsion 2": (PURPLE, "s"),
        "SVGD on positions": (GREY, "x"),
    }
    for ax, task in zip(axes[0], tasks, strict=True):
        for name, (colour, marker) in styles.items():
            series = [r for r in rows if r["task"] == task and r["method"].startswith(f"coupling: {name},")]
            ax.plot(
                [r["self_bleu_of_all"] for r in series], [r["gold_of_all"] for r in series], marker, color=colour, markersize=7,
                label="none, at 1, 2 and 4 nats" if name == "none" else name,
            )  # fmt: skip
            for r in series:
                nats = r["setting"]["kl_budget"]
                ax.annotate(
                    f"{nats:g}", (r["self_bleu_of_all"], r["gold_of_all"]), xytext=(6, 4), textcoords="offset points", fontsize=8
                )
        ax.set(
            title=task, xlabel="self-BLEU of a prompt's particles (less is more diverse)", ylabel="gold, mean of all particles"
        )
        ax.margins(0.12)
        ax.grid(color="#E4E4E4")
    shared_legend(figure, axes, 4)
    save_figure(figure, path)


# ---- the run


@dataclass(frozen=True)
class Cells:
    """What was measured of one task: a file each, made when it is asked for. With `make` False, None where there is none."""

    world: World
    seeds: Sequence[int]
    size: int
    work: Path
    make: bool = True

    def of(self, variant: Variant) -> dict | None:
        if variant.horizon == self.world.horizon:
            variant = replace(variant, horizon="task")  # one measurement, whatever it is called
        changed = {k: v for k, v in asdict(variant).items() if v != getattr(REFERENCE, k)}
        name = "-".join(f"{k}={v}" for k, v in changed.items()) or "reference"
        if variant.move != "library":
            name += "-" + hashlib.sha256(Path(moves.__file__).read_bytes()).hexdigest()[:8]
        return self._kept(name, lambda: measure(self.world, variant, self.seeds))

    def pool(self, members: int) -> dict | None:
        if members == 0:
            return self._kept("pool", lambda: draw_pool(self.world, self.seeds, self.size))
        everyone = self.pool(0)
        return everyone and self._kept("pool-1", lambda: judged_by_one(self.world, self.seeds, everyone))

    def forecasts(self) -> dict | None:
        return self._kept("forecasts", lambda: forecasts(self.world, self.seeds[0]))

    def _kept(self, name: str, measured: Callable[[], dict]) -> dict | None:
        path = self.work / self.world.name / f"{name}.json"
        if not path.is_file():
            if not self.make:
                return None
            begun = time.process_time()
            write_atomically(path, json.dumps(measured()).encode())
            print(f"{self.world.name}: {name}: {time.process_time() - begun:.1f} s of CPU", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))


def summarise(cells: Cells, groups: Groups, against: Variant = REFERENCE) -> tuple[list[dict], list[str]]:
    """All rows of a task, each beside the variant `against`, and the names of those that were not measured."""
    several = len(cells.world.rewards)
    rows: list[dict] = []
    absent: list[str] = []
    pools = {
        members: cells.pool(members)
        for members in (0, 1)
        if any(v.members == members for g in groups.values() for v in g.values())
    }
    still, found = cells.of(STILL), cells.of(against)
    if pools[0] is None or still is None or found is None:
        return [], [cells.world.name]
    reference = found[str(against.rounds)]
    for members, pool in pools.items():
        rows += best_of_n_rows(pool, cells.size, members or several) if pool else []
    unmoved = row("vgf", still["1"], STILL, pools[0], several, 1)
    rows.append({**unmoved, **over_reference(still["1"], reference), "kl_budget": 0.0})
    for group, of_group in groups.items():
        for name, variant in of_group.items():
            measured, pool = cells.of(variant), pools[variant.members]
            if measured is None or pool is None:
                absent.append(f"{cells.world.name}: {group}: {name}")
                continue
            for rounds, cell in measured.items():
                said = name.partition(" / ")[0] + (f", {rounds} round{'' if rounds == '1' else 's'}" if variant.record else "")
                rows.append(row(f"{group}: {said}", cell, variant, pool, variant.members or several, int(rounds)))
                rows[-1] |= over_reference(cell, reference)
                if group == "coupling" and (alone := cells.of(of_group["none, 2 nats"])):
                    rows[-1] |= diversity(cell, alone[rounds]["gold_of_all"])
    unit = float(torch.tensor(pools[0]["gold"]).double().var(1).mean().sqrt())
    return [{"task": cells.world.name, "gold_unit": unit, **r} for r in rows], absent


def embedded_worlds(models: Path | None, quick: bool, count: int, work: Path) -> list[World]:
    """Tone and content, with the models in `models` or those that the demonstration trains."""
    if models is None:
        settings = QUICK if quick else SCALES["full"].settings
        built = build_world(ROOT / "outputs" / ("quick" if quick else "full") / "models", settings, print)
        base, rewards = built.base, built.rewards
    else:
        base = newest(models, "base")
        rewards = {name: [newest(models, f"reward-{name}-{k}") for k in range(3)] for name in reviews.GOLD}
    return [
        World(
            name, base, rewards[name], gold, partial(lambda seed, name: reviews.generate_prompts(count, seed, name), name=name),
            MAX_COMPLETION, None if name == "tone" else 0, work,
            partial(reviews.generate_prompts, FIELD_PROMPTS, FIELD_SEED, name),
        )
        for name, gold in reviews.GOLD.items()
    ]  # fmt: skip


def e2e_world(models: Path, data: Path, count: int, seeds: Sequence[int], work: Path) -> World:
    """The held-out meaning representations of benchmarks/e2e_nlg.py."""
    train, held_out = split_by_mr(load_e2e(data), seed=0, held_out=E2E_HELD_OUT)
    prompts = sorted({format_prompt(e.slots) for e in held_out})
    random.Random(0).shuffle(prompts)
    asked = [format_prompt(spoken_order(e.slots, e.reference)) for e in train]
    return World(
        "e2e", newest(models, "base"), [newest(models, f"reward-{k}") for k in range(3)], e2e_gold,
        lambda seed: prompts[count * seeds.index(seed) :][:count], E2E_LENGTH, 0, work,
        lambda: random.Random(FIELD_SEED).sample(asked, FIELD_PROMPTS),
    )  # fmt: skip


def environment() -> dict[str, dict]:
    """What a report says about where it comes from."""
    return {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", type=Path, help="models of the demonstration; default: outputs/full/models, trained if missing"
    )
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument("--prompts", default=16, type=int, help="held-out prompts per seed; at most 10 of E2E")
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    parser.add_argument("--pool", default=256, type=int, help="samples per prompt for best-of-n")
    parser.add_argument("--work", type=Path, help="where cells are kept; default: a directory of outputs/ablations")
    parser.add_argument("--publish", action="store_true", help="measure nothing more; what is absent is named in the report")
    parser.add_argument("--confirm", action="store_true", help="where to take the gradient, on prompts of other seeds")
    parser.add_argument("--field", action="store_true", help="a learned gradient field, on the prompts of --confirm")
    parser.add_argument("--quick", action="store_true", help="one task, tiny models, few prompts; writes to --work only")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.quick:
        args.prompts, args.seeds, args.pool = 2, [0], 16
    elif args.confirm or args.field:
        args.prompts, args.seeds, args.pool = CONFIRMING_PROMPTS, list(CONFIRMING_SEEDS), CONFIRMING_POOL
    other = "confirmed" if args.confirm else "field" if args.field else None
    kind = "quick" if args.quick else other or f"{args.prompts}x{len(args.seeds)}"
    work = args.work or ROOT / "outputs" / "ablations" / kind
    results, images = (work, work) if args.quick else (ROOT / "benchmarks" / "results", ROOT / "docs" / "img")

    groups: Groups = confirming() if args.confirm else with_field() if args.field else variants()
    if args.quick:
        groups = shortened(groups)
    tasks = [
        (Cells(world, args.seeds, args.pool, work, not args.publish), groups)
        for world in embedded_worlds(args.models, args.quick, args.prompts, work)
        if world.name == "content" or not args.quick
    ]
    if args.e2e_models:
        # 24 for each of four seeds are all that is held out.
        world = e2e_world(args.e2e_models, args.e2e_data, min(args.prompts, 24 if other else 10), args.seeds, work)
        some = groups if other else {group: {name: groups[group][name] for name in names} for group, names in E2E.items()}
        tasks.append((Cells(world, args.seeds, min(args.pool, 64), work, not args.publish), some))
    rows, absent = [], []
    against = groups["field"]["own, 7 x 2, 2 nats"] if args.field and not args.quick else REFERENCE
    for cells, of_task in tasks:
        found, missing = summarise(cells, of_task, against)
        rows, absent = rows + found, absent + missing
    spent = sum(cells.pool(0)["seconds"] for cells, _ in tasks if cells.pool(0))
    spent += sum({str(r["setting"]) + r["task"]: r["cpu_seconds"] for r in rows if "setting" in r}.values())
    write_report(
        results / (f"ablations_{other}.json" if other else "ablations.json"),
        {
            "rows": rows,
            "reference": asdict(against),
            "settings": {"prompts": args.prompts, "seeds": args.seeds, "pool": args.pool, "num_particles": N},
            "not_measured": absent,
            "forecasts": {cells.world.name: cells.forecasts() for cells, _ in tasks} if args.field and not args.quick else None,
            "field_seconds": {
                cells.world.name: json.loads(kept.read_text())
                for cells, _ in tasks
                if (kept := work / cells.world.name / "field" / "seconds.json").is_file()
            },
            "cpu_seconds": spent,
            **environment(),
        },
    )
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}):
        for group, plot, name in (
            ("space", plot_differences, "ablations"),
            ("rounds", plot_rounds, "ablations_rounds"),
            ("far", plot_far, "ablations_overoptimisation"),
            ("coupling", plot_coupling, "ablations_coupling"),
        ):
            if any(r["method"].startswith(f"{group}:") for r in rows):
                plot(rows, images / f"{name}.png")


if __name__ == "__main__":
    main()
