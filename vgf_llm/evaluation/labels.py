"""Where the labels of reward models go: in a second round, to texts that the flow of the first has moved.

A reward model errs where it has compared nothing, and its gradient leads there. As many labels are worth more when a part of them
is spent on texts drawn along the gradient field of reward models that were trained on the others (docs/ablations.md).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from vgf_llm.text import VGFSampler
from vgf_llm.text.field import GradientField

from .preferences import Pair, moved_pairs
from .training import COMPARISONS, HELD_OUT, artefact, ensemble, trained_field


# Of what the field of the first round is fitted to; that of the final reward models has noise of its own.
FIRST_SEED = 31_000


@dataclass(frozen=True)
class Labels:
    """The comparisons that the reward models of one task are trained on.

    Attributes:
        plain: member -> pairs of texts that no reward model had a part in.
        moved: pairs of moved texts that a member compares beside them; 0: there is one round.
        prompts: member -> what moved texts are written to.
        seen: prompts to fit the field of the first round to.
        gold, noise: who labels moved pairs, and how noisily, in units of gold.
        max_completion_length: of moved texts, tokens.
        train: directory, pairs, member -> a reward model there, as `training.train_reward_model` makes it.
    """

    plain: Callable[[int], list[Pair]]
    moved: int
    prompts: Callable[[int], Sequence[str]]
    seen: Sequence[str]
    gold: Callable[[str, str], float]
    noise: float
    max_completion_length: int
    train: Callable[[Path, list[Pair], int], None]


def train_members(
    directory: Path, task: str, base: Path, labels: Labels, members: int, recipe: Any, log: Callable[[str], None]
) -> list[Path]:
    """`directory/reward-<task>-<member>-<hash>`, what is missing trained.

    Moved pairs are drawn along the field of an ensemble `first-<task>-<member>` on the plain pairs alone; what is returned is
    trained on all, from the same start. Of the pairs that a member was not trained on those of moved texts, if there are any, are
    kept beside it: they say what likelihood is worth where the flow leads (`likelihood_worth`).
    """
    plain = cache(labels.plain)

    def trained(name: str, moved: Callable[[int], list[Pair]] | None) -> list[Path]:
        def make(out: Path, _: Any, member: int) -> None:
            pairs = telling = plain(member)
            if moved is not None:
                telling = moved(member)
                pairs = pairs + telling
                random.Random(member).shuffle(pairs)
            labels.train(out, pairs, member)
            of_telling = set(telling)
            held_out = [(p, f" {c}", f" {r}") for p, c, r in pairs[:HELD_OUT] if (p, c, r) in of_telling]
            (out / COMPARISONS).write_text(json.dumps(held_out))

        rooms = ("data", "flow", "text")
        return [
            artefact(directory, f"{name}-{task}-{k}", recipe, partial(make, member=k), log, rooms=rooms) for k in range(members)
        ]

    if not labels.moved:
        return trained("reward", None)

    first = trained("first", None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    sampler = VGFSampler(model, ensemble(first, tokenizer), tokenizer, flow_batch_size=512)
    field = trained_field(
        directory, f"first-{task}", sampler, first, labels.seen, max_completion_length=labels.max_completion_length,
        seed=FIRST_SEED, log=log,
    )  # fmt: skip
    sampler.field = GradientField.from_pretrained(field)

    def moved(member: int) -> list[Pair]:
        return moved_pairs(
            sampler, labels.prompts(member), labels.gold, count=labels.moved, noise=labels.noise,
            max_completion_length=labels.max_completion_length, seed=member,
        )  # fmt: skip

    return trained("reward", moved)
