"""What a row of a report is made of: diversity, fluency under a judge, KL from both sides, intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from sacrebleu.metrics import BLEU
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vgf_llm.flow import best_of_n_kl


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams as a share of all n-grams of the corpus, over tokens separated by white space; in (0, 1].

    It falls as a corpus grows, so compare corpora of equal size only. 0.0 where no text is n tokens long.

    Raises:
        ValueError: n < 1.
        TypeError: texts is one string.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, got one string")
    total, seen = 0, set()
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0


def self_bleu(texts: Sequence[str], limit: int = 64) -> float:
    """Mean BLEU of every text against all others, in [0, 100]: how much texts repeat each other (Zhu et al. 2018, Texygen).

    Sentence BLEU of sacrebleu with its tokeniser and effective order. 0.0 with fewer than two texts.

    Args:
        texts: of one method, over all prompts. It rises with their number, so compare equal numbers only.
        limit: only the first so many, since the cost grows with their square.
    """
    texts = [text for text in texts[:limit] if text.strip()]
    if len(texts) < 2:
        return 0.0
    bleu = BLEU(effective_order=True)
    return float(np.mean([bleu.sentence_score(t, [*texts[:i], *texts[i + 1 :]]).score for i, t in enumerate(texts)]))


def length_slope(lengths: ArrayLike, values: ArrayLike) -> float:
    """Least-squares slope of values on lengths, both [P, M], within prompts: what one more token is worth by itself.

    Each prompt's means are taken out first, so that prompts which ask for long answers do not count as a liking for length. 0.0
    where no lengths differ.
    """
    x, y = (np.asarray(a, dtype=np.float64) for a in (lengths, values))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    spread = float((x * x).sum())
    return float((x * y).sum()) / spread if spread else 0.0


def bootstrap_ci(values_by_prompt: ArrayLike, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling prompts.

    Args:
        values_by_prompt: [P] one value per prompt, averaged over its seeds and completions beforehand: those are not
            independent, so prompts are the unit.
        seed: of the resampling. The same seed and P give the same resamples.
        resamples: how many.
        level: coverage, in (0, 1).

    Returns:
        (low, high) in the unit of the values. With one prompt both are its value: nothing is known about the spread.

    Raises:
        ValueError: no value, more than one dimension, a value that is not finite, or an argument out of range.
    """
    values = _by_prompt(values_by_prompt, "values_by_prompt")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level!r}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In pieces of at most about a million numbers.
    step = max(1, 2**20 // len(values))
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        means[first : first + count] = values[rng.integers(len(values), size=(count, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap_ci(
    a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Interval of mean(a) - mean(b) over the same prompts, [P] each in the same order; otherwise as `bootstrap_ci`.

    What prompts have in common (a hard one is hard for both) drops out, so it is narrower than two intervals compared.

    Raises:
        ValueError: as `bootstrap_ci`, or the lengths differ.
    """
    first, second = _by_prompt(a, "a"), _by_prompt(b, "b")
    if len(first) != len(second):
        raise ValueError(f"a and b must be over the same prompts, got {len(first)} and {len(second)} values")
    return bootstrap_ci(first - second, seed, resamples, level)


def _by_prompt(values: ArrayLike, name: str) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} must be one value per prompt, [P] with P >= 1, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


@torch.no_grad()
def judge_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int = 256,
) -> Tensor:
    """`-log p(completion | prompt)` under a judge model, summed over the tokens of the completion.

    The judge is read at temperature 1 over its full vocabulary, whatever the completions were sampled with, and is put
    into evaluation mode for the time of the call.

    Args:
        model: causal language model, best one that wrote none of the completions.
        tokenizer: of the judge. `completion_ids` have to be its tokens.
        prompts: [R] strings in final form, or their token ids.
        completion_ids: [R] lists of tokens, with the end-of-sequence token where it was said. An empty one costs 0.
        batch_size: rows in memory at once.

    Returns:
        [R] float64 on the CPU, in nats. Divide by `len(completion_ids[r])` for nats per token.

    Raises:
        ValueError: the lengths differ, batch_size < 1, a prompt without tokens (and the tokenizer has no
            beginning-of-sequence token), a token outside the judge's vocabulary, or a row longer than its context.
    """
    if isinstance(prompts, str) or len(prompts) != len(completion_ids):
        raise ValueError(
            f"judge_nll needs one prompt per completion, got {len(prompts)} and {len(completion_ids)}; repeat a "
            "prompt that has several completions"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encoded = {prompt: _encode(tokenizer, prompt) for prompt in dict.fromkeys(p for p in prompts if isinstance(p, str))}
    rows = [
        (encoded[prompt] if isinstance(prompt, str) else list(prompt), list(ids))
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]
    vocab = model.get_output_embeddings().weight.shape[0]
    context = getattr(model.config, "max_position_embeddings", None)
    for index, (prompt, ids) in enumerate(rows):
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"completion {index} holds a token outside the {vocab} of the judge: another tokenizer's ids")
        if context is not None and len(prompt) + len(ids) > context:
            raise ValueError(f"row {index} has {len(prompt) + len(ids)} tokens, the judge's context holds {context}")
    total = torch.zeros(len(rows), dtype=torch.float64)
    # Rows of like length together, so that little is padding.
    order = sorted((r for r in range(len(rows)) if rows[r][1]), key=lambda r: (len(rows[r][1]), len(rows[r][0])))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            total[batch] = _nll([rows[r] for r in batch], model)
    finally:
        model.train(was_training)
    return total


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ValueError("a prompt has no tokens, so nothing gives the first token of its completion a probability")
    return ids


def _nll(rows: list[tuple[list[int], list[int]]], model: PreTrainedModel) -> Tensor:
    """[R] float64 of rows (prompt, completion): prompts end and completions begin in the same column."""
    before, after = (max(len(row[side]) for row in rows) for side in (0, 1))
    ids = torch.zeros(len(rows), before + after, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for r, (prompt, completion) in enumerate(rows):
        start, end = before - len(prompt), before + len(completion)
        ids[r, start:end] = torch.tensor(prompt + completion)
        mask[r, start:end] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        use_cache=False,
        logits_to_keep=after + 1,
    ).logits[:, -after - 1 : -1]
    said = logits.float().log_softmax(-1).gather(-1, ids[:, before:, None])[..., 0]
    return -said.masked_fill(mask[:, before:] == 0, 0.0).double().sum(1).cpu()


def equal_kl_n(nats: float, most: int) -> int:
    """The n of best-of-n that is allowed so many nats: the smallest whose bound on KL is not below them, `most` at the most."""
    return next((n for n in range(1, most) if best_of_n_kl(n) >= nats), most)


def selection_kl(kl_selected: ArrayLike, candidates: int) -> float:
    """An account of KL(output || base), in nats per completion: moving the particles, plus choosing among them.

    `E_selected[log q(y | y0) - log mu(y)] + log M - (M - 1) / M`: the selection costs at most what best-of-M costs,
    and by the chain rule the pair (first particle, moved particle) costs at least as much as what is returned of it.
    This bounds the KL from above only if the noise of a decode is independent of its tilt. Hindsight noise, with which
    `VGFSampler` decodes, is not: the tilt follows from the particle that the noise is inferred from. There the number
    is an account and no bound (docs/method.md, "How nats are counted").

    Args:
        kl_selected: [P] nats spent on the way to the selected completion of each prompt, 0 where an initial particle
            was selected. `Particles.log_ratio` of the selected gives the formula itself. `Particles.kl`, the KL of
            the tilts along the path, has less noise, but does not see that selection may prefer unlikely moves.
        candidates: M, how many completions were chosen among: N where only transported particles are (verify=False),
            2 N where the initial ones stay in the selection. A verified population leaves out what rejected moves
            cost: read the number with `reward_quantile_kl` beside it.

    Raises:
        ValueError: no value, a value that is not finite, or candidates < 1.
    """
    return float(_by_prompt(kl_selected, "kl_selected").mean()) + best_of_n_kl(candidates)


def reward_quantile_kl(selected_reward: ArrayLike, pool_rewards: ArrayLike, seed: int = 0) -> float:
    """Lower bound on the mean over prompts of KL(output || base), in nats, from rewards alone.

    Where a completion ranks by reward in a pool of base samples is a random function of the completion, so it can only
    lose KL (data processing), as does pooling prompts (convexity). Had the base model written the completion, its rank
    among the M + 1 would be uniform whatever the reward. What is estimated is the KL of the ranks from uniform, by
    their m-spacings, `m = round(sqrt(P))`, without the bias they have where the ranks are uniform. Spacings
    smooth, which errs downwards.

    It cannot exceed log(M + 1), and sees only what the reward sees. An estimate from P prompts: its standard error is
    about `1 / sqrt(P)` nats for best-of-n.

    Args:
        selected_reward: [P] reward of the completion returned for each prompt. Of the reward that selected (the proxy)
            the bound is tightest; any other is as valid.
        pool_rewards: [P, M] the same reward of base samples drawn independently of the selected completion.
        seed: of the order among equal rewards, drawn at random.

    Returns:
        Nats, at least 0.

    Raises:
        ValueError: fewer than 8 prompts, shapes that do not fit, or a reward that is nan.
    """
    if isinstance(pool_rewards, Tensor):
        pool_rewards = pool_rewards.detach().cpu().numpy()
    pool = np.asarray(pool_rewards, dtype=np.float64)
    selected = _by_prompt(selected_reward, "selected_reward")
    P = len(selected)
    if pool.ndim != 2 or pool.shape[0] != P or pool.shape[1] < 1:
        raise ValueError(f"pool_rewards must be [P, M] with P = {P} prompts and M >= 1, got shape {pool.shape}")
    if P < 8:
        raise ValueError(f"the distribution of ranks needs at least 8 prompts, got {P}")
    if np.isnan(pool).any():
        raise ValueError("pool_rewards hold nan: ranks are not defined")
    # Not the stream a caller with the same seed has drawn rewards from: ties would follow it.
    rng = np.random.default_rng([seed, 0x71A5])
    below, equal = (pool < selected[:, None]).sum(1), (pool == selected[:, None]).sum(1)
    rank = below + rng.integers(equal + 1)
    u = np.sort((rank + rng.random(P)) / (pool.shape[1] + 1))
    m = max(1, round(math.sqrt(P)))
    edges = np.concatenate([[0.0], u, [1.0]])
    spacings = np.maximum(edges[m:] - edges[:-m], np.finfo(np.float64).tiny)
    # Of P uniform points an m-spacing is Beta(m, P + 1 - m).
    uniform = torch.digamma(torch.tensor([m, P + 1], dtype=torch.float64))
    return max(0.0, float(uniform[0] - uniform[1]) - float(np.log(spacings).mean()))
