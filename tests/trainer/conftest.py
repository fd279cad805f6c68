"""A tiny world: eleven words and more, a random language model, and a reward that counts the word "good"."""

import pytest
from datasets import Dataset
from peft import LoraConfig

from tests import tiny
from vgf_llm import VGFConfig, VGFTrainer


PROMPTS = ["the food was", "a room", "the staff were nice but the", "and", "room was", "nice", "poor a", "the the but"]


@pytest.fixture
def tokenizer():
    return tiny.tokenizer(chat=True)


@pytest.fixture
def prompts():
    return Dataset.from_list([{"prompt": prompt, "index": index} for index, prompt in enumerate(PROMPTS)])


@pytest.fixture
def make_trainer(tmp_path, tokenizer, prompts):
    """A trainer in the tiny world; keywords go to `VGFConfig`, but for those that `VGFTrainer` takes."""

    def make(**changes):
        given = {
            "model": None, "reward_funcs": None, "train_dataset": prompts, "eval_dataset": None,
            "processing_class": tokenizer, "reward_processing_classes": None, "peft_config": None,
            "quantization_config": None,
        }  # fmt: skip
        given.update({name: changes.pop(name) for name in list(changes) if name in given})
        if given["model"] is None:
            given["model"] = tiny.language_model("llama", len(tokenizer), eos=tokenizer.eos_token_id)
        if given["reward_funcs"] is None:
            given["reward_funcs"] = tiny.counting_reward(tokenizer)
        settings = {
            "output_dir": str(tmp_path / "run"), "num_generations": 4, "max_completion_length": 6,
            "flow_step_size": 1.0, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1,
            "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none",
            "activation_checkpointing": False, "per_device_train_batch_size": 4, "max_steps": 2,
        }  # fmt: skip
        return VGFTrainer(args=VGFConfig(**settings | changes), **given)

    return make


@pytest.fixture
def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
