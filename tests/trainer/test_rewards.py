"""Rewards of every kind, alone and added up: functions as TRL calls them, models with another tokenizer, value models."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests import tiny
from vgf_llm import VGFSampler
from vgf_llm.text import DifferentiableReward
from vgf_llm.text.value import RewardSum, ValueModel


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def good(completions, **kwargs):
    return [float(completion.split().count("good")) for completion in completions]


def records(trainer):
    path = Path(trainer.args.output_dir) / "completions-00000.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_function_alone_raises_its_own_reward_through_a_value_model(make_trainer):
    trainer = make_trainer(
        reward_funcs=good, max_steps=40, per_device_train_batch_size=8, num_generations=8, flow_kl_budget=4.0,
        learning_rate=5e-3, value_warmup_samples=128, value_learning_rate=3e-3, value_update_ratio=2.0, eval_dataset=None,
    )  # fmt: skip
    trainer.train()
    gains = logged(trainer, "flow/reward_gain")
    assert gains[0] == 0  # warm-up: no flow along a gradient that has seen nothing
    assert sum(gains[-10:]) / 10 > 0.1
    initial, final = logged(trainer, "flow/reward_initial"), logged(trainer, "flow/reward_final")
    assert all(b >= a for a, b in zip(initial, final, strict=True))  # the true reward verifies
    assert logged(trainer, "value/loss")[-1] < 0.7
    assert logged(trainer, "rewards/good/mean") == pytest.approx(final)
    assert logged(trainer, "fit/log_ratio")[-1] > 0.2


def test_functions_get_what_trl_gives_them(make_trainer, prompts):
    calls = []

    def look(prompts, completions, completion_ids, index, trainer_state, log_extra, log_metric, **kwargs):
        assert not kwargs
        calls.append((prompts, completions, completion_ids, index, trainer_state.global_step))
        log_metric("seen", len(prompts))
        log_extra("initial", [completion[:1] for completion in completions])
        return [None if number % 2 else 1.0 for number in index]

    async def wait(completions, **kwargs):
        await asyncio.sleep(0)
        return good(completions)

    trainer = make_trainer(
        reward_funcs=[look, wait], reward_weights=[0.5, 2.0], max_steps=2, shuffle_dataset=False, log_completions=True,
        value_warmup_samples=8, flow_kl_budget=4.0,
    )  # fmt: skip
    trainer.train()
    texts = prompts["prompt"]
    for asked, completions, ids, index, step in calls:
        assert asked == [texts[number] for number in index]
        assert completions == trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        assert step in (0, 1)
    pairs = [(p, tuple(c)) for asked, _, ids, _, step in calls for p, c in zip(asked, ids, strict=True)]
    assert len(pairs) == len(set(pairs)), "a completion was scored twice"
    assert logged(trainer, "seen")
    assert logged(trainer, "rewards/look/mean") == [1.0, 1.0]  # over those it applies to
    for record in records(trainer):
        number = texts.index(record["prompt"])
        for side in ("before", "after"):
            for total, first, second in zip(
                record[side]["reward"], record[side]["rewards"]["look"], record[side]["rewards"]["wait"], strict=True
            ):
                assert total == pytest.approx(2 * second + (0 if number % 2 else 0.5 * first))
            assert [extra["initial"] for extra in record[side]["extra"]] == [c[:1] for c in record[side]["completions"]]


def test_conversations_are_handed_over_as_messages(make_trainer):
    seen = []

    def look(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [0.0] * len(completions)

    chat = [{"role": "user", "content": "the food"}]
    make_trainer(reward_funcs=look, train_dataset=Dataset.from_list([{"prompt": chat}] * 4), max_steps=1).train()
    for prompts, completions in seen:
        assert prompts == [chat] * len(completions)
        assert all([message["role"] for message in completion] == ["assistant"] for completion in completions)


def test_rewards_of_all_kinds_add_up(make_trainer, tokenizer):
    model = tiny.counting_reward(tokenizer, "nice")
    trainer = make_trainer(
        reward_funcs=[model, good], reward_weights=[3.0, 1.0], max_steps=4, value_warmup_samples=40, log_completions=True,
        flow_kl_budget=4.0,
    )  # fmt: skip
    assert isinstance(trainer.rewards.guide(ready=True), RewardSum)
    assert trainer.rewards.guide(ready=True).weights == [3.0, 1.0]
    assert trainer.rewards.guide(ready=False).weights == [3.0]  # the model leads alone until the value model has seen enough
    trainer.train()
    assert logged(trainer, "flow/reward_gain")[0] > 0
    for record in records(trainer):
        for side in ("before", "after"):
            words = [f"{record['prompt']} {text}".split() for text in record[side]["completions"]]
            assert record[side]["rewards"]["SumOfEmbeddings"] == pytest.approx([float(w.count("nice")) for w in words])
            assert record[side]["reward"] == pytest.approx(
                [
                    3.0 * w.count("nice") + text.split().count("good")
                    for w, text in zip(words, record[side]["completions"], strict=True)
                ]
            )


def test_a_reward_model_with_another_tokenizer_scores_texts(make_trainer, saved):
    theirs = tiny.tokenizer(tiny.WORDS[::-1])
    trainer = make_trainer(reward_funcs=str(saved["other_reward"]), max_steps=2, log_completions=True, value_warmup_samples=8)
    assert isinstance(trainer.rewards.value, ValueModel)
    trainer.train()
    model = trainer.rewards.terms[0].reward.model
    eos = theirs.eos_token_id
    for record in records(trainer):
        for text, reward in zip(record["before"]["completions"], record["before"]["reward"], strict=True):
            ids = theirs(record["prompt"] + text)["input_ids"]
            either = [model(torch.tensor([row])).logits.item() for row in (ids, [*ids, eos]) if row]
            assert any(reward == pytest.approx(value, abs=1e-4) for value in either)
    ensemble = make_trainer(reward_funcs=[[str(saved["reward"]), str(saved["reward"])]])
    assert isinstance(ensemble.rewards.terms[0].reward, DifferentiableReward) and ensemble.rewards.value is None


def test_wrong_answers_of_functions_are_named(make_trainer):
    def raises(completions, **kwargs):
        raise KeyError("answer")

    def short(completions, **kwargs):
        return [1.0]

    def tensor(completions, **kwargs):
        return torch.ones(len(completions))

    def silent(completions, **kwargs):
        return [None] * len(completions)

    for function, message in (
        (raises, "reward function raises raised KeyError: 'answer'"),
        (short, r"reward function short returned 1 values for \d+ completions"),
        (tensor, r"reward function tensor returned Tensor for \d+ completions"),
        (silent, "no reward applies to a completion of prompt .*every function returned None"),
    ):
        with pytest.raises(RuntimeError, match=message):
            make_trainer(reward_funcs=function).train()


def test_value_models_that_do_not_fit_are_refused(make_trainer, saved, tmp_path):
    tiny.tokenizer(tiny.WORDS[::-1], chat=True).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="value_model .* has another vocabulary"):
        make_trainer(reward_funcs=good, value_model=str(tmp_path / "other"))
    trainer = make_trainer(reward_funcs=good, value_model=str(saved["lm"]))
    assert isinstance(trainer.rewards.value, ValueModel)


def test_zero_steps_with_a_function_are_best_of_n(make_trainer, tokenizer):
    trainer = make_trainer(reward_funcs=good, flow_steps=0, max_steps=1, log_completions=True, shuffle_dataset=False)
    trainer.train()
    sampler = VGFSampler(
        tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id), tiny.counting_reward(tokenizer), tokenizer
    )
    for record in records(trainer):
        assert record["before"]["completions"] == record["after"]["completions"]
        expected = sampler.sample([record["prompt"]], 4, trainer.args.budget, 6, seed=trainer._seed(record["place"]))
        assert record["before"]["completions"] == expected.initial.completions[0]


def test_a_clipped_reward_is_what_verification_and_selection_see(make_trainer):
    trainer = make_trainer(reward_clip_range=[0.0, 1.0], flow_kl_budget=8.0, max_steps=3)
    trainer.train()
    free = make_trainer(flow_kl_budget=8.0, max_steps=3)
    free.train()
    ours, theirs = ([e for e in t.state.log_history if "reward" in e] for t in (trainer, free))
    assert all(0 <= entry["reward"] <= 1 for entry in ours) and max(entry["reward"] for entry in theirs) > 1
    # A particle that is at the upper end stays where it is.
    assert sum(e["flow/accept_rate"] for e in ours) < sum(e["flow/accept_rate"] for e in theirs)


def test_a_value_model_without_samples_is_an_error(make_trainer):
    trainer = make_trainer(reward_funcs=lambda completions, **kwargs: [0.0] * len(completions))
    with pytest.raises(RuntimeError, match="value model has no samples"):
        trainer._fit_value([])


def test_sharding_needs_processes(make_trainer):
    with pytest.raises(ValueError, match="reward_model_sharding needs several processes"):
        make_trainer(reward_model_sharding=True)
