import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgf_llm.flow import TransportBudget, displacement, gradient_of, spread, transport


COUPLINGS = [("none", 0.0), ("svgd", 0.0), ("svgd", 0.5)]
NORMALIZE = ["none", "particle", "prompt"]


def bowl(a):
    """Value with its maximum at 1 in every coordinate."""
    return -0.5 * (a - 1).square().flatten(2).sum(-1)


def budgets(**fields):
    return [
        TransportBudget(coupling=c, temperature=t, normalize=n, **fields) for (c, t), n in itertools.product(COUPLINGS, NORMALIZE)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [TransportBudget(steps=0), TransportBudget(kl_budget=0.0)])
def test_zero_budget_returns_the_particles_bit_for_bit(budget, dtype):
    def never(particles, step):
        raise AssertionError("nothing to evaluate")

    particles = torch.randn(2, 3, 4, dtype=dtype)
    particles[0, 0, 0] = -0.0
    result = transport(particles, never, budget)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    assert torch.equal(result.particles.view(bits), particles.view(bits))
    assert result.trace.values.shape == (0, 2, 3) and result.trace.bandwidth.shape == (0, 2)


@pytest.mark.parametrize("coupling", ["none", "svgd"])
def test_one_particle_is_gradient_ascent_exactly(coupling):
    budget = TransportBudget(steps=7, step_size=0.13, coupling=coupling, normalize="none")
    particles = torch.randn(4, 1, 3)
    expected = particles
    for _ in range(7):
        leaf = expected.detach().requires_grad_()
        bowl(leaf).sum().backward()
        expected = expected + 0.13 * leaf.grad
    assert torch.equal(transport(particles, gradient_of(bowl), budget).particles, expected)


def test_one_particle_at_a_temperature_is_gradient_ascent_on_the_scaled_value():
    particles = torch.randn(4, 1, 3)
    warm = TransportBudget(steps=5, step_size=0.05, temperature=0.5, coupling="svgd", normalize="none")
    plain = TransportBudget(steps=5, step_size=0.1, normalize="none")
    torch.testing.assert_close(
        transport(particles, gradient_of(bowl), warm).particles,
        transport(particles, gradient_of(bowl), plain).particles,
    )


@pytest.mark.parametrize("budget", budgets(steps=4, max_displacement=0.25), ids=repr)
def test_a_prompt_does_not_depend_on_its_batch_mates(budget):
    torch.manual_seed(0)
    particles = torch.randn(5, 6, 3, 2) * torch.logspace(-2, 3, 5)[:, None, None, None]
    mask = torch.rand(5, 6, 3) > 0.3
    together = transport(particles, gradient_of(bowl), budget, mask=mask)
    for b in range(5):
        alone = transport(particles[b : b + 1], gradient_of(bowl), budget, mask=mask[b : b + 1])
        assert torch.equal(alone.particles[0], together.particles[b])
        assert torch.equal(alone.trace.displacement[:, 0], together.trace.displacement[:, b])


@pytest.mark.parametrize("budget", budgets(steps=4), ids=repr)
def test_permuted_particles_give_permuted_results(budget):
    torch.manual_seed(1)
    particles, order = torch.randn(2, 7, 3, dtype=torch.float64), torch.randperm(7)
    result = transport(particles, gradient_of(bowl), budget)
    permuted = transport(particles[:, order], gradient_of(bowl), budget)
    torch.testing.assert_close(permuted.particles, result.particles[:, order])
    torch.testing.assert_close(permuted.trace.values, result.trace.values[:, :, order])


