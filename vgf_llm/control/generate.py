"""OGBench data sets that need no trained expert, generated here: cubes, scene, puzzles and point mazes.

Same environments, oracles and settings as the published sets, and the same distribution, but not the same numbers: the
published ones were made without fixed seeds. Here each episode depends on the seed and its index alone, so that a set comes
out the same on any number of processes and can be resumed.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


Episode = dict[str, NDArray[Any]]
COLUMNS = {"observations": np.float32, "actions": np.float32, "terminals": bool, "qpos": np.float32, "qvel": np.float32}
# Range of the probability that a cube is put on another one, by number of cubes.
STACKING = {"single": (0.0, 0.0), "double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
# Scale of the oracle's Gaussian noise in the five action dimensions of the arm (noisy sets).
ARM_NOISE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])


@dataclass(frozen=True)
class Recipe:
    """What a data set is made with: `cube-double-play` is family `cube`, environment `cube-double-v0`, kind `play`."""

    name: str
    family: str
    env: str
    kind: str

    @property
    def rows(self) -> int:
        """Rows of an episode: one more than its transitions."""
        return 2001 if "giant" in self.env else 1001

    @property
    def random_actions(self) -> float:
        """Probability that an action of a noisy set is uniform."""
        return {"cube": 0.1, "scene": 0.1, "puzzle": 0.2}.get(self.family, 0.0) if self.kind == "noisy" else 0.0


def recipe(name: str) -> Recipe:
    """The recipe of a data set's name, with or without `-v0`.

    Raises:
        ValueError: a set that cannot be generated without a trained expert, or an unknown one.
    """
    words = name.removesuffix("-v0").split("-")
    family, kind = words[0], words[-1]
    if family in ("antmaze", "humanoidmaze", "antsoccer"):
        raise ValueError(
            f"{name} was made by trained experts: download it from https://rail.eecs.berkeley.edu/datasets/ogbench/. Without "
            "an expert cube, scene, puzzle and pointmaze can be generated"
        )
    kinds = {"cube": ("play", "noisy"), "scene": ("play", "noisy"), "puzzle": ("play", "noisy"), "pointmaze": ("navigate",)}
    if family not in kinds or kind not in kinds[family] or len(words) < 2:
        known = ", ".join(f"{f}-...-{'/'.join(k)}" for f, k in kinds.items())
        raise ValueError(f"cannot generate {name!r}; known are {known}, such as cube-double-play")
    return Recipe("-".join(words), family, "-".join([*words[:-1], "v0"]), kind)


def play(env: Any, plan: Recipe, seed: int, index: int) -> Episode:
    """One episode, decided by seed and index alone."""
    attempt = 0
    while True:  # a scene in which the cube got out of sight is played again, from another seed
        words = np.random.SeedSequence([seed, index, attempt]).generate_state(2)
        np.random.seed(words[0])
        draws = np.random.default_rng(words)
        start = int(words[1])
        episode = _navigate(env, draws, start) if plan.family == "pointmaze" else _manipulate(env, plan, draws, start)
        if plan.family != "scene" or _in_sight(episode["qpos"]):
            return episode
        attempt += 1


def _in_sight(qpos: NDArray[Any]) -> bool:
    """Whether the cube neither left to the right, nor to the left other than into the drawer."""
    y, z = qpos[:, 15], qpos[:, 16]
    return not ((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any()


def _record(env: Any, obs: Any, choose: Callable[[Any, Any], Any], after: Callable[[Any], None], info: Any) -> Episode:
    """Play to the end; `choose(obs, info)` gives the action, `after(info)` may set a new goal once it was taken."""
    rows: dict[str, list[Any]] = {}
    done = False
    while not done:
        action = np.clip(choose(obs, info), -1, 1)
        next_obs, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        after(info)
        row = {"observations": obs, "actions": action, "terminals": done, "qpos": info["prev_qpos"], "qvel": info["prev_qvel"]}
        if "prev_button_states" in info:
            row["button_states"] = info["prev_button_states"]
        for name, value in row.items():
            rows.setdefault(name, []).append(np.array(value))
        obs = next_obs
    return {name: np.array(column, dtype=COLUMNS.get(name, np.int64)) for name, column in rows.items()}


def _navigate(env: Any, draws: np.random.Generator, start: int) -> Episode:
    """From goal to goal through a maze; the action is the direction of the shortest path, with noise 0.5."""
    maze = env.unwrapped
    free = np.argwhere(maze.maze_map == 0)
    blocked = maze.maze_map != 0
    vertical = [(blocked[i - 1, j], blocked[i + 1, j]) for i, j in free]
    horizontal = [(blocked[i, j - 1], blocked[i, j + 1]) for i, j in free]
    corridor = [{v, h} == {(True, True), (False, False)} for v, h in zip(vertical, horizontal, strict=True)]
    goals = free[~np.array(corridor)]  # corners, crossings and dead ends

    def pick(cells: NDArray[Any]) -> tuple[int, int]:
        i, j = cells[draws.integers(len(cells))]
        return int(i), int(j)

    def towards_goal(obs: Any, info: Any) -> Any:
        subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
        direction = subgoal - maze.get_xy()
        return direction / (np.linalg.norm(direction) + 1e-6) + 0.5 * draws.standard_normal(2)

    def next_goal(info: Any) -> None:
        if info["success"]:
            maze.set_goal(pick(goals))

    obs, info = env.reset(seed=start, options={"task_info": {"init_ij": pick(free), "goal_ij": pick(goals)}})
    return _record(env, obs, towards_goal, next_goal, info)


def _manipulate(env: Any, plan: Recipe, draws: np.random.Generator, start: int) -> Episode:
    """From task to task with OGBench's scripted arm: planned with smooth noise (play), or reactive with white noise."""
    noisy = plan.kind == "noisy"
    arm = env.unwrapped
    oracles = _oracles(env, plan)
    obs, info = env.reset(seed=start)
    env.action_space.seed(start)
    size = plan.env.split("-")[1]
    stacking = draws.uniform(*STACKING[size]) if size in STACKING else 0.5
    scale = draws.uniform(0, 0.1) * ARM_NOISE
    current = oracles[info["privileged/target_task"]]
    current.reset(obs, info)

    def oracle_action(obs: Any, info: Any) -> Any:
        if draws.random() < plan.random_actions:
            return env.action_space.sample()
        action = np.array(current.select_action(obs, info))
        return action + scale * draws.standard_normal(5) if noisy else action

    def next_task(info: Any) -> None:
        nonlocal current
        if current.done:
            seen, told = arm.set_new_target(p_stack=stacking)
            current = oracles[told["privileged/target_task"]]
            current.reset(seen, told)

    return _record(env, obs, oracle_action, next_task, info)


