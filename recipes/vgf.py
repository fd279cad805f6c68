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

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from datasets import DatasetDict, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from vgf_llm import VGFConfig, VGFTrainer


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


def load_prompts(args: ScriptArguments) -> DatasetDict:
    if args.dataset_name is None:
        raise ValueError("give --dataset_name: a JSONL file, a directory or a hub id")
    if Path(args.dataset_name).is_file():
        return load_dataset("json", data_files={args.dataset_train_split: args.dataset_name})
    return load_dataset(args.dataset_name, args.dataset_config)


def main(script_args: VGFScriptArguments, training_args: VGFConfig, model_args: ModelConfig) -> None:
    models = script_args.reward_model_name_or_path
    rewards = [models if len(models) > 1 else models[0]] if models else []
    for name in script_args.reward_funcs:
        module, _, function = name.rpartition(".")
        rewards.append(getattr(import_module(module), function))
    if not rewards:
        raise ValueError("give --reward_model_name_or_path, one or more, or --reward_funcs")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_prompts(script_args)
    evaluate = training_args.eval_strategy != "no"
    if evaluate and script_args.dataset_test_split not in dataset:
        raise ValueError(f"eval_strategy needs a split {script_args.dataset_test_split!r}, got only {list(dataset)}")
    trainer = VGFTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if evaluate else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((VGFScriptArguments, VGFConfig, ModelConfig)).parse_args_and_config())
