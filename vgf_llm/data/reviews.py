"""The embedded data set: short reviews of places, generated from a grammar, with two exact gold rewards.

A prompt names a place and, for the *content* task, the aspects to speak about, each with a polarity and in the order in
which they have to be mentioned::

    hotel food+ staff- price+ :

A review answers in a few sentences::

    we visited the hotel last week . the soup was really superb , but the waiter seemed lousy . however , i found the bill fine .

The grammar asks a language model for agreement in number, for nouns that fit the aspect, for adjectives, verbs, connectives
and feelings that fit the polarities they express or join, and for negation ("was not superb" is bad). The texts a model is
trained on are *flawed on purpose* (``Flaws``): aspects are left out, contradicted, swapped, repeated or added, so that
sampling from the model leaves something to gain.

Two gold rewards, both computed exactly from the text:

- ``content_gold``: depends on the prompt and on what is said where (order, polarity, contradiction, repetition).
- ``tone_gold``: positive minus negative words, a bag of words that ignores the prompt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field


GOOD, BAD = "good", "bad"
SIGN = {GOOD: "+", BAD: "-"}
POLARITY = {sign: polarity for polarity, sign in SIGN.items()}

VENUES = (
    "hotel", "cafe", "restaurant", "museum", "gym", "library", "bakery", "hostel",
    "cinema", "spa", "resort", "theatre", "lodge", "tavern", "bistro", "gallery",
)  # fmt: skip


@dataclass(frozen=True)
class Aspect:
    """Nouns for one aspect, in both numbers. No noun serves two aspects."""

    singular: tuple[str, ...]
    plural: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ASPECTS: dict[str, Aspect] = {
    "food": Aspect(
        _words("food soup meal bread menu dessert salad breakfast dinner cheese cake fish rice coffee tea wine juice"),
        _words("dishes snacks pastries noodles sandwiches drinks cocktails"),
    ),
    "staff": Aspect(
        _words("staff waiter host manager porter receptionist cook guard owner barista butler chef doorman maid"),
        _words("guides clerks waitresses attendants cleaners cashiers"),
    ),
    "price": Aspect(
        _words("price bill cost fee tariff deal rate invoice discount deposit surcharge value tax"),
        _words("prices charges offers vouchers tickets refunds"),
    ),
    "room": Aspect(
        _words("room hall lobby bathroom balcony corridor interior ceiling carpet kitchen sofa bed shower mirror"),
        _words("seats tables pillows curtains towels windows"),
    ),
    "music": Aspect(
        _words("music band singer playlist pianist orchestra concert choir guitar violin melody duet karaoke"),
        _words("songs melodies drummers speakers tunes dancers"),
    ),
    "place": Aspect(
        _words("location street view district harbour neighbourhood area square avenue garden terrace park beach"),
        _words("surroundings streets views shops trees fountains"),
    ),
}
ADJECTIVES_GOOD = _words(
    "superb lovely fantastic great charming splendid pleasant delightful brilliant impressive remarkable fine amazing "
    "outstanding exceptional marvellous stunning nice first-rate magnificent enjoyable flawless likeable welcoming"
)
ADJECTIVES_BAD = _words(
    "horrible nasty poor shabby miserable dismal unpleasant mediocre dull lousy shameful inferior hideous "
    "unacceptable depressing ghastly pathetic grim second-rate appalling tiresome defective hopeless hostile"
)

NEGATIONS = ("not", "never", "hardly")
ADVERBS = ("really", "very", "quite", "rather", "truly", "extremely", "surprisingly", "fairly")
TIMES = (
    "last week", "in spring", "on monday", "this summer", "a month ago", "on friday", "in october", "yesterday",
    "during the holidays", "for my birthday", "after work", "with friends", "with my family", "before the holidays",
)  # fmt: skip
ARRIVALS = ("visited", "chose", "entered", "tried", "discovered", "booked")
VERBS = ("noticed", "remember", "had", "saw", "describe")
VERBS_GOOD = ("enjoyed", "loved", "praised")
VERBS_BAD = ("endured", "hated", "regretted")
# Words that set the tone without speaking about an aspect.
TONE_GOOD = _words(
    "luckily happily gladly wonderful excellent memorable perfect delighted impressed pleased soon enjoyed loved praised"
)
TONE_BAD = _words(
    "sadly unfortunately reluctantly dreadful awful disappointing terrible annoyed disappointed upset never "
    "endured hated regretted"
)
CLAUSE_BREAKS = frozenset((".", ",", "and", "but", "yet", "while", "although", "however", "also", "moreover"))

_NOUN_ASPECT = {noun: name for name, a in ASPECTS.items() for noun in a.singular + a.plural}
_ADJECTIVE = dict.fromkeys(ADJECTIVES_GOOD, GOOD) | dict.fromkeys(ADJECTIVES_BAD, BAD)
# "never" is a negation inside a clause and a verdict in "we will never return": only the latter counts for tone.
_VALENCE = (
    dict.fromkeys(TONE_GOOD, 1)
    | dict.fromkeys(TONE_BAD, -1)
    | {word: 1 if polarity == GOOD else -1 for word, polarity in _ADJECTIVE.items()}
)


@dataclass(frozen=True)
class Flaws:
    """Chance of each flaw in a training review. The values leave a base model that is right about half the time."""

    omit: float = 0.08  # per asked aspect
    contradict: float = 0.08  # per asked aspect
    swap: float = 0.08  # per pair of neighbours
    repeat: float = 0.06  # per asked aspect
    add: float = 0.10  # per review: an aspect nobody asked for


@dataclass(frozen=True)
class Review:
    """One example: ``prompt`` and ``completion`` are strings of words separated by single spaces."""

    prompt: str
    completion: str
    venue: str
    asked: tuple[tuple[str, str], ...] = field(default=())


def format_prompt(venue: str, asked: Sequence[tuple[str, str]]) -> str:
    """``("hotel", [("food", "good")])`` -> ``"hotel food+ :"``; nothing asked gives the open prompt ``"hotel :"``."""
    return " ".join([venue, *(aspect + SIGN[polarity] for aspect, polarity in asked), ":"])


def parse_prompt(prompt: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Inverse of ``format_prompt``. Raises ``ValueError`` on anything that it could not have written."""
    words = prompt.split()
    if len(words) < 2 or words[-1] != ":" or words[0] not in VENUES:
        raise ValueError(f"not a prompt of the embedded data set: {prompt!r} (expected e.g. 'hotel food+ staff- :')")
    asked = tuple((word[:-1], POLARITY.get(word[-1], "")) for word in words[1:-1])
    for word, (aspect, polarity) in zip(words[1:-1], asked, strict=True):
        if aspect not in ASPECTS or not polarity:
            raise ValueError(f"not a prompt of the embedded data set: {prompt!r} ({word!r} is no aspect with + or -)")
    return words[0], asked


