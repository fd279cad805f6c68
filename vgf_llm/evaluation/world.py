"""The small world the demonstration is measured in: a base model, a judge and proxy rewards, trained from the embedded data."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vgf_llm.data import reviews

from .labels import Labels, train_members
from .preferences import Pair, preference_pairs
from .training import artefact, train_language_model, train_reward_model, word_tokenizer


MAX_COMPLETION = 64  # tokens; the longest text of the grammar has fewer
MAX_REVIEW = 128  # tokens, with its prompt
FIELD_SEED = 31_000  # of the prompts that gradient fields are fitted to


@dataclass(frozen=True)
class Settings:
    """What the world is made of. A change makes new artefacts."""

    seed: int = 0
    texts: int = 56_000
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    steps: int = 3_500
    judge_steps: int = 800
    readings: float = 0.3  # share of the training texts that teach to read: text -> request
    learning_rate: float = 4e-3
    matrix_learning_rate: float = 7e-3
    members: int = 3
    trunk_pairs: int = 10_000
    content_pairs: int = 2_000
    content_edits: int = 4_000
    content_moved: int = 0  # comparisons of moved texts (labels.py); 0: one round of labels
    content_noise: float = 0.1  # in units of the gold reward: differences are 0.17 to 1.5
    tone_pairs: int = 2_000
    tone_moved: int = 0
    tone_noise: float = 2.0  # in words
    reward_learning_rate: float = 1e-3
    content_matrix_learning_rate: float = 2e-3  # of Muon, for the content reward and its trunk
    field_prompts: int = 1_000  # that the field of the first round is fitted to


@dataclass(frozen=True)
class World:
    """Directories of the trained models; `rewards[task]` are the members of that task's proxy (`training.ensemble`)."""

    base: Path
    judge: Path
    rewards: dict[str, list[Path]]


def build_world(
    directory: Path, settings: Settings, log: Callable[[str], None], tasks: Sequence[str] = ("content", "tone")
) -> World:
    """Train what is missing under `directory` and return where everything is."""
    base, judge = base_model(directory, settings, log), judge_model(directory, settings, log)
    labels = {
        "content": lambda: content_labels(settings, base, trunk_model(directory, settings, log)),
        "tone": lambda: tone_labels(settings, base),
    }
    rewards = {name: train_members(directory, name, base, labels[name](), settings.members, settings, log) for name in tasks}
    return World(base, judge, rewards)


def base_model(directory: Path, settings: Settings, log: Callable[[str], None]) -> Path:
    """What all samples are drawn from, trained if it is not there."""
    return artefact(directory, "base", settings, _train_base, log)


def judge_model(directory: Path, settings: Settings, log: Callable[[str], None]) -> Path:
    """Other texts and another initialisation than the base model: what only the base model finds fluent does not pass."""
    return artefact(directory, "judge", settings, _train_judge, log)


def trunk_model(directory: Path, settings: Settings, log: Callable[[str], None]) -> Path:
    """What members of the content reward start from: comparisons of texts in which one thing that is said differs."""
    train = partial(_train_trunk, base=base_model(directory, settings, log))
    return artefact(directory, "reward-trunk", settings, train, log)


def content_labels(s: Settings, base: Path, trunk: Path) -> Labels:
    """What members of the content reward compare: generated texts, edits of the base model's own, moved ones. They start from the
    trunk, and are trained between tokens too (`mix_embeddings`)."""

    def seed(member: int) -> int:
        return s.seed * 1000 + member + 1

    def prompts(member: int) -> list[str]:
        return reviews.generate_prompts(1_000, 20_000 + seed(member), "content")

    def plain(member: int) -> list[Pair]:
        generated = reviews.generate_preferences(s.content_pairs, seed(member), "content", s.content_noise)
        edits = preference_pairs(
            base, prompts(member), reviews.content_gold, samples=0, edits=s.content_edits, noise=s.content_noise,
            max_completion_length=MAX_COMPLETION, seed=seed(member),
        )  # fmt: skip
        pairs = [(p.prompt, p.chosen, p.rejected) for p in generated] + edits
        random.Random(seed(member)).shuffle(pairs)
        return pairs

    def train(out: Path, pairs: list[Pair], member: int) -> None:
        train_reward_model(
            out, trunk, pairs, learning_rate=s.reward_learning_rate, matrix_learning_rate=s.content_matrix_learning_rate,
            seed=seed(member), name=f"reward-content-{member}", max_length=MAX_REVIEW, mixtures=(base, ":"),
        )  # fmt: skip

    seen = reviews.generate_prompts(s.field_prompts, FIELD_SEED, "content")
    return Labels(plain, s.content_moved, prompts, seen, reviews.content_gold, s.content_noise, MAX_COMPLETION, train)


def tone_labels(s: Settings, base: Path) -> Labels:
    """What members of the tone reward compare: generated texts and moved ones. They start from the base model."""

    def seed(member: int) -> int:
        return s.seed * 1000 + member

    def plain(member: int) -> list[Pair]:
        generated = reviews.generate_preferences(s.tone_pairs, seed(member), "tone", s.tone_noise)
        return [(p.prompt, p.chosen, p.rejected) for p in generated]

    def prompts(member: int) -> list[str]:
        return reviews.generate_prompts(1_000, 20_000 + seed(member), "tone")

    def train(out: Path, pairs: list[Pair], member: int) -> None:
        train_reward_model(
            out, base, pairs, learning_rate=s.reward_learning_rate, seed=seed(member), name=f"reward-tone-{member}",
            max_length=MAX_REVIEW, mixtures=(base, ":"),
        )  # fmt: skip

    seen = reviews.generate_prompts(s.field_prompts, FIELD_SEED, "tone")
    return Labels(plain, s.tone_moved, prompts, seen, reviews.tone_gold, s.tone_noise, MAX_COMPLETION, train)


def _train_base(out: Path, s: Settings) -> None:
    _train_lm(out, s, s.seed, s.steps, "base")


def _train_judge(out: Path, s: Settings) -> None:
    _train_lm(out, s, s.seed + 1, s.judge_steps, "judge")


def _train_lm(out: Path, s: Settings, seed: int, steps: int, name: str) -> None:
    examples = reviews.generate_reviews(min(s.texts, steps * 16), seed)
    rng = random.Random(seed)
    train_language_model(
        out,
        word_tokenizer(reviews.vocabulary()),
        [reviews.as_reading(r) if r.asked and rng.random() < s.readings else (r.prompt, r.completion) for r in examples],
        hidden_size=s.hidden_size,
        layers=s.layers,
        heads=s.heads,
        context=MAX_REVIEW,
        steps=steps,
        learning_rate=s.learning_rate,
        matrix_learning_rate=s.matrix_learning_rate,
        seed=seed,
        name=name,
    )


def _train_trunk(out: Path, s: Settings, base: Path) -> None:
    pairs = reviews.generate_preferences(s.trunk_pairs, s.seed * 1000, "content", s.content_noise)
    compared = [(p.prompt, p.chosen, p.rejected) for p in pairs]
    train_reward_model(
        out, base, compared, learning_rate=s.reward_learning_rate, matrix_learning_rate=s.content_matrix_learning_rate,
        seed=s.seed * 1000, name="reward-trunk", max_length=MAX_REVIEW,
    )  # fmt: skip
