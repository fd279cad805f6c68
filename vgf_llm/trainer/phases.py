"""Which prompts come when, and on which process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Sampler


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class PhaseOrder:
    """How the prompts of a phase are dealt to micro-batches and processes.

    Micro-batch j of a phase takes the next `micro * world` prompts of the stream, of which process r takes the r-th share: the
    prompts of an optimizer step are the same for one process and for many.

    Attributes:
        micro: prompts of a micro-batch on one process.
        steps: micro-batches of a phase.
        world: processes.
        iterations: passes over the phase.
    """

    micro: int
    steps: int
    world: int
    iterations: int

    @property
    def size(self) -> int:
        """Prompts of a phase on all processes."""
        return self.micro * self.steps * self.world

    @property
    def repeats(self) -> int:
        """Micro-steps that a phase lasts."""
        return self.steps * self.iterations

    def share(self, process: int) -> list[int]:
        """Places within the phase of the prompts of one process, micro-batch by micro-batch."""
        first = [(j * self.world + process) * self.micro for j in range(self.steps)]
        return [start + i for start in first for i in range(self.micro)]

    def places(self, phase: int, process: int) -> list[int]:
        """The same as places in the whole stream."""
        return [phase * self.size + place for place in self.share(process)]

    def deal(self, prompts: list[T]) -> list[T]:
        """The prompts of a phase, share by share: the order in which a data loader that gives whole batches to processes in
        turn hands every process its own."""
        return [prompts[place] for process in range(self.world) for place in self.share(process)]


class PhaseSampler(Sampler[int]):
    """Indices of prompts, phase by phase: those of a phase come `order.repeats` times in a row.

    Every epoch has its own order, which depends on the seed and the epoch alone, so that a run can resume in any of
    them. The last prompts of an epoch that do not fill a phase are left out.

    Args:
        size: number of prompts in the dataset.
        order: sizes of a phase.
        seed: of the order; None keeps the order of the dataset.
    """

    def __init__(self, size: int, order: PhaseOrder, seed: int | None) -> None:
        self.size, self.order, self.seed = size, order, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        indices = list(range(self.size))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 2**20 + self.epoch)
            indices = torch.randperm(self.size, generator=generator).tolist()
        step = self.order.size
        for start in range(0, self.size - step + 1, step):
            for _ in range(self.order.repeats):
                yield from self.order.deal(indices[start : start + step])

    def __len__(self) -> int:
        return self.size // self.order.size * self.order.size * self.order.repeats


class PhaseStream(TorchIterableDataset):
    """The same for a stream of prompts, in its own order; a rest that does not fill a phase is left out."""

    def __init__(self, rows: IterableDataset, order: PhaseOrder) -> None:
        self.rows, self.order = rows, order

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        phase: list[dict[str, Any]] = []
        for row in self.rows:
            phase.append(row)
            if len(phase) == self.order.size:
                for _ in range(self.order.repeats):
                    yield from self.order.deal(phase)
                phase = []
