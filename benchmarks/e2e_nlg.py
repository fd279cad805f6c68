"""VGF beside best-of-n on real text: the E2E challenge, content and order judged by exact slot coverage.

    python -m benchmarks.e2e_nlg --data ../e2e-dataset

Trains a small base model and a judge on the human sentences (meaning representation as prompt, in the order in which the
sentence states it), three proxy reward models, and prints the table of the demonstration. The reward models learn to read from
the human sentences, which cost no label, and then compare base samples, edits of them, and texts that the flow of earlier ones
has moved, labelled by a noisy version of the gold reward. `--data` is a directory with `devset.csv` and `testset_w_refs.csv` of
the E2E data set.

Writes benchmarks/results/e2e_nlg.json, the same as tables in e2e_nlg.md, and docs/img/e2e_*.png.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vgf_llm.data.e2e import PROMPT_SEPARATOR, e2e_gold, format_prompt, load_e2e, parse_mr, split_by_mr, spoken_order
from vgf_llm.evaluation.frontier import Plan, Task, measure_task
from vgf_llm.evaluation.labels import Labels, train_members
from vgf_llm.evaluation.plots import plot_frontier, plot_generations
from vgf_llm.evaluation.preferences import Pair, preference_pairs
from vgf_llm.evaluation.report import markdown_table, print_table, write_atomically, write_report
from vgf_llm.evaluation.training import SPECIAL, artefact, train_language_model, train_reward_model
from vgf_llm.evaluation.world import FIELD_SEED


ROOT = Path(__file__).resolve().parents[1]
MAX_COMPLETION = 72
CONTEXT = 176
PAIRS = 4_000  # per reward model
NOISE = 0.5  # of labels, in units of gold
TRUNK_PAIRS = 8_000
REWARD_RATES = {"learning_rate": 1e-3, "matrix_learning_rate": 2e-3}


def gold(prompt: str, text: str) -> float:
    """Exact ordered slot coverage; the prompt says which slots and in which order."""
    return e2e_gold(parse_mr(prompt), text)


def bpe_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL[:3]),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        padding_side="left",
    )


def sentences_apart(examples: list[tuple[str, str]], count: int, seed: int) -> list[Pair]:
    """(prompt, its human sentence, one of another prompt that asks for much of the same): comparisons that need no label."""
    rng, pairs = random.Random(seed), []
    slots = [set(prompt.removesuffix(PROMPT_SEPARATOR).split(", ")) for prompt, _ in examples]
    while len(pairs) < count:
        own = rng.randrange(len(examples))
        others = [i for i in rng.sample(range(len(examples)), 60) if examples[i][0] != examples[own][0]]
        near = max(others, key=lambda i: len(slots[own] & slots[i]) - abs(len(slots[own]) - len(slots[i])))
        pairs.append((*examples[own], examples[near][1]))
    return pairs


def labels(base: Path, trunk: Path, prompts: list[str], pairs: int, moved: int) -> Labels:
    """What members of the reward compare: samples, edits of samples, and moved texts. They start from the trunk."""

    def plain(member: int) -> list[Pair]:
        samples = (pairs - moved) // 2
        return preference_pairs(
            base, prompts, gold, samples=samples, edits=pairs - moved - samples, noise=NOISE,
            max_completion_length=MAX_COMPLETION, seed=member,
        )  # fmt: skip

    def train(out: Path, compared: list[Pair], member: int) -> None:
        train_reward_model(
            out, trunk, compared, **REWARD_RATES, seed=member, name=f"reward-{member}", max_length=CONTEXT,
            mixtures=(base, PROMPT_SEPARATOR),
        )  # fmt: skip

    seen = random.Random(FIELD_SEED).sample(prompts, min(1_000, len(prompts)))
    return Labels(plain, moved, lambda member: prompts, seen, gold, NOISE, MAX_COMPLETION, train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="directory of the E2E data set")
    parser.add_argument("--work", default=ROOT / "outputs" / "e2e", type=Path, help="where trained models are kept")
    parser.add_argument("--steps", default=2000, type=int, help="training steps of the base model")
    parser.add_argument("--pairs", default=PAIRS, type=int, help="preference pairs per reward model")
    parser.add_argument(
        "--moved", type=int, help="so many of them in a second round, of moved texts; default: half; 0: one round"
    )
    parser.add_argument("--prompts", default=32, type=int, help="held-out meaning representations per seed")
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    args = parser.parse_args()
    if args.moved is None:
        args.moved = args.pairs // 2
    if not 0 <= args.moved < args.pairs:
        parser.error(f"--moved must leave some of the {args.pairs} pairs to the first round, got {args.moved}")
    console, started = Console(), time.perf_counter()
    needed = args.prompts * len(args.seeds)
    train, held_out = split_by_mr(load_e2e(args.data), seed=0, held_out=needed)
    examples = [(format_prompt(spoken_order(e.slots, e.reference)), e.reference) for e in train]
    held_out_prompts = sorted({format_prompt(e.slots) for e in held_out})
    random.Random(0).shuffle(held_out_prompts)
    train_prompts = [p for p, _ in examples]

    def train_lm(path: Path, recipe: tuple[str, int, int]) -> None:
        name, seed, steps = recipe
        train_language_model(
            path, tokenizer, examples, hidden_size=128, layers=3, heads=4, context=CONTEXT, steps=steps,
            learning_rate=2e-3, matrix_learning_rate=5e-3, seed=seed, name=name, batch_size=16,
        )  # fmt: skip

    def train_trunk(path: Path, recipe: tuple[str, int]) -> None:
        compared = sentences_apart(examples, recipe[1], seed=0)
        train_reward_model(path, base, compared, **REWARD_RATES, seed=0, name="reward-trunk", max_length=CONTEXT)

    tokenizer = bpe_tokenizer([f"{p} {c}" for p, c in examples], 1000)
    base, judge = (
        artefact(args.work, name, (name, seed, steps), train_lm, console.log)
        for name, seed, steps in (("base", 0, args.steps), ("judge", 1, args.steps // 2))
    )
    trunk = artefact(args.work, "reward-trunk", (base.name, TRUNK_PAIRS), train_trunk, console.log)
    compared = labels(base, trunk, train_prompts, args.pairs, args.moved)
    members = train_members(args.work, "e2e", base, compared, 3, (trunk.name, args.pairs, args.moved), console.log)
    task = Task(
        "e2e", gold, lambda seed: held_out_prompts[seed * args.prompts : (seed + 1) * args.prompts], MAX_COMPLETION,
        seen=lambda count: random.Random(1).sample(train_prompts, count),
    )  # fmt: skip
    rows = measure_task(task, base, judge, members, args.seeds, Plan(pool=256), work=args.work, log=console.log)
    print_table(rows, console)
    write_report(
        ROOT / "benchmarks" / "results" / "e2e_nlg.json",
        {
            "rows": rows,
            "settings": {k: v for k, v in vars(args).items() if k not in ("data", "work")},
            "seconds": time.perf_counter() - started,
            "machine": {"processor": platform.machine(), "cores": torch.get_num_threads()},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
    )
    write_atomically(ROOT / "benchmarks" / "results" / "e2e_nlg.md", markdown_table(rows).encode())
    plot_frontier(rows, ROOT / "docs" / "img" / "e2e_frontier.png")
    plot_generations(rows, ROOT / "docs" / "img" / "e2e_generations.png")


if __name__ == "__main__":
    main()
