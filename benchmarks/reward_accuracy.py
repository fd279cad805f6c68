"""Has a reward model learned what its labels say? Accuracy on its own pairs and on fresh ones, by start and optimizer.

    python -m benchmarks.reward_accuracy --models DIR --e2e-models DIR --e2e-data DIR

Base models and label-free trunks are those of `vgf demo --scale full` and of benchmarks/e2e_nlg.py; labels are as many as theirs,
in one round. One member each. Fresh pairs are the base model's on held-out prompts, labelled without noise: two samples, or a
sample and an edit of it.

Writes benchmarks/results/reward_accuracy.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import e2e_nlg
from benchmarks.cells import environment
from benchmarks.diagnose import E2E_HELD_OUT, e2e_prompts, newest
from vgf_llm.data import reviews
from vgf_llm.data.e2e import PROMPT_SEPARATOR, format_prompt, load_e2e, split_by_mr, spoken_order
from vgf_llm.evaluation.demo import SCALES
from vgf_llm.evaluation.preferences import Pair, preference_pairs
from vgf_llm.evaluation.report import write_atomically, write_report
from vgf_llm.evaluation.training import artefact, train_reward_model
from vgf_llm.evaluation.world import MAX_COMPLETION, MAX_REVIEW, content_labels, tone_labels


ROOT = Path(__file__).resolve().parents[1]
FRESH = 1_000  # pairs of each kind
SEED = 40_000  # of the prompts and noise of fresh pairs


@dataclass(frozen=True)
class Taught:
    """A task whose reward models are compared: `starts` are what they may start from, `pairs` what they learn."""

    name: str
    base: Path
    starts: Mapping[str, Path]
    pairs: Callable[[], list[Pair]]
    prompts: Callable[[], list[str]]
    gold: Callable[[str, str], float]
    max_completion_length: int
    max_length: int
    separator: str
    rates: tuple[float, float]  # of AdamW, and of Muon for the matrices

    def fresh(self, samples: int, edits: int) -> list[Pair]:
        return preference_pairs(
            self.base, self.prompts(), self.gold, samples=samples, edits=edits, noise=1e-9,
            max_completion_length=self.max_completion_length, seed=SEED,
        )  # fmt: skip


@torch.no_grad()
def accuracy(model: Path, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose chosen text has the higher score."""
    tokenizer, scorer = AutoTokenizer.from_pretrained(model), AutoModelForSequenceClassification.from_pretrained(model).eval()

    def scores(texts: list[str]) -> torch.Tensor:
        encoded = tokenizer([f"{text} {tokenizer.eos_token}" for text in texts], padding=True, return_tensors="pt")
        return scorer(**{key: encoded[key] for key in ("input_ids", "attention_mask")}).logits[:, 0]

    right = 0
    for start in range(0, len(pairs), 128):
        batch = pairs[start : start + 128]
        chosen, rejected = (scores([f"{pair[0]} {pair[side]}" for pair in batch]) for side in (1, 2))
        right += int((chosen > rejected).sum())
    return right / len(pairs)


def measured(task: Taught, work: Path) -> list[dict]:
    """A row for every start and optimizer; what was trained is kept in `work`."""
    rows = []
    wanted = [(start, optimizer) for start in task.starts for optimizer in ("AdamW", "Muon")]
    if any(not (work / f"{task.name}-{start}-{optimizer}.json").is_file() for start, optimizer in wanted):
        pairs, samples, edits = task.pairs(), task.fresh(FRESH, 0), task.fresh(0, FRESH)
    for start, optimizer in wanted:
        kept = work / f"{task.name}-{start}-{optimizer}.json"
        if not kept.is_file():
            model, begun = work / f"{task.name}-{start}-{optimizer}", time.process_time()
            train_reward_model(
                model, task.starts[start], pairs, learning_rate=task.rates[0],
                matrix_learning_rate=task.rates[1] if optimizer == "Muon" else None, seed=1, name=model.name,
                max_length=task.max_length, mixtures=(task.base, task.separator),
            )  # fmt: skip
            row = {
                "task": task.name, "start": start, "optimizer": optimizer, "pairs": len(pairs),
                "cpu_seconds": time.process_time() - begun, "own_pairs": accuracy(model, pairs),
                "fresh_samples": accuracy(model, samples), "fresh_edits": accuracy(model, edits),
            }  # fmt: skip
            write_atomically(kept, json.dumps(row).encode())
            print(row, flush=True)
        rows.append(json.loads(kept.read_bytes()))
    return rows


