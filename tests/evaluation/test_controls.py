"""Control directions: what each keeps of the gradient, what it destroys, and that a batch changes nothing."""

import math

import pytest
import torch

from tests import tiny
from vgf_llm.evaluation.controls import flip, random_direction, shuffle_positions
from vgf_llm.flow import TransportBudget
from vgf_llm.text import VGFSampler
from vgf_llm.text.decode import row_keys


CONTROLS = (random_direction, flip, shuffle_positions)


def case(rows=6, length=9, width=5):
    gradient = torch.randn(rows, length, width)
    mask = torch.rand(rows, length) < 0.6
    mask[0], mask[1] = True, False
    return gradient.masked_fill(~mask[..., None], 0.0), mask, row_keys(0, [[1, 2]], rows)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("width", [1, 4, 5])
def test_shape_type_and_zero_outside_the_mask(control, width):
    gradient, mask, keys = case(width=width)
    dirty = gradient.masked_fill(~mask[..., None], 7.0)
    result = control(dirty, mask, keys)
    assert result.shape == gradient.shape and result.dtype == gradient.dtype
    assert (result[~mask] == 0).all() and result[mask].abs().sum() > 0
    assert control(dirty.bfloat16(), mask, keys).dtype == torch.bfloat16


@pytest.mark.parametrize("control", CONTROLS)
def test_a_row_does_not_depend_on_its_batch_nor_on_padding(control):
    gradient, mask, keys = case()
    together = control(gradient, mask, keys)
    for r in range(len(keys)):
        assert torch.equal(control(gradient[r : r + 1], mask[r : r + 1], keys[r : r + 1])[0], together[r])
    wider = torch.nn.functional.pad(gradient, (0, 0, 0, 3)), torch.nn.functional.pad(mask, (0, 3))
    assert torch.equal(control(*wider, keys)[:, : mask.shape[1]], together)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.equal(control(gradient[order], mask[order], keys[order]), together[order])


def test_random_direction_keeps_the_norm_of_every_position():
    gradient, mask, keys = case()
    gradient[0, 0] = 0
    result = random_direction(gradient, mask, keys)
    torch.testing.assert_close(result.norm(dim=-1), gradient.norm(dim=-1))
    assert not torch.equal(random_direction(gradient, mask, keys + 1), result)


def test_random_direction_points_everywhere_alike_and_not_along_the_gradient():
    rows, length, width = 300, 20, 7
    gradient = torch.zeros(rows, length, width)
    gradient[..., 0] = 1.0
    result = random_direction(gradient, torch.ones(rows, length, dtype=torch.bool), row_keys(1, [[3]], rows))
    flat = result.reshape(-1, width)
    n = len(flat)
    assert (flat.mean(0).abs() < 5 / math.sqrt(width * n)).all()
    torch.testing.assert_close(flat.T @ flat / n, torch.eye(width) / width, atol=0.012, rtol=0)
    # Fourth moment of one coordinate on the unit sphere: 3 / (d (d + 2)).
    torch.testing.assert_close(flat.pow(4).mean(0), torch.full((width,), 3 / (width * (width + 2))), atol=0.006, rtol=0)


def test_flip_is_minus():
    gradient, mask, keys = case()
    assert torch.equal(flip(gradient, mask, keys), -gradient)


def test_shuffle_is_a_permutation_of_the_positions_that_move():
    gradient, mask, keys = case()
    result = shuffle_positions(gradient, mask, keys)
    for g, m, r in zip(gradient, mask, result, strict=True):
        assert sorted(map(tuple, g[m].tolist())) == sorted(map(tuple, r[m].tolist()))
    assert not torch.equal(result[0], gradient[0])


def test_shuffle_gives_every_order_alike():
    rows = 3000
    gradient = torch.tensor([0.0, 1.0, 9.0, 2.0])[None, :, None].expand(rows, 4, 1)
    mask = torch.tensor([True, True, False, True]).expand(rows, 4)
    result = shuffle_positions(gradient, mask, row_keys(2, [[5]], rows))[..., 0]
    orders, counts = result[:, [0, 1, 3]].unique(dim=0, return_counts=True)
    assert len(orders) == 6
    assert (counts - rows / 6).abs().max() < 5 * math.sqrt(rows / 6)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_sampler_takes_them(control):
    tokenizer = tiny.tokenizer()
    model = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    sampler = VGFSampler(model, tiny.reward_model("llama", len(tokenizer), pad=tokenizer.pad_token_id), tokenizer)
    budget = TransportBudget(steps=2, kl_budget=3.0)
    both = sampler.sample(["the food", "a"], 3, budget, 8, verify=False, direction=control)
    alone = sampler.sample(["a"], 3, budget, 8, verify=False, direction=control)
    assert both.transported.completion_ids[1] == alone.transported.completion_ids[0]
