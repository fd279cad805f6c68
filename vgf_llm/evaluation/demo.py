"""The main job on the embedded data: train a small world, align it at test time and by fine-tuning, measure, report."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from vgf_llm.data import reviews
from vgf_llm.flow import TransportBudget
from vgf_llm.text import VGFSampler
from vgf_llm.trainer import VGFConfig, VGFTrainer

from .frontier import Measured, Plan, Row, Task, fitted_field, measure_task, row, seeds_by_place
from .metrics import judge_nll
from .plots import plot_budget, plot_frontier, plot_generations
from .report import markdown_table, print_table, write_atomically, write_report
from .training import artefact, ensemble
from .world import FIELD_SEED, MAX_COMPLETION, Settings, World, base_model, build_world, judge_model


STUDENT_BATCH = 16
STUDENT_LEARNING_RATE = 5e-4


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured."""

    settings: Settings
    plan: Plan
    prompts_per_seed: int
    seeds: tuple[int, ...]
    student_steps: int


SCALES = {
    # Shows that everything runs, and measures nothing.
    "quick": Scale(
        Settings(
            steps=300,
            judge_steps=100,
            trunk_pairs=600,
            content_pairs=300,
            content_edits=60,
            content_moved=40,
            tone_pairs=300,
            tone_moved=100,
            field_prompts=24,
            members=2,
        ),
        Plan(pool=16, kl_budgets=(0.0, 1.0, 4.0), field_prompts=24, own_steps=1, own_rounds=2),
        prompts_per_seed=8,
        seeds=(0,),
        student_steps=2,
    ),
    # Minutes on two cores.
    "default": Scale(
        Settings(
            steps=1_900,
            judge_steps=400,
            trunk_pairs=5_000,
            content_pairs=1_300,
            content_edits=500,
            content_moved=400,
            tone_pairs=600,
            tone_moved=600,
            field_prompts=60,
        ),
        Plan(kl_budgets=(0.0, 0.5, 1.0, 4.0, 16.0), field_prompts=150, own_steps=1),
        prompts_per_seed=6,
        seeds=(0, 1, 2),
        student_steps=3,
    ),
    # What docs/method.md reports.
    "full": Scale(
        Settings(
            trunk_pairs=40_000, content_pairs=3_000, content_edits=6_000, content_moved=6_000, tone_pairs=1_000, tone_moved=1_000
        ),
        Plan(pool=256),
        prompts_per_seed=64,
        seeds=(0, 1, 2),
        student_steps=15,
    ),
}