def content(models: Path, work: Path) -> Taught:
    s, base = SCALES["full"].settings, newest(models, "base")

    def train(out: Path, _: str) -> None:
        compared = reviews.generate_preferences(s.trunk_pairs, s.seed * 1000, "content", s.content_noise)
        train_reward_model(
            out, base, [(p.prompt, p.chosen, p.rejected) for p in compared], learning_rate=s.reward_learning_rate,
            seed=s.seed * 1000, name="trunk by AdamW", max_length=MAX_REVIEW,
        )  # fmt: skip

    by_adamw = artefact(work, "trunk-AdamW", base.name, train, print)
    by_muon = newest(models, "reward-trunk")
    one_round = replace(s, content_edits=s.content_edits + s.content_moved, content_moved=0)
    return Taught(
        "content", base, {"trunk by AdamW": by_adamw, "trunk by Muon": by_muon},
        lambda: content_labels(one_round, base, by_muon).plain(0), lambda: reviews.generate_prompts(1_000, SEED, "content"),
        reviews.content_gold, MAX_COMPLETION, MAX_REVIEW, ":", (s.reward_learning_rate, s.content_matrix_learning_rate),
    )  # fmt: skip


def tone(models: Path) -> Taught:
    s, base = SCALES["full"].settings, newest(models, "base")
    one_round = replace(s, tone_pairs=s.tone_pairs + s.tone_moved, tone_moved=0)
    return Taught(
        "tone", base, {"base": base}, lambda: tone_labels(one_round, base).plain(0),
        lambda: reviews.generate_prompts(1_000, SEED, "tone"), reviews.tone_gold, MAX_COMPLETION, MAX_REVIEW, ":",
        (s.reward_learning_rate, s.content_matrix_learning_rate),
    )  # fmt: skip


def e2e(models: Path, data: Path) -> Taught:
    base, trunk = newest(models, "base"), newest(models, "reward-trunk")
    examples, _ = split_by_mr(load_e2e(data), seed=0, held_out=E2E_HELD_OUT)
    prompts = [format_prompt(spoken_order(e.slots, e.reference)) for e in examples]
    rates = e2e_nlg.REWARD_RATES
    return Taught(
        "e2e", base, {"base": base, "trunk": trunk}, lambda: e2e_nlg.labels(base, trunk, prompts, e2e_nlg.PAIRS, 0).plain(0),
        lambda: random.Random(SEED).choices(e2e_prompts(data, E2E_HELD_OUT, SEED), k=1_000), e2e_nlg.gold,
        e2e_nlg.MAX_COMPLETION, e2e_nlg.CONTEXT, PROMPT_SEPARATOR, (rates["learning_rate"], rates["matrix_learning_rate"]),
    )  # fmt: skip


def markdown(rows: Sequence[Mapping]) -> str:
    """The table that docs/method.md quotes."""
    names = {"tone": "tone", "content": "content", "e2e": "E2E"}
    lines = ["| | start | optimizer | own pairs | fresh samples | fresh edits |", "|:--|:--|:--|--:|--:|--:|"]
    lines += [
        f"| {names[r['task']]} | {r['start']} | {r['optimizer']} | "
        + " | ".join(f"{r[key]:.2f}" for key in ("own_pairs", "fresh_samples", "fresh_edits"))
        + " |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=ROOT / "outputs" / "full" / "models", type=Path, help="models of the demonstration")
    parser.add_argument("--e2e-models", type=Path, help="models of benchmarks/e2e_nlg.py; default: none, and no E2E")
    parser.add_argument("--e2e-data", type=Path, help="directory of the E2E data set")
    parser.add_argument("--work", default=ROOT / "outputs" / "reward_accuracy", type=Path, help="where what was trained is kept")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    rows = measured(tone(args.models), args.work) + measured(content(args.models, args.work), args.work)
    if args.e2e_models:
        rows += measured(e2e(args.e2e_models, args.e2e_data), args.work)
    results = ROOT / "benchmarks" / "results"
    write_report(results / "reward_accuracy.json", {"rows": rows, "fresh_pairs": FRESH, **environment()})
    write_atomically(results / "reward_accuracy.md", markdown(rows).encode())


if __name__ == "__main__":
    main()
