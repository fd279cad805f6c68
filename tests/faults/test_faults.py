"""Short versions of what `python -m tests.faults.kill` does at length, and faults of the machine: disk, permissions, clock."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.trainer import runs
from vgf_llm.trainer.checkpoints import check_writable, last_whole_checkpoint


ROOT = Path(__file__).resolve().parents[2]


def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    command = [sys.executable, "-m", "tests.faults.kill", "--kills", "3", "--cases", "sampler", "value"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "faults.json"
    result = subprocess.run(
        [*command, "--output", output], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stderr[-5000:]
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["kills"] == 3 and report["different_or_failed"] == 0


def in_a_child(work):
    """What `work` raised in a process of its own, as text, or "nothing"."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            said = "nothing"
        except BaseException as error:  # noqa: BLE001  # told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def test_a_full_disk_is_named_and_leaves_what_can_be_resumed(tmp_path):
    settings = {"max_steps": 4, "save_steps": 1, "lr_scheduler_type": "constant"}
    runs.make_trainer(tmp_path, "sft", **settings | {"max_steps": 2}).train()
    whole = last_whole_checkpoint(tmp_path / "sft")

    def train():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk
        trainer = runs.make_trainer(tmp_path, "sft", **settings)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        trainer.train(resume_from_checkpoint="auto")

    started = time.monotonic()
    said = in_a_child(train)
    assert said.startswith("OSError: checkpoint ") and "checkpoint-3 could not be written" in said, said
    assert whole in said and "Make room" in said and time.monotonic() - started < 60
    assert last_whole_checkpoint(tmp_path / "sft") == whole
    resumed = runs.make_trainer(tmp_path, "sft", **settings)
    resumed.train(resume_from_checkpoint="auto")
    undisturbed = runs.make_trainer(tmp_path / "whole", "sft", **settings)
    undisturbed.train()
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in undisturbed.model.state_dict().items())


@pytest.fixture
def open_folder():
    """One that other users may look at, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(tmp_path, open_folder):
    folder = open_folder / "read-only"
    folder.mkdir(mode=0o555)

    def construct(output):
        def work():
            if os.getuid() == 0:  # who may write anywhere
                os.setuid(65534)
            check_writable(output)

        return work

    for output in (folder, folder / "run" / "one"):
        said = in_a_child(construct(output))
        assert said.startswith(f"PermissionError: output_dir {output} cannot be written: {folder} is read-only"), said
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"output_dir .*file/run cannot be made: .*file is a file"):
        runs.make_trainer(tmp_path / "file", "sft", output_dir=str(tmp_path / "file" / "run"))


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    plain = runs.make_trainer(tmp_path / "plain", "value", save_steps=1)
    plain.train()
    real, calls = time.time, []

    def jumping():
        calls.append(real())
        return calls[-1] + (-86400, 0, 86400 * 365)[len(calls) % 3]

    monkeypatch.setattr(time, "time", jumping)
    jumped = runs.make_trainer(tmp_path / "jumped", "value", save_steps=1, save_total_limit=1)
    jumped.train()
    monkeypatch.undo()
    assert calls and jumped.state.global_step == 4
    assert all(torch.equal(value, jumped.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    assert last_whole_checkpoint(tmp_path / "jumped" / "value") == str(tmp_path / "jumped" / "value" / "checkpoint-4")
