"""Methods, and the parts that they share: memory, synthesis of anomalies, layers, the contract in `base`."""

from __future__ import annotations

from unflaw import registry
from unflaw.config import Config, WeightSource
from unflaw.methods.base import Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet

__all__ = ["NEW_IMAGES", "Context", "FeatureSet", "Inspection", "Method", "create"]


def create(config: Config, weights: WeightSource = None) -> Method:
    """Creates the method that a configuration names, untrained; `weights` as for `FeatureExtractor`."""
    return registry.method_class(config.method)(config, weights)
