"""Training loop of all methods, and its checkpoints."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from unflaw.calibration.crossfit import feature_set
from unflaw.config import Training
from unflaw.datasets.samples import digest
from unflaw.errors import TrainingError
from unflaw.features.cache import Cache
from unflaw.io.files import damaged_checkpoint, holding, write_atomically
from unflaw.io.progress import Progress, silent
from unflaw.io.words import count
from unflaw.methods import Method
from unflaw.parallel.process_group import (
    SINGLE_PROCESS,
    Engine,
    Loss,
    ProcessGroup,
    Terms,
    batch_norms,
    uses_bfloat16,
)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One-cycle schedule: linear warm-up over the first tenth, cosine decay to a hundredth of the peak."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trainable parameters as two groups for an optimiser: those that decay and those that do not.

    Weights of linear and convolutional layers and embeddings decay. Biases, scales of normalisation and single tokens,
    which have one dimension, do not; nor do parameters that a module names in `no_decay`, such as the log-deviations of
    Bayesian weights, which decay would pull towards a deviation of 1.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad:
                groups[parameter.ndim > 1 and name not in getattr(part, "no_decay", ())].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def step_rng(seed: int, step: int, stream: int = 0) -> Generator:
    """Generator of one step, a function of the arguments only, so that resuming needs no generator state.

    `stream` numbers the parts of a batch: the passes of all processes. Generators use the lower 32 bits of a seed; in
    these the golden ratio keeps a thousand streams a million steps apart.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step + stream * 2_654_435_769)


