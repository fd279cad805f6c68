"""Baselines on the same networks, data and optimiser: behaviour cloning, IQL, IFQL and FQL."""

import torch
from torch import Tensor

from vgf_llm.flow import gradient_of

from .agent import Agent, Batch, VGFAgent, aggregate
from .networks import GaussianBehaviour, StackedMLP


class BCAgent(Agent):
    """Behaviour cloning: one sample of the behaviour model. It has no critic, so every budget must be 0 steps."""

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"behaviour": self.behaviour.loss(batch.obs, batch.actions, self.noise)}, {}


class IQLAgent(Agent):
    """Implicit Q-learning (Kostrikov et al. 2022, arXiv 2110.06169) and its flow variant IFQL (arXiv 2502.02538).

    V is fitted to the target critic at the data by expectile regression, Q to `r + gamma V(s')`. IQL's policy is a Gaussian
    fitted with weights `min(exp(advantage_weight (Q - V)), 100)` and acts with its mean; IFQL takes the best of N samples of
    a flow fitted without weights.
    """

    def _add_networks(self) -> None:
        self.value = StackedMLP(len(self.seeds), self.obs_dim, 0, 1, self.config.hidden, True, self.noise)

    def _v(self, obs: Tensor) -> Tensor:
        v: Tensor = self.value(self.value.context(obs))
        return v.flatten(1)

    def propose(self, obs: Tensor, noise: Tensor) -> Tensor:
        if isinstance(self.behaviour, GaussianBehaviour):
            return self.behaviour.mean(obs).unsqueeze(2).clamp(-1, 1)
        return super().propose(obs, noise)

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config = self.config
        assert self.critic is not None and self.target_critic is not None
        actions = batch.actions.unsqueeze(2)
        with torch.no_grad():
            q_target = aggregate(self.target_critic(self.target_critic.context(batch.obs), actions), "min").squeeze(-1)
            target = batch.rewards + batch.discounts * self._v(batch.next_obs)
        v = self._v(batch.obs)
        advantage = q_target - v
        weight = torch.where(advantage >= 0, config.expectile, 1 - config.expectile)
        q = self.critic(self.critic.context(batch.obs), actions).squeeze(-1)
        losses = {
            "value": (weight * advantage.square()).mean(1),
            "critic": (q - target.unsqueeze(1)).square().sum(1).mean(1),
        }
        if isinstance(self.behaviour, GaussianBehaviour):
            trust = torch.exp(config.advantage_weight * advantage.detach()).clamp_max(100.0)
            losses["policy"] = -(trust * self.behaviour.log_prob(batch.obs, batch.actions)).mean(1)
        else:
            losses["behaviour"] = self.behaviour.loss(batch.obs, batch.actions, self.noise)
        return losses, {"q": q.detach().mean((1, 2)), "v": v.detach().mean(1)}


class FQLAgent(Agent):
    """Flow Q-learning (Park et al. 2025, arXiv 2502.02538): a one-step policy mu(s, z), pulled to the flow's result for the
    same noise z with weight `distill_weight`, and up the critic.
    """

    def _add_networks(self) -> None:
        D, hidden = self.action_dim, self.config.hidden
        self.policy = StackedMLP(len(self.seeds), self.obs_dim, D, D, hidden, False, self.noise)

    def _one_step(self, obs: Tensor, noise: Tensor) -> Tensor:
        actions: Tensor = self.policy(self.policy.context(obs), noise)
        return actions

    def propose(self, obs: Tensor, noise: Tensor) -> Tensor:
        return self._one_step(obs, noise).clamp(-1, 1)

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config, critic, target_critic = self.config, self.critic, self.target_critic
        assert critic is not None and target_critic is not None
        B = batch.obs.shape[1]
        with torch.no_grad():
            next_actions = self.propose(batch.next_obs, self.noise.normal(B, 1, self.action_dim))
            next_q = aggregate(target_critic(target_critic.context(batch.next_obs), next_actions), config.critic_aggregate)
            target = batch.rewards + batch.discounts * next_q.squeeze(-1)
        q = critic(critic.context(batch.obs), batch.actions.unsqueeze(2)).squeeze(-1)
        noise = self.noise.normal(B, 1, self.action_dim)
        with torch.no_grad():
            taught = self.behaviour.sample(batch.obs, noise)
            context = critic.context(batch.obs)
        actions = self._one_step(batch.obs, noise)
        clipped = actions.clamp(-1, 1)
        # grad_a Q enters as a constant: the policy's gradient is the same, and the critic gets none.
        values, slope = gradient_of(lambda a: aggregate(critic(context, a), "mean"))(clipped, 0)
        scale = 1 / values.abs().mean((1, 2)) if config.normalize_q else torch.ones_like(q[:, 0, 0]).detach()
        losses = {
            "critic": (q - target.unsqueeze(1)).square().sum(1).mean(1),
            "behaviour": self.behaviour.loss(batch.obs, batch.actions, self.noise),
            "distill": config.distill_weight * (actions - taught).square().mean((1, 2, 3)),
            "policy": -scale * (slope * clipped).sum(-1).mean((1, 2)),
        }
        return losses, {"q": q.detach().mean((1, 2)), "policy_q": values.mean((1, 2))}


AGENTS: dict[str, type[Agent]] = {"vgf": VGFAgent, "bc": BCAgent, "iql": IQLAgent, "ifql": IQLAgent, "fql": FQLAgent}
