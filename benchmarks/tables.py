"""Tables in README and docs, rendered from the committed results.

    python -m benchmarks.tables            write them
    python -m benchmarks.tables --check    exit with 1 where one is out of date (a test does the same)

A table stands between `<!-- results: FILE TASK ROWS... -->` and `<!-- /results -->`, FILE being the name of a report in
benchmarks/results, and TASK `-` where it has one task only. ROWS are methods, shown in the order of the report: `vgf` stands
for its verified rows with all reward models, `vgf:unverified`, `vgf:one` and `vgf:own` for those without verification, with one
reward model and along the reward's own gradient; sizes may be picked, `best_of_n:8,16`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(<!-- results: (?P<file>\S+) (?P<task>\S+) (?P<methods>[^>]+?) -->\n).*?(?P<end><!-- /results -->)", re.DOTALL
)
NAMES = {
    "vgf_auto": "VGF, automatic budget",
    "vgf_random": "random direction",
    "vgf_flip": "flipped gradient",
    "vgf_shuffle": "shuffled positions",
    "student_best_of_n": "student of best-of-16",
    "student_vgf": "student of VGF",
}


# Columns of some reports only: key, header, digits.
MORE = (
    ("correlation", "correlation of the field", 2),
    ("gold_over_reference", "above the reference", 2),
    ("gold_over_best_of_n_by_likelihood", "above best-of-n where likelihood counts", 2),
    ("over_at_equal_proxy", "above best-of-n at equal proxy, std of gold", 2),
    ("gold_of_all_over_uncoupled", "gold of all particles above uncoupled", 2),
    ("self_bleu_of_all", "self-BLEU", 0),
    ("distinct_2_of_all", "distinct-2", 2),
    ("cpu_seconds", "CPU s", 0),
)


def name(row: Mapping[str, Any], several: int) -> str:
    """What a reader calls the row; `several` is the usual number of reward models."""
    method = row["method"]
    if method in ("best_of_n", "best_of_n_likelihood"):
        said = f"best-of-{row['num_particles']}" + (", likelihood counts" if method.endswith("likelihood") else "")
    elif method == "vgf":
        said = "VGF"
    else:
        said = NAMES.get(method, method)
    if "kl_budget" in row and method != "vgf_auto":
        said += f", {row['kl_budget']:g} nat{'' if row['kl_budget'] == 1 else 's'}"
    if row.get("gradient") == "own":
        said += ", own gradient"
    if row.get("verified") is False:
        said += ", unverified"
    return said if row.get("members", several) == several else f"{said}, {row['members']} reward model"


def matches(row: Mapping[str, Any], wanted: str, several: int) -> bool:
    """Whether `wanted`, as in a page, means this row."""
    method, _, options = wanted.partition(":")
    picked = set(filter(None, options.split(",")))
    sizes = {option for option in picked if option.isdigit()}
    return (
        row["method"].partition(":")[0] == method
        and (not sizes or str(row["num_particles"]) in sizes)
        and (row.get("verified") is False) == ("unverified" in picked)
        and (row.get("members", several) < several) == ("one" in picked)
        and (row.get("gradient") == "own") == ("own" in picked)
    )


def table(report: Mapping[str, Any], task: str, methods: list[str]) -> str:
    """Markdown.

    Raises:
        ValueError: the report has no row of one of the methods.
    """
    of_task = [r for r in report["rows"] if task in (r["task"], "-")]
    several = max((r.get("members", 1) for r in of_task), default=1)
    if missing := [m for m in methods if not any(matches(r, m, several) for r in of_task)]:
        raise ValueError(f"no row of {', '.join(missing)} for {task}")
    rows = [r for r in of_task if any(matches(r, m, several) for m in methods)]
    key, header = ("gold_over_best_of_n", "above best-of-n at equal generations")
    if not any(key in r for r in of_task):
        key, header = ("gain", "above L = 0")
    more = [column for column in MORE if any(column[0] in r for r in rows)]
    headers = ["method", "generations", "gold [95 %]", header, "proxy", "KL account", "NLL base", *(said for _, said, _ in more)]
    lines = ["| " + " | ".join(headers) + " |", "|:--|" + "--:|" * (len(headers) - 1)]
    for r in rows:
        cells = [
            name(r, several),
            f"{r['generations']:.1f}",
            f"{r['reward_gold']:.2f} [{r['reward_gold_low']:.2f}, {r['reward_gold_high']:.2f}]",
            difference(r, key, 2),
            f"{r['reward_proxy']:.2f}",
            "-" if r["kl_nats"] is None else f"{r['kl_nats']:.2f}",
            f"{r['nll_base']:.1f}",
            *(difference(r, extra, digits) for extra, _, digits in more),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def difference(row: Mapping[str, Any], key: str, digits: int) -> str:
    """A value; with its sign and its interval if it has one."""
    value, low, high = (row.get(f"{key}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if low is None or high is None else f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def rendered(page: str) -> str:
    """The page with every table as the results are now."""

    def block(match: re.Match[str]) -> str:
        report = json.loads((ROOT / "benchmarks" / "results" / match["file"]).read_text(encoding="utf-8"))
        return f"{match[1]}\n{table(report, match['task'], match['methods'].split())}\n{match['end']}"

    return BLOCK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a table is out of date")
    check = parser.parse_args().check
    old = [page for page in PAGES if rendered(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in old:
        print(f"{page.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(1 if check and old else 0)


if __name__ == "__main__":
    main()
