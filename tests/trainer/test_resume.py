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
from vgf_llm.trainer.checkpoints import MANIFEST_FILE, check_whole, delete_old_checkpoints, last_whole_checkpoint, write_manifest


ROOT = Path(__file__).resolve().parents[2]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def completions(folder):
    """What was drawn, as it was written: a resume takes back the lines that it writes again."""
    return (folder / "completions-00000.jsonl").read_text(encoding="utf-8")


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


def numbers(trainer):
    """All that was logged, less what the clock says."""
    clock = ("runtime", "second", "step_time", "train_loss")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: value for name, value in entry.items() if not any(word in name for word in clock)} for entry in logs]


@pytest.mark.parametrize("save", [3, 5])
def test_a_checkpoint_between_two_logs_changes_no_metric(tmp_path, save):
    changes = {"max_steps": 6, "logging_steps": 4, "save_steps": save}
    whole = runs.make_trainer(tmp_path, "weighted", **changes)
    whole.train()
    logged = numbers(whole)
    resumed = runs.make_trainer(tmp_path, "weighted", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "weighted" / f"checkpoint-{save}"))
    assert len(logged) == 1 and numbers(resumed) == logged


def spoil(folder, how):
    if how == "cut off":
        file = folder / "rng_state.pth"
        os.truncate(file, file.stat().st_size // 2)
    elif how == "missing":
        (folder / "optimizer.pt").unlink()
    elif how == "no end":
        (folder / MANIFEST_FILE).unlink()
    elif how == "broken manifest":
        (folder / MANIFEST_FILE).write_text("{", encoding="utf-8")


SPOILED = {
    "cut off": r"rng_state.pth has \d+ bytes instead of \d+",
    "missing": "optimizer.pt is missing",
    "no end": "was not written to its end",
    "broken manifest": "is broken",
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_not_whole_is_never_loaded(tmp_path, how):
    runs.make_trainer(tmp_path, "sft", max_steps=2, save_steps=1).train()
    first, second = tmp_path / "sft" / "checkpoint-1", tmp_path / "sft" / "checkpoint-2"
    check_whole(second)
    (second / "README.md").write_text("a card may be edited", encoding="utf-8")
    assert last_whole_checkpoint(tmp_path / "sft") == str(second)
    spoil(second, how)
    assert last_whole_checkpoint(tmp_path / "sft") == str(first)
    with pytest.raises(ValueError, match=rf"checkpoint-2.*{SPOILED[how]}.*'auto'"):
        runs.make_trainer(tmp_path, "sft").train(resume_from_checkpoint=str(second))
    trainer = runs.make_trainer(tmp_path, "sft", max_steps=2, save_steps=1)
    trainer.train(resume_from_checkpoint="True")
    assert trainer.state.global_step == 2 and last_whole_checkpoint(tmp_path / "sft") == str(second)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint .*checkpoint-7"):
        runs.make_trainer(tmp_path, "sft").train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_old_checkpoints_go_by_step_whatever_the_clock_says(tmp_path):
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 2}
    runs.make_trainer(tmp_path, "sft", **settings | {"max_steps": 2}).train()
    folder = tmp_path / "sft"
    for name in ("checkpoint-1", "checkpoint-2"):  # written by a clock that was a year ahead
        os.utime(folder / name, (2**31, 2**31))
    (folder / "checkpoint-9" / "of another trainer").mkdir(parents=True)
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "vgf_state_0.pt").touch()  # killed while it was written
    trainer = runs.make_trainer(tmp_path, "sft", **settings)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.args.save_total_limit == 2
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-9"]


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "vgf_settings.json").write_text("{}", encoding="utf-8")
        write_manifest(tmp_path / f"checkpoint-{step}")
    left = []
    for keep in (3, 1):
        delete_old_checkpoints(tmp_path, keep, str(tmp_path / "checkpoint-1"))
        left.append(sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")))
    assert left == [["1", "3", "4"], ["1", "4"]]


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "completions-00000.jsonl").write_text('{"step": 0}\n{"step": 0, "pla', encoding="utf-8")
    runs.make_trainer(tmp_path, "sft", max_steps=1, save_strategy="no").train(resume_from_checkpoint="auto")
    records = [json.loads(line) for line in completions(folder).splitlines()]
    assert records[0] == {"step": 0} and all("place" in record for record in records[1:]) and len(records) > 1


def test_a_run_that_was_killed_after_its_last_checkpoint_is_at_its_end(tmp_path):
    settings = {"max_steps": 3, "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = runs.make_trainer(tmp_path, "sft", **settings)
    whole.train()
    drawn = completions(tmp_path / "sft")
    again = runs.make_trainer(tmp_path, "sft", **settings)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 3 and completions(tmp_path / "sft") == drawn
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in whole.model.state_dict().items())
