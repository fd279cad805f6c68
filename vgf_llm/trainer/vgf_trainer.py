"""VGFTrainer: fit a policy to completions that the flow carried away from the reference.

Every generation phase: draw N particles per prompt from the frozen reference, transport and verify them
(`VGFSampler`), keep the best k, and maximise their likelihood under the policy,

    loss = - sum_i w_i log pi(y_i | x_i) / sum_i w_i |y_i|,    w = softmax of reward over the k particles of a prompt,

both sums over all completions of one optimizer step. The particles never depend on the policy, so there is no KL
term: how far the policy can go is set by the transport budget alone.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
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
from transformers.trainer_utils import EvalLoopOutput

from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFOutput, VGFSampler

from .vgf_config import VGFConfig


RewardFunc = str | PreTrainedModel | DifferentiableReward


class VGFTrainer(Trainer):
    """Trainer of Value Gradient Flow: likelihood of the best transported particles of a frozen reference.

    The reference is the policy as it is handed over: a frozen copy of it, or with PEFT the same weights with the
    adapters disabled (an adapter that was trained before has to be merged first to be part of it). It stays the same
    when training resumes, as long as the trainer is built from the same model.

    Args:
        model: causal language model to train: a path or hub id (loaded with `args.model_init_kwargs`, in float32
            unless they say otherwise), a model, or a PEFT model.
        reward_funcs: what the flow climbs: path or hub id of a sequence-classification model with `num_labels=1`
            (loaded with `args.reward_model_init_kwargs`), such a model, or a `DifferentiableReward`. A list of the
            first two is an ensemble, `mean - args.reward_kappa * std`.
        args: `VGFConfig`. Default: its defaults, in the folder "<model name>-VGF".
        train_dataset: `datasets.Dataset` with a column "prompt": strings in final form, or lists of chat messages, to
            which the chat template is applied. Other columns are kept.
        eval_dataset: the same, or a dict of such.
        processing_class: tokenizer of the policy. Default: loaded from the path of the model. A missing padding token
            becomes its end-of-sequence token.
        reward_processing_classes: tokenizer(s) of `reward_funcs`, to check that their vocabulary is the policy's.
            Rewards given as paths are always checked.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: for loading the policy from a path; train it with `peft_config`.
        peft_config: adapters to wrap the model with.

    Raises:
        TypeError: a reward without a gradient (a plain function), or a dataset that is not a `datasets.Dataset`.
        ValueError: arguments that contradict each other, a dataset without prompts or smaller than one generation
            phase, another vocabulary in a reward model, several GPUs in one process, or several processes.
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
        train_dataset: Dataset | None = None,
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
        if args.world_size > 1:
            raise ValueError(
                f"VGFTrainer runs in one process so far, and {args.world_size} were launched: start it with `python`"
            )
        if train_dataset is None:
            raise ValueError("train_dataset is required: a datasets.Dataset with a column 'prompt'")
        _check_dataset(train_dataset, "train_dataset")
        for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
            if dataset is not None:
                _check_dataset(dataset, f"eval_dataset {name}".strip())
        if len(train_dataset) < args.prompts_per_phase:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} prompts, but one generation phase takes "
                f"{args.prompts_per_phase} (per_device_train_batch_size {args.per_device_train_batch_size} / "
                f"best_k {args.best_k} * steps_per_generation {args.steps_per_generation}): lower the batch size or "
                "the steps, or add prompts"
            )

        set_seed(args.seed)  # adapters are initialised at random
        if processing_class is None:
            if not path:
                raise ValueError("processing_class is required, the tokenizer of the model, where it has no path")
            processing_class = AutoTokenizer.from_pretrained(path)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        model = _load_policy(model, args, quantization_config, peft_config)
        if args.disable_dropout:
            _disable_dropout(model)
        reward = _load_reward(reward_funcs, reward_processing_classes, processing_class, args)

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
                "VGFTrainer does not support: make one visible, e.g. CUDA_VISIBLE_DEVICES=0"
            )

        sampler_kwargs: dict[str, Any] = {
            "reward_model": reward, "processing_class": processing_class, "temperature": args.temperature,
            "top_k": args.top_k, "top_p": args.top_p, "horizon": args.flow_horizon,
            "flow_batch_size": args.flow_batch_size,
        }  # fmt: skip
        self.is_peft = isinstance(model, PeftModel)
        # After super().__init__, which moves the model to its device.
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._policy_sampler = self._reference_sampler = VGFSampler(base, **sampler_kwargs)
        if not self.is_peft:  # copied from memory, since a model need not have a path
            self._reference_sampler = VGFSampler(copy.deepcopy(base).requires_grad_(False), **sampler_kwargs)

        self._micro_step = 0  # place in the stream of micro-batches, set before every optimizer step
        self._phase: int | None = None
        self._buffer: list[dict[str, Any]] = []  # the micro-batches of this phase
        self._metrics: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        self._step_time = 0.0
        self._printed: deque[tuple[str, str, float]] = deque(maxlen=args.num_completions_to_print)

    # ---- Data: which prompts, in which order ------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        # With remove_unused_columns Trainer would keep what the forward of the model takes.
        self._signature_columns = ["prompt"]  # type: ignore[assignment]

    def get_train_dataloader(self) -> DataLoader:
        """Every item holds the prompts of a generation phase, and is repeated once per micro-batch made from it."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.prompts_per_phase,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PhaseSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            prompts_per_phase=self.args.prompts_per_phase,
            repeats=self.args.prompts_per_phase // self.args.prompts_per_micro_batch,
            seed=seed if self.args.shuffle_dataset else None,
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """`per_device_eval_batch_size / best_k` prompts per batch, in the order of the dataset."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if chosen is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self._get_dataloader(
            dataset=chosen,
            description="Evaluation",
            batch_size=max(1, self.args.per_device_eval_batch_size // self.args.best_k),
            sampler_fn=self._get_eval_sampler,  # type: ignore[arg-type]
        )

    # ---- Particles: from prompts to micro-batches -------------------------------------------------------------------

    @contextmanager
    def _sampler(self, *, reference: bool) -> Iterator[VGFSampler]:
        """The sampler of the frozen reference or of the policy, in eval mode for as long as it is in use."""
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter() if reference and self.is_peft else nullcontext():
                yield self._reference_sampler if reference else self._policy_sampler
        finally:
            self.model.train(training)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Called once per optimizer step. The place follows from the global step, so it survives a resume."""
        self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """The next micro-batch. At the start of a phase, or resuming in one, its particles are drawn first."""
        phase, part = divmod(self._micro_step, len(inputs) // self.args.prompts_per_micro_batch)
        if part == 0 or phase != self._phase:
            self._buffer = self._make_micro_batches(inputs, phase * len(inputs))
            self._phase = phase
        self._micro_step += 1
        return self._buffer[part]

    def _make_micro_batches(self, rows: list[dict[str, Any]], place: int) -> list[dict[str, Any]]:
        """Particles of one phase, split into micro-batches. `place`: of the first prompt in the stream."""
        # A seed per prompt, by its place in the stream: neither the size of a phase nor of a batch changes a
        # particle, and a prompt that comes again, in this phase or in another epoch, gets new ones.
        prompts = [row["prompt"] for row in rows]
        seeds = [self._seed(place + index) for index in range(len(rows))]
        with self._sampler(reference=True) as sampler:
            output = sampler.sample(
                prompts, self.args.num_generations, self.args.budget, self.args.max_completion_length, seed=seeds
            )
            prompt_ids = sampler.encode(prompts, self.args.max_completion_length)
        size = self.args.prompts_per_micro_batch
        batches = [self._collate(prompt_ids, output, slice(start, start + size)) for start in range(0, len(rows), size)]
        # A phase feeds whole optimizer steps, so that the tokens of each are known before its first backward.
        per_step = self.args.gradient_accumulation_steps
        for start in range(0, len(batches), per_step):
            step = batches[start : start + per_step]
            tokens = torch.stack([batch["num_items"] for batch in step]).sum()
            for batch in step:
                batch["num_items"] = tokens
        return batches

    def _seed(self, place: int) -> int:
        return self.args.seed * 2**40 + place

    def _collate(self, prompt_ids: list[list[int]], output: VGFOutput, part: slice) -> dict[str, Any]:
        """The fitted completions of some prompts of a sampler's output, R = prompts * best_k rows.

        Returns prompt_ids, prompt_mask [R, P] padded on the left; completion_ids, completion_mask [R, T] padded on
        the right; weights, base_logprobs [R]; num_items, the weighted number of tokens; metrics, one value per prompt.
        """
        transported = output.transported
        rewards = transported.rewards[part]
        chosen, weights = target_weights(rewards, self.args.best_k, self.args.target_temperature)
        rows = [(b, n) for b, row in zip(range(*part.indices(len(prompt_ids))), chosen.tolist(), strict=True) for n in row]
        completions = [transported.completion_ids[b][n] for b, n in rows]
        batch = self._pad([prompt_ids[b] for b, _ in rows], completions)
        lengths = batch["completion_mask"].sum(1)
        batch["weights"] = weights.flatten()
        batch["base_logprobs"] = transported.logprobs[part].gather(1, chosen).flatten()
        batch["num_items"] = (batch["weights"] * lengths).sum()
        batch["metrics"] = flow_metrics(output, part) | {
            "reward": (weights * rewards.gather(1, chosen)).sum(1),
            "reward_std": rewards.std(1, correction=0),
            "completions/mean_length": lengths.view(chosen.shape).float().mean(1),
            "completions/clipped_ratio": self._clipped(completions, chosen.shape),
        }
        if self.args.log_completions:
            batch["samples"] = [
                (self.processing_class.decode(prompt_ids[b]), transported.completions[b][n], rewards_row)
                for (b, n), rewards_row in zip(rows, rewards.gather(1, chosen).flatten().tolist(), strict=True)
            ]
        return batch

    def _pad(self, prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
        pad, device = self.processing_class.pad_token_id, self.model.device
        P, T = max(map(len, prompts)), max(map(len, completions))
        return {
            "prompt_ids": torch.tensor([[pad] * (P - len(p)) + p for p in prompts], device=device),
            "prompt_mask": torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device),
            "completion_ids": torch.tensor([c + [pad] * (T - len(c)) for c in completions], device=device),
            "completion_mask": torch.tensor([[1] * len(c) + [0] * (T - len(c)) for c in completions], device=device),
        }

    def _clipped(self, completions: list[list[int]], shape: torch.Size) -> Tensor:
        """Share [B] of completions that were cut at `max_completion_length`."""
        ends = set(self._policy_sampler.eos_ids.tolist())
        cut = [float(completion[-1] not in ends) for completion in completions]
        return torch.tensor(cut).view(shape).mean(1)

    # ---- Loss -------------------------------------------------------------------------------------------------------

    def _logprobs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """log pi(y | x) [R] in nats at `temperature`, with gradient."""
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
        ).logits[:, :-1]
        logits = logits.float() / self.args.temperature
        said = logits.gather(-1, batch["completion_ids"][..., None])[..., 0]
        return ((said - logits.logsumexp(-1)) * batch["completion_mask"]).sum(1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's share of the loss of its optimizer step (see the module), in nats per token.

        `num_items_in_batch` is not used: Trainer counts labels in the raw batch, which holds prompts only.
        """
        if return_outputs:
            raise ValueError("VGFTrainer does not return outputs: its inputs are particles and not those of the caller")
        logprobs = self._logprobs(model, inputs)
        loss = -(inputs["weights"] * logprobs).sum() / inputs["num_items"]
        ratio = (inputs["weights"] * (logprobs.detach() - inputs["base_logprobs"])).view(-1, self.args.best_k).sum(1)
        mode = "train" if self.model.training else "eval"
        for name, values in (inputs["metrics"] | {"fit/log_ratio": ratio}).items():
            self._metrics[mode][name].extend(values.tolist())
        if mode == "train":
            self.state.num_input_tokens_seen += int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
            self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
            self._printed.extend(inputs.get("samples", ()))
        return loss

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
        prompts = [row["prompt"] for row in inputs]
        seed = self._seed(-1)  # the same noise in every evaluation, and none that training uses
        length = self.args.max_completion_length
        with self._sampler(reference=True) as sampler:
            particles = sampler.sample(prompts, self.args.num_generations, self.args.budget, length, seed=seed)
            prompt_ids = sampler.encode(prompts, length)
        with self._sampler(reference=False) as sampler:
            own = sampler.sample(prompts, 1, TransportBudget(steps=0), length, seed=seed)
        batch = self._pad(prompt_ids, own.completion_ids)
        fitted = self._collate(prompt_ids, particles, slice(0, len(prompts)))
        with torch.no_grad(), self.compute_loss_context_manager():
            with self._sampler(reference=True) as sampler:
                kl = -self._logprobs(sampler.model, batch)
            with self._sampler(reference=False) as sampler:
                kl += self._logprobs(sampler.model, batch)
            fitted["metrics"] |= {
                "reward": own.rewards,
                "kl": kl,
                "completions/mean_length": batch["completion_mask"].sum(1).float(),
                "completions/clipped_ratio": self._clipped(own.completion_ids, own.initial.rewards.shape),
            }
            loss = self.compute_loss(model, fitted)
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Adds the mean over prompts of each metric, under the prefix of the evaluation."""
        self._metrics["eval"].clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": _mean(v) for name, v in self._metrics["eval"].items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over prompts since the last log of training."""
        if self.model.training:
            logs.update({name: _mean(values) for name, values in self._metrics["train"].items()})
            self._metrics["train"].clear()
            if self._printed:
                table = Table("prompt", "completion", "reward", title=f"step {self.state.global_step}", show_lines=True)
                for prompt, completion, reward in self._printed:
                    table.add_row(prompt, completion, f"{reward:.3f}")
                Console(markup=False).print(table)  # a completion may hold square brackets
                self._printed.clear()
        super().log(logs, start_time)


