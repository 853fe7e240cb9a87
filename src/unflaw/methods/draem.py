"""DRAEM (arXiv 2108.07610): a discriminatively trained reconstruction embedding, on pixels. A reference, small.

    image ──▶ artificial anomalies (training only) ──▶ reconstructive network ──▶ discriminative network ──▶ map
                                                    └──────────────────────────▶──┘

Networks, losses and anomalies are the paper's, at widths and a side that options reduce. Ours: the plain window of
SSIM, mirrored decoders, the optimiser of the common loop, and the common score in place of the maximum.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from unflaw.config import Config, MethodOptions, WeightSource
from unflaw.features.extractor import PixelExtractor
from unflaw.methods.base import PAPER, Batch, Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import local_mean, ssim_map
from unflaw.methods.synthesis import Anomalies, Synthesis, synthesise
from unflaw.methods.visualization import Stage, Stages

FOCUS = 2.0  # γ of the focal loss
AUGMENTATIONS = 3  # of each texture image


class PixelSynthesis(Synthesis):
    """DRAEM's artificial anomalies: textures only, half of the images clean, β from 0.1 on (sections 3.3 and 4)."""

    clean: float = Field(0.5, ge=0, le=1, description="share of samples left without anomaly")
    others: float = Field(0.0, ge=0, description="weight of other good images, at other places")
    shuffles: float = Field(0.0, ge=0, description="weight of the image's own pixels, shuffled among places")
    jitter: float = Field(0.0, ge=0, description="weight of Gaussian noise scaled by the norm of pixels")
    strength: tuple[float, float] = Field((0.1, 1.0), description="range of the opacity β")


class DRAEMOptions(MethodOptions):
    """DRAEM (arXiv 2108.07610), on pixels."""

    method: Literal["draem"] = "draem"
    side: int | None = Field(
        128, ge=32, le=4096, description="pixels it works at, at most preparation.size; None: all of them"
    )
    reconstructive: int = Field(
        16, ge=1, le=4096, description="channels at full resolution of the reconstructive network"
    )
    discriminative: int = Field(
        16, ge=1, le=4096, description="channels at full resolution of the discriminative network"
    )
    synthesis: PixelSynthesis = PixelSynthesis()


