"""The recipes run end to end on tiny models, each in a process of its own, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_sample_shows_particles_and_both_selections(saved):
    out = run(
        "recipes/sample.py", saved["lm"], saved["reward"], "--prompt", "the food was", "--num-particles", 3,
        "--max-completion-length", 8,
    )  # fmt: skip
    assert "best of 3: " in out
    assert "transported: " in out
    assert "completions decoded: " in out


def test_vgf_trains_and_saves(saved, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ["the food was", "a room", "staff", "nice but"]),
        encoding="utf-8",
    )
    run(
        "recipes/vgf.py", "--config", "recipes/configs/reviews/tiny_vgf.yaml",
        "--model_name_or_path", saved["lm"], "--reward_model_name_or_path", saved["reward"], saved["reward"],
        "--dataset_name", tmp_path / "prompts.jsonl", "--output_dir", tmp_path / "policy", "--max_steps", 2,
        "--per_device_train_batch_size", 2, "--num_generations", 2, "--max_completion_length", 6,
        "--use_cpu", "true", "--disable_tqdm", "true", "--reward_funcs", "tests.trainer.runs.count_good",
        "--reward_weights", 1.0, 0.5, "--resume_from_checkpoint", "auto",
    )  # fmt: skip
    assert "1 x reward" in (tmp_path / "policy" / "README.md").read_text(encoding="utf-8")
    assert "0.5 x count_good" in (tmp_path / "policy" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "policy" / "model.safetensors").exists()
