"""The differentiable reward against the models' own forward, on unpadded rows, one at a time."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from tests import tiny
from vgf_llm.text import DifferentiableReward
from vgf_llm.text.reward import mix_embeddings


TOKENIZER = tiny.tokenizer()
VOCAB = len(TOKENIZER)
FAMILIES = ("llama", "gpt_neox", "gpt2", "opt", "qwen2")
MODELS = {family: tiny.reward_model(family, VOCAB) for family in FAMILIES}
REWARDS = {family: DifferentiableReward(model, TOKENIZER) for family, model in MODELS.items()}


def random_texts(rng, rows):
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(rows)]
    completions = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 7))] for _ in range(rows)]
    return prompts, completions


def padded(rng, prompts, completions, pad):
    return [
        *tiny.pad_left(prompts, pad, rng.randint(0, 3)),
        *tiny.pad_right(completions, pad, rng.randint(0, 3)),
    ]  # fmt: skip


@torch.no_grad()
def own_score(model, tokens):
    """The score as transformers computes it: no padding, no mask, a batch of one."""
    return float(model(input_ids=torch.tensor([tokens])).logits[0, 0])


def own_gradient(family, prompt, completion):
    """d score / d embedding of every completion token in float64, by the model's own forward, [T, D]."""
    model = tiny.reward_model(family, VOCAB).double()
    embeds = model.get_input_embeddings()(torch.tensor([prompt + completion])).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, 0].backward()
    return embeds.grad[0, len(prompt) :]


# Values


@given(case=st.integers(0, 10**9), family=st.sampled_from(FAMILIES))
@settings(max_examples=60)
def test_ids_embeddings_and_the_model_itself_give_one_score_under_any_padding(case, family):
    rng = random.Random(case)
    prompts, completions = random_texts(rng, 4)
    # Whatever token pads: also the end-of-sequence token and one that occurs in the texts.
    pad = rng.choice([TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, completions[0][-1]])
    prompt_ids, prompt_mask, ids, mask = padded(rng, prompts, completions, pad)
    reward = REWARDS[family]
    expected = torch.tensor([own_score(MODELS[family], p + c) for p, c in zip(prompts, completions, strict=True)])
    by_ids = reward.score_ids(prompt_ids, prompt_mask, ids, mask)
    torch.testing.assert_close(by_ids, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reward(prompt_ids, prompt_mask, reward.embed(ids), mask), expected, atol=1e-4, rtol=1e-4)
    raw = reward.member_scores_ids(prompt_ids, prompt_mask, ids, mask)
    assert torch.equal(raw, by_ids[None])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_on_padding_changes_nothing(family):
    rng = random.Random(family)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 6), 1)
    reward = REWARDS[family]
    embeds = reward.embed(ids)
    value, gradient = reward.value_and_grad(prompt_ids, prompt_mask, embeds, mask)
    spoiled = embeds + 100 * torch.randn_like(embeds) * ~mask[..., None]
    spoiled_prompt = torch.where(prompt_mask, prompt_ids, 7)
    value_2, gradient_2 = reward.value_and_grad(spoiled_prompt, prompt_mask, spoiled, mask)
    torch.testing.assert_close(value, value_2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, gradient_2, atol=1e-4, rtol=1e-4)


def test_a_reward_model_with_more_rows_than_the_tokenizer_has_tokens_is_welcome():
    wide = tiny.reward_model("llama", VOCAB + 13)
    reward = DifferentiableReward(wide, TOKENIZER)
    assert reward.table.shape == (VOCAB, 16)
    ids = torch.tensor([[5, 6]])
    ones = torch.ones(1, 2, dtype=torch.bool)
    assert reward.score_ids(ids, ones, ids, ones).item() == pytest.approx(own_score(wide, [5, 6, 5, 6]), abs=1e-4)


def test_coordinates_put_two_random_tokens_at_distance_one_in_every_member():
    reward = DifferentiableReward([MODELS["llama"], MODELS["gpt2"]], TOKENIZER)
    assert reward.width == 32 and torch.equal(reward.table, reward.embed(torch.arange(VOCAB)))
    for part, model in zip(reward.table.split(16, 1), (MODELS["llama"], MODELS["gpt2"]), strict=True):
        squared = torch.cdist(part, part).square()
        assert squared.mean().item() == pytest.approx(1, rel=1e-4)  # drawn with replacement
        weights = model.get_input_embeddings().weight[:VOCAB]
        torch.testing.assert_close(part / part.norm(), weights / weights.norm())


# Gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_model_itself_and_zero_on_padding(family):
    rng = random.Random(family)
    prompts, completions = random_texts(rng, 8)
    prompt_ids, prompt_mask, ids, mask = padded(rng, prompts, completions, TOKENIZER.eos_token_id)
    reward = REWARDS[family]
    values, gradient = reward.value_and_grad(prompt_ids, prompt_mask, reward.embed(ids), mask)
    torch.testing.assert_close(values, reward.score_ids(prompt_ids, prompt_mask, ids, mask))
    assert not values.requires_grad and not gradient.requires_grad
    # One unit of the flow is `unit` units of the embedding.
    unit = MODELS[family].get_input_embeddings().weight[:VOCAB].norm() / reward.table.norm()
    for r, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        expected = own_gradient(family, prompt, completion) * unit.double()
        torch.testing.assert_close(gradient[r, : len(completion)].double(), expected, atol=2e-4, rtol=2e-3, check_dtype=False)
        assert (gradient[r, len(completion) :] == 0).all()


def test_the_gradient_of_an_ensemble_equals_finite_differences():
    models = [tiny.reward_model("llama", VOCAB, seed=s) for s in range(2)] + [MODELS["gpt2"]]
    reward = DifferentiableReward(models, TOKENIZER, kappa=0.8, calibration=[(0.1, 0.5), (-0.4, 2.0), (0.0, 1.3)])
    rng = random.Random(0)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 6), 1)
    embeds = reward.embed(ids)
    _, gradient = reward.value_and_grad(prompt_ids, prompt_mask, embeds, mask)
    assert gradient.shape == (*ids.shape, 48)
    for _ in range(5):
        way = torch.randn_like(embeds) * mask[..., None]
        way = way / way.flatten(1).norm(dim=1)[:, None, None]
        h = 5e-3
        with torch.no_grad():
            up, down = (reward(prompt_ids, prompt_mask, embeds + s * h * way, mask) for s in (1, -1))
        predicted = (gradient * way).sum((1, 2))
        tolerance = 0.02 * gradient.flatten(1).norm(dim=1)
        assert (((up - down) / (2 * h) - predicted).abs() < tolerance + 2e-4).all()


@pytest.mark.parametrize("kappa", [0.0, 0.5, 2.0])
def test_members_are_calibrated_and_aggregated_as_mean_minus_kappa_std(kappa):
    models = [tiny.reward_model("llama", VOCAB, seed=s) for s in range(3)]
    calibration = [(0.3, 0.5), (-0.2, 2.0), (0.0, 1.0)]
    reward = DifferentiableReward(models, TOKENIZER, kappa=kappa, calibration=calibration)
    singles = [DifferentiableReward(model, TOKENIZER) for model in models]
    rng = random.Random(1)
    texts = padded(rng, *random_texts(rng, 5), 1)
    scores = torch.stack([single.score_ids(*texts) for single in singles]).double()
    torch.testing.assert_close(reward.member_scores_ids(*texts).double(), scores, atol=1e-5, rtol=1e-5)
    means, stds = (torch.tensor(c, dtype=torch.float64)[:, None] for c in zip(*calibration, strict=True))
    z = (scores - means) / stds
    centred = z - z.mean(0)
    std = centred.square().mean(0).sqrt()
    torch.testing.assert_close(reward.score_ids(*texts).double(), z.mean(0) - kappa * std, atol=1e-5, rtol=1e-5)

    prompt_ids, prompt_mask, ids, mask = texts
    _, gradient = reward.value_and_grad(prompt_ids, prompt_mask, reward.embed(ids), mask)
    # d (mean - kappa std) / d score_k, by hand.
    weights = (1 / 3 - kappa * centred / (3 * std)) / stds
    for k, (single, part) in enumerate(zip(singles, gradient.split(16, -1), strict=True)):
        _, own = single.value_and_grad(prompt_ids, prompt_mask, single.embed(ids), mask)
        torch.testing.assert_close(part, (weights[k][:, None, None] * own).float(), atol=1e-4, rtol=1e-3)


