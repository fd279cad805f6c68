"""VGFConfig: what it accepts, what it refuses, and that it survives a command line and a JSON file."""

import json
import warnings

import pytest
from transformers import HfArgumentParser

from vgf_llm import TransportBudget, VGFConfig


def test_flow_fields_make_the_budget(tmp_path):
    args = VGFConfig(str(tmp_path), flow_steps=3, flow_step_size=0.5, flow_kl_budget=1.5, flow_rounds=2)
    assert args.budget == TransportBudget(steps=3, step_size=0.5, kl_budget=1.5, rounds=2)
    assert VGFConfig(str(tmp_path), flow_steps=0).budget.is_zero


def test_defaults_neither_warn_nor_need_a_gpu(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = VGFConfig(str(tmp_path))
    assert args.activation_checkpointing and args.remove_unused_columns is False


def test_json_holds_everything_the_budget_needs(tmp_path):
    saved = json.loads(VGFConfig(str(tmp_path), flow_kl_budget=0.7, flow_rounds=3).to_json_string())
    fields = {name: value for name, value in saved.items() if name.startswith("flow_")}
    assert VGFConfig(str(tmp_path), **fields).budget == TransportBudget(kl_budget=0.7, rounds=3)


def test_every_field_can_be_set_on_a_command_line(tmp_path):
    parser = HfArgumentParser(VGFConfig)
    line = ["--output_dir", str(tmp_path), "--flow_steps", "2", "--best_k", "4", "--reward_model_init_kwargs"]
    (args,) = parser.parse_args_into_dataclasses([*line, '{"num_labels": 1}'])
    assert (args.flow_steps, args.best_k, args.reward_model_init_kwargs) == (2, 4, {"num_labels": 1})
    assert "flow_kl_budget" in parser.format_help()  # an unescaped % in a help text would raise here


def test_a_phase_defaults_to_one_optimizer_step(tmp_path):
    sizes = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
    args = VGFConfig(str(tmp_path), best_k=2, **sizes)
    assert (args.prompts_per_micro_batch, args.steps_per_generation, args.prompts_per_phase) == (3, 4, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_k": 3}, r"per_device_train_batch_size \(8\).*best_k \(3\).*e\.g\. 9"),
        ({"best_k": 16, "per_device_train_batch_size": 16}, r"best_k \(16\) must not exceed num_generations \(8\)"),
        ({"best_k": 0}, "best_k must be at least 1"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"flow_batch_size": 0}, "flow_batch_size must be at least 1"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            r"steps_per_generation \(3\).*gradient_accumulation_steps \(2\)",
        ),
        ({"steps_per_generation": 0}, r"steps_per_generation \(0\)"),
        ({"target_temperature": 0.0}, "target_temperature must be positive"),
        ({"target_temperature": float("inf")}, "must be positive and finite"),
        ({"flow_steps": -1}, "steps must be an integer of at least 0"),
        ({"flow_kl_budget": -1.0}, "kl_budget is in nats"),
        ({"target": "ppo"}, "target must be one of sft, weighted, tilt, dpo, advantage"),
        ({"particle_source": "data"}, "particle_source must be one of reference, policy"),
        ({"target": "dpo", "per_device_train_batch_size": 3}, r"per_device_train_batch_size \(3\).*2, a pair.*e\.g\. 4"),
        ({"target": "dpo", "best_k": 2}, r"best_k \(2\) must be 1"),
        ({"target": "dpo", "num_generations": 1}, r"num_generations \(1\) at least 2"),
        ({"target": "weighted", "num_generations_eval": 2}, r"num_generations_eval \(2\) must be at least the 8"),
        ({"value_warmup_samples": 50, "value_replay_size": 20}, r"value_warmup_samples \(50\).*value_replay_size \(20\)"),
        ({"flow_movers": 9}, r"flow_movers \(9\) must be between 1 and num_generations \(8\)"),
        ({"flow_movers": 0}, r"flow_movers \(0\)"),
        ({"flow_field": "f", "particle_source": "policy"}, r"flow_field .* of it alone, but particle_source='policy'"),
        ({"flow_field": "f", "target": "tilt", "best_k": 2}, r"as they were drawn: best_k \(2\) must be num_generations \(8\)"),
        ({"flow_field": "f", "target": "tilt", "flow_rounds": 2}, r"as they were drawn: .*flow_rounds \(2\) 1"),
        ({"flow_field": "f", "use_vllm": True}, "which vLLM does not do: leave out use_vllm or flow_field"),
        ({"flow_field": 3}, r"flow_field must be .*str.*, got 3"),
        ({"reward_clip_range": [1.0]}, "reward_clip_range must be two numbers"),
        ({"reward_clip_range": [1.0, 0.0]}, "reward_clip_range must be two numbers"),
        ({"target": "advantage"}, r"particle_source='policy' \(is 'reference'\), flow_steps=0 \(is 5\)"),
        ({"target": "advantage", "best_k": 4}, r"best_k \(4\) must be num_generations \(8\)"),
        (
            {"target": "advantage", "particle_source": "policy", "flow_steps": 0, "steps_per_generation": 2},
            r"steps_per_generation \(2\).*gradient_accumulation_steps \(1\)",
        ),
        ({"tilt_kl_cap": 0.0}, "tilt_kl_cap must be positive"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        VGFConfig(str(tmp_path), **fields)
