"""`vgf diagnose`: before anything is trained or sampled at length, is this gradient worth following?

What the reward's gradient predicts for single tokens against what the reward says of them, where it goes wrong, and what one
decode gains per nat. Rules with stated thresholds turn it into one recommendation (docs/diagnose.md).
"""

from __future__ import annotations

import copy
import itertools
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor

import vgf_llm
from vgf_llm.data.loading import load_splits
from vgf_llm.flow import TransportBudget, best_of_n_curve
from vgf_llm.text import VGFSampler
from vgf_llm.text.sampler import Prompt

from .controls import random_direction
from .fidelity import Gold, Substitutions, measure_substitutions
from .loading import load_sampler
from .metrics import bootstrap_ci, paired_bootstrap_ci
from .plots import plot_diagnosis
from .report import write_report


Report = dict[str, Any]

# Thresholds of the recommendation, from tasks whose outcome is known (docs/diagnose.md).
MIN_FIDELITY = 0.0
MIN_AGREEMENT = 0.65


@dataclass
class DiagnoseConfig:
    """What is diagnosed, and on how much. Every field is an option and a YAML key of `vgf diagnose`."""

    model_name_or_path: str = field(default="", metadata={"help": "Base language model: a directory or a hub id."})
    reward_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Reward model(s) with its vocabulary. Several are an ensemble."}
    )
    gradient_field: str | None = field(
        default=None, metadata={"help": "Folder of a learned gradient (vgf field) to be diagnosed beside the reward's own."}
    )
    dataset_name: str = field(default="", metadata={"help": "JSONL file, directory or hub id with a column prompt."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a directory or hub id."})
    hh_transcripts: bool = field(default=False, metadata={"help": "The data set holds raw transcripts of Anthropic's HH-RLHF."})
    output_dir: str = field(default="outputs/diagnosis", metadata={"help": "Where diagnose.json and diagnose.png go."})
    max_prompts: int = field(default=24, metadata={"help": "The first so many prompts that fit the context."})
    max_completion_length: int = field(default=64, metadata={"help": "T, in tokens."})
    samples: int = field(default=16, metadata={"help": "Base samples per prompt, for the spread of the reward and best-of-n."})
    num_particles: int = field(default=4, metadata={"help": "Of them moved by one decode, for the gain per nat."})
    substitutions: int = field(default=10, metadata={"help": "Tokens replaced in one sample per prompt."})
    regenerations: int = field(default=2, metadata={"help": "Times the rest of a text is written anew after each."})
    flow_steps: int = field(default=3, metadata={"help": "Flow steps L of a decode."})
    flow_step_size: float = field(default=0.5, metadata={"help": "Length of a step, in distances between two token embeddings."})
    flow_kl_budgets: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0], metadata={"help": "Budgets of one decode, nats."}
    )
    flow_batch_size: int = field(default=64, metadata={"help": "Completions in memory at once; changes no result."})
    temperature: float = field(default=1.0, metadata={"help": "Of the base model."})
    top_k: int = field(default=0, metadata={"help": "Of the base model; 0 keeps all tokens."})
    top_p: float = field(default=1.0, metadata={"help": "Of the base model; 1.0 keeps all tokens."})
    seed: int = field(default=0, metadata={"help": "Of all noise."})

    def check_complete(self) -> None:
        """Raises ValueError where something is missing. Not in `__post_init__`: an unknown key in a file is to be named first."""
        for name in ("model_name_or_path", "reward_model_name_or_path", "dataset_name"):
            if not getattr(self, name):
                raise ValueError(f"give --{name}")

    def __post_init__(self) -> None:
        lowest = {
            "max_prompts": 2, "samples": 2 * self.num_particles, "num_particles": 1, "substitutions": 2, "regenerations": 1,
            "flow_steps": 1,
        }  # fmt: skip
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.flow_kl_budgets or min(self.flow_kl_budgets) <= 0:
            raise ValueError("flow_kl_budgets must be positive, at least one")


