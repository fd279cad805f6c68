import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgf_llm.flow import displacement, fidelity, mmd2, spread


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), N=st.integers(1, 6), M=st.integers(1, 6), sigma=st.floats(0.2, 5.0))
def test_mmd2_is_the_distance_of_mean_embeddings(seed, N, M, sigma):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(1, N, 2, generator=generator), torch.randn(1, M, 2, generator=generator)
    points = torch.cat([x, y], 1)[0].double()
    weights = torch.cat([torch.full((N,), 1 / N), torch.full((M,), -1 / M)]).double()
    kernel = torch.exp(-(points[:, None] - points[None]).square().sum(-1) / (2 * sigma**2))
    expected = (weights @ kernel @ weights).clamp_min(0)
    torch.testing.assert_close(mmd2(x, y, sigma), expected[None], rtol=1e-6, atol=1e-9)


def test_mmd2_at_its_ends():
    x = torch.randn(3, 8, 2, 2)
    assert (mmd2(x, x, 1.0) < 1e-12).all()
    far = mmd2(x[:, :1], x[:, :1] + 100, 1.0)
    torch.testing.assert_close(far, torch.full((3,), 2.0, dtype=torch.float64))


def test_spread_and_displacement():
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert spread(x).tolist() == [1.0, 0.0]
    assert displacement(x, x + torch.tensor([3.0, 4.0])).tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert displacement(torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)).tolist() == [[2.0, 2.0]]


def test_fidelity_ranks():
    actual = torch.tensor([[0.1, 3.0], [-2.0, 10.0]])
    assert fidelity(actual.exp(), actual) == pytest.approx(1.0)
    assert fidelity(-actual, actual) == pytest.approx(-1.0)
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)): ranks 1 2 3 4 5 against 2 1 4 3 5.
    assert fidelity(torch.arange(5.0), torch.tensor([1.0, 0.0, 3.0, 2.0, 4.0])) == pytest.approx(1 - 6 * 4 / 120)
    # With ties Pearson's correlation of the mean ranks: (1, 2.5, 2.5, 4) against (1, 2, 3, 4).
    assert fidelity(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.arange(4.0)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_fidelity_of_what_cannot_be_ranked():
    assert math.isnan(fidelity(torch.ones(4), torch.arange(4.0)))
    with pytest.raises(ValueError, match="one shape"):
        fidelity(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="at least two"):
        fidelity(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="nan"):
        fidelity(torch.tensor([1.0, math.nan]), torch.zeros(2))
