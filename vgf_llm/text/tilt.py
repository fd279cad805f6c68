"""Dense token targets: what a first-order look at the reward says every next token of a completion should be.

    q_t(v) = mu_t(v) exp(lam_t A_t(v)) / Z_t,    A_t(v) = <g_t, E_v> - E_mu <g_t, E_v>,    lam_t = min(1 / alpha, lam_cap),

with g the gradient of the reward at the completion's embeddings, E the embedding table, and lam_cap the scale at which one
token spends its cap, KL(q_t || mu_t) = kl_cap. It is the closed-form maximum of E_q A_t - alpha KL(q || mu_t) wherever the cap is
slack.

Where a particle was drawn along a learned gradient (text/field.py), q_t is what it was drawn from, and nothing is left to choose:
`VGFOutput.drawn_from`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import decode
from .decode import TokenTargets
from .field import GradientField, gain
from .proxy import evaluation_points, token_advantages
from .sampler import VGFSampler


@torch.no_grad()
def token_targets(
    sampler: VGFSampler,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    ids: Tensor,
    mask: Tensor,
    alpha: Tensor,
    kl_cap: float,
    field: GradientField | None = None,
) -> TokenTargets:
    """Targets at completions [R, T] of prompts [R, P].

    Args:
        sampler: its model is mu, its reward gives the gradient, its `candidates` are K.
        prompt_ids, prompt_mask: [R, P] padded on the left.
        ids, mask: [R, T] padded on the right.
        alpha: [R] temperature, in units of the reward.
        kl_cap: nats that one token may spend.
        field: gives g_t instead, learned and in expectation over what follows; then the end of a text has an advantage too.
    """
    if field is None:
        log_mu, advantage, moves = _advantages(sampler, prompt_ids, prompt_mask, ids, mask)
        candidates, coarse = decode.coarse(log_mu, sampler.candidates)
        inside = advantage.gather(-1, candidates)
    else:
        moves = mask
        candidates, coarse, inside = _along(field, sampler, prompt_ids, prompt_mask, ids, mask)
    # What is not a candidate is one event with advantage 0: a target over candidates alone would empty the tail.
    advantages = torch.nn.functional.pad(inside, (0, 1))
    # Every position is a row of its own here: the cap holds per token.
    flat = (coarse.flatten(0, 1)[:, None], advantages.flatten(0, 1)[:, None], moves.flatten()[:, None])
    cap = decode.solve_scale(*flat, kl_cap).view(moves.shape)
    log_q = decode.tilted(coarse, torch.minimum(cap, 1 / alpha[:, None])[..., None] * advantages)
    return TokenTargets(candidates, log_q, decode.kl(log_q, coarse) * mask)


@torch.no_grad()
def substitution_fidelity(
    sampler: VGFSampler, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Predicted `<g_t, E_v - E_{y_t}>` and actual change [R] of the sampler's reward under one substitution per completion.

    Position and token are drawn by `keys` [R]: a position with a token to move, and a token of the base model's own other than
    the one that stands there. Completions without a position to move give 0 and 0. Rank their correlation with
    `vgf_llm.flow.diagnostics.fidelity`.
    """
    log_mu, advantage, moves = _advantages(sampler, prompt_ids, prompt_mask, ids, mask)
    here = torch.arange(len(ids), device=ids.device)
    zero = torch.zeros_like(keys)
    at = (decode.uniform(keys, decode.CONTROL, zero, ids.shape[1]) * moves).argmax(-1)
    old = ids[here, at]
    choices = log_mu[here, at].scatter(-1, old[:, None], -torch.inf)
    choices[:, sampler.eos_ids] = -torch.inf
    new = (choices + decode.gumbel(keys, decode.CONTROL, zero + 1, choices.shape[-1])).argmax(-1)
    usable = moves[here, at] & (choices.max(-1).values > -torch.inf)
    new = torch.where(usable, new, old)
    changed = ids.clone()
    changed[here, at] = new
    predicted = advantage[here, at, new] - advantage[here, at, old]
    actual = sampler.reward.score_ids(prompt_ids, prompt_mask, changed, mask)
    return predicted, actual - sampler.reward.score_ids(prompt_ids, prompt_mask, ids, mask)


def _along(
    field: GradientField, sampler: VGFSampler, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates [R, T, K], log mu [R, T, K + 1] of them and of all others, and their advantages along a field [R, T, K] in
    units of the reward."""
    prefix = decode.read_prompts(sampler.model, prompt_ids, prompt_mask, field.depth)
    tables = decode.read(sampler.model, prefix, ids, mask, sampler.base, field.depth)
    gradient = field.gradients(field.read(prompt_ids, prompt_mask, prefix.hidden), ids, mask, tables.hidden)
    candidates, coarse = decode.coarse(tables.log_mu, sampler.candidates)
    return candidates, coarse, field.spread * gain(gradient, tables.log_mu, candidates, sampler.reward.table)


def _advantages(
    sampler: VGFSampler, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log mu [R, T, V], first-order advantages [R, T, V], and where tokens may move [R, T]."""
    prefix = decode.read_prompts(sampler.model, prompt_ids, prompt_mask)
    log_mu = decode.read(sampler.model, prefix, ids, mask, sampler.base).log_mu
    tokens, table = sampler.reward.embed(ids), sampler.reward.table
    moves = mask & ~torch.isin(ids, sampler.eos_ids)
    # Halfway, wherever the sampler's flow looks: the better forecast of one token where the others stay (docs/method.md).
    points = evaluation_points(tokens, tokens, log_mu.exp() @ table, moves, "path", 0, 1)
    _, gradient = sampler.reward.value_and_grad(prompt_ids, prompt_mask, points, mask)
    neutral = torch.cat([sampler.eos_ids, sampler.eos_ids.new_tensor([sampler.processing_class.pad_token_id])])
    return log_mu, token_advantages(gradient, log_mu, table, moves, neutral), moves
