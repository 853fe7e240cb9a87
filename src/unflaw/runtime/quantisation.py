"""Eight bits for the deeper half of an exported backbone.

The distance to a memory takes the noise of rounding for what is not normal: with all of EfficientNet-Lite0 in 8 bits
image AUROC on screw fell from .945 to .194 (`nearest_neighbor`), with the 1×1 convolutions alone to .877, with those
of its first half to .874, and with those of its second half not at all (.949). That half has most of the weights.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from unflaw.errors import DetectorError
from unflaw.imaging.transforms import ModelInput

BACKBONE = "network.features.backbone"


def quantise(model: ModelProto, images: Sequence[ModelInput]) -> ModelProto:
    """Quantised statically, weights by output channel, activations in the range that good images show.

    Args:
        model: As `to_onnx` writes it: its nodes say which module they come from.
        images: Good ones, on the detector's canvas.

    Raises:
        DetectorError: No backbone.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    convolutions = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and _in_backbone(node) and dims[node.input[1]][1] > 1  # depthwise ones gain nothing
    ]
    convolutions = convolutions[len(convolutions) // 2 :]
    if not convolutions:
        raise DetectorError("this method has no backbone that could compute in 8 bits; export it in fp32 or fp16")
    inputs = [node.name for node in model.graph.input]
    sides = [node.type.tensor_type.shape.dim[1].dim_value for node in model.graph.input if node.name == "cells"]
    grid = sides[0] if sides else 1

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            if image is None:
                return None
            fed = {
                "images": image.pixels[None],
                "cells": image.window.cells(grid)[None],
                "category": np.array(0, np.int64),
            }
            return {name: fed[name] for name in inputs}

    logger = logging.getLogger()
    level = logger.level
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "small.onnx"
        onnx.save(model, whole)
        try:
            logger.setLevel(logging.ERROR)  # it advises a preparation that the exporter has done already
            quantize_static(
                whole,
                small,
                Reader(),
                nodes_to_quantize=convolutions,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        finally:
            logger.setLevel(level)
        return onnx.load(small)


def _in_backbone(node: onnx.NodeProto) -> bool:
    return any(BACKBONE in entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes")
