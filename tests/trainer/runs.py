"""Runs that are killed: `python runs.py FOLDER` trains every case in a process of its own, which kills itself in the step after
its first checkpoint.

The processes are forked from one that has imported everything and computed nothing, which saves most of their time.
"""

import os
import signal
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests import tiny
from vgf_llm import VGFConfig, VGFTrainer


PROMPTS = ["the food was", "a room", "the staff were nice but the", "and", "room was", "nice", "poor a", "the the but"]


def count_good(completions, **kwargs):
    return [float(completion.split().count("good")) for completion in completions]


# Phases of two steps: a checkpoint at step 1 lies within one.
CASES = {
    "sft": {"save_steps": 1},
    "weighted": {"target": "weighted", "best_k": 2},
    "tilt": {"target": "tilt", "best_k": 2, "lora": True},
    "dpo": {"target": "dpo", "particle_source": "policy", "save_steps": 1},
    "advantage": {
        "target": "advantage", "particle_source": "policy", "flow_steps": 0, "num_generations": 2, "steps_per_generation": 2,
    },
    "value": {"reward": count_good, "value_warmup_samples": 8, "target": "weighted", "best_k": 2},
    "value_tilt_policy": {
        "reward": [count_good, "model"], "value_warmup_samples": 8, "target": "tilt", "best_k": 2,
        "particle_source": "policy", "lora": True, "save_steps": 1, "policy_kl_cap": 0.05,
    },
}  # fmt: skip


class Kill(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def make_trainer(folder, case, callbacks=None, **changes):
    settings = {
        "output_dir": str(folder / case), "num_generations": 4, "max_completion_length": 6, "flow_step_size": 1.0,
        "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True,
        "report_to": "none", "activation_checkpointing": False, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4, "log_completions": True,
        "dataloader_pin_memory": False, "use_cpu": True,
    } | CASES[case] | changes  # fmt: skip
    tokenizer = tiny.tokenizer()
    lora, reward = settings.pop("lora", False), settings.pop("reward", "model")
    model = tiny.counting_reward(tokenizer, "nice")
    reward = [model if part == "model" else part for part in reward] if isinstance(reward, list) else reward
    return VGFTrainer(
        model=tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id),
        reward_funcs=model if reward == "model" else reward,
        args=VGFConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        callbacks=callbacks,
    )


def main(folder):
    for case, settings in CASES.items():
        child = os.fork()
        if child == 0:
            make_trainer(folder, case, [Kill(settings.get("save_steps", 2) + 1, signal.SIGKILL)]).train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (case, status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