def _pick(rng: random.Random, words: Sequence[str]) -> str:
    """Words come with Zipf frequencies, as in real text: a small model meets the frequent ones often enough to learn."""
    return rng.choices(words, [1 / rank for rank in range(1, len(words) + 1)])[0]


def _clause(rng: random.Random, aspect: str, polarity: str) -> str:
    """One clause about one aspect, without the connective that leads to it."""
    a = ASPECTS[aspect]
    plural = rng.random() < 0.35
    noun = _pick(rng, a.plural if plural else a.singular)
    good = polarity == GOOD
    if rng.random() < 0.15:  # say it by negating the opposite
        adjective = _pick(rng, ADJECTIVES_BAD if good else ADJECTIVES_GOOD)
        be = "were" if plural else "was"
        return f"the {noun} {be} {rng.choice(NEGATIONS)} {adjective}"
    adjective = _pick(rng, ADJECTIVES_GOOD if good else ADJECTIVES_BAD)
    adverb = f"{_pick(rng, ADVERBS)} " if rng.random() < 0.3 else ""
    form = rng.randrange(8)
    if form == 0:
        return f"i found the {noun} {adverb}{adjective}"
    if form == 1:
        return f"the {noun} {'were' if plural else 'was'} {adverb}{adjective}"
    if form == 2:
        return f"the {noun} {rng.choice(('seemed', 'looked', 'felt'))} {adverb}{adjective}"
    if form == 3:
        return f"{rng.choice(('i', 'we'))} {rng.choice(VERBS_GOOD if good else VERBS_BAD)} the {adjective} {noun}"
    if form == 4:
        return f"{rng.choice(('i', 'we'))} {rng.choice(VERBS)} the {adverb}{adjective} {noun}"
    if form == 5:
        article = "some" if plural else rng.choice(("some", "this", "that"))
        return f"there {'were' if plural else 'was'} {article} {adverb}{adjective} {noun}"
    feeling = rng.choice(("impressed", "pleased", "delighted") if good else ("annoyed", "disappointed", "upset"))
    return f"the {adverb}{adjective} {noun} {feeling} us"


