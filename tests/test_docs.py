"""Examples of README.md, docs/sampler.md and docs/evaluation.md run on tiny models; links between pages lead somewhere; the site
builds without a warning.

docs/flow.md and docs/trainer.md are run where their rooms are tested.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
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
    for name in ("my-reward-model", "my-reward-model-0", "my-reward-model-1", "my-gold-model"):
        shutil.copytree(saved["reward"], tmp_path / name)
    (tmp_path / "prompts.txt").write_text("the food was\nthe staff were\n", encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"prompt": "the food was", "chosen": " good"}\n', encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the food was"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "count"), [(ROOT / "README.md", 2), (ROOT / "docs" / "sampler.md", 3)], ids=["README.md", "sampler.md"]
)
def test_examples_run(page, count, folder, capsys):
    examples = blocks(page, "python")
    assert len(examples) == count
    for example in examples:
        exec(compile(example, str(page), "exec"), {})  # noqa: S102
    for command in blocks(page, "sh"):
        name, *arguments = command.replace("\\\n", " ").split()
        assert name == "vgf"
        assert cli.main([*arguments, "--max-completion-length", "8"]) == 0
    assert (folder / "completions.jsonl").exists()


def test_the_evaluation_runs_as_printed(folder):
    (command,) = blocks(ROOT / "docs" / "evaluation.md", "sh")
    name, *arguments = command.replace("\\\n", " ").split()
    assert name == "vgf"
    small = ["--pool_size", "4", "--num_particles", "2", "--max_completion_length", "6", "--flow_kl_budgets", "2"]
    assert cli.main([*arguments, *small]) == 0
    assert (folder / "outputs" / "evaluation" / "report.html").exists()


def test_the_page_of_all_fields_is_current():
    spec = importlib.util.spec_from_file_location("config_page", ROOT / "docs" / "config_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == module.page(), "run: python docs/config_page.py"


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # which is about the theme's next version
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk|www.mkdocs)', page)  # but for the makers of the theme


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[1:] if f": {page.name}" not in navigation]


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
