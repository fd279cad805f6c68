"""The E2E restaurant data (Novikova, Dusek and Rieser, 2017) with an exact, order-sensitive gold reward.

A *meaning representation* (MR) such as `name[Alimentum], area[city centre], familyFriendly[no]` lists the facts a
sentence should state. The data set pairs each MR with several human sentences; it is published, under CC BY-SA 4.0,
at https://github.com/tuetschek/e2e-dataset and is read here from a directory of the user's.

Why this task: a reward that only counts good words flatters every gradient method. Here the gold reward depends on
*what* is said and *in which order*, so a method has to assign credit to positions.

Order. Human sentences state the facts in any order, so the prompt decides: `format_prompt` writes the slots in the
order in which they should be said. A training prompt is written in the order of its own reference
(`spoken_order`), from which a language model learns to follow the order of its prompt; a held-out prompt is written
in the order the caller asks for, by default that of the MR.

    examples = load_e2e("e2e-dataset")
    train, held_out = split_by_mr(examples, seed=0, held_out=100)
    texts = [format_prompt(spoken_order(e.slots, e.reference)) + " " + e.reference for e in train]
    e2e_gold(parse_mr("name[Aromi], area[riverside]"), "Aromi is by the river.")  # 2.0
"""

import csv
import random
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


Slot = tuple[str, str]
"""(slot name, value), e.g. `("area", "city centre")`."""

SLOT_NAMES = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")
PROMPT_SEPARATOR = " =>"
FILES = ("devset.csv", "testset_w_refs.csv")


class E2EExample(NamedTuple):
    """One line of the data: the MR as published, its slots in the MR's order, one human sentence."""

    mr: str
    slots: tuple[Slot, ...]
    reference: str


class Mention(NamedTuple):
    """A slot found in a text, `start` characters into its normalised form; `words` are the words that gave it away.

    `value` is the recognisers' own: prices and ratings are reduced to three levels (see `e2e_gold`).
    """

    start: int
    slot: str
    value: str
    words: str


# Loading


def parse_mr(mr: str) -> tuple[Slot, ...]:
    """Slots of an MR, in its order; the text of `format_prompt` is an MR too.

    Raises:
        ValueError: not of the form `slot[value], slot[value]`, an unknown slot, or a slot given twice.
    """
    body = mr.strip().removesuffix(PROMPT_SEPARATOR.strip()).strip()
    if not re.fullmatch(r"[^\[\],]+\[[^\[\]]+\](?:\s*,\s*[^\[\],]+\[[^\[\]]+\])*", body):
        raise ValueError(f"not a meaning representation of the form 'slot[value], slot[value]': {mr!r}")
    slots = tuple((name.strip(), value.strip()) for name, value in re.findall(r"([^\[\],]+)\[([^\[\]]+)\]", body))
    names = [name for name, _ in slots]
    if unknown := set(names) - set(SLOT_NAMES):
        raise ValueError(f"unknown slots {sorted(unknown)} in {mr!r}; known are {', '.join(SLOT_NAMES)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a slot is given twice in {mr!r}")
    return slots


def format_prompt(slots: Sequence[Slot]) -> str:
    """Prompt asking for `slots` in this order: `name[Aromi], area[riverside] =>`. A completion starts with a space."""
    return ", ".join(f"{name}[{value}]" for name, value in slots) + PROMPT_SEPARATOR


