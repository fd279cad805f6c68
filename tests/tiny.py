"""Tiny models and tokenizers, built in memory: no hub, no network, a few thousand weights.

Weights are drawn wide, so that the distributions and rewards of an untrained model differ from token to token.
"""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)


FAMILIES = ("llama", "gpt_neox", "gpt2", "opt", "qwen2")
LEARNED_POSITIONS = ("gpt2", "opt")
WORDS = ("good", "bad", "fine", "poor", "the", "a", "food", "room", "staff", "was", "were", "and", "but", "nice")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tokenizer(words=WORDS, *, pad="<pad>", eos="<eos>", chat=False):
    """One token per word. `pad=None` leaves the padding token out, `pad="<eos>"` pads with the end of sequence."""
    special = [token for token in dict.fromkeys(("<unk>", pad, eos, "user", "assistant")) if token is not None]
    vocab = {word: index for index, word in enumerate([*special, *words])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    result = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token=pad, eos_token=eos)
    if chat:
        result.chat_template = CHAT_TEMPLATE
    return result


def _config(family, vocab_size, positions, eos, pad, num_labels):
    common = {
        "vocab_size": vocab_size,
        "eos_token_id": eos,
        "bos_token_id": None,
        "pad_token_id": pad,
        "num_labels": num_labels,
        "initializer_range": 0.35,
        "tie_word_embeddings": False,
    }
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": positions}
    if family == "llama":
        return LlamaConfig(intermediate_size=24, num_key_value_heads=1, **sizes, **common)
    if family == "qwen2":
        return Qwen2Config(intermediate_size=24, num_key_value_heads=1, **sizes, **common)
    if family == "gpt_neox":
        return GPTNeoXConfig(intermediate_size=24, **sizes, **common)
    if family == "opt":
        return OPTConfig(ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, **sizes, **common)
    if family == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(n_positions=positions, n_embd=16, n_layer=2, n_head=2, **off, **common)
    raise ValueError(family)


LM = {
    "llama": LlamaForCausalLM,
    "gpt_neox": GPTNeoXForCausalLM,
    "gpt2": GPT2LMHeadModel,
    "opt": OPTForCausalLM,
    "qwen2": Qwen2ForCausalLM,
}
REWARD = {
    "llama": LlamaForSequenceClassification,
    "gpt_neox": GPTNeoXForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
    "opt": OPTForSequenceClassification,
    "qwen2": Qwen2ForSequenceClassification,
}


def language_model(family="llama", vocab_size=20, *, seed=0, positions=48, eos=None, pad=None, sharpness=1.0):
    """A causal language model. `sharpness` multiplies its logits."""
    torch.manual_seed(seed)
    model = LM[family](_config(family, vocab_size, positions, eos, pad, 2)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharpness)
    return model


def reward_model(family="llama", vocab_size=20, *, seed=0, positions=48, pad=None, num_labels=1):
    """A sequence-classification model with one number per text."""
    torch.manual_seed(1000 + seed)
    return REWARD[family](_config(family, vocab_size, positions, None, pad, num_labels)).eval()


class SumConfig(PreTrainedConfig):
    model_type = "sum_of_embeddings"


class _Sum(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, vocab_size)

    def forward(self, inputs_embeds, attention_mask, past_key_values, position_ids=None, use_cache=True):
        states, _ = past_key_values.update(inputs_embeds[:, None], inputs_embeds[:, None], 0)
        return ((states[:, 0] * attention_mask[..., None]).cumsum(1)[:, -inputs_embeds.shape[1] :],)


class SumOfEmbeddings(PreTrainedModel):
    """A reward that is exactly known: the sum over all tokens, prompt included, of one number per token."""

    config_class = SumConfig
    base_model_prefix = "model"

    def __init__(self, worth):
        super().__init__(SumConfig(num_labels=1))
        self.model = _Sum(len(worth))
        self.score = nn.Linear(len(worth), 1, bias=False)
        with torch.no_grad():
            self.model.embed_tokens.weight.copy_(torch.eye(len(worth)))
            self.score.weight.copy_(torch.tensor(worth)[None])

    def get_input_embeddings(self):
        return self.model.embed_tokens


def counting_reward(processing_class, word="good"):
    """How often `word` stands in prompt and completion."""
    worth = [0.0] * len(processing_class)
    worth[processing_class.convert_tokens_to_ids(word)] = 1.0
    return SumOfEmbeddings(worth)


def pad_left(rows, pad_id, extra=0):
    """Ids and mask [R, P] of lists of tokens, `extra` columns wider than the longest."""
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def pad_right(rows, pad_id, extra=0):
    """Ids and mask [R, T] of lists of tokens, `extra` columns wider than the longest."""
    width = max(map(len, rows)) + extra
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask
