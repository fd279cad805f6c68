"""Figures of a run: learning curves, score against the budget, particles before and after."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgf_llm.flow import TransportBudget

from .agent import Agent, aggregate


COLOURS = ("#8d99ae", "#8ab6d6", "#2a6f97", "#013a63", "#e09f3e", "#c44e52", "#6a4c93", "#1b998b")

# Rings around dots: where nothing moved both are seen.
BEFORE: dict[str, Any] = {
    "s": 26,
    "facecolors": "none",
    "edgecolors": "#013a63",
    "linewidths": 0.9,
    "label": "before",
    "zorder": 3,
}
AFTER: dict[str, Any] = {"s": 10, "color": "#c44e52", "linewidths": 0, "label": "after", "zorder": 4}


def read_scores(path: str | Path, column: str = "score") -> dict[int, dict[int, list[float]]]:
    """`scores[L_test][updates]`: the scores of the seeds, from `scores.csv`; or another of its columns, such as "return".

    Raises:
        OSError, ValueError: the file is missing, or has no scores.
    """
    scores: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with Path(path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            scores[int(row["test_steps"])][int(row["updates"])].append(float(row[column]))
    if not scores:
        raise ValueError(f"{path} holds no scores yet")
    return {steps: dict(curve) for steps, curve in sorted(scores.items())}


def plot_run(run: str | Path, switch: int | None = None, ylabel: str = "score") -> list[Path]:
    """`learning.png` and `budget.png` of an output directory of `train`.

    Args:
        run: the directory.
        switch: number of updates at which the run went online, to be marked.
        ylabel: what the score is.

    Returns:
        the paths of the figures.
    """
    run = Path(run)
    scores = read_scores(run / "scores.csv")
    return [plot_learning(scores, run / "learning.png", switch, ylabel), plot_budget(scores, run / "budget.png", ylabel)]


def plot_learning(scores: dict[int, dict[int, list[float]]], path: Path, switch: int | None, ylabel: str) -> Path:
    """Score against updates, a line per L_test, the range of the seeds as a band."""
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (steps, curve), colour in zip(scores.items(), COLOURS * len(scores), strict=False):
        updates = sorted(curve)
        seeds = [np.asarray(curve[u]) for u in updates]
        ax.fill_between(updates, [s.min() for s in seeds], [s.max() for s in seeds], color=colour, alpha=0.15, linewidth=0)
        label = "L = 0 (best-of-N)" if steps == 0 else f"L = {steps}"
        ax.plot(updates, [s.mean() for s in seeds], color=colour, marker="o", markersize=3, label=label)
    if switch is not None:
        ax.axvline(switch, color="#555555", linestyle="--", linewidth=1)
        ax.annotate("online", (switch, ax.get_ylim()[0]), (4, 6), "data", "offset points", color="#555555")
    ax.set(xlabel="updates", ylabel=ylabel)
    ax.legend(title="test budget", frameon=False, fontsize=9)
    return _finish(fig, ax, path)


def plot_budget(scores: dict[int, dict[int, list[float]]], path: Path, ylabel: str) -> Path:
    """Last score against L_test: mean of the seeds, and each of them."""
    plt = _pyplot()
    fig, ax = plt.subplots(figsize=(5, 3.8), layout="constrained")
    last = {steps: curve[max(curve)] for steps, curve in scores.items()}
    ax.plot(list(last), [np.mean(s) for s in last.values()], color="#2a6f97", marker="o")
    for steps, seeds in last.items():
        ax.scatter([steps] * len(seeds), seeds, color="#2a6f97", alpha=0.35, s=14, linewidths=0)
    ax.set(xlabel="transport steps at test time, L (0: best-of-N)", ylabel=ylabel, xticks=list(last))
    return _finish(fig, ax, path)


@torch.no_grad()
def plot_particles(
    agent: Agent,
    obs: Tensor,
    budgets: Sequence[TransportBudget],
    path: str | Path,
    dims: tuple[int, int] = (0, 1),
    titles: Sequence[str] | None = None,
) -> Path:
    """Particles before and after transport at one state, on two action dimensions, over the critic's value.

    The value is shown on the plane through the mean of the start; with more dimensions than two, particles lie off it. With
    one action dimension, its value is drawn as a curve instead.

    Args:
        agent: with a critic; the first seed is shown.
        obs: [obs_dim].
        budgets: a panel each.
        path: of the figure.
        dims: the two dimensions of the plane.
        titles: of the panels; default: the number of steps.
    """
    plt = _pyplot()
    critic = agent.acting_critic
    assert critic is not None
    S, D = len(agent.seeds), agent.action_dim
    states = obs.to(agent.device).expand(S, 1, -1)
    noise = torch.randn(S, 1, 40, D, generator=torch.Generator().manual_seed(0)).to(agent.device)
    start = agent.propose(states, noise)
    context = critic.context(states)
    line = torch.linspace(-1, 1, 61, device=agent.device)
    fig, axes = plt.subplots(1, len(budgets), figsize=(3.3 * len(budgets), 3.5), layout="constrained", sharey=True)
    for ax, budget, title in zip(np.atleast_1d(axes), budgets, titles or [f"L = {b.steps}" for b in budgets], strict=True):
        moved = agent.carry(states, start, budget).particles[0].cpu()
        before = start[0, 0].cpu()
        if D == 1:
            values = aggregate(critic(context, line[None, None, :, None].expand(S, 1, -1, 1)), "mean")[0, 0].cpu()
            ax.plot(line.cpu(), values, color="#8d99ae")
            for points, style in ((before, BEFORE), (moved, AFTER)):
                at = aggregate(critic(context, points.to(agent.device).expand(S, 1, -1, 1)), "mean")[0, 0].cpu()
                ax.scatter(points[:, 0], at, **style)
            ax.set(xlabel="action", title=title)
        else:
            plane = start[0, 0].mean(0).expand(61 * 61, D).clone()
            plane[:, dims[0]], plane[:, dims[1]] = line.repeat(61), line.repeat_interleave(61)
            values = aggregate(critic(context, plane.expand(S, 1, -1, D)), "mean")[0, 0].cpu().view(61, 61)
            ax.contourf(line.cpu(), line.cpu(), values, levels=20, cmap="Greys", alpha=0.6)
            ax.plot(*np.stack([before[:, dims].T, moved[:, dims].T], axis=1), color="#c44e52", alpha=0.4, linewidth=0.8)
            for points, style in ((before, BEFORE), (moved, AFTER)):
                ax.scatter(points[:, dims[0]], points[:, dims[1]], clip_on=False, **style)
            ax.set(xlabel=f"action[{dims[0]}]", title=title, aspect="equal")
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("Q(s, a)" if D == 1 else f"action[{dims[1]}]")
    fig.legend(*first.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9, frameon=False)
    return _finish(fig, first, Path(path))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _finish(fig: Any, ax: Any, path: Path) -> Path:
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    _pyplot().close(fig)
    return path
