"""Prompts that a causal model has read once, for all that is written after them.

N particles of a prompt, all their flow steps and all their decodes start behind the same tokens. Keys and values of the prompt
are computed once per prompt, and every later forward takes them as they are: it costs the completion alone, and a gradient at a
completion's embeddings never passes through the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


Layers = list[tuple[Tensor, Tensor]]

# Tokens that keys and values get room for at a time.
ROOM = 64


@dataclass(frozen=True)
class Prefix:
    """B prompts as one or several models have read them, dealt to R rows.

    Attributes:
        mask: [B, P] bool, padded on either side.
        states: one entry per model: keys and values [B, heads, P, size] of every layer.
        logits: [B, V] at the last token of each prompt; None for models that say none.
        rows: [R] which prompt each row continues.
        room: tokens that there is memory for behind each prompt in `states`; 0: none.
        hidden: [B, P, H] hidden states between two layers of the one model (`forward`), if they were asked for.
    """

    mask: Tensor
    states: Sequence[Layers]
    logits: Tensor | None
    rows: Tensor
    room: int = 0
    hidden: Tensor | None = None

    def deal(self, rows: Tensor) -> Prefix:
        """The same prompts for other rows: `rows` [R'] are indices of the rows of this prefix."""
        assert not self.room, "rows that were spread write to memory of their own"
        return replace(self, rows=self.rows[rows])

    def spread(self, room: int) -> Prefix:
        """The same rows, each with a copy of its prompt and memory for `room` tokens behind it.

        Every forward behind it writes over what the last one wrote, and copies no prompt: the steps of a flow take turns. A
        backward has to come before the next forward, and no row may be dealt any more.
        """

        def copied(x: Tensor) -> Tensor:
            memory = x.new_empty(len(self.rows), x.shape[1], x.shape[2] + room, x.shape[3])
            memory[:, :, : x.shape[2]] = x[self.rows]
            return memory

        states = [[(copied(keys), copied(values)) for keys, values in layers] for layers in self.states]
        logits = None if self.logits is None else self.logits[self.rows]
        return Prefix(self.mask[self.rows], states, logits, torch.arange(len(self.rows), device=self.rows.device), room)

    def cache(self, model: int = 0) -> DynamicCache:
        """Keys and values of every row's prompt, to be continued; its own tensors, so that nothing here changes, but for the
        memory behind the prompts."""
        if self.room:
            cache = DynamicCache()
            cache.layers = [_SpreadLayer(keys, values, self.mask.shape[1]) for keys, values in self.states[model]]
            return cache
        return cache_of([(keys[self.rows], values[self.rows]) for keys, values in self.states[model]])

    def attention(self, mask: Tensor) -> Tensor:
        """[R, P + T] bool: every row's prompt, and a mask [R, T] of what follows it."""
        return torch.cat([self.mask[self.rows], mask], 1)


def stack(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a transformer.

    Raises:
        ValueError: they are not in a list called `layers` or `h`.
    """
    decoder = model.get_decoder()
    for name in ("layers", "h"):
        if isinstance(found := getattr(decoder, name, None), nn.ModuleList):
            return found
    raise ValueError(
        f"{type(decoder).__name__} has no list `layers` or `h` of them that a gradient field could share: fit one with layers=0"
    )


@contextmanager
def entered(model: PreTrainedModel, hidden: Tensor | None) -> Iterator[None]:
    """Meanwhile the layers of a transformer begin with the states `hidden` [R, w, H], not with the embeddings of its tokens.

    A hook and not `inputs_embeds`, to which models add their learned positions, or which they scale.
    """
    if hidden is None:
        yield
        return
    begin = hidden.to(model.dtype)
    handle = stack(model)[0].register_forward_pre_hook(lambda layer, given: (begin, *given[1:]))
    try:
        yield
    finally:
        handle.remove()


def forward(model: PreTrainedModel, depth: int = 0, hidden: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    """What a model makes of R rows of w tokens, logits or, without a head, hidden states [R, w, ...]; and its states [R, w, H]
    behind the first `depth` of its layers, unless that is 0. See `entered` for `hidden`."""
    with entered(model, hidden):
        out = model(**inputs, **({"output_hidden_states": True} if depth else {}))
    return out[0], out.hidden_states[depth] if depth else None


def side_by_side(reads: Sequence[Callable[[int, Tensor | None], tuple[Tensor, Tensor | None]]], depth: int) -> Tensor:
    """What models make of the same tokens [R, w, ...], the first of which hands on its states behind `depth` layers, unless that
    is 0. Each of `reads` is `forward` of a model, but for these two arguments."""
    hidden, found = None, []
    for read in reads:
        out, hidden = read(depth, hidden)
        found.append(out)
        depth = 0
    return found[0] if len(found) == 1 else torch.cat(found, -1)


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
    cache.layer_class_to_replicate = _RoomyLayer
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values with free memory behind them, where what is decoded next is written.

    `DynamicLayer` copies all there is for every token that comes, T^2 / 2 tokens in a completion of T. That took more than half
    of the time of drawing (docs/speed.md).
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: list[Tensor] = []
        self._given: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What is held, and these behind it. [R, heads, S, size] each."""
        # What a gradient passes through must not be written to.
        if torch.is_grad_enabled() or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        held = cast("tuple[Tensor, Tensor]", (self.keys, self.values))
        end, size = held[0].shape[2], held[0].shape[2] + key_states.shape[2]
        # Rows that were selected or slots that were cut off are other tensors, in memory of their own.
        if held[0] is not self._given or size > self._memory[0].shape[2]:
            self._memory = [x.new_empty(*x.shape[:2], size + ROOM, x.shape[3]) for x in held]
            for memory, x in zip(self._memory, held, strict=True):
                memory[:, :, :end] = x
        for memory, x in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, end:size] = x
        self.keys, self.values = (memory[:, :, :size] for memory in self._memory)
        self._given = self.keys
        return self.keys, self.values


class _SpreadLayer(DynamicLayer):
    """Keys and values of prompts of `length` tokens, at the front of memory [R, heads, S, size] for what follows."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._memory = (keys, values)
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What is held, and these behind it. [R, heads, S, size] each."""
        start = self.get_seq_length()
        self.keys, self.values = (
            _Write.apply(memory, new, start) for memory, new in zip(self._memory, (key_states, value_states), strict=True)
        )
        return self.keys, self.values


class _Write(torch.autograd.Function):
    """memory[:, :, :start] and `new` behind it, where it is written: a gradient belongs to `new` alone."""

    @staticmethod
    def forward(ctx: Any, memory: Tensor, new: Tensor, start: int) -> Tensor:
        ctx.start, end = start, start + new.shape[2]
        memory[:, :, start:end] = new
        return memory[:, :, :end]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, gradient[:, :, ctx.start :], None


def positions(attention: Tensor, count: int) -> Tensor:
    """Position ids [R, count] of the last columns of a bool mask [R, S]: real tokens are counted, padding is not."""
    return (attention.long().cumsum(1) - 1).clamp_min(0)[:, -count:]


def window(model: PreTrainedModel) -> float:
    """How many slots back the shortest-sighted layer of a model sees."""
    config = model.config.get_text_config()
    if all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ["unknown"]):
        return math.inf
    return min(getattr(config, name, None) or math.inf for name in ("sliding_window", "attention_chunk_size"))
