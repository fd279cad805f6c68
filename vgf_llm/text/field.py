"""A learned gradient: which way the reward rises at every prefix, in expectation over what follows, at the price of a layer.

The gradient of a reward model speaks about one finished text, and costs a forward and a backward of every member at every step
of the flow. `GradientField` learns the gradient of an action value instead, linear in the embedding e of the next token:

    Q(x, y_<t, e) = V(x, y_<t) + <g(x, y_<t), e - E_mu e>,    grad_e Q = g,

with V and g read off a hidden state before that token, behind a layer of its own on those of the base model, and e in the
coordinates of `DifferentiableReward.embed`. Fitted to the rewards of completions that the base model wrote, Q estimates
E[R | x, y_<=t]: what the token is worth when the base model writes the rest, not when the rest stays as it was. The advantages
<g, e - E_mu e> have mean 0 under mu, and what a completion has over V is their sum. Fitting the sum (Direct Advantage Estimation,
arXiv 2109.06093), not one token's share at a time, keeps what follows a token from being noise to it. Tokens are the actions of
arXiv 2604.14265, prefixes its states, and the network that gives their gradient is its amortised flow.

Since it needs no finished text, a particle need not be drawn before it is moved: the embedding of every token takes its L steps
along g, which is the same wherever it has got to, while it is drawn,

    q_t(v) = mu_t(v) exp(lam <g_t, E_v>) / Z_t,

and the next gradient is read behind the token that was said. What L steps of what length would be is one number, `lam`, and it is
the budget in nats that sets it (`GradientField.scale`).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, DynamicCache, PreTrainedModel

from vgf_llm.flow import TransportBudget

from . import decode
from .loading import load_whole
from .prefix import Prefix, forward, layers_of, left_pad, positions, stack


if TYPE_CHECKING:
    from .sampler import Prompt, VGFSampler

logger = logging.getLogger(__name__)

HEADS = "field.safetensors"
# Scales lam, per standard deviation of the reward, whose price in nats is measured when a field is fitted.
SCALES = tuple(2.0 ** (k / 2) for k in range(-12, 13))
# What a nat of likelihood counts in selection, in standard deviations of the reward, where comparisons do not say more.
LIKELIHOOD_WEIGHT = 0.005
FEWEST_COMPARISONS = 50
# Prompt, chosen, rejected.
Comparison = tuple["Prompt", str, str]


class GradientField(nn.Module):
    """V and g on the hidden states of a causal model.

    Args:
        backbone: causal transformer without a head, with the vocabulary of the policy. Taken as it is, not copied.
        width: D of a particle, `DifferentiableReward.width` of the reward whose gradient this is.
        depth: of the base model's layers, behind which its states are what the backbone's layers read. Default 0: they read the
            tokens, and the base model plays no part.

    Attributes:
        nats: [len(SCALES)] KL(q || mu) of a completion at each of `SCALES`, mean over the samples it was fitted to.
        spread: [] standard deviation of the reward over these samples, the unit of V and g.
        correlation: [] between the rewards of completions of the same prompt and what g says of their tokens,
            sum_t <g_t, e - E_mu e>, on prompts that were held out of the fit. A small budget of k nats raises the reward by
            `correlation * sqrt(2 k)` of its standard deviations within the prompt, where 1 is what no tilt can exceed.
        likelihood_weight: [] w of `R + w log mu`, by which completions drawn along the field are selected, in units of the reward
            per nat (`likelihood_worth`).
    """

    nats: Tensor
    spread: Tensor
    correlation: Tensor
    likelihood_weight: Tensor

    def __init__(self, backbone: PreTrainedModel, width: int, depth: int = 0) -> None:
        super().__init__()
        self.backbone, self.width, self.depth = backbone, width, depth
        self.register_buffer("nats", torch.zeros(len(SCALES)))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("correlation", torch.zeros(()))
        self.register_buffer("likelihood_weight", torch.zeros(()))
        config = backbone.config.get_text_config()
        hidden = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # OPT may project what it puts out
        # Without drawing random numbers: they begin at zero, since before any sample is seen no direction is better than another.
        self.value, self.slope = (nn.utils.skip_init(nn.Linear, hidden, size) for size in (1, width))
        for head in (self.value, self.slope):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.to(backbone.device).eval()

    @torch.no_grad()
    def read(self, prompt_ids: Tensor, prompt_mask: Tensor, hidden: Tensor | None = None) -> Prefix:
        """Prompts [B, P], one row each, for `gradients` of any number of completions; its `logits` are hidden states [B, H].

        `hidden` [B, P, H] are the base model's, behind `depth` layers (`decode.read_prompts`); None at depth 0.
        """
        cache = DynamicCache()
        found = self._hidden(prompt_ids, prompt_mask, cache, hidden)
        return Prefix(prompt_mask, [layers_of(cache)], found[:, -1], torch.arange(len(prompt_ids), device=prompt_ids.device))

    @torch.no_grad()
    def gradients(self, prefix: Prefix, ids: Tensor, mask: Tensor, hidden: Tensor | None = None) -> Tensor:
        """g [R, T, D] before every token of completions [R, T], float32; `hidden` [R, T, H] as in `read` (`decode.read`)."""
        after = self._hidden(ids, prefix.attention(mask), prefix.cache(), hidden)[:, :-1]
        return self.slope(torch.cat([cast(Tensor, prefix.logits)[prefix.rows][:, None], after], 1)).float()

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """V [R, T] and g [R, T, D] before every token of completions [R, T] of prompts [R, P], with gradients of the weights;
        `hidden` [R, P + T, H] as in `read`."""
        found = self._hidden(torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1), None, hidden)
        before = found[:, prompt_ids.shape[1] - 1 : -1]
        return self.value(before)[..., 0].float(), self.slope(before).float()

    def scale(self, kl_budget: float) -> float:
        """lam at which a completion spends `kl_budget` nats in the mean over prompts: one for all, so that the last nat of
        each buys as much. 0 for a field that has no direction yet."""
        known = self.nats > 0
        if not known.any() or kl_budget == 0:
            return 0.0
        log_nats, log_scales = self.nats[known].double().log(), torch.tensor(SCALES, dtype=torch.float64)[known.cpu()].log()
        return math.exp(float(np.interp(math.log(kl_budget), log_nats.cpu().numpy(), log_scales.numpy())))

    def steering(
        self,
        prefix: Prefix,
        table: Tensor,
        kl_budget: float,
        candidates: int,
        direction: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> decode.Steering:
        """For `decode.sample`: particles that move while they are drawn.

        Args:
            prefix: from `read`, R rows.
            table: [V, D] embeddings of the vocabulary, `DifferentiableReward.table`.
            kl_budget: nats that a completion may spend, and about what it spends in the mean (`scale`).
            candidates: tokens per position that may be favoured, the likeliest of the base model.
            direction: replaces the gradient [A, k, D] at positions [A, k] of rows [A] in a control experiment, given all three.
        """
        scale = self.scale(kl_budget)

        def tilt(rows: Tensor, positions: Tensor, hidden: Tensor, log_mu: Tensor) -> decode.Tilt:
            gradient = self.slope(hidden.to(self.slope.weight.dtype)).float()
            if direction is not None:
                gradient = direction(gradient, rows, positions)
            ids = log_mu.topk(min(candidates, log_mu.shape[-1]), -1).indices
            return decode.Tilt(ids, scale * gain(gradient, log_mu, ids, table))

        return decode.Steering(self.backbone, prefix, tilt, kl_budget, self.depth)

    def _hidden(self, ids: Tensor, attention: Tensor, cache: DynamicCache | None, hidden: Tensor | None) -> Tensor:
        assert (hidden is None) == (self.depth == 0), "the states that it reads, and nothing else"
        return forward(
            self.backbone, hidden=hidden,
            input_ids=ids, attention_mask=attention.long(), position_ids=positions(attention, ids.shape[1]),
            past_key_values=cache, use_cache=cache is not None,
        )[0]  # fmt: skip

    def save_pretrained(self, directory: str | Path) -> None:
        """The backbone in the format of transformers, the heads beside it."""
        self.backbone.save_pretrained(str(directory))
        heads = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items() if not name.startswith("backbone.")}
        heads["depth"] = torch.tensor(self.depth)
        save_file(heads, str(Path(directory) / HEADS))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GradientField:
        """The inverse of `save_pretrained`.

        Raises:
            OSError: there are no such files.
            ValueError: weights that are broken, missing, or of another model.
        """
        path = Path(directory) / HEADS
        if not path.is_file():
            raise OSError(f"{directory} holds no {HEADS}: give a folder that GradientField.save_pretrained wrote")
        try:
            heads = load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: the weights cannot be read, the file is broken or cut off: {error}") from error
        expected = {
            "value.weight", "value.bias", "slope.weight", "slope.bias", "nats", "spread", "correlation", "likelihood_weight",
            "depth",
        }  # fmt: skip
        if set(heads) != expected:
            raise ValueError(f"{path} has the weights {sorted(heads)}, not {sorted(expected)}: no gradient field wrote it")
        field = cls(load_whole(AutoModel, str(directory)), heads["slope.weight"].shape[0], int(heads["depth"]))
        if heads["slope.weight"].shape[1] != field.slope.in_features:
            raise ValueError(
                f"{path} belongs to a model with {heads['slope.weight'].shape[1]} hidden units, but the one beside it has "
                f"{field.slope.in_features}: the files are of two fields"
            )
        field.load_state_dict(heads, strict=False)
        return field.requires_grad_(False)


def last_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy of the last `count` layers of a causal transformer, with what comes before and after them all.

    Raises:
        ValueError: it has fewer, or they are not in a list called `layers` or `h`.
    """
    layers = stack(model)
    if not 1 <= count <= len(layers):
        raise ValueError(f"layers must lie between 1 and {len(layers)}, which {type(model).__name__} has, got {count}")
    # What is left out is not copied on the way.
    copied = copy.deepcopy(model, {id(layer): nn.Identity() for layer in layers[:-count]})
    kept = stack(copied)
    del kept[:-count]
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where its keys and values stand in a cache
                cast(Any, module).layer_idx = index
    config = copied.config.get_text_config()
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-count:]
    return copied