_SEEDING = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Makes the initialisation of new modules a function of the seed, and restores the global generator afterwards.

    Only the generator of the CPU is seeded, where modules are created. Threads wait for each other.
    """
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def optimise(
    module: nn.Module,
    loss: Loss,
    n: int,
    steps: int,
    settings: Training,
    *,
    stage: str = "training",
    progress: Progress = silent,
    checkpoint: Path | None = None,
    identity: str = "",
    group: ProcessGroup = SINGLE_PROCESS,
    bfloat16: bool = False,
) -> list[dict[str, float]]:
    """Trains with AdamW, a one-cycle learning rate and clipped gradients; the last step is used, without selection.

    A batch is computed in equal parts: one for each process of the group and each of its `settings.accumulate` passes.
    Each part has its own random stream, draws its own rows, and counts equally in the gradient. So one process
    with two passes is equivalent to two processes with one pass, up to rounding. Batch normalisation is per part; its
    running statistics are those of the process of rank 0.

    Args:
        module: Module whose parameters that require gradients are trained.
        loss: Maps rows (B,) of the cache and a generator to named terms, means over these rows; "loss" is minimised.
        n: Number of images in the cache.
        steps: Optimiser steps.
        checkpoint: File to resume from, if it exists. It is saved every `settings.checkpoint_seconds`, after the last
            step, and after the step in which Ctrl-C is pressed.
        identity: Identity of data and settings; a checkpoint with another one is refused.
        group: Processes that train together.
        bfloat16: Use bfloat16 for matrix products.

    Returns:
        Mean of each term over every hundredth of the run.

    Raises:
        TrainingError: The batch has no equal parts, the loss is infinite, or the checkpoint is unusable.
        InUseError: Another training writes the checkpoint. KeyboardInterrupt: Ctrl-C; `module` is in evaluation mode,
            as always afterwards.
    """
    parts = _parts(settings, group)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(decay_groups(module, settings.weight_decay), settings.learning_rate)
    history: list[dict[str, float]] = []
    window: list[dict[str, float]] = []  # steps that are not yet in history
    start = 0
    with ExitStack() as stack:
        if checkpoint is not None:
            if group.is_main:
                stack.enter_context(holding(checkpoint))
            if saved_state := group.on_main(lambda: _read(checkpoint, identity)):
                start, history, window = _restore(checkpoint, saved_state, module, optimiser)
                progress(stage, start, steps, history[-1]["loss"] if history else None)
        module.train()
        stack.callback(module.eval)
        saved = time.monotonic()
        asked = stack.enter_context(_interruptible(checkpoint is not None))
        engine = stack.enter_context(group.engine(module, optimiser, loss, bfloat16))
        for step in range(start, steps):
            for parameter_group in optimiser.param_groups:
                parameter_group["lr"] = learning_rate(step, steps, settings.learning_rate)
            optimiser.zero_grad(set_to_none=True)
            terms = _gradients(engine, n, settings, step, parts, group)
            if not np.isfinite(terms["loss"]):
                raise TrainingError(
                    f"the loss became infinite at step {step}; lower it with --set training.learning_rate=…"
                )
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            window.append(terms)
            last = step == steps - 1
            if full := len(window) >= max(1, steps // 100) or last:
                history.append({name: float(np.mean([w[name] for w in window])) for name in window[0]})
                window = []
                progress(stage, step + 1, steps, history[-1]["loss"])
            if checkpoint is not None:
                stopped = bool(group.all_reduce(torch.tensor(float(asked()))))  # all processes stop after the same step
                due = full and (last or time.monotonic() - saved > settings.checkpoint_seconds)
                if group.is_main and (stopped or due):
                    _checkpoint(checkpoint, module, optimiser, step + 1, history, identity, steps, window)
                    saved = time.monotonic()
                if stopped:
                    raise KeyboardInterrupt
        if group.size > 1:
            for norm in batch_norms(module):
                norm.load_state_dict(group.broadcast(norm.state_dict()))
    return history


@contextmanager
def _interruptible(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt at once.

    It always returns False if `wanted` is False, outside of the main thread, and if Ctrl-C has another handler.
    """
    noted = False

    def note(number: int, frame: Any) -> None:
        nonlocal noted
        if noted:
            signal.default_int_handler(number, frame)
        noted = True

    ours = threading.current_thread() is threading.main_thread()
    if not (wanted and ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if noted:  # after the last step
        raise KeyboardInterrupt


def train(
    network: Method,
    cache: Cache,
    textures: Tensor | None,
    rng: Generator,
    *,
    progress: Progress = silent,
    checkpoint: Path | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[dict[str, float]]:
    """Trains a method on a cache: first `Method.fit_memory`, then the loop.

    Args:
        network: Method with its extractor fitted.
        cache: Training images.
        textures: F of texture images, for methods that use them.
        rng: Random stream of `Method.fit_memory`.
        progress, checkpoint, group: See `optimise`.

    Returns:
        The history of `optimise`; empty for a method that trains nothing.
    """
    settings = network.config.training
    progress("memory", 0, 1, None)
    with torch.no_grad():
        extras = network.fit_memory(feature_set(cache, network, textures), rng)
    progress("memory", 1, 1, None)
    tensors = {"features": cache.features, **extras}

    def loss(rows: Tensor, rng: Generator) -> Terms:
        return network.loss({name: t[rows].to(group.device).float() for name, t in tensors.items()}, rng)

    if not any(p.requires_grad for p in network.parameters()):
        return []
    return optimise(
        network,
        loss,
        len(cache),
        settings.steps,
        settings,
        progress=progress,
        checkpoint=checkpoint,
        identity=_identity(network, cache) if checkpoint is not None and group.is_main else "",
        group=group,
        bfloat16=uses_bfloat16(settings, group.device),
    )


def _identity(network: Method, cache: Cache) -> str:
    """Identity of images, backbone and settings, for checkpoints."""
    backbone = hashlib.sha256()
    for tensor in network.features.backbone.state_dict().values():
        backbone.update(tensor.numpy().tobytes())
    samples = {name: [cache.paths[row] for row in cache.heads(rows)] for name, rows in cache.rows().items()}
    contents = cache.content_of()
    images = " ".join(name + digest(own, contents) for name, own in samples.items())
    return f"{images} {backbone.hexdigest()} {network.config.model_dump_json()}"


def _parts(settings: Training, group: ProcessGroup) -> int:
    """Returns the number of equal parts of a batch. Raises TrainingError if it cannot be divided."""
    parts = group.size * settings.accumulate
    if settings.batch % parts:
        processes, passes = count(group.size, "process", "processes"), count(settings.accumulate, "pass", "passes")
        raise TrainingError(
            f"a batch of {settings.batch} cannot be cut into equal parts for {processes} in {passes} each; choose a "
            f"multiple of {parts}, such as --set training.batch={-(-settings.batch // parts) * parts}"
        )
    return parts


def _gradients(
    engine: Engine, n: int, settings: Training, step: int, parts: int, group: ProcessGroup
) -> dict[str, float]:
    """Computes the gradients of the mean loss over a batch; returns the means of its terms."""
    passes, sums = settings.accumulate, defaultdict[str, float](float)
    for number in range(passes):
        rng = step_rng(settings.seed, step, group.rank * passes + number)
        rows = torch.randint(n, (settings.batch // parts,), generator=rng)
        terms = engine.loss(rows, rng)
        if "loss" not in terms:
            raise TrainingError(f'the loss of the method has no term "loss" to minimise; it has {", ".join(terms)}')
        engine.backward(terms["loss"] / passes, number == passes - 1)
        for name, value in terms.items():
            sums[name] += float(value.detach())
    means = group.all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64)) / parts
    return dict(zip(sums, means.tolist(), strict=True))


def _checkpoint(
    path: Path,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    history: list[dict[str, float]],
    identity: str,
    steps: int,
    window: list[dict[str, float]],
) -> None:
    # buffers too: the running statistics of batch normalisation change from step to step
    named = [(n, t) for n, t in module.named_parameters() if t.requires_grad] + list(module.named_buffers())
    tensors: dict[str, Tensor] = {f"module.{n}": t for n, t in named}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"identity": identity, "step": str(step), "steps": str(steps)}
    metadata |= {"history": json.dumps(history), "window": json.dumps(window)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _read(path: Path, identity: str) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """Metadata and tensors of a checkpoint; None if it does not exist."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                raise TrainingError(f"{path}: is of other images or settings; delete it, or train without --resume")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}
    except TrainingError:
        raise
    except (SafetensorError, OSError) as error:
        raise damaged_checkpoint(path, error) from error


def _restore(
    path: Path,
    found: tuple[dict[str, str], dict[str, Tensor]],
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> tuple[int, list[dict[str, float]], list[dict[str, float]]]:
    """Loads a checkpoint into module and optimiser; returns step, history and window."""
    metadata, tensors = found
    try:
        parameters: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                kind, rest = name.split(".", 1)
                if kind == "module":
                    parameters[rest].copy_(tensor)
                else:
                    index, term = rest.split(".")
                    state.setdefault(int(index), {})[term] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return int(metadata["step"]), json.loads(metadata["history"]), json.loads(metadata.get("window", "[]"))
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise damaged_checkpoint(path, error) from error
