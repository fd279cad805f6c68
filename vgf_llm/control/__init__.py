"""Continuous control on the same flow: offline and offline-to-online reinforcement learning without a policy network.

Names are loaded on first use: the arguments of `vgf control` are known without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .agent import Agent, Batch, VGFAgent
    from .baselines import BCAgent, FQLAgent, IQLAgent
    from .config import AgentConfig
    from .datasets import OfflineDataset, ReplayBuffer
    from .environments import make_env, make_vector_env
    from .evaluation import Evaluation, diagnose, evaluate, record_video
    from .training import TrainConfig, load_agent, train

__all__ = [
    "Agent",
    "AgentConfig",
    "BCAgent",
    "Batch",
    "Evaluation",
    "FQLAgent",
    "IQLAgent",
    "OfflineDataset",
    "ReplayBuffer",
    "TrainConfig",
    "VGFAgent",
    "diagnose",
    "evaluate",
    "load_agent",
    "make_env",
    "make_vector_env",
    "record_video",
    "train",
]

_HOME = {
    "agent": ("Agent", "Batch", "VGFAgent"),
    "baselines": ("BCAgent", "FQLAgent", "IQLAgent"),
    "config": ("AgentConfig",),
    "datasets": ("OfflineDataset", "ReplayBuffer"),
    "environments": ("make_env", "make_vector_env"),
    "evaluation": ("Evaluation", "diagnose", "evaluate", "record_video"),
    "training": ("TrainConfig", "load_agent", "train"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
