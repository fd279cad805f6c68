import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from vgf_llm import __version__, cli


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the food was\n\nthe staff were nice but\n", encoding="utf-8")
    return path


@pytest.fixture
def arguments(saved, prompts):
    """A small `vgf sample`; the options given win over those before them."""

    def make(*options):
        models = ["--model", saved["lm"], "--reward-model", saved["reward"]]
        sizes = ["--num-particles", 4, "--max-completion-length", 8]
        return [str(word) for word in ("sample", *models, "--prompts", prompts, *sizes, *options)]

    return make


def fails(argv, capsys):
    """The one line that bad input ends in."""
    try:
        code = cli.main(argv)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = re.findall(r"^vgf: error: .*$", captured.err, flags=re.MULTILINE)
    assert captured.err.endswith(f"{line}\n")
    return line


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"vgf_llm {__version__}\n"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom vgf_llm.cli import main\ntry:\n    main(['sample', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_sample_writes_one_record_per_prompt(arguments, capsys):
    assert cli.main(arguments()) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["prompt"] for record in records] == ["the food was", "the staff were nice but"]
    assert "prompts" in captured.err  # the progress bar
    for record in records:
        assert list(record) == ["prompt", "completion", "reward", "reward_initial_best", "kl", "generations"]
        assert record["reward"] >= record["reward_initial_best"]
        assert record["generations"] >= 4


def test_a_completion_is_printed_as_soon_as_it_is_final(arguments, prompts, monkeypatch, capsys):
    """Prompts go through in chunks of `flow_batch_size` completions; what is final does not wait for the rest."""
    prompts.write_text("the food was\n" * 20, encoding="utf-8")
    from vgf_llm.text import VGFSampler

    real, shown = VGFSampler.sample, []

    def sample(self, *args, **kwargs):
        shown.append(capsys.readouterr().out)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VGFSampler, "sample", sample)
    assert cli.main(arguments()) == 0
    shown.append(capsys.readouterr().out)
    assert [len(out.splitlines()) for out in shown] == [0, 8, 8, 4]


def test_a_person_is_asked_for_prompts(arguments, tmp_path, monkeypatch, capsys):
    lines = iter(["the food was", "good " * 60, "staff"])
    monkeypatch.setattr("builtins.input", lambda question: next(lines, ""))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert cli.main(arguments("--prompts", "-", "--output", tmp_path / "out.jsonl")) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == ["the food was", "staff"]
    assert captured.out.splitlines() == [record["completion"] for record in records]
    assert "does not fit the context" in captured.err  # the second, and the third was asked for all the same
    assert captured.err.count("over the best as drawn") == 2


def test_zero_steps_is_best_of_n(arguments, capsys):
    assert cli.main(arguments("--steps", 0)) == 0
    for line in capsys.readouterr().out.splitlines():
        record = json.loads(line)
        assert record["reward"] == record["reward_initial_best"]
        assert record["kl"] == 0
        assert record["generations"] == pytest.approx(4)


