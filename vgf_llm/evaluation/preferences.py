"""Preference pairs from a base model's own texts, labelled by a noisy version of a gold reward.

Three kinds of pairs. *Samples*: two completions of one prompt. *Edits*: a completion and what becomes of it when one token is
replaced by another one the base model could have said there, the rest kept or written anew. A flow edits texts; a reward model
that has only compared whole texts ranks edits little better than chance, and its gradient leads to its errors (docs/method.md).
*Moved*: two completions drawn along the gradient field of an earlier reward model. Where that one errs the flow has gone too
far, and the labels say so (docs/ablations.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vgf_llm.flow import TransportBudget
from vgf_llm.text import BaseDistribution, VGFSampler, decode
from vgf_llm.text.prefix import Prefix


Pair = tuple[str, str, str]
PROMPTS_AT_ONCE = 128
# Budgets that moved pairs are drawn at, from no move to far beyond what a first reward model is good for.
MOVED_NATS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


def preference_pairs(
    base: Path,
    prompts: Sequence[str],
    gold: Callable[[str, str], float],
    *,
    samples: int,
    edits: int,
    noise: float,
    max_completion_length: int,
    seed: int,
) -> list[Pair]:
    """(prompt, chosen, rejected): `samples` pairs of two samples and `edits` pairs of a sample and an edit of it.

    The better text is chosen with probability `sigmoid(difference of gold / noise)`; pairs of equal gold are left out.
    """
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rng = random.Random(f"preferences {seed}")
    draw = _Drawer(model, tokenizer, max_completion_length)

    def two_samples() -> Iterator[Pair]:
        batch = [rng.choice(prompts) for _ in range(PROMPTS_AT_ONCE)]
        texts = draw.texts(*draw.sample(draw.encode(batch), 2, rng))
        yield from zip(batch, texts[::2], texts[1::2], strict=True)

    def edited_samples() -> Iterator[Pair]:
        batch = [rng.choice(prompts) for _ in range(PROMPTS_AT_ONCE)]
        prompt_ids = draw.encode(batch)
        ids, mask = draw.sample(prompt_ids, 1, rng)
        texts = draw.texts(ids, mask)
        # Twice the rest is kept: what one word does shows there alone. Once it is written anew, as a decode does it.
        for keep in (True, True, False):
            yield from zip(batch, texts, draw.edit(prompt_ids, ids, mask, keep, rng), strict=True)

    drawn = ((two_samples, samples), (edited_samples, edits))
    pairs = [pair for texts, count in drawn for pair in islice(_labelled(texts, gold, noise, rng), count)]
    rng.shuffle(pairs)
    return pairs


def moved_pairs(
    sampler: VGFSampler,
    prompts: Sequence[str],
    gold: Callable[[str, str], float],
    *,
    count: int,
    noise: float,
    max_completion_length: int,
    seed: int,
) -> list[Pair]:
    """(prompt, chosen, rejected): `count` pairs of two completions, each drawn along the sampler's gradient field at a budget of
    its own, one of `MOVED_NATS`. Labels are those of `preference_pairs`.

    Raises:
        ValueError: the sampler has no gradient field.
    """
    if sampler.field is None:
        raise ValueError("moved pairs are drawn along a gradient field: give the sampler one (gradient_field=)")
    rng = random.Random(f"moved {seed}")

    def texts(nats: float, batch: list[str]) -> list[str]:
        budget = TransportBudget(kl_budget=nats) if nats else TransportBudget(steps=0)
        seeds = [rng.getrandbits(40) for _ in batch]
        drawn = sampler.sample(batch, 1, budget, max_completion_length, seed=seeds, verify=False).transported
        return [text for (text,) in drawn.completions]

    def two_moved() -> Iterator[Pair]:
        batch = [rng.choice(prompts) for _ in range(PROMPTS_AT_ONCE)]
        first, second = (texts(rng.choice(MOVED_NATS), batch) for _ in range(2))
        yield from zip(batch, first, second, strict=True)

    return list(islice(_labelled(two_moved, gold, noise, rng), count))


def _labelled(
    texts: Callable[[], Iterator[Pair]], gold: Callable[[str, str], float], noise: float, rng: random.Random
) -> Iterator[Pair]:
    while True:
        for prompt, first, second in texts():
            difference = gold(prompt, first) - gold(prompt, second)
            if difference and first and second:
                better = rng.random() < 0.5 * (1 + math.tanh(0.5 * difference / noise))
                yield (prompt, first, second) if better else (prompt, second, first)


class _Drawer:
    """Samples and edits of one base model, as token ids."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.base = BaseDistribution()
        self.eos = torch.tensor([tokenizer.eos_token_id])

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer(p)["input_ids"] for p in prompts]

    def sample(self, prompt_ids: list[list[int]], n: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Ids and mask [P * n, T] of `n` completions per prompt."""
        keys = torch.tensor([rng.getrandbits(62) for _ in range(n * len(prompt_ids))])
        prefix = self._read(prompt_ids)
        drawn = decode.sample(
            self.model, prefix.deal(prefix.rows.repeat_interleave(n)), keys, base=self.base, max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos, pad_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return drawn.ids, drawn.mask

    def edit(self, prompt_ids: list[list[int]], ids: Tensor, mask: Tensor, keep: bool, rng: random.Random) -> list[str]:
        """The texts [P] with one token replaced; what follows it is kept, or written anew by the base model."""
        log_mu = decode.read(self.model, self._read(prompt_ids), ids, mask, self.base).log_mu
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        inside = mask & ~torch.isin(ids, self.eos)
        inside[:, 0] |= ~inside.any(1)
        place = torch.multinomial(inside.float(), 1, generator=generator)
        row = torch.arange(len(ids))[:, None]
        weights = log_mu[row, place][:, 0].exp().scatter(1, ids[row, place], 0.0)
        weights[:, self.eos] = 0.0
        new = ids.scatter(1, place, torch.multinomial(weights + 1e-12, 1, generator=generator))
        if keep:
            return self.texts(new, mask)
        heads = [n[: t + 1].tolist() for n, t in zip(new, place[:, 0].tolist(), strict=True)]
        tails, tail_masks = self.sample([p + h for p, h in zip(prompt_ids, heads, strict=True)], 1, rng)
        joined = [h + t[m].tolist() for h, t, m in zip(heads, tails, tail_masks, strict=True)]
        return [self._text(j[: self.max_new_tokens]) for j in joined]

    def texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        return [self._text(i[m].tolist()) for i, m in zip(ids, mask, strict=True)]

    def _text(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _read(self, prompt_ids: list[list[int]]) -> Prefix:
        batch = self.tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
        return decode.read_prompts(self.model, batch["input_ids"], batch["attention_mask"].bool())