@pytest.mark.parametrize("budget", budgets(steps=3), ids=repr)
def test_masked_positions_never_move_and_are_never_seen(budget):
    torch.manual_seed(2)
    particles = torch.randn(2, 4, 5, 3)
    mask = torch.arange(5) < torch.randint(1, 6, (2, 4))[..., None]
    other = torch.where(mask[..., None], particles, 1e4 * torch.randn(2, 4, 5, 3))

    def score_fn(u, step):
        score = torch.where(mask[..., None], 1 - u, torch.nan)  # a padded position may hold anything
        return u.sum((2, 3)) * 0, score

    first = transport(particles, score_fn, budget, mask=mask, project=lambda u: u.clamp(-1, 1))
    second = transport(other, score_fn, budget, mask=mask, project=lambda u: u.clamp(-1, 1))
    assert torch.equal(first.particles[~mask], particles[~mask])
    assert torch.equal(second.particles[~mask], other[~mask])
    assert torch.equal(first.particles[mask], second.particles[mask])
    assert (displacement(particles, first.particles) > 0).all()


@pytest.mark.parametrize("budget", budgets(steps=3), ids=repr)
def test_an_absent_particle_is_not_counted(budget):
    torch.manual_seed(3)
    particles = torch.randn(1, 5, 3)
    mask = torch.tensor([[True, True, False, True, True]])
    result = transport(particles, gradient_of(bowl), budget, mask=mask)
    without = transport(particles[mask][None], gradient_of(bowl), budget)
    torch.testing.assert_close(result.particles[mask][None], without.particles)
    assert torch.equal(result.particles[0, 2], particles[0, 2])


def test_mask_broadcasts_over_particles():
    particles = torch.randn(2, 4, 5, 3)
    mask = torch.rand(2, 1, 5) > 0.5
    one = transport(particles, gradient_of(bowl), TransportBudget(), mask=mask)
    full = transport(particles, gradient_of(bowl), TransportBudget(), mask=mask.expand(2, 4, 5))
    assert torch.equal(one.particles, full.particles)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cap=st.floats(1e-3, 2.0),
    step_size=st.floats(1e-3, 5.0),
    steps=st.integers(1, 6),
    budget=st.sampled_from(budgets()),
)
def test_the_cap_and_the_projection_hold_after_every_step(seed, cap, step_size, steps, budget):
    particles = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    seen = []

    def score_fn(u, step):
        seen.append(u)
        return gradient_of(lambda a: bowl(a / 2))(u, step)

    budget = TransportBudget(
        steps=steps,
        step_size=step_size,
        max_displacement=cap,
        coupling=budget.coupling,
        temperature=budget.temperature,
        normalize=budget.normalize,
    )
    result = transport(particles, score_fn, budget, project=lambda a: a.clamp(-1, 1))
    for u in [*seen[1:], result.particles]:
        assert displacement(particles, u).max() <= cap * (1 + 1e-5) + 1e-6
        assert u.abs().max() <= 1


def test_the_cap_leaves_shorter_ways_alone():
    particles = torch.randn(3, 4, 2)
    free = transport(particles, gradient_of(bowl), TransportBudget())
    capped = transport(particles, gradient_of(bowl), TransportBudget(max_displacement=0.6))
    assert torch.equal(free.particles, capped.particles)


def test_normalize_says_what_a_step_is():
    particles = torch.randn(3, 5, 2) + 4
    for scale in (1.0, 1e4, 1e-6):
        score_fn = gradient_of(lambda a, scale=scale: scale * bowl(a))
        one = transport(particles, score_fn, TransportBudget(steps=1, step_size=0.2, normalize="particle"))
        torch.testing.assert_close(displacement(particles, one.particles), torch.full((3, 5), 0.2))
        rms = transport(particles, score_fn, TransportBudget(steps=1, step_size=0.2, normalize="prompt"))
        moved = displacement(particles, rms.particles)
        torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((3,), 0.2))
        assert (moved.std(1) > 1e-3).all()  # the longer score still goes further


def test_a_zero_score_stays_where_it_is():
    particles = torch.ones(2, 3, 4)
    for normalize in NORMALIZE:
        result = transport(particles, gradient_of(bowl), TransportBudget(normalize=normalize))
        assert torch.equal(result.particles, particles)


