"""Time of one update at the size of the published tasks: batch 256, [512] * 4, 28 observations, 5 actions (cube-single).

    python -m benchmarks.control_speed [--threads 2] [--rounds 5] [--jax PYTHON]

Four variants (VGF with N = 10 particles, F = 10 Euler steps, L in {1, 5}; amortised with N = 5), each as it is in fp32, and with
the savings: frozen behaviour with cached particles, bfloat16 in the flow, both. `--jax` names an interpreter that has jax:
`control_speed_jax.py`, the same mathematics in JAX, is then timed in turns with ours. On a shared machine wall-clock says
little: the smallest of the rounds and the CPU seconds of the process are given beside it.

Writes benchmarks/results/control_speed.json (control_speed_cuda.json on a GPU, where updates are replayed as a CUDA graph).
"""

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vgf_llm.control import AgentConfig, ReplayBuffer, VGFAgent
from vgf_llm.control.training import UpdateLoop, cache_particles
from vgf_llm.flow import TransportBudget


RESULTS = Path(__file__).resolve().parent / "results"
OBS, ACT, BATCH, HIDDEN, EULER, ROWS = 28, 5, 256, 512, 10, 20_000
# What was measured for the public JAX code on two CPU cores, seconds per update.
PUBLIC = {"vgf L=5": 0.56, "vgf L=1": 0.29, "amortised L=5": 0.127, "amortised L=1": 0.107}
SAVINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "frozen": {"behaviour_steps": 1},
    "bf16": {"precision": "bf16"},
    "frozen + bf16": {"behaviour_steps": 1, "precision": "bf16"},
}


def variant(name: str) -> AgentConfig:
    """The configuration of `vgf L=5` and the like."""
    steps = int(name[-1])
    if name.startswith("amortised"):
        budget = TransportBudget(steps=steps, step_size=0.1, normalize="none")
        return AgentConfig(amortised=True, max_grad_norm=1.0, num_particles=5, train=budget, test=budget)
    budget = TransportBudget(steps=steps, step_size=0.1, normalize="none", coupling="svgd", temperature=0.1)
    return AgentConfig(num_particles=10, train=budget, test=budget)


def gigaflop(config: AgentConfig) -> float:
    """Products of one update: what no implementation of this mathematics can do without."""
    trunk, N, L = 3 * HIDDEN**2, config.num_particles, config.train.steps
    critic = 2 * 2 * (trunk + (OBS + ACT + 1) * HIDDEN)  # two members, forward, per row
    flow = 2 * (trunk + (OBS + 2 * ACT + 1) * HIDDEN)
    slope = 2 * (trunk + (OBS + 2 * ACT) * HIDDEN)
    total = BATCH * N * critic + 3 * BATCH * critic  # target, critic's loss
    if not config.behaviour_steps:
        total += BATCH * N * EULER * flow + 3 * BATCH * flow
    if config.amortised:
        total += BATCH * N * L * slope + 3 * BATCH * slope + 2 * BATCH * critic
    else:
        total += 2 * BATCH * N * L * critic
    return total / 1e9


def loop(config: AgentConfig, device: str) -> UpdateLoop:
    """Random transitions on the device, ready to be updated on."""
    agent = VGFAgent(OBS, ACT, config, device=device)
    draw = torch.Generator().manual_seed(0)
    columns = {
        "obs": torch.randn(ROWS, OBS, generator=draw),
        "actions": 2 * torch.rand(ROWS, ACT, generator=draw) - 1,
        "rewards": -torch.ones(ROWS),
        "next_obs": torch.randn(ROWS, OBS, generator=draw),
        "discounts": torch.full((ROWS,), 0.99),
    }
    particles = None
    if config.behaviour_steps:
        # As many rows as are needed to draw from; the whole set is cached once, before the updates that are timed.
        columns = {name: column[:2000] for name, column in columns.items()}
        particles = cache_particles(agent, columns["next_obs"])
    buffer = ReplayBuffer(columns, device=device, particles=particles)
    return UpdateLoop(agent, buffer, graph=device == "cuda")


def timed(updates: UpdateLoop, count: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds per update."""
    on_gpu = updates.agent.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    updates.run(count)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count, (time.process_time() - cpu) / count


def jax_round(python: str, config: AgentConfig, threads: int, count: int) -> list[list[float]]:
    """Wall-clock and CPU seconds of `count` updates of the JAX script, on as many cores."""
    spec = {
        "amortised": config.amortised,
        "particles": config.num_particles,
        "steps": config.train.steps,
        "step_size": config.train.step_size,
        "temperature": config.train.temperature,
    }
    script = Path(__file__).with_name("control_speed_jax.py")
    command = [python, str(script), json.dumps(spec), str(count)]
    if threads == 1 and hasattr(os, "sched_getaffinity"):
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    pairs: list[list[float]] = json.loads(result.stdout.strip().splitlines()[-1])
    return pairs


def summary(rounds: list[Any]) -> dict[str, float]:
    wall, cpu = zip(*rounds, strict=True)
    return {"wall_min": min(wall), "wall_median": median(wall), "cpu_min": min(cpu), "cpu_median": median(cpu)}


def machine_rate(device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of the largest product of an update, [2560, 512] x [512, 512] for two members."""
    a, b = torch.randn(2, 2560, HIDDEN, dtype=dtype, device=device), torch.randn(2, HIDDEN, HIDDEN, dtype=dtype, device=device)
    best = 1e9
    for _ in range(20):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.bmm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 2 * 2560 * HIDDEN**2 / best / 1e9


def write(result: dict[str, Any]) -> None:
    target = RESULTS / ("control_speed.json" if result["device"] == "cpu" else "control_speed_cuda.json")
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2, help="per round")
    parser.add_argument("--jax", metavar="PYTHON", help="interpreter that has jax")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    updates = args.updates if device == "cpu" else 200
    result: dict[str, Any] = {
        "benchmark": "control_speed",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": args.threads,
        "load": os.getloadavg(),
        "gflops_fp32": machine_rate(device, torch.float32),
        "gflops_bf16": machine_rate(device, torch.bfloat16),
        "public_two_cores": PUBLIC,
        "variants": {},
    }
    for name in PUBLIC:
        base = variant(name)
        loops = {}
        for saving, changes in SAVINGS.items():
            config = AgentConfig(**{**{f: getattr(base, f) for f in base.__dataclass_fields__}, **changes})
            loops[saving] = loop(config, device)
            loops[saving].run(5 if device == "cuda" else 1)
        rounds: dict[str, list[Any]] = {saving: [] for saving in loops}
        theirs: list[Any] = []
        for _ in range(args.rounds):  # in turns, so that what else the machine does meets all alike
            for saving, updating in loops.items():
                rounds[saving].append(timed(updating, updates))
            if args.jax:
                theirs += jax_round(args.jax, base, args.threads, updates)
        row = {saving: {**summary(r), "gflop": gigaflop(loops[saving].agent.config)} for saving, r in rounds.items()}
        if theirs:
            row["jax"] = {**summary(theirs), "gflop": gigaflop(base)}
        result["variants"][name] = row
        for saving, numbers in row.items():
            rate = numbers["gflop"] / numbers["wall_min"]
            print(
                f"{name:14} {saving:14} wall {numbers['wall_min']:.4f} (median {numbers['wall_median']:.4f}) s, CPU "
                f"{numbers['cpu_min']:.4f} s, {numbers['gflop']:.0f} GFLOP, {rate:.0f} GFLOP/s",
                flush=True,
            )
        write(result)


if __name__ == "__main__":
    main()