def test_members_that_agree_exactly_have_a_finite_gradient():
    reward = DifferentiableReward([MODELS["llama"], MODELS["llama"]], TOKENIZER, kappa=3.0)
    rng = random.Random(2)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 4), 1)
    values, gradient = reward.value_and_grad(prompt_ids, prompt_mask, reward.embed(ids), mask)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    single = REWARDS["llama"].score_ids(prompt_ids, prompt_mask, ids, mask)
    torch.testing.assert_close(values, single, atol=1e-4, rtol=1e-4)


def test_kappa_has_no_effect_on_one_member_and_calibration_has():
    rng = random.Random(3)
    texts = padded(rng, *random_texts(rng, 4), 1)
    plain = REWARDS["gpt2"].score_ids(*texts)
    torch.testing.assert_close(DifferentiableReward(MODELS["gpt2"], TOKENIZER, kappa=9.0).score_ids(*texts), plain)
    calibrated = DifferentiableReward([MODELS["gpt2"]], TOKENIZER, calibration=[(0.5, 4.0)])
    torch.testing.assert_close(calibrated.score_ids(*texts), (plain - 0.5) / 4)


def test_the_reward_is_frozen_and_gathers_no_gradients():
    model = tiny.reward_model("llama", VOCAB).train()
    reward = DifferentiableReward(model, TOKENIZER)
    rng = random.Random(4)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 4), 1)
    embeds = reward.embed(ids).requires_grad_()
    reward.value_and_grad(prompt_ids, prompt_mask, embeds, mask)
    assert embeds.grad is None
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not reward.score_ids(prompt_ids, prompt_mask, ids, mask).requires_grad


def test_gradients_come_where_the_caller_has_switched_them_off():
    rng = random.Random(5)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 2), 1)
    reward = REWARDS["llama"]
    with torch.no_grad():
        _, gradient = reward.value_and_grad(prompt_ids, prompt_mask, reward.embed(ids), mask)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_weights_give_float32_gradients(family):
    half = DifferentiableReward(tiny.reward_model(family, VOCAB).bfloat16(), TOKENIZER)
    rng = random.Random(6)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 4), 1)
    embeds = half.embed(ids)
    values, gradient = half.value_and_grad(prompt_ids, prompt_mask, embeds, mask)
    assert {embeds.dtype, half.table.dtype, values.dtype, gradient.dtype} == {torch.float32}
    _, full = REWARDS[family].value_and_grad(prompt_ids, prompt_mask, REWARDS[family].embed(ids), mask)
    assert torch.cosine_similarity(gradient.flatten(), full.flatten(), dim=0) > 0.98


# Errors


def test_a_path_with_another_vocabulary_is_refused(saved):
    with pytest.raises(ValueError, match="another vocabulary than the policy.*trained with the policy's tokenizer"):
        DifferentiableReward(saved["other_reward"], TOKENIZER)


def test_a_path_with_the_same_vocabulary_scores_as_the_model_that_was_saved(saved):
    reward = DifferentiableReward(str(saved["reward"]), TOKENIZER)
    rng = random.Random(7)
    prompts, completions = random_texts(rng, 3)
    model = LlamaForSequenceClassification.from_pretrained(saved["reward"]).eval()
    model.config.pad_token_id = None  # with it, the model would look for its last token by itself
    expected = [own_score(model, p + c) for p, c in zip(prompts, completions, strict=True)]
    found = reward.score_ids(*padded(rng, prompts, completions, 1))
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_smaller_embedding_is_refused():
    with pytest.raises(ValueError, match=f"embeds {VOCAB - 3} tokens.*has {VOCAB}.*one vocabulary"):
        DifferentiableReward(tiny.reward_model("llama", VOCAB - 3), TOKENIZER)


def test_several_labels_are_refused():
    with pytest.raises(ValueError, match="num_labels=2.*needs num_labels=1"):
        DifferentiableReward(tiny.reward_model("llama", VOCAB, num_labels=2), TOKENIZER)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="empty list.*at least one"):
        DifferentiableReward([], TOKENIZER)


def test_a_negative_kappa_is_refused():
    with pytest.raises(ValueError, match="kappa must not be negative.*0 is the mean"):
        DifferentiableReward(MODELS["llama"], TOKENIZER, kappa=-0.1)


