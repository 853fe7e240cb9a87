"""Eight bits for the backbone of an exported graph."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from unflaw.errors import DetectorError
from unflaw.images import Prepared

BACKBONE = "network.features.backbone"


def quantise(model: ModelProto, pictures: Sequence[Prepared]) -> ModelProto:
    """Quantised statically, weights by output channel, activations in the range that good pictures show.

    Args:
        model: As `to_onnx` writes it: its nodes say which module they come from.
        pictures: Good ones, on the detector's canvas.

    Raises:
        ValueError: No pictures. DetectorError: No backbone.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    if not pictures:
        raise ValueError("8 bits need good pictures that say which range they have to cover; give --data")
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv" and _in_backbone(node)]
    if not convolutions:
        raise DetectorError("this method has no backbone that could compute in 8 bits; export it in fp32 or fp16")
    inputs = [node.name for node in model.graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(pictures)

        def get_next(self) -> dict[str, np.ndarray] | None:
            picture = next(self.rest, None)
            if picture is None:
                return None
            fed = {
                "pictures": picture.pixels[None],
                "boxes": np.array([picture.box], np.int64),
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
