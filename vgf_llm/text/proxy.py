"""Where the flow looks at the reward: at the tokens, at what the base model would have said, or on the way between.

A particle is the matrix of input embeddings of a completion, in the coordinates of `DifferentiableReward.embed`. The gradient
of a reward model is a better forecast of what another token would change when it is taken at the base model's *mixture*, the
mean embedding of a position under mu, than at the token that happens to stand there: the mixture lies inside the hull of the
plausible tokens (measured in docs/method.md).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


GradientAt = Literal["token", "mixture", "path"]


def evaluation_points(
    particles: Tensor,
    tokens: Tensor,
    mixture: Tensor,
    mask: Tensor,
    at: GradientAt,
    step: int,
    steps: int,
) -> Tensor:
    """Particles [R, T, D] shifted from the token embeddings towards the mixture, where the gradient of this step is taken.

    "token": not at all. "mixture": all the way. "path": a share that grows from step to step, the midpoint rule for the
    integral of the gradient along the line between them.

    tokens [R, T, D] embeddings of the completion, mixture [R, T, D] `sum_v mu_t(v) E_v`, mask [R, T].
    """
    if at == "token":
        return particles
    share = 1.0 if at == "mixture" else (step + 0.5) / steps
    return particles + torch.where(mask[..., None], share * (mixture - tokens), 0.0)


def token_advantages(displacement: Tensor, log_mu: Tensor, table: Tensor, mask: Tensor, neutral: Tensor) -> Tensor:
    """What the displacement [R, T, D] says for every token: `<D_t, E_v> - E_mu <D_t, E_v>`, [R, T, V].

    Centred by the base model, since `<D_t, E_v>` is dominated by what all embeddings share. `neutral` tokens (end of sequence,
    padding) get 0: the gradient at them is an artefact of pooling. Tokens outside the support of mu get 0 as well.
    """
    advantage = displacement @ table.T
    advantage[..., neutral] = 0.0
    probs = log_mu.exp()
    kept = (probs > 0) & mask[..., None]
    kept[..., neutral] = False
    centre = (probs * advantage).sum(-1, keepdim=True) / (probs * kept).sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.where(kept, advantage - centre, 0.0)
