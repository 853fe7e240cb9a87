"""unflaw: visual anomaly detection trained on good images only. It restores the flaw and shows the difference."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unflaw._version import __version__ as __version__

if TYPE_CHECKING:
    from pathlib import Path

    from unflaw.config import Config, Weights, make_config
    from unflaw.datasets import load_categories, load_dataset
    from unflaw.detector import Detector
    from unflaw.evaluation.evaluate import evaluate
    from unflaw.inference.base import BasePredictor
    from unflaw.postprocessing.results import Result

__all__ = [
    "Config",
    "Detector",
    "Result",
    "Weights",
    "evaluate",
    "load",
    "load_categories",
    "load_dataset",
    "make_config",
]

_HOMES = {
    "Config": "config",
    "Detector": "detector",
    "Result": "postprocessing.results",
    "Weights": "config",
    "evaluate": "evaluation.evaluate",
    "load_categories": "datasets",
    "load_dataset": "datasets",
    "make_config": "config",
}


def load(path: str | Path, *, threads: int | None = None) -> BasePredictor:
    """A detector from a file: a `Detector` that was saved, or one that `unflaw export` wrote, which needs no torch.

    Args:
        path: `.safetensors`, `.onnx`, or the `.xml` of OpenVINO.
        threads: That compute, for an exported one; None: as many as the runtime likes. For a `Detector`,
            `torch.set_num_threads` says so.

    Raises:
        DetectorError: Missing, damaged, or not a detector.
    """
    from unflaw.io.detector_file import kind_of

    if kind_of(path) == "safetensors":
        return _attribute("Detector").load(path)
    from unflaw.runtime.predictor import ExportedDetector

    return ExportedDetector(path, threads=threads)


def _attribute(name: str) -> Any:
    return getattr(import_module(f"unflaw.{_HOMES[name]}"), name)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import unflaw` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unflaw' has no attribute {name!r}")
    return _attribute(name)


def __dir__() -> list[str]:
    """Public names are listed before their first use too, for completion."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
