"""Tables in README and docs, rendered from the committed results.

    python -m benchmarks.tables            write them
    python -m benchmarks.tables --check    exit with 1 where one is out of date (a test does the same)

A table stands between `<!-- results: FILE TASK METHOD... -->` and `<!-- /results -->`, FILE being the name of a report in
benchmarks/results. Of all its rows it shows those of the task and of the methods named, in the order of the report.
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
    "vgf_random": "random direction",
    "vgf_flip": "flipped gradient",
    "vgf_shuffle": "shuffled positions",
    "student_best_of_n": "student of best-of-16",
    "student_vgf": "student of VGF",
}


def name(row: Mapping[str, Any], several: int) -> str:
    """What a reader calls the row; `several` is the usual number of reward models."""
    method = row["method"]
    if method == "best_of_n":
        said = f"best-of-{row['num_particles']}"
    elif method == "vgf":
        said = "VGF"
    else:
        said = NAMES.get(method, method)
    if "kl_budget" in row:
        said += f", {row['kl_budget']:g} nat{'' if row['kl_budget'] == 1 else 's'}"
    if row.get("verified") is False:
        said += ", unverified"
    return said if row.get("members", several) == several else f"{said}, {row['members']} reward model"


def table(report: Mapping[str, Any], task: str, methods: list[str]) -> str:
    """Markdown. `best_of_n` may carry the sizes shown, `best_of_n:8,16`.

    Raises:
        ValueError: the report has no such row.
    """
    sizes = {m.split(":")[0]: set(map(int, m.split(":")[1].split(","))) for m in methods if ":" in m}
    shown = {m.split(":")[0] for m in methods}
    rows = [r for r in report["rows"] if r["task"] == task and r["method"] in shown]
    rows = [r for r in rows if r["method"] not in sizes or r["num_particles"] in sizes[r["method"]]]
    if missing := shown - {r["method"] for r in rows}:
        raise ValueError(f"no row of {', '.join(sorted(missing))} for {task}")
    several = max(r.get("members", 1) for r in rows)
    lines = [
        "| method | generations | gold [95 %] | above best-of-n at equal generations | proxy | KL account | NLL base |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        over = "-"
        if "gold_over_best_of_n" in r:
            over = "{gold_over_best_of_n:+.2f} [{gold_over_best_of_n_low:+.2f}, {gold_over_best_of_n_high:+.2f}]".format(**r)
        lines.append(
            f"| {name(r, several)} | {r['generations']:.1f} | {r['reward_gold']:.2f} [{r['reward_gold_low']:.2f}, "
            f"{r['reward_gold_high']:.2f}] | {over} | {r['reward_proxy']:.2f} | {r['kl_nats']:.2f} | {r['nll_base']:.1f} |"
        )
    return "\n".join(lines) + "\n"


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
