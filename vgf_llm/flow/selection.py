"""Choosing among N particles, and what best-of-n would have given for every n up to N."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def best_of_n(values: Tensor) -> Tensor:
    """Index [...] of the largest of N values [..., N]; of equal ones, the lowest index.

    Raises:
        ValueError: a value is nan.
    """
    if values.isnan().any():
        raise ValueError("values hold nan: a best particle is not defined")
    return values.argmax(dim=-1)


def softmax_select(values: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Index [...] drawn with probability proportional to `exp(values / temperature)` over the last dimension of
    [..., N].

    Args:
        values: [..., N], in units of R.
        temperature: in units of R, positive. Towards 0 it is `best_of_n`, towards infinity a uniform draw.
        generator: on the device of values.

    Raises:
        ValueError: temperature is not positive and finite, or a value is nan.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}; best_of_n is its limit at 0")
    if values.isnan().any():
        raise ValueError("values hold nan: the probabilities are not defined")
    probabilities = torch.softmax(values.double() / temperature, dim=-1)
    drawn = torch.multinomial(probabilities.reshape(-1, values.shape[-1]), 1, generator=generator)
    return drawn.reshape(values.shape[:-1])


def best_of_n_curve(proxy: Tensor, gold: Tensor, ns: Sequence[int]) -> Tensor:
    """Unbiased expected gold of best-of-n by proxy, for each n, from one pool of N samples.

    `sum_{i=n}^N C(i-1, n-1) / C(N, n) gold_(i)`, the samples sorted ascending by proxy: sample i is the best of a
    random n-subset when the other n - 1 come from the i - 1 below it. Of samples with equal proxy the earlier counts
    as better, as in `best_of_n`.

    Args:
        proxy: [..., N], what the choice is made by.
        gold: [..., N], what is reported.
        ns: subset sizes between 1 and N.

    Returns:
        [..., len(ns)] in float64.

    Raises:
        ValueError: the shapes differ, a proxy is nan, or an n is not between 1 and N.
    """
    if proxy.shape != gold.shape:
        raise ValueError(f"proxy and gold must have the same shape, got {tuple(proxy.shape)} and {tuple(gold.shape)}")
    if proxy.isnan().any():
        raise ValueError("proxy holds nan: the samples cannot be sorted")
    N = proxy.shape[-1]
    if outside := [n for n in ns if not 1 <= n <= N]:
        raise ValueError(f"best-of-n needs 1 <= n <= {N}, the size of the pool, got {outside}")
    # Best first and stable, then turned round: among ties the earliest ends up last, that is best.
    ascending = gold.double().gather(-1, proxy.argsort(dim=-1, descending=True, stable=True).flip(-1))
    i = torch.arange(1, N + 1, dtype=torch.float64, device=gold.device)[:, None]
    n = torch.tensor(ns, dtype=torch.float64, device=gold.device)[None, :]

    def log_choose(m: Tensor | float, k: Tensor) -> Tensor:
        m = torch.as_tensor(m, dtype=torch.float64, device=gold.device)
        return torch.lgamma(m + 1) - torch.lgamma(k + 1) - torch.lgamma(m - k + 1)

    weights = torch.where(i >= n, torch.exp(log_choose(i - 1, n - 1) - log_choose(N, n)), 0.0)  # [N, len(ns)]
    return ascending @ weights


def best_of_n_kl(n: int) -> float:
    """`log n - (n - 1) / n` nats: upper bound on KL(best-of-n || reference) (Beirami et al. 2024, arXiv 2401.01879).

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n
