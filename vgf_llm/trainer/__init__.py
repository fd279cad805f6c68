"""Training: fit a policy to particles that the flow carried away from the reference."""

from .vgf_config import VGFConfig
from .vgf_trainer import VGFTrainer


__all__ = ["VGFConfig", "VGFTrainer"]
