"""Moves that benchmarks/ablations.py compares with those of the library, and the rounds in which they are tried.

`Chains.run` is the loop of `VGFSampler.sample` with the move and its acceptance as arguments: under `embeddings` and `rises` it
gives what the sampler gives. All work is on R rows, prompts times particles; shapes as in `vgf_llm.text.decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vgf_llm.flow import TransportBudget, median_bandwidth, rbf_kernel, repulsion, squared_distances, transport
from vgf_llm.text import DifferentiableReward, VGFSampler, decode
from vgf_llm.text.decode import Decoded, Tables
from vgf_llm.text.prefix import Prefix, left_pad
from vgf_llm.text.proxy import evaluation_points, token_advantages


# The chances of a single-site edit: of one position, a floor in units of the mean over positions, so that every one can move.
FLOOR = 0.25
# Counter streams of an edit. They may be those of a decode with hindsight, which an edit does without.
SITE, TOKEN, CHANCE = 5, 6, 7


@dataclass(frozen=True)
class Rows:
    """R particles with all that a move of them needs. `unit` [R]: standard deviation of the initial rewards of their prompt."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    prefix: Prefix
    reward_prefix: Prefix
    text: Decoded
    rewards: Tensor
    unit: Tensor
    keys: Tensor

    def take(self, rows: Tensor) -> Rows:
        return Rows(*(_at(getattr(self, f.name), rows) for f in fields(Rows)))


@dataclass(frozen=True)
class Moved:
    """Proposed texts, and what Metropolis-Hastings adds to the difference of log targets: log of the proposals' odds, [R]."""

    text: Decoded
    odds: Tensor | None = None


Move = Callable[[VGFSampler, Rows], Moved]
# Rows, what is proposed, its rewards [R] -> which of them to take [R].
Accept = Callable[[Rows, Moved, Tensor], Tensor]


class Chains:
    """N particles of each prompt, drawn as `VGFSampler.sample` draws them; one seed per prompt."""

    @torch.no_grad()
    def __init__(self, sampler: VGFSampler, prompts: Sequence[str], n: int, length: int, seeds: Sequence[int]) -> None:
        self.sampler, self.shape = sampler, (len(prompts), n)
        encoded, pad = sampler.encode(prompts, length), sampler.processing_class.pad_token_id
        ids, mask = left_pad(encoded, pad, sampler.model.device)
        every = torch.arange(len(prompts), device=ids.device).repeat_interleave(n)
        keys = torch.cat([decode.row_keys(s, [p], n) for s, p in zip(seeds, encoded, strict=True)]).to(ids.device)
        prefix = decode.read_prompts(sampler.model, ids, mask).deal(every)
        reward_prefix = sampler.reward.read(ids, mask).deal(every)
        text = decode.sample(
            sampler.model, prefix, keys, base=sampler.base, max_new_tokens=length, eos_ids=sampler.eos_ids, pad_id=pad
        )
        none = torch.zeros(len(every), device=ids.device)
        rows = Rows(ids[every], mask[every], prefix, reward_prefix, text, none, none, keys)
        rewards = self._score(rows, text)
        unit = rewards.view(self.shape).std(1, correction=0).repeat_interleave(n)
        self.initial = replace(rows, rewards=rewards, unit=unit)

    def _score(self, rows: Rows, text: Decoded) -> Tensor:
        length = int(text.mask.sum(1).max())
        ids, mask = text.ids[:, :length], text.mask[:, :length]
        return self.sampler.reward.score_ids(rows.prompt_ids, rows.prompt_mask, ids, mask, rows.reward_prefix)

    @torch.no_grad()
    def run(self, move: Move, accept: Accept, rounds: int, movers: int) -> Iterator[tuple[Rows, Tensor]]:
        """After every round the particles as they stand, and tokens [R] decoded for them so far, initial ones included."""
        prompts, n = self.shape
        now, cost = self.initial, self.initial.text.new_tokens.clone()
        for index in range(rounds):
            best = now.rewards.view(self.shape).argsort(dim=1, descending=True, stable=True)[:, :movers].sort(1).values
            picked = (best + n * torch.arange(prompts, device=best.device)[:, None]).flatten()
            rows = now.take(picked)
            rows = replace(rows, keys=decode.round_keys(rows.keys, index))
            moved = move(self.sampler, rows)
            rewards = self._score(rows, moved.text)
            cost[picked] += moved.text.new_tokens
            take = (moved.text.ids != rows.text.ids).any(1) & accept(rows, moved, rewards)
            text = rows.text.moved(moved.text, take)
            now = replace(
                now,
                text=now.text.put(picked, text),
                rewards=now.rewards.index_copy(0, picked, torch.where(take, rewards, rows.rewards)),
            )
            yield now, cost


