"""The small world the demonstration is measured in: a base model, a judge and proxy rewards, trained from the embedded data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vgf_llm.data import reviews

from . import preferences
from .training import artefact, train_language_model, train_reward_model, word_tokenizer


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
    content_noise: float = 0.1  # in units of the gold reward: differences are 0.17 to 1.5
    tone_pairs: int = 2_000
    tone_noise: float = 2.0  # in words
    reward_learning_rate: float = 1e-3


@dataclass(frozen=True)
class World:
    """Directories of the trained models.

    `rewards[task]` are the members of that task's proxy, each with its calibration; `trunk` is what those of content start from.
    """

    base: Path
    judge: Path
    trunk: Path
    rewards: dict[str, list[Path]]
    calibration: dict[str, list[tuple[float, float]]]


def build_world(directory: Path, settings: Settings, log: Callable[[str], None]) -> World:
    """Train what is missing under `directory` and return where everything is."""
    base = artefact(directory, "base", settings, _train_base, log)
    judge = artefact(directory, "judge", settings, _train_judge, log)
    trunk = artefact(directory, "reward-trunk", settings, partial(_train_trunk, base=base), log)
    makers = {"content": partial(_train_content, trunk=trunk, base=base), "tone": partial(_train_tone, base=base)}
    rewards = {
        task: [
            artefact(directory, f"reward-{task}-{member}", settings, partial(make, member=member), log)
            for member in range(settings.members)
        ]
        for task, make in makers.items()
    }
    calibration: dict[str, list[tuple[float, float]]] = {
        task: [tuple(json.loads((p / "calibration.json").read_text())) for p in paths] for task, paths in rewards.items()
    }
    return World(base, judge, trunk, rewards, calibration)


def _train_base(out: Path, s: Settings) -> None:
    _train_lm(out, s, s.seed, s.steps, "base")


def _train_judge(out: Path, s: Settings) -> None:
    """Other texts and another initialisation than the base model: what only the base model finds fluent does not pass."""
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
        context=128,
        steps=steps,
        learning_rate=s.learning_rate,
        matrix_learning_rate=s.matrix_learning_rate,
        seed=seed,
        name=name,
    )


def _train_trunk(out: Path, s: Settings, base: Path) -> None:
    """What all members of the content reward start from: comparisons of texts in which one thing that is said differs."""
    pairs = reviews.generate_preferences(s.trunk_pairs, s.seed * 1000, "content", s.content_noise)
    _fit_reward(out, s, base, [(p.prompt, p.chosen, p.rejected) for p in pairs], s.seed * 1000, "trunk", None)


def _train_content(out: Path, s: Settings, member: int, trunk: Path, base: Path) -> None:
    """A member of its own: other comparisons, edits of the base model's own texts, and embeddings between tokens."""
    seed = s.seed * 1000 + member + 1
    pairs = [
        (p.prompt, p.chosen, p.rejected) for p in reviews.generate_preferences(s.content_pairs, seed, "content", s.content_noise)
    ]
    pairs += preferences.preference_pairs(
        base,
        reviews.generate_prompts(1_000, 20_000 + seed, "content"),
        reviews.content_gold,
        samples=0,
        edits=s.content_edits,
        noise=s.content_noise,
        max_completion_length=64,
        seed=seed,
    )
    random.Random(seed).shuffle(pairs)
    _fit_reward(out, s, trunk, pairs, seed, f"content-{member}", base)


def _train_tone(out: Path, s: Settings, member: int, base: Path) -> None:
    seed = s.seed * 1000 + member
    pairs = reviews.generate_preferences(s.tone_pairs, seed, "tone", s.tone_noise)
    _fit_reward(out, s, base, [(p.prompt, p.chosen, p.rejected) for p in pairs], seed, f"tone-{member}", base)


def _fit_reward(
    out: Path, s: Settings, start: Path, pairs: list[tuple[str, str, str]], seed: int, name: str, mixtures_of: Path | None
) -> None:
    train_reward_model(
        out,
        start,
        pairs,
        learning_rate=s.reward_learning_rate,
        seed=seed,
        name=f"reward-{name}",
        max_length=128,
        mixtures=None if mixtures_of is None else (mixtures_of, ":"),
    )
