"""RBF kernel, median bandwidth, and the Stein direction between the particles of one prompt.

Convention: `k(a, x) = exp(-|a - x|^2 / (2 sigma^2))`. sigma is called bandwidth or kernel width everywhere, in units
of the particle space. Nothing here is meant to be differentiated: in the flow the bandwidth is a constant of the
step, and differentiating the median along with the kernel turns repulsion into attraction for the median pair.
"""

import torch
from torch import Tensor


def squared_distances(particles: Tensor) -> Tensor:
    """Squared distances [B, N, N] between the particles [B, N, F] of each prompt."""
    # Differences, not the expanded square: with |u| large against the spread of a cloud, the expansion cancels in
    # fp32.
    return torch.cdist(particles, particles, compute_mode="donot_use_mm_for_euclid_dist").square()


def median_bandwidth(sq_distances: Tensor, present: Tensor) -> Tensor:
    """Median heuristic `sigma^2 = median(d^2) / (2 log(N + 1))`, so that a row of kernel values sums to about 1 (Liu
    & Wang 2016).

    The median runs over pairs of *different* particles (of two middle values, the lower): the zeros of the diagonal
    are no distances, and with few particles they would halve the width.

    Args:
        sq_distances: [B, N, N].
        present: [B, N] bool, False for a particle that does not exist.

    Returns:
        [B] sigma, detached. At least 1e-6, which is only reached by coinciding particles or fewer than two of them;
        then it does not matter, since all their kernel values are 1 and all their repulsions 0.
    """
    N = sq_distances.shape[1]
    pair = present[:, :, None] & present[:, None, :] & ~torch.eye(N, dtype=torch.bool, device=present.device)
    # Sorted, not torch.median: that one has no deterministic CUDA kernel.
    ordered = sq_distances.detach().masked_fill(~pair, 0.0).flatten(1).sort(dim=1).values
    excluded = N * N - pair.sum((1, 2))  # these zeros come first, and all is zero where there is no pair
    middle = (excluded + (pair.sum((1, 2)) - 1).clamp_min(0) // 2).clamp_max(N * N - 1)
    median = ordered.gather(1, middle[:, None]).squeeze(1)
    return (median / (2 * torch.log(present.sum(1) + 1.0))).clamp_min(1e-12).sqrt()


def rbf_kernel(sq_distances: Tensor, bandwidth: Tensor) -> Tensor:
    """`exp(-d^2 / (2 sigma^2))` [B, N, M] from squared distances [B, N, M] and one sigma per prompt [B]."""
    return torch.exp(-sq_distances / (2 * bandwidth.square()[:, None, None]))


def repulsion(particles: Tensor, kernel: Tensor, bandwidth: Tensor) -> Tensor:
    """`sum_j grad_{a_j} k(a_j, x_i) = sum_j k(a_j, x_i) (x_i - a_j) / sigma^2`, in closed form [B, N, F].

    Args:
        particles: [B, N, F], the points x_i and a_j alike.
        kernel: [B, N, N], row i holds k(a_j, x_i); a zero column leaves a particle out.
        bandwidth: [B] sigma, a constant.
    """
    # Differences are all that counts; centred, the two terms below do not cancel in fp32.
    centred = particles - particles.mean(dim=1, keepdim=True)
    return (kernel.sum(2, keepdim=True) * centred - kernel @ centred) / bandwidth.square()[:, None, None]


def stein_direction(
    particles: Tensor,
    score: Tensor,
    temperature: float,
    bandwidth: float | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Velocity of SVGD towards `exp(R / alpha)` (Liu & Wang 2016; the flow of arXiv 2604.14265).

    `phi(x_i) = 1/N sum_j [ k(a_j, x_i) score_j / alpha + grad_{a_j} k(a_j, x_i) ]`; at temperature 0 its rescaled
    limit `phi(x_i) = 1/N sum_j k(a_j, x_i) score_j`.

    Args:
        particles: [B, N, ...] with any trailing shape. Coordinates that are to be left out hold 0 in every particle.
        score: like particles, grad R at each particle.
        temperature: alpha >= 0, in units of R.
        bandwidth: fixed kernel width; None takes `median_bandwidth`.
        present: [B, N] bool, False for a particle that does not exist: it is not summed over and N does not count it.

    Returns:
        The direction (like particles) and the kernel width of each prompt [B].
    """
    a, s = particles.flatten(2), score.flatten(2)
    if present is None:
        present = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
    sq_distances = squared_distances(a)
    sigma = median_bandwidth(sq_distances, present) if bandwidth is None else a.new_full((a.shape[0],), bandwidth)
    kernel = rbf_kernel(sq_distances, sigma) * present[:, None, :]
    total = kernel @ s
    if temperature > 0:
        total = total / temperature + repulsion(a, kernel, sigma)
    count = present.sum(1).clamp_min(1)[:, None, None]
    return (total / count).view_as(particles), sigma
