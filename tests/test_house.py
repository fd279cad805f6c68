"""The rooms of the package and the arrows between them (docs/architecture.md), as written in pyproject.toml."""

import subprocess
import sys
from pathlib import Path


def test_arrows_point_down_only():
    # A process of its own: import-linter changes the import path and keeps global state.
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout
