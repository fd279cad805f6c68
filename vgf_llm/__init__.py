"""Value Gradient Flow for language models.

The four names below are loaded on first use, so that `import vgf_llm` costs nothing and the sampler works where
only torch and transformers are installed (the trainer also needs trl).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from vgf_llm.flow import TransportBudget
    from vgf_llm.text.sampler import VGFSampler
    from vgf_llm.trainer import VGFConfig, VGFTrainer

__version__ = "0.1.0"

__all__ = ["TransportBudget", "VGFConfig", "VGFSampler", "VGFTrainer", "__version__"]

_HOME = {
    "TransportBudget": "vgf_llm.flow",
    "VGFConfig": "vgf_llm.trainer",
    "VGFSampler": "vgf_llm.text.sampler",
    "VGFTrainer": "vgf_llm.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access skips this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
