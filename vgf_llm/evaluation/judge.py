"""Pairwise judges: a command, or a model behind an OpenAI-compatible endpoint, asked in both positions, answers kept in a log.

A comparison is asked twice, with our answer first and with it second: judges prefer a position. Only what is said in both
counts as a win; a verdict that changes with the position is a tie (Zheng et al. 2023, arXiv 2306.05685).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm


Verdict = Literal["A", "B", "tie"]
# Asks once: (prompt, first answer, second answer) -> what the judge said.
Ask = Callable[[str, str, str], str]

QUESTION = """\
Two assistants answered the same request. Say which answer is better for the one who asked: more helpful, honest and harmless, \
and to the point. Length alone is no merit.

[Request]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

Say "A", "B" or "tie", one word and nothing else."""


class JudgeDown(OSError):
    """The judge cannot be asked. What it answered before is in the log, so the same call goes on where this one stopped."""


@dataclass(frozen=True)
class Comparison:
    """One answer of ours beside another one, to the same prompt."""

    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Verdicts:
    """What a judge said about C comparisons.

    Attributes:
        scores: [C] 1.0 where ours won in both positions, 0.0 where it lost in both, 0.5 for a tie or a verdict that changed with
            the position; None where the judge answered nonsense in one of them.
        first: share of the verdicts for the answer shown first, of those that were no tie; 0.5 of a judge without a
            preference for positions. None without any.
    """

    scores: list[float | None]
    first: float | None

    @property
    def unanswered(self) -> int:
        return sum(score is None for score in self.scores)


def command_judge(argv: Sequence[str], timeout: float = 120.0) -> Ask:
    """A judge that is a program. It reads one JSON object, `{"prompt", "a", "b"}`, and prints A, B or tie. There is no shell.

    Raises:
        ValueError: no such command.
        JudgeDown (when asked): it exits with an error, or takes longer than `timeout` seconds.
    """
    if not argv or shutil.which(argv[0]) is None:
        raise ValueError(f"judge_command: no program {argv[0] if argv else ''!r} that can be run")

    def ask(prompt: str, a: str, b: str) -> str:
        question = json.dumps({"prompt": prompt, "a": a, "b": b})
        try:
            done = subprocess.run(
                list(argv), input=question, capture_output=True, text=True, encoding="utf-8", timeout=timeout, check=False
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            raise JudgeDown(f"judge command {argv[0]}: {error}") from None
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise JudgeDown(f"judge command {argv[0]} exited with {done.returncode}" + (f": {said[-1]}" if said else ""))
        return done.stdout

    return ask


def endpoint_judge(base_url: str, model: str, timeout: float = 120.0) -> Ask:
    """A chat model behind an OpenAI-compatible endpoint. Its key is read from the environment variable `OPENAI_API_KEY`.

    Raises:
        ValueError: the package `openai` is not installed.
        JudgeDown (when asked): the endpoint cannot be reached or refuses, after the client's own retries.
    """
    try:
        import openai
    except ModuleNotFoundError:
        raise ValueError("a judge behind an endpoint needs the package openai: pip install 'vgf_llm[judge]'") from None
    import os

    # Servers without keys want one that is not empty.
    client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout)

    def ask(prompt: str, a: str, b: str) -> str:
        message = QUESTION.format(prompt=prompt, a=a, b=b)
        try:
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": message}], temperature=0.0, max_tokens=16
            )
        except openai.OpenAIError as error:
            raise JudgeDown(f"judge endpoint {base_url}: {error}") from None
        return (answer.choices[0].message.content or "") if answer.choices else ""

    return ask


def verdict(said: str) -> Verdict | None:
    """The one word of an answer, whatever stands around it in punctuation; None for anything else."""
    word = re.fullmatch(r"\W*(?:answer\W+)?(a|b|tie)\W*", said.strip(), flags=re.IGNORECASE)
    if word is None:
        return None
    named: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}
    return named[word[1].lower()]


def judge(
    comparisons: Sequence[Comparison],
    ask: Ask,
    log: str | Path,
    *,
    name: str,
    retries: int = 2,
    workers: int = 4,
    progress: bool = True,
) -> Verdicts:
    """Ask a judge about every comparison in both positions.

    Each question is asked once, ever: answers are appended to `log` one line at a time, and what is there already is not
    asked again. A last line that a killed run left incomplete is dropped. Equal answers are a tie without a question.

    Args:
        comparisons: what to judge.
        ask: `command_judge`, `endpoint_judge`, or any function that may be called from several threads.
        log: JSONL file, made if missing.
        name: of the judge: answers of another one in the same log are not taken for this one's.
        retries: how often a question is asked again after an answer that is none; then it counts as unanswered.
        workers: questions at once.
        progress: show a progress bar.

    Raises:
        JudgeDown: the judge cannot be asked; the message names the log.
        ValueError: a line of the log that no run of this has written.
    """
    path = Path(log)
    known = _read_log(path)
    questions = []
    for c in comparisons:
        if c.ours != c.theirs:
            questions += [(c.prompt, c.ours, c.theirs), (c.prompt, c.theirs, c.ours)]
    open_questions = [q for q in dict.fromkeys(questions) if _key(name, q) not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, stop = threading.Lock(), threading.Event()

    with path.open("a", encoding="utf-8") as file:

        def answer(question: tuple[str, str, str]) -> None:
            if stop.is_set():
                return
            said: list[str] = []
            found: Verdict | None = None
            while found is None and len(said) <= retries:
                said.append(ask(*question))
                found = verdict(said[-1])
            key = _key(name, question)
            record = {"key": key, "judge": name, "verdict": found, "said": said[-1][:200], "asked": len(said)}
            with lock:
                known[key] = found
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()

        with ThreadPoolExecutor(max_workers=workers) as pool:
            tasks = [pool.submit(answer, question) for question in open_questions]
            try:
                for task in tqdm(tasks, desc="judge", disable=not progress or not tasks):
                    task.result()
            except JudgeDown as error:
                stop.set()
                raise JudgeDown(f"{error}. What was answered is in {path}: run the same again to go on") from None
            except BaseException:
                stop.set()
                raise

    scores: list[float | None] = []
    firsts: list[bool] = []
    for c in comparisons:
        if c.ours == c.theirs:
            scores.append(0.5)
            continue
        one, two = (known[_key(name, q)] for q in ((c.prompt, c.ours, c.theirs), (c.prompt, c.theirs, c.ours)))
        firsts += [v == "A" for v in (one, two) if v in ("A", "B")]
        if one is None or two is None:
            scores.append(None)
        else:
            scores.append({("A", "B"): 1.0, ("B", "A"): 0.0}.get((one, two), 0.5))
    return Verdicts(scores, sum(firsts) / len(firsts) if firsts else None)


def _key(name: str, question: tuple[str, str, str]) -> str:
    return hashlib.sha256(json.dumps([name, QUESTION, *question]).encode()).hexdigest()


def _read_log(path: Path) -> dict[str, Verdict | None]:
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:  # a killed run: what follows must start on a line of its own
        with path.open("r+b") as file:
            file.truncate(len((whole + "\n").encode()) if whole else 0)
    known: dict[str, Verdict | None] = {}
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
        try:
            record: Any = json.loads(line)
            known[record["key"]] = record["verdict"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is no answer of a judge: move the file away to ask anew") from None
    return known
