"""The flow: particles drawn from a reference distribution are carried along the gradient of a value.

    u <- project(cap(u + eps * phi(u))),  L times

(discrete gradient flow of KL(q || exp(R / alpha)), arXiv 2604.14265). `TransportBudget` says how far.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Normalize, TransportBudget
from .diagnostics import displacement
from .kernels import stein_direction


ScoreFn = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Trace:
    """What happened at each of the L steps, on the device of the particles.

    Attributes:
        values: [L, B, N] value before the step, in units of R.
        score_norm: [L, B, N] norm of the score before it was normalised, masked coordinates left out.
        displacement: [L, B, N] distance from the start after the step, in units of the particle space.
        bandwidth: [L, B] kernel width, nan where particles are not coupled.
    """

    values: Tensor
    score_norm: Tensor
    displacement: Tensor
    bandwidth: Tensor


@dataclass(frozen=True)
class Transported:
    """Result of `transport`.

    Attributes:
        particles: [B, N, ...] after L steps, detached.
        values: [B, N] value at these particles if a `value_fn` was given, else None.
        trace: the steps.
    """

    particles: Tensor
    values: Tensor | None
    trace: Trace


@torch.no_grad()
def transport(
    particles: Tensor,
    score_fn: ScoreFn,
    budget: TransportBudget,
    *,
    mask: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
    value_fn: Callable[[Tensor], Tensor] | None = None,
    check_finite: bool = True,
) -> Transported:
    """Carry N particles per prompt L steps along the score. Prompts never see each other.

    Args:
        particles: [B, N, ...]: B prompts or states, N particles each, any trailing shape ([T, D] embeddings, [D]
            actions). Half precision is moved and returned in float32, since a step can be smaller than its rounding.
        score_fn: `(particles, step) -> (values [B, N], score like particles)`, score = grad R. The index of the step
            lets a caller evaluate the gradient elsewhere along a path. `gradient_of` makes one from a differentiable
            value.
        budget: steps, their length, temperature, coupling, cap. `budget.is_zero` returns the particles as they came.
        mask: bool, broadcastable to leading dimensions of particles, for instance [B, N, T] or [B, N]. False never
            moves; what it holds enters no norm and no distance (kernels read 0 there), and a particle that is False
            throughout is not counted among the N.
        precondition: maps `phi` to the direction that `step_size` multiplies, once per step: a particle optimiser such as
            Adam, whose state lives as long as this flow. The bounds of `TransportBudget` are those of `phi` itself.
        project: maps particles back to where they are allowed, after every step: `lambda a: a.clamp(-1, 1)` for
            actions.
        value_fn: `particles -> values [B, N]`, called once at the end and without gradient, for
            `Transported.values`. It may differ from the value that drove the flow (a minimum over critics instead of
            their mean). Leave it out where particles are decoded first: what counts there is the value of the
            decoded text.
        check_finite: look at the trace once, after the last step. False where the host must not wait for the device, as
            while a CUDA graph is captured; then the caller looks at what comes out.

    Raises:
        ValueError: a shape does not fit, or a value, score or particle is not finite; says at which step and where.
    """
    start = particles.detach().to(torch.promote_types(particles.dtype, torch.float32))
    moves = _moves(mask, start)
    present = moves.flatten(2).any(2)
    steps = 0 if budget.is_zero else budget.steps
    B, N = present.shape
    trace = Trace(*(start.new_full(shape, torch.nan) for shape in [(steps, B, N)] * 3 + [(steps, B)]))
    u = start
    for step in range(steps):
        values, score = score_fn(u, step)
        if values.shape != (B, N) or score.shape != u.shape:
            raise ValueError(
                f"score_fn must return values {(B, N)} and a score {tuple(u.shape)}, got {tuple(values.shape)} and "
                f"{tuple(score.shape)}"
            )
        score = torch.where(moves, score.to(u.dtype), 0.0)
        trace.values[step], trace.score_norm[step] = values, _norm(score)
        phi = _normalize(score, present, budget.normalize)
        if budget.coupling == "svgd":
            visible = torch.where(moves, u, 0.0)
            phi, trace.bandwidth[step] = stein_direction(visible, phi, budget.temperature, budget.bandwidth, present)
        if precondition is not None:
            phi = precondition(phi)
        # A coupled direction points where other particles may move too; what never moves must not use up the cap.
        u = u + budget.step_size * torch.where(moves, phi, 0.0)
        if budget.max_displacement is not None:
            shrink = _wide(budget.max_displacement / displacement(start, u), u)
            u = torch.where(shrink < 1, start + (u - start) * shrink, u)
        if project is not None:
            u = project(u)
        u = torch.where(moves, u, start)
        trace.displacement[step] = displacement(start, u)
    # Once, after the loop: asking at every step would make the host wait for the device L times.
    if check_finite:
        _check_finite(trace, present)
    return Transported(particles=u, values=None if value_fn is None else value_fn(u), trace=trace)


def gradient_of(value_fn: Callable[[Tensor], Tensor]) -> ScoreFn:
    """The `score_fn` of a differentiable value `particles [B, N, ...] -> values [B, N]` in which particles do not
    interact."""

    def score_fn(particles: Tensor, step: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = particles.detach().requires_grad_()
            values = value_fn(leaf)
            # values[b, n] depends on particle (b, n) alone, so the gradient of the sum holds one gradient per
            # particle.
            (score,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), score

    return score_fn


def _moves(mask: Tensor | None, particles: Tensor) -> Tensor:
    """The mask as [B, N, ...] with as many dimensions as particles; all True without one."""
    if particles.ndim < 3:
        raise ValueError(f"particles must be [B, N, ...] with at least one trailing dimension, got {tuple(particles.shape)}")
    if mask is None:
        mask = torch.ones(particles.shape[:2], dtype=torch.bool, device=particles.device)
    leading = particles.shape[: mask.ndim]
    fits = 2 <= mask.ndim <= particles.ndim and all(m in (1, p) for m, p in zip(mask.shape, leading, strict=True))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask must be bool and broadcastable to leading dimensions of particles {tuple(particles.shape)}, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    return _wide(mask.expand(*particles.shape[:2], *mask.shape[2:]), particles)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """x with trailing dimensions of size 1, as many as it takes to broadcast from the left against `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _norm(x: Tensor) -> Tensor:
    """Norm [B, N] of each particle over all its trailing dimensions."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(2), dim=2)
    return norm


def _normalize(score: Tensor, present: Tensor, normalize: Normalize) -> Tensor:
    """The score in the scale the budget asks for; a zero score stays zero."""
    if normalize == "none":
        return score
    scale = _norm(score)
    if normalize == "prompt":
        scale = (scale.square().sum(1, keepdim=True) / present.sum(1, keepdim=True)).sqrt()
    scale = _wide(scale, score)
    return torch.where(scale > 0, score / scale, 0.0)


def _check_finite(trace: Trace, present: Tensor) -> None:
    """Raise for the first step at which something was not finite."""
    recorded = {"value": trace.values, "score": trace.score_norm, "particle after the step": trace.displacement}
    bad = torch.stack([~x.isfinite() & present for x in recorded.values()], dim=-1)  # [L, B, N, 3]
    if bad.any():
        step, prompt, particle, what = bad.nonzero()[0].tolist()
        raise ValueError(
            f"non-finite {list(recorded)[what]} at step {step}, prompt {prompt}, particle {particle}: look at the "
            "value model there, or lower step_size or set max_displacement to stay where it is defined"
        )
