"""A value model learned online: the differentiable stand-in for rewards that have no gradient.

Python functions, verifiers, judges behind an API and reward models with another tokenizer say what a text is worth, but not in
which direction it would be worth more. A value model is fitted to what they said of completions seen so far, beside the policy;
the flow follows its gradient, `mean - kappa * std` over an ensemble of heads, and the true reward verifies and selects.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from . import decode
from .prefix import Prefix
from .reward import DifferentiableReward


class ValueModel(DifferentiableReward):
    """K linear heads on a backbone with LoRA, fitted to scored completions.

    The heads share the backbone and differ in their initialisation and in their samples: each sees its own half of them
    (bootstrap by a fixed coin per sample and head). Values are in units of the reward.

    Two value models built alike that are given the same samples in the same order stay equal: processes of a run keep replicas
    without exchanging gradients.

    Args:
        backbone: a causal language model with the vocabulary of the policy; its base model is copied, so it is left as it is.
        processing_class: tokenizer of the policy.
        heads: K. Default 4.
        kappa: standard deviations over heads that are subtracted from their mean. Default 0.5, as for ensembles of reward
            models (docs/method.md).
        lora_rank: of the adapters on all linear layers of the backbone; 0 trains the heads alone. Default 8.
        learning_rate: of AdamW. Default 1e-3, for heads and adapters that start from nothing.
        replay_size: samples kept, newest last. Default 4096.
        batch_size: samples per update. Default 32.
        seed: of heads, adapters, coins and the choice of samples.

    Raises:
        ValueError: a size below 1, a negative kappa, or a backbone without sequence-classification class.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        heads: int = 4,
        kappa: float = 0.5,
        lora_rank: int = 8,
        learning_rate: float = 1e-3,
        replay_size: int = 4096,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        for name, value in (("heads", heads), ("replay_size", replay_size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = copy.deepcopy(backbone.config)
            config.num_labels = 1
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            model.base_model.load_state_dict(backbone.base_model.state_dict())
            super().__init__(model, processing_class, kappa=kappa)
            model.score = nn.Linear(model.score.in_features, heads, bias=False)
            if lora_rank:
                adapters = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
                inject_adapter_in_model(adapters, model.base_model)
            model.to(backbone.device)
        self.requires_grad_(False).eval()
        self.heads, self.batch_size, self.seed = heads, batch_size, seed
        self.trained = {name: p for name, p in model.named_parameters() if "lora_" in name or name.startswith("score.")}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=learning_rate, weight_decay=0.01)
        self.replay: deque[tuple[list[int], list[int], float, int]] = deque(maxlen=replay_size)
        self.seen = 0  # samples ever added: the number of a sample decides its coins
        self.updates = 0
        self.scale = (0.0, 1.0)  # mean and standard deviation of the rewards in the replay

    def aggregate(self, scores: Tensor) -> Tensor:
        """`mean - kappa * std` over heads of [K, ...] -> [...], in units of the reward."""
        lower = scores.mean(0) - self.kappa * (scores.var(0, correction=0) + 1e-12).sqrt()
        return self.scale[0] + self.scale[1] * lower

    def add(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], rewards: Sequence[float]) -> None:
        """Take scored completions, one prompt each, into the replay."""
        for prompt, completion, reward in zip(prompt_ids, completion_ids, rewards, strict=True):
            self.replay.append((list(prompt), list(completion), float(reward), self.seen))
            self.seen += 1

    def fit(self, updates: int) -> float:
        """`updates` steps of AdamW on mean squared error, batches drawn from the replay. Returns the mean loss, in variances of
        the reward: 1 is what a constant reaches.

        Raises:
            RuntimeError: nothing was added yet.
            FloatingPointError: no update had a finite gradient. Single ones that have none are skipped.
        """
        if not self.replay:
            raise RuntimeError("the value model has no samples to be fitted to: no reward function has scored a completion yet")
        rewards = torch.tensor([reward for *_, reward, _ in self.replay], dtype=torch.float64)
        self.scale = (rewards.mean().item(), max(rewards.std(correction=0).item(), 1e-6))
        losses = []
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        try:
            for _ in range(updates):
                losses.append(self._update())
        finally:
            for parameter in self.trained.values():
                parameter.requires_grad_(False)
        finite = [loss for loss in losses if math.isfinite(loss)]
        if losses and not finite:
            raise FloatingPointError(
                f"none of {updates} updates of the value model had a finite gradient (rewards have mean {self.scale[0]:g} and "
                f"standard deviation {self.scale[1]:g}): look at the rewards, or lower value_learning_rate"
            )
        return math.fsum(finite) / max(len(finite), 1)

    def _update(self) -> float:
        generator = torch.Generator().manual_seed(self.seed * 2**32 + self.updates)
        chosen = torch.randint(len(self.replay), (self.batch_size,), generator=generator).tolist()
        prompts, completions, rewards, numbers = zip(*(self.replay[index] for index in chosen), strict=True)
        prompt_ids, prompt_mask = _pad(prompts, self.device, left=True)
        ids, mask = _pad(completions, self.device, left=False)
        target = (torch.tensor(rewards, device=self.device) - self.scale[0]) / self.scale[1]
        keys = torch.tensor(numbers, dtype=torch.int64)
        coins = decode.uniform(keys, decode.CONTROL, torch.full_like(keys, self.seed), self.heads).T < 0.5
        weight = (coins.double() if self.heads > 1 else torch.ones(1, len(numbers)).double()).to(self.device)
        with torch.enable_grad():
            scores = self._member_scores(prompt_ids, prompt_mask, self.embed(ids), mask)
            loss = (weight * (scores - target).double().square()).sum() / weight.sum().clamp_min(1)
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        finite = bool(norm.isfinite())  # a step along anything else would lose every weight
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return loss.item() if finite else math.nan

    def state(self) -> dict[str, Any]:
        """Everything `load_state` needs to go on as if nothing had happened."""
        return {
            "weights": {name: parameter.detach().cpu() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "replay": list(self.replay),
            "seen": self.seen,
            "updates": self.updates,
            "scale": self.scale,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay = deque((tuple(sample) for sample in state["replay"]), maxlen=self.replay.maxlen)
        self.seen, self.updates, self.scale = state["seen"], state["updates"], tuple(state["scale"])


class RewardSum(DifferentiableReward):
    """`sum_i weight_i R_i` of several rewards, each with its own members; their embeddings are placed side by side.

    Args:
        parts: the rewards.
        weights: one per reward; they may change between calls, as a value model's does once it has seen samples.
    """

    def __init__(self, parts: Sequence[DifferentiableReward], weights: Sequence[float]) -> None:
        nn.Module.__init__(self)
        if not parts or len(parts) != len(weights):
            raise ValueError(f"a sum needs at least one reward and a weight for each, got {len(parts)} and {len(weights)}")
        self.parts, self.weights = nn.ModuleList(parts), list(weights)
        self._vocab_size = parts[0]._vocab_size

    @property
    def _rewards(self) -> list[DifferentiableReward]:
        return cast("list[DifferentiableReward]", list(self.parts))

    @property
    def device(self) -> torch.device:
        return self._rewards[0].device

    @property
    def width(self) -> int:
        return sum(part.width for part in self._rewards)

    def embed(self, ids: Tensor) -> Tensor:
        return torch.cat([part.embed(ids) for part in self._rewards], -1)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, embeds: Tensor, mask: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        prefix = self.read(prompt_ids, prompt_mask) if prefix is None else prefix
        values, first, start = [], 0, 0
        for part, weight in zip(self._rewards, self.weights, strict=True):
            states = prefix.states[first : first + len(part.members)]
            if weight != 0:
                piece = embeds[..., start : start + part.width]
                values.append(weight * part(prompt_ids, prompt_mask, piece, mask, replace(prefix, states=states)))
            first, start = first + len(part.members), start + part.width
        return torch.stack(values).sum(0)

    def read(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Prefix:
        read = [part.read(prompt_ids, prompt_mask) for part in self._rewards]
        return replace(read[0], states=[state for prefix in read for state in prefix.states])


def _pad(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids (0 where padded: masked, and a token of every vocabulary) and bool mask [R, T]."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        part = slice(width - len(row), None) if left else slice(len(row))
        ids[index, part] = torch.tensor(row)
        mask[index, part] = True
    return ids.to(device), mask.to(device)
