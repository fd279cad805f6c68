"""Train a control agent as a YAML file says, and draw its figures.

    python recipes/control.py recipes/configs/control/pendulum.yaml outputs/pendulum

The same as `vgf control train`; here to be read, and to be changed.
"""

import sys
from pathlib import Path

import torch

from vgf_llm.control import TrainConfig, diagnose, train
from vgf_llm.control.plots import plot_particles, plot_run
from vgf_llm.control.training import load_dataset


def main(config_path: str, output_dir: str) -> None:
    config = TrainConfig.from_yaml(config_path)
    output = Path(output_dir)
    agent = train(config, output, resume=True, say=print)

    # What the budgets do to particles at states of the data.
    data = load_dataset(config)
    states = data.obs[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:256]]
    for row in diagnose(agent, states, config.budgets):
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))

    offline = config.agent.behaviour_steps + config.updates
    figures = plot_run(output, switch=offline if config.online_steps else None)
    figures.append(plot_particles(agent, states[0], config.budgets, output / "particles.png"))
    print(*figures, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
