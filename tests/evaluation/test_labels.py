import json

import pytest
from transformers import AutoTokenizer

from tests import tiny
from vgf_llm.evaluation.labels import Labels, train_members
from vgf_llm.evaluation.training import comparisons


PROMPTS = ["the food was", "the staff were", "a room was", "the food was nice and"]
PLAIN = [("the food was", "good", "bad"), ("a room was", "fine", "poor")]


def count_good(prompt, text):
    return float(text.split().count("good") - text.split().count("bad"))


@pytest.fixture
def asked(saved):
    """Labels whose training saves a reward model that has learned nothing; and what it was given, by directory name."""
    given = {}
    tokenizer = AutoTokenizer.from_pretrained(saved["lm"])

    def train(out, pairs, member):
        given[out.name.removeprefix(".").rpartition("-")[0]] = list(pairs)
        tiny.reward_model("llama", len(tokenizer), pad=tokenizer.pad_token_id, seed=member).save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / "calibration.json").write_text(json.dumps([0.0, 1.0]))

    def labels(moved):
        return Labels(lambda member: PLAIN[: member + 1], moved, lambda member: PROMPTS, PROMPTS * 3, count_good, 1e-9, 8, train)

    return labels, given


def kept_beside(member):
    return [tuple(pair) for pair in json.loads((member / "comparisons.json").read_text())]


def test_one_round_trains_on_the_plain_pairs(saved, asked, tmp_path):
    labels, given = asked
    paths = train_members(tmp_path, "words", saved["lm"], labels(0), 2, "recipe", lambda message: None)
    assert [path.name.rpartition("-")[0] for path in paths] == ["reward-words-0", "reward-words-1"]
    assert given == {"reward-words-0": PLAIN[:1], "reward-words-1": PLAIN}
    assert kept_beside(paths[1]) == [(p, f" {c}", f" {r}") for p, c, r in PLAIN]


def test_a_second_round_adds_pairs_that_the_first_has_moved(saved, asked, tmp_path):
    labels, given = asked
    said = []
    paths = train_members(tmp_path, "words", saved["lm"], labels(30), 2, "recipe", said.append)
    assert given["first-words-0"] == PLAIN[:1] and given["first-words-1"] == PLAIN
    for member in range(2):
        plain, all_of_it = PLAIN[: member + 1], given[f"reward-words-{member}"]
        moved = [pair for pair in all_of_it if pair not in plain]
        assert len(all_of_it) == len(plain) + 30
        # Labelled by the gold reward, which errs never at this noise, and not by the first reward models.
        assert all(count_good(p, chosen) > count_good(p, rejected) for p, chosen, rejected in moved)
        # What is kept for `likelihood_worth` is of moved texts, a completion with the space before it.
        assert kept_beside(paths[member]) == [(p, f" {c}", f" {r}") for p, c, r in moved]
    assert comparisons(paths) == kept_beside(paths[0]) + kept_beside(paths[1]) and comparisons(paths[:1]) is None
    assert given["reward-words-0"][1:] != given["reward-words-1"][1:]
    assert [message.split()[-1] for message in said] == [
        "first-words-0", "first-words-1", "field-first-words", "reward-words-0", "reward-words-1",
    ]  # fmt: skip
    assert train_members(tmp_path, "words", saved["lm"], labels(30), 2, "recipe", said.append) == paths
    assert len(said) == 5
