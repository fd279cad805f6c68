"""Logged transitions: OGBench and D4RL files, Minari, arrays; and the buffer that updates draw from."""

import dataclasses
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .agent import Batch
from .networks import SeededNoise


# A flow cannot fit a density at the border: actions are kept this far inside, as in the authors' code.
ACTION_LIMIT = 1 - 1e-5


@dataclass(frozen=True)
class OfflineDataset:
    """T transitions in the order they happened, float32 on the CPU.

    Attributes:
        obs, next_obs: [T, obs_dim].
        actions: [T, D] within (-1, 1).
        rewards: [T].
        masks: [T], 1 where the next state has a value, 0 where the task ended with this step.
        ends: [T] bool, last step of a trajectory, for whatever reason.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    masks: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.obs)

    @property
    def obs_dim(self) -> int:
        """Size of a state."""
        return self.obs.shape[1]

    @property
    def action_dim(self) -> int:
        """Size of an action."""
        return self.actions.shape[1]

    @classmethod
    def from_arrays(
        cls,
        obs: ArrayLike,
        actions: ArrayLike,
        rewards: ArrayLike,
        next_obs: ArrayLike,
        masks: ArrayLike,
        ends: ArrayLike,
        *,
        source: str = "the arrays",
    ) -> "OfflineDataset":
        """Check and convert arrays of the shapes above. Actions are clipped to +-(1 - 1e-5).

        Args:
            source: what an error message calls them.

        Raises:
            ValueError: shapes do not fit each other, a value is not finite, an action leaves [-1, 1] by more than 1e-3.
        """
        # A copy each: the set must not change with the arrays of the caller.
        columns = {
            "observations": torch.tensor(np.asarray(obs, dtype=np.float32)),
            "actions": torch.tensor(np.asarray(actions, dtype=np.float32)),
            "rewards": torch.tensor(np.asarray(rewards, dtype=np.float32)),
            "next observations": torch.tensor(np.asarray(next_obs, dtype=np.float32)),
            "masks": torch.tensor(np.asarray(masks, dtype=np.float32)),
            "ends": torch.tensor(np.asarray(ends).astype(bool)),
        }
        count = len(columns["observations"])
        if count == 0:
            raise ValueError(f"{source} hold no transition")
        for name, column in columns.items():
            wanted = 2 if name in ("observations", "actions", "next observations") else 1
            if column.ndim != wanted or len(column) != count:
                raise ValueError(
                    f"{source}: {name} must be {wanted}-dimensional with {count} rows like the observations, got "
                    f"{tuple(column.shape)}"
                )
            if name != "ends" and not bool(column.isfinite().all()):
                row = int((~column.isfinite()).reshape(count, -1).any(1).nonzero()[0])
                raise ValueError(f"{source}: {name} hold nan or infinity, first in row {row}")
        if columns["observations"].shape != columns["next observations"].shape:
            raise ValueError(f"{source}: observations and next observations differ in size")
        if bool((columns["actions"].abs() > 1 + 1e-3).any()):
            row = int((columns["actions"].abs() > 1 + 1e-3).any(1).nonzero()[0])
            raise ValueError(
                f"{source}: actions must lie in [-1, 1], row {row} holds {columns['actions'][row].tolist()}; rescale them to "
                "the limits of the action space"
            )
        if bool(((columns["masks"] != 0) & (columns["masks"] != 1)).any()):
            raise ValueError(f"{source}: masks must be 0 or 1")
        columns["actions"].clamp_(-ACTION_LIMIT, ACTION_LIMIT)
        columns["ends"][-1] = True
        return cls(*columns.values())

    @classmethod
    def from_ogbench_npz(cls, path: str | Path, env: Any) -> "OfflineDataset":
        """A file of OGBench's format, with the rewards of a single task.

        Rows of a trajectory are T + 1 states; the last one's action is void. Rewards and masks are OGBench's: number of
        satisfied components minus their number, 1 or 0 minus 1 in mazes; the mask is 0 where all are satisfied. Whether
        that is judged before the step (`success_timing="pre"`, OGBench >= 1.2) or after it ("post", 1.1, which the
        published tables used) is taken from the environment.

        Args:
            path: `.npz`.
            env: the environment of the task, from `environments.make_env`.

        Raises:
            FileNotFoundError: no such file; names the generator.
            ValueError: the file is truncated, lacks a column, or does not fit the environment.
        """
        path = Path(path)
        arrays = read_npz(path, ("observations", "actions", "terminals", "qpos"))
        from ogbench.relabel_utils import relabel_dataset

        size = int(np.prod(env.observation_space.shape))
        if arrays["observations"].ndim != 2 or arrays["observations"].shape[1] != size:
            raise ValueError(
                f"{path}: observations are {arrays['observations'].shape}, the environment's have size {size}: "
                "the file belongs to another environment"
            )
        if arrays["actions"].shape[1:] != env.action_space.shape:
            raise ValueError(
                f"{path}: actions are {arrays['actions'].shape}, the environment's have shape {env.action_space.shape}: "
                "the file belongs to another environment"
            )
        count = len(arrays["observations"])
        if wrong := [f"{name} {len(a)}" for name, a in arrays.items() if len(a) != count]:
            raise ValueError(f"{path}: columns differ in length: observations {count}, {', '.join(wrong)}")
        last = arrays["terminals"].astype(bool)
        if not last[-1]:
            raise ValueError(f"{path}: the last trajectory is cut off")
        relabel_dataset(env.spec.id, env, arrays)
        here = np.flatnonzero(~last)
        judged = here + 1 if env.unwrapped._success_timing == "post" else here
        return cls.from_arrays(
            arrays["observations"][here],
            arrays["actions"][here],
            arrays["rewards"][judged],
            arrays["observations"][here + 1],
            arrays["masks"][judged],
            last[here + 1],
            source=str(path),
        )

    @classmethod
    def from_d4rl_hdf5(cls, path: str | Path) -> "OfflineDataset":
        """A D4RL file, read without the d4rl package. The authors' rewards are `rescaled(1, -1)` in mazes and
        `rescaled(1000 / return_span())` elsewhere.

        The step at a timeout is dropped where the file holds no next observations, since its successor is unknown. A
        trajectory also ends where an observation is not the one before it promised (by more than 1e-6).

        Args:
            path: `.hdf5` with observations, actions, rewards, terminals and timeouts, perhaps next_observations.

        Raises:
            FileNotFoundError, ValueError: as for OGBench's files.
        """
        path = Path(path)
        _exists(path, "D4RL's files were published at http://rail.eecs.berkeley.edu/datasets/offline_rl/")
        h5py = _need("h5py", "D4RL files")
        names = ("observations", "actions", "rewards", "terminals")
        try:
            with h5py.File(path, "r") as file:
                if missing := [name for name in names if name not in file]:
                    raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(file))}")
                arrays = {n: file[n][()] for n in (*names, "timeouts", "next_observations") if n in file}
        except OSError as error:
            raise ValueError(f"{path} is no complete HDF5 file: {error}") from None
        obs, terminals = arrays["observations"], arrays["terminals"].astype(bool)
        if wrong := [f"{name} {len(a)}" for name, a in arrays.items() if len(a) != len(obs)]:
            raise ValueError(f"{path}: columns differ in length: observations {len(obs)}, {', '.join(wrong)}")
        timeouts = arrays["timeouts"].astype(bool) if "timeouts" in arrays else np.zeros(len(obs), dtype=bool)
        ends = terminals | timeouts
        keep = np.ones(len(obs), dtype=bool)
        if "next_observations" in arrays:
            next_obs = arrays["next_observations"]
            ends[:-1] |= np.linalg.norm(obs[1:] - next_obs[:-1], axis=1) > 1e-6
        else:
            next_obs = np.concatenate([obs[1:], obs[-1:]])
            keep = ~(timeouts & ~terminals)
            keep[-1] &= terminals[-1]
            ends[:-1] |= ~keep[1:]  # the step before a dropped one is the last that is known
        columns = [a[keep] for a in (obs, arrays["actions"], arrays["rewards"], next_obs, 1.0 - terminals, ends)]
        return cls.from_arrays(*columns, source=str(path))

    @classmethod
    def from_minari(cls, name: str, *, download: bool = True) -> "OfflineDataset":
        """A Minari data set; dict observations of goal tasks become [achieved goal, desired goal, observation].

        Scores on Minari's sets are not comparable with D4RL's tables: most were collected anew by other policies.

        Raises:
            ValueError: the set cannot be found or fetched, or is malformed.
        """
        minari = _need("minari", "Minari data sets")
        try:
            episodes = list(minari.load_dataset(name, download=download).iterate_episodes())
        except Exception as error:  # noqa: BLE001  its hosts, formats and versions fail in many classes of their own
            raise ValueError(
                f"Minari cannot give {name!r}: {error}. If its host cannot be reached from here, generate data instead: "
                "`vgf control generate`"
            ) from None
        if not episodes:
            raise ValueError(f"Minari data set {name!r} holds no episode")
        states = [_flat(e.observations) for e in episodes]
        ends = [np.arange(len(e.actions)) == len(e.actions) - 1 for e in episodes]
        return cls.from_arrays(
            np.concatenate([s[:-1] for s in states]),
            np.concatenate([np.asarray(e.actions) for e in episodes]),
            np.concatenate([np.asarray(e.rewards) for e in episodes]),
            np.concatenate([s[1:] for s in states]),
            np.concatenate([1.0 - np.asarray(e.terminations, dtype=float) for e in episodes]),
            np.concatenate(ends),
            source=f"Minari data set {name!r}",
        )

    def return_span(self) -> float:
        """Largest minus smallest return of a trajectory: the authors divide D4RL's locomotion rewards by it, times 1000.

        Raises:
            ValueError: all trajectories have the same return, which gives no scale.
        """
        trajectory = torch.cat([torch.zeros(1, dtype=torch.long), self.ends.long().cumsum(0)[:-1]])
        returns = torch.zeros(int(trajectory[-1]) + 1, dtype=torch.float64).index_add(0, trajectory, self.rewards.double())
        span = float(returns.max() - returns.min())
        if span <= 0:
            raise ValueError("all trajectories have the same return, which gives no scale")
        return span

    def rescaled(self, scale: float, shift: float = 0.0) -> "OfflineDataset":
        """The same transitions with rewards `scale * r + shift`."""
        return dataclasses.replace(self, rewards=scale * self.rewards + shift)

    def n_step(self, n: int, discount: float) -> dict[str, Tensor]:
        """Columns of `ReplayBuffer`, for n-step targets: from each step on, up to n rewards and the state after them.

        A sum stops early where the trajectory ends or the task has ended: `rewards_i = sum_{k<m} discount^k r_{i+k}`, next
        state that after step i+m-1, `discounts_i = discount^m mask_{i+m-1}` with m <= n.

        Args:
            n: at least 1.
            discount: gamma per step.
        """
        rewards = self.rewards.double().clone()
        last = torch.arange(len(self))
        length = torch.ones(len(self), dtype=torch.long)
        stop = self.ends | (self.masks == 0)
        open_ = ~stop
        for k in range(1, n):
            index = (last + 1).clamp_max(len(self) - 1)
            rewards = torch.where(open_, rewards + discount**k * self.rewards.double()[index], rewards)
            last = torch.where(open_, index, last)
            length = length + open_.long()
            open_ = open_ & ~stop[last]
        return {
            "obs": self.obs,
            "actions": self.actions,
            "rewards": rewards.float(),
            "next_obs": self.next_obs[last],
            "discounts": (discount ** length.double() * self.masks[last]).float(),
        }


class ReplayBuffer:
    """Transitions on the device, drawn from without leaving it: a data set for all seeds, and what each seed collects.

    Args:
        columns: from `OfflineDataset.n_step`.
        seeds: S.
        device: where they live.
        room: for this many transitions collected per seed; beyond it the oldest of them are overwritten.
        particles: [S, T, N, D] cached behaviour samples at next_obs, or None.
        share: of each draw that comes from what the seed collected, as soon as there is any: 0.5 is the symmetric sampling of
            RLPD (arXiv 2302.02948). Default None: uniform over all transitions.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        seeds: int = 1,
        device: torch.device | str = "cpu",
        room: int = 0,
        particles: Tensor | None = None,
        share: float | None = None,
    ) -> None:
        self.fixed, self.room, self.share = len(columns["obs"]), room, share
        self.added = [0] * seeds
        # On the device and changed in place, so that a captured graph sees the buffer grow.
        self.size = torch.full((seeds, 1), float(self.fixed), dtype=torch.float64, device=device)
        # Rows of the data set, then `room` rows of each seed.
        self.first_own = room * torch.arange(seeds, device=device)[:, None]
        self.columns = {
            name: torch.cat([column, column.new_zeros(seeds * room, *column.shape[1:])]).to(device)
            for name, column in columns.items()
        }
        self.particles = particles
        if particles is not None and room:
            self.particles = torch.cat([particles, particles.new_zeros(seeds, room, *particles.shape[2:])], dim=1)

    def add(self, seed: int, rows: Mapping[str, Tensor], particles: Tensor | None = None) -> None:
        """Append transitions [R, ...] by column that the seed of this index collected, with their particles [R, N, D] if
        the buffer holds such.

        Raises:
            ValueError: no room for R rows, or particles are missing.
        """
        count = len(rows["obs"])
        if count > self.room:
            raise ValueError(f"{count} transitions do not fit into the room for {self.room}")
        device = self.size.device
        place = self.fixed + (self.added[seed] + torch.arange(count, device=device)) % self.room
        for name, column in self.columns.items():
            column[place + seed * self.room] = rows[name].to(device)
        if self.particles is not None:
            if particles is None:
                raise ValueError("the buffer holds cached particles: give those of the new transitions")
            self.particles[seed, place] = particles
        self.added[seed] += count
        self.size[seed] = self.fixed + min(self.added[seed], self.room)

    def own(self, seed: int) -> dict[str, Tensor]:
        """The transitions that a seed collected, oldest place first."""
        first = self.fixed + seed * self.room
        return {name: column[first : first + min(self.added[seed], self.room)] for name, column in self.columns.items()}

    def sample(self, batch_size: int, noise: SeededNoise) -> Batch:
        """`batch_size` transitions for each seed with replacement; see `share`."""
        draws, fixed = noise.uniform(batch_size, dtype=torch.float64), self.fixed
        if self.share is None:
            index = (draws * self.size).long()  # [S, B]
        else:
            first = torch.arange(batch_size, device=draws.device) < round(self.share * batch_size)
            own = first & (self.size > fixed)
            index = torch.where(own, fixed + draws * (self.size - fixed), draws * fixed).long()
        particles = None
        if self.particles is not None:
            particles = torch.stack([cached[i] for cached, i in zip(self.particles, index, strict=True)])
        row = torch.where(index < self.fixed, index, index + self.first_own)
        return Batch(**{name: column[row] for name, column in self.columns.items()}, particles=particles)


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """All columns of a `.npz` file, among which `names` must be.

    Raises:
        FileNotFoundError, ValueError: no such file, a truncated one, or a column is missing.
    """
    _exists(path, "generate it with `vgf control generate`, or fetch it from https://rail.eecs.berkeley.edu/datasets/ogbench/")
    try:
        with np.load(path) as file:
            if missing := [name for name in names if name not in file]:
                raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(file))}")
            return {name: file[name] for name in file}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} is no complete .npz file, perhaps truncated: {error}") from None


def _exists(path: Path, hint: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}; {hint}")


def _need(module: str, what: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise ValueError(f"{what} need the package {module}: pip install 'vgf_llm[control]'") from None


def _flat(observations: Any) -> NDArray[Any]:
    if isinstance(observations, dict):
        keys = [k for k in ("achieved_goal", "desired_goal", "observation") if k in observations]
        return np.concatenate([np.asarray(observations[k]) for k in keys], axis=-1)
    return np.asarray(observations)
