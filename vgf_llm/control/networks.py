"""Networks of a control agent: stacked multilayer perceptrons, critics, and models of the behaviour in the data.

Shapes: S seeds trained side by side, E members of an ensemble, B states, N particles, D action dimensions. Weights are
stacked along a leading dimension, so that an ensemble, or several seeds, is one batched product.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# flax's default, under which the authors' settings were found.
LAYER_NORM_EPS = 1e-6
# On a CPU, layers of this width are computed member by member: products and LayerNorm of single matrices were measured 10 %
# faster there than batched ones. Narrow layers, and all on a GPU, gain from the batch.
ONE_BY_ONE = 256


class SeededNoise:
    """Random numbers with one generator per seed: a seed draws the same whoever is trained beside it.

    Args:
        seeds: S integers.
        device: where the numbers are drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal [S, *shape]."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [0, 1), [S, *shape]."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device, dtype=dtype) for g in self.generators])

    def state(self) -> Tensor:
        """State of the generators, [S, bytes] uint8 on the CPU."""
        return torch.stack([g.get_state() for g in self.generators])

    def set_state(self, state: Tensor) -> None:
        """Take up a `state` again."""
        for generator, one in zip(self.generators, state, strict=True):
            generator.set_state(one.clone())


class StackedMLP(nn.Module):
    """G perceptrons Linear -> (LayerNorm) -> ReLU of a state and of what goes with it, in one batched product each.

    The order Linear, LayerNorm, ReLU and the glorot-uniform weights with zero biases are the authors'. The state's share
    of the first layer is computed once per state (`context`), however many particles, flow steps or transport steps
    follow.

    Args:
        groups: G.
        obs_dim: size of a state.
        in_dim: size of what goes with it (action, action and time); 0 for a function of the state alone.
        out_dim: size of the output.
        hidden: widths of the hidden layers. The authors' are (512, 512, 512, 512).
        layer_norm: LayerNorm before each ReLU.
        noise: draws the weights; G must be a multiple of its number of seeds.
    """

    def __init__(
        self,
        groups: int,
        obs_dim: int,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int],
        layer_norm: bool,
        noise: SeededNoise,
    ) -> None:
        super().__init__()
        self.obs_dim, self.layer_norm = obs_dim, layer_norm
        sizes = [obs_dim + in_dim, *hidden, out_dim]
        members = groups // len(noise.generators)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            limit = math.sqrt(6 / (fan_in + fan_out))
            uniform = noise.uniform(members, fan_in, fan_out).flatten(0, 1)
            self.weights.append(nn.Parameter((2 * uniform - 1) * limit))
            self.biases.append(nn.Parameter(uniform.new_zeros(groups, 1, fan_out)))
        for width in hidden if layer_norm else ():
            self.scales.append(nn.Parameter(torch.ones(groups, 1, width, device=noise.device)))
            self.shifts.append(nn.Parameter(torch.zeros(groups, 1, width, device=noise.device)))

    def context(self, obs: Tensor) -> Tensor:
        """The states' share [G, B, 1, width] of the first layer, from obs [G, B, obs_dim]."""
        return torch.baddbmm(self.biases[0], obs.to(self.biases[0].dtype), self.weights[0][:, : self.obs_dim]).unsqueeze(2)

    def forward(self, context: Tensor, x: Tensor | None = None) -> Tensor:
        """[G, B, N, out_dim] from a `context` [G, B, 1, width] and x [G, B, N, in_dim]; without x, N = 1."""
        # A tensor of its own in either case: ReLU works in place.
        if x is None:
            h = context.clone()
        else:
            first = self.weights[0][:, self.obs_dim :]
            h = context + torch.bmm(x.flatten(1, 2).to(first.dtype), first).unflatten(1, x.shape[1:3])
        (B, N), h = h.shape[1:3], h.flatten(1, 2)
        if h.is_cpu and h.shape[-1] >= ONE_BY_ONE:
            return self._one_by_one(h).unflatten(1, (B, N))
        for layer in range(1, len(self.weights)):
            if self.layer_norm:
                h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
                h = torch.addcmul(self.shifts[layer - 1], h, self.scales[layer - 1])
            weight = self.weights[layer]
            h = torch.baddbmm(self.biases[layer], h.relu_().to(weight.dtype), weight)
        return h.unflatten(1, (B, N))

    def _one_by_one(self, h: Tensor) -> Tensor:
        """The layers after the first, member by member: [G, rows, width] -> [G, rows, out_dim]."""
        # While it is one tensor: autograd lets nobody change the views of it.
        members = list((h if self.layer_norm else h.relu_()).unbind())
        for layer in range(1, len(self.weights)):
            if self.layer_norm:
                norms = zip(members, self.scales[layer - 1].unbind(), self.shifts[layer - 1].unbind(), strict=True)
                members = [F.layer_norm(x, x.shape[-1:], scale[0], shift[0], LAYER_NORM_EPS).relu_() for x, scale, shift in norms]
            elif layer > 1:
                members = [x.relu_() for x in members]
            weights, biases = self.weights[layer].unbind(), self.biases[layer].unbind()
            members = [
                torch.addmm(bias, x.to(weight.dtype), weight) for x, weight, bias in zip(members, weights, biases, strict=True)
            ]
        return torch.stack(members)


