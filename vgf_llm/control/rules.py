"""What the authors' public code does with particles: Adam on the direction of the flow, and its repulsion."""

import math

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma & Ba 2015) as the `precondition` of one flow; its state starts anew with each flow.

    The first step is the sign of the direction, and L steps move no coordinate by more than about `L * step_size`, whatever
    the scale of the value: the budget is a ball in the largest coordinate. beta 0.9 and 0.999, eps 1e-8.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def __call__(self, phi: Tensor) -> Tensor:
        """The direction, like phi [B, N, D], that `step_size` multiplies."""
        self.steps += 1
        if self.first is None or self.second is None:
            self.first, self.second = 0.1 * phi, 0.001 * phi.square()
        else:
            self.first = 0.9 * self.first + 0.1 * phi
            self.second = 0.999 * self.second + 0.001 * phi.square()
        first = self.first / (1 - 0.9**self.steps)
        return first / ((self.second / (1 - 0.999**self.steps)).sqrt() + 1e-8)


def public_stein(particles: Tensor, score: Tensor, temperature: float) -> Tensor:
    """The direction [B, N, D] of the authors' public code, for comparison with `flow.stein_direction`.

    Its bandwidth is the median over all N * N squared distances, the zeros of the diagonal included, and it is differentiated
    along with the kernel: the median pair then attracts, and what is meant to repel hardly spreads the particles.

    Args:
        particles, score: [B, N, D].
        temperature: alpha > 0.
    """
    N = particles.shape[1]
    fixed = particles.detach()
    with torch.enable_grad():
        leaf = particles.detach().requires_grad_()
        distances = (leaf.unsqueeze(2) - fixed.unsqueeze(1)).square().sum(-1)  # [B, N, N]
        ordered = distances.flatten(1).sort(dim=1).values
        median = (ordered[:, (N * N - 1) // 2] + ordered[:, N * N // 2]) / 2
        h = (median / (2 * math.log(N + 1))).clamp_min(1e-12)
        kernel = torch.exp(-distances / (1e-6 + 2 * h)[:, None, None])
        (attraction,) = torch.autograd.grad(kernel.sum(), leaf)
    return (kernel.detach() @ score / temperature - attraction) / N
