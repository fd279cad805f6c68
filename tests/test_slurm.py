"""slurm/train.sbatch run with stand-ins for SLURM's programs: what is launched on every node, and what a signal does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "slurm" / "train.sbatch"
PYTHON = f"#!{sys.executable}\n"

# Runs the command once per node, as SLURM does, and hands a SIGTERM on.
SRUN = """
import os, signal, subprocess, sys
assert sys.argv[1:3] == ["--ntasks-per-node=1", "--kill-on-bad-exit=1"], sys.argv
count = int(os.environ["SLURM_NNODES"])
nodes = [subprocess.Popen(sys.argv[3:], env={**os.environ, "SLURM_NODEID": str(node)}) for node in range(count)]
signal.signal(signal.SIGTERM, lambda *args: [node.terminate() for node in nodes])
sys.exit(max(node.wait() for node in nodes))
"""
SCONTROL = """
import os, sys
with open(os.environ["SEEN"] + "/scontrol", "a") as file:
    print(*sys.argv[1:], file=file)
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*(f"node-{i}" for i in range(int(os.environ["SLURM_NNODES"]))), sep="\\n")
"""
# Says what it was given, and what real accelerate makes of it.
ACCELERATE = """
import json, os, signal, sys, time
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
args = launch_command_parser().parse_args(sys.argv[2:])
args, defaults, mp_from_config = _validate_launch_command(args)
environment = prepare_multi_gpu_env(args)
names = ("nproc_per_node", "nnodes", "node_rank", "rdzv_endpoint", "rdzv_backend", "training_script", "training_script_args")
seen = {name: str(getattr(args, name)) for name in names if hasattr(args, name)}
seen |= {"argv": sys.argv[1:], "omp": os.environ["OMP_NUM_THREADS"], "grace": os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]}
target = f"{os.environ['SEEN']}/node-{os.environ['SLURM_NODEID']}.json"
def saved(*unused):
    open(target + ".saved", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, saved)
with open(target + ".tmp", "w") as file:
    json.dump(seen, file)
os.rename(target + ".tmp", target)
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(3 if "--fail" in sys.argv else 0)
"""


@pytest.fixture
def cluster(tmp_path):
    """Starts the script on a number of nodes; its process, and the folder of what was seen."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE)):
        (programs / name).write_text(PYTHON + text, encoding="utf-8")
        (programs / name).chmod(0o755)
    seen = tmp_path / "seen"
    seen.mkdir()

    def start(nodes, *words, **environment):
        env = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(seen), "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": f"node-[0-{nodes - 1}]", "SLURM_NNODES": str(nodes), "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64", **environment,
        }  # fmt: skip
        env = {name: value for name, value in env.items() if value is not None}
        command = ["bash", str(SCRIPT), *words]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), seen

    return start


TRAINING = ["recipes/vgf.py", "--config", "a file.yaml", "--resume_from_checkpoint", "auto"]


@pytest.mark.parametrize(("nodes", "config"), [(1, "multi_gpu"), (4, "zero3")])
def test_every_node_launches_its_share(cluster, nodes, config):
    process, seen = cluster(nodes, config, *TRAINING)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found = [json.loads((seen / f"node-{node}.json").read_text(encoding="utf-8")) for node in range(nodes)]
    for node, launched in enumerate(found):
        assert launched["argv"] == [
            "launch", "--config_file", f"accelerate_configs/{config}.yaml", "--num_machines", str(nodes),
            "--num_processes", str(8 * nodes), "--main_process_ip", "node-0", "--main_process_port", "23456",
            "--machine_rank", str(node), *TRAINING,
        ]  # fmt: skip
        assert launched["nproc_per_node"] == "8"
        assert launched["training_script"] == "recipes/vgf.py"
        assert launched["training_script_args"] == str(TRAINING[1:])
        assert (launched["omp"], launched["grace"]) == ("8", "540")
        if nodes > 1:
            assert (launched["nnodes"], launched["node_rank"]) == (str(nodes), str(node))
            assert (launched["rdzv_endpoint"], launched["rdzv_backend"]) == ("node-0:23456", "static")
    assert "requeue" not in (seen / "scontrol").read_text(encoding="utf-8")


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_has_to_go_saves_and_comes_back(cluster, signum):
    process, seen = cluster(2, "zero3", *TRAINING, "--wait")
    files = [seen / f"node-{node}.json" for node in range(2)]
    deadline = time.monotonic() + 100
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signum)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "back into the queue" in out
    assert all(Path(f"{file}.saved").exists() for file in files)
    assert (seen / "scontrol").read_text(encoding="utf-8").splitlines()[-1] == "requeue 123456"


def test_a_failed_training_fails_the_job_and_is_not_requeued(cluster):
    process, seen = cluster(1, "multi_gpu", *TRAINING, "--fail")
    process.communicate(timeout=100)
    assert process.returncode == 3
    assert "requeue" not in (seen / "scontrol").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        ([], {}, "usage: sbatch"),
        (["zero9", "recipes/vgf.py"], {}, "no file accelerate_configs/zero9.yaml"),
        (["zero3", "recipes/none.py"], {}, "no file recipes/none.py"),
        (["zero3", "recipes/vgf.py"], {"SLURM_GPUS_ON_NODE": None}, "no GPU in this job"),
    ],
)
def test_what_cannot_be_launched(cluster, words, environment, says):
    process, seen = cluster(1, *words, **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert says in err
    assert not list(seen.glob("node-*"))


def test_shell_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, str(SCRIPT), str(ROOT / ".ci" / "run")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