def reduce_precision(net: nn.Module) -> None:
    """Turn the perceptrons of a network to bfloat16, all but their last layers."""
    for mlp in net.modules():
        if isinstance(mlp, StackedMLP):
            for parameter in (*mlp.weights[:-1], *mlp.biases[:-1], *mlp.scales, *mlp.shifts):
                parameter.data = parameter.data.bfloat16()


class Critic(nn.Module):
    """An ensemble of E action values Q(s, a) per seed, LayerNorm on.

    Args:
        seeds, members: S and E.
        obs_dim, action_dim, hidden, noise: as in `StackedMLP`.
    """

    def __init__(
        self, seeds: int, members: int, obs_dim: int, action_dim: int, hidden: Sequence[int], noise: SeededNoise
    ) -> None:
        super().__init__()
        self.members = members
        self.net = StackedMLP(seeds * members, obs_dim, action_dim, 1, hidden, True, noise)

    def context(self, obs: Tensor) -> Tensor:
        """What of `forward` depends on obs [S, B, obs_dim] alone."""
        return self.net.context(obs.repeat_interleave(self.members, 0))

    def forward(self, context: Tensor, actions: Tensor) -> Tensor:
        """Values [S, E, B, N] of actions [S, B, N, D]."""
        values: Tensor = self.net(context, actions.repeat_interleave(self.members, 0))
        return values.squeeze(-1).unflatten(0, (-1, self.members))


class FlowBehaviour(nn.Module):
    """Flow matching on the linear path: what the data does, with all its modes.

    Args:
        seeds, obs_dim, action_dim, hidden, noise: as in `Critic`. No LayerNorm; the time is concatenated as it is.
        steps: F, Euler steps from noise to action. Default 10, as in all of the authors' scripts.
    """

    def __init__(
        self, seeds: int, obs_dim: int, action_dim: int, hidden: Sequence[int], noise: SeededNoise, steps: int = 10
    ) -> None:
        super().__init__()
        self.steps = steps
        self.net = StackedMLP(seeds, obs_dim, action_dim + 1, action_dim, hidden, False, noise)

    def loss(self, obs: Tensor, actions: Tensor, noise: SeededNoise) -> Tensor:
        """`E |v(s, (1 - t) x + t a, t) - (a - x)|^2` [S], x ~ N(0, I), t ~ U(0, 1), mean over dimensions.

        Args:
            obs: [S, B, obs_dim].
            actions: [S, B, D].
        """
        x = noise.normal(*actions.shape[1:])
        t = noise.uniform(actions.shape[1], 1)
        inputs = torch.cat([(1 - t) * x + t * actions, t], dim=-1)
        velocity = self.net(self.net.context(obs), inputs.unsqueeze(2)).squeeze(2)
        return (velocity - (actions - x)).square().mean((1, 2))

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [S, B, N, D] in [-1, 1] at obs [S, B, obs_dim], from standard normal noise [S, B, N, D].

        Differentiable in the noise and the weights; clipped once, after the last Euler step.
        """
        context, a = self.net.context(obs), noise
        for i in range(self.steps):
            t = a.new_full((*a.shape[:-1], 1), i / self.steps)
            a = a + self.net(context, torch.cat([a, t], dim=-1)).to(a.dtype) / self.steps
        return a.clamp(-1, 1)


class GaussianBehaviour(nn.Module):
    """A Gaussian with learned mean and one learned standard deviation per dimension, fitted by likelihood.

    Args:
        seeds, obs_dim, action_dim, hidden, noise: as in `Critic`. The last layer starts at a hundredth of its usual size.
    """

    def __init__(self, seeds: int, obs_dim: int, action_dim: int, hidden: Sequence[int], noise: SeededNoise) -> None:
        super().__init__()
        self.net = StackedMLP(seeds, obs_dim, 0, action_dim, hidden, False, noise)
        with torch.no_grad():
            self.net.weights[-1].mul_(1e-2)
        self.log_std = nn.Parameter(torch.zeros(seeds, 1, action_dim, device=noise.device))

    def mean(self, obs: Tensor) -> Tensor:
        """Mean action [S, B, D] at obs [S, B, obs_dim], not clipped."""
        mean: Tensor = self.net(self.net.context(obs))
        return mean.squeeze(2)

    def log_prob(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Log density [S, B] in nats of actions [S, B, D]."""
        log_std = self.log_std.clamp(-5, 2)
        z = (actions - self.mean(obs)) * torch.exp(-log_std)
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def loss(self, obs: Tensor, actions: Tensor, noise: SeededNoise) -> Tensor:
        """Negative log-likelihood [S] of actions [S, B, D] at obs [S, B, obs_dim], in nats."""
        return -self.log_prob(obs, actions).mean(1)

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions [S, B, N, D] in [-1, 1] at obs [S, B, obs_dim], from standard normal noise [S, B, N, D]."""
        std = torch.exp(self.log_std.clamp(-5, 2)).unsqueeze(1)
        return (self.mean(obs).unsqueeze(2) + std * noise).clamp(-1, 1)
