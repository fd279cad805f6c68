"""Fit a policy to completions that the flow carried away from a frozen reference.

    python recipes/vgf.py --config recipes/configs/reviews/tiny_vgf.yaml \
        --model_name_or_path my-sft-model --reward_model_name_or_path my-reward-model-0 my-reward-model-1

    python recipes/vgf.py --model_name_or_path my-sft-model --reward_model_name_or_path my-reward-model \
        --dataset_name prompts.jsonl --output_dir my-policy --use_peft --lora_target_modules all-linear

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/vgf.py ... --resume_from_checkpoint auto

Every field of `VGFConfig`, and of TRL's `ScriptArguments` and `ModelConfig`, is an option and a key of the YAML file;
options win over the file. The data set needs a column "prompt"; `dataset_name` is a JSONL file, a directory or a hub
id. `--flow_steps 0` fits to best-of-N, the run to compare with.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from vgf_llm import VGFConfig, VGFTrainer
from vgf_llm.data.loading import load_splits


@dataclass
class VGFScriptArguments(ScriptArguments):
    reward_model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sequence-classification model(s). Several with the vocabulary of the policy are an ensemble, one reward."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Python functions that add up with it, as module.function; see reward_weights."},
    )
    hh_transcripts: bool = field(
        default=False, metadata={"help": "The data set holds raw transcripts of Anthropic's HH-RLHF, to be parsed."}
    )


def main(script_args: VGFScriptArguments, training_args: VGFConfig, model_args: ModelConfig) -> None:
    models = script_args.reward_model_name_or_path
    rewards = [models if len(models) > 1 else models[0]] if models else []
    rewards += map(load_function, script_args.reward_funcs)
    evaluate = training_args.eval_strategy != "no"
    splits = [script_args.dataset_train_split, *([script_args.dataset_test_split] if evaluate else [])]
    data = load_splits(script_args.dataset_name, script_args.dataset_config, splits, ["prompt"], script_args.hh_transcripts)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = VGFTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=data[0],
        eval_dataset=data[1] if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module.function` names, of a module in the Python path.

    Raises:
        ValueError: there is no such module or function.
    """
    module, _, function = name.rpartition(".")
    try:
        found = getattr(import_module(module), function)
        if not callable(found):
            raise ValueError(f"it is a {type(found).__name__}")  # noqa: TRY004  # of what was typed, not of a type
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward_funcs: {name} is not module.function of a module in the Python path: {error}") from error
    return found


def parse(argv: Sequence[str] | None = None) -> tuple[VGFScriptArguments, VGFConfig, ModelConfig]:
    """Options and YAML file, checked; nothing is loaded.

    Raises:
        ValueError: an unknown key or value, or no policy, reward or data set.
    """
    try:
        args = TrlParser((VGFScriptArguments, VGFConfig, ModelConfig)).parse_args_and_config(argv)
    except (TypeError, OverflowError) as error:  # a key that is no string; in fields of transformers' own a list, or infinity
        raise ValueError(f"a key or value in the configuration is not of the kind of its option: {error}") from error
    script_args, _, model_args = args
    if not model_args.model_name_or_path:
        raise ValueError("give --model_name_or_path: the supervised model, a directory or a hub id")
    if not script_args.reward_model_name_or_path and not script_args.reward_funcs:
        raise ValueError("give --reward_model_name_or_path, one or more, or --reward_funcs")
    if not script_args.dataset_name:
        raise ValueError("give --dataset_name: a JSONL file, a directory or a hub id")
    return args


if __name__ == "__main__":
    try:
        parsed = parse()
    except (ValueError, OSError) as error:
        sys.exit(f"vgf: error: {error}")
    main(*parsed)
