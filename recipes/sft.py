"""Supervised fine-tuning: the base model whose samples the flow starts from. TRL's SFTTrainer.

One GPU:

    python recipes/sft.py --config recipes/configs/tldr/pythia-1b_sft.yaml

Several GPUs; options win over the file:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 recipes/sft.py \
        --config recipes/configs/tldr/pythia-1b_sft.yaml --gradient_accumulation_steps 2

A laptop, a few minutes:

    python recipes/sft.py --config recipes/configs/tldr/tiny_sft.yaml

Every field of TRL's `SFTConfig`, `ScriptArguments` and `ModelConfig` is an option and a key of the YAML file. The data
set (JSONL file, directory or hub id) has columns "prompt" and "completion", or "prompt", "chosen" and "rejected", of
which the chosen answers are learned; texts or chat messages. With adapters (`use_peft`), `output_dir` holds the
adapter and `output_dir/merged` the whole model, which the other recipes take.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft import AutoPeftModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from vgf_llm.data.loading import load_splits


@dataclass
class SFTScriptArguments(ScriptArguments):
    hh_transcripts: bool = field(
        default=False, metadata={"help": "The data set holds raw transcripts of Anthropic's HH-RLHF, to be parsed."}
    )


def main(script_args: SFTScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    evaluate = training_args.eval_strategy != "no"
    splits = [script_args.dataset_train_split, *([script_args.dataset_test_split] if evaluate else [])]
    data = load_splits(script_args.dataset_name, script_args.dataset_config, splits, ["prompt"], script_args.hh_transcripts)
    for index, dataset in enumerate(data):
        if "completion" not in dataset.column_names:
            if "chosen" not in dataset.column_names:
                raise ValueError(f"{script_args.dataset_name} has neither a column completion nor a column chosen")
            data[index] = dataset.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[0],
        eval_dataset=data[1] if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    resume = training_args.resume_from_checkpoint
    if resume == "auto":  # the newest checkpoint, if there is one: the same command starts and goes on
        resume = get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.wait_for_everyone()
    if model_args.use_peft and trainer.accelerator.is_main_process:
        # From disk, so that it does not matter over how many devices training was spread.
        whole = AutoPeftModelForCausalLM.from_pretrained(training_args.output_dir, dtype=model_args.dtype).merge_and_unload()
        merged = Path(training_args.output_dir) / "merged"
        whole.save_pretrained(merged)
        trainer.processing_class.save_pretrained(merged)


def parse(argv: Sequence[str] | None = None) -> tuple[SFTScriptArguments, SFTConfig, ModelConfig]:
    """Options and YAML file, checked; nothing is loaded.

    Raises:
        ValueError: an unknown key or value, or no model or data set.
    """
    args = TrlParser((SFTScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(argv)
    script_args, _, model_args = args
    if not model_args.model_name_or_path:
        raise ValueError("give --model_name_or_path: a causal language model, a directory or a hub id")
    if not script_args.dataset_name:
        raise ValueError("give --dataset_name: a JSONL file, a directory or a hub id")
    return args


if __name__ == "__main__":
    try:
        parsed = parse()
    except (ValueError, OSError) as error:
        sys.exit(f"sft: error: {error}")
    main(*parsed)
