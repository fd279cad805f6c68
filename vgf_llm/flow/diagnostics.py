"""What the flow did to the particles, and whether the gradient it followed can be trusted."""

import math

import torch
from torch import Tensor

from .kernels import rbf_kernel


def mmd2(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Squared maximum mean discrepancy [B] in the RBF kernel `exp(-d^2 / (2 sigma^2))`, between 0 and 2.

    The V-statistic `mean k(x, x') + mean k(y, y') - 2 mean k(x, y)`, diagonals included: the exact MMD^2 of the two
    empirical distributions, which `TransportBudget.mmd_bound` bounds. As an estimate for the distributions behind the
    samples it is biased upwards by at most 1/N + 1/M.

    Args:
        x: [B, N, ...] particles.
        y: [B, M, ...] particles with the same trailing shape.
        bandwidth: sigma, in units of the particle space.
    """
    x, y = x.flatten(2).double(), y.flatten(2).double()
    sigma = x.new_full((x.shape[0],), bandwidth)

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return rbf_kernel(distances.square(), sigma).mean((1, 2))

    return (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)).clamp_min(0.0)


def displacement(start: Tensor, end: Tensor) -> Tensor:
    """Distance [B, N] each particle [B, N, ...] has gone, in units of the particle space."""
    distance: Tensor = torch.linalg.vector_norm((end - start).flatten(2), dim=2)
    return distance


def spread(particles: Tensor) -> Tensor:
    """Root mean squared distance [B] of a prompt's particles [B, N, ...] to their mean, in particle units."""
    return displacement(particles.mean(1, keepdim=True), particles).square().mean(1).sqrt()


def fidelity(predicted: Tensor, actual: Tensor) -> float:
    """Spearman rank correlation of predicted and actual changes of a value, over all entries; ties get their mean
    rank.

    `predicted` is usually the first-order `<grad R, change>`. Near 1 the flow goes where it believes it goes; near 0
    it is not worth its cost. nan where all predictions or all changes are equal.

    Raises:
        ValueError: the shapes differ, there are fewer than two entries, or one is nan.
    """
    if predicted.shape != actual.shape or predicted.numel() < 2:
        raise ValueError(
            f"fidelity needs two tensors of one shape and at least two entries, got {tuple(predicted.shape)} and "
            f"{tuple(actual.shape)}"
        )
    if predicted.isnan().any() or actual.isnan().any():
        raise ValueError("predicted or actual changes hold nan and cannot be ranked")
    ranks = torch.stack([_ranks(predicted), _ranks(actual)])
    if (ranks == ranks[:, :1]).all(1).any():
        return math.nan
    return torch.corrcoef(ranks)[0, 1].item()


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1 of the flattened entries, equal entries sharing the mean of theirs."""
    _, group, count = torch.unique(x.flatten(), return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0) - (count - 1).double() / 2
    return ranks[group]
