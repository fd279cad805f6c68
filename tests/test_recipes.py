"""The recipes run end to end on tiny models, and every configuration is read by its recipe."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import diagnose, evaluate, reward, sft, vgf
from vgf_llm.text import DifferentiableReward


ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"sft": sft, "reward": reward, "vgf": vgf, "diagnose": diagnose, "evaluate": evaluate}
# Those of control have another form, and tests in tests/control.
CONFIGS = sorted(p for p in (ROOT / "recipes" / "configs").rglob("*.yaml") if p.parent.name != "control")


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


# Configurations


def launch_line(config):
    """The command at the top of a configuration, as words."""
    comment = config.read_text(encoding="utf-8").split("\n#\n")[0]
    return re.sub(r"\\?\n?# +", " ", comment).split()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_is_read_by_its_recipe(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    python, script, *options = launch_line(config)
    job = config.stem.rsplit("_", 1)[1]
    assert (python, script) == ("python", f"recipes/{job}.py")
    assert options[:2] == ["--config", str(config.relative_to(ROOT))]
    if job in ("diagnose", "evaluate"):
        (args,) = RECIPES[job].parse(options)
        assert args.dataset_name and args.output_dir.startswith("outputs/")
        needed = [args.model_name_or_path, *args.reward_model_name_or_path]
        if job == "evaluate":  # adapters are read as they are
            needed += [name for name in args.students.values() if "lora" not in name]
    else:
        # use_cpu: what is written for GPUs is to be read here as well.
        script_args, training_args, model_args = RECIPES[job].parse([*options, "--use_cpu", "true"])
        assert script_args.dataset_name
        assert training_args.output_dir.startswith("outputs/")
        template = getattr(training_args, "chat_template_path", None)
        assert template is None or Path(template).is_file()
        needed = [model_args.model_name_or_path, *getattr(script_args, "reward_model_name_or_path", [])]
    # A job starts from what the one before it writes.
    for name in needed:
        if name.startswith("outputs/"):
            before, _, inside = name.removeprefix("outputs/").partition("/")
            _, model, job_before = before.split("_")
            earlier = config.parent / f"{model}_{job_before}.yaml"
            _, earlier_args, earlier_model = RECIPES[job_before].parse(["--config", str(earlier), "--use_cpu", "true"])
            assert earlier_args.output_dir == f"outputs/{before}"
            assert earlier_model.use_peft == (inside == "merged")


def test_every_recipe_that_trains_has_configurations():
    assert {config.stem.rsplit("_", 1)[1] for config in CONFIGS} == set(RECIPES)


def render(path, template, messages, **kwargs):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (ROOT / "recipes" / "configs" / "hh" / template).read_text(encoding="utf-8")
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize(
    ("template", "whole", "opening"),
    [
        (
            "transcript.jinja",
            "\n\nHuman: a\n\nAssistant: b<eos>\n\nHuman: c\n\nAssistant: d<eos>",
            "\n\nHuman: a\n\nAssistant:",
        ),
        (
            "chatml.jinja",
            (
                "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
            ),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_chat_templates_end_where_a_completion_does(saved, template, whole, opening):
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    assert render(saved["lm"], template, messages) == whole
    prompt = render(saved["lm"], template, messages[:1], add_generation_prompt=True)
    assert prompt == opening
    assert whole.startswith(prompt)


# Training


TINY = [
    "--max_steps", "30", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false",
    "--bf16", "false", "--use_cpu", "true", "--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none",
]  # fmt: skip


@pytest.fixture
def transcripts(tmp_path, monkeypatch):
    """A directory of raw dialogues, in which the good answer is preferred."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for thing in ("food", "room", "staff", "a room", "the food", "the staff"):
        prompt = f"\n\nHuman: {thing}\n\nAssistant: fine\n\nHuman: the {thing}"
        answers = (f"{prompt}\n\nAssistant: {thing} was {word} and {word}" for word in ("good", "bad"))
        rows.append(dict(zip(("chosen", "rejected"), answers, strict=True)))
    folder = tmp_path / "transcripts"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def scores(model, tokenizer, prompt, answers):
    """As the sampler reads them: at the end-of-sequence token."""
    prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]] * len(answers))
    ids = torch.tensor([tokenizer(answer + tokenizer.eos_token)["input_ids"] for answer in answers])
    everything = torch.ones_like(prompt_ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    return DifferentiableReward(str(model), tokenizer).score_ids(prompt_ids, everything[0], ids, everything[1])


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_from_transcripts_to_a_reward_model(saved, transcripts, tmp_path, adapters):
    common = ["--dataset_name", transcripts, "--hh_transcripts", "true", "--eval_strategy", "epoch", *TINY]
    lora = ["--use_peft", "true", "--lora_target_modules", "all-linear"] if adapters else []
    template = ROOT / "recipes" / "configs" / "hh" / "transcript.jinja"

    def train(recipe, *options):
        recipe.main(*recipe.parse([str(word) for word in (*options, *common, *lora)]))

    train(sft, "--model_name_or_path", saved["lm"], "--output_dir", tmp_path / "sft", "--chat_template_path", template)
    learned = tmp_path / "sft" / "merged" if adapters else tmp_path / "sft"
    tokenizer = AutoTokenizer.from_pretrained(learned)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the food"}], add_generation_prompt=True, tokenize=False)

    def loss(model, answer):
        ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(model)(ids, labels=ids).loss.item()

    answer = " food was good and good"
    assert loss(learned, answer) < loss(saved["lm"], answer) - 0.3

    seqcls = ["--lora_task_type", "SEQ_CLS"] if adapters else []
    flow_aware = ["--flow_aware_model_name_or_path", learned, "--max_length", 48, *seqcls]
    train(reward, "--model_name_or_path", learned, "--output_dir", tmp_path / "reward", *flow_aware)
    judge = tmp_path / "reward" / "merged" if adapters else tmp_path / "reward"
    good, bad = scores(judge, tokenizer, prompt, [answer, answer.replace("good", "bad")]).tolist()
    assert good > bad + 0.5


def test_answers_are_what_a_pair_does_not_share():
    chosen, rejected = [5, 6, 7, 8, 2, 0], [5, 6, 9, 8, 7, 2]
    positions = reward.answers([0, 2])(torch.tensor([chosen, chosen, rejected, chosen]))
    assert positions.int().tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6, [0, 0, 1, 1, 1, 0], [0] * 6]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max_length", "2"], "every pair is longer than max_length=2"),
        (["--pad_token", "<eos>"], "give --pad_token"),
        (["--chat_template_path", "{chatml}"], "give --chat_template_path"),
        (["--flow_aware_model_name_or_path", "{other}"], "another vocabulary"),
    ],
)
def test_reward_models_that_the_flow_could_not_use(saved, transcripts, tmp_path, options, says):
    hh = ROOT / "recipes" / "configs" / "hh"
    fill = {"chatml": hh / "chatml.jinja", "other": saved["other_reward"]}
    words = [
        "--model_name_or_path", saved["lm"], "--output_dir", tmp_path / "r", "--dataset_name", transcripts,
        "--hh_transcripts", "true", *TINY, "--chat_template_path", hh / "transcript.jinja", *(o.format(**fill) for o in options),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=says):
        reward.main(*reward.parse(list(map(str, words))))
    assert not (tmp_path / "r" / "config.json").exists()


