import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgf_llm.flow import best_of_n, best_of_n_curve, best_of_n_kl, softmax_select


def test_best_of_n_takes_the_first_of_the_best():
    values = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-math.inf, -5.0, -7.0]])
    assert best_of_n(values).tolist() == [1, 0, 1]


def test_nan_is_not_a_best_particle():
    values = torch.tensor([1.0, math.nan])
    with pytest.raises(ValueError, match="nan"):
        best_of_n(values)
    with pytest.raises(ValueError, match="nan"):
        softmax_select(values, 1.0)
    with pytest.raises(ValueError, match="nan"):
        best_of_n_curve(values, values, [1])


def test_softmax_select_draws_in_proportion():
    values = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    drawn = softmax_select(values, temperature=0.5, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(frequencies, torch.softmax(values[0] / 0.5, 0), atol=0.01, rtol=0)


def test_softmax_select_at_its_limits():
    values = torch.randn(2, 5, 4)
    assert torch.equal(softmax_select(values, 1e-6), best_of_n(values))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            softmax_select(values, temperature)


def test_softmax_select_follows_its_generator():
    values = torch.zeros(50, 4)
    one, two = (softmax_select(values, 1.0, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(one, softmax_select(values, 1.0, torch.Generator().manual_seed(1))) and not torch.equal(one, two)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7).flatmap(lambda N: st.tuples(*[st.lists(st.integers(-3, 3), min_size=N, max_size=N)] * 2)))
def test_curve_is_the_mean_over_all_subsets(lists):
    """Few distinct proxies, so that ties are part of it: the curve must agree with best_of_n on every subset."""
    proxy, gold = (torch.tensor(x, dtype=torch.float32) for x in lists)
    N = len(proxy)
    curve = best_of_n_curve(proxy, gold, range(1, N + 1))
    for n in range(1, N + 1):
        subsets = torch.tensor(list(itertools.combinations(range(N), n)))
        chosen = subsets.gather(1, best_of_n(proxy[subsets])[:, None])
        assert curve[n - 1].item() == pytest.approx(gold[chosen].double().mean().item(), abs=1e-9)


def test_curve_is_stable_and_batched():
    proxy, gold = torch.randn(3, 256), torch.randn(3, 256)
    curve = best_of_n_curve(proxy, gold, [1, 64, 256])
    assert curve.shape == (3, 3)
    torch.testing.assert_close(curve[:, 0], gold.double().mean(1))
    torch.testing.assert_close(curve[:, 2], gold.double().gather(1, best_of_n(proxy)[:, None]).squeeze(1))
    # Weights sum to 1: a constant gold comes back.
    ones = best_of_n_curve(proxy, torch.ones(3, 256), [1, 2, 64, 200, 256])
    torch.testing.assert_close(ones, torch.ones(3, 5, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("ns", [[0], [5], [1, 9]])
def test_curve_refuses_sizes_it_cannot_estimate(ns):
    with pytest.raises(ValueError, match="1 <= n <= 4"):
        best_of_n_curve(torch.zeros(4), torch.zeros(4), ns)
    with pytest.raises(ValueError, match="same shape"):
        best_of_n_curve(torch.zeros(4), torch.zeros(3), [1])


def test_kl_of_best_of_n():
    """A reference without atoms reaches the bound: integral over [0, 1] of q log q with q = n x^(n-1)."""
    assert best_of_n_kl(1) == 0.0
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (2, 8, 64):
        q = n * x ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(torch.special.xlogy(q, q).mean().item(), rel=1e-4)
    # An atom makes it a strict upper bound: two equally likely outcomes, the better one chosen with 1 - 2^-n.
    for n in (2, 8):
        p = 1 - 0.5**n
        exact = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
        assert exact < best_of_n_kl(n)
    with pytest.raises(ValueError, match="n >= 1"):
        best_of_n_kl(0)
