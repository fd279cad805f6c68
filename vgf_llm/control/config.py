"""Settings of a control agent. Defaults are those of the authors' scripts unless a line says otherwise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vgf_llm.flow import TransportBudget


Algorithm = Literal["vgf", "bc", "iql", "ifql", "fql"]
Aggregate = Literal["min", "mean"]
Rule = Literal["adam", "normalized", "public"]
ActingCritic = Literal["online", "target"]
# Adam's step does not depend on the scale of the score, so that the score is left as it is.
ADAM_BUDGET = TransportBudget(steps=1, step_size=0.1, normalize="none")
BEST_OF_N = TransportBudget(steps=0)


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What an agent is and how it learns. One class for all algorithms, since they share networks and data.

    Args:
        algorithm: "vgf" (this project), or a baseline on the same networks: "bc" (behaviour cloning), "iql", "ifql"
            (IQL's critic, best of `num_particles` flow samples), "fql" (one-step policy distilled from the flow).
        hidden: widths of all networks.
        batch_size: transitions per update and seed.
        learning_rate: of Adam, for all networks.
        max_grad_norm: cap on the gradient norm of each network, per seed. Default None; the authors' amortised variant
            uses 1.0.
        discount: gamma per environment step.
        n_step: rewards summed before the bootstrap, without correction for the behaviour. Default 1, the authors'.
        target_rate: tau of the Polyak average of the critic.
        num_critics: E.
        critic_aggregate: over the ensemble in targets and in the choice of a particle. Per task in the authors' scripts.
        flow_aggregate: over the ensemble in the value that is climbed.
        behaviour: "flow" (flow matching) or "gaussian".
        flow_matching_steps: F, Euler steps of the behaviour flow.
        behaviour_steps: updates that fit the behaviour before the critic starts; after them it is frozen and its particles
            are cached, as the paper describes. Default 0: it is fitted in every update, as the authors' code does.
        num_particles: N. 10 in the authors' scripts, 5 in the amortised variant, 32 for IFQL.
        rule: what a transport step does with the direction of the flow. "adam": an Adam state as old as the flow, in which
            every coordinate moves about `step_size` per step whatever the scale of Q (the authors' optimiser, on correct
            SVGD). "normalized": `vgf_llm.flow` as it is, where `step_size` is a Euclidean length if the budget normalises.
            "public": the authors' code including its repulsion, whose bandwidth is differentiated, for comparison only.
        train, explore, test: transport budgets inside the TD target, while collecting online, and at test time.
            `explore` defaults to 0 steps (best-of-N), the authors' behaviour.
        target_reduce: over the N particles in the TD target. "mean" as in the paper, or "max".
        acting_critic: which critic is climbed, and chooses, in acting: "online" (the authors'), or "target", its Polyak average,
            which does not follow the swings of single updates.
        select: which particle acts: "best", "softmax" with `select_temperature`, or "random".
        select_temperature: in units of Q.
        amortised: climb a network f(s, a) fitted to grad_a Q at the data instead of Q itself.
        anchor: tau of a proximal term `-|a - a0|^2 / (2 tau)` added to the value that is climbed, in units of squared
            action per unit of Q. Default None: the budget alone holds particles back.
        precision: "bf16" computes behaviour samples, transport and the target critic during updates in bfloat16, but for
            their last layers; "fp32" nothing. Losses, weights and acting stay in float32.
        expectile: of IQL's value.
        advantage_weight: inverse temperature of IQL's policy, in 1 / units of Q.
        distill_weight: alpha of FQL. Per task in its authors' repository.
        normalize_q: FQL divides its Q term by the mean of |Q|.

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    algorithm: Algorithm = "vgf"
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    batch_size: int = 256
    learning_rate: float = 3e-4
    max_grad_norm: float | None = None
    discount: float = 0.99
    n_step: int = 1
    target_rate: float = 0.005
    num_critics: int = 2
    critic_aggregate: Aggregate = "mean"
    flow_aggregate: Aggregate = "mean"
    behaviour: Literal["flow", "gaussian"] = "flow"
    flow_matching_steps: int = 10
    behaviour_steps: int = 0
    num_particles: int = 10
    rule: Rule = "adam"
    train: TransportBudget = ADAM_BUDGET
    explore: TransportBudget = BEST_OF_N
    test: TransportBudget = ADAM_BUDGET
    target_reduce: Literal["mean", "max"] = "mean"
    acting_critic: ActingCritic = "online"
    select: Literal["best", "softmax", "random"] = "best"
    select_temperature: float = 1.0
    amortised: bool = False
    anchor: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    expectile: float = 0.9
    advantage_weight: float = 10.0
    distill_weight: float = 10.0
    normalize_q: bool = False

    def __post_init__(self) -> None:
        choices = {
            "algorithm": get_args(Algorithm),
            "critic_aggregate": get_args(Aggregate),
            "flow_aggregate": get_args(Aggregate),
            "behaviour": ("flow", "gaussian"),
            "rule": get_args(Rule),
            "target_reduce": ("mean", "max"),
            "acting_critic": get_args(ActingCritic),
            "select": ("best", "softmax", "random"),
            "precision": ("fp32", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        lowest = {"batch_size": 1, "n_step": 1, "num_critics": 1, "num_particles": 1, "flow_matching_steps": 1}
        for name, least in {**lowest, "behaviour_steps": 0}.items():
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
        if not self.hidden or any(not isinstance(width, int) or width < 1 for width in self.hidden):
            raise ValueError(f"hidden must name the width of at least one layer, got {self.hidden!r}")
        positive = ("learning_rate", "max_grad_norm", "anchor", "select_temperature", "advantage_weight", "distill_weight")
        for name in positive:
            number = getattr(self, name)
            if number is None and name in ("max_grad_norm", "anchor"):
                continue
            if not isinstance(number, (int, float)) or not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number!r}")
        for name, closed in (("discount", True), ("target_rate", True), ("expectile", False)):
            number = getattr(self, name)
            if not isinstance(number, (int, float)) or not (0 < number < 1 or (closed and number == 1)):
                raise ValueError(f"{name} must lie in (0, 1{']' if closed else ')'}, got {number!r}")
        if self.algorithm != "vgf" and (self.amortised or self.behaviour_steps):
            raise ValueError(f"amortised and behaviour_steps belong to algorithm='vgf', not to {self.algorithm!r}")
        if self.algorithm in ("bc", "iql", "fql") and self.num_particles != 1:
            raise ValueError(f"{self.algorithm} acts with a single proposal: set num_particles=1, got {self.num_particles}")
        if self.algorithm in ("ifql", "fql") and self.behaviour != "flow":
            raise ValueError(f"{self.algorithm} proposes from a flow: set behaviour='flow'")
        if self.algorithm == "iql" and self.behaviour != "gaussian":
            raise ValueError("iql has a Gaussian policy: set behaviour='gaussian'; ifql is its variant with a flow")
        for name in ("train", "explore", "test"):
            check_budget(self, getattr(self, name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AgentConfig":
        """From plain values, as a YAML file or a checkpoint holds them; budgets are mappings of `TransportBudget` fields.

        Raises:
            ValueError: an unknown field, or what the classes themselves raise.
        """
        values = dict(values)
        known_fields(cls, values)
        for name in ("train", "explore", "test"):
            if name in values:
                if not isinstance(values[name], Mapping):
                    raise ValueError(f"{name} must be a mapping of TransportBudget fields, got {values[name]!r}")
                known_fields(TransportBudget, values[name])
                values[name] = TransportBudget(**values[name])
        if isinstance(values.get("hidden"), list):
            values["hidden"] = tuple(values["hidden"])
        return cls(**values)


def check_budget(config: AgentConfig, budget: TransportBudget) -> None:
    """Raise a ValueError if an agent of this configuration cannot be moved within this budget."""
    if budget.is_zero:
        return
    if config.algorithm == "bc":
        raise ValueError("behaviour cloning has no critic to climb: give budgets of 0 steps")
    if config.rule == "public" and not config.amortised and (budget.coupling != "svgd" or budget.temperature <= 0):
        raise ValueError("rule='public' is SVGD at a positive temperature: set coupling='svgd' and temperature > 0")
    if config.amortised and budget.coupling != "none":
        raise ValueError("the amortised variant has no kernel: set coupling='none'")


def known_fields(cls: type, values: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the fields of a dataclass if `values` holds another."""
    names = [f.name for f in fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"unknown {cls.__name__} field {', '.join(map(repr, unknown))}; it has {', '.join(names)}")
