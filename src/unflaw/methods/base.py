"""The contract between methods and everything around them (training, scoring, calibration, files, reports)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from unflaw.config import Config
from unflaw.features import Extractor, FeatureExtractor
from unflaw.methods.layers import gaussian_blur

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Inspection:
    """What a method says of a batch, on the feature grid.

    Attributes:
        witnesses: Anomaly maps (N, W, g, g), raw: W kinds of evidence, such as the residual of the restoration and the
            distance to the memory. `Method.fuse` makes them one map.
        restored: F̂ (N, C, g, g), or None where the method restores nothing.
        layers: Further maps (N, 1, g, g) in [0, 1], by name: "mean", "uncertainty", "mask".
    """

    witnesses: Tensor
    restored: Tensor | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A method on frozen features. Subclasses implement `forward`, and what they need of `setup` and `loss`."""

    kinds = 1  # W, kinds of evidence
    window = 3  # side in cells of the mean filter over the map that judges a picture; odd
    uses_textures = False  # whether `setup` wants texture pictures

    def __init__(self, config: Config, weights: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.features = self.extractor(config, weights)
        self.normal: Tensor
        self.normal_scores: Tensor
        # mean and deviation on good training pictures: of every witness, and of the statistics that judge a picture
        self.register_buffer("normal", torch.tensor([0.0, 1.0]).repeat(self.kinds, 1))
        self.register_buffer("normal_scores", torch.tensor([0.0, 1.0]).repeat(len(config.scoring.shares), 1))

    def extractor(self, config: Config, weights: str | None) -> Extractor:
        """What makes F of pictures; a method on pixels has its own, which uses no weights."""
        return FeatureExtractor(config.features, weights)

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

    def forward(self, features: Tensor) -> Inspection:
        """F (N, C, g, g) → evidence on the feature grid. Deterministic."""
        raise NotImplementedError

    @torch.no_grad()
    def finish(self, features: Tensor, valid: Tensor | None = None) -> None:
        """After training: how large evidence is on good training pictures, F (N, C, g, g, float16)."""
        witnesses = torch.cat([self(part.float()).witnesses for part in features.split(8)])
        cells = witnesses.transpose(0, 1)
        cells = cells.flatten(1) if valid is None else cells[:, valid]
        self.normal.copy_(torch.stack([cells.mean(1), cells.std(1).clamp_min(1e-6)], dim=-1))
        statistics = self._statistics(self._evidence_map(witnesses), valid)
        deviation = statistics.std(0, correction=0).clamp_min(1e-3)
        self.normal_scores.copy_(torch.stack([statistics.mean(0), deviation], dim=-1))

    def extend(self, features: Tensor, rng: Generator) -> None:
        """After calibration: learns from the pictures that calibrated, F (N, C, g, g, float16).

        Only what can lower the evidence of a picture and never raise it, or the calibration would not hold.
        """

    def fuse(self, inspection: Inspection, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Evidence → anomaly maps at canvas size, (N, S, S), and image scores (N,).

        The map is the mean of the witnesses, each in deviations from its normal mean; bilinear, then a Gaussian. The
        score is the mean over shares q of how far the mean of the map's highest share q lies above its normal value, in
        deviations: a small q sees small defects, a large one wide and faint ones.

        Args:
            inspection: Of N pictures.
            valid: (N, g, g) bool, the cells that the picture covers; None: all.
        """
        size = self.config.preparation.size
        maps = self._evidence_map(inspection.witnesses)
        mean, deviation = self.normal_scores.unbind(-1)
        scores = ((self._statistics(maps, valid) - mean) / deviation).mean(1)
        maps = F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)
        return gaussian_blur(maps, self.config.scoring.smooth * size / 256)[:, 0], scores

    def _evidence_map(self, witnesses: Tensor) -> Tensor:
        """(N, W, g, g) → (N, g, g)."""
        mean, deviation = self.normal[..., None, None].unbind(1)
        return ((witnesses - mean) / deviation).mean(1)

    def _statistics(self, maps: Tensor, valid: Tensor | None = None) -> Tensor:
        """(N, g, g) → (N, Q): mean of the highest share q of the valid cells, after a mean over `window`."""
        inside = torch.ones_like(maps) if valid is None else valid.to(maps)
        around = (self.window, 1, self.window // 2)
        share = F.avg_pool2d(inside[:, None], *around)  # so that the padding does not blur into the picture
        smooth = (F.avg_pool2d((maps * inside)[:, None], *around) / share.clamp_min(1e-6)).flatten(1)
        cells = smooth if valid is None else smooth.masked_fill(~valid.flatten(1), -torch.inf)
        ordered = cells.sort(dim=1, descending=True).values
        present = torch.full((len(maps),), cells.shape[1]) if valid is None else valid.flatten(1).sum(1)
        rank = torch.arange(cells.shape[1], device=maps.device)
        counts = [(q * present).round().clamp_min(1)[:, None] for q in self.config.scoring.shares]
        return torch.stack([torch.where(rank < k, ordered, 0).sum(1) / k[:, 0] for k in counts], dim=1)
