"""`python tests/lowest.py`: the lowest versions that pyproject.toml allows, for `pip install --constraint`.

What it bounds by itself, the tools of development, has the version of constraints.txt. Needs nothing but Python: it is
run before anything is installed.
"""

import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
BOUNDED = re.compile(r"(?P<name>[\w.-]+)>=(?P<lowest>[\w.]+)(,<(?P<below>\d+))?(; .+)?")


def lowest() -> dict[str, str]:
    """Lowest version by name, of every dependency with a lower bound, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    return {found["name"].lower(): found["lowest"] for found in map(BOUNDED.fullmatch, asked) if found}


def pinned() -> dict[str, str]:
    """Version by name in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


if __name__ == "__main__":
    for name, version in {**pinned(), **lowest()}.items():
        print(f"{name}=={version}")
