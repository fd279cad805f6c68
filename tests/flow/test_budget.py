import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgf_llm.flow import TransportBudget, gradient_of, mmd2, transport


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "steps must be an integer of at least 0"),
        ({"steps": 2.0}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"rounds": 0}, "rounds must be an integer of at least 1"),
        ({"step_size": 0.0}, "use steps=0"),
        ({"step_size": -0.1}, "step_size must be positive"),
        ({"step_size": math.nan}, "step_size must be finite"),
        ({"temperature": -1.0, "coupling": "svgd"}, "temperature must not be negative"),
        ({"temperature": math.inf, "coupling": "svgd"}, "temperature must be finite"),
        ({"temperature": 0.5}, "set coupling='svgd' or temperature=0"),
        ({"bandwidth": 0.5}, "set coupling='svgd' or bandwidth=None"),
        ({"bandwidth": 0.0, "coupling": "svgd"}, "bandwidth must be positive"),
        ({"max_displacement": 0.0}, "max_displacement must be positive"),
        ({"max_displacement": math.inf}, "max_displacement must be finite"),
        ({"generations": 0.0}, "generations must be positive"),
        ({"generations": math.nan}, "generations must be finite"),
        ({"kl_budget": -1.0}, "kl_budget is in nats"),
        ({"kl_budget": None}, "kl_budget must be finite, got None"),
        ({"kl_budget": math.inf}, "kl_budget must be finite, got inf"),
        ({"coupling": "SVGD"}, "coupling must be one of none, svgd"),
        ({"normalize": "batch"}, "normalize must be one of none, particle, prompt"),
    ],
)
def test_bad_fields_say_what_to_do(fields, message):
    with pytest.raises(ValueError, match=message):
        TransportBudget(**fields)


def test_zero_budgets():
    assert TransportBudget(steps=0).is_zero and TransportBudget(kl_budget=0.0).is_zero
    assert not TransportBudget().is_zero and not TransportBudget(kl_budget=1.0).is_zero
    assert TransportBudget(steps=0).mmd_bound(kernel_width=1.0) == 0.0


def test_bounds_need_what_they_rest_on():
    with pytest.raises(ValueError, match="give gradient_bound"):
        TransportBudget(normalize="none").displacement_bound()
    with pytest.raises(ValueError, match="give kernel_width"):
        TransportBudget(temperature=1.0, coupling="svgd").displacement_bound()
    with pytest.raises(ValueError, match="kernel_width must be positive"):
        TransportBudget().mmd_bound(kernel_width=0.0)


def test_mmd_bound_is_the_formula_of_the_paper():
    budget = TransportBudget(steps=4, step_size=0.02, temperature=0.5, coupling="svgd", normalize="none", bandwidth=0.7)
    eps, L, sigma, c, alpha, root_e = 0.02, 4, 0.7, 3.0, 0.5, math.sqrt(math.e)
    expected = (2 * eps * L) / (sigma * root_e) * (c / alpha + 1 / (sigma * root_e))
    assert budget.mmd_bound(kernel_width=0.7, gradient_bound=3.0) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    particles=st.integers(1, 12),
    dimension=st.integers(1, 5),
    steps=st.integers(1, 8),
    step_size=st.floats(1e-3, 0.5),
    temperature=st.sampled_from([0.0, 0.05, 1.0, 10.0]),
    bandwidth=st.sampled_from([0.3, 1.0, 3.0, None]),
    normalize=st.sampled_from(["none", "particle", "prompt"]),
    gradient_bound=st.floats(0.1, 5.0),
    cap=st.sampled_from([None, 0.05, 0.5]),
    coupled=st.booleans(),
)
def test_the_bounds_hold(
    seed, particles, dimension, steps, step_size, temperature, bandwidth, normalize, gradient_bound, cap, coupled
):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(3, particles, dimension, generator=generator, dtype=torch.float64)
    direction = torch.randn(dimension, generator=generator, dtype=torch.float64)

    def value(a):  # |gradient| <= gradient_bound: the derivative of sin(w . a) / |w| is at most 1
        return gradient_bound * torch.sin(a @ direction) / direction.norm()

    budget = TransportBudget(
        steps=steps,
        step_size=step_size,
        temperature=temperature if coupled else 0.0,
        coupling="svgd" if coupled else "none",
        bandwidth=bandwidth if coupled else None,
        normalize=normalize,
        max_displacement=cap,
    )
    result = transport(start, gradient_of(value), budget)
    # The theorem fixes one width; under the median heuristic the smallest width met takes its place.
    width = result.trace.bandwidth.min().item() if coupled else 0.8
    moved = result.trace.displacement[-1].mean(1).max().item()
    assert moved <= budget.displacement_bound(gradient_bound, width) * (1 + 1e-9)
    assert mmd2(start, result.particles, width).max() <= budget.mmd_bound(width, gradient_bound) * (1 + 1e-9) + 1e-12


def test_the_bound_binds():
    """A bound far too large would pass the test above: this step reaches 65 % of it, and all of the displacement."""
    start = torch.zeros(1, 1, 2, dtype=torch.float64)
    budget = TransportBudget(steps=1, step_size=1.0)
    end = transport(start, gradient_of(lambda a: a[..., 0]), budget).particles
    assert mmd2(start, end, 1.0).item() > 0.6 * budget.mmd_bound(1.0)
    assert (end - start).norm().item() == pytest.approx(budget.displacement_bound(), rel=1e-12)
    assert TransportBudget(steps=5, step_size=0.1, max_displacement=0.2).displacement_bound() == 0.2
    assert TransportBudget(steps=5, step_size=0.1, max_displacement=5.0).displacement_bound() == 0.5


def test_an_automatic_budget_along_a_field_spends_by_what_it_is_worth():
    assert TransportBudget.auto(16, 0.9).kl_budget == pytest.approx(5 * 0.81)
    assert TransportBudget.auto(16, 0.3).kl_budget == pytest.approx(0.45)
    # One that points away spends nothing to speak of, and is no budget of zero, which would leave fresh samples undrawn too.
    away = TransportBudget.auto(16, -0.5)
    assert away.kl_budget == pytest.approx(0, abs=1e-2) and not away.is_zero
    for wrong in (1.5, float("nan")):
        with pytest.raises(ValueError, match="correlation"):
            TransportBudget.auto(16, wrong)
