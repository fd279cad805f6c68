import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgf_llm.flow import median_bandwidth, rbf_kernel, repulsion, squared_distances, stein_direction


def everyone(particles):
    return torch.ones(particles.shape[:2], dtype=torch.bool)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), N=st.integers(1, 9), F=st.integers(1, 6), offset=st.sampled_from([0.0, 100.0]))
def test_repulsion_is_the_gradient_of_the_kernel_with_the_bandwidth_held_fixed(seed, N, F, offset):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, N, F, generator=generator) + offset
    sq_distances = squared_distances(x)
    sigma = median_bandwidth(sq_distances, everyone(x))
    ours = repulsion(x, rbf_kernel(sq_distances, sigma), sigma)

    a = x.double().requires_grad_()
    width = sigma.double()[:, None, None]
    expected = torch.zeros_like(a)
    for i in range(N):  # sum_j grad_{a_j} k(a_j, x_i), x_i and the bandwidth constants
        kernel = torch.exp(-(a - x[:, i : i + 1].double()).square().sum(-1, keepdim=True) / (2 * width.square()))
        (gradient,) = torch.autograd.grad(kernel.sum(), a)
        expected[:, i] = gradient.sum(1)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_repulsion_pushes_apart():
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    phi, sigma = stein_direction(x, torch.zeros_like(x), temperature=1.0)
    assert phi[0, 0, 0] < 0 < phi[0, 1, 0]
    assert sigma.item() == pytest.approx(math.sqrt(1 / (2 * math.log(3))))


def test_median_is_over_different_particles_only():
    # Distances 1, 2, 3 between the three present particles; with the diagonal the median would be 1.
    x = torch.tensor([[[0.0], [1.0], [3.0], [50.0]]])
    present = torch.tensor([[True, True, True, False]])
    sigma = median_bandwidth(squared_distances(x), present)
    assert sigma.item() == pytest.approx(math.sqrt(4 / (2 * math.log(4))))


def test_bandwidth_does_not_carry_a_gradient():
    x = torch.randn(1, 4, 2, requires_grad=True)
    assert not median_bandwidth(squared_distances(x), everyone(x)).requires_grad


@pytest.mark.parametrize("N", [1, 5])
def test_coinciding_particles_follow_their_mean_score(N):
    x, score = torch.ones(2, N, 3), torch.randn(2, N, 3)
    phi, _ = stein_direction(x, score, temperature=0.5)
    torch.testing.assert_close(phi, (score / 0.5).mean(1, keepdim=True).expand(2, N, 3))


def test_stein_direction_against_the_sum_written_out():
    generator = torch.Generator().manual_seed(0)
    a, s = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)
    for alpha in (0.0, 0.3):
        phi, sigma = stein_direction(a, s, temperature=alpha)
        for b in range(2):
            for i in range(5):
                total = torch.zeros(3)
                for j in range(5):
                    k = torch.exp(-(a[b, j] - a[b, i]).square().sum() / (2 * sigma[b] ** 2))
                    total += k * s[b, j] / alpha + k * (a[b, i] - a[b, j]) / sigma[b] ** 2 if alpha else k * s[b, j]
                torch.testing.assert_close(phi[b, i], total / 5, rtol=1e-4, atol=1e-5)


def test_trailing_shape_does_not_matter():
    a, s = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    phi, _ = stein_direction(a, s, 1.0)
    flat, _ = stein_direction(a.flatten(2), s.flatten(2), 1.0)
    assert phi.shape == a.shape and torch.equal(phi.flatten(2), flat)


def test_a_particle_that_is_not_present_changes_nothing():
    a, s = torch.randn(1, 5, 2), torch.randn(1, 5, 2)
    present = torch.tensor([[True, True, True, True, False]])
    phi, sigma = stein_direction(a, s, 0.7, present=present)
    without, sigma_without = stein_direction(a[:, :4], s[:, :4], 0.7)
    torch.testing.assert_close(phi[:, :4], without)
    torch.testing.assert_close(sigma, sigma_without)
