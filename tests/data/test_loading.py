"""Data sets from files and directories: splits, columns, transcripts, and bad input in one line."""

import json

import pytest

from vgf_llm.data.loading import load_splits


ROW = {"prompt": "the food was", "completion": " good"}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_file_and_a_directory_are_read_alike(tmp_path):
    file = write(tmp_path / "d" / "train.jsonl", ROW, ROW)
    write(tmp_path / "d" / "test.jsonl", ROW)
    (alone,) = load_splits(file, None, ["train"], ["prompt"])
    train, test = load_splits(str(tmp_path / "d"), None, ["train", "test"], ["prompt", "completion"])
    assert alone.to_list() == train.to_list() == [ROW, ROW]
    assert test.to_list() == [ROW]


def test_transcripts_are_parsed_and_bad_ones_reported(tmp_path, caplog):
    file = write(tmp_path / "hh.jsonl", HH, {**HH, "rejected": HH["chosen"]}, HH)
    (dataset,) = load_splits(file, None, ["train"], ["prompt", "chosen", "rejected"], hh_transcripts=True)
    assert dataset[1] == {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    }
    assert "2 pairs, 1 malformed rows left out: 1 with equal answers (first: row 2)" in caplog.text


@pytest.mark.parametrize(
    ("name", "splits", "columns", "transcripts", "says"),
    [
        (None, ["train"], [], False, "give --dataset_name"),
        ("empty.jsonl", ["train"], [], False, "is empty"),
        ("a.jsonl", ["train", "test"], [], False, "no split 'test', only train"),
        ("a.jsonl", ["train"], ["prompt", "chosen"], False, r"lacks the column\(s\) chosen; found prompt, completion"),
        ("a.jsonl", ["train"], [], True, 'no HH transcripts: .* 1 with no strings "chosen"'),
    ],
)
def test_bad_data(tmp_path, name, splits, columns, transcripts, says):
    write(tmp_path / "a.jsonl", ROW)
    write(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=says):
        load_splits(name and str(tmp_path / name), None, splits, columns, transcripts)
