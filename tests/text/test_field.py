"""The learned gradient: it estimates what a token is worth over all that may follow, and the sampler follows it as any other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.text.test_sampler import BUDGET, EOS, LENGTH, PROMPTS, TOKENIZER, VOCAB, build, numbers_of, raw_gain, result_of
from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFSampler, decode
from vgf_llm.text.field import HEADS, GradientField, fit_field
from vgf_llm.text.prefix import left_pad


def fitted(sampler, **arguments):
    settings = {"num_samples": 64, "max_completion_length": LENGTH, "epochs": 6, "batch_size": 32, "learning_rate": 3e-3}
    return fit_field(sampler, PROMPTS, **{**settings, **arguments})


COUNT = build(reward="count")
FIELD = fitted(COUNT)


def exact_action_values(sampler, prompt, length):
    """E[R | x, y_1 = v] for every token v, by enumeration of all completions of `length` <= 3 tokens."""
    words = torch.cartesian_prod(*[torch.arange(VOCAB)] * length)
    prompt_ids = torch.tensor([sampler.encode([prompt], length)[0]]).expand(len(words), -1)
    prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    mask = decode.completion_mask(words, sampler.eos_ids)
    with torch.no_grad():
        logits = sampler.model(torch.cat([prompt_ids, words], 1)).logits[:, prompt_ids.shape[1] - 1 : -1, :VOCAB].double()
    log_mu = logits.log_softmax(-1).gather(-1, words[..., None])[..., 0]
    probability = log_mu[:, 1:].sum(1).exp()
    rewards = sampler.reward.score_ids(prompt_ids, prompt_mask, words, mask).double()
    return (probability * rewards).view(VOCAB, -1).sum(1), logits[:: VOCAB ** (length - 1), 0].softmax(-1)[0]


def test_the_field_estimates_what_a_token_is_worth_over_all_that_may_follow():
    sampler = build(reward=tiny.reward_model("llama", VOCAB, seed=5))
    field = fitted(sampler, num_samples=400, max_completion_length=3, epochs=8)
    share, ordered = [], []
    for prompt in PROMPTS:
        values, mu = exact_action_values(sampler, prompt, 3)
        exact = values - (mu * values).sum()
        ids, mask = left_pad(sampler.encode([prompt], 3), 0, torch.device("cpu"))
        nothing = torch.zeros(1, 1, dtype=torch.int64)
        gradient = field.gradients(field.read(ids, mask), nothing, torch.ones(1, 1, dtype=torch.bool))[0, 0].double()
        table = sampler.reward.table.double()
        # Fitted to standardised rewards: the scale is left to least squares.
        learned = (table - mu @ table) @ gradient
        slope = (mu * exact * learned).sum() / (mu * learned.square()).sum()
        ordered.append(float(slope))
        share.append(1 - float((mu * (exact - slope * learned).square()).sum() / (mu * exact.square()).sum()))
    assert min(ordered) > 0
    # Of the variance of what the first token is worth.
    assert sum(share) / len(share) > 0.5


def test_the_flow_follows_the_field_and_its_mirror_image_lowers_the_population():
    sampler = build(reward="count", gradient_field=FIELD, horizon=None)
    up = raw_gain(sampler=sampler)
    down = raw_gain(lambda gradient, mask, keys: -gradient, sampler=sampler)
    assert up > 0.3 and down < -0.05


def test_no_gradient_of_the_reward_is_taken(monkeypatch):
    sampler = build(reward="count", gradient_field=FIELD)

    def refuse(*arguments):
        raise AssertionError("the reward was differentiated")

    monkeypatch.setattr(sampler.reward, "value_and_grad", refuse)
    output = sampler.sample(PROMPTS, 4, BUDGET, LENGTH, 0)
    assert output.transported.completion_ids != output.initial.completion_ids
    assert torch.equal(output.trace[0].values[0], output.initial.rewards)


def test_a_prompts_result_does_not_depend_on_the_rest_of_the_call():
    sampler = build(reward="count", gradient_field=FIELD, flow_batch_size=8)
    together = sampler.sample(PROMPTS, 4, BUDGET, LENGTH, 3)
    for index in (0, 3, 5):
        alone = sampler.sample([PROMPTS[index]], 4, BUDGET, LENGTH, 3)
        assert result_of(alone, 0) == result_of(together, index)
        torch.testing.assert_close(numbers_of(alone, 0), numbers_of(together, index), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_are_the_same_with_and_without_a_cache_and_under_any_padding(family):
    torch.manual_seed(0)
    field = GradientField(tiny.language_model(family, VOCAB, eos=EOS).base_model, 6)
    torch.nn.init.normal_(field.slope.weight)
    ids, mask = left_pad([[5, 6, 7], [8], [9, 10]], 0, torch.device("cpu"))
    words = torch.tensor([[11, 12, 13], [5, 6, 0], [7, 0, 0]])
    inside = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    with torch.no_grad():
        direct = field(ids, mask, words, inside)[1]
    cached = field.gradients(field.read(ids, mask), words, inside)
    torch.testing.assert_close(cached[inside], direct[inside], atol=1e-4, rtol=1e-4)
    alone = field.gradients(field.read(torch.tensor([[8]]), torch.tensor([[True]])), words[1:2, :2], inside[1:2, :2])
    torch.testing.assert_close(alone[0], direct[1, :2], atol=1e-4, rtol=1e-4)


def test_before_it_has_seen_a_sample_nothing_moves():
    untrained = GradientField(tiny.language_model("llama", VOCAB, eos=EOS).base_model, COUNT.reward.width)
    sampler = build(reward="count", gradient_field=untrained)
    output = sampler.sample(PROMPTS[:2], 3, BUDGET, LENGTH, 0, verify=False)
    assert output.transported.completion_ids == output.initial.completion_ids


def test_fitting_again_gives_the_same_field_and_leaves_sampler_and_random_state_alone():
    before, weights = torch.get_rng_state(), [p.clone() for p in COUNT.reward.parameters()]
    again = fitted(COUNT)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(COUNT.reward.parameters(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), FIELD.parameters(), strict=True))
    assert not any(p.requires_grad for p in again.parameters())


def test_a_field_is_saved_and_loaded(tmp_path):
    FIELD.save_pretrained(tmp_path)
    loaded = GradientField.from_pretrained(tmp_path)
    budget = TransportBudget(steps=1, kl_budget=2.0)
    first, second = (build(reward="count", gradient_field=f).sample(PROMPTS, 3, budget, LENGTH) for f in (FIELD, loaded))
    assert first.transported.completion_ids == second.transported.completion_ids


def test_files_that_are_no_field_are_refused(tmp_path):
    FIELD.save_pretrained(tmp_path / "whole")
    with pytest.raises(OSError, match=rf"holds no {HEADS}"):
        GradientField.from_pretrained(tmp_path)
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    save_file({"score.weight": torch.zeros(1, 16)}, str(tmp_path / "other" / HEADS))
    with pytest.raises(ValueError, match=r"has the weights \['score.weight'\]"):
        GradientField.from_pretrained(tmp_path / "other")
    (tmp_path / "other" / HEADS).write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"the file is broken or cut off"):
        GradientField.from_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"sizes in its config.json"):
        GradientField.from_pretrained(tmp_path / "whole")


def test_a_field_of_another_reward_is_refused():
    ensemble = DifferentiableReward([tiny.reward_model("llama", VOCAB, seed=s) for s in range(2)], TOKENIZER)
    with pytest.raises(ValueError, match=r"gradient_field gives gradients of \d+ numbers, but the .* this reward have 32"):
        VGFSampler(COUNT.model, ensemble, TOKENIZER, gradient_field=FIELD)


def test_a_reward_that_says_the_same_of_everything_is_refused():
    sampler = build(reward="count")
    with torch.no_grad():
        for parameter in sampler.reward.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match=r"all 24 completions have the reward .*: there is no direction to learn"):
        fit_field(sampler, PROMPTS, num_samples=4, max_completion_length=LENGTH)


def test_a_loss_that_is_not_finite_ends_the_fit():
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        fitted(COUNT, learning_rate=1e30, num_samples=8)
