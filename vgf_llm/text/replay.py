"""Decoding on a GPU: one CUDA graph per token, over keys and values of prompts that their particles share.

Launched one by one, the hundreds of kernels behind a token take ten times what the GPU needs for them. They can be recorded once
and replayed if no tensor changes its shape or place: keys and values of a completion stand in a slot per position, written over
where a guess was wrong, and finished rows stay, unseen. Particles of a prompt attend to one copy of its keys and values, which
are read once for all of them: at a prompt of 512 tokens and N = 8 the larger part of what a token has to read.

`decode` asks `fits` whether a model can be read in this way; the CPU's way is `decode._continue`. They differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .prefix import Prefix, forward, side_by_side, window


ATTENTION = "vgf_shared_prompts"
# Completions are attended to in whole multiples of so many slots: one graph for each.
SLOTS = 64
# Completions are read in blocks of so many tokens, whose scores are held for all of them at once.
BLOCK = 128
# Replays between two looks at whether anything goes on, for each of which the GPU waits.
PATIENCE = 8

# Rows [A] that go on, positions [A, k] and what was read there [A, k, ...], logits first -> the tokens they say [A, k], and of
# each what is to be added up along the completion, [A, k, quantities].
Choose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def fits(model: PreTrainedModel) -> bool:
    """Whether a model is on one GPU and can be read in this way.

    Load it with another `attn_implementation` than `sdpa`, and it is read as on a CPU.
    """
    return model.device.type == "cuda" and len({p.device for p in model.parameters()}) == 1 and plain(model)


def plain(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all that came before, with nothing but a mask, by transformers' `sdpa`, and the forward asks
    nothing of its tensors that a recorded graph could not know."""
    config = model.config.get_text_config()
    return (
        window(model) == math.inf
        and getattr(config, "attn_logit_softcapping", None) is None
        and config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
        and model._can_compile_fullgraph
        and not getattr(model, "is_quantized", False)
    )


