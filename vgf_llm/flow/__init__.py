"""Value Gradient Flow on tensors: particles, a score and a budget. Imports torch only."""

from .budget import TransportBudget
from .diagnostics import displacement, fidelity, mmd2, spread
from .kernels import median_bandwidth, rbf_kernel, repulsion, squared_distances, stein_direction
from .selection import best_of_n, best_of_n_curve, best_of_n_kl, softmax_select
from .transport import ScoreFn, Trace, Transported, gradient_of, transport


__all__ = [
    "ScoreFn",
    "Trace",
    "TransportBudget",
    "Transported",
    "best_of_n",
    "best_of_n_curve",
    "best_of_n_kl",
    "displacement",
    "fidelity",
    "gradient_of",
    "median_bandwidth",
    "mmd2",
    "rbf_kernel",
    "repulsion",
    "softmax_select",
    "spread",
    "squared_distances",
    "stein_direction",
    "transport",
]
