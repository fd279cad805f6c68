import dataclasses

import pytest
import torch

from vgf_llm.control import Agent, AgentConfig, Batch, VGFAgent, load_agent, networks
from vgf_llm.control.baselines import AGENTS
from vgf_llm.flow import TransportBudget, best_of_n


STILL = TransportBudget(steps=0)
STEP = TransportBudget(steps=2, step_size=0.1, normalize="none")
SMALL = {"hidden": (32, 32), "batch_size": 16, "num_particles": 5, "flow_matching_steps": 3, "train": STEP, "test": STEP}
SVGD = TransportBudget(steps=2, step_size=0.1, temperature=0.1, coupling="svgd", normalize="none")
VARIANTS = {
    "vgf": {},
    "normalized": {"rule": "normalized", "train": TransportBudget(steps=2), "test": TransportBudget(steps=2)},
    "svgd": {"train": SVGD, "test": SVGD},
    "public": {"rule": "public", "train": SVGD, "test": SVGD},
    "amortised": {"amortised": True, "max_grad_norm": 1.0},
    "gaussian": {"behaviour": "gaussian"},
    "anchored": {"anchor": 0.05, "target_reduce": "max", "critic_aggregate": "min"},
    "bf16": {"precision": "bf16"},
    "bc": {"algorithm": "bc", "num_particles": 1, "train": STILL, "test": STILL},
    "iql": {"algorithm": "iql", "num_particles": 1, "behaviour": "gaussian", "train": STILL, "test": STILL},
    "ifql": {"algorithm": "ifql"},
    "fql": {"algorithm": "fql", "num_particles": 1, "normalize_q": True, "train": STILL, "test": STILL},
}


def make(seeds=(0,), **changes) -> Agent:
    config = AgentConfig(**{**SMALL, **changes})
    return AGENTS[config.algorithm](3, 2, config, seeds=seeds)


def batch(S=1, B=16, particles=None):
    g = torch.Generator().manual_seed(7)
    one = Batch(
        obs=torch.randn(1, B, 3, generator=g),
        actions=torch.rand(1, B, 2, generator=g) * 2 - 1,
        rewards=torch.randn(1, B, generator=g),
        next_obs=torch.randn(1, B, 3, generator=g),
        discounts=torch.full((1, B), 0.9),
    )
    columns = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "particles"}
    return Batch(**{name: x.expand(S, *x.shape[1:]) for name, x in columns.items()}, particles=particles)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_its_losses_and_acts_in_range(name):
    agent = make(**VARIANTS[name])
    first = agent.update(batch())
    for _ in range(60):
        last = agent.update(batch())
    fitted = [k for k in ("critic", "gradient", "value") if k in first] or ["behaviour"]
    for key in fitted:
        assert last[key].item() < first[key].item(), key
    actions = agent.act(torch.randn(7, 3))
    assert actions.shape == (7, 2)
    assert actions.abs().max() <= 1


def test_zero_steps_is_best_of_n_bit_for_bit():
    agent = make()
    for _ in range(20):
        agent.update(batch())
    obs, noise = torch.randn(9, 3), torch.randn(9, 5, 2)
    with torch.no_grad():
        particles = agent.behaviour.sample(obs[None], noise[None])
        values = agent.critic(agent.critic.context(obs[None]), particles).mean(1)[0]
    chosen = particles[0, torch.arange(9), best_of_n(values)]
    assert torch.equal(agent.act(obs, STILL, noise=noise), chosen)


@pytest.mark.parametrize("name", ["vgf", "svgd", "amortised", "bf16", "ifql", "fql"])
def test_seeds_side_by_side_are_the_seeds_alone(name):
    together, alone = make(seeds=(3, 8), **VARIANTS[name]), make(seeds=(8,), **VARIANTS[name])
    for _ in range(3):
        both, one = together.update(batch(S=2)), alone.update(batch())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if name == "bf16" else {"rtol": 1e-3, "atol": 1e-4}
    for key, value in one.items():
        torch.testing.assert_close(both[key][1:], value, **tolerance)
    obs, noise = torch.randn(4, 3), torch.randn(4, alone.config.num_particles, 2)
    actions = together.act(obs.expand(2, -1, -1), noise=noise.expand(2, -1, -1, -1))
    torch.testing.assert_close(actions[1], alone.act(obs, noise=noise), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["vgf", "svgd"])  # not "public": its median is differentiated for one of a pair only
