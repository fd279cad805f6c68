"""`vgf diagnose`: figures that are known for rewards that are known, and the rules of the recommendation."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests import tiny
from vgf_llm import VGFSampler, cli
from vgf_llm.evaluation.diagnose import DiagnoseConfig, correlation, diagnose, recommend
from vgf_llm.evaluation.fidelity import measure_substitutions
from vgf_llm.text import DifferentiableReward
from vgf_llm.text.field import fit_field


PROMPTS = ["the food was", "the staff were", "a room was", "the room was", "the staff was", "a food was"]
SMALL = {"max_completion_length": 10, "samples": 8, "num_particles": 2, "substitutions": 6, "regenerations": 2}


def make(reward=None, **options):
    tok = tiny.tokenizer()
    model = tiny.language_model("llama", len(tok), eos=tok.eos_token_id, pad=tok.pad_token_id)
    reward = tiny.reward_model("llama", len(tok), pad=tok.pad_token_id) if reward is None else reward(tok)
    return VGFSampler(model, DifferentiableReward(reward, tok), tok, **options)


@pytest.fixture(scope="module")
def report():
    return diagnose(make(tiny.counting_reward), PROMPTS, lambda prompt, text: float(text.split().count("good")), **SMALL)


def test_a_reward_that_counts_words_is_forecast_exactly(report):
    fixed = {row["at"]: row for row in report["fidelity"] if row["suffix"] == "fixed"}
    for at in ("token", "mixture", "path"):
        assert fixed[at]["value"] == pytest.approx(1)
        assert fixed[at]["r2"]["value"] == pytest.approx(1)
    assert abs(fixed["random"]["value"]) < 0.9
    assert report["gold"]["fixed"]["proxy"]["value"] == pytest.approx(1)
    assert report["gold"]["regenerated"]["proxy"]["value"] == pytest.approx(1)
    assert sum(part["count"] for part in report["by_position"]["fixed"]) == report["substitutions"]
    assert sum(part["count"] for part in report["by_entropy"]["regenerated"]) == report["substitutions"]


def test_one_decode_moves_towards_the_word_and_stays_under_the_ideal(report):
    gains = {g["kl_budget"]: g for g in report["gain"] if g["direction"] == "gradient"}
    assert list(gains) == [0.5, 1, 2, 4]
    (random,) = (g for g in report["gain"] if g["direction"] == "random")
    assert gains[4]["gain"] > gains[0.5]["gain"] > 0
    assert gains[2]["gain"] > random["gain"]
    for g in gains.values():
        assert g["ideal"] == pytest.approx(math.sqrt(2 * g["kl"]))
        assert g["kl"] <= 1.5 * g["kl_budget"]


def test_substitutions_change_one_token_and_agree_with_the_reward():
    sampler = make()
    s = measure_substitutions(sampler, PROMPTS, max_completion_length=10, substitutions=6, regenerations=1)
    assert len(s.members_fixed) == 0
    assert len(s.fixed) == len(s.regenerated) == len(s.third) == len(s.entropy) == len(s.prompt)
    assert s.entropy.min() >= 0 and s.entropy.max() <= math.log(len(sampler.processing_class))
    # With the last token of a text that is full, nothing is left to be written anew.
    tok = sampler.processing_class
    never = tiny.language_model("llama", len(tok), eos=tok.eos_token_id, pad=tok.pad_token_id)
    with torch.no_grad():
        never.get_output_embeddings().weight[tok.eos_token_id] = 0.0
    full = VGFSampler(never, sampler.reward, tok, top_k=3)
    s = measure_substitutions(full, PROMPTS[:2], max_completion_length=1, substitutions=6, regenerations=2)
    assert torch.allclose(s.fixed, s.regenerated, atol=1e-5)


def test_a_prompt_is_measured_alike_in_any_company():
    sampler = make()
    options = {"max_completion_length": 10, "substitutions": 5, "regenerations": 2}
    together = measure_substitutions(sampler, PROMPTS, **options)
    for index in (0, 3):
        alone = measure_substitutions(sampler, [PROMPTS[index]], **options)
        mine = together.prompt == index
        for name in ("fixed", "regenerated", "entropy"):
            assert torch.allclose(getattr(together, name)[mine], getattr(alone, name), atol=1e-5)
        assert torch.allclose(together.predicted["path"][mine], alone.predicted["path"], atol=1e-5)


def test_a_base_model_without_a_choice_is_named():
    with pytest.raises(ValueError, match="said otherwise"):
        measure_substitutions(make(top_k=1), PROMPTS[:2], max_completion_length=5)


def test_members_that_are_the_same_agree():
    tok = tiny.tokenizer()
    same = [tiny.reward_model("llama", len(tok), pad=tok.pad_token_id) for _ in range(2)]
    s = measure_substitutions(make(lambda tok: same), PROMPTS[:3], max_completion_length=8, substitutions=4, regenerations=1)
    assert s.members_fixed.shape == s.members_regenerated.shape == (2, len(s.fixed))
    assert torch.allclose(s.members_fixed[0], s.fixed, atol=1e-5)
    assert torch.allclose(s.members_regenerated[1], s.regenerated, atol=1e-5)


def test_the_correlation_is_spearmans_and_its_interval_covers_it():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, generator=rng)
    y = x + torch.randn(300, generator=rng)
    prompt = torch.arange(300) // 10
    found = correlation(x, y, prompt)
    assert found["value"] == pytest.approx(spearmanr(x, y).statistic)
    assert found["low"] < found["value"] < found["high"]
    assert found["high"] - found["low"] == pytest.approx(4 * 0.5 / np.sqrt(300), rel=0.6)
    assert correlation(torch.zeros(9), torch.arange(9.0), torch.arange(9)) == {"value": None, "low": None, "high": None}


def known(fidelity=0.5, agreement=0.9, over=0.2, field=None):
    """A report in which nothing is uncertain."""

    def sure(value):
        return {"value": value, "low": value, "high": value}

    earned = {"gradient": over} if field is None else {"gradient": over, "field": field}
    return {
        "correlation": None if field is None else 0.6,
        "gradient_at": "path",
        "fidelity": [{"suffix": "regenerated", "at": "path", **sure(fidelity)}],
        "members": None if agreement is None else {"count": 3, "fixed": sure(0.0), "regenerated": sure(agreement)},
        "gain": [
            {"direction": name, "kl_budget": 2.0} | {f"over_best_of_n{end}": value for end in ("", "_low", "_high")}
            for name, value in earned.items()
        ],
    }


@pytest.mark.parametrize(
    ("facts", "choice", "rules"),
    [
        ({}, "flow", 3),
        ({"agreement": None}, "flow", 3),
        ({"over": -0.1}, "rounds", 3),
        ({"agreement": 0.0}, "best_of_n", 2),
        ({"fidelity": -0.01, "over": 0.0}, "best_of_n", 1),
        ({"fidelity": -0.01}, "flow", 3),
        ({"fidelity": -0.01, "agreement": 0.0}, "best_of_n", 2),
        ({"fidelity": 0.0, "agreement": 0.0, "over": -1.0}, "best_of_n", 1),
        ({"fidelity": 0.0, "agreement": 0.0, "over": -1.0, "field": 0.1}, "field", 1),
        ({"fidelity": 0.0, "agreement": 0.0, "over": -1.0, "field": 0.0}, "best_of_n", 2),
        ({"field": -0.1}, "flow", 4),
    ],
)
def test_rules_in_their_order(facts, choice, rules):
    said = recommend(known(**facts))
    assert said["choice"] == choice
    assert len(said["reasons"]) == rules
    assert said["reasons"][-1] in said["sentence"]
    assert ("1.8 nats" in said["sentence"]) == (choice == "field")  # 5 * 0.6^2


def test_a_field_is_measured_beside_the_gradient(report):
    sampler = make(tiny.counting_reward)
    sampler.field = fit_field(
        sampler, PROMPTS * 4, num_samples=32, max_completion_length=8, epochs=6, batch_size=32, learning_rate=3e-3
    )
    found = diagnose(sampler, PROMPTS, lambda prompt, text: float(text.split().count("good")), **SMALL)
    # The rest is what it is without a field.
    own = [gain for gain in found["gain"] if gain["direction"] != "field"]
    assert own == report["gain"] and [r for r in found["fidelity"] if r["at"] != "field"] == report["fidelity"]
    along = [gain for gain in found["gain"] if gain["direction"] == "field"]
    assert [gain["kl_budget"] for gain in along] == [gain["kl_budget"] for gain in own if gain["direction"] == "gradient"]
    assert all(gain["generations"] == SMALL["num_particles"] for gain in along)
    assert along[-1]["gain"] > next(gain for gain in own if gain["direction"] == "random")["gain"] + 0.3
    assert found["correlation"] == float(sampler.field.correlation) and report["correlation"] is None
    assert {r["at"] for r in found["fidelity"]} == {r["at"] for r in report["fidelity"]} | {"field"}
    assert found["recommendation"]["choice"] == "field"


def test_the_command_writes_figures_and_a_picture(saved, tmp_path, capsys):
    rows = [{"prompt": prompt} for prompt in [*PROMPTS, "the " * 60]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]), encoding="utf-8")
    words = [
        "diagnose", "--model_name_or_path", saved["lm"], "--reward_model_name_or_path", saved["reward"], "--dataset_name",
        tmp_path / "p.jsonl", "--output_dir", tmp_path / "out", "--max_completion_length", 8, "--samples", 4,
        "--num_particles", 2, "--substitutions", 4, "--regenerations", 1, "--flow_kl_budgets", 1, 2, "--max_prompts", 4,
    ]  # fmt: skip
    assert cli.main(list(map(str, words))) == 0
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "diagnose.json").read_text(encoding="utf-8"))
    assert written["recommendation"]["sentence"].split(":")[0] in said
    assert (written["prompts"], written["prompts_left_out"]) == (4, 1)
    assert (tmp_path / "out" / "diagnose.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("options", "says"),
    [({"samples": 4}, "samples"), ({"substitutions": 1}, "substitutions"), ({"flow_kl_budgets": [0.0]}, "flow_kl_budgets")],
)
def test_bad_settings(options, says):
    with pytest.raises(ValueError, match=says):
        DiagnoseConfig(model_name_or_path="m", reward_model_name_or_path=["r"], dataset_name="d", **options)


def test_a_reward_that_never_changes_is_named():
    def nothing(tok):
        return tiny.SumOfEmbeddings([0.0] * len(tok))

    with pytest.raises(ValueError, match="same for all samples"):
        diagnose(make(nothing), PROMPTS[:2], **SMALL)


def test_the_example_of_the_page_runs(saved, tmp_path, monkeypatch):
    for name in ("my-reward-model-0", "my-reward-model-1"):
        shutil.copytree(saved["reward"], tmp_path / name)
    shutil.copytree(saved["lm"], tmp_path / "my-sft-model")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[2] / "docs" / "diagnose.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = {}
    with pytest.warns(UserWarning, match="give at least 50"):
        exec(compile(example, str(page), "exec"), found)  # noqa: S102
    assert len(found["output"].completions) == len(PROMPTS)
