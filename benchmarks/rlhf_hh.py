"""The whole pipeline on real transcripts: Anthropic's HH-RLHF, with a model of a million parameters trained from scratch.

    python -m benchmarks.rlhf_hh --data DIR            under 20 minutes on two cores
    python -m benchmarks.rlhf_hh --data DIR --quick    shows that every stage runs, and measures nothing

`DIR` holds .jsonl or .jsonl.gz files of the published data.

Stages, each by its recipe: supervised training (`recipes/sft.py`), a proxy and a gold reward model on different dialogues
(`recipes/reward.py`), a policy fitted to VGF (`recipes/vgf.py`), evaluation (`recipes/evaluate.py`). What the recipes start
from in practice, a pretrained model, is trained here on whole transcripts first.

A model this small writes poor English, and a reward model this small is little better than chance on human preferences: the
point is that every stage works on real transcripts, and that the page says how well. Writes `report.html` and what belongs to
it to `--output-dir`, and with `--publish` the report as benchmarks/results/rlhf_hh.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.e2e_nlg import bpe_tokenizer
from recipes import evaluate, reward, sft, vgf
from vgf_llm.data.hh import Preference, load_hh
from vgf_llm.evaluation.loading import load_reward
from vgf_llm.evaluation.report import markdown_table, write_atomically, write_report
from vgf_llm.evaluation.training import train_language_model


ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "recipes" / "configs" / "hh" / "transcript.jinja"
CONTEXT = 320
TRAINING = [
    "--use_cpu", "true", "--bf16", "false", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true",
    "--logging_steps", "20", "--learning_rate", "5e-4", "--lr_scheduler_type", "cosine", "--warmup_steps", "10",
]  # fmt: skip
# Steps of pretraining, supervised training, each reward model and the policy; prompts and seeds of the evaluation.
SCALES: dict[str, dict[str, Any]] = {
    "full": {"pretrain": 250, "sft": 50, "reward": 70, "policy": 8, "prompts": 24, "seeds": [0, 1, 2], "pool": 16},
    "quick": {"pretrain": 2, "sft": 2, "reward": 2, "policy": 1, "prompts": 4, "seeds": [0], "pool": 4},
}


def transcript(pair: Preference, side: str) -> str:
    """One dialogue of a pair as the template writes it, without the end of sequence."""
    names = {"user": "Human", "assistant": "Assistant"}
    messages = [*pair["prompt"], *(pair["chosen"] if side == "chosen" else pair["rejected"])]
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


def write_split(folder: Path, rows: list[Preference]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def accuracy(model: Path, rows: list[Preference]) -> float:
    """How often the chosen answer scores higher than the rejected one."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    judge, right = load_reward([str(model)], tokenizer), 0
    for row in rows:
        opening = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        scores = []
        for side in (row["chosen"], row["rejected"]):
            whole = tokenizer.apply_chat_template([*row["prompt"], *side], return_dict=True)["input_ids"]
            prompt, answer = (torch.tensor([ids]) for ids in (opening, whole[len(opening) :]))
            every = torch.ones_like(prompt, dtype=torch.bool), torch.ones_like(answer, dtype=torch.bool)
            scores.append(judge.score_ids(prompt, every[0], answer, every[1]).item())
        right += scores[0] > scores[1]
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="file or directory of HH-RLHF transcripts")
    parser.add_argument("--output-dir", default=ROOT / "outputs" / "rlhf", type=Path)
    parser.add_argument("--quick", action="store_true", help="shows that every stage runs, and measures nothing")
    parser.add_argument("--publish", action="store_true", help="also write benchmarks/results/rlhf_hh.json and .md")
    args = parser.parse_args()
    out, scale, started = args.output_dir, SCALES["quick" if args.quick else "full"], time.perf_counter()
    seconds: dict[str, float] = {}

    def done(stage: str) -> None:
        seconds[stage] = time.perf_counter() - started - sum(seconds.values())
        print(f"{time.perf_counter() - started:6.0f} s  {stage}", flush=True)

    pairs = load_hh(args.data)
    print(pairs.report())
    tokenizer = bpe_tokenizer([transcript(p, "chosen") for p in pairs.rows], 2000)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    rows = [
        pair
        for pair in pairs.rows
        if max(len(tokenizer(transcript(pair, side))["input_ids"]) for side in ("chosen", "rejected")) < CONTEXT - 80
    ]
    random.Random(0).shuffle(rows)
    held_out, rest = rows[: len(rows) // 8], rows[len(rows) // 8 :]
    policy_rows, gold_rows = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    test, policy_data, gold_data = (
        str(write_split(out / "data" / name, part))
        for name, part in (("test", held_out), ("policy", policy_rows), ("gold", gold_rows))
    )
    print(f"{len(policy_rows)} pairs for the policy and its proxy, {len(gold_rows)} for gold, {len(held_out)} held out")
    done("data")

    base, judge_lm = out / "pretrained", out / "judge"
    texts = [("\n\nHuman:", transcript(p, "chosen").removeprefix("\n\nHuman: ")) for p in policy_rows]
    others = [("\n\nHuman:", transcript(p, "chosen").removeprefix("\n\nHuman: ")) for p in gold_rows]
    for path, examples, steps, seed in (
        (base, texts + others, scale["pretrain"], 0),
        (judge_lm, others, scale["pretrain"] // 2, 1),
    ):
        shutil.rmtree(path, ignore_errors=True)
        train_language_model(
            path, tokenizer, examples, hidden_size=128, layers=3, heads=4, context=CONTEXT, steps=steps,
            learning_rate=2e-3, matrix_learning_rate=5e-3, seed=seed, name=path.name, batch_size=16,
        )  # fmt: skip
        done(f"pretraining {path.name}")

    def train(recipe: Any, data: str, model: Path, output: Path, steps: int, *more: str) -> None:
        words = ["--model_name_or_path", str(model), "--dataset_name", data, "--output_dir", str(output), *TRAINING]
        words += ["--max_steps", str(steps)]
        recipe.main(*recipe.parse([*words, *more]))
        done(output.name)

    common = ["--max_length", str(CONTEXT), "--per_device_train_batch_size", "16", "--gradient_checkpointing", "false"]
    train(sft, policy_data, base, out / "sft", scale["sft"], *common, "--chat_template_path", str(TEMPLATE))
    for name, data, seed in (("proxy", policy_data, 0), ("gold", gold_data, 1)):
        aware = ["--flow_aware_model_name_or_path", str(out / "sft"), "--seed", str(seed)]
        train(reward, data, out / "sft", out / name, scale["reward"], *common, *aware)
    shown = {name: accuracy(out / name, held_out) for name in ("proxy", "gold")}
    print(f"pairs ordered as people did, of {len(held_out)} held out: {shown}")
    flow = ["--flow_steps", "3", "--max_completion_length", "40"]
    train(
        vgf, policy_data, out / "sft", out / "vgf", scale["policy"], *flow, "--reward_model_name_or_path", str(out / "proxy"),
        "--num_generations", "4", "--per_device_train_batch_size", "16", "--activation_checkpointing", "false",
    )  # fmt: skip
    evaluate.main(
        *evaluate.parse([
            "--model_name_or_path", str(out / "sft"), "--reward_model_name_or_path", str(out / "proxy"),
            "--gold_reward_model_name_or_path", str(out / "gold"), "--judge_lm_name_or_path", str(judge_lm),
            "--student_name_or_path", f"VGF={out / 'vgf'}", "--dataset_name", test, "--output_dir", str(out),
            "--max_prompts", str(scale["prompts"]), "--seeds", *map(str, scale["seeds"]), "--pool_size", str(scale["pool"]),
            "--num_particles", "4", "--max_prompt_length", "160", "--flow_kl_budgets", "1", "4", *flow,
            "--title", "Anthropic-HH, a small model from scratch",
        ])
    )  # fmt: skip
    done("evaluation")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    report |= {"accuracy": shown, "pairs": pairs.report(), "stages": seconds, "seconds": sum(seconds.values())}
    # Offensive text, and paths of this machine, do not belong into a repository.
    for key in ("examples", "config"):
        del report[key]
    report["settings"] = {"scale": scale, "max_completion_length": 40, "num_particles": 4, "flow_steps": 3}
    if args.publish:
        write_report(ROOT / "benchmarks" / "results" / "rlhf_hh.json", report)
        write_atomically(ROOT / "benchmarks" / "results" / "rlhf_hh.md", markdown_table(report["rows"]).encode())
    print(f"look at {out / 'report.html'}")


if __name__ == "__main__":
    main()
