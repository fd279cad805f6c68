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
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from . import replay
from .prefix import Prefix, cache_of, forward, layers_of, side_by_side, window
from .prefix import positions as positions_of
from .replay import Choose


# Streams of the counter: noise of different use must not repeat.
SAMPLE, HINDSIGHT_TOP, HINDSIGHT_REST, BEYOND, CONTROL, HINDSIGHT_OTHERS, WHICH_OTHER = range(7)

# Share of a batch that has to be finished before its rows leave.
FINISHED = 0.25


def row_keys(seed: int, prompts: Sequence[Sequence[int]], num_particles: int, start: int = 0) -> Tensor:
    """Keys [B * N] of the noise counter, from the seed, the tokens of the prompt and the index of the particle alone."""
    keys = []
    for prompt in prompts:
        digest = hashlib.blake2b(repr((seed, list(prompt))).encode(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little", signed=True))
    base = torch.tensor(keys, dtype=torch.int64)
    return _mix(base[:, None] ^ _mix(torch.arange(start, start + num_particles)[None])).flatten()


def round_keys(keys: Tensor, index: int | Tensor) -> Tensor:
    """Keys of the same rows for the noise of another round, or place; nested calls do not meet."""
    return _mix(keys ^ _mix(torch.zeros_like(keys) + index + 1))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 (products wrap around; `>>` is arithmetic, so the sign bits are masked)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(keys: Tensor, stream: int | Tensor, positions: Tensor, size: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64 [R, ..., size], that depend on nothing but their coordinates.

    keys [R]; positions [R] or [R, T], and the stream like them where it is not one. `size` tokens, or which ones: [R, ..., K].
    """
    keys = keys.view(keys.shape + (1,) * (positions.ndim - keys.ndim))
    tokens = size if isinstance(size, Tensor) else torch.arange(size, device=keys.device)
    counter = _mix(keys ^ _mix(positions * 8 + stream))[..., None] + tokens * 2654435769
    # 52 bits and half a unit: never 0, never 1, so that the logarithms below are finite.
    return (((_mix(counter) >> 12) & 0xFFFFFFFFFFFFF).double() + 0.5) * 2.0**-52


def exponential(keys: Tensor, stream: int | Tensor, positions: Tensor, size: int | Tensor) -> Tensor:
    """Standard exponential noise, float32 [R, ..., size]: see `uniform`."""
    return -torch.log(uniform(keys, stream, positions, size)).float()


def gumbel(keys: Tensor, stream: int | Tensor, positions: Tensor, size: int | Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [R, ..., size]: see `uniform`."""
    return -torch.log(exponential(keys, stream, positions, size))


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

    def take(self, rows: Tensor) -> Decoded:
        """Rows by their index [R']."""
        return Decoded(*(getattr(self, f.name)[rows] for f in fields(Decoded)))

    def put(self, rows: Tensor, part: Decoded) -> Decoded:
        """A copy with `part` at the rows [R']."""
        return Decoded(*(getattr(self, f.name).index_copy(0, rows, getattr(part, f.name)) for f in fields(Decoded)))

    def moved(self, new: Decoded, taken: Tensor) -> Decoded:
        """Row by row `new` where taken [R], else what stands. What was spent adds up over the moves of a row."""
        new = replace(new, kl=self.kl + new.kl, log_ratio=self.log_ratio + new.log_ratio, new_tokens=self.new_tokens)
        parts = ((getattr(self, f.name), getattr(new, f.name)) for f in fields(Decoded))
        return Decoded(*(torch.where(taken.view(-1, *[1] * (old.ndim - 1)), then, old) for old, then in parts))


@torch.no_grad()
def read_prompts(model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, depth: int = 0) -> Prefix:
    """Prompts [B, P], one row each; `Prefix.deal` gives them to their particles. With the states behind the first `depth` layers,
    unless that is 0."""
    cache = DynamicCache()
    logits, hidden = _forward(model, prompt_ids, prompt_mask, cache, depth, keep=1)
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    return Prefix(prompt_mask, [layers_of(cache)], logits[:, -1], rows, hidden=hidden)


@dataclass(frozen=True)
class Tilt:
    """What is added to log mu at every position of R completions: `values` [R, T, K] at K tokens `ids` [R, T, K], none twice,
    and nothing at the others."""

    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Steering:
    """What tilts every token of R rows while it is drawn, within a budget per completion.

    Attributes:
        model: reads the tokens.
        prefix: the prompts as it has read them, R rows.
        tilt: rows [A], positions [A, k], what was read before them [A, k, H], and log mu there [A, k, V] -> the tilt there.
        kl_budget: nats, sum_t KL(q_t || mu_t) of a completion. A token whose tilt would cost more than is left is drawn without,
            and what is left stays for those that follow.
        depth: of the base model's layers, behind which its states are what `model` reads; 0: it reads the tokens.
    """

    model: PreTrainedModel
    prefix: Prefix
    tilt: Callable[[Tensor, Tensor, Tensor, Tensor], Tilt]
    kl_budget: float
    depth: int = 0


@dataclass(frozen=True)
class TokenTargets:
    """Targets at every position of R completions, over K candidate tokens and the rest of the vocabulary as one event.

    Attributes:
        ids: [R, T, K] candidates, the base model's own likeliest tokens.
        log_q: [R, T, K + 1] log target; the last entry is the mass of all other tokens together.
        kl: [R, T] KL(q_t || mu_t) in nats, over the same K + 1 events; 0 outside the completion.
    """

    ids: Tensor
    log_q: Tensor
    kl: Tensor


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prefix: Prefix,
    keys: Tensor,
    *,
    base: BaseDistribution,
    max_new_tokens: int,
    eos_ids: Tensor,
    pad_id: int,
    steering: Steering | None = None,
    drawn_from: TokenTargets | None = None,
) -> Decoded:
    """Ancestral samples [R, T] by Gumbel-max, one for each row of the prompts, keys [R]: from mu, or under `steering` from
    q_t = mu_t exp(tilt) / Z_t at every token, with the same noise. `drawn_from`, room for R completions of `max_new_tokens`, is
    then filled with these q_t."""
    rows = keys.shape[0]
    spent = torch.zeros(rows, device=keys.device)
    models, prefixes, depth = [model], [prefix], 0
    if steering is not None:
        models, prefixes, depth = [model, steering.model], [prefix, steering.prefix], steering.depth
    replayed = all(replay.fits(model) for model in models)
    kept = drawn_from
    if drawn_from is not None and replayed:  # a finished row goes on unseen, behind its end
        kept = TokenTargets(*(torch.cat([x, x[:, -1:]], 1) for x in (drawn_from.ids, drawn_from.log_q, drawn_from.kl)))

    def choose(active: Tensor, positions: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        log_mu = base.log_probs(read[..., :width])
        noise = gumbel(keys[active], SAMPLE, positions, log_mu.shape[-1])
        if steering is None:
            tokens = (log_mu + noise).argmax(-1)
            return tokens, log_mu.gather(-1, tokens[..., None])
        tilt = steering.tilt(active, positions, read[..., width:], log_mu)
        price, shift = _price(log_mu, tilt.ids, tilt.values)
        paid = spent[active][:, None] + price <= steering.kl_budget
        values = torch.where(paid[..., None], tilt.values, 0.0)
        price, shift = torch.where(paid, price, 0.0), torch.where(paid, shift, 0.0)
        spent[active] += price[:, 0]
        if kept is not None:
            at = (active[:, None], positions)
            kept.ids[at], kept.kl[at] = tilt.ids, price
            kept.log_q[at] = tilted(with_rest(log_mu, tilt.ids), torch.nn.functional.pad(values, (0, 1)))
        tokens = (log_mu + noise).scatter_add(-1, tilt.ids, values).argmax(-1)
        ratio = (values * (tilt.ids == tokens[..., None])).sum(-1) - shift
        return tokens, torch.stack([log_mu.gather(-1, tokens[..., None])[..., 0], price, ratio], -1)

    ids = torch.full((rows, max_new_tokens), pad_id, device=keys.device)
    start = torch.zeros(rows, dtype=torch.int64, device=keys.device)
    firsts = [cast(Tensor, read.logits)[read.rows] for read in prefixes]
    width, first = firsts[0].shape[-1], torch.cat(firsts, -1)
    if replayed:
        caches = [replay.Slots(read, 0, max_new_tokens + 1) for read in prefixes]
        alive = torch.ones_like(start, dtype=torch.bool)
        totals = replay.carry_on(models, caches, ids, start, alive, choose, eos_ids, first=first, depth=depth)
    else:
        reader = _Reader(models, [read.cache() for read in prefixes], depth)
        totals = _continue(reader, prefix.mask[prefix.rows], first, ids, start, choose, eos_ids)
    mask = completion_mask(ids, eos_ids)
    if drawn_from is not None and kept is not drawn_from:
        for name in ("ids", "log_q", "kl"):
            room, found = getattr(drawn_from, name), getattr(kept, name)[:, :-1]
            room.copy_(torch.where(mask.view(*mask.shape, *[1] * (room.ndim - 2)), found, room))
    logprobs, nats, log_ratio = totals.unbind(1) if steering is not None else (totals[:, 0], spent, spent)
    return Decoded(ids, mask, logprobs, nats, log_ratio, mask.sum(1))


@dataclass(frozen=True)
class Tables:
    """One parallel forward of the base model over completions it may or may not have written.

    Attributes:
        log_mu: [R, T, V] log mu at every position of the completion.
        cache: keys and values of prompt and completion.
        attention: [R, P + T] bool, of a cache that has both in one row.
        hidden: [R, T, H] states behind the first `depth` layers, if that was not 0.
    """

    log_mu: Tensor
    cache: DynamicCache | replay.Slots
    attention: Tensor
    hidden: Tensor | None


@torch.no_grad()
def read(model: PreTrainedModel, prefix: Prefix, ids: Tensor, mask: Tensor, base: BaseDistribution, depth: int = 0) -> Tables:
    """log mu at every position of completions [R, T] of the prompts, in one forward."""
    attention, first = prefix.attention(mask), cast(Tensor, prefix.logits)[prefix.rows][:, None]
    cache: DynamicCache | replay.Slots
    if replay.fits(model):
        cache = replay.Slots(prefix, 0, ids.shape[1])
        after, hidden = replay.read(model, cache, ids, depth)
    else:
        cache = prefix.cache()
        after, hidden = _forward(model, ids, attention, cache, depth)
    return Tables(base.log_probs(torch.cat([first, after[:, :-1]], 1)), cache, attention, hidden)


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
    ids = log_mu.topk(min(candidates, log_mu.shape[-1]), -1).indices
    return ids, with_rest(log_mu, ids)


def with_rest(log_mu: Tensor, ids: Tensor) -> Tensor:
    """log mu [..., K + 1] of the tokens `ids` [..., K] and of all others as one event."""
    some = log_mu.gather(-1, ids)
    rest = 1 - some.exp().sum(-1, keepdim=True)
    if ids.shape[-1] == log_mu.shape[-1]:
        # There are no others: what rounding leaves of 1 must not become an event that nothing can say.
        rest = torch.zeros_like(rest)
    return torch.cat([some, rest.clamp_min(1e-30).log()], -1).log_softmax(-1)


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


def hindsight(log_mu: Tensor, said: Tensor, top: Tensor, noise: Tensor) -> Tensor:
    """Gumbel noise [..., K] of K tokens from its posterior, given which token the base model said.

    The winning value is Gumbel(0) since mu is normalised; every other value is Gumbel(log mu) truncated at it
    (Maddison et al. 2014, arXiv 1411.0030): `z_v = log mu_v - log(mu_v exp(-top) - log u)`. What is returned is `z - log mu`;
    outside the support it is plain noise.

    Args:
        log_mu: [..., K].
        said: bool [..., K], the token that was said, if it is among the K.
        top: [..., 1] standard Gumbel noise, the winning value.
        noise: [..., K] standard exponential noise.
    """
    return torch.where(said & (log_mu > -torch.inf), top - log_mu, -torch.log((log_mu - top).exp() + noise))


@torch.no_grad()
def redecode(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    tables: Tables,
    tilt: Tilt,
    keys: Tensor,
    *,
    base: BaseDistribution,
    eos_ids: Tensor,
    pad_id: int,
    horizon: int | None = None,
    lookahead: int = 4,
) -> Decoded:
    """Decode completions again under `log mu + tilt` with the noise that made them what they are.

    The old tokens are a draft: `tables` verifies all of them at once, and decoding resumes at the first token that the tilt
    changes, with keys and values up to there kept. From there on the rest of the old text goes on as a draft, `lookahead` tokens
    in one forward: with the noise that once chose them, many of them are said again.

    Args:
        ids, mask: [R, T] completions; `tables` was read from their first columns, up to the longest.
        tilt: as wide as `tables`; nothing is tilted beyond the last position.
        keys: [R] noise keys of this round.
        horizon: how many positions after the first change the tilt still holds. None: to the end. 0: the first change
            only, after which the base model is on its own.
        lookahead: tokens per forward after the first change. The result does not depend on it; 1 is plain decoding, and what
            models do whose sliding window the completion could fill.
    """
    _, length, vocab = tables.log_mu.shape
    place = torch.arange(length, device=ids.device).expand(len(ids), length)
    draft, inside = ids[:, :length], mask[:, :length]
    token, overtaken = _verify(tables.log_mu, draft, tilt, keys, place)
    overtaken &= inside
    changed = overtaken.any(1)
    first = torch.where(changed, overtaken.int().argmax(1), inside.sum(1) - 1)
    reached = (place <= first[:, None]) & inside
    at_change = (place == first[:, None]) & changed[:, None]
    verified = torch.where(at_change, token, draft).masked_fill(~reached, pad_id)
    said = verified.masked_fill(~reached, 0)
    totals = torch.where(reached[..., None], _quantities(tables.log_mu, tilt.ids, tilt.values, said), 0.0).sum(1)
    new_ids = torch.full_like(ids, pad_id)
    new_ids[:, :length] = verified

    ended = torch.isin(new_ids.gather(1, first[:, None])[:, 0], eos_ids) | (first == ids.shape[1] - 1)
    goes_on = changed & ~ended
    # Where a batch keeps its shape, all rows stay in it.
    replayed = isinstance(tables.cache, replay.Slots)
    go = torch.arange(len(ids), device=ids.device) if replayed else goes_on.nonzero()[:, 0]
    if goes_on.any():

        def choose(active: Tensor, positions: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
            r, at = go[active][:, None], positions.clamp(max=length - 1)
            log_mu = base.log_probs(logits)
            old = inside[r, at] & (positions < length)
            noise = exponential(keys[r[:, 0]], torch.where(old, HINDSIGHT_REST, BEYOND), positions, vocab)
            was = torch.arange(vocab, device=ids.device) == draft[r, at][..., None]
            then = hindsight(tables.log_mu[r, at], was, gumbel(keys[r[:, 0]], HINDSIGHT_TOP, at, 1), noise)
            z = torch.where(old[..., None], then, -torch.log(noise))
            holds = old if horizon is None else old & (positions <= first[r] + horizon)
            values = torch.where(holds[..., None], tilt.values[r, at], 0.0)
            said = (log_mu + z).scatter_add(-1, tilt.ids[r, at], values).argmax(-1)
            return said, _quantities(log_mu, tilt.ids[r, at], values, said)

        if isinstance(tables.cache, replay.Slots):
            totals += replay.carry_on(
                [model], [tables.cache], new_ids, first + 1, goes_on, choose, eos_ids, draft=ids, lookahead=lookahead
            )
        else:
            cache, attention = _right_align(tables.cache, tables.attention, go, tables.attention.shape[1] - length + first[go])
            attention = torch.cat([attention, attention.new_ones(len(go), 1)], 1)
            continued, reader = new_ids[go], _Reader([model], [cache])
            logits = reader(new_ids[go, first[go]][:, None], attention)[:, -1]
            # Wrong guesses leave gaps, which a window that counts slots would take for tokens.
            slots = attention.shape[1] + lookahead * ids.shape[1]
            ahead = lookahead if slots <= window(model) else 1
            totals[go] += _continue(reader, attention, logits, continued, first[go] + 1, choose, eos_ids, ids[go], ahead)
            new_ids[go] = continued
    new_mask = completion_mask(new_ids, eos_ids)
    logprobs, spent, log_ratio = totals.unbind(1)
    return Decoded(
        torch.where(changed[:, None], new_ids, ids),
        torch.where(changed[:, None], new_mask, mask),
        logprobs,
        spent,
        log_ratio,
        torch.where(changed, new_mask.sum(1) - first - 1, 0),
    )


def _verify(log_mu: Tensor, draft: Tensor, tilt: Tilt, keys: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """What the tilt makes of every token of a draft [R, T], were all before it unchanged: the token said instead, and whether it
    overtakes the old one, [R, T].

    Noise is needed for the tilted tokens only. All others together win with the value of the best of them, a Gumbel of their
    joint mass truncated like each of theirs, and which of them it is does not depend on that value.
    """
    top = gumbel(keys, HINDSIGHT_TOP, place, 1)
    some = log_mu.gather(-1, tilt.ids)
    # Capped before the tilt: rounding alone must not lift a rival over the token that won. A token that rounding has pushed
    # out of the support (this forward is parallel, the one that said it was not) stays as well, unless a rival is tilted.
    is_draft = tilt.ids == draft[..., None]
    noise = exponential(keys, HINDSIGHT_REST, place, tilt.ids)
    untilted = torch.minimum(some + hindsight(some, is_draft, top, noise), top)
    old = top[..., 0] + (tilt.values * is_draft).sum(-1)
    rival, which = (untilted + tilt.values).masked_fill(is_draft, -torch.inf).max(-1)
    token = tilt.ids.gather(-1, which[..., None])[..., 0]
    # The others: neither tilted nor the draft itself. What rounding leaves of 1 is none.
    said = log_mu.gather(-1, draft[..., None])[..., 0].masked_fill(is_draft.any(-1), -torch.inf)
    mass = 1 - some.exp().sum(-1) - said.exp() if tilt.ids.shape[-1] < log_mu.shape[-1] else torch.zeros_like(old)
    noise = exponential(keys, HINDSIGHT_OTHERS, place, 1)
    best = -torch.log((-top).exp() + noise / mass.clamp_min(1e-5)[..., None])[..., 0]
    other = (mass > 1e-5) & (best > rival) & (best > old)
    if other.any():
        r, t = other.nonzero(as_tuple=True)
        left = log_mu[r, t].scatter(-1, tilt.ids[r, t], -torch.inf).scatter(-1, draft[r, t][:, None], -torch.inf)
        token[r, t] = (left + gumbel(keys[r], WHICH_OTHER, t, left.shape[-1])).argmax(-1)
    return token, (rival > old) | other


def _quantities(log_mu: Tensor, ids: Tensor, values: Tensor, said: Tensor) -> Tensor:
    """[R, T, 3]: log mu of the tokens said [R, T]; KL(q || mu) where they were said; log q - log mu of them."""
    price, shift = _price(log_mu, ids, values)
    ratio = (values * (ids == said[..., None])).sum(-1) - shift
    some = (values != 0).any(-1)
    return torch.stack(
        [
            log_mu.gather(-1, said[..., None])[..., 0],
            torch.where(some, price, 0.0),
            torch.where(some, ratio, 0.0),
        ],
        -1,
    )


def _price(log_mu: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || mu) and log Z of q = mu exp(tilt) / Z, [R, T] each, for a tilt of `values` [R, T, K] at tokens `ids`."""
    events, tilt = with_rest(log_mu, ids), torch.nn.functional.pad(values, (0, 1))
    return kl(tilted(events, tilt), events), torch.logsumexp(events + tilt, -1)


def completion_mask(ids: Tensor, eos_ids: Tensor) -> Tensor:
    """True up to and including the first end-of-sequence token, which the padding may equal. [R, T]"""
    is_eos = torch.isin(ids, eos_ids)
    return is_eos.int().cumsum(1) - is_eos.int() == 0


def _forward(
    model: PreTrainedModel,
    ids: Tensor,
    attention: Tensor,
    cache: DynamicCache,
    depth: int = 0,
    hidden: Tensor | None = None,
    keep: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """`prefix.forward`, with the logits of the last `keep` positions, 0: of all. Position ids count real tokens: learned
    positions need it under padding."""
    return forward(
        model,
        depth,
        hidden,
        input_ids=ids,
        attention_mask=attention.long(),
        position_ids=positions_of(attention, ids.shape[1]),
        past_key_values=cache,
        use_cache=True,
        **({"logits_to_keep": keep} if keep else {}),
    )


class _Reader:
    """Models that read the same tokens, each with keys and values of its own; what they make of them stands side by side. A
    second one may read the states of the first behind `depth` layers instead."""

    def __init__(self, models: Sequence[PreTrainedModel], caches: Sequence[DynamicCache], depth: int = 0) -> None:
        self.models, self.caches, self.depth = models, caches, depth

    def __call__(self, ids: Tensor, attention: Tensor) -> Tensor:
        reads = [partial(_forward, m, ids, attention, cache) for m, cache in zip(self.models, self.caches, strict=True)]
        return side_by_side(reads, self.depth)

    def keep(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.batch_select_indices(rows)


def _continue(
    reader: _Reader,
    attention: Tensor,
    first: Tensor,
    ids: Tensor,
    start: Tensor,
    choose: Choose,
    eos_ids: Tensor,
    draft: Tensor | None = None,
    lookahead: int = 1,
) -> Tensor:
    """Fill `ids` [R, T] in place from position `start` [R] on, row by row its own position; finished rows leave the batch, as
    soon as there are enough of them: whenever rows leave, keys and values of all others are copied.

    `first` [R, ...] is what was read before `start`. With a draft [R, T], every forward also takes `lookahead - 1` tokens of it,
    and what follows counts as far as they were said. Returns the quantities of `choose`, added up along each row.
    """
    length = ids.shape[1]
    active = torch.arange(len(ids), device=ids.device)
    positions, guess, read = start.clone(), start.new_empty(len(ids), 0), first[:, None]
    slots = active  # where the rows that go on stand in the batch that is read
    totals: Tensor | None = None
    while True:
        places = positions[:, None] + torch.arange(guess.shape[1] + 1, device=ids.device)
        tokens, quantities = choose(active, places, read)
        # A token counts if all guesses before it were right, none of them was the last, and there is room for it.
        ends = torch.isin(tokens, eos_ids)
        right = (tokens[:, :-1] == guess) & ~ends[:, :-1]
        counts = torch.cat([torch.ones_like(ends[:, :1]), right.cumprod(1).bool()], 1) & (places < length)
        row, column = counts.nonzero(as_tuple=True)
        ids[active[row], places[row, column]] = tokens[row, column]
        if totals is None:
            totals = quantities.new_zeros(len(ids), quantities.shape[-1])
        totals[active] += torch.where(counts[..., None], quantities, 0.0).sum(1)
        count = counts.sum(1)
        last = (count - 1)[:, None]
        # The first column of the last forward held a token that had been said, the others guesses: wrong ones are unseen.
        width = guess.shape[1]
        if width:
            attention[slots, -width:] = counts[:, 1:]
        positions = positions + count
        goes_on = ~ends.gather(1, last)[:, 0] & (positions < length)
        said = tokens.gather(1, last)
        kept = goes_on.nonzero()[:, 0]
        if len(kept) == 0:
            return totals
        active, positions, said, slots = active[kept], positions[kept], said[kept], slots[kept]
        if len(slots) <= (1 - FINISHED) * len(attention):
            reader.keep(slots)
            attention, slots = attention[slots], torch.arange(len(slots), device=ids.device)
        if draft is not None and lookahead > 1:
            ahead = positions[:, None] + torch.arange(min(lookahead - 1, length - 1), device=ids.device)
            guess = draft[active[:, None], ahead.clamp(max=length - 1)]
            # Nothing follows the last place: what would stand there is unseen, and takes no position.
            seen = torch.cat([torch.ones_like(said, dtype=torch.bool), ahead < length - 1], 1)
        else:
            guess, seen = guess[: len(active)], torch.ones_like(said, dtype=torch.bool)
        # A finished row that has not left reads any token, of which nothing is seen.
        block, new = ids.new_zeros(len(attention), seen.shape[1]), seen.new_zeros(len(attention), seen.shape[1])
        block[slots], new[slots] = torch.cat([said, guess], 1), seen
        attention = torch.cat([attention, new], 1)
        read = reader(block, attention)
        if len(slots) < len(attention):
            read = read[slots]


def _right_align(cache: DynamicCache, attention: Tensor, rows: Tensor, lengths: Tensor) -> tuple[DynamicCache, Tensor]:
    """The first `lengths` slots of the given rows, moved to the right so that all rows continue in the same slot."""
    longest = int(lengths.max())
    source = torch.arange(longest, device=lengths.device) - (longest - lengths)[:, None]
    inside = source >= 0
    source = source.clamp_min(0)
    aligned = []
    for keys, values in layers_of(cache):
        take = source[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        aligned.append((keys[rows].gather(2, take), values[rows].gather(2, take)))
    return cache_of(aligned), attention[rows].gather(1, source) & inside