def test_the_seed_makes_the_result(arguments, capsys):
    outputs = []
    for seed in (3, 3, 4):
        assert cli.main(arguments("--seed", seed)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_sample_reads_an_ensemble_and_writes_to_a_file(arguments, saved, tmp_path, capsys):
    output = tmp_path / "new" / "out.jsonl"
    assert cli.main(arguments("--reward-model", saved["reward"], saved["reward"], "--output", output)) == 0
    assert capsys.readouterr().out == ""
    assert len(output.read_text(encoding="utf-8").splitlines()) == 2
    assert os.listdir(output.parent) == ["out.jsonl"]


def test_a_failed_run_leaves_an_earlier_file_alone(arguments, saved, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("earlier", encoding="utf-8")
    fails(arguments("--reward-model", saved["other_reward"], "--output", output), capsys)
    assert output.read_text(encoding="utf-8") == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "prompts.txt"}


def test_prompts_of_every_kind(tmp_path, monkeypatch):
    chat = [{"role": "user", "content": "a\u2028b"}]
    lines = [json.dumps({"prompt": "the food"}), json.dumps({"prompt": chat}, ensure_ascii=False), ""]
    (tmp_path / "p.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    assert cli.read_prompts(tmp_path / "p.jsonl") == ["the food", chat]
    (tmp_path / "p.txt").write_text(" the food was \n{a}\n\n", encoding="utf-8")
    assert cli.read_prompts(tmp_path / "p.txt") == [" the food was ", "{a}"]
    for text, expected in (('{"prompt": "a"}\n', ["a"]), ("a\nb", ["a", "b"])):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(text))
            assert cli.read_prompts("-") == expected


def records(argv, capsys):
    assert cli.main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_fewer_movers_decode_less(arguments, capsys):
    every = records(arguments("--rounds", 2, "--horizon", -1), capsys)
    one = records(arguments("--rounds", 2, "--horizon", -1, "--movers", 1), capsys)
    assert sum(r["generations"] for r in one) < sum(r["generations"] for r in every)


def test_an_automatic_budget_is_spent(arguments, capsys):
    found = records(arguments("--auto", 12), capsys)
    assert found and all(9 <= r["generations"] <= 16 for r in found)


def field_command(models, prompts, output, *options):
    """A `vgf field` that takes a second; the options given win over those before them."""
    words = ["field", "--model", models["lm"], "--reward-model", models["reward"], "--prompts", prompts, "--output", output]
    sizes = ["--num-samples", 32, "--max-completion-length", 8, "--epochs", 4, "--batch-size", 16, "--learning-rate", 3e-3]
    return [str(word) for word in (*words, *sizes, *options)]


@pytest.fixture(scope="module")
def fitted(saved, tmp_path_factory):
    """What `vgf field` wrote, into a folder that did not exist."""
    folder = tmp_path_factory.mktemp("field")
    lines = [
        f"{a} {b} {c}\n" for a in ("the", "a", "good") for b in ("food", "room", "staff") for c in ("was", "were", "but", "and")
    ]
    (folder / "prompts.txt").write_text("".join(lines), encoding="utf-8")
    assert cli.main(field_command(saved, folder / "prompts.txt", folder / "new" / "field")) == 0
    assert os.listdir(folder / "new") == ["field"]
    return folder / "new" / "field"


def test_an_automatic_budget_along_a_field_is_that_of_its_correlation(arguments, fitted, capsys, monkeypatch):
    from vgf_llm import TransportBudget, VGFSampler
    from vgf_llm.text.field import GradientField

    asked, sample = [], VGFSampler.sample

    def spied(self, *arguments, **options):
        asked.append(options["budget"])
        return sample(self, *arguments, **options)

    monkeypatch.setattr(VGFSampler, "sample", spied)
    records(arguments("--auto", 12, "--gradient-field", fitted), capsys)
    correlation = float(GradientField.from_pretrained(fitted).correlation)
    assert asked and set(asked) == {TransportBudget.auto(12, correlation)} and 0 < correlation <= 1


def test_a_field_moves_particles_while_they_are_drawn(arguments, fitted, capsys):
    many = ("--prompts", fitted.parents[1] / "prompts.txt", "--num-particles", 2)
    along = (*many, "--gradient-field", fitted, "--kl-budget", 4)
    plain, moved, more = (records(arguments(*o), capsys) for o in ((*many, "--steps", 0), along, (*along, "--rounds", 2)))
    assert [r["completion"] for r in moved] != [r["completion"] for r in plain]
    assert all(0 < r["kl"] <= 4 * (1 + 1e-5) for r in moved)
    assert all(r["reward"] == r["reward_initial_best"] and r["generations"] == pytest.approx(2) for r in moved)
    assert all(r["generations"] > 2 for r in more)
    means = [sum(r["reward"] for r in found) / len(found) for found in (plain, moved, more)]
    assert means[0] + 0.1 < means[1] < means[2]


@pytest.mark.parametrize("zero", [("--steps", 0), ("--kl-budget", 0)], ids=["steps", "nats"])
def test_at_budget_zero_a_field_changes_nothing(arguments, fitted, capsys, zero):
    assert records(arguments(*zero, "--gradient-field", fitted), capsys) == records(arguments(*zero), capsys)


def test_a_field_is_the_same_again_and_follows_its_seed(saved, prompts, fitted, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for seed in (0, 1):
        assert cli.main(field_command(saved, fitted.parents[1] / "prompts.txt", tmp_path / "empty", "--seed", seed)) == 0
        same = (tmp_path / "empty" / "field.safetensors").read_bytes() == (fitted / "field.safetensors").read_bytes()
        assert same == (seed == 0)
        shutil.rmtree(tmp_path / "empty")
    captured = capsys.readouterr()
    assert captured.out == "" and "gradient field" in captured.err  # the progress bar
    assert re.search(r"^correlation with rewards of held-out prompts: -?[01]\.\d\d$", captured.err, re.MULTILINE)


def test_comparisons_say_what_likelihood_is_worth(saved, fitted, tmp_path, capsys):
    from vgf_llm.evaluation.loading import load_sampler
    from vgf_llm.text.field import GradientField, likelihood_worth

    sides = [" the food was good", " food food and the"]
    rows = [("the food was", *sides[:: 1 if k % 3 else -1]) for k in range(60)]
    file = tmp_path / "pairs.jsonl"
    as_texts = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows]
    as_messages = [{**row, **{k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")}} for row in as_texts]
    found = []
    for number, some in enumerate((as_texts, as_messages)):
        file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        command = field_command(saved, fitted.parents[1] / "prompts.txt", tmp_path / str(number), "--comparisons", file)
        assert cli.main(command) == 0
        found.append(float(GradientField.from_pretrained(tmp_path / str(number)).likelihood_weight))
        assert f"a nat of likelihood is worth {found[-1]:.3g} of the reward" in capsys.readouterr().err
    plain = GradientField.from_pretrained(fitted)
    worth = likelihood_worth(load_sampler(saved["lm"], [saved["reward"]]), rows)
    assert found == pytest.approx([max(worth, float(plain.likelihood_weight))] * 2)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "the", "chosen": " a"}, "lacks the column(s) rejected"),
        ({"prompt": "", "chosen": " a", "rejected": " b"}, 'row 1 has no "prompt"'),
        ({"prompt": "the", "chosen": [], "rejected": []}, 'row 1: "chosen" and "rejected" must be texts'),
        ({"prompt": "the", "chosen": " a", "rejected": " b"}, "1 comparisons count"),
    ],
)
def test_what_is_no_comparison_is_refused(saved, fitted, tmp_path, capsys, row, says):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    command = field_command(saved, fitted.parents[1] / "prompts.txt", tmp_path / "new", "--comparisons", tmp_path / "pairs.jsonl")
    assert says in fails(command, capsys) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["full", "file", "below a file"])
