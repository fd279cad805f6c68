"""The update of the authors' code in JAX, written anew from its mathematics, to be timed beside ours on the same machine.

    python benchmarks/control_speed_jax.py '{"amortised": false, "particles": 10, "steps": 5, ...}' ROUNDS

Needs jax only, which is no dependency of this project; benchmarks.control_speed starts it with another interpreter
(--jax). Adam on networks and particles, two LayerNorm critics, flow-matching behaviour, correct SVGD, Polyak average, all in
one jitted function, fp32. Prints wall-clock and CPU seconds of each round's update as a JSON list of pairs.
"""

import json
import sys
import time
from itertools import pairwise

import jax
import jax.numpy as jnp


OBS, ACT, BATCH, HIDDEN, EULER = 28, 5, 256, (512, 512, 512, 512), 10


def init(key, sizes, norm, members=1):
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        key, now = jax.random.split(key)
        limit = (6 / (fan_in + fan_out)) ** 0.5
        weight = jax.random.uniform(now, (members, fan_in, fan_out), minval=-limit, maxval=limit)
        layer = {"w": weight, "b": jnp.zeros((members, fan_out))}
        if norm and fan_out in HIDDEN:
            layer.update(g=jnp.ones((members, fan_out)), o=jnp.zeros((members, fan_out)))
        layers.append(layer)
    return layers


def one(layers, x):
    for i, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        if i + 1 < len(layers):
            if "g" in layer:
                mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
                x = (x - mean) * jax.lax.rsqrt(var + 1e-6) * layer["g"] + layer["o"]
            x = jax.nn.relu(x)
    return x


members = jax.vmap(one, in_axes=(0, None))


def q_of(critic, obs, actions):
    return members(critic, jnp.concatenate([obs, actions], -1))[..., 0]


def adam(params, grads, state, lr):
    m, v, t = state
    t = t + 1
    m = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, m, grads)
    v = jax.tree.map(lambda a, g: 0.999 * a + 0.001 * g * g, v, grads)
    moved = jax.tree.map(lambda p, a, b: p - lr * (a / (1 - 0.9**t)) / (jnp.sqrt(b / (1 - 0.999**t)) + 1e-8), params, m, v)
    return moved, (m, v, t)


def stein(a, score, alpha):
    n = a.shape[1]
    d2 = jnp.square(a[:, :, None] - a[:, None]).sum(-1)
    sigma2 = jnp.maximum(jnp.median(d2, axis=(1, 2)) / (2 * jnp.log(n + 1.0)), 1e-12)[:, None, None]
    k = jnp.exp(-d2 / (2 * sigma2))
    push = (k.sum(2, keepdims=True) * a - k @ a) / sigma2
    return (k @ score / alpha + push) / n


def clip_norm(grads):
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), grads)


def make_update(spec):
    n, steps, lr = spec["particles"], spec["steps"], spec["step_size"]

    def sample(behaviour, obs, key):
        a = jax.random.normal(key, (*obs.shape[:-1], ACT))
        for i in range(EULER):
            t = jnp.full((*obs.shape[:-1], 1), i / EULER)
            a = a + members(behaviour, jnp.concatenate([obs, a, t], -1))[0] / EULER
        return jnp.clip(a, -1, 1)

    def update(state, batch):
        nets, target, optimiser, key = state
        key, k1, k2, k3 = jax.random.split(key, 4)
        obs = jnp.repeat(batch["next_obs"][:, None], n, axis=1)
        a = sample(nets["behaviour"], obs, k1)
        moments = (jnp.zeros_like(a), jnp.zeros_like(a), 0)
        for _ in range(steps):
            if spec["amortised"]:
                phi = members(nets["gradient"], jnp.concatenate([obs, a], -1))[0]
            else:
                score = jax.grad(lambda x: q_of(nets["critic"], obs, x).mean(0).sum())(a)
                phi = stein(a, score, spec["temperature"])
            a, moments = adam(a, -phi, moments, lr)
            a = jnp.clip(a, -1, 1)
        goal = batch["rewards"] + batch["discounts"] * q_of(target, obs, a).mean(0).mean(1)
        x0, t = jax.random.normal(k2, (BATCH, ACT)), jax.random.uniform(k3, (BATCH, 1))
        slope = jax.grad(lambda x: q_of(nets["critic"], batch["obs"], x).mean(0).sum())(batch["actions"])

        def loss(nets):
            total = jnp.square(q_of(nets["critic"], batch["obs"], batch["actions"]) - goal).sum(0).mean()
            x = jnp.concatenate([batch["obs"], (1 - t) * x0 + t * batch["actions"], t], -1)
            total += jnp.square(members(nets["behaviour"], x)[0] - (batch["actions"] - x0)).mean()
            if spec["amortised"]:
                f = members(nets["gradient"], jnp.concatenate([batch["obs"], batch["actions"]], -1))[0]
                total += jnp.square(f - slope).mean()
            return total

        grads = jax.grad(loss)(nets)
        if spec["amortised"]:
            grads = {name: clip_norm(g) for name, g in grads.items()}
        target = jax.tree.map(lambda p, q: 0.995 * p + 0.005 * q, target, nets["critic"])
        nets, optimiser = adam(nets, grads, optimiser, 3e-4)
        return nets, target, optimiser, key

    return jax.jit(update)


def main() -> None:
    spec, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    nets = {
        "critic": init(keys[0], (OBS + ACT, *HIDDEN, 1), True, 2),
        "behaviour": init(keys[1], (OBS + ACT + 1, *HIDDEN, ACT), False),
    }
    if spec["amortised"]:
        nets["gradient"] = init(keys[2], (OBS + ACT, *HIDDEN, ACT), True)
    zeros = jax.tree.map(jnp.zeros_like, nets)
    state = (nets, nets["critic"], (zeros, zeros, 0), keys[3])
    batch = {
        "obs": jax.random.normal(keys[4], (BATCH, OBS)),
        "next_obs": jax.random.normal(keys[5], (BATCH, OBS)),
        "actions": jax.random.uniform(keys[6], (BATCH, ACT), minval=-1),
        "rewards": -jnp.ones(BATCH),
        "discounts": jnp.full(BATCH, 0.99),
    }
    update = make_update(spec)
    for _ in range(2):
        state = jax.block_until_ready(update(state, batch))
    seconds = []
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(update(state, batch))
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
