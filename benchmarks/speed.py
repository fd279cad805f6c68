"""What a transported particle costs beside a sampled one: seconds of every stage, and how they grow.

    python -m benchmarks.speed                     small random models, on whatever torch finds
    python -m benchmarks.speed --preset 2.8b       Pythia-2.8B shapes for policy and reward, for a GPU of 141 GB; no grids
    python -m benchmarks.speed --compile           also flow and sampling of models that torch.compile has compiled

Models are initialised at random: speed does not depend on what they say, except for the length of completions, so completions
end at the limit only. Along a gradient field, which has all layers of its own, half or one, on the base model's states,
particles move while they are drawn: what moving takes is what drawing takes longer.
Stages are timed inside `VGFSampler.sample`: reading the prompts, drawing the particles, reading them in
one forward, gradients of the reward (the flow), decoding again, scoring. Every figure is the smallest of `--repeats` runs; ratios
are of runs in turns.

Writes benchmarks/results/speed.json and docs/img/speed.png; speed_2.8b_cuda.json and so on for another preset and on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.flow import TransportBudget
from vgf_llm.text import DifferentiableReward, VGFSampler, decode
from vgf_llm.text.field import SCALES, GradientField, last_layers
from vgf_llm.text.prefix import ROOM, left_pad


ROOT = Path(__file__).resolve().parents[1]
STAGES = ("read prompts", "sample", "read", "flow", "decode again", "score")


@dataclass(frozen=True)
class Load:
    """What is asked for: N particles of length T for so many prompts of length P, moved with L steps."""

    prompts: int = 8
    num_particles: int = 8
    prompt_length: int = 32
    length: int = 64
    steps: int = 5
    kl_budget: float = 1.0
    rounds: int = 1
    movers: int | None = None


# Shape of the models, what is asked for, and completions in memory at once.
PRESETS: dict[str, tuple[dict[str, int], Load, int]] = {
    "small": ({"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}, Load(), 10**6),
    "2.8b": (
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
        Load(prompts=16, prompt_length=512, length=128),
        128,
    ),
}
VOCABULARY = {"small": 2048, "2.8b": 50_254}
GRIDS: dict[str, tuple[int, ...]] = {
    "num_particles": (1, 2, 4, 8, 16, 32, 64),
    "length": (32, 64, 128, 256, 512, 1024),
    "steps": (0, 1, 2, 4, 8, 16),
    "prompts": (1, 2, 4, 8, 16, 32, 64, 128, 256),
}


def build(
    shape: Mapping[str, int], words: int, device: str, members: int, dtype: torch.dtype = torch.float32
) -> tuple[VGFSampler, dict[str, GradientField], list[str]]:
    """A sampler over random models, gradient fields by what they are called, and the words of their vocabulary."""
    names = [f"w{i}" for i in range(words)]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *names])}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    settings: dict[str, Any] = {"max_position_embeddings": 2048, "pad_token_id": 0, "eos_token_id": 1, "num_labels": 1, **shape}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        rewards = [AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval() for _ in range(members)]
    # Never the end of a sequence: all completions have the same length.
    model.get_output_embeddings().register_forward_hook(_no_end)
    sampler = VGFSampler(model, DifferentiableReward(rewards, tokenizer), tokenizer, flow_batch_size=10**6)
    fields = {}
    whole = shape["num_hidden_layers"]
    for name, layers in (
        ("a field", whole),
        ("a field of half the layers", whole // 2),
        ("a field of one layer", 1),
    ):
        field = GradientField(last_layers(model.base_model, layers), sampler.reward.width, whole - layers)
        torch.nn.init.normal_(field.slope.weight)
        field.nats.copy_(torch.tensor(SCALES).square())  # a nat at the scale 1: what it says does not matter
        fields[name] = field.to(dtype)
    return sampler, fields, names


def _no_end(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(logits[..., :2], -1e4), logits[..., 2:]], -1)


@contextmanager
def timed(sampler: VGFSampler) -> Iterator[dict[str, float]]:
    """Seconds by stage of whatever `sampler` does meanwhile."""
    seconds = dict.fromkeys(STAGES, 0.0)

    def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = now(sampler.model.device)
            result = function(*args, **kwargs)
            seconds[stage] += now(sampler.model.device) - started
            return result

        return call

    learned = ((sampler.field, "read", "read prompts"),) if sampler.field else ()
    with ExitStack() as stack:
        for owner, attribute, stage in (
            *learned,
            (decode, "read_prompts", "read prompts"),
            (sampler.reward, "read", "read prompts"),
            (decode, "sample", "sample"),
            (decode, "read", "read"),
            (sampler.reward, "value_and_grad", "flow"),
            (decode, "redecode", "decode again"),
            (sampler.reward, "score_ids", "score"),
        ):
            stack.enter_context(patch.object(owner, attribute, clocked(stage, getattr(owner, attribute))))
        yield seconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(sampler: VGFSampler, words: list[str], load: Load, repeats: int) -> dict[str, Any]:
    """Smallest total of `repeats` runs, with its stages, tokens decoded and peak memory (GPU only)."""
    prompts = prompts_of(words, load)
    budget = TransportBudget(steps=load.steps, step_size=0.5, kl_budget=load.kl_budget, rounds=load.rounds)
    sampler.movers = load.movers
    device, best = sampler.model.device, None
    for repeat in range(repeats):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with timed(sampler) as seconds:
            started = now(device)
            output = sampler.sample(prompts, load.num_particles, budget, load.length, seed=repeat)
            total = now(device) - started
        if best is None or total < best["total"]:
            best = {
                "total": total,
                **seconds,
                "other": total - sum(seconds.values()),
                "generations": float(output.generations.mean()),
            }
            if device.type == "cuda":
                best["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    assert best is not None
    return best


def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16: where it emulates them nobody would use it."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512).to(dtype)
        a @ a  # the first product also chooses a kernel
        started = time.perf_counter()
        for _ in range(5):
            a @ a
        seconds.append(time.perf_counter() - started)
    return seconds[1] < seconds[0]


def floors(device: str) -> dict[str, float]:
    """Measured peak of a large product in TFLOP/s, and bandwidth of a large copy in GB/s."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    big = torch.empty(2**28 if device == "cuda" else 2**25, device=device)
    times: dict[str, float] = {}
    for name, work in (("product", lambda: a @ a), ("copy", lambda: big.clone())):
        seconds = []
        for _ in range(10):
            started = now(a.device)
            work()
            seconds.append(now(a.device) - started)
        times[name] = min(seconds)
    return {"tflops": 2 * size**3 / times["product"] / 1e12, "gb_per_s": 2 * big.nbytes / times["copy"] / 1e9}


