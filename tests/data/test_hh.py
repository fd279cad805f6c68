"""HH transcripts: the parser on written dialogues, the loader on bad input, and both on the real file."""

import gzip
import json
import os
from pathlib import Path

import pytest

from vgf_llm.data.hh import ROLES, load_hh, parse_pair, parse_transcript


DATA = Path(os.environ.get("VGF_LLM_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
REAL = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"
needs_real_data = pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is missing (VGF_LLM_DATA: another place)")

PROMPT = "\n\nHuman: Where is the river?\n\nAssistant: Behind the mill.\n\nand the hill\n\nHuman: How far?"
ROW = {"chosen": f"{PROMPT}\n\nAssistant: A mile. ", "rejected": f"{PROMPT}\n\nAssistant: Far."}


def write(path, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as file:
        file.write(text)
    return path


def test_a_pair_shares_its_prompt():
    pair = parse_pair(**ROW)
    assert pair["prompt"] == [
        {"role": "user", "content": "Where is the river?"},
        {"role": "assistant", "content": "Behind the mill.\n\nand the hill"},
        {"role": "user", "content": "How far?"},
    ]
    assert pair["chosen"] == [{"role": "assistant", "content": "A mile."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "Far."}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "text before the first turn"),
        ("Hello", "text before the first turn"),
        ("Hello\n\nHuman: a\n\nAssistant: b", "text before the first turn"),
        ("\nHuman: a\n\nAssistant: b", "text before the first turn"),
        ("\n\nAssistant: b", "do not alternate"),
        ("\n\nHuman: a", "do not alternate"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "do not alternate"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "do not alternate"),
        ("\n\nHuman: a\n\nAssistant: ", "empty turn"),
        ("\n\nHuman:\n\nAssistant: b", "empty turn"),
    ],
)
def test_malformed_transcripts(text, says):
    with pytest.raises(ValueError, match=says):
        parse_transcript(text)


def test_pairs_that_do_not_belong_together():
    with pytest.raises(ValueError, match="different prompts"):
        parse_pair(ROW["chosen"], ROW["rejected"].replace("mill", "inn"))
    with pytest.raises(ValueError, match="different prompts"):
        parse_pair(ROW["chosen"], "\n\nHuman: Where is the river?\n\nAssistant: There.")
    with pytest.raises(ValueError, match="equal answers"):
        parse_pair(ROW["chosen"], ROW["chosen"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_malformed_rows_are_counted_with_their_reasons(tmp_path, name):
    good = ROW["chosen"]
    bad = [{"chosen": good}, "no json", "[1]", {"chosen": good, "rejected": good}]
    pairs = load_hh(write(tmp_path / name, ROW, *bad, "", ROW))
    assert pairs.rows == [parse_pair(**ROW)] * 2
    assert pairs.malformed == {
        'no strings "chosen" and "rejected"': [f"{name}, line {n}" for n in (2, 3, 4)],
        "equal answers": [f"{name}, line 5"],
    }
    assert pairs.report() == (
        f'2 pairs, 4 malformed rows left out: 3 with no strings "chosen" and "rejected" (first: {name}, line 2); '
        f"1 with equal answers (first: {name}, line 5)"
    )


def test_a_directory_and_its_splits(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "train.jsonl.gz", ROW, ROW)
    write(tmp_path / "test.jsonl", ROW)
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    assert [len(load_hh(tmp_path, split).rows) for split in (None, "train", "test")] == [3, 2, 1]
    assert load_hh(tmp_path).report() == "3 pairs, 0 malformed rows left out"
    with pytest.raises(FileNotFoundError, match="no .jsonl .* 'validation' in its name"):
        load_hh(tmp_path, "validation")


def test_files_that_hold_no_transcripts(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        load_hh(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="no HH transcripts: 0 pairs"):
        load_hh(write(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="1 with text before the first turn"):
        load_hh(write(tmp_path / "other.jsonl", {"chosen": "a", "rejected": "b"}))
    whole = write(tmp_path / "whole.jsonl.gz", ROW).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cut.jsonl.gz is broken"):
        load_hh(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="plain.jsonl.gz is broken"):
        load_hh(tmp_path / "plain.jsonl.gz")


@needs_real_data
def test_the_real_file():
    pairs = load_hh(REAL)
    dropped = {reason: len(places) for reason, places in pairs.malformed.items()}
    assert sum(dropped.values()) + len(pairs.rows) == 2312
    assert 2290 < len(pairs.rows) < 2312
    assert "turns that do not alternate from human to assistant" in dropped
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        originals = {json.loads(line)["chosen"].strip() for line in file}
    speaker = {role: name for name, role in ROLES.items()}
    for row in pairs.rows:
        assert row["prompt"][-1]["role"] == "user"
        assert row["chosen"] != row["rejected"]
    # Nothing is lost: the turns put together again are the transcript, where it has no white space of its own around them.
    again = ["\n\n".join(f"{speaker[m['role']]}: {m['content']}" for m in row["prompt"] + row["chosen"]) for row in pairs.rows]
    assert sum(text in originals for text in again) > 0.98 * len(again)
