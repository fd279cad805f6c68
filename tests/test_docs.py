"""Examples of README.md and docs/sampler.md run on tiny models; links between pages lead somewhere.

docs/flow.md and docs/trainer.md are run where their rooms are tested.
"""

import re
import shutil
from pathlib import Path

import pytest

from vgf_llm import cli


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A working directory with the models that the examples name."""
    shutil.copytree(saved["lm"], tmp_path / "my-sft-model")
    for name in ("my-reward-model", "my-reward-model-0", "my-reward-model-1"):
        shutil.copytree(saved["reward"], tmp_path / name)
    (tmp_path / "prompts.txt").write_text("the food was\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the food was"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "sampler.md"], ids=lambda page: page.name)
def test_examples_run(page, folder, capsys):
    examples = blocks(page, "python")
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, str(page), "exec"), {})  # noqa: S102
    for command in blocks(page, "sh"):
        name, *arguments = command.replace("\\\n", " ").split()
        assert name == "vgf"
        assert cli.main([*arguments, "--max-completion-length", "8"]) == 0
    assert (folder / "completions.jsonl").exists()


def anchors(page):
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index]
    assert not missing


def test_every_column_of_a_report_is_explained():
    from vgf_llm.evaluation import report

    explained = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = set(re.findall(r'(?:_whole|_number)\("(\w+)"', Path(report.__file__).read_text(encoding="utf-8")))
    assert names
    assert not [name for name in names if f"`{name}`" not in explained]
