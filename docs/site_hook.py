"""Hook of mkdocs: links that leave docs/ for a file of the repository lead to a copy of it in the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
OUTWARD = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    targets = {
        target
        for page in ROOT.joinpath("docs").glob("*.md")
        for target in OUTWARD.findall(page.read_text(encoding="utf-8"))
        if (ROOT / target).is_file()
    }
    for target in sorted(targets):
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, **unused: Any) -> str:
    return OUTWARD.sub(r"](\1", markdown)
