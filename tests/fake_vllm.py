"""What TRL imports of vLLM, played by a transformers model: vLLM itself is in no environment of these tests.

An engine draws as the sampler would have drawn: its n-th prompt with the seed of the n-th place in the stream of prompts. A run
with it is therefore the run without it, as long as the engine has the right weights, gets the right prompts and stops where it
should.
"""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from vgf_llm.text import decode
from vgf_llm.text.decode import BaseDistribution
from vgf_llm.trainer.replica import unsharded_loading


class Weights:
    """A model as an engine holds it, and all that was done to it."""

    def __init__(self, path):
        with unsharded_loading():  # which a real engine need not care for: it has a loader of its own
            self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.drawn = 0  # prompts so far
        self.calls = []  # what `draw` was given, without the prompts
        self.syncs = 0
        self.synced = []  # names, of the last sync
        self.seed = lambda number: 42 * 2**40 + number  # of the n-th prompt it gets: `VGFTrainer._seed` in one process

    @torch.no_grad()
    def load(self, named):
        parameters = dict(self.model.named_parameters())
        for name, value in named:
            assert value.shape == parameters[name].shape, name
            parameters[name].copy_(value)
            self.synced.append(name)

    def synced_all(self):
        """The end of a sync: what vLLM asks for is every parameter once."""
        assert sorted(self.synced) == sorted(name for name, _ in self.model.named_parameters())
        self.synced = []
        self.syncs += 1

    def draw(self, prompts, n, *, temperature, max_tokens, stop_token_ids, logit_bias=None, **others):
        """Token ids [B * n] of n completions of every prompt, up to and including the token that stopped them."""
        self.calls.append({"temperature": temperature, "stop_token_ids": stop_token_ids, "logit_bias": logit_bias, **others})
        rows = self.model.get_output_embeddings().weight.shape[0]
        base = BaseDistribution(temperature, vocab_size=rows - len(logit_bias or {}))
        completions = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            prefix = decode.read_prompts(self.model, ids, ids >= 0).deal(torch.zeros(n, dtype=torch.int64))
            keys = decode.row_keys(self.seed(self.drawn), [prompt], n)
            drawn = decode.sample(
                self.model, prefix, keys, base=base, max_new_tokens=max_tokens, eos_ids=torch.tensor(stop_token_ids), pad_id=0
            )
            completions += [row[mask].tolist() for row, mask in zip(drawn.ids, drawn.mask, strict=True)]
            self.drawn += 1
        return completions


class LLM:
    """Colocated: `vllm.LLM` as far as TRL uses it."""

    last: "LLM"  # that was built

    def __init__(self, model, **options):
        LLM.last = self
        self.options, self.weights, self.asleep = options, Weights(model), False
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.weights.load))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def generate(self, prompts, sampling_params, use_tqdm):
        assert not self.asleep and sampling_params.pop("n") == 1
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        n = next((i for i, row in enumerate(rows) if row != rows[0]), len(rows))
        completions = self.weights.draw(rows[::n], n, **sampling_params)
        return [
            SimpleNamespace(prompt_token_ids=row, outputs=[SimpleNamespace(token_ids=tuple(ids), logprobs=None)])
            for row, ids in zip(rows, completions, strict=True)
        ]

    def reset_prefix_cache(self):
        self.weights.synced_all()

    def sleep(self, level):
        assert level == 2  # discards the weights
        self.asleep = True
        with torch.no_grad():
            for parameter in self.weights.model.parameters():
                parameter.fill_(torch.nan)

    def wake_up(self, tags):
        self.asleep &= "kv_cache" not in tags


class VLLMClient:
    """Of a server: TRL's client without the network."""

    path = None  # of the model that the server has loaded
    last: "VLLMClient"

    def __init__(self, base_url, group_port, connection_timeout):
        VLLMClient.last = self
        self.base_url, self.group_port, self.connection_timeout = base_url, group_port, connection_timeout
        self.weights = Weights(VLLMClient.path)

    def init_communicator(self, device):
        pass

    def generate(self, prompts, features, n, structured_outputs_regex, generation_kwargs, **sampling_params):
        assert features is structured_outputs_regex is None
        completions = self.weights.draw(prompts, n, **sampling_params, **generation_kwargs)
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}

    def update_named_params(self, metadata, named):
        named = list(named)
        assert metadata == [(name, str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in named]
        self.weights.load(named)

    def reset_prefix_cache(self):
        self.weights.synced_all()


def install(patch):
    """Make TRL believe in vLLM; `patch(module, name, value)` sets an attribute."""
    import trl.generation.vllm_generation as trl_vllm

    from vgf_llm.trainer import engine

    for module in (trl_vllm, engine):
        patch(module, "is_vllm_available", lambda: True)
    patch(trl_vllm, "LLM", LLM)
    patch(trl_vllm, "SamplingParams", dict)
    patch(trl_vllm, "VLLMClient", VLLMClient)
