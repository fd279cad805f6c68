"""The method on language: differentiable rewards, coupled decoding, the sampler. Imports flow and transformers."""

from .decode import BaseDistribution
from .reward import DifferentiableReward
from .sampler import Particles, VGFOutput, VGFSampler


__all__ = ["BaseDistribution", "DifferentiableReward", "Particles", "VGFOutput", "VGFSampler"]