def test_the_order_of_particles_does_not_matter(name):
    agent = make(**VARIANTS[name])
    obs, particles = torch.randn(1, 6, 3), torch.rand(1, 6, 5, 2) * 2 - 1
    order = torch.randperm(5)
    moved = agent.carry(obs, particles, SVGD if name != "vgf" else STEP).particles
    shuffled = agent.carry(obs, particles[:, :, order], SVGD if name != "vgf" else STEP).particles
    torch.testing.assert_close(shuffled, moved[:, order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 2])
def test_the_average_of_the_critic_may_act(steps):
    agent, averaged = make(), make(acting_critic="target")
    for _ in range(20):
        agent.update(batch())
    averaged.load_state_dict(agent.state_dict())
    agent.critic.load_state_dict(agent.target_critic.state_dict())
    obs, noise, budget = torch.randn(30, 3), torch.randn(30, 5, 2), dataclasses.replace(STEP, steps=steps)
    assert torch.equal(averaged.act(obs, budget, noise=noise), agent.act(obs, budget, noise=noise))


def test_the_slope_that_is_fitted_is_that_of_the_critic():
    agent = make(**VARIANTS["amortised"])
    losses, _ = agent.losses(batch())
    actions = batch().actions.unsqueeze(2).requires_grad_()
    (slope,) = torch.autograd.grad(agent.critic(agent.critic.context(batch().obs), actions).mean(1).sum(), actions)
    fitted = agent.gradient(agent.gradient.context(batch().obs), actions.detach())
    torch.testing.assert_close(losses["gradient"], (fitted - slope).square().mean((1, 2, 3)))


def test_bfloat16_leaves_the_last_layers_alone_and_changes_targets_little():
    plain, fast = make(hidden=(256, 256)), make(hidden=(256, 256), precision="bf16")
    _, expected = plain.losses(batch())
    _, got = fast.losses(batch())
    torch.testing.assert_close(got["target"], expected["target"], rtol=0.02, atol=0.02)
    for net in fast._flow_networks():
        mlp = getattr(net, "net", net)
        assert mlp.weights[0].dtype == torch.bfloat16
        assert mlp.weights[-1].dtype == torch.float32


def test_one_state_does_not_depend_on_its_batch():
    agent = make()
    obs, noise = torch.randn(8, 3), torch.randn(8, 5, 2)
    torch.testing.assert_close(agent.act(obs[2:3], noise=noise[2:3]), agent.act(obs, noise=noise)[2:3])


def test_masks_stop_the_bootstrap():
    agent = make(num_critics=1)
    ended = dataclasses.replace(batch(), discounts=torch.zeros(1, 16))
    _, metrics = agent.losses(ended)
    torch.testing.assert_close(metrics["target"], ended.rewards.mean(1))


def test_the_target_passes_no_gradient():
    agent = make()
    losses, _ = agent.losses(batch())
    losses["critic"].sum().backward()
    assert all(p.grad is None for p in agent.target_critic.parameters())
    assert all(p.grad is None for p in agent.behaviour.parameters())
    assert all(p.grad is not None for p in agent.critic.parameters())


def test_the_target_critic_follows_the_critic_of_before_the_step():
    agent = make()
    before = [p.clone() for p in agent.critic.parameters()]
    target = [p.clone() for p in agent.target_critic.parameters()]
    agent.update(batch())
    for t, b, now in zip(target, before, agent.target_critic.parameters(), strict=True):
        torch.testing.assert_close(now, t + 0.005 * (b - t))


def test_transport_raises_the_value_and_stays_inside():
    agent = make()
    for _ in range(100):
        agent.update(batch())
    obs, particles = torch.randn(1, 50, 3), torch.rand(1, 50, 5, 2) * 2 - 1
    still = agent.carry(obs, particles, STILL)
    moved = agent.carry(obs, particles, dataclasses.replace(STEP, steps=3, step_size=0.05))
    assert (moved.values - still.values).mean() > 0
    assert moved.particles.abs().max() <= 1


def test_an_anchor_holds_particles_back():
    free, held = make(rule="normalized", seeds=(1,)), make(rule="normalized", anchor=1e-3, seeds=(1,))
    plain = TransportBudget(steps=5, step_size=0.05, normalize="none")
    obs, particles = torch.randn(1, 20, 3), torch.rand(1, 20, 5, 2) - 0.5
    far = (free.carry(obs, particles, plain).particles - particles[0]).norm(dim=-1).mean()
    anchored = TransportBudget(steps=5, step_size=1e-4, normalize="none")
    near = (held.carry(obs, particles, anchored).particles - particles[0]).norm(dim=-1).mean()
    assert near < 0.5 * far


