"""The decoder that draws restored features as a picture. For people only: it never takes part in scoring."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from unflaw.cache import Cache
from unflaw.config import Training
from unflaw.streams import Progress
from unflaw.team import Share, Terms
from unflaw.training import optimise, seeded


class DisplayDecoder(nn.Module):
    """F (N, C, g, g) → picture (N, 3, 128, 128), about [0, 1]: convolutions and two pixel shuffles.

    Trained on good pictures by the mean absolute error against thumbnails.
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
        if drawn.shape[-1] == self.side:
            return drawn
        return F.interpolate(drawn, (self.side, self.side), mode="bilinear", align_corners=False)


def fit_display(cache: Cache, settings: Training, progress: Progress) -> DisplayDecoder:
    """A decoder that has learned to draw the features of a cache."""
    with seeded(settings.seed):
        decoder = DisplayDecoder(cache.features.shape[1])

    def loss(indices: Tensor, rng: Generator, share: Share) -> Terms:
        indices = share.take(indices)
        drawn = decoder(cache.features[indices].float())
        return {"loss": (drawn - cache.thumbnails[indices].float() / 255).abs().mean()}

    optimise(decoder, loss, len(cache), settings.display_steps, settings, stage="display", progress=progress)
    return decoder
