"""The rewards of a run: differentiable models, reward models with another tokenizer, Python functions; one weighted sum.

    R(x, y) = sum_i w_i R_i(x, y)

What has a gradient in the policy's vocabulary is followed as it is. The rest is scored as text, and a `ValueModel` fitted to its
sum stands in for it in the flow.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
)

from vgf_llm.text import DifferentiableReward
from vgf_llm.text.loading import load_whole
from vgf_llm.text.sampler import Scorer
from vgf_llm.text.value import RewardSum, ValueModel

from .vgf_config import VGFConfig


RewardModel = str | PreTrainedModel | DifferentiableReward
RewardFunction = Callable[..., Any]
# A list is an ensemble: one reward, `mean - reward_kappa * std` over its models.
RewardFunc = RewardModel | RewardFunction | list[str | PreTrainedModel]


class TextRewardModel(nn.Module):
    """A reward model with a tokenizer of its own, which reads texts: it scores, but its gradient is in another vocabulary.

    Plain text is prompt and completion joined, with the end-of-sequence token that `trl.RewardTrainer` appends where the
    completion has come to its end; conversations go through the reward tokenizer's chat template.
    """

    def __init__(self, model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.processing_class = processing_class
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        model.config.pad_token_id = processing_class.pad_token_id

    @torch.no_grad()
    def forward(self, prompts: list[Any], completions: list[Any], ended: list[bool]) -> list[float]:
        texts = []
        for prompt, completion, end in zip(prompts, completions, ended, strict=True):
            if isinstance(prompt, str):
                eos = self.processing_class.eos_token or ""
                texts.append(prompt + completion + (eos if end and not completion.endswith(eos) else ""))
            else:
                texts.append(cast(str, self.processing_class.apply_chat_template(prompt + completion, tokenize=False)))
        conversational = not isinstance(prompts[0], str)
        encoded = self.processing_class(
            texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=not conversational
        )
        inputs = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return self.model(**inputs).logits[:, 0].float().tolist()


@dataclass
class Term:
    """One of the rewards that add up.

    Attributes:
        name: for metrics, as in TRL: the last part of a model's path, or the name of the function.
        weight: its factor in the sum.
        reward: a `DifferentiableReward`, a `TextRewardModel` or a function.
    """

    name: str
    weight: float
    reward: Any

    @property
    def has_gradient(self) -> bool:
        return isinstance(self.reward, DifferentiableReward)


@dataclass
class Scores:
    """What one generation phase learned from its rewards.

    Attributes:
        terms: per prompt of the phase and completion (its ids), the value of every term, nan where a function said None.
        seconds: spent scoring.
        extra: what functions logged with `log_extra`, per prompt and completion.
        metrics: what functions logged with `log_metric`.
    """

    terms: dict[tuple[int, tuple[int, ...]], list[float]] = field(default_factory=dict)
    extra: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


class Rewards:
    """All rewards of a run.

    Args:
        reward_funcs: one reward or a list of rewards that add up; each a path, a model, a `DifferentiableReward`, a function with
            TRL's signature, or a list of paths and models, an ensemble.
        reward_processing_classes: tokenizer(s) of the reward models, one per reward; None: that of the model's path, or the
            policy's where the model is an object.
        processing_class: tokenizer of the policy.
        args: weights, kappa and `reward_model_init_kwargs`.

    Raises:
        TypeError: a reward that is neither model nor function.
        ValueError: lists of different lengths, or a model that cannot be a reward.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | list[RewardFunc],
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
        processing_class: PreTrainedTokenizerBase,
        args: VGFConfig,
    ) -> None:
        rewards = cast("list[RewardFunc]", reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])
        tokenizers = reward_processing_classes
        if not isinstance(tokenizers, list):
            tokenizers = [tokenizers] * len(rewards)
        if not rewards:
            raise ValueError("reward_funcs is an empty list: give at least one reward")
        if len(tokenizers) != len(rewards):
            raise ValueError(f"{len(tokenizers)} reward_processing_classes were given for {len(rewards)} reward_funcs")
        weights = args.reward_weights or [1.0] * len(rewards)
        if len(weights) != len(rewards):
            raise ValueError(f"reward_weights has {len(weights)} entries for {len(rewards)} reward_funcs: give one per reward")
        models = [m for reward in rewards for m in (reward if isinstance(reward, list) else [reward])]
        if args.reward_model_init_kwargs is not None and not any(isinstance(m, str) for m in models):
            raise ValueError(
                "reward_model_init_kwargs are for loading reward models from paths, but none is given as a path: leave them "
                "out, or give its path"
            )
        self.processing_class = processing_class
        self.clip_range = args.reward_clip_range
        self.terms = [
            Term(_name(reward), weight, _load(reward, tokenizer, processing_class, args))
            for reward, weight, tokenizer in zip(rewards, weights, tokenizers, strict=True)
        ]
        self.value: ValueModel | None = None  # set where a term has no gradient

    @property
    def differentiable(self) -> list[Term]:
        return [term for term in self.terms if term.has_gradient]

    @property
    def black_box(self) -> list[Term]:
        return [term for term in self.terms if not term.has_gradient]

    def to(self, device: torch.device) -> Rewards:
        for term in self.terms:
            if isinstance(term.reward, nn.Module):
                term.reward.to(device)
        return self

    def guide(self, ready: bool) -> DifferentiableReward:
        """What the flow climbs: the differentiable terms, and, once it is `ready`, the value model for the rest."""
        parts = [cast(DifferentiableReward, term.reward) for term in self.differentiable]
        weights = [term.weight for term in self.differentiable]
        if self.value is not None and (ready or not parts):
            parts, weights = [*parts, self.value], [*weights, 1.0]
        if len(parts) == 1 and weights == [1.0]:
            return parts[0]
        return RewardSum(parts, weights)

    def black_box_value(self, values: list[float]) -> float:
        """The part of the reward that the value model is fitted to, from the values of all terms."""
        return sum(
            term.weight * value
            for term, value in zip(self.terms, values, strict=True)
            if not term.has_gradient and not math.isnan(value)
        )

    def scorer(self, rows: list[dict[str, Any]], state: TrainerState, eos_ids: Tensor) -> tuple[Scorer, Scores]:
        """A scorer for `VGFSampler.sample` on the prompts of `rows` of the dataset, and what it will have learned.

        The same completion of the same prompt is scored by a function once.

        Raises (when called):
            RuntimeError: a function raised, or returned another number of values than completions, or no term applies to a
                completion; the message names the function.
        """
        scores = Scores()
        ends = set(eos_ids.tolist())

        def score(index: Tensor, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            started = time.perf_counter()
            # A prompt is read once for all of its completions; which of their rows it is read from does not matter.
            prompts, owner = index.unique(return_inverse=True)
            some = torch.empty_like(prompts).scatter_(0, owner, torch.arange(len(index), device=index.device))

            def column(reward: DifferentiableReward) -> list[float]:
                prefix = reward.read(prompt_ids[some], prompt_mask[some]).deal(owner)
                return cast(list[float], reward.score_ids(prompt_ids, prompt_mask, ids, mask, prefix).tolist())

            columns = [column(cast(DifferentiableReward, term.reward)) if term.has_gradient else None for term in self.terms]
            keys = [(i, tuple(row[m].tolist())) for i, row, m in zip(index.tolist(), ids, mask, strict=True)]
            new = [i for i, key in enumerate(keys) if key not in scores.terms and key not in keys[:i]]
            if self.black_box and new:
                self._ask(keys, new, rows, ends, state, columns, scores)
            for i, key in enumerate(keys):
                if key not in scores.terms:
                    scores.terms[key] = [column[i] for column in columns if column is not None]
            totals = []
            for key in keys:
                values = scores.terms[key]
                if all(math.isnan(value) for value in values) and self.black_box:
                    raise RuntimeError(
                        f"no reward applies to a completion of prompt {rows[key[0]]['prompt']!r}: every function returned None"
                    )
                weighted = [t.weight * v for t, v in zip(self.terms, values, strict=True) if not math.isnan(v) or t.has_gradient]
                totals.append(sum(weighted))
            scores.seconds += time.perf_counter() - started
            summed = torch.tensor(totals, device=ids.device, dtype=torch.float32)
            return summed if self.clip_range is None else summed.clamp(*self.clip_range)

        return score, scores

    def _ask(
        self,
        keys: list[tuple[int, tuple[int, ...]]],
        new: list[int],
        rows: list[dict[str, Any]],
        ends: set[int],
        state: TrainerState,
        columns: list[list[float] | None],
        scores: Scores,
    ) -> None:
        """Ask the functions about completions that were not scored yet."""
        prompts = [rows[keys[i][0]]["prompt"] for i in new]
        ids = [list(keys[i][1]) for i in new]
        texts = [cast(str, self.processing_class.decode(c, skip_special_tokens=True)) for c in ids]
        completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        extra = [name for name in rows[0] if name != "prompt"]
        named = {name: [rows[keys[i][0]][name] for i in new] for name in extra}

        def log_extra(column: str, values: list[Any]) -> None:
            for i, value in zip(new, values, strict=True):
                scores.extra.setdefault(keys[i], {})[column] = value

        def log_metric(name: str, value: float) -> None:
            scores.metrics.setdefault(name, []).append(float(value))

        answers: list[list[float]] = []
        for term, column in zip(self.terms, columns, strict=True):
            if column is not None:
                answers.append([column[i] for i in new])
                continue
            try:
                if isinstance(term.reward, TextRewardModel):
                    said = term.reward(prompts, completions, [c[-1] in ends for c in ids])
                else:
                    said = term.reward(
                        prompts=prompts, completions=completions, completion_ids=ids, **named,
                        trainer_state=state, log_extra=log_extra, log_metric=log_metric,
                    )  # fmt: skip
                    if inspect.isawaitable(said):
                        said = asyncio.run(_await(said))
            except Exception as error:
                raise RuntimeError(f"reward function {term.name} raised {type(error).__name__}: {error}") from error
            if not isinstance(said, (list, tuple)) or len(said) != len(new):
                got = f"{len(said)} values" if isinstance(said, (list, tuple)) else type(said).__name__
                raise RuntimeError(
                    f"reward function {term.name} returned {got} for {len(new)} completions: it must return a list with one "
                    "number, or None, per completion"
                )
            answers.append([_number(value, term.name, text) for value, text in zip(said, texts, strict=True)])
        for i, *values in zip(new, *answers, strict=True):
            scores.terms[keys[i]] = list(values)


def _number(value: Any, name: str, completion: str) -> float:
    """What a function said of a completion; nan stands for None, which means that it does not apply."""
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):  # nan would pass for None, and a broken reward for one that does not apply
        raise RuntimeError(
            f"reward function {name} returned {value!r} for the completion {completion!r}: it must return a finite number, or "
            "None where it does not apply"
        )
    return number


