"""Known tasks are learned past a threshold, and the budget does what it is there for."""

import dataclasses

import pytest
import torch

from vgf_llm.control import AgentConfig, Batch, TrainConfig, VGFAgent, evaluate, train
from vgf_llm.control.baselines import AGENTS
from vgf_llm.control.datasets import ReplayBuffer
from vgf_llm.control.pendulum import PendulumVectorEnv, collect
from vgf_llm.control.plots import read_scores
from vgf_llm.flow import TransportBudget


OFFLINE = 1000  # updates
STILL = TransportBudget(steps=0)
PENDULUM = AgentConfig(
    hidden=(64, 64),
    batch_size=64,
    num_particles=4,
    flow_matching_steps=5,
    discount=0.97,
    learning_rate=2e-3,
    target_rate=0.015,
    train=TransportBudget(steps=2, step_size=0.1, normalize="none"),
    acting_critic="target",
    explore=TransportBudget(steps=2, step_size=0.1, normalize="none"),
    test=TransportBudget(steps=3, step_size=0.1, normalize="none"),
)


def true_reward(actions):
    """Bumps of height 1 at (.55, .55) and .8 at (-.55, .45), of width .25, just outside of the logged actions."""
    peaks, heights = torch.tensor([[0.55, 0.55], [-0.55, 0.45]]), torch.tensor([1.0, 0.8])
    return (heights * torch.exp(-(actions.unsqueeze(-2) - peaks).square().sum(-1) / (2 * 0.25**2))).amax(-1)


def test_bandit_an_inverted_u_in_the_budget():
    """Three agents side by side: a few steps beat best-of-200, too many follow the critic's errors."""
    step = TransportBudget(steps=0, step_size=0.05, normalize="none")
    config = AgentConfig(hidden=(64, 64), batch_size=128, learning_rate=1e-3, num_particles=10, train=step, test=step)
    seeds = (0, 1, 2)
    agent = VGFAgent(1, 2, config, seeds=seeds)
    centres = torch.tensor([[0.25, 0.20], [-0.30, 0.10]])
    actions = (centres[torch.randint(2, (3, 2000))] + 0.12 * torch.randn(3, 2000, 2)).clamp(-1, 1)
    rewards = true_reward(actions) + 0.05 * torch.randn(3, 2000)
    state = torch.zeros(3, 128, 1)
    pick = torch.arange(3)[:, None]
    for _ in range(1500):
        rows = torch.randint(2000, (3, 128))
        # One step and the task has ended: the critic learns the reward, and what it would bootstrap from does not matter.
        ended = torch.zeros(3, 128)
        batch = Batch(state, actions[pick, rows], rewards[pick, rows], state, ended, particles=torch.zeros(3, 128, 1, 2))
        agent.update_behaviour(batch)
        agent.update(batch)

    draws = 100
    obs = torch.zeros(3, draws, 1)
    noise = torch.randn(3, draws, 200, 2)
    with torch.no_grad():
        pool = agent.behaviour.sample(obs, noise)
    earned = {"best-of-200": true_reward(agent.act(obs, STILL, particles=pool)).mean(1)}
    believed = {}
    for steps in (0, 5, 40):
        budget = dataclasses.replace(step, steps=steps)
        earned[steps] = true_reward(agent.act(obs, budget, noise=noise[:, :, :10])).mean(1)
        believed[steps] = agent.carry(obs, pool[:, :, :10], budget).values.mean()
    assert (earned[5] > earned["best-of-200"] + 0.1).all(), earned
    assert (earned["best-of-200"] > earned[0]).all(), earned
    assert (earned[40] < earned[5] - 0.3).all(), earned
    assert believed[40] > believed[5] > believed[0]


@pytest.fixture(scope="module")
def swing_up(tmp_path_factory):
    """Two seeds of VGF on logged swings and then online: `scores[L_test][updates]`, means of 20 episodes for each seed."""
    config = TrainConfig(
        env="pendulum", agent=PENDULUM, reward_scale=0.1, seeds=(0, 1), updates=OFFLINE, online_steps=200, online_start=200,
        online_share=0.5, log_every=200, eval_every=0, eval_episodes=20, eval_steps=(0, 3), save_every=0, device="cpu",
    )  # fmt: skip
    run = tmp_path_factory.mktemp("swing_up") / "run"
    train(config, run)
    curves = read_scores(run / "scores.csv")
    return {steps: {updates: torch.tensor(seeds) for updates, seeds in curve.items()} for steps, curve in curves.items()}


def test_pendulum_from_logged_data(swing_up):
    best_of_n, flow = swing_up[0][OFFLINE], swing_up[3][OFFLINE]
    assert (flow >= -230).all(), flow
    assert (flow > best_of_n).all(), (flow, best_of_n)
    logged = collect(0).rewards.view(200, 200).sum(1)
    assert flow.mean() > logged[100:].mean()  # better than the scripted half


def test_pendulum_goes_on_online_without_a_drop(swing_up):
    """Two hundred updates after the switch; where it ends after thousands is for benchmarks.control_tasks."""
    for curve in swing_up.values():
        assert list(curve) == [OFFLINE, OFFLINE + 200], swing_up
        assert curve[OFFLINE + 200].mean() > curve[OFFLINE].mean() - 20, swing_up


def test_pendulum_baselines(swing_up):
    """What stays within the behaviour falls behind, on the same networks and data."""
    config = dataclasses.replace(PENDULUM, algorithm="bc", num_particles=1, train=STILL, explore=STILL, test=STILL)
    agent = AGENTS["bc"](3, 1, config, seeds=(0, 1))
    buffer = ReplayBuffer(collect(0).n_step(1, 0.97), seeds=2)
    for _ in range(500):
        agent.update(buffer.sample(config.batch_size, agent.noise))
    cloned = evaluate(agent, "pendulum", PendulumVectorEnv(40), [STILL], 20)
    assert cloned.returns.mean() < swing_up[0][OFFLINE].mean() - 300
