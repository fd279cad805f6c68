"""What is not a number never reaches a weight: it is skipped, counted, and named when it does not stop."""

import math

import pytest
import torch

from tests import tiny
from vgf_llm import TransportBudget, VGFSampler
from vgf_llm.text.value import ValueModel


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def spoil(trainer, steps, factor):
    """Multiplies the loss of these optimizer steps; returns the weights before each step."""
    real, seen = trainer.compute_loss, []

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(weights(trainer))
        loss = real(model, inputs, *args, **kwargs)
        return loss * factor if trainer.state.global_step in steps else loss

    trainer.compute_loss = compute_loss
    return seen


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_that_is_not_finite_is_skipped_and_counted(make_trainer, factor, max_grad_norm):
    trainer = make_trainer(max_steps=4, max_grad_norm=max_grad_norm)
    seen = spoil(trainer, {1}, factor)
    trainer.train()
    assert logged(trainer, "frac_skipped_steps") == [0, 1, 0, 0]
    assert not same(seen[0], seen[1]) and same(seen[1], seen[2]) and not same(seen[2], seen[3])
    assert all(value.isfinite().all() for value in weights(trainer).values())
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert moments and all(value.isfinite().all() for value in moments)


def test_too_many_in_a_row_end_the_run(make_trainer):
    trainer = make_trainer(max_steps=9, max_skipped_steps=2)
    seen = spoil(trainer, {1, 3, 4, 5}, math.nan)  # one alone is forgotten
    with pytest.raises(FloatingPointError, match=r"^3 optimizer step\(s\) in a row, up to step 5,.*lower learning_rate"):
        trainer.train()
    assert same(weights(trainer), seen[3]) and len(seen) == 6


def test_the_completion_is_named(make_trainer):
    trainer = make_trainer(max_skipped_steps=0)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[5] = math.nan  # the policy alone: the reference is a copy
    with pytest.raises(FloatingPointError, match=r"process 0: the loss of a completion is nan: prompt '.*', completion '"):
        trainer.train()


def test_deepspeed_which_has_stepped_already_stops_at_once(make_trainer):
    trainer = make_trainer()
    trainer.is_deepspeed_enabled = True
    assert trainer._get_grad_norm(trainer.model, torch.tensor(2.0)) == 2
    with pytest.raises(FloatingPointError, match="1 optimizer step"):
        trainer._get_grad_norm(trainer.model, torch.tensor(math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf, "good", [1.0]])
def test_a_function_has_to_return_finite_numbers(make_trainer, value):
    def judge(completions, **kwargs):
        return [None] + [value] * (len(completions) - 1)

    trainer = make_trainer(reward_funcs=judge)
    before = weights(trainer)
    with pytest.raises(RuntimeError, match=r"judge returned .* for the completion '.*: it must return a finite number, or None"):
        trainer.train()
    assert same(before, weights(trainer))


@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_a_reward_model_that_is_broken_stops_the_run(make_trainer, tokenizer, value):
    reward = tiny.counting_reward(tokenizer)
    with torch.no_grad():
        reward.score.weight[:] = value
    trainer = make_trainer(reward_funcs=reward)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"the reward of a completion is (nan|inf).*the completion was '"):
        trainer.train()
    assert same(before, weights(trainer))


def test_a_gradient_that_is_broken_stops_the_run(make_trainer, tokenizer):
    """The reward of tokens is fine, between them it is not."""
    reward = tiny.counting_reward(tokenizer)
    real = reward.model.forward

    def forward(inputs_embeds, **kwargs):
        if inputs_embeds.requires_grad:
            inputs_embeds.register_hook(lambda gradient: gradient * math.nan)
        return real(inputs_embeds, **kwargs)

    reward.model.forward = forward
    trainer = make_trainer(reward_funcs=reward)
    before = weights(trainer)
    with pytest.raises(ValueError, match="non-finite score at step 0, prompt 0, particle"):
        trainer.train()
    assert same(before, weights(trainer))


def test_logits_that_are_broken_are_named(tokenizer):
    model = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
    sampler = VGFSampler(model, tiny.counting_reward(tokenizer), tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(ValueError, match="the base model's logits are not finite: check its weights and dtype"):
        sampler.sample(["the food was"], 2, TransportBudget(steps=0), 4)


def test_an_update_of_the_value_model_that_is_not_finite_is_skipped(tokenizer, monkeypatch):
    model = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
    value = ValueModel(model, tokenizer, batch_size=4)
    value.add([[5, 6]] * 8, [[7, 8, number] for number in range(8)], [float(number) for number in range(8)])
    real, calls = value._member_scores, []

    def scores(*args):
        calls.append({name: p.detach().clone() for name, p in value.trained.items()})
        return real(*args) * (math.nan if len(calls) in (2, 5, 6) else 1)

    monkeypatch.setattr(value, "_member_scores", scores)
    assert math.isfinite(value.fit(3))
    assert not same(calls[0], calls[1]) and same(calls[1], calls[2])
    value.fit(1)
    with pytest.raises(FloatingPointError, match="none of 2 updates of the value model had a finite gradient"):
        value.fit(2)
    assert all(p.isfinite().all() for p in value.trained.values())
