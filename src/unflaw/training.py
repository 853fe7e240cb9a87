"""From good pictures to a trained method: the feature cache and the one training loop, the same for every method."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from unflaw.config import Training
from unflaw.features import FeatureExtractor
from unflaw.files import write_atomically
from unflaw.images import ImageError, Preparation, Prepared, prepare, read

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[str, int, int, float | None], None]  # stage, done, total, loss


class TrainingError(ValueError):
    """Data or settings that cannot give a detector. The message says why and what to do."""


def silent(stage: str, done: int, total: int, loss: float | None = None) -> None:
    """Progress that nobody watches."""


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 2, depth: int = 8) -> Iterator[R]:
    """`map` in threads that stays at most `depth` items ahead of the consumer, in order."""
    with ThreadPoolExecutor(workers) as pool:
        iterator = iter(items)
        waiting = [pool.submit(function, item) for item in islice(iterator, depth)]
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(iterator, 1)]
            yield result


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def load(path: Path, preparation: Preparation) -> Prepared | ImageError:
    """A prepared picture, or why it could not be read: one bad file must not end a batch."""
    try:
        return prepare(read(path), preparation)
    except ImageError as error:
        return error


def stack(prepared: Sequence[Prepared]) -> Tensor:
    """Prepared pictures as (N, 3, S, S) float32 in [0, 1]."""
    return torch.from_numpy(np.stack([p.pixels for p in prepared]))


@dataclass
class Cache:
    """Everything training needs of each good picture; the backbone is never run again.

    Attributes:
        features: F (N, C, g, g), float16, in RAM or memory-mapped.
        thumbnails: (N, 3, t, t) uint8, what the display decoder learns to draw.
        paths: The N pictures.
        skipped: `(path, reason)` of pictures that could not be read.
    """

    features: Tensor
    thumbnails: Tensor
    paths: list[Path]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def subset(self, indices: Tensor) -> Cache:
        """Some of the pictures; copies unless memory-mapped features would not fit."""
        return Cache(self.features[indices], self.thumbnails[indices], [self.paths[i] for i in indices.tolist()])


THUMBNAIL = 128
MINIMUM = 8  # good pictures


def build_cache(
    extractor: FeatureExtractor,
    paths: Sequence[Path],
    preparation: Preparation,
    budget: float,
    progress: Progress = silent,
    *,
    fit: bool = True,
    batch: int = 16,
) -> Cache:
    """Reads every picture once, fits the extractor on the first ones and embeds all.

    Args:
        extractor: A `FeatureExtractor`; its `fit` sees at most 64 pictures, spread over the list, or 512 MB.
        budget: Features above this many bytes are memory-mapped in a temporary folder, else kept in RAM.
        fit: False leaves the extractor as it is, for pictures that only calibrate.

    Raises:
        TrainingError: To learn from: fewer than 8 readable pictures, or all identical. To calibrate with: none.
    """
    order = np.random.default_rng(0).permutation(len(paths)).tolist()  # so that the first pictures are typical
    skipped: list[tuple[str, str]] = []
    kept: list[int] = []
    thumbnails: list[Tensor] = []
    store: Tensor | None = None
    folder: tempfile.TemporaryDirectory[str] | None = None
    pending: list[Tensor] = []
    fitted = 0

    def flush() -> None:
        """Fits on what was gathered, then embeds it."""
        nonlocal store, folder, fitted, pending
        raw = torch.cat(pending)
        if fit:
            extractor.fit(raw)
        shape = (len(paths), *extractor.project(raw[:1]).shape[1:])
        if np.prod(shape) * 2 > budget:
            folder = tempfile.TemporaryDirectory(prefix="unflaw-cache-")
            file = np.memmap(Path(folder.name) / "features", np.float16, "w+", shape=shape)
            store = torch.from_numpy(file)
        else:
            store = torch.empty(shape, dtype=torch.float16)
        for part in pending:
            store[fitted : fitted + len(part)] = extractor.project(part)
            fitted += len(part)
        pending = []

    loaded = ahead(lambda i: (i, load(paths[i], preparation)), order)
    for group in batched(loaded, batch):
        for i, picture in group:
            if isinstance(picture, ImageError):
                skipped.append((str(paths[i]), str(picture)))
        good = [(i, p) for i, p in group if isinstance(p, Prepared)]
        if not good:
            continue
        images = stack([p for _, p in good])
        kept += [i for i, _ in good]
        thumbnails.append((F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="area") * 255).round().byte())
        raw = extractor.aggregate(images)
        if store is None:
            pending.append(raw)
            gathered = sum(map(len, pending))
            if gathered >= 64 or gathered * raw[0].nbytes >= 2**29:
                flush()
        else:
            store[fitted : fitted + len(raw)] = extractor.project(raw)
            fitted += len(raw)
        progress("features", len(kept), len(paths), None)
    if len(kept) < (MINIMUM if fit else 1):
        reasons = f"; {len(skipped)} could not be read, first: {skipped[0][1]}" if skipped else ""
        purpose = f"learn from: at least {MINIMUM} needed" if fit else "calibrate with"
        raise TrainingError(f"{len(kept)} good pictures are too few to {purpose}{reasons}")
    if store is None:
        flush()
    assert store is not None
    back = torch.from_numpy(np.argsort(kept))  # the order of the list, whatever was skipped
    pictures = torch.cat(thumbnails)[back]
    if fit and bool((pictures == pictures[:1]).all()):
        raise TrainingError("all good pictures are identical; give pictures of different parts")
    features = store[: len(kept)]
    if folder is None:
        features = features[back]
        paths_kept = [paths[i] for i in sorted(kept)]
    else:  # reordering would read the whole file: keep it as written
        pictures, paths_kept = torch.cat(thumbnails), [paths[i] for i in kept]
    return Cache(features, pictures, paths_kept, skipped, folder)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One cycle: linear warm-up over the first tenth, cosine to a hundredth of the peak."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def step_rng(seed: int, step: int) -> Generator:
    """Randomness of one step, a function of seed and step alone: resuming needs no generator state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def optimise(
    module: nn.Module,
    loss: Callable[[Tensor, Generator], dict[str, Tensor]],
    n: int,
    steps: int,
    settings: Training,
    *,
    stage: str = "training",
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> list[dict[str, float]]:
    """The loop: AdamW, one-cycle rate, clipped gradients; the last step counts, nothing is chosen on test images.

    Args:
        module: Its parameters that require gradients are trained.
        loss: From indices (B,) into the cache and randomness to named terms; "loss" is minimised.
        n: Number of pictures in the cache.
        steps: Optimiser steps.
        checkpoint: Saved there every `settings.checkpoint_seconds`, resumed from where present, removed at the end.

    Returns:
        The mean of each term over every hundredth of the run.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    history: list[dict[str, float]] = []
    start = 0
    if checkpoint is not None and checkpoint.is_file():
        start, history = _restore(checkpoint, module, optimiser, stage)
    module.train()
    saved, window = time.monotonic(), []
    for step in range(start, steps):
        rng = step_rng(settings.seed, step)
        indices = torch.randint(n, (settings.batch,), generator=rng)
        terms = loss(indices, rng)
        if not torch.isfinite(terms["loss"]):
            raise TrainingError(f"the loss became infinite at step {step}; lower --set training.learning_rate")
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps, settings.learning_rate)
        optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        window.append({name: float(value.detach()) for name, value in terms.items()})
        if len(window) >= max(1, steps // 100) or step == steps - 1:
            history.append({name: float(np.mean([w[name] for w in window])) for name in window[0]})
            window = []
            progress(stage, step + 1, steps, history[-1]["loss"])
            if checkpoint is not None and time.monotonic() - saved > settings.checkpoint_seconds:
                _checkpoint(checkpoint, module, optimiser, step + 1, history, stage)
                saved = time.monotonic()
    module.eval()
    return history


def _checkpoint(
    path: Path,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    history: list[dict[str, float]],
    stage: str,
) -> None:
    tensors: dict[str, Tensor] = {f"module.{n}": t for n, t in module.named_parameters() if t.requires_grad}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"stage": stage, "step": str(step), "history": json.dumps(history)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _restore(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, stage: str
) -> tuple[int, list[dict[str, float]]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        if metadata["stage"] != stage:
            return 0, []
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    parameters = dict(module.named_parameters())
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
    return int(metadata["step"]), json.loads(metadata["history"])
