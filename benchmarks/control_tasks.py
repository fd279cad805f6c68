"""VGF beside its baselines on tasks a CPU can learn: pendulum offline, pendulum offline-to-online, a generated point maze.

    python -m benchmarks.control_tasks pendulum     # table of algorithms
    python -m benchmarks.control_tasks savings      # learning curves with frozen behaviour, bfloat16 and both, five seeds
    python -m benchmarks.control_tasks online       # offline-to-online
    python -m benchmarks.control_tasks pointmaze    # OGBench's code path; needs the extra vgf_llm[control]
    python -m benchmarks.control_tasks maze_online  # offline-to-online there

Three seeds side by side (five for the savings), every VGF figure beside its L = 0 column. Writes
benchmarks/results/control_*.json and docs/img/control_*.png. One thread; some minutes each.
"""

import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from vgf_llm.control import AgentConfig, OfflineDataset, ReplayBuffer, TrainConfig, VGFAgent, evaluate, make_env, make_vector_env
from vgf_llm.control.baselines import AGENTS
from vgf_llm.control.evaluation import slots
from vgf_llm.control.pendulum import collect
from vgf_llm.control.plots import plot_budget, plot_learning, plot_particles, read_scores
from vgf_llm.control.training import UpdateLoop, cache_particles, train
from vgf_llm.flow import TransportBudget


ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "img"
SEEDS = (0, 1, 2)
STILL = TransportBudget(steps=0)
STEPS = (0, 1, 2, 3, 5, 8)
TWO = TransportBudget(steps=2, step_size=0.1, normalize="none")
SVGD = TransportBudget(steps=2, step_size=0.1, normalize="none", coupling="svgd", temperature=0.1)
PENDULUM = AgentConfig(
    hidden=(64, 64),
    batch_size=128,
    num_particles=4,
    flow_matching_steps=5,
    discount=0.97,
    learning_rate=1e-3,
    target_rate=0.01,
    train=TWO,
    test=TWO,
)
ONE = {"num_particles": 1, "train": STILL, "test": STILL}
PENDULUM_RUNS = {
    "behaviour cloning": {"algorithm": "bc", **ONE},
    "IQL": {"algorithm": "iql", "behaviour": "gaussian", **ONE},
    "FQL, alpha 0.1": {"algorithm": "fql", "distill_weight": 0.1, **ONE},
    "IFQL": {"algorithm": "ifql", "train": STILL},
    "trained at L = 0": {"train": STILL},
    "VGF": {},
    "VGF, amortised": {"amortised": True},
    "VGF, SVGD at 0.1": {"train": SVGD, "test": SVGD},
    "VGF, SVGD at 0.1, public code's repulsion": {"train": SVGD, "test": SVGD, "rule": "public"},
    "VGF, steps of one length": {
        "rule": "normalized",
        "train": TransportBudget(steps=2, step_size=0.1),
        "test": TransportBudget(steps=2, step_size=0.1),
    },
}
FIVE = (0, 1, 2, 3, 4)
# The behaviour is fitted as often as it would be in the run itself, and a third as often.
SAVING_RUNS: dict[str, dict[str, Any]] = {
    "VGF": {},
    "bfloat16": {"precision": "bf16"},
    "frozen behaviour": {"behaviour_steps": 3000},
    "frozen behaviour and bfloat16": {"behaviour_steps": 3000, "precision": "bf16"},
    "frozen behaviour after 1000 fits": {"behaviour_steps": 1000},
}


def prepared(agent: Any, data: OfflineDataset) -> ReplayBuffer:
    """The buffer of a run; with a frozen behaviour, that is fitted first and its particles are cached."""
    config = agent.config
    columns = data.n_step(config.n_step, config.discount)
    buffer = ReplayBuffer(columns, len(agent.seeds))
    if not config.behaviour_steps:
        return buffer
    assert isinstance(agent, VGFAgent)
    for _ in range(config.behaviour_steps):
        agent.update_behaviour(buffer.sample(config.batch_size, agent.noise))
    return ReplayBuffer(columns, len(agent.seeds), particles=cache_particles(agent, columns["next_obs"]))


