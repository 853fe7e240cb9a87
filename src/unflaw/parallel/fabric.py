"""Data-parallel training with Lightning Fabric, on several processors or GPUs of one or more machines.

torchrun --nproc-per-node 2 mine.py        # or: unflaw train … --devices 2, which starts its processes itself

group = FabricGroup(detector.config.training, devices=2)      # in mine.py
detector.fit("parts/train/good", group=group)
if group.is_main:
    detector.save("parts.safetensors")
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

try:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy
    from lightning_fabric.utilities.exceptions import MisconfigurationException
except ImportError as error:
    raise ImportError("several devices need Lightning Fabric: pip install 'unflaw[distributed]'") from error

from unflaw.config import Training
from unflaw.errors import TrainingError
from unflaw.io.words import count
from unflaw.parallel.launch import FAILURE_FOLDER
from unflaw.parallel.process_group import Engine, Loss, ProcessGroup, Terms, uses_bfloat16

T = TypeVar("T")


class FabricGroup(ProcessGroup):
    """A group of several processes; each of them creates one.

    Args:
        training: Settings of the detector to be fitted; `precision` chooses Fabric's plugin.
        devices: Number of processes on this machine, one for each device.
        accelerator: "cpu", "gpu", or "auto": GPUs if available.
        strategy: "ddp", or "auto": ddp for several processes.
        nodes: Number of machines.

    Raises:
        TrainingError: The devices are not available, or contradict the environment.
    """

    def __init__(
        self,
        training: Training,
        *,
        devices: int = 1,
        accelerator: Literal["auto", "cpu", "gpu"] = "auto",
        strategy: Literal["auto", "ddp"] = "auto",
        nodes: int = 1,
    ) -> None:
        several = devices * nodes > 1 or strategy == "ddp"
        on_gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
        self.bfloat16 = uses_bfloat16(training, torch.device("cuda" if on_gpu else "cpu"))
        # buffers are equal in all processes anyway; the option's name depends on the version of torch
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        ddp = DDPStrategy(**options)
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # hide its start messages
        warnings.filterwarnings("ignore", message="Grad strides do not match")  # of channels-last weights
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice on data loaders, which are not used
                self.fabric = Fabric(
                    accelerator=accelerator,
                    devices=devices,
                    num_nodes=nodes,
                    strategy=ddp if several else "auto",
                    precision="bf16-mixed" if self.bfloat16 else "32-true",
                    plugins=[LightningEnvironment()] if FAILURE_FOLDER in os.environ else None,
                )
                self.fabric.launch()
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            raise TrainingError(
                f"{count(devices, 'device')} ({accelerator}) on {count(nodes, 'node')} are not available: {error}"
            ) from error
        self.rank, self.size, self.local_size = self.fabric.global_rank, self.fabric.world_size, devices
        self.device = self.fabric.device
        if self.size > 1:
            self._objects: Any = dist.new_group(backend="gloo")  # for objects in CPU memory

    def barrier(self) -> None:
        self.fabric.barrier()

    def all_gather(self, own: T) -> list[T]:
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self._objects)
        return found

    def broadcast(self, own: T) -> T:
        if self.size == 1:
            return own
        sent: list[Any] = [own if self.is_main else None]
        dist.broadcast_object_list(sent, src=0, group=self._objects)
        return sent[0]

    def all_reduce(self, own: Tensor) -> Tensor:
        found = own.detach().clone().cpu()
        if self.size > 1:
            dist.all_reduce(found, group=self._objects)
        return found

    @contextmanager
    def hosting(self, module: nn.Module) -> Iterator[None]:
        module.to(self.device)
        try:
            yield
        finally:
            module.cpu()

    @contextmanager
    def engine(
        self, module: nn.Module, optimiser: torch.optim.Optimizer, loss: Loss, bfloat16: bool
    ) -> Iterator[Engine]:
        if bfloat16 != self.bfloat16:
            raise TrainingError(
                "the process group was created for another training.precision; pass it the settings of the detector"
            )
        wrapped, _ = self.fabric.setup(_Callable(module), optimiser)

        def forward(rows: Tensor, rng: Generator) -> Terms:
            return wrapped(partial(loss, rows, rng))

        def backward(value: Tensor, last: bool) -> None:
            with self.fabric.no_backward_sync(wrapped, enabled=not last):
                self.fabric.backward(value)

        try:
            yield Engine(forward, backward)
        finally:
            module.cpu()


class _Callable(nn.Module):
    """The module that Fabric wraps: its `forward` calls any function that uses the parameters of `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Terms]) -> Terms:
        return work()
