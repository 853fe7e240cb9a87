"""Decoder that draws restored features, for display only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DisplayDecoder(nn.Module):
    """F (N, C, rows, columns) → image (N, 3, 128, 128), about [0, 1]: convolutions and two pixel shuffles.

    Trained on good images by the mean absolute error against thumbnails, which are square whatever the canvas.
    """

    def __init__(self, channels: int, width: int = 64, side: int = 128) -> None:
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.GELU(),
            nn.Conv2d(width // 2, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, features: Tensor) -> Tensor:
        drawn = self.layers(features)
        if drawn.shape[2:] == (self.side, self.side):
            return drawn
        return F.interpolate(drawn, (self.side, self.side), mode="bilinear", align_corners=False)
