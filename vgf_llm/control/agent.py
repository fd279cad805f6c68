"""Agents: `Agent` holds what all of them share, `VGFAgent` is Value Gradient Flow (arXiv 2604.14265) for control."""

import copy
import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vgf_llm.flow import TransportBudget, Transported, best_of_n, gradient_of, softmax_select, transport

from .config import AgentConfig, Aggregate, check_budget
from .networks import Critic, FlowBehaviour, GaussianBehaviour, SeededNoise, StackedMLP, reduce_precision
from .rules import Adam, public_stein


@dataclass(frozen=True)
class Batch:
    """Transitions, B for each of S seeds.

    Attributes:
        obs, next_obs: [S, B, obs_dim]; next_obs is `n_step` steps later, or where the trajectory ended before that.
        actions: [S, B, D] in [-1, 1].
        rewards: [S, B], discounted sum of the steps in between.
        discounts: [S, B], what the value of next_obs is multiplied with: `gamma^steps`, 0 where the task had ended.
        particles: [S, B, N, D] behaviour samples at next_obs if they are cached, else None.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    discounts: Tensor
    particles: Tensor | None = None


def aggregate(values: Tensor, how: Aggregate) -> Tensor:
    """Minimum or mean over the ensemble: [S, E, ...] -> [S, ...]."""
    return values.amin(1) if how == "min" else values.mean(1)


class Agent(nn.Module, ABC):
    """Networks, one optimiser, acting and checkpoints; a subclass adds `losses`, and `_add_networks` if it has any of its own.

    Args:
        obs_dim, action_dim: sizes of a state and an action; actions lie in [-1, 1].
        config: see `AgentConfig`.
        seeds: several seeds learn side by side without seeing each other, each drawing its own numbers.
        device: of everything.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        config: AgentConfig,
        seeds: Sequence[int] = (0,),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if obs_dim < 1 or action_dim < 1 or not seeds:
            raise ValueError(f"need observations, actions and a seed, got sizes {obs_dim}, {action_dim} and seeds {seeds!r}")
        self.obs_dim, self.action_dim, self.config, self.seeds = obs_dim, action_dim, config, tuple(seeds)
        self.device = torch.device(device)
        self.noise = SeededNoise(seeds, device)
        self.updates = 0
        self.behaviour: FlowBehaviour | GaussianBehaviour
        S, hidden = len(seeds), config.hidden
        if config.behaviour == "flow":
            self.behaviour = FlowBehaviour(S, obs_dim, action_dim, hidden, self.noise, config.flow_matching_steps)
        else:
            self.behaviour = GaussianBehaviour(S, obs_dim, action_dim, hidden, self.noise)
        self.critic: Critic | None = None
        self.target_critic: Critic | None = None
        if config.algorithm != "bc":
            self.critic = Critic(S, config.num_critics, obs_dim, action_dim, hidden, self.noise)
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self._add_networks()
        # One Adam serves all networks: it acts per weight.
        learned = [p for p in self.parameters() if p.requires_grad]
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(learned, lr=config.learning_rate, fused=True, capturable=on_gpu)

    def _add_networks(self) -> None:
        """Networks of a subclass, before the optimiser is made."""

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is minimised, and what is only logged, each [S] by name. Losses share no weights but where they name them."""

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of every network. Nothing waits for the device.

        Returns:
            losses and metrics, [S] each, on the device.
        """
        losses, metrics = self.losses(batch)
        self.optimizer.zero_grad(set_to_none=True)
        # Summed over seeds and networks: they share no weights, so each gets its own gradient.
        torch.stack(list(losses.values())).sum().backward()
        self._finish(self.target_critic is not None)
        return {**{name: loss.detach() for name, loss in losses.items()}, **metrics}

    def _finish(self, track_target: bool) -> None:
        if self.config.max_grad_norm is not None:
            for net in self.children():
                self._clip([p.grad for p in net.parameters() if p.grad is not None])
        if track_target:
            assert self.critic is not None and self.target_critic is not None
            # From the critic before this step, as in the authors' code.
            online: list[Tensor] = list(self.critic.parameters())
            target: list[Tensor] = list(self.target_critic.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(target, online, self.config.target_rate)
        self.optimizer.step()
        self.updates += 1

    def _clip(self, grads: list[Tensor]) -> None:
        assert self.config.max_grad_norm is not None
        if grads:
            S = len(self.seeds)
            norm = torch.stack([g.reshape(S, -1).square().sum(1) for g in grads]).sum(0).sqrt()
            factor = (self.config.max_grad_norm / norm).clamp_max(1.0)
            for g in grads:
                g.reshape(S, -1).mul_(factor[:, None])

    # Acting

    @property
    def acting_critic(self) -> Critic | None:
        """The critic that actions are chosen by; None in behaviour cloning."""
        return self.critic if self.config.acting_critic == "online" else self.target_critic

    def propose(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Proposals [S, B, N, D] of the algorithm at obs [S, B, obs_dim], before any transport."""
        return self.behaviour.sample(obs, noise)

    @torch.no_grad()
    def carry(
        self,
        obs: Tensor,
        particles: Tensor,
        budget: TransportBudget,
        *,
        climbed: Critic | StackedMLP | None = None,
        with_values: bool = True,
        check_finite: bool = True,
    ) -> Transported:
        """Transport particles [S, B, N, D] at obs [S, B, obs_dim] along the critic's gradient, inside [-1, 1].

        Args:
            obs, particles: see above.
            budget: how far.
            climbed: the network that gives the score, if not the critic that acts.
            with_values: evaluate the critic that acts, aggregated as for targets, at the end.
            check_finite: see `flow.transport`.

        Returns:
            `flow.Transported` with S * B for its first dimension.
        """
        S, B = particles.shape[:2]
        start = particles.flatten(0, 1)
        precondition = None
        if self.config.rule != "normalized":
            precondition = Adam()
        if not budget.is_zero:
            check_budget(self.config, budget)
            if self.config.rule == "public" and not self.config.amortised:
                score_fn = self._public_score(self._score(obs, start, climbed), budget.temperature)
                budget = dataclasses.replace(budget, coupling="none", temperature=0.0, bandwidth=None, normalize="none")
            else:
                score_fn = self._score(obs, start, climbed)
        else:
            score_fn = _no_score
        judge, value_fn = self.acting_critic, None
        if with_values and judge is not None:
            context = judge.context(obs)

            def value_fn(a: Tensor) -> Tensor:
                return aggregate(judge(context, a.unflatten(0, (S, B))), self.config.critic_aggregate).flatten(0, 1)

        return transport(
            start,
            score_fn,
            budget,
            precondition=precondition,
            project=lambda a: a.clamp(-1, 1),
            value_fn=value_fn,
            check_finite=check_finite,
        )

    def _score(self, obs: Tensor, start: Tensor, climbed: Critic | StackedMLP | None) -> Any:
        """Score function of the value that is climbed: Q, less the proximal term if there is an anchor."""
        critic = climbed or self.acting_critic
        assert critic is not None
        context = critic.context(obs)
        S, B = obs.shape[:2]

        def value(a: Tensor) -> Tensor:
            q = critic(context, a.unflatten(0, (S, B))).float()
            q = aggregate(q, self.config.flow_aggregate).flatten(0, 1)
            if self.config.anchor is not None:
                q = q - (a - start).square().sum(-1) / (2 * self.config.anchor)
            return q

        return gradient_of(value)

    @staticmethod
    def _public_score(score_fn: Any, temperature: float) -> Any:
        def public(particles: Tensor, step: int) -> tuple[Tensor, Tensor]:
            values, score = score_fn(particles, step)
            return values, public_stein(particles, score, temperature)

        return public

    @torch.no_grad()
    def act(
        self,
        obs: Tensor,
        budget: TransportBudget | None = None,
        *,
        noise: Tensor | None = None,
        particles: Tensor | None = None,
    ) -> Tensor:
        """Actions for a batch of states: propose N particles, transport them, choose one.

        Args:
            obs: [B, obs_dim] if the agent has one seed, else [S, B, obs_dim].
            budget: default `config.test`; 0 steps is best-of-N.
            noise: standard normal [(S,) B, N, D] the proposals are made from; drawn from the agent's generators if absent.
                The same noise under different budgets starts from the same particles.
            particles: [(S,) B, N, D], proposals to start from instead.

        Returns:
            [B, D] or [S, B, D] in [-1, 1].

        Raises:
            ValueError: observations of another size or not finite, or a budget the algorithm cannot use.
        """
        single = obs.ndim == 2
        obs = self._batched(obs, "obs", 3)
        if obs.shape[-1] != self.obs_dim or obs.shape[0] != len(self.seeds):
            raise ValueError(
                f"observations must be [{len(self.seeds)}, B, {self.obs_dim}] (seeds first, left out where there is one), "
                f"got {tuple(obs.shape)}"
            )
        if not obs.isfinite().all():
            raise ValueError("observations hold nan or infinity")
        S, B, N = len(self.seeds), obs.shape[1], self.config.num_particles
        if particles is None:
            if noise is None:
                noise = self.noise.normal(B, N, self.action_dim)
            particles = self.propose(obs, self._batched(noise, "noise", 4))
        moved = self.carry(obs, self._batched(particles, "particles", 4), budget or self.config.test)
        chosen = moved.particles[:, 0] if moved.values is None else self._select(moved.particles, moved.values)
        actions = chosen.unflatten(0, (S, B))
        return actions[0] if single else actions

    def _batched(self, x: Tensor, name: str, dimensions: int) -> Tensor:
        x = torch.as_tensor(x, dtype=torch.float32, device=self.device)
        if x.ndim == dimensions - 1:
            x = x.unsqueeze(0)
        if x.ndim != dimensions:
            raise ValueError(f"{name} must have {dimensions - 1} dimensions, or {dimensions} with seeds, got {tuple(x.shape)}")
        return x

    def _select(self, particles: Tensor, values: Tensor) -> Tensor:
        """One particle [R, D] of each row, of particles [R, N, D] with values [R, N]."""
        if self.config.select == "best":
            index = best_of_n(values)
        else:
            # A uniform draw is softmax over equal values; the first seed's generator decides for all rows.
            values = values if self.config.select == "softmax" else torch.zeros_like(values)
            index = softmax_select(values, self.config.select_temperature, self.noise.generators[0])
        return particles[torch.arange(len(index), device=index.device), index]

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimiser and generators, all that training depends on, by name."""
        state = {f"weights.{name}": value for name, value in self.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            state.update({f"optimizer.{index}.{name}": value for name, value in entries.items()})
        state["noise"] = self.noise.state()
        state["updates"] = torch.tensor(self.updates)
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def save(self, directory: str | Path) -> None:
        """Write `agent.safetensors` and `agent.json`, from which `load_agent` continues exactly."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The weights last of all, under another name until they are complete: a checkpoint is there or it is not.
        header = {
            "obs_dim": self.obs_dim,
            "action_dim": self.action_dim,
            "seeds": self.seeds,
            "config": dataclasses.asdict(self.config),
        }
        tensors = self.tensors()
        for name, write in (
            ("agent.json", lambda path: path.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")),
            ("agent.safetensors", lambda path: save_file(tensors, path)),
        ):
            partial = directory / f".{name}.partial"
            write(partial)
            partial.replace(directory / name)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` of an agent of the same configuration gave."""
        prefix = "weights."
        self.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, entry = name.split(".")
                state["state"].setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(state)
        self.noise.set_state(tensors["noise"])
        self.updates = int(tensors["updates"])


def _no_score(particles: Tensor, step: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("a budget of 0 steps asks for no score")


class VGFAgent(Agent):
    """Value Gradient Flow: no policy network; particles of a behaviour model are carried along the critic's gradient.

    TD target: `r + gamma mean_i Q'(s', a_i)`, a_i transported within `config.train`; Q' is the target critic, the flow
    climbs the online one. With `config.train` at 0 steps it is SARSA on the behaviour with best-of-N acting.

    Args: as in `Agent`.
    """

    def _add_networks(self) -> None:
        if self.config.amortised:
            D, hidden = self.action_dim, self.config.hidden
            self.gradient = StackedMLP(len(self.seeds), self.obs_dim, D, D, hidden, True, self.noise)
        self._fast: Any = None

    def _score(self, obs: Tensor, start: Tensor, climbed: Critic | StackedMLP | None) -> Any:
        if not self.config.amortised:
            return super()._score(obs, start, climbed)
        gradient = climbed or self.gradient
        context = gradient.context(obs)
        S, B = obs.shape[:2]

        def amortised(a: Tensor, step: int) -> tuple[Tensor, Tensor]:
            score = gradient(context, a.unflatten(0, (S, B))).flatten(0, 1).float()
            if self.config.anchor is not None:
                score = score - (a - start) / self.config.anchor
            return a.new_zeros(a.shape[:2]), score  # f gives no value; the trace shows 0

        return amortised

    def _flow_networks(self) -> tuple[Critic | StackedMLP, FlowBehaviour | GaussianBehaviour, Critic]:
        """What updates climb, the behaviour they sample, the critic of their targets: the agent's own networks, or copies of
        this moment in bfloat16, whose last layers stay in float32: values differ between actions by less than bfloat16 resolves.
        """
        climbed = self.gradient if self.config.amortised else self.critic
        assert climbed is not None and self.target_critic is not None
        own = climbed, self.behaviour, self.target_critic
        if self.config.precision == "fp32":
            return own
        if self._fast is None:  # in a tuple, so that they are no part of the checkpoint
            self._fast = tuple(copy.deepcopy(net).requires_grad_(False) for net in own)
            for net in self._fast:
                reduce_precision(net)
        for net, fast in zip(own, self._fast, strict=True):
            torch._foreach_copy_(list[Tensor](fast.parameters()), list[Tensor](net.parameters()))
        return self._fast

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`critic`: summed squared TD error of the ensemble. `behaviour`: fit to the data's actions, unless it is frozen.
        `gradient`: fit of f to grad_a Q (amortised).
        """
        config = self.config
        assert self.critic is not None
        with torch.no_grad():
            climbed, behaviour, target_critic = self._flow_networks()
            start = batch.particles
            if start is None:
                noise = self.noise.normal(batch.obs.shape[1], config.num_particles, self.action_dim)
                start = behaviour.sample(batch.next_obs, noise)
            moved = self.carry(
                batch.next_obs, start, config.train, climbed=climbed, with_values=False, check_finite=False
            ).particles.unflatten(0, start.shape[:2])
            next_q = aggregate(target_critic(target_critic.context(batch.next_obs), moved), config.critic_aggregate)
            next_v = next_q.mean(-1) if config.target_reduce == "mean" else next_q.amax(-1)
            target = batch.rewards + batch.discounts * next_v
        actions = batch.actions.unsqueeze(2).requires_grad_(config.amortised)
        q = self.critic(self.critic.context(batch.obs), actions).squeeze(-1)  # [S, E, B]
        losses = {"critic": (q - target.unsqueeze(1)).square().sum(1).mean(1)}
        if batch.particles is None:
            losses["behaviour"] = self.behaviour.loss(batch.obs, batch.actions, self.noise)
        if config.amortised:
            # E |f(s, a) - grad_a Q(s, a)|^2 at the data, from the same forward pass.
            (slope,) = torch.autograd.grad(aggregate(q, config.flow_aggregate).sum(), actions, retain_graph=True)
            predicted = self.gradient(self.gradient.context(batch.obs), actions.detach())
            losses["gradient"] = (predicted - slope).square().mean((1, 2, 3))
        metrics = {
            "q": q.detach().mean((1, 2)),
            "target": target.mean(1),
            "displacement": torch.linalg.vector_norm(moved - start, dim=-1).mean((1, 2)),
        }
        return losses, metrics

    def update_behaviour(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of the behaviour model alone: `config.behaviour_steps` of these come before the critic's."""
        loss = self.behaviour.loss(batch.obs, batch.actions, self.noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        self._finish(track_target=False)
        return {"behaviour": loss.detach()}
