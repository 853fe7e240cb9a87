"""Training of the decoder that draws restored features as an image, for display only."""

from __future__ import annotations

from torch import Generator, Tensor

from unflaw.config import Training
from unflaw.features.cache import Cache
from unflaw.io.progress import Progress
from unflaw.methods.decoder import DisplayDecoder
from unflaw.parallel.process_group import Terms
from unflaw.training.loop import optimise, seeded


def fit_display(cache: Cache, settings: Training, progress: Progress) -> DisplayDecoder:
    """Trains a decoder on the features and thumbnails of a cache."""
    with seeded(settings.seed):
        decoder = DisplayDecoder(cache.features.shape[1])

    def loss(rows: Tensor, rng: Generator) -> Terms:
        drawn = decoder(cache.features[rows].float())
        return {"loss": (drawn - cache.thumbnails[rows].float() / 255).abs().mean()}

    optimise(decoder, loss, len(cache), settings.display_steps, settings, stage="display", progress=progress)
    return decoder