def test_trace_and_final_values():
    particles = torch.randn(2, 3, 4)
    budget = TransportBudget(steps=3, step_size=0.1, coupling="svgd")
    result = transport(particles, gradient_of(bowl), budget, value_fn=bowl)
    assert torch.equal(result.trace.values[0], bowl(particles))
    torch.testing.assert_close(result.trace.score_norm[0], (particles - 1).norm(dim=-1))
    torch.testing.assert_close(result.trace.displacement[-1], displacement(particles, result.particles))
    assert result.trace.bandwidth.shape == (3, 2) and (result.trace.bandwidth > 0).all()
    assert torch.equal(result.values, bowl(result.particles)) and not result.values.requires_grad
    assert (result.values > result.trace.values[0]).all()
    uncoupled = transport(particles, gradient_of(bowl), TransportBudget())
    assert uncoupled.trace.bandwidth.isnan().all() and uncoupled.values is None


def test_score_fn_is_told_the_step():
    seen = []

    def score_fn(u, step):
        seen.append(step)
        return u.sum(-1), torch.full_like(u, step)

    result = transport(torch.zeros(1, 1, 1), score_fn, TransportBudget(steps=4, step_size=1.0, normalize="none"))
    assert seen == [0, 1, 2, 3] and result.particles.item() == 0 + 1 + 2 + 3


def test_half_precision_is_moved_in_float32():
    """500 steps of 1e-3 are lost one by one to the rounding of bfloat16 at 1."""
    particles = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    budget = TransportBudget(steps=500, step_size=1e-3)
    result = transport(particles, lambda u, step: (u.sum(-1), torch.ones_like(u)), budget)
    assert result.particles.dtype == torch.float32 and result.particles.item() == pytest.approx(1.5, rel=1e-4)


def test_no_graph_is_kept():
    particles = torch.randn(1, 2, 3, requires_grad=True)
    result = transport(particles, gradient_of(bowl), TransportBudget(), value_fn=bowl)
    assert not result.particles.requires_grad and not result.trace.values.requires_grad


@pytest.mark.parametrize("what", ["value", "score"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_number_is_named(what, bad):
    def score_fn(u, step):
        values, score = torch.zeros(2, 3), torch.ones_like(u)
        if step >= 2:
            (values if what == "value" else score[..., 0])[1, 2] = bad
        return values, score

    with pytest.raises(ValueError, match=f"non-finite {what} at step 2, prompt 1, particle 2"):
        transport(torch.zeros(2, 3, 4), score_fn, TransportBudget())


def test_a_last_step_out_of_range_is_named():
    def score_fn(u, step):
        return u.sum(-1), torch.full_like(u, 1e18)

    budget = TransportBudget(steps=1, step_size=1e30, normalize="none")
    with pytest.raises(ValueError, match="non-finite particle after the step at step 0, prompt 0, particle 0"):
        transport(torch.zeros(1, 1, 2), score_fn, budget)


def test_shapes_that_do_not_fit_raise():
    particles = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"values \(2, 3\) and a score \(2, 3, 4\), got \(3,\)"):
        transport(particles, lambda u, step: (torch.zeros(3), u), TransportBudget())
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 3\)"):
        transport(particles, lambda u, step: (torch.zeros(2, 3), torch.zeros(2, 3)), TransportBudget())
    with pytest.raises(ValueError, match="particles must be"):
        transport(torch.zeros(2, 3), gradient_of(bowl), TransportBudget())
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask must be bool and broadcastable"):
            transport(particles, gradient_of(bowl), TransportBudget(), mask=mask)


def svgd(log_density, start, steps, step_size, temperature=1.0):
    budget = TransportBudget(steps=steps, step_size=step_size, temperature=temperature, coupling="svgd", normalize="none")
    return transport(start, gradient_of(log_density), budget).particles