def load_e2e(directory: str | Path) -> list[E2EExample]:
    """Every line of `devset.csv` and `testset_w_refs.csv` in `directory`, in file order.

    Raises:
        FileNotFoundError: the directory or one of the two files is missing.
        ValueError: a file has no lines, lacks a column, or holds an empty reference or a malformed MR (the message
            names file and line).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no directory {directory}; the E2E data ({', '.join(FILES)}) is at https://github.com/tuetschek/e2e-dataset"
        )
    return [example for name in FILES for example in _read_file(directory / name)]


def _read_file(path: Path) -> list[E2EExample]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected {' and '.join(FILES)} in {path.parent}")
    examples = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"mr", "ref"} - set(reader.fieldnames or ()):
            raise ValueError(f"{path} lacks the column(s) {', '.join(sorted(missing))}; found {reader.fieldnames}")
        for row in reader:
            if not row["ref"]:
                raise ValueError(f"{path}, line {reader.line_num}: no reference text")
            try:
                slots = parse_mr(row["mr"])
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            examples.append(E2EExample(row["mr"], slots, row["ref"]))
    if not examples:
        raise ValueError(f"{path} holds a header and no examples")
    return examples


def split_by_mr(examples: Sequence[E2EExample], seed: int, held_out: int) -> tuple[list[E2EExample], list[E2EExample]]:
    """Train and held-out examples that share no MR: every reference of `held_out` randomly drawn MRs is held out.

    The draw depends on `seed` and on the set of MRs, not on the order of `examples`, which both parts keep.

    Raises:
        ValueError: `held_out` is not between 1 and the number of MRs less one.
    """
    mrs = sorted({example.mr for example in examples})
    if not 1 <= held_out < len(mrs):
        raise ValueError(f"held_out={held_out} must leave both parts non-empty: the examples hold {len(mrs)} MRs")
    chosen = set(random.Random(seed).sample(mrs, held_out))
    train = [example for example in examples if example.mr not in chosen]
    return train, [example for example in examples if example.mr in chosen]


# Recognisers: from a text to the slots it states

# Numbers and words name the same three levels in this data: "less than £20" is said as "cheap", and so on.
_LEVEL = {
    ("priceRange", "less than £20"): "cheap",
    ("priceRange", "£20-25"): "moderate",
    ("priceRange", "more than £30"): "high",
    ("customer rating", "1 out of 5"): "low",
    ("customer rating", "3 out of 5"): "average",
    ("customer rating", "5 out of 5"): "high",
}

# The venues of the whole challenge: one that is not the MR's own is a wrong or an invented name.
_VENUES = {
    "name": (
        "Alimentum", "Aromi", "Bibimbap House", "Blue Spice", "Browns Cambridge", "Clowns", "Cocum", "Cotto",
        "Fitzbillies", "Giraffe", "Green Man", "Loch Fyne", "Midsummer House", "Strada", "Taste of Cambridge",
        "The Cambridge Blue", "The Cricketers", "The Dumpling Tree", "The Eagle", "The Golden Curry",
        "The Golden Palace", "The Mill", "The Olive Grove", "The Phoenix", "The Plough", "The Punter",
        "The Twenty Two", "The Vaults", "The Waterman", "The Wrestlers", "Travellers Rest Beefeater", "Wildwood",
        "Zizzi",
    ),
    "near": (
        "All Bar One", "Avalon", "Burger King", "Café Adriatic", "Café Brazil", "Café Rouge", "Café Sicilia",
        "Clare Hall", "Crowne Plaza Hotel", "Express by Holiday Inn", "Rainbow Vegetarian Café",
        "Raja Indian Cuisine", "Ranch", "The Bakers", "The Portland Arms", "The Rice Boat", "The Six Bells",
        "The Sorrento", "Yippee Noodle Bar",
    ),
}  # fmt: skip
_SHORTENED = {
    "Crowne Plaza Hotel": r"crowne? plaza(?: hotel)?",
    "Express by Holiday Inn": r"express (?:by )?(?:the )?holiday inn|holiday inn(?: express)?",
    "Rainbow Vegetarian Café": r"rainbow(?: vegetarian)?(?: cafe)?",
    "Raja Indian Cuisine": r"raja(?: indian)?(?: cuisine)?",
}

_PRICE = r"(?:pric(?:ed?|es|ings?)|cost(?:s|ing)?)(?:[- ]range[sd]?)?"
_RATING = (
    r"(?:(?:customer'?s?'?|consumers?|guests?'?|service|satisfaction|overall|quality)[- ])*"
    r"(?:rat(?:ed?|es|ings?)|review(?:s|ed)?|scores?)"
)
# What may stand between "price range" or "rating" and its value: "price range is in the", "rated by customers as".
_LINK = (
    r"(?: (?:is|are|was|has|been|being|that|it|a|an|the|of|as|at|by|in|for|from|customers|very|quite|rather|only|just|"
    r"#+))*:? "
)
_MONEY = r"(?: (?:pounds?|euros?|dollars?)\b)?"
_CHILD = r"(?:famil(?:y|ies)|kids?|child(?:ren)?)(?:'?s)?"
_CHILDREN = rf"\b{_CHILD}(?:(?: and| or| with|,) {_CHILD})*"
_NOT = r"(?:\b(?:not?|non|none|never|without|cannot|nor|leave|bad)|n't)"
_NOT_AFTER = r"(?:not\b(?! (?:far|too|very|expensive|cheap))|no\b|\w*n't\b|unfriendly|prohibited|free\b)"
_CITY = r"(?:city|town)'?s?[- ]?cent(?:re|er|ral)|cent(?:re|er) of (?:the )?(?:city|town)(?: cent(?:re|er))?"
# "Reasonable" and "fair" are said of every price level here, so they state none.
_MIDDLE = r"average(?:ly)?|medium|mid(?:dle)?(?:[- ]?(?:ranged?|level))?"
# Words between a negation and what it negates; a new clause ends its reach.
_REACH = r"(?:(?!(?:and|but|with|it|that|which|only)\b)[\w']+[- ])"

# Words that look like a slot and state none: "north of the city centre", "20 British pounds".
_STATES_NOTHING = re.compile(
    rf"\b(?:north|south|east|west|outside|edge|outskirts)(?:ern)?(?: part)?(?: of)?(?: the)? (?:{_CITY}|city|town)\b"
    r"|\b(?:british|english) (?:pounds?|sterling)\b"
    r"|\bfamily[- ](?:owned|run)\b"
)


def _stars(number: str) -> str:
    """Ways of giving `number` (alternatives joined by |) out of five, with the word rating beside it or not."""
    return (
        rf"(?:\b{_RATING}{_LINK})?\b(?:{number})"
        rf"(?: ?(?:out of|out|of)(?: a possible)? ?(?:5|five)\b(?:[- ]stars?)?|/5|[- ]stars?\b)(?:[- ]{_RATING})?"
        rf"|\b{_RATING}{_LINK}(?:{number})\b(?! ?[\d.]| out| of)"
    )


def _rated(level: str) -> str:
    """Either order, "high customer rating" and "rating is high"; in "rating at high prices" the price is high."""
    return rf"\b(?:{level})[- ]{_RATING}\b|\b{_RATING}{_LINK}(?:{level})\b(?![- ]{_PRICE}\b)"


def _priced(level: str) -> str:
    return rf"\b(?:{level})[- ](?:in |range )?{_PRICE}\b|\b{_PRICE}{_LINK}(?:{level})\b(?![- ]{_RATING}\b)"


# Tried from top to bottom; what one has matched, those below no longer see.
_PATTERNS = [
    (slot, value, re.compile(pattern))
    for slot, value, pattern in (
        ("customer rating", "low", _stars("1|one")),
        ("customer rating", "2 out of 5", _stars("2|two")),
        ("customer rating", "average", _stars("3|three")),
        ("customer rating", "4 out of 5", _stars("4|four")),
        ("customer rating", "high", _stars("5|five")),
        (
            "customer rating",
            "low",
            _rated(
                r"low(?:er|ly|est)?|poor(?:ly)?|bad(?:ly)?|below average|terribl[ey]|"
                r"(?:not|n't) (?:have |get |receive )?(?:very |a )?(?:high(?:ly)?|good|well|great)"
            ),
        ),
        (
            "customer rating",
            "high",
            _rated(
                r"(?:very )?high(?:ly|er|est)?|above average|well|good|great|excellent|top|best|perfect|positive|"
                r"fantastic|outstanding"
            ),
        ),
        (
            "customer rating",
            "average",
            _rated(r"average(?:ly)?|moderate(?:ly)?|medium|mediocre|decent(?:ly)?|mid(?:[- ]ranged?)?"),
        ),
        ("priceRange", "moderate", rf"[£l]? ?20(?:\.00)?{_MONEY} ?(?:-|to|and|or) ?[£l]? ?25\b{_MONEY}"),
        ("priceRange", "cheap", rf"\b(?:less|lower|under|below|up to)(?: th[ae]n)? [£l]? ?(?:20|twenty)\b{_MONEY}"),
        ("priceRange", "cheap", r"£ ?20\b"),
        (
            "priceRange",
            "high",
            rf"\b(?:more|higher|over|above|from|at least)(?: th[ae]n)? [£l]? ?(?:30|thirty)\b{_MONEY}",
        ),
        ("priceRange", "high", r"£ ?30\b|\b30 (?:pounds?|euros?)\b"),
        ("priceRange", "moderate", r"\bmoderately (?:expensive|cheap|priced)\b"),
        ("priceRange", "moderate", rf"\b{_PRICE}{_LINK}moderate(?:ly)?\b(?![- ]{_RATING}\b)"),
        ("priceRange", "cheap", _priced(r"low(?:er|est|ly)?|below average|reduced|not (?:very |too )?high")),
        (
            "priceRange",
            "high",
            _priced(r"(?:very )?high(?:er|est|ly)?|(?:above|higher than|more than)[- ]average|premium"),
        ),
        # "an average price of £30" is no average price.
        ("priceRange", "moderate", rf"(?:{_priced(_MIDDLE)})(?! (?:range )?(?:of|is)\b)"),
        ("priceRange", "cheap", rf"\b(?:cheap(?:er|ly)?|inexpensive(?:ly)?|affordabl[ey]|budget)(?:[- ]{_PRICE})?\b"),
        ("priceRange", "cheap", r"\bnot (?:very |too |that )?expensive\b"),
        ("priceRange", "high", rf"\b(?:(?:more )?expensive(?:ly)?|pric(?:e?y|ier)|costly|upscale)(?:[- ]{_PRICE})?\b"),
        ("priceRange", "moderate", rf"\b(?:moderate(?:ly)?|mid[- ]?range)(?:[- ]{_PRICE})?\b"),
        ("area", "riverside", r"\briver(?:[- ]?(?:side|banks?|front))?(?: area)?\b|\bwaterfront\b"),
        ("area", "city centre", rf"\b(?:{_CITY}|(?:middle|heart) of (?:the )?(?:city|town)|downtown)\b"),
        ("area", "city centre", r"\bin (?:the )?(?:city|town|cent(?:re|er))\b"),
        ("food", "Fast food", r"\bfast[- ]?foods?\b"),
        ("food", "Chinese", r"\bchinese\b"),
        ("food", "English", r"\b(?:english|british)\b"),
        ("food", "French", r"\bfrench\b(?! fr(?:y|ies))"),
        ("food", "Indian", r"\bindian\b"),
        ("food", "Italian", r"\b(?:italian|pasta)\b"),
        ("food", "Japanese", r"\b(?:japanese|sushi)\b"),
        ("familyFriendly", "yes", rf"\badults? and {_CHILD}\b|{_CHILDREN} (?:and|as well as) adults?\b|\ball ages\b"),
        ("familyFriendly", "no", rf"{_NOT}[- ]{_REACH}{{0,4}}?{_CHILDREN}(?:[- ](?:friendly|oriented|allowed))?\b"),
        ("familyFriendly", "no", rf"{_CHILDREN}[- ](?:friendly:? )?{_REACH}{{0,3}}?{_NOT_AFTER}"),
        ("familyFriendly", "no", r"\badults?'?s?(?:[- ](?:only|oriented))?\b|\bgrown[- ]?ups?\b"),
        ("familyFriendly", "yes", rf"{_CHILDREN}(?:[- ](?:friendly|oriented|welcome))?\b"),
        ("eatType", "coffee shop", r"\bcoffee[- ]?(?:shops?|house|bar|place)\b|\bcafe\b"),
        ("eatType", "pub", r"\b(?:pubs?|bar|tavern)\b"),
        ("eatType", "restaurant", r"\brestaurants?\b"),
    )
]


def _normalise(text: str) -> str:
    """Lower case, accents removed, quotes and dashes made plain, white space reduced to single spaces."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).lower()
    return " ".join(text.replace("’", "'").replace("–", "-").replace("—", "-").split())