def rises(weight: float) -> Accept:
    """The rule of the library: `R + weight sigma log mu` rises."""

    def accept(rows: Rows, moved: Moved, rewards: Tensor) -> Tensor:
        price = weight * rows.unit * (rows.text.logprobs - moved.text.logprobs)
        return rewards - rows.rewards > price

    return accept


def always(rows: Rows, moved: Moved, rewards: Tensor) -> Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


def metropolis(nats: float) -> Accept:
    """Metropolis-Hastings for the target mu exp(R / alpha). See `temperature`."""

    def accept(rows: Rows, moved: Moved, rewards: Tensor) -> Tensor:
        assert moved.odds is not None, "this move has no odds: it cannot be reversed"
        chance = decode.uniform(rows.keys, CHANCE, torch.zeros_like(rows.keys), 1)[:, 0]
        return chance.log() < ((rewards - rows.rewards) / temperature(rows, nats) + moved.odds).double()

    return accept


def temperature(rows: Rows, nats: float) -> Tensor:
    """alpha [R] at which mu exp(R / alpha) is `nats` from mu, were rewards normal: KL = sigma^2 / (2 alpha^2)."""
    return (rows.unit / (2 * nats) ** 0.5).clamp_min(1e-6)


def embeddings(budget: TransportBudget) -> Move:
    """The library's move: a flow on embeddings, then the text decoded again with its own noise."""

    def move(sampler: VGFSampler, rows: Rows) -> Moved:
        tables, ids, moves = _read(sampler, rows)
        displacement = _flow(sampler, rows, budget, tables, ids, moves)
        advantage = token_advantages(displacement, tables.log_mu, sampler.reward.table, moves, _neutral(sampler))
        return Moved(_redecoded(sampler, rows, budget, tables, advantage, moves))

    return move


def hidden_states(budget: TransportBudget) -> Move:
    """A flow on the base model's last hidden states, which act on the reward through the mixture they stand for.

    A displacement d of the states makes the base model say `softmax(log mu + W d)`, and the reward is read where the embeddings
    of that mixture lie, by the same shares of the way from token to mixture as in the library. What is tilted is `W d` itself.
    """

    def move(sampler: VGFSampler, rows: Rows) -> Moved:
        tables, ids, moves = _read(sampler, rows)
        reward, log_mu = sampler.reward, tables.log_mu
        table, tokens = reward.table, reward.embed(ids)
        head = sampler.model.get_output_embeddings().weight[: log_mu.shape[-1]].float()  # type: ignore[union-attr]

        def score_fn(shift: Tensor, step: int) -> tuple[Tensor, Tensor]:
            said = (log_mu + shift[:, 0] @ head.T).softmax(-1)
            share = (step + 0.5) / budget.steps
            points = tokens + torch.where(moves[..., None], share * (said @ table - tokens), 0.0)
            values, gradient = reward.value_and_grad(
                rows.prompt_ids, rows.prompt_mask, points, rows.text.mask[:, : ids.shape[1]], rows.reward_prefix
            )
            worth = gradient @ table.T
            chain = said * (worth - (said * worth).sum(-1, keepdim=True))
            return values[:, None], (chain @ head)[:, None]

        start = tokens.new_zeros(len(ids), 1, ids.shape[1], head.shape[1])
        shift = transport(start, score_fn, budget, mask=moves[:, None]).particles[:, 0]
        advantage = token_advantages(shift, log_mu, head, moves, _neutral(sampler))
        return Moved(_redecoded(sampler, rows, budget, tables, advantage, moves))

    return move


