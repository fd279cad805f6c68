"""A run that was killed goes on as if it had not been; a run that is asked to stop saves first."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer import runs
from vgf_llm.trainer.vgf_trainer import last_whole_checkpoint


ROOT = Path(__file__).resolve().parents[2]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def completions(folder):
    """What was drawn, the last time it was."""
    lines = (folder / "completions-00000.jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["step"], record["place"]): record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    # The last bit of a sum depends on how many threads share it: the killed run has as many as the one compared with it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(Path(runs.__file__)), str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.mark.parametrize("case", runs.CASES)
def test_four_steps_are_what_a_killed_run_and_its_resume_make(killed, tmp_path, case):
    whole = runs.make_trainer(tmp_path, case)
    whole.train()
    resumed = runs.make_trainer(killed, case)
    # As after a second kill within a checkpoint: what is not whole does not count.
    saved = runs.CASES[case].get("save_steps", 2)
    (killed / case / "checkpoint-9").mkdir()
    shutil.copy(killed / case / f"checkpoint-{saved}" / "vgf_settings.json", killed / case / "checkpoint-9")
    assert last_whole_checkpoint(killed / case) == str(killed / case / f"checkpoint-{saved}")
    resumed.train(resume_from_checkpoint="auto")
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    assert completions(killed / case) == completions(tmp_path / case)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    if whole.rewards.value is not None:
        ours, theirs = whole.rewards.value.state(), resumed.rewards.value.state()
        assert ours["replay"] == theirs["replay"] and ours["scale"] == theirs["scale"]
        assert all(torch.equal(value, theirs["weights"][name]) for name, value in ours["weights"].items())


def test_auto_starts_anew_where_nothing_was_saved(tmp_path):
    trainer = runs.make_trainer(tmp_path, "sft", max_steps=1, save_strategy="no")
    assert last_whole_checkpoint(trainer.args.output_dir) is None
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer.train(resume_from_checkpoint="True")  # as a command line says it


def test_sigterm_saves_at_the_next_step_boundary(tmp_path):
    trainer = runs.make_trainer(tmp_path, "dpo", [runs.Kill(3, signal.SIGTERM)], save_strategy="no", max_steps=6)
    before = signal.getsignal(signal.SIGTERM)
    trainer.train()
    assert trainer.state.global_step in (3, 4)
    assert signal.getsignal(signal.SIGTERM) == before
    checkpoint = tmp_path / "dpo" / f"checkpoint-{trainer.state.global_step}"
    assert last_whole_checkpoint(tmp_path / "dpo") == str(checkpoint)
    resumed = runs.make_trainer(tmp_path, "dpo", save_strategy="no", max_steps=6)
    resumed.train(resume_from_checkpoint="auto")
    whole = runs.make_trainer(tmp_path / "whole", "dpo", save_strategy="no", max_steps=6)
    whole.train()
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    runs.make_trainer(tmp_path, "sft", max_steps=1).train()
    checkpoint = tmp_path / "sft" / "checkpoint-1"
    other = runs.make_trainer(tmp_path, "sft", num_generations=8, flow_kl_budget=1.0)
    with pytest.raises(ValueError, match=r"num_generations \(4 there, 8 here\).*flow_kl_budget|flow_kl_budget.*num_generations"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "vgf_settings.json").unlink()
    with pytest.raises(ValueError, match="was not made by VGFTrainer"):
        runs.make_trainer(tmp_path, "sft").train(resume_from_checkpoint=str(checkpoint))