def _oracles(env: Any, plan: Recipe) -> dict[str, Any]:
    """OGBench's scripted policies by the task they solve, with the published settings."""
    shut = {"gripper_always_closed": True} if plan.family == "puzzle" else {}
    if plan.kind == "play":
        from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

        smooth = {"env": env, "noise": 0.1, "noise_smoothing": 0.5}
        makers: dict[str, Callable[[], Any]] = {
            "cube": lambda: cube_plan.CubePlanOracle(**smooth),
            "button": lambda: button_plan.ButtonPlanOracle(**smooth, **shut),
            "drawer": lambda: drawer_plan.DrawerPlanOracle(**smooth),
            "window": lambda: window_plan.WindowPlanOracle(**smooth),
        }
    else:
        from ogbench.manipspace.oracles.markov import button_markov, cube_markov, drawer_markov, window_markov

        least = {"env": env, "min_norm": 0.4}
        patience = {"max_step": 100} if plan.family == "scene" else {}
        makers = {
            "cube": lambda: cube_markov.CubeMarkovOracle(**least, **patience),
            "button": lambda: button_markov.ButtonMarkovOracle(**least, **shut),
            "drawer": lambda: drawer_markov.DrawerMarkovOracle(**least),
            "window": lambda: window_markov.WindowMarkovOracle(**least),
        }
    tasks = {"cube": ("cube",), "puzzle": ("button",), "scene": ("cube", "button", "drawer", "window")}[plan.family]
    return {task: makers[task]() for task in tasks}


def _make(plan: Recipe, rows: int) -> Any:
    try:
        import gymnasium
        import ogbench  # noqa: F401  registers the environments
    except ImportError as error:
        raise ValueError(f"generating {plan.name} needs {error.name}: pip install 'vgf_llm[control]'") from None
    mode: dict[str, Any] = {} if plan.family == "pointmaze" else {"mode": "data_collection"}
    try:
        return gymnasium.make(plan.env, terminate_at_goal=False, max_episode_steps=rows, **mode)
    except gymnasium.error.Error as error:
        raise ValueError(f"OGBench has no environment {plan.env!r}: {error}") from None