def run_diagnose(config: DiagnoseConfig, console: Console | None = None) -> Report:
    """Load, `diagnose`, print the table and write `diagnose.json` and `diagnose.png` to `config.output_dir`.

    Raises:
        ValueError: a model, column or setting that does not work; says which.
    """
    config.check_complete()
    sampler = load_sampler(
        config.model_name_or_path, config.reward_model_name_or_path, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, flow_batch_size=config.flow_batch_size, gradient_field=config.gradient_field,
    )  # fmt: skip
    (data,) = load_splits(config.dataset_name, config.dataset_config, [config.dataset_split], ["prompt"], config.hh_transcripts)
    prompts, left_out = _fitting(sampler, data["prompt"], config.max_prompts, config.max_completion_length)
    report = diagnose(
        sampler, prompts, max_completion_length=config.max_completion_length, samples=config.samples,
        num_particles=config.num_particles, substitutions=config.substitutions, regenerations=config.regenerations,
        steps=config.flow_steps, step_size=config.flow_step_size, kl_budgets=config.flow_kl_budgets, seed=config.seed,
    )  # fmt: skip
    report |= {"prompts_left_out": left_out, "config": asdict(config)}
    print_diagnosis(report, console or Console())
    out = Path(config.output_dir)
    plot_diagnosis(report, out / "diagnose.png")
    write_report(out / "diagnose.json", report)
    return report


