"""A trained detector as one graph for ONNX Runtime or OpenVINO: from the prepared image to map, score and layers."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.func import functional_call

from unflaw._version import __version__
from unflaw.detector import Detector
from unflaw.errors import DetectorError, WriteError
from unflaw.imaging.transforms import ModelInput
from unflaw.io.detector_file import before, read_metadata, read_weights
from unflaw.io.files import holding, write_atomically
from unflaw.methods.graph import Graph

Target = Literal["onnx", "openvino"]
Precision = Literal["fp32", "fp16", "int8"]

OPSET = 18
SUFFIX: Mapping[str, str] = {"onnx": ".onnx", "openvino": ".xml"}
HALVED = 1024  # numbers that a tensor has at least to be stored in 16 bits; smaller ones hold scales and means
CALIBRATED_ON = 64  # images at most that say which range 8 bits have to cover


class ByCategory(nn.Module):
    """A graph of several categories: an input says whose memories and normal evidence it uses.

    What the categories own is stacked, and the graph picks one row of each stack. So the detector stays one file with
    one set of weights, and a caller names a category by a number instead of carrying tensors about. The price is a copy
    of one category's memories, some megabytes, for each run.

    Args:
        whole: The graph, whatever category is in use.
        categories: `Method.category_state` of each.
    """

    def __init__(self, whole: Graph, categories: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.whole = whole
        self.owned = {name: f"owned_{i}" for i, name in enumerate(categories[0])}
        for name, place in self.owned.items():
            self.register_buffer(place, torch.stack([category[name] for category in categories]))

    def forward(self, images: Tensor, category: Tensor, cells: Tensor | None = None) -> dict[str, Tensor]:
        """As `Graph`, with the number of the category, () int64."""
        own = {f"network.{name}": getattr(self, place)[category] for name, place in self.owned.items()}
        return functional_call(self.whole, own, (images, cells))


def export(
    detector: Detector,
    path: str | Path,
    *,
    to: Target = "onnx",
    precision: Precision = "fp32",
    images: Sequence[ModelInput] = (),
) -> Path:
    """Writes a detector as a graph, with all that its file says of it; docs/runtime.md is the contract.

    Args:
        detector: Fitted.
        path: Where to write; for OpenVINO the `.xml` file, and the `.bin` file comes beside it.
        to: What will run it.
        precision: "fp32" agrees with the detector to rounding. "fp16" stores weights and memories in 16 bits and
            computes in 32: half the file. "int8" also computes the deeper half of the backbone in 8 bits.
        images: Good ones, which say what range 8 bits have to cover; up to 64 are used.

    Raises:
        DetectorError: Not fitted. ValueError: "int8" without images, or without a backbone.
    """
    path = Path(path)
    if precision == "int8" and not images:
        raise ValueError("8 bits need good images that say which range they have to cover; give --data")
    detector.select(next(iter(detector.calibrations), None))  # fails where there is none
    model = to_onnx(detector)
    if precision == "int8":
        from unflaw.runtime.quantisation import quantise

        model = quantise(model, images[:CALIBRATED_ON])
    for node in model.graph.node:
        del node.metadata_props[:]  # where in torch's code it comes from
        node.doc_string = ""
    metadata = detector.metadata() | {"exported": _record(detector, to, precision)}
    if to == "onnx":
        if precision != "fp32":
            halve(model)
        helper.set_model_props(model, {"unflaw": json.dumps(metadata)})
        write_atomically(path, lambda file: file.write_bytes(model.SerializeToString()))
    else:
        _write_openvino(model, path, metadata)
    return path


def to_onnx(detector: Detector) -> ModelProto:
    """The graph of a fitted detector in float32, without metadata. The number of images, N, is open."""
    networks = [category.network for category in detector.categories_.values()]
    graph: Graph | ByCategory = Graph(networks[0], detector.display)
    size = detector.config.preparation.size
    batch = torch.export.Dim("N", min=1)
    arguments: dict[str, tuple[Tensor, Any]] = {"images": (torch.rand(2, 3, size, size), {0: batch})}
    if len(networks) > 1:
        graph = ByCategory(Graph(networks[0], detector.display), [network.category_state() for network in networks])
        arguments["category"] = (torch.tensor(0), None)
    if not detector.config.preparation.covers:
        grid = detector.network.features.grid
        arguments["cells"] = (torch.ones(2, grid, grid, dtype=torch.bool), {0: batch})
    inputs = tuple(example for example, _ in arguments.values())
    shapes: Any = tuple(dynamic for _, dynamic in arguments.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other versions of its own parts
        outputs = list(graph.eval()(*inputs))
        program = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            input_names=list(arguments),
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.producer_name, model.producer_version = "unflaw", __version__
    return model


def halve(model: ModelProto) -> None:
    """Stores large float32 tensors as float16, followed by a cast that runtimes do once, when they load the graph."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < HALVED:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _record(detector: Detector, to: Target, precision: Precision) -> dict[str, Any]:
    draws = detector.network.weight_samples
    return {
        "to": to,
        "precision": precision,
        "grid": detector.network.features.grid,
        "opset": OPSET,
        "unflaw": __version__,
        **({"draws": draws} if draws > 1 else {}),
    }


def _write_openvino(model: ModelProto, path: Path, metadata: dict[str, Any]) -> None:
    """`.xml` and `.bin`. The first names the digest of the second, so that halves of two detectors are not mistaken."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source, written = Path(folder) / "graph.onnx", Path(folder) / "graph.xml"
        onnx.save(model, source)
        graph = openvino.convert_model(source)
        half = metadata["exported"]["precision"] != "fp32"
        _save_openvino(graph, written, half)
        weights = written.with_suffix(".bin").read_bytes()
        metadata["exported"]["weights"] = hashlib.sha256(weights).hexdigest()
        graph.set_rt_info(json.dumps(metadata), "unflaw")
        _save_openvino(graph, written, half)
        described = written.read_bytes()
    second = path.with_suffix(".bin")
    with holding(path):
        if path.is_file() and second.is_file():
            with suppress(DetectorError, KeyError):  # no pair that could be lost
                old = read_weights(path, read_metadata(path)["exported"]["weights"])
                write_atomically(before(second), lambda file: file.write_bytes(old))
        write_atomically(second, lambda file: file.write_bytes(weights))
        write_atomically(path, lambda file: file.write_bytes(described))
        before(second).unlink(missing_ok=True)


def _save_openvino(graph: Any, file: Path, half: bool) -> None:
    import openvino

    try:
        openvino.save_model(graph, file, compress_to_fp16=half)
    except RuntimeError as error:
        raise WriteError(file.parent, error, "make room there, or name another folder with TMPDIR") from error
