"""Statistics of anomaly maps that the image score is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def variance_between(maps: Tensor, inside: Tensor, images: Tensor) -> Tensor:
    """Share of the variance of maps that lies between images: the intraclass correlation, () in [0, 1].

    Args:
        maps: (N, h, h).
        inside: (N, h, h) bool, the cells that count.
        images: (N,) the image that each map belongs to.

    Returns:
        The variance of the means of images, over the sum of it and the mean variance within an image; 0 for one image.
    """
    cells = [maps[images == image][inside[images == image]] for image in images.unique()]
    cells = [c for c in cells if len(c)] or [maps.new_zeros(1)]
    means, within = (torch.stack(found) for found in ([c.mean() for c in cells], [c.var(correction=0) for c in cells]))
    between = means.var() if len(means) > 1 else means.new_zeros(())
    return between / (between + within.mean()).clamp_min(1e-12)


def square_parts(maps: Tensor) -> list[Tensor]:
    """Square parts (N, s, s) of maps (N, rows, columns) along their longer side, which overlap by half at least.

    What is measured on whole images is measured on these: a defect would otherwise count for less, the longer the
    product is. Squares are one part.
    """
    side, axis = min(maps.shape[1:]), 1 if maps.shape[1] > maps.shape[2] else 2
    further = maps.shape[axis] - side
    count = -(-further // max(1, side // 2))
    return [maps.narrow(axis, further * i // max(1, count), side) for i in range(count + 1)]


def top_fraction_mean(maps: Tensor, fractions: Sequence[float], valid: Tensor | None = None, window: int = 3) -> Tensor:
    """Mean of the highest values of each map, after a mean filter.

    Args:
        maps: (N, g, g).
        fractions: Q fractions in (0, 1] of the valid cells; at least one cell is taken.
        valid: (N, g, g) bool; None: all.
        window: Odd side of the mean filter in cells; 1 leaves the maps as they are.

    Returns:
        (N, Q).
    """
    inside = torch.ones_like(maps) if valid is None else valid.to(maps)
    around = (window, 1, window // 2)
    covered = F.avg_pool2d(inside[:, None], *around)  # so that the padding does not blur into the image
    smooth = (F.avg_pool2d((maps * inside)[:, None], *around) / covered.clamp_min(1e-6)).flatten(1)
    cells = smooth if valid is None else smooth.masked_fill(~valid.flatten(1), -torch.inf)
    ordered = cells.sort(dim=1, descending=True).values
    present = torch.full((maps.shape[0],), cells.shape[1]) if valid is None else valid.flatten(1).sum(1)
    rank = torch.arange(cells.shape[1], device=maps.device)
    counts = [(q * present).round().clamp_min(1)[:, None] for q in fractions]
    return torch.stack([torch.where(rank < k, ordered, 0).sum(1) / k[:, 0] for k in counts], dim=1)
