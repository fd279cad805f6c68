"""`vgf diagnose` where the outcome is known: tone, content, E2E. Does it recommend what was measured to be best?

Without a gradient field, and with the one that is kept beside the models.

    python -m benchmarks.diagnose --models outputs/demo/models --e2e-models outputs/e2e --e2e-data DIR

Models are those of `vgf demo` and of benchmarks/e2e_nlg.py; one group may be left out. The gold rewards are asked as well, so
that the thresholds of the recommendation can be seen beside what they stand for.

Writes benchmarks/results/diagnose_TASK.json and docs/img/diagnose_TASK.png.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from vgf_llm.data import reviews
from vgf_llm.data.e2e import e2e_gold, format_prompt, load_e2e, parse_mr, split_by_mr
from vgf_llm.evaluation.diagnose import diagnose, print_diagnosis, recommend
from vgf_llm.evaluation.loading import load_sampler
from vgf_llm.evaluation.plots import plot_diagnosis
from vgf_llm.evaluation.report import write_report
from vgf_llm.text import VGFSampler


ROOT = Path(__file__).resolve().parents[1]
# Meaning representations that the models of benchmarks/e2e_nlg.py, at its defaults, were not trained on.
E2E_HELD_OUT = 96


@dataclass(frozen=True)
class KnownTask:
    """A task with its models; `prompts(count, seed)` are held out. `field`: of the gradient field fitted to its rewards."""

    name: str
    base: Path
    rewards: list[str]
    gold: Callable[[str, str], float]
    prompts: Callable[[int, int], list[str]]
    max_completion_length: int
    field: Callable[[], Path]

    def sampler(self, **options: object) -> VGFSampler:
        return load_sampler(str(self.base), self.rewards, flow_batch_size=512, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=Path, help="models of the demonstration")
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument("--tasks", nargs="+", choices=("tone", "content", "e2e"), help="default: all that have models")


def newest(models: Path, name: str) -> Path:
    """The directory `name`, or the newest `name-HASH`, as the demonstration keeps its models.

    Raises:
        SystemExit: there is none.
    """
    found = (
        [models / name] if (models / name).is_dir() else sorted(models.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    )
    if not found:
        raise SystemExit(f"{models} holds no model {name}: give the directory that `vgf demo` keeps its models in")
    return found[-1]


def known_tasks(args: argparse.Namespace) -> list[KnownTask]:
    tasks = []
    if args.models:
        for name in ("tone", "content"):
            rewards = [str(newest(args.models, f"reward-{name}-{k}")) for k in range(3)]
            tasks.append(
                KnownTask(
                    name, newest(args.models, "base"), rewards, reviews.GOLD[name],
                    lambda count, seed, name=name: reviews.generate_prompts(count, seed, name), 64,
                    partial(newest, args.models, f"field-{name}-3"),
                )
            )  # fmt: skip
    if args.e2e_models:
        base = newest(args.e2e_models, "base")
        rewards = [str(newest(args.e2e_models, f"reward-e2e-{k}")) for k in range(3)]
        tasks.append(
            KnownTask(
                "e2e", base, rewards, lambda prompt, text: e2e_gold(parse_mr(prompt), text),
                lambda count, seed: e2e_prompts(args.e2e_data, count, seed), 72, partial(newest, args.e2e_models, "field-e2e-3"),
            )
        )  # fmt: skip
    return [task for task in tasks if not args.tasks or task.name in args.tasks]


def e2e_prompts(data: Path, count: int, seed: int) -> list[str]:
    """Held-out meaning representations, their slots in random orders: another order is another task."""
    _, examples = split_by_mr(load_e2e(data), seed=0, held_out=E2E_HELD_OUT)
    slots = sorted({e.slots for e in examples})
    rng = random.Random(f"order {seed}")
    rng.shuffle(slots)
    return [format_prompt(rng.sample(s, len(s))) for s in (slots[k % len(slots)] for k in range(count))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--prompts", default=24, type=int)
    args = parser.parse_args()
    for task in known_tasks(args):
        report = diagnose(
            task.sampler(gradient_field=str(task.field())), task.prompts(args.prompts, 77), task.gold,
            max_completion_length=task.max_completion_length,
        )  # fmt: skip
        own = [gain for gain in report["gain"] if gain["direction"] != "field"]
        report["recommendation_without_field"] = recommend({**report, "gain": own})
        print(task.name)
        print_diagnosis(report, Console(width=130))
        write_report(ROOT / "benchmarks" / "results" / f"diagnose_{task.name}.json", report)
        plot_diagnosis(report, ROOT / "docs" / "img" / f"diagnose_{task.name}.png")


if __name__ == "__main__":
    main()