def test_a_field_overwrites_nothing(saved, prompts, tmp_path, monkeypatch, capsys, kind):
    """And says so before the models are loaded."""
    from vgf_llm.evaluation import loading

    monkeypatch.setattr(loading, "load_sampler", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("earlier", encoding="utf-8")
    output = tmp_path / "taken" / {"full": ".", "file": "file", "below a file": "file/new"}[kind]
    says = "file: " if kind == "below a file" else "is there already and no empty folder"
    assert says in fails(field_command(saved, prompts, output), capsys)
    assert (tmp_path / "taken" / "file").read_text(encoding="utf-8") == "earlier"
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "taken"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--reward-model", "/no/such"), "cannot load /no/such"),
        (("--prompts", "/no/such"), "/no/such: No such file"),
        (("--num-samples", 1), "num_samples must be at least 2, got 1"),
        (("--epochs", 0), "epochs must be at least 1"),
        (("--batch-size", 0), "batch_size must be at least 1"),
        (("--max-completion-length", 0), "max_completion_length must be at least 1"),
        (("--max-completion-length", 1000), "does not fit the context"),
        (("--learning-rate", "nan"), "learning_rate must be positive and finite, got nan"),
        (("--learning-rate", 0), "learning_rate must be positive"),
        (("--learning-rate", 1e30), "lower learning_rate"),
        (("--temperature", 0), "temperature"),
        (("--epochs", "many"), "invalid int value"),
    ],
)
def test_a_field_that_cannot_be_fitted_leaves_nothing(saved, prompts, tmp_path, capsys, options, says):
    assert says in fails(field_command(saved, prompts, tmp_path / "field", *options), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_field_that_is_interrupted_leaves_nothing(saved, prompts, tmp_path, monkeypatch, capsys):
    from vgf_llm.text.field import GradientField

    def interrupted(self, directory):
        (directory / "config.json").write_text("{", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(GradientField, "save_pretrained", interrupted)
    assert cli.main(field_command(saved, prompts, tmp_path / "field")) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.fixture
def calibrated(saved, tmp_path):
    """A copy of the reward model with a calibration beside it."""

    def make(content):
        path = tmp_path / "calibrated"
        shutil.copytree(saved["reward"], path, dirs_exist_ok=True)
        (path / "calibration.json").write_text(content, encoding="utf-8")
        return path

    return make


def test_a_calibration_beside_the_reward_model_is_used(arguments, calibrated, capsys):
    plain = records(arguments("--steps", 0), capsys)
    scaled = records(arguments("--steps", 0, "--reward-model", calibrated("[1.0, 2.0]")), capsys)
    for a, b in zip(plain, scaled, strict=True):
        assert b["reward"] == pytest.approx((a["reward"] - 1) / 2, abs=1e-5)


@pytest.mark.parametrize("content", ["{}", "[1.0]", '["a", 1]', "not json", "[0.0, 0.0]", "[NaN, 1.0]"])
def test_a_bad_calibration_is_named(arguments, calibrated, capsys, content):
    assert "calibration.json" in fails(arguments("--reward-model", calibrated(content)), capsys)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no prompts"),
        ("\n \n", "no prompts"),
        ('{"prompt": "a"}\n{"text": "b"}', 'line 2 has no "prompt"'),
        ('{"prompt": ""}', 'no "prompt"'),
        ('{"prompt": []}', 'no "prompt"'),
        ('{"prompt": [{"role": "user"}]}', 'no "prompt"'),
        ("[1]", 'no "prompt"'),
        ("the food", "is not JSON"),
    ],
)
def test_bad_prompts(arguments, tmp_path, capsys, content, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    assert says in fails(arguments("--prompts", path), capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompts", "/no/such/file"], "error: /no/such/file: No such file"),
        (["--prompts", "."], "directory"),
        (["--model", "/no/such/model"], "cannot load /no/such/model"),
        (["--reward-model", "no/such-model"], "cannot load no/such-model"),
        (["--steps", "-1"], "steps"),
        (["--kl-budget", "nan"], "kl_budget"),
        (["--auto", "0"], "generations must be positive"),
        (["--num-particles", "0"], "num_particles"),
        (["--temperature", "0"], "temperature"),
        (["--movers", "0"], "movers"),
        (["--max-completion-length", "1000"], "context"),
        (["--output", "."], "directory"),
        (["--steps", "many"], "invalid int value"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_bad_options(arguments, capsys, options, says):
    assert says in fails(arguments(*options), capsys)


def test_a_missing_option_or_command_is_one_line(capsys):
    assert "--model" in fails(["sample"], capsys)
    assert "COMMAND" in fails([], capsys)


@pytest.mark.parametrize("name", sorted(cli.RECIPES))
def test_recipes_are_commands(name, monkeypatch, tmp_path):
    import importlib

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("{}\n", encoding="utf-8")

    script = importlib.import_module(f"vgf_llm.recipes.{name}")
    seen = []
    monkeypatch.setattr(script, "parse", lambda argv: (name, *argv))
    monkeypatch.setattr(script, "main", lambda *args: seen.append(args))
    assert cli.main([name, "--config", "c.yaml", "--seed", "1"]) == 0
    assert seen == [(name, "--config", "c.yaml", "--seed", "1")]


@pytest.mark.parametrize("name", sorted(cli.RECIPES))
def test_bad_input_of_a_recipe_is_one_line(name, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("nonsense: 1\n", encoding="utf-8")
    more = [] if name in ("evaluate", "diagnose") else ["--use_cpu", "true"]
    assert "nonsense" in fails([name, "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path), *more], capsys)
    assert "no-such.yaml" in fails([name, "--config", str(tmp_path / "no-such.yaml")], capsys)


def test_demo_hands_its_options_over(monkeypatch, tmp_path):
    from vgf_llm.evaluation import demo

    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda *args, **kwargs: seen.append((args, kwargs)) or {})
    assert cli.main(["demo", "--output-dir", str(tmp_path / "d"), "--scale", "quick"]) == 0
    assert seen == [((tmp_path / "d", "quick"), {})]


def test_ctrl_c_ends_with_130_and_leaves_nothing(monkeypatch, arguments, tmp_path, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "sample", interrupted)
    assert cli.main(arguments("--output", tmp_path / "out.jsonl")) == 130
    assert capsys.readouterr().err.endswith("\nvgf: interrupted\n")  # behind the bars of loading
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "vgf_llm", "sample", "--nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("vgf: error: ")


def test_a_closed_pipe_is_no_error(monkeypatch, arguments, capfd):
    def closed(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "sample", closed)
    monkeypatch.setattr(os, "dup2", lambda *fds: None)
    assert cli.main(arguments()) == 141
    assert "vgf:" not in capfd.readouterr().err
