"""`vgf serve` under many clients, and the sampler over many prompts: memory, latency, and whether every answer is the right one.

    python -m tests.load --clients 32 --seconds 600 --prompts 100000 --output benchmarks/results/load.json

Clients ask a tiny model in this process, over a real socket, with random prompts, seeds, lengths and budgets, and hang up on one
request in ten. Every answer is compared with what the sampler says of that request alone. Memory is what the process holds
(resident), as medians of the first and the last fifth of its samples after a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from tests import tiny
from vgf_llm import TransportBudget, VGFSampler, __version__
from vgf_llm.serving import Limits, create_app, listen


PROMPTS = [" ".join(words) for words in itertools.product(("the", "a", "nice"), ("food", "room", "staff"), ("was", "were"))]
GROWTH = 0.05


def make_sampler() -> VGFSampler:
    tokenizer = tiny.tokenizer(chat=True)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = tiny.language_model("llama", len(tokenizer), eos=eos, pad=pad)
    return VGFSampler(model, tiny.reward_model("llama", len(tokenizer), pad=pad), tokenizer)


def resident() -> float:
    """Mebibytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(memory: list[float]) -> dict[str, float]:
    fifth = max(1, len(memory) // 5)
    first, last = statistics.median(memory[:fifth]), statistics.median(memory[-fifth:])
    return {"first_mib": round(first, 1), "last_mib": round(last, 1), "growth": round(last / first - 1, 4)}


def request(rng: random.Random) -> dict[str, Any]:
    return {
        "model": "tiny", "prompt": rng.choice(PROMPTS), "seed": rng.randrange(5), "max_tokens": rng.choice([2, 5, 8]),
        "num_particles": rng.choice([1, 2, 4]), "steps": rng.choice([0, 1, 2]), "kl_budget": rng.choice([0.5, 2.0]),
    }  # fmt: skip


def serve(clients: int, seconds: float, warm_up: float) -> dict[str, Any]:
    """The load on the server; what was seen."""
    served, alone = make_sampler(), make_sampler()
    listening = listen("127.0.0.1", 0, None)
    config = uvicorn.Config(
        create_app(served, "tiny", Limits(queue=4 * clients)), log_level="warning", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    end, lock = time.monotonic() + seconds, threading.Lock()
    answers: dict[str, set[str]] = {}
    seen: dict[str, Any] = {"answered": 0, "hung_up": 0, "other": {}}
    latencies: list[float] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(timeout=60) as http:
            while time.monotonic() < end:
                body, started = request(rng), time.monotonic()
                patience = rng.uniform(0.001, 0.05) if rng.random() < 0.1 else 60.0
                try:
                    answer = http.post(url, json=body, timeout=patience)
                except httpx.TimeoutException:
                    with lock:
                        key = "hung_up" if patience < 60 else "lost"
                        seen[key] = seen.get(key, 0) + 1
                    continue
                with lock:
                    if answer.status_code == 200:
                        seen["answered"] += 1
                        latencies.append(time.monotonic() - started)
                        answers.setdefault(json.dumps(body), set()).add(answer.json()["choices"][0]["text"])
                    else:
                        seen["other"][answer.status_code] = seen["other"].get(answer.status_code, 0) + 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for one in threads:
        one.start()
    memory = []
    began = time.monotonic()
    while time.monotonic() < end:
        time.sleep(0.5)
        if time.monotonic() - began > warm_up:
            memory.append(resident())
    for one in threads:
        one.join()
    server.should_exit = True
    thread.join()
    listening.close()
    wrong = 0
    for key, texts in answers.items():
        body = json.loads(key)
        budget = TransportBudget(steps=body["steps"], kl_budget=body["kl_budget"])
        expected = alone.sample([body["prompt"]], body["num_particles"], budget, body["max_tokens"], seed=body["seed"])
        wrong += texts != {expected.completions[0]}
    latencies.sort()
    return seen | {
        "clients": clients, "seconds": seconds, "different_requests": len(answers), "wrong_answers": wrong,
        "lost": seen.get("lost", 0),
        "median_s": round(latencies[len(latencies) // 2], 3), "p99_s": round(latencies[int(len(latencies) * 0.99)], 3),
        "memory": growth(memory),
    }  # fmt: skip


def loop(prompts: int) -> dict[str, Any]:
    """The sampler over many prompts."""
    sampler, rng, memory, done = make_sampler(), random.Random(0), [], 0
    started = time.monotonic()
    while done < prompts:
        some = [rng.choice(PROMPTS) for _ in range(16)]
        sampler.sample(some, 2, TransportBudget(steps=1), 6, seed=done)
        done += len(some)
        if done > prompts // 5:  # the allocator has seen all shapes by then
            gc.collect(0)
            memory.append(resident())
    return {"prompts": done, "seconds": round(time.monotonic() - started), "memory": growth(memory)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--output", type=Path, help="JSON; default: standard output")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = {
        "server": serve(args.clients, args.seconds, min(30.0, args.seconds / 4)),
        "sampler": loop(args.prompts),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "vgf_llm": __version__},
    }
    text = json.dumps(report, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
    server, sampler = report["server"], report["sampler"]
    bad = server["wrong_answers"] or server["lost"] or server["other"] or server["memory"]["growth"] > GROWTH
    return int(bool(bad or sampler["memory"]["growth"] > GROWTH))


if __name__ == "__main__":
    sys.exit(main())
