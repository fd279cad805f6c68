"""Decoding at fixed shapes says what decoding does: here without a GPU, step by step instead of replayed."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.decoding import prompts_of
from vgf_llm.flow import TransportBudget
from vgf_llm.text import VGFSampler, decode, replay
from vgf_llm.text.decode import BaseDistribution
from vgf_llm.text.field import SCALES, GradientField, last_layers


VOCAB = 9
MODELS = {family: tiny.language_model(family, VOCAB + 2, seed=5) for family in tiny.FAMILIES}
PLAIN = TransportBudget(steps=2, step_size=0.5, kl_budget=2.0, rounds=2)


@pytest.fixture
def fixed_shapes(monkeypatch):
    """On and off: whether a CPU decodes as a GPU would."""

    def switch(on):
        monkeypatch.setattr(replay, "fits", replay.plain if on else lambda model: False)

    switch(True)
    return switch


def rows_of(decoded):
    return [ids[mask].tolist() for ids, mask in zip(decoded.ids, decoded.mask, strict=True)]


def assert_same(ours, theirs):
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.new_tokens, theirs.new_tokens)
    for name in ("logprobs", "kl", "log_ratio"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_models_are_read_so_on_a_gpu_alone(family):
    assert replay.plain(MODELS[family]) and not replay.fits(MODELS[family])
    loaded = tiny.language_model(family, VOCAB)
    loaded.set_attn_implementation("eager")
    assert not replay.plain(loaded)


@given(case=st.integers(0, 10**9))
@settings(max_examples=40)
def test_samples_tables_and_moved_completions_are_the_same(case):
    rng = random.Random(case)
    model = MODELS[rng.choice(tiny.FAMILIES)]
    pad, eos = rng.choice([(0, [0]), (1, [0]), (1, [0, 4])])
    base = BaseDistribution(rng.choice([0.7, 1.6]), rng.choice([0, 4]), rng.choice([1.0, 0.9]), vocab_size=VOCAB)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(3)]
    n, length, horizon, lookahead = rng.choice([1, 4]), rng.choice([1, 6, 30]), rng.choice([None, 0, 2]), rng.choice([1, 2, 4])
    keys = decode.row_keys(case, prompts, n)
    if rng.random() < 0.3:  # prompts with different numbers of rows
        keep = torch.tensor([0, *range(n, len(keys))] if n > 1 else [2, 0, 1, 1])
    else:
        keep = torch.arange(len(keys))
    keys = keys[keep]
    push = torch.randn(len(keys), length, VOCAB, generator=torch.Generator().manual_seed(case)) * rng.choice([0.5, 2.0])
    found = []
    for on in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replay, "fits", replay.plain if on else lambda model: False)
            patch.setattr(replay, "SLOTS", 8)  # several graphs for a long completion
            patch.setattr(replay, "BLOCK", 10)
            prefix = prompts_of(model, prompts, n, pad, rng.randint(0, 2)).deal(keep)
            drawn = decode.sample(model, prefix, keys, base=base, max_new_tokens=length, eos_ids=torch.tensor(eos), pad_id=pad)
            width = int(drawn.mask.sum(1).max())
            tables = decode.read(model, prefix, drawn.ids[:, :width], drawn.mask[:, :width], base)
            assert isinstance(tables.cache, replay.Slots) == on
            tilt = decode.Tilt(torch.arange(VOCAB).expand(len(keys), width, VOCAB), push[:, :width])
            moved = decode.redecode(
                model, drawn.ids, drawn.mask, tables, tilt, decode.round_keys(keys, 1),
                base=base, eos_ids=torch.tensor(eos), pad_id=pad, horizon=horizon, lookahead=lookahead,
            )  # fmt: skip
        found.append((drawn, tables.log_mu.masked_fill(~drawn.mask[:, :width, None], 0.0), moved))
    (drawn, log_mu, moved), (drawn_too, log_mu_too, moved_too) = found
    assert_same(drawn_too, drawn)
    assert_same(moved_too, moved)
    torch.testing.assert_close(log_mu_too, log_mu, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def a_field(sampler, family, depth):
    backbone = tiny.language_model(family, len(sampler.processing_class), seed=7).base_model
    field = GradientField(last_layers(backbone, 1) if depth else backbone, sampler.reward.width, depth)
    torch.nn.init.normal_(field.slope.weight, generator=torch.Generator().manual_seed(3))
    field.nats.copy_(torch.tensor(SCALES).square())
    return field


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_call_of_the_sampler_is_the_same(family, depth, fixed_shapes):
    """Along the reward's gradient and along a field, whose distributions are kept, also beyond the end of a completion."""
    tokenizer = tiny.tokenizer()
    ids = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    model, reward = tiny.language_model(family, 21, **ids), tiny.reward_model("llama", 21, pad=ids["pad"])
    prompts, found = ["the food was", "good", "a bad room and the nice staff were"], {}
    for on in (False, True):
        fixed_shapes(on)
        sampler = VGFSampler(model, reward, tokenizer)
        along = VGFSampler(model, reward, tokenizer, gradient_field=a_field(sampler, family, depth))
        found[on] = [
            sampler.sample(prompts, 4, PLAIN, 12, seed=1),
            along.sample(prompts, 4, PLAIN, 12, seed=1, dense=True),
            along.sample(prompts[::-1], 4, PLAIN, 12, seed=1, dense=True),
        ]
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert ours.initial.completion_ids == theirs.initial.completion_ids
        assert ours.transported.completion_ids == theirs.transported.completion_ids
        torch.testing.assert_close(ours.transported.kl, theirs.transported.kl, atol=1e-4, rtol=1e-4)
        if theirs.drawn_from is not None:
            assert torch.equal(ours.drawn_from.ids, theirs.drawn_from.ids)
            torch.testing.assert_close(ours.drawn_from.log_q, theirs.drawn_from.log_q, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.drawn_from.kl, theirs.drawn_from.kl, atol=1e-4, rtol=1e-4)
    assert found[True][0].transported.completion_ids != found[True][0].initial.completion_ids
    assert found[True][1].initial.kl.max() > 0


def test_prompts_are_held_once_for_all_their_rows(fixed_shapes):
    model = MODELS["llama"]
    prefix = prompts_of(model, [[2, 3, 4], [5]], 4, 1)
    slots = replay.Slots(prefix, 0, 10)
    assert all(ours is theirs for ours, theirs in zip(slots.prompts, prefix.states[0], strict=True))
    assert len(slots.layers[0].keys) == 8


def test_what_attention_cannot_do_is_said():
    class Module(torch.nn.Module):
        layer_idx = 0

    x = torch.zeros(1, 1, 1, 2)
    for missing in ({"softcap": 2.0}, {"dropout": 0.1}, {}):
        with pytest.raises(NotImplementedError, match="eager"):
            replay.attend(Module(), x, x, x, x, slots=None, **missing)


def test_a_model_with_adapters_is_the_same(fixed_shapes):
    tokenizer = tiny.tokenizer()
    ids = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    model = tiny.language_model("llama", len(tokenizer), **ids)
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"))
    reward, found = tiny.counting_reward(tokenizer), []
    for on in (True, False):
        fixed_shapes(on)
        found.append(VGFSampler(adapted, reward, tokenizer).sample(["the food was", "good"], 4, PLAIN, 12, seed=1))
    assert found[0].transported.completion_ids == found[1].transported.completion_ids
    torch.testing.assert_close(found[0].transported.logprobs, found[1].transported.logprobs, atol=1e-4, rtol=1e-4)
