"""Tables and reports: what is shown, what is refused, and that a file is whole or absent."""

import io
import json
import math
import os

import pytest
import torch
from rich.console import Console

from vgf_llm.evaluation import report


def row(method="vgf", task="e2e", **extra):
    return {
        "task": task,
        "method": method,
        "num_particles": 16,
        "generations": 36.8,
        "steps": 5,
        "reward_proxy": 1.2345,
        "reward_gold": 0.6249,
        "reward_gold_low": 0.58,
        "reward_gold_high": 0.6601,
        "kl_nats": 4.125,
        "nll_base": 31.44,
        "nll_judge": 35.1,
        "distinct_2": 0.3333,
        "seconds": 12345.6,
        "seeds": 3,
    } | extra


FULL = {
    "kl_budget": 0.5,
    "rounds": 2,
    "members": 4,
    "verified": True,
    "reward_gold_population": -0.41,
    "kl_lower": 2.5,
    "gold_over_best_of_n": 0.21,
    "gold_over_best_of_n_low": -0.1,
    "gold_over_best_of_n_high": 0.52,
}
ALL_METHODS = tuple(report.METHOD_NAMES)


def shown(rows, width=120):
    console = Console(width=width, file=io.StringIO())
    report.print_table(rows, console)
    return console.file.getvalue()


def test_the_table_rounds_and_shows_the_interval():
    text = shown([row()])
    assert "0.62 [0.58, 0.66]" in text
    assert all(value in text for value in ("VGF", "16", "36.8", "1.23", "4.12", "31.4", "35.1", "0.33", "12346"))
    assert "budget" not in text and "[95 %]" in text


def test_everything_fits_into_120_columns():
    text = shown([row(m, reward_gold=-0.62, reward_gold_low=-0.66, reward_gold_high=-0.58, **FULL) for m in ALL_METHODS])
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 120
    assert all(name in text for name in report.METHOD_NAMES.values())
    assert "-0.62 [-0.66, -0.58]" in text and "yes" in text and "+0.21 [-0.10, +0.52]" in text


def test_one_table_per_task_and_a_dash_for_what_is_not_known():
    text = shown([row(), row(task="[b]reviews"), row("base", reward_gold=None)])
    assert text.index("e2e") < text.index("[b]reviews")
    base = next(line for line in text.splitlines() if line.startswith("base"))
    assert " - " in base and base.split()[-1] == "12346"
    with pytest.raises(ValueError, match=r"rows\[1\] has no 'task'"):
        shown([row(), {"method": "vgf"}])
    assert shown([]) == ""


def test_a_gold_without_interval_stands_alone():
    assert "[" not in report.markdown_table([row(reward_gold_low=None)]).splitlines()[2]


def test_markdown_has_as_many_cells_in_every_line():
    one = report.markdown_table([row(), row("best_of_n", kl_lower=1.0)])
    lines = one.splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| VGF | 16 |") and "0.62 [0.58, 0.66]" in lines[2]
    assert "| KL ≥ |" in lines[0] and "| - |" in lines[2]
    two = report.markdown_table([row(), row(task="reviews")])
    assert two.startswith("### e2e\n\n|") and "\n\n### reviews\n\n|" in two
    assert report.markdown_table([]) == ""


def test_a_report_comes_back_as_it_was(tmp_path):
    content = {"rows": [row(verified=True)], "über": None, "n": [1, 2.5]}
    path = tmp_path / "new" / "report.json"
    report.write_report(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    report.write_report(str(path), {"n": 2})
    assert json.loads(path.read_text()) == {"n": 2}
    assert os.listdir(path.parent) == ["report.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(ValueError, match=r"rows\[1\]\.kl_nats is"):
        report.write_report(tmp_path / "report.json", {"rows": [row(), row(kl_nats=value)]})
    with pytest.raises(TypeError, match=r"a\.b is a Tensor"):
        report.write_report(tmp_path / "report.json", {"a": {"b": torch.ones(2)}})
    with pytest.raises(TypeError, match="not a string"):
        report.write_report(tmp_path / "report.json", {"a": {1: 2}})
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    report.write_report(path, {"n": 1})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert os.listdir(tmp_path) == ["report.json"]
