"""Is the gradient of this reward model worth following? Fidelity, gain per nat and a recommendation; nothing is trained.

    python recipes/diagnose.py --config recipes/configs/tldr/pythia-1b_diagnose.yaml

Every field of `DiagnoseConfig` is an option and a key of the YAML file, and options win over the file. The data set needs a
column "prompt". Writes diagnose.json and diagnose.png to `output_dir` (docs/diagnose.md).
"""

import sys
from collections.abc import Sequence

from trl import TrlParser

from vgf_llm.evaluation.diagnose import DiagnoseConfig, run_diagnose


def main(config: DiagnoseConfig) -> None:
    run_diagnose(config)


def parse(argv: Sequence[str] | None = None) -> tuple[DiagnoseConfig]:
    """Options and YAML file, checked; nothing is loaded.

    Raises:
        ValueError: an unknown key or value, or a combination that does not work.
    """
    (config,) = TrlParser((DiagnoseConfig,)).parse_args_and_config(argv)
    config.check_complete()
    return (config,)


if __name__ == "__main__":
    try:
        parsed = parse()
        main(*parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"diagnose: error: {error}")
