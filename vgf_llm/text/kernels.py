"""Attention of a few tokens per row to a prompt that their rows share and to what each row has said, in two Triton kernels.

The first lets the tokens of all rows of a prompt attend to it together, so that its keys and values are read once; the second
lets each row attend to its own slots, as many as it has filled, and joins the two. `replay.attend` computes the same without.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


# Keys that are held at a time.
BLOCK = 64


@triton.jit
def _to_prompts(  # type: ignore[no-untyped-def]
    query, keys, values, seen, out, lse, length, scaling, row_stride, head_stride, token_stride,
    KV: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One prompt and head of keys: ROWS * SHARED * WIDTH queries, of the rows, heads and tokens that look at it."""
    at, block = tl.program_id(0), tl.program_id(1)
    group, kv = at // KV, at % KV
    each = SHARED * WIDTH
    index = block * QUERIES + tl.arange(0, QUERIES)
    row, head, token = group * ROWS + index // each, kv * SHARED + index % each // WIDTH, index % WIDTH
    channel, there = tl.arange(0, CHANNELS), index < ROWS * each
    inside = channel < SIZE
    place = row.to(tl.int64) * row_stride + head * head_stride + token * token_stride
    q = tl.load(query + place[:, None] + channel[None], mask=there[:, None] & inside[None], other=0.0)
    best = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, CHANNELS], tl.float32)
    first = at.to(tl.int64) * length * SIZE
    for start in range(0, length, KEYS):
        slot = start + tl.arange(0, KEYS)
        where = first + slot[:, None] * SIZE + channel[None]
        visible = (slot < length)[:, None] & inside[None]
        k = tl.load(keys + where, mask=visible, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        open = tl.load(seen + group * length + slot, mask=slot < length, other=0) != 0
        score = tl.where(open[None], score, -1e30)
        higher = tl.maximum(best, tl.max(score, 1))
        shrink, weight = tl.exp(best - higher), tl.where(open[None], tl.exp(score - higher[:, None]), 0.0)
        v = tl.load(values + where, mask=visible, other=0.0)
        found = found * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total, best = total * shrink + tl.sum(weight, 1), higher
    result = at.to(tl.int64) * ROWS * each + index
    tl.store(out + result[:, None] * SIZE + channel[None], found / total[:, None], mask=there[:, None] & inside[None])
    tl.store(lse + result, best + tl.log(total), mask=there)


@triton.jit
def _to_own(  # type: ignore[no-untyped-def]
    query, keys, values, places, before, lse, out, capacity, scaling, row_stride, head_stride, token_stride,
    KV: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One row and head of keys: SHARED * WIDTH queries. `before`, `lse`: what they found in their prompt."""
    at = tl.program_id(0)
    row, kv = at // KV, at % KV
    index, channel = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    there, inside = index < SHARED * WIDTH, channel < SIZE
    head, token = kv * SHARED + index // WIDTH, index % WIDTH
    place = row.to(tl.int64) * row_stride + head * head_stride + token * token_stride
    q = tl.load(query + place[:, None] + channel[None], mask=there[:, None] & inside[None], other=0.0)
    last = tl.load(places + row * WIDTH + token, mask=there, other=0)
    best = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, CHANNELS], tl.float32)
    first = at.to(tl.int64) * capacity * SIZE
    for start in range(0, tl.max(last, 0) + 1, KEYS):
        slot = start + tl.arange(0, KEYS)
        where = first + slot[:, None] * SIZE + channel[None]
        visible = (slot < capacity)[:, None] & inside[None]
        k = tl.load(keys + where, mask=visible, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        open = slot[None] <= last[:, None]
        score = tl.where(open, score, -1e30)
        higher = tl.maximum(best, tl.max(score, 1))
        shrink, weight = tl.exp(best - higher), tl.where(open, tl.exp(score - higher[:, None]), 0.0)
        v = tl.load(values + where, mask=visible, other=0.0)
        found = found * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total, best = total * shrink + tl.sum(weight, 1), higher
    # Prompts were read by (prompt, head of keys, row, query).
    each = SHARED * WIDTH
    source = ((row // ROWS * KV + kv) * ROWS + row % ROWS).to(tl.int64) * each + index
    theirs = tl.load(lse + source, mask=there, other=0.0)
    read = tl.load(before + source[:, None] * SIZE + channel[None], mask=there[:, None] & inside[None], other=0.0)
    higher = tl.maximum(best, theirs)
    own, prompt = tl.exp(best - higher), tl.exp(theirs - higher)
    joined = (found * own[:, None] + read * prompt[:, None]) / (total * own + prompt)[:, None]
    # [R, WIDTH, heads, SIZE]
    target = ((row * WIDTH + token).to(tl.int64) * KV * SHARED + head) * SIZE
    tl.store(out + target[:, None] + channel[None], joined.to(out.dtype.element_ty), mask=there[:, None] & inside[None])


@torch.library.custom_op("vgf_llm::attention", mutates_args=())
def attention(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, prompt_keys: Tensor, prompt_values: Tensor, seen: Tensor,
    scaling: float,
) -> Tensor:  # fmt: skip
    """Attention [R, w, heads, size] of tokens that stand in the slots `places`.

    Args:
        query: [R, heads, w, size].
        keys, values: [R, heads of keys, S, size], contiguous; a token sees the slots up to its own.
        places: [R, w] int64, contiguous.
        prompt_keys, prompt_values: [G, heads of keys, P, size] of G prompts, R / G rows each, contiguous.
        seen: [G, P] int8, 0 for padding.
        scaling: of the products.
    """
    rows, heads, width, size = query.shape
    groups, kv, length = prompt_keys.shape[:3]
    n, shared = rows // groups, heads // kv
    each = shared * width
    out = query.new_empty(rows, width, heads, size)
    read = torch.empty(groups * kv, n * each, size, dtype=torch.float32, device=query.device)
    lse = torch.empty(groups * kv, n * each, dtype=torch.float32, device=query.device)
    # Matrix units take 16 rows at least.
    queries, channels = min(64, max(16, triton.next_power_of_2(n * each))), max(16, triton.next_power_of_2(size))
    strides = query.stride()[:3]
    _to_prompts[groups * kv, triton.cdiv(n * each, queries)](
        query, prompt_keys, prompt_values, seen, read, lse, length, scaling, *strides,
        KV=kv, ROWS=n, SHARED=shared, WIDTH=width, SIZE=size, QUERIES=queries, KEYS=BLOCK, CHANNELS=channels,
    )  # fmt: skip
    _to_own[(rows * kv,)](
        query, keys, values, places, read, lse, out, keys.shape[2], scaling, *strides,
        KV=kv, SHARED=shared, WIDTH=width, SIZE=size, ROWS=n, QUERIES=max(16, triton.next_power_of_2(each)), KEYS=BLOCK,
        CHANNELS=channels,
    )  # fmt: skip
    return out


@attention.register_fake
def _(query: Tensor, *others: Tensor | float) -> Tensor:
    rows, heads, width, size = query.shape
    return query.new_empty(rows, width, heads, size)
