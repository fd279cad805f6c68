import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from transformers import TrainingArguments

from vgf_llm import VGFConfig, VGFTrainer


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


@pytest.mark.parametrize("target", ["sft", "tilt", "dpo", "advantage"])
def test_every_metric_that_is_logged_is_explained(make_trainer, target):
    def rewarding(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    page = PAGE.read_text(encoding="utf-8")
    still = {"flow_steps": 0} if target == "advantage" else {}
    trainer: VGFTrainer = make_trainer(max_steps=2, target=target, particle_source="policy", reward_funcs=rewarding, **still)
    trainer.train()
    trainers_own = {"grad_norm", "learning_rate", "epoch", "step"}
    names = {name.replace("/rewarding/", "/<name>/") for name in trainer.state.log_history[0]}
    assert not {name for name in names if f"`{name}`" not in page} - trainers_own


def test_every_field_of_the_configuration_is_explained():
    page = PAGE.read_text(encoding="utf-8")
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = [field for field in dataclasses.fields(VGFConfig) if field.name not in inherited]
    assert len(ours) > 35
    assert not [field.name for field in ours if f"`{field.name}`" not in page]
    docstring = VGFConfig.__doc__
    assert not [field.name for field in ours if field.name not in docstring]
    assert not [field.name for field in ours if not field.metadata.get("help")]
