"""Configuration of `VGFTrainer`."""

import json
import math
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from vgf_llm.flow import TransportBudget
from vgf_llm.text.decode import BaseDistribution


Target = Literal["sft", "weighted", "tilt", "dpo", "advantage"]
ParticleSource = Literal["reference", "policy"]
VLLMMode = Literal["colocate", "server"]
# Fields that are objects, or JSON of them.
OBJECTS = ("model_init_kwargs", "reward_model_init_kwargs", "chat_template_kwargs")


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
        chat_template_kwargs (`dict` or JSON `str`, *optional*):
            Passed to the chat template of the policy with every prompt of messages, as in TRL: `{"enable_thinking": false}`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether models and tokenizers given as paths, of the policy, the rewards and the value model, may bring code of their
            own.
        reward_model_sharding (`bool`, *optional*, defaults to `False`):
            Shard the layers of differentiable reward models over all processes (FSDP2), under any engine. Every forward and
            backward of them then gathers one layer at a time.
        reward_clip_range (`list[float]`, *optional*):
            Lowest and highest value of the summed reward, as in TRL: verification, selection and targets see it clipped. The flow
            follows the gradient of what is below, but a particle at the upper end does not move any further.
        reward_weights (`list[float]`, *optional*):
            One weight per reward; default 1 each, as in TRL.
        reward_kappa (`float`, *optional*, defaults to `0.5`):
            An ensemble of reward models, and the heads of a value model, count as `mean - reward_kappa * std` over them
            (see `DifferentiableReward`).
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Sets every dropout of the policy to 0: with one pass over given completions it is noise on the likelihood.

        > Data

        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Another order of the prompts in every epoch, from `data_seed` or else `seed`.
        per_device_train_batch_size, per_device_eval_batch_size (`int`, *optional*, default to `8`):
            Fitted completions of one process, not prompts: `per_device_train_batch_size / rows_per_prompt` prompts make one
            micro-batch, where a prompt has `best_k` rows, and two with `target="dpo"`. All N particles of a prompt are drawn
            by one process, whatever the sizes.
        steps_per_generation (`int`, *optional*):
            Micro-batches made from one generation phase, a multiple of `gradient_accumulation_steps`, which is its
            default. While particles come from a frozen reference and need no value model, a larger number changes nothing
            but how many prompts are sampled at once, up to rounding.
        num_iterations (`int`, *optional*, defaults to `1`):
            How many times the policy is fitted to each generation phase, mu in GRPO.

        > Particles

        num_generations (`int`, *optional*, defaults to `8`):
            Particles N per prompt. 8 is what the method was measured with.
        num_generations_eval (`int`, *optional*):
            The same in evaluation; default `num_generations`.
        max_completion_length (`int`, *optional*, defaults to `256`):
            In tokens.
        particle_source (`str`, *optional*, defaults to `"reference"`):
            `"reference"`: the model as it was handed over, so that the budget is the only regulariser. `"policy"`: the
            policy as it is at the start of the phase; targets then move with it, up to `policy_kl_cap`.
        policy_kl_cap (`float`, *optional*, defaults to `4.0`):
            Nats per completion. A phase that finds KL(policy || reference) above it, measured on its own initial particles,
            is spent on plain samples of the reference, which brings the policy back. The default is the upper end of
            the range in which methods are compared (docs/method.md). Without effect with `particle_source="reference"`.
        temperature, top_p, top_k (*optional*, default to `1.0`, `1.0`, `0`):
            Of the base sampler, as in TRL. The policy is fitted, and meant to be sampled, at the same temperature.
        flow_batch_size (`int`, *optional*, defaults to `32`):
            Completions that sampler and flow hold in memory at once.

        > vLLM as the engine that draws the particles of training, before the flow (docs/trainer.md)

        use_vllm (`bool`, *optional*, defaults to `False`):
            Draw with vLLM (`pip install "vgf_llm[vllm]"`). Defaults here and below are those of TRL. Not with `top_k` or `top_p`:
            vLLM computes in another precision than the flow's model, so that its support would be another at the edge.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: in every training process, on its GPU. `"server"`: behind `vllm serve`, on GPUs of its own.
        vllm_server_base_url (`str`, *optional*):
            Of the server. Default: TRL's, `http://0.0.0.0:8000`.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to be up.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port over which the server gets weights.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that vLLM takes in colocate mode.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt plus completion of vLLM in colocate mode, in tokens. Default: the model's own.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Processes that share one vLLM in colocate mode; divides their number.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            In colocate mode vLLM frees its memory between two phases, and gets its weights again at the next one.

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
        flow_movers (`int`, *optional*):
            How many particles of a prompt, best first, every round moves; `None`: all N. With `target="sft"` only the best
            is fitted, so moving the others is mostly spent in vain.
        flow_horizon (`int`, *optional*, defaults to `0`):
            Positions after the first changed token that the tilt still holds; `None`: to the end, for rewards to which
            position does not matter (see `VGFSampler`).
        flow_field (`str`, *optional*):
            Folder of a learned gradient of the reward (`vgf_llm.text.field.fit_field`), fitted to the reference. Particles then
            move while they are drawn, which costs a layer more per token and no gradient; `flow_rounds` times
            `num_generations` are drawn (every round after the first `flow_movers`, if that is set), and the best
            `num_generations` stay. `flow_kl_budget` is what one of them may spend; `flow_step_size`, `flow_horizon` and
            `flow_steps` (but for 0, which draws plain samples) play no part. `"tilt"` and `"advantage"` take their dense targets
            from it too (docs/trainer.md). Needs rewards with a gradient, and particles that move to be the reference's. Not with
            `use_vllm`.

        > Target

        target (`str`, *optional*, defaults to `"sft"`):
            What the policy is fitted to (formulas in docs/trainer.md): `"sft"`, the likelihood of the best k particles;
            `"weighted"`, the same weighted by a softmax of their rewards; `"tilt"`, dense token targets from the gradient of
            the reward along the best k, or what every particle was drawn from along a `flow_field`; `"dpo"`, the transported
            best against the initial worst; `"advantage"`, the policy gradient of the reward with the dense targets as its
            control variate, on samples of the policy as they were drawn.
        best_k (`int`, *optional*):
            How many particles per prompt, best first, the policy is fitted to. Default: 1 with `"sft"`, all N with
            `"weighted"` and `"tilt"`. With `"dpo"` it is 1, with `"advantage"` N.
        target_temperature (`float`, *optional*, defaults to `1.0`):
            tau, in standard deviations of R over the N transported particles of the prompt, and so free of the scale of R: of
            the weights of `"weighted"` and of the advantages of `"tilt"` and `"advantage"`.
        tilt_kl_cap (`float`, *optional*, defaults to `0.1`):
            Nats that one token target may lie away from the base distribution. 0.1 over the 20 to 30 tokens of the measured
            tasks is the 2 to 3 nats per completion of `flow_kl_budget`.
        dpo_beta (`float`, *optional*, defaults to `0.1`):
            beta of DPO, as in TRL.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Completions cut at `max_completion_length` do not count in the loss, as in TRL.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            How many optimizer steps in a row may be skipped because their gradient is not finite; one more ends the run. Under
            DeepSpeed, which steps within the backward pass, the first one does.

        > Value model: rewards without a gradient (`vgf_llm.text.value.ValueModel`)

        value_model (`str`, *optional*):
            Path of its backbone, a causal language model with the policy's vocabulary. Default: a copy of the policy as
            it was handed over.
        value_heads, value_lora_rank, value_learning_rate (*optional*, default to `4`, `8`, `1e-3`):
            Heads of the ensemble; rank of the adapters on the backbone, 0 for none; of AdamW.
        value_replay_size (`int`, *optional*, defaults to `4096`):
            Scored completions kept, of all processes together.
        value_warmup_samples (`int`, *optional*, defaults to `256`):
            Scored completions before the flow follows the value model; until then phases are best-of-N along what else has a
            gradient.
        value_batch_size (`int`, *optional*, defaults to `32`):
            Samples per update.
        value_update_ratio (`float`, *optional*, defaults to `1.0`):
            How many times a new sample is used on average while it is new: a phase that scored n completions makes
            `value_update_ratio * n / value_batch_size` updates.

        > Logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Print fitted completions with their rewards whenever metrics are logged, and append all particles before and
            after transport with their rewards to `completions-<process>.jsonl` in `output_dir`.
        num_completions_to_print (`int`, *optional*, defaults to `8`):
            How many of them.

    Raises:
        ValueError: a field is out of range or fields contradict each other; the message says what to do instead.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + list(OBJECTS)

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
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the chat template, for prompts that are messages."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers given as paths to bring code of their own."}
    )
    reward_model_sharding: bool = field(
        default=False, metadata={"help": "Shard the layers of differentiable reward models over all processes."}
    )
    reward_clip_range: list[float] | None = field(
        default=None, metadata={"help": "Lowest and highest value of the summed reward. Default: no clipping."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight per reward. Default: 1 each."})
    reward_kappa: float = field(
        default=0.5,
        metadata={
            "help": "Ensembles of reward models, and value heads, count as their mean minus this many standard deviations."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the policy to 0."})

    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts anew in every epoch."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches made from a generation phase, a multiple of gradient_accumulation_steps (default)."},
    )
    num_iterations: int = field(default=1, metadata={"help": "How many times the policy is fitted to each generation phase."})

    num_generations: int = field(default=8, metadata={"help": "Particles N per prompt."})
    num_generations_eval: int | None = field(default=None, metadata={"help": "The same in evaluation. Default: num_generations."})
    particle_source: ParticleSource = field(
        default="reference",
        metadata={"help": "'reference': the model as it was handed over; 'policy': the policy at the start of the phase."},
    )
    policy_kl_cap: float = field(
        default=4.0,
        metadata={"help": "Nats per completion; above it a phase with particle_source='policy' fits samples of the reference."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the base sampler, at which the policy is fitted as well."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the base sampler; 1.0 keeps all tokens."})
    top_k: int = field(default=0, metadata={"help": "Top-k of the base sampler; 0 keeps all tokens."})
    flow_batch_size: int = field(default=32, metadata={"help": "Completions that sampler and flow hold in memory at once."})

    use_vllm: bool = field(default=False, metadata={"help": "Draw the particles of training with vLLM."})
    vllm_mode: VLLMMode = field(
        default="colocate",
        metadata={"help": "'colocate': vLLM in every training process; 'server': behind `vllm serve`, on GPUs of its own."},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Of the vLLM server. Default: that of TRL, http://0.0.0.0:8000."}
    )
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the vLLM server to be up."})
    vllm_group_port: int = field(default=51216, metadata={"help": "Port over which the vLLM server gets weights."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that vLLM takes in colocate mode."}
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt plus completion of vLLM in colocate mode, in tokens. Default: the model's own."},
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Processes that share one vLLM in colocate mode; divides their number."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "In colocate mode vLLM frees its memory between two phases."}
    )

    flow_steps: int = field(default=5, metadata={"help": "Flow steps L; 0 fits the policy to best-of-N."})
    flow_step_size: float = field(
        default=0.1, metadata={"help": "Length of one flow step, in distances between two token embeddings."}
    )
    flow_kl_budget: float = field(default=2.0, metadata={"help": "Nats per completion that one decode may spend."})
    flow_rounds: int = field(default=1, metadata={"help": "How many times flow and decode follow each other."})
    flow_movers: int | None = field(
        default=None, metadata={"help": "Particles of a prompt, best first, that every round moves. Default: all."}
    )
    flow_horizon: int | None = field(
        default=0,
        metadata={"help": "Positions after the first changed token that the tilt still holds; None: to the end."},
    )

    flow_field: str | None = field(
        default=None, metadata={"help": "Folder of a learned gradient (vgf_llm.text.field), along which particles are drawn."}
    )

    target: Target = field(
        default="sft",
        metadata={
            "help": "'sft': likelihood of the best k particles; 'weighted': by a softmax of reward; 'tilt': dense token targets "
            "from the reward's gradient; 'dpo': transported best against initial worst; 'advantage': policy gradient with "
            "dense targets as its control variate."
        },
    )
    best_k: int | None = field(
        default=None,
        metadata={"help": "Particles per prompt, best first, that the policy is fitted to. Default: 1 with sft, else all."},
    )
    target_temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of 'weighted', 'tilt' and 'advantage', in standard deviations of R within the prompt."},
    )
    tilt_kl_cap: float = field(default=0.1, metadata={"help": "Nats that one token target of 'tilt' and 'advantage' may spend."})
    dpo_beta: float = field(default=0.1, metadata={"help": "beta of 'dpo'."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Completions cut at max_completion_length do not count in the loss."}
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={"help": "Steps in a row that may be skipped for a gradient that is not finite; one more ends the run."},
    )

    value_model: str | None = field(
        default=None,
        metadata={"help": "Backbone of the value model for rewards without a gradient. Default: a copy of the policy."},
    )
    value_heads: int = field(default=4, metadata={"help": "Heads of the value model's ensemble."})
    value_lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters on its backbone; 0: heads alone."})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the value model."})
    value_replay_size: int = field(default=4096, metadata={"help": "Scored completions kept for it."})
    value_warmup_samples: int = field(
        default=256, metadata={"help": "Scored completions before the flow follows the value model."}
    )
    value_batch_size: int = field(default=32, metadata={"help": "Samples per update of the value model."})
    value_update_ratio: float = field(
        default=1.0, metadata={"help": "How many times a new sample is used, on average, in the phase that scored it."}
    )

    log_completions: bool = field(default=False, metadata={"help": "Print fitted completions, and write all particles to JSONL."})
    num_completions_to_print: int = field(default=8, metadata={"help": "How many completions to print."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        for name in OBJECTS:
            _check_object(name, getattr(self, name))
        for name, kind in VGFConfig.__annotations__.items():
            if not _fits(getattr(self, name), kind):
                raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {getattr(self, name)!r}")
        super().__post_init__()

        for name, allowed in (
            ("target", get_args(Target)), ("particle_source", get_args(ParticleSource)), ("vllm_mode", get_args(VLLMMode)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.num_generations_eval is None:
            self.num_generations_eval = self.num_generations
        if self.best_k is None:
            self.best_k = 1 if self.target in ("sft", "dpo") else self.num_generations
        for name, lowest in (
            ("num_generations", 1), ("num_generations_eval", 1), ("max_completion_length", 1), ("flow_batch_size", 1),
            ("best_k", 1), ("num_iterations", 1), ("num_completions_to_print", 1), ("value_heads", 1), ("value_lora_rank", 0),
            ("value_replay_size", 1), ("value_batch_size", 1), ("value_warmup_samples", 1), ("max_skipped_steps", 0),
            ("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1), ("gradient_accumulation_steps", 1),
            ("vllm_group_port", 1), ("vllm_tensor_parallel_size", 1),
        ):  # fmt: skip
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in (
            "target_temperature",
            "policy_kl_cap",
            "tilt_kl_cap",
            "dpo_beta",
            "value_learning_rate",
            "value_update_ratio",
            "vllm_server_timeout",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        for name, numbers in (
            ("reward_kappa", [self.reward_kappa]), ("reward_weights", self.reward_weights or []),
            ("learning_rate", [self.learning_rate]), ("max_grad_norm", [self.max_grad_norm]),
        ):  # fmt: skip
            if any(not abs(number) < math.inf or (number < 0 and name != "reward_weights") for number in numbers):
                wanted = "finite" if name == "reward_weights" else "finite and not negative"
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")
        if self.flow_horizon is not None and self.flow_horizon < 0:
            raise ValueError(f"flow_horizon must be at least 0, got {self.flow_horizon}; None holds the tilt to the end")
        BaseDistribution(self.temperature, self.top_k, self.top_p)  # whose message names the field
        if self.reward_clip_range is not None:
            self.reward_clip_range = list(self.reward_clip_range)  # as JSON gives it back
            if len(self.reward_clip_range) != 2 or not self.reward_clip_range[0] < self.reward_clip_range[1]:
                raise ValueError(f"reward_clip_range must be two numbers, lowest and highest, got {self.reward_clip_range!r}")
        if self.best_k > self.num_generations:
            raise ValueError(
                f"best_k ({self.best_k}) must not exceed num_generations ({self.num_generations}), the particles of a "
                "prompt: lower best_k or raise num_generations"
            )
        if self.flow_movers is not None and not 1 <= self.flow_movers <= self.num_generations:
            raise ValueError(
                f"flow_movers ({self.flow_movers}) must be between 1 and num_generations ({self.num_generations}), the "
                "particles of a prompt; None moves all of them"
            )
        if self.flow_field is not None and self.particle_source != "reference" and not self.budget.is_zero:
            raise ValueError(
                "flow_field is fitted to the reference and moves particles of it alone, but particle_source="
                f"{self.particle_source!r}: use particle_source='reference', or move nothing (flow_steps=0)"
            )
        drawn_from = self.flow_field is not None and self.target == "tilt" and not self.budget.is_zero
        if drawn_from and (self.best_k != self.num_generations or self.flow_rounds != 1):
            raise ValueError(
                "target='tilt' with flow_field is fitted to what particles are drawn from, so to all of them as they were "
                f"drawn: best_k ({self.best_k}) must be num_generations ({self.num_generations}), and flow_rounds "
                f"({self.flow_rounds}) 1"
            )
        if self.flow_field is not None and self.use_vllm:
            raise ValueError(
                "flow_field moves particles while they are drawn, token by token, which vLLM does not do: leave out use_vllm or "
                "flow_field"
            )
        if self.target == "dpo" and (self.best_k != 1 or self.num_generations < 2):
            raise ValueError(
                f"target='dpo' takes one pair of a prompt, so best_k ({self.best_k}) must be 1 and num_generations "
                f"({self.num_generations}) at least 2"
            )
        if self.target == "advantage" and (self.best_k != self.num_generations or self.num_generations < 2):
            raise ValueError(
                f"target='advantage' compares all particles of a prompt, so best_k ({self.best_k}) must be num_generations "
                f"({self.num_generations}), and that at least 2"
            )
        if self.target == "advantage" and (self.particle_source != "policy" or self.flow_steps or self.num_iterations != 1):
            raise ValueError(
                "target='advantage' is a policy gradient, for which completions have to be the policy's own as they were drawn: "
                f"set particle_source='policy' (is {self.particle_source!r}), flow_steps=0 (is {self.flow_steps}) and "
                f"num_iterations=1 (is {self.num_iterations})"
            )
        if min(self.num_generations_eval, self.num_generations) < self.best_k or (
            self.target == "dpo" and self.num_generations_eval < 2
        ):
            raise ValueError(
                f"num_generations_eval ({self.num_generations_eval}) must be at least the {self.rows_per_prompt} particles that "
                f"target={self.target!r} fits of a prompt"
            )
        if self.per_device_train_batch_size % self.rows_per_prompt:
            raise ValueError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) counts fitted completions and must be "
                f"divisible by {'2, a pair' if self.target == 'dpo' else f'best_k ({self.best_k})'}, the completions of one "
                f"prompt: use e.g. {math.ceil(self.per_device_train_batch_size / self.rows_per_prompt) * self.rows_per_prompt}"
            )
        if self.value_warmup_samples > self.value_replay_size:
            raise ValueError(
                f"value_warmup_samples ({self.value_warmup_samples}) must not exceed value_replay_size "
                f"({self.value_replay_size}): the replay would never hold enough"
            )
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation < 1 or self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a positive multiple of "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}): a generation phase feeds whole "
                "optimizer steps"
            )
        if self.target == "advantage" and self.steps_per_generation != self.gradient_accumulation_steps:
            raise ValueError(
                f"target='advantage' needs new completions in every optimizer step: leave out steps_per_generation "
                f"({self.steps_per_generation}), or set it to gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            )
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(f"vllm_gpu_memory_utilization must lie in (0, 1], got {self.vllm_gpu_memory_utilization!r}")
        if self.vllm_max_model_length is not None and self.vllm_max_model_length <= self.max_completion_length:
            raise ValueError(
                f"vllm_max_model_length ({self.vllm_max_model_length}) must exceed max_completion_length "
                f"({self.max_completion_length}): it holds the prompt as well"
            )
        if self.use_vllm and (self.top_k or self.top_p < 1):
            raise ValueError(
                f"use_vllm needs top_k=0 (is {self.top_k}) and top_p=1.0 (is {self.top_p}): vLLM computes in another precision "
                "than the flow's model, and would draw tokens to which that gives no probability at all"
            )
        if self.use_vllm and self.vllm_mode == "server":
            of_colocate = ("vllm_enable_sleep_mode", "vllm_tensor_parallel_size", "vllm_max_model_length")
            given = [name for name in of_colocate if getattr(self, name) != VGFConfig.__dataclass_fields__[name].default]
            if given:
                raise ValueError(
                    f"{', '.join(given)} would do nothing with vllm_mode='server': give the option to `vllm serve` itself"
                )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the size of a generation phase while training: set it to False and "
                "lower per_device_train_batch_size or flow_batch_size instead"
            )
        try:
            _ = self.budget  # out-of-range flow fields fail here and not at the first step
        except ValueError as error:
            raise ValueError(f"flow_{error}") from None  # the message begins with the name of the field

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
    def rows_per_prompt(self) -> int:
        """Fitted completions of one prompt: `best_k`, and the pair of DPO."""
        assert self.best_k is not None  # set in __post_init__
        return 2 if self.target == "dpo" else self.best_k

    @property
    def prompts_per_micro_batch(self) -> int:
        """Prompts whose fitted completions make one micro-batch of `per_device_train_batch_size`, on one process."""
        return self.per_device_train_batch_size // self.rows_per_prompt

    @property
    def prompts_per_phase(self) -> int:
        """Prompts of one generation phase on one process, sampled in one call."""
        assert self.steps_per_generation is not None  # set in __post_init__
        return self.prompts_per_micro_batch * self.steps_per_generation


def _check_object(name: str, value: Any) -> None:
    """Raises ValueError unless this is None, a dict, or the JSON of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name} must be a JSON object, got {value!r}: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f'{name} must be an object such as {{"dtype": "bfloat16"}}, got {value!r}')


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of its field: a command line is checked by its parser, but YAML says what it likes."""
    if kind is Any or get_origin(kind) is Literal:  # choices have a message of their own
        return True
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_fits(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