def test_a_calibration_of_another_length_is_refused():
    with pytest.raises(ValueError, match="calibration has 1 entries for 2 reward models"):
        DifferentiableReward([MODELS["llama"], MODELS["gpt2"]], TOKENIZER, calibration=[(0.0, 1.0)])


def test_a_model_without_a_head_on_its_last_token_is_refused():
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=1
    )
    with pytest.raises(ValueError, match="no `score` head.*decoder-style"):
        DifferentiableReward(BertForSequenceClassification(config), TOKENIZER)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_model_that_yields_no_gradient_is_refused_when_one_is_asked_for_and_still_scores(guard):
    model = tiny.reward_model("llama", VOCAB)
    model.model.forward = guard()(model.model.forward)
    reward = DifferentiableReward(model, TOKENIZER)
    rng = random.Random(8)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 3), 1)
    assert torch.equal(
        reward.score_ids(prompt_ids, prompt_mask, ids, mask),
        REWARDS["llama"].score_ids(prompt_ids, prompt_mask, ids, mask),
    )
    with pytest.raises(ValueError, match="no gradient at its input embeddings.*steps=0"):
        reward.value_and_grad(prompt_ids, prompt_mask, reward.embed(ids), mask)


@pytest.mark.parametrize("first", [True, False])
def test_one_member_without_gradient_is_refused_in_an_ensemble_too(first):
    broken = tiny.reward_model("llama", VOCAB)
    broken.model.forward = torch.no_grad()(broken.model.forward)
    reward = DifferentiableReward([broken, MODELS["gpt2"]] if first else [MODELS["gpt2"], broken], TOKENIZER)
    rng = random.Random(9)
    prompt_ids, prompt_mask, ids, mask = padded(rng, *random_texts(rng, 3), 1)
    with pytest.raises(ValueError, match="no gradient at its input embeddings"):
        reward.value_and_grad(prompt_ids, prompt_mask, reward.embed(ids), mask)


def mixing_pair(family="llama"):
    tok = tiny.tokenizer()
    model = tiny.reward_model(family, len(tok), pad=tok.pad_token_id)
    base = tiny.language_model(family, len(tok), eos=tok.eos_token_id, pad=tok.pad_token_id)
    ids = torch.randint(5, len(tok), (6, 9))
    return model, base, ids


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_embeddings_lie_between_the_token_and_the_mean_of_the_base_model(family):
    model, base, ids = mixing_pair(family)
    chosen = torch.arange(9) >= 4
    table = model.get_input_embeddings()
    plain = table(ids)
    mix_embeddings(model, base, lambda ids: chosen.expand(ids.shape))
    model.train()
    mixed = table(ids)
    with torch.no_grad():
        probs = base(input_ids=ids).logits.softmax(-1)[:, :-1]
        toward = (probs @ table.weight[: probs.shape[-1]]) - plain[:, 1:]
    moved = (mixed - plain)[:, 1:]
    share = (moved * toward).sum(-1) / toward.square().sum(-1)
    torch.testing.assert_close(moved, share[..., None] * toward, atol=1e-5, rtol=1e-4)
    assert (share >= -1e-5).all() and (share <= 1 + 1e-5).all()
    assert torch.equal(mixed[:, :4], plain[:, :4])
    # One share per row where anything moves, and about half of the positions do.
    assert 0.2 < (share[:, 3:] > 1e-4).float().mean() < 0.8
    for row in share:
        values = row[row > 1e-4]
        assert (values - values.mean()).abs().max() < 1e-4 if len(values) else True


def test_embeddings_are_not_mixed_in_evaluation_nor_after_removal():
    model, base, ids = mixing_pair()
    plain = model(input_ids=ids).logits
    handle = mix_embeddings(model, base, lambda ids: torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(model.eval()(input_ids=ids).logits, plain)
    assert not torch.equal(model.train()(input_ids=ids).logits, plain)
    handle.remove()
    torch.testing.assert_close(model.train()(input_ids=ids).logits, plain)


def test_mixing_trains_the_reward_model_and_not_the_base_model():
    model, base, ids = mixing_pair()
    mix_embeddings(model, base, lambda ids: torch.ones_like(ids, dtype=torch.bool))
    model.train()(input_ids=ids).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in base.parameters())
