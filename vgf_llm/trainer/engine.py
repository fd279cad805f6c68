"""vLLM as the engine that draws particles: TRL's class for it, fed with the weights that the sampler uses.

Imported only where `use_vllm` is set: the import of TRL's class imports vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from vgf_llm.text import VGFSampler

from .vgf_config import VGFConfig


class Engine(VLLMGeneration):
    """Draws completions with vLLM, colocated or behind a server, as TRL does.

    The model it gets is whole and plain on every process, with or without adapters: what a sampler of this package samples from,
    and never what ZeRO-3 or FSDP has sharded.

    Args:
        model: what `sync_weights` sends, in the state in which it is at that moment: adapters count where they are on. May be
            exchanged for another of the same architecture. Colocated vLLM loads config and tokenizer from its path.
        sampler: whose distribution and end-of-sequence tokens vLLM takes over.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: a model that vLLM cannot be given.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        args: VGFConfig,
        sampler: VGFSampler,
    ) -> None:
        _check_model(model, args)
        # Rows of the output layer that no token uses: the sampler drops them, vLLM does not.
        unused = range(len(processing_class), model.get_output_embeddings().weight.shape[0])
        super().__init__(
            model,
            accelerator,
            processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            trust_remote_code=args.trust_remote_code,
            temperature=args.temperature,
            max_completion_length=args.max_completion_length,
            logprobs=None,  # those that count are the sampler's own
            generation_kwargs={
                "stop_token_ids": sampler.eos_ids.tolist(),
                **({"logit_bias": dict.fromkeys(unused, -100.0)} if unused else {}),
            },
        )

    def draw(self, prompts: list[list[int]], n: int) -> list[list[list[int]]]:
        """Token ids of completions [B][n] of prompts [B], each up to and including its end-of-sequence token.

        Every process has to call it, with as many prompts.
        """
        # Colocated vLLM draws one completion per prompt it gets, the server n for every n-th.
        _, completions, _, _ = self.generate([ids for ids in prompts for _ in range(n)], None, n)
        rows = [list(map(int, completion)) for completion in completions]
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """What `sync_weights` sends. TRL's own would look for ZeRO and FSDP, and merges adapters in place and takes them out
        again, which leaves rounding in weights that are the reference's too."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        yield from _weights(model, "", set())


def check_installed() -> None:
    """Raises ImportError unless vLLM is installed."""
    if not is_vllm_available():
        raise ImportError('use_vllm=True needs vLLM, which is not installed: pip install "vgf_llm[vllm]"')


def _check_model(model: Any, args: VGFConfig) -> None:
    if args.vllm_mode == "colocate" and not model.name_or_path:
        raise ValueError(
            "use_vllm with vllm_mode='colocate' loads config and tokenizer from the path of the model, and this one has none: "
            "save_pretrained model and tokenizer, and give the path"
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "use_vllm does not go with a quantized model: vLLM would round its weights in its own way, and draw from another "
            "distribution than the reference"
        )
    if args.particle_source == "policy" and isinstance(model, PeftModel):
        base: Any = model.get_base_model()
        wrapped = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        tables = (base.get_input_embeddings(), base.get_output_embeddings())
        if base.config.tie_word_embeddings and any(isinstance(table, wrapped) for table in tables):
            raise ValueError(
                "use_vllm with particle_source='policy' does not go with adapters on embeddings that are tied to lm_head: vLLM "
                "holds one matrix for both, and the adapters change one of them; leave them out of the adapters"
            )
        others = [
            name
            for name, module in base.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper)
        ]
        if others:
            raise ValueError(
                "use_vllm with particle_source='policy' sends adapters of layers and modules_to_save to vLLM, and not "
                f"single trained tokens: leave trainable_token_indices out ({others[0]})"
            )


def _weights(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module under the names they have without adapters, those that are on added in; tied ones once.

    `seen`: ids of those that came before.
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        trained = isinstance(module, ModulesToSaveWrapper) and module.active_adapters and not module.disable_adapters
        inner = module.modules_to_save[module.active_adapter] if trained else module.original_module
        yield from _weights(inner, prefix, seen)
    elif isinstance(module, BaseTunerLayer):
        layer: Any = module  # every kind of adapter has a base_layer, the class of all of them does not say so
        if not layer.disable_adapters:
            layer = copy.deepcopy(layer)  # one layer at a time
            layer.merge()
            seen = set()  # its own, since the ids of a copy that is gone may come again
        yield from _weights(layer.base_layer, prefix, seen)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + name, parameter.data
        for name, child in module.named_children():
            yield from _weights(child, f"{prefix}{name}.", seen)
