"""The command `vgf`. Thin: every command is a function of this module, and the work is done elsewhere.

    vgf demo                                                 the whole method on the embedded data, on a CPU
    vgf sft|reward|vgf|diagnose|evaluate --config FILE        the recipes, with options that win over the file
    vgf sample --model DIR --reward-model DIR --prompts FILE  best transported completion of every prompt
    vgf field --model DIR --reward-model DIR --prompts FILE --output DIR
                                                             a learned gradient, for --gradient-field of sample and serve
    vgf control train|eval|generate                          continuous control on the same flow
    vgf serve --model DIR --reward-model DIR                  the same over HTTP, as OpenAI's API

Libraries are imported inside the commands, so that `vgf --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from vgf_llm import __version__
from vgf_llm.control.commands import add_control_command


RECIPES = {
    "sft": "supervised fine-tuning: the base model",
    "reward": "a reward model from preference pairs",
    "vgf": "fit a policy to transported completions",
    "diagnose": "whether a reward model's gradient is worth following",
    "evaluate": "base, best-of-n, VGF and policies under a gold reward model, as one page",
}

if TYPE_CHECKING:
    from vgf_llm.text import VGFSampler
    from vgf_llm.text.field import Comparison
    from vgf_llm.text.sampler import Prompt


def demo(output_dir: str | Path = "outputs/demo", scale: str = "default") -> dict[str, Any]:
    """Train the small models of the embedded data set, measure the method beside its baselines, write the report.

    Args:
        output_dir: where models, report and figures go.
        scale: "default" takes minutes on two cores; "full" is what the documentation reports; "quick" shows that everything
            runs, and is no measurement.
    """
    from vgf_llm.evaluation.demo import run_demo

    return run_demo(Path(output_dir), scale)


def recipe(name: str, argv: Sequence[str]) -> None:
    """Run a recipe on its options, `--config FILE` among them.

    Raises:
        ValueError, OSError: those of the recipe's `parse` and `main`.
    """
    script = import_module(f"vgf_llm.recipes.{name}")
    _check_yaml(argv)
    said = io.StringIO()
    try:
        with redirect_stderr(said):  # argparse shows hundreds of options before it comes to the point
            options = script.parse(list(argv))
    except SystemExit as exit:
        if exit.code != 2:
            raise
        raise ValueError(f"{said.getvalue().strip().rpartition('error: ')[2]} (see `vgf {name} --help`)") from None
    except (TypeError, OverflowError) as error:  # a list or infinity where a number is wanted, in a field of transformers' own
        raise ValueError(f"a key or value in the configuration is not of the kind of its option: {error}") from error
    sys.stderr.write(said.getvalue())  # warnings
    script.main(*options)


def _check_yaml(argv: Sequence[str]) -> None:
    """Raises ValueError, naming the file of `--config`, where it is none, cannot be read as YAML, or has keys of another kind."""
    import yaml

    if "--config" not in argv:
        return
    after = argv[argv.index("--config") + 1 :]
    if not after:
        raise ValueError("--config needs a file: a YAML mapping of options")
    try:
        said = yaml.safe_load(Path(after[0]).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{after[0]} cannot be read as YAML: {error}") from None
    if strange := [key for key in said if not isinstance(key, str)] if isinstance(said, dict) else []:
        raise ValueError(f"{after[0]} has the key {strange[0]!r}, which is no string: keys are names of options")


def sample(sampler: VGFSampler, prompts: Sequence[Prompt], *, num_particles: int = 8, **options: Any) -> Iterator[dict[str, Any]]:
    """The selected completion of every prompt, with what it earned and what it cost, each as soon as it is final.

    Args:
        sampler: e.g. of `vgf_llm.evaluation.loading.load_sampler`.
        prompts: as in `VGFSampler.sample`.
        num_particles: N.
        options: `budget`, `max_completion_length` and `seed` of `VGFSampler.sample`.

    Yields:
        One record per prompt: `prompt`, `completion`, `reward`, `reward_initial_best` (that of the best particle as drawn: what
        best-of-N earns, unless a gradient field had moved it already; along one likelihood counts too, so that `reward` may be
        lower), `kl` (nats spent by the tilts of the selected completion) and `generations` (completions decoded,
        `VGFOutput.generations`).

    Raises:
        ValueError: those of `VGFSampler.sample`, before anything is sampled where a prompt is to blame.
    """
    import torch

    sampler.encode(prompts, options.get("max_completion_length", 64))
    per_call = max(1, sampler.flow_batch_size // max(1, num_particles))
    for first in range(0, len(prompts), per_call):
        some = prompts[first : first + per_call]
        output = sampler.sample(some, num_particles, **options)
        spent = torch.cat([output.transported.kl, output.initial.kl], 1).gather(1, output.selected[:, None])[:, 0]
        columns = (output.rewards, output.initial.rewards.amax(1), spent, output.generations)
        numbers = zip(*(column.tolist() for column in columns), strict=True)
        names = ("reward", "reward_initial_best", "kl", "generations")
        for prompt, completion, row in zip(some, output.completions, numbers, strict=True):
            yield {"prompt": prompt, "completion": completion, **dict(zip(names, row, strict=True))}


def field(
    model: str,
    reward_models: Sequence[str],
    prompts: Sequence[Prompt],
    output: str | Path,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    **options: Any,
) -> None:
    """Fit a learned gradient of a reward to completions of a base model, and save it.

    Args:
        model, reward_models: as in `vgf_llm.evaluation.loading.load_sampler`.
        prompts: as in `VGFSampler.sample`.
        output: folder, new or empty, that `GradientField.from_pretrained` will read. It appears whole or not at all.
        temperature, top_k, top_p: of the base distribution.
        options: `layers`, `num_samples`, `max_completion_length`, `epochs`, `batch_size`, `learning_rate`, `seed` and
            `comparisons` of `vgf_llm.text.field.fit_field`.

    Raises:
        FileExistsError: there is something in the folder; known before the models are loaded.
        ValueError: a number out of range, known as early, and those of `load_sampler` and `fit_field`.
        FloatingPointError: the loss is not finite.
    """
    for name, lowest in (("num_samples", 2), ("max_completion_length", 1), ("epochs", 1), ("batch_size", 1)):
        if options.get(name, lowest) < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {options[name]}")
    if not 0 < options.get("learning_rate", 1.0) < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {options['learning_rate']}")
    with _new_folder(output) as folder:
        from vgf_llm.evaluation.loading import load_sampler
        from vgf_llm.text.field import fit_field

        sampler = load_sampler(model, reward_models, temperature=temperature, top_k=top_k, top_p=top_p)
        fitted = fit_field(sampler, prompts, progress=True, **options)
        fitted.save_pretrained(folder)
    # Where the progress bar was.
    print(f"correlation with rewards of held-out prompts: {float(fitted.correlation):.2f}", file=sys.stderr)
    print(f"a nat of likelihood is worth {float(fitted.likelihood_weight):.3g} of the reward", file=sys.stderr)


def read_prompts(source: str | Path) -> list[Prompt]:
    """Prompts of a file, or of standard input where `source` is "-". Empty lines are skipped.

    One prompt per line as it stands, or one JSON object per line whose "prompt" is a string or a list of chat
    messages: in files that end in `.jsonl`, and on standard input if its first character is "{".

    Raises:
        ValueError: no prompt, or a line that holds none.
        OSError: the file cannot be read.
    """
    if str(source) == "-":
        name, text = "standard input", sys.stdin.read()
        is_json = text.lstrip().startswith("{")
    else:
        path = Path(source)
        try:
            name, text = str(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from None
        is_json = path.suffix == ".jsonl"
    # Not splitlines: a JSON string may hold the other line separators of Unicode.
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"no prompts in {name}")
    if not is_json:
        return [line for _, line in lines]
    return [_prompt_of(line, f"{name}, line {number}") for number, line in lines]


def read_comparisons(path: str | Path) -> list[Comparison]:
    """(prompt, chosen, rejected) of a data set in TRL's preference format: a JSONL file, or what `load_dataset` reads, its split
    "train". An answer of chat messages is one message.

    Raises:
        ValueError, OSError: those of `vgf_llm.data.loading.load_splits`; or a row that is none.
    """
    from vgf_llm.data.loading import load_splits

    (rows,) = load_splits(str(path), None, ["train"], ["prompt", "chosen", "rejected"])
    return [_comparison_of(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _comparison_of(row: dict[str, Any], place: str) -> Comparison:
    def text(answer: Any) -> str:
        if isinstance(answer, list) and len(answer) == 1 and _is_message(answer[0]):
            return str(answer[0]["content"])
        if isinstance(answer, str):
            return answer
        raise ValueError(f'{place}: "chosen" and "rejected" must be texts, or lists of one message')

    return _as_prompt(row["prompt"], place), text(row["chosen"]), text(row["rejected"])


def _prompt_of(line: str, place: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg}") from None
    return _as_prompt(record.get("prompt") if isinstance(record, dict) else None, place)


def _as_prompt(prompt: Any, place: str) -> Prompt:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    raise ValueError(f'{place} has no "prompt": a string, or a list of messages with "role" and "content"')


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears only when all of it is written."""
    if path is None:
        yield sys.stdout
        return
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears at `path` only when all of it is written.

    Raises:
        FileExistsError: there is something other than an empty folder.
        OSError: the place cannot be written to.
    """
    target = Path(path).resolve()  # a link to an empty folder stays one
    if any(target.iterdir()) if target.is_dir() else target.exists():
        raise FileExistsError(f"{path} is there already and no empty folder: give a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_demo(args: argparse.Namespace) -> None:
    demo(args.output_dir, args.scale)  # says itself what it does and where it writes


def _run_sample(args: argparse.Namespace) -> None:
    talk = args.prompts == "-" and sys.stdin.isatty()
    prompts = [] if talk else read_prompts(args.prompts)
    from tqdm import tqdm

    from vgf_llm.evaluation.loading import load_sampler
    from vgf_llm.flow import TransportBudget

    options = {
        "num_particles": args.num_particles,
        "budget": (
            TransportBudget(steps=args.steps, kl_budget=args.kl_budget, rounds=args.rounds)
            if args.auto is None
            else TransportBudget.auto(args.auto)
        ),
        "max_completion_length": args.max_completion_length,
        "seed": args.seed,
    }
    # Opened first: a place that cannot be written must fail before the work is done.
    with open_output(args.output) as file:
        sampler = load_sampler(
            args.model, args.reward_model, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            horizon=None if args.horizon < 0 else args.horizon, movers=args.movers, gradient_field=args.gradient_field,
        )  # fmt: skip
        if args.auto is not None and sampler.field is not None:
            options["budget"] = TransportBudget.auto(args.auto, float(sampler.field.correlation))
        if talk:
            _talk(sampler, options, file if args.output else None)
            return
        for record in tqdm(sample(sampler, prompts, **options), desc="prompts", total=len(prompts)):
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)


def _talk(sampler: VGFSampler, options: dict[str, Any], file: TextIO | None) -> None:
    """Prompts from a person, one line each, until an empty line or the end of input. Records go to the file, if there is one."""
    has_chat = sampler.processing_class.chat_template is not None
    print("A prompt per line; an empty line ends.", file=sys.stderr)
    while line := _ask("> "):
        prompt: Prompt = [{"role": "user", "content": line}] if has_chat else line
        try:
            (record,) = sample(sampler, [prompt], **options)
        except ValueError as error:  # of this prompt; the next one may be better
            print(f"vgf: error: {error}", file=sys.stderr)
            continue
        print(record["completion"])
        gain = record["reward"] - record["reward_initial_best"]
        # Along a gradient field the particles as drawn are moved ones, and not best-of-N's.
        said = f"reward {record['reward']:.2f} ({gain:+.2f} over the best as drawn), {record['generations']:.1f} decoded"
        print(said, file=sys.stderr)
        if file is not None:
            print(json.dumps(record, ensure_ascii=False), file=file)


def _ask(question: str) -> str:
    try:
        return input(question)
    except EOFError:
        return ""


def _run_field(args: argparse.Namespace) -> None:
    field(
        args.model, args.reward_model, read_prompts(args.prompts), args.output,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        layers=args.layers, num_samples=args.num_samples, max_completion_length=args.max_completion_length, epochs=args.epochs,
        batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed,
        comparisons=None if args.comparisons is None else read_comparisons(args.comparisons),
    )  # fmt: skip


def _run_serve(args: argparse.Namespace) -> None:
    try:
        from vgf_llm.evaluation.loading import load_sampler
        from vgf_llm.serving import Limits, create_app, listen, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"vgf serve needs {error.name}: pip install 'vgf_llm[serve]'") from None
    limits = Limits(tokens=args.max_completion_length, queue=args.queue, seconds=args.seconds)
    api_key = os.environ.get("VGF_API_KEY") or None
    # First of all: a port in use must be known before the models are loaded.
    with listen(args.host, args.port, api_key) as listening:
        sampler = load_sampler(
            args.model, args.reward_model, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            gradient_field=args.gradient_field,
        )  # fmt: skip
        name = args.model_name or args.model
        host, port = listening.getsockname()[:2]
        print(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        serve(create_app(sampler, name, limits, api_key), listening)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error of the command."""
        self.exit(2, f"vgf: error: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vgf", description="Value Gradient Flow for language models.")
    parser.add_argument("--version", action="version", version=f"vgf_llm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    with_defaults = argparse.ArgumentDefaultsHelpFormatter

    run = commands.add_parser("demo", help="the whole method on the embedded data, on a CPU", formatter_class=with_defaults)
    run.add_argument("--output-dir", default="outputs/demo", metavar="DIR", help="models, report and figures")
    run.add_argument(
        "--scale", choices=("quick", "default", "full"), default="default",
        help="default: minutes on two cores; full: what the documentation reports; quick: shows that it runs",
    )  # fmt: skip
    run.set_defaults(run=_run_demo)

    for name, help_text in RECIPES.items():  # whose options `main` leaves to the recipe
        commands.add_parser(name, help=help_text)

    run = commands.add_parser(
        "sample", help="best transported completion of every prompt, as JSONL", formatter_class=with_defaults
    )
    # No default is shown where there is none.
    required: dict[str, Any] = {"required": True, "default": argparse.SUPPRESS}
    along = "learned gradient (vgf field) along which particles are drawn; default: none"
    run.add_argument("--model", metavar="DIR", help="causal language model", **required)
    run.add_argument("--reward-model", nargs="+", metavar="DIR", help="sequence-classification model(s)", **required)
    run.add_argument(
        "--prompts",
        metavar="FILE",
        help='prompt per line, or JSONL with "prompt"; - is standard input, a terminal asks',
        **required,
    )
    run.add_argument("--num-particles", type=int, default=8, metavar="N", help="particles per prompt")
    run.add_argument("--steps", type=int, default=5, metavar="L", help="flow steps; 0 is best-of-N")
    run.add_argument("--kl-budget", type=float, default=2.0, metavar="NATS", help="what one decode may spend")
    run.add_argument("--rounds", type=int, default=1, metavar="R", help="how often flow and decode alternate")
    run.add_argument(
        "--auto",
        type=float,
        metavar="G",
        help="completions per prompt in all, moves or fresh samples as they pay; steps, nats and rounds are not asked: along a "
        "gradient field its correlation sets the nats",
    )
    run.add_argument(
        "--horizon", type=int, default=0, metavar="T", help="tokens a tilt outlives the first change; -1: to the end"
    )
    run.add_argument(
        "--movers", type=int, metavar="N", help="best particles a round moves; default: all", default=argparse.SUPPRESS
    )
    run.add_argument("--gradient-field", metavar="DIR", help=along, default=argparse.SUPPRESS)
    run.add_argument("--max-completion-length", type=int, default=64, metavar="T", help="in tokens")
    run.add_argument("--seed", type=int, default=0, help="of the noise")
    run.add_argument("--temperature", type=float, default=1.0, help="of the base model")
    run.add_argument("--top-k", type=int, default=0, help="of the base model; 0 keeps all tokens")
    run.add_argument("--top-p", type=float, default=1.0, help="of the base model; 1.0 keeps all tokens")
    run.add_argument("--output", metavar="FILE", default=argparse.SUPPRESS, help="default: standard output")
    run.set_defaults(run=_run_sample)

    run = commands.add_parser(
        "field", help="a learned gradient of a reward, for sample, serve and evaluate", formatter_class=with_defaults
    )
    run.add_argument("--model", metavar="DIR", help="causal language model", **required)
    run.add_argument("--reward-model", nargs="+", metavar="DIR", help="sequence-classification model(s)", **required)
    run.add_argument("--prompts", metavar="FILE", help='prompt per line, or JSONL with "prompt"; - is standard input', **required)
    run.add_argument("--output", metavar="DIR", help="where the field goes: a folder that is new or empty", **required)
    run.add_argument(
        "--layers", type=int, default=1, metavar="L",
        help="layers of its own, on the others of the base model; 0: a copy of the reward model, on none",
    )  # fmt: skip
    run.add_argument(
        "--comparisons", metavar="FILE", default=argparse.SUPPRESS,
        help='JSONL with "prompt", "chosen" and "rejected", at least 50 of which the reward model has not learned: they say what '
        "likelihood is worth beside the reward; default: next to nothing",
    )  # fmt: skip
    run.add_argument("--num-samples", type=int, default=8, metavar="N", help="completions per prompt to learn from")
    run.add_argument("--max-completion-length", type=int, default=64, metavar="T", help="in tokens")
    run.add_argument("--epochs", type=int, default=2, help="passes over the completions")
    run.add_argument("--batch-size", type=int, default=64, help="completions per optimizer step")
    run.add_argument("--learning-rate", type=float, default=5e-4, help="peak of its one cycle")
    run.add_argument("--seed", type=int, default=0, help="of samples and batches")
    run.add_argument("--temperature", type=float, default=1.0, help="of the base model")
    run.add_argument("--top-k", type=int, default=0, help="of the base model; 0 keeps all tokens")
    run.add_argument("--top-p", type=float, default=1.0, help="of the base model; 1.0 keeps all tokens")
    run.set_defaults(run=_run_field)

    add_control_command(commands)
    run = commands.add_parser("serve", help="transported completions over HTTP, as OpenAI's API", formatter_class=with_defaults)
    run.add_argument("--model", metavar="DIR", help="causal language model", **required)
    run.add_argument("--reward-model", nargs="+", metavar="DIR", help="sequence-classification model(s)", **required)
    run.add_argument("--gradient-field", metavar="DIR", help=along, default=argparse.SUPPRESS)
    run.add_argument("--model-name", metavar="NAME", help="what requests call the model; default: as given", default=None)
    run.add_argument("--host", default="127.0.0.1", help="others than loopback need a key in VGF_API_KEY")
    run.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    run.add_argument("--temperature", type=float, default=1.0, help="of the base model")
    run.add_argument("--top-k", type=int, default=0, help="of the base model; 0 keeps all tokens")
    run.add_argument("--top-p", type=float, default=1.0, help="of the base model; 1.0 keeps all tokens")
    run.add_argument("--max-completion-length", type=int, default=512, metavar="T", help="most tokens a request may ask for")
    run.add_argument("--queue", type=int, default=64, metavar="PROMPTS", help="how many may wait")
    run.add_argument("--seconds", type=float, default=300.0, help="how long a request may take, waiting included")
    run.set_defaults(run=_run_serve)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in RECIPES:
            recipe(argv[0], argv[1:])
        else:
            args = _parser().parse_args(argv)
            # Without a default, so that the help shows none.
            for name in ("output", "movers", "gradient_field", "comparisons"):
                setattr(args, name, getattr(args, name, None))
            args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vgf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe, e.g. `head`, has seen enough. Nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"  # without the number of the system's error
        print(f"vgf: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    return 0
