"""`vgf evaluate`: one pool of particles per prompt, and what base, best-of-n, VGF and students make of it.

Everything is measured on the same prompts and seeds: the first N particles of the pool are those that VGF moves, so that its
budget 0 is best-of-N of the pool bit for bit, and differences are paired. Along a learned gradient (`flow_field`) VGF draws its
particles moved, with the noise of those N; the pool is the base model's there too. Every finished stage is kept in the output
directory under a hash of what it was made from, so a killed run goes on where it stopped; the report itself appears when it is
complete.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import vgf_llm
from vgf_llm.data.loading import load_splits
from vgf_llm.flow import TransportBudget, best_of_n_curve, best_of_n_kl
from vgf_llm.text import DifferentiableReward, VGFOutput, VGFSampler
from vgf_llm.text.sampler import Prompt
from vgf_llm.trainer.rewards import TextRewardModel

from .controls import random_direction
from .evaluation_config import EvaluationConfig
from .judge import Comparison, command_judge, endpoint_judge, judge
from .loading import check_model, load_language_model, load_reward, load_sampler
from .metrics import bootstrap_ci, distinct_n, judge_nll, length_slope, paired_bootstrap_ci, selection_kl, self_bleu
from .page import write_page
from .plots import plot_budget, plot_frontier, plot_generations, plot_overoptimisation, plot_wins
from .report import Row, markdown_table, write_atomically, write_report


# The true reward of answers: (prompts, answers as text) -> one number each.
Gold = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
Stage = dict[str, Any]
# Noise of the sample that stands for the base model as an opponent: never the pool's.
OPPONENT_SEED = 1_000_000


@dataclass
class Questions:
    """The prompts, and by name the answers they are compared with."""

    prompts: list[Prompt]
    ids: list[list[int]]
    opponents: dict[str, list[str]]
    left_out: int


def evaluate(config: EvaluationConfig, gold: Gold | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, judge and write `report.json`, `report.md`, `report.html` and figures to `config.output_dir`.

    Args:
        config: see `EvaluationConfig`.
        gold: the true reward as a function, where it is known; otherwise the gold reward model(s) of the configuration.
        say: takes a line about every stage.

    Returns:
        The report, as written. On other processes than the main one of a distributed run, an empty one.

    Raises:
        ValueError: a model, column or setting that does not work; says which.
        JudgeDown: the judge cannot be asked. Run the same again: nothing that is finished is repeated.
    """
    config.check_complete(gold is not None)
    state = PartialState()
    out, started = Path(config.output_dir), time.perf_counter()
    # What can fail fails before anything is sampled.
    for name in (config.judge_lm_name_or_path, *config.gold_reward_model_name_or_path, *config.students.values()):
        if name is not None:
            check_model(name)
    ask = None
    if config.judge_command:
        ask = command_judge(shlex.split(config.judge_command))
    elif config.judge_base_url:
        ask = endpoint_judge(config.judge_base_url, cast(str, config.judge_model))
    options: dict[str, Any] = {
        "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "movers": config.flow_movers,
        "horizon": None if config.flow_horizon < 0 else config.flow_horizon, "flow_batch_size": config.flow_batch_size,
        "gradient_field": config.flow_field,  # plays no part at budget 0: the pool and the opponent are the base model's
    }  # fmt: skip
    sampler = load_sampler(config.model_name_or_path, config.reward_model_name_or_path, **options)
    questions = _questions(config, sampler)
    if questions.left_out and state.is_main_process:
        say(f"{questions.left_out} prompts are too long and left out")
    run = _Run(config, sampler, questions, gold, out / "stages", state, say if state.is_main_process else lambda line: None)
    answers = {
        "pool": run.pool(),
        "opponent": run.opponent(),
        **{f"vgf {kl:g}": run.vgf(kl) for kl in config.flow_kl_budgets},
    }
    if config.random_control:
        answers |= {f"vgf_random {kl:g}": run.vgf(kl, control=True) for kl in config.flow_kl_budgets}
    answers |= {f"student {name}": run.student(name, path) for name, path in config.students.items()}
    answers["given"] = run.given()
    if not state.is_main_process:
        state.wait_for_everyone()
        return {}
    opponents = {**questions.opponents, "base": [row[0] for row in answers["opponent"]["completions"]]}
    weight = 0.0 if sampler.field is None else float(sampler.field.likelihood_weight)
    rows, curve = _rows(config, answers, opponents, weight)
    about_judge = None
    if ask is not None:
        wins, about_judge = _ask_judge(config, ask, questions, answers, opponents, out / "judge.jsonl", say)
        for row in rows:
            if _label(row) in wins:
                row["wins"]["judge"] = wins[_label(row)]
    report = {
        "title": config.title,
        "rows": rows,
        "curve": curve,
        "judge": about_judge,
        "examples": _examples(config, questions, answers),
        "prompts": len(questions.prompts),
        "prompts_left_out": questions.left_out,
        "config": asdict(config),
        "seconds": time.perf_counter() - started,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": str(sampler.model.device)},
        "versions": {
            "python": platform.python_version(), "vgf_llm": vgf_llm.__version__,
            "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip
    figures = []
    for name, plot in (
        ("frontier", plot_frontier), ("generations", plot_generations), ("wins", plot_wins),
        ("overoptimisation", plot_overoptimisation), ("budget", plot_budget),
    ):  # fmt: skip
        plot(rows, out / f"{name}.png")
        figures.append(out / f"{name}.png")
    write_atomically(out / "report.md", markdown_table(rows).encode())
    write_page(out / "report.html", report, figures)
    write_report(out / "report.json", report)  # last: where it is, all of it is
    say(f"wrote {out / 'report.html'}, with report.json, report.md and figures beside it")
    state.wait_for_everyone()
    return report


class _Run:
    """Stages of one evaluation, each computed by all processes on their share of the prompts, and kept."""

    def __init__(
        self,
        config: EvaluationConfig,
        sampler: VGFSampler,
        questions: Questions,
        gold: Gold | None,
        directory: Path,
        state: PartialState,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.sampler, self.questions = config, sampler, questions
        self.directory, self.state, self.say = directory, state, say
        tokenizer = sampler.processing_class
        self.gold = _gold_scorer(config, sampler) if gold is None else _as_scorer(gold)
        self.judge_lm = None if config.judge_lm_name_or_path is None else load_language_model(config.judge_lm_name_or_path)
        common = ("max_completion_length", "temperature", "top_k", "top_p", "seeds")
        self.common = {
            "version": vgf_llm.__version__,
            "prompts": questions.ids,
            "models": [_fingerprint(config.model_name_or_path), *map(_fingerprint, config.reward_model_name_or_path)],
            "gold": [gold.__qualname__ if gold is not None else "", *map(_fingerprint, config.gold_reward_model_name_or_path)],
            "judge_lm": _fingerprint(config.judge_lm_name_or_path) if config.judge_lm_name_or_path else None,
            **{name: getattr(config, name) for name in common},
        }
        self.tokenizer = tokenizer

    def pool(self) -> Stage:
        size = self.config.pool_size

        def sample(share: list[int], seed: int) -> Stage:
            particles = self._sample(self.sampler, share, size, TransportBudget(steps=0), seed).initial
            nll = (-particles.logprobs).tolist()
            return self._judged(share, particles.completions, particles.completion_ids, particles.rewards.tolist(), nll)

        return self._stage("pool", {"pool_size": size}, f"a pool of {size} samples per prompt", sample)

    def opponent(self) -> Stage:
        """One base sample per prompt with noise of its own, the base model as an opponent."""

        def sample(share: list[int], seed: int) -> Stage:
            one = self._sample(self.sampler, share, 1, TransportBudget(steps=0), OPPONENT_SEED + seed).initial
            nll = (-one.logprobs).tolist()
            return self._judged(share, one.completions, one.completion_ids, one.rewards.tolist(), nll)

        return self._stage("opponent", {}, "a base sample to compare with", sample)

    def vgf(self, kl_budget: float, control: bool = False) -> Stage:
        config, n = self.config, self.config.num_particles
        budget = config.budget(kl_budget)

        def sample(share: list[int], seed: int) -> Stage:
            started = time.perf_counter()
            output = self._sample(self.sampler, share, n, budget, seed, random_direction if control else None)
            seconds = (time.perf_counter() - started) / len(share)

            def selected(name: str) -> torch.Tensor:
                both = torch.cat([getattr(particles, name) for particles in (output.transported, output.initial)], 1)
                return both.gather(1, output.selected[:, None])[:, 0]

            stage = self._judged(
                share,
                [[text] for text in output.completions],
                [[ids] for ids in output.completion_ids],
                output.rewards[:, None].tolist(),
                (-selected("logprobs"))[:, None].tolist(),
            )
            # The log ratio of what was selected, not the mean KL of its path: selection prefers unlikely moves.
            stage["log_ratio"] = selected("log_ratio").tolist()
            stage["generations"] = output.generations.tolist()
            stage["seconds"] = [seconds] * len(share)
            if config.flow_field is None:
                stage["start"] = [output.initial.completions[b][k] for b, k in enumerate((output.selected % n).tolist())]
                # Mean over the moved particles before every step, of every round.
                stage["trace"] = torch.cat([t.values.mean(2) for t in output.trace]).T.tolist()
            else:  # drawn moved: no text stands before it, and no step
                stage["start"], stage["trace"] = list(output.completions), [[] for _ in share]
            return stage

        settings = {"budget": asdict(budget), "n": n, "horizon": config.flow_horizon, "movers": config.flow_movers}
        if config.flow_field is not None:  # else what was finished before there were fields stays finished
            settings["field"] = _fingerprint(config.flow_field)
        name = f"{'random' if control else 'vgf'}-{kl_budget:g}"
        said = f"{'random directions' if control else 'VGF'} at {kl_budget:g} nats per decode"
        return self._stage(name, settings, said, sample)

    def student(self, name: str, path: str) -> Stage:
        """N samples of a trained policy per prompt, all of them counted."""
        model: PreTrainedModel | None = None

        def sample(share: list[int], seed: int) -> Stage:
            nonlocal model
            if model is None:
                model, tokenizer = load_language_model(path)
                if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                    raise ValueError(f"student {path} has another vocabulary than the base model")
            options = {"temperature": self.config.temperature, "top_k": self.config.top_k, "top_p": self.config.top_p}
            batch = self.config.flow_batch_size
            sampler = VGFSampler(model, self.sampler.reward, self.tokenizer, flow_batch_size=batch, **cast(Any, options))
            n = self.config.num_particles
            particles = self._sample(sampler, share, n, TransportBudget(steps=0), seed).initial
            # KL is measured between the models at temperature 1, whatever they were sampled with.
            nll, own = (self._nll(which, share, particles.completion_ids) for which in (self.sampler.model, model))
            rewards = particles.rewards.tolist()
            stage = self._judged(share, particles.completions, particles.completion_ids, rewards, nll)
            stage["log_ratio"] = (np.array(nll) - np.array(own)).mean(1).tolist()
            return stage

        settings = {"student": _fingerprint(path), "n": self.config.num_particles}
        return self._stage(f"student-{name}", settings, f"student {name}", sample)

    def given(self) -> Stage:
        """Gold of the answers in the data, one per opponent and prompt."""

        def score(share: list[int], seed: int) -> Stage:
            stage: Stage = {"prompt": share}
            for name, answers in self.questions.opponents.items():
                prompts = [self.questions.prompts[i] for i in share]
                texts = [answers[i] for i in share]
                ids = [self._answer_ids(p, t) for p, t in zip(prompts, texts, strict=True)]
                stage[name] = self.gold(prompts, [self.questions.ids[i] for i in share], texts, ids)
            return stage

        settings = {"opponents": self.questions.opponents}
        return self._stage("given", settings, "answers of the data", score, seeds=self.config.seeds[:1])

    def _sample(
        self, sampler: VGFSampler, share: list[int], n: int, budget: TransportBudget, seed: int, direction: Any = None
    ) -> VGFOutput:
        prompts = [self.questions.prompts[i] for i in share]
        quiet = not self.state.is_main_process
        length = self.config.max_completion_length
        return sampler.sample(prompts, n, budget, length, seed, direction=direction, progress=not quiet)

    def _judged(
        self,
        share: list[int],
        completions: list[list[str]],
        ids: list[list[list[int]]],
        proxy: list[list[float]],
        nll: list[list[float]],
    ) -> Stage:
        """A stage from [P][M] completions of the prompts `share`: gold, likelihood and length."""
        width = len(completions[0])
        prompts = [self.questions.prompts[i] for i in share for _ in range(width)]
        prompt_ids = [self.questions.ids[i] for i in share for _ in range(width)]
        flat, flat_ids = [t for row in completions for t in row], [i for row in ids for i in row]
        gold = np.array(self.gold(prompts, prompt_ids, flat, flat_ids), dtype=np.float64).reshape(-1, width)
        stage: Stage = {
            "prompt": share, "completions": completions, "proxy": proxy, "gold": gold.tolist(), "nll_base": nll,
            "length": [[len(i) for i in row] for row in ids],
        }  # fmt: skip
        if self.judge_lm is not None:
            stage["nll_judge"] = self._judge_lm_nll(share, completions, ids)
        return stage

    def _nll(self, model: PreTrainedModel, share: list[int], ids: list[list[list[int]]]) -> list[list[float]]:
        prompts = [self.questions.ids[i] for i, row in zip(share, ids, strict=True) for _ in row]
        flat = [i for row in ids for i in row]
        return judge_nll(model, self.tokenizer, prompts, flat, self.config.flow_batch_size).view(len(ids), -1).tolist()

    def _judge_lm_nll(self, share: list[int], completions: list[list[str]], ids: list[list[list[int]]]) -> list[list[float]]:
        model, tokenizer = cast(Any, self.judge_lm)
        if tokenizer.get_vocab() == self.tokenizer.get_vocab():
            return self._nll(model, share, ids)
        # In the judge's own tokens; the prompt as the base model reads it, without its special tokens.
        prompts: list[Any] = [
            self.tokenizer.decode(self.questions.ids[i], skip_special_tokens=True)
            for i, row in zip(share, completions, strict=True)
            for _ in row
        ]
        ends = set(self.sampler.eos_ids.tolist())
        flat = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], *([tokenizer.eos_token_id] if row[-1] in ends else [])]
            for texts, rows in zip(completions, ids, strict=True)
            for text, row in zip(texts, rows, strict=True)
        ]
        nll = judge_nll(model, tokenizer, prompts, flat, self.config.flow_batch_size)
        return nll.view(len(completions), -1).tolist()

    def _answer_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """Tokens of a given answer as the base model would have said it: what follows the prompt, one end of sequence."""
        tokenizer, ends = self.tokenizer, set(self.sampler.eos_ids.tolist())
        if isinstance(prompt, str):
            ids = list(tokenizer(prompt + answer)["input_ids"])[len(tokenizer(prompt)["input_ids"]) :]
        else:
            whole = [*prompt, {"role": "assistant", "content": answer}]
            text = cast(str, tokenizer.apply_chat_template(whole, tokenize=False))
            opening = cast(str, tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
            said = text[len(opening) :] if text.startswith(opening) else answer
            ids = list(tokenizer(said, add_special_tokens=False)["input_ids"])
        end = next((index for index, token in enumerate(ids) if token in ends), None)
        return [*ids, cast(int, tokenizer.eos_token_id)] if end is None else ids[: end + 1]

    def _stage(
        self,
        name: str,
        settings: dict[str, Any],
        said: str,
        make: Callable[[list[int], int], Stage],
        seeds: Sequence[int] | None = None,
    ) -> Stage:
        """Columns over prompts and seeds, seeds outermost: computed, or read from a finished stage of the same settings."""
        digest = hashlib.sha256(json.dumps([self.common, settings], sort_keys=True, default=str).encode()).hexdigest()[:12]
        path = self.directory / f"{name.replace('/', '-')}-{digest}.json"
        found: list[Any] = [
            json.loads(path.read_text(encoding="utf-8")) if self.state.is_main_process and path.is_file() else None
        ]
        broadcast_object_list(found)
        if found[0] is not None:
            self.say(f"{said}: finished before")
            return cast(Stage, found[0])
        self.say(said)
        whole: Stage = {}
        for seed in self.config.seeds if seeds is None else seeds:
            everyone = list(range(len(self.questions.prompts)))
            share = everyone[self.state.process_index :: self.state.num_processes]
            parts = gather_object([make(share, seed) if share else None])
            for part in parts:
                for key, values in (part or {}).items():
                    whole.setdefault(key, []).extend(values)
            # In the order of the prompts, however they were shared out.
            first = len(whole["prompt"]) - len(everyone)
            order = sorted(range(first, len(whole["prompt"])), key=lambda i: whole["prompt"][i])
            whole = {key: values[:first] + [values[i] for i in order] for key, values in whole.items()}
        if self.state.is_main_process:
            write_report(path, whole)
        return whole


# (prompts, their ids, answers, their ids) -> gold reward of each.
_Scorer = Callable[[Sequence[Prompt], Sequence[list[int]], Sequence[str], Sequence[list[int]]], list[float]]


def _as_scorer(gold: Gold) -> _Scorer:
    return lambda prompts, prompt_ids, answers, ids: [float(value) for value in gold(prompts, answers)]


def _gold_scorer(config: EvaluationConfig, sampler: VGFSampler) -> _Scorer:
    """Gold reward models as a function: by tokens where they share the vocabulary, as texts otherwise."""
    names, tokenizer, device = config.gold_reward_model_name_or_path, sampler.processing_class, sampler.model.device
    theirs = AutoTokenizer.from_pretrained(names[0])
    batch = config.flow_batch_size
    if theirs.get_vocab() == tokenizer.get_vocab():
        reward: DifferentiableReward = load_reward(names, tokenizer).to(device)

        def by_ids(
            prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]], answers: Sequence[str], ids: Sequence[list[int]]
        ) -> list[float]:
            scores: list[float] = []
            for i in range(0, len(ids), batch):
                (read, seen), (said, mask) = (_pad(rows[i : i + batch], tokenizer, device) for rows in (prompt_ids, ids))
                scores += reward.score_ids(read, seen, said, mask).tolist()
            return scores

        return by_ids
    if len(names) > 1:
        raise ValueError("several gold reward models need the vocabulary of the base model: give one")
    model: Any = AutoModelForSequenceClassification.from_pretrained(names[0])
    if model.config.num_labels != 1:
        raise ValueError(f"gold reward model {names[0]} has num_labels={model.config.num_labels}: a reward needs 1")
    text_reward = TextRewardModel(model.to(device), theirs)
    # A reward model without a template of its own reads chats as the base model does.
    rendered = theirs.chat_template is None
    ends = set(sampler.eos_ids.tolist())

    def by_text(
        prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]], answers: Sequence[str], ids: Sequence[list[int]]
    ) -> list[float]:
        if rendered:
            prompts, answers = (
                [cast(str, tokenizer.decode(row, skip_special_tokens=True)) for row in rows] for rows in (prompt_ids, ids)
            )
        said: list[Any] = [
            a if isinstance(p, str) else [{"role": "assistant", "content": a.strip()}]
            for p, a in zip(prompts, answers, strict=True)
        ]
        ended, scores = [row[-1] in ends for row in ids], []
        for i in range(0, len(ids), batch):
            scores += text_reward(list(prompts[i : i + batch]), said[i : i + batch], ended[i : i + batch])
        return scores

    return by_text


