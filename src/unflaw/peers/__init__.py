"""Methods of anomalib, measured on the same images, backbone weights, image size and metrics as unflaw.

anomalib runs in an environment of its own and is no dependency. Only `anomalib_adapter.py` runs there: it gets images
as arrays and returns raw maps and scores. docs/peers.md lists what is equal and what differs.
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

from unflaw.config import OneWeightSource
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
_HAS_ANOMALIB = "import importlib.util, sys; sys.exit(3 * (importlib.util.find_spec('anomalib') is None))"


class PeerError(RuntimeError):
    """A peer that could not be run. The message gives the reason and a remedy."""


@dataclass
class PeerRun:
    """Results of a method of anomalib.

    Attributes:
        evaluation: Evaluation as of `evaluate`, without what needs calibration (verdicts, p-values, threshold) and
            without images for a report. "timing" excludes reading and resizing; "peer" is `record`.
        maps: Raw anomaly maps, (N, S, S) float32, memory-mapped, in the order of the rows of the evaluation.
        boxes: Part of the canvas (x0, y0, x1, y1) that each of the N images covers.
        record: Record of the adapter: versions, times, peak memory, threads, size of the model.
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
    weights: OneWeightSource = None,
    levels: tuple[int, ...] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    spool: bool = False,
    progress: Progress = silent,
) -> PeerRun:
    """Train a method of anomalib on the good images of a data set and measure it on the test images.

    It trains on all of `dataset.train`, since it holds none out for calibration, and does not see
    `dataset.validation`.

    Args:
        python: Interpreter of an environment with anomalib (INSTALL).
        method: One of LEVELS.
        backbone, weights: See `FeatureExtractor`; the peer gets what unflaw would load.
        levels: Backbone levels, see `Features`; None: anomalib's default for the method.
        options: Options of the method (OPTIONS of the adapter), such as {"coreset_sampling_ratio": 0.01}; the others
            have anomalib's defaults.
        out: Folder that keeps maps.npy, scores.npy and record.json; None: a temporary one, deleted with the result.
        spool: See `evaluate`.

    Raises:
        PeerError: Unknown method, no interpreter, no anomalib, or the adapter failed. WeightsError: See
            `create_backbone`. TrainingError: No images to train or to test on.
    """
    if method not in LEVELS:
        raise PeerError(f"there is no peer {method!r}; choose from {', '.join(LEVELS)}")
    for part, samples in (("training", dataset.train), ("test", dataset.test)):
        if not samples:
            raise TrainingError(f"{dataset.name}: there are no {part} images")
    preparation = preparation.model_copy(update={"tile": None})  # peers take whole images
    if not isinstance(preparation.size, int):
        raise ValueError(f"anomalib's methods are run on square images; a size of {preparation.size_text} is none")
    _run(python, "-c", _HAS_ANOMALIB)
    model = create_backbone(backbone, levels or LEVELS[method], weights)
    feature_info: Any = model.feature_info
    folder = tempfile.TemporaryDirectory() if out is None else None
    target = Path(folder.name if folder else out or "").absolute()
    target.mkdir(parents=True, exist_ok=True)
    skipped: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as work:
        job_file, weight_file, train, test = (
            Path(work) / name for name in ("job.json", "weights.safetensors", "train.npy", "test.npy")
        )
        save_file(model.state_dict(), weight_file)
        _write_images(dataset.train, preparation, train, skipped, progress)
        tested, boxes = _write_images(dataset.test, preparation, test, skipped, progress)
        job = {
            "method": method,
            "backbone": backbone,
            "weights": str(weight_file),
            "layers": feature_info.module_name(),
            "seed": seed,
            "train": str(train),
            "test": str(test),
            "out": str(target),
            "options": dict(options or {}),
        }
        job_file.write_text(json.dumps(job), encoding="utf-8")
        progress(f"anomalib {method}", 0, 1, None)
        _run(python, str(ADAPTER), str(job_file))
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


def _write_images(
    samples: Sequence[Sample], preparation: Preparation, file: Path, skipped: list[tuple[str, str]], progress: Progress
) -> tuple[list[Sample], list[Box]]:
    """Write prepared images to a file, (N, H, W, 3) uint8; return the samples that could be read and their boxes.

    `prepare` resizes 8-bit images in 8 bits, so only deeper images are rounded. The other samples are added to
    `skipped`.
    """
    width, height = preparation.canvas
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (len(samples), height, width, 3))
    kept: list[Sample] = []
    boxes: list[Box] = []
    images = ahead(lambda sample: try_prepare(sample.path, preparation), samples)
    for i, (sample, image) in enumerate(zip(samples, images, strict=True)):
        if isinstance(image, ImageError):
            skipped.append((str(sample.path), str(image)))
        else:
            pixels[len(kept)] = np.rint(image.pixels.transpose(1, 2, 0) * 255)
            kept.append(sample)
            boxes.append(image.box)
        progress("images", i + 1, len(samples), None)
    if not kept:
        raise TrainingError(f"none of {count(len(samples), 'image')} could be read; {skipped[-len(samples)][1]}")
    if len(kept) < len(samples):
        shorter = file.with_suffix(".part.npy")
        np.save(shorter, pixels[: len(kept)])
        shorter.replace(file)
    return kept, boxes


def _run(python: str | Path, *arguments: str) -> None:
    """Run the interpreter without this one's module path; raise PeerError if it fails."""
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
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    if done.returncode == 3:
        raise PeerError(f"{python}: has no anomalib that can be imported ({lines[-1]}); {INSTALL}")
    if done.returncode == 2:
        raise PeerError(f"anomalib was not run: {lines[-1]}")
    if done.returncode < 0:
        raise PeerError(f"anomalib was ended by signal {-done.returncode}; 9 mostly means too little memory")
    if done.returncode:
        raise PeerError("anomalib failed; its last lines:\n" + "\n".join(lines[-10:]))
