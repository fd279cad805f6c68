"""Prompts that a causal model has read once, for all that is written after them.

N particles of a prompt, all their flow steps and all their decodes start behind the same tokens. Keys and values of the prompt
are computed once per prompt, and every later forward takes them as they are: it costs the completion alone, and a gradient at a
completion's embeddings never passes through the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Prefix:
    """B prompts as one or several models have read them, dealt to R rows.

    Attributes:
        mask: [B, P] bool, padded on either side.
        states: one entry per model: keys and values [B, heads, P, size] of every layer.
        logits: [B, V] at the last token of each prompt; None for models that say none.
        rows: [R] which prompt each row continues.
    """

    mask: Tensor
    states: Sequence[Layers]
    logits: Tensor | None
    rows: Tensor

    def deal(self, rows: Tensor) -> Prefix:
        """The same prompts for other rows: `rows` [R'] are indices of the rows of this prefix."""
        return replace(self, rows=self.rows[rows])

    def cache(self, model: int = 0) -> DynamicCache:
        """Keys and values of every row's prompt, to be continued; its own tensors, so that nothing here changes."""
        return cache_of([(keys[self.rows], values[self.rows]) for keys, values in self.states[model]])

    def attention(self, mask: Tensor) -> Tensor:
        """[R, P + T] bool: every row's prompt, and a mask [R, T] of what follows it."""
        return torch.cat([self.mask[self.rows], mask], 1)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P] of B lists of tokens, padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def layers_of(cache: DynamicCache) -> Layers:
    """Keys and values of every layer of a cache of attention layers that has been filled."""
    return [cast("tuple[Tensor, Tensor]", (layer.keys, layer.values)) for layer in cast("list[DynamicLayer]", cache.layers)]


def cache_of(layers: Layers) -> DynamicCache:
    """A cache that holds these keys and values.

    All of them, also where a model looks back through a window: its mask leaves out what is too far.
    """
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def positions(attention: Tensor, count: int) -> Tensor:
    """Position ids [R, count] of the last columns of a bool mask [R, S]: real tokens are counted, padding is not."""
    return (attention.long().cumsum(1) - 1).clamp_min(0)[:, -count:]
