import math
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from vgf_llm.evaluation.preferences import moved_pairs, preference_pairs
from vgf_llm.text import VGFSampler
from vgf_llm.text.field import SCALES, GradientField


PROMPTS = ["the food was", "the staff were", "a room was"]


def count_good(prompt, text):
    return float(text.split().count("good") - text.split().count("bad"))


def pairs(base, **overrides):
    arguments = {"samples": 0, "edits": 0, "noise": 1e-9, "max_completion_length": 8, "seed": 0} | overrides
    return preference_pairs(base, PROMPTS, count_good, **arguments)


def test_the_better_text_is_chosen_where_the_judge_does_not_err(saved):
    made = pairs(saved["lm"], samples=40, edits=40)
    assert len(made) == 80
    assert all(prompt in PROMPTS for prompt, _, _ in made)
    assert all(count_good(p, chosen) > count_good(p, rejected) for p, chosen, rejected in made)


def test_a_noisy_judge_errs_as_often_as_its_noise_says(saved):
    made = pairs(saved["lm"], samples=600, noise=2.0)
    gains = [count_good(p, chosen) - count_good(p, rejected) for p, chosen, rejected in made]
    expected = sum(1 / (1 + math.exp(abs(gain) / 2.0)) for gain in gains)
    wrong = sum(gain < 0 for gain in gains)
    assert 0.6 * expected < wrong < 1.4 * expected


def test_an_edit_replaces_one_token_and_two_of_three_keep_the_rest(saved):
    distances = Counter()
    for _, chosen, rejected in pairs(saved["lm"], edits=150):
        a, b = chosen.split(), rejected.split()
        distances[sum(x != y for x, y in zip(a, b, strict=False)) if len(a) == len(b) else "other length"] += 1
    # Pairs of equal gold are left out, which spares more of those whose rest was written anew: fewer than two of three remain.
    assert distances[1] > 50
    assert sum(distances.values()) - distances[1] > 15


def test_the_same_seed_gives_the_same_pairs_and_another_one_others(saved):
    first = pairs(saved["lm"], samples=10, edits=10, seed=1)
    assert pairs(saved["lm"], samples=10, edits=10, seed=1) == first
    assert pairs(saved["lm"], samples=10, edits=10, seed=2) != first


@pytest.mark.parametrize("kind", ["samples", "edits"])
def test_texts_are_not_longer_than_asked(saved, kind):
    assert all(max(len(a.split()), len(b.split())) <= 8 for _, a, b in pairs(saved["lm"], **{kind: 40}))


def test_moved_pairs_are_drawn_along_the_field_and_labelled_like_the_others(saved):
    sampler = VGFSampler(saved["lm"], saved["reward"], AutoTokenizer.from_pretrained(saved["lm"]))
    with pytest.raises(ValueError, match="gradient field"):
        moved_pairs(sampler, PROMPTS, count_good, count=1, noise=1.0, max_completion_length=8, seed=0)
    backbone = sampler.reward.members[0].base_model
    sampler.field = GradientField(backbone, sampler.reward.width)
    # Everywhere the same direction: towards "good".
    good = sampler.processing_class.convert_tokens_to_ids("good")
    sampler.field.slope.bias.data.copy_(sampler.reward.table[good])
    sampler.field.nats.copy_(torch.tensor(SCALES).square())
    made = moved_pairs(sampler, PROMPTS, count_good, count=60, noise=1e-9, max_completion_length=8, seed=0)
    assert len(made) == 60
    assert all(count_good(p, chosen) > count_good(p, rejected) for p, chosen, rejected in made)
    plain = pairs(saved["lm"], samples=60)
    goods = [sum(text.split().count("good") for _, *texts in kind for text in texts) for kind in (made, plain)]
    assert goods[0] > 1.3 * goods[1]
    assert moved_pairs(sampler, PROMPTS, count_good, count=60, noise=1e-9, max_completion_length=8, seed=0) == made