def fit_field(
    sampler: VGFSampler,
    prompts: Sequence[Prompt],
    *,
    layers: int = 1,
    num_samples: int = 8,
    max_completion_length: int = 64,
    epochs: int = 2,
    batch_size: int = 64,
    learning_rate: float = 5e-4,
    seed: int = 0,
    comparisons: Sequence[Comparison] | None = None,
    progress: bool = False,
) -> GradientField:
    """Fit a field to what a sampler's base model writes and what its reward says of that. No label is needed.

    The backbone starts as a copy of the last few layers of the base model, on the states that the others have for every token
    anyway. All its weights are trained, in float32; the base model stays as it is. One prompt in ten is held out, and the weights
    of the quarter of an epoch after which `GradientField.correlation` on these is highest are kept: how soon a fit turns to noise
    differs between rewards (docs/sampler.md).

    Args:
        sampler: base model and reward; a field it may have already plays no part.
        layers: how many layers the field has of its own, which is what drawing along it costs; below them it shares those of the
            base model. Default 1, that of docs/ablations.md. 0: it shares none, and is a copy of the first reward model, which
            knows what the reward looks at; where the reward has no model of its own, of the base model.
        prompts: to draw from, `num_samples` completions each, both at least 2. How many completions it takes differs between
            rewards: docs/sampler.md measures 2,000 to 24,000.
        max_completion_length: T, in tokens.
        epochs, batch_size, learning_rate: passes over the samples, completions per step, and the peak of one cycle of AdamW.
            Defaults 2, 64 and 5e-4, those of docs/sampler.md.
        seed: of samples and batches.
        comparisons: with which the reward was not trained, for `GradientField.likelihood_weight` (`likelihood_worth`). Default
            None: it is 0.005 standard deviations of the reward, which holds text likely and costs hardly any reward.
        progress: show progress bars.

    Raises:
        ValueError: those of `VGFSampler.sample`, `likelihood_worth` and `last_layers`; all completions have the same reward, the
            weights to begin with are quantized, or there are less than 2 prompts or samples.
        FloatingPointError: the loss is not finite.
    """
    if len(prompts) < 2 or num_samples < 2:
        raise ValueError(
            "a field needs at least 2 prompts, one of which is held out, and 2 samples of each, got "
            f"{len(prompts)} prompts and num_samples={num_samples}"
        )
    # Before anything is drawn, so that what cannot be made is said at once.
    base = cast(PreTrainedModel, sampler.model.base_model)
    if layers == 0:
        own = [getattr(member, "base_model", None) for member in getattr(sampler.reward, "members", [])]
        backbone, depth = copy.deepcopy(next((model for model in own if isinstance(model, PreTrainedModel)), base)), 0
    else:
        backbone, depth = last_layers(base, layers), len(stack(base)) - layers
    if not all(weights.is_floating_point() for weights in backbone.parameters()):
        raise ValueError(
            "the weights that a field would begin with are quantized, and cannot be trained: fit it to the "
            f"{'base' if layers else 'reward'} model without quantization, and follow it with either"
        )
    field = GradientField(cast(PreTrainedModel, backbone.float().requires_grad_(True)), sampler.reward.width, depth)
    worth = 0.0 if comparisons is None else likelihood_worth(sampler, comparisons)
    budget = TransportBudget(steps=0)
    # A seed for every place: a prompt that comes again has other completions, of which most would else be copies.
    seeds = [seed * 2**40 + place for place in range(len(prompts))]
    drawn = sampler.sample(prompts, num_samples, budget, max_completion_length, seed=seeds, progress=progress).initial
    encoded = sampler.encode(prompts, max_completion_length)
    rows = [(prompt, ids) for prompt, several in zip(encoded, drawn.completion_ids, strict=True) for ids in several]
    rewards = drawn.rewards.flatten()
    spread = float(rewards.std(correction=0))
    if spread <= 1e-6 * max(1.0, float(rewards.abs().max())):
        raise ValueError(f"all {len(rows)} completions have the reward {float(rewards[0]):g}: there is no direction to learn")
    target = (rewards - rewards.mean()) / spread

    field.spread.fill_(spread)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator)
    held = order[: max(1, len(prompts) // 10)].sort().values
    places = torch.arange(len(rows)).view(len(prompts), num_samples)
    seen = places[order[len(held) :].sort().values].flatten()
    steps = epochs * -(-len(seen) // batch_size)
    checks = {max(1, round(steps * k / (4 * epochs))) for k in range(1, 4 * epochs + 1)}
    optimizer = torch.optim.AdamW(field.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    best: dict[str, Tensor] = {}
    step, best_factor = 0, 1.0
    with tqdm(total=steps, desc="gradient field", disable=not progress) as bar:
        for _ in range(epochs):
            for chosen in seen[torch.randperm(len(seen), generator=generator)].split(batch_size):
                loss = _loss(field, sampler, [rows[i] for i in chosen.tolist()], target[chosen.to(target.device)])
                if not loss.isfinite():
                    raise FloatingPointError("the loss of the gradient field is not finite: lower learning_rate")
                loss.backward()
                nn.utils.clip_grad_norm_(field.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
                step += 1
                if step in checks:
                    parts = places[held].flatten().split(batch_size)
                    said = torch.cat([_said(field, sampler, [rows[i] for i in part.tolist()]) for part in parts])
                    found, factor = _agreement(said.view(len(held), -1), drawn.rewards[held.to(said.device)] / spread)
                    # Of equal ones the last: where nothing can be told, the fit is as long as was asked for.
                    if not best or found >= field.correlation:
                        field.correlation.fill_(found)
                        best = {name: value.detach().clone() for name, value in field.state_dict().items()}
                        best_factor = factor
                    bar.set_postfix(correlation=f"{found:.2f}")
    field.load_state_dict(best)
    field.requires_grad_(False)
    # What was stopped early has not grown to its size, and what points away from the held-out rewards has none.
    field.slope.weight *= best_factor
    field.slope.bias *= best_factor
    if best_factor == 0:
        logger.warning("the gradient field has learned nothing that holds on held-out prompts: it will move no particle")
    for start in range(0, len(rows), batch_size):
        field.nats += _nats(field, sampler, rows[start : start + batch_size]) / len(rows)
    field.likelihood_weight.fill_(max(LIKELIHOOD_WEIGHT * spread, worth))
    return field


def likelihood_worth(sampler: VGFSampler, comparisons: Sequence[Comparison], batch_size: int = 64) -> float:
    """What a nat of likelihood says about which text is better, beside the reward: w of `R + w log mu`, in units of R per nat.

    A reward model errs most on texts that the base model finds unlikely, and a large budget leads there. How far it is to be
    trusted is a question to labels: of `P(chosen) = sigmoid(a (R_c - R_r) + b (log mu_c - log mu_r))` (Bradley-Terry with two
    features, by maximum likelihood) w is b / a.

    Args:
        sampler: base distribution mu and reward R.
        comparisons: (prompt, chosen, rejected) with which the reward was not trained, best of texts drawn along a field; a
            completion is what stands behind the prompt, with a space if there is one, and without its end-of-sequence token.
            Those of which the base distribution cannot say a text (`top_k`, `top_p`) do not count.
        batch_size: comparisons at once.

    Returns:
        w; 0 where unlikely texts are the better ones, and, with a warning, where the reward does not agree with the comparisons.

    Raises:
        ValueError: less than 50 comparisons that count, or those of `VGFSampler.encode`.
    """
    tokenizer = sampler.processing_class
    texts = [[tokenizer(pair[side], add_special_tokens=False)["input_ids"] for pair in comparisons] for side in (1, 2)]
    longest = max((len(ids) for side in texts for ids in side), default=0) + 1
    prompts = sampler.encode([prompt for prompt, _, _ in comparisons], longest) if comparisons else []
    parts = []
    for start in range(0, len(prompts), batch_size):
        features = []
        for side in texts:
            some = list(zip(prompts, side, strict=True))[start : start + batch_size]
            prompt_ids, prompt_mask, ids, mask, log_mu, _ = _read(sampler, [(p, [*c, tokenizer.eos_token_id]) for p, c in some])
            said = log_mu.gather(-1, ids[..., None])[..., 0].masked_fill(~mask, 0.0).sum(1)
            features.append(torch.stack([sampler.reward.score_ids(prompt_ids, prompt_mask, ids, mask), said], 1))
        parts.append((features[0] - features[1]).double().cpu().numpy())
    apart = np.concatenate(parts) if parts else np.empty((0, 2))
    apart = apart[np.isfinite(apart).all(1)]
    if len(apart) < FEWEST_COMPARISONS:
        raise ValueError(
            f"{len(apart)} comparisons count, which do not say what likelihood is worth: give at least {FEWEST_COMPARISONS}, of "
            "texts that the base distribution can say"
        )
    units = np.maximum(np.sqrt(np.square(apart).mean(0)), 1e-12)
    apart /= units
    found = minimize(
        lambda x: float(np.logaddexp(0.0, -apart @ x).mean()),
        np.zeros(2),
        jac=lambda x: -(apart.T @ expit(-apart @ x)) / len(apart),
    )
    a, b = found.x / units
    if a <= 0:
        logger.warning("the reward does not agree with the comparisons: they do not say what likelihood is worth beside it")
        return 0.0
    return max(0.0, float(b / a))


def gain(gradient: Tensor, log_mu: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """<g, E_v> [..., K] of the candidates ids [..., K], less their mean under mu: the tokens that are none stay at 0."""
    # Up to thousands of tokens a product with the whole table is faster than fetching rows of it for everyone.
    small = len(table) <= 128 * ids.shape[-1]
    slopes = (gradient @ table.T).gather(-1, ids) if small else (table[ids] @ gradient[..., None])[..., 0]
    return slopes - (log_mu.gather(-1, ids).softmax(-1) * slopes).sum(-1, keepdim=True)


@torch.no_grad()
def _nats(field: GradientField, sampler: VGFSampler, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """sum_t KL(q_t || mu_t) along completions at each of `SCALES`, summed over the completions: [len(SCALES)]."""
    prompt_ids, prompt_mask, ids, mask, log_mu, hidden = _read(sampler, rows, field.depth)
    _, gradient = field(prompt_ids, prompt_mask, ids, mask, hidden)
    candidates, events = decode.coarse(log_mu, sampler.candidates)
    padded = nn.functional.pad(gain(gradient, log_mu, candidates, sampler.reward.table), (0, 1))
    return torch.stack([(decode.kl(decode.tilted(events, scale * padded), events) * mask).sum() for scale in SCALES])


@torch.no_grad()
def _said(field: GradientField, sampler: VGFSampler, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """sum_t <g_t, e - E_mu e> [R] along completions."""
    prompt_ids, prompt_mask, ids, mask, log_mu, hidden = _read(sampler, rows, field.depth)
    _, gradient = field(prompt_ids, prompt_mask, ids, mask, hidden)
    offset = sampler.reward.embed(ids) - log_mu.exp() @ sampler.reward.table
    return ((gradient * offset).sum(-1) * mask).sum(1)


def _agreement(said: Tensor, rewards: Tensor) -> tuple[float, float]:
    """Of what a field says [B, N] with rewards [B, N] within the prompts: the correlation, and the factor, not below 0, that
    takes the one to the other by least squares. 0 and 1 where one of them does not vary."""
    said, rewards = (x.double() - x.double().mean(1, keepdim=True) for x in (said, rewards))
    both, own, theirs = ((said * rewards).sum(), said.square().sum(), rewards.square().sum())
    if own == 0 or theirs == 0:
        return 0.0, 1.0
    return float(both / (own * theirs).sqrt()), max(0.0, float(both / own))


def _loss(field: GradientField, sampler: VGFSampler, rows: Sequence[tuple[list[int], list[int]]], target: Tensor) -> Tensor:
    """Mean over tokens of (V_t + sum_{s >= t} <g_s, e_s - E_mu e> - R)^2. The reward depends on nothing but the text: where V and
    the advantages are right, nothing is left of it."""
    prompt_ids, prompt_mask, ids, mask, log_mu, hidden = _read(sampler, rows, field.depth)
    offset = sampler.reward.embed(ids) - log_mu.exp() @ sampler.reward.table
    with torch.enable_grad():
        value, gradient = field(prompt_ids, prompt_mask, ids, mask, hidden)
        advantage = (gradient * offset).sum(-1) * mask
        following = advantage.flip(1).cumsum(1).flip(1)
        return (value + following - target[:, None]).square()[mask].mean()


@torch.no_grad()
def _read(
    sampler: VGFSampler, rows: Sequence[tuple[list[int], list[int]]], depth: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Prompts and completions of the rows as ids and masks [R, P], [R, T]; log mu [R, T, V]; and the base model's states
    [R, P + T, H] behind the first `depth` layers, None at 0."""
    device = sampler.model.device
    prompt_ids, prompt_mask = left_pad([prompt for prompt, _ in rows], 0, device)
    lengths = torch.tensor([len(ids) for _, ids in rows], device=device)
    length = int(lengths.max())
    ids = torch.tensor([ids + [0] * (length - len(ids)) for _, ids in rows], device=device)
    mask = torch.arange(length, device=device) < lengths[:, None]
    prefix = decode.read_prompts(sampler.model, prompt_ids, prompt_mask, depth)
    tables = decode.read(sampler.model, prefix, ids, mask, sampler.base, depth)
    states = [states for states in (prefix.hidden, tables.hidden) if states is not None]
    return prompt_ids, prompt_mask, ids, mask, tables.log_mu, torch.cat(states, 1) if states else None
