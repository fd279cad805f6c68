import re
import shutil
from pathlib import Path

from vgf_llm import VGFTrainer


PAGE = Path(__file__).resolve().parents[2] / "docs" / "trainer.md"


def test_the_example_of_the_page_trains_and_saves(saved, tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    shutil.copytree(saved["lm"], tmp_path / "my-sft-model")
    shutil.copytree(saved["reward"], tmp_path / "my-reward-model")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, str(PAGE), "exec"), names)  # noqa: S102
    assert (tmp_path / "my-policy" / "model.safetensors").exists()
    assert names["trainer"].state.global_step == 6


def test_every_metric_that_is_logged_is_explained(make_trainer):
    page = PAGE.read_text(encoding="utf-8")
    trainer: VGFTrainer = make_trainer(max_steps=1)
    trainer.train()
    trainers_own = {"grad_norm", "learning_rate", "epoch", "step"}
    unexplained = [name for name in trainer.state.log_history[0] if f"`{name}`" not in page]
    assert set(unexplained) <= trainers_own
