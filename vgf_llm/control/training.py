"""Offline and offline-to-online training: one function, a configuration, files that a run can be resumed from."""

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vgf_llm.flow import TransportBudget

from .agent import Agent, VGFAgent
from .baselines import AGENTS
from .config import AgentConfig, known_fields
from .datasets import OfflineDataset, ReplayBuffer
from .environments import VectorEnv, make_env, make_vector_env
from .evaluation import Evaluation, evaluate, slots
from .networks import SeededNoise
from .pendulum import PendulumVectorEnv, collect


OGBENCH_FOLDER = Path("~/.ogbench/data")
MASK_OF_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Defaults are those of the authors' scripts where they have them.

    Args:
        env: task, such as `cube-single-play-singletask-v0`, a Gymnasium id, or `pendulum`.
        agent: see `AgentConfig`.
        dataset: `.npz` (OGBench), `.hdf5` (D4RL) or `minari:NAME`. Default: OGBench's file of the task in
            `~/.ogbench/data`, downloaded if it is not there; for `pendulum` a set collected with `data_seed`.
        data_seed: see there.
        success_timing: of OGBench's rewards. "pre" (OGBench >= 1.2) or "post" (1.1, which the published tables used).
        normalize_return: rewards * 1000 / span of the returns; the authors' for D4RL's locomotion.
        reward_scale, reward_shift: further affine map of all rewards, online too. D4RL's antmaze: shift -1.
        seeds: trained side by side in one run.
        updates: offline.
        online_steps: environment steps per seed after them, each with `updates_per_step` updates.
        online_start: steps that are collected before the first of these updates.
        updates_per_step: see there.
        online_share: of each batch online that is drawn from collected transitions. 0.5 is RLPD's symmetric sampling; default
            None, the authors': uniform over the data set and what is collected.
        eval_every: updates between evaluations. 0: only at the end of each phase.
        eval_episodes: per seed and budget.
        eval_steps: the values of L_test; each changes the steps of `agent.test`.
        max_envs: environments that evaluation may keep open. Default: two per core; all for `pendulum`.
        env_processes: one process per environment. False steps them in turns, which is faster where a step is cheap (pointmaze).
        log_every, save_every: in updates. 0 of `save_every`: only at the end of each phase.
        device: "cuda" if there is one.
        graph: capture the update as a CUDA graph. Default: on a GPU.
    """

    env: str
    agent: AgentConfig = field(default_factory=AgentConfig)
    dataset: str | None = None
    data_seed: int = 0
    success_timing: str = "pre"
    normalize_return: bool = False
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    seeds: tuple[int, ...] = (0,)
    updates: int = 1_000_000
    online_steps: int = 0
    online_start: int = 5000
    updates_per_step: int = 1
    online_share: float | None = None
    eval_every: int = 100_000
    eval_episodes: int = 50
    eval_steps: tuple[int, ...] = (0, 1, 2, 3)
    max_envs: int | None = None
    env_processes: bool = True
    log_every: int = 10_000
    save_every: int = 100_000
    device: str | None = None
    graph: bool | None = None

    def __post_init__(self) -> None:
        for name, lowest in (
            ("updates", 0), ("online_steps", 0), ("online_start", 0), ("updates_per_step", 1), ("eval_every", 0),
            ("eval_episodes", 1), ("log_every", 1), ("save_every", 0),
        ):  # fmt: skip
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {number!r}")
        if self.online_share is not None and not 0 < self.online_share <= 1:
            raise ValueError(f"online_share must lie in (0, 1], or be None for uniform draws, got {self.online_share!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be one or more different integers, got {self.seeds!r}")
        if not self.eval_steps:
            raise ValueError("eval_steps must name at least one budget; [0] is best-of-N")
        if self.success_timing not in ("pre", "post"):
            raise ValueError(f"success_timing must be pre or post, got {self.success_timing!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """From plain values, as a YAML file holds them.

        Raises:
            ValueError: an unknown field, or what the classes themselves raise.
        """
        values = dict(values)
        known_fields(cls, values)
        if isinstance(values.get("agent"), Mapping):
            values["agent"] = AgentConfig.from_dict(values["agent"])
        for name in ("seeds", "eval_steps"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "TrainConfig":
        """From a file such as those in `recipes/configs/control/`.

        Raises:
            ValueError, OSError: not readable, not YAML, or as `from_dict`.
        """
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        return cls.from_dict(values)

    @property
    def budgets(self) -> list[TransportBudget]:
        """One per `eval_steps`."""
        return [dataclasses.replace(self.agent.test, steps=steps) for steps in self.eval_steps]


def load_dataset(config: TrainConfig) -> OfflineDataset:
    """The data set of a run, its rewards not yet rescaled.

    Raises:
        ValueError, OSError: it is missing, malformed, or its host cannot be reached; says how to generate it.
    """
    source = config.dataset
    if source is None and config.env == "pendulum":
        return collect(config.data_seed)
    if source is None and "singletask" not in config.env:
        raise ValueError(f"name the data set of {config.env!r}: an .npz or .hdf5 file, or minari:NAME")
    if source is not None and source.startswith("minari:"):
        data = OfflineDataset.from_minari(source.removeprefix("minari:"))
    elif source is not None and source.endswith((".hdf5", ".h5")):
        data = OfflineDataset.from_d4rl_hdf5(Path(source).expanduser())
    else:
        path = fetch_ogbench(config.env) if source is None else Path(source).expanduser()
        env = make_env(config.env, success_timing=config.success_timing)
        try:
            return OfflineDataset.from_ogbench_npz(path, env)
        finally:
            env.close()
    # Before the first update, not at the first evaluation.
    sizes = (PendulumVectorEnv.obs_dim, PendulumVectorEnv.action_dim) if config.env == "pendulum" else _sizes(config.env)
    if sizes != (data.obs_dim, data.action_dim):
        raise ValueError(
            f"{source} has observations and actions of size {data.obs_dim} and {data.action_dim}, {config.env!r} of size "
            f"{sizes[0]} and {sizes[1]}: the data belong to another environment"
        )
    return data


def _sizes(name: str) -> tuple[int, int]:
    env = make_env(name)
    env.close()
    return int(np.prod(env.observation_space.shape)), int(np.prod(env.action_space.shape))


def fetch_ogbench(name: str, folder: str | Path = OGBENCH_FOLDER) -> Path:
    """Path of OGBench's file for a task; downloaded into `folder` if it is not there.

    Raises:
        ValueError: ogbench is not installed, or its host cannot be reached; names the generator.
    """
    words = name.split("-")
    if "singletask" in words:
        words = words[: words.index("singletask")] + words[-1:]
    path = Path(folder).expanduser() / f"{'-'.join(words)}.npz"
    if path.is_file():
        return path
    try:
        import ogbench

        ogbench.download_datasets([path.stem], str(path.parent))
    except ImportError:
        raise ValueError("OGBench's data needs the package ogbench: pip install 'vgf_llm[control]'") from None
    except OSError as error:
        raise ValueError(
            f"no {path}, and it cannot be downloaded: {error}. Generate such a set (cube, scene, puzzle and pointmaze need no "
            f"download): vgf control generate --env {'-'.join(words[:-1])} --output {path}"
        ) from None
    return path


class UpdateLoop:
    """Repeats draw-and-update with everything on the device; on a GPU as one captured graph.

    Args:
        agent, buffer: what is trained, on what.
        graph: capture one update, after three ordinary ones, and replay it. Needs a CUDA device.
        step: what is repeated; default: `agent.update` of a fresh batch.

    Raises:
        ValueError: a graph is asked for without a CUDA device.
    """

    def __init__(
        self, agent: Agent, buffer: ReplayBuffer, graph: bool, step: Callable[[], dict[str, Tensor]] | None = None
    ) -> None:
        if graph and agent.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {agent.device}: set graph to false")
        self.agent, self.graph = agent, graph
        self.step = step or (lambda: agent.update(buffer.sample(agent.config.batch_size, agent.noise)))
        self.captured: torch.cuda.CUDAGraph | None = None
        self.ordinary = 0
        self.metrics: dict[str, Tensor] = {}

    def run(self, count: int) -> dict[str, Tensor]:
        """`count` updates; the metrics of the last, on the device."""
        for _ in range(count):
            if self.captured is None and self.graph and self.ordinary >= 3:
                self.captured = self._capture()
            if self.captured is not None:
                self.captured.replay()
                self.agent.updates += 1
            elif self.graph:
                # On a stream of its own: this creates gradients, Adam's state and workspaces for the graph.
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.metrics = self.step()
                torch.cuda.current_stream().wait_stream(stream)
                self.ordinary += 1
            else:
                self.metrics = self.step()
        return self.metrics

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph, updates = torch.cuda.CUDAGraph(), self.agent.updates
        for generator in self.agent.noise.generators:
            graph.register_generator_state(generator)
        self.agent.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self.metrics = self.step()
        self.agent.updates = updates  # capturing computes nothing
        return graph


def cache_particles(agent: VGFAgent, next_obs: Tensor, seed: int = 0, rows: int = 4096) -> Tensor:
    """N behaviour samples [S, T, N, D] at each of next_obs [T, obs_dim], for a behaviour that is frozen.

    The noise is its own, so that a resumed run finds the same particles.
    """
    noise = SeededNoise([(s + seed) % MASK_OF_SEEDS for s in agent.seeds], agent.device)
    shape = (agent.config.num_particles, agent.action_dim)
    with torch.no_grad():
        parts = [
            agent.behaviour.sample(part.to(agent.device).expand(len(agent.seeds), -1, -1), noise.normal(len(part), *shape))
            for part in next_obs.split(rows)
        ]
    return torch.cat(parts, dim=1)


class Collector:
    """Steps one environment per seed with `config.explore` and hands n-step transitions to the buffer."""

    def __init__(self, agent: Agent, env: VectorEnv, buffer: ReplayBuffer, config: TrainConfig, scale: float) -> None:
        if env.num_envs != len(agent.seeds):
            raise ValueError(f"collecting needs one environment per seed, got {env.num_envs} for {len(agent.seeds)}")
        self.agent, self.env, self.buffer, self.config, self.scale = agent, env, buffer, config, scale
        self.windows: list[list[tuple[Tensor, Tensor, float, float]]] = [[] for _ in agent.seeds]
        self.episodes = [0 for _ in agent.seeds]
        self.obs = self._reset(np.ones(env.num_envs, dtype=bool))

    def _reset(self, mask: Any) -> Tensor:
        # Far from the seeds of evaluation, and another start for each episode and each time that a run is resumed.
        updates = self.agent.updates
        seeds = [
            int(np.random.SeedSequence([1, s, e, updates]).generate_state(1)[0] % MASK_OF_SEEDS)
            for s, e in zip(self.agent.seeds, self.episodes, strict=True)
        ]
        obs, _ = self.env.reset(seed=seeds, options={"reset_mask": mask})
        return torch.as_tensor(np.array(obs), dtype=torch.float32)

    def step(self) -> None:
        """One step of every environment."""
        actions = self.agent.act(self.obs[:, None], self.agent.config.explore)[:, 0].cpu()
        obs, rewards, terminated, truncated, _ = self.env.step(actions.numpy())
        next_obs = torch.as_tensor(np.array(obs), dtype=torch.float32)
        rewards = self.scale * rewards + self.config.reward_shift
        if not np.isfinite(rewards).all() or not next_obs.isfinite().all():
            raise ValueError(f"environment {self.config.env!r} returned a reward or an observation that is not finite")
        done = terminated | truncated
        for s, window in enumerate(self.windows):
            window.append((self.obs[s], actions[s], float(rewards[s]), float(terminated[s])))
            if done[s] or len(window) == self.agent.config.n_step:
                self._emit(s, next_obs[s], all_of_it=bool(done[s]))
            self.episodes[s] += int(done[s])
        self.obs = self._reset(done) if done.any() else next_obs

    def _emit(self, s: int, next_obs: Tensor, all_of_it: bool) -> None:
        """The oldest transition of a full window, or what is left of it at the end of an episode."""
        window, gamma = self.windows[s], self.agent.config.discount
        rows = []
        while window:
            total = sum(gamma**k * reward for k, (_, _, reward, _) in enumerate(window))
            rows.append((window[0][0], window[0][1], total, gamma ** len(window) * (1 - window[-1][3])))
            window.pop(0)
            if not all_of_it:
                break
        obs, actions, totals, discounts = zip(*rows, strict=True)
        columns = {
            "obs": torch.stack(obs),
            "actions": torch.stack(actions),
            "rewards": torch.tensor(totals),
            "next_obs": next_obs.expand(len(rows), -1),
            "discounts": torch.tensor(discounts),
        }
        particles = None
        if self.buffer.particles is not None:
            shape = (len(rows), self.agent.config.num_particles, self.agent.action_dim)
            states = columns["next_obs"].to(self.agent.device).expand(len(self.agent.seeds), -1, -1)
            with torch.no_grad():
                particles = self.agent.behaviour.sample(states, self.agent.noise.normal(*shape))[s]
        self.buffer.add(s, columns, particles)


def train(
    config: TrainConfig, output_dir: str | Path, *, resume: bool = False, say: Callable[[str], None] | None = None
) -> Agent:
    """Train as configured; evaluate, log and save on the way.

    `output_dir` gets `config.json`, `metrics.csv` (losses), `scores.csv` (one row per seed, budget and evaluation) and
    `checkpoint/`. An offline run that is resumed continues exactly; an online one starts with fresh episodes.

    Args:
        config: see `TrainConfig`.
        output_dir: see above.
        resume: continue from `output_dir/checkpoint` if there is one.
        say: told once per evaluation and log line, such as `print`.

    Returns:
        the trained agent.

    Raises:
        ValueError, OSError: bad data, environment or configuration; losses that are no longer finite; `output_dir` holds a
            run and resume is False, or one of another configuration.
    """
    say = say or (lambda line: None)
    run = Path(output_dir)
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    described = run / "config.json"
    if described.exists():
        if not resume:
            raise ValueError(f"{run} holds a run already: resume it, or name another directory")
        if json.loads(described.read_text(encoding="utf-8")) != plain:
            raise ValueError(f"{described} is another configuration than the one that is to be resumed")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    graph = device.startswith("cuda") if config.graph is None else config.graph
    data = load_dataset(config)
    scale = config.reward_scale * (1000 / data.return_span() if config.normalize_return else 1.0)
    data = data.rescaled(scale, config.reward_shift)
    agent = AGENTS[config.agent.algorithm](data.obs_dim, data.action_dim, config.agent, config.seeds, device)
    columns = data.n_step(config.agent.n_step, config.agent.discount)
    run.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32

    checkpoint = run / "checkpoint"
    tensors = load_file(checkpoint / "agent.safetensors") if (checkpoint / "agent.safetensors").exists() else {}
    if tensors:
        agent.load_tensors(tensors)
    prepare = config.agent.behaviour_steps
    offline, whole = prepare + config.updates, prepare + config.updates + config.online_steps * config.updates_per_step
    log = Log(run, config, agent, say, keep=bool(tensors))
    env = None
    try:
        if agent.updates < prepare:
            assert isinstance(agent, VGFAgent)
            plain_buffer = ReplayBuffer(columns, len(config.seeds), device)

            def fit_behaviour() -> dict[str, Tensor]:
                assert isinstance(agent, VGFAgent)
                return agent.update_behaviour(plain_buffer.sample(config.agent.batch_size, agent.noise))

            log.run(UpdateLoop(agent, plain_buffer, graph, fit_behaviour), prepare, evaluating=False)
        particles = cache_particles(agent, columns["next_obs"]) if prepare and isinstance(agent, VGFAgent) else None
        buffer = ReplayBuffer(columns, len(config.seeds), device, config.online_steps, particles, config.online_share)
        loop = UpdateLoop(agent, buffer, graph)
        if agent.updates < offline:
            log.run(loop, offline)
        if config.online_steps:
            if (checkpoint / "online.safetensors").exists() and agent.updates > offline:
                restore_online(buffer, load_file(checkpoint / "online.safetensors"))
            env = make_vector_env(config.env, len(config.seeds), **env_options(config))
            collector = Collector(agent, env, buffer, config, scale)
            if agent.updates == offline:
                for _ in range(min(config.online_start, config.online_steps)):
                    collector.step()
            while agent.updates < whole:
                until = log.next_stop(whole)
                while agent.updates < until:
                    collector.step()
                    metrics = loop.run(config.updates_per_step)
                log.reached(metrics, whole, buffer)
    finally:
        log.close()
        if env is not None:
            env.close()
    return agent


def env_options(config: TrainConfig) -> dict[str, Any]:
    """What the environments of a run are made with."""
    timing = {"success_timing": config.success_timing} if "singletask" in config.env else {}
    return {"processes": config.env_processes, **timing}


def restore_online(buffer: ReplayBuffer, tensors: Mapping[str, Tensor]) -> None:
    """Put collected transitions back, as `Log` saved them."""
    seeds = sorted({int(name.split(".")[0]) for name in tensors})
    for s in seeds:
        rows = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{s}.")}
        buffer.add(s, rows, rows.pop("particles", None))


class Log:
    """Decides when a run logs, evaluates and saves, and does it."""

    def __init__(self, run: Path, config: TrainConfig, agent: Agent, say: Callable[[str], None], keep: bool) -> None:
        self.folder, self.config, self.agent, self.say = run, config, agent, say
        self.env: VectorEnv | None = None
        if not keep:
            for name in ("metrics.csv", "scores.csv"):
                (run / name).unlink(missing_ok=True)
        self.started, self.at_start = time.perf_counter(), agent.updates

    def next_stop(self, end: int) -> int:
        """The next number of updates at which something is due."""
        every = [n for n in (self.config.log_every, self.config.eval_every, self.config.save_every) if n]
        return min([end, *(self.agent.updates // n * n + n for n in every)])

    def run(self, loop: UpdateLoop, end: int, evaluating: bool = True) -> None:
        """Update until the agent has `end` updates."""
        while self.agent.updates < end:
            metrics = loop.run(self.next_stop(end) - self.agent.updates)
            self.reached(metrics, end, evaluating=evaluating)

    def reached(
        self, metrics: Mapping[str, Tensor], end: int, buffer: ReplayBuffer | None = None, evaluating: bool = True
    ) -> None:
        """Log, evaluate and save what is due at the agent's number of updates."""
        config, updates = self.config, self.agent.updates
        values = {name: value.tolist() for name, value in metrics.items()}
        if bad := sorted(name for name, row in values.items() if not np.isfinite(row).all()):
            raise ValueError(
                f"{', '.join(bad)} no longer finite after {updates} updates: lower the learning rate or look at the data"
            )
        per_second = (updates - self.at_start) / (time.perf_counter() - self.started)
        if updates % config.log_every == 0 or updates == end:
            for i, seed in enumerate(self.agent.seeds):
                self._write("metrics.csv", {"updates": updates, "seed": seed, **{n: row[i] for n, row in values.items()}})
            means = ", ".join(f"{name} {np.mean(row):.4g}" for name, row in values.items())
            self.say(f"{updates} updates ({per_second:.1f}/s): {means}")
        if evaluating and (updates == end or (config.eval_every and updates % config.eval_every == 0)):
            self._evaluate()
        if updates == end or (config.save_every and updates % config.save_every == 0):
            self._save(buffer)

    def _evaluate(self) -> None:
        config, agent = self.config, self.agent
        budgets = config.budgets if agent.config.algorithm in ("vgf", "ifql") else [TransportBudget(steps=0)]
        steps = config.eval_steps if len(budgets) == len(config.eval_steps) else (0,)
        if self.env is None:
            limit = 10**6 if config.env == "pendulum" and config.max_envs is None else config.max_envs
            self.env = make_vector_env(config.env, slots(agent, len(budgets), config.eval_episodes, limit), **env_options(config))
        result = evaluate(agent, config.env, self.env, budgets, config.eval_episodes)
        for row in score_rows(result, agent.updates, agent.seeds, steps):
            self._write("scores.csv", row)
        shown = ", ".join(f"L={k} {x:.1f}" for k, x in zip(steps, result.scores.mean((0, 2)), strict=True))
        self.say(f"{agent.updates} updates, mean score of {len(agent.seeds)} seeds: {shown}")

    def _save(self, buffer: ReplayBuffer | None) -> None:
        checkpoint = self.folder / "checkpoint"
        if buffer is not None:
            tensors = {}
            for s in range(len(self.agent.seeds)):
                rows = dict(buffer.own(s))
                if buffer.particles is not None:
                    rows["particles"] = buffer.particles[s, buffer.fixed : buffer.fixed + len(rows["obs"])]
                tensors.update({f"{s}.{name}": t.cpu().contiguous() for name, t in rows.items()})
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_file(tensors, checkpoint / "online.safetensors")
        self.agent.save(checkpoint)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.folder / name
        fields = list(row)
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                fields = next(csv.reader(file))
        if set(fields) != set(row):  # the behaviour's phase has other losses than the critic's
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            fields += [f for f in row if f not in fields]
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fields)
                writer.writeheader()
                writer.writerows(rows)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def close(self) -> None:
        """Close the environments of evaluation."""
        if self.env is not None:
            self.env.close()


def score_rows(result: Evaluation, updates: int, seeds: Sequence[int], steps: Sequence[int]) -> Iterator[dict[str, int | float]]:
    """One row per seed and budget: means over episodes."""
    for i, seed in enumerate(seeds):
        for k, step in enumerate(steps):
            yield {
                "updates": updates,
                "seed": seed,
                "test_steps": step,
                "score": float(result.scores[i, k].mean()),
                "return": float(result.returns[i, k].mean()),
                "success": float(result.successes[i, k].mean()),
                "length": float(result.lengths[i, k].mean()),
                "episodes": result.scores.shape[2],
            }


def load_agent(directory: str | Path, device: str = "cpu") -> Agent:
    """The agent of a checkpoint, as `Agent.save` or `train` wrote it.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, or a damaged one.
    """
    folder = Path(directory)
    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    if not (folder / "agent.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {directory}: agent.json is missing")
    header = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
    config = AgentConfig.from_dict(header["config"])
    agent = AGENTS[config.algorithm](header["obs_dim"], header["action_dim"], config, header["seeds"], device)
    try:
        agent.load_tensors(load_file(folder / "agent.safetensors"))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder / 'agent.safetensors'} cannot be read: {error}") from None
    return agent
