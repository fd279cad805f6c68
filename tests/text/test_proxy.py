"""Where the gradient is taken, and what a displacement says for each token."""

import pytest
import torch

from vgf_llm.text.decode import BaseDistribution
from vgf_llm.text.proxy import evaluation_points, token_advantages


R, T, V, D = 3, 4, 7, 5


@pytest.fixture
def world():
    table = torch.randn(V, D)
    ids = torch.randint(V, (R, T))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    log_mu = BaseDistribution(top_k=5).log_probs(2 * torch.randn(R, T, V))
    return table, table[ids], log_mu, mask


def test_token_takes_the_gradient_where_the_particle_is(world):
    table, tokens, log_mu, mask = world
    particles = tokens + 0.1 * torch.randn_like(tokens)
    assert torch.equal(evaluation_points(particles, tokens, log_mu.exp() @ table, mask, "token", 2, 5), particles)


def test_mixture_puts_an_unmoved_particle_on_the_mean_embedding_under_mu(world):
    table, tokens, log_mu, mask = world
    expected = sum(log_mu.exp()[..., v, None] * table[v] for v in range(V))
    for step in (0, 3):
        points = evaluation_points(tokens, tokens, log_mu.exp() @ table, mask, "mixture", step, 5)
        torch.testing.assert_close(points[mask], expected[mask])


def test_a_displacement_is_carried_along_and_masked_positions_stay(world):
    table, tokens, log_mu, mask = world
    moved = tokens + torch.randn_like(tokens)
    for at in ("mixture", "path"):
        unmoved = evaluation_points(tokens, tokens, log_mu.exp() @ table, mask, at, 1, 4)
        points = evaluation_points(moved, tokens, log_mu.exp() @ table, mask, at, 1, 4)
        torch.testing.assert_close(points - moved, unmoved - tokens)
        assert torch.equal(points[~mask], moved[~mask])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_path_is_the_midpoint_rule_on_the_way_from_the_token_to_the_mixture(world, steps):
    table, tokens, log_mu, mask = world
    mixture = evaluation_points(tokens, tokens, log_mu.exp() @ table, mask, "mixture", 0, 1)
    for step in range(steps):
        points = evaluation_points(tokens, tokens, log_mu.exp() @ table, mask, "path", step, steps)
        torch.testing.assert_close(points, torch.lerp(tokens, mixture, (2 * step + 1) / (2 * steps)))


def advantages(world, displacement, neutral=(0,)):
    table, _, log_mu, mask = world
    return token_advantages(displacement, log_mu, table, mask, torch.tensor(neutral))


def test_advantages_are_inner_products_up_to_a_constant_per_position(world):
    table, _, log_mu, mask = world
    displacement = torch.randn(R, T, D)
    result = advantages(world, displacement)
    for r, t in mask.nonzero().tolist():
        counted = [v for v in range(1, V) if log_mu[r, t, v] > -torch.inf]
        plain = torch.stack([displacement[r, t] @ table[v] for v in counted])
        difference = result[r, t, counted] - plain
        torch.testing.assert_close(difference, difference[:1].expand(len(counted)))


@pytest.mark.parametrize("neutral", [(0,), (0, 3), (2, 2)])
def test_advantages_are_centred_by_mu_over_the_tokens_that_count(world, neutral):
    _, _, log_mu, _mask = world
    result = advantages(world, torch.randn(R, T, D), neutral)
    assert (log_mu.exp() * result).sum(-1).abs().max() < 1e-5
    # What all embeddings share says nothing for any token.
    table = world[0]
    shifted = (table + 10 * torch.randn(D), *world[1:])
    displacement = torch.randn(R, T, D)
    torch.testing.assert_close(
        advantages(shifted, displacement, neutral), advantages(world, displacement, neutral), atol=1e-4, rtol=1e-4
    )


def test_neutral_tokens_tokens_outside_the_support_and_masked_positions_get_zero(world):
    _, _, log_mu, mask = world
    result = advantages(world, torch.randn(R, T, D), (0, 3))
    assert (result[..., [0, 3]] == 0).all()
    assert (result[log_mu == -torch.inf] == 0).all()
    assert (result[~mask] == 0).all()
    assert (result[mask] != 0).any(-1).all()


def test_no_displacement_no_advantage_and_a_lone_neutral_token_is_finite(world):
    assert (advantages(world, torch.zeros(R, T, D)) == 0).all()
    table, tokens, _, mask = world
    log_mu = torch.full((R, T, V), -torch.inf)
    log_mu[..., 0] = 0.0
    assert (advantages((table, tokens, log_mu, mask), torch.randn(R, T, D)) == 0).all()
