"""Distance to the nearest of a set of normal prototypes. Nothing is trained: the floor for methods that are.

Our own baseline, of the family of PatchCore (Roth et al. 2022): standardised, reduced features, a k-centre greedy
coreset of all training tokens, nearest-prototype distance as the map; and a second memory of whole regions
(`RegionalMemoryBank`).
"""

from __future__ import annotations

from torch import Generator, Tensor

from unflaw.config import Config, NearestNeighborOptions, WeightSource
from unflaw.methods.base import Batch, Inspection, Method
from unflaw.methods.memory_bank import MemoryBank, RegionalMemoryBank
from unflaw.methods.visualization import Stage, Stages


class NearestNeighbor(Method):
    """See the module."""

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        options = config.network
        assert isinstance(options, NearestNeighborOptions)
        self.judges = options.coarse_prototypes > 0
        super().__init__(config, weights)
        self.memory = MemoryBank(options.prototypes, self.features.channels)
        self.judge = RegionalMemoryBank(options.coarse_prototypes, self.features) if self.judges else None

    def setup(
        self, features: Tensor, textures: Tensor | None, rng: Generator, categories: Tensor | None = None
    ) -> Batch:
        self.memory.fit(features, rng, categories)
        if self.judge is not None:
            self.judge.fit(features, rng, categories)
        return {}

    def forward(
        self,
        features: Tensor,
        images: Tensor | None = None,
        valid: Tensor | None = None,
        held_out: Tensor | None = None,
    ) -> Inspection:
        recalled, _, distance = self.memory(features, images, held_out)
        coarse = None if self.judge is None else self.judge(features, images, valid, held_out)
        return Inspection(distance, coarse=coarse, restored=recalled)

    def stages(self, features: Tensor, inspection: Inspection) -> Stages:
        assert inspection.restored is not None
        tiles = {
            "Features, drawn": Stage("features", features[0]),
            "Recalled, drawn": Stage("features", inspection.restored[0]),
            "Distance to the memory": Stage("map", inspection.anomaly_maps[0]),
        }
        if inspection.coarse is not None:
            tiles["Coarse evidence"] = Stage("map", inspection.coarse[0])
        return {"recall": [("", tiles)]}
