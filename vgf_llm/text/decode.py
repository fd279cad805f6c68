"""Decoding as a deterministic map of fixed noise: Gumbel-max sampling, and re-decoding under a tilt.

A particle is drawn by `y_t = argmax_v [log mu(v | x, y_<t) + G_t(v)]` with Gumbel noise G from a counter (seed, prompt,
particle, position, token): no noise is stored, and no result depends on the batch it was computed in.

`redecode` moves a particle instead of drawing it anew. It infers noise under which the base model says exactly `y`
("hindsight" Gumbels, truncated at the value of the token that won) and decodes again under `log mu + b + G` with a tilt b.
A tilt of zero returns y bit for bit; a small tilt changes few tokens, and what follows a change is written by the base
model.

Everything here works on R rows (prompts times particles). Shapes: prompts [R, P] padded on the left, completions [R, T]
padded on the right, masks bool, tables [R, T, V].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


Choose = Callable[[Tensor, Tensor, Tensor], Tensor]

# Streams of the counter: noise of different use must not repeat.
SAMPLE, HINDSIGHT_TOP, HINDSIGHT_REST, BEYOND, CONTROL = range(5)


def row_keys(seed: int, prompts: Sequence[Sequence[int]], num_particles: int, start: int = 0) -> Tensor:
    """Keys [B * N] of the noise counter, from the seed, the tokens of the prompt and the index of the particle alone."""
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(repr((seed, list(prompt))).encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little", signed=True))
    base = torch.tensor(keys, dtype=torch.int64)
    return _mix(base[:, None] ^ _mix(torch.arange(start, start + num_particles)[None])).flatten()


def round_keys(keys: Tensor, index: int) -> Tensor:
    """Keys of the same rows for the noise of another round; nested calls do not meet."""
    return _mix(keys ^ _mix(torch.full_like(keys, index + 1)))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (products wrap around; `>>` is arithmetic, so the sign bits are masked)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(keys: Tensor, stream: int, positions: Tensor, size: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [R, ..., size], that depend on nothing but their coordinates.

    keys [R]; positions [R] or [R, T].
    """
    keys = keys.view(keys.shape + (1,) * (positions.ndim - keys.ndim))
    counter = _mix(keys ^ _mix(positions * 8 + stream))[..., None] + torch.arange(size, device=keys.device) * 2654435769
    # 52 bits and half a unit: never 0, never 1, so that the logarithms below are finite.
    return (((_mix(counter) >> 12) & 0xFFFFFFFFFFFFF).double() + 0.5) * 2.0**-52


