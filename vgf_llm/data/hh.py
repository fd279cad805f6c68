"""Anthropic's HH-RLHF transcripts (Bai et al., 2022) as chat preferences.

The data set is pairs of whole dialogues, each one string of turns that start with a blank line and a speaker:
`\\n\\nHuman: ... \\n\\nAssistant: ...`. Both dialogues of a pair should be the same up to their last turn, which the
assistant speaks; that shared part is the prompt. It is published, under the MIT licence, at
https://github.com/anthropics/hh-rlhf and contains offensive text: messages of this module quote none of it.

    pairs = load_hh("hh-rlhf/harmless-base", split="train")
    print(pairs.report())
    dataset = Dataset.from_list(pairs.rows)  # TRL's conversational preference format
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO, TypedDict, cast


Message = dict[str, str]
"""`{"role": "user" or "assistant", "content": ...}`"""

ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class Preference(TypedDict):
    """Two answers to one prompt. `prompt` ends with a user's message; `chosen` and `rejected` are one message each."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


class HHPairs(NamedTuple):
    """What could be read, and what could not.

    Attributes:
        rows: the pairs, in the order of the data.
        malformed: the places of the rows left out ("test.jsonl.gz, line 3"), by reason.
    """

    rows: list[Preference]
    malformed: dict[str, list[str]]

    def report(self) -> str:
        """One line: how many pairs were read, and how many rows were left out for which reason."""
        dropped = sum(map(len, self.malformed.values()))
        why = "; ".join(f"{len(places)} with {reason} (first: {places[0]})" for reason, places in self.malformed.items())
        return f"{len(self.rows)} pairs, {dropped} malformed rows left out" + (f": {why}" if why else "")


def parse_transcript(text: str) -> list[Message]:
    """The turns of one dialogue, white space around them removed.

    Raises:
        ValueError: text before the first turn, turns that do not alternate from a human to an assistant, or an empty one.
            The message is the reason alone, so that rows can be counted by it.
    """
    before, *rest = _SPEAKER.split(text)
    messages = [
        {"role": ROLES[speaker], "content": content.strip()} for speaker, content in zip(rest[::2], rest[1::2], strict=True)
    ]
    if before.strip() or not messages:
        raise ValueError("text before the first turn")
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(messages))]
    if [message["role"] for message in messages] != expected or messages[-1]["role"] != "assistant":
        raise ValueError("turns that do not alternate from human to assistant")
    if not all(message["content"] for message in messages):
        raise ValueError("an empty turn")
    return messages


def parse_pair(chosen: str, rejected: str) -> Preference:
    """One row of the data.

    Raises:
        ValueError: as `parse_transcript`; the dialogues differ before their last turn, or do not differ at all.
    """
    good, bad = parse_transcript(chosen), parse_transcript(rejected)
    if good[:-1] != bad[:-1]:
        raise ValueError("different prompts")
    if good == bad:
        raise ValueError("equal answers")
    return {"prompt": good[:-1], "chosen": good[-1:], "rejected": bad[-1:]}


def parse_rows(rows: Iterable[tuple[str, object]]) -> HHPairs:
    """Rows as (place, row): a row that is no object with strings `chosen` and `rejected` is malformed too.

    Raises:
        ValueError: no row could be read; the message says why.
    """
    pairs = HHPairs([], {})
    for place, row in rows:
        try:
            pairs.rows.append(parse_pair(*_texts(row)))
        except ValueError as error:
            pairs.malformed.setdefault(str(error), []).append(place)
    if not pairs.rows:
        raise ValueError(f"no HH transcripts: {pairs.report()}")
    return pairs


def _texts(row: object) -> tuple[str, str]:
    match row:
        case {"chosen": str(chosen), "rejected": str(rejected)}:
            return chosen, rejected
    raise ValueError('no strings "chosen" and "rejected"')


def load_hh(path: str | Path, split: str | None = None) -> HHPairs:
    """The pairs of one `.jsonl` or `.jsonl.gz` file, or of all such files below a directory.

    Args:
        path: file or directory.
        split: of a directory, only the files whose name contains it: the published files are called train and test.
            Default None: all.

    Raises:
        FileNotFoundError: no such file, or none in the directory.
        ValueError: a broken archive, text that is not UTF-8, or no row that could be read.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.jsonl*") if file.name.endswith((".jsonl", ".jsonl.gz")))
        files = [file for file in files if split is None or split in file.name.split(".jsonl")[0]]
        if not files:
            named = f" with {split!r} in its name" if split is not None else ""
            raise FileNotFoundError(f"no .jsonl or .jsonl.gz file{named} in {path}")
    elif not path.is_file():
        raise FileNotFoundError(f"no file or directory {path}; the HH data is at https://github.com/anthropics/hh-rlhf")
    return parse_rows(row for file in files for row in _read_file(file))


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    open_text = gzip.open if path.name.endswith(".gz") else open
    try:
        with cast(TextIO, open_text(path, "rt", encoding="utf-8")) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}, line {number}", _json(line)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is broken: {error}") from error


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # counted with the rows that hold no transcripts