@pytest.mark.parametrize("layer_norm", [False, True])
def test_wide_layers_member_by_member_are_the_batched_ones(layer_norm, monkeypatch):
    """Values and all gradients."""
    net = networks.StackedMLP(2, 3, 2, 4, (256, 256), layer_norm, networks.SeededNoise((0, 1)))
    obs = torch.randn(2, 30, 3)
    found = []
    for narrowest in (257, 256):
        monkeypatch.setattr(networks, "ONE_BY_ONE", narrowest)
        x = torch.linspace(-1, 1, 2 * 30 * 5 * 2).view(2, 30, 5, 2).requires_grad_()
        values = net(net.context(obs), x)
        found.append((values, *torch.autograd.grad(values.square().sum(), [x, *net.parameters()])))
    for batched, got in zip(*found, strict=True):
        torch.testing.assert_close(got, batched, rtol=1e-4, atol=1e-4)


def test_cached_particles_replace_the_behaviour_in_an_update():
    agent = make(behaviour_steps=1)
    before = [p.clone() for p in agent.behaviour.parameters()]
    agent.update(batch(particles=torch.rand(1, 16, 5, 2)))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.behaviour.parameters(), strict=True))
    assert isinstance(agent, VGFAgent)
    agent.update_behaviour(batch())
    assert not any(torch.equal(a, b) for a, b in zip(before, agent.behaviour.parameters(), strict=True))


@pytest.mark.parametrize("name", ["vgf", "amortised", "bf16", "iql", "fql"])
def test_two_updates_and_two_after_a_load_are_four(name, tmp_path):
    through, stopped = make(seeds=(0, 1), **VARIANTS[name]), make(seeds=(0, 1), **VARIANTS[name])
    for _ in range(2):
        through.update(batch(S=2))
        stopped.update(batch(S=2))
    stopped.save(tmp_path / "a")
    resumed = load_agent(tmp_path / "a")
    assert resumed.updates == 2
    assert resumed.config == stopped.config
    for _ in range(2):
        expected, got = through.update(batch(S=2)), resumed.update(batch(S=2))
    assert all(torch.equal(expected[k], got[k]) for k in expected)
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))


def test_damaged_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"agent\.json"):
        load_agent(tmp_path)
    make().save(tmp_path)
    whole = (tmp_path / "agent.safetensors").read_bytes()
    (tmp_path / "agent.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_agent(tmp_path)


def test_what_act_refuses():
    agent = make(seeds=(0, 1))
    with pytest.raises(ValueError, match=r"\[2, B, 3\]"):
        agent.act(torch.randn(4, 3))
    with pytest.raises(ValueError, match="got"):
        agent.act(torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match="nan"):
        agent.act(torch.full((2, 4, 3), torch.nan))
    with pytest.raises(ValueError, match="no critic"):
        make(**VARIANTS["bc"]).act(torch.randn(4, 3), STEP)


def test_selection():
    agent = make(select="softmax", select_temperature=1e-6)
    obs, noise = torch.randn(30, 3), torch.randn(30, 5, 2)
    assert torch.equal(agent.act(obs, noise=noise), make().act(obs, noise=noise))
    uniform = make(select="random").act(obs, noise=noise)
    assert not torch.equal(uniform, make().act(obs, noise=noise))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "sac"}, "algorithm must be one of"),
        ({"hidden": []}, "hidden"),
        ({"batch_size": 0}, "batch_size"),
        ({"discount": 1.5}, "discount"),
        ({"expectile": 1.0}, "expectile"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"algorithm": "bc"}, "single proposal"),
        ({"algorithm": "iql", "num_particles": 1}, "Gaussian"),
        ({"algorithm": "ifql", "behaviour": "gaussian"}, "flow"),
        ({"algorithm": "ifql", "amortised": True}, "belong to algorithm='vgf'"),
        ({"rule": "public"}, "positive temperature"),
        ({"amortised": True, "test": {"coupling": "svgd"}}, "no kernel"),
        ({"train": {"lenght": 1}}, "unknown TransportBudget field 'lenght'"),
        ({"train": 3}, "mapping"),
        ({"particles": 3}, "unknown AgentConfig field 'particles'"),
    ],
)
def test_wrong_configurations_say_what_to_do(values, message):
    with pytest.raises(ValueError, match=message):
        AgentConfig.from_dict(values)


def test_a_configuration_survives_plain_values():
    config = AgentConfig(**SMALL, n_step=3, rule="adam")
    assert AgentConfig.from_dict(dataclasses.asdict(config)) == config
