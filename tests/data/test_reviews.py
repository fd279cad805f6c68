"""The embedded reviews: the same everywhere, grammatical, and scored as documented, on hand-written sentences."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgf_llm.data import reviews
from vgf_llm.data.reviews import (
    ASPECTS,
    BAD,
    GOLD,
    GOOD,
    VENUES,
    Flaws,
    content_gold,
    format_prompt,
    generate_prompts,
    generate_reviews,
    mentions,
    parse_prompt,
    sample_asked,
    tone_gold,
    vocabulary,
    write_review,
)


PERFECT = Flaws(omit=0, contradict=0, swap=0, repeat=0, add=0)
PROMPT = "hotel food+ staff- price+ :"

aspects = st.sampled_from(sorted(ASPECTS))
said_lists = st.lists(st.tuples(aspects, st.sampled_from([GOOD, BAD])), min_size=1, max_size=6)
asked_lists = st.lists(
    st.tuples(aspects, st.sampled_from([GOOD, BAD])), min_size=1, max_size=4, unique_by=lambda mention: mention[0]
)


# Generation


def test_the_same_seed_gives_the_same_reviews_and_another_seed_others():
    assert generate_reviews(50, 3) == generate_reviews(50, 3)
    # More of them go on where fewer stop.
    assert generate_reviews(80, 3)[:50] == generate_reviews(50, 3)
    assert len(set(generate_reviews(200, 3)) & set(generate_reviews(200, 4))) < 10
    state = random.getstate()
    generate_reviews(5, 0), generate_prompts(5, 0, "content")
    assert random.getstate() == state


def test_reviews_and_prompts_do_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "from vgf_llm.data.reviews import *\n"
        "import hashlib\n"
        "everything = repr((generate_reviews(300, 5), generate_prompts(50, 5, 'content'), vocabulary()))\n"
        "print(hashlib.sha256(everything.encode()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "1", "77")
    }  # fmt: skip
    assert len(digests) == 1


def test_every_word_of_reviews_and_prompts_is_in_the_vocabulary():
    words = vocabulary()
    assert words == sorted(set(words))
    found = Counter()
    for seed in range(3):
        for review in generate_reviews(3000, seed):
            found.update(f"{review.prompt} {review.completion}".split())
    for task in GOLD:
        for prompt in generate_prompts(500, 0, task):
            found.update(prompt.split())
    assert not set(found) - set(words)
    # And hardly a word is there for nothing.
    assert len(set(words) - set(found)) < 0.05 * len(words)


def test_reviews_without_flaws_have_gold_one():
    for review in generate_reviews(3000, 1, open_share=0.0, flaws=PERFECT):
        assert review.prompt == format_prompt(review.venue, review.asked)
        assert content_gold(review.prompt, review.completion) == 1, review


@pytest.mark.parametrize("flaw", ["omit", "contradict", "swap", "repeat", "add"])
def test_each_flaw_lowers_gold_by_itself(flaw):
    flaws = Flaws(**{name: 0.5 * (name == flaw) for name in ("omit", "contradict", "swap", "repeat", "add")})
    gold = [content_gold(r.prompt, r.completion) for r in generate_reviews(400, 2, open_share=0.0, flaws=flaws)]
    assert max(gold) == 1 and sum(gold) / len(gold) < 0.95


def test_the_default_flaws_leave_something_to_gain():
    gold = [content_gold(r.prompt, r.completion) for r in generate_reviews(2000, 0, open_share=0.0)]
    assert 0.3 < sum(g == 1 for g in gold) / len(gold) < 0.8 and min(gold) < 0


def test_the_share_of_open_prompts_is_as_asked():
    assert all(r.asked and r.prompt != f"{r.venue} :" for r in generate_reviews(100, 0, open_share=0.0))
    assert all(not r.asked and r.prompt == f"{r.venue} :" for r in generate_reviews(100, 0, open_share=1.0))
    some = sum(not r.asked for r in generate_reviews(2000, 0, open_share=0.2))
    assert 320 < some < 480


@given(said=said_lists, seed=st.integers(0, 10**6), venue=st.sampled_from(VENUES))
def test_a_review_says_what_it_was_told_to_say(said, seed, venue):
    text = write_review(random.Random(seed), venue, said)
    assert mentions(text) == (said, 0)
    assert text.endswith(".") and text == " ".join(text.split())


def test_verbs_agree_with_their_nouns_in_number():
    singular = {noun for a in ASPECTS.values() for noun in a.singular}
    plural = {noun for a in ASPECTS.values() for noun in a.plural}
    assert not singular & plural
    seen = Counter()
    for review in generate_reviews(2000, 0):
        words = review.completion.split()
        for noun, verb in itertools.pairwise(words):
            if verb in ("was", "were") and noun in singular | plural:
                assert (noun in plural) == (verb == "were"), review.completion
                seen[verb] += 1
    assert min(seen["was"], seen["were"]) > 100


def test_no_word_has_two_meanings_for_the_gold():
    nouns = [noun for a in ASPECTS.values() for noun in a.singular + a.plural]
    adjectives = [*reviews.ADJECTIVES_GOOD, *reviews.ADJECTIVES_BAD]
    rest = {word for word in vocabulary() if word not in set(nouns) | set(adjectives)}
    assert len(nouns) == len(set(nouns)) and len(adjectives) == len(set(adjectives))
    assert not set(nouns) & set(adjectives)
    # Nothing that opens or closes a review reads as a mention.
    for times in reviews.TIMES:
        assert set(times.split()) <= rest, times
    assert set(VENUES) | set(reviews.VERBS) | set(reviews.ADVERBS) | set(reviews.ARRIVALS) <= rest


# Prompts


@given(asked=asked_lists | st.just([]), venue=st.sampled_from(VENUES))
def test_parse_prompt_inverts_format_prompt(asked, venue):
    assert parse_prompt(format_prompt(venue, asked)) == (venue, tuple(asked))


@pytest.mark.parametrize(
    "bad",
    ["", ":", "hotel", "hotel food+", "castle food+ :", "hotel food :", "hotel food* :", "hotel + :", "hotel money+ :",
     "food+ hotel :", "hotel : food+", "hotel food+ extra :", "hotel food+staff- :"],
)  # fmt: skip
def test_parse_prompt_rejects_what_it_could_not_have_written(bad):
    with pytest.raises(ValueError, match="not a prompt of the embedded data set"):
        parse_prompt(bad)


def test_parse_prompt_says_which_word_is_wrong():
    with pytest.raises(ValueError, match=r"'money\+' is no aspect with \+ or -"):
        parse_prompt("hotel food+ money+ :")


@pytest.mark.parametrize("task", GOLD)
def test_prompts_differ_from_seed_to_seed_and_are_the_same_for_one(task):
    first, again, other = (generate_prompts(60, seed, task) for seed in (0, 0, 1))
    assert first == again and first != other
    assert generate_prompts(90, 0, task)[:60] == first


def test_content_prompts_ask_for_different_aspects_and_tone_prompts_for_none():
    asked = [parse_prompt(prompt)[1] for prompt in generate_prompts(200, 0, "content")]
    low, high = sample_asked.__defaults__
    assert {len(a) for a in asked} == set(range(low, high + 1)) and all(len(dict(a)) == len(a) for a in asked)
    assert {polarity for a in asked for _, polarity in a} == {GOOD, BAD}
    assert {a for each in asked for a, _ in each} == set(ASPECTS)
    assert all(parse_prompt(prompt)[1] == () for prompt in generate_prompts(200, 0, "tone"))


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'style': choose 'content' or 'tone'"):
        generate_prompts(1, 0, "style")


# The content reward on sentences written by hand; three aspects are asked for, so a fault costs 1/6 and an aspect 1/3


@pytest.mark.parametrize(
    ("text", "points"),
    [
        # Perfect, in several forms
        ("the soup was superb . the waiter was nasty . the bill was fine .", 3),
        ("we visited the hotel yesterday . the soup was superb , but the waiter was nasty . the bill was fine .", 3),
        ("i found the soup superb , yet we hated the nasty waiter . however , there were some fine prices .", 3),
        ("the soup was not horrible . the waiter was hardly great . the bill was never poor .", 3),
        (
            "the superb soup pleased us . the nasty waiter upset us . the fine bill pleased us . we will return .",
            3,
        ),
        # Missing
        ("the soup was superb . the waiter was nasty .", 2),
        ("the waiter was nasty .", 1),
        # Wrong polarity: no point, and a fault
        ("the soup was horrible . the waiter was nasty . the bill was fine .", 2 - 0.5),
        ("the soup was not superb . the waiter was nasty . the bill was fine .", 2 - 0.5),
        ("the soup was horrible . the waiter was great . the bill was poor .", -1.5),
        # A negation speaks for its own clause only, and two cancel
        ("the soup was superb , but the waiter was not great . the bill was fine .", 3),
        ("the soup was never not superb . the waiter was nasty . the bill was fine .", 3),
        # Order
        ("the waiter was nasty . the soup was superb . the bill was fine .", 2),
        ("the bill was fine . the waiter was nasty . the soup was superb .", 1),
        ("the waiter was nasty . the bill was fine . the soup was superb .", 2),
        # Repetition, once and twice; what comes second does not help
        ("the soup was superb . the dessert was lovely . the waiter was nasty . the bill was fine .", 3 - 0.5),
        ("the soup was superb . the waiter was nasty . the bill was fine . the soup was superb .", 3 - 0.5),
        ("the soup was superb . " * 3 + "the waiter was nasty . the bill was fine .", 3 - 1),
        ("the soup was superb . the soup was horrible . the waiter was nasty . the bill was fine .", 3 - 0.5),
        ("the soup was horrible . the soup was superb . the waiter was nasty . the bill was fine .", 2 - 1),
        # Unasked
        ("the soup was superb . the waiter was nasty . the bill was fine . the band was great .", 3 - 0.5),
        ("the band was great . " * 2 + "the soup was superb . the waiter was nasty . the bill was fine .", 3 - 1),
        # Nonsense: a noun or an adjective alone, or two in one clause
        ("the soup . the waiter was nasty . the bill was fine .", 2 - 0.5),
        ("it was superb . the waiter was nasty . the bill was fine .", 2 - 0.5),
        ("the soup and the waiter was nasty . the bill was fine .", 2 - 0.5),
        ("the soup waiter was nasty . the bill was fine .", 1 - 0.5),
        ("the soup was superb lovely . the waiter was nasty . the bill was fine .", 2 - 0.5),
        # Unfinished
        ("the soup was superb . the waiter was nasty . the bill was fine", 3 - 0.5),
        ("the soup was superb . the waiter was nasty . the bill", 2 - 1),
        ("the soup was superb . the waiter was nasty . the bill was fine . ", 3),
        # Nothing
        ("", -0.5),
        (".", 0),
        ("we visited the hotel .", 0),
    ],
)
def test_content_gold_of_hand_written_reviews(text, points):
    assert content_gold(PROMPT, text) == pytest.approx(points / 3)


def test_content_gold_depends_on_the_prompt():
    text = "the soup was superb ."
    assert content_gold("hotel food+ :", text) == 1
    assert content_gold("hotel food- :", text) == -0.5
    assert content_gold("hotel staff+ :", text) == -0.5
    assert content_gold("cafe food+ staff+ :", text) == 0.5


@given(asked=asked_lists, said=said_lists, seed=st.integers(0, 10**6))
def test_content_gold_of_any_review_is_what_its_plan_deserves(asked, said, seed):
    wanted, faults, first = dict(asked), 0, {}
    for aspect, polarity in said:
        faults += aspect in first or wanted.get(aspect) != polarity
        first.setdefault(aspect, polarity)
    right = [aspect for aspect, polarity in first.items() if wanted.get(aspect) == polarity]
    places = [[aspect for aspect, _ in asked].index(aspect) for aspect in right]
    best = max(
        (subset).bit_count()
        for subset in range(2 ** len(places))
        if (chosen := [p for i, p in enumerate(places) if subset >> i & 1]) == sorted(chosen)
    )
    text = write_review(random.Random(seed), "hotel", said)
    assert content_gold(format_prompt("hotel", asked), text) == pytest.approx((best - 0.5 * faults) / len(asked))


def test_content_gold_refuses_the_open_prompt():
    with pytest.raises(ValueError, match="asks for aspects, got the open prompt 'hotel :'"):
        content_gold("hotel :", "the soup was superb .")


# The tone reward


@pytest.mark.parametrize(
    ("text", "tone"),
    [
        ("", 0),
        ("we visited the hotel .", 0),
        ("the soup was superb .", 1),
        ("the soup was superb . the waiter was nasty . sadly , the bill was poor .", -2),
        ("luckily , we loved the lovely soup . overall a perfect visit . we will gladly return .", 5),
        # A bag of words: it does not understand negation.
        ("the soup was not superb .", 1),
        ("the soup was never superb .", 1),
        ("we will never return .", -1),
        ("never", 0),
        ("superb superb superb", 3),
    ],
)
def test_tone_gold_counts_words(text, tone):
    for prompt in ("hotel :", PROMPT):
        assert tone_gold(prompt, text) == tone


def test_tone_gold_is_high_for_praise_and_low_for_blame():
    rng = random.Random(0)
    for _ in range(50):
        names = rng.sample(sorted(ASPECTS), 3)
        # Without the negated forms, which a bag of words takes for the opposite.
        praise, blame = (write_review(rng, "spa", [(n, p) for n in names]) for p in (GOOD, BAD))
        if not set(praise.split()) & set(reviews.NEGATIONS):
            assert tone_gold("spa :", praise) >= 3
        if not set(blame.split()) & set(reviews.NEGATIONS):
            assert tone_gold("spa :", blame) <= -3