def _play_some(plan: Recipe, rows: int, seed: int, indices: list[int], parts: Path) -> None:
    """Work of one process: these episodes, each into a file of its own."""
    env = _make(plan, rows)
    for index in indices:
        partial = parts / f"{index}.partial.npz"
        np.savez(partial, **play(env, plan, seed, index))  # type: ignore[arg-type,unused-ignore]
        partial.replace(parts / f"{index}.npz")
    env.close()


def generate(
    name: str,
    output: str | Path,
    episodes: int = 1000,
    seed: int = 0,
    processes: int | None = None,
    rows: int | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Generate a data set, and a tenth of its size for validation, in OGBench's format.

    Episodes are kept one by one in `<output>.parts` until all are there: a second call with the same arguments continues.

    Args:
        name: such as `cube-double-play`, `puzzle-3x3-noisy`, `scene-play`, `pointmaze-medium-navigate`.
        output: `.npz`; validation goes to `-val.npz` and the manifest to `.json` beside it.
        episodes: of the training set. 1000 in the published sets of 1M transitions.
        seed: of everything.
        processes: default: one per core.
        rows: of an episode, one more than its transitions. Default: that of the published set.
        say: told about progress, such as `print`.

    Returns:
        the manifest: name, episodes, rows, seed, versions, transitions, SHA-256 of both files.

    Raises:
        ValueError: an unknown name, packages missing, or `output` or its parts belong to other arguments.
    """
    plan = recipe(name)
    output = Path(output).expanduser()
    if output.suffix != ".npz":
        raise ValueError(f"output must end in .npz, got {output.name!r}")
    if episodes < 1 or (processes is not None and processes < 1) or (rows is not None and rows < 2):
        raise ValueError("need at least one episode, one process and two rows")
    rows = rows or plan.rows
    _make(plan, rows).close()
    versions = {p: importlib.metadata.version(p) for p in ("ogbench", "mujoco", "gymnasium", "numpy")}
    wanted = {"name": plan.name, "episodes": episodes, "rows": rows, "seed": seed, "versions": versions}
    manifest_path, parts = output.with_suffix(".json"), output.with_suffix(".parts")
    if output.exists():
        raise ValueError(f"{output} exists: remove it to generate it anew")
    parts.mkdir(parents=True, exist_ok=True)
    described = parts / "arguments.json"
    if described.exists() and json.loads(described.read_text(encoding="utf-8")) != wanted:
        raise ValueError(f"{parts} holds episodes of other arguments or versions: remove it to start anew")
    described.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    total = episodes + episodes // 10
    missing = [i for i in range(total) if not (parts / f"{i}.npz").exists()]
    workers = max(1, min(processes or os.cpu_count() or 1, len(missing)))
    # Several tasks per process, so that progress is seen and one slow episode does not hold up the end.
    size = max(1, -(-len(missing) // (8 * workers)))
    chunks = [missing[i : i + size] for i in range(0, len(missing), size)]
    if workers == 1:
        for chunk in chunks:
            _play_some(plan, rows, seed, chunk, parts)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(_play_some, plan, rows, seed, chunk, parts) for chunk in chunks]
            for count, job in enumerate(jobs, 1):
                job.result()
                if say:
                    say(f"{plan.name}: {count} of {len(jobs)} parts")
    validation = output.with_name(f"{output.stem}-val.npz")
    manifest: dict[str, Any] = {**wanted, "transitions": episodes * (rows - 1)}
    for path, indices in ((validation, range(episodes, total)), (output, range(episodes))):
        if indices:
            manifest[path.name] = _join(parts, indices, path)
    manifest_path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(parts)
    return manifest


def _join(parts: Path, indices: range, path: Path) -> str:
    """Write the episodes one after another; SHA-256 of the columns' contents, which does not depend on the compression."""
    episodes = [np.load(parts / f"{i}.npz") for i in indices]
    columns: dict[str, Any] = {name: np.concatenate([e[name] for e in episodes]) for name in episodes[0]}
    partial = path.with_name(f".{path.stem}.partial.npz")
    np.savez_compressed(partial, **columns)
    partial.replace(path)
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
