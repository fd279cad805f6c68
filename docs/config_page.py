"""Writes docs/config.md from the dataclasses, so that no field is described twice.

python docs/config_page.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ScriptArguments

from vgf_llm import TransportBudget, VGFConfig
from vgf_llm.control import AgentConfig, TrainConfig
from vgf_llm.evaluation.diagnose import DiagnoseConfig
from vgf_llm.evaluation.evaluation_config import EvaluationConfig
from vgf_llm.recipes.reward import RewardScriptArguments
from vgf_llm.recipes.sft import SFTScriptArguments
from vgf_llm.recipes.vgf import VGFScriptArguments


PAGE = Path(__file__).with_name("config.md")
INTRODUCTION = """\
# Every field of every configuration

This page is written by `python docs/config_page.py` from the classes themselves; a test fails where it is out of date.
Each field is a key of the YAML file and an option of the command, which wins over the file. Lists are given with blanks between
their words, and an unknown key is an error.
"""
# Heading, what reads it, the class, and the class whose fields are described elsewhere.
SECTIONS: list[tuple[type, str, type | None]] = [
    (VGFConfig, "`vgf vgf`, `VGFTrainer`. All fields of `transformers.TrainingArguments` besides.", TrainingArguments),
    (VGFScriptArguments, "`vgf vgf`. All fields of TRL's `ScriptArguments` and `ModelConfig` besides.", ScriptArguments),
    (SFTScriptArguments, "`vgf sft`. All fields of TRL's `SFTConfig` and of these two besides.", ScriptArguments),
    (RewardScriptArguments, "`vgf reward`. All fields of TRL's `RewardConfig` and of these two besides.", ScriptArguments),
    (EvaluationConfig, "`vgf evaluate`.", None),
    (DiagnoseConfig, "`vgf diagnose`.", None),
    (TransportBudget, "`VGFSampler.sample`, `transport`, and `train`, `explore` and `test` of `AgentConfig`.", None),
    (TrainConfig, "`vgf control train`.", None),
    (AgentConfig, "`agent` of `TrainConfig`.", None),
]  # fmt: skip


def arguments(cls: type) -> dict[str, str]:
    """What the section "Args" of a docstring says about each name."""
    found: dict[str, str] = {}
    section = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", inspect.getdoc(cls) or "", flags=re.DOTALL)
    if section is None:
        return found
    for names, text in re.findall(r"^    ([\w, ]+): (.*?)(?=^    \S|\Z)", section[1] + "\n", flags=re.DOTALL | re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
        return "`" + f"{type(value).__name__}({', '.join(f'{name}={v!r}' for name, v in given)})" + "`"
    return f"`{value!r}`"


def page() -> str:
    parts = [INTRODUCTION]
    for cls, read_by, base in SECTIONS:
        inherited = {field.name for field in dataclasses.fields(base)} if base is not None else set()
        said = arguments(cls)
        lines = [f"## {cls.__name__}", "", read_by, "", "| field | default | what |", "|:--|:--|:--|"]
        for field in dataclasses.fields(cls):
            if field.name in inherited:
                continue
            what = field.metadata.get("help") or said.get(field.name)
            if not what:
                raise ValueError(f"{cls.__name__}.{field.name} is described neither in its metadata nor in the docstring")
            cells = (f"`{field.name}`", default(field), what)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
