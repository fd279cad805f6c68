"""The transport budget: how far particles may be carried away from the reference distribution."""

import math
from dataclasses import dataclass
from typing import Literal, get_args


Coupling = Literal["none", "svgd"]
Normalize = Literal["none", "particle", "prompt"]


@dataclass(frozen=True, kw_only=True)
class TransportBudget:
    """The only regulariser of Value Gradient Flow (arXiv 2604.14265): how many steps, how long, how dispersed.

    One step is `u <- u + step_size * phi(u)`, where `phi` is the score of the particle itself (`coupling="none"`) or
    its Stein direction (`coupling="svgd"`).

    Args:
        steps: number of steps L. 0 moves nothing: what remains is best-of-N. Default 5, the value of the authors'
            antmaze and puzzle runs.
        step_size: factor eps on `phi`, in units of the particle space. With a normalised score and `temperature=0`
            it is the length of one step. Default 0.1, the authors' step for actions in [-1, 1]; embeddings need their
            own.
        temperature: alpha of the target `exp(R / alpha)`. The drive is `score / alpha`, so `step_size / temperature`
            is its step. In units of R, or of distance if the score is normalised. 0 is the limit form: no repulsion
            and no `1 / alpha`. Default 0, as in the authors' amortised variant.
        coupling: "none": every particle follows its own score. "svgd": scores are averaged over the particles of a
            prompt with an RBF kernel, and particles repel each other when `temperature > 0`. Default "none": averaging
            the same position of different sentences is noise.
        normalize: scale of the score before it is coupled. "none": as it is. "particle": every score has norm 1.
            "prompt": one factor per prompt, so that the rms norm over its particles is 1. Nothing is ever scaled by
            the batch: a result must not depend on its batch mates. Default "particle": it makes `step_size` a length.
        max_displacement: cap on `|u - u0|` of each particle over the whole flow, in units of the particle space.
            Default None: `steps * step_size` is the cap already when scores are normalised and uncoupled.
        bandwidth: fixed kernel width sigma of `exp(-d^2 / (2 sigma^2))`, in units of the particle space, as the MMD
            bound assumes. Default None: the median heuristic, per prompt and step.
        kl_budget: nats per completion that one decode may spend. Read only where particles are decoded through a base
            distribution (language), where the scale of a tilt is solved from it; 0 moves nothing anywhere. Default 2.0.
        rounds: how many times flow and decode follow each other. Read only in language. Default 1.
        generations: completions per prompt that may be decoded in all, the first N included; each prompt then divides what is
            left between moves and fresh samples by what either has earned, for at most `rounds` turns. Read only in
            language. Default None: every round moves.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    steps: int = 5
    step_size: float = 0.1
    temperature: float = 0.0
    coupling: Coupling = "none"
    normalize: Normalize = "particle"
    max_displacement: float | None = None
    bandwidth: float | None = None
    kl_budget: float = 2.0
    rounds: int = 1
    generations: float | None = None

    @classmethod
    def auto(cls, generations: float = 16.0, correlation: float | None = None) -> "TransportBudget":
        """The budget for text that needs no tuning: so many completions per prompt, spent where they pay.

        Along the reward's own gradient gold is nearly flat in the nats of a decode between 2 and 16, and in the number of steps:
        these are fixed, at the low end. Along a learned one nats buy as much as it agrees with the reward,
        `E_q R - E_mu R = correlation sd sqrt(2 KL)` (docs/method.md), so that `E_q R - a KL` is largest at
        `KL = (correlation sd / a)^2 / 2`: with a = sd / sqrt(10) these are 5 correlation^2 nats. What else differs between
        rewards and between prompts is whether moves pay at all, and that is found out on the way.

        Args:
            generations: completions per prompt in all.
            correlation: `GradientField.correlation` of the field that the sampler follows; None without one.

        Raises:
            ValueError: correlation is not in [-1, 1].
        """
        if correlation is None:
            return cls(steps=3, step_size=0.5, kl_budget=2.0, rounds=64, generations=generations)
        if not -1 <= correlation <= 1:
            raise ValueError(f"correlation must lie in [-1, 1], got {correlation!r}")
        # A field that agrees with nothing moves nothing; a budget of 0 would also leave all but the first N undrawn.
        return cls(kl_budget=max(5 * max(correlation, 0.0) ** 2, 1e-3), rounds=64, generations=generations)

    def __post_init__(self) -> None:
        for name, lowest in (("steps", 0), ("rounds", 1)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {count!r}")
        for name in ("step_size", "temperature", "max_displacement", "bandwidth", "kl_budget", "generations"):
            number = getattr(self, name)
            if number is None and name in ("max_displacement", "bandwidth", "generations"):
                continue
            if number is None or not math.isfinite(number):
                raise ValueError(f"{name} must be finite, got {number!r}; leave it at its default if it should not bind")
        if self.step_size <= 0:
            raise ValueError(f"step_size must be positive, got {self.step_size!r}; use steps=0 to move nothing")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature!r}; use 0 for no repulsion")
        for name in ("max_displacement", "bandwidth", "generations"):
            number = getattr(self, name)
            if number is not None and number <= 0:
                raise ValueError(f"{name} must be positive or None, got {number!r}")
        if self.kl_budget < 0:
            raise ValueError(f"kl_budget is in nats and must not be negative, got {self.kl_budget!r}; use 0 to move nothing")
        for name, allowed in (("coupling", get_args(Coupling)), ("normalize", get_args(Normalize))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.coupling == "none":
            for name, inactive in (("temperature", 0.0), ("bandwidth", None)):
                if getattr(self, name) != inactive:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} acts between particles, which coupling='none' keeps apart: "
                        f"set coupling='svgd' or {name}={inactive}"
                    )

    @property
    def is_zero(self) -> bool:
        """Whether nothing can change: what remains is best-of-N over the particles as they were drawn."""
        return self.steps == 0 or self.kl_budget == 0

    def displacement_bound(self, gradient_bound: float | None = None, kernel_width: float | None = None) -> float:
        """Bound on the mean over a prompt's particles of `|u_L - u_0|`, in units of the particle space.

        `L eps (c / alpha + 1 / (sigma sqrt(e)))`, or `L eps c` at temperature 0, and never more than
        `max_displacement`. It holds for every single particle too, unless `normalize="prompt"`, where one particle
        may go further than the rms of its prompt. A `project` keeps it if it is the projection onto a convex set that
        holds the starting particles.

        Args:
            gradient_bound: c >= |score|. Needed with `normalize="none"`; a normalised score has c = 1.
            kernel_width: sigma of the flow's kernel. Needed when `temperature > 0` and no `bandwidth` is fixed.

        Raises:
            ValueError: a bound or a width that is needed was not given, or is not positive.
        """
        if self.is_zero:
            return 0.0
        if self.normalize != "none":
            drive = 1.0
        elif gradient_bound is None or not gradient_bound >= 0:
            raise ValueError(f"normalize='none' does not bound the score: give gradient_bound, got {gradient_bound!r}")
        else:
            drive = gradient_bound
        repulsion = 0.0
        if self.temperature > 0:
            width = self.bandwidth if self.bandwidth is not None else kernel_width
            if width is None or not width > 0:
                raise ValueError(f"the median bandwidth follows the particles: give kernel_width > 0, got {width!r}")
            drive /= self.temperature
            repulsion = 1 / (width * math.sqrt(math.e))
        moved = self.steps * self.step_size * (drive + repulsion)
        return moved if self.max_displacement is None else min(moved, self.max_displacement)

    def mmd_bound(self, kernel_width: float, gradient_bound: float | None = None) -> float:
        """Bound on `MMD^2(mu, pi_L)` in the RBF kernel of width sigma (transport bound of arXiv 2604.14265).

        `MMD^2(mu, pi_L) <= (2 eps L) / (sigma sqrt(e)) * (c / alpha + 1 / (sigma sqrt(e)))`: sigma-kernels of two
        points differ by at most `2 r / (sigma sqrt(e))` in squared norm when the points are `r` apart, and
        `displacement_bound` limits r. `MMD^2 <= 2` whatever the budget, so a larger figure says nothing.

        Args:
            kernel_width: sigma of `exp(-d^2 / (2 sigma^2))`. Under the median heuristic choose it no larger than
                `trace.bandwidth.min()`.
            gradient_bound: c >= |score|. Needed with `normalize="none"`; a normalised score has c = 1.

        Raises:
            ValueError: kernel_width is not positive, or gradient_bound is needed and missing.
        """
        if not kernel_width > 0:
            raise ValueError(f"kernel_width must be positive, got {kernel_width!r}")
        return 2 / (kernel_width * math.sqrt(math.e)) * self.displacement_bound(gradient_bound, kernel_width)
