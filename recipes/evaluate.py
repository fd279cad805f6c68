"""Measure a base model, best-of-n, VGF at several budgets and trained policies on held-out prompts, under a gold reward model.

    python recipes/evaluate.py --config recipes/configs/hh/pythia-1b_evaluate.yaml

Several GPUs share out the prompts; options win over the file:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 recipes/evaluate.py \
        --config recipes/configs/hh/pythia-1b_evaluate.yaml --max_prompts 512

With a judge as well, a program or a model behind an OpenAI-compatible endpoint:

    python recipes/evaluate.py --config ... --judge_base_url http://127.0.0.1:8001/v1 --judge_model NAME

Every field of `EvaluationConfig` is an option and a key of the YAML file. The data set needs a column "prompt"; answers to
compare with are in "reference", "chosen", or the columns that `--against` names. Writes report.html, report.json, report.md and
figures to `output_dir`. A run that was killed goes on where it stopped.
"""

import sys
from collections.abc import Sequence

from trl import TrlParser

from vgf_llm.evaluation.evaluate import evaluate
from vgf_llm.evaluation.evaluation_config import EvaluationConfig


def main(config: EvaluationConfig) -> None:
    evaluate(config)


def parse(argv: Sequence[str] | None = None) -> tuple[EvaluationConfig]:
    """Options and YAML file, checked; nothing is loaded.

    Raises:
        ValueError: an unknown key or value, or a combination that does not work.
    """
    (config,) = TrlParser((EvaluationConfig,)).parse_args_and_config(argv)
    config.check_complete()
    return (config,)


if __name__ == "__main__":
    try:
        parsed = parse()
        main(*parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate: error: {error}")
