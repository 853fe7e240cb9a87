"""FASM, feature-level artificial anomaly synthesis (URA-Net): Perlin masks and sources of foreign features.

Anomalies are made on cached features, so that no image passes the backbone again during training. Randomness comes
from the given generator only: the same generator state gives the same anomalies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from unflaw.config import Settings
from unflaw.errors import ImageError
from unflaw.imaging.reading import read
from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import prepare
from unflaw.io.brief import brief
from unflaw.io.listing import list_images


class Synthesis(Settings):
    """FASM: artificial anomalies at feature level. A weight of 0 switches a source off."""

    clean: float = Field(0.3, ge=0, le=1, description="share of samples left without anomaly")
    max_scale: int = Field(5, ge=0, le=7, description="Perlin frequency is 2^0 .. 2^max_scale per axis")
    threshold: float = Field(0.5, description="Perlin noise above this is anomalous")
    textures: float = Field(1.0, ge=0, description="weight of features of texture images")
    others: float = Field(1.0, ge=0, description="weight of features of other good images, at other places")
    shuffles: float = Field(1.0, ge=0, description="weight of the image's own features, shuffled among places")
    jitter: float = Field(1.0, ge=0, description="weight of Gaussian noise scaled by the feature norm")
    strength: tuple[float, float] = Field((0.2, 1.0), description="range of the opacity β")


# Photographs of textures and things inside the scikit-image package (its data/README names origins and licences).
PACKAGED_TEXTURES = ("brick", "grass", "gravel", "coins", "camera", "cell", "coffee", "chelsea", "text", "rocket")


@brief
@dataclass(frozen=True)
class Anomalies:
    """FASM's output.

    Attributes:
        features: F_a, altered features (N, C, g, g).
        mask: M, what was altered, (N, 1, g, g) in {0, 1}.
        origin: (N,) image of the batch whose features were put in; the own one where they came from no other.
    """

    features: Tensor
    mask: Tensor
    origin: Tensor


def perlin(n: int, shape: tuple[int, int], max_scale: int, rng: Generator) -> Tensor:
    """Perlin noise (n, *shape) in about [-1, 1], with frequency 2^0 … 2^max_scale drawn per axis and sample.

    Values are those of classic gradient noise with quintic fade, times √2 so that the theoretical range is [-1, 1].
    """
    made = []
    exponents = torch.randint(0, max_scale + 1, (n, 2), generator=rng).tolist()
    for ey, ex in exponents:
        cells = torch.minimum(torch.tensor([2**ey, 2**ex]), torch.tensor(shape))
        angles = torch.rand((int(cells[0]) + 1, int(cells[1]) + 1), generator=rng) * 2 * torch.pi
        # one extra random phase per axis: otherwise noise is always 0 on the lines of the lattice
        phases = [torch.rand(1, generator=rng) for _ in range(2)]
        parts = zip(shape, phases, cells.tolist(), strict=True)
        y, x = ((torch.arange(side) + phase) / side * c * (1 - 1e-6) for side, phase, c in parts)
        y, x = y.clamp_max(float(cells[0]) - 1e-4), x.clamp_max(float(cells[1]) - 1e-4)
        y0, x0 = y.long(), x.long()
        fy, fx = y - y0, x - x0

        corners = []
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            angle = angles[(y0 + dy)[:, None], (x0 + dx)[None, :]]
            corners.append(angle.sin() * (fy - dy)[:, None] + angle.cos() * (fx - dx)[None, :])
        wy, wx = (t * t * t * (t * (t * 6 - 15) + 10) for t in (fy[:, None], fx[None, :]))
        top, bottom = torch.lerp(corners[0], corners[1], wx), torch.lerp(corners[2], corners[3], wx)
        made.append(torch.lerp(top, bottom, wy))
    return torch.stack(made) * 2**0.5


def perlin_masks(n: int, shape: tuple[int, int], config: Synthesis, rng: Generator) -> Tensor:
    """M, (n, 1, *shape) in {0, 1}: where Perlin noise exceeds the threshold; never empty.

    Where nothing exceeds the threshold it is lowered to a tenth below that sample's maximum.
    """
    noise = perlin(n, shape, config.max_scale, rng)
    peak = noise.flatten(1).amax(1)
    threshold = torch.minimum(torch.full_like(peak, config.threshold), peak - 0.1 * peak.abs())
    return (noise >= threshold.view(-1, 1, 1)).float()[:, None]


def _others(features: Tensor, step: int, rng: Generator) -> Tensor:
    """Features of another image of the batch, `step` before, moved to other places."""
    dy, dx = torch.randint(0, max(features.shape[2:]), (2,), generator=rng).tolist()  # `roll` goes round
    return features.roll(step, 0).roll((dy, dx), dims=(2, 3))


def _shuffled(features: Tensor, rng: Generator) -> Tensor:
    """The image's own cells, permuted among all places."""
    flat = features.flatten(2)
    return flat[..., torch.randperm(flat.shape[-1], generator=rng)].unflatten(2, features.shape[2:])


