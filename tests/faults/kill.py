"""Kills training at random moments, resumes it until it ends, and compares what came out with an undisturbed run, bit for bit.

    python -m tests.faults.kill --kills 100 --output benchmarks/results/faults.json
    python -m tests.faults.kill --kills 8 --cases sampler value

A case trains tiny models for a few steps with a checkpoint after each. Half of the kills (SIGKILL, which no program can catch)
come at any moment of a run, the other half while a checkpoint is being written. With two processes half of the kills hit one
of them alone, once they have met: the other one has to end by itself. Every run is taken up again with
`resume_from_checkpoint="auto"` until it ends; then weights, metrics, completions and the value model must be those of the run
that nobody touched.

Processes are forked from this one, which has imported everything and computed nothing: that saves most of their time.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from tests.trainer import runs
from vgf_llm import __version__
from vgf_llm.trainer.checkpoints import MANIFEST_FILE, last_whole_checkpoint


logger = logging.getLogger(__name__)
STEPS = 6
# Phases of two steps, a log every second step: checkpoints lie within phases and between logs.
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 1,
    "logging_steps": 2,
    "save_total_limit": 2,
    "lr_scheduler_type": "constant",
}
# Name: case of tests/trainer/runs.py, processes, whether DeepSpeed ZeRO-2.
CASES = {
    "sampler": ("weighted", 1, False),
    "value": ("value", 1, False),
    "sampler_ddp": ("weighted", 2, False),
    "value_ddp": ("value", 2, False),
    "sampler_zero2": ("weighted", 2, True),
}
SURVIVOR_SECONDS = 60.0  # a process whose partner died must have ended by then
RUN_SECONDS = 240.0  # no run of a few steps takes as long: it hangs


def child(folder: Path, name: str, rank: int, port: int) -> None:
    """One process of a run; ends it, whatever happens."""
    case, world, zero2 = CASES[name]
    log = os.open(folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        changes = dict(SETTINGS)
        if world > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            changes["ddp_timeout"] = 45
        if (
            zero2
        ):  # as accelerate sets it from accelerate_configs/zero2.yaml, and as tests/distributed/on_cpu.py makes a CPU of it
            # A process that dies while torch compiles or loads an extension of DeepSpeed leaves a lock on which all others wait
            # for ever: it is in a folder of this run, from which `Run` takes it away.
            os.environ["TORCH_EXTENSIONS_DIR"] = str(folder.parent / "extensions")
            os.environ |= {
                "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_TORCH_DEVICE": "cpu",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "DS_ACCELERATOR": "cpu", "ACCELERATE_MIXED_PRECISION": "no",
            }  # fmt: skip
            PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("gloo", DistributedType.MULTI_GPU)
            changes |= {"use_cpu": False, "bf16": False}
        trainer = runs.make_trainer(folder, case, **changes)
        (folder / f"met-{rank}").touch()
        trainer.train(resume_from_checkpoint="auto")
        trainer.save_model(str(folder / "final"))
        if rank == 0:
            if trainer.rewards.value is not None:
                torch.save(trainer.rewards.value.state(), folder / "value.pt")
            (folder / "logs.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
        code = 0
    except BaseException:
        logger.exception("the run failed")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    """The processes of one attempt."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(CASES[name][1]):
            (folder / f"met-{rank}").unlink(missing_ok=True)
        for lock in (folder.parent / "extensions").rglob("lock"):
            lock.unlink()
        self.pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.started = time.monotonic()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(CASES[name][1]):
            pid = os.fork()
            if pid == 0:
                child(folder, name, rank, port)
            self.pids[rank] = pid

    def ended(self) -> bool:
        """Whether all processes have; collects their exit codes."""
        for rank, pid in self.pids.items():
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, seconds: float) -> bool:
        """Whether all processes have ended in time; the rest is killed."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                self.kill(list(self.pids))
                while not self.ended():
                    time.sleep(0.01)
                return False
            time.sleep(0.005)
        return True


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if not (path / MANIFEST_FILE).exists()]


def strike(run: Run, folder: Path, rng: random.Random, typical: float, saving: bool) -> bool:
    """Kill a run at a random moment. False: it ended before that."""
    if saving:
        at_least, step = rng.uniform(0, typical), rng.uniform(0, 0.03)
        while time.monotonic() - run.started < at_least or not unfinished(folder):
            if run.ended() or time.monotonic() - run.started > RUN_SECONDS:
                return False
            time.sleep(0.0005)
        time.sleep(step)
    else:
        until = run.started + rng.uniform(0, 1.3 * typical)
        while time.monotonic() < until:
            if run.ended():
                return False
            time.sleep(0.001)
    return not run.ended()


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """Everything that has to be the same."""
    clock = ("runtime", "second", "step_time", "train_loss")
    logs = json.loads((folder / "logs.json").read_text(encoding="utf-8"))
    output = folder / CASES[name][0]
    completions = {}
    for path in sorted(output.glob("completions-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            # A run that is killed before its first checkpoint starts anew, and says the same again.
            completions[path.name, record["step"], record["place"]] = line
    value = torch.load(folder / "value.pt", weights_only=True) if (folder / "value.pt").exists() else None
    return {
        "weights": load_file(folder / "final" / "model.safetensors"),
        "metrics": [{k: v for k, v in entry.items() if not any(word in k for word in clock)} for entry in logs],
        "completions": completions,
        "value": value,
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def log_of(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.glob("log-*.txt")))


def torture(name: str, kills: int, folder: Path, rng: random.Random) -> dict[str, Any]:
    """Runs of one case until `kills` of them were killed; what was seen."""
    world = CASES[name][1]
    for place in ("first", "whole") if CASES[name][2] else ("whole",):  # the first one compiles the extensions of DeepSpeed
        whole = Run(folder / place, name)
        if not whole.wait(RUN_SECONDS) or set(whole.codes.values()) != {0}:
            raise RuntimeError(f"{name}: the undisturbed run fails\n{log_of(folder / place)}")
    typical, expected = time.monotonic() - whole.started, outcome(folder / "whole", name)
    seen: dict[str, Any] = {
        "processes": world, "kills": 0, "while_saving": 0, "left_unfinished": 0, "one_of_two": 0, "survivor_seconds": 0.0,
        "resumed_from_step": dict.fromkeys(range(STEPS + 1), 0), "runs": 0, "different": [], "failed": [],
    }  # fmt: skip
    while seen["kills"] < kills:
        place = folder / f"run-{seen['runs']}"
        seen["runs"] += 1
        while True:
            output = place / CASES[name][0]
            if seen["kills"] >= kills:  # the last run is left to end
                typical_left, saving = 0.0, False
            else:
                typical_left, saving = typical, rng.random() < 0.5
            run = Run(place, name)
            if typical_left and strike(run, output, rng, typical_left, saving):
                # Before they have met, a death is for the launcher to notice: torch waits for the rendezvous, and tries again.
                met = all((place / f"met-{rank}").exists() for rank in range(world))
                one = world > 1 and met and rng.random() < 1 / 2
                killed = [rng.randrange(world)] if one else list(range(world))
                run.kill(killed)
                struck = time.monotonic()
                if not run.wait(SURVIVOR_SECONDS):
                    seen["failed"].append(f"run {seen['runs']}: the other process did not end\n{log_of(place)}")
                    return seen
                # A process that had done its part before the other one died has not survived anything.
                if one and any(code not in (0, -signal.SIGKILL) for code in run.codes.values()):
                    seen["one_of_two"] += 1
                    seen["survivor_seconds"] = max(seen["survivor_seconds"], round(time.monotonic() - struck, 1))
                seen["kills"] += 1
                seen["while_saving"] += saving
                seen["left_unfinished"] += bool(unfinished(output))
                last = last_whole_checkpoint(output)
                seen["resumed_from_step"][int(last.split("-")[-1]) if last else 0] += 1
                continue
            if not run.wait(RUN_SECONDS) or set(run.codes.values()) != {0}:
                seen["failed"].append(f"run {seen['runs']}: ended with {run.codes}\n{log_of(place)}")
                return seen
            break
        got = outcome(place, name)
        seen["different"] += [f"run {seen['runs']}: {part}" for part in expected if not equal(expected[part], got[part])]
        if not seen["different"]:
            shutil.rmtree(place)
        took = time.monotonic() - whole.started
        print(f"{name}: {seen['kills']} kills, {seen['runs']} runs, {took:.0f} s", file=sys.stderr, flush=True)
    return seen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="over all cases together")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON; default: standard output")
    args = parser.parse_args(argv)
    if any(CASES[name][2] for name in args.cases):
        import deepspeed  # noqa: F401  # once, before the forks: a run that imports it lasts three times as long
    started, rng, code = time.monotonic(), random.Random(args.seed), commit()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(args.cases):
            share = args.kills // len(args.cases) + (index < args.kills % len(args.cases))
            if share:
                results[name] = torture(name, share, Path(folder) / name, rng)
    bad = [f"{name}: {what}" for name, seen in results.items() for what in (*seen["different"], *seen["failed"])]
    report = {
        "kills": sum(seen["kills"] for seen in results.values()),
        "while_saving": sum(seen["while_saving"] for seen in results.values()),
        "left_unfinished": sum(seen["left_unfinished"] for seen in results.values()),
        "different_or_failed": len(bad),
        "seconds": round(time.monotonic() - started),
        "seed": args.seed,
        "steps": STEPS,
        "cases": results,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "vgf_llm": __version__, "commit": code,
        },
    }  # fmt: skip
    text = json.dumps(report, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
    print(*bad, sep="\n", file=sys.stderr)
    return int(bool(bad))


def commit() -> str:
    """Of the code that was tried."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    # Forked processes with one thread each: more of them wait for each other on models this small.
    torch.set_num_threads(1)
    sys.exit(main())