@lru_cache(maxsize=4096)
def _venue_patterns(own: tuple[Slot, ...]) -> list[tuple[str, str, re.Pattern[str]]]:
    """Longest first, so that no name hides in a longer one; `own` venues take precedence over the known ones."""
    venues = {value: slot for slot, known in _VENUES.items() for value in known}
    venues |= {value: slot for slot, value in own}
    patterns = []
    for value in sorted(venues, key=len, reverse=True):
        words = _SHORTENED.get(value) or re.escape(_normalise(value).removeprefix("the "))
        patterns.append((venues[value], value, re.compile(rf"\b(?:{words})\b")))
    return patterns


def find_mentions(slots: Sequence[Slot], text: str) -> list[Mention]:
    """Slots stated in `text`, in the order of the text.

    `slots` (of the MR) say which venue is the subject and which the neighbour, and whether "restaurant" states a
    kind of place: where the MR does not ask for it, it is everybody's word for a place to eat and states nothing.

    An apposition counts once: other words for the same value beside the first ones, no other slot in between, as in
    "not family-friendly, adults only" or "high price range, more than £30". The same words again are a mention again.
    """
    rest = _normalise(text)
    found: list[Mention] = []
    own = tuple((name, value) for name, value in slots if name in _VENUES)
    states_restaurant = any(value == "restaurant" for _, value in slots)
    # Venues first: "Raja Indian Cuisine" states no food and "All Bar One" no pub.
    for slot, value, pattern in _venue_patterns(own):
        rest = _take(slot, value, pattern, rest, found)
    rest = _STATES_NOTHING.sub(_blank, rest)
    for slot, value, pattern in _PATTERNS:
        if value != "restaurant" or states_restaurant:
            rest = _take(slot, value, pattern, rest, found)

    mentions: list[Mention] = []
    said: set[str] = set()  # the words of the current apposition
    for mention in sorted(found):
        apposed = bool(mentions) and mention[1:3] == mentions[-1][1:3] and mention.words not in said
        if apposed:
            said.add(mention.words)
        else:
            mentions.append(mention)
            said = {mention.words}
    return mentions