def write_review(rng: random.Random, venue: str, said: Sequence[tuple[str, str]]) -> str:
    """A review that mentions ``said`` in order, with connectives that fit the polarities they join."""
    # Every clause draws from a generator of its own: changing what is said in one place leaves the other clauses as they were.
    seed = rng.random()
    times_said: dict[str, int] = {}
    parts: list[str] = []
    if rng.random() < 0.35:
        parts.append(f"{rng.choice(('we', 'i'))} {_pick(rng, ARRIVALS)} the {venue} {_pick(rng, TIMES)} .")
    open_sentence = False
    for i, (aspect, polarity) in enumerate(said):
        nth = times_said[aspect] = times_said.get(aspect, 0) + 1
        clause = _clause(random.Random(f"{seed} {aspect} {polarity} {nth}"), aspect, polarity)
        same = i > 0 and said[i - 1][1] == polarity
        if open_sentence:
            parts += [
                ", and" if same and rng.random() < 0.5 else "and" if same else rng.choice((", but", ", yet")),
                clause,
                ".",
            ]
            open_sentence = False
            continue
        if i > 0 and rng.random() < 0.5:
            parts.append(rng.choice(("also ,", "moreover ,")) if same else "however ,")
        elif rng.random() < 0.2:
            parts.append(f"{rng.choice(TONE_GOOD[:2] if polarity == GOOD else TONE_BAD[:2])} ,")
        parts.append(clause)
        open_sentence = i + 1 < len(said) and rng.random() < 0.5
        if not open_sentence:
            parts.append(".")
    if rng.random() < 0.35:
        good = sum(polarity == GOOD for _, polarity in said) * 2 >= len(said)
        parts.append(
            rng.choice(
                (
                    f"overall a {rng.choice(TONE_GOOD[3:7] if good else TONE_BAD[3:7])} visit .",
                    f"we will {rng.choice(('gladly', 'happily')) if good else 'reluctantly'} return .",
                    "we will return soon ." if good else "we will never return .",
                )
            )
        )
    return " ".join(parts)


def _flawed(rng: random.Random, asked: Sequence[tuple[str, str]], flaws: Flaws) -> list[tuple[str, str]]:
    said = list(asked)
    for i in range(len(said) - 1):
        if rng.random() < flaws.swap:
            said[i], said[i + 1] = said[i + 1], said[i]
    out: list[tuple[str, str]] = []
    for aspect, polarity in said:
        if rng.random() < flaws.omit:
            continue
        if rng.random() < flaws.contradict:
            polarity = BAD if polarity == GOOD else GOOD
        out.append((aspect, polarity))
        if rng.random() < flaws.repeat:
            out.append((aspect, polarity if rng.random() < 0.5 else (BAD if polarity == GOOD else GOOD)))
    if rng.random() < flaws.add:
        asked_names = {aspect for aspect, _ in asked}
        extra = rng.choice([name for name in ASPECTS if name not in asked_names])
        out.insert(rng.randint(0, len(out)), (extra, rng.choice((GOOD, BAD))))
    return out or [(asked[0][0], asked[0][1])]


def as_reading(review: Review) -> tuple[str, str]:
    """The example the other way round: the text as prompt, and as completion what it says, in the words of a request.

    ``("the soup was superb . the waiter seemed lousy . |", "food+ staff-")``. A model that has also learned to read texts is a
    better start for a reward model than one that can only write them.
    """
    said, _ = mentions(review.completion)
    return f"{review.completion} |", " ".join(aspect + SIGN[polarity] for aspect, polarity in said)


