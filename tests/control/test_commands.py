"""`vgf control`, and the examples of docs/control.md."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from vgf_llm import cli


ROOT = Path(__file__).resolve().parents[2]
TINY = """
env: pendulum
reward_scale: 0.1
seeds: [0]
updates: 6
eval_every: 3
eval_episodes: 2
eval_steps: [0, 1]
log_every: 3
save_every: 3
agent:
  hidden: [8]
  batch_size: 4
  num_particles: 2
  flow_matching_steps: 2
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_train_evaluate_and_continue(config, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["control", "train", "--config", str(config), "--output-dir", str(run)]
    assert cli.main(train) == 0
    assert "6 updates, mean score of 1 seeds: L=0" in capsys.readouterr().out
    assert {"learning.png", "budget.png", "scores.csv", "checkpoint"} <= {path.name for path in run.iterdir()}
    assert cli.main(["control", "eval", str(run), "--steps", "0", "2", "--episodes", "2"]) == 0
    assert "seed 0  L 2  score" in capsys.readouterr().out
    assert len((run / "evaluation.csv").read_text().splitlines()) == 3
    assert cli.main([*train, "--resume"]) == 0
    capsys.readouterr()
    assert cli.main(train) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main([*train, "--resume", "--seeds", "0", "1"]) == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--config", "/no/such.yaml"], "/no/such.yaml: No such file"),
        (["eval", "/no/such/run"], "agent.json is missing"),
        (["generate", "--env", "antmaze-large-navigate"], "trained experts"),
        (["generate", "--env", "cube-single-play", "--output", "a.txt"], "must end in .npz"),
        (["train"], "--config"),
        ([], "COMMAND"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments, says, capsys):
    try:
        code = cli.main(["control", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom vgf_llm.cli import main\ntry:\n    main(['control', 'train', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'gymnasium', 'ogbench'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_processes_of_environments_load_no_torch():
    code = "import sys\nimport vgf_llm.control.environments, vgf_llm.control.generate\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_agents_need_no_extra_package():
    code = (
        "import sys\nfor name in ('gymnasium', 'ogbench', 'mujoco', 'minari', 'h5py'): sys.modules[name] = None\n"
        "from vgf_llm.control import *\nimport vgf_llm.control.generate, vgf_llm.control.commands\n"
        "assert not {'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_example_of_the_page_runs():
    page = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(compile(example, "docs/control.md", "exec"), names)  # noqa: S102
    assert names["actions"].shape == (2, 5, 1)


def test_the_recipe_runs(config, tmp_path, capsys):
    runpy.run_path(str(ROOT / "recipes" / "control.py"))["main"](str(config), str(tmp_path / "run"))
    assert "displacement" in capsys.readouterr().out
    assert (tmp_path / "run" / "particles.png").stat().st_size > 5000
