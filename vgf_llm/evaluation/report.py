"""Reports: rows of results as tables for people and as strict JSON for programs.

A row is a dict: `task`, `method` (base, best_of_n, best_of_n_likelihood, vgf, vgf_auto, vgf_random, vgf_flip, vgf_shuffle,
student_best_of_n, student_vgf), `num_particles` N, `generations` per prompt, `steps` L, `reward_proxy`, `reward_gold` with its
95 % interval `reward_gold_low` and `reward_gold_high`, `kl_nats`, `nll_base` and `nll_judge` in nats, `distinct_2`,
`seconds`, `seeds`. A trained policy of the user is `student: NAME`. `wins` holds win rates: by judge ("gold", "judge") and
opponent `rate`, `low`, `high` and `ties`. Optional: `gradient` that particles follow ("learned" or the reward's "own"),
`kl_budget` in nats, `rounds`, `members`, `verified`, `reward_gold_population`, `kl_lower` in nats, `likelihood_weight` in units
of the proxy per nat, where completions are selected by both; `gold_over_best_of_n` with its 95 % interval `..._low` and
`..._high`, of a paired difference at equal generations, and likewise `gold_over_best_of_n_in_equal_time`,
`gold_over_best_of_n_at_equal_kl` and `gold_over_best_of_n_by_likelihood`. A value may be absent or None; a table shows
"-" there, and leaves out a column that no row fills.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


Row = Mapping[str, Any]

METHOD_NAMES = {
    "base": "base",
    "best_of_n": "best-of-n",
    "best_of_n_likelihood": "BoN likely",
    "vgf": "VGF",
    "vgf_auto": "VGF auto",
    "vgf_random": "VGF random",
    "vgf_flip": "VGF flipped",
    "vgf_shuffle": "VGF shuffled",
    "student_best_of_n": "student BoN",
    "student_vgf": "student VGF",
}


def _whole(key: str) -> Callable[[Row], str | None]:
    def cell(row: Row) -> str | None:
        value = row.get(key)
        if isinstance(value, (list, tuple)):
            value = len(value)
        return None if value is None else f"{round(value, 2):g}"  # the nats of an automatic budget are no round number

    return cell


def _number(key: str, digits: int) -> Callable[[Row], str | None]:
    def cell(row: Row) -> str | None:
        value = row.get(key)
        return None if value is None else f"{value:.{digits}f}"

    return cell


def _generations(row: Row) -> str | None:
    value = row.get("generations")
    return None if value is None else (f"{value:.0f}" if value >= 100 or value == round(value) else f"{value:.1f}")


def _gold(row: Row) -> str | None:
    value, low, high = (row.get(key) for key in ("reward_gold", "reward_gold_low", "reward_gold_high"))
    if value is None:
        return None
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _over(row: Row) -> str | None:
    value, low, high = (row.get(f"gold_over_best_of_n{end}") for end in ("", "_low", "_high"))
    return None if value is None else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _gain(row: Row) -> str | None:
    value, low, high = (row.get(key) for key in ("gain", "gain_low", "gain_high"))
    if value is None or low is None or high is None:
        return None
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _win(judge: str, against: str) -> Callable[[Row], str | None]:
    def cell(row: Row) -> str | None:
        found = row.get("wins", {}).get(judge, {}).get(against, {})
        if found.get("rate") is None:
            return None
        return f"{100 * found['rate']:.0f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"

    return cell


def _win_columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str | None]]]:
    """One per judge and opponent, in percent with its interval."""
    pairs = dict.fromkeys((judge, against) for row in rows for judge, found in row.get("wins", {}).items() for against in found)
    return [(f"{judge}: win % vs {against}", _win(judge, against)) for judge, against in pairs]


def _seconds(row: Row) -> str | None:
    value = row.get("seconds")
    return None if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _verified(row: Row) -> str | None:
    value = row.get("verified")
    return None if value is None else ("yes" if value else "no")


# Header and cell; two words of a header stand above each other.
_COLUMNS: list[tuple[str, Callable[[Row], str | None]]] = [
    ("method", lambda row: METHOD_NAMES.get(row["method"], str(row["method"]))),
    ("grad.", lambda row: row.get("gradient")),
    ("N", _whole("num_particles")),
    ("gen.", _generations),
    ("L", _whole("steps")),
    ("KL cap", _whole("kl_budget")),
    ("rnd", _whole("rounds")),
    ("RMs", _whole("members")),
    ("ver", _verified),
    ("proxy", _number("reward_proxy", 2)),
    ("gold [95 %]", _gold),
    ("gain over L=0", _gain),
    ("gold LC", _number("reward_gold_lc", 2)),
    ("over BoN [95 %]", _over),
    ("KL nats", _number("kl_nats", 2)),
    ("KL ≥", _number("kl_lower", 2)),
    ("NLL base", _number("nll_base", 1)),
    ("NLL judge", _number("nll_judge", 1)),
    ("dist. 1", _number("distinct_1", 2)),
    ("dist. 2", _number("distinct_2", 2)),
    ("self-BLEU", _number("self_bleu", 1)),
    ("length", _number("length", 0)),
    ("s", _seconds),
]


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each task, tasks and rows in the order they came in.

    Raises:
        ValueError: a row without task or method.
    """
    tasks: dict[str, list[Row]] = {}
    for index, row in enumerate(rows):
        for key in ("task", "method"):
            if key not in row:
                raise ValueError(f"rows[{index}] has no {key!r}")
        tasks.setdefault(row["task"], []).append(row)
    return tasks


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the columns that at least one row fills."""
    filled = [(header, [cell(row) for row in rows]) for header, cell in [*_COLUMNS, *_win_columns(rows)]]
    filled = [(header, column) for header, column in filled if any(value is not None for value in column)]
    body = [["-" if column[r] is None else str(column[r]) for _, column in filled] for r in range(len(rows))]
    return [header for header, _ in filled], body


def print_table(rows: Sequence[Row], console: Console) -> None:
    """One table per task, readable within 120 columns.

    Raises:
        ValueError: a row without task or method.
    """
    for task, of_task in by_task(rows).items():
        headers, body = _cells(of_task)
        # Text, not markup: "[95 %]" and a task called "[b]" are to be read as they are.
        table = Table(title=Text(str(task)), box=None, padding=(0, 1, 0, 0))
        for header in headers:
            right = header != "method"
            words = header if header.endswith("[95 %]") else header.replace(" ", "\n")
            table.add_column(Text(words), justify="right" if right else "left", no_wrap=True)
        for cells in body:
            table.add_row(*map(Text, cells))
        console.print(table)
        console.print()


def markdown_table(rows: Sequence[Row]) -> str:
    """The same tables in Markdown, under a heading per task where there are several tasks. Ends with a newline.

    Raises:
        ValueError: a row without task or method.
    """
    tasks = by_task(rows)
    parts = []
    for task, of_task in tasks.items():
        headers, body = _cells(of_task)
        lines = [f"### {task}", ""] if len(tasks) > 1 else []
        lines.append("| " + " | ".join(headers) + " |")
        lines.append("| " + " | ".join(":--" if header == "method" else "--:" for header in headers) + " |")
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in body]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else ""


def write_report(path: str | Path, report: dict[str, Any]) -> None:
    """Write a report as strict JSON, whole or not at all.

    Raises:
        ValueError: a number that JSON cannot hold (nan, inf); the message names its key.
        TypeError: a value JSON has no form for, or a key that is not a string, named likewise. Turn tensors and arrays
            into lists or floats before.
        OSError: the folder cannot be written to.
    """
    _check(report, "")
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode("utf-8"))


def _check(value: Any, where: str) -> None:
    """Whether JSON holds it; a key is named as "rows[3].kl_nats"."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"report key {key!r} in {where or 'the report'} is not a string")
            _check(item, f"{where}.{key}" if where else key)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold: use None for a value that is not known")
    elif value is not None and not isinstance(value, (str, bool, int)):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part. Makes missing folders.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
