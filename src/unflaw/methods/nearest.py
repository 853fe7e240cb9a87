"""Distance to the nearest of a set of normal prototypes. Nothing is trained: a baseline for trained methods.

Our own baseline, of the family of PatchCore (Roth et al. 2022): standardised, reduced features, a k-centre greedy
coreset of all training tokens, nearest-prototype distance as the map; and a second memory of whole regions
(`RegionalMemoryBank`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from unflaw.config import Config, MethodOptions, WeightSource
from unflaw.methods.base import Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context
from unflaw.methods.visualization import Stage, Stages


class NearestNeighborOptions(MethodOptions):
    """Distance to the nearest normal prototype; nothing is trained."""

    method: Literal["nearest_neighbor"] = "nearest_neighbor"
    prototypes: int = Field(4096, ge=1, le=10_000_000, description="size of the memory")
    regional_prototypes: int = Field(
        16384, ge=0, le=10_000_000, description="size of the memory of regions, for image score and map; 0: none"
    )


class NearestNeighbor(Method):
    """Assembly; see the module."""

    options_class = NearestNeighborOptions
    options: NearestNeighborOptions

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        options = config.network
        assert isinstance(options, NearestNeighborOptions)
        super().__init__(
            config, weights, prototypes=options.prototypes, regional_prototypes=options.regional_prototypes
        )

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        assert self.memory is not None
        found = self.memory(features, context)
        return Inspection(found.scored, regional=self.regional_distance(features, context), restored=found.mixture)

    def visualize(self, features: Tensor, inspection: Inspection) -> Stages:
        assert inspection.restored is not None
        tiles = {
            "Features, drawn": Stage("features", features[0]),
            "Retrieved, drawn": Stage("features", inspection.restored[0]),
            "Distance to the memory": Stage("map", inspection.anomaly_maps[0]),
        }
        if inspection.regional is not None:
            tiles["Regional distance"] = Stage("map", inspection.regional[0])
        return {"retrieval": [("", tiles)]}
