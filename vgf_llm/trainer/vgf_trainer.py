"""VGFTrainer: fit a policy to completions that the flow carried away from the reference.

Every generation phase: draw N particles per prompt, transport and verify them (`VGFSampler`), make targets of them, and fit the
policy to those (`vgf_llm.trainer.targets`, docs/trainer.md). With the default target and source,

    loss = - sum_i w_i log pi(y_i | x_i) / sum_i w_i |y_i|,

both sums over all completions of one optimizer step, on all processes. Particles that come from the frozen reference never depend
on the policy, so there is no KL term: how far the policy can go is set by the transport budget alone.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from vgf_llm import __version__
from vgf_llm.flow import TransportBudget, diagnostics
from vgf_llm.text import VGFOutput, VGFSampler, tilt
from vgf_llm.text.decode import TokenTargets, row_keys
from vgf_llm.text.field import HEADS, GradientField
from vgf_llm.text.loading import load_whole
from vgf_llm.text.sampler import Particles
from vgf_llm.text.value import ValueModel

from .checkpoints import (
    MANIFEST_FILE,
    RESUMED,
    SETTINGS_FILE,
    SaveOnSigterm,
    check_whole,
    check_writable,
    delete_old_checkpoints,
    last_whole_checkpoint,
    whole_checkpoints,
    write_manifest,
)
from .phases import PhaseOrder, PhaseSampler, PhaseStream
from .replica import copy_weights, shard_layers, unsharded_loading, whole_copy
from .rewards import RewardFunc, Rewards, Scores
from .targets import dpo_loss, leave_one_out, likelihood_loss, residual_loss, spread, target_weights, tilt_loss
from .vgf_config import VGFConfig


if TYPE_CHECKING:
    from .engine import Engine

T = TypeVar("T")
logger = logging.getLogger(__name__)


# Particles on which the first phase after a log measures the fidelity of its gradient.
FIDELITY_ROWS = 64


class VGFTrainer(Trainer):
    """Trainer of Value Gradient Flow: a policy is fitted to what becomes of samples under the gradient of a reward.

    The reference is the policy as it is handed over: a frozen copy of it, or with PEFT the same weights with the
    adapters disabled (an adapter that was trained before has to be merged first to be part of it). It stays the same
    when training resumes, as long as the trainer is built from the same model.

    Under DDP, DeepSpeed ZeRO-1/2/3 and FSDP, reference, rewards and field are whole and frozen on every process, outside the
    engine (docs/distributed.md).

    Args:
        model: causal language model to train: a path or hub id (loaded with `args.model_init_kwargs`, in float32
            unless they say otherwise), a model, or a PEFT model.
        reward_funcs: a reward, or a list of rewards of any kind that add up with `args.reward_weights`: path or hub id of a
            sequence-classification model with `num_labels=1` (loaded with `args.reward_model_init_kwargs`), such a model, a
            `DifferentiableReward`, a list of paths and models (an ensemble, `mean - args.reward_kappa * std`), or a function
            `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)` that returns a number or
            None per completion, as in TRL, plain or async. Functions, and models with another tokenizer, have no gradient that
            could be followed: a value model learns them (`vgf_llm.text.value`).
        args: `VGFConfig`. Default: its defaults, in the folder "<model name>-VGF".
        train_dataset: `datasets.Dataset` or `IterableDataset` with a column "prompt": strings in final form, or lists of chat
            messages, to which the chat template is applied. Other columns go to reward functions.
        eval_dataset: a `datasets.Dataset`, or a dict of such.
        processing_class: tokenizer of the policy. Default: loaded from the path of the model. A missing padding token
            becomes its end-of-sequence token.
        reward_processing_classes: tokenizer(s) of the reward models, one per reward. Default: that of their path; a model given
            as an object is taken to have the policy's.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: for loading the policy from a path; train it with `peft_config`.
        peft_config: adapters to wrap the model with.

    Raises:
        TypeError: a reward that is no model and no function, or a dataset that is none.
        ValueError: arguments that contradict each other, a dataset without prompts or smaller than one generation
            phase, a field of another reward, or several GPUs in one process.
        OSError: nothing can be written to `output_dir`, or `args.flow_field` holds no field.
        RuntimeError: another process cannot read the field.
        ImportError: `use_vllm` without vLLM.
    """

    # `compute_loss` divides by the tokens of the whole optimizer step, so Trainer must not divide by the number of its
    # micro-batches once more. Left unset, it would decide from the signature of the model's forward.
    loss_is_scaled_for_ga = True

    args: VGFConfig
    model: Any  # PreTrainedModel or PeftModel; without type, as both look their attributes up at run time
    processing_class: PreTrainedTokenizerBase
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: VGFConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        path = model if isinstance(model, str) else model.config._name_or_path
        if args is None:
            args = VGFConfig(f"{path.rstrip('/').split('/')[-1] or type(model).__name__}-VGF")
        if args.should_save:
            check_writable(Path(args.output_dir or "."))
        if args.use_vllm:
            from .engine import Engine, check_installed  # imports TRL, and vLLM where there is one

            check_installed()
        if train_dataset is None:
            raise ValueError("train_dataset is required: a datasets.Dataset with a column 'prompt'")
        _check_dataset(train_dataset, "train_dataset")
        for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
            if dataset is not None:
                _check_dataset(dataset, f"eval_dataset {name}".strip())
                if isinstance(dataset, IterableDataset):
                    raise TypeError(f"eval_dataset {name}".strip() + " must be a datasets.Dataset: evaluation needs its length")
        if isinstance(train_dataset, IterableDataset):
            if args.dataloader_num_workers:
                raise ValueError("dataloader_num_workers must be 0 with an IterableDataset, whose order they would change")
            accelerator_config: Any = args.accelerator_config
            accelerator_config.dispatch_batches = False  # every process reads the stream and keeps its own part
        elif len(train_dataset) < args.prompts_per_phase * args.world_size:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} prompts, but one generation phase takes "
                f"{args.prompts_per_phase * args.world_size} (per_device_train_batch_size {args.per_device_train_batch_size} / "
                f"{args.rows_per_prompt} rows per prompt * steps_per_generation {args.steps_per_generation} * {args.world_size} "
                "processes): lower the batch size or the steps, or add prompts"
            )

        set_seed(args.seed)  # adapters are initialised at random
        if processing_class is None:
            if not path:
                raise ValueError("processing_class is required, the tokenizer of the model, where it has no path")
            processing_class = AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        has_chats = isinstance(train_dataset, Dataset) and isinstance(train_dataset[0]["prompt"], list)
        if has_chats and processing_class.chat_template is None:
            raise ValueError(
                "the prompts are chat messages, but the tokenizer has no chat template: set tokenizer.chat_template, or give "
                "prompts as strings"
            )
        with unsharded_loading():
            self.rewards = Rewards(reward_funcs, reward_processing_classes, processing_class, args)
            self._field, self._field_digest = _load_field(self.rewards, processing_class, args)
            model = _load_policy(model, args, quantization_config)
            if self.rewards.black_box:
                self.rewards.value = _load_value_model(model, processing_class, args)
        model = _add_adapters(model, peft_config)
        if args.disable_dropout:
            _disable_dropout(model)

        super().__init__(
            model=model,
            args=args,
            data_collator=_identity,  # type: ignore[arg-type]  # prompts stay as they are until the sampler reads them
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, where Trainer would use nn.DataParallel, which "
                "VGFTrainer does not support: start one process per GPU with `accelerate launch`, or make one visible, e.g. "
                "CUDA_VISIBLE_DEVICES=0"
            )
        self.add_callback(SaveOnSigterm(self))

        self.is_peft = isinstance(model, PeftModel)
        self._zero3 = is_deepspeed_zero3_enabled()
        self._sharded = self._zero3 or self.is_fsdp_enabled
        if self.is_peft and args.activation_checkpointing:
            # Inputs of the first block have to carry a gradient where everything below the adapters is frozen (TRL, issue
            # 3089), and ZeRO-3 needs the reentrant kind (TRL, pull request 4951).
            model.enable_input_require_grads()
            if self._zero3:
                args.activation_checkpointing_kwargs = {**(args.activation_checkpointing_kwargs or {}), "use_reentrant": True}  # type: ignore[dict-item]
        self.rewards.to(args.device)
        if args.reward_model_sharding:
            if args.world_size == 1:
                raise ValueError("reward_model_sharding needs several processes: start them with `accelerate launch`")
            for term in self.rewards.differentiable:
                shard_layers(term.reward, args.device)
        # After super().__init__, which moves the model to its device, and before an engine wraps it.
        self._whole: Any = whole_copy(model, args.device) if self._sharded and self.is_peft else None if self._sharded else model
        reference = self._whole if self.is_peft else whole_copy(model, args.device)
        self._samplers = {"reference": self._make_sampler(reference, self._field)}
        self._vllm: Engine | None = None
        self._vllm_has_weights = False
        if args.use_vllm:
            self._vllm = Engine(reference, self.accelerator, processing_class, args, self._samplers["reference"])

        self._micro_step = 0  # place in the stream of micro-batches, set before every optimizer step
        self._phase: int | None = None
        self._buffer: list[dict[str, Any]] = []  # the micro-batches of this phase
        self._metrics: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        self._unlogged: tuple[float, int] | None = None  # loss since the last log, and its step, from a checkpoint
        self._skipped = 0  # optimizer steps in a row
        self._not_finite = ""  # where the loss of this optimizer step was not
        self._step_time = 0.0
        self._eval_batch = 0
        self._printed: deque[tuple[str, str, float]] = deque(maxlen=args.num_completions_to_print)

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None  # Trainer has a default for it
        return Path(self.args.output_dir)

    # ---- Data: which prompts, in which order ------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        # With remove_unused_columns Trainer would keep what the forward of the model takes.
        self._signature_columns = ["prompt"]  # type: ignore[assignment]

    @property
    def _order(self) -> PhaseOrder:
        assert self.args.steps_per_generation is not None
        return PhaseOrder(
            self.args.prompts_per_micro_batch, self.args.steps_per_generation, self.args.world_size, self.args.num_iterations
        )

    def get_train_dataloader(self) -> DataLoader:
        """Every item holds one process's prompts of a generation phase, and is repeated once per micro-batch made from it."""
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            dataset = PhaseStream(dataset, self._order)
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self.args.prompts_per_phase,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        size = len(self.train_dataset if train_dataset is None else train_dataset)
        return PhaseSampler(size, self._order, seed if self.args.shuffle_dataset else None)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """`per_device_eval_batch_size / rows_per_prompt` prompts per batch, in the order of the dataset."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if chosen is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self._get_dataloader(
            dataset=chosen,
            description="Evaluation",
            batch_size=self._eval_batch_size,
            sampler_fn=self._get_eval_sampler,  # type: ignore[arg-type]
        )

    @property
    def _eval_batch_size(self) -> int:
        return max(1, self.args.per_device_eval_batch_size // self.args.rows_per_prompt)

    # ---- Models that sample -----------------------------------------------------------------------------------------

    def _make_sampler(self, model: Any, gradient_field: GradientField | None) -> VGFSampler:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        return VGFSampler(
            base,
            self.rewards.guide(ready=True),
            self.processing_class,
            temperature=self.args.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            horizon=self.args.flow_horizon,
            movers=self.args.flow_movers,
            gradient_field=gradient_field,
            flow_batch_size=self.args.flow_batch_size,
            chat_template_kwargs=self.args.chat_template_kwargs,  # type: ignore[arg-type]  # JSON by now
        )

    def _sync_policy(self) -> None:
        """Make the policy ready to be sampled: where its weights are sharded, gather them into a whole copy, once.

        Every process has to call it; sampling itself then needs no other process.
        """
        if "policy" not in self._samplers:
            if self._whole is None:  # sharded, full weights: the first use makes the copy
                self._whole = copy.deepcopy(self._samplers["reference"].model)
            training = self.model.training
            # Without the field, which is refused where the policy's particles move: those of an evaluation are plain.
            self._samplers["policy"] = self._make_sampler(self._whole, None)
            self.model.train(training)  # the sampler puts its model into eval mode
        if self._sharded:
            copy_weights(self.model, self._whole, zero3=self._zero3, adapters_only=self.is_peft)

    @contextmanager
    def _sampler(self, source: str) -> Iterator[VGFSampler]:
        """The sampler of the frozen "reference" or of the "policy", in eval mode for as long as it is in use."""
        training = self.model.training
        self.model.eval()
        try:
            with self._whole.disable_adapter() if source == "reference" and self.is_peft else nullcontext():
                yield self._samplers[source]
        finally:
            self.model.train(training)

    @property
    def _drawn_moved(self) -> bool:
        """Whether particles move while they are drawn, so that none of them is the base model's."""
        return self._field is not None and not self.args.budget.is_zero

    def _everywhere(self, work: Callable[..., T], *given: Any) -> T:
        return everywhere(self.args, work, *given)

    # ---- Particles: from prompts to micro-batches -------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed from the last checkpoint: Trainer would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Called once per optimizer step. The place follows from the global step, so it survives a resume."""
        self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        if self._unlogged is not None:  # Trainer has set these to zero since the checkpoint was read
            loss, self._globalstep_last_logged = self._unlogged
            self._tr_loss += loss
            self._unlogged = None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """The next micro-batch. At the start of a phase, or resuming in one, its particles are drawn first."""
        order = self._order
        phase, part = divmod(self._micro_step, order.repeats)
        if phase != self._phase:
            self._buffer = self._make_micro_batches(inputs, phase)
            self._phase = phase
        self._micro_step += 1
        return self._buffer[part % order.steps]

    def _make_micro_batches(self, rows: list[dict[str, Any]], phase: int) -> list[dict[str, Any]]:
        """Particles of one phase, split into micro-batches."""
        # A seed per prompt, by its place in the stream: neither the size of a phase nor of a batch nor the number of
        # processes changes a particle, and a prompt that comes again, in this phase or in another epoch, gets new ones.
        places = self._order.places(phase, self.args.process_index)[: len(rows)]
        started = time.perf_counter()
        if self.args.particle_source == "policy":
            self._sync_policy()
        initial = None if self._vllm is None else self._draw_with_vllm(self._vllm, rows)
        batches, drawn = self._everywhere(self._draw, rows, places, self.args.particle_source, started, initial)
        if self.args.particle_source == "policy":
            ratios = gather_object([float(r) for r in drawn.log_ratio]) if self.args.world_size > 1 else drawn.log_ratio.tolist()
            kl = math.fsum(ratios) / len(ratios)
            self._metrics["train"]["kl"] += [kl] * len(rows)
            if kl > self.args.policy_kl_cap:
                batches, _ = self._everywhere(self._draw, rows, places, "pull back", time.perf_counter(), None)
            self._metrics["train"]["pulled_back"] += [float(kl > self.args.policy_kl_cap)] * len(rows)
        if self.rewards.value is not None and (self.args.flow_steps or self.args.target in ("tilt", "advantage")):
            self._fit_value(drawn.samples)
        # A phase feeds whole optimizer steps, so that the items of each are known before its first backward. Gradients are
        # averaged over processes, so that each divides by the mean over processes and not by the sum.
        per_step = self.args.gradient_accumulation_steps
        counts = torch.stack([torch.stack([b["num_items"], b["num_tokens"]]) for b in batches]).double()
        counts = self.accelerator.reduce(counts.to(self.args.device), reduction="sum")
        items = counts[:, 0].view(-1, per_step).sum(1) / self.args.world_size
        for index, batch in enumerate(batches):
            batch["num_items"] = items[index // per_step].clamp_min(1e-6).float()
            batch["num_tokens"] = int(counts[index, 1])
        return batches

    def _draw_with_vllm(self, engine: Engine, rows: list[dict[str, Any]]) -> list[list[list[int]]]:
        """Initial particles [B][N] of this process's prompts of a phase, as token ids. Every process has to call it."""
        source = self.args.particle_source
        prompt_ids = self._everywhere(self._encode_for_vllm, [row["prompt"] for row in rows])
        with self._sampler(source) as sampler:  # adapters off for the reference
            if not self.is_peft:
                engine.model = sampler.model
            # The reference is sent too, once: at its path there may be another revision than the one in memory, and behind a
            # server whatever the run before this one has sent.
            if source == "policy" or not self._vllm_has_weights:
                engine.sync_weights()
                self._vllm_has_weights = True
            return engine.draw(prompt_ids, self.args.num_generations)

    def _encode_for_vllm(self, prompts: list[Any]) -> list[list[int]]:
        prompt_ids = self._samplers["reference"].encode(prompts, self.args.max_completion_length)
        longest, limit = max(map(len, prompt_ids)), self.args.vllm_max_model_length
        if limit is not None and longest + self.args.max_completion_length > limit:
            raise ValueError(
                f"a prompt has {longest} tokens; with max_completion_length={self.args.max_completion_length} it does not fit "
                f"vllm_max_model_length ({limit}): raise that, or leave the prompt out"
            )
        return prompt_ids

    def _draw(
        self,
        rows: list[dict[str, Any]],
        places: list[int],
        source: str,
        started: float,
        initial: list[list[list[int]]] | None,
    ) -> tuple[list[dict[str, Any]], Drawn]:
        """Particles of this process's prompts of a phase, and micro-batches of targets made from them. No collective.

        `started`: when work on the particles began. `initial`: those that vLLM has drawn.
        """
        prompts = [row["prompt"] for row in rows]
        seeds = [self._seed(place) for place in places]
        n, budget = self.args.num_generations, self.args.budget
        ready = self._value_ready()
        if source == "pull back":  # plain samples of the reference; no reward is asked for
            n, budget, source, pull = self.args.rows_per_prompt, TransportBudget(steps=0), "reference", True
        else:
            pull = False
        follows = ready or bool(self.rewards.differentiable)
        if not follows:
            budget = TransportBudget(steps=0)
        metrics = self._metrics["train"]
        with self._sampler(source) as sampler:
            sampler.reward = self.rewards.guide(ready)
            score, scores = self.rewards.scorer(rows, self.state, sampler.eos_ids)
            output = sampler.sample(
                prompts, n, budget, self.args.max_completion_length, seed=seeds, initial=initial,
                scorer=_no_reward if pull else score, dense=self.args.target == "tilt",
            )  # fmt: skip
            prompt_ids = sampler.encode(prompts, self.args.max_completion_length)
            sampled = time.perf_counter()
            # Once between two logs: it costs as much as a flow step.
            followed = follows and self._field is None and (not budget.is_zero or self.args.target in ("tilt", "advantage"))
            if not pull and followed and "flow/fidelity" not in metrics:
                self._measure_fidelity(sampler, prompt_ids, output, places[0])
            size = self.args.prompts_per_micro_batch
            parts = [slice(start, start + size) for start in range(0, len(rows), size)]
            own, known = self._initial_logprobs(source, prompt_ids, output)
            batches = [self._collate(sampler, prompt_ids, output, part, scores, pull, ready, known) for part in parts]
            ratio = own - torch.tensor([known[key] for key in _keys(output.initial)]) if source == "policy" else torch.zeros(0)
        seconds = {
            "particles": sampled - started - scores.seconds,
            "score": scores.seconds,
            "targets": time.perf_counter() - sampled,
        }
        for name, spent in seconds.items():
            metrics[f"seconds/{name}"].append(spent)
        for name, logged in scores.metrics.items():
            metrics[name] += logged
        if self.args.log_completions and not pull:
            self._write_completions(rows, places, output, scores)
        return batches, Drawn(ratio, self._value_samples(prompt_ids, places, scores))

    def _seed(self, place: int) -> int:
        return self.args.seed * 2**40 + place

    def _collate(
        self,
        sampler: VGFSampler,
        prompt_ids: list[list[int]],
        output: VGFOutput,
        part: slice,
        scores: Scores,
        pull: bool,
        ready: bool,
        known: dict[tuple[int, tuple[int, ...]], float],
    ) -> dict[str, Any]:
        """Targets from some prompts of a sampler's output, R = prompts * rows_per_prompt rows.

        `known`: log-probabilities under the reference, of completions of prompts, that need not be computed again.

        Returns kind; prompt_ids, prompt_mask [R, P] padded on the left; completion_ids, completion_mask [R, T] padded on
        the right; weights, base_logprobs [R], the log-probability under the reference; num_items, what the loss is divided by
        before sums over micro-batches and processes are taken; num_tokens; metrics, one value per prompt; with dense targets
        target_ids, target_log_q, target_kl.
        """
        before, after = output.initial, output.transported
        rewards = after.rewards[part]
        # Back to the reference by its whole distribution at every token, which has no noise of its own where they agree.
        kind = "tilt" if pull else "likelihood" if self.args.target in ("sft", "weighted") else self.args.target
        prompts = range(*part.indices(len(prompt_ids)))
        k = self.args.rows_per_prompt
        if pull:
            chosen, weights = target_weights(torch.zeros_like(rewards), k, None)
        elif kind == "dpo":
            best, worst = rewards.argmax(1), before.rewards[part].argmin(1)
            chosen, weights = (
                torch.stack([best, worst], 1),
                torch.tensor([[1.0, 0.0]], device=rewards.device).expand(len(best), 2),
            )
        else:
            assert self.args.best_k is not None
            tau = self.args.target_temperature if self.args.target == "weighted" else None
            chosen, weights = target_weights(rewards, self.args.best_k, tau)
        pools = [after, before] if kind == "dpo" else [after] * k
        completions = [
            pool.completion_ids[b][n]
            for b, row in zip(prompts, chosen.tolist(), strict=True)
            for pool, n in zip(pools, row, strict=True)
        ]
        owners = [b for b in prompts for _ in range(k)]
        batch = self._pad([prompt_ids[b] for b in owners], completions)
        lengths, weights = batch["completion_mask"].sum(1), weights.to(self.args.device)
        whole = ~self._cut(completions).to(self.args.device)
        if self.args.mask_truncated_completions:
            keep = whole.view(-1, k)
            weights = weights * (keep.all(1, keepdim=True) if kind == "dpo" else keep)
        batch["kind"] = kind
        batch["weights"] = weights.flatten()
        batch["num_items"] = weights.sum() if kind == "dpo" else (batch["weights"] * lengths).sum()
        batch["num_tokens"] = (batch["prompt_mask"].sum() + batch["completion_mask"].sum()).to(weights)
        keys = [(b, tuple(completion)) for b, completion in zip(owners, completions, strict=True)]
        new = [row for row, key in enumerate(keys) if key not in known]
        if new:
            with self._sampler("reference") as reference:
                names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
                logprobs = self._whole_logprobs(reference, {name: batch[name][new] for name in names})
            known = known | {keys[row]: value for row, value in zip(new, logprobs.tolist(), strict=True)}
        batch["base_logprobs"] = torch.tensor([known[key] for key in keys], device=self.args.device)
        if kind == "advantage":
            advantages = leave_one_out(rewards) / (self.args.target_temperature * spread(rewards)[:, None])
            batch["advantages"] = advantages.gather(1, chosen).flatten().to(self.args.device)
        if kind == "tilt" and output.drawn_from is not None:
            # The targets hold in the mean over all particles; what selection adds to them is said by the particles alone.
            _, selected = target_weights(rewards, k, self.args.target_temperature)
            batch["selection"] = (k * selected - 1).flatten().to(self.args.device)
            drawn, T = output.drawn_from, batch["completion_ids"].shape[1]
            at = torch.tensor(owners) * rewards.shape[1] + chosen.flatten().cpu()
            batch |= {
                "target_ids": drawn.ids[at, :T],
                "target_log_q": drawn.log_q[at, :T],
                "target_kl": drawn.kl[at, :T],
            }
        elif kind in ("tilt", "advantage"):
            alpha = self.args.target_temperature * spread(rewards).repeat_interleave(k).to(self.args.device)
            if pull or not (ready or self.rewards.differentiable):  # nothing to follow: the target is the base distribution
                alpha = torch.full_like(alpha, torch.inf)
            make = partial(tilt.token_targets, sampler, kl_cap=self.args.tilt_kl_cap, field=self._field)
            batch |= self._token_targets(batch, make, alpha=alpha)
        picked = torch.stack([pool.rewards[part].gather(1, chosen[:, i : i + 1])[:, 0] for i, pool in enumerate(pools)], 1).to(
            self.args.device
        )
        share = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
        if not pull:
            batch["metrics"] = (
                flow_metrics(output, part, self.args.flow_step_size, self._drawn_moved)
                | {
                    "reward": (share * picked).sum(1),
                    "reward_std": rewards.std(1, correction=0),
                    "frac_reward_zero_std": (rewards.std(1, correction=0) == 0).float(),
                }
                | self._term_metrics(output, part, scores)
            )
        else:
            batch["metrics"] = {}
        fitted = lengths.view(-1, k).float()
        batch["metrics"] |= {
            "completions/mean_length": fitted.mean(1),
            "completions/min_length": fitted.min(1).values,
            "completions/max_length": fitted.max(1).values,
            "completions/clipped_ratio": 1 - whole.view(-1, k).float().mean(1),
        }
        if kind in ("tilt", "advantage") and not pull:
            batch["metrics"]["target/kl"] = (batch["target_kl"].sum(1).view(-1, k) * share).sum(1)
        if self.args.log_completions and self.is_world_process_zero():
            batch["samples"] = [
                (
                    self.processing_class.decode(prompt_ids[b]),
                    self.processing_class.decode(completion, skip_special_tokens=True),
                    reward,
                )
                for b, completion, reward in zip(owners, completions, picked.flatten().tolist(), strict=True)
            ]
        return batch

    def _pad(self, prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
        pad, device = self.processing_class.pad_token_id, self.args.device
        P, T = max(map(len, prompts)), max(map(len, completions))
        return {
            "prompt_ids": torch.tensor([[pad] * (P - len(p)) + p for p in prompts], device=device),
            "prompt_mask": torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device),
            "completion_ids": torch.tensor([c + [pad] * (T - len(c)) for c in completions], device=device),
            "completion_mask": torch.tensor([[1] * len(c) + [0] * (T - len(c)) for c in completions], device=device),
        }

    def _cut(self, completions: list[list[int]]) -> Tensor:
        """Which completions [R] were cut at `max_completion_length`."""
        ends = set(self._samplers["reference"].eos_ids.tolist())
        return torch.tensor([completion[-1] not in ends for completion in completions])

    @torch.no_grad()
    def _whole_logprobs(self, sampler: VGFSampler, batch: dict[str, Any]) -> Tensor:
        """log p(y | x) [R] under a sampler's model, without top-k and top-p, in portions of `flow_batch_size` rows."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        size, total = self.args.flow_batch_size, len(batch["prompt_ids"])
        portions = [{name: batch[name][i : i + size] for name in names} for i in range(0, total, size)]
        with self.accelerator.autocast():  # in the precision of the policy's own forward, to which it is compared
            return torch.cat([self._logprobs(self._log_pi(sampler.model, portion), portion) for portion in portions])

    def _token_targets(self, batch: dict[str, Any], make: Callable[..., TokenTargets], **settings: Tensor) -> dict[str, Tensor]:
        """Dense targets at the completions of a batch: what `make` says of them and of the settings [R] of each, in portions of
        `flow_batch_size` rows."""
        given = {
            "prompt_ids": batch["prompt_ids"], "prompt_mask": batch["prompt_mask"].bool(),
            "ids": batch["completion_ids"], "mask": batch["completion_mask"].bool(), **settings,
        }  # fmt: skip
        size = self.args.flow_batch_size
        portions = [slice(start, start + size) for start in range(0, len(given["ids"]), size)]
        pieces = [make(**{name: values[rows] for name, values in given.items()}) for rows in portions]
        return {
            "target_ids": torch.cat([piece.ids for piece in pieces]),
            "target_log_q": torch.cat([piece.log_q for piece in pieces]),
            "target_kl": torch.cat([piece.kl for piece in pieces]),
        }

    def _initial_logprobs(
        self, source: str, prompt_ids: list[list[int]], output: VGFOutput
    ) -> tuple[Tensor, dict[tuple[int, tuple[int, ...]], float]]:
        """log p [B * N] of the initial particles under the model that drew them, and what is known of the reference.

        The sampler has told its own where it says the same as a forward of the fit: not with top-k or top-p, and not in another
        precision.
        """
        initial, told = output.initial, not (self.args.top_k or self.args.top_p < 1 or self.args.bf16 or self.args.fp16)
        if source == "reference":
            pools = (initial, output.transported) if told else ()
            known = {
                key: value for pool in pools for key, value in zip(_keys(pool), pool.logprobs.flatten().tolist(), strict=True)
            }
            return initial.logprobs.flatten().cpu(), known
        owners = [ids for ids, row in zip(prompt_ids, initial.completion_ids, strict=True) for _ in row]
        batch = self._pad(owners, [c for row in initial.completion_ids for c in row])
        with self._sampler("reference") as reference:
            mu = self._whole_logprobs(reference, batch)
        if told:
            own = initial.logprobs.flatten()
        else:
            with self._sampler(source) as policy:
                own = self._whole_logprobs(policy, batch)
        return own.cpu(), dict(zip(_keys(initial), mu.tolist(), strict=True))

    @torch.no_grad()
    def _measure_fidelity(self, sampler: VGFSampler, prompt_ids: list[list[int]], output: VGFOutput, place: int) -> None:
        """Does the gradient foretell what a substitution does? Measured on one of each of the first particles."""
        rows = [(ids, c) for ids, row in zip(prompt_ids, output.initial.completion_ids, strict=True) for c in row][
            : min(FIDELITY_ROWS, self.args.flow_batch_size)
        ]
        if len(rows) < 2:
            return
        batch = self._pad([ids for ids, _ in rows], [c for _, c in rows])
        keys = row_keys(self._seed(place), [rows[0][0]], len(rows)).to(self.args.device)
        predicted, actual = tilt.substitution_fidelity(
            sampler,
            batch["prompt_ids"],
            batch["prompt_mask"].bool(),
            batch["completion_ids"],
            batch["completion_mask"].bool(),
            keys,
        )
        rank = diagnostics.fidelity(predicted, actual)
        if not math.isnan(rank):
            self._metrics["train"]["flow/fidelity"].append(rank)

    def _term_metrics(self, output: VGFOutput, part: slice, scores: Scores) -> dict[str, Tensor]:
        """Mean and spread of every reward over the transported particles, one value per prompt."""
        metrics = {}
        prompts = range(len(output.completions))[part]
        ids = output.transported.completion_ids
        for index, term in enumerate(self.rewards.terms):
            values = torch.tensor([[scores.terms[b, tuple(c)][index] for c in ids[b]] for b in prompts])
            mean = values.nanmean(1)
            metrics[f"rewards/{term.name}/mean"] = mean
            metrics[f"rewards/{term.name}/std"] = (values - mean[:, None]).square().nanmean(1).sqrt()
        return metrics

    @property
    def _completions_file(self) -> Path:
        return self._folder / f"completions-{self.args.process_index:05d}.jsonl"

    def _cut_completions(self, size: int | None) -> None:
        """Take back the lines of steps that will come again, beyond `size` bytes; None: a last line that a kill cut off."""
        file = self._completions_file
        if file.exists():
            size = file.read_bytes().rfind(b"\n") + 1 if size is None else size
            os.truncate(file, min(size, file.stat().st_size))

    def _write_completions(self, rows: list[dict[str, Any]], places: list[int], output: VGFOutput, scores: Scores) -> None:
        """One line per prompt: all particles before and after transport."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._completions_file.open("a", encoding="utf-8") as file:
            for b, (row, place) in enumerate(zip(rows, places, strict=True)):
                record: dict[str, Any] = {"step": self.state.global_step, "place": place, "prompt": row["prompt"]}
                for name, particles in (("before", output.initial), ("after", output.transported)):
                    keys = [(b, tuple(c)) for c in particles.completion_ids[b]]
                    record[name] = {
                        "completions": particles.completions[b],
                        "reward": particles.rewards[b].tolist(),
                        "rewards": {
                            term.name: [scores.terms[key][i] for key in keys] for i, term in enumerate(self.rewards.terms)
                        },
                    }
                    extra = [scores.extra.get(key) for key in keys]
                    if any(extra):
                        record[name]["extra"] = extra
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")

    # ---- Value model ------------------------------------------------------------------------------------------------

    def _value_ready(self) -> bool:
        return self.rewards.value is None or self.rewards.value.seen >= self.args.value_warmup_samples

    def _value_samples(self, prompt_ids: list[list[int]], places: list[int], scores: Scores) -> list[Any]:
        """(place, prompt, completion, reward without gradient) of all that was scored in this phase."""
        if self.rewards.value is None:
            return []
        return [
            (places[index], prompt_ids[index], list(ids), self.rewards.black_box_value(values))
            for (index, ids), values in scores.terms.items()
        ]

    def _fit_value(self, samples: list[Any]) -> None:
        """Every process adds the samples of all and makes the same updates, so that replicas stay equal."""
        value = self.rewards.value
        assert value is not None
        started = time.perf_counter()
        if self.args.world_size > 1:
            samples = gather_object(samples)
        samples = sorted(samples)  # by place: the order does not depend on the number of processes
        if not samples:
            raise RuntimeError("the value model has no samples: no reward function scored a completion in this phase")
        _, prompts, completions, rewards = zip(*samples, strict=True)
        metrics = self._metrics["train"]
        value.add(prompts, completions, rewards)
        updates = max(1, round(self.args.value_update_ratio * len(samples) / self.args.value_batch_size))
        metrics["value/loss"].append(value.fit(updates))
        metrics["value/samples"].append(float(len(value.replay)))
        metrics["seconds/value"].append(time.perf_counter() - started)

    # ---- Loss -------------------------------------------------------------------------------------------------------

    def _log_pi(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities [R, T, V] of every next token of the completions, at `temperature`, with gradient."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        T = batch["completion_ids"].shape[1]
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            # Counted over real tokens: learned positions do not know about padding on the left.
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=T + 1,  # the logits of the prompt are never needed
        ).logits[:, :-1, : len(self.processing_class)]
        return (logits.float() / self.args.temperature).log_softmax(-1)

    def _logprobs(self, log_pi: Tensor, batch: dict[str, Any]) -> Tensor:
        """log pi(y | x) [R] in nats."""
        said = log_pi.gather(-1, batch["completion_ids"][..., None])[..., 0]
        return (said * batch["completion_mask"]).sum(1)

    def _losses(self, log_pi: Tensor, logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Loss [R] of every row, or [R / 2] of every pair, before it is divided by the items of the optimizer step."""
        if batch["kind"] in ("tilt", "advantage"):
            targets = TokenTargets(batch["target_ids"], batch["target_log_q"], batch["target_kl"])
            loss = tilt_loss(log_pi, targets, batch["completion_mask"], batch["weights"])
            if batch["kind"] == "tilt" and "selection" not in batch:
                return loss
            if batch["kind"] == "tilt":
                return loss + likelihood_loss(logprobs, batch["weights"] * batch["selection"])
            return loss + residual_loss(
                log_pi, batch["completion_ids"], targets, batch["completion_mask"], batch["advantages"], batch["weights"]
            )
        if batch["kind"] == "dpo":
            return dpo_loss(logprobs - batch["base_logprobs"], batch["weights"].view(-1, 2)[:, 0], self.args.dpo_beta)
        return likelihood_loss(logprobs, batch["weights"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's share of the loss of its optimizer step (see the module), in nats per token, or per pair with DPO.

        `num_items_in_batch` is not used: Trainer counts labels in the raw batch, which holds prompts only.
        """
        if return_outputs:
            raise ValueError("VGFTrainer does not return outputs: its inputs are particles and not those of the caller")
        log_pi = self._log_pi(model, inputs)
        logprobs = self._logprobs(log_pi, inputs)
        losses = self._losses(log_pi, logprobs, inputs)
        loss = losses.sum() / inputs["num_items"]
        if not loss.isfinite():
            self._not_finite = self._where(losses, inputs)
            logger.warning(self._not_finite)
        metrics = self._metrics["train"]
        for name, values in (inputs["metrics"] | self._fit_metrics(logprobs, inputs)).items():
            metrics[name].extend(values.tolist())
        self.state.num_input_tokens_seen += inputs["num_tokens"]
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        self._printed.extend(inputs.get("samples", ()))
        return loss

    def _where(self, losses: Tensor, batch: dict[str, Any]) -> str:
        """Which completion has a loss that is not finite."""
        place = f"step {self.state.global_step}, process {self.args.process_index}: the loss"
        bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
        if not bad:
            return f"{place} overflows in the sum over completions"
        row = bad[0] * (len(batch["completion_ids"]) // len(losses))
        texts = [
            self.processing_class.decode(batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()])
            for part in ("prompt", "completion")
        ]
        return f"{place} of a completion is {losses[bad[0]].item()}: prompt {texts[0]!r}, completion {texts[1]!r}"

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in Trainer. A gradient that is not finite is dropped, on all processes: one step along it, and every weight is lost.

        Raises:
            FloatingPointError: more than `max_skipped_steps` in a row, or DeepSpeed, which has stepped already.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is not None:  # of fp16, which expects overflows and skips them itself
            return norm
        bad = torch.tensor(float(norm is not None and not math.isfinite(norm)), device=self.args.device)
        bad = self.accelerator.reduce(bad, reduction="sum")
        self._metrics["train"]["frac_skipped_steps"].append(float(bad > 0))
        where, self._not_finite = self._not_finite or "the loss on this process is finite", ""
        if not bad:
            self._skipped = 0
            return norm
        self._skipped += 1
        if self.is_deepspeed_enabled or self._skipped > self.args.max_skipped_steps:
            raise FloatingPointError(
                f"{self._skipped} optimizer step(s) in a row, up to step {self.state.global_step}, had a gradient that is not "
                f"finite (norm {float(norm)}); {where}. Look at that completion, lower learning_rate, or load the model in "
                "float32; checkpoints up to here are not touched by it"
            )
        logger.warning("step %d skipped: its gradient has norm %s; %s", self.state.global_step, float(norm), where)
        for parameter in model.parameters():
            parameter.grad = None  # AdamW passes these by: no decay, no moments
        return norm

    def _fit_metrics(self, logprobs: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        k = self.args.rows_per_prompt
        ratio, weights = (logprobs.detach() - batch["base_logprobs"]).view(-1, k), batch["weights"].view(-1, k)
        metrics = {"fit/log_ratio": (ratio * weights).sum(1) / weights.sum(1).clamp_min(1e-9)}
        if batch["kind"] == "dpo":
            metrics["fit/accuracy"] = (ratio[:, 0] > ratio[:, 1]).float()
        return metrics

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._step_time += time.perf_counter() - start
        if self._micro_step % self.args.gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._step_time)
            self._step_time = 0.0
        return loss

    # ---- Evaluation and logs ----------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss on transported particles; reward, length and KL of one plain sample of the policy per prompt."""
        metrics = self._everywhere(self._evaluate_prompts, inputs)
        # A process whose share does not fill the last batches gets the first prompts once more: they count once.
        first = (self._eval_batch * self.args.world_size + self.args.process_index) * self._eval_batch_size
        fresh = max(0, min(len(inputs), self._eval_size - first))
        self._eval_batch += 1
        for name, values in metrics.items():
            self._metrics["eval"][name].extend(values[:fresh].tolist())
        return metrics["loss"].mean(), None, None

    @torch.no_grad()
    def _evaluate_prompts(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One value per prompt of every metric. Runs on whole models, without collectives."""
        prompts = [row["prompt"] for row in rows]
        seed = self._seed(-1)  # the same noise in every evaluation, and none that training uses
        length = self.args.max_completion_length
        ready = self._value_ready()
        budget = self.args.budget if ready or self.rewards.differentiable else TransportBudget(steps=0)
        assert self.args.num_generations_eval is not None
        with self._sampler("reference") as sampler:
            sampler.reward = self.rewards.guide(ready)
            score, scores = self.rewards.scorer(rows, self.state, sampler.eos_ids)
            particles = sampler.sample(
                prompts, self.args.num_generations_eval, budget, length, seed=seed, scorer=score, dense=self.args.target == "tilt"
            )
            prompt_ids = sampler.encode(prompts, length)
            fitted = self._collate(sampler, prompt_ids, particles, slice(0, len(prompts)), scores, False, ready, {})
        with self._sampler("policy") as sampler:
            own = sampler.sample(prompts, 1, TransportBudget(steps=0), length, seed=seed, scorer=score)
        completions = [row[0] for row in own.initial.completion_ids]
        batch = self._pad(prompt_ids, completions)
        with self._sampler("reference") as sampler:
            kl = -self._whole_logprobs(sampler, batch)
        with self._sampler("policy") as sampler, self.compute_loss_context_manager():
            kl += self._whole_logprobs(sampler, batch)
            log_pi = self._log_pi(sampler.model, fitted)
            logprobs = self._logprobs(log_pi, fitted)
            k = self.args.rows_per_prompt
            losses = self._losses(log_pi, logprobs, fitted).view(len(rows), -1).sum(1)
            items = fitted["weights"].view(-1, k)
            if fitted["kind"] != "dpo":
                items = items * fitted["completion_mask"].sum(1).view(-1, k)
        lengths = batch["completion_mask"].sum(1).float()
        return (
            fitted["metrics"]
            | self._fit_metrics(logprobs, fitted)
            | {
                "loss": losses / items.sum(1).clamp_min(1e-6),
                "reward": own.rewards,
                "kl": kl,
                "completions/mean_length": lengths,
                "completions/min_length": lengths,
                "completions/max_length": lengths,
                "completions/clipped_ratio": self._cut(completions).float(),
            }
        )

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the mean over prompts of each metric, under the prefix of the evaluation."""
        self._metrics["eval"].clear()
        self._eval_batch, self._eval_size = 0, len(dataloader.dataset)  # type: ignore[arg-type]
        self._sync_policy()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._means("eval").items()})
        return output

    def _means(self, mode: str) -> dict[str, float]:
        """Means over the prompts of all processes since the last call; of lengths named so the lowest and the highest."""
        gathered = [dict(self._metrics[mode])]
        if self.args.world_size > 1:
            gathered = gather_object(gathered)
        self._metrics[mode].clear()
        means = {}
        for name in sorted({name for metrics in gathered for name in metrics}):
            values = [v for metrics in gathered for v in metrics.get(name, ()) if not math.isnan(v)]
            if values:
                pick = min if name.endswith("/min_length") else max if name.endswith("/max_length") else None
                means[name] = pick(values) if pick else math.fsum(values) / len(values)
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over prompts since the last log of training."""
        if self.model.training:
            logs.update(self._means("train"))
            if self._printed:
                table = Table("prompt", "completion", "reward", title=f"step {self.state.global_step}", show_lines=True)
                for prompt, completion, reward in self._printed:
                    table.add_row(prompt, completion, f"{reward:.3f}")
                Console(markup=False).print(table)  # a completion may hold square brackets
                self._printed.clear()
        super().log(logs, start_time)

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]  # the others by name
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """As in `transformers.Trainer`; "auto" resumes from the last whole checkpoint in `output_dir`, if there is one.

        Raises:
            ValueError: there is no such checkpoint, it was not written to its end, or it was made with other settings, which the
                message names.
        """
        if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint.lower() in ("true", "false"):
            resume_from_checkpoint = resume_from_checkpoint.lower() == "true"  # as a command line says it
        if resume_from_checkpoint in ("auto", True):
            found = self._last_checkpoint()
            if found is None and resume_from_checkpoint is True:
                raise ValueError(f"No valid checkpoint found in output directory ({self._folder}): 'auto' would start anew")
            resume_from_checkpoint = found
        elif isinstance(resume_from_checkpoint, str):
            self._everywhere(check_whole, resume_from_checkpoint)
        if not resume_from_checkpoint:
            self._cut_completions(None)
        return super().train(resume_from_checkpoint, **kwargs)

    def _last_checkpoint(self) -> str | None:
        """The newest checkpoint in `output_dir` that is whole as every process sees it."""
        seen: list[list[str]] = [whole_checkpoints(self._folder)]
        if self.args.world_size > 1:
            seen = gather_object(seen)
        return next((path for path in seen[0] if all(path in paths for paths in seen)), None)

    def _settings(self) -> dict[str, Any]:
        # A field by what it is, and not by its folder, which may move, or hold another one by now.
        known = {"flow_field": self._field_digest, "rewards": [term.name for term in self.rewards.terms]}
        return {name: getattr(self.args, name) for name in RESUMED} | known

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Beside what Trainer saves: settings, the particles of an unfinished phase, what the next log will sum up, the value
        model; and, when all processes are done, the manifest that makes it a whole checkpoint."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        # Old checkpoints may go when this one is whole, and not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self._everywhere(self._save_own, folder)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(folder)
        except Exception as error:  # torch, safetensors and DeepSpeed each have errors of their own for a disk that is full
            raise OSError(
                f"checkpoint {folder} could not be written ({type(error).__name__}: {error}). Make room, or set "
                f"save_total_limit; then go on from the last whole one, {last_whole_checkpoint(self._folder)}, with "
                "resume_from_checkpoint='auto'"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit is not None and limit > 0:
            delete_old_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save_own(self, folder: Path) -> None:
        """This process's part of a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST_FILE).unlink(missing_ok=True)  # of a checkpoint that is written over
        done = (self.state.global_step * self.args.gradient_accumulation_steps) % self._order.repeats == 0
        state = {
            "phase": self._phase,
            "buffer": [] if done else self._buffer,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "completions": self._completions_file.stat().st_size if self._completions_file.exists() else 0,
        }
        torch.save(state, folder / f"vgf_state_{self.args.process_index}.pt")
        if self.args.should_save:
            if self.rewards.value is not None:
                torch.save(self.rewards.value.state(), folder / "vgf_value.pt")
            (folder / SETTINGS_FILE).write_text(json.dumps(self._settings()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        saved, ours = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")), self._settings()
        differ = [
            f"{name} ({saved.get(name)!r} there, {value!r} here)" for name, value in ours.items() if saved.get(name) != value
        ]
        if differ:
            raise ValueError(
                f"{checkpoint} cannot be resumed from, since it was made with other settings: {', '.join(differ)}. Use those of "
                "the checkpoint, or start a new run from its weights"
            )
        state = torch.load(folder / f"vgf_state_{self.args.process_index}.pt", map_location="cpu", weights_only=True)
        device = self.args.device
        self._buffer = [
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            for batch in state["buffer"]
        ]
        self._phase = state["phase"] if self._buffer else None
        self._metrics["train"] = defaultdict(list, state["metrics"])
        self._unlogged = state["loss"], state["last_logged"]
        if folder.resolve().parent == self._folder.resolve():
            self._cut_completions(state["completions"])
        if self.rewards.value is not None:
            self.rewards.value.load_state(torch.load(folder / "vgf_value.pt", map_location="cpu", weights_only=True))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_card(Path(output_dir) if output_dir else self._folder, self.args.hub_model_id)

    def create_model_card(  # type: ignore[override]  # ours has no use for them
        self, model_name: str | None = None, **kwargs: Any
    ) -> None:
        """A model card with the budget, the rewards and what was measured, in `output_dir`; called by `push_to_hub`."""
        if self.is_world_process_zero():
            self._write_card(self._folder, model_name)

    def _write_card(self, folder: Path, name: str | None) -> None:
        base = self._samplers["reference"].model.config._name_or_path
        history, field = self.state.log_history, self.args.flow_field

        def line(metric: str, what: str) -> list[str]:
            values = [entry[metric] for entry in history if metric in entry]
            return [f"| {what} | {values[0]:.3f} | {values[-1]:.3f} |"] if values else []

        measured = [
            *line("eval_reward", "reward of the policy on the evaluation prompts"),
            *line("eval_kl", "KL(policy \\|\\| reference), nats per completion"),
            *line("flow/reward_initial", "reward of particles before transport"),
            *line("flow/reward_final", "reward of particles after transport"),
            *line("reward", "reward of the fitted completions"),
        ]
        text = [
            f"# {name or self._folder.name}", "",
            f"Trained from {base or 'a model without a path'} with Value Gradient Flow "
            "([arXiv 2604.14265](https://arxiv.org/abs/2604.14265)), vgf_llm " + __version__ + ".", "",
            f"- rewards: {', '.join(f'{term.weight:g} x {term.name}' for term in self.rewards.terms)}",
            f"- target: {self.args.target}, particles of the {self.args.particle_source}, {self.args.num_generations} per prompt",
            f"- transport budget: {self.args.budget}",
            *([f"- particles drawn along the learned gradient {Path(field).resolve().name}"] if field is not None else []),
            f"- optimizer steps: {self.state.global_step}", "",
        ]  # fmt: skip
        if measured:
            text += ["| measured | first | last |", "|---|---|---|", *measured, ""]
        data = ModelCardData(
            base_model=base if base and not Path(base).exists() else None,
            library_name="peft" if self.is_peft else "transformers",
            tags=["vgf_llm", "value-gradient-flow", "reinforcement-learning"],
        )
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text))
        card.save(folder / "README.md")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a phase's sampling tells beside its micro-batches.

    Attributes:
        log_ratio: [B * N] `log pi - log mu` of the initial particles, empty unless they came from the policy.
        samples: what the value model is fitted to.
    """

    log_ratio: Tensor
    samples: list[Any]


def everywhere(args: VGFConfig, work: Callable[..., T], *given: Any) -> T:
    """The result of work that needs no other process. An error of one process is raised by all of them."""
    result, error = None, None
    try:
        result = work(*given)
    except Exception as raised:  # noqa: BLE001  # raised below, by every process
        error = raised
    messages = [None if error is None else f"process {args.process_index}: {type(error).__name__}: {error}"]
    if args.world_size > 1:
        messages = gather_object(messages)
    failed = [message for message in messages if message is not None]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("; ".join(failed))
    return result  # type: ignore[return-value]


def flow_metrics(output: VGFOutput, part: slice, step_size: float, drawn_moved: bool) -> dict[str, Tensor]:
    """One value per prompt [B] of what the flow did to the particles of some prompts (docs/trainer.md).

    `drawn_moved`: the initial particles are moved ones. There is no text then that a particle was before, and nothing to compare.
    """
    before, after = output.initial, output.transported
    first, last = before.rewards[part], after.rewards[part]
    metrics = {
        "flow/reward_final": last.mean(1),
        "flow/kl": after.kl[part].mean(1),
        "flow/generations": output.generations[part],
    }
    if not drawn_moved:
        changed = [
            sum(sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b)) for a, b in zip(old, new, strict=True))
            / sum(max(len(a), len(b)) for a, b in zip(old, new, strict=True))
            for old, new in zip(before.completion_ids[part], after.completion_ids[part], strict=True)
        ]
        metrics |= {
            "flow/reward_initial": first.mean(1),
            "flow/reward_gain": (last - first).mean(1),
            "flow/accept_rate": (last > first).float().mean(1),
            "flow/token_change_rate": torch.tensor(changed),
        }
    if output.trace:  # [rounds, L, B, N]
        norms = torch.stack([trace.score_norm[:, part] for trace in output.trace])
        moved = torch.stack([trace.displacement[-1, part] for trace in output.trace])
        metrics["flow/reward_grad_norm"] = norms.mean((0, 1, 3))
        metrics["flow/displacement_norm"] = moved.mean((0, 2))
        metrics["flow/gain_predicted"] = step_size * norms.sum((0, 1)).mean(1)
    return metrics


def _keys(particles: Particles) -> list[tuple[int, tuple[int, ...]]]:
    """Prompt and completion of every particle [B * N]."""
    return [(b, tuple(c)) for b, row in enumerate(particles.completion_ids) for c in row]


def _no_reward(index: Tensor, *rows: Tensor) -> Tensor:
    return torch.zeros(len(index), device=index.device)


def _identity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def _check_dataset(dataset: Any, name: str) -> None:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"{name} must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}")
    # A stream may not know its columns before it is read.
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "prompt" not in columns:
        raise ValueError(
            f"{name} has no column 'prompt' (strings or lists of chat messages), only {columns}: rename "
            "one with dataset.rename_column"
        )
    if isinstance(dataset, Dataset):  # a stream is seen when it comes
        for number, prompt in enumerate(dataset["prompt"]):
            if why := _prompt_is_none(prompt):
                raise ValueError(f"{name}, row {number}: {why}; leave the row out with dataset.filter, or mend it")


def _prompt_is_none(prompt: Any) -> str:
    """What is wrong with a prompt, or nothing."""
    if isinstance(prompt, str):
        return "" if prompt.strip() else "the prompt is empty"
    if not isinstance(prompt, list):
        return f"the prompt is {prompt!r}, and neither a string nor a list of chat messages"
    if not prompt:
        return "the prompt is a list without messages"
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"{message!r} is no chat message, an object with strings 'role' and 'content'"
    return ""


def _load_policy(
    model: str | PreTrainedModel | PeftModel, args: VGFConfig, quantization_config: Any | None
) -> PreTrainedModel | PeftModel:
    if isinstance(model, str):
        init_kwargs = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
        if quantization_config is not None:
            init_kwargs["quantization_config"] = quantization_config
        return load_whole(AutoModelForCausalLM, model, **init_kwargs)
    if args.model_init_kwargs is not None or quantization_config is not None:
        raise ValueError(
            "model_init_kwargs and quantization_config are for loading a model from a path, but the model is loaded "
            "already: leave them out, or give its path"
        )
    return model


def _load_field(
    rewards: Rewards, processing_class: PreTrainedTokenizerBase, args: VGFConfig
) -> tuple[GradientField | None, str | None]:
    """The field of `flow_field`, on the CPU, and the digest that tells it from others; every process has the same or an error."""
    folder = args.flow_field
    if folder is None:
        return None, None
    if rewards.black_box:
        names = ", ".join(term.name for term in rewards.black_box)
        raise ValueError(
            f"flow_field replaces the gradient of the rewards, but {names} has none, and the value model that learns it changes "
            "while the policy trains: leave out flow_field, or give rewards with a gradient alone"
        )
    field, digest = everywhere(args, _read_field, folder)
    if args.world_size > 1 and len(set(gather_object([digest]))) > 1:
        raise ValueError(
            f"flow_field {folder} is not the same on every process, and particles would depend on the process that draws them: "
            "put it where all of them read it"
        )
    if field.depth and args.particle_source == "policy":
        raise ValueError(
            f"flow_field {folder} reads the states of the reference, but particle_source='policy' draws from another model: fit "
            "one with layers of its own alone (fit_field(layers=0)), or use particle_source='reference'"
        )
    table: Any = field.backbone.get_input_embeddings()
    width, rows = rewards.guide(ready=True).width, table.weight.shape[0]
    if field.width != width:
        raise ValueError(
            f"flow_field {folder} gives gradients of {field.width} numbers, but the particles of this reward have {width}: "
            "fit it to this reward (vgf_llm.text.field.fit_field)"
        )
    if rows < len(processing_class):
        raise ValueError(
            f"flow_field {folder} reads {rows} tokens, but the policy has {len(processing_class)}: fit it to this policy "
            "(vgf_llm.text.field.fit_field)"
        )
    return field, digest


def _read_field(folder: str) -> tuple[GradientField, str]:
    field = GradientField.from_pretrained(folder)
    return field, f"sha256 {hashlib.sha256((Path(folder) / HEADS).read_bytes()).hexdigest()[:16]}"


def _add_adapters(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "model is a PeftModel already, so peft_config cannot wrap it again: leave peft_config out to train "
                "its adapters, or pass model.merge_and_unload()"
            )
        # ZeRO-3 needs one dtype in a module, and adapters would be float32 beside a bfloat16 model (TRL, issue 6089).
        model = get_peft_model(model, peft_config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            if config.is_prompt_learning or getattr(config, "bias", "none") not in (None, "none"):
                raise ValueError(
                    f"the reference is the model with its adapters disabled, which {type(config).__name__} with "
                    f"bias={getattr(config, 'bias', None)!r} does not bring back: use e.g. LoraConfig(bias='none')"
                )
        base: Any = model.get_base_model()
        head = base.get_output_embeddings()
        if any("lora_" in name for name, _ in head.named_parameters()):
            raise ValueError(
                "the adapters reach lm_head, which TRL's trainers refuse too: where it is tied to the input embeddings, merging "
                "them changes those; leave it out of target_modules, as target_modules='all-linear' does"
            )
    return model


def _load_value_model(
    policy: PreTrainedModel | PeftModel, processing_class: PreTrainedTokenizerBase, args: VGFConfig
) -> ValueModel:
    backbone: Any = policy
    if args.value_model is not None:
        trust = args.trust_remote_code
        if AutoTokenizer.from_pretrained(args.value_model, trust_remote_code=trust).get_vocab() != processing_class.get_vocab():
            raise ValueError(
                f"value_model {args.value_model} has another vocabulary than the policy, in which its gradient is taken"
            )
        backbone = load_whole(AutoModelForCausalLM, args.value_model, dtype="float32", trust_remote_code=trust)
    elif getattr(policy, "is_quantized", False):
        raise ValueError("a quantized policy cannot be the backbone of the value model: set value_model to a path of one")
    elif isinstance(policy, PeftModel):
        adapted: Any = copy.deepcopy(policy)
        backbone = adapted.unload()
    return ValueModel(
        backbone,
        processing_class,
        heads=args.value_heads,
        kappa=args.reward_kappa,
        lora_rank=args.value_lora_rank,
        learning_rate=args.value_learning_rate,
        replay_size=args.value_replay_size,
        batch_size=args.value_batch_size,
        seed=args.seed,
    ).to(args.device)


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # read by functional attention, no module
            module.attention_dropout = 0.0  # type: ignore[assignment]