def diagnose(
    sampler: VGFSampler,
    prompts: Sequence[Prompt],
    gold: Gold | None = None,
    *,
    max_completion_length: int = 64,
    samples: int = 16,
    num_particles: int = 4,
    substitutions: int = 10,
    regenerations: int = 2,
    steps: int = 3,
    step_size: float = 0.5,
    kl_budgets: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    seed: int = 0,
) -> Report:
    """Measure how far the gradient of `sampler.reward` can be trusted, and the gradient field of the sampler if it has one, and
    recommend what to do with them.

    Args:
        prompts: P of them; the unit of every interval. Strings where `gold` is given.
        gold: the true reward, where it is known: adds how well the proxy's changes agree with its.
        max_completion_length: T, in tokens.
        samples: of the base model per prompt: the spread of the reward, and best-of-n up to this.
        num_particles: how many of them one decode moves.
        substitutions, regenerations: as in `measure_substitutions`.
        steps, step_size, kl_budgets: of the decodes. They move all particles once, unverified, tilted to the end; along a field
            they draw as many.
        seed: of all noise.

    Returns:
        The report of docs/diagnose.md. Intervals are 95 % bootstrap intervals over prompts.

    Raises:
        ValueError: those of `VGFSampler.sample`; the reward is the same for all samples.
    """
    started = time.perf_counter()
    pool = sampler.sample(prompts, samples, TransportBudget(steps=0), max_completion_length, seed).initial.rewards.cpu()
    sigma = float(pool.double().var(1).mean().sqrt())
    if not sigma > 0:
        raise ValueError("the reward is the same for all samples of every prompt: there is nothing to follow")
    s = measure_substitutions(
        sampler, prompts, gold, max_completion_length=max_completion_length, substitutions=substitutions,
        regenerations=regenerations, seed=seed,
    )  # fmt: skip
    report: Report = {"sigma": sigma, "substitutions": len(s.prompt), "prompts": len(prompts)}
    report["gradient_at"] = sampler.gradient_at
    report["correlation"] = None if sampler.field is None else float(sampler.field.correlation)
    report |= _fidelity(s, sampler.gradient_at)
    report["end"] = {
        "gradient_share": float(s.end_share.mean()),
        "even_share": float(s.even_share.mean()),
        "swap": float(s.end_swap.mean()) / sigma,
        "swap_elsewhere": float(s.fixed.abs().mean()) / sigma,
    }
    report["gain"] = _gains(
        sampler, prompts, pool, sigma, num_particles, steps, step_size, kl_budgets, max_completion_length, seed
    )
    report["recommendation"] = recommend(report)
    return report | {
        "seconds": time.perf_counter() - started,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": str(sampler.model.device)},
        "versions": {
            "python": platform.python_version(), "vgf_llm": vgf_llm.__version__,
            "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip


def recommend(report: Report) -> Report:
    """A gradient field, flow (one round), flow with rounds, or best-of-n, by the rules of docs/diagnose.md in their order.

    Returns:
        `choice`: "field", "flow", "rounds" or "best_of_n"; `sentence`; `reasons`, one per rule that was asked.
    """
    along = [g for g in report["gain"] if g["direction"] == "field"]
    learned = []
    if along:
        best = max(along, key=lambda g: float(g["over_best_of_n_low"]))
        learned = [f"particles drawn along the field at {best['kl_budget']:g} nats earn {_over(best)}"]
        if best["over_best_of_n_low"] > 0:
            return _said("field", learned, TransportBudget.auto(correlation=report["correlation"]).kl_budget)
    at = report["gradient_at"]
    row = next(r for r in report["fidelity"] if r["suffix"] == "regenerated" and r["at"] == at)
    faithful = row["value"] is not None and row["low"] > MIN_FIDELITY
    seen = f"{_interval(row)} ({'above' if faithful else 'not surely above'} {MIN_FIDELITY:g})"
    reasons = [*learned, f"the gradient's forecast of what a token is worth, the rest written anew, has rank correlation {seen}"]
    gains = [g for g in report["gain"] if g["direction"] == "gradient"]
    best = max(gains, key=lambda g: float(g["over_best_of_n_low"]))
    pays = best["over_best_of_n_low"] > 0
    earned = f"one decode of all particles at {best['kl_budget']:g} nats earns {_over(best)}"
    # A few hundred substitutions leave a forecast in doubt that whole decodes may settle.
    if not faithful and not pays:
        return _said("best_of_n", [*reasons[:-1], f"{reasons[-1]}, and {earned}"])
    members = report["members"]
    if members is None:
        reasons.append("one reward model: whether it is right about edits cannot be seen from here")
    else:
        agreement = members["regenerated"]
        agree = agreement["value"] is not None and agreement["value"] >= MIN_AGREEMENT
        reasons.append(
            f"the {members['count']} reward models agree about edits with rank correlation {_interval(agreement)} "
            f"({'at least' if agree else 'below'} {MIN_AGREEMENT:g})"
        )
        if not agree:
            return _said("best_of_n", reasons)
    reasons.append(earned)
    return _said("flow" if pays else "rounds", reasons, best["kl_budget"])


def _over(gain: Report) -> str:
    value, low, high = (gain[f"over_best_of_n{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] standard deviations more than best-of-n of as many completions"


_SENTENCES = {
    "field": "Draw along the gradient field, at {budget:.2g} nats, which its correlation says",
    "flow": "Use flow with one round, tilted to the end, at {budget:g} nats",
    "rounds": "Use flow with rounds: edits one at a time, each verified",
    "best_of_n": "Use best-of-n",
}


def _said(choice: str, reasons: list[str], budget: float = 0.0) -> Report:
    return {"choice": choice, "sentence": _SENTENCES[choice].format(budget=budget) + ": " + reasons[-1] + ".", "reasons": reasons}


def _fidelity(s: Substitutions, at: str) -> Report:
    changes = {"fixed": s.fixed, "regenerated": s.regenerated}
    report: Report = {
        "fidelity": [
            {"suffix": suffix, "at": name, **correlation(predicted, change, s.prompt), "r2": _r2(predicted, change, s.prompt)}
            for suffix, change in changes.items()
            for name, predicted in s.predicted.items()
        ]
    }
    cuts = torch.quantile(s.entropy, torch.tensor([1 / 3, 2 / 3]))
    report["entropy_terciles"] = cuts.tolist()
    for name, part in (("by_position", s.third), ("by_entropy", torch.bucketize(s.entropy, cuts))):
        report[name] = {
            suffix: [
                correlation(s.predicted[at][part == k], change[part == k], s.prompt[part == k])
                | {"count": int((part == k).sum())}
                for k in range(3)
            ]
            for suffix, change in changes.items()
        }
    report["members"] = None
    if len(s.members_fixed):
        pairs = list(itertools.combinations(range(len(s.members_fixed)), 2))
        report["members"] = {
            "count": len(s.members_fixed),
            **{
                suffix: correlation(scores[[a for a, _ in pairs]], scores[[b for _, b in pairs]], s.prompt)
                for suffix, scores in (("fixed", s.members_fixed), ("regenerated", s.members_regenerated))
            },
        }
    report["gold"] = None
    if len(s.gold_fixed):
        golds = {"fixed": s.gold_fixed, "regenerated": s.gold_regenerated}
        report["gold"] = {
            suffix: {
                "proxy": correlation(changes[suffix], change, s.prompt),
                "gradient": correlation(s.predicted[at], change, s.prompt),
            }
            for suffix, change in golds.items()
        }
    return report


def _gains(
    sampler: VGFSampler,
    prompts: Sequence[Prompt],
    pool: Tensor,
    sigma: float,
    n: int,
    steps: int,
    step_size: float,
    kl_budgets: Sequence[float],
    length: int,
    seed: int,
) -> list[Report]:
    """What one decode gains, in standard deviations of the reward: every budget, and a random direction at one of them; what
    particles gain that are drawn along a field, at every budget."""
    own = copy.copy(sampler)
    own.movers, own.horizon, own.field = None, None, None
    middle = kl_budgets[len(kl_budgets) // 2]
    plan = [*(("gradient", b) for b in kl_budgets), ("random", middle)]
    if sampler.field is not None:
        plan += [("field", b) for b in kl_budgets]
    # The noise of a particle depends on its number: these are the ones that are moved, or that would have been drawn.
    before = pool[:, :n]
    rows = []
    for name, kl_budget in plan:
        budget = TransportBudget(steps=steps, step_size=step_size, kl_budget=kl_budget)
        out = (sampler if name == "field" else own).sample(
            prompts, n, budget, length, seed, verify=False, direction=random_direction if name == "random" else None
        )
        after = out.transported.rewards.cpu()
        gain = (after - before).mean(1).double().numpy() / sigma
        # The chain rule: the KL of the whole text is the mean of what was spent on the way.
        spent = float(out.transported.kl.mean())
        # A field leaves no initial particles to choose from.
        candidates = after if name == "field" else torch.cat([before, after], 1)
        best = candidates.amax(1).double().numpy() / sigma
        generations = float(out.generations.mean())
        equal = min(math.ceil(generations), pool.shape[1])
        baseline = best_of_n_curve(pool, pool, [equal])[:, 0].numpy() / sigma
        low, high = bootstrap_ci(gain)
        over_low, over_high = paired_bootstrap_ci(best, baseline)
        rows.append(
            {
                "direction": name,
                "kl_budget": float(kl_budget), "kl": spent, "gain": float(gain.mean()), "gain_low": low, "gain_high": high,
                "ideal": math.sqrt(2 * spent), "generations": generations, "best_of_n_equal": equal,
                "over_best_of_n": float((best - baseline).mean()), "over_best_of_n_low": over_low,
                "over_best_of_n_high": over_high,
            }
        )  # fmt: skip
    return rows


def correlation(x: Tensor, y: Tensor, prompt: Tensor, resamples: int = 1000) -> dict[str, float | None]:
    """Spearman rank correlation of x and y [S] or, as the mean over K pairs, [K, S], with its interval over prompts.

    Ranks are those of the whole sample, also in a resample of its prompts. None where all ranks of a side are equal or there is
    nothing to rank.
    """
    if x.shape[-1] < 3:
        return {"value": None, "low": None, "high": None}
    left, right = (rankdata(side.reshape(-1, side.shape[-1]).numpy(), axis=1) for side in (x, y))
    return _pearson(left, right, prompt, resamples)


def _r2(x: Tensor, y: Tensor, prompt: Tensor) -> dict[str, float | None]:
    """Share of the variance of y that a multiple of x explains, with its interval over prompts; as for `correlation`."""
    return _pearson(x[None].double().numpy(), y[None].double().numpy(), prompt, 1000, squared=True)


def _pearson(x: np.ndarray, y: np.ndarray, prompt: Tensor, resamples: int, squared: bool = False) -> dict[str, float | None]:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    _, group = np.unique(prompt.numpy(), return_inverse=True)
    member = np.eye(group.max() + 1)[group]  # [S, P]
    sums = np.stack([t @ member for t in (np.ones_like(x), x, y, x * x, y * y, x * y)])  # [6, K, P]
    drawn = np.random.default_rng(0).multinomial(sums.shape[2], np.full(sums.shape[2], 1 / sums.shape[2]), size=resamples)
    whole = np.ones((1, sums.shape[2]))

    def of(weights: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = np.einsum("akp,rp->akr", sums, weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = (n * sxy - sx * sy) / np.sqrt((n * sxx - sx * sx) * (n * syy - sy * sy))
        return np.asarray((r * r if squared else r).mean(0))

    value, several = of(whole)[0], of(drawn)
    several = several[np.isfinite(several)]
    if not np.isfinite(value) or not len(several):
        return {"value": None, "low": None, "high": None}
    low, high = np.quantile(several, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _fitting(sampler: VGFSampler, prompts: Sequence[Prompt], count: int, length: int) -> tuple[list[Prompt], int]:
    """The first `count` prompts that the sampler can read, and how many before them it cannot."""
    fitting: list[Prompt] = []
    left_out, reason = 0, ""
    for prompt in prompts:
        try:
            sampler.encode([prompt], length)
        except ValueError as error:  # too long, or empty
            left_out, reason = left_out + 1, str(error)
            continue
        fitting.append(prompt)
        if len(fitting) == count:
            break
    if len(fitting) < 2:
        raise ValueError(f"fewer than two prompts can be used: {reason or 'the data set has only one'}")
    return fitting, left_out


def _interval(row: Report) -> str:
    return "-" if row["value"] is None else f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def print_diagnosis(report: Report, console: Console) -> None:
    """The report as tables, and the recommendation with its reasons."""
    suffixes = ("fixed", "regenerated")
    table = Table(title="Forecast of single substitutions: rank correlation [95 %]", box=None, padding=(0, 2, 0, 0))
    for header in ("", "rest kept", "rest written anew", "R² kept", "R² anew"):
        table.add_column(header, justify="left" if not header else "right")
    by = {(row["suffix"], row["at"]): row for row in report["fidelity"]}
    for at in dict.fromkeys(row["at"] for row in report["fidelity"]):
        name = {"random": "random direction", "field": "gradient field"}.get(at, f"gradient at {at}")
        rows = [by[suffix, at] for suffix in suffixes]
        shares = ["-" if row["r2"]["value"] is None else f"{row['r2']['value']:.2f}" for row in rows]
        table.add_row(name, *map(_interval, rows), *shares)
    for key, names in (
        ("by_position", ("first third", "middle third", "last third")),
        ("by_entropy", ("low entropy", "middle entropy", "high entropy")),
    ):
        for k, name in enumerate(names):
            table.add_row(name, *(_interval(report[key][suffix][k]) for suffix in suffixes), "", "")
    if report["members"] is not None:
        table.add_row(
            f"{report['members']['count']} reward models agree",
            *(_interval(report["members"][suffix]) for suffix in suffixes),
            "",
            "",
        )
    if report["gold"] is not None:
        table.add_row("proxy and gold agree", *(_interval(report["gold"][suffix]["proxy"]) for suffix in suffixes), "", "")
    console.print(table)
    if report["correlation"] is not None:
        console.print(f"The field agrees with the reward, on prompts held out of its fit, by {report['correlation']:.2f}.\n")
    table = Table(title="One decode, in standard deviations of the reward", box=None, padding=(0, 2, 0, 0))
    for header in ("budget, nats", "spent", "direction", "gain [95 %]", "ideal", "over best-of-n [95 %]", "generations"):
        table.add_column(header, justify="right")
    for g in report["gain"]:
        table.add_row(
            f"{g['kl_budget']:g}", f"{g['kl']:.2f}", g["direction"],
            f"{g['gain']:.2f} \\[{g['gain_low']:.2f}, {g['gain_high']:.2f}]", f"{g['ideal']:.2f}",
            f"{g['over_best_of_n']:+.2f} \\[{g['over_best_of_n_low']:+.2f}, {g['over_best_of_n_high']:+.2f}]",
            f"{g['generations']:.1f}",
        )  # fmt: skip
    console.print(table)
    end = report["end"]
    console.print(
        f"End of text: {end['gradient_share']:.0%} of the gradient's norm on the last token (evenly: {end['even_share']:.0%}); "
        f"another last word moves the reward by {end['swap']:.2f} standard deviations, another word elsewhere by "
        f"{end['swap_elsewhere']:.2f}."
    )
    console.print(f"\n[bold]{report['recommendation']['sentence']}[/bold]", highlight=False)
