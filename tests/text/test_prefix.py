"""Keys and values that grow: the numbers of transformers' own cache, without a copy for every token."""

import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from vgf_llm.text import DifferentiableReward, decode
from vgf_llm.text.prefix import ROOM, cache_of, layers_of


def numbers(rows: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.randn(rows, 2, count, 3, generator=generator) for _ in range(2))
    return keys, values


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_what_is_held_is_what_transformers_cache_holds(seed):
    generator = torch.Generator().manual_seed(seed)
    first = [numbers(6, 4, generator) for _ in range(2)]
    ours, theirs = cache_of(first), DynamicCache()
    for index, pair in enumerate(first):
        theirs.update(*pair, index)
    rows = 6
    for _ in range(3 * ROOM // 5):
        kind = int(torch.randint(8, (), generator=generator))
        if kind == 0 and rows > 1:
            kept = torch.randperm(rows, generator=generator)[: rows - 1].sort().values
            rows -= 1
            for cache in (ours, theirs):
                cache.batch_select_indices(kept)
        elif kind == 1:
            for cache in (ours, theirs):
                cache.crop(-2)
        else:
            for index in range(2):
                new = numbers(rows, max(1, kind - 1), generator)
                given, expected = ours.update(*new, index), theirs.update(*new, index)
                assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        for mine, other in zip(layers_of(ours), layers_of(theirs), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@torch.no_grad()
def test_a_token_is_written_behind_the_others_which_stay_where_they_are():
    generator = torch.Generator().manual_seed(0)
    cache = cache_of([numbers(4, 5, generator)])
    places = [cache.update(*numbers(4, 1, generator), 0)[0].data_ptr() for _ in range(ROOM)]
    assert len(set(places)) == 1


def test_what_a_gradient_passes_through_is_not_written_to():
    generator = torch.Generator().manual_seed(0)
    cache = cache_of([numbers(2, 3, generator)])
    new = torch.randn(2, 2, 1, 3, generator=generator, requires_grad=True)
    kept, _ = cache.update(new, new, 0)
    later, _ = cache.update(new * 2, new, 0)
    (kept.square().sum() + later.square().sum()).backward()
    torch.testing.assert_close(new.grad, 2 * new + 2 * new + 8 * new)


@torch.no_grad()
def test_rows_leave_when_a_quarter_is_finished_and_not_one_by_one():
    end, length, rows = 0, 12, 8
    calls: list[tuple[str, int]] = []

    class Reader:
        def __call__(self, ids, attention):
            calls.append(("read", len(ids)))
            return torch.zeros(len(ids), 1, 1)

        def keep(self, kept):
            calls.append(("keep", len(kept)))

    def choose(active, positions, read):
        # Row k ends at position k.
        tokens = torch.where(positions >= active[:, None], end, 5)
        return tokens, torch.ones(*tokens.shape, 1)

    ids = torch.full((rows, length), 9)
    attention, first = torch.ones(rows, 2, dtype=torch.bool), torch.zeros(rows, 1)
    start = torch.zeros(rows, dtype=torch.int64)
    totals = decode._continue(Reader(), attention, first, ids, start, choose, torch.tensor([end]))
    assert totals[:, 0].tolist() == [k + 1 for k in range(rows)]
    for k in range(rows):
        assert ids[k].tolist() == [5] * k + [end] + [9] * (length - k - 1)
    assert [count for name, count in calls if name == "keep"] == [6, 4, 3, 2, 1]
    assert [count for name, count in calls if name == "read"] == [8, 6, 6, 4, 3, 2, 1]


def test_steps_of_a_flow_share_one_copy_of_the_prompts():
    """Values and gradients are those of prompts that are copied anew, step after step, with shorter completions in between."""
    tokenizer = tiny.tokenizer()
    reward = DifferentiableReward([tiny.reward_model("gpt_neox", 21, seed=s) for s in (0, 1)], tokenizer)
    prompt_ids, prompt_mask = tiny.pad_left([[5, 6, 7], [8]], 0, 1)
    rows = torch.tensor([0, 0, 1, 1, 1])
    with torch.no_grad():
        prefix = reward.read(prompt_ids, prompt_mask).deal(rows)
    shared = prefix.spread(4)
    places = [keys.data_ptr() for layers in shared.states for keys, _ in layers]
    generator = torch.Generator().manual_seed(0)
    for length in (4, 4, 2, 4):
        embeds = torch.randn(5, length, reward.width, generator=generator)
        mask = torch.arange(length) < torch.tensor([4, 2, 1, 4, 3])[:, None]
        given = (prompt_ids[rows], prompt_mask[rows], embeds, mask)
        for ours, theirs in zip(reward.value_and_grad(*given, shared), reward.value_and_grad(*given, prefix), strict=True):
            assert torch.equal(ours, theirs)
    assert places == [keys.data_ptr() for layers in shared.states for keys, _ in layers]