def _jittered(features: Tensor, rng: Generator) -> Tensor:
    """Gaussian noise whose expected norm is that of a typical feature vector."""
    scale = features.pow(2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return features + scale * torch.randn(features.shape, generator=rng).to(features)


def sources(features: Tensor, textures: Tensor | None, step: int, rng: Generator) -> dict[str, Callable[[], Tensor]]:
    """Functions that make foreign features T (N, C, g, g), by the name of their weight in `Synthesis`.

    Other images are those `step` before in the batch.
    """
    made: dict[str, Callable[[], Tensor]] = {
        "others": lambda: _others(features, step, rng),
        "shuffles": lambda: _shuffled(features, rng),
        "jitter": lambda: _jittered(features, rng),
    }
    if textures is not None and len(textures):
        n, bank = len(features), textures
        made["textures"] = lambda: bank[torch.randint(len(bank), (n,), generator=rng)].to(features)
    return made


def blend(features: Tensor, foreign: Tensor, mask: Tensor, beta: float | Tensor) -> Tensor:
    """F_a = (1 − M) ⊙ F + M ⊙ (β·T + (1 − β)·F)."""
    return features + mask * beta * (foreign - features)


def synthesise(features: Tensor, textures: Tensor | None, config: Synthesis, rng: Generator) -> Anomalies:
    """F_a = (1 − M) ⊙ F + M ⊙ (β·T + (1 − β)·F), T from one source per sample (our reading of FASM).

    T is foreign: features of a texture image (the paper's), or ours: other good images, shuffled cells, jitter.
    β is drawn per sample from `config.strength`; a share `config.clean` of the samples stays as it is.

    Args:
        features: F (N, C, g, g).
        textures: Bank of texture features (K, C, g, g), or None.
        config: Sources and strength.
        rng: The only source of randomness.
    """
    n, shape = len(features), (features.shape[2], features.shape[3])
    own, step = torch.arange(n), int(torch.randint(1, max(n, 2), (1,), generator=rng))
    made = sources(features, textures, step, rng)
    weights = torch.tensor([getattr(config, name) for name in made])
    if weights.sum() == 0 or config.clean == 1:
        return Anomalies(features, torch.zeros(n, 1, *shape).to(features), own)
    choice, foreign = torch.multinomial(weights, n, replacement=True, generator=rng), torch.zeros_like(features)
    for i, make in enumerate(made.values()):
        chosen = (choice == i).view(-1, 1, 1, 1)
        if chosen.any():
            foreign = torch.where(chosen.to(features.device), make(), foreign)
    low, high = config.strength
    beta = low + (high - low) * torch.rand(n, 1, 1, 1, generator=rng)
    mask = perlin_masks(n, shape, config, rng)
    mask = (mask * (torch.rand(n, 1, 1, 1, generator=rng) >= config.clean)).to(features)
    origin = torch.where(choice == 0, (own - step) % n, own)  # `others` is the first source
    return Anomalies(blend(features, foreign, mask, beta.to(features)), mask, origin)


def texture_files(folder: str | Path, limit: int = 32) -> list[Path]:
    """The texture images of a folder that are used: the first `limit`. Raises ImageError: there is none."""
    if found := list_images(folder)[:limit]:
        return found
    raise ImageError(f"{folder}: holds no texture images; name a folder of photographs, or none")


def texture_images(folder: str | Path | None, preparation: Preparation) -> list[np.ndarray]:
    """Prepared texture images (3, H, W), of a folder or those packaged with scikit-image.

    A region of interest is a matter of the product's images, and left out.
    """
    preparation = preparation.model_copy(update={"roi": None})
    if folder is not None:
        return [prepare(read(path), preparation).pixels for path in texture_files(folder)]
    import skimage.data

    images = [getattr(skimage.data, name)() for name in PACKAGED_TEXTURES]
    return [prepare(read(np.asarray(image)), preparation).pixels for image in images]
