"""Is the gradient right about what one other token would do? Predicted, learned and true changes of single substitutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from vgf_llm.flow import TransportBudget, fidelity
from vgf_llm.text import VGFSampler, decode
from vgf_llm.text.proxy import GradientAt, evaluation_points
from vgf_llm.text.sampler import Prompt

from .controls import random_direction


Gold = Callable[[str, str], float]
# Far above any log-probability: the token it is given to is said.
_FORCED = 1e4


@dataclass(frozen=True)
class Substitutions:
    """S substitutions of one token by another, in one sample of the base model for each of P prompts.

    Attributes:
        prompt: [S] index of the prompt.
        third: [S] 0, 1 or 2: first, middle or last third of the completion's tokens before the end of sequence.
        entropy: [S] of the base model at the position, nats.
        predicted: [S] by where the gradient is taken (token, mixture, path), and of a random direction of the same length.
        fixed: [S] change of the reward, the rest of the text kept.
        regenerated: [S] change of the mean reward where the base model writes the rest anew after the one token and after the
            other, with the same noise; empty without regenerations.
        members_fixed, members_regenerated: [K, S] the same of each of K > 1 reward models in its calibrated units; of one [0, S].
        gold_fixed, gold_regenerated: [S] the same of the gold reward; empty without it.
        end_share: [P] share of the last position, end of sequence or not, in the sum of the gradient's norms at the tokens.
        even_share: [P] one over the length: what `end_share` would be, were all positions alike.
        end_swap: [P] size of the change of the reward where the last token before the end becomes the likeliest other one.
    """

    prompt: Tensor
    third: Tensor
    entropy: Tensor
    predicted: dict[str, Tensor]
    fixed: Tensor
    regenerated: Tensor
    members_fixed: Tensor
    members_regenerated: Tensor
    gold_fixed: Tensor
    gold_regenerated: Tensor
    end_share: Tensor
    even_share: Tensor
    end_swap: Tensor


def substitution_fidelity(
    sampler: VGFSampler,
    prompts: Sequence[str],
    gold: Gold | None = None,
    *,
    max_completion_length: int,
    substitutions: int = 24,
    path_steps: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """`measure_substitutions` with the rest of the text kept, as rank correlations.

    Returns:
        `{at}_proxy` and `{at}_gold` for at in token, mixture, path: Spearman rank correlations of prediction and change.
        `proxy_gold`: that of the two changes. `{at}_sign` and `proxy_sign`: how often the sign is that of the change of gold,
        where gold changes. `substitutions`: how many there were.

    Raises:
        ValueError: those of `VGFSampler.sample`; fewer than two substitutions.
    """
    s = measure_substitutions(
        sampler, prompts, gold, max_completion_length=max_completion_length, substitutions=substitutions,
        path_steps=path_steps, seed=seed,
    )  # fmt: skip
    predicted = {at: change for at, change in s.predicted.items() if at != "random"}
    result = {f"{at}_proxy": fidelity(change, s.fixed) for at, change in predicted.items()}
    result["substitutions"] = float(len(s.prompt))
    if gold is not None:
        matters = s.gold_fixed != 0
        for name, change in (*predicted.items(), ("proxy", s.fixed)):
            result[f"{name}_gold"] = fidelity(change, s.gold_fixed)
            result[f"{name}_sign"] = float(((change > 0) == (s.gold_fixed > 0))[matters].float().mean())
    return result


@torch.no_grad()
def measure_substitutions(
    sampler: VGFSampler,
    prompts: Sequence[Prompt],
    gold: Gold | None = None,
    *,
    max_completion_length: int,
    substitutions: int = 24,
    regenerations: int = 0,
    path_steps: int = 4,
    seed: int = 0,
) -> Substitutions:
    """One sample per prompt, in which `substitutions` times one token becomes another that the base model could have said.

    Tokens come from the base model's own `sampler.candidates` likeliest at the position, by their probability; never the end of
    sequence. Predicted is `<g_t, E_v - E_y>` with the gradient g taken at the token, at the base model's mixture and along the
    path between them (mean over `path_steps` points).

    Args:
        prompts: strings, or chats where there is no gold reward.
        regenerations: how many times the rest is written anew, for both tokens with the same fresh noise.

    Raises:
        ValueError: those of `VGFSampler.sample`; no completion has a token that could be another.
    """
    encoded = sampler.encode(prompts, max_completion_length)
    # The rewritten texts of a prompt are the largest batch.
    per_chunk = max(1, sampler.flow_batch_size // substitutions)
    parts = []
    for first in range(0, len(prompts), per_chunk):
        some = prompts[first : first + per_chunk]
        drawn = sampler.sample(some, 1, TransportBudget(steps=0), max_completion_length, seed=seed).initial.completion_ids
        texts = _Texts(sampler, some, encoded[first : first + per_chunk], [row[0] for row in drawn], seed)
        part = texts.measure(first, gold, max_completion_length, substitutions, regenerations, path_steps)
        parts += [part] if part is not None else []
    if not parts:
        raise ValueError("no completion has a token that the base model could have said otherwise: see top_k and temperature")
    joined = {
        f.name: torch.cat([getattr(part, f.name) for part in parts], -1) for f in fields(Substitutions) if f.name != "predicted"
    }
    predicted = {at: torch.cat([part.predicted[at] for part in parts]) for at in parts[0].predicted}
    return Substitutions(predicted=predicted, **joined)


class _Texts:
    """Completions of a few prompts, [B, T], and what base model and reward say about them."""

    def __init__(
        self, sampler: VGFSampler, prompts: Sequence[Prompt], encoded: list[list[int]], drawn: list[list[int]], seed: int
    ) -> None:
        self.sampler, self.prompts = sampler, prompts
        pad, device = sampler.processing_class.pad_token_id, sampler.model.device
        self.prompt_ids, self.prompt_mask = _padded(encoded, pad, "left", device)
        self.ids, self.mask = _padded(drawn, pad, "right", device)
        depth = 0 if sampler.field is None else sampler.field.depth
        self.prefix = decode.read_prompts(sampler.model, self.prompt_ids, self.prompt_mask, depth)
        tables = decode.read(sampler.model, self.prefix, self.ids, self.mask, sampler.base, depth)
        self.log_mu, self.hidden = tables.log_mu, tables.hidden
        self.moves = self.mask & ~torch.isin(self.ids, sampler.eos_ids)
        self.keys = torch.cat([decode.row_keys(seed, [p], 1) for p in encoded]).to(device)

    def measure(
        self, first: int, gold: Gold | None, length: int, substitutions: int, regenerations: int, path_steps: int
    ) -> Substitutions | None:
        """None where no token of these texts can be replaced."""
        row, number, place, token = self._draw(substitutions)
        if not len(row):
            return None
        reward = self.sampler.reward
        tokens, table = reward.embed(self.ids), reward.table
        gradients = self._gradients(tokens, path_steps)
        step = table[token] - tokens[row, place]
        new = self.ids[row].clone()
        new[torch.arange(len(row)), place] = token
        everyone = torch.arange(len(self.ids), device=row.device)
        before, members_before = self._scores(self.prompt_ids, self.prompt_mask, self.ids, self.mask)
        after, members_after = self._scores(self.prompt_ids[row], self.prompt_mask[row], new, self.mask[row])
        regenerated, gold_regenerated, members_regenerated = torch.empty(0), torch.empty(0), torch.empty(0, 0)
        gold_fixed = torch.empty(0)
        if gold is not None:
            old_gold = torch.tensor(self._gold(gold, everyone, self.ids, self.mask))
            gold_fixed = torch.tensor(self._gold(gold, row, new, self.mask[row])) - old_gold[row.cpu()]
        if regenerations:
            said = self.ids[row, place]
            (r_new, m_new, g_new), (r_old, m_old, g_old) = (
                self._regenerated(row, number, place, other, forced, length, regenerations, gold)
                for other, forced in ((said, token), (token, said))
            )
            regenerated, members_regenerated, gold_regenerated = r_new - r_old, m_new - m_old, g_new - g_old
        log_mu = self.log_mu[row, place]
        norms = gradients["token"].norm(dim=-1) * self.mask
        last = self.mask.sum(1) - 1
        return Substitutions(
            prompt=(row + first).cpu(),
            third=(place * 3 // self.moves.sum(1)[row]).cpu(),
            entropy=-(log_mu.exp() * log_mu.nan_to_num(neginf=0.0)).sum(-1).cpu(),
            predicted={at: (g[row, place] * step).sum(-1).cpu() for at, g in gradients.items()},
            fixed=after - before[row.cpu()],
            regenerated=regenerated,
            members_fixed=members_after - members_before[:, row.cpu()],
            members_regenerated=members_regenerated,
            gold_fixed=gold_fixed,
            gold_regenerated=gold_regenerated,
            end_share=(norms[everyone, last] / norms.sum(1).clamp_min(1e-30)).cpu(),
            even_share=(1 / (last + 1)).cpu(),
            end_swap=self._end_swap(before),
        )

    def _gradients(self, tokens: Tensor, path_steps: int) -> dict[str, Tensor]:
        """[B, T, D] by where they are taken."""
        reward = self.sampler.reward
        mixture = self.log_mu.exp() @ reward.table
        result: dict[str, Tensor] = {}
        at: GradientAt
        for at, steps in (("token", 1), ("mixture", 1), ("path", path_steps)):
            points = (evaluation_points(tokens, tokens, mixture, self.moves, at, step, steps) for step in range(steps))
            taken = [reward.value_and_grad(self.prompt_ids, self.prompt_mask, p, self.mask)[1] for p in points]
            result[str(at)] = torch.stack(taken).mean(0)
        result["random"] = random_direction(result["path"], self.moves, self.keys)
        if (field := self.sampler.field) is not None:
            prefix = field.read(self.prompt_ids, self.prompt_mask, self.prefix.hidden)
            result["field"] = field.gradients(prefix, self.ids, self.mask, self.hidden)
        return result

    def _draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, number, position and new token of up to `count` substitutions in every row, by noise of the row alone."""
        sampler, rows = self.sampler, self.moves.any(1).nonzero()[:, 0]
        number = torch.arange(count, device=rows.device).expand(len(rows), count)
        u = decode.uniform(self.keys[rows], decode.CONTROL, number, 1)[..., 0]
        # The positions that move come first in a row, so this is one of them.
        place = (u * self.moves[rows].sum(1, keepdim=True)).long().flatten()
        row, number = rows.repeat_interleave(count), number.flatten()
        log_mu = self.log_mu[row, place]
        if sampler.candidates < log_mu.shape[-1]:
            log_mu = log_mu.masked_fill(log_mu < log_mu.topk(sampler.candidates, -1).values[..., -1:], -torch.inf)
        log_mu = self._without(log_mu, self.ids[row, place])
        # Noise of its own for every substitution, also where two meet at one position.
        noise = decode.gumbel(self.keys[row], decode.CONTROL, place + (number + 1) * 2**20, log_mu.shape[-1])
        # A site at which nothing else can be said stays as it is.
        kept = log_mu.exp().sum(-1) > 1e-6
        return row[kept], number[kept], place[kept], (log_mu + noise).argmax(-1)[kept]

    def _without(self, log_mu: Tensor, said: Tensor) -> Tensor:
        """log mu [S, V] of other tokens than the one that was said and the end of sequence, not normalised."""
        others = log_mu.scatter(-1, said[:, None], -torch.inf)
        others[:, self.sampler.eos_ids] = -torch.inf
        return others

    def _end_swap(self, rewards: Tensor) -> Tensor:
        rows = self.moves.any(1).nonzero()[:, 0]
        place = self.moves[rows].sum(1) - 1
        new = self.ids[rows].clone()
        log_mu = self._without(self.log_mu[rows, place], self.ids[rows, place])
        new[torch.arange(len(rows)), place] = log_mu.argmax(-1)
        swapped, _ = self._scores(self.prompt_ids[rows], self.prompt_mask[rows], new, self.mask[rows])
        rows = rows.cpu()
        return torch.zeros_like(rewards).index_copy(0, rows, (swapped - rewards[rows]).abs())

    def _regenerated(
        self, row: Tensor, number: Tensor, place: Tensor, other: Tensor, token: Tensor, length: int, count: int, gold: Gold | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean reward [S], that of every member [K, S] and gold reward [S] of `count` texts that go on after `token` at `place`.

        What stands before it is kept. A decode from a text that ends in another token, under a tilt that has `token` said: what
        follows is then noise of positions beyond that text, fresh and the same for every token.
        """
        sampler, pad = self.sampler, self.sampler.processing_class.pad_token_id
        width = int(place.max()) + 1
        column = torch.arange(length, device=place.device)
        mask = column <= place[:, None]
        ids = torch.full_like(mask, pad, dtype=torch.int64)
        ids[:, :width] = self.ids[row, :width]
        ids = ids.masked_fill(~mask, pad).scatter(1, place[:, None], other[:, None])
        prompt_ids, prompt_mask = self.prompt_ids[row], self.prompt_mask[row]
        tables = decode.read(sampler.model, self.prefix.deal(row), ids[:, :width], mask[:, :width], sampler.base)
        forced = torch.where(column[:width] == place[:, None], _FORCED, 0.0)
        tilt = decode.Tilt(token[:, None, None].expand(-1, width, 1), forced[..., None])
        rewards, members, golds = [], [], []
        for index in range(count):
            keys = torch.stack([decode.round_keys(self.keys, n * count + index) for n in range(int(number.max()) + 1)])
            decoded = decode.redecode(
                sampler.model, ids, mask, tables, tilt, keys[number, row],
                base=sampler.base, eos_ids=sampler.eos_ids, pad_id=pad, horizon=0,
            )  # fmt: skip
            score, by_member = self._scores(prompt_ids, prompt_mask, decoded.ids, decoded.mask)
            rewards.append(score)
            members.append(by_member)
            if gold is not None:
                golds.append(torch.tensor(self._gold(gold, row, decoded.ids, decoded.mask)))
        return (
            torch.stack(rewards).mean(0),
            torch.stack(members).mean(0),
            torch.stack(golds).mean(0) if golds else torch.empty(0),
        )

    def _scores(self, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Reward [S], and the calibrated scores [K, S] of several reward models; [0, S] of one, which is the reward."""
        reward = self.sampler.reward
        if len(reward.members) == 1:
            return reward.score_ids(prompt_ids, prompt_mask, ids, mask).cpu(), torch.empty(0, len(ids))
        scores = reward.member_scores_ids(prompt_ids, prompt_mask, ids, mask)
        mean, std = torch.tensor(reward.calibration, device=ids.device).T
        return reward.aggregate(scores).cpu(), ((scores - mean[:, None]) / std[:, None]).cpu()

    def _gold(self, gold: Gold, row: Tensor, ids: Tensor, mask: Tensor) -> list[float]:
        decoder = self.sampler.processing_class
        texts = [cast(str, decoder.decode(i[m], skip_special_tokens=True)) for i, m in zip(ids, mask, strict=True)]
        return [gold(cast(str, self.prompts[r]), text) for r, text in zip(row.tolist(), texts, strict=True)]


def _padded(rows: Sequence[Sequence[int]], pad: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    left = side == "left"
    ids = [[pad] * (width - len(r)) + list(r) if left else list(r) + [pad] * (width - len(r)) for r in rows]
    lengths, place = torch.tensor([len(r) for r in rows]), torch.arange(width)
    mask = place >= width - lengths[:, None] if left else place < lengths[:, None]
    return torch.tensor(ids, device=device), mask.to(device)
