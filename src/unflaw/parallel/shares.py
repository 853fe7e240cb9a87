"""Who works on a training: one process alone, or several that share every batch and every set of images.

A batch is drawn once for all, with everything random in it, from a generator that is the same in every process; each
process works on its `Share` of the rows. So several processes learn what one would.
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


@dataclass(frozen=True)
class Share:
    """Consecutive rows of a batch, which one process works on at a time; by default all.

    Attributes:
        start, stop: The rows.
        of: How many the batch has; 0: the share is all of it, however many these are.
        combine: From a sum over the share's rows to the sum over all rows of the batch.
    """

    start: int = 0
    stop: int | None = None
    of: int = 0
    combine: Callable[[Tensor], Tensor] | None = None

    @property
    def weight(self) -> float:
        """The share of the rows, in (0, 1]."""
        return (self.stop - self.start) / self.of if self.stop is not None else 1.0

    def take(self, rows: Tensor) -> Tensor:
        """The share's rows of something that has a row for each image of the batch."""
        return rows[self.start : self.stop] if self.of else rows

    def randn(self, shape: torch.Size | tuple[int, ...], rng: Generator) -> Tensor:
        """The share's rows, of the given shape, of normal numbers that are drawn for the whole batch."""
        return self.take(torch.randn((self.of or shape[0], *shape[1:]), generator=rng))

    def total(self, own: Tensor) -> Tensor:
        """From a sum over the share's rows to that over the batch, for terms of a loss that are no mean over rows.

        Its gradient is the share's own, and larger by 1 / `weight`: where losses of shares are averaged with their
        weights, gradients of any function of totals add up to the function's own.
        """
        if self.combine is None:
            return own
        return self.combine(own.detach()).to(own) + (own - own.detach()) / self.weight


WHOLE = Share()
Loss = Callable[[Tensor, Generator, Share], Terms]  # of picked rows (B,) of the cache; means over the share


@dataclass(frozen=True)
class Engine:
    """How a module learns.

    Attributes:
        loss: Terms of a share, from indices, randomness and the share.
        backward: Adds the gradients of a loss; the last time in a step, they become those of all processes together.
    """

    loss: Loss
    backward: Callable[[Tensor, bool], None]


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """The parts that learn and normalise over the batch; those of a frozen backbone do neither."""
    found = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    return [part for part in found if any(p.requires_grad for p in part.parameters())]


class Team:
    """One process alone; `distributed.FabricTeam` is several.

    Attributes:
        rank: The number of this process, from 0.
        size: How many there are.
        near: How many of them share this machine's memory and disk.
        device: What backbone and method work on in training.
    """

    rank = 0
    size = 1
    near = 1
    device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    @property
    def described(self) -> str:
        """How a detector's record ends the line of its machine."""
        return f", {self.size} processes" if self.size > 1 else ""

    def barrier(self) -> None:
        """Waits until every process is here."""

    def gather(self, own: T) -> list[T]:
        """What each process has, in the order of ranks; every one gets all of it."""
        return [own]

    def broadcast(self, own: T) -> T:
        """What the process of rank 0 has."""
        return own

    def total(self, own: Tensor) -> Tensor:
        """The sum over processes, without gradient."""
        return own

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the process of rank 0, in all of them; also what it raises."""
        if self.size == 1:
            return work()
        found: tuple[Any, Exception | None] = (None, None)
        if self.leads:
            try:
                found = work(), None
            except Exception as error:
                found = None, error
        result, problem = self.broadcast(found)
        if problem is not None:
            raise problem
        return result

    def rows(self, batch: int, parts: int) -> list[tuple[int, int]]:
        """The consecutive rows of a batch that this process works on, `parts` times some."""
        among = self.size * parts
        cuts = [batch * i // among for i in range(among + 1)]
        first = self.rank * parts
        return [(cuts[i], cuts[i + 1]) for i in range(first, first + parts)]

    @contextmanager
    def hosting(self, module: nn.Module) -> Iterator[None]:
        """A frozen module lies on `device` meanwhile."""
        yield

    @contextmanager
    def engine(
        self, module: nn.Module, optimiser: torch.optim.Optimizer, loss: Loss, bfloat16: bool
    ) -> Iterator[Engine]:
        """How `module` learns meanwhile, with matrix products in bfloat16 or not."""
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)

        def work(indices: Tensor, rng: Generator, share: Share) -> Terms:
            with autocast:
                return loss(indices, rng, share)

        yield Engine(work, lambda value, last: value.backward())


ALONE = Team()


def uses_bfloat16(settings: Training, device: torch.device = ALONE.device) -> bool:
    """Whether matrix products in training are bfloat16: faster where the device has it, slower where emulated."""
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
