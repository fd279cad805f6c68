"""A reward model from preference pairs. TRL's RewardTrainer, with the option of flow-aware training.

One GPU:

    python recipes/reward.py --config recipes/configs/tldr/pythia-1b_reward.yaml

Several GPUs; options win over the file:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 recipes/reward.py \
        --config recipes/configs/tldr/pythia-1b_reward.yaml --gradient_accumulation_steps 2

A laptop, a few minutes, after recipes/sft.py with its tiny configuration:

    python recipes/reward.py --config recipes/configs/tldr/tiny_reward.yaml

Every field of TRL's `RewardConfig`, `ScriptArguments` and `ModelConfig` is an option and a key of the YAML file. The
data set (JSONL file, directory or hub id) has columns "prompt", "chosen" and "rejected"; texts or chat messages. Start
from the supervised model: the flow needs a reward model with the vocabulary of its base model.

`--flow_aware_model_name_or_path my-sft-model` shows the reward model in training what lies between tokens, where the flow will
ask it for gradients (`vgf_llm.text.reward.mix_embeddings`). For an ensemble, train several with other `--seed`s.

With adapters (`use_peft`), `output_dir` holds the adapter and `output_dir/merged` the whole model, which the other
recipes take.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from vgf_llm.data.loading import load_splits
from vgf_llm.text.reward import mix_embeddings


@dataclass
class RewardScriptArguments(ScriptArguments):
    hh_transcripts: bool = field(
        default=False, metadata={"help": "The data set holds raw transcripts of Anthropic's HH-RLHF, to be parsed."}
    )
    flow_aware_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Language model with the same vocabulary, for flow-aware training. Default: none, tokens only."},
    )


def answers(special_ids: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Which positions flow-aware training may mix: token ids [2B, T] of a batch -> bool [2B, T].

    RewardTrainer stacks the chosen texts on the rejected ones. What the two of a pair share is their prompt (and how both
    answers begin, which is no loss); all behind it is answer, but for special tokens.
    """

    def positions(ids: Tensor) -> Tensor:
        chosen, rejected = ids.chunk(2)
        differs = (chosen != rejected).cumsum(1) > 0
        return differs.repeat(2, 1) & ~torch.isin(ids, torch.tensor(special_ids, device=ids.device))

    return positions


def check_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """The score must be learned where the sampler will read it: at the end-of-sequence token of the answer.

    Raises:
        ValueError: it is not.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"{tokenizer.eos_token} is padding and end of sequence, so the score would be read before the end: "
            "give --pad_token, another special token of the vocabulary"
        )
    if ids[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"texts end with {tokenizer.decode(ids[-1:])!r}, but completions end with {tokenizer.eos_token}: give "
            "--chat_template_path, a template that ends an answer with it, or --eos_token"
        )


def make_flow_aware(trainer: RewardTrainer, name: str, dtype: str | None) -> None:
    tokenizer = trainer.processing_class
    if is_deepspeed_zero3_enabled():
        raise ValueError("flow-aware training needs the whole embedding table on every device: use ZeRO-2, not ZeRO-3")
    if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{name} has another vocabulary than the reward model: flow-aware training needs the same")
    base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    mix_embeddings(trainer.model, base.to(trainer.args.device), answers(tokenizer.all_special_ids))


def main(script_args: RewardScriptArguments, training_args: RewardConfig, model_args: ModelConfig) -> None:
    evaluate = training_args.eval_strategy != "no"
    splits = [script_args.dataset_train_split, *([script_args.dataset_test_split] if evaluate else [])]
    columns = ["prompt", "chosen", "rejected"]
    data = load_splits(script_args.dataset_name, script_args.dataset_config, splits, columns, script_args.hh_transcripts)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[0],
        eval_dataset=data[1] if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if len(trainer.train_dataset) == 0:
        raise ValueError(f"every pair is longer than max_length={training_args.max_length} tokens")
    check_end(trainer.processing_class, trainer.train_dataset[0]["chosen_ids"])
    if script_args.flow_aware_model_name_or_path:
        make_flow_aware(trainer, script_args.flow_aware_model_name_or_path, model_args.dtype)
    resume = training_args.resume_from_checkpoint
    if resume == "auto":  # the newest checkpoint, if there is one: the same command starts and goes on
        resume = get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.wait_for_everyone()
    if model_args.use_peft and trainer.accelerator.is_main_process:
        # From disk, so that it does not matter over how many devices training was spread.
        whole = AutoPeftModelForSequenceClassification.from_pretrained(
            training_args.output_dir, num_labels=1, dtype=model_args.dtype
        ).merge_and_unload()
        whole.config.pad_token_id = trainer.processing_class.pad_token_id
        merged = Path(training_args.output_dir) / "merged"
        whole.save_pretrained(merged)
        trainer.processing_class.save_pretrained(merged)


def parse(argv: Sequence[str] | None = None) -> tuple[RewardScriptArguments, RewardConfig, ModelConfig]:
    """Options and YAML file, checked; nothing is loaded.

    Raises:
        ValueError: an unknown key or value, or no model or data set; adapters of another task.
    """
    args = TrlParser((RewardScriptArguments, RewardConfig, ModelConfig)).parse_args_and_config(argv)
    script_args, _, model_args = args
    if not model_args.model_name_or_path:
        raise ValueError("give --model_name_or_path: the supervised model, a directory or a hub id")
    if not script_args.dataset_name:
        raise ValueError("give --dataset_name: a JSONL file, a directory or a hub id")
    if model_args.use_peft and model_args.lora_task_type != "SEQ_CLS":
        raise ValueError("adapters of a reward model need --lora_task_type SEQ_CLS: its head is trained with them")
    return args


if __name__ == "__main__":
    try:
        parsed = parse()
    except (ValueError, OSError) as error:
        sys.exit(f"reward: error: {error}")
    main(*parsed)