class UNet(nn.Module):
    """Encoder–decoder of pairs of 3×3 convolutions, with maximum pooling and bilinear upsampling.

    Args:
        channels_in, channels_out: Of images in and out.
        width: Channels at full resolution; doubled by each halving, up to eightfold.
        halvings: 4 in the reconstructive network, 5 in the discriminative one.
        skips: Whether the decoder sees what the encoder had at its scale.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int, halvings: int, skips: bool) -> None:
        super().__init__()
        self.skips = skips
        widths = [width * min(2**i, 8) for i in range(halvings + 1)]
        self.encoder = nn.ModuleList(_pair(a, b) for a, b in pairwise([channels_in, *widths]))
        self.up = nn.ModuleList(_convolution(b, a) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(_pair(a * (1 + skips), a) for a in widths[:-1])
        self.out = nn.Conv2d(width, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, g, g) → (N, channels_out, g, g)."""
        skipped: list[Tensor] = []
        for block in self.encoder:
            x = block(F.max_pool2d(x, 2) if skipped else x)
            skipped.append(x)
        for up, block, finer in zip(self.up[::-1], self.decoder[::-1], skipped[-2::-1], strict=True):
            x = up(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
            x = block(torch.cat([x, finer], dim=1) if self.skips else x)
        return self.out(x)


class DRAEM(Method):
    """Assembly; see the module. In `paper`, widths and learning rate are published ones."""

    options_class = DRAEMOptions
    options: DRAEMOptions
    on_pixels = True
    profiles = {  # noqa: RUF012
        "cpu": {"training.steps": 600, "training.batch": 4},
        "paper": PAPER
        | {
            "training.batch": 8,
            "network.side": None,
            "network.reconstructive": 128,
            "network.discriminative": 64,
        },
    }

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        super().__init__(config, weights)
        options = self.options
        self.uses_textures = options.synthesis.textures > 0
        self.window = (
            2 * round(21 * min(self.features.shape) / 512) + 1
        )  # published: 21 of 256 pixels, then the maximum
        self.reconstructive = UNet(3, 3, options.reconstructive, 4, skips=False)
        self.discriminative = UNet(6, 2, options.discriminative, 5, skips=True)
        self.textures: Tensor | None = None
        self.to(memory_format=torch.channels_last)  # a third less time per step

    def make_extractor(self, weights: WeightSource) -> PixelExtractor:
        return PixelExtractor(self.config.preparation.canvas, self.options.side, halvings=5)

    def fit_memory(self, data: FeatureSet, rng: Generator) -> Batch:
        self.textures = data.textures
        return {}

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """L2 and SSIM of reconstruction and clean image, focal loss of the map and M (sections 3.1, 3.2)."""
        anomalies = self._altered(batch["features"], self.textures, self.options.synthesis, rng)
        clean = batch["features"]
        restored, logits = self._both(anomalies.features)
        similarity = ssim_map(restored.flatten(0, 1)[:, None], clean.flatten(0, 1)[:, None])  # of each colour
        terms = {
            "l2": F.mse_loss(restored, clean),
            "ssim": 1 - similarity.mean(),
            "focal": focal_loss(logits, anomalies.mask),
        }
        return terms | {"loss": sum(terms.values(), torch.zeros(()))}

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        """Images (N, 3, g, g) → the probability of an anomaly at each pixel."""
        restored, logits = self._both(features)
        return Inspection(logits.softmax(1)[:, 1:], restored=restored)

    def visualize(self, features: Tensor, inspection: Inspection) -> Stages:
        return {"repair": [("", {"Image it sees": Stage("image", features[0]), **_tiles(inspection, 0)})]}

    def visualize_training(self, images: Tensor, textures: Tensor | None, rng: Generator) -> Stages:
        """Altered images, none left clean, and what the networks make of them."""
        clean = self.embed(images)
        always = self.options.synthesis.model_copy(update={"clean": 0.0})
        anomalies = self._altered(clean, None if textures is None else self.embed(textures), always, rng)
        inspection, rows = self(anomalies.features), []
        for i, (image, altered, mask) in enumerate(zip(clean, anomalies.features, anomalies.mask, strict=True)):
            made = {"Good image": Stage("image", image), "Mask M, the label": Stage("mask", mask)}
            rows.append(("altered", made | {"Altered": Stage("image", altered), **_tiles(inspection, i)}))
        return {"anomalies": rows}

    def _altered(self, clean: Tensor, textures: Tensor | None, config: Synthesis, rng: Generator) -> Anomalies:
        """Artificial anomalies on a share of images (N, 3, g, g), textures augmented first."""
        if textures is not None and len(textures):
            drawn = torch.randint(len(textures), (len(clean),), generator=rng)
            textures = torch.stack([augment(texture, rng) for texture in textures[drawn]])
        return synthesise(clean, textures, config, rng)

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (N, 3, g, g) and logits (N, 2, g, g): good, anomalous."""
        images = images.contiguous(memory_format=torch.channels_last)
        restored = self.reconstructive(images)
        logits = self.discriminative(torch.cat([restored, images.to(restored)], dim=1))
        return restored.float(), logits.float()


def _tiles(inspection: Inspection, i: int) -> dict[str, Stage]:
    """Tiles with the outputs of both networks for the i-th image."""
    assert inspection.restored is not None
    repaired, probability = inspection.restored[i], inspection.anomaly_maps[i]
    return {"Repair": Stage("image", repaired), "Probability of anomaly": Stage("share", probability)}


def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean of −(1 − p)^γ log p over pixels, p the probability of the true class (Lin et al. 2017).

    Args:
        logits: (N, 2, g, g). mask: (N, 1, g, g) in {0, 1}.
    """
    log_p = logits.log_softmax(1).gather(1, mask.long())
    return ((1 - log_p.exp()) ** FOCUS * -log_p).mean()


def augment(texture: Tensor, rng: Generator) -> Tensor:
    """A texture (3, g, g) in [0, 1], turned, moved, and altered by three of seven functions drawn at random (3.3)."""
    turns, dy, dx = (int(torch.randint(high, (1,), generator=rng)) for high in (4, *texture.shape[1:]))
    if texture.shape[1] != texture.shape[2]:  # a quarter turn would not fit
        turns = turns // 2 * 2
    texture = texture.rot90(turns, (1, 2)).roll((dy, dx), (1, 2))
    for i in torch.randperm(len(_ALTERATIONS), generator=rng)[:AUGMENTATIONS].tolist():
        texture = _ALTERATIONS[i](texture, float(torch.rand(1, generator=rng))).clamp(0, 1)
    return texture


def _posterise(x: Tensor, amount: float) -> Tensor:
    levels = 2 + round(6 * amount)
    return (x * levels).floor().clamp_max(levels - 1) / (levels - 1)


def _sharpen(x: Tensor, amount: float) -> Tensor:
    return x + 3 * amount * (x - local_mean(x, 3))


def _solarise(x: Tensor, amount: float) -> Tensor:
    return torch.where(x < 0.1 + 0.8 * amount, x, 1 - x)


def _equalise(x: Tensor, amount: float) -> Tensor:
    flat = x.flatten(1)
    return (flat.argsort(1).argsort(1) / flat.shape[1]).view_as(x)


def _brighten(x: Tensor, amount: float) -> Tensor:
    return x * (0.5 + amount)


def _recolour(x: Tensor, amount: float) -> Tensor:
    """From grey to twice the colour."""
    return x.mean(0, keepdim=True).lerp(x, 2 * amount)


def _stretch(x: Tensor, amount: float) -> Tensor:
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-3)


_ALTERATIONS = (_posterise, _sharpen, _solarise, _equalise, _brighten, _recolour, _stretch)


def _convolution(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())


def _pair(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(_convolution(a, b), _convolution(b, b))
