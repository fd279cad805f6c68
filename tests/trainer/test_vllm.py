"""`use_vllm` with a fake engine (tests/fake_vllm.py): the run with it is the run without it, or it says why it cannot be."""

import os
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests import fake_vllm, tiny
from vgf_llm import VGFConfig
from vgf_llm.trainer import engine


@pytest.fixture
def with_vllm(make_trainer, saved, monkeypatch):
    """A trainer that draws with the fake, and the weights that the fake holds."""
    fake_vllm.install(lambda module, name, value: monkeypatch.setattr(module, name, value, raising=False))
    monkeypatch.setattr(fake_vllm.VLLMClient, "path", saved["lm"])

    def make(**changes):
        with mock.patch.dict(os.environ):  # TRL tells vLLM rank and address by the environment
            trainer = make_trainer(**{"model": str(saved["lm"])} | changes, use_vllm=True)
        colocated = trainer.args.vllm_mode == "colocate"
        return trainer, (fake_vllm.LLM if colocated else fake_vllm.VLLMClient).last.weights

    return make


def history(trainer):
    times = ("seconds", "second", "runtime", "step_time", "train_")
    return [{k: v for k, v in entry.items() if not any(name in k for name in times)} for entry in trainer.state.log_history]


def assert_same_run(one, other):
    """The same numbers logged and the same weights, up to the rounding of one forward of a text instead of one per token."""
    for a, b in zip(history(one), history(other), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4, nan_ok=True)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], atol=1e-3, rtol=1e-3, msg=lambda m, name=name: name + m)


# ---- The run with the engine is the run without it ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("source", ["reference", "policy"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_run_with_vllm_is_the_run_without(make_trainer, with_vllm, saved, lora, adapters, source, mode):
    changes = {
        "particle_source": source, "peft_config": lora if adapters else None, "max_steps": 4, "num_iterations": 2,
        "per_device_train_batch_size": 2, "steps_per_generation": 1, "policy_kl_cap": 1e3,
    }  # fmt: skip
    plain = make_trainer(model=str(saved["lm"]), **changes)
    plain.train()
    trainer, weights = with_vllm(vllm_mode=mode, **changes)
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trainer.train()
    assert_same_run(trainer, plain)
    phases = 2  # of two steps
    assert weights.drawn == phases * 2
    assert weights.syncs == (phases if source == "policy" else 1)
    assert all(torch.equal(value, dict(trainer.model.named_parameters())[name]) for name, value in frozen.items())
    # What it holds in the end: the policy as it was before the second phase, or the reference.
    reference = AutoModelForCausalLM.from_pretrained(saved["lm"])
    moved = max((a - b).abs().max() for a, b in zip(weights.model.parameters(), reference.parameters(), strict=True))
    assert moved > 1e-3 if source == "policy" else moved == 0


def test_weights_are_discarded_in_sleep_and_come_again(make_trainer, with_vllm, saved, lora):
    for changes in ({}, {"peft_config": lora}, {"peft_config": lora, "particle_source": "policy", "policy_kl_cap": 1e3}):
        plain = make_trainer(model=str(saved["lm"]), **changes)
        plain.train()
        trainer, weights = with_vllm(vllm_enable_sleep_mode=True, **changes)
        trainer.train()
        assert_same_run(trainer, plain)
        assert fake_vllm.LLM.last.asleep and weights.syncs == 2


def test_a_reference_that_differs_from_its_path_is_sent(make_trainer, with_vllm, saved, lora):
    def changed():
        model = AutoModelForCausalLM.from_pretrained(saved["lm"])
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    for adapters in (None, lora):
        plain = make_trainer(model=changed(), peft_config=adapters)
        plain.train()
        trainer, _ = with_vllm(model=changed(), peft_config=adapters)
        trainer.train()
        assert_same_run(trainer, plain)


@pytest.mark.parametrize("source", ["reference", "policy"])
def test_a_resumed_run_sends_the_weights_again(with_vllm, make_trainer, lora, tmp_path, source):
    """The reference without the adapters of the checkpoint, the policy with them."""
    changes = {
        "peft_config": lora, "particle_source": source, "policy_kl_cap": 1e3, "save_strategy": "steps", "save_steps": 2,
        "max_steps": 3,
    }  # fmt: skip
    whole, _ = with_vllm(**changes, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed, weights = with_vllm(**changes, output_dir=str(tmp_path / "whole"))
    first = weights.seed
    weights.seed = lambda number: first(number + 8)  # the fake counts anew
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert weights.syncs == 1 and weights.drawn == 4
    assert_same_run(resumed, whole)


def test_adapters_of_embeddings_and_trained_modules_are_added(with_vllm, make_trainer, saved):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=True, task_type="CAUSAL_LM"
    )
    changes = {"particle_source": "policy", "policy_kl_cap": 1e3, "peft_config": config}
    plain = make_trainer(model=str(saved["lm"]), **changes)
    plain.train()
    trainer, _ = with_vllm(**changes)
    trainer.train()
    assert_same_run(trainer, plain)