def _pad(
    rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [cast(int, tokenizer.pad_token_id)] * (width - len(row)) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < torch.tensor([[len(row)] for row in rows], device=device)


def _questions(config: EvaluationConfig, sampler: VGFSampler) -> Questions:
    columns = ["prompt", *config.against]
    (data,) = load_splits(config.dataset_name, config.dataset_config, [config.dataset_split], columns, config.hh_transcripts)
    names = config.against or [name for name in ("reference", "chosen") if name in data.column_names]
    context = getattr(sampler.model.config, "max_position_embeddings", None) or sys.maxsize
    longest = context - config.max_completion_length
    if config.max_prompt_length is not None:
        longest = min(longest, config.max_prompt_length)
    prompts: list[Prompt] = []
    ids: list[list[int]] = []
    opponents: dict[str, list[str]] = {name: [] for name in names}
    left_out = 0
    for row in data:
        encoded = _encode(sampler.processing_class, row["prompt"])
        answers = {name: _text(row[name], name) for name in names}
        # A given answer has to fit as well, or a reward model could not read it; its template adds a few tokens.
        lengths = [len(sampler.processing_class(answer)["input_ids"]) + 8 for answer in answers.values()]
        if not encoded or len(encoded) > longest or len(encoded) + max(lengths, default=0) > context:
            left_out += 1
            continue
        prompts.append(row["prompt"])
        ids.append(encoded)
        for name, answer in answers.items():
            opponents[name].append(answer)
        if len(prompts) == config.max_prompts:
            break
    if not prompts:
        raise ValueError(
            f"none of the {left_out} prompts of {config.dataset_name} fits; see max_prompt_length and max_completion_length"
        )
    return Questions(prompts, ids, opponents, left_out)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """As `VGFSampler.encode`, of a prompt of any length."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(cast(Any, chat)["input_ids"])


def _text(answer: Any, column: str) -> str:
    match answer:
        case str():
            return answer
        case [*_, {"content": str(content)}]:
            return content
    raise ValueError(f"column {column} holds neither texts nor lists of chat messages")


def _fingerprint(name: str) -> Any:
    """Name, and of a directory its files with sizes and times: a model trained again is another one."""
    path = Path(name)
    if not path.is_dir():
        return name
    files = sorted(file for file in path.iterdir() if file.is_file())
    return [str(path.resolve()), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


# From answers to rows


def _by_prompt(values: Any, seeds: int) -> np.ndarray:
    """[S * P, ...] as [P, S, ...]: seeds of a prompt belong together."""
    array = np.asarray(values, dtype=np.float64)
    return np.moveaxis(array.reshape(seeds, -1, *array.shape[1:]), 0, 1)


def _rows(
    config: EvaluationConfig, answers: dict[str, Stage], opponents: dict[str, list[str]], likelihood_weight: float
) -> tuple[list[dict[str, Any]], Any]:
    """Rows of the report, and best-of-n for every n. With a weight, that of a gradient field, also best-of-n by its rule of
    selection, proxy and likelihood: what selects better is no merit of the field."""
    seeds, pool, size, n = len(config.seeds), answers["pool"], config.pool_size, config.num_particles
    columns = [name for name in ("gold", "proxy", "nll_base", "nll_judge", "length") if name in pool]
    slope = length_slope(pool["length"], pool["gold"])
    typical = float(np.mean(pool["length"]))
    gold_of = {name: np.tile(answers["given"][name], seeds) for name in opponents if name != "base"}
    gold_of["base"] = np.asarray(answers["opponent"]["gold"])[:, 0]

    def values(stage: Stage) -> dict[str, np.ndarray]:
        """Everything that is averaged, each [S * P, M]."""
        found: dict[str, np.ndarray] = {name: np.asarray(stage[name], dtype=np.float64) for name in columns}
        found["lc"] = found["gold"] - slope * (found["length"] - typical)
        for name, theirs in gold_of.items():
            gap = found["gold"] - theirs[:, None]
            found[f"tie {name}"] = (np.abs(gap) <= config.tie_margin).astype(float)
            found[f"win {name}"] = (gap > config.tie_margin) + 0.5 * found[f"tie {name}"]
        return found

    everything = values(pool)
    ns = list(range(1, size + 1))
    chosen_by = {"best_of_n": everything["proxy"]}
    if likelihood_weight:
        chosen_by["best_of_n_likelihood"] = everything["proxy"] - likelihood_weight * everything["nll_base"]
    # [S * P, n] of every quantity: unbiased best-of-n by each rule.
    by_rule = {
        method: {name: best_of_n_curve(torch.tensor(by), torch.tensor(v), ns).numpy() for name, v in everything.items()}
        for method, by in chosen_by.items()
    }
    curves = by_rule["best_of_n"]
    best = np.asarray(pool["proxy"])[:, :n].argmax(1)
    zero = {name: v[np.arange(len(best)), best] for name, v in everything.items()}
    zero_gold = _by_prompt(zero["gold"], seeds).mean(1)

    def row(method: str, measured: dict[str, np.ndarray], texts: list[str], **more: Any) -> dict[str, Any]:
        mean = {name: _by_prompt(v, seeds).mean(1) for name, v in measured.items()}  # [P]
        low, high = bootstrap_ci(mean["gold"])
        gain = paired_bootstrap_ci(mean["gold"], zero_gold)
        wins = {}
        for name in gold_of:
            rate = mean[f"win {name}"]
            ends = bootstrap_ci(rate)
            wins[name] = {"rate": float(rate.mean()), "low": ends[0], "high": ends[1], "ties": float(mean[f"tie {name}"].mean())}
        return {
            "task": config.title, "method": method, **more,
            "reward_proxy": float(mean["proxy"].mean()),
            "reward_gold": float(mean["gold"].mean()), "reward_gold_low": low, "reward_gold_high": high,
            "gain": float((mean["gold"] - zero_gold).mean()), "gain_low": gain[0], "gain_high": gain[1],
            "reward_gold_lc": float(mean["lc"].mean()),
            "length": float(mean["length"].mean()),
            "nll_base": float(mean["nll_base"].mean()),
            **({"nll_judge": float(mean["nll_judge"].mean())} if "nll_judge" in mean else {}),
            "distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2), "self_bleu": self_bleu(texts),
            "wins": {"gold": wins},
            "seeds": seeds,
        }  # fmt: skip

    rows = []
    for method, by in chosen_by.items():
        for k in sorted({1, *(2**i for i in range(1, 20) if 2**i <= size), n, size}):
            if k == 1 and method != "best_of_n":
                continue
            texts = [found[i] for found, i in zip(pool["completions"], by[:, :k].argmax(1).tolist(), strict=True)]
            more = {"num_particles": k, "generations": float(k), "steps": 0, "kl_nats": best_of_n_kl(k)}
            at = {name: curve[:, k - 1] for name, curve in by_rule[method].items()}
            rows.append(row("base" if k == 1 else method, at, texts, **more))
    texts = [found[i] for found, i in zip(pool["completions"], best.tolist(), strict=True)]
    more = {"num_particles": n, "generations": float(n), "steps": 0, "kl_budget": 0.0, "kl_nats": best_of_n_kl(n)}
    rows.append(row("vgf", zero, texts, **more))
    movers = n if config.flow_movers is None else min(config.flow_movers, n)
    # Beside the N plain ones every round moves some; along a field those drawn first are moved ones already.
    drawn_moved = config.flow_field is not None
    candidates = n + movers * (config.flow_rounds - 1 if drawn_moved else config.flow_rounds)
    for method in ("vgf", "vgf_random"):
        for kl in config.flow_kl_budgets:
            stage = answers.get(f"{method} {kl:g}")
            if stage is None:
                continue
            at = {name: v[:, 0] for name, v in values(stage).items()}
            more = {
                "num_particles": n, "generations": float(np.mean(stage["generations"])),
                "steps": 1 if drawn_moved else config.flow_steps,  # along a field there is no number of them
                "kl_budget": kl, "rounds": config.flow_rounds, "seconds_per_prompt": float(np.mean(stage["seconds"])),
                "kl_nats": selection_kl(_by_prompt(stage["log_ratio"], seeds).mean(1), candidates),
            }  # fmt: skip
            rows.append(row(method, at, [t[0] for t in stage["completions"]], **more))
    for name in config.students:
        stage = answers[f"student {name}"]
        at = {key: v.mean(1) for key, v in values(stage).items()}
        more = {"num_particles": 1, "generations": 1.0, "kl_nats": float(np.mean(stage["log_ratio"]))}
        rows.append(row(f"student: {name}", at, [t[0] for t in stage["completions"]], **more))
    curve = {
        "n": ns, "kl_nats": [best_of_n_kl(k) for k in ns], "length_slope": slope,
        "reward_gold": curves["gold"].mean(0).tolist(), "reward_proxy": curves["proxy"].mean(0).tolist(),
        "wins": {name: curves[f"win {name}"].mean(0).tolist() for name in gold_of},
    }  # fmt: skip
    return rows, curve


def _label(row: Row) -> str:
    """What a row is called among the judged answers."""
    return f"{row['method']} {row['kl_budget']:g}" if row.get("kl_budget") is not None else str(row["method"])


def _ask_judge(
    config: EvaluationConfig,
    ask: Callable[[str, str, str], str],
    questions: Questions,
    answers: dict[str, Stage],
    opponents: dict[str, list[str]],
    log: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Win rates by method and opponent, on the answers of the first seed, and what is to be said about the judge."""
    P, n = len(questions.prompts), config.num_particles
    texts = [p if isinstance(p, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in p) for p in questions.prompts]
    pool = answers["pool"]
    ours = {
        "base": [row[0] for row in pool["completions"][:P]],
        "vgf 0": [row[int(np.argmax(proxy[:n]))] for row, proxy in zip(pool["completions"][:P], pool["proxy"][:P], strict=True)],
    }
    for key, stage in answers.items():
        method, _, setting = key.partition(" ")
        if method in ("vgf", "vgf_random"):
            ours[key] = [row[0] for row in stage["completions"][:P]]
        elif method == "student":
            ours[f"student: {setting}"] = [row[0] for row in stage["completions"][:P]]
    name = config.judge_command or f"{config.judge_base_url} {config.judge_model}"
    labels = [(method, against) for method in ours for against in opponents]
    comparisons = [
        Comparison(p, a.strip(), b.strip())
        for method, against in labels
        for p, a, b in zip(texts, ours[method], opponents[against], strict=False)  # that of the base model has all seeds
    ]
    say(f"judge: {len(comparisons)} comparisons in both positions")
    verdicts = judge(comparisons, ask, log, name=name, retries=config.judge_retries, workers=config.judge_workers)
    found: dict[str, dict[str, Any]] = {}
    for index, (method, against) in enumerate(labels):
        found.setdefault(method, {})[against] = _judged(verdicts.scores[index * P : (index + 1) * P])
    return found, {
        "name": name, "comparisons": len(comparisons), "unanswered": verdicts.unanswered, "first_position": verdicts.first
    }  # fmt: skip


def _judged(scores: Sequence[float | None]) -> dict[str, Any]:
    answered = np.array([score for score in scores if score is not None])
    said: dict[str, Any] = {"unanswered": len(scores) - len(answered)}
    if len(answered):
        low, high = bootstrap_ci(answered)
        said |= {"rate": float(answered.mean()), "low": low, "high": high, "ties": float((answered == 0.5).mean())}
    return said


def _examples(config: EvaluationConfig, questions: Questions, answers: dict[str, Stage]) -> list[dict[str, Any]]:
    """The first prompts at the first seed, side by side."""
    pool, n = answers["pool"], config.num_particles
    shown = []
    for index, prompt in enumerate(questions.prompts[: config.examples]):

        def one(stage: Stage, k: int = 0, index: int = index) -> dict[str, Any]:
            return {"text": stage["completions"][index][k], "proxy": stage["proxy"][index][k], "gold": stage["gold"][index][k]}

        best = int(np.argmax(pool["proxy"][index][:n]))
        moved = [
            {
                "kl_budget": kl,
                **one(answers[f"vgf {kl:g}"]),
                "start": answers[f"vgf {kl:g}"]["start"][index],
                "trace": answers[f"vgf {kl:g}"]["trace"][index],
            }
            for kl in config.flow_kl_budgets
        ]
        shown.append(
            {
                "prompt": [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt,
                "given": {name: texts[index] for name, texts in questions.opponents.items()},
                "base": one(pool),
                "best_of_n": one(pool, best),
                "vgf": moved,
            }
        )
    return shown
