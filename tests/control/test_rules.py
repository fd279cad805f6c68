import math

import pytest
import torch

from vgf_llm.control.rules import Adam, public_stein
from vgf_llm.flow import TransportBudget, spread, stein_direction, transport


def towards(point):
    return lambda a, step: (-(a - point).square().sum(-1), -2 * (a - point))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_adam_moves_every_coordinate_by_the_step_size_whatever_the_scale(scale):
    particles = torch.zeros(3, 4, 5)
    score = scale * torch.randn(3, 4, 5)
    moved = transport(
        particles, lambda a, step: (a.sum(-1), score), TransportBudget(steps=1, step_size=0.1, normalize="none"),
        precondition=Adam(),
    ).particles  # fmt: skip
    torch.testing.assert_close(moved, 0.1 * score.sign(), rtol=1e-3, atol=1e-6)


def test_steps_times_step_size_bounds_the_largest_coordinate():
    start = torch.rand(50, 8, 3) * 2 - 1
    for steps in (1, 3, 5):
        budget = TransportBudget(steps=steps, step_size=0.1, normalize="none")
        moved = transport(start, towards(3.0), budget, precondition=Adam()).particles
        assert (moved - start).abs().max() <= steps * 0.1 * 1.02


def test_adam_is_torchs_adam():
    u = torch.randn(2, 3, 4)
    target = torch.randn(2, 3, 4)
    free = u.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(6):
        optimizer.zero_grad()
        (free - target).pow(4).sum().backward()
        optimizer.step()
    moved = transport(
        u, lambda a, step: (a.sum(-1), -4 * (a - target).pow(3)), TransportBudget(steps=6, step_size=0.05, normalize="none"),
        precondition=Adam(),
    ).particles  # fmt: skip
    torch.testing.assert_close(moved, free.detach(), rtol=1e-4, atol=1e-5)


def outwards(particles, direction):
    """How fast the cloud spreads along the direction."""
    return ((particles - particles.mean(1, keepdim=True)) * direction).sum((1, 2)).mean().item()


def test_the_public_repulsion_does_not_disperse_and_the_correct_one_does():
    particles = 0.3 * torch.randn(256, 10, 5)
    nothing = torch.zeros_like(particles)
    public = public_stein(particles, nothing, 1.0)
    correct, _ = stein_direction(particles, nothing, 1.0)
    assert outwards(particles, correct) > 0.5
    assert abs(outwards(particles, public)) < 0.1 * outwards(particles, correct)
    cosine = torch.nn.functional.cosine_similarity(public.flatten(1), correct.flatten(1)).mean()
    assert cosine < 0.3


def test_the_public_drive_is_the_kernel_average_of_the_score():
    # At a low temperature the repulsion does not count.
    particles, score = 0.3 * torch.randn(4, 6, 2), torch.randn(4, 6, 2)
    distances = torch.cdist(particles, particles).square()
    # N is even, and with the zeros of the diagonal so is N * N: the median is the mean of the two values in the middle.
    median = distances.flatten(1).sort(dim=1).values[:, 17:19].mean(1)
    kernel = torch.exp(-distances * math.log(7) / median[:, None, None])
    torch.testing.assert_close(1e-6 * public_stein(particles, score, 1e-6), kernel @ score / 6, rtol=1e-3, atol=1e-4)


def test_temperature_spreads_particles():
    particles = 0.2 * torch.randn(100, 10, 2)
    spreads = []
    for temperature in (0.05, 1.0):
        budget = TransportBudget(
            steps=5, step_size=0.05 * temperature, temperature=temperature, coupling="svgd", normalize="none"
        )
        spreads.append(spread(transport(particles, towards(0.0), budget).particles).mean())
    assert spreads[1] > spreads[0]