def gumbel(keys: Tensor, stream: int, positions: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise, float32 [R, ..., size]."""
    return -torch.log(-torch.log(uniform(keys, stream, positions, size))).float()


@dataclass(frozen=True)
class BaseDistribution:
    """How the base model samples: mu is softmax(logits / temperature) restricted by top-k, then top-p, renormalised.

    Args:
        temperature: of the base sampler, not of the flow. Default 1.0, as in TRL.
        top_k: 0 keeps all tokens. Default 0, as in TRL.
        top_p: 1.0 keeps all tokens. Default 1.0, as in TRL.
        vocab_size: logits beyond it are dropped: models pad their vocabulary with rows that no token uses. Default None: all.

    Raises:
        ValueError: temperature <= 0, top_k < 0, or top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}; use top_k=1 for greedy decoding")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k!r}; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}; 1.0 keeps all tokens")

    def log_probs(self, logits: Tensor) -> Tensor:
        """log mu [..., V] in float32, -inf outside the support."""
        logits = logits[..., : self.vocab_size].float() / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(drop, -torch.inf)
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class Decoded:
    """Completions of R rows.

    Attributes:
        ids: [R, T] int64, padded on the right.
        mask: [R, T] bool, True up to and including the end-of-sequence token.
        logprobs: [R] log mu of the completion, in nats.
        kl: [R] sum_t KL(q_t || mu_t) along the completion under the tilt it was decoded with, in nats; 0 for samples.
        log_ratio: [R] sum_t [log q_t(y_t) - log mu_t(y_t)] along the same path; its mean estimates the same KL.
        new_tokens: [R] how many tokens the base model had to decode one by one.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    kl: Tensor
    log_ratio: Tensor
    new_tokens: Tensor


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    keys: Tensor,
    *,
    base: BaseDistribution,
    max_new_tokens: int,
    eos_ids: Tensor,
    pad_id: int,
) -> Decoded:
    """Ancestral samples from mu by Gumbel-max.

    prompt_ids [B, P], prompt_mask [B, P], keys [B * N]. The prompt is read once and shared by its N particles.
    """
    rows = keys.shape[0]
    cache = DynamicCache(config=model.config)
    logits = _forward(model, prompt_ids, prompt_mask, cache)[:, -1]
    repeats = rows // prompt_ids.shape[0]
    cache.batch_repeat_interleave(repeats)
    attention = prompt_mask.repeat_interleave(repeats, 0)
    logprobs = torch.zeros(rows, device=prompt_ids.device)

    def choose(active: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        log_mu = base.log_probs(logits)
        tokens = (log_mu + gumbel(keys[active], SAMPLE, positions, log_mu.shape[-1])).argmax(-1)
        logprobs[active] += log_mu.gather(-1, tokens[:, None])[:, 0]
        return tokens

    ids = torch.full((rows, max_new_tokens), pad_id, device=prompt_ids.device)
    start = torch.zeros(rows, dtype=torch.int64, device=prompt_ids.device)
    _continue(model, cache, attention, logits.repeat_interleave(repeats, 0), ids, start, choose, eos_ids)
    mask = completion_mask(ids, eos_ids)
    zeros = torch.zeros_like(logprobs)
    return Decoded(ids, mask, logprobs, zeros, zeros, mask.sum(1))


@dataclass(frozen=True)
class Tables:
    """One parallel forward of the base model over completions it may or may not have written.

    Attributes:
        log_mu: [R, T, V] log mu at every position of the completion.
        cache: keys and values of prompt and completion.
        attention: [R, P + T] bool.
    """

    log_mu: Tensor
    cache: DynamicCache
    attention: Tensor


@torch.no_grad()
def read(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, base: BaseDistribution
) -> Tables:
    """log mu at every position of completions [R, T] of prompts [R, P], in one forward."""
    attention = torch.cat([prompt_mask, mask], 1)
    # Not by the config: layers with a sliding window would keep its last slots alone, and decoding resumes anywhere.
    cache = DynamicCache()
    logits = _forward(model, torch.cat([prompt_ids, ids], 1), attention, cache, keep=ids.shape[1] + 1)
    return Tables(base.log_probs(logits[:, :-1]), cache, attention)


def tilted(log_mu: Tensor, tilt: Tensor) -> Tensor:
    """log q = log mu + b, normalised. [..., V]"""
    return (log_mu + tilt).log_softmax(-1)


def kl(log_q: Tensor, log_mu: Tensor) -> Tensor:
    """KL(q || mu) [...] in nats; tokens outside the support count as 0."""
    return (log_q.exp() * (log_q - log_mu).masked_fill(log_mu == -torch.inf, 0.0)).sum(-1)


def coarse(log_mu: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The K = `candidates` likeliest tokens [..., K] of log_mu [..., V], and log mu [..., K + 1] of them and of all others as one
    event.

    A tilt that is constant over the others has the same KL on these K + 1 events as on all V tokens.
    """
    top, ids = log_mu.topk(min(candidates, log_mu.shape[-1]), -1)
    rest = 1 - top.exp().sum(-1, keepdim=True)
    if ids.shape[-1] == log_mu.shape[-1]:
        # There are no others: what rounding leaves of 1 must not become an event that nothing can say.
        rest = torch.zeros_like(rest)
    rest = rest.clamp_min(1e-30).log()
    return ids, torch.cat([top, rest], -1).log_softmax(-1)


def solve_scale(log_mu: Tensor, direction: Tensor, mask: Tensor, kl_budget: float, iterations: int = 24) -> Tensor:
    """The scale lam [R] at which tilting by `lam * direction` costs `sum_t KL(q_t || mu_t) = kl_budget` nats per row.

    The KL grows with lam from 0 up to that of the best token at every position; a row whose ceiling lies below the budget
    gets a large finite scale, a row without direction gets 0. log_mu, direction [R, T, K]; mask [R, T].
    """
    # Unit spread per row, so that one bracket serves every reward model.
    probs = log_mu.exp()
    variance = (probs * direction.square()).sum(-1) - (probs * direction).sum(-1).square()
    total = (variance.clamp_min(0) * mask).sum(-1)
    # Second order: KL = lam^2 / 2 * sum_t Var_mu(direction).
    first = torch.where(total > 0, (2 * kl_budget / total.clamp_min(1e-30)).sqrt(), 0.0)
    # Far wider: a direction towards one rare token, or uneven between positions, is nowhere near second order.
    low, high = first * 2.0**-20, first * 2.0**20
    for _ in range(iterations):
        middle = low.sqrt() * high.sqrt()
        spent = (kl(tilted(log_mu, middle[:, None, None] * direction), log_mu) * mask).sum(-1)
        low, high = torch.where(spent < kl_budget, middle, low), torch.where(spent < kl_budget, high, middle)
    return torch.where(total > 0, low.sqrt() * high.sqrt(), 0.0)