def _take(slot: str, value: str, pattern: re.Pattern[str], text: str, found: list[Mention]) -> str:
    """Adds the matches to `found`; the text with each replaced by as many #, so that positions stay."""
    matches = [Mention(match.start(), slot, value, match.group()) for match in pattern.finditer(text)]
    found += matches
    return pattern.sub(_blank, text) if matches else text


def _blank(match: re.Match[str]) -> str:
    return "#" * len(match.group())


# Order and reward


def spoken_order(slots: Sequence[Slot], text: str) -> tuple[Slot, ...]:
    """`slots` reordered as `text` mentions them first; those it does not mention follow, in their own order.

    A slot left out by the writer (about one in fourteen here) stays in the prompt: training and held-out prompts are
    then of one kind, and a model trained on them leaves out a little too, which the gold reward sees.
    """
    first = {mention.slot: mention.start for mention in reversed(find_mentions(slots, text))}
    return tuple(sorted(((name, value) for name, value in slots), key=lambda slot: first.get(slot[0], len(text) + 1)))


def e2e_gold(slots: Sequence[Slot], text: str) -> float:
    """Exact ordered slot coverage of `slots` by `text`, in slots: at most `len(slots)`, without a lower bound.

        gold = ordered - wrong - hallucinated - repeated / 2

    - *correct* is a slot of the MR that the text mentions with its value and no other; *ordered* is the length of the
      longest subsequence of `slots` whose correct slots the text mentions first in this very order. A correct slot
      out of order therefore earns nothing, and one slot moved far costs no more than one moved by one place.
    - *wrong*: slots of the MR that the text mentions with another value (also beside the right one).
    - *hallucinated*: slots that the text mentions and the MR does not hold.
    - *repeated*: mentions of a slot beyond its first, summed over slots (appositions apart, see `find_mentions`).

    Values are compared exactly, prices and customer ratings by level: "less than £20" and "cheap", "£20-25" and
    "moderate", "more than £30" and "high" are one value each, and so are "1 out of 5" and "low", "3 out of 5" and
    "average", "5 out of 5" and "high". A slot not mentioned costs what it does not earn. An empty text scores 0.

    Args:
        slots: what to say, in the order in which to say it: `parse_mr` of an MR or of a prompt.
        text: the completion alone, without the prompt.
    """
    wanted = {name: _LEVEL.get((name, value), value) for name, value in slots}
    mentions = find_mentions(slots, text)
    values: dict[str, set[str]] = {}
    for mention in mentions:
        values.setdefault(mention.slot, set()).add(mention.value)
    correct = [name for name in values if values[name] == {wanted.get(name)}]  # by first mention
    wrong = sum(name in wanted for name in values) - len(correct)
    hallucinated = sum(name not in wanted for name in values)
    repeated = len(mentions) - len(values)

    # Longest increasing subsequence of MR positions (patience sorting).
    position = {name: index for index, name in enumerate(wanted)}
    tails: list[int] = []
    for index in (position[name] for name in correct):
        place = bisect_left(tails, index)
        tails[place : place + 1] = [index]
    return len(tails) - wrong - hallucinated - repeated / 2
