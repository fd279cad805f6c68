"""Wheel and source archive hold what an installed package needs, and nothing is missing where they are installed."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest

from tests import lowest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, source archive) of a copy of the files that git knows."""
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    code = "import setuptools.build_meta as b; print(b.build_wheel('dist')); print(b.build_sdist('dist'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, source


def test_the_wheel_holds_the_package_alone(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {"vgf_llm/py.typed", "vgf_llm/evaluation/page.html.jinja", "vgf_llm/recipes/vgf.py", "vgf_llm/cli.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"vgf_llm", next(n for n in names if ".dist-info/" in n).split("/")[0]}


def test_the_source_archive_can_be_built_from(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "vgf_llm/cli.py", "vgf_llm/py.typed"} <= names


def test_the_wheel_is_enough(built, tmp_path):
    """Unpacked beside the libraries, away from the checkout."""
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    code = (
        "import vgf_llm, vgf_llm.cli, importlib.util; assert importlib.util.find_spec('vgf_llm.recipes.vgf'); "
        "print(vgf_llm.__file__); vgf_llm.cli.main(['--version'])"
    )
    environment = {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[0] == str(tmp_path / "vgf_llm" / "__init__.py") and "vgf_llm " in result.stdout


def test_every_dependency_has_bounds_and_a_tested_version_within():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [name for extra in ("control", "serve", "quantization", "judge") for name in extras[extra]]
    numbers, pinned = {}, lowest.pinned()
    for line in asked:
        found = lowest.BOUNDED.fullmatch(line)
        assert found and found["below"], line
        tested = pinned[found["name"].lower()]
        low, high = ([int(part) for part in version.split(".")] for version in (found["lowest"], tested))
        assert low <= high and high[0] < int(found["below"]), line
        numbers[found["name"].lower()] = found["lowest"]
    assert lowest.lowest() == numbers


def dependencies(name, found):
    """Metadata by name of everything installed that `name`, with any extra, asks for, and of what that asks for."""
    for line in requires(name) or []:
        needed = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        if needed in found:
            continue
        try:
            found[needed] = metadata(needed)
        except PackageNotFoundError:  # of another system, or of an extra that is not installed
            continue
        dependencies(needed, found)
    return found


def licence(about):
    names = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    return about.get("License-Expression") or "; ".join(names) or about.get("License") or ""


def test_no_dependency_is_under_a_licence_that_would_bind_what_imports_it():
    licences = {name: licence(about) for name, about in dependencies("vgf_llm", {}).items()}
    assert len(licences) > 40
    # A torch for GPUs brings NVIDIA's libraries, some of which name no licence: their terms are NVIDIA's own.
    assert [name for name, text in licences.items() if not text and not name.startswith(("cuda-", "nvidia-"))] == []
    # LGPL and MPL would pass: they bind changes of the library alone.
    bound = re.compile(r"\bA?GPL|GNU (Affero )?General Public|SSPL|Server Side Public|Business Source|CC-BY-NC")
    assert {name: text for name, text in licences.items() if bound.search(text)} == {}
