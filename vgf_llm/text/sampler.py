"""VGFSampler: prompts -> particles -> transported -> selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from vgf_llm.flow import Trace, TransportBudget, best_of_n, transport

from . import decode
from .decode import BaseDistribution, Decoded, TokenTargets
from .loading import load_whole
from .prefix import Prefix, left_pad
from .proxy import GradientAt, evaluation_points, token_advantages
from .race import Race
from .reward import DifferentiableReward


if TYPE_CHECKING:
    from .field import GradientField

Prompt = str | list[dict[str, str]]
# Particles that a turn moves or draws under a budget in generations, where `movers` leaves it open.
PER_TURN = 2
# Replaces the gradient [R, T, D] of a flow step, given mask [R, T] and noise keys [R]: what a control experiment needs.
Direction = Callable[[Tensor, Tensor, Tensor], Tensor]
# Replaces the reward [R] of verification and selection, given for R rows the index of the prompt in the call [R], its ids and
# mask [R, P], the completion's ids and mask [R, T]: a reward without a gradient, while the flow follows that of a model of it.
Scorer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Particles:
    """All particles of B prompts, N each.

    Attributes:
        completions: [B][N] texts, special tokens left out.
        completion_ids: [B][N] token ids up to and including the end-of-sequence token.
        rewards: [B, N] through the token path.
        logprobs: [B, N] under the base distribution, nats.
        kl: [B, N] nats spent on the way here: sum_t KL(q_t || mu_t) over all accepted decodes; 0 for the initial ones.
        log_ratio: [B, N] sum_t [log q_t(y_t) - log mu_t(y_t)] over the same decodes.
    """

    completions: list[list[str]]
    completion_ids: list[list[list[int]]]
    rewards: Tensor
    logprobs: Tensor
    kl: Tensor
    log_ratio: Tensor


@dataclass(frozen=True)
class VGFOutput:
    """Result of `VGFSampler.sample` for B prompts.

    Attributes:
        completions: [B] selected texts, one per prompt.
        completion_ids: [B] their token ids.
        rewards: [B] their rewards.
        initial: the particles as they were drawn: from the base model, or moved already where a gradient field moved them.
        transported: the particles after all rounds (an unmoved particle is its own result).
        selected: [B] index of the selected completion among the N transported ones, or N + index among the initial ones: of the
            highest reward, along a gradient field of the highest `R + w log mu`.
        trace: one flow trace per round, [L, B, N] per field; none under a budget in generations, where every prompt moves in
            rounds of its own, nor along a gradient field, where a particle moves token by token.
        generations: [B] base-model completions decoded per prompt: tokens decoded one by one, as multiples of the mean length
            of the prompt's initial particles.
        drawn_from: q_t that every token of the initial particles was drawn from, B * N rows of `max_completion_length` positions,
            if it was to be kept and a gradient field moved them; else None. A completion says one token of q_t; the whole of it
            takes away the noise of the draw, and what is fitted to it is fitted to q: E_q sum_t KL(q_t || pi_t) = KL(q || pi).
    """

    completions: list[str]
    completion_ids: list[list[int]]
    rewards: Tensor
    initial: Particles
    transported: Particles
    selected: Tensor
    trace: list[Trace]
    generations: Tensor
    drawn_from: TokenTargets | None


@dataclass
class _Chunk:
    """What is at hand while B prompts are worked on together, on R = B * n rows."""

    prompts: list[list[int]]
    seeds: list[int]
    n: int
    length: int  # max_completion_length
    scorer: Scorer | None
    prompt_ids: Tensor  # [R, P]
    prompt_mask: Tensor  # [R, P]
    keys: Tensor  # [R]
    index: Tensor  # [R] of the prompt in the call
    prefix: Prefix  # R rows, of the base model
    field_prefix: Prefix | None  # R rows
    state: Decoded  # the particles as they stand
    drawn_from: TokenTargets | None  # the particles as they were drawn
    generations: Tensor  # [B] completions decoded so far
    mean_length: Tensor  # [B] of the initial particles
    reward_prefix: Prefix | None = None  # R rows, once the reward has read them
    rewards: Tensor = field(init=False)  # [B, n] of the particles
    weight: Tensor = field(init=False)  # [B] what a nat of likelihood is worth when one moves along the reward's own gradient
    price: Tensor | float = 0.0  # the same when particles are kept and selected

    @property
    def values(self) -> Tensor:
        """[B, n] what the particles are kept and selected by."""
        return self.value(self.rewards, self.state)

    def value(self, rewards: Tensor, decoded: Decoded) -> Tensor:
        """The same of any completions, given their rewards, in the shape of these."""
        return rewards + self.price * decoded.logprobs.view_as(rewards)


class VGFSampler:
    """Samples completions of a base model and transports them along the gradient of a reward.

    Per prompt: draw N particles; `budget.rounds` times: L flow steps on their embeddings, one decode under the resulting tilt
    with the noise that made them (`decode.redecode`), rewards of the emitted tokens, and a particle moves only if its reward
    rises, at a fair price in likelihood. Under `budget.generations` prompts take turns of their own, moves or fresh samples
    (`race.Race`). Then the best of transported and initial particles is selected: never worse than
    best-of-N under the reward, and best-of-N itself at budget zero.

    With a `gradient_field` particles need not be drawn before they move: every token is drawn under the tilt that the field gives
    its prefix (`field`), N particles in each of `budget.rounds`, and the N best stay. No completion spends more than
    `budget.kl_budget` nats, so that KL(q || mu) <= kl_budget for every prompt, and `kl` is exact. The best is that of the highest
    `R + w log mu`, w = `GradientField.likelihood_weight`.

    A prompt's result depends on the prompt, the seed and the budget, not on what else is in the call.

    Args:
        model: causal language model, or a path or hub id. It is the base distribution mu. Nothing here trains it or
            touches `requires_grad`: the trainer samples from a model whose adapters are being trained.
        reward_model: `DifferentiableReward`, or what it takes: sequence-classification model(s) or path(s).
        processing_class: tokenizer of `model`; needed where a model object is given. Default: loaded from the path.
        temperature, top_k, top_p: of the base distribution (`BaseDistribution`).
        gradient_at: where the flow takes the gradient (`proxy.evaluation_points`). Default "mixture": "path"
            foretells single tokens better, but what is decoded from "mixture" scores higher (docs/ablations.md).
        candidates: tokens per position that a tilt may favour: the base model's own top-k. Default 64: every method that
            kept text fluent restricts itself to tens or hundreds (docs/method.md).
        horizon: how many positions after the first change a tilt holds (`decode.redecode`). None: to the end, right where
            position does not matter; 0, the default: what follows a change is the base model's alone, since the gradient
            speaks about a text that no longer exists.
        movers: how many particles of a prompt, best first, every round moves (along a field: draws). Default None: all N. One
            is selected in the end, so with several rounds the decodes of poor ones are the likeliest to be spent in vain: fewer
            movers save them, and look for improvement among the best alone.
        likelihood_weight: w >= 0. A particle moves if `R + w sigma log mu` rises, the log density of mu exp(R / alpha) times
            alpha = w sigma. sigma, the standard deviation of the prompt's initial rewards, makes w independent of their scale.
            0: if the reward rises, however unlikely the text becomes. Selection is by the reward alone. Default 0.02: on the
            embedded data the flow then reaches best-of-64's reward at no lower likelihood (docs/method.md). A field has a weight
            of its own, which selects.
        flow_batch_size: completions in memory at once. Default 32.
        chat_template_kwargs: passed to the chat template with every prompt of messages, such as `{"enable_thinking": False}`.
        gradient_field: a learned gradient (`vgf_llm.text.field.fit_field`) to follow instead of the reward's own: a layer
            more per token instead of gradients. It counts in what is written after a token. `gradient_at`, `horizon`,
            `likelihood_weight` and the steps of a budget (but for 0) play no part.

    Raises:
        ValueError: no tokenizer for a model object, no padding or end-of-sequence token, another vocabulary in the reward
            model, a field of another reward, or an argument out of range.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_model: DifferentiableReward | str | Path | PreTrainedModel | Sequence[str | Path | PreTrainedModel],
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        gradient_at: GradientAt = "mixture",
        candidates: int = 64,
        horizon: int | None = 0,
        movers: int | None = None,
        likelihood_weight: float = 0.02,
        flow_batch_size: int = 32,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        gradient_field: GradientField | None = None,
    ) -> None:
        if isinstance(model, (str, Path)):
            processing_class = processing_class or AutoTokenizer.from_pretrained(str(model))
            model = cast(PreTrainedModel, load_whole(AutoModelForCausalLM, str(model)))
        if processing_class is None:
            raise ValueError("give processing_class, the tokenizer of the model, where model is an object and not a path")
        if processing_class.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token: set one, e.g. `tokenizer.pad_token = tokenizer.eos_token`")
        for name, value, lowest in (
            ("candidates", candidates, 1), ("flow_batch_size", flow_batch_size, 1), ("movers", movers, 1),
            ("horizon", horizon, 0), ("likelihood_weight", likelihood_weight, 0),
        ):  # fmt: skip
            if value is not None and not value >= lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        self.model = model.eval()
        self.processing_class = processing_class
        if not isinstance(reward_model, DifferentiableReward):
            reward_model = DifferentiableReward(reward_model, processing_class)
        self.reward = reward_model.to(self.model.device)
        self.base = BaseDistribution(temperature, top_k, top_p, vocab_size=len(processing_class))
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < len(processing_class):
            raise ValueError(
                f"the model writes {rows} tokens, but its tokenizer has {len(processing_class)}: this is the tokenizer of "
                "another model"
            )
        if gradient_field is not None and gradient_field.width != self.reward.width:
            raise ValueError(
                f"gradient_field gives gradients of {gradient_field.width} numbers, but the particles of this reward have "
                f"{self.reward.width}: fit it to this reward (vgf_llm.text.field.fit_field)"
            )
        if gradient_field is not None:
            known = gradient_field.backbone.config.get_text_config().vocab_size
            if known < len(processing_class):
                raise ValueError(
                    f"gradient_field reads {known} tokens, but the tokenizer has {len(processing_class)}: it was fitted to "
                    "another base model"
                )
            layers, hidden = (getattr(model.config.get_text_config(), name) for name in ("num_hidden_layers", "hidden_size"))
            reads = gradient_field.backbone.config.get_text_config().hidden_size
            if gradient_field.depth and (gradient_field.depth >= layers or reads != hidden):
                raise ValueError(
                    f"gradient_field reads the states behind {gradient_field.depth} layers, {reads} numbers each, but the model "
                    f"has {layers} layers of {hidden}: it was fitted to another base model"
                )
        self.field = None if gradient_field is None else gradient_field.to(self.model.device).eval()
        self.gradient_at = gradient_at
        self.candidates = candidates
        self.horizon = horizon
        self.movers = movers
        self.likelihood_weight = likelihood_weight
        self.flow_batch_size = flow_batch_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.eos_ids = _eos_ids(model, processing_class)

    def sample(
        self,
        prompts: Sequence[Prompt],
        num_particles: int = 8,
        budget: TransportBudget | None = None,
        max_completion_length: int = 64,
        seed: int | Sequence[int] = 0,
        *,
        initial: Sequence[Sequence[Sequence[int]]] | None = None,
        verify: bool = True,
        direction: Direction | None = None,
        scorer: Scorer | None = None,
        dense: bool = False,
        progress: bool = False,
    ) -> VGFOutput:
        """Sample, transport, verify and select.

        Args:
            prompts: strings in final form, or lists of chat messages (the chat template adds the generation prompt).
            num_particles: N.
            budget: how far particles may move; default `TransportBudget()`. `kl_budget` is what one decode may spend. Under
                `generations` the initial particles are the base model's, whatever moves the others.
            max_completion_length: T, in tokens.
            seed: of the noise, one for all prompts or one per prompt: equal prompts with equal seeds get equal particles.
            initial: [B][N] token ids of completions that another engine drew from the base distribution, taken for the initial
                particles instead of drawing them. Each ends with its end-of-sequence token, or is as long as T and has none. The
                base model reads them once, for their log-probabilities; everything else is as if it had drawn them. A gradient
                field draws its particles beside them.
            verify: a particle moves only if its reward rises (see `likelihood_weight`), and the initial particles stay in the
                selection. False gives the raw population the flow made, for controls and diagnostics.
            direction: replaces the gradient in a control experiment (`vgf_llm.evaluation.controls`).
            scorer: the reward that verifies and selects, where it is another than the one whose gradient the flow follows.
            dense: keep what every token was drawn from, and not the token alone (`VGFOutput.drawn_from`).
            progress: show a progress bar over chunks of prompts.

        Raises:
            ValueError: no prompt, N < 1, another number of seeds than of prompts, a prompt that does not fit the context, a
                reward that is not finite, or completions in `initial` that the base distribution cannot have said.
        """
        budget = TransportBudget() if budget is None else budget
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
        prompt_ids = self.encode(prompts, max_completion_length)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompt_ids)
        if len(seeds) != len(prompt_ids):
            raise ValueError(f"seed must be one number or one per prompt, got {len(seeds)} for {len(prompt_ids)} prompts")
        if initial is not None:
            self._check_initial(initial, len(prompt_ids), num_particles, max_completion_length)
        per_chunk = max(1, self.flow_batch_size // num_particles)
        chunks = [slice(i, i + per_chunk) for i in range(0, len(prompt_ids), per_chunk)]
        parts = [
            self._sample_chunk(
                prompt_ids[chunk],
                num_particles,
                budget,
                max_completion_length,
                seeds[chunk],
                None if initial is None else initial[chunk],
                verify,
                direction,
                scorer,
                dense,
                chunk.start,
            )
            for chunk in tqdm(chunks, desc="prompts", disable=not progress)
        ]
        return parts[0] if len(parts) == 1 else _join(parts)

    @torch.no_grad()
    def _sample_chunk(
        self,
        prompts: list[list[int]],
        n: int,
        budget: TransportBudget,
        length: int,
        seeds: list[int],
        initial: Sequence[Sequence[Sequence[int]]] | None,
        verify: bool,
        direction: Direction | None,
        scorer: Scorer | None,
        dense: bool,
        start: int,
    ) -> VGFOutput:
        """One chunk of B prompts, on R = B * N rows. `start`: index of its first prompt in the call."""
        # Under a field particles move while they are drawn; given ones, and those a race compares with, are the base model's.
        steered = self.field is not None and not budget.is_zero
        at_once = steered and initial is None and budget.generations is None
        moves = budget if at_once else None
        chunk = self._draw_chunk(prompts, n, length, seeds, initial, scorer, start, moves, direction, dense and at_once)
        if self.field is not None and steered:
            chunk.price = self.field.likelihood_weight
        drawn, rewards, values = chunk.state, chunk.rewards, chunk.values
        traces: list[Trace] = []
        rounds = 0 if budget.is_zero else budget.rounds
        movers = n if self.movers is None else min(self.movers, n)
        if budget.generations is None:
            everyone = torch.arange(len(prompts), device=rewards.device)
            for index in range(rounds):
                if not steered:
                    traces.append(self._move(chunk, everyone, movers, index, budget, verify, direction)[0])
                elif index >= at_once:
                    before = [n * at_once + movers * (index - at_once)] * len(prompts)
                    self._draw(chunk, everyone, movers, before, budget, direction)
        else:
            race = Race(values, budget.generations, min(self.movers or PER_TURN, n))
            for index in range(rounds):
                moving, drawing = race.turns()
                if not len(moving) + len(drawing):
                    break
                if len(moving) and steered:
                    before = race.moves[moving].tolist()
                    race.moved(moving, *self._draw(chunk, moving, race.turn, before, budget, direction))
                elif len(moving):
                    _, found, spent = self._move(chunk, moving, race.turn, index, budget, verify, direction)
                    race.moved(moving, found, spent)
                if len(drawing):
                    before = [n + drawn for drawn in race.draws[drawing].tolist()]
                    race.drew(drawing, *self._draw(chunk, drawing, race.turn, before))
        state, state_rewards = chunk.state, chunk.rewards
        first, last = self._particles(drawn, rewards), self._particles(state, state_rewards)
        # A tie goes to the transported particle, so that an unmoved winner counts as its own result.
        selected = best_of_n(torch.cat([chunk.values, values], 1) if verify else chunk.values)
        texts = [(t + i)[k] for t, i, k in zip(last.completions, first.completions, selected.tolist(), strict=True)]
        tokens = [(t + i)[k] for t, i, k in zip(last.completion_ids, first.completion_ids, selected.tolist(), strict=True)]
        return VGFOutput(
            completions=texts,
            completion_ids=tokens,
            rewards=torch.cat([state_rewards, rewards], 1).gather(1, selected[:, None])[:, 0],
            initial=first,
            transported=last,
            selected=selected,
            trace=traces,
            generations=chunk.generations,
            drawn_from=chunk.drawn_from,
        )

    def _draw_chunk(
        self,
        prompts: list[list[int]],
        n: int,
        length: int,
        seeds: list[int],
        initial: Sequence[Sequence[Sequence[int]]] | None,
        scorer: Scorer | None,
        start: int,
        budget: TransportBudget | None,
        direction: Direction | None,
        dense: bool,
    ) -> _Chunk:
        """Read the prompts and draw their particles, moved within a budget if there is one, or take those given."""
        device = self.model.device
        ids, mask = left_pad(prompts, self.processing_class.pad_token_id, device)
        every = torch.arange(len(prompts), device=device).repeat_interleave(n)
        prefix = decode.read_prompts(self.model, ids, mask, 0 if self.field is None else self.field.depth).deal(every)
        field_prefix = None if self.field is None else self.field.read(ids, mask, prefix.hidden).deal(every)
        keys = torch.cat([decode.row_keys(s, [p], n) for s, p in zip(seeds, prompts, strict=True)]).to(device)
        drawn_from = None
        if dense:
            k = min(self.candidates, len(self.processing_class))
            # Beyond the end of a completion, too, candidates are distinct and numbers finite.
            log_q = torch.zeros(len(every), length, k + 1, device=device)
            drawn_from = TokenTargets(
                torch.arange(k, device=device).repeat(*log_q.shape[:2], 1), log_q, log_q.new_zeros(log_q.shape[:2])
            )
        if initial is None:
            drawn = decode.sample(
                self.model, prefix, keys, base=self.base, max_new_tokens=length, eos_ids=self.eos_ids, pad_id=self._pad,
                steering=self._steering(field_prefix, keys, budget, direction), drawn_from=drawn_from,
            )  # fmt: skip
        else:
            drawn = self._read_initial(initial, prefix, length, start)
        chunk = _Chunk(
            prompts, seeds, n, length, scorer, ids[every], mask[every], keys, start + every, prefix, field_prefix, drawn,
            drawn_from, torch.full((len(prompts),), float(n), device=device), drawn.mask.sum(1).view(-1, n).float().mean(1),
        )  # fmt: skip
        chunk.rewards = self._score(chunk, torch.arange(len(every), device=device), drawn).view(-1, n)
        # Biased, so that a single particle has a spread of 0 and is judged by its reward alone.
        chunk.weight = self.likelihood_weight * chunk.rewards.std(1, correction=0)
        return chunk

    def _check_initial(self, initial: Sequence[Sequence[Sequence[int]]], prompts: int, n: int, length: int) -> None:
        counts = [len(row) for row in initial]
        if counts != [n] * prompts:
            raise ValueError(
                f"initial must hold {n} completions (num_particles) for each of {prompts} prompts, got {counts} completions for "
                f"{len(counts)} prompts"
            )
        ends, vocabulary = set(self.eos_ids.tolist()), len(self.processing_class)
        for b, row in enumerate(initial):
            for i, completion in enumerate(row):
                place = f"initial[{b}][{i}]"
                if not 1 <= len(completion) <= length:
                    raise ValueError(f"{place} has {len(completion)} tokens; it must have 1 to {length} (max_completion_length)")
                foreign = [token for token in completion if not 0 <= token < vocabulary]
                if foreign:
                    raise ValueError(f"{place} has the token {foreign[0]}, but the tokenizer has {vocabulary} tokens")
                if any(token in ends for token in completion[:-1]):
                    raise ValueError(f"{place} goes on after an end-of-sequence token")
                if len(completion) < length and completion[-1] not in ends:
                    raise ValueError(
                        f"{place} ends after {len(completion)} of {length} tokens without an end-of-sequence token "
                        f"({sorted(ends)}): leave that token in, and let what drew it stop nowhere else"
                    )

    def _read_initial(self, initial: Sequence[Sequence[Sequence[int]]], prefix: Prefix, length: int, start: int) -> Decoded:
        """Given completions [B][N] as if they had been drawn here: R rows. `start`: index of their first prompt in the call."""
        rows = [list(completion) for row in initial for completion in row]
        device = self.model.device
        ids = torch.tensor([row + [self._pad] * (length - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(length, device=device) < lengths[:, None]
        longest = int(lengths.max())
        log_mu = decode.read(self.model, prefix, ids[:, :longest], mask[:, :longest], self.base).log_mu
        said = log_mu.gather(-1, ids[:, :longest, None])[..., 0].masked_fill(~mask[:, :longest], 0.0)
        if (said == -torch.inf).any():
            r, t = (said == -torch.inf).nonzero()[0].tolist()
            n = len(initial[0])
            raise ValueError(
                f"initial[{start + r // n}][{r % n}] has the token {rows[r][t]} at position {t}, which the base distribution "
                f"never says there (top_k={self.base.top_k}, top_p={self.base.top_p}): give completions that were drawn from it"
            )
        zeros = torch.zeros_like(said[:, 0])
        return Decoded(ids, mask, said.sum(1), zeros, zeros, lengths)

    def _move(
        self,
        chunk: _Chunk,
        who: Tensor,
        movers: int,
        index: int,
        budget: TransportBudget,
        verify: bool,
        direction: Direction | None,
    ) -> tuple[Trace, Tensor, Tensor]:
        """Move the best particles of the prompts `who` [B']. Returns also the rewards they moved to [B', movers], taken or not,
        nan where nothing changed, and what it cost [B'] in completions."""
        n, rewards = chunk.n, chunk.rewards.flatten()
        # The best by reward, in the order of their index, so that moving all is moving each in its place.
        best = chunk.rewards[who].argsort(dim=1, descending=True, stable=True)[:, :movers].sort(1).values
        rows = (best + n * who[:, None]).flatten()
        old, old_rewards = chunk.state.take(rows), rewards[rows]
        keys = decode.round_keys(chunk.keys[rows], index)
        moved, trace = self._round(chunk, rows, old, keys, budget, direction, (len(who), movers))
        moved_rewards = self._score(chunk, rows, moved)
        changed = (moved.ids != old.ids).any(1)
        gain = moved_rewards - old_rewards
        price = chunk.weight[rows // n] * (old.logprobs - moved.logprobs)
        take = changed & (gain > price) if verify else changed
        chunk.state = chunk.state.put(rows, old.moved(moved, take))
        chunk.rewards = rewards.index_copy(0, rows, torch.where(take, moved_rewards, old_rewards)).view(-1, n)
        spent = moved.new_tokens.view(-1, movers).sum(1) / chunk.mean_length[who]
        chunk.generations[who] += spent
        return trace, torch.where(changed, moved_rewards, torch.nan).view(-1, movers), spent

    def _draw(
        self,
        chunk: _Chunk,
        who: Tensor,
        count: int,
        before: list[int],
        budget: TransportBudget | None = None,
        direction: Direction | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw `count` more particles for the prompts `who` [B'], from the base model, or moved within a budget along the field.
        Returns what they are kept by [B', count] (`_Chunk.values`) and what they cost [B'].

        They are those that a larger N would have begun with, behind the first `before` [B'].
        """
        rows = who.repeat_interleave(count) * chunk.n
        several = [
            decode.row_keys(chunk.seeds[b], [chunk.prompts[b]], count, index)
            for b, index in zip(who.tolist(), before, strict=True)
        ]
        keys, field_prefix = torch.cat(several).to(rows.device), chunk.field_prefix
        if budget is not None and budget.generations is not None:
            keys = decode.round_keys(keys, 0)  # moved and plain samples of one prompt must not share their noise
        drawn = decode.sample(
            self.model, chunk.prefix.deal(rows), keys, base=self.base, max_new_tokens=chunk.length, eos_ids=self.eos_ids,
            pad_id=self._pad, steering=self._steering(field_prefix and field_prefix.deal(rows), keys, budget, direction),
        )  # fmt: skip
        rewards = self._score(chunk, rows, drawn).view(-1, count)
        values = chunk.value(rewards, drawn)
        # One after the other: a sample takes the place of the worst particle, if it is better.
        n = chunk.n
        for column in range(count):
            worst = chunk.values[who].min(1)
            place, better = who * n + worst.indices, (values[:, column] > worst.values).nonzero()[:, 0]
            chunk.state = chunk.state.put(place[better], drawn.take(better * count + column))
            chunk.rewards = chunk.rewards.flatten().index_copy(0, place[better], rewards[better, column]).view(-1, n)
        spent = drawn.new_tokens.view(-1, count).sum(1) / chunk.mean_length[who]
        chunk.generations[who] += spent
        return values, spent

    def _steering(
        self, prefix: Prefix | None, keys: Tensor, budget: TransportBudget | None, direction: Direction | None
    ) -> decode.Steering | None:
        """How rows with noise keys [R] move while they are drawn; without a field or a budget they do not."""
        if self.field is None or prefix is None or budget is None:
            return None

        def another(gradient: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
            assert direction is not None
            mask = torch.ones_like(positions, dtype=torch.bool)
            return direction(gradient, mask, decode.round_keys(keys[rows], positions[:, 0]))

        replaced = another if direction is not None else None
        return self.field.steering(prefix, self.reward.table, budget.kl_budget, self.candidates, replaced)

    def _round(
        self,
        chunk: _Chunk,
        rows: Tensor,
        state: Decoded,
        keys: Tensor,
        budget: TransportBudget,
        direction: Direction | None,
        shape: tuple[int, int],
    ) -> tuple[Decoded, Trace]:
        """Flow on the embeddings of completions of the given rows, then one decode under the tilt they give."""
        length = int(state.mask.sum(1).max())
        ids, mask = state.ids[:, :length], state.mask[:, :length]
        tables = decode.read(self.model, chunk.prefix.deal(rows), ids, mask, self.base)
        prompt_ids, prompt_mask = chunk.prompt_ids[rows], chunk.prompt_mask[rows]
        prefix = self._reward_prefix(chunk).deal(rows).spread(length)
        tokens, table = self.reward.embed(ids), self.reward.table
        moves = mask & ~torch.isin(ids, self.eos_ids)
        mixture = tables.log_mu.exp() @ table

        def score_fn(particles: Tensor, step: int) -> tuple[Tensor, Tensor]:
            points = evaluation_points(particles.flatten(0, 1), tokens, mixture, moves, self.gradient_at, step, budget.steps)
            values, gradient = self.reward.value_and_grad(prompt_ids, prompt_mask, points, mask, prefix)
            if direction is not None:
                gradient = direction(gradient, moves, decode.round_keys(keys, step))
            return values.view(shape), gradient.view(particles.shape)

        start = tokens.view(*shape, *tokens.shape[1:])
        flowed = transport(start, score_fn, budget, mask=moves.view(*shape, -1))
        displacement = (flowed.particles - start).flatten(0, 1)
        advantage = token_advantages(displacement, tables.log_mu, table, moves, self._neutral)
        candidates, coarse = decode.coarse(tables.log_mu, self.candidates)
        gain = advantage.gather(-1, candidates)
        scale = decode.solve_scale(coarse, torch.nn.functional.pad(gain, (0, 1)), moves, budget.kl_budget)
        tilt = decode.Tilt(candidates, scale[:, None, None] * gain)
        moved = decode.redecode(
            self.model, state.ids, state.mask, tables, tilt, keys,
            base=self.base, eos_ids=self.eos_ids, pad_id=self._pad, horizon=self.horizon,
        )  # fmt: skip
        return moved, flowed.trace

    def _reward_prefix(self, chunk: _Chunk) -> Prefix:
        """Read when it is first asked for: particles that move while they are drawn, under a scorer, never need it."""
        if chunk.reward_prefix is None:
            every = torch.arange(len(chunk.prompts), device=chunk.keys.device).repeat_interleave(chunk.n)
            chunk.reward_prefix = self.reward.read(chunk.prompt_ids[:: chunk.n], chunk.prompt_mask[:: chunk.n]).deal(every)
        return chunk.reward_prefix

    @property
    def _pad(self) -> int:
        return self.processing_class.pad_token_id

    @property
    def _neutral(self) -> Tensor:
        return torch.cat([self.eos_ids, self.eos_ids.new_tensor([self._pad])])

    def encode(self, prompts: Sequence[Prompt], max_completion_length: int) -> list[list[int]]:
        """Token ids of each prompt, as `sample` reads it; its errors are those of `sample`."""
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError("prompts must be a non-empty list of strings or of lists of chat messages")
        if max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {max_completion_length}")
        context = getattr(self.model.config, "max_position_embeddings", None)
        encoded = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                ids = self.processing_class(prompt)["input_ids"]
            else:
                chat = self.processing_class.apply_chat_template(
                    prompt, add_generation_prompt=True, return_dict=True, **self.chat_template_kwargs
                )
                ids = cast(BatchEncoding, chat)["input_ids"]
            if not ids:
                raise ValueError(f"prompt {index} has no tokens: the base model needs at least one to start from")
            if context is not None and len(ids) + max_completion_length > context:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens; with max_completion_length={max_completion_length} it does not "
                    f"fit the context of {context}: shorten the prompt or lower max_completion_length"
                )
            encoded.append(list(ids))
        return encoded

    def _score(self, chunk: _Chunk, rows: Tensor, decoded: Decoded) -> Tensor:
        """Rewards of completions, one for each of the given rows."""
        if decoded.logprobs.isnan().any():
            row = int(decoded.logprobs.isnan().nonzero()[0])
            raise ValueError(
                f"the base model's logits are not finite: check its weights and dtype; the completion was "
                f"{self._text(decoded.ids[row], decoded.mask[row])!r}"
            )
        length = int(decoded.mask.sum(1).max())
        ids, mask = decoded.ids[:, :length], decoded.mask[:, :length]
        prompt_ids, prompt_mask = chunk.prompt_ids[rows], chunk.prompt_mask[rows]
        if chunk.scorer is None:
            rewards = self.reward.score_ids(prompt_ids, prompt_mask, ids, mask, self._reward_prefix(chunk).deal(rows))
        else:
            rewards = chunk.scorer(chunk.index[rows], prompt_ids, prompt_mask, ids, mask)
        if not rewards.isfinite().all():
            row = int((~rewards.isfinite()).nonzero()[0])
            text = self._text(decoded.ids[row], decoded.mask[row])
            raise ValueError(
                f"the reward of a completion is {rewards[row].item()}: check the reward model (dtype overflow, broken "
                f"weights); the completion was {text!r}"
            )
        return rewards

    def _text(self, ids: Tensor, mask: Tensor) -> str:
        return cast(str, self.processing_class.decode(ids[mask], skip_special_tokens=True))

    def _particles(self, decoded: Decoded, rewards: Tensor) -> Particles:
        b, n = rewards.shape
        texts = [self._text(i, m) for i, m in zip(decoded.ids, decoded.mask, strict=True)]
        ids = [i[m].tolist() for i, m in zip(decoded.ids, decoded.mask, strict=True)]
        grid = [range(row * n, row * n + n) for row in range(b)]
        return Particles(
            completions=[[texts[i] for i in row] for row in grid],
            completion_ids=[[ids[i] for i in row] for row in grid],
            rewards=rewards,
            logprobs=decoded.logprobs.view(b, n),
            kl=decoded.kl.view(b, n),
            log_ratio=decoded.log_ratio.view(b, n),
        )


def _join(parts: list[VGFOutput]) -> VGFOutput:
    """The outputs of several chunks of prompts as one."""

    def particles(several: list[Particles]) -> Particles:
        return Particles(
            completions=[row for p in several for row in p.completions],
            completion_ids=[row for p in several for row in p.completion_ids],
            **{name: torch.cat([getattr(p, name) for p in several]) for name in ("rewards", "logprobs", "kl", "log_ratio")},
        )

    def trace(several: tuple[Trace, ...]) -> Trace:
        return Trace(
            *(torch.cat([getattr(t, f.name) for t in several], 1) for f in fields(Trace)),
        )

    kept = [p.drawn_from for p in parts if p.drawn_from is not None]
    return VGFOutput(
        completions=[c for p in parts for c in p.completions],
        completion_ids=[c for p in parts for c in p.completion_ids],
        rewards=torch.cat([p.rewards for p in parts]),
        initial=particles([p.initial for p in parts]),
        transported=particles([p.transported for p in parts]),
        selected=torch.cat([p.selected for p in parts]),
        trace=[trace(rounds) for rounds in zip(*(p.trace for p in parts), strict=True)],
        generations=torch.cat([p.generations for p in parts]),
        drawn_from=TokenTargets(*(torch.cat([getattr(t, f.name) for t in kept]) for f in fields(TokenTargets))) if kept else None,
    )


def _eos_ids(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> Tensor:
    """All ids that end a completion: those of the generation config and that of the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = configured if isinstance(configured, list) else [configured]
    ids = sorted({i for i in [*several, processing_class.eos_token_id] if i is not None})
    if not ids:
        raise ValueError("neither the model nor the tokenizer names an end-of-sequence token: set tokenizer.eos_token")
    return torch.tensor(ids, device=model.device)