def nearest_token(budget: TransportBudget) -> Move:
    """Every moved embedding rounded to the nearest token: what a flow on text gives where no language model decodes it."""

    def move(sampler: VGFSampler, rows: Rows) -> Moved:
        tables, ids, moves = _read(sampler, rows)
        tokens, table = sampler.reward.embed(ids), sampler.reward.table
        moved = tokens + _flow(sampler, rows, budget, tables, ids, moves)
        distances = torch.cdist(moved, table.expand(len(ids), -1, -1))
        distances[..., _neutral(sampler)] = torch.inf
        new = rows.text.ids.clone()
        new[:, : ids.shape[1]] = torch.where(moves, distances.argmin(-1), ids)
        text, _ = _as_decoded(sampler, rows, new, rows.text.mask)
        return Moved(text)

    return move


def single_site(gradient: bool, nats: float) -> Move:
    """One token proposed at one position, the rest of the text written anew by the base model.

    With the gradient: a position by the spread of first-order advantages C_t there, a token by `mu_t exp(C_t / (2 alpha))` over
    the base model's candidates. Without: any position, a token by mu_t. The odds make it exact under `metropolis`; the chances
    of the suffix cancel, since both directions write it by mu.
    """

    def move(sampler: VGFSampler, rows: Rows) -> Moved:
        log_mu, log_site, log_q = site_law(sampler, rows, gradient, nats)
        here, zero = torch.arange(len(rows.keys), device=rows.keys.device), torch.zeros_like(rows.keys)
        place = (log_site + decode.gumbel(rows.keys, SITE, zero, log_site.shape[1])).argmax(-1)
        token = (log_q[here, place] + decode.gumbel(rows.keys, TOKEN, zero, log_q.shape[-1])).argmax(-1)
        said = rows.text.ids[here, place]
        ids, mask, new_tokens = rewritten(sampler, rows, place, token)
        text, after = _as_decoded(sampler, rows, ids, mask)
        _, log_site_back, log_q_back = site_law(sampler, replace(rows, text=text), gradient, nats, after)
        there, back = log_q[here, place], log_q_back[here, place]
        at = log_mu[here, place]

        def ratio(log_q: Tensor, token: Tensor) -> Tensor:
            return (log_q - at).gather(-1, token[:, None])[:, 0]

        odds = ratio(back, said) - ratio(there, token) + log_site_back[here, place] - log_site[here, place]
        spent = decode.kl(there, at)
        return Moved(replace(text, kl=spent, log_ratio=ratio(there, token), new_tokens=new_tokens), odds)

    return move