def hindsight(tables: Tables, ids: Tensor, keys: Tensor) -> Tensor:
    """Gumbel noise [R, T, V] from its posterior given that the base model said `ids`.

    The winning value is Gumbel(0) since mu is normalised; every other value is Gumbel(log mu) truncated at it
    (Maddison et al. 2014, arXiv 1411.0030): `z_v = log mu_v - log(mu_v exp(-top) - log u)`. The noise is `z - log mu`;
    outside the support it is plain noise.
    """
    rows, length, vocab = tables.log_mu.shape
    positions = torch.arange(length, device=ids.device).expand(rows, length)
    top = gumbel(keys, HINDSIGHT_TOP, positions, 1)
    log_mu = tables.log_mu
    minus_log_u = -torch.log(uniform(keys, HINDSIGHT_REST, positions, vocab)).float()
    noise = -torch.log((log_mu - top).exp() + minus_log_u)
    said, plain = log_mu.gather(-1, ids[..., None]), noise.gather(-1, ids[..., None])
    return noise.scatter(-1, ids[..., None], torch.where(said > -torch.inf, top - said, plain))


@torch.no_grad()
def redecode(
    model: PreTrainedModel,
    prompt_mask: Tensor,
    ids: Tensor,
    mask: Tensor,
    tables: Tables,
    tilt: Tensor,
    keys: Tensor,
    *,
    base: BaseDistribution,
    eos_ids: Tensor,
    pad_id: int,
    horizon: int | None = None,
) -> Decoded:
    """Decode completions again under `log mu + tilt` with the noise that made them what they are.

    The old tokens are a draft: `tables` verifies all of them at once, and decoding resumes at the first token that the tilt
    changes, with keys and values up to there kept.

    Args:
        prompt_mask: [R, P].
        ids, mask: [R, T] completions; `tables` was read from their first columns, up to the longest.
        tilt: [R, T', V] as wide as `tables`, added to log mu at the same position; nothing is tilted beyond the last position.
        keys: [R] noise keys of this round.
        horizon: how many positions after the first change the tilt still holds. None: to the end. 0: the first change
            only, after which the base model is on its own.
    """
    _, length, vocab = tables.log_mu.shape
    place = torch.arange(length, device=ids.device)
    draft, inside = ids[:, :length], mask[:, :length]
    noise = hindsight(tables, draft, keys)
    log_q = tilted(tables.log_mu, tilt)
    # A row changes where another token overtakes strictly: at tilt zero the old token wins by construction.
    # Capped before the tilt: rounding alone must not lift a rival over the token that won. A token that rounding has
    # pushed out of the support (this forward is parallel, the one that said it was not) stays too; its log ratio is 0.
    untilted = tables.log_mu + noise
    perturbed = torch.minimum(untilted, untilted.gather(-1, draft[..., None])) + tilt
    old = perturbed.gather(-1, draft[..., None])[..., 0]
    rival, token = perturbed.scatter(-1, draft[..., None], -torch.inf).max(-1)
    overtaken = (rival > old) & inside
    changed = overtaken.any(1)
    first = torch.where(changed, overtaken.int().argmax(1), inside.sum(1) - 1)
    reached = (place <= first[:, None]) & inside
    at_change = (place == first[:, None]) & changed[:, None]
    verified = torch.where(at_change, token, draft).masked_fill(~reached, pad_id)

    spent = (kl(log_q, tables.log_mu) * reached).sum(1)
    pick = verified.masked_fill(~reached, 0)[..., None]
    log_mu_said = tables.log_mu.gather(-1, pick)[..., 0].masked_fill(~reached, 0)
    log_ratio = (log_q.gather(-1, pick)[..., 0].masked_fill(~reached, 0) - log_mu_said).nan_to_num(0.0).sum(1)
    logprobs = log_mu_said.sum(1)
    new_ids = torch.full_like(ids, pad_id)
    new_ids[:, :length] = verified

    ended = torch.isin(new_ids.gather(1, first[:, None])[:, 0], eos_ids) | (first == ids.shape[1] - 1)
    go = (changed & ~ended).nonzero()[:, 0]
    if len(go):
        cache, attention = _right_align(tables.cache, tables.attention, go, prompt_mask.shape[1] + first[go])
        attention = torch.cat([attention, attention.new_ones(len(go), 1)], 1)
        logits = _forward(model, new_ids[go, first[go]][:, None], attention, cache)[:, -1]

        def choose(active: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
            r, at = go[active], positions.clamp(max=length - 1)
            log_mu = base.log_probs(logits)
            old_noise = inside[r, at] & (positions < length)
            z = torch.where(old_noise[:, None], noise[r, at], gumbel(keys[r], BEYOND, positions, vocab))
            holds = old_noise if horizon is None else old_noise & (positions <= first[r] + horizon)
            b = torch.where(holds[:, None], tilt[r, at], 0.0)
            said = (log_mu + b + z).argmax(-1, keepdim=True)
            log_q = tilted(log_mu, b)
            spent[r] += kl(log_q, log_mu)
            logprobs[r] += log_mu.gather(-1, said)[:, 0]
            log_ratio[r] += (log_q.gather(-1, said) - log_mu.gather(-1, said))[:, 0]
            return said[:, 0]

        continued = new_ids[go]
        _continue(model, cache, attention, logits, continued, first[go] + 1, choose, eos_ids)
        new_ids[go] = continued
    new_mask = completion_mask(new_ids, eos_ids)
    return Decoded(
        torch.where(changed[:, None], new_ids, ids),
        torch.where(changed[:, None], new_mask, mask),
        logprobs,
        spent,
        log_ratio,
        torch.where(changed, new_mask.sum(1) - first - 1, 0),
    )


def completion_mask(ids: Tensor, eos_ids: Tensor) -> Tensor:
    """True up to and including the first end-of-sequence token, which the padding may equal. [R, T]"""
    is_eos = torch.isin(ids, eos_ids)
    return is_eos.int().cumsum(1) - is_eos.int() == 0


def _forward(model: PreTrainedModel, ids: Tensor, attention: Tensor, cache: DynamicCache, keep: int = 1) -> Tensor:
    """Logits of the last `keep` positions. Position ids count real tokens: learned positions need it under padding."""
    positions = (attention.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids,
        attention_mask=attention.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    ).logits


def _continue(
    model: PreTrainedModel,
    cache: DynamicCache,
    attention: Tensor,
    logits: Tensor,
    ids: Tensor,
    start: Tensor,
    choose: Choose,
    eos_ids: Tensor,
) -> None:
    """Fill `ids` [R, T] in place from position `start` [R] on, row by row its own position; finished rows leave the batch."""
    active = torch.arange(ids.shape[0], device=ids.device)
    positions = start.clone()
    while True:
        tokens = choose(active, positions, logits)
        ids[active, positions] = tokens
        positions = positions + 1
        goes_on = ~torch.isin(tokens, eos_ids) & (positions < ids.shape[1])
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            if len(kept) == 0:
                return
            cache.batch_select_indices(kept)
            active, positions, tokens, attention = active[kept], positions[kept], tokens[kept], attention[kept]
        attention = torch.cat([attention, attention.new_ones(len(active), 1)], 1)
        logits = _forward(model, tokens[:, None], attention, cache)[:, -1]


def _right_align(cache: DynamicCache, attention: Tensor, rows: Tensor, lengths: Tensor) -> tuple[DynamicCache, Tensor]:
    """The first `lengths` slots of the given rows, moved to the right so that all rows continue in the same slot."""
    longest = int(lengths.max())
    source = torch.arange(longest, device=lengths.device) - (longest - lengths)[:, None]
    inside = source >= 0
    source = source.clamp_min(0)
    aligned = DynamicCache()
    # What a DynamicCache of attention layers holds, once it has been filled.
    for index, layer in enumerate(cast("list[DynamicLayer]", cache.layers)):
        keys, values = cast("tuple[Tensor, Tensor]", (layer.keys, layer.values))
        take = source[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        aligned.update(keys[rows].gather(2, take), values[rows].gather(2, take), index)
    return aligned, attention[rows].gather(1, source) & inside
