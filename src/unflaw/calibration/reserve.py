"""Reserve of a threshold: an estimate of how far scores move from one session to the next (ours).

Images that are held out come from the same sessions as those that were trained on. The light, focus and gain of
tomorrow are a little different, and scores rise with every difference. So images that calibrate are scored once more
with mild alterations of their pixels, and the rises of all kinds, which may come together, are added in squares. The
reserve is an estimate and no part of the guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.calibration.crossfit import stitched_maps
from unflaw.errors import ImageError
from unflaw.features.cache import Cache, stack
from unflaw.imaging.transforms import ModelInput, try_load_windows
from unflaw.methods import Method
from unflaw.methods.feature_set import Context
from unflaw.methods.layers import gaussian_blur

WINDOWS = 16  # windows of images that are altered; more of them hardly change a median

LIGHT = CONTRAST = GRADIENT = 0.05  # relative changes, the last one towards the sides
BLUR, SHARPEN = 0.5, 0.25  # pixels at a side of 256; share of an unsharp mask
NOISE = 0.5  # standard deviation of the added noise, as a multiple of the image's own
CLIPPED = 1.5 / 255  # what is that near to black or white is clipped, and stays so in another light

KINDS = (  # of opposite changes one can come; changes of different kinds can come together
    ("brighter", "darker"),
    ("more contrast", "less contrast"),
    ("light from the side",),
    ("less sharp", "sharper"),
    ("noise",),
)

Alteration = Callable[[Tensor], Tensor]  # (N, 3, H, W) in [0, 1] → the same


def alterations(seed: int = 0) -> dict[str, Alteration]:
    """Mild alterations of images by name: what differs between two sessions of one camera with one product.

    Clipped pixels keep their value: the white of a backlight hides noise and small changes of light.
    """

    def contrast(change: float) -> Alteration:
        return lambda x: x + change * (x - x.mean((2, 3), keepdim=True))

    def gradient(x: Tensor) -> Tensor:
        return x * (1 + GRADIENT * torch.linspace(-1, 1, x.shape[3]))

    def noise(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=Generator().manual_seed(seed))
        return x + NOISE * _noise_level(x) * drawn

    def in_range(alter: Alteration) -> Alteration:
        def altered(x: Tensor) -> Tensor:
            return torch.where((x < CLIPPED) | (x > 1 - CLIPPED), x, alter(x).clamp(0, 1))

        return altered

    made: dict[str, Alteration] = {
        "brighter": lambda x: x * (1 + LIGHT),
        "darker": lambda x: x * (1 - LIGHT),
        "more contrast": contrast(CONTRAST),
        "less contrast": contrast(-CONTRAST),
        "light from the side": gradient,
        "less sharp": lambda x: _blurred(x, BLUR),
        "sharper": lambda x: x + SHARPEN * (x - _blurred(x, 2 * BLUR)),
        "noise": noise,
    }
    return {name: in_range(alter) for name, alter in made.items()}


@torch.inference_mode()
def score_rises(network: Method, held: Cache, context: Context) -> dict[str, float]:
    """Median rise of the image score under each alteration; negative where scores fall.

    Args:
        network: Network of the category of the images.
        held: Images that calibrate; the first ones with `WINDOWS` windows or so are altered.
        context: Their rows, as they are scored for the calibration.

    Returns:
        Rises by alteration, in units of the image score; empty if no image can be read again.
    """
    heads = held.heads()
    rows, images = list[int](), list[ModelInput]()
    for head, following in zip(heads, [*heads[1:], len(held)], strict=True):
        if rows and following > WINDOWS:
            break
        found = try_load_windows(held.paths[head], network.config.preparation, str(held.paths[head]))
        if not isinstance(found, ImageError):
            windows = list(found.windows)
            if len(windows) == following - head:
                rows += range(head, following)
                images += windows
    if not rows:
        return {}
    pixels, chosen = stack(images), torch.tensor(rows)
    windows_ = [image.window for image in images]
    own = replace(context[chosen], valid=None)

    def scores(alter: Alteration) -> np.ndarray:
        parts = stitched_maps(network, windows_, lambda part: network.embed(alter(pixels[part])).float(), own)
        return np.array([stitcher.result()[0] for stitcher in parts])

    usual = scores(lambda x: x)
    return {name: float(np.median(scores(alter) - usual)) for name, alter in alterations().items()}


def reserve_of(rises: Mapping[str, float]) -> float:
    """Root of the sum of squares over `KINDS` of the largest rise of each kind, ≥ 0."""
    return math.hypot(*(max(0.0, *(rises.get(name, 0.0) for name in names)) for names in KINDS))


def _noise_level(x: Tensor) -> Tensor:
    """(N, 3, H, W) → (N, 3, 1, 1), standard deviation of the noise of each channel (Immerkær 1996).

    The mask cancels the Laplacian of planes and edges. The median of its magnitude, not the mean, is taken, so that
    texture counts for less.
    """
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    found = F.conv2d(x.flatten(0, 1)[:, None], mask.view(1, 1, 3, 3)).abs().flatten(1).median(1).values
    return (found / 0.6745 / 6).view(*x.shape[:2], 1, 1)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """(N, 3, H, W), a Gaussian filter of each channel; sigma in pixels at a side of 256."""
    return gaussian_blur(x.flatten(0, 1)[:, None], sigma * min(x.shape[2:]) / 256).view_as(x)
