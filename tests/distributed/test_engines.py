"""Two real processes of every engine do what one process does; `make test-distributed` runs these.

Every engine is launched once, with the configuration it has in accelerate_configs/: most of the time goes into starting
processes. It runs recipes/vgf.py first and then several scenarios of `scenarios.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed import scenarios
from vgf_llm import VGFSampler
from vgf_llm.text.field import fit_field


ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ALL = list(scenarios.SCENARIOS)
# The engines that change least against DDP run less.
PLAN = {
    "multi_gpu": [*ALL, "fail"],
    "fsdp2": ALL,
    "zero3": [*ALL, "fail"],
    "zero2": ["full_sft", "lora_weighted_value", "full_advantage"],
    "zero1": ["full_sft"],
    "fsdp1": ["full_sft"],
}
CLASSES = {
    "multi_gpu": "DistributedDataParallel",
    "fsdp2": "FSDP",
    "fsdp1": "FullyShardedDataParallel",
    "zero1": "DeepSpeedEngine",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}


def launch(folder, engine, *script):
    """`accelerate launch` with a configuration of ours, on CPU processes."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{engine}.yaml").read_text(encoding="utf-8"))
    config |= {"num_processes": min(2, config["num_processes"]), "mixed_precision": "no"}
    if engine == "fsdp1":
        # What the first FSDP cannot do without a GPU: broadcast loaded weights, and gather a state dict to the CPU, which it
        # frees before it is read (a crash inside torch).
        config["fsdp_config"] |= {
            "fsdp_sync_module_states": False,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        }
    path = folder / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, "--main_process_port", "0",
        HERE / "on_cpu.py", *script,
    ]  # fmt: skip
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    own = [line for line in result.stderr.splitlines() if line.startswith("[rank")]  # not the launcher's
    assert result.returncode == 0, "\n".join(own[-80:]) or result.stderr[-5000:]


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "saved").symlink_to(saved["lm"].parent)
    sampler = VGFSampler(saved["lm"], saved["reward"], flow_batch_size=512)
    fit_field(sampler, scenarios.PROMPTS, num_samples=16, max_completion_length=6).save_pretrained(folder / "saved" / "field")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The same scenarios in one process with twice the batch."""
    return {name: scenarios.run(folder, name, folder / "saved", 1) for name in ALL}


def values(result, name):
    return [entry[name] for entry in result["history"] if name in entry]


@pytest.mark.parametrize("engine", PLAN)
def test_two_processes_are_one_process_with_twice_the_batch(engine, folder, alone):
    out = folder / engine
    out.mkdir()
    (out / "saved").symlink_to(folder / "saved")
    launch(folder, engine, HERE / "scenarios.py", out, "recipe", *PLAN[engine])
    assert (out / "policy" / "model.safetensors").exists() == (engine != "fsdp1")  # see launch
    for name in (name for name in PLAN[engine] if name != "fail"):
        first, second = (json.loads((out / f"{name}.{rank}.json").read_text()) for rank in (0, 1))
        expected = alone[name]
        assert first["engine"].startswith(CLASSES[engine]), first["engine"]
        assert first["zero3"] == (engine == "zero3")
        # Reference, rewards and value model are whole, and no engine has touched them.
        assert first["frozen"] > 20 and first["sharded_replicas"] == second["sharded_replicas"]
        assert (first["sharded_replicas"] > 0) == (name == "full_sharded_reward"), name
        assert (first["sharded_policy"] > 0) == (engine in ("fsdp2", "zero3"))
        for metric in (
            "loss",
            "grad_norm",
            "reward",
            "flow/kl",
            "completions/mean_length",
            "completions/max_length",
            "num_tokens",
        ):
            assert values(first, metric) == pytest.approx(values(expected, metric), rel=1e-3, abs=1e-4), (name, metric)
        for metric in ("kl", "pulled_back", "value/loss", "value/samples", "rewards/count_good/mean"):
            assert values(first, metric) == pytest.approx(values(expected, metric), rel=1e-2, abs=1e-3), (name, metric)
        for metric, value in first["evaluation"].items():
            if not any(part in metric for part in ("runtime", "second", "epoch")):
                assert value == pytest.approx(expected["evaluation"][metric], rel=1e-2, abs=1e-3), (name, metric)
                assert second["evaluation"][metric] == value, (name, metric)
        if name == "lora_pulled_back":
            assert values(first, "pulled_back")[-1] == 1
        if name == "lora_resumed":
            assert values({"history": first["resumed"]}, "loss") == values(first, "loss")
            assert first["evaluation"]["eval_reward"] == expected["evaluation"]["eval_reward"]
    if "fail" in PLAN[engine]:
        for rank in (0, 1):
            messages = json.loads((out / f"fail.{rank}.json").read_text())
            assert "reward function raise_on_the_second_process raised ValueError: no answer from the judge" in messages["raise"]
            assert "too_few_on_the_second_process returned 7 values for 8 completions" in messages["too few"]
            assert "the value model has no samples" in messages["no samples"]
            assert "the adapters reach lm_head" in messages["lm_head"]


def test_the_recipe_runs_in_one_process(folder):
    out = folder / "single_gpu"
    out.mkdir()
    (out / "saved").symlink_to(folder / "saved")
    launch(folder, "single_gpu", HERE / "scenarios.py", out, "recipe")
    assert (out / "policy" / "model.safetensors").exists()


def test_a_process_that_dies_ends_the_other_and_the_run_can_be_resumed(tmp_path):
    """The short version of `python -m tests.faults.kill` with two processes."""
    command = [sys.executable, "-m", "tests.faults.kill", "--kills", "3", "--cases", "value_ddp", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "faults.json"
    result = subprocess.run(
        [*command, "--output", output], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stderr[-5000:]
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["kills"] == 3 and report["different_or_failed"] == 0 and report["cases"]["value_ddp"]["one_of_two"] > 0
