"""`vgf evaluate` on tiny models: what is shared, what is compared, what is written, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests import tiny
from vgf_llm import TransportBudget, cli
from vgf_llm.evaluation import evaluate as module
from vgf_llm.evaluation.evaluate import evaluate
from vgf_llm.evaluation.evaluation_config import EvaluationConfig
from vgf_llm.evaluation.judge import JudgeDown
from vgf_llm.evaluation.loading import load_sampler
from vgf_llm.flow import best_of_n_curve, best_of_n_kl
from vgf_llm.text.field import GradientField, fit_field


PROMPTS = ["the food was", "a room", "staff were nice", "the staff"]


@pytest.fixture(scope="module")
def models(saved, tmp_path_factory):
    """A gold reward model of other weights and a student, beside those of `saved`."""
    root = tmp_path_factory.mktemp("evaluate")
    ours = tiny.tokenizer()
    for name, model in (
        ("gold", tiny.reward_model("llama", len(ours), seed=7, pad=ours.pad_token_id)),
        ("student", tiny.language_model("llama", len(ours), seed=3, eos=ours.eos_token_id, pad=ours.pad_token_id)),
    ):
        model.save_pretrained(root / name)
        ours.save_pretrained(root / name)
    return {**saved, "gold": root / "gold", "student": root / "student"}


@pytest.fixture
def config(models, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": p, "reference": " good food", "chosen": " fine and good"} for p in PROMPTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(**fields):
        return EvaluationConfig(
            **{
                "model_name_or_path": str(models["lm"]),
                "reward_model_name_or_path": [str(models["reward"])],
                "gold_reward_model_name_or_path": [str(models["gold"])],
                "judge_lm_name_or_path": str(models["student"]),
                "dataset_name": str(data),
                "output_dir": str(tmp_path / "out"),
                "pool_size": 6,
                "num_particles": 3,
                "max_completion_length": 8,
                "flow_kl_budgets": [1.0, 8.0],
                "flow_steps": 2,
                "seeds": [0, 1],
                **fields,
            }
        )

    return make


def quiet(line):
    pass


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """One full evaluation, with students and a judge; its folder and report."""
    root = tmp_path_factory.mktemp("whole")
    rows = [{"prompt": p, "reference": " good food", "chosen": " fine <b>and</b> good"} for p in PROMPTS]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    program = "import json, sys; d = json.load(sys.stdin); print('A' if len(d['a']) > len(d['b']) else 'B')"
    config = EvaluationConfig(
        model_name_or_path=str(models["lm"]),
        reward_model_name_or_path=[str(models["reward"])],
        gold_reward_model_name_or_path=[str(models["gold"])],
        judge_lm_name_or_path=str(models["student"]),
        student_name_or_path=[f"same={models['lm']}", f"other={models['student']}"],
        dataset_name=str(root / "data.jsonl"), output_dir=str(root / "out"), pool_size=6, num_particles=3,
        max_completion_length=8, flow_kl_budgets=[1.0, 8.0], flow_steps=2, seeds=[0, 1], title="<script>alert(1)</script>",
        judge_command=f"{sys.executable} -c \"{program}\"",
    )  # fmt: skip
    return root / "out", evaluate(config, say=quiet)


def row_of(report, method, **fields):
    (row,) = [r for r in report["rows"] if r["method"] == method and all(r.get(k) == v for k, v in fields.items())]
    return row


def test_what_is_written_is_whole(whole):
    folder, report = whole
    names = {path.name for path in folder.iterdir()}
    figures = {f"{name}.png" for name in ("frontier", "generations", "wins", "overoptimisation", "budget")}
    assert names == {"report.json", "report.md", "report.html", "judge.jsonl", "stages", *figures}
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert "| VGF |" in (folder / "report.md").read_text(encoding="utf-8")


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(whole):
    folder, _ = whole
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "fine &lt;b&gt;and&lt;/b&gt; good" in page
    assert not [word for word in ("http://", "https://", "<link", "@import", 'src="/', "url(") if word in page]
    assert page.count("data:image/png;base64,") == 5


def test_the_sampler_gives_the_same_completions(whole, models):
    folder, report = whole
    sampler = load_sampler(str(models["lm"]), [str(models["reward"])])
    out = sampler.sample(PROMPTS, 3, TransportBudget(steps=2, kl_budget=8.0), 8, seed=0)
    shown = [example["vgf"][1]["text"] for example in report["examples"]]
    assert shown == out.completions
    # L = 0 is best-of-3 of the particles that VGF starts from, and those are the first of the pool.
    assert [e["best_of_n"]["text"] for e in report["examples"]] == sampler.sample(
        PROMPTS, 3, TransportBudget(steps=0), 8
    ).completions
    pool = json.loads(next((folder / "stages").glob("pool-*.json")).read_text(encoding="utf-8"))
    assert [row[:3] for row in pool["completions"][:4]] == out.initial.completions


def test_best_of_n_is_the_unbiased_estimate_of_the_pool(whole):
    folder, report = whole
    pool = json.loads(next((folder / "stages").glob("pool-*.json")).read_text(encoding="utf-8"))
    proxy, gold = torch.tensor(pool["proxy"]), torch.tensor(pool["gold"])
    assert report["curve"]["n"] == [1, 2, 3, 4, 5, 6]
    expected = best_of_n_curve(proxy, gold, range(1, 7)).mean(0)
    assert report["curve"]["reward_gold"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert row_of(report, "base")["reward_gold"] == pytest.approx(float(gold.mean()), abs=1e-5)
    assert row_of(report, "best_of_n", num_particles=6)["reward_proxy"] == pytest.approx(float(proxy.amax(1).mean()), abs=1e-5)
    zero = row_of(report, "vgf", kl_budget=0.0)
    assert zero["reward_proxy"] == pytest.approx(float(proxy[:, :3].amax(1).mean()), abs=1e-5)
    assert zero["gain"] == zero["gain_low"] == zero["gain_high"] == 0.0


def test_rows_hold_what_the_method_promises(whole):
    _, report = whole
    zero = row_of(report, "vgf", kl_budget=0.0)
    for kl in (1.0, 8.0):
        for method in ("vgf", "vgf_random"):
            row = row_of(report, method, kl_budget=kl)
            assert row["reward_proxy"] >= zero["reward_proxy"]
            assert row["generations"] >= 3
    same, other = row_of(report, "student: same"), row_of(report, "student: other")
    assert same["kl_nats"] == pytest.approx(0.0, abs=1e-4)
    assert other["kl_nats"] > 1
    for row in report["rows"]:
        assert set(row["wins"]["gold"]) == {"reference", "chosen", "base"}
        for found in row["wins"]["gold"].values():
            assert 0 <= found["low"] <= found["rate"] <= found["high"] <= 1
            assert found["ties"] <= 2 * min(found["rate"], 1 - found["rate"]) + 1e-9  # a tie is half a win
    judged = [row["method"] for row in report["rows"] if "judge" in row["wins"]]
    assert judged == ["base", "vgf", "vgf", "vgf", "vgf_random", "vgf_random", "student: same", "student: other"]
    assert report["judge"]["comparisons"] == 8 * 3 * 4 and report["judge"]["unanswered"] == 0


def test_a_given_answer_wins_and_loses_by_gold(config, monkeypatch):
    """A gold reward that is known: the number of times a text says good."""

    def gold(prompts, answers):
        return [float(answer.split().count("good")) for answer in answers]

    report = evaluate(config(judge_lm_name_or_path=None, gold_reward_model_name_or_path=[], random_control=False), gold, quiet)
    folder = next((module.Path(report["config"]["output_dir"]) / "stages").glob("pool-*.json"))
    pool = json.loads(folder.read_text(encoding="utf-8"))
    counts = np.array([[text.split().count("good") for text in row] for row in pool["completions"]])
    base = row_of(report, "base")
    assert base["reward_gold"] == pytest.approx(counts.mean())
    for name in ("reference", "chosen"):  # each says good once
        wins = base["wins"]["gold"][name]
        assert wins["rate"] == pytest.approx((counts > 1).mean() + 0.5 * (counts == 1).mean())
        assert wins["ties"] == pytest.approx((counts == 1).mean())
    assert "nll_judge" not in base


def test_a_killed_run_goes_on_and_a_new_setting_starts_anew(config, monkeypatch):
    said = []

    def killed(self, kl_budget, control=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "vgf", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(), say=quiet)
    out = module.Path(config().output_dir)
    assert {path.name for path in out.iterdir()} == {"stages"}  # no report of a part
    first = evaluate(config(), say=said.append)
    assert "a pool of 6 samples per prompt: finished before" in said
    assert "VGF at 1 nats per decode" in said
    said.clear()
    again = evaluate(config(), say=said.append)
    assert again["rows"] == first["rows"]
    assert all("finished before" in line for line in said[:-1])
    said.clear()
    evaluate(config(max_completion_length=7), say=said.append)
    assert not [line for line in said if "finished before" in line]


@pytest.fixture(scope="module")
def fields(models, tmp_path_factory):
    """Folders of two learned gradients of the reward, of different samples."""
    root = tmp_path_factory.mktemp("fields")
    sampler = load_sampler(str(models["lm"]), [str(models["reward"])])
    for seed in (0, 1):
        settings = {"num_samples": 32, "max_completion_length": 8, "epochs": 4, "batch_size": 32, "learning_rate": 3e-3}
        fit_field(sampler, PROMPTS, seed=seed, **settings).save_pretrained(root / str(seed))
    return root / "0", root / "1"


def test_along_a_field_moved_particles_are_compared_with_plain_ones(config, fields, models, tmp_path):
    """Pool, L = 0 and best-of-n are those of an evaluation without a field; VGF is what the sampler gives along it."""
    few = {"flow_rounds": 3, "flow_movers": 2, "flow_kl_budgets": [1.0, 4.0]}
    along = config(**few, flow_field=str(fields[0]), student_name_or_path=[f"other={models['student']}"])
    report, plain = evaluate(along, say=quiet), evaluate(config(**few, output_dir=str(tmp_path / "plain")), say=quiet)
    assert report["curve"] == plain["curve"]
    still = [[row for row in r["rows"] if row["method"] in ("base", "best_of_n") or row.get("kl_budget") == 0]
             for r in (report, plain)]  # fmt: skip
    assert still[0] == still[1] and len(still[0]) == 6
    # Best-of-n by the rule that selects along a field stands beside it: of the whole pool it is the best by both.
    weight = float(GradientField.from_pretrained(fields[0]).likelihood_weight)
    sizes = [row["num_particles"] for row in report["rows"] if row["method"] == "best_of_n_likelihood"]
    assert weight > 0 and sizes == [row["num_particles"] for row in report["rows"] if row["method"] == "best_of_n"]
    assert not [row for row in plain["rows"] if row["method"] == "best_of_n_likelihood"]
    drawn = [load_sampler(str(models["lm"]), [str(models["reward"])]).sample(PROMPTS, 6, TransportBudget(steps=0), 8, seed=seed)
             for seed in (0, 1)]  # fmt: skip
    rewards, logprobs = (torch.cat([getattr(out.initial, name) for out in drawn]) for name in ("rewards", "logprobs"))
    best = (rewards + weight * logprobs).argmax(1)[:, None]
    row = row_of(report, "best_of_n_likelihood", num_particles=6)
    assert row["reward_proxy"] == pytest.approx(float(rewards.gather(1, best).mean()), abs=1e-5)
    assert row["nll_base"] == pytest.approx(-float(logprobs.gather(1, best).mean()), abs=1e-4)
    sampler = load_sampler(str(models["lm"]), [str(models["reward"])], gradient_field=fields[0], movers=2)
    zero = row_of(report, "vgf", kl_budget=0.0)
    for index, kl in enumerate((1.0, 4.0)):
        row = row_of(report, "vgf", kl_budget=kl)
        budget = TransportBudget(steps=2, kl_budget=kl, rounds=3)
        out = [sampler.sample(PROMPTS, 3, budget, 8, seed=seed) for seed in (0, 1)]
        assert [example["vgf"][index]["text"] for example in report["examples"]] == out[0].completions
        assert row["reward_proxy"] == pytest.approx(float(torch.cat([o.rewards for o in out]).mean()), abs=1e-5)
        assert row["gain"] == pytest.approx(row["reward_gold"] - zero["reward_gold"], abs=1e-5)
        # Three were drawn moved and twice two more; the log ratio of the selected one is counted even if it was drawn first.
        ratio = [torch.cat([o.transported.log_ratio, o.initial.log_ratio], 1).gather(1, o.selected[:, None]) for o in out]
        assert row["kl_nats"] == pytest.approx(float(torch.cat(ratio).mean()) + best_of_n_kl(7), abs=1e-5)
        assert 3 < row["generations"] and row["steps"] == 1
    assert row_of(report, "vgf", kl_budget=4.0)["reward_proxy"] > row_of(report, "vgf_random", kl_budget=4.0)["reward_proxy"]
    # A student has no field: as it is without one.
    alone = config(flow_kl_budgets=[], student_name_or_path=[f"other={models['student']}"], output_dir=str(tmp_path / "alone"))
    assert row_of(report, "student: other") == row_of(evaluate(alone, say=quiet), "student: other")
    page = (module.Path(along.output_dir) / "report.html").read_text(encoding="utf-8")
    # No text stood before an answer, and no step: no word is marked, and the page says why.
    assert "<ins>" not in page and "drawn along a learned gradient" in page and 'aria-label="reward per step"' not in page


def test_a_run_that_was_cut_goes_on_with_its_own_field_alone(config, fields):
    small = {"flow_kl_budgets": [4.0], "random_control": False, "seeds": [0]}
    reports, said = {}, {}
    for name, field in (("none", None), ("first", fields[0]), ("second", fields[1]), ("again", fields[0])):
        said[name] = []
        reports[name] = evaluate(config(**small, flow_field=field and str(field)), say=said[name].append)
    finished = "VGF at 4 nats per decode: finished before"
    assert [finished in said[name] for name in said] == [False, False, False, True]
    assert all("a pool of 6 samples per prompt: finished before" in said[name] for name in ("first", "second"))
    texts = {name: [e["vgf"][0]["text"] for e in reports[name]["examples"]] for name in reports}
    assert texts["none"] != texts["first"] != texts["second"] and texts["again"] == texts["first"]


def test_a_field_of_another_reward_or_vocabulary(config, fields, models, tmp_path, monkeypatch):
    monkeypatch.setattr(module._Run, "_sample", lambda *args: pytest.fail("sampled"))
    with pytest.raises(OSError, match="gold holds no field.safetensors"):
        evaluate(config(flow_field=str(models["gold"])), say=quiet)
    GradientField(tiny.language_model("llama", 24).base_model, 5).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="gradient_field gives gradients of 5 numbers"):
        evaluate(config(flow_field=str(tmp_path / "wide")), say=quiet)
    GradientField(tiny.language_model("llama", 9).base_model, 16).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match="gradient_field reads 9 tokens, but the tokenizer has .*another base model"):
        evaluate(config(flow_field=str(tmp_path / "few")), say=quiet)


def test_a_model_trained_again_is_another_one(config, models, tmp_path):
    gold = tmp_path / "gold"
    shutil.copytree(models["gold"], gold)
    fields = {"gold_reward_model_name_or_path": [str(gold)], "flow_kl_budgets": [], "random_control": False}
    first = evaluate(config(**fields), say=quiet)
    ours = tiny.tokenizer()
    tiny.reward_model("llama", len(ours), seed=11, pad=ours.pad_token_id).save_pretrained(gold)
    assert evaluate(config(**fields), say=quiet)["rows"] != first["rows"]


def test_batches_change_nothing(config, tmp_path):
    reports = [
        evaluate(config(flow_batch_size=size, output_dir=str(tmp_path / str(size)), flow_kl_budgets=[2.0]), say=quiet)
        for size in (4, 64)
    ]
    for a, b in zip(*(report["rows"] for report in reports), strict=True):
        for name in ("reward_gold", "reward_proxy", "nll_base", "nll_judge", "length"):
            assert a[name] == pytest.approx(b[name], abs=1e-4)


def test_processes_share_out_the_prompts_and_change_nothing(config, tmp_path):
    """Two real processes, three seeds of four prompts: the rows of one process."""
    one = evaluate(config(flow_kl_budgets=[2.0], seeds=[0, 1, 2]), say=quiet)
    options = {**one["config"], "output_dir": str(tmp_path / "two")}
    words = []
    for name in ("model_name_or_path", "judge_lm_name_or_path", "dataset_name", "output_dir", "pool_size", "num_particles",
                 "max_completion_length", "flow_steps"):  # fmt: skip
        words += [f"--{name}", str(options[name])]
    for name in ("reward_model_name_or_path", "gold_reward_model_name_or_path", "flow_kl_budgets", "seeds"):
        words += [f"--{name}", *map(str, options[name])]
    launch = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "recipes/evaluate.py", *words]
    root = module.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two" / "report.json").read_text(encoding="utf-8"))
    for a, b in zip(one["rows"], two["rows"], strict=True):
        for name in ("reward_gold", "reward_gold_low", "reward_proxy", "nll_base", "nll_judge", "length", "gain_high"):
            assert a[name] == pytest.approx(b[name], abs=1e-5)


def test_a_judge_that_is_down_loses_nothing(config):
    broken = config(judge_command=f"{sys.executable} -c 'import sys; sys.exit(3)'", random_control=False)
    with pytest.raises(JudgeDown, match="exited with 3.*run the same again"):
        evaluate(broken, say=quiet)
    assert not (module.Path(broken.output_dir) / "report.json").exists()


def test_other_vocabularies_read_texts(config, models, tmp_path):
    """Gold and judge with tokenizers of their own see the same words."""
    other = AutoTokenizer.from_pretrained(models["other_reward"])
    lm = tiny.language_model("llama", len(other), seed=3, eos=other.eos_token_id, pad=other.pad_token_id)
    lm.save_pretrained(tmp_path / "lm")
    other.save_pretrained(tmp_path / "lm")
    fields = {"gold_reward_model_name_or_path": [str(models["other_reward"])], "judge_lm_name_or_path": str(tmp_path / "lm")}
    report = evaluate(config(**fields, flow_kl_budgets=[], random_control=False), say=quiet)
    assert np.isfinite([row_of(report, "base")[name] for name in ("reward_gold", "nll_judge")]).all()


def test_chats_and_their_answers(models, tmp_path):
    """Prompts as messages, answers as messages: a given answer is read where a completion would stand."""
    ours = tiny.tokenizer(chat=True)
    for name in ("lm", "reward", "gold"):
        shutil.copytree(models[name], tmp_path / name)
        ours.save_pretrained(tmp_path / name)
    chat = [{"role": "user", "content": "the food"}]
    rows = [{"prompt": chat, "chosen": [{"role": "assistant", "content": "good"}]}] * 2
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = evaluate(
        EvaluationConfig(
            model_name_or_path=str(tmp_path / "lm"), reward_model_name_or_path=[str(tmp_path / "reward")],
            gold_reward_model_name_or_path=[str(tmp_path / "gold")], dataset_name=str(tmp_path / "data.jsonl"),
            output_dir=str(tmp_path / "out"), pool_size=2, num_particles=2, max_completion_length=6, flow_kl_budgets=[],
        ),
        say=quiet,
    )  # fmt: skip
    given = json.loads(next((tmp_path / "out" / "stages").glob("given-*.json")).read_text(encoding="utf-8"))
    gold = load_sampler(str(tmp_path / "lm"), [str(tmp_path / "gold")]).reward
    prompt = torch.tensor([ours("user the food assistant")["input_ids"]])
    answer = torch.tensor([ours("good <eos>")["input_ids"]])
    expected = gold.score_ids(prompt, prompt > -1, answer, answer > -1).item()
    assert given["chosen"][0] == pytest.approx(expected, abs=1e-5)
    assert report["examples"][0]["given"] == {"chosen": "good"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_particles": 9}, "pool_size must be at least 9"),
        ({"flow_kl_budgets": [0.0]}, "flow_kl_budgets must be positive"),
        ({"flow_kl_budgets": [1.0, 1.0]}, "different"),
        ({"seeds": []}, "seeds"),
        ({"judge_base_url": "http://127.0.0.1:1/v1"}, "judge_base_url and judge_model"),
        ({"judge_command": "cat", "judge_base_url": "x", "judge_model": "y"}, "not both"),
        ({"student_name_or_path": ["a/x", "b/x"]}, "same name"),
        ({"tie_margin": -1.0}, "tie_margin"),
    ],
)
def test_settings_that_contradict(config, fields, says):
    with pytest.raises(ValueError, match=says):
        config(**fields)


def test_the_proxy_cannot_be_gold(config, models):
    with pytest.raises(ValueError, match="is proxy and gold"):
        config(gold_reward_model_name_or_path=[str(models["reward"])])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dataset_name": ""}, "give --dataset_name"),
        ({"gold_reward_model_name_or_path": []}, "give --gold_reward_model_name_or_path"),
        ({"gold_reward_model_name_or_path": ["/no/such/gold"]}, "cannot load /no/such/gold"),
        ({"student_name_or_path": ["/no/such/student"]}, "cannot load /no/such/student"),
        ({"against": ["preferred"]}, "lacks the column.*preferred"),
        ({"max_prompt_length": 1}, "none of the 4 prompts"),
        ({"judge_command": "no-such-program -x"}, "no program 'no-such-program'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_sampled(config, monkeypatch, fields, says):
    monkeypatch.setattr(module._Run, "_sample", lambda *args: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=says):
        evaluate(config(**fields), say=quiet)


def test_an_empty_file(config, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        evaluate(config(dataset_name=str(tmp_path / "empty.jsonl")), say=quiet)


def test_a_student_of_another_vocabulary(config, models, tmp_path):
    other = AutoTokenizer.from_pretrained(models["other_reward"])
    shutil.copytree(models["lm"], tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another vocabulary than the base model"):
        evaluate(config(student_name_or_path=[str(tmp_path / "other")], flow_kl_budgets=[], random_control=False), say=quiet)


def test_the_command(config, tmp_path, capsys):
    fields = config(flow_kl_budgets=[2.0], random_control=False)
    yaml = tmp_path / "evaluate.yaml"
    names = ("model_name_or_path", "reward_model_name_or_path", "gold_reward_model_name_or_path", "dataset_name", "output_dir")
    yaml.write_text("".join(f"{name}: {json.dumps(getattr(fields, name))}\n" for name in names), encoding="utf-8")
    words = ["--pool_size", "2", "--num_particles", "2", "--max_completion_length", "4", "--flow_kl_budgets", "2"]
    assert cli.main(["evaluate", "--config", str(yaml), *words]) == 0
    assert "report.html" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["config"]["pool_size"] == 2
    assert cli.main(["evaluate", "--config", str(yaml), "--pool_size", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vgf: error: pool_size must be at least")
