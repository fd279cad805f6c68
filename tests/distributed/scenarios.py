"""What every engine has to do: run by `accelerate launch` in each process of an engine, and by the test itself in one.

    accelerate launch --config_file X.yaml tests/distributed/scenarios.py FOLDER [NAME ...]

Writes losses, metrics and weights of each scenario to FOLDER, from the first process.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from tests import fake_vllm, tiny
from vgf_llm import VGFConfig, VGFTrainer


PROMPTS = [
    "the food was", "a room", "the staff were nice but the", "and", "room was", "nice", "poor a", "the the but",
    "staff and", "food", "the room and the food were", "bad", "fine", "a nice staff", "but the", "were",
]  # fmt: skip
ROWS = 4  # fitted completions of a micro-batch on all processes together


def count_good(prompts, completions, completion_ids, index, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(index)
    return [float(completion.split().count("good")) for completion in completions]


def raise_on_the_second_process(completions, trainer_state, **kwargs):
    if torch.distributed.get_rank() == 1:
        raise ValueError("no answer from the judge")
    return [0.0] * len(completions)


def too_few_on_the_second_process(completions, **kwargs):
    return [0.0] * (len(completions) - torch.distributed.get_rank())


# Each covers several of the things that have to hold at once; together they cover all targets, sources and kinds of reward.
SCENARIOS = {
    "full_sft": {},
    "lora_weighted_value": {"lora": True, "target": "weighted", "best_k": 2, "num_generations": 4, "reward": "function"},
    "lora_tilt": {"lora": True, "target": "tilt", "best_k": 2},
    "full_dpo_policy": {"target": "dpo", "particle_source": "policy"},
    "full_advantage": {
        "target": "advantage", "particle_source": "policy", "flow_steps": 0, "num_generations": 2, "steps_per_generation": 2,
    },
    # In one process there is nothing to shard over: what is compared is a sharded reward with a whole one.
    "full_sharded_reward": {"reward_model_sharding": True, "flow_rounds": 2, "flow_movers": 2},
    "lora_pulled_back": {"lora": True, "target": "dpo", "particle_source": "policy", "policy_kl_cap": 1e-4},
    "lora_resumed": {
        "lora": True, "target": "weighted", "best_k": 2, "particle_source": "policy", "reward": "function",
        "max_steps": 4, "save_strategy": "steps", "save_steps": 3,
    },
    "full_field": {"flow_field": "field", "flow_rounds": 2},
    # Compared with one process that draws by itself.
    "full_vllm_server": {"vllm": "server", "particle_source": "policy"},
    "lora_vllm_colocate": {"vllm": "colocate", "lora": True, "particle_source": "policy"},
}  # fmt: skip


def make_trainer(folder, name, saved, world, **changes):
    settings = {
        "num_generations": 4, "max_completion_length": 6, "flow_step_size": 1.0, "flow_batch_size": 8, "learning_rate": 3e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none",
        "bf16": False, "activation_checkpointing": True, "gradient_accumulation_steps": 2,
        "steps_per_generation": 4, "max_steps": 3, "per_device_train_batch_size": ROWS // world, "log_completions": False,
        "per_device_eval_batch_size": 4 // world, "value_warmup_samples": 16, "value_batch_size": 8,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    scenario = SCENARIOS.get(name, {}) | changes
    if world == 1:
        scenario.pop("reward_model_sharding", None)
    if "flow_field" in scenario:
        scenario["flow_field"] = str(saved / scenario["flow_field"])
    lora, reward, vllm = scenario.pop("lora", False), scenario.pop("reward", "model"), scenario.pop("vllm", None)
    if vllm and world > 1:
        fake_vllm.install(setattr)
        fake_vllm.VLLMClient.path = saved / "lm"
        scenario |= {"use_vllm": True, "vllm_mode": vllm}
    modules = lora if isinstance(lora, list) else "all-linear"
    tokenizer = tiny.tokenizer()
    rewards = {
        "model": str(saved / "reward"),
        "function": count_good,
        "raise": raise_on_the_second_process,
        "too few": too_few_on_the_second_process,
    }
    dataset = Dataset.from_list([{"prompt": prompt, "index": index} for index, prompt in enumerate(PROMPTS)])
    trainer = VGFTrainer(
        model=str(saved / "lm"),
        reward_funcs=rewards[reward],
        args=VGFConfig(str(folder / f"{name}-{world}"), **settings | scenario),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(5)),  # not a multiple of any batch
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM") if lora else None,
    )
    if vllm and world > 1:
        follow_the_stream(trainer, vllm, world)
    return trainer


def follow_the_stream(trainer, vllm, world):
    """Which noise the fake engine has for the n-th prompt it gets: that of its place in the stream of prompts."""
    rank, size = trainer.args.process_index, trainer.args.prompts_per_phase
    if vllm == "server" and rank > 0:
        return  # the first process alone talks to the server, for all
    ranks = range(world) if vllm == "server" else [rank]

    def seed(number):
        phase, index = divmod(number, size * len(ranks))
        return trainer._seed([place for r in ranks for place in trainer._order.places(phase, r)][index])

    (fake_vllm.VLLMClient if vllm == "server" else fake_vllm.LLM).last.weights.seed = seed


def run(folder, name, saved, world):
    """Train, evaluate, save, resume; what came of it, as JSON holds it."""
    trainer = make_trainer(folder, name, saved, world)
    trainer.train()
    measured = trainer.evaluate()
    if name == "full_sft" and os.environ.get("FSDP_VERSION") != "1":
        trainer.save_model()
    resumed = None
    if name == "lora_resumed" and world > 1:
        again = make_trainer(folder, name, saved, world)
        again.train(resume_from_checkpoint=str(Path(again.args.output_dir) / "checkpoint-3"))
        resumed = again.state.log_history
    frozen = [p for term in trainer.rewards.terms if isinstance(term.reward, torch.nn.Module) for p in term.reward.parameters()]
    frozen += list(trainer._samplers["reference"].model.parameters())
    frozen += [] if trainer._field is None else list(trainer._field.parameters())
    if trainer.rewards.value is not None:
        frozen += list(trainer.rewards.value.parameters())
    result = {
        "history": trainer.state.log_history,
        "resumed": resumed,
        "evaluation": measured,
        "engine": type(trainer.model_wrapped).__name__,
        "zero3": is_deepspeed_zero3_enabled(),
        # What ZeRO or FSDP has taken hold of.
        "sharded_replicas": sum(hasattr(p, "ds_id") or type(p).__name__ == "DTensor" or p.numel() == 0 for p in frozen),
        "frozen": sum(1 for _ in frozen),
        "sharded_policy": sum(hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in trainer.model.parameters()),
    }
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return result


def fail(folder, saved, world):
    """Errors of one process, as every process reports them."""
    messages = {}
    for reward in ("raise", "too few"):
        trainer = make_trainer(folder, "failing", saved, world, reward=reward)
        try:
            trainer.train()
        except RuntimeError as error:
            messages[reward] = str(error)
    try:
        trainer._fit_value([])
    except RuntimeError as error:
        messages["no samples"] = str(error)
    try:
        make_trainer(folder, "failing", saved, world, lora=["q_proj", "lm_head"])
    except ValueError as error:
        messages["lm_head"] = str(error)
    return messages


def recipe(folder, saved):
    """recipes/vgf.py as a user starts it, two steps."""
    root = Path(__file__).resolve().parents[2]
    prompts = folder / "prompts.jsonl"
    if os.environ.get("RANK", "0") == "0":
        prompts.with_suffix(".partial").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        prompts.with_suffix(".partial").replace(prompts)
    while not prompts.exists():
        time.sleep(0.1)
    arguments = [
        "--config", root / "recipes/configs/reviews/tiny_vgf.yaml", "--model_name_or_path", saved / "lm",
        "--reward_model_name_or_path", saved / "reward", saved / "reward", "--dataset_name", prompts,
        "--output_dir", folder / "policy", "--max_steps", 2, "--per_device_train_batch_size", 2, "--num_generations", 2,
        "--max_completion_length", 6, "--disable_tqdm", "true", "--logging_steps", 1, "--activation_checkpointing", "true",
        "--gradient_accumulation_steps", 2, "--save_strategy", "steps", "--save_steps", 1, "--resume_from_checkpoint", "auto",
    ]  # fmt: skip
    given, sys.argv = sys.argv, ["vgf.py", *map(str, arguments)]
    runpy.run_path(str(root / "recipes/vgf.py"), run_name="__main__")
    sys.argv = given


def main(folder, names):
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for name in names:
        saved = folder / "saved"
        if name == "recipe":
            recipe(folder, saved)
            continue
        result = fail(folder, saved, world) if name == "fail" else run(folder, name, saved, world)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