class PhaseSampler(Sampler[int]):
    """Indices of prompts, phase by phase: the `prompts_per_phase` indices of a phase come `repeats` times in a row.

    Every epoch has its own order, which depends on the seed and the epoch alone, so that a run can resume in any of
    them. The last prompts of an epoch that do not fill a phase are left out.

    Args:
        size: number of prompts in the dataset.
        prompts_per_phase: prompts of one generation phase.
        repeats: micro-batches made from it.
        seed: of the order; None keeps the order of the dataset.
    """

    def __init__(self, size: int, *, prompts_per_phase: int, repeats: int, seed: int | None) -> None:
        self.size, self.prompts_per_phase, self.repeats, self.seed = size, prompts_per_phase, repeats, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 2**20 + self.epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        for start in range(0, self.size - self.prompts_per_phase + 1, self.prompts_per_phase):
            for _ in range(self.repeats):
                yield from order[start : start + self.prompts_per_phase]

    def __len__(self) -> int:
        return self.size // self.prompts_per_phase * self.prompts_per_phase * self.repeats


def target_weights(rewards: Tensor, best_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Particles to fit the policy to, and how much: `w_i = softmax_i(R_i / (temperature * s))`, best k.

    Args:
        rewards: [B, N].
        best_k: k <= N.
        temperature: in units of s, the standard deviation of R over the N particles of the prompt. Rewards that are
            all equal get equal weights.

    Returns:
        Indices [B, k], best first and of equal ones the lower index first, and weights [B, k], which sum to 1 over k.
    """
    ordered, order = rewards.sort(dim=1, descending=True, stable=True)
    scale = rewards.std(1, correction=0, keepdim=True).clamp_min(torch.finfo(rewards.dtype).tiny)
    # The best is subtracted first: 0 / tiny is 0, where reward / tiny would overflow.
    weights = ((ordered - ordered[:, :1])[:, :best_k] / (temperature * scale)).softmax(1)
    return order[:, :best_k], weights


def flow_metrics(output: VGFOutput, part: slice) -> dict[str, Tensor]:
    """One value per prompt [B] of what the flow did to the particles of some prompts (docs/trainer.md)."""
    before, after = output.initial, output.transported
    changed = [
        sum(sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b)) for a, b in zip(old, new, strict=True))
        / sum(max(len(a), len(b)) for a, b in zip(old, new, strict=True))
        for old, new in zip(before.completion_ids[part], after.completion_ids[part], strict=True)
    ]
    first, last = before.rewards[part], after.rewards[part]
    metrics = {
        "flow/reward_initial": first.mean(1),
        "flow/reward_final": last.mean(1),
        "flow/reward_gain": (last - first).mean(1),
        "flow/accept_rate": (last > first).float().mean(1),
        "flow/token_change_rate": torch.tensor(changed),
        "flow/kl": after.kl[part].mean(1),
        "flow/generations": output.generations[part],
    }
    if output.trace:  # [rounds, L, B, N]
        norms = torch.stack([trace.score_norm[:, part] for trace in output.trace])
        moved = torch.stack([trace.displacement[-1, part] for trace in output.trace])
        metrics["flow/reward_grad_norm"] = norms.mean((0, 1, 3))
        metrics["flow/displacement_norm"] = moved.mean((0, 2))
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _identity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def _check_dataset(dataset: Dataset, name: str) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}: a stream has no length and no order to "
            "resume in; load a part of it, e.g. with Dataset.from_list"
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt' (strings or lists of chat messages), only {dataset.column_names}: rename "
            "one with dataset.rename_column"
        )


def _load_policy(
    model: str | PreTrainedModel | PeftModel,
    args: VGFConfig,
    quantization_config: Any | None,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel:
    if isinstance(model, str):
        init_kwargs = {"dtype": "float32", **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
        if quantization_config is not None:
            init_kwargs["quantization_config"] = quantization_config
        model = AutoModelForCausalLM.from_pretrained(model, **init_kwargs)
    elif args.model_init_kwargs is not None or quantization_config is not None:
        raise ValueError(
            "model_init_kwargs and quantization_config are for loading a model from a path, but the model is loaded "
            "already: leave them out, or give its path"
        )
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "model is a PeftModel already, so peft_config cannot wrap it again: leave peft_config out to train "
                "its adapters, or pass model.merge_and_unload()"
            )
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            if config.is_prompt_learning or getattr(config, "bias", "none") not in (None, "none"):
                raise ValueError(
                    f"the reference is the model with its adapters disabled, which {type(config).__name__} with "
                    f"bias={getattr(config, 'bias', None)!r} does not bring back: use e.g. LoraConfig(bias='none')"
                )
    return model


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # read by functional attention, no module
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _load_reward(
    reward_funcs: RewardFunc | list[RewardFunc],
    reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    processing_class: PreTrainedTokenizerBase,
    args: VGFConfig,
) -> DifferentiableReward:
    members = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    for member in members:
        if not isinstance(member, (str, PreTrainedModel, DifferentiableReward)):
            raise TypeError(
                "plain functions have no gradient, and the flow climbs one: reward_funcs holds a "
                f"{type(member).__name__}; give a sequence-classification model, e.g. one trained with "
                "trl.RewardTrainer on pairs that the function ranked"
            )
    tokenizers = reward_processing_classes if isinstance(reward_processing_classes, list) else [reward_processing_classes]
    if reward_processing_classes is not None and len(tokenizers) != len(members):
        raise ValueError(f"{len(tokenizers)} reward_processing_classes were given for {len(members)} reward_funcs")
    for tokenizer in tokenizers:
        if tokenizer is not None and tokenizer.get_vocab() != processing_class.get_vocab():
            raise ValueError(
                "a reward model has another vocabulary than the policy, and the flow moves embeddings of one "
                "vocabulary: use a reward model trained with the policy's tokenizer"
            )
    if args.reward_model_init_kwargs is not None and not all(isinstance(member, str) for member in members):
        raise ValueError(
            "reward_model_init_kwargs are for loading reward models from paths, but one is loaded already: leave them "
            "out, or give its path"
        )
    if isinstance(members[0], DifferentiableReward) and len(members) == 1:
        return members[0]
    models = [member for member in members if not isinstance(member, DifferentiableReward)]
    if len(models) < len(members):
        raise ValueError("a DifferentiableReward is an ensemble already: pass it alone, or list the models it is made of")
    init_kwargs = args.reward_model_init_kwargs
    assert not isinstance(init_kwargs, str)
    return DifferentiableReward(models, processing_class, kappa=args.reward_kappa, model_init_kwargs=init_kwargs)