def test_a_phase_that_is_pulled_back_and_evaluation_draw_by_themselves(with_vllm, make_trainer, saved, prompts):
    changes = {"particle_source": "policy", "policy_kl_cap": 1e-4, "eval_dataset": prompts.select(range(3)), "max_steps": 3}
    plain = make_trainer(model=str(saved["lm"]), **changes)
    trainer, weights = with_vllm(**changes)
    for one in (plain, trainer):
        one.train()
        one.evaluate()
    assert_same_run(trainer, plain)
    assert weights.drawn == 3 * 4
    assert trainer.state.log_history[2]["pulled_back"] == 1


def test_what_the_engine_is_told(with_vllm, tokenizer, tmp_path):
    """Every end-of-sequence token, and no token that the tokenizer does not have."""
    model = tiny.language_model("llama", len(tokenizer) + 5, eos=[tokenizer.eos_token_id, 7])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    model.save_pretrained(tmp_path / "padded")
    trainer, weights = with_vllm(
        model=str(tmp_path / "padded"), temperature=0.7, vllm_gpu_memory_utilization=0.5, vllm_max_model_length=40
    )
    trainer.train()
    options = fake_vllm.LLM.last.options
    assert (options["gpu_memory_utilization"], options["max_model_len"]) == (0.5, 40)
    assert weights.calls[0]["temperature"] == 0.7 and weights.calls[0]["top_p"] == 1.0 and weights.calls[0]["top_k"] == 0
    assert weights.calls[0]["stop_token_ids"] == sorted([tokenizer.eos_token_id, 7])
    assert weights.calls[0]["logit_bias"] == dict.fromkeys(range(len(tokenizer), len(tokenizer) + 5), -100.0)
    with_vllm(vllm_mode="server", vllm_server_base_url="http://there:1", vllm_group_port=9, vllm_server_timeout=1.0)
    client = fake_vllm.VLLMClient.last
    assert (client.base_url, client.group_port, client.connection_timeout) == ("http://there:1", 9, 1.0)


# ---- What cannot work is refused ------------------------------------------------------------------------------------


def test_without_vllm_the_trainer_says_what_to_install(make_trainer):
    with pytest.raises(ImportError, match=r'^use_vllm=True needs vLLM, which is not installed: pip install "vgf_llm\[vllm\]"$'):
        make_trainer(use_vllm=True)


def test_models_that_vllm_cannot_be_given(with_vllm, tokenizer, saved):
    with pytest.raises(ValueError, match="from the path of the model, and this one has none"):
        with_vllm(model=tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id))
    tied = AutoModelForCausalLM.from_pretrained(saved["lm"])
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    embeddings = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="tied to lm_head"):
        with_vllm(model=tied, peft_config=embeddings, particle_source="policy")
    tokens = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="leave trainable_token_indices out"):
        with_vllm(peft_config=tokens, particle_source="policy")
    trainer, _ = with_vllm(peft_config=tokens)  # the reference has none of them
    trainer.train()
    trainer.model.is_quantized = True  # as bitsandbytes, which may not be here, marks its models
    with pytest.raises(ValueError, match="quantized"):
        engine._check_model(trainer.model, trainer.args)


def test_prompts_that_do_not_fit_and_texts_that_end_elsewhere(with_vllm, monkeypatch):
    trainer, _ = with_vllm(vllm_max_model_length=10)
    with pytest.raises(ValueError, match=r"a prompt has 6 tokens.*vllm_max_model_length \(10\)"):
        trainer._make_micro_batches([{"prompt": "the staff were nice but the"}], 0)
    trainer, weights = with_vllm()
    monkeypatch.setattr(weights, "draw", lambda *a, **k: [[9, 9]] * 4)
    with pytest.raises(ValueError, match="ends after 2 of 6 tokens without an end-of-sequence token"):
        trainer._make_micro_batches([{"prompt": "the food was"}], 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_mode": "ray"}, "vllm_mode must be one of colocate, server"),
        ({"vllm_gpu_memory_utilization": 0.0}, r"vllm_gpu_memory_utilization must lie in \(0, 1\]"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization must lie"),
        ({"vllm_max_model_length": 256}, r"vllm_max_model_length \(256\) must exceed max_completion_length \(256\)"),
        ({"vllm_tensor_parallel_size": 0}, "vllm_tensor_parallel_size must be at least 1"),
        ({"vllm_group_port": 0}, "vllm_group_port must be at least 1"),
        ({"vllm_server_timeout": 0.0}, "vllm_server_timeout must be positive"),
        ({"use_vllm": "yes"}, "use_vllm must be bool"),
        ({"use_vllm": True, "top_k": 5}, r"use_vllm needs top_k=0 \(is 5\)"),
        ({"use_vllm": True, "top_p": 0.9}, r"top_p=1.0 \(is 0.9\)"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode would do nothing with vllm_mode='server'",
        ),
    ],
)
def test_fields_that_cannot_work(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        VGFConfig(str(tmp_path), **fields)