def sample_asked(rng: random.Random, low: int = 2, high: int = 3) -> tuple[tuple[str, str], ...]:
    """``low`` to ``high`` different aspects, each with a random polarity, in a random order."""
    names = rng.sample(list(ASPECTS), rng.randint(low, high))
    return tuple((name, rng.choice((GOOD, BAD))) for name in names)


def generate_reviews(n: int, seed: int, *, open_share: float = 0.2, flaws: Flaws | None = None) -> list[Review]:
    """``n`` training examples. ``open_share`` of them carry the open prompt, under which any aspects may be mentioned.

    ``flaws=Flaws(0, 0, 0, 0, 0)`` gives perfect reviews. The same arguments give the same list on every machine.
    """
    rng = random.Random(f"vgf_llm reviews {seed}")  # a string seed is hashed the same way on every platform
    flaws = Flaws() if flaws is None else flaws
    reviews = []
    for _ in range(n):
        venue = rng.choice(VENUES)
        if rng.random() < open_share:
            said = sample_asked(rng, 2, 3)
            reviews.append(Review(format_prompt(venue, ()), write_review(rng, venue, said), venue))
        else:
            # Short requests teach what a word of the prompt means long before long ones teach the order.
            asked = sample_asked(rng, 1, 3)
            completion = write_review(rng, venue, _flawed(rng, asked, flaws))
            reviews.append(Review(format_prompt(venue, asked), completion, venue, asked))
    return reviews


def generate_prompts(n: int, seed: int, task: str) -> list[str]:
    """``n`` prompts for ``task`` ("content": aspects asked for; "tone": the open prompt of a random place)."""
    rng = random.Random(f"vgf_llm prompts {task} {seed}")
    if task == "content":
        return [format_prompt(rng.choice(VENUES), sample_asked(rng)) for _ in range(n)]
    if task == "tone":
        return [format_prompt(rng.choice(VENUES), ()) for _ in range(n)]
    raise ValueError(f"unknown task {task!r}: choose 'content' or 'tone'")


@dataclass(frozen=True)
class Preference:
    """One labelled comparison of two completions of a prompt."""

    prompt: str
    chosen: str
    rejected: str


def generate_preferences(n: int, seed: int, task: str, noise: float) -> list[Preference]:
    """``n`` pairs labelled by a noisy judge: the better text is chosen with probability ``sigmoid(difference / noise)``.

    ``noise`` is in units of the task's gold reward. For "content" the two texts differ in one thing that is said (a polarity,
    an omission, an order, a repetition, an addition), as an edit would make it; for "tone" they are two independent reviews.
    """
    rng = random.Random(f"vgf_llm preferences {task} {seed}")
    if task not in GOLD:
        raise ValueError(f"unknown task {task!r}: choose 'content' or 'tone'")
    gold = GOLD[task]
    pairs: list[Preference] = []
    while len(pairs) < n:
        venue = rng.choice(VENUES)
        if task == "content":
            asked = sample_asked(rng, 1, 3)
            prompt, said = format_prompt(venue, asked), list(asked)
            for _ in range(rng.choice((0, 0, 1, 2))):
                said = _edit(rng, said, asked)
            manner = rng.random()
            first = write_review(random.Random(manner), venue, said)
            second = write_review(random.Random(manner), venue, _edit(rng, said, asked))
        else:
            prompt = format_prompt(venue, ())
            first, second = (write_review(rng, venue, sample_asked(rng)) for _ in range(2))
        difference = gold(prompt, first) - gold(prompt, second)
        if difference == 0:
            continue
        if rng.random() > 1 / (1 + math.exp(-difference / noise)):
            first, second = second, first
        pairs.append(Preference(prompt, first, second))
    return pairs


