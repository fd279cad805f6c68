"""Differentiable rewards: one number through token ids and through input embeddings, and its gradient.

A particle of the flow is the sequence of input embeddings of a completion. Several reward models make one reward,
`mean - kappa * std` over calibrated members, in the gradient as in every comparison; the particle then holds the embeddings
of all members side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .loading import load_whole
from .prefix import Prefix, layers_of, positions


class DifferentiableReward(nn.Module):
    """One or several frozen sequence-classification models (`num_labels=1`) as a reward R(prompt, completion).

    Coordinates: the embeddings of every member are divided by the root-mean-square distance between two tokens of its
    table, so that 1 is "as far as from one token to another" in every model, and placed side by side.

    Args:
        models: a transformers model or a path or hub id, or a list of them.
        processing_class: tokenizer of the policy; its vocabulary must be that of every member.
        kappa: how many standard deviations over members are subtracted from their mean. Default 0.5, the value measured
            with three members in docs/method.md. Without effect with one member.
        calibration: `(mean, std)` of each member's raw score on samples of the base model; members are compared after
            `(score - mean) / std`, and the reward is in units of that std. Default None: scores as they are.
        model_init_kwargs: passed to `from_pretrained` where a path is given.

    Raises:
        ValueError: no model; `num_labels != 1`; another vocabulary; negative kappa; a calibration of another length.
    """

    def __init__(
        self,
        models: str | Path | PreTrainedModel | Sequence[str | Path | PreTrainedModel],
        processing_class: PreTrainedTokenizerBase,
        *,
        kappa: float = 0.5,
        calibration: Sequence[tuple[float, float]] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        models = [models] if isinstance(models, (str, Path, PreTrainedModel)) else list(models)
        if not models:
            raise ValueError("reward_model is an empty list: give at least one sequence-classification model")
        if kappa < 0:
            raise ValueError(f"kappa must not be negative, got {kappa!r}; 0 is the mean over members")
        if calibration is not None and len(calibration) != len(models):
            raise ValueError(f"calibration has {len(calibration)} entries for {len(models)} reward models")
        self.kappa = kappa
        self.calibration = list(calibration) if calibration is not None else [(0.0, 1.0)] * len(models)
        self.members = nn.ModuleList(_load(model, processing_class, model_init_kwargs or {}) for model in models)
        scales, widths = [], []
        for member in self._models:
            table = _table(_embeddings(member)).detach().float()[: len(processing_class)]
            # E|a - b|^2 = 2 * total variance, for two tokens drawn at random.
            scales.append(float((2 * table.var(0, correction=0).sum()).sqrt()))
            widths.append(table.shape[1])
        self._scales, self._widths, self._vocab_size = scales, widths, len(processing_class)
        self.requires_grad_(False).eval()

    @property
    def _models(self) -> list[PreTrainedModel]:
        """The members as what they are: a ModuleList only knows modules."""
        return cast("list[PreTrainedModel]", list(self.members))

    @property
    def device(self) -> torch.device:
        return self._models[0].device

    @property
    def width(self) -> int:
        """D of a particle: the embedding widths of all members together."""
        return sum(self._widths)

    @cached_property
    def table(self) -> Tensor:
        """Embeddings [V, D] of the whole vocabulary, in the coordinates of the flow."""
        with torch.no_grad():
            return self.embed(torch.arange(self._vocab_size, device=self.device))

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., D] of token ids [...], in the coordinates of the flow (see the class)."""
        parts = [_embeddings(m)(ids) / s for m, s in zip(self._models, self._scales, strict=True)]
        return torch.cat([part.float() for part in parts], -1)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, embeds: Tensor, mask: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        """Reward [R] of completions given as embeddings [R, T, D]; prompts [R, P], masks bool.

        `prefix`: these prompts as `read` returned them, so that they are not read again.
        """
        return self.aggregate(self._member_scores(prompt_ids, prompt_mask, embeds, mask, prefix))

    def read(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Prefix:
        """Prompts [B, P] as every member reads them, one row each; `Prefix.deal` gives them to more."""
        attention, states = prompt_mask.long(), []
        for member in self._models:
            cache = DynamicCache()
            _backbone(member)(
                inputs_embeds=_embeddings(member)(prompt_ids), attention_mask=attention,
                position_ids=positions(prompt_mask, prompt_mask.shape[1]), past_key_values=cache, use_cache=True,
            )  # fmt: skip
            states.append(layers_of(cache))
        return Prefix(prompt_mask, states, None, torch.arange(len(prompt_ids), device=prompt_ids.device))

    def aggregate(self, scores: Tensor) -> Tensor:
        """`mean - kappa * std` over members of raw scores [members, ...] -> [...] (uncorrected std, Coste et al. 2023)."""
        shape = (-1,) + (1,) * (scores.ndim - 1)
        mean, std = (torch.tensor(c, device=scores.device).view(shape) for c in zip(*self.calibration, strict=True))
        scores = (scores - mean) / std
        if len(self.members) == 1:
            return scores[0]
        # The gradient of a std at zero is not defined; the floor is far below any score.
        return scores.mean(0) - self.kappa * (scores.var(0, correction=0) + 1e-12).sqrt()

    @torch.no_grad()
    def score_ids(
        self, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        """Reward [R] of token ids [R, T]: the same path as for embeddings, so the same number."""
        return self(prompt_ids, prompt_mask, self.embed(ids), mask, prefix)

    @torch.no_grad()
    def member_scores_ids(self, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores [members, R] of token ids [R, T]."""
        return self._member_scores(prompt_ids, prompt_mask, self.embed(ids), mask)

    def value_and_grad(
        self, prompt_ids: Tensor, prompt_mask: Tensor, embeds: Tensor, mask: Tensor, prefix: Prefix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reward [R] and its gradient [R, T, D] at embeddings, in float32.

        Raises:
            ValueError: the score of a member does not depend on its input embeddings.
        """
        if prefix is None:
            with torch.no_grad():
                prefix = self.read(prompt_ids, prompt_mask)
        with torch.enable_grad():
            leaf = embeds.detach().float().requires_grad_()
            values = self(prompt_ids, prompt_mask, leaf, mask, prefix)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradient

    def _member_scores(
        self, prompt_ids: Tensor, prompt_mask: Tensor, embeds: Tensor, mask: Tensor, prefix: Prefix | None = None
    ) -> Tensor:
        """[members, R]. Without a prefix the prompts are read here, with gradients for weights that are being trained."""
        prefix = self.read(prompt_ids, prompt_mask) if prefix is None else prefix
        attention = prefix.attention(mask)
        places = positions(attention, mask.shape[1])
        # The head belongs on the last token, wherever the padding begins and whatever the padding token is.
        rows, last = torch.arange(len(mask), device=mask.device), mask.int().cumsum(1).argmax(1)
        scores, start = [], 0
        for index, (member, scale, width) in enumerate(zip(self._models, self._scales, self._widths, strict=True)):
            part = (embeds[..., start : start + width] * scale).to(_embeddings(member).weight.dtype)
            start += width
            hidden = _backbone(member)(
                inputs_embeds=part, attention_mask=attention.long(), position_ids=places,
                past_key_values=prefix.cache(index), use_cache=True,
            )[0]  # fmt: skip
            head = cast(nn.Module, member.score)
            score = head(hidden[rows, last]).float()
            # Member by member: one without gradient would not show in that of the whole ensemble.
            if torch.is_grad_enabled() and embeds.requires_grad and not score.requires_grad:
                raise ValueError(
                    f"reward model {member.config._name_or_path or type(member).__name__} yields no gradient at its "
                    "input embeddings: its forward detaches them or runs under no_grad/inference_mode; give a "
                    "differentiable model, or steps=0 to select by reward only"
                )
            scores.append(score)
        return torch.cat(scores, 1).T  # one number per head; a reward model has one head


def mix_embeddings(
    reward_model: PreTrainedModel, base: PreTrainedModel, positions: Callable[[Tensor], Tensor]
) -> RemovableHandle:
    """Flow-aware reward training: while `reward_model` trains, it also sees what lies *between* tokens.

    The flow takes gradients at points between a token and the base model's mean embedding of its position; a reward model that
    has met tokens only has any gradient there. From now on, in training mode, half of the chosen positions of every row are
    moved towards that mean, `e <- e + lam (E_mu[e] - e)`, by one random share `lam` in [0, 1] per row. What it is worth, alone
    and beside comparisons of edits, is measured in docs/method.md.

    Args:
        reward_model: sequence-classification model in training, called with right-padded `input_ids`.
        base: causal language model with the same vocabulary, frozen.
        positions: token ids [R, T] -> bool [R, T], which positions belong to a completion and may be mixed.

    Returns:
        The handle of the hook; `handle.remove()` ends it.
    """

    def mix(module: nn.Module, inputs: tuple[Tensor, ...], embeds: Tensor) -> Tensor:
        if not module.training:
            return embeds
        (ids,) = inputs
        with torch.no_grad():
            # Right-padded and causal: padding cannot reach a token. Position t is predicted by t - 1.
            probs = base(input_ids=ids).logits[:, :-1].softmax(-1)
            share = torch.rand(len(ids), 1, device=ids.device) * (torch.rand(ids.shape, device=ids.device) < 0.5)
            share = (share * positions(ids))[:, 1:, None]
        table = _table(cast(nn.Embedding, module))
        mean = probs.to(table.dtype) @ table[: probs.shape[-1]]
        moved = embeds[:, 1:] + share.to(embeds.dtype) * (mean - embeds[:, 1:])
        return torch.cat([embeds[:, :1], moved], 1)

    base.requires_grad_(False).eval()
    return _embeddings(reward_model).register_forward_hook(mix)


def _embeddings(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _backbone(model: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, getattr(model, model.base_model_prefix))


def _table(embeddings: nn.Embedding) -> Tensor:
    """What the model sees of every token [V, D]: some families scale their weights in the forward. Hooks are passed by."""
    tokens = torch.arange(embeddings.num_embeddings, device=embeddings.weight.device)
    return embeddings.forward(tokens)


def _load(
    model: str | Path | PreTrainedModel, processing_class: PreTrainedTokenizerBase, init_kwargs: dict[str, Any]
) -> PreTrainedModel:
    if isinstance(model, (str, Path)):
        name = str(model)
        _check_vocabulary(AutoTokenizer.from_pretrained(name), processing_class, name)
        loaded: PreTrainedModel = load_whole(AutoModelForSequenceClassification, name, **{"num_labels": 1, **init_kwargs})
    else:
        loaded, name = model, model.config._name_or_path or type(model).__name__
    if loaded.config.num_labels != 1:
        raise ValueError(f"reward model {name} has num_labels={loaded.config.num_labels}: a reward needs num_labels=1")
    if not hasattr(loaded, "score"):
        raise ValueError(
            f"reward model {name} ({type(loaded).__name__}) has no `score` head on its last token: use a decoder-style "
            "AutoModelForSequenceClassification"
        )
    rows = _embeddings(loaded).weight.shape[0]
    if rows < len(processing_class):
        raise ValueError(
            f"reward model {name} embeds {rows} tokens, but the policy's tokenizer has {len(processing_class)}: gradients "
            "need one vocabulary; use a reward model trained with the policy's tokenizer"
        )
    return loaded


def _check_vocabulary(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, name: str) -> None:
    a, b = theirs.get_vocab(), ours.get_vocab()
    if a != b:
        differ = sorted(set(a.items()) ^ set(b.items()), key=lambda item: item[1])
        raise ValueError(
            f"reward model {name} has another vocabulary than the policy ({len(a)} and {len(b)} tokens, e.g. "
            f"{differ[0][0]!r}): the flow moves embeddings of one vocabulary; use a reward model trained with the policy's "
            "tokenizer"
        )
