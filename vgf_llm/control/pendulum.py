"""A pendulum to swing up, many at once in NumPy: the task of the CPU tests and the demo, without any extra package."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    from .datasets import OfflineDataset

Array = NDArray[np.float32]
# Constants of Gymnasium's Pendulum-v1.
GRAVITY, DT, MAX_SPEED, MAX_TORQUE, EPISODE_STEPS = 10.0, 0.05, 8.0, 2.0, 200


class PendulumVectorEnv:
    """`num_envs` pendulums with the dynamics, costs and 200 steps of Gymnasium's Pendulum-v1, actions scaled to [-1, 1].

    It has the part of `gymnasium.vector.VectorEnv` that evaluation and collecting use: a pendulum that has ended waits for
    `reset` with a mask.
    """

    obs_dim, action_dim = 3, 1

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.angle, self.speed = np.zeros(num_envs), np.zeros(num_envs)
        self.elapsed = np.zeros(num_envs, dtype=int)

    def reset(self, *, seed: Sequence[int | None], options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start anew where `options["reset_mask"]` says so (default: everywhere), each from its seed."""
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        for i in np.flatnonzero(mask).tolist():
            draws = np.random.default_rng(seed[i])
            self.angle[i], self.speed[i] = draws.uniform(-np.pi, np.pi), draws.uniform(-1, 1)
            self.elapsed[i] = 0
        return self._observe(), {}

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[Array, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of 0.05 s with torques 2 * actions [num_envs, 1]; reward minus the cost before the step."""
        torque = MAX_TORQUE * np.clip(np.asarray(actions, dtype=float)[:, 0], -1, 1)
        upright = (self.angle + np.pi) % (2 * np.pi) - np.pi
        cost = upright**2 + 0.1 * self.speed**2 + 0.001 * torque**2
        acceleration = 1.5 * GRAVITY * np.sin(self.angle) + 3 * torque
        self.speed = np.clip(self.speed + acceleration * DT, -MAX_SPEED, MAX_SPEED)
        self.angle = self.angle + self.speed * DT
        self.elapsed += 1
        return self._observe(), -cost, np.zeros(self.num_envs, dtype=bool), self.elapsed >= EPISODE_STEPS, {}

    def _observe(self) -> Array:
        return np.stack([np.cos(self.angle), np.sin(self.angle), self.speed], axis=1).astype(np.float32)

    def close(self) -> None:
        """Nothing is held open."""


def scripted(env: PendulumVectorEnv) -> Array:
    """Actions [num_envs, 1] that pump energy until the pendulum is nearly upright, and then hold it."""
    upright = (env.angle + np.pi) % (2 * np.pi) - np.pi
    # Energy of the rod of mass and length 1, relative to standing still upright (inertia 1/3, half the length to the mass).
    energy = env.speed**2 / 6 + GRAVITY / 2 * (np.cos(upright) - 1)
    pump = np.where(energy < 0, np.sign(env.speed), -np.sign(env.speed)) * np.minimum(1, np.abs(energy) + 0.2)
    hold = -(7 * upright + 1.2 * env.speed) / MAX_TORQUE
    action = np.where(np.abs(upright) < 0.5, hold, pump)
    return np.clip(action, -1, 1)[:, None].astype(np.float32)


def collect(seed: int, episodes: int = 200, noise: float = 0.5) -> "OfflineDataset":
    """`episodes` of 200 steps: one half random actions (return about -1250), one half `scripted` with noise (about -240).

    Args:
        seed: of starts and noise.
        episodes: even number of episodes.
        noise: standard deviation added to the scripted actions.
    """
    # Here, since every process of an environment imports this module, and none of them needs torch.
    from .datasets import OfflineDataset

    draws = np.random.default_rng(seed)
    env = PendulumVectorEnv(episodes)
    obs, _ = env.reset(seed=draws.integers(2**31, size=episodes).tolist())
    steps: list[tuple[NDArray[Any], ...]] = []
    for _ in range(EPISODE_STEPS):
        actions = scripted(env) + noise * draws.standard_normal((episodes, 1))
        actions[: episodes // 2] = draws.uniform(-1, 1, (episodes // 2, 1))
        actions = np.clip(actions, -1, 1).astype(np.float32)
        next_obs, rewards, _, _, _ = env.step(actions)
        steps.append((obs, actions, rewards, next_obs))
        obs = next_obs
    ends = np.tile(np.arange(EPISODE_STEPS) == EPISODE_STEPS - 1, episodes)
    # Episode after episode, each in the order of its steps.
    columns = [np.concatenate(np.stack(values, axis=1)) for values in zip(*steps, strict=True)]
    all_obs, all_actions, all_rewards, all_next_obs = columns
    return OfflineDataset.from_arrays(all_obs, all_actions, all_rewards, all_next_obs, np.ones(len(ends)), ends)