def _edit(rng: random.Random, said: Sequence[tuple[str, str]], asked: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """``said`` with one thing changed."""
    out = list(said)
    at = rng.randrange(len(out))
    kind = rng.choices(("contradict", "omit", "swap", "repeat", "add"), (3, 3, 2, 1, 1))[0]
    if kind == "repeat":
        out.insert(rng.randint(0, len(out)), out[at])
    elif kind == "add":
        asked_names = {aspect for aspect, _ in asked}
        extra = rng.choice([name for name in ASPECTS if name not in asked_names])
        out.insert(rng.randint(0, len(out)), (extra, rng.choice((GOOD, BAD))))
    elif kind == "omit" and len(out) > 1:
        out.pop(at)
    elif kind == "swap" and len(out) > 1:
        at = rng.randrange(len(out) - 1)
        out[at], out[at + 1] = out[at + 1], out[at]
    else:
        out[at] = (out[at][0], BAD if out[at][1] == GOOD else GOOD)
    return out


def vocabulary() -> list[str]:
    """Every word the grammar can write, sorted."""
    words = {"|", ":", ".", ",", "and", "but", "yet", "while", "also", "moreover", "however", "overall"}
    words |= {"a", "visit", "we", "i", "us", "will", "return", "the"}
    words |= (
        set(VENUES) | {aspect + sign for aspect in ASPECTS for sign in POLARITY} | set(NEGATIONS) | set(ADVERBS) | set(ARRIVALS)
    )
    words |= {*VERBS, *VERBS_GOOD, *VERBS_BAD} | set(TONE_GOOD) | set(TONE_BAD) | {w for time in TIMES for w in time.split()}
    words |= {"found", "seemed", "looked", "felt", "was", "were", "there", "some", "this", "that"}
    words |= set(_NOUN_ASPECT) | set(_ADJECTIVE)
    return sorted(words)


def mentions(text: str) -> tuple[list[tuple[str, str]], int]:
    """What a text says: the ``(aspect, polarity)`` of every clause in order, and how many clauses make no sense.

    A clause makes no sense when a noun stands without an adjective, an adjective without a noun, or two of either in one.
    """
    said: list[tuple[str, str]] = []
    nonsense = 0
    clause: list[str] = []
    for word in [*text.split(), "."]:
        if word not in CLAUSE_BREAKS:
            clause.append(word)
            continue
        nouns = [_NOUN_ASPECT[w] for w in clause if w in _NOUN_ASPECT]
        adjectives = [_ADJECTIVE[w] for w in clause if w in _ADJECTIVE]
        if nouns or adjectives:
            if len(nouns) == 1 and len(adjectives) == 1:
                polarity = adjectives[0]
                if sum(w in NEGATIONS for w in clause) % 2:
                    polarity = BAD if polarity == GOOD else GOOD
                said.append((nouns[0], polarity))
            else:
                nonsense += 1
        clause = []
    return said, nonsense


def content_gold(prompt: str, text: str) -> float:
    """Exact content-and-order reward: 1 is a perfect review, 0 says nothing that was asked, negative is possible.

    ``(in_order - 0.5 * (contradicted + repeated + unasked + nonsense + unfinished)) / asked`` where ``in_order`` is the
    length of the longest common subsequence of what was asked and what was said (first mentions, right polarity).
    """
    _, asked = parse_prompt(prompt)
    if not asked:
        raise ValueError(f"content_gold needs a prompt that asks for aspects, got the open prompt {prompt!r}")
    said, nonsense = mentions(text)
    polarity = dict(asked)
    seen: set[str] = set()
    first: list[tuple[str, str]] = []
    faults = nonsense + (not text.rstrip().endswith("."))
    for aspect, tone in said:
        if aspect in seen or aspect not in polarity or polarity[aspect] != tone:
            faults += 1
        if aspect not in seen:
            first.append((aspect, tone))
        seen.add(aspect)
    return (_common_subsequence(asked, first) - 0.5 * faults) / len(asked)


def _common_subsequence(a: Sequence[tuple[str, str]], b: Sequence[tuple[str, str]]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        above = row[:]
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(above[j + 1], row[j])
    return row[-1]


def tone_gold(prompt: str, text: str) -> float:
    """Positive minus negative words, whatever the prompt and wherever they stand."""
    words = text.split()
    return float(sum(_VALENCE.get(w, 0) for i, w in enumerate(words) if w != "never" or words[i - 1 : i] == ["will"]))


GOLD = {"content": content_gold, "tone": tone_gold}
