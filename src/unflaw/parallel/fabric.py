"""A team of processes, over Lightning Fabric: several processors or GPUs, of one machine or several.

torchrun --nproc-per-node 2 mine.py        # or: unflaw train … --devices 2, which starts its processes itself

team = FabricTeam(detector.config.training, devices=2)      # in mine.py
detector.fit("parts/train/good", team=team)
if team.leads:
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
from unflaw.parallel.launch import OURS
from unflaw.parallel.shares import Engine, Loss, Share, Team, Terms, batch_norms, uses_bfloat16

T = TypeVar("T")


class FabricTeam(Team):
    """Every process of a training makes one; together they are the team.

    Args:
        training: Of the detector that will be fitted: its `precision` chooses Fabric's plugin.
        devices: Processes on this machine, one for each device.
        accelerator: "cpu", "gpu", or "auto": GPUs where there are some.
        strategy: "ddp", or "auto": that where there are several.
        nodes: Machines.

    Raises:
        TrainingError: Devices that are not there, or an environment that says otherwise.
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
        # buffers are the same in all processes as it is; the option's name depends on the version of torch
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {name: False}
        ddp = DDPStrategy(**options)
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its greetings
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice on data loaders, of which there are none
                self.fabric = Fabric(
                    accelerator=accelerator,
                    devices=devices,
                    num_nodes=nodes,
                    strategy=ddp if several else "auto",
                    precision="bf16-mixed" if self.bfloat16 else "32-true",
                    plugins=[LightningEnvironment()] if OURS in os.environ else None,
                )
                self.fabric.launch()
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            raise TrainingError(
                f"{count(devices, 'device')} ({accelerator}) on {count(nodes, 'node')} cannot be had: {error}"
            ) from error
        self.rank, self.size, self.near = self.fabric.global_rank, self.fabric.world_size, devices
        self.device = self.fabric.device
        if self.size > 1:
            self._told: Any = dist.new_group(backend="gloo")  # for what lies in memory, whatever the devices
            self._sums = dist.new_group()  # of normalisation: in the midst of a backward pass that has its own traffic

    def barrier(self) -> None:
        self.fabric.barrier()

    def gather(self, own: T) -> list[T]:
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own, group=self._told)
        return found

    def broadcast(self, own: T) -> T:
        if self.size == 1:
            return own
        sent: list[Any] = [own if self.leads else None]
        dist.broadcast_object_list(sent, src=0, group=self._told)
        return sent[0]

    def total(self, own: Tensor) -> Tensor:
        found = own.detach().clone().cpu()
        if self.size > 1:
            dist.all_reduce(found, group=self._told)
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
            raise TrainingError("the team was made for another training.precision; give it the detector's settings")
        wrapped, _ = self.fabric.setup(_Work(module), optimiser)
        normalising = batch_norms(module) if self.size > 1 else []

        def work(indices: Tensor, rng: Generator, share: Share) -> Terms:
            return wrapped(partial(loss, indices, rng, share))

        def backward(value: Tensor, last: bool) -> None:
            with self.fabric.no_backward_sync(wrapped, enabled=not last):
                self.fabric.backward(value)

        for part in normalising:
            part.forward = partial(_normalise, part, self._sums)  # type: ignore[method-assign]
        try:
            yield Engine(work, backward)
        finally:
            for part in normalising:
                del part.forward
            module.cpu()


class _Work(nn.Module):
    """What Fabric wraps: work on a module, which need not be its `forward`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, work: Callable[[], Terms]) -> Terms:
        return work()


class _Sum(torch.autograd.Function):
    """Sums over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group, found = group, own.clone()
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found = gradients[0].contiguous().clone()
        dist.all_reduce(found, group=ctx.group)
        return found, None


def _normalise(part: nn.BatchNorm2d, group: Any, x: Tensor) -> Tensor:
    """`part(x)` by the statistics of all processes' rows. torch's own `SyncBatchNorm` knows no processors."""
    if not part.training:
        return nn.BatchNorm2d.forward(part, x)
    assert part.running_mean is not None and part.running_var is not None and part.num_batches_tracked is not None
    assert part.momentum is not None
    wide, places = x.float() if x.dtype == torch.bfloat16 else x, (0, 2, 3)
    count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
    dist.all_reduce(count, group=group)
    n = float(count)
    mean = _summed(wide.sum(places), group) / n
    apart = wide - mean[:, None, None]
    variance = _summed(apart.square().sum(places), group) / n
    with torch.no_grad():
        part.num_batches_tracked += 1
        part.running_mean.lerp_(mean.to(part.running_mean), part.momentum)
        part.running_var.lerp_((variance * (n / (n - 1))).to(part.running_var), part.momentum)
    scale = (variance + part.eps).rsqrt()
    if part.weight is None:
        return (apart * scale[:, None, None]).to(x.dtype)
    return torch.addcmul(part.bias[:, None, None], apart, (scale * part.weight)[:, None, None]).to(x.dtype)


def _summed(own: Tensor, group: Any) -> Tensor:
    return _Sum.apply(own, group)
