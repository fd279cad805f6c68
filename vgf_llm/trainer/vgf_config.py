"""Configuration of `VGFTrainer`."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from vgf_llm.flow import TransportBudget


@dataclass
class VGFConfig(TrainingArguments):
    r"""Arguments of [`VGFTrainer`]: those of `transformers.TrainingArguments`, and the ones below.

    Defaults that differ from `TrainingArguments`, all as in TRL 1.16 unless noted: `logging_steps=10`;
    `activation_checkpointing=True`; `bf16` on where a GPU supports it and `fp16` is off;
    `remove_unused_columns=False`; `learning_rate=1e-5` (ours: supervised fitting wants more than the 1e-6 of TRL's
    policy gradients, and the 2e-5 of its SFT is for data that does not come from the model itself).

    Parameters:
        > Models

        model_init_kwargs (`dict` or JSON `str`, *optional*):
            Passed to `AutoModelForCausalLM.from_pretrained` where `model` is a path. `dtype` defaults to float32, as
            in TRL.
        reward_model_init_kwargs (`dict` or JSON `str`, *optional*):
            The same for reward models given as paths. Kept apart, since a revision or dtype of the policy is seldom
            theirs.
        reward_kappa (`float`, *optional*, defaults to `0.5`):
            Several reward models count as `mean - reward_kappa * std` over them (see `DifferentiableReward`).
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Sets every dropout of the policy to 0: with one pass over given completions it is noise on the likelihood.

        > Data

        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Another order of the prompts in every epoch, from `data_seed` or else `seed`.
        per_device_train_batch_size, per_device_eval_batch_size (`int`, *optional*, default to `8`):
            Completions, not prompts, as in TRL: `per_device_train_batch_size / best_k` prompts make one micro-batch.
        steps_per_generation (`int`, *optional*):
            Micro-batches made from one generation phase, a multiple of `gradient_accumulation_steps`, which is its
            default. Particles come from a frozen reference, so a larger number changes nothing but how many prompts
            are sampled at once, up to rounding.

        > Particles

        num_generations (`int`, *optional*, defaults to `8`):
            Particles N per prompt. 8 is what the method was measured with.
        max_completion_length (`int`, *optional*, defaults to `256`):
            In tokens.
        temperature, top_p, top_k (*optional*, default to `1.0`, `1.0`, `0`):
            Of the base sampler, as in TRL. The policy is fitted, and meant to be sampled, at the same temperature.
        flow_batch_size (`int`, *optional*, defaults to `32`):
            Completions that sampler and flow hold in memory at once.

        > Transport budget: the only regulariser

        flow_steps (`int`, *optional*, defaults to `5`):
            Flow steps L. 0 moves nothing: the policy is then fitted to the best of N samples.
        flow_step_size (`float`, *optional*, defaults to `0.1`):
            Length of one step, in distances between two tokens of the reward model's embedding table.
        flow_kl_budget (`float`, *optional*, defaults to `2.0`):
            Nats per completion that one decode may spend. Runs at 1.2 and 2.3 nats kept the fluency of the base model
            (docs/method.md).
        flow_rounds (`int`, *optional*, defaults to `1`):
            How many times flow and decode follow each other.
        flow_horizon (`int`, *optional*, defaults to `0`):
            Positions after the first changed token that the tilt still holds; `None`: to the end, for rewards to which
            position does not matter (see `VGFSampler`).

        > Target

        best_k (`int`, *optional*, defaults to `1`):
            How many particles per prompt, best first, the policy is fitted to.
        target_temperature (`float`, *optional*, defaults to `1.0`):
            tau of their weights `w_i = softmax_i(R_i / (tau * s))`, s the standard deviation of R over the N
            transported particles of the prompt: free of the scale of R. Without effect with `best_k=1`.

        > Logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Print fitted completions with their rewards whenever metrics are logged.
        num_completions_to_print (`int`, *optional*, defaults to `8`):
            How many of them.

    Raises:
        ValueError: a field is out of range or fields contradict each other; the message says what to do instead.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs", "reward_model_init_kwargs"]

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Update steps between two logs; below 1 a share of all steps."})
    # The field that TRL 1.16 still sets, gradient_checkpointing, is a deprecated alias of this one and warns.
    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Recompute activations in the backward pass: less memory, about 20%% slower."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "bfloat16 mixed precision. Default: on where a GPU supports it and fp16 is off."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep only the column 'prompt' of the dataset."})

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of AutoModelForCausalLM.from_pretrained where the model is a path."},
    )
    reward_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of AutoModelForSequenceClassification.from_pretrained where rewards are paths."},
    )
    reward_kappa: float = field(
        default=0.5,
        metadata={"help": "Several reward models count as their mean minus this many standard deviations."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the policy to 0."})

    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts anew in every epoch."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches made from a generation phase, a multiple of gradient_accumulation_steps (default)."},
    )

    num_generations: int = field(default=8, metadata={"help": "Particles N per prompt."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the base sampler, at which the policy is fitted as well."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the base sampler; 1.0 keeps all tokens."})
    top_k: int = field(default=0, metadata={"help": "Top-k of the base sampler; 0 keeps all tokens."})
    flow_batch_size: int = field(default=32, metadata={"help": "Completions that sampler and flow hold in memory at once."})

    flow_steps: int = field(default=5, metadata={"help": "Flow steps L; 0 fits the policy to best-of-N."})
    flow_step_size: float = field(
        default=0.1, metadata={"help": "Length of one flow step, in distances between two token embeddings."}
    )
    flow_kl_budget: float = field(default=2.0, metadata={"help": "Nats per completion that one decode may spend."})
    flow_rounds: int = field(default=1, metadata={"help": "How many times flow and decode follow each other."})
    flow_horizon: int | None = field(
        default=0,
        metadata={"help": "Positions after the first changed token that the tilt still holds; None: to the end."},
    )

    best_k: int = field(default=1, metadata={"help": "Particles per prompt, best first, that the policy is fitted to."})
    target_temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of their softmax weights, in standard deviations of R within the prompt."},
    )

    log_completions: bool = field(default=False, metadata={"help": "Print fitted completions whenever metrics are logged."})
    num_completions_to_print: int = field(default=8, metadata={"help": "How many completions to print."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()

        for name, lowest in (
            ("num_generations", 1), ("max_completion_length", 1), ("flow_batch_size", 1), ("best_k", 1),
            ("num_completions_to_print", 1),
        ):  # fmt: skip
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if not (math.isfinite(self.target_temperature) and self.target_temperature > 0):
            raise ValueError(
                f"target_temperature must be positive and finite, got {self.target_temperature!r}; best_k=1 is its limit at 0"
            )
        if self.best_k > self.num_generations:
            raise ValueError(
                f"best_k ({self.best_k}) must not exceed num_generations ({self.num_generations}), the particles of a "
                "prompt: lower best_k or raise num_generations"
            )
        if self.per_device_train_batch_size % self.best_k:
            raise ValueError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) counts completions and must be "
                f"divisible by best_k ({self.best_k}), the completions of one prompt: use e.g. "
                f"{math.ceil(self.per_device_train_batch_size / self.best_k) * self.best_k}"
            )
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation < 1 or self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a positive multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}): a generation phase feeds whole "
                "optimizer steps"
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the size of a generation phase while training: set it to False and "
                "lower per_device_train_batch_size or flow_batch_size instead"
            )
        _ = self.budget  # out-of-range flow fields fail here and not at the first step

    @property
    def budget(self) -> TransportBudget:
        """The transport budget that the `flow_*` fields describe."""
        return TransportBudget(
            steps=self.flow_steps,
            step_size=self.flow_step_size,
            kl_budget=self.flow_kl_budget,
            rounds=self.flow_rounds,
        )

    @property
    def prompts_per_micro_batch(self) -> int:
        """Prompts whose `best_k` completions make one micro-batch of `per_device_train_batch_size`."""
        return self.per_device_train_batch_size // self.best_k

    @property
    def prompts_per_phase(self) -> int:
        """Prompts of one generation phase, sampled in one call."""
        assert self.steps_per_generation is not None  # set in __post_init__
        return self.prompts_per_micro_batch * self.steps_per_generation
