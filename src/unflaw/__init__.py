"""unflaw: visual anomaly detection trained on good images only. It restores the flaw and shows the difference."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unflaw.config import Config, make_config
    from unflaw.datasets import load_categories, load_dataset
    from unflaw.detector import Detector
    from unflaw.evaluation import evaluate
    from unflaw.results import Result

__version__ = "0.1.0"
__all__ = ["Config", "Detector", "Result", "evaluate", "load", "load_categories", "load_dataset", "make_config"]

_HOMES = {
    "Config": "config",
    "Detector": "detector",
    "Result": "results",
    "evaluate": "evaluation",
    "load_categories": "datasets",
    "load_dataset": "datasets",
    "make_config": "config",
}


def load(path: str) -> Detector:
    """A detector from a file that `Detector.save` wrote."""
    return _attribute("Detector").load(path)


def _attribute(name: str) -> Any:
    return getattr(import_module(f"unflaw.{_HOMES[name]}"), name)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import unflaw` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unflaw' has no attribute {name!r}")
    return _attribute(name)
