"""The methods, by name. A new one is a file here, its options in `config.py`, and a line in `create`."""

from __future__ import annotations

from unflaw.config import Config, WeightSource
from unflaw.methods.base import Inspection, Method
from unflaw.methods.draem import DRAEM
from unflaw.methods.memae import MemAE
from unflaw.methods.mfrnet import MFRNet
from unflaw.methods.nearest import NearestNeighbor
from unflaw.methods.uranet import URANet

__all__ = ["Inspection", "Method", "create"]

_CLASSES: dict[str, type[Method]] = {
    "uranet": URANet,
    "nearest_neighbor": NearestNeighbor,
    "mfrnet": MFRNet,
    "draem": DRAEM,
    "memae": MemAE,
}


def create(config: Config, weights: WeightSource = None) -> Method:
    """The method that a configuration names, untrained, its backbone loaded as `FeatureExtractor` says."""
    return _CLASSES[config.method](config, weights)
