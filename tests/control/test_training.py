import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from vgf_llm.control import AgentConfig, OfflineDataset, TrainConfig, load_agent, train, training
from vgf_llm.control.pendulum import collect
from vgf_llm.control.plots import read_scores
from vgf_llm.flow import TransportBudget


STEP = TransportBudget(steps=1, step_size=0.1, normalize="none")
AGENT = AgentConfig(hidden=(16, 16), batch_size=16, num_particles=3, flow_matching_steps=2, train=STEP, test=STEP)
RUN = TrainConfig(
    env="pendulum", agent=AGENT, reward_scale=0.1, seeds=(0, 1), updates=12, eval_every=0, eval_episodes=2, eval_steps=(0, 1),
    log_every=4, save_every=4, device="cpu",
)  # fmt: skip


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def stop_after(monkeypatch):
    """Break a run off when it has saved at this number of updates."""

    def stop(updates):
        save = training.Log._save

        def save_and_stop(self, buffer):
            save(self, buffer)
            if self.agent.updates == updates:
                raise KeyboardInterrupt

        monkeypatch.setattr(training.Log, "_save", save_and_stop)

    return stop


@pytest.mark.parametrize("changes", [{}, {"behaviour_steps": 6}, {"n_step": 3}], ids=["joint", "frozen", "n-step"])
def test_a_run_that_was_broken_off_continues_exactly(changes, tmp_path, stop_after, monkeypatch):
    config = dataclasses.replace(RUN, agent=dataclasses.replace(AGENT, **changes))
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training.Log, "_save", training.Log._save)
        stop_after(8)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "broken")
        patch.undo()
    monkeypatch.undo()
    resumed = train(config, tmp_path / "broken", resume=True)
    assert resumed.updates == whole.updates == 12 + changes.get("behaviour_steps", 0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert rows(tmp_path / "whole" / "scores.csv") == rows(tmp_path / "broken" / "scores.csv")


@pytest.mark.parametrize("changes", [{}, {"behaviour_steps": 4, "n_step": 3}], ids=["joint", "frozen, n-step"])
def test_online_steps_fill_the_buffer_and_survive_a_resume(changes, tmp_path):
    agent = dataclasses.replace(AGENT, **changes)
    config = dataclasses.replace(RUN, agent=agent, online_steps=220, online_start=210, log_every=100, save_every=0)
    trained = train(config, tmp_path / "run")
    assert trained.updates == changes.get("behaviour_steps", 0) + 12 + 220
    saved = training.load_file(tmp_path / "run" / "checkpoint" / "online.safetensors")
    # Windows of n steps hold back their last n - 1, but for those of the episode that ended.
    assert len(saved["0.obs"]) == len(saved["1.obs"])
    assert 220 - 2 <= len(saved["0.obs"]) <= 220
    assert saved["0.rewards"].min() > -5
    assert not torch.equal(saved["0.obs"], saved["1.obs"])
    again = train(config, tmp_path / "run", resume=True)
    assert again.updates == trained.updates


def test_what_a_run_leaves(tmp_path):
    agent = train(dataclasses.replace(RUN, eval_every=6), tmp_path / "run")
    metrics, scores = rows(tmp_path / "run" / "metrics.csv"), rows(tmp_path / "run" / "scores.csv")
    assert [(r["updates"], r["seed"]) for r in metrics] == [(str(u), s) for u in (4, 8, 12) for s in "01"]
    assert float(metrics[0]["critic"]) > 0
    assert [(r["updates"], r["seed"], r["test_steps"]) for r in scores] == [
        (u, s, k) for u in ("6", "12") for s in "01" for k in "01"
    ]
    lengths = read_scores(tmp_path / "run" / "scores.csv", "length")
    assert lengths == {k: {6: [200.0, 200.0], 12: [200.0, 200.0]} for k in (0, 1)}
    loaded = load_agent(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(agent.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds a run already"):
        train(RUN, tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration"):
        train(dataclasses.replace(RUN, updates=50), tmp_path / "run", resume=True)


@pytest.mark.parametrize("algorithm", ["bc", "iql", "ifql", "fql"])
def test_baselines_run_through_the_same_door(algorithm, tmp_path):
    still = TransportBudget(steps=0)
    changes = {"algorithm": algorithm, "train": still, "test": STEP if algorithm == "ifql" else still}
    if algorithm != "ifql":
        changes["num_particles"] = 1
    if algorithm == "iql":
        changes["behaviour"] = "gaussian"
    train(dataclasses.replace(RUN, agent=dataclasses.replace(AGENT, **changes)), tmp_path / "run")
    assert {r["test_steps"] for r in rows(tmp_path / "run" / "scores.csv")} == ({"0", "1"} if algorithm == "ifql" else {"0"})


def test_losses_that_are_not_finite_stop_a_run(tmp_path, monkeypatch):
    data = collect(0)
    monkeypatch.setattr(training, "collect", lambda seed: dataclasses.replace(data, rewards=data.rewards * 1e38))
    with pytest.raises(ValueError, match="no longer finite after 4 updates"):
        train(RUN, tmp_path / "run")


def test_rewards_of_an_environment_that_are_not_finite_stop_a_run(tmp_path, monkeypatch):
    step = training.Collector.step
    monkeypatch.setattr(training.Collector, "step", lambda self: (setattr(self, "scale", float("nan")), step(self)))
    with pytest.raises(ValueError, match="'pendulum' returned a reward or an observation that is not finite"):
        train(dataclasses.replace(RUN, updates=1, online_steps=2, online_start=1), tmp_path / "run")


@pytest.mark.parametrize(("env", "sizes"), [("pendulum", "3 and 1"), ("Pendulum-v1", "3 and 1")])
def test_data_of_another_environment_are_refused_before_training(env, sizes, tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra vgf_llm[control]")
    pytest.importorskip("gymnasium", reason="needs the extra vgf_llm[control]")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, shape in (("observations", (9, 4)), ("actions", (9, 1)), ("rewards", (9,)), ("terminals", (9,))):
            file[name] = torch.zeros(shape).numpy()
    config = dataclasses.replace(RUN, env=env, dataset=str(tmp_path / "a.hdf5"))
    with pytest.raises(ValueError, match=f"size 4 and 1, '{env}' of size {sizes}: the data belong to another environment"):
        train(config, tmp_path / "run")


def test_data_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="name the data set"):
        training.load_dataset(TrainConfig(env="Hopper-v4"))
    ogbench = pytest.importorskip("ogbench", reason="needs the extra vgf_llm[control]")

    def unreachable(names, folder):
        raise OSError("host not found")

    monkeypatch.setattr(ogbench, "download_datasets", unreachable)
    with pytest.raises(ValueError, match="host not found.*vgf control generate --env cube-single-play --output"):
        training.fetch_ogbench("cube-single-play-singletask-task1-v0", tmp_path)
    (tmp_path / "scene-play-v0.npz").touch()
    assert training.fetch_ogbench("scene-play-singletask-v0", tmp_path).name == "scene-play-v0.npz"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"env": "pendulum", "updtes": 1}, "unknown TrainConfig field 'updtes'"),
        ({"env": "pendulum", "updates": -1}, "updates"),
        ({"env": "pendulum", "seeds": [1, 1]}, "different integers"),
        ({"env": "pendulum", "eval_steps": []}, "best-of-N"),
        ({"env": "pendulum", "online_share": 1.5}, "uniform draws"),
        ({"env": "pendulum", "success_timing": "never"}, "pre or post"),
        ({"env": "pendulum", "agent": {"rule": "sign"}}, "rule must be one of"),
    ],
)
def test_wrong_configurations(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)


def test_a_graph_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="CUDA graph needs a CUDA device"):
        train(dataclasses.replace(RUN, graph=True), tmp_path / "run")


def test_data_sets_share_one_shape():
    assert isinstance(training.load_dataset(RUN), OfflineDataset)


CONFIGS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "configs" / "control").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_one(path):
    config = TrainConfig.from_yaml(path)
    assert f"vgf control train --config recipes/configs/control/{path.name}\n" in path.read_text(encoding="utf-8")
    # An environment of any sort, and a data set that is known or named.
    assert config.env == "pendulum" or "singletask" in config.env or config.dataset


def test_the_authors_settings_are_all_there():
    assert len(CONFIGS) >= 15
    config = TrainConfig.from_yaml(CONFIGS[0].with_name("puzzle-3x3-play.yaml"))
    assert config.agent.amortised and config.agent.num_particles == 5
    assert (config.agent.train.steps, config.agent.train.step_size) == (5, 0.1)
    assert (config.updates, config.online_steps) == (1_000_000, 1_000_000)
