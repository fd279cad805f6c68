"""Random input for what reads files that others wrote: HH transcripts, and the YAML of `vgf vgf`.

    python -m tests.fuzz transcripts --executions 1000000
    python -m tests.fuzz config --executions 2000

Whatever comes in, the answer is a result that holds what it promises, or a ValueError; anything else ends the run and shows the
input. Half of the inputs are mutations of well-formed ones, which get further than noise. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from vgf_llm.data.hh import parse_pair, parse_rows, parse_transcript


WHOLE = ["\n\nHuman: Hi.\n\nAssistant: Hello.", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"]
PIECES = [
    "\n\nHuman:", "\n\nAssistant:", "\n\nHuman: x", "\n\nAssistant: y", "\n", "\n\n", " ", "Human:", "Assistant", "\x00",
    "\u2028", "\r", "é", "\ud800", "𝔘", "\n\nhuman:", "\n\nHuman :", "a" * 50, "\t", "\\n\\nHuman: ", "\n\n\nAssistant:",
    "{", "<|eos|>",
]  # fmt: skip


def text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        whole = rng.choice(WHOLE)
        for _ in range(rng.randint(0, 3)):
            at = rng.randint(0, len(whole))
            whole = whole[:at] + rng.choice([*PIECES, ""]) + whole[at + rng.randint(0, 3) :]
        return whole
    return "".join(rng.choices(PIECES, k=rng.randint(0, 8)))


def transcripts(rng: random.Random) -> bool:
    """One input. Whether it was accepted."""
    chosen, rejected = text(rng), text(rng)
    try:
        messages = parse_transcript(chosen)
    except ValueError:
        messages = None
    if messages is not None:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2) and messages
        assert all(message["content"] and message["content"] == message["content"].strip() for message in messages)
        again = "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages)
        assert parse_transcript(again) == messages
    try:
        pair = parse_pair(chosen, rejected)
    except ValueError:
        pair = None
    if pair is not None:
        assert messages == pair["prompt"] + pair["chosen"] and pair["chosen"] != pair["rejected"]
    junk: list[Any] = [
        {"chosen": chosen, "rejected": rejected},
        {"chosen": chosen},
        [chosen],
        chosen,
        None,
        3,
        {"chosen": 1, "rejected": 2},
    ]
    rows = rng.choices(junk, k=rng.randint(0, 3))
    try:
        pairs = parse_rows((f"row {i}", row) for i, row in enumerate(rows))
    except ValueError as error:
        assert "no HH transcripts" in str(error)
    else:
        assert len(pairs.rows) + sum(map(len, pairs.malformed.values())) == len(rows)
        assert chosen not in pairs.report() or len(chosen.strip()) < 12  # reports quote nothing of the data
    return messages is not None


VALUES: list[Any] = [
    0, 1, -1, 2, 7, 10**30, 0.5, -0.5, float("nan"), float("inf"), True, False, None, "", "x", "1", "-3", "1e3", "nan",
    "sft", "dpo", "tilt", "advantage", "weighted", "policy", "reference", [], [1], [1, 2], ["x"], {}, {"a": 1}, "[1", "{", "\x00",
    "é" * 20, "--seed", "~",
]  # fmt: skip


class Config:
    """Random YAML files with random values of the fields of `VGFConfig`, through the parser of the recipe."""

    def __init__(self, folder: Path) -> None:
        from recipes.vgf import parse
        from vgf_llm import VGFConfig

        self.parse, self.path, self.output = parse, folder / "fuzz.yaml", str(folder / "out")
        # Ours: what transformers makes of values for fields of its own is for transformers to say.
        self.names = sorted(VGFConfig.__annotations__)

    def __call__(self, rng: random.Random) -> bool:
        fields: dict[str, Any] = {
            "model_name_or_path": "a",
            "reward_model_name_or_path": "b",
            "dataset_name": "c",
            "use_cpu": True,
        }
        for _ in range(rng.randint(0, 4)):
            fields[rng.choice(self.names)] = rng.choice(VALUES)
        if rng.random() < 0.05:
            fields[rng.choice(["nonsense", "", "é", "--x"])] = rng.choice(VALUES)
        content = yaml.safe_dump(fields, allow_unicode=True)
        if rng.random() < 0.1:
            at = rng.randint(0, len(content))
            content = content[:at] + rng.choice(["[", ":", "\t", "- ", "&a", "!!python/name:os.system", "\x00"]) + content[at:]
        self.path.write_text(content, encoding="utf-8", errors="replace")
        try:
            _, config, _ = self.parse(["--config", str(self.path), "--output_dir", self.output])
        except (ValueError, yaml.YAMLError, SystemExit):
            return False
        assert config.budget.steps >= 0 and config.rows_per_prompt >= 1 and config.prompts_per_phase >= 1
        json.loads(config.to_json_string())
        return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=("transcripts", "config"))
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        target = transcripts if args.target == "transcripts" else Config(Path(folder))
        started, accepted = time.monotonic(), 0
        stderr = sys.stderr
        for number in range(args.executions):
            rng = random.Random(f"{args.seed} {number}")
            state = rng.getstate()
            try:
                if args.target == "config":
                    sys.stderr = open(Path(folder) / "said", "w")  # noqa: SIM115  # argparse shows all options every time
                accepted += target(rng)
            except BaseException:
                sys.stderr = stderr
                print(f"input {number} of seed {args.seed} is not dealt with", file=sys.stderr)
                if args.target == "config":
                    print((Path(folder) / "fuzz.yaml").read_text(encoding="utf-8"), file=sys.stderr)
                else:
                    rng.setstate(state)
                    print(repr(text(rng)), repr(text(rng)), file=sys.stderr)
                raise
            finally:
                if sys.stderr is not stderr:
                    sys.stderr.close()
                    sys.stderr = stderr
    seconds = round(time.monotonic() - started)
    print(json.dumps({"target": args.target, "executions": args.executions, "accepted": accepted, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
