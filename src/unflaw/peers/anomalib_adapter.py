"""Run a method of anomalib on prepared images: `python anomalib_adapter.py JOB.json`, in anomalib's environment.

This file imports nothing of unflaw. The job is

    {"method": "patchcore" | "padim" | "reverse_distillation", "backbone": "resnet18", "weights": FILE or null,
     "layers": ["layer2", "layer3"] or null, "seed": 0, "train": "train.npy", "test": "test.npy", "out": FOLDER,
     "options": {…}}

train.npy and test.npy hold RGB images, (N, S, S, 3) uint8, at the size of the method. Null weights are those that
anomalib finds itself; null layers are the method's own; missing options have anomalib's defaults (see OPTIONS).

Files written to `out`: raw maps.npy (N, S, S) and scores.npy (N,), both float32, and record.json. Exit status: 0; 2 if
the job cannot be run, with the reason on stderr; 3 if anomalib cannot be imported.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

OPTIONS = {  # anomalib's own, and ours: "batch" (images per training batch), "epochs" and "steps"
    "patchcore": {"coreset_sampling_ratio", "num_neighbors", "batch"},
    "padim": {"n_features", "batch"},
    "reverse_distillation": {"anomaly_map_mode", "batch", "epochs", "steps"},
}
CLASSES = {"patchcore": "Patchcore", "padim": "Padim", "reverse_distillation": "ReverseDistillation"}
BATCH, EPOCHS = 32, 200  # anomalib's training batch; epochs of the reverse distillation paper
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class JobError(ValueError):
    """A job that cannot be run. The message gives the reason."""


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    _check(job)
    if job["weights"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no network is needed
    try:
        import anomalib
        import numpy as np
        import torch
        from anomalib import models
    except ImportError as error:
        print(f"cannot import {error.name or 'anomalib'}: {error}", file=sys.stderr)
        raise SystemExit(3) from error
    random.seed(job["seed"])
    np.random.seed(job["seed"])  # noqa: NPY002 - scikit-learn, which anomalib projects with, draws from this one
    torch.manual_seed(job["seed"])
    train, test = (np.load(job[part], mmap_mode="r") for part in ("train", "test"))
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))

    def tensor(images: Any) -> Any:
        """Convert (n, S, S, 3) uint8 to (n, 3, S, S) float32, standardised."""
        return (torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous() / 255 - mean) / deviation

    start = time.perf_counter()
    module = _create_module(models, job, train.shape[1])
    trained = _train(module, job, train, tensor)
    training = time.perf_counter() - start
    model = module.model.eval()
    out = Path(job["out"])
    maps = np.lib.format.open_memmap(out / "maps.npy", "w+", np.float32, test.shape[:3])
    scores = np.empty(len(test), np.float32)
    with torch.inference_mode():
        model(tensor(test[:1]))  # warm up
        cpu, seconds = time.process_time(), list[float]()
        for i in range(len(test)):
            start = time.perf_counter()
            prediction = model(tensor(test[i : i + 1]))
            maps[i] = prediction.anomaly_map.reshape(test.shape[1:3]).float().numpy()
            scores[i] = float(prediction.pred_score)
            seconds.append(time.perf_counter() - start)
        cpu = time.process_time() - cpu
    if not all(np.isfinite(row).all() for row in (scores, *maps)):
        raise JobError("the maps or scores hold NaN or infinite values; train with another seed or fewer steps")
    maps.flush()
    np.save(out / "scores.npy", scores)
    record = {
        "anomalib": anomalib.__version__,
        "torch": torch.__version__,
        **{name: job[name] for name in ("method", "backbone", "seed", "options")},
        "layers": list(module.model.layers if hasattr(module.model, "layers") else module.layers),
        "images": [len(train), len(test)],
        "seconds_training": training,
        "seconds_per_image": {"median": float(np.median(seconds)), "p95": float(np.quantile(seconds, 0.95))},
        "cpu_seconds_per_image": cpu / len(test),
        "peak_bytes": _peak_bytes(),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **trained,
    }
    (out / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _check(job: dict[str, Any]) -> None:
    method, given = job["method"], set(job["options"])
    if method not in OPTIONS:
        raise JobError(f"there is no method {method!r}; choose from {', '.join(OPTIONS)}")
    if unknown := given - OPTIONS[method]:
        raise JobError(f"{method} has no options {sorted(unknown)}; there are {', '.join(sorted(OPTIONS[method]))}")
    if {"epochs", "steps"} <= given:
        raise JobError("give epochs or steps, not both")


def _create_module(models: Any, job: dict[str, Any], size: int) -> Any:
    """Create anomalib's own Lightning module, for its defaults and optimiser, with the job's backbone weights."""
    import timm

    kind = getattr(models, CLASSES[job["method"]])
    defaults = inspect.signature(kind).parameters
    layers = list(job["layers"] or defaults["layers"].default)
    feature_info: Any = timm.create_model(job["backbone"], features_only=True).feature_info
    known = [level["module"] for level in feature_info.info]
    if missing := [layer for layer in layers if layer not in known]:  # anomalib would ignore them
        raise JobError(f"{job['backbone']} has no layers {missing}; there are {', '.join(known)}")
    if job["method"] == "reverse_distillation" and layers != list(defaults["layers"].default):
        raise JobError(f"reverse_distillation's decoder needs the layers {list(defaults['layers'].default)}")
    options = {name: value for name, value in job["options"].items() if name in defaults}
    if "anomaly_map_mode" in options:
        options["anomaly_map_mode"] = type(defaults["anomaly_map_mode"].default)(options["anomaly_map_mode"])
    try:
        module = kind(
            backbone=job["backbone"],
            layers=layers,
            pre_trained=not job["weights"],
            pre_processor=kind.configure_pre_processor((size, size)),  # determines only the size
            **dict.fromkeys(("post_processor", "evaluator", "visualizer"), False),
            **options,
        )
    except ValueError as error:
        raise JobError(str(error)) from error
    if job["weights"]:
        extractor = module.model.encoder if hasattr(module.model, "encoder") else module.model.feature_extractor
        _load(extractor.feature_extractor, Path(job["weights"]), f"{job['method']} of {job['backbone']}, {layers}")
    return module


def _load(backbone: Any, path: Path, purpose: str) -> None:
    """Load every tensor of the backbone from the file; others in the file belong to deeper layers."""
    import torch
    from safetensors.torch import load_file

    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        missing, _ = backbone.load_state_dict(state, strict=False)
    except Exception as error:  # damaged files raise exceptions of many kinds, other tensor shapes RuntimeError
        raise JobError(f"{path}: cannot serve {purpose} ({error})") from error
    if missing:
        raise JobError(f"{path}: cannot serve {purpose}: lacks {len(missing)} of its tensors (first: {missing[0]})")


def _train(module: Any, job: dict[str, Any], images: Any, tensor: Any) -> dict[str, Any]:
    """Train as anomalib's trainer would; return the entries for the record."""
    import torch

    batch, model = job["options"].get("batch", BATCH), module.model.train()
    if job["method"] != "reverse_distillation":
        with torch.no_grad():
            for start in range(0, len(images), batch):
                model(tensor(images[start : start + batch]))  # it keeps the embeddings
            module.fit()
        if job["method"] == "padim":
            return {"gaussians": list(model.gaussian.mean.shape[::-1])}
        return {"memory_bank": list(model.memory_bank.shape)}
    epoch = math.ceil(len(images) / batch)
    steps = job["options"].get("steps", job["options"].get("epochs", EPOCHS) * epoch)
    optimizer = module.configure_optimizers()
    order: list[torch.Tensor] = []  # remaining batches of this epoch
    losses = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(images)).split(batch))
        loss = module.loss(*model(tensor(images[order.pop(0).sort().values.numpy()])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-epoch:]
    return {"steps": steps, "loss": sum(last) / len(last) if last else None}


def _peak_bytes() -> int | None:
    """Peak resident memory of this process, from VmHWM if there is one: ru_maxrss may include its predecessor's."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except JobError as problem:
        print(problem, file=sys.stderr)
        raise SystemExit(2) from None