def shares(sampler: VGFSampler, load: Load, measured: Mapping[str, float], floor: Mapping[str, float]) -> dict[str, float]:
    """Flow as a share of the matmul peak, sampling as a share of the bandwidth, and tokens that it draws in a second."""
    steps = load.steps * load.rounds
    return {
        "flow_of_peak": steps * flow_flop(sampler, load) / (floor["tflops"] * 1e12) / measured["flow"],
        "sampling_of_bandwidth": sampling_bytes(sampler, load) / (floor["gb_per_s"] * 1e9) / measured["sample"],
        "sampled_tokens_per_s": load.prompts * load.num_particles * load.length / measured["sample"],
    }


def flow_flop(sampler: VGFSampler, load: Load) -> float:
    """Of one step: a forward and a backward of every member to its inputs, 4 FLOPs per weight and token of the completions. There
    is no gradient of a weight, prompts are read once, and products of queries and keys are left out."""
    weights = sum(p.numel() for m in sampler.reward.members for n, p in m.named_parameters() if "embed" not in n)
    return 4.0 * weights * load.prompts * load.num_particles * load.length


def sampling_bytes(sampler: VGFSampler, load: Load) -> float:
    """What must be read to draw all completions: for every token the weights, keys and values of each prompt once, and those of
    each completion so far."""
    config, dtype = sampler.model.config, sampler.model.dtype
    weights = sum(p.nbytes for n, p in sampler.model.named_parameters() if "embed_in" not in n)
    token = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize
    prompts = load.prompts * load.prompt_length * token
    own = load.prompts * load.num_particles * (load.length + 1) / 2 * token
    return load.length * (weights + prompts + own)


