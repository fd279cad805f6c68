"""The inverted U: one state, two-dimensional actions, true reward and learned value against the transport budget.

    python -m benchmarks.bandit

Logged actions come from two clusters; the true reward peaks just outside of them. Two critics are fitted to the logged
rewards and a flow-matching model to the logged actions. Particles drawn from that model are carried L steps along the
critics' gradient and the best of them by learned value is taken. A few steps leave the data and find the peak, which
best-of-N cannot; many steps climb on where the critics are wrong. The arrangement follows Figure 2 of arXiv
2604.14265. True rewards of 50 draws choose the number of steps by the rule of `tune_budget`, which is judged on the others.

Writes benchmarks/results/bandit.json and docs/img/bandit.png. About 15 seconds on one CPU core.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vgf_llm.evaluation.tune import Candidates, choose_budget
from vgf_llm.flow import TransportBudget, Transported, best_of_n, gradient_of, spread, transport


ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
STEPS = (0, 1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 40)
STATES = 200  # independent draws of N particles that every figure is averaged over
LABELLED = 50  # of them, with which a budget is chosen
PARTICLES = 10
# One step is as long as the authors' sign step of 0.05 per coordinate: 0.05 * sqrt(2).
STEP_SIZE = 0.07


def true_reward(actions: Tensor) -> Tensor:
    """Two bumps of width 0.25, height 1 at (0.55, 0.55) and 0.8 at (-0.55, 0.45). [..., 2] -> [...]."""
    peaks = actions.new_tensor([[0.55, 0.55], [-0.55, 0.45]])
    heights = actions.new_tensor([1.0, 0.8])
    sq_distances = (actions.unsqueeze(-2) - peaks).square().sum(-1)
    return (heights * torch.exp(-sq_distances / (2 * 0.25**2))).amax(-1)


def logged_data(generator: torch.Generator, count: int = 2000) -> tuple[Tensor, Tensor]:
    """Actions [count, 2] from two clusters of standard deviation 0.12 and their rewards [count] with noise 0.05."""
    centres = torch.tensor([[0.25, 0.20], [-0.30, 0.10]])
    which = torch.randint(2, (count,), generator=generator)
    actions = (centres[which] + 0.12 * torch.randn(count, 2, generator=generator)).clamp(-1, 1)
    return actions, true_reward(actions) + 0.05 * torch.randn(count, generator=generator)


def critic() -> nn.Module:
    """Value of an action; LayerNorm before each ReLU, as in the authors' critics."""
    return nn.Sequential(
        nn.Linear(2, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 1)
    )