def test_svgd_converges_to_a_gaussian():
    """Mean within 0.02, every entry of the covariance within 15 % of the largest (150 particles, exp(R / 1))."""
    mean = torch.tensor([1.0, -2.0])
    covariance = torch.tensor([[1.0, 0.5], [0.5, 0.8]])
    precision = covariance.inverse()

    def log_density(a):
        return -0.5 * ((a - mean) @ precision * (a - mean)).sum(-1)

    start = torch.randn(1, 150, 2, generator=torch.Generator().manual_seed(0)) * 0.3
    (end,) = svgd(log_density, start, steps=800, step_size=0.5)
    torch.testing.assert_close(end.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(end.T.cov(), covariance, atol=0.15, rtol=0)


def test_spread_is_that_of_the_temperature():
    """exp(-|a|^2 / (2 alpha)) has the variance alpha: measured within 15 %, and a higher temperature is wider."""
    start = torch.randn(1, 100, 1, generator=torch.Generator().manual_seed(0)) * 0.5
    variances = []
    for alpha in (0.25, 1.0, 4.0):
        end = svgd(lambda a: -0.5 * a.square().sum(-1), start, 600, 0.5 * min(alpha, 1.0), alpha)
        variances.append(spread(end).square().item())
        assert variances[-1] == pytest.approx(alpha, rel=0.15)
    assert variances == sorted(variances)


def test_svgd_finds_both_modes_with_their_mass():
    """A third of the mass at -2, two thirds at 2, from particles that start right of both (Liu & Wang 2016, figure 1).

    Mass within 0.07, mean and variance (18/9 = 2/3 and 1 + 4 * 8/9) within 10 %.
    """

    def log_density(a):
        x = a.squeeze(-1)
        left = -0.5 * (x + 2).square() + torch.log(torch.tensor(1 / 3))
        right = -0.5 * (x - 2).square() + torch.log(torch.tensor(2 / 3))
        return torch.logaddexp(left, right)

    start = 6 + torch.randn(1, 100, 1, generator=torch.Generator().manual_seed(0))
    end = svgd(log_density, start, steps=1500, step_size=1.0).flatten()
    assert (end < 0).float().mean().item() == pytest.approx(1 / 3, abs=0.07)
    assert end.mean().item() == pytest.approx(2 / 3, rel=0.15)
    assert end.var().item() == pytest.approx(1 + 4 * 8 / 9, rel=0.1)


def test_a_precondition_maps_the_direction_once_per_step():
    seen = []

    def halve(phi):
        seen.append(phi)
        return 0.5 * phi

    particles = torch.randn(2, 3, 4)
    budget = TransportBudget(steps=3, step_size=0.2, normalize="none")
    constant = torch.ones(2, 3, 4)
    moved = transport(particles, lambda a, step: (a.sum(-1), constant), budget, precondition=halve).particles
    torch.testing.assert_close(moved, particles + 3 * 0.2 * 0.5)
    assert len(seen) == 3


def test_finiteness_may_be_left_to_the_caller():
    def broken(a, step):
        return a.sum(-1), torch.full_like(a, torch.nan)

    budget = TransportBudget(steps=1, normalize="none")
    with pytest.raises(ValueError, match="non-finite"):
        transport(torch.zeros(1, 2, 3), broken, budget)
    assert transport(torch.zeros(1, 2, 3), broken, budget, check_finite=False).particles.isnan().all()


def test_what_never_moves_does_not_use_up_the_cap():
    """Coupled directions point along coordinates that another particle may move in, and this one may not."""
    budget = TransportBudget(steps=1, step_size=1.0, coupling="svgd", bandwidth=10.0, normalize="none", max_displacement=0.5)
    mask = torch.tensor([[[True, False], [True, True]]])
    score = torch.tensor([[[0.3, 0.0], [0.3, 9.0]]])
    moved = transport(torch.zeros(1, 2, 2), lambda u, step: (u.sum(2), score), budget, mask=mask)
    torch.testing.assert_close(moved.particles[0, 0], torch.tensor([0.3, 0.0]))
