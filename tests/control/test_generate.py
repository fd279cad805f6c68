"""Generated OGBench sets: reproducible, resumable, of OGBench's format, and good enough to learn from."""

import dataclasses
import json

import numpy as np
import pytest


pytest.importorskip("ogbench", reason="needs the extra vgf_llm[control]")

from vgf_llm.control import AgentConfig, OfflineDataset, ReplayBuffer, evaluate, make_env, make_vector_env
from vgf_llm.control.baselines import AGENTS
from vgf_llm.control.datasets import read_npz
from vgf_llm.control.evaluation import slots
from vgf_llm.control.generate import generate, recipe
from vgf_llm.flow import TransportBudget


# What headless rendering and OGBench's own spaces warn about is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
MAZE = "pointmaze-medium-navigate-singletask-task3-v0"


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    """The file of 50 episodes in a point maze, and its manifest."""
    path = tmp_path_factory.mktemp("data") / "pointmaze-medium-navigate-v0.npz"
    return path, generate("pointmaze-medium-navigate", path, episodes=50, processes=1)


def test_a_maze_set_has_ogbenchs_format(maze):
    path, manifest = maze
    columns = read_npz(path, ("observations", "actions", "terminals", "qpos", "qvel"))
    assert columns["observations"].shape == (50 * 1001, 2)
    assert columns["terminals"].nonzero()[0].tolist() == [1001 * (i + 1) - 1 for i in range(50)]
    assert len(read_npz(path.with_name("pointmaze-medium-navigate-v0-val.npz"), ())["actions"]) == 5 * 1001
    assert manifest == json.loads(path.with_suffix(".json").read_text())
    assert manifest["transitions"] == 50_000
    assert not path.with_suffix(".parts").exists()
    with pytest.raises(ValueError, match="exists"):
        generate("pointmaze-medium-navigate", path)


def test_rewards_are_ogbenchs(maze):
    path, _ = maze
    import ogbench

    env = make_env(MAZE)
    _, theirs, _ = ogbench.make_env_and_datasets(MAZE, dataset_path=str(path))
    ours = OfflineDataset.from_ogbench_npz(path, env)
    for mine, column in (
        (ours.obs, "observations"), (ours.next_obs, "next_observations"), (ours.rewards, "rewards"), (ours.masks, "masks"),
    ):  # fmt: skip
        np.testing.assert_array_equal(mine.numpy(), theirs[column])
    np.testing.assert_array_equal(ours.ends.numpy(), theirs["terminals"].astype(bool))
    later = OfflineDataset.from_ogbench_npz(path, make_env(MAZE, success_timing="post"))
    inside = ~ours.ends[:-1]
    # Judged after the step, a reward is the one that is judged before the next step.
    np.testing.assert_array_equal(later.rewards[:-1][inside], ours.rewards[1:][inside])


def test_files_that_are_broken_or_of_another_task(maze, tmp_path):
    path, _ = maze
    env = make_env(MAZE)
    with pytest.raises(FileNotFoundError, match="vgf control generate"):
        OfflineDataset.from_ogbench_npz(tmp_path / "absent.npz", env)
    (tmp_path / "half.npz").write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"no complete \.npz file"):
        OfflineDataset.from_ogbench_npz(tmp_path / "half.npz", env)
    columns = read_npz(path, ())
    cut = {name: column[:500] for name, column in columns.items()}
    for change, message in (
        ({k: v for k, v in cut.items() if k != "qpos"}, "lacks qpos"),
        (cut, "last trajectory is cut off"),
        ({**cut, "observations": cut["observations"][:, :1]}, "belongs to another environment"),
        ({**cut, "actions": cut["actions"][:, :1]}, "belongs to another environment"),
        ({**cut, "actions": cut["actions"][:-1]}, "columns differ in length"),
    ):
        np.savez(tmp_path / "bad.npz", **change)
        with pytest.raises(ValueError, match=message):
            OfflineDataset.from_ogbench_npz(tmp_path / "bad.npz", env)


