"""Module from prepared images to all outputs of an inspection, which `Detector` computes and export writes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from unflaw.features.extractor import PixelExtractor
from unflaw.methods import Context, Inspection, Method
from unflaw.methods.decoder import DisplayDecoder


class Graph(nn.Module):
    """A method and its display decoder.

    Args:
        network: Trained network of a category.
        display: Decoder of restored features; None if there are none, or the method restores pixels.
    """

    def __init__(self, network: Method, display: DisplayDecoder | None) -> None:
        super().__init__()
        self.network, self.display = network, display
        self.size = network.config.preparation.canvas[::-1]

    def forward(self, images: Tensor, cells: Tensor | None = None) -> dict[str, Tensor]:
        """Prepared images (N, 3, H, W) in [0, 1] → outputs by name.

        Args:
            images: On the canvas, float32.
            cells: (N, rows, columns) bool, the feature cells that count (`Window.cells`); None: all.

        Returns:
            "map" (N, H, W) and "score" (N,), float32, raw; then, if the method has them, "mean", "uncertainty" and
            "mask", each (N, H, W) float32 in [0, 1], and "restored" (N, H, W, 3) uint8.
        """
        inspection = self.network(self.network.embed(images), Context(cells))
        maps, scores = self.network.fuse(inspection, cells)
        found = {"map": maps, "score": scores}
        for name, layer in inspection.layers.items():
            mode = "nearest" if name == "mask" else "bilinear"
            found[name] = F.interpolate(layer.float(), self.size, mode=mode)[:, 0]
        drawn = self._restored_image(inspection)
        if drawn is not None:
            canvas = F.interpolate(drawn, self.size, mode="bilinear").clamp(0, 1)
            found["restored"] = (canvas * 255).round().byte().permute(0, 2, 3, 1)
        return found

    def _restored_image(self, inspection: Inspection) -> Tensor | None:
        """Restored images (N, 3, h, w): restored pixels, or restored features drawn by the display decoder."""
        if inspection.restored is None or isinstance(self.network.features, PixelExtractor):
            return inspection.restored
        return None if self.display is None else self.display(inspection.restored.float())
