"""Every benchmark can be started; what trainer_vs_trl makes of its measurements, and whether the pipeline runs."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import trainer_vs_trl as benchmark


SCRIPTS = sorted(
    path.stem for path in Path(benchmark.__file__).parent.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "control_speed_jax"])  # which needs JAX
def test_every_benchmark_can_be_started(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def points(*rows):
    fields = ("step", "seconds", "gold", "kl")
    return [dict(zip(fields, row, strict=True)) | {"proxy": row[2] / 2, "nll_base": 30.0, "tokens": 20.0} for row in rows]


SLOW = points((0, 0.0, 0.0, 0.0), (4, 40.0, 1.0, 1.0), (8, 80.0, 2.0, 3.0))
FAST = points((0, 0.0, 0.0, 0.0), (4, 10.0, 2.0, 1.0), (8, 20.0, 4.0, 4.0))


def run(method, measured, seconds, seed=0):
    return {
        "task": "t", "adaptation": "full", "method": method, "seed": seed, "seconds_per_step": seconds, "points": measured,
        "learning_rate": 1e-3,
    }  # fmt: skip


def test_curves_are_read_between_measurements_and_not_beyond_them():
    assert benchmark.at_kl(SLOW, 2.0, "gold") == pytest.approx(1.5)
    assert benchmark.at_kl(SLOW, 4.0, "gold") is None
    assert benchmark.seconds_to(FAST, 1.5) == pytest.approx(7.5)
    assert benchmark.seconds_to(SLOW, 2.5) is None


def test_goals_are_judged_against_rloo():
    rows = benchmark.summarise([run("rloo", SLOW, 10.0), run("vgf_sft", FAST, 2.5), run("dpo", SLOW, 1.0)])
    ours = next(row for row in rows if row["method"] == "vgf_sft")
    assert ours["step_time_ratio_to_rloo"]["mean"] == 0.25
    # RLOO is at KL 2 after 60 s with gold 1.5, which ours has after 7.5 s.
    assert ours["time_ratio_to_rloo_gold_at_kl_2"]["mean"] == pytest.approx(7.5 / 60)
    (verdict,) = benchmark.goals(rows)
    assert verdict["methods by gold at KL 1"] == ["vgf_sft", "rloo", "dpo"]
    assert verdict["methods by gold at KL 4"] == ["vgf_sft"]  # the others never got there
    assert verdict["shortest time to RLOO's gold at KL 2, in RLOO's"] == ["vgf_sft", pytest.approx(7.5 / 60)]
    assert verdict["step time in RLOO's"] == {"vgf_sft": 0.25}
    (alone,) = benchmark.goals(benchmark.summarise([run("vgf_sft", FAST, 2.5)]))
    assert alone["step time in RLOO's"] == {"vgf_sft": None}


def test_several_runs_of_a_method_are_read_between_their_ends():
    """A path that overshoots its rest is not what a budget or a rate buys."""
    rests = {0.5: (1.0, 0.6), 1.0: (1.5, 0.8), 2.0: (2.5, 1.2), 4.0: (4.0, 2.8)}
    students = [
        run(f"vgf_tilt_{nats:g}", points((0, 0.0, 0.0, 0.0), (4, 10.0, 2.0, 5.0), (8, 20.0, gold, kl)), 2.0)
        for nats, (gold, kl) in rests.items()
    ]
    rows = {r["method"]: r for r in benchmark.summarise([run("rloo", SLOW, 10.0), *students])}
    merged = rows["vgf_tilt"]
    assert set(rows) == {"rloo", "vgf_tilt"} and merged["runs_per_seed"] == 4
    assert merged["gold_at_kl_1"]["mean"] == pytest.approx(2.0) and merged["gold_at_kl_2"]["mean"] == pytest.approx(3.25)
    assert merged["gold_at_kl_4"]["mean"] is None  # no budget gets there
    assert (merged["largest_kl"]["mean"], merged["largest_kl_gold"]["mean"]) == (2.8, 4.0)
    # RLOO's gold is 1 at KL 1 and 1.5 at KL 2, where its single run passes.
    assert merged["gold_over_rloo_at_kl_1"]["mean"] == pytest.approx(1.0)
    # On the way every student had gold 1.5 after 7.5 s, RLOO after 60.
    assert merged["time_ratio_to_rloo_gold_at_kl_2"]["mean"] == pytest.approx(7.5 / 60)
    assert merged["step_time_ratio_to_rloo"]["mean"] == pytest.approx(0.2)
    (verdict,) = benchmark.goals(list(rows.values()))
    assert verdict["methods by gold at KL 1"] == ["vgf_tilt", "rloo"]


def test_the_quickest_of_rloos_runs_is_the_one_to_beat():
    quick = points((0, 0.0, 0.0, 0.0), (4, 4.0, 3.0, 3.0))
    rows = {
        r["method"]: r for r in benchmark.summarise([run("rloo", SLOW, 10.0), run("rloo", quick, 1.0), run("vgf_sft", FAST, 2.5)])
    }
    # Between the ends (3, 2) and (3, 3) and the base model RLOO's gold at KL 2 is 4 / 3, or 5 / 3: its faster run has it soon.
    gold = benchmark.at_kl(benchmark.frontier([run("rloo", SLOW, 10.0), run("rloo", quick, 1.0)]), 2.0, "gold")
    assert rows["rloo"]["time_ratio_to_rloo_gold_at_kl_2"]["mean"] == 1
    expected = benchmark.seconds_to(FAST, gold) / benchmark.seconds_to(quick, gold)
    assert rows["vgf_sft"]["time_ratio_to_rloo_gold_at_kl_2"]["mean"] == pytest.approx(expected)


def test_seeds_that_do_not_get_there_are_counted():
    rows = benchmark.summarise([run("rloo", SLOW, 1.0), run("rloo", FAST, 3.0, seed=1)])
    assert rows[0]["gold_at_kl_1"] == {"mean": 1.5, "half_width": pytest.approx(12.706 * 0.5), "seeds": 2}
    assert rows[0]["gold_at_kl_4"] == {"mean": 4.0, "half_width": None, "seeds": 1}
    assert "4.00 (1/2)" in benchmark.markdown(rows)
    (verdict,) = benchmark.goals(rows)
    assert verdict["methods by gold at KL 4"] == []


def test_a_run_that_is_there_is_not_run_again(tmp_path, monkeypatch):
    calls = []

    def once(job, method, adaptation, seed, rate, steps, held_out, field):
        calls.append((method, field))
        return run(method, SLOW, 1.0, seed)

    monkeypatch.setattr(benchmark, "run", once)
    job = benchmark.Job("t", None, tmp_path, None, None, None, 8, 0)
    for _ in range(2):
        kept = benchmark.Kept(tmp_path / "runs", 8, 4, lambda line: None)
        kept.run(job, "rloo", "full", 0, 1e-3)
    assert calls == [("rloo", None)] and [r["method"] for r in kept.all()] == ["rloo"]


def test_a_field_is_fitted_once_a_task_and_its_seconds_are_stated_apart(tmp_path, saved, monkeypatch):
    fits, given = [], []
    fit = benchmark.fit_field

    def fitted(sampler, prompts, **arguments):
        fits.append(prompts)
        return fit(sampler, prompts, **arguments)

    def once(job, method, adaptation, seed, rate, steps, held_out, field):
        given.append(field)
        return run(method, SLOW, 1.0, seed)

    monkeypatch.setattr(benchmark, "fit_field", fitted)
    monkeypatch.setattr(benchmark, "run", once)
    asked = []

    def train(count, seed):
        asked.append((count, seed))
        return ["the food was", "a room", "nice"]

    reward = partial(benchmark.DifferentiableReward, saved["reward"])
    job = benchmark.Job("t", None, saved["lm"], reward, train, None, 6, 0)
    for seed in (0, 1):  # a second process goes on where the first one was
        benchmark.Kept(tmp_path, 8, 4, lambda line: None).run(job, "vgf_sft", "full", seed, 1e-3)
    assert len(fits) == 1 and asked == [(benchmark.FIELD_PROMPTS, benchmark.FIELD_SEED)]
    assert given == [tmp_path / "field-t-1000"] * 2 and (given[0] / "field.safetensors").exists()
    runs = benchmark.Kept(tmp_path, 8, 4, lambda line: None).all()
    seconds = {r["field_seconds"] for r in runs}
    assert len(runs) == 2 and len(seconds) == 1 and all(r["points"] == SLOW for r in runs)
    text = benchmark.markdown(benchmark.summarise(runs))
    assert f"once per task and in no time above: t {seconds.pop():.0f}." in text
    assert "fitting the field" not in benchmark.markdown(benchmark.summarise([run("rloo", SLOW, 1.0)]))


def test_every_method_has_settings():
    assert set(benchmark.VGF) < set(benchmark.METHODS)
    assert set(benchmark.STYLE) == {benchmark.shown(method) for method in benchmark.METHODS}
    for of_task in benchmark.RATES.values():
        assert set(of_task) == set(benchmark.FAMILY.values())
    for fields in benchmark.VGF.values():
        benchmark.VGFConfig("unused", per_device_train_batch_size=16 * 8, **fields)


def test_the_figure_shows_every_method(tmp_path):
    benchmark.plot([run(method, FAST, 1.0) for method in benchmark.METHODS], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_pipeline_on_transcripts(tmp_path, monkeypatch):
    """Every stage of benchmarks/rlhf_hh.py, on dialogues made here, ends in the page."""
    from benchmarks import rlhf_hh

    rows = []
    for index in range(40):
        prompt = f"\n\nHuman: question {index} about the food\n\nAssistant: fine\n\nHuman: and the room {index % 7}"
        answers = (f"{prompt}\n\nAssistant: it was {word} and number {index % 5}" for word in ("good", "bad"))
        rows.append(dict(zip(("chosen", "rejected"), answers, strict=True)))
    rows.append({"chosen": "no turns", "rejected": ""})
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["rlhf_hh", "--data", str(tmp_path / "hh.jsonl"), "--quick", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    rlhf_hh.main()
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in report["rows"]][-1] == "student: VGF"
    assert "it was good" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "rlhf_hh.json").exists()


@pytest.mark.parametrize("moved", ["-1", "100"])
def test_a_second_round_of_labels_leaves_some_to_the_first(moved, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["e2e_nlg", "--data", "nowhere", "--pairs", "100", "--moved", moved])
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.e2e_nlg").main()
    assert "must leave some of the 100 pairs" in capsys.readouterr().err


def test_sentences_apart_belong_to_prompts_that_ask_for_much_of_the_same():
    apart = importlib.import_module("benchmarks.e2e_nlg").sentences_apart
    prompts = ["a[1], b[1] =>", "a[1], b[2] =>", "c[1] =>", "c[2] =>", "a[1], b[1] =>"]
    # Sixty others are drawn to choose from, so there have to be more than sixty.
    examples = [(prompt, f"{prompt} said {place}") for place, prompt in enumerate(prompts * 20)]
    pairs = apart(examples, 50, seed=0)
    assert pairs == apart(examples, 50, seed=0) != apart(examples, 50, seed=1)
    for prompt, chosen, rejected in pairs:
        assert chosen.startswith(prompt) and not rejected.startswith(prompt)
        assert len(rejected.split(" =>")[0].split(", ")) == len(prompt.split(", "))
