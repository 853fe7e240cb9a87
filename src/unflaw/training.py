"""The one training loop, the same for every method, and its checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from unflaw.config import Training
from unflaw.errors import TrainingError
from unflaw.files import write_atomically
from unflaw.streams import Progress, silent


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One cycle: linear warm-up over the first tenth, cosine to a hundredth of the peak."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def uses_bfloat16(settings: Training) -> bool:
    """Whether matrix products in training are bfloat16: faster where the processor has it, slower where emulated."""
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
    identity: str = "",
) -> list[dict[str, float]]:
    """The loop: AdamW, one-cycle rate, clipped gradients; the last step counts, nothing is chosen on test images.

    Args:
        module: Its parameters that require gradients are trained.
        loss: From indices (B,) into the cache and randomness to named terms; "loss" is minimised.
        n: Number of pictures in the cache.
        steps: Optimiser steps.
        checkpoint: Saved there every `settings.checkpoint_seconds`; resumed from where present.
        identity: Of data and settings; a checkpoint of others is refused.

    Returns:
        The mean of each term over every hundredth of the run.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    history: list[dict[str, float]] = []
    start = 0
    if checkpoint is not None and checkpoint.is_file():
        start, history = _restore(checkpoint, module, optimiser, identity)
    module.train()
    saved, window = time.monotonic(), []
    for step in range(start, steps):
        rng = step_rng(settings.seed, step)
        indices = torch.randint(n, (settings.batch,), generator=rng)
        terms = loss(indices, rng)
        if not torch.isfinite(terms["loss"]):
            raise TrainingError(
                f"the loss became infinite at step {step}; lower it with --set training.learning_rate=…"
            )
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
                _checkpoint(checkpoint, module, optimiser, step + 1, history, identity)
                saved = time.monotonic()
    module.eval()
    return history


def _checkpoint(
    path: Path,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    history: list[dict[str, float]],
    identity: str,
) -> None:
    # buffers too: the running statistics of batch normalisation change from step to step
    named = [(n, t) for n, t in module.named_parameters() if t.requires_grad] + list(module.named_buffers())
    tensors: dict[str, Tensor] = {f"module.{n}": t for n, t in named}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"identity": identity, "step": str(step), "history": json.dumps(history)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _restore(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, identity: str
) -> tuple[int, list[dict[str, float]]]:
    """Step and history of a checkpoint, whose tensors are put into module and optimiser."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                raise TrainingError(f"{path}: is of other pictures or settings; delete it, or train without --resume")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
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
        return int(metadata["step"]), json.loads(metadata["history"])
    except TrainingError:
        raise
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise TrainingError(f"{path}: the checkpoint is damaged ({error}); delete it and train again") from error
