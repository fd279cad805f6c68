"""What benchmarks/trainer_vs_trl.py makes of its measurements, and whether the pipeline runs."""

import json

import pytest

from benchmarks import trainer_vs_trl as benchmark


def points(*rows):
    return [dict(zip(("step", "seconds", "gold", "kl"), row, strict=True)) for row in rows]


SLOW = points((0, 0.0, 0.0, 0.0), (4, 40.0, 1.0, 1.0), (8, 80.0, 2.0, 3.0))
FAST = points((0, 0.0, 0.0, 0.0), (4, 10.0, 2.0, 1.0), (8, 20.0, 4.0, 4.0))


def run(method, measured, seconds):
    return {
        "task": "t", "adaptation": "full", "method": method, "seed": 0, "seconds_per_step": seconds, "points": measured,
    }  # fmt: skip


def test_curves_are_read_between_measurements_and_not_beyond_them():
    assert benchmark.at_kl(SLOW, 2.0, "gold") == pytest.approx(1.5)
    assert benchmark.at_kl(SLOW, 4.0, "gold") is None
    assert benchmark.seconds_to(FAST, 1.5) == pytest.approx(7.5)
    assert benchmark.seconds_to(SLOW, 2.5) is None


def test_goals_are_judged_against_rloo():
    rows = benchmark.summarise([run("rloo", SLOW, 10.0), run("vgf_sft", FAST, 2.5)])
    ours = next(row for row in rows if row["method"] == "vgf_sft")
    assert ours["step_time_ratio_to_rloo"] == 0.25
    # RLOO is at KL 2 after 60 s with gold 1.5, which ours has after 7.5 s.
    assert ours["time_ratio_to_rloo_gold_at_kl_2"] == pytest.approx(7.5 / 60)
    verdicts = benchmark.goals(rows)
    assert verdicts["highest gold at KL 1"] and verdicts["highest gold at KL 2"]
    assert verdicts["highest gold at KL 4"] is None  # RLOO never got there
    assert verdicts["RLOO's gold at KL 2 in a quarter of its time"] and verdicts["a step at most 1.25 times RLOO's"]
    slow = benchmark.goals(benchmark.summarise([run("rloo", SLOW, 1.0), run("vgf_sft", FAST, 2.5)]))
    assert not slow["a step at most 1.25 times RLOO's"]
    alone = benchmark.goals(benchmark.summarise([run("vgf_sft", FAST, 2.5)]))
    assert alone["a step at most 1.25 times RLOO's"] is None


def test_every_method_has_settings():
    assert set(benchmark.VGF) < set(benchmark.METHODS)
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
