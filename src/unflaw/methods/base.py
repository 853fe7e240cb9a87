"""The contract between methods and everything around them (training, scoring, calibration, files, reports)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from unflaw.config import Config
from unflaw.features import FeatureExtractor
from unflaw.methods.layers import gaussian_blur

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Inspection:
    """What a method says of a batch, on the feature grid.

    Attributes:
        map: Anomaly map, (N, 1, g, g), raw.
        restored: F̂ (N, C, g, g), or None where the method restores nothing.
        layers: Further maps (N, 1, g, g) in [0, 1], by name: "mean", "uncertainty", "mask".
    """

    map: Tensor
    restored: Tensor | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A method on frozen features. Subclasses implement `forward`, and what they need of `setup`, `loss`, `finish`."""

    def __init__(self, config: Config, weights: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.features = FeatureExtractor(config.features, weights)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] → F (N, C, g, g), without gradient."""
        return self.features(images)

    def setup(self, features: Tensor, textures: Tensor | None, rng: Generator) -> Batch:
        """Learns what needs no gradient steps from all cached features (N, C, g, g, float16).

        Returns:
            Further tensors to cache, one row per picture; `loss` gets them by name beside "features".
        """
        return {}

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """Terms by name; "loss" is minimised. `batch["features"]` is F (B, C, g, g) float32."""
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def finish(self, features: Tensor) -> None:
        """After training: learns from the features (N, C, g, g, float16) of held-out good pictures what is normal."""

    def forward(self, features: Tensor) -> Inspection:
        """F (N, C, g, g) → maps on the feature grid. Deterministic."""
        raise NotImplementedError

    @torch.no_grad()
    def anomaly_map(self, inspection: Inspection) -> Tensor:
        """The map at canvas size, (N, S, S): bilinear, then a Gaussian of `scoring.smooth` / 256 of the side."""
        size = self.config.preparation.size
        maps = F.interpolate(inspection.map.float(), (size, size), mode="bilinear", align_corners=False)
        return gaussian_blur(maps, self.config.scoring.smooth * size / 256)[:, 0]
