"""The order-sensitive E2E reward on hand-written sentences, the loader on bad input, and both on the real files."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vgf_llm.data.e2e import (
    E2EExample,
    e2e_gold,
    find_mentions,
    format_prompt,
    load_e2e,
    parse_mr,
    split_by_mr,
    spoken_order,
)


REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "e2e-nlg"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the E2E files are not in ../shared/data/e2e-nlg")

ALIMENTUM = parse_mr("name[Alimentum], area[city centre], familyFriendly[no]")
FULL = parse_mr(
    "name[The Vaults], eatType[pub], food[Japanese], priceRange[£20-25], customer rating[5 out of 5], "
    "area[riverside], familyFriendly[yes], near[Raja Indian Cuisine]"
)
FULL_TEXT = (
    "The Vaults is a pub with Japanese food for £20-25, rated 5 out of 5. It is by the river, family-friendly and "
    "near Raja Indian Cuisine."
)


# Meaning representations and prompts


def test_parse_mr_keeps_order_and_reads_prompts():
    assert ALIMENTUM == (("name", "Alimentum"), ("area", "city centre"), ("familyFriendly", "no"))
    assert parse_mr(format_prompt(FULL[::-1])) == FULL[::-1]
    assert format_prompt(ALIMENTUM[:2]) == "name[Alimentum], area[city centre] =>"


@pytest.mark.parametrize("bad", ["", "name", "name[Aromi", "name[Aromi] area[riverside]", "name[Aromi],", "name[]"])
def test_parse_mr_rejects_malformed_text(bad):
    with pytest.raises(ValueError, match="not a meaning representation"):
        parse_mr(bad)


def test_parse_mr_rejects_unknown_and_repeated_slots():
    with pytest.raises(ValueError, match="unknown slots .*colour"):
        parse_mr("name[Aromi], colour[red]")
    with pytest.raises(ValueError, match="given twice"):
        parse_mr("name[Aromi], name[Cotto]")


# The reward


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("Alimentum, in the city centre, is not family-friendly.", 3.0),
        ("Alimentum in the centre of the city does not allow children.", 3.0),
        ("Alimentum is in the city centre. Not family-friendly, adults only.", 3.0),  # an apposition counts once
        ("Alimentum is in the city centre.", 2.0),  # missing
        ("Alimentum is not family-friendly. It is in the city centre.", 2.0),  # order: two of three are in order
        ("In the city centre is a place that is no place for kids: Alimentum.", 2.0),
        ("Not family-friendly, in the city centre: Alimentum.", 1.0),  # reversed
        ("Alimentum, in the city centre, is family-friendly.", 1.0),  # 2 ordered - 1 wrong
        ("Alimentum, by the river, is not family-friendly.", 1.0),
        ("Aromi, in the city centre, is not family-friendly.", 1.0),
        ("Alimentum is a pub in the city centre and not family-friendly.", 2.0),  # 3 ordered - 1 hallucinated
        ("Alimentum in the city centre, in the city centre, is not family-friendly.", 2.5),  # repeated
        ("Alimentum Alimentum Alimentum Alimentum", -0.5),
        ("", 0.0),
        ("We had a lovely evening.", 0.0),
    ],
)
def test_gold_on_three_slots(text, gold):
    assert e2e_gold(ALIMENTUM, text) == gold


def test_gold_of_all_eight_slots_follows_the_order_of_the_prompt():
    assert e2e_gold(FULL, FULL_TEXT) == 8.0
    assert e2e_gold(FULL[::-1], FULL_TEXT) == 1.0
    swapped = (FULL[0], FULL[2], FULL[1], *FULL[3:])
    assert e2e_gold(swapped, FULL_TEXT) == 7.0
    moved_far = (*FULL[1:], FULL[0])
    assert e2e_gold(moved_far, FULL_TEXT) == 7.0  # distance does not matter


def test_gold_accepts_rows_as_data_sets_store_them():
    assert e2e_gold([list(slot) for slot in FULL], FULL_TEXT) == 8.0


@pytest.mark.parametrize(
    ("slot", "value", "text"),
    [
        ("priceRange", "less than £20", "It is cheap."),
        ("priceRange", "cheap", "You pay less than 20 pounds."),
        ("priceRange", "£20-25", "Prices range from 20 to 25 pounds."),
        ("priceRange", "moderate", "It is in the moderate price range."),
        ("priceRange", "moderate", "It is a mid-priced place."),
        ("priceRange", "more than £30", "It costs over £30."),
        ("priceRange", "more than £30", "The average price is £30."),
        ("priceRange", "high", "It is expensive."),
        ("customer rating", "1 out of 5", "Customers rate it 1 out of 5."),
        ("customer rating", "low", "It does not have good reviews."),
        ("customer rating", "3 out of 5", "It is a three star place."),
        ("customer rating", "average", "Its customer rating is average."),
        ("customer rating", "high", "It is highly rated."),
        ("area", "riverside", "It is on the river."),
        ("area", "city centre", "It is in the center of the city."),
        ("eatType", "coffee shop", "It is a café."),
        ("eatType", "restaurant", "It is a restaurant."),
        ("food", "Fast food", "It serves fast food."),
        ("familyFriendly", "yes", "Children are welcome."),
        ("familyFriendly", "yes", "It is not expensive and child friendly."),
        ("familyFriendly", "no", "Children are not welcome."),
        ("familyFriendly", "no", "It isn't a kid friendly place."),
        ("familyFriendly", "no", "It is a non-family-friendly place."),
        ("familyFriendly", "no", "Leave the kids at home."),
        ("near", "Crowne Plaza Hotel", "It is near the Crowne Plaza."),
        ("near", "Café Brazil", "It is next to Cafe Brazil."),
    ],
)
def test_paraphrases_are_recognised(slot, value, text):
    named = f"Aromi. {text}"
    slots = (("name", "Aromi"), (slot, value))
    extra = {mention.slot for mention in find_mentions(slots, named)} - {"name", slot, "priceRange"}
    assert not extra
    if "not expensive" in text:  # states a price as well
        slots = (("name", "Aromi"), ("priceRange", "cheap"), (slot, value))
    assert e2e_gold(slots, named) == len(slots)


def test_look_alikes_state_nothing():
    slots = parse_mr("name[Aromi], near[All Bar One]")
    assert e2e_gold(slots, "Aromi is a restaurant near All Bar One, north of the city centre.") == 2.0  # no pub
    slots = parse_mr("name[Aromi], near[Raja Indian Cuisine]")
    assert e2e_gold(slots, "Aromi is near Raja Indian Cuisine.") == 2.0  # no Indian food


def test_venues_outside_the_challenge_are_known_from_the_mr():
    slots = parse_mr("name[Chez Ünal], near[The Old Pier]")
    assert e2e_gold(slots, "Chez Unal is near the Old Pier.") == 2.0


@given(st.permutations(FULL), st.text(max_size=200))
def test_gold_is_bounded_by_the_number_of_slots(slots, text):
    assert e2e_gold(slots, text) <= len(slots)
    assert e2e_gold(spoken_order(slots, FULL_TEXT), FULL_TEXT) == 8.0


def test_spoken_order_keeps_unmentioned_slots_at_the_end():
    text = "By the river, Aromi serves English food."
    slots = parse_mr("name[Aromi], priceRange[high], food[English], area[riverside], familyFriendly[no]")
    names = [name for name, _ in spoken_order(slots, text)]
    assert names == ["area", "name", "food", "priceRange", "familyFriendly"]


# Loading and splitting


def write_files(directory: Path, dev: str, test: str = "mr,ref\nname[Aromi],Aromi is a place.\n") -> Path:
    (directory / "devset.csv").write_text(dev, encoding="utf-8")
    (directory / "testset_w_refs.csv").write_text(test, encoding="utf-8")
    return directory


def test_load_reads_both_files_in_order(tmp_path):
    write_files(tmp_path, 'mr,ref\n"name[Cotto], area[riverside]","Cotto, by the river."\n')
    assert load_e2e(tmp_path) == [
        E2EExample("name[Cotto], area[riverside]", (("name", "Cotto"), ("area", "riverside")), "Cotto, by the river."),
        E2EExample("name[Aromi]", (("name", "Aromi"),), "Aromi is a place."),
    ]


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory .*e2e-dataset"):
        load_e2e(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"devset\.csv is missing"):
        load_e2e(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"lacks the column\(s\) mr, ref"),
        ("mr,text\nname[Aromi],Aromi.\n", r"lacks the column\(s\) ref"),
        ("mr,ref\n", "no examples"),
        ("mr,ref\nname[Aromi],\n", "line 2: no reference"),
        ("mr,ref\nname[Aromi]\n", "line 2: no reference"),
        ("mr,ref\nname[Aromi],fine\nname Aromi,bad\n", "line 3: not a meaning representation"),
    ],
)
def test_load_says_where_a_file_is_bad(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"devset\.csv.*{message}"):
        load_e2e(write_files(tmp_path, content))


def make_examples(mrs: int, references: int) -> list[E2EExample]:
    slots = [(("name", f"Place {i}"),) for i in range(mrs)]
    return [E2EExample(f"name[Place {i}]", slots[i], f"Text {j}.") for i in range(mrs) for j in range(references)]


def test_split_shares_no_mr_and_loses_nothing():
    examples = make_examples(mrs=10, references=3)
    train, held_out = split_by_mr(examples, seed=1, held_out=4)
    assert len({e.mr for e in held_out}) == 4
    assert {e.mr for e in train}.isdisjoint(e.mr for e in held_out)
    assert sorted(train + held_out) == sorted(examples)


def test_split_depends_on_seed_and_not_on_order():
    examples = make_examples(mrs=10, references=3)
    held_out = {e.mr for e in split_by_mr(examples, seed=1, held_out=4)[1]}
    assert {e.mr for e in split_by_mr(examples[::-1], seed=1, held_out=4)[1]} == held_out
    assert any({e.mr for e in split_by_mr(examples, seed=s, held_out=4)[1]} != held_out for s in range(2, 6))


@pytest.mark.parametrize("held_out", [0, 10, -1])
def test_split_rejects_an_empty_part(held_out):
    with pytest.raises(ValueError, match="hold 10 MRs"):
        split_by_mr(make_examples(mrs=10, references=1), seed=0, held_out=held_out)


# The published files


@pytest.fixture(scope="module")
def real_examples() -> list[E2EExample]:
    return load_e2e(REAL)


@needs_real_data
def test_real_files_load_and_split(real_examples):
    assert len(real_examples) == 9365
    assert len({example.mr for example in real_examples}) == 1177
    train, held_out = split_by_mr(real_examples, seed=0, held_out=100)
    assert len({example.mr for example in held_out}) == 100
    assert len(train) + len(held_out) == len(real_examples)


@needs_real_data
def test_human_references_score_high_in_their_own_order(real_examples):
    """Writers leave slots out and err, so the ceiling is below 1; a recogniser that broke would show here."""
    sample = real_examples[::5]
    slots = sum(len(e.slots) for e in sample)
    own = sum(e2e_gold(spoken_order(e.slots, e.reference), e.reference) for e in sample)
    in_mr_order = sum(e2e_gold(e.slots, e.reference) for e in sample)
    assert own / slots > 0.89
    assert in_mr_order / slots < own / slots - 0.15  # order matters


@needs_real_data
def test_recognisers_rarely_fire_where_the_mr_lacks_their_slot(real_examples):
    sample = real_examples[::5]
    lacking = sum(8 - len(e.slots) for e in sample)
    invented = sum(len({m.slot for m in find_mentions(e.slots, e.reference)} - {name for name, _ in e.slots}) for e in sample)
    assert invented / lacking < 0.01
