"""What the policy is fitted to: weights over particles, dense token targets, preferences (docs/trainer.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_llm.text.decode import TokenTargets


def target_weights(rewards: Tensor, best_k: int, temperature: float | None) -> tuple[Tensor, Tensor]:
    """Particles to fit the policy to, and how much: `w_i = softmax_i(R_i / (temperature * s))`, best k.

    Args:
        rewards: [B, N].
        best_k: k <= N.
        temperature: in units of s, the standard deviation of R over the N particles of the prompt. Rewards that are
            all equal get equal weights. None: equal weights.

    Returns:
        Indices [B, k], best first and of equal ones the lower index first, and weights [B, k], which sum to 1 over k.
    """
    ordered, order = rewards.sort(dim=1, descending=True, stable=True)
    if temperature is None:
        return order[:, :best_k], torch.full_like(ordered[:, :best_k], 1 / best_k)
    # The best is subtracted first: 0 / tiny is 0, where reward / tiny would overflow.
    weights = ((ordered - ordered[:, :1])[:, :best_k] / (temperature * spread(rewards)[:, None])).softmax(1)
    return order[:, :best_k], weights


def spread(rewards: Tensor) -> Tensor:
    """Standard deviation [B] of rewards [B, N] over the particles of a prompt, never 0."""
    return rewards.std(1, correction=0).clamp_min(torch.finfo(rewards.dtype).tiny)


def likelihood_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """`- w_i log pi(y_i | x_i)` [R], from log-probabilities [R] in nats."""
    return -weights * logprobs


def tilt_loss(log_pi: Tensor, targets: TokenTargets, mask: Tensor, weights: Tensor) -> Tensor:
    """`w_i sum_t KL(q_t || pi_t)` [R] over the candidates and all other tokens as one event.

    Args:
        log_pi: [R, T, V] log-probabilities of the policy.
        targets: of R completions, as wide as `log_pi`.
        mask: [R, T].
        weights: [R].
    """
    inside = log_pi.gather(-1, targets.ids)
    # Summed over the others rather than taken as 1 - inside: the difference of two ones has no digits left.
    rest = log_pi.scatter(-1, targets.ids, -torch.inf).logsumexp(-1, keepdim=True).clamp_min(-1e4)
    log_p = torch.cat([inside, rest], -1)
    q = targets.log_q.exp()
    kl = (q * (targets.log_q - log_p).masked_fill(q == 0, 0.0)).sum(-1)
    return weights * (kl * mask).sum(1)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantages [B, N] of rewards [B, N]: each less the mean of the others of its prompt."""
    n = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (n / (n - 1))


def residual_loss(
    log_pi: Tensor, ids: Tensor, targets: TokenTargets, mask: Tensor, advantages: Tensor, weights: Tensor
) -> Tensor:
    """What dense targets leave of a policy gradient, `- w_i sum_t [A_i - c_t(y_t)] log pi(y_t)` [R].

    `c_t(v) = q_t(v) / pi_t(v) - 1` has mean 0 under pi, and `tilt_loss` at `pi = mu` has the gradient
    `- sum_v pi(v) c(v) grad log pi(v)`. Added to it, this loss therefore has the gradient of REINFORCE with advantages A in
    expectation, whatever the targets are worth: they are its control variate (Q-Prop, Gu et al. 2017, arXiv 1611.02247).

    Args:
        log_pi: [R, T, V] of the policy that drew the completions.
        ids: [R, T] of the completions.
        targets: of the same completions.
        mask: [R, T].
        advantages: [R] in the unit in which the targets are tilted.
        weights: [R].
    """
    said = log_pi.gather(-1, ids[..., None])[..., 0]
    with torch.no_grad():
        inside = log_pi.gather(-1, targets.ids)
        rest = log_pi.scatter(-1, targets.ids, -torch.inf).logsumexp(-1, keepdim=True).clamp_min(-1e4)
        ratio = (targets.log_q - torch.cat([inside, rest], -1)).exp() - 1
        hit = targets.ids == ids[..., None]
        variate = torch.where(hit.any(-1), (ratio[..., :-1] * hit).sum(-1), ratio[..., -1])
    return -weights * ((advantages[:, None] - variate) * said * mask).sum(1)


def dpo_loss(log_ratio: Tensor, weights: Tensor, beta: float) -> Tensor:
    """`- w log sigmoid(beta (log_ratio_best - log_ratio_worst))` [P] (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Args:
        log_ratio: [2 P] `log pi - log mu` of the pairs, best before worst.
        weights: [P].
        beta: of DPO.
    """
    best, worst = log_ratio.view(-1, 2).unbind(1)
    return -weights * torch.nn.functional.logsigmoid(beta * (best - worst))
