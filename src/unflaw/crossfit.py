"""What good pictures show a network that did not learn from them: the evidence that calibrates a detector."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unflaw.cache import Cache
from unflaw.calibration import Evidence
from unflaw.methods import Method

Cells = Callable[[Tensor], Tensor | None]  # boxes (N, 4) → the cells that pictures cover, as `Method.fuse` takes them


@torch.inference_mode()
def gather_evidence(
    network: Method, cache: Cache, cells: Cells, found: Evidence, leave: Tensor | None = None
) -> Evidence:
    """Adds what a network finds in pictures to evidence, and returns it.

    Args:
        network: With what is normal for their category in use.
        cache: The pictures.
        cells: Says which cells they cover.
        found: What is added to.
        leave: (N,) rows of the cache that `Method.setup` saw, where they are among these: what a memory keeps of each
            is left out for it.
    """
    size = (network.config.preparation.size,) * 2
    for rows in torch.arange(len(cache)).split(8):
        boxes, part = cache.boxes[rows], slice(int(rows[0]), int(rows[-1]) + 1)
        inspection = network(cache.features[part].float(), None if leave is None else leave[rows])
        maps, scores = network.fuse(inspection, cells(boxes))
        doubt = inspection.layers.get("uncertainty")
        doubts = [None] * len(rows) if doubt is None else F.interpolate(doubt, size, mode="bilinear")[:, 0].numpy()
        for score, anomaly_map, box, uncertainty in zip(
            scores.tolist(), maps.numpy(), boxes.tolist(), doubts, strict=True
        ):
            found.add(score, anomaly_map, box, uncertainty)
    return found
