"""Run a script as one process of an engine, on a CPU: `accelerate launch --config_file X.yaml on_cpu.py SCRIPT [ARGUMENT ...]`.

accelerate hands a model to FSDP or DeepSpeed only where it believes itself on accelerators: told that the device is a CPU it
falls back to DDP. Here it is told that there are accelerators, that they talk through gloo, and that their device is the CPU;
everything else is what runs on a cluster.
"""

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def main(script, *arguments):
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("gloo", DistributedType.MULTI_GPU)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