async def _await(said: Any) -> Any:
    return await said


def _name(reward: RewardFunc) -> str:
    if isinstance(reward, list):
        return "+".join(dict.fromkeys(_name(member) for member in reward))
    if isinstance(reward, str):
        return Path(reward).name
    if isinstance(reward, PreTrainedModel):
        return Path(reward.config._name_or_path).name or type(reward).__name__
    return getattr(reward, "__name__", type(reward).__name__)


def _load(
    reward: RewardFunc,
    tokenizer: PreTrainedTokenizerBase | None,
    processing_class: PreTrainedTokenizerBase,
    args: VGFConfig,
) -> DifferentiableReward | TextRewardModel | RewardFunction:
    if isinstance(reward, DifferentiableReward):
        return reward
    init_kwargs = cast("dict[str, Any]", args.reward_model_init_kwargs or {})
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **init_kwargs}
    if isinstance(reward, (str, PreTrainedModel)):
        if tokenizer is None and isinstance(reward, str):
            tokenizer = AutoTokenizer.from_pretrained(reward, trust_remote_code=args.trust_remote_code)
        if tokenizer is not None and tokenizer.get_vocab() != processing_class.get_vocab():
            if isinstance(reward, str):
                reward = cast(
                    PreTrainedModel,
                    load_whole(AutoModelForSequenceClassification, reward, **{"num_labels": 1, **init_kwargs}),
                )
            if reward.config.num_labels != 1:
                raise ValueError(f"reward model {_name(reward)} has num_labels={reward.config.num_labels}: a reward needs 1")
            return TextRewardModel(reward, tokenizer)
        reward = [reward]
    if isinstance(reward, list):
        if not all(isinstance(member, (str, PreTrainedModel)) for member in reward):
            raise TypeError(
                "a list inside reward_funcs is an ensemble of reward models, paths or objects; functions stand beside it, as "
                "rewards of their own"
            )
        if tokenizer is not None and tokenizer.get_vocab() != processing_class.get_vocab():
            raise ValueError(
                "an ensemble needs the vocabulary of the policy, in which its gradient is taken: list its models one by one as "
                "rewards of their own"
            )
        return DifferentiableReward(reward, processing_class, kappa=args.reward_kappa, model_init_kwargs=init_kwargs)
    if not callable(reward):
        raise TypeError(f"reward_funcs holds a {type(reward).__name__}: give a path, a model or a function")
    return reward
