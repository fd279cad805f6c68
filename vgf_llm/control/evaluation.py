"""Playing episodes: several transport budgets in one pass, on the same resets and from the same particles."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vgf_llm.flow import TransportBudget, displacement, mmd2, spread

from .agent import Agent
from .environments import VectorEnv, make_env, score


NOISE_CHUNK = 100  # steps for which an episode draws its noise at once


@dataclass(frozen=True)
class Evaluation:
    """Results for S seeds, L budgets, E episodes. Episode e starts from the same reset and draws the same noise throughout.

    Attributes:
        returns: [S, L, E] sum of rewards.
        successes: [S, L, E] whether the last step was a success, nan where the environment does not say.
        lengths: [S, L, E] steps.
        scores: [S, L, E], see `environments.score`.
    """

    returns: NDArray[np.float64]
    successes: NDArray[np.float64]
    lengths: NDArray[np.int64]
    scores: NDArray[np.float64]


def slots(agent: Agent, budgets: int, episodes: int, at_most: int | None = None) -> int:
    """How many environments an evaluation of this size asks for: a multiple of S * L, and `at_most` so many if it can be.

    `at_most` defaults to two per core of this machine.
    """
    groups = len(agent.seeds) * budgets
    limit = 2 * (os.cpu_count() or 1) if at_most is None else at_most
    return groups * max(1, min(episodes, limit // groups))


def evaluate(
    agent: Agent, name: str, env: VectorEnv, budgets: Sequence[TransportBudget], episodes: int, seed: int = 0
) -> Evaluation:
    """Play `episodes` episodes for every seed of the agent and every budget.

    The result does not depend on the number of environments, up to the rounding of batched products.

    Args:
        agent: acts with `agent.act`.
        name: of the environment, for the score.
        env: S * L * k environments (`slots`); each plays every k-th episode.
        budgets: L of them; `TransportBudget(steps=0)` is best-of-N.
        episodes: E.
        seed: episode e is reset with `seed + e`.

    Raises:
        ValueError: the number of environments does not fit.
    """
    S, L = len(agent.seeds), len(budgets)
    per_group, rest = divmod(env.num_envs, S * L)
    if not L or rest or not per_group:
        raise ValueError(f"{env.num_envs} environments cannot be shared by {S} seeds and {L} budgets")
    N, D = agent.config.num_particles, agent.action_dim
    shape = (S, L, per_group)
    episode = np.broadcast_to(np.arange(per_group), shape).copy()
    returns, successes = np.zeros((S, L, episodes)), np.full((S, L, episodes), np.nan)
    lengths = np.zeros((S, L, episodes), dtype=np.int64)
    elapsed, collected = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    noise = _EpisodeNoise(seed, N, D)
    group = np.indices(shape)
    obs, _ = env.reset(seed=(seed + episode).reshape(-1).tolist())
    while (active := episode < episodes).any():
        states = torch.as_tensor(obs, dtype=torch.float32).reshape(*shape, -1)
        draws = noise.at(episode, elapsed)
        actions = torch.stack(
            [agent.act(states[:, i], budget, noise=draws[:, i]).cpu() for i, budget in enumerate(budgets)], dim=1
        )
        obs, rewards, terminated, truncated, info = env.step(actions.flatten(0, 2).numpy())
        collected += rewards.reshape(shape)
        elapsed += 1
        done = (terminated | truncated).reshape(shape)
        if done.any():
            s, i, _ = (index[done & active] for index in group)
            e = episode[done & active]
            returns[s, i, e] = collected[done & active]
            lengths[s, i, e] = elapsed[done & active]
            if "success" in info:
                successes[s, i, e] = np.asarray(info["success"], dtype=float).reshape(shape)[done & active]
            episode[done] += per_group
            elapsed[done], collected[done] = 0, 0.0
            seeds = (seed + episode).reshape(-1).tolist()
            obs, _ = env.reset(seed=seeds, options={"reset_mask": done.reshape(-1)})
            obs = np.array(obs)
    return Evaluation(returns, successes, lengths, score(name, returns, successes))


class _EpisodeNoise:
    """Standard normal noise [N, D] of step t of episode e: the same for every seed, budget and number of environments."""

    def __init__(self, seed: int, particles: int, action_dim: int) -> None:
        self.seed, self.shape = seed, (NOISE_CHUNK, particles, action_dim)
        self.chunks: dict[tuple[int, int], Tensor] = {}

    def at(self, episode: NDArray[Any], step: NDArray[Any]) -> Tensor:
        keys = [(e, t // NOISE_CHUNK) for e, t in zip(episode.reshape(-1).tolist(), step.reshape(-1).tolist(), strict=True)]
        self.chunks = {key: self.chunks[key] if key in self.chunks else self._draw(*key) for key in set(keys)}
        rows = [self.chunks[key][t % NOISE_CHUNK] for key, t in zip(keys, step.reshape(-1).tolist(), strict=True)]
        return torch.stack(rows).reshape(*episode.shape, *self.shape[1:])

    def _draw(self, episode: int, chunk: int) -> Tensor:
        mixed = int(np.random.SeedSequence([self.seed, episode, chunk]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(mixed))


@torch.no_grad()
def diagnose(agent: Agent, obs: Tensor, budgets: Sequence[TransportBudget]) -> list[dict[str, float]]:
    """What each budget does to particles at these states, from the same start. Means over seeds, states and particles.

    Args:
        agent: with a critic.
        obs: [B, obs_dim], used for every seed.
        budgets: L of them.

    Returns:
        one dict per budget: `steps`, `value` (Q aggregated as for targets), `gain` over the start, `displacement` (action
        units), `largest_share` (largest coordinate moved, as a share of `steps * step_size`), `spread`, `mmd2` to the
        start (kernel width 0.5), `clipped` (share of coordinates at the border).
    """
    S = len(agent.seeds)
    states = obs.to(agent.device).expand(S, -1, -1)
    noise = torch.randn(S, len(obs), agent.config.num_particles, agent.action_dim, generator=torch.Generator().manual_seed(0)).to(
        agent.device
    )
    start = agent.propose(states, noise)
    flat = start.flatten(0, 1)
    before = agent.carry(states, start, TransportBudget(steps=0)).values
    rows = []
    for budget in budgets:
        moved = agent.carry(states, start, budget)
        assert moved.values is not None and before is not None
        reach = max(budget.steps * budget.step_size, 1e-12)
        rows.append(
            {
                "steps": float(budget.steps),
                "value": moved.values.mean().item(),
                "gain": (moved.values - before).mean().item(),
                "displacement": displacement(flat, moved.particles).mean().item(),
                "largest_share": (moved.particles - flat).abs().amax(-1).mean().item() / reach if budget.steps else 0.0,
                "spread": spread(moved.particles).mean().item(),
                "mmd2": mmd2(flat, moved.particles, 0.5).mean().item(),
                "clipped": (moved.particles.abs() >= 1).float().mean().item(),
            }
        )
    return rows


def record_video(
    act: Callable[[Tensor], Tensor], name: str, path: str | Path, seed: int = 0, frames_per_second: int = 30
) -> Path:
    """Play one episode and write it as `.gif`, or as `.mp4` where imageio with ffmpeg is installed.

    Args:
        act: observation [1, obs_dim] -> action [1, D], such as `lambda obs: agent.act(obs, budget)`.
        name: of the environment; it must render.
        path: ends in `.gif` or `.mp4`.
        seed: of the reset.
        frames_per_second: of the file; every step is a frame.

    Raises:
        ValueError: another suffix, imageio missing, or an environment that cannot be rendered here.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"a video is a .gif or an .mp4, not {path.name!r}")
    if name == "pendulum":
        name = "Pendulum-v1"
    env = make_env(name, render_mode="rgb_array")
    obs, _ = env.reset(seed=seed)
    frames, done = [], False
    try:
        while not done:
            frames.append(env.render())
            action = act(torch.as_tensor(obs, dtype=torch.float32)[None])[0].cpu().numpy()
            obs, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    except (ImportError, RuntimeError, OSError) as error:  # what renderers fail with where there is no display
        raise ValueError(f"{name} cannot be rendered here: {error}; on a machine without display try MUJOCO_GL=egl") from None
    finally:
        env.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        from PIL import Image

        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // frames_per_second, loop=0)
        return path
    try:
        import imageio.v3

        imageio.v3.imwrite(path, np.stack(frames), fps=frames_per_second)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"an .mp4 needs imageio with ffmpeg (pip install 'imageio[ffmpeg]'), or ask for a .gif: {error}"
        ) from None
    return path