def behaviour() -> nn.Module:
    """Velocity of the flow-matching model at (action, time)."""
    return nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def fit(critics: nn.ModuleList, velocity: nn.Module, actions: Tensor, rewards: Tensor, generator: torch.Generator) -> None:
    """1500 Adam steps on the critics' squared error and the linear-path flow-matching error."""
    optimizer = torch.optim.Adam([*critics.parameters(), *velocity.parameters()], lr=1e-3, fused=True)
    for _ in range(1500):
        rows = torch.randint(len(actions), (128,), generator=generator)
        a, r = actions[rows], rewards[rows]
        noise, time = torch.randn(a.shape, generator=generator), torch.rand(len(a), 1, generator=generator)
        flowed = velocity(torch.cat([(1 - time) * noise + time * a, time], dim=1))
        loss = (flowed - (a - noise)).square().mean()
        loss = loss + torch.stack([(q(a).squeeze(1) - r).square().mean() for q in critics]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sample(velocity: nn.Module, shape: tuple[int, int], generator: torch.Generator, steps: int = 10) -> Tensor:
    """Actions [*shape, 2] from the behaviour model by Euler integration."""
    a = torch.randn(*shape, 2, generator=generator)
    for i in range(steps):
        a = a + velocity(torch.cat([a, torch.full((*shape, 1), i / steps)], dim=-1)) / steps
    return a.clamp(-1, 1)


def run(seed: int) -> dict[str, Any]:
    """Fit on one data set and measure every budget on the same particles.

    Returns:
        `behaviour`: mean true reward of the behaviour model. `best_of_10`, `best_of_200`: true reward of best-of-n by
        learned value. `curve`: for each number of steps, `true` and `learned` value of the selected particle,
        `learned_all` and `spread` over all particles. `spread_by_temperature`: spread after five coupled steps. `tuned`: the
        budget that labels choose (`tuned`).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    critics, velocity = nn.ModuleList([critic(), critic()]), behaviour()
    actions, rewards = logged_data(generator)
    fit(critics, velocity, actions, rewards, generator)

    def value(a: Tensor) -> Tensor:
        return torch.stack([q(a).squeeze(-1) for q in critics]).mean(0)

    def flow(particles: Tensor, budget: TransportBudget) -> tuple[Transported, Tensor]:
        moved = transport(particles, gradient_of(value), budget, project=lambda a: a.clamp(-1, 1), value_fn=value)
        assert moved.values is not None
        return moved, moved.values

    def selected(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index[:, None]).squeeze(1)

    particles = sample(velocity, (STATES, PARTICLES), generator)
    curve, gold = [], {}
    for steps in STEPS:
        budget = TransportBudget(steps=steps, step_size=STEP_SIZE)
        moved, values = flow(particles, budget)
        best = best_of_n(values)
        gold[budget] = selected(true_reward(moved.particles), best)
        curve.append(
            {
                "steps": steps,
                "true": gold[budget].mean().item(),
                "learned": selected(values, best).mean().item(),
                "learned_all": values.mean().item(),
                "spread": spread(moved.particles).mean().item(),
            }
        )
    with torch.no_grad():
        pool = sample(velocity, (STATES, 200), generator)
        best_of_10 = selected(true_reward(particles), best_of_n(value(particles))).mean().item()
        best_of_200 = selected(true_reward(pool), best_of_n(value(pool)))
    spreads = {}
    for temperature in (0.05, 1.0):
        # step_size multiplies score / temperature; with this factor the drive is as long as above at both
        # temperatures.
        coupled = TransportBudget(step_size=STEP_SIZE * temperature, temperature=temperature, coupling="svgd")
        spreads[str(temperature)] = spread(flow(particles, coupled)[0].particles).mean().item()
    return {
        "seed": seed,
        "behaviour": true_reward(particles).mean().item(),
        "best_of_10": best_of_10,
        "best_of_200": best_of_200.mean().item(),
        "tuned": tuned({budget: g.numpy() for budget, g in gold.items()}, best_of_200.numpy()),
        "curve": curve,
        "spread_by_temperature": spreads,
    }


def tuned(gold: dict[TransportBudget, np.ndarray], best_of_200: np.ndarray) -> dict[str, float]:
    """What labels of the first draws choose from L = 0, the default number of steps and the others, and what that earns on the
    other draws, beside the best there. Best-of-200 may be chosen too."""
    standard = TransportBudget(step_size=STEP_SIZE)
    budgets = sorted(gold, key=lambda budget: (not budget.is_zero, budget != standard))
    labels, elsewhere = (np.array([gold[b][part] for b in budgets]) for part in (slice(LABELLED), slice(LABELLED, None)))
    count = len(budgets)
    rival = np.tile(best_of_200[:LABELLED], (count, 1))
    choice = choose_budget(
        Candidates(budgets, [PARTICLES] * count, labels, np.full(count, float(PARTICLES)), [200] * count, rival)
    )
    earned = best_of_200[LABELLED:].mean() if choice.is_best_of_n else elsewhere[budgets.index(choice.budget)].mean()
    best = max(elsewhere.mean(1).max(), best_of_200[LABELLED:].mean())
    return {
        "steps": choice.budget.steps, "num_particles": choice.num_particles, "true_elsewhere": float(earned),
        "best_elsewhere": float(best), "share_of_best": float(earned / best),
        "standard_share_of_best": float(elsewhere[budgets.index(standard)].mean() / best),
    }  # fmt: skip


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Mean over seeds with the range of the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, label, colour in (("learned", "learned value", "#c44e52"), ("true", "true reward", "#2a6f97")):
        seeds = torch.tensor([[point[key] for point in run["curve"]] for run in runs])
        ax.fill_between(STEPS, seeds.amin(0), seeds.amax(0), color=colour, alpha=0.2, linewidth=0)
        ax.plot(STEPS, seeds.mean(0), color=colour, marker="o", markersize=4)
        ax.annotate(label, (STEPS[-1], seeds[:, -1].mean()), (-4, 9), "data", "offset points", color=colour, ha="right")
    best_of_200 = sum(run["best_of_200"] for run in runs) / len(runs)
    ax.axhline(best_of_200, color="#555555", linestyle="--", linewidth=1)
    ax.annotate(
        "true reward of best-of-200",
        (STEPS[-1], best_of_200),
        (-4, 4),
        "data",
        "offset points",
        color="#555555",
        ha="right",
    )
    ax.annotate(
        f"L = 0: best-of-{PARTICLES}",
        (0, sum(run["best_of_10"] for run in runs) / len(runs)),
        (12, -12),
        "data",
        "offset points",
        color="#555555",
        va="center",
        arrowprops={"arrowstyle": "-", "color": "#999999"},
    )
    ax.set(
        xlabel=f"transport budget: steps L of length {STEP_SIZE}",
        ylabel="reward of the selected action",
        xlim=(-1, 41),
        ylim=(0, None),
    )
    ax.set_title("A few steps leave the data and find the peak; many follow the critics' errors", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    torch.set_num_threads(1)  # so that the figures do not depend on the number of cores
    runs = [run(seed) for seed in SEEDS]
    result = {
        "benchmark": "bandit",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seeds": list(SEEDS),
        "states": STATES,
        "particles": PARTICLES,
        "step_size": STEP_SIZE,
        "runs": runs,
    }
    target = ROOT / "benchmarks" / "results" / "bandit.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, target)
    plot(runs, ROOT / "docs" / "img" / "bandit.png")
    for r in runs:
        print(
            f"seed {r['seed']}: behaviour {r['behaviour']:.2f}, best-of-200 {r['best_of_200']:.2f}, "
            + ", ".join(f"L={p['steps']} {p['true']:.2f} (learned {p['learned']:.2f})" for p in r["curve"])
            + f"; {LABELLED} labels choose L={r['tuned']['steps']}, {r['tuned']['share_of_best']:.2f} of the best elsewhere"
        )


if __name__ == "__main__":
    main()