def test_a_set_is_the_same_on_any_number_of_processes_and_after_a_break(tmp_path):
    name, sizes = "pointmaze-medium-navigate", {"episodes": 10, "rows": 21, "seed": 4}
    alone = generate(name, tmp_path / "a.npz", processes=1, **sizes)
    # Broken off: some episodes are there already.
    generate(name, tmp_path / "b.npz", processes=1, **sizes)
    parts = tmp_path / "c.parts"
    parts.mkdir()
    arguments = {key: alone[key] for key in ("name", "episodes", "rows", "seed", "versions")}
    (parts / "arguments.json").write_text(json.dumps(arguments))
    first = {k: v[:21] for k, v in read_npz(tmp_path / "b.npz", ()).items()}
    np.savez(parts / "0.npz", **first)
    both = generate(name, tmp_path / "c.npz", processes=2, **sizes)
    assert alone["a.npz"] == both["c.npz"]
    assert alone["a-val.npz"] == both["c-val.npz"]
    other = generate(name, tmp_path / "d.npz", processes=1, **{**sizes, "seed": 5})
    assert other["d.npz"] != alone["a.npz"]


def test_parts_of_other_arguments_are_refused(tmp_path):
    (tmp_path / "a.parts").mkdir()
    (tmp_path / "a.parts" / "arguments.json").write_text("{}")
    with pytest.raises(ValueError, match="other arguments"):
        generate("pointmaze-medium-navigate", tmp_path / "a.npz", episodes=1, rows=5)


@pytest.mark.parametrize(
    "name", ["cube-single-play", "cube-double-noisy", "scene-play", "scene-noisy", "puzzle-3x3-play", "puzzle-3x3-noisy"]
)
def test_arms_of_every_kind(name, tmp_path):
    path = tmp_path / "a.npz"
    generate(name, path, episodes=1, rows=41, processes=1)
    data = OfflineDataset.from_ogbench_npz(path, make_env(f"{name}-singletask-v0"))
    assert len(data) == 40
    assert data.action_dim == 5
    assert data.rewards.max() <= 0
    assert data.actions.std() > 0.05


@pytest.mark.parametrize(
    ("name", "message"),
    [("antmaze-large-navigate", "trained experts"), ("cube-single-fast", "cannot generate"), ("hopper", "cannot generate")],
)
def test_sets_that_cannot_be_generated(name, message):
    with pytest.raises(ValueError, match=message):
        recipe(name)


@pytest.mark.slow
def test_a_maze_is_solved_from_generated_data_where_cloning_fails(maze):
    path, _ = maze
    still = TransportBudget(steps=0)
    flow = TransportBudget(steps=3, step_size=0.3, normalize="none")
    config = AgentConfig(
        hidden=(64, 64), num_particles=2, flow_matching_steps=3, learning_rate=1e-3, target_rate=0.05, n_step=5,
        train=flow, test=still,
    )  # fmt: skip
    cloning = dataclasses.replace(config, algorithm="bc", num_particles=1, train=still, test=still)
    data = OfflineDataset.from_ogbench_npz(path, make_env(MAZE)).rescaled(0.1)
    success = {}
    for name, agent_config, updates in (("bc", cloning, 1000), ("vgf", config, 3500)):
        agent = AGENTS[agent_config.algorithm](2, 2, agent_config)
        buffer = ReplayBuffer(data.n_step(5, 0.99))
        for _ in range(updates):
            agent.update(buffer.sample(256, agent.noise))
        env = make_vector_env(MAZE, slots(agent, 1, 5, 5), processes=False)
        success[name] = evaluate(agent, MAZE, env, [agent_config.test], 5).scores.mean()
        env.close()
    assert success["vgf"] >= 80, success
    assert success["vgf"] > success["bc"] + 50, success
