"""Environments by name, many of them side by side in processes, and the scores they are reported in."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .pendulum import PendulumVectorEnv


# Return of a random and of an expert policy, as D4RL defines its scores.
D4RL_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
}


class VectorEnv(Protocol):
    """What of `gymnasium.vector.VectorEnv` is used here; a sub-environment that has ended waits for its reset."""

    num_envs: int

    def reset(self, *, seed: Any, options: dict[str, Any] | None = None) -> tuple[NDArray[Any], dict[str, Any]]: ...
    def step(self, actions: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]: ...
    def close(self) -> None: ...


def make_env(name: str, **options: Any) -> Any:
    """One Gymnasium environment: an OGBench single task such as `cube-single-play-singletask-v0`, or any Gymnasium id.

    Observations are flat, actions are in [-1, 1], and `reset(seed=...)` also seeds NumPy's global generator, which OGBench's
    environments draw from.

    Args:
        name: of the task. The data set's type (`play`, `navigate`, ...) may be part of it.
        options: for the environment, such as `success_timing="post"` or `render_mode="rgb_array"`.

    Raises:
        ValueError: the packages or the environment are not installed.
    """
    try:
        import gymnasium
        from gymnasium.wrappers import FlattenObservation, RescaleAction
    except ImportError:
        raise ValueError(f"environment {name!r} needs gymnasium: pip install 'vgf_llm[control]'") from None
    try:
        if "singletask" in name:
            import ogbench

            env = ogbench.make_env_and_datasets(name, env_only=True, **options)
        else:
            env = gymnasium.make(name, **options)
    except ImportError as error:
        raise ValueError(f"environment {name!r} needs {error.name}: pip install 'vgf_llm[control]'") from None
    except gymnasium.error.Error as error:
        raise ValueError(f"no environment {name!r}: {error}") from None
    if isinstance(env.observation_space, gymnasium.spaces.Dict):
        env = FlattenObservation(env)
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Box) or not np.isfinite([space.low, space.high]).all():
        raise ValueError(f"environment {name!r} has no bounded continuous actions: {space}")
    if (space.low != -1).any() or (space.high != 1).any():
        env = RescaleAction(env, np.float32(-1), np.float32(1))

    class SeedsEverything(gymnasium.Wrapper):  # type: ignore[misc,type-arg,unused-ignore]
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
            if seed is not None:
                np.random.seed(seed % 2**32)
            return self.env.reset(seed=seed, options=options)

    return SeedsEverything(env)


class _Make:
    """`make_env` with its arguments, as something that can be sent to a process."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options

    def __call__(self) -> Any:
        return make_env(self.name, **self.options)


def make_vector_env(name: str, num_envs: int, processes: bool = True, **options: Any) -> VectorEnv:
    """`num_envs` environments that are stepped together. `pendulum` needs no package and no process.

    Args:
        name, options: as in `make_env`.
        processes: one process per environment; False steps them one after another.

    Raises:
        ValueError: as `make_env`.
    """
    if name == "pendulum":
        return PendulumVectorEnv(num_envs)
    make_env(name, **options).close()  # in this process, where an error can be understood
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

    makers: list[Callable[[], Any]] = [_Make(name, options)] * num_envs
    if not processes or num_envs == 1:
        sync: VectorEnv = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
        return sync
    env: VectorEnv = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED, context="spawn")
    return env


def score(name: str, returns: NDArray[Any], successes: NDArray[Any]) -> NDArray[np.float64]:
    """What tables report, per episode: success in percent (OGBench, D4RL's mazes), D4RL's normalised return, or the return.

    Args:
        name: of the environment.
        returns: of the episodes.
        successes: whether the last step was a success; nan where the environment does not say.
    """
    if "singletask" in name or not np.isnan(successes).any():
        return 100.0 * np.asarray(successes, dtype=float)
    lowest, highest = D4RL_RETURNS.get(name.lower().split("-")[0], (math.nan, math.nan))
    if math.isnan(lowest):
        return np.asarray(returns, dtype=float)
    return 100.0 * (np.asarray(returns, dtype=float) - lowest) / (highest - lowest)