@pytest.mark.parametrize(
    ("job", "options", "says"),
    [
        ("sft", [], "give --model_name_or_path"),
        ("sft", ["--model_name_or_path", "m"], "give --dataset_name"),
        ("sft", ["--config", "{unknown}"], "nonsense"),
        ("reward", ["--model_name_or_path", "m", "--dataset_name", "d", "--use_peft", "true"], "lora_task_type SEQ_CLS"),
        ("reward", ["--config", "recipes/configs/tldr/tiny_vgf.yaml"], "num_generations"),
        ("vgf", ["--model_name_or_path", "m", "--dataset_name", "d"], "give --reward_model_name_or_path"),
        ("diagnose", ["--model_name_or_path", "m"], "give --reward_model_name_or_path"),
        ("diagnose", ["--config", "{unknown}"], "nonsense"),
        ("evaluate", [], "give --model_name_or_path"),
        ("evaluate", ["--config", "{unknown}"], "nonsense"),
        ("evaluate", ["--config", "recipes/configs/tldr/tiny_vgf.yaml"], "num_generations"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, job, options, says):
    monkeypatch.chdir(ROOT)
    (tmp_path / "unknown.yaml").write_text("nonsense: 1\n", encoding="utf-8")
    words = [word.format(unknown=tmp_path / "unknown.yaml") for word in options]
    with pytest.raises(ValueError, match=says):
        RECIPES[job].parse(
            [*words, "--output_dir", str(tmp_path), *([] if job in ("diagnose", "evaluate") else ["--use_cpu", "true"])]
        )


def test_a_bad_option_is_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "recipes/sft.py", "--output_dir", str(tmp_path), "--use_cpu", "true"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert (
        result.stderr.splitlines()[-1]
        == "sft: error: give --model_name_or_path: a causal language model, a directory or a hub id"
    )
    assert "Traceback" not in result.stderr
