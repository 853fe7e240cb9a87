"""MemAE (arXiv 1904.02639): an autoencoder whose code is re-composed from a memory of normal prototypes, on pixels.

    image ──▶ encoder ──▶ queries z ──▶ memory: sparse addressing ──▶ ẑ ──▶ decoder ──▶ image,   map = squared error

A reference, small. Addressing and losses are the paper's, the convolutions those of its CIFAR-10 network at widths and
a side that options reduce. Ours: the optimiser of the common loop and the common score.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from unflaw.config import Config, MethodOptions, WeightSource
from unflaw.features.extractor import PixelExtractor
from unflaw.methods.base import PAPER, Batch, Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context
from unflaw.methods.layers import to_grid, to_tokens
from unflaw.methods.visualization import Stage, Stages


class MemAEOptions(MethodOptions):
    """MemAE (arXiv 1904.02639), on pixels."""

    method: Literal["memae"] = "memae"
    side: int | None = Field(
        128, ge=32, le=4096, description="pixels it works at, at most preparation.size; None: all of them"
    )
    widths: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        (16, 32, 32, 64),
        min_length=1,
        max_length=12,
        description="channels of the encoder's layers, each of which halves the side",
    )
    items: int = Field(100, ge=1, le=1_000_000, description="size of the memory")
    shrinkage: float = Field(1.0, ge=0, le=3, description="weights up to this multiple of 1 / items become 0")
    entropy: float = Field(0.0002, ge=0, description="weight of the entropy of addressing weights in the loss")


class AddressedMemory(nn.Module):
    """Learned prototypes; a query becomes a sparse mixture of them (section 3.3).

    w = softmax of the cosine similarities, hard-shrunk by ŵ = max(w − λ, 0) · w / (|w − λ| + ε),
    that is w where w > λ, and brought back to the sum 1.

    Args:
        items: M. channels: C. shrinkage: λ · M. At 1 or less some weight always stays: the largest is at least 1 / M.
    """

    def __init__(self, items: int, channels: int, shrinkage: float) -> None:
        super().__init__()
        self.shrink = shrinkage / items
        self.items = nn.Parameter(torch.randn(items, channels) / channels**0.5)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(…, C) → re-composed (…, C), addressing weights (…, M)."""
        with torch.autocast(queries.device.type, enabled=False):  # all weights are near 1 / M, which λ has to part
            cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(self.items, dim=-1).T
            weights = cosine.softmax(-1)
            above = weights - self.shrink
            weights = F.normalize(above.relu() * weights / (above.abs() + 1e-12), p=1, dim=-1)
            return weights @ self.items, weights


class MemAE(Method):
    """Assembly; see the module. In `paper`, widths, items and learning rate are published ones, those for CIFAR-10."""

    options_class = MemAEOptions
    options: MemAEOptions
    on_pixels = True
    profiles = {  # noqa: RUF012
        "cpu": {"training.steps": 1000},
        "paper": PAPER | {"network.side": None, "network.widths": (64, 128, 128, 256), "network.items": 500},
    }

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        super().__init__(config, weights)
        options = self.options
        self.window = 2 * round(21 * min(self.features.shape) / 512) + 1  # as DRAEM's
        sides = list(pairwise([3, *options.widths]))
        self.encoder = nn.Sequential(*(_halve(a, b) for a, b in sides))
        self.addressed_memory = AddressedMemory(options.items, options.widths[-1], options.shrinkage)
        *inner, (a, b) = reversed(sides)
        last = nn.ConvTranspose2d(b, a, 3, 2, padding=1, output_padding=1)
        self.decoder = nn.Sequential(*(_double(b, a) for a, b in inner), last)

    def make_extractor(self, weights: WeightSource) -> PixelExtractor:
        return PixelExtractor(self.config.preparation.canvas, self.options.side, halvings=len(self.options.widths))

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """Mean squared error and the entropy of addressing, summed over items (section 3.4)."""
        images = batch["features"]
        restored, weights = self._restore(images)
        entropy = -(weights * (weights + 1e-12).log()).sum(-1).mean()
        terms = {"mse": F.mse_loss(restored, images), "entropy": entropy}
        return terms | {"loss": terms["mse"] + self.options.entropy * entropy}

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        """Images (N, 3, g, g) → squared error of the reconstruction at each pixel."""
        restored, _ = self._restore(features)
        return Inspection((features - restored).square().mean(1, keepdim=True), restored=restored)

    def visualize(self, features: Tensor, inspection: Inspection) -> Stages:
        assert inspection.restored is not None
        tiles = {
            "Image it sees": Stage("image", features[0]),
            "Reconstruction": Stage("image", inspection.restored[0]),
            "Squared error": Stage("map", inspection.anomaly_maps[0]),
        }
        return {"reconstruction": [("", tiles)]}

    def _restore(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, g, g) → restored (N, 3, g, g), addressing weights (N, T, M) of the T places of the code."""
        code = self.encoder(images)
        mixed, weights = self.addressed_memory(to_tokens(code))
        return self.decoder(to_grid(mixed, code.shape[2:])).float(), weights.float()


def _halve(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, 2, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))


def _double(a: int, b: int) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(a, b, 3, 2, padding=1, output_padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
