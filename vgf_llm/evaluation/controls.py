"""Control experiments: what is left of a gain when the gradient loses its direction, its sign or its place.

Each function is a `Direction` of `VGFSampler.sample`: it takes the gradient [R, T, D], the mask [R, T] of positions
that move and noise keys [R], and returns what the flow uses instead, [R, T, D], zero where the mask is False. What a
row gets depends on its own gradient, mask and key alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgf_llm.text import decode


def random_direction(gradient: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """A Gaussian direction at every position, as long as the gradient there: the same step in no particular way."""
    width = gradient.shape[-1]
    pairs = (width + 1) // 2
    noise = decode.uniform(keys, decode.CONTROL, _places(mask), 2 * pairs)  # [R, T, 2 * pairs]
    # Box-Muller: a radius and an angle give two independent Gaussians.
    radius, angle = (-2 * noise[..., :pairs].log()).sqrt(), 2 * math.pi * noise[..., pairs:]
    gaussian = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :width]
    unit = gaussian / gaussian.norm(dim=-1, keepdim=True)
    return (unit * gradient.double().norm(dim=-1, keepdim=True)).to(gradient.dtype).masked_fill(~mask[..., None], 0.0)


def flip(gradient: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """Minus the gradient: it has to hurt. `keys` are not used."""
    return (-gradient).masked_fill(~mask[..., None], 0.0)


def shuffle_positions(gradient: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """The same gradient vectors at other positions: those of a row permuted at random among its True positions.

    A permutation may leave a position where it is; a row with one position stays as it is.
    """
    noise = decode.uniform(keys, decode.CONTROL, _places(mask), 1)[..., 0]  # [R, T]
    # True positions first, in random order on one side and in their own on the other.
    source = noise.masked_fill(~mask, 2.0).argsort(dim=1, stable=True)
    target = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    wide = (-1, -1, gradient.shape[-1])
    moved = torch.zeros_like(gradient).scatter(
        1, target[..., None].expand(wide), gradient.gather(1, source[..., None].expand(wide))
    )
    return moved.masked_fill(~mask[..., None], 0.0)


def _places(mask: Tensor) -> Tensor:
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