def compiled(sampler: VGFSampler, words: list[str], load: Load, floor: Mapping[str, float]) -> dict[str, float]:
    """Flow and sampling of models that `torch.compile` has compiled, and what compiling them took."""
    device = sampler.model.device
    ids, mask = left_pad([sampler.encode([prompt], load.length)[0] for prompt in prompts_of(words, load)], 0, device)
    every = torch.arange(load.prompts, device=device).repeat_interleave(load.num_particles)
    said = torch.randint(2, len(words), (len(every), load.length), device=device)
    keys = torch.cat([decode.row_keys(0, [row], load.num_particles) for row in ids.tolist()]).to(device)
    found: dict[str, float] = {}

    def clock(name: str, work: Callable[[], Any]) -> None:
        seconds = []
        for _ in range(4):
            started = now(device)
            work()
            seconds.append(now(device) - started)
        found[name], found[f"{name}_first"] = min(seconds[1:]), seconds[0]

    with torch.no_grad():
        theirs = sampler.reward.read(ids, mask).deal(every).spread(load.length)
        prefix = decode.read_prompts(sampler.model, ids, mask).deal(every)
    flow = (ids[every], mask[every], sampler.reward.embed(said), torch.ones_like(said, dtype=torch.bool), theirs)
    clock("flow_plain", lambda: sampler.reward.value_and_grad(*flow))
    for member in sampler.reward.members:
        member.base_model.compile()
    clock("flow", lambda: sampler.reward.value_and_grad(*flow))
    found["flow_of_peak"] = flow_flop(sampler, load) / (floor["tflops"] * 1e12) / found["flow"]
    draw = partial(
        decode.sample,
        sampler.model,
        prefix,
        keys,
        base=sampler.base,
        max_new_tokens=load.length,
        eos_ids=sampler.eos_ids,
        pad_id=0,
    )
    clock("sample_plain", draw)
    sampler.model.compile()
    clock("sample", draw)
    found["sampling_of_bandwidth"] = sampling_bytes(sampler, load) / (floor["gb_per_s"] * 1e9) / found["sample"]
    found["sampled_tokens_per_s"] = said.numel() / found["sample"]
    return found


def named(benchmark: str, preset: str, device: str) -> str:
    """Of the file of a report."""
    return f"{benchmark}{'' if preset == 'small' else '_' + preset}{'' if device == 'cpu' else '_cuda'}.json"


def prompts_of(words: list[str], load: Load) -> list[str]:
    return [" ".join(words[(i * 31 + j) % len(words)] for j in range(load.prompt_length)) for i in range(load.prompts)]


def row_bytes(shape: Mapping[str, int], words: int, load: Load, size: int) -> dict[str, float]:
    """Memory that one completion in flight takes at the peak, by what it is; `size` is that of a weight in bytes.

    tables: log mu, the advantages and one copy on the way, float32 [T, V] each. cache: keys and values of base and reward
    model over prompt and completion, with the base model's room for what is decoded next. activations: what a backward to the
    inputs keeps, 17 numbers per layer, channel and token (Korthikanti et al. 2022, arXiv 2205.05198, without attention scores).
    """
    width, layers, tokens = shape["hidden_size"], shape["num_hidden_layers"], load.prompt_length + load.length
    kv = shape.get("kv_size", width)
    return {
        "tables": 3 * 4 * load.length * words,
        "cache": 2 * layers * kv * (2 * tokens + ROOM) * size,
        "activations": 17 * layers * width * load.length * size,
    }


def peak(rows: int, preset: str) -> float:
    """Bytes that a call with so many completions in flight takes at its peak, on a CPU, in a process of its own."""
    shape, load, _ = PRESETS[preset]
    sampler, _, words = build(shape, VOCABULARY[preset], "cpu", 1)
    measure(sampler, words, replace(load, prompts=1, num_particles=1), 1)
    before = high_water()
    measure(sampler, words, replace(load, prompts=1, num_particles=rows), 1)
    return high_water() - before