def study(
    env_name: str,
    data: OfflineDataset,
    config: AgentConfig,
    updates: int,
    parts: int,
    steps: tuple[int, ...],
    episodes: int,
    seeds: tuple[int, ...] = SEEDS,
) -> tuple[Any, dict[str, Any]]:
    """Train in `parts`, test after each: the agent, its curve at L_test = 0 and 3, and its last scores at all budgets."""
    agent = AGENTS[config.algorithm](data.obs_dim, data.action_dim, config, seeds)
    start = time.process_time()
    loop = UpdateLoop(agent, prepared(agent, data), graph=False)
    before, seconds, curve = time.process_time() - start, 0.0, []
    for part in range(1, parts + 1):
        start = time.process_time()
        loop.run(updates // parts)
        seconds += time.process_time() - start
        tested = (0,) if config.algorithm not in ("vgf", "ifql") else steps if part == parts else (0, 3)
        found = [dataclasses.replace(config.test, steps=k) for k in tested]
        env = make_vector_env(env_name, slots(agent, len(found), episodes, 10**6), processes=False)
        result = evaluate(agent, env_name, env, found, episodes)
        env.close()
        scores = {str(k): result.scores[:, i].mean(-1).tolist() for i, k in enumerate(tested)}
        lengths = {str(k): result.lengths[:, i].mean(-1).tolist() for i, k in enumerate(tested)}
        curve.append({"updates": part * updates // parts, "scores": scores})
    ms = 1000 * seconds / updates
    return agent, {"cpu_seconds_before": before, "cpu_ms_per_update": ms, "curve": curve, "scores": scores, "lengths": lengths}


def show(name: str, row: dict[str, Any]) -> None:
    scores = {k: [round(x) for x in v] for k, v in row["scores"].items()}
    print(f"{name}: {scores}, {row['cpu_ms_per_update']:.1f} ms of CPU per update", flush=True)


def pendulum(updates: int = 1500, episodes: int = 20) -> dict[str, Any]:
    """Returns of each algorithm at each budget, and learning curves."""
    data = collect(0)
    returns = data.rewards.view(-1, 200).sum(1)
    rows: dict[str, Any] = {}
    for name, changes in PENDULUM_RUNS.items():
        config = dataclasses.replace(PENDULUM, **changes)
        agent, rows[name] = study("pendulum", data.rescaled(0.1), config, updates, 3, STEPS, episodes)
        show(name, rows[name])
        if name == "VGF":
            shown = [dataclasses.replace(TWO, steps=k) for k in (0, 1, 3, 8)]
            plot_particles(agent, torch.tensor([-0.6, 0.8, 2.0]), shown, IMAGES / "control_pendulum_particles.png")
            scores = {int(k): {updates: v} for k, v in rows[name]["scores"].items()}
            plot_budget(scores, IMAGES / "control_pendulum_budget.png", "return")
    logged = {"mean": returns.mean().item(), "random": returns[:100].mean().item(), "scripted": returns[100:].mean().item()}
    return {"updates": updates, "episodes": episodes, "logged": logged, "runs": rows}


def interval(values: list[float]) -> dict[str, float]:
    """Mean of the seeds and its 95 % interval by Student's t."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    half = t * stdev(values) / len(values) ** 0.5
    return {"mean": mean(values), "low": mean(values) - half, "high": mean(values) + half}


def savings(updates: int = 3000, episodes: int = 20) -> dict[str, Any]:
    """Pendulum: learning curves with each saving, and by seed how far they are from those without, L = 0 and 3."""
    data = collect(0).rescaled(0.1)
    rows: dict[str, Any] = {}
    for name, changes in SAVING_RUNS.items():
        config = dataclasses.replace(PENDULUM, **changes)
        _, rows[name] = study("pendulum", data, config, updates, 6, (0, 3), episodes, FIVE)
        show(name, rows[name])
    plain = rows["VGF"]["curve"]
    for name, row in rows.items():
        if name == "VGF":
            continue
        row["difference"] = {}
        for k in ("0", "3"):
            by_seed = [
                [b - a for a, b in zip(one["scores"][k], other["scores"][k], strict=True)]
                for one, other in zip(plain, row["curve"], strict=True)
            ]
            found = {str(part["updates"]): interval(d) for part, d in zip(plain, by_seed, strict=True)}
            found["mean of the curve"] = interval([mean(seed) for seed in zip(*by_seed, strict=True)])
            row["difference"][k] = found
        print(name, json.dumps(row["difference"]), flush=True)
    return {"updates": updates, "episodes": episodes, "runs": rows}


# How a batch is drawn online, beside as many updates without any new transition.
ONLINE_RUNS: dict[str, dict[str, Any]] = {
    "symmetric replay": {"online_share": 0.5},
    "offline goes on": {"online_steps": 0},
    "uniform replay": {},
}


def online_study(base: TrainConfig, ylabel: str) -> dict[str, Any]:
    """Each of `ONLINE_RUNS`: scores and returns along the way, and by seed what the last return gained on that at the switch."""
    rows: dict[str, Any] = {}
    for name, changes in ONLINE_RUNS.items():
        config = dataclasses.replace(base, **changes)
        if not config.online_steps:
            config = dataclasses.replace(config, updates=base.updates + base.online_steps)
        with tempfile.TemporaryDirectory() as folder:
            train(config, folder, say=lambda line: print(line, flush=True))
            scores, returns = (read_scores(Path(folder) / "scores.csv", column) for column in ("score", "return"))
        gains = {k: [b - a for a, b in zip(c[base.updates], c[max(c)], strict=True)] for k, c in returns.items()}
        rows[name] = {
            "scores": {str(k): {str(u): v for u, v in curve.items()} for k, curve in scores.items()},
            "returns": {str(k): {str(u): v for u, v in curve.items()} for k, curve in returns.items()},
            "gain": {str(k): {"seeds": gain, **interval(gain)} for k, gain in gains.items()},
        }
        print(name, json.dumps(rows[name]), flush=True)
        if name == "symmetric replay":
            plot_learning(returns, IMAGES / f"control_{base.env.split('-')[0]}_online.png", base.updates, ylabel)
    return {"updates": base.updates, "online_steps": base.online_steps, "episodes": base.eval_episodes, "runs": rows}


def online(updates: int = 1500, steps: int = 3000) -> dict[str, Any]:
    """Pendulum: offline, then online with exploration at L = 2."""
    return online_study(
        TrainConfig(
            env="pendulum", agent=dataclasses.replace(PENDULUM, explore=TWO, acting_critic="target"), reward_scale=0.1,
            seeds=SEEDS, updates=updates, online_steps=steps, online_start=500, eval_every=750, eval_episodes=40,
            eval_steps=(0, 2, 5), log_every=750, save_every=0, device="cpu",
        ),
        "return",
    )  # fmt: skip


def maze_online(updates: int = 5000, steps: int = 3000) -> dict[str, Any]:
    """The same in a point maze: third task of pointmaze-medium-navigate, 50 generated episodes, acting and exploring at L = 0.

    The return is minus the number of steps to the goal: it still tells agents apart that always arrive.
    """
    from vgf_llm.control.generate import generate

    warnings.filterwarnings("ignore")
    three = TransportBudget(steps=3, step_size=0.3, normalize="none")
    agent = AgentConfig(
        hidden=(64, 64), batch_size=128, num_particles=4, flow_matching_steps=5, learning_rate=1e-3, target_rate=0.05, n_step=5,
        train=three, test=STILL, acting_critic="target",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pointmaze-medium-navigate-v0.npz"
        generate("pointmaze-medium-navigate", path, episodes=50, processes=1)
        return online_study(
            TrainConfig(
                env="pointmaze-medium-navigate-singletask-task3-v0", dataset=str(path), agent=agent, reward_scale=0.1,
                seeds=SEEDS, updates=updates, online_steps=steps, online_start=500, eval_every=1000, eval_episodes=10,
                eval_steps=(0,), log_every=1000, save_every=0, device="cpu", max_envs=30, env_processes=False,
            ),
            "return: minus the steps to the goal",
        )  # fmt: skip


@torch.no_grad()
def maze_budgets(agent: Any, data: OfflineDataset, name: str, episodes: int) -> list[dict[str, Any]]:
    """Where test-time budgets lead in a maze, by budget: scores by seed, and means over seeds of

    `progress`: of the chosen action along the shortest path, at 300 states of the data (an action has at most length sqrt(2)),
    `predicted_gain`: rise of Q over the start there, `clipped`: coordinates at the border there,
    `off_data`: share of up to 300 steps of one episode for each seed farther than 0.5, an eighth of a cell, from
    every state of the data.
    """
    draw = torch.Generator().manual_seed(0)
    states = data.obs[torch.randperm(len(data), generator=draw)[:300]]
    maze = make_env(name)
    maze.reset(seed=0)
    inner = maze.unwrapped
    ways = [torch.as_tensor(inner.get_oracle_subgoal(s, inner.cur_goal_xy)[0]) - s for s in states.numpy()]
    ways = torch.nn.functional.normalize(torch.stack(ways).float(), dim=-1)
    seeds = len(agent.seeds)
    expanded = states.expand(seeds, -1, -1)
    start = agent.propose(expanded, torch.randn(seeds, 300, agent.config.num_particles, 2, generator=draw))
    before = agent.carry(expanded, start, STILL).values
    rows = []
    for steps, size in ((0, 0.2), (1, 0.02), (1, 0.05), (1, 0.2), (3, 0.02), (3, 0.05), (3, 0.2), (3, 0.3)):
        budget = TransportBudget(steps=steps, step_size=size, normalize="none")
        moved = agent.carry(expanded, start, budget)
        chosen = moved.particles[torch.arange(seeds * 300), moved.values.argmax(1)]
        env = make_vector_env(name, slots(agent, 1, episodes, 10**6), processes=False)
        result = evaluate(agent, name, env, [budget], episodes)
        env.close()
        env = make_vector_env(name, seeds, processes=False)
        obs, visited = env.reset(seed=list(range(seeds)))[0], []
        going = torch.ones(seeds, dtype=torch.bool)
        for _ in range(300):
            at = torch.as_tensor(obs, dtype=torch.float32)
            visited += [at[going]]
            obs, _, terminated, _, _ = env.step(agent.act(at[:, None], budget)[:, 0].numpy())
            going &= ~torch.from_numpy(terminated)
            if not going.all():  # a maze that has been solved waits
                obs = env.reset(seed=list(range(seeds)), options={"reset_mask": (~going).numpy()})[0]
        env.close()
        nearest = torch.cat([torch.cdist(part, data.obs).amin(1) for part in torch.cat(visited).split(200)])
        rows.append(
            {
                "steps": steps,
                "step_size": size,
                "scores": result.scores[:, 0].mean(-1).tolist(),
                "lengths": result.lengths[:, 0].mean(-1).tolist(),
                "progress": (chosen * ways.repeat(seeds, 1)).sum(-1).mean().item(),
                "predicted_gain": (moved.values - before).mean().item(),
                "clipped": (moved.particles.abs() >= 1).float().mean().item(),
                "off_data": (nearest > 0.5).float().mean().item(),
            }
        )
        print({k: v if isinstance(v, list) else round(v, 3) for k, v in rows[-1].items()}, flush=True)
    return rows


def pointmaze(updates: int = 5000, episodes: int = 10) -> dict[str, Any]:
    """Success on the third task of the medium maze, from 50 generated episodes."""
    from vgf_llm.control.generate import generate

    warnings.filterwarnings("ignore")
    name = "pointmaze-medium-navigate-singletask-task3-v0"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pointmaze-medium-navigate-v0.npz"
        manifest = generate("pointmaze-medium-navigate", path, episodes=50, processes=1)
        data = OfflineDataset.from_ogbench_npz(path, make_env(name)).rescaled(0.1)
    three = TransportBudget(steps=3, step_size=0.3, normalize="none")
    base = AgentConfig(
        hidden=(64, 64), num_particles=4, flow_matching_steps=5, learning_rate=1e-3, target_rate=0.05, n_step=5, train=three,
        test=dataclasses.replace(three, step_size=0.2),
    )  # fmt: skip
    runs = {
        "behaviour cloning": {"algorithm": "bc", **ONE},
        "IQL": {"algorithm": "iql", "behaviour": "gaussian", **ONE},
        "IFQL": {"algorithm": "ifql", "train": STILL},
        "trained at L = 0": {"train": STILL},
        "VGF": {},
    }
    rows: dict[str, Any] = {}
    for label, changes in runs.items():
        config = dataclasses.replace(base, **changes)
        agent, rows[label] = study(name, data, config, updates, 1, (0, 1, 3, 5), episodes)
        show(label, rows[label])
        if label == "VGF":
            shown = [dataclasses.replace(base.test, steps=k) for k in (0, 1, 3, 5)]
            state = torch.tensor([8.0, 20.0])  # the start's lower neighbour: the way on is to the left
            plot_particles(agent, state, shown, IMAGES / "control_pointmaze_particles.png")
            budgets = maze_budgets(agent, data, name, 5)
    return {"env": name, "updates": updates, "episodes": episodes, "data": manifest, "runs": rows, "budgets": budgets}


def main() -> None:
    parts = {"pendulum": pendulum, "savings": savings, "online": online, "pointmaze": pointmaze, "maze_online": maze_online}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    result = {
        "benchmark": f"control_{sys.argv[1]}",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seeds": list(FIVE if sys.argv[1] == "savings" else SEEDS),
        **parts[sys.argv[1]](),
    }
    target = ROOT / "benchmarks" / "results" / f"control_{sys.argv[1]}.json"
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, target)


if __name__ == "__main__":
    main()
