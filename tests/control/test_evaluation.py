import dataclasses

import numpy as np
import pytest
import torch

from vgf_llm.control import AgentConfig, VGFAgent, diagnose, evaluate, make_env, make_vector_env, record_video
from vgf_llm.control.environments import score
from vgf_llm.control.pendulum import PendulumVectorEnv
from vgf_llm.flow import TransportBudget


STEP = TransportBudget(steps=1, step_size=0.1, normalize="none")
BUDGETS = [dataclasses.replace(STEP, steps=k) for k in (0, 2)]


@pytest.fixture(scope="module")
def agent():
    config = AgentConfig(hidden=(16, 16), num_particles=3, flow_matching_steps=2, train=STEP, test=STEP)
    return VGFAgent(3, 1, config, seeds=(0, 1))


def test_many_at_once_are_one_after_another(agent):
    together = evaluate(agent, "pendulum", PendulumVectorEnv(2 * 2 * 5), BUDGETS, 5, seed=3)
    waves = evaluate(agent, "pendulum", PendulumVectorEnv(2 * 2 * 2), BUDGETS, 5, seed=3)
    np.testing.assert_allclose(together.returns, waves.returns, rtol=1e-3)
    assert (together.lengths == 200).all()
    assert together.returns.shape == (2, 2, 5)


def test_budgets_start_from_the_same_resets_and_particles(agent):
    twice = evaluate(agent, "pendulum", PendulumVectorEnv(2 * 2 * 4), [BUDGETS[1], BUDGETS[1]], 4)
    np.testing.assert_array_equal(twice.returns[:, 0], twice.returns[:, 1])
    alone = evaluate(agent, "pendulum", PendulumVectorEnv(2 * 1 * 4), [BUDGETS[1]], 4)
    np.testing.assert_allclose(alone.returns[:, 0], twice.returns[:, 0], rtol=1e-3)


def test_environments_that_cannot_be_shared(agent):
    with pytest.raises(ValueError, match="5 environments cannot be shared by 2 seeds and 2 budgets"):
        evaluate(agent, "pendulum", PendulumVectorEnv(5), BUDGETS, 4)


def test_our_pendulum_is_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium", reason="needs the extra vgf_llm[control]")
    theirs, ours = gymnasium.make("Pendulum-v1"), PendulumVectorEnv(1)
    theirs.reset(seed=0)
    ours.reset(seed=[0])
    ours.angle[0], ours.speed[0] = theirs.unwrapped.state
    for t in range(200):
        action = np.array([np.sin(t)], dtype=np.float32)
        a, r, _, done, _ = theirs.step(2 * action)
        b, reward, _, ended, _ = ours.step(action[None])
        np.testing.assert_allclose(a, b[0], atol=1e-4)
        assert reward[0] == pytest.approx(r, abs=1e-4)
        assert ended[0] == done


def test_environments_in_processes(agent):
    pytest.importorskip("gymnasium", reason="needs the extra vgf_llm[control]")
    results = []
    for processes in (True, False):
        env = make_vector_env("Pendulum-v1", 2, processes=processes)
        results.append(evaluate(agent, "Pendulum-v1", env, BUDGETS[1:], 2, seed=5).returns)
        env.close()
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3)


def test_environments_that_do_not_exist():
    pytest.importorskip("gymnasium", reason="needs the extra vgf_llm[control]")
    with pytest.raises(ValueError, match="no environment 'Nowhere-v0'"):
        make_env("Nowhere-v0")
    with pytest.raises(ValueError, match="no bounded continuous actions"):
        make_env("CartPole-v1")


def test_environments_without_packages(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ValueError, match=r"pip install 'vgf_llm\[control\]'"):
        make_env("Pendulum-v1")


def test_scores():
    nothing = np.full(2, np.nan)
    assert score("cube-single-play-singletask-v0", np.array([-5.0, 0]), np.array([0.0, 1])).tolist() == [0, 100]
    assert score("Hopper-v4", np.array([-20.272305, 3234.3]), nothing) == pytest.approx([0, 100])
    assert score("pendulum", np.array([-3.0, -2]), nothing).tolist() == [-3, -2]


def test_what_budgets_do_to_particles(agent):
    rows = diagnose(agent, torch.randn(20, 3), [TransportBudget(steps=0), *BUDGETS[1:], dataclasses.replace(STEP, steps=9)])
    assert rows[0]["gain"] == rows[0]["displacement"] == 0
    assert rows[0]["mmd2"] == pytest.approx(0, abs=1e-9)
    assert 0 < rows[1]["gain"] < rows[2]["gain"]
    assert rows[1]["mmd2"] < rows[2]["mmd2"]
    assert 0 < rows[1]["largest_share"] <= 1.02


def test_videos(agent, tmp_path):
    with pytest.raises(ValueError, match=r"\.gif or an \.mp4"):
        record_video(lambda obs: obs, "pendulum", tmp_path / "a.avi")
    pytest.importorskip("pygame", reason="Gymnasium's pendulum is drawn by pygame")
    path = record_video(lambda obs: torch.zeros(1, 1), "pendulum", tmp_path / "a.gif")
    assert path.stat().st_size > 1000
