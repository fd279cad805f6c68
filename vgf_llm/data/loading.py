"""Data sets of the recipes: a file, a directory or a hub id, by one code path."""

import gzip
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from .hh import parse_rows


logger = logging.getLogger(__name__)


def load_splits(
    name: str | None, config: str | None, splits: Sequence[str], columns: Sequence[str], hh_transcripts: bool = False
) -> list[Dataset]:
    """The named splits, in this order.

    Args:
        name: a `.jsonl` or `.jsonl.gz` file, a directory that `datasets.load_dataset` can read, or a hub id. A file is its
            own first split. `HF_HUB_OFFLINE=1` reads hub ids from the local cache alone.
        config: of a hub data set with several configurations.
        splits: names of the splits.
        columns: which every split must have.
        hh_transcripts: the rows are raw HH transcripts (`vgf_llm.data.hh`) and become `prompt`, `chosen` and `rejected`;
            malformed ones are left out, and a warning says how many and why.

    Raises:
        ValueError: no name, a split or a column that is not there, an empty split, no row that could be read.
        OSError: the file, directory or hub id cannot be read.
    """
    if not name:
        raise ValueError("give --dataset_name: a JSONL file, a directory or a hub id")
    if Path(name).is_file() and not Path(name).stat().st_size:
        raise ValueError(f"{name} is empty")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the traceback of what it raises
    try:
        if Path(name).is_file():
            found = load_dataset("json", data_files={splits[0]: name})
        else:
            found = load_dataset(name, config)
    except DatasetGenerationError as error:  # which says nothing itself
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name} cannot be read as JSON lines, one object each, or as a data set: {reason}") from error
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
    return [_split(found, name, split, columns, hh_transcripts) for split in splits]


def _split(found: DatasetDict, name: str, split: str, columns: Sequence[str], hh_transcripts: bool) -> Dataset:
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(found)}")
    dataset = found[split]
    if hh_transcripts:
        pairs = parse_rows((f"row {number}", row) for number, row in enumerate(dataset, 1))
        if pairs.malformed:
            logger.warning("%s, split %s: %s", name, split, pairs.report())
        dataset = Dataset.from_list(list(map(dict, pairs.rows)))
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} of {name} has no rows")
    if missing := sorted(set(columns) - set(dataset.column_names)):
        raise ValueError(f"{name} lacks the column(s) {', '.join(missing)}; found {', '.join(dataset.column_names)}")
    return dataset
