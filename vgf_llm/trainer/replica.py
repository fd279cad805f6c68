"""Whole copies of a model whose weights an engine shards.

Everything that is sampled, scored or differentiated at its inputs runs on plain modules that every process holds whole: the
frozen reference, the rewards, and, where the engine shards the policy, a copy of the policy that is filled once per phase.
Processes may then decode different numbers of tokens without waiting for each other, and no engine sees a forward or a backward
that is not the training's own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """`from_pretrained` loads whole weights on every process, even while ZeRO-3 or FSDP would have it load parts."""
    zero = hf_deepspeed._hf_deepspeed_config_weak_ref
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    hf_deepspeed.unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = zero
        if efficient is None:
            del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient


def whole_copy(model: Any, device: torch.device) -> Any:
    """A frozen copy of a model that no engine has wrapped yet, on `device`, in eval mode.

    Raises:
        ValueError: the weights are not there (on the meta device).
    """
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(
            "the model was loaded without its weights on this process (FSDP's cpu_ram_efficient_loading): give its path "
            "instead, so that the trainer loads it, or set fsdp_cpu_ram_efficient_loading: false"
        )
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # loaded by the caller while ZeRO-3 was on
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            replica = copy.deepcopy(model)
    else:
        replica = copy.deepcopy(model)
    return replica.requires_grad_(False).eval().to(device)


def shard_layers(reward: nn.Module, device: torch.device) -> None:
    """Shard the layers of every model in `reward` over all processes, in place; each is whole only while it is in use.

    Embedding table and head stay whole: the flow looks tokens up outside the forward. From now on a forward or backward of the
    reward is a collective: all processes have to make as many of them.

    Raises:
        ValueError: a model that does not say what its layers are (`_no_split_modules`).
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    models = [module for module in reward.modules() if isinstance(module, PreTrainedModel) and hasattr(module, "score")]
    for model in models:
        names = set(model._no_split_modules or ())
        layers = [module for module in model.modules() if type(module).__name__ in names]
        if not layers:
            raise ValueError(f"reward_model_sharding: {type(model).__name__} does not name its layers (_no_split_modules)")
        for layer in layers:
            # Said outright: each layer is a root of its own here, and roots would stay whole after their first forward.
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def copy_weights(trained: nn.Module, replica: nn.Module, *, zero3: bool, adapters_only: bool) -> None:
    """Fill a replica with the weights of a model that ZeRO-3 or FSDP shards. Every process has to call it.

    `adapters_only`: only what is trained, where the rest stands still.
    """
    target = dict(replica.named_parameters())
    if zero3:
        import deepspeed

        for name, parameter in trained.named_parameters():  # one by one: the whole model is never held twice
            if parameter.requires_grad or not adapters_only:
                with deepspeed.zero.GatheredParameters([parameter]):
                    target[name].copy_(parameter)
        return
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=adapters_only)
    for name, value in get_model_state_dict(trained, options=options).items():
        if name in target:  # buffers do not change, and a tied weight appears under each of its names
            target[name].copy_(cast(Tensor, value))