def site_law(
    sampler: VGFSampler, rows: Rows, gradient: bool, nats: float, tables: Tables | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """log mu [R, T, V]; log chance of every position [R, T], -inf behind the end; log chance of every token there [R, T, V]."""
    length = int(rows.text.mask.sum(1).max())
    ids, mask = rows.text.ids[:, :length], rows.text.mask[:, :length]
    if tables is None:
        tables = decode.read(sampler.model, rows.prefix, ids, mask, sampler.base)
    log_mu = tables.log_mu
    if not gradient:
        return log_mu, torch.zeros_like(log_mu[..., 0]).masked_fill(~mask, -torch.inf).log_softmax(-1), log_mu
    reward, moves = sampler.reward, mask & ~torch.isin(ids, sampler.eos_ids)
    tokens = reward.embed(ids)
    # One gradient, halfway to the mixture: the midpoint rule with one step.
    points = evaluation_points(tokens, tokens, log_mu.exp() @ reward.table, moves, "path", 0, 1)
    _, slope = reward.value_and_grad(rows.prompt_ids, rows.prompt_mask, points, mask, rows.reward_prefix)
    advantage = token_advantages(slope, log_mu, reward.table, moves, _neutral(sampler))
    candidates, _ = decode.coarse(log_mu, sampler.candidates)
    kept = torch.zeros_like(advantage).scatter(-1, candidates, advantage.gather(-1, candidates))
    spread = (log_mu.exp() * kept.square()).sum(-1).sqrt()
    floor = FLOOR * spread.sum(1, keepdim=True) / mask.sum(1, keepdim=True) + 1e-6
    log_site = (spread + floor).log().masked_fill(~mask, -torch.inf).log_softmax(-1)
    return log_mu, log_site, decode.tilted(log_mu, kept / (2 * temperature(rows, nats)[:, None, None]))


def rewritten(sampler: VGFSampler, rows: Rows, place: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Texts [R, T] with `token` at `place`, what stands before it kept and what follows drawn from mu; and tokens drawn [R]."""
    pad, length = sampler.processing_class.pad_token_id, rows.text.ids.shape[1]
    column = torch.arange(length, device=place.device)
    ids = rows.text.ids.masked_fill(column >= place[:, None], pad).scatter(1, place[:, None], token[:, None])
    go = (~torch.isin(token, sampler.eos_ids) & (place < length - 1)).nonzero()[:, 0]
    if len(go):
        heads = [
            rows.prompt_ids[r][rows.prompt_mask[r]].tolist() + ids[r, : int(place[r]) + 1].tolist() for r in go.tolist()
        ]  # fmt: skip
        prefix = decode.read_prompts(sampler.model, *left_pad(heads, pad, place.device))
        rest = decode.sample(
            sampler.model, prefix, rows.keys[go], base=sampler.base,
            max_new_tokens=length - 1 - int(place[go].min()), eos_ids=sampler.eos_ids, pad_id=pad,
        )  # fmt: skip
        # What one that began late was given beyond the longest text falls off.
        index = column - place[go][:, None] - 1
        within = (index >= 0) & (index < rest.ids.shape[1])
        taken = rest.ids.gather(1, index.clamp(0, rest.ids.shape[1] - 1))
        ids[go] = torch.where(within, taken, ids[go])
    mask = decode.completion_mask(ids, sampler.eos_ids)
    drawn = (mask.sum(1) - place - 1).clamp_min(0)
    return ids.masked_fill(~mask, pad), mask, drawn


class PooledRepulsion(DifferentiableReward):
    """A reward whose gradient also keeps the particles of a prompt apart, by the mean embedding of each.

    The repulsion of SVGD between mean embeddings, the same at every position, with a root mean square over a prompt's particles
    of `strength` times that of the gradient.
    """

    def __init__(self, reward: DifferentiableReward, tokenizer: PreTrainedTokenizerBase, particles: int, strength: float) -> None:
        super().__init__(list(reward.members), tokenizer, kappa=reward.kappa, calibration=reward.calibration)
        self.particles, self.strength = particles, strength

    def value_and_grad(
        self, prompt_ids: Tensor, prompt_mask: Tensor, embeds: Tensor, mask: Tensor, prefix: Prefix | None = None
    ) -> tuple[Tensor, Tensor]:
        values, gradient = super().value_and_grad(prompt_ids, prompt_mask, embeds, mask, prefix)
        return values, gradient + self.strength * pooled_repulsion(embeds, gradient, mask, self.particles)


def pooled_repulsion(embeds: Tensor, gradient: Tensor, mask: Tensor, particles: int) -> Tensor:
    """Repulsion [R, T, D] of mean embeddings between the `particles` rows of each prompt, as large as their gradients."""
    inside = mask[..., None].to(embeds.dtype)
    mean = ((embeds * inside).sum(1) / inside.sum(1)).view(-1, particles, embeds.shape[-1])
    distances = squared_distances(mean)
    width = median_bandwidth(distances, torch.ones(mean.shape[:2], dtype=torch.bool, device=mean.device))
    away = repulsion(mean, rbf_kernel(distances, width), width).flatten(0, 1)[:, None] * inside

    def size(x: Tensor) -> Tensor:
        """Root mean square over particles of the norm of each, [prompts]."""
        return x.flatten(1).norm(dim=1).view(-1, particles).square().mean(1).sqrt()

    # Particles that coincide do not repel each other.
    factor = torch.where(size(away) > 0, size(gradient) / size(away), 0.0)
    return away * factor.repeat_interleave(particles)[:, None, None]


def _read(sampler: VGFSampler, rows: Rows) -> tuple[Tables, Tensor, Tensor]:
    """Tables of the texts, their ids up to the longest [R, T], and which positions a flow moves."""
    length = int(rows.text.mask.sum(1).max())
    ids, mask = rows.text.ids[:, :length], rows.text.mask[:, :length]
    return decode.read(sampler.model, rows.prefix, ids, mask, sampler.base), ids, mask & ~torch.isin(ids, sampler.eos_ids)


def _flow(sampler: VGFSampler, rows: Rows, budget: TransportBudget, tables: Tables, ids: Tensor, moves: Tensor) -> Tensor:
    """Displacement [R, T, D] of the embeddings, particles uncoupled."""
    reward, mask = sampler.reward, rows.text.mask[:, : ids.shape[1]]
    tokens, mixture = reward.embed(ids), tables.log_mu.exp() @ reward.table

    def score_fn(particles: Tensor, step: int) -> tuple[Tensor, Tensor]:
        points = evaluation_points(particles[:, 0], tokens, mixture, moves, sampler.gradient_at, step, budget.steps)
        values, gradient = reward.value_and_grad(rows.prompt_ids, rows.prompt_mask, points, mask, rows.reward_prefix)
        return values[:, None], gradient[:, None]

    return transport(tokens[:, None], score_fn, budget, mask=moves[:, None]).particles[:, 0] - tokens


def _redecoded(
    sampler: VGFSampler, rows: Rows, budget: TransportBudget, tables: Tables, advantage: Tensor, moves: Tensor
) -> Decoded:
    candidates, coarse = decode.coarse(tables.log_mu, sampler.candidates)
    gain = advantage.gather(-1, candidates)
    scale = decode.solve_scale(coarse, torch.nn.functional.pad(gain, (0, 1)), moves, budget.kl_budget)
    return decode.redecode(
        sampler.model, rows.text.ids, rows.text.mask, tables, decode.Tilt(candidates, scale[:, None, None] * gain), rows.keys,
        base=sampler.base, eos_ids=sampler.eos_ids, pad_id=sampler.processing_class.pad_token_id, horizon=sampler.horizon,
    )  # fmt: skip


def _as_decoded(sampler: VGFSampler, rows: Rows, ids: Tensor, mask: Tensor) -> tuple[Decoded, Tables]:
    """Texts [R, T] that no tilt has written, with their log mu."""
    length = int(mask.sum(1).max())
    tables = decode.read(sampler.model, rows.prefix, ids[:, :length], mask[:, :length], sampler.base)
    said = tables.log_mu.gather(-1, ids[:, :length, None])[..., 0].masked_fill(~mask[:, :length], 0.0).sum(1)
    none = torch.zeros_like(said)
    return Decoded(ids, mask, said, none, none, torch.zeros_like(ids[:, 0])), tables


def _neutral(sampler: VGFSampler) -> Tensor:
    return torch.cat([sampler.eos_ids, sampler.eos_ids.new_tensor([sampler.processing_class.pad_token_id])])


def _at(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Prefix):
        return value.deal(rows)
    return value.take(rows) if isinstance(value, Decoded) else value[rows]