def high_water() -> float:
    """Most bytes this process has held. Not `getrusage`, whose figure a child inherits from its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024.0 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def memory(preset: str) -> dict[str, Any]:
    """Measured bytes per completion, from the slope over 64 and 192 of them, beside the formula."""
    context = multiprocessing.get_context("spawn")
    few, many = 64, 192
    with context.Pool(1, maxtasksperchild=1) as pool:
        taken = [pool.apply(peak, (rows, preset)) for rows in (few, many)]
    shape, load, _ = PRESETS[preset]
    parts = row_bytes(shape, VOCABULARY[preset], load, 4)
    return {"measured_per_row": (taken[1] - taken[0]) / (many - few), "formula_per_row": sum(parts.values()), "parts": parts}


def ratios(stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What moving the particles takes beside drawing them, and what about 16 completions take beside best-of-64."""
    drawn = stages["best-of-N"]
    whole = {name: found["total"] for name, found in stages.items() if name.startswith(("seven", "16"))}
    moving = {name: found["total"] - drawn["total"] for name, found in stages.items() if not name.startswith(("best", "16"))}
    return {
        **{f"moving / sampling: {name}": seconds / drawn["sample"] for name, seconds in moving.items()},
        **{f"{name} / best-of-64": total / stages["best-of-64"]["total"] for name, total in whole.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--members", type=int, default=1, help="reward models")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--patience", type=float, default=100.0, help="a grid ends behind the first point of so many seconds")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, load, rows = PRESETS[args.preset]
    precisions = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16") if fast_bfloat16() else ("float32",)
    built = {p: build(shape, VOCABULARY[args.preset], device, args.members, getattr(torch, p)) for p in precisions}
    cases = {
        "one round, all particles": load,
        "one round, all particles, L = 1": replace(load, steps=1),
        "drawn along a field": load,
        "drawn along a field of half the layers": load,
        "drawn along a field of one layer": load,
        "seven rounds of two movers, L = 1": replace(load, rounds=7, movers=2, steps=1),
        "16 drawn along a field": replace(load, num_particles=16),
        "16 drawn along a field of half the layers": replace(load, num_particles=16),
        "16 drawn along a field of one layer": replace(load, num_particles=16),
        "best-of-64": replace(load, num_particles=64, steps=0),
        "best-of-N": replace(load, steps=0),
    }
    if args.preset != "small":  # what takes longest and says least
        cases = {
            name: case
            for name, case in cases.items()
            if name not in ("seven rounds of two movers, L = 1", "16 drawn along a field")
        }
    counts = (load.prompts, 1) if args.preset == "small" else (load.prompts,)
    blocks: dict[tuple[str, int], dict[str, Any]] = {(p, count): {} for p in precisions for count in counts}
    for sampler, _, words in built.values():
        sampler.flow_batch_size = rows
        measure(sampler, words, replace(load, length=8), 1)  # warm up
    for _ in range(args.repeats):  # in turns
        for (precision, count), stages in tqdm(blocks.items(), desc="stages", leave=False):
            sampler, fields, words = built[precision]
            for name, case in cases.items():
                sampler.field = next((field for called, field in fields.items() if name.endswith(f"along {called}")), None)
                found = measure(sampler, words, replace(case, prompts=count), 1)
                if name not in stages or found["total"] < stages[name]["total"]:
                    stages[name] = found
    sampler, _, words = built[precisions[0]]
    sampler.field = None
    grids: dict[str, list[dict[str, Any]]] = {}
    for field, whole in GRIDS.items() if args.preset == "small" else ():
        small = replace(load, prompts=2, num_particles=4) if field != "prompts" else replace(load, num_particles=4)
        grids[field] = []
        for value in tqdm(whole, desc=field, leave=False):
            found = measure(sampler, words, replace(small, **{field: value}), args.repeats)
            grids[field].append({field: value, **found})
            if found["total"] > args.patience:
                break
    floor = floors(device)
    report = {
        "memory": memory(args.preset) if device == "cpu" and Path("/proc/self/status").exists() else None,
        "preset": args.preset,
        "load": asdict(load),
        "members": args.members,
        "blocks": [
            {"precision": precision, "prompts": count, "stages": stages, "ratios": ratios(stages)}
            for (precision, count), stages in blocks.items()
        ],
        "floors": floor,
        "shares": shares(sampler, load, blocks[precisions[0], load.prompts]["one round, all particles"], floor),
        "compiled": None,
        "grids": grids,
        "machine": {
            "processor": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    name = named("speed", args.preset, device)
    write_report(ROOT / "benchmarks" / "results" / name, report)
    if args.compile:
        report["compiled"] = compiled(sampler, words, load, floor)
        write_report(ROOT / "benchmarks" / "results" / name, report)
    if grids:
        plot(grids, ROOT / "docs" / "img" / name.replace("json", "png"))
    show(report, Console(width=140))


def plot(grids: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds of every stage against each size, on logarithmic axes, where a line of slope one is a cost per unit."""
    import io

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {"num_particles": "particles N", "length": "completion length T", "steps": "flow steps L", "prompts": "prompts"}
    for ax, (field, points) in zip(figure.subplots(1, len(grids)), grids.items(), strict=True):
        for stage in STAGES:
            ax.plot([p[field] for p in points], [p[stage] for p in points], marker="o", markersize=3, label=stage)
        ax.set(xlabel=labels[field], ylabel="seconds" if field == "num_particles" else None)
        if field != "steps":
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())


def show(report: Mapping[str, Any], console: Console) -> None:
    machine = report["machine"]
    for block in report["blocks"]:
        title = (
            f"seconds, {block['precision']}, {block['prompts']} prompts ({machine['processor']}, {machine['threads']} threads)"
        )
        table = Table(title=title, box=None)
        table.add_column("", no_wrap=True)
        for column in (*STAGES, "other", "total", "generations"):
            table.add_column(column, justify="right")
        for name, found in block["stages"].items():
            table.add_row(name, *(f"{found[c]:.2f}" for c in (*STAGES, "other", "total", "generations")))
        console.print(table)
        console.print(json.dumps(block["ratios"], indent=2))
    console.print(json.dumps({"shares": report["shares"], "compiled": report["compiled"]}, indent=2))


if __name__ == "__main__":
    main()