def run_demo(output_dir: Path, scale: str = "default") -> dict:
    """Run everything, write `report.json`, its tables (`report.md`) and the plots to `output_dir`, print and return the report.

    Trained models are kept under `output_dir/models` and found again by their settings. A second process takes a share of the
    work.

    Raises:
        ValueError: `scale` is not one of `SCALES`.
        RuntimeError: the second process failed; it has said why.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    # A pipe or a log file has no width of its own.
    console, started = Console(width=None if sys.stdout.isatty() else 120), time.time()
    log = partial(_log, console, started)
    with _second_process(output_dir, scale, "judge", started):
        _work_on(output_dir, scale, "base", log)
    with _second_process(output_dir, scale, "tone", started) as of_tone:
        rows = _work_on(output_dir, scale, "content", log)
    rows += of_tone
    report = {
        "rows": rows,
        "seconds": time.time() - started,
        "scale": scale,
        "prompts_per_seed": SCALES[scale].prompts_per_seed,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }
    print_table(rows, console)
    write_report(output_dir / "report.json", report)
    write_atomically(output_dir / "report.md", markdown_table(rows).encode())
    plot_frontier(rows, output_dir / "frontier.png")
    plot_generations(rows, output_dir / "generations.png")
    plot_budget(rows, output_dir / "budget.png")
    log(f"wrote {output_dir / 'report.json'} and report.md, frontier.png, generations.png, budget.png beside it")
    return report


def _log(console: Console, started: float, message: str) -> None:
    console.print(f"[dim]{time.time() - started:6.0f} s[/dim]  {message}")


@contextmanager
def _second_process(output_dir: Path, scale: str, part: str, started: float) -> Iterator[list[Row]]:
    """Has a part done beside what stands in the block; its rows are there at the end. Models this small keep one core busy and
    cannot use two."""
    rows: list[Row] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    # Its progress bars get a line of their own.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TQDM_POSITION": "1"}
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "rows.json"
        command = [sys.executable, "-m", __name__, str(output_dir), scale, part, repr(started), str(found)]
        process = subprocess.Popen(command, env=environment)
        try:
            yield rows
            if process.wait():
                raise RuntimeError(
                    f"the process that works on {part} of the demonstration ended with status {process.returncode}"
                )
            rows += json.loads(found.read_text(encoding="utf-8"))
        finally:
            process.kill()
            process.wait()
            torch.set_num_threads(threads)


def _second_process_main(output_dir: str, scale: str, part: str, started: str, rows: str) -> None:
    log = partial(_log, Console(width=None if sys.stdout.isatty() else 120), float(started))
    Path(rows).write_text(json.dumps(_work_on(Path(output_dir), scale, part, log)), encoding="utf-8")


def _work_on(output_dir: Path, scale: str, part: str, log: Callable[[str], None]) -> list[Row]:
    """`part` is "base" or "judge", a model that is trained, or a task, the rows of which are returned."""
    # Progress bars stay; what the libraries say about freshly initialised heads is no news here.
    transformers.logging.set_verbosity_error()
    size, models = SCALES[scale], output_dir / "models"
    if part in ("base", "judge"):
        {"base": base_model, "judge": judge_model}[part](models, size.settings, log)
        return []
    world = build_world(models, size.settings, log, tasks=[part])
    task = Task(
        part, reviews.GOLD[part], partial(_prompts, count=size.prompts_per_seed, task=part), MAX_COMPLETION,
        None if part == "tone" else 0, partial(reviews.generate_prompts, seed=FIELD_SEED, task=part),
    )  # fmt: skip
    rows = measure_task(task, world.base, world.judge, world.rewards[part], size.seeds, size.plan, work=models, log=log)
    return rows + _students(models, task, world, size.settings, size.plan, size.seeds, size.student_steps, log)


def _prompts(seed: int, count: int, task: str) -> list[str]:
    return reviews.generate_prompts(count, seed, task)


def _students(
    directory: Path,
    task: Task,
    world: World,
    settings: Settings,
    plan: Plan,
    seeds: Sequence[int],
    steps: int,
    log: Callable[[str], None],
) -> list[Row]:
    """Two policies fitted for the same number of steps to the best of as many completions: plain ones, and VGF particles."""
    rows, n = [], plan.num_particles * plan.rounds
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    reward = partial(ensemble, world.rewards[task.name], tokenizer)
    base = VGFSampler(AutoModelForCausalLM.from_pretrained(world.base), reward(), tokenizer, flow_batch_size=512)
    field = fitted_field(task, base, world.rewards[task.name], plan, directory, log)
    for method in ("student_best_of_n", "student_vgf"):
        measured = Measured([], [], [], [], [], [], [], [], [], 0.0)
        moved = method == "student_vgf"
        for seed in seeds:

            def make(out: Path, s: Settings, seed: int = seed, moved: bool = moved) -> None:
                started = time.perf_counter()
                trainer = VGFTrainer(
                    model=str(world.base),
                    reward_funcs=reward(),
                    args=VGFConfig(
                        output_dir=str(out),
                        num_generations=n,
                        max_completion_length=MAX_COMPLETION,
                        flow_steps=5 if moved else 0,
                        flow_kl_budget=plan.kl_budget,
                        flow_field=str(field) if moved else None,
                        flow_batch_size=64 * plan.num_particles,
                        per_device_train_batch_size=STUDENT_BATCH,
                        steps_per_generation=min(5, steps),
                        max_steps=steps,
                        learning_rate=STUDENT_LEARNING_RATE,
                        lr_scheduler_type="constant",
                        activation_checkpointing=False,
                        logging_strategy="no",
                        disable_tqdm=False,
                        save_strategy="no",
                        report_to="none",
                        use_cpu=not torch.cuda.is_available(),
                        seed=seed,
                    ),
                    train_dataset=Dataset.from_dict(
                        {"prompt": reviews.generate_prompts(steps * STUDENT_BATCH, 10_000 + seed, task.name)}
                    ),
                )
                trainer.train()
                trainer.save_model()
                (out / "seconds.json").write_text(json.dumps(time.perf_counter() - started))

            rooms = ("data", "flow", "text", "trainer")
            path = artefact(directory, f"{method}-{task.name}-{seed}", (settings, plan, steps), make, log, rooms)
            _judge_student(measured, task, world, path, seed)
        extra = {"steps": steps, "members": settings.members, "seeds": len(seeds)}
        rows.append(row(task, method, measured, 1, 1, training_particles=n, **extra))
    return rows


def _judge_student(measured: Measured, task: Task, world: World, path: Path, seed: int) -> None:
    """Fresh samples of the student: 8 per held-out prompt, all of them counted. KL(student || base) from the same samples."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    student = AutoModelForCausalLM.from_pretrained(path)
    base, judge = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (world.base, world.judge))
    prompts = task.prompts(seed)
    out = (
        VGFSampler(student, ensemble(world.rewards[task.name], tokenizer), tokenizer, flow_batch_size=512)
        .sample(prompts, 8, TransportBudget(steps=0), task.max_completion_length, seed=seeds_by_place(seed, prompts))
        .initial
    )
    flat = [p for p in prompts for _ in range(8)]
    ids = [i for row in out.completion_ids for i in row]
    by_prompt = {
        "proxy": out.rewards,
        "nll_base": judge_nll(base, tokenizer, flat, ids).view(-1, 8),
        "nll_judge": judge_nll(judge, tokenizer, flat, ids).view(-1, 8),
    }
    gold = [float(np.mean([task.gold(p, c) for c in cs])) for p, cs in zip(prompts, out.completions, strict=True)]
    measured.gold += gold
    measured.population_gold += gold
    measured.proxy += by_prompt["proxy"].mean(1).tolist()
    measured.nll_base += by_prompt["nll_base"].mean(1).tolist()
    measured.nll_judge += by_prompt["nll_judge"].mean(1).tolist()
    kl = (out.logprobs.double() + by_prompt["nll_base"]).mean(1).tolist()
    measured.kl += kl
    measured.population_kl += kl
    measured.completions += [cs[0] for cs in out.completions]
    measured.generations += [1.0] * len(prompts)
    measured.seconds += json.loads((path / "seconds.json").read_text())


if __name__ == "__main__":
    _second_process_main(*sys.argv[1:])
