"""The processes that work on one training: a single one, or several with the usual data-parallel semantics.

Each process works on its own equal part of every batch, with its own random stream; gradients are averaged over
processes. Methods do not depend on the group: their `loss` gets a batch and a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from unflaw.config import Training

T = TypeVar("T")
Terms = dict[str, Tensor]
Loss = Callable[[Tensor, Generator], Terms]  # rows (B,) of the cache and randomness → terms, means over these rows


@dataclass(frozen=True)
class Engine:
    """Forward and backward passes of one training.

    Attributes:
        loss: Terms of a batch.
        backward: Adds the gradients of a loss. The flag marks the last call of a step, in which gradients are averaged
            over processes.
    """

    loss: Loss
    backward: Callable[[Tensor, bool], None]


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """The trained batch normalisations of a module; those of a frozen backbone are left out."""
    found = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    return [part for part in found if any(p.requires_grad for p in part.parameters())]


class ProcessGroup:
    """A group of one process; `fabric.FabricGroup` is one of several.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_size: Number of processes on this machine, which share its memory and disk.
        device: Device of backbone and method in training.
    """

    rank = 0
    size = 1
    local_size = 1
    device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """True in the process of rank 0, which writes files and reports progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process arrives."""

    def all_gather(self, own: T) -> list[T]:
        """Collects one object from each process, in the order of ranks, in all processes."""
        return [own]

    def broadcast(self, own: T) -> T:
        """Returns the object of rank 0 in all processes."""
        return own

    def all_reduce(self, own: Tensor) -> Tensor:
        """Sums a tensor over processes, without gradient."""
        return own

    def on_main(self, work: Callable[[], T]) -> T:
        """Calls `work` in the process of rank 0; all processes return its result, or raise its exception."""
        if self.size == 1:
            return work()
        found: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                found = work(), None
            except Exception as error:
                found = None, error
        result, problem = self.broadcast(found)
        if problem is not None:
            raise problem
        return result

    @contextmanager
    def hosting(self, module: nn.Module) -> Iterator[None]:
        """Keeps a frozen module on `device` within the block."""
        yield

    @contextmanager
    def engine(
        self, module: nn.Module, optimiser: torch.optim.Optimizer, loss: Loss, bfloat16: bool
    ) -> Iterator[Engine]:
        """Prepares `module` for training within the block, with matrix products in bfloat16 or float32."""
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)

        def forward(rows: Tensor, rng: Generator) -> Terms:
            with autocast:
                return loss(rows, rng)

        yield Engine(forward, lambda value, last: value.backward())


SINGLE_PROCESS = ProcessGroup()


def uses_bfloat16(settings: Training, device: torch.device = SINGLE_PROCESS.device) -> bool:
    """Chooses bfloat16 for matrix products in training: faster where the device has it, slower where emulated."""
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
