"""The page of an evaluation: one HTML file that asks nothing of the network, every text in it escaped."""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .report import METHOD_NAMES, write_atomically


CAPTIONS = {
    "frontier": "Gold reward at a price in KL. Higher at the same KL is better; the curve is best-of-n from the same pool.",
    "generations": "Gold reward at a price in completions decoded. This is what a user pays.",
    "wins": "Share of prompts on which a row beats the given answer. An interval that crosses 50 decides nothing.",
    "overoptimisation": "What was optimised against what was wanted. A curve that bends down has been optimised too far.",
    "budget": "Both rewards as one decode may spend more. Where gold turns down while the proxy rises, the budget is too large.",
}


def changes(before: str, after: str) -> list[tuple[str, str]]:
    """Pieces of both texts in order, as ("same" | "new" | "gone", text), word by word; no text is lost."""
    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (before, after))
    pieces: list[tuple[str, str]] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(new[j1:j2])))
            continue
        pieces += [(name, "".join(part)) for name, part in (("gone", old[i1:i2]), ("new", new[j1:j2])) if part]
    return pieces


def sparkline(values: Sequence[float], width: int = 120, height: int = 28) -> str:
    """Points of an SVG polyline through the values, left to right, with a margin of 3."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = (width - 6) / max(1, len(values) - 1)
    return " ".join(f"{3 + i * step:.1f},{height - 3 - (v - low) / span * (height - 6):.1f}" for i, v in enumerate(values))


def render_page(report: dict[str, Any], figures: Sequence[tuple[str, bytes]]) -> str:
    """The page as text. `figures`: (name, PNG)."""
    environment = Environment(
        loader=PackageLoader("vgf_llm.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(changes=changes, sparkline=sparkline)
    images = [{"name": name, "caption": CAPTIONS.get(name, ""), "data": base64.b64encode(png).decode()} for name, png in figures]
    return environment.get_template("page.html.jinja").render(
        report=report, images=images, method_names=METHOD_NAMES, summary=_summary(report)
    )


def write_page(path: str | Path, report: dict[str, Any], figures: Sequence[Path]) -> None:
    """Write the page whole or not at all, with the figures inside.

    Raises:
        OSError: a figure cannot be read or the page not written.
    """
    images = [(figure.stem, figure.read_bytes()) for figure in figures]
    write_atomically(path, render_page(report, images).encode("utf-8"))


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """What the rows say in one sentence each: chosen by proxy, as a user without gold would have to."""
    rows = report["rows"]
    best_of_n = max((row for row in rows if row["method"] in ("base", "best_of_n")), key=lambda row: row["num_particles"])
    (zero,) = (row for row in rows if row["method"] == "vgf" and row["kl_budget"] == 0)
    moved = [row for row in rows if row["method"] == "vgf" and row["kl_budget"] > 0]
    vgf = max(moved, key=lambda row: row["reward_proxy"], default=None)
    (base,) = (row for row in rows if row["method"] == "base")
    verdict = ""
    if vgf is not None:
        verdict = "better than" if vgf["gain_low"] > 0 else "worse than" if vgf["gain_high"] < 0 else "not told apart from"
    return {"base": base, "zero": zero, "vgf": vgf, "best_of_n": best_of_n, "verdict": verdict}