@contextmanager
def shared_prompts(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Meanwhile the models attend as `Slots.read` needs it."""
    AttentionInterface.register(ATTENTION, attend)
    try:
        for model in models:
            model.set_attn_implementation(ATTENTION)
        yield
    finally:
        for model in models:
            model.set_attn_implementation("sdpa")


class Slots(Cache):
    """Keys and values of one model for R rows: of their prompts, once each, and of completions, a slot per position.

    Args:
        prefix: R rows. Rows of a prompt stand together; where prompts have different numbers of rows, each row gets a copy.
        model: which of the models that have read the prompts.
        capacity: S, slots of a completion.
    """

    def __init__(self, prefix: Prefix, model: int, capacity: int) -> None:
        heads, counts = prefix.rows.unique_consecutive(return_counts=True)
        if bool((counts != counts[0]).any()):
            heads = prefix.rows
        states = prefix.states[model]
        mask = prefix.mask[heads]  # [G, P]
        self.lengths = mask.sum(1).repeat_interleave(len(prefix.rows) // len(heads))  # [R]
        own = len(heads) == len(prefix.mask) and bool((heads == torch.arange(len(heads), device=heads.device)).all())
        self.prompts = states if own else [(keys[heads], values[heads]) for keys, values in states]  # [G, heads, P, size]
        dtype = self.prompts[0][0].dtype
        # Masks are numbers that a product of queries and keys starts from.
        self.mask = _additive(mask, dtype)[:, None]  # [G, 1, P]
        rows = len(self.lengths)
        self.places = self.lengths.new_zeros(rows, 1)  # [R, w] slots of the tokens that are read
        self.rows = torch.arange(rows, device=mask.device)[:, None, None]
        self.limit = capacity
        super().__init__(layers=[_Slots(self, keys, rows, capacity) for keys, _ in self.prompts])

    def grow(self, capacity: int) -> None:
        """Room for completions of S = `capacity` tokens."""
        for layer in cast("list[_Slots]", self.layers):
            layer.grow(capacity)

    def read(
        self, model: PreTrainedModel, ids: Tensor, places: Tensor, limit: int, depth: int = 0, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`prefix.forward` of tokens [R, w] that stand in the slots `places` [R, w]; they see the slots before them, of which the
        first `limit` are looked at."""
        self.places, self.limit = places, limit
        seen = torch.arange(limit, device=ids.device) <= places[:, None, :, None]
        mask, positions = _additive(seen, self.mask.dtype), self.lengths[:, None] + places
        # `slots` is handed through to `attend`, which gets keys and values, and not the cache they come from.
        return forward(
            model, depth, hidden,
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self, use_cache=True, slots=self,
        )  # fmt: skip


class _Slots(CacheLayerMixin):
    """One layer of `Slots`: keys and values [R, heads, S, size]."""

    is_croppable = False

    def __init__(self, owner: Slots, like: Tensor, rows: int, capacity: int) -> None:
        super().__init__()
        self.owner = owner
        # Zeros: what is not seen still takes part in a product, with weight 0.
        self.keys, self.values = (like.new_zeros(rows, like.shape[1], capacity, like.shape[3]) for _ in range(2))
        self.heads = torch.arange(like.shape[1], device=like.device)[:, None]
        self.is_initialized = True

    def grow(self, capacity: int) -> None:
        held = cast("tuple[Tensor, Tensor]", (self.keys, self.values))
        more = capacity - held[0].shape[2]
        if more > 0:
            self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, more)) for x in held)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held, slots = cast("tuple[Tensor, Tensor]", (self.keys, self.values)), self.owner
        for memory, new in zip(held, (key_states, value_states), strict=True):
            # Not `scatter_`, which torch.compile turns into a copy of all there is.
            memory.index_put_((slots.rows, self.heads, slots.places[:, None]), new)
        limit = slots.limit
        return held[0][:, :, :limit], held[1][:, :, :limit]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("the mask is given")

    def get_seq_length(self) -> int:
        return 0  # every row has a length of its own; models ask before they see that positions are given

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # what it was called in transformers 5.0


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    slots: Slots | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of tokens [R, w] to their prompts and to completions [R, S] up to them, in the form that transformers asks for.

    Args:
        query: [R, heads, w, size].
        key, value: [R, heads of keys, S, size].
        attention_mask: [R, 1, w, S], what is added to the scores.
        scaling: default 1 / sqrt(size).
        dropout: must be 0.
    """
    # GPT-2 of transformers 5.0 hands nothing on.
    if slots is None or dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} cannot be decoded with shared prompts (dropout, a soft cap, sinks, or keywords that do not "
            'get here): load the model with attn_implementation="eager"'
        )
    their_keys, their_values = slots.prompts[cast(int, module.layer_idx)]
    rows, heads, width, size = query.shape
    groups, kv, length = their_keys.shape[:3]
    scaling = size**-0.5 if scaling is None else scaling
    # Queries that look at the same keys side by side: those of one row, [R * kv, q, size], and of all rows of a prompt, [G * kv,
    # n * q, size].
    n, q = rows // groups, heads // kv * width
    own = query.reshape(rows * kv, q, size)
    alike = query.reshape(groups, n, kv, q, size).transpose(1, 2).reshape(groups * kv, n * q, size)
    start = attention_mask.expand(-1, heads, -1, -1).reshape(rows * kv, q, -1)
    first = slots.mask[:, None].expand(-1, kv, -1, -1).reshape(groups * kv, 1, length)
    here = torch.baddbmm(start, own, key.reshape(rows * kv, -1, size).mT, alpha=scaling)
    there = torch.baddbmm(first, alike, their_keys.reshape(groups * kv, length, size).mT, alpha=scaling)
    there = there.view(groups, kv, n, q, length).transpose(1, 2)
    scores = torch.cat([there, here.view(groups, n, kv, q, -1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    there = weights[..., :length].transpose(1, 2).reshape(groups * kv, n * q, length)
    seen = (there @ their_values.reshape(groups * kv, length, size)).view(groups, kv, n, q, size).transpose(1, 2)
    here = weights[..., length:].reshape(rows * kv, q, -1)
    out = torch.baddbmm(seen.reshape(rows * kv, q, size), here, value.reshape(rows * kv, -1, size))
    return out.view(rows, heads, width, size).transpose(1, 2), None


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


@torch.no_grad()
def read(model: PreTrainedModel, cache: Slots, ids: Tensor, depth: int = 0) -> tuple[Tensor, Tensor | None]:
    """`prefix.forward` of completions [R, T] from their first slot on."""
    parts, places = [], torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    with shared_prompts([model]):
        for start in range(0, ids.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            parts.append(cache.read(model, ids[:, block], places[:, block], min(start + BLOCK, ids.shape[1]), depth))
    out, hidden = zip(*parts, strict=True)
    return torch.cat(out, 1), torch.cat(hidden, 1) if depth else None


@torch.no_grad()
def carry_on(
    models: Sequence[PreTrainedModel],
    caches: Sequence[Slots],
    ids: Tensor,
    positions: Tensor,
    alive: Tensor,
    choose: Choose,
    eos_ids: Tensor,
    first: Tensor | None = None,
    draft: Tensor | None = None,
    lookahead: int = 1,
    depth: int = 0,
) -> Tensor:
    """Fill `ids` [R, T] in place from `positions` [R] on, as `decode._continue` does, for the rows that are `alive` [R].

    Args:
        models, caches: what they make of a token stands side by side, [R, w, ...].
        first: [R, ...] what was read before `positions`. None: the token before stands in `ids` and is read first.
        draft, lookahead: see `decode._continue`.
        depth: a second model reads the states of the first behind so many layers; 0: it reads the tokens.

    Returns the quantities of `choose`, added up along each row.
    """
    length, width = ids.shape[1], lookahead if draft is not None and first is None else 1
    rows, ahead = torch.arange(len(ids), device=ids.device), torch.arange(width, device=ids.device)
    for cache in caches:
        cache.grow(length + width)
    # Tokens that do not count go to a column of their own.
    said_so_far = torch.nn.functional.pad(ids, (0, 1))
    positions, alive = positions.clone(), alive.clone()
    said = said_so_far.gather(1, (positions - 1).clamp_min(0)[:, None])
    guess = _guess(draft, positions, width, length)
    totals: Tensor | None = None

    def take(read: Tensor, guess: Tensor) -> None:
        nonlocal totals
        places = positions[:, None] + ahead[: guess.shape[1] + 1]
        tokens, quantities = choose(rows, places, read)
        ends = (tokens[..., None] == eos_ids).any(-1)
        right = (tokens[:, :-1] == guess) & ~ends[:, :-1]
        counts = torch.cat([torch.ones_like(ends[:, :1]), right.cumprod(1).bool()], 1) & (places < length) & alive[:, None]
        said_so_far.scatter_(1, torch.where(counts, places, length), tokens)
        if totals is None:
            totals = quantities.new_zeros(len(ids), quantities.shape[-1])
        totals += torch.where(counts[..., None], quantities, 0.0).sum(1)
        count = counts.sum(1)
        last = (count - 1).clamp_min(0)[:, None]
        said.copy_(torch.where(alive[:, None], tokens.gather(1, last), said))
        positions.add_(count)
        alive.logical_and_(~ends.gather(1, last)[:, 0] & (positions < length))

    def step(limit: int) -> None:
        places = (positions - 1)[:, None] + ahead
        block = torch.cat([said, guess], 1)
        reads = [partial(cache.read, model, block, places, limit) for model, cache in zip(models, caches, strict=True)]
        take(side_by_side(reads, depth), guess)
        guess.copy_(_guess(draft, positions, width, length))

    reach = int(positions.max())
    if first is not None:
        take(first[:, None], guess)
        reach += 1
    seen: set[int] = set()
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    with shared_prompts(models):
        for index in range(length):
            if index % PATIENCE == 0 and not alive.any():
                break
            # No row has got further than it would have with every guess right.
            limit = min(length + width, -(-(reach + width) // SLOTS) * SLOTS)
            reach += width
            if limit not in seen or ids.device.type != "cuda":
                step(limit)  # in earnest, and so that nothing is left to be set up while kernels are recorded
                seen.add(limit)
                continue
            if limit not in graphs:
                graphs[limit] = torch.cuda.CUDAGraph()
                # Other threads may go on: that of a server, that which watches NCCL.
                with torch.cuda.graph(graphs[limit], capture_error_mode="thread_local"):
                    step(limit)
            graphs[limit].replay()
    ids.copy_(said_so_far[:, :length])
    assert totals is not None
    return totals


def _guess(draft: Tensor | None, positions: Tensor, width: int, length: int) -> Tensor:
    """The tokens of a draft from `positions` on, [R, width - 1]."""
    ahead = positions[:, None] + torch.arange(width - 1, device=positions.device)
    return ahead if draft is None else draft.gather(1, ahead.clamp(max=length - 1))
