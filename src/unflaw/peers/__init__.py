"""Methods of anomalib measured beside unflaw: same images, same backbone weights, same size, same metrics.

anomalib runs in an environment of its own and is no dependency; `anomalib_adapter.py` is all of ours that runs there.
Images go over as arrays, maps and scores come back raw. docs/peers.md says what is equal and what is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from unflaw.config import WeightSource
from unflaw.datasets import Dataset, Sample
from unflaw.errors import ImageError, TrainingError
from unflaw.evaluation.accumulate import Measurement
from unflaw.evaluation.results import Evaluation
from unflaw.features.backbones import create_backbone
from unflaw.imaging.tiling import Box, Preparation
from unflaw.imaging.transforms import try_prepare
from unflaw.io.progress import Progress, ahead, silent
from unflaw.io.words import count

ADAPTER = Path(__file__).with_name("anomalib_adapter.py")
LEVELS = {"patchcore": (2, 3), "padim": (1, 2, 3), "reverse_distillation": (1, 2, 3)}  # anomalib's defaults
INSTALL = "python3 -m venv FOLDER && FOLDER/bin/python -m pip install 'anomalib>=2.7,<3'"
_KNOWN = "import importlib.util, sys; sys.exit(3 * (importlib.util.find_spec('anomalib') is None))"


class PeerError(RuntimeError):
    """A peer that could not be run. The message says why and what to do."""


@dataclass
class PeerRun:
    """A method of anomalib, measured.

    Attributes:
        evaluation: As `evaluate` gives it, without what needs calibration: no verdicts, p-values or threshold, and no
            images for a report. "timing" is that of the method alone, images read and resized before; "peer" is
            `record`.
        maps: (N, S, S) float32, raw, memory-mapped, in the order of the N rows of the evaluation.
        boxes: The part of the canvas (x0, y0, x1, y1) that each of the N images covers.
        record: What the adapter says of the run: versions, times, peak memory, threads, size of the model.
    """

    evaluation: Evaluation
    maps: np.ndarray
    boxes: list[Box]
    record: dict[str, Any]
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)


def run_peer(
    python: str | Path,
    method: str,
    dataset: Dataset,
    preparation: Preparation,
    *,
    backbone: str = "resnet18",
    weights: WeightSource = None,
    levels: tuple[int, ...] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    spool: bool = False,
    progress: Progress = silent,
) -> PeerRun:
    """Trains a method of anomalib on the good images of a data set and measures it on the test part.

    It trains on *all* of `dataset.train`, since it keeps none out to calibrate, and never sees `dataset.validation`.

    Args:
        python: Interpreter of the environment that has anomalib (INSTALL).
        method: One of LEVELS.
        backbone, weights: As for `FeatureExtractor`: whatever unflaw would load is what the peer gets.
        levels: Of the backbone, as in `Features`; None: anomalib's default of the method.
        options: The method's own, as in OPTIONS of the adapter, such as {"coreset_sampling_ratio": 0.01}; what is left
            out has anomalib's default.
        out: Keeps maps.npy, scores.npy and record.json; None: they go when the run is let go of.
        spool: As for `evaluate`.

    Raises:
        PeerError: Unknown method, no interpreter, no anomalib, or the adapter failed. WeightsError: as
            `create_backbone`. TrainingError: no images to train or to test on.
    """
    if method not in LEVELS:
        raise PeerError(f"there is no peer {method!r}; choose from {', '.join(LEVELS)}")
    for part, samples in (("training", dataset.train), ("test", dataset.test)):
        if not samples:
            raise TrainingError(f"{dataset.name}: there are no {part} images")
    preparation = preparation.model_copy(update={"tile": None})  # whole images are what a peer takes
    _run(python, "-c", _KNOWN)
    model = create_backbone(backbone, levels or LEVELS[method], weights)
    feature_info: Any = model.feature_info
    folder = tempfile.TemporaryDirectory() if out is None else None
    target = Path(folder.name if folder else out or "").absolute()
    target.mkdir(parents=True, exist_ok=True)
    skipped: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as work:
        files = {name: str(Path(work) / name) for name in ("train.npy", "test.npy", "weights.safetensors", "job.json")}
        save_file(model.state_dict(), files["weights.safetensors"])
        _write(dataset.train, preparation, files["train.npy"], skipped, progress)
        tested, boxes = _write(dataset.test, preparation, files["test.npy"], skipped, progress)
        job = {
            "method": method,
            "backbone": backbone,
            "weights": files["weights.safetensors"],
            "layers": feature_info.module_name(),
            "seed": seed,
            "train": files["train.npy"],
            "test": files["test.npy"],
            "out": str(target),
            "options": dict(options or {}),
        }
        Path(files["job.json"]).write_text(json.dumps(job), encoding="utf-8")
        progress(f"anomalib {method}", 0, 1, None)
        _run(python, str(ADAPTER), files["job.json"])
        progress(f"anomalib {method}", 1, 1, None)
    maps, scores = np.load(target / "maps.npy", mmap_mode="r"), np.load(target / "scores.npy")
    record = json.loads((target / "record.json").read_text(encoding="utf-8"))
    measured = Measurement(dataset, preparation, spool=spool)
    for sample, score, anomaly_map, box in zip(tested, scores, maps, boxes, strict=True):
        measured.add(sample, float(score), anomaly_map, box)
    metrics = {
        **measured.metrics(),
        "skipped": skipped,
        "problems": [*dataset.problems, *measured.problems],
        "dataset": dataset.name,
        "timing": {
            "seconds_per_image": round(record["seconds_per_image"]["median"], 4),
            "cpu_seconds_per_image": round(record["cpu_seconds_per_image"], 4),
            "training": round(record["seconds_training"], 2),
        },
        "peer": record,
    }
    images = measured.per_image() if spool else None
    evaluation = Evaluation(metrics, measured.rows, measured.curves(), [], skipped, images)
    return PeerRun(evaluation, maps, boxes, record, folder)


def _write(
    samples: Sequence[Sample], preparation: Preparation, file: str, skipped: list[tuple[str, str]], progress: Progress
) -> tuple[list[Sample], list[Box]]:
    """Prepared images into a file, (N, S, S, 3) uint8, one at a time.

    `prepare` resizes images of eight bits in eight bits, so nothing is lost of those; deeper ones are rounded.

    Returns:
        The samples that could be read, and their boxes; the others are added to `skipped`.
    """
    size = preparation.size
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (len(samples), size, size, 3))
    kept: list[Sample] = []
    boxes: list[Box] = []
    before = len(skipped)
    outcomes = ahead(lambda sample: try_prepare(sample.path, preparation), samples)
    for i, (sample, image) in enumerate(zip(samples, outcomes, strict=True)):
        if isinstance(image, ImageError):
            skipped.append((str(sample.path), str(image)))
        else:
            pixels[len(kept)] = np.rint(image.pixels.transpose(1, 2, 0) * 255)
            kept.append(sample)
            boxes.append(image.box)
        progress("images", i + 1, len(samples), None)
    if not kept:
        raise TrainingError(f"none of {count(len(samples), 'image')} could be read; {skipped[before][1]}")
    if len(kept) < len(samples):
        np.save(f"{file}.part.npy", pixels[: len(kept)])
        Path(f"{file}.part.npy").replace(file)
    return kept, boxes


def _run(python: str | Path, *arguments: str) -> None:
    """The given interpreter, without this one's module path; PeerError where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            [str(python), *arguments], env=environment, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise PeerError(
            f"{python}: cannot be started ({error.strerror}); name the interpreter of anomalib's environment. "
            f"To make one: {INSTALL}"
        ) from error
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    if done.returncode == 3:
        raise PeerError(f"{python}: has no anomalib that can be imported ({lines[-1]}); {INSTALL}")
    if done.returncode == 2:
        raise PeerError(f"anomalib was not run: {lines[-1]}")
    if done.returncode < 0:
        raise PeerError(f"anomalib was ended by signal {-done.returncode}; 9 mostly means too little memory")
    if done.returncode:
        raise PeerError("anomalib failed; its last lines:\n" + "\n".join(lines[-10:]))
