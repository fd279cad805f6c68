"""`vgf control train|eval|generate`: arguments, and the functions behind them."""

import argparse
import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def evaluate_run(
    run: str | Path,
    eval_steps: Sequence[int] | None = None,
    episodes: int | None = None,
    seed: int = 0,
    video: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Play a trained run at several budgets; write `evaluation.csv`, and a video if asked for.

    Args:
        run: `output_dir` of `train`.
        eval_steps: values of L_test; default: those of the run.
        episodes: per seed and budget; default: that of the run.
        seed: of the resets.
        video: `.gif` or `.mp4` of one episode at the largest budget, for runs of one seed.

    Returns:
        the rows of `evaluation.csv`: score, return, success and length by seed and budget.

    Raises:
        ValueError, OSError: no run there, or environment or video cannot be had.
    """
    from vgf_llm.flow import TransportBudget

    from .environments import make_vector_env
    from .evaluation import evaluate, record_video, slots
    from .training import TrainConfig, env_options, load_agent, score_rows

    folder = Path(run)
    agent = load_agent(folder)
    config = TrainConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    steps = tuple(eval_steps or config.eval_steps) if agent.config.algorithm in ("vgf", "ifql") else (0,)
    budgets = [dataclasses.replace(config.agent.test, steps=k) for k in steps]
    if agent.config.algorithm not in ("vgf", "ifql"):
        budgets = [TransportBudget(steps=0)]
    count = episodes or config.eval_episodes
    limit = 10**6 if config.env == "pendulum" and config.max_envs is None else config.max_envs
    env = make_vector_env(config.env, slots(agent, len(budgets), count, limit), **env_options(config))
    try:
        result = evaluate(agent, config.env, env, budgets, count, seed)
    finally:
        env.close()
    rows = list(score_rows(result, agent.updates, agent.seeds, steps))
    with (folder / "evaluation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if video is not None:
        if len(agent.seeds) != 1:
            raise ValueError(f"a video shows one agent, and this run has {len(agent.seeds)} seeds: train one alone")
        record_video(lambda obs: agent.act(obs, budgets[-1]), config.env, video, seed)
    return rows


def _train(args: argparse.Namespace) -> None:
    from .plots import plot_run
    from .training import TrainConfig, train

    config = TrainConfig.from_yaml(args.config)
    changes = {k: getattr(args, k) for k in ("dataset", "updates", "online_steps", "device") if getattr(args, k) is not None}
    if args.seeds is not None:
        changes["seeds"] = tuple(args.seeds)
    output = Path(args.output_dir or Path("outputs") / Path(args.config).stem)
    train(dataclasses.replace(config, **changes), output, resume=args.resume, say=lambda line: print(line, flush=True))
    for path in plot_run(output):
        print(path)


def _eval(args: argparse.Namespace) -> None:
    for row in evaluate_run(args.run_directory, args.steps, args.episodes, args.seed, args.video):
        print(f"seed {row['seed']}  L {row['test_steps']}  score {row['score']:.1f}  return {row['return']:.1f}")


def _generate(args: argparse.Namespace) -> None:
    from .generate import generate

    output = args.output or f"~/.ogbench/data/{args.env.removesuffix('-v0')}-v0.npz"
    manifest = generate(
        args.env, output, args.episodes, args.seed, args.processes, args.rows, say=lambda line: print(line, flush=True)
    )
    print(json.dumps(manifest, indent=1))


def add_control_command(commands: Any) -> None:
    """Add `control` with its three commands to the subparsers of `vgf`; each sets `run`, a function of the arguments."""
    control = commands.add_parser("control", help="continuous control: train, evaluate, generate data")
    jobs = control.add_subparsers(title="commands", required=True, metavar="COMMAND")

    job = jobs.add_parser("train", help="train offline, then online if the configuration says so")
    job.add_argument("--config", required=True, metavar="FILE", help="YAML, such as recipes/configs/control/pendulum.yaml")
    job.add_argument("--output-dir", metavar="DIR", help="default: outputs/ and the name of the configuration")
    job.add_argument("--dataset", metavar="FILE", help="instead of the configuration's")
    job.add_argument("--updates", type=int, metavar="N", help="instead of the configuration's")
    job.add_argument("--online-steps", type=int, metavar="N", help="instead of the configuration's")
    job.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="instead of the configuration's; side by side")
    job.add_argument("--device", help="instead of the configuration's")
    job.add_argument("--resume", action="store_true", help="continue what is in the output directory")
    job.set_defaults(run=_train)

    job = jobs.add_parser("eval", help="play a trained run at several budgets")
    job.add_argument("run_directory", metavar="RUN", help="output directory of `vgf control train`")
    job.add_argument("--steps", type=int, nargs="+", metavar="L", help="budgets; default: the run's")
    job.add_argument("--episodes", type=int, metavar="N", help="per seed and budget; default: the run's")
    job.add_argument("--seed", type=int, default=0, help="of the resets (default: 0)")
    job.add_argument("--video", metavar="FILE", help=".gif or .mp4 of one episode at the last budget")
    job.set_defaults(run=_eval)

    job = jobs.add_parser("generate", help="make an OGBench data set that needs no trained expert")
    job.add_argument("--env", required=True, metavar="NAME", help="such as cube-double-play or pointmaze-medium-navigate")
    job.add_argument("--episodes", type=int, default=1000, metavar="N", help="of the training set (default: 1000)")
    job.add_argument("--output", metavar="FILE", help="default: where OGBench looks, ~/.ogbench/data")
    job.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    job.add_argument("--processes", type=int, metavar="N", help="default: one per core")
    job.add_argument("--rows", type=int, metavar="N", help="per episode; default: that of the published set")
    job.set_defaults(run=_generate)
