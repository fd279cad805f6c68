"""What tests of decoding share: prompts that were read, dense tilts, the noise of a whole vocabulary."""

import torch

from tests import tiny
from vgf_llm.text import decode


def hindsight_of(log_mu, ids, keys):
    """Noise [R, T, V] of all tokens, given that completions [R, T] were said."""
    rows, length, vocab = log_mu.shape
    places = torch.arange(length).expand(rows, length)
    said = torch.arange(vocab) == ids[..., None]
    top = decode.gumbel(keys, decode.HINDSIGHT_TOP, places, 1)
    return decode.hindsight(log_mu, said, top, decode.exponential(keys, decode.HINDSIGHT_REST, places, vocab))


def everywhere(values):
    """The tilt that adds values [R, T, V]."""
    return decode.Tilt(torch.arange(values.shape[-1]).expand(values.shape), values)


def prompts_of(model, prompts, n, pad, extra=0):
    """The prompts, for n particles each."""
    prefix = decode.read_prompts(model, *tiny.pad_left(prompts, pad, extra))
    return prefix.deal(torch.arange(len(prompts)).repeat_interleave(n))
