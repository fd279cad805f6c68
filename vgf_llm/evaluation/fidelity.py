"""Is the gradient right about what one other token would do? Predicted, learned and true changes of single substitutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from vgf_llm.flow import TransportBudget, fidelity
from vgf_llm.text import VGFSampler, decode
from vgf_llm.text.proxy import GradientAt, evaluation_points


def substitution_fidelity(
    sampler: VGFSampler,
    prompts: Sequence[str],
    gold: Callable[[str, str], float] | None = None,
    *,
    max_completion_length: int,
    substitutions: int = 24,
    path_steps: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """One sample per prompt, in which `substitutions` times one token becomes another the base model could have said.

    The rest of the text is kept. Predicted is `<g_t, E_v - E_y>` with the gradient g taken at the token, at the base model's
    mixture and along the path between them (mean over `path_steps` points); the proxy and, if given, the gold reward are asked
    for the true change.

    Returns:
        `{at}_proxy` and `{at}_gold` for at in token, mixture, path: Spearman rank correlations of prediction and change.
        `proxy_gold`: that of the two changes. `{at}_sign` and `proxy_sign`: how often the sign is that of the change of gold,
        where gold changes. `substitutions`: how many there were.

    Raises:
        ValueError: those of `VGFSampler.sample`; fewer than two substitutions.
    """
    budget = TransportBudget(steps=0)
    drawn = sampler.sample(prompts, 1, budget, max_completion_length, seed=seed).initial.completion_ids
    reward, tokenizer, device = sampler.reward, sampler.processing_class, sampler.model.device
    prompt_ids, prompt_mask = _padded(sampler.encode(prompts, max_completion_length), tokenizer.pad_token_id, "left", device)
    ids, mask = _padded([row[0] for row in drawn], tokenizer.pad_token_id, "right", device)
    tables = decode.read(sampler.model, prompt_ids, prompt_mask, ids, mask, sampler.base)
    tokens, table = reward.embed(ids), reward.table
    moves = mask & ~torch.isin(ids, sampler.eos_ids)

    mixture = tables.log_mu.exp() @ table
    gradients: dict[GradientAt, Tensor] = {}
    at: GradientAt
    for at, steps in (("token", 1), ("mixture", 1), ("path", path_steps)):
        points = (evaluation_points(tokens, tokens, mixture, moves, at, step, steps) for step in range(steps))
        gradients[at] = torch.stack([reward.value_and_grad(prompt_ids, prompt_mask, p, mask)[1] for p in points]).mean(0)

    generator = torch.Generator().manual_seed(seed)
    row, place = _sites(moves, substitutions, generator)
    weights = tables.log_mu[row, place].exp().cpu()
    weights[torch.arange(len(row)), ids[row, place].cpu()] = 0.0
    weights[:, sampler.eos_ids.cpu()] = 0.0
    kept = weights.sum(1) > 1e-6
    row, place = row[kept], place[kept]
    token = torch.multinomial(weights[kept], 1, generator=generator)[:, 0].to(device)

    new = ids[row].clone()
    new[torch.arange(len(row)), place] = token
    before = reward.score_ids(prompt_ids, prompt_mask, ids, mask)
    size = sampler.flow_batch_size
    after = torch.cat(
        [
            reward.score_ids(prompt_ids[r], prompt_mask[r], n, mask[r])
            for r, n in zip(row.split(size), new.split(size), strict=True)
        ]
    )
    learned = (after - before[row]).cpu()
    step = table[token] - tokens[row, place]
    predicted = {at: (g[row, place] * step).sum(-1).cpu() for at, g in gradients.items()}
    result = {f"{at}_proxy": fidelity(p, learned) for at, p in predicted.items()}
    result["substitutions"] = float(len(row))
    if gold is not None:

        def text(tokens: Tensor) -> str:
            return cast(str, tokenizer.decode(tokens, skip_special_tokens=True))

        first = [gold(p, text(i[m])) for p, i, m in zip(prompts, ids, mask, strict=True)]
        changes = [gold(prompts[r], text(n[mask[r]])) - first[r] for r, n in zip(row.tolist(), new, strict=True)]
        true = torch.tensor(changes)
        matters = true != 0
        for name, change in (*predicted.items(), ("proxy", learned)):
            result[f"{name}_gold"] = fidelity(change, true)
            result[f"{name}_sign"] = float(((change > 0) == (true > 0))[matters].float().mean())
    return result


def _sites(moves: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row and position of `count` random tokens of every row that has any, with repetition."""
    rows = moves.any(1).nonzero()[:, 0]
    places = torch.multinomial(moves[rows].float().cpu(), count, replacement=True, generator=generator).to(moves.device)
    return rows.repeat_interleave(count), places.flatten()


def _padded(rows: Sequence[Sequence[int]], pad: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    left = side == "left"
    ids = [[pad] * (width - len(r)) + list(r) if left else list(r) + [pad] * (width - len(r)) for r in rows]
    lengths, place = torch.tensor([len(r) for r in rows]), torch.arange(width)
    mask = place >= width - lengths[:, None] if left else place < lengths[:, None]
    return torch.tensor(ids, device=device), mask.to(device)
