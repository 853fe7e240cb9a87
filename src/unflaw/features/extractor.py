"""Frozen backbone and aggregation: images (N, 3, H, W) → one feature grid F (N, C, g, g).

The backbone is frozen, so each image passes it once; everything after that works on F.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unflaw.config import Features, WeightSource
from unflaw.features.backbones import check_size, compute_levels, create_backbones, level_channels
from unflaw.imaging.tiling import grid_shape
from unflaw.io.words import count

REGIONAL_COMPONENTS = 64  # principal components of the coarsest level, for the regional memory


class FeatureExtractor(nn.Module):
    """φ and agg: levels are smoothed, resized to one grid, concatenated, standardised and reduced.

    `fit` learns standardisation and principal components once, from good features.

    Args:
        config: Backbone, levels, grid and reduction.
        weights: `.safetensors` or `.pth` file with the backbone's state_dict. None: an installed package
            (`WEIGHT_PACKAGES`), else the hub of timm. `Weights.RANDOM` (for tests) and `Weights.LATER` (weights come
            with a detector file) load nothing.
        size: Canvas in pixels, width and height or the side of a square (default); checked, since some transformers
            take images of one size only.

    Attributes:
        shape: Rows and columns of the grid: `config.grid` cells along the shorter side, about square.

    Raises:
        WeightsError: See `create_backbone`, or the backbone takes no images of this size.
    """

    def __init__(
        self, config: Features, weights: WeightSource = None, size: int | tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        canvas = (size, size) if isinstance(size, int) else size or (1, 1)
        self.shape = grid_shape(config.grid, canvas, math.gcd(config.grid, 4))
        known = None if size is None else canvas
        self.backbone = create_backbones(config.backbone, config.levels, weights, known).eval().requires_grad_(False)
        if known is not None:
            check_size(self.backbone, config.backbone, canvas)
        self.backbone.to(memory_format=torch.channels_last)
        by_backbone = level_channels(self.backbone)
        self.level_channels = [channels for own in by_backbone for channels in own]
        self._backbones = len(by_backbone)
        raw = sum(self.level_channels)
        self.channels = min(config.components or raw, raw)
        self.centre: Tensor
        self.basis: Tensor
        self.register_buffer("centre", torch.zeros(raw))
        self.register_buffer("basis", torch.eye(raw, self.channels))  # standardisation is folded into it
        self.regional_basis: Tensor
        self.regional_channels = min(REGIONAL_COMPONENTS, self.channels)
        self.register_buffer("regional_basis", torch.eye(self.channels, self.regional_channels))

    @torch.no_grad()
    def aggregate(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] → (N, C_raw, g, g): smooths and resizes each level (see `resize`)."""
        k = self.config.smooth
        given = compute_levels(self.backbone, images)
        levels = [F.avg_pool2d(f, k, 1, k // 2) if k > 1 else f for f in given]
        return torch.cat([resize(f.float(), self.shape) for f in levels], dim=1).to(images.device)

    @torch.no_grad()
    def fit(self, raw: Tensor) -> FeatureExtractor:
        """Learns centre, scale and components from raw features (N, C_raw, g, g) of good images.

        One scale per *level* (default) gives each level its share `level_weights` of the mean squared norm, whose sum
        is 1. One per channel amplifies the noise of channels that hardly vary (docs/research.md). Principal components
        are those of the scaled features. The components of `to_regions` are fitted as well.
        """
        self.centre = raw.mean((0, 2, 3))
        tokens_raw = raw.transpose(0, 1).flatten(1) - self.centre[:, None]  # (C_raw, N·g²)
        energy = tokens_raw.square().mean(1)
        shares = torch.tensor(self._level_shares())
        if self.config.standardise == "level":
            parts = zip(energy.split(self.level_channels), shares, strict=True)
            weight = torch.cat([(share / part.sum().clamp_min(1e-12)).sqrt().expand_as(part) for part, share in parts])
        elif self.config.standardise == "channel":
            sizes = torch.tensor(self.level_channels)
            per_channel = (shares / sizes).repeat_interleave(sizes)
            weight = (per_channel / energy.clamp_min(1e-12)).sqrt()
        else:
            weight = torch.ones_like(energy)
        basis = torch.eye(len(weight))
        if self.channels < len(weight):
            tokens = tokens_raw * weight[:, None]
            _, vectors = torch.linalg.eigh((tokens @ tokens.T / tokens.shape[1]).double())  # ascending
            basis = vectors[:, -self.channels :].flip(1).float()
        # contiguous, as in a loaded detector: other strides change rounding
        self.basis = (weight[:, None] * basis).contiguous()
        self._fit_regional(basis, self.basis.T @ (tokens_raw @ tokens_raw.T / tokens_raw.shape[1]) @ self.basis)
        return self

    def _fit_regional(self, basis: Tensor, covariance: Tensor) -> None:
        """Fits the projection of F to components of its last level, of several backbones of the last level of each.

        From orthonormal `basis` (C_raw, C) and the covariance of F (C, C).

        ‖F·B‖ is the length of these levels' part of F where B·Bᵀ = basisᵀ·I_last·basis; principal components of
        F·B follow.
        """
        levels = basis.split(self.level_channels)
        each = len(levels) // self._backbones
        last = torch.cat(levels[each - 1 :: each]).double()
        values, vectors = torch.linalg.eigh(last.T @ last)
        root = vectors * values.clamp_min(0).sqrt()
        _, components = torch.linalg.eigh(root.T @ covariance.double() @ root)
        self.regional_basis = (root @ components[:, -self.regional_channels :].flip(1)).float().contiguous()

    def _level_shares(self) -> list[float]:
        """Weights of the levels, with sum 1; the first is repeated or left out to match their number.

        Backbones have equal shares.
        """
        n, given = len(self.level_channels) // self._backbones, self.config.level_weights
        weights = (given[:1] * n + given)[-n:] * self._backbones
        return [weight / sum(weights) for weight in weights]

    def project(self, raw: Tensor) -> Tensor:
        """(N, C_raw, g, g) → F (N, C, g, g)."""
        return F.conv2d(raw - self.centre.view(-1, 1, 1), self.basis.T[..., None, None])

    def to_regions(self, features: Tensor) -> Tensor:
        """F (N, C, g, g) → features of regions: its coarsest level on half the grid, (N, C', ⌈g/2⌉, ⌈g/2⌉)."""
        pooled = F.avg_pool2d(features, 2, ceil_mode=True)
        return F.conv2d(pooled, self.regional_basis.T[..., None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] → F (N, C, g, g)."""
        return self.project(self.aggregate(images))

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in evaluation mode, so that batch statistics do not change."""
        return super().train(False)


class PixelExtractor(nn.Module):
    """Returns images themselves as F (N, 3, g, g) in [0, 1]: the `FeatureExtractor` of methods on pixels.

    Args:
        size: Canvas in pixels: width and height, or the side of a square.
        side: Pixels along the shorter side of the grid, at most those of the canvas; None: all of them.
        halvings: Number of times that the method halves the side.

    Raises:
        ValueError: The shorter side is not divisible by 2 ** halvings.
    """

    channels = 3

    def __init__(self, size: int | tuple[int, int], side: int | None, halvings: int) -> None:
        super().__init__()
        canvas = (size, size) if isinstance(size, int) else size
        shorter = min(side or min(canvas), *canvas)
        self.backbone = nn.Module()  # none
        if shorter % 2**halvings:
            raise ValueError(
                f"a side of {shorter} pixels cannot be halved {count(halvings, 'time')}; "
                f"choose a multiple of {2**halvings} for preparation.size or network.side"
            )
        self.shape = grid_shape(shorter, canvas, 2**halvings, most=2**24)

    def aggregate(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] → (N, 3, g, g)."""
        return resize(images, self.shape)

    def fit(self, raw: Tensor) -> PixelExtractor:
        """Learns nothing."""
        return self

    def project(self, raw: Tensor) -> Tensor:
        """Returns the images unchanged."""
        return raw

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] → F (N, 3, g, g)."""
        return self.aggregate(images)


Extractor = FeatureExtractor | PixelExtractor


def resize(features: Tensor, shape: tuple[int, int]) -> Tensor:
    """(N, C, h, w) → (N, C, *shape): mean of blocks if both sides can be divided, else bilinear."""
    h, w = features.shape[2:]
    if (h, w) == shape:
        return features
    if h % shape[0] == 0 and w % shape[1] == 0:
        return F.avg_pool2d(features, (h // shape[0], w // shape[1]))
    return F.interpolate(features, shape, mode="bilinear", align_corners=False)
