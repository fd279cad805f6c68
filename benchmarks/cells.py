"""What the benchmarks of sampling share: tasks with their models and prompts, cells that are measured once, rows, and figures."""

from __future__ import annotations

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

import numpy as np
import torch
import transformers
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
from vgf_llm.evaluation.demo import SCALES
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
from vgf_llm.evaluation.report import write_atomically
from vgf_llm.evaluation.training import comparisons, ensemble
from vgf_llm.evaluation.world import FIELD_SEED, MAX_COMPLETION, Settings, build_world
from vgf_llm.flow import TransportBudget, best_of_n, best_of_n_curve, best_of_n_kl, fidelity
from vgf_llm.text import VGFSampler
from vgf_llm.text.field import GradientField, fit_field
from vgf_llm.text.prefix import left_pad


ROOT = Path(__file__).resolve().parents[1]
N = 8
QUICK = Settings(
    texts=1_600, steps=60, judge_steps=1, trunk_pairs=240, content_pairs=200, content_edits=60, tone_pairs=260, members=2
)
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
# Prompts that had no part in the first ablations.
CONFIRMING_SEEDS, CONFIRMING_PROMPTS, CONFIRMING_POOL = (600, 601, 602, 603), 32, 64
FIELD_PROMPTS = 3_000  # that a field is fitted to


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
    layers: int = 1  # that the field has of its own, on the others of the base model; 0: all, those of a reward model


REFERENCE = Variant()
ONCE = replace(REFERENCE, rounds=1, movers=N, verify=False)
# A particle drawn and left alone.
STILL = replace(REFERENCE, steps=0, kl_budget=0.0, rounds=1)


Groups = Mapping[str, Mapping[str, Variant]]


@dataclass(frozen=True)
class World:
    """One task with its models; `prompts(seed)` are held out, and no two seeds share one. `fitted` is the gradient field that is
    kept beside the models; where there is none, or one of other `layers` is asked for, it is fitted to `seen`."""

    name: str
    base: Path
    rewards: list[Path]
    gold: Callable[[str, str], float]
    prompts: Callable[[int], list[str]]
    length: int
    horizon: int | None
    work: Path
    seen: Callable[[], list[str]]
    fitted: Path | None = None

    def field_at(self, layers: int = 1) -> Path:
        """Where the field lies, the seconds it took beside it."""
        if layers == 1 and self.fitted is not None:
            return self.fitted
        return self.work / self.name / f"field-{layers}"

    def field(self, sampler: VGFSampler, layers: int = 1) -> GradientField:
        """Fitted if it is not there."""
        kept = self.field_at(layers)
        if not kept.is_dir():
            begun, making = time.process_time(), kept.with_name("field.part")
            fitted = fit_field(
                sampler, self.seen(), layers=layers, max_completion_length=self.length, seed=FIELD_SEED,
                comparisons=comparisons(self.rewards),
            )  # fmt: skip
            fitted.save_pretrained(making)
            (making / "seconds.json").write_text(json.dumps(time.process_time() - begun))
            making.rename(kept)
        return GradientField.from_pretrained(kept)

    def sampler(self, variant: Variant) -> VGFSampler:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        reward = ensemble(self.rewards[: variant.members or None], tokenizer)
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
    texts and their mean gold; what a nat of likelihood was worth, along a field; and CPU seconds in all, on one thread: other
    programs do not count."""
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
        if sampler.field is not None:
            result[str(rounds)]["likelihood_weight"] = float(sampler.field.likelihood_weight)
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


def best_of_n_rows(pool: Mapping[str, Any], size: int, members: int, weight: float = 0.0) -> list[dict]:
    """Unbiased best-of-n for n = 1, 2, 4, ... from a pool of `size` samples per prompt. With a weight of likelihood, as along a
    gradient field, the best is that of both, and n is at least 2."""
    ns = [2**k for k in range(bool(weight), int(math.log2(size)) + 1)]
    chosen_by = torch.tensor(pool["proxy"]) - weight * torch.tensor(pool["nll_base"])
    curves = {key: best_of_n_curve(chosen_by, torch.tensor(pool[key]), ns).numpy() for key in ("gold", "proxy", "nll_base")}
    rows = []
    for i, n in enumerate(ns):
        low, high = bootstrap_ci(curves["gold"][:, i])
        rows.append(
            {
                "method": "best_of_n_likelihood" if weight else "base" if n == 1 else "best_of_n",
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
                **({"likelihood_weight": weight} if weight else {}),
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
    """Gold above best-of-n with as many generations, in as many CPU seconds, and at as many nats, rounded up, and above the best
    of as many by proxy and likelihood where these have selected; mean and interval, paired."""
    proxy, gold = torch.tensor(pool["proxy"]), torch.tensor(pool["gold"])
    size, drawn, result = proxy.shape[1], float(np.mean(cell["generations"])), {}
    rivals = {"": (drawn, proxy), "_in_equal_time": (size * cell["seconds"] / pool["seconds"], proxy)}
    if kl_nats is not None:
        rivals["_at_equal_kl"] = (equal_kl_n(kl_nats, size), proxy)
    if weight := cell.get("likelihood_weight"):
        rivals["_by_likelihood"] = (drawn, proxy - weight * torch.tensor(pool["nll_base"]))
    for key, (n, chosen_by) in rivals.items():
        n = min(max(math.ceil(n), 1), size)
        rival = best_of_n_curve(chosen_by, gold, [n])[:, 0].numpy()
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


# ---- the run


@dataclass(frozen=True)
class Cells:
    """What was measured of one task: a file each, made when it is asked for. With `make` False, None where there is none.

    Files are found by task and setting and not by model: other models need another `work`.
    """

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
            return self._kept(f"pool-{self.size}", lambda: draw_pool(self.world, self.seeds, self.size))
        everyone = self.pool(0)
        return everyone and self._kept(f"pool-{self.size}-1", lambda: judged_by_one(self.world, self.seeds, everyone))

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
    weights: dict[int, float] = {}  # of likelihood, along the first field of so many members
    for variant in [v for g in groups.values() for v in g.values() if v.gradient_at == "field"]:
        for cell in (cells.of(variant) or {}).values():
            weights.setdefault(variant.members, cell["likelihood_weight"])
    for members, pool in pools.items():
        for weight in (0.0, weights.get(members)) if pool else ():
            rows += [] if weight is None else best_of_n_rows(pool, cells.size, members or several, weight)
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
            None if models is None else newest(models, f"field-{name}-3"),
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
        "e2e", newest(models, "base"), [newest(models, f"reward-e2e-{k}") for k in range(3)], e2e_gold,
        lambda seed: prompts[count * seeds.index(seed) :][:count], E2E_LENGTH, 0, work,
        lambda: random.Random(FIELD_SEED).sample(asked, FIELD_PROMPTS),
        newest(models, "field-e2e-3"),
    )  # fmt: skip


def environment() -> dict[str, dict]:
    """What a report says about where it comes from."""
    return {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }


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


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
