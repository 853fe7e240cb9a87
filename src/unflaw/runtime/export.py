"""Export of a trained detector as one graph for ONNX Runtime or OpenVINO, from the prepared image to map and score."""

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
from unflaw.methods.memory_bank import FAR

Target = Literal["onnx", "openvino"]
Precision = Literal["fp32", "fp16", "int8"]

OPSET = 18
SUFFIX: Mapping[str, str] = {"onnx": ".onnx", "openvino": ".xml"}
HALVED = 1024  # minimum number of elements of a tensor stored in 16 bits; smaller ones hold scales and means
CALIBRATED_ON = 64  # maximum number of images that determine the range of 8-bit activations


class ByCategory(nn.Module):
    """Graph of a detector of several categories, with the category as an input.

    The tensors that belong to a category, such as memory banks, are stacked, and the graph selects one row of each
    stack. All other weights are stored once. Each run copies the tensors of its category, some megabytes.

    Args:
        whole: Graph of the detector, with any category selected.
        categories: `Method.category_state` of each category.
    """

    def __init__(self, whole: Graph, categories: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.whole = whole
        self.owned = {name: f"owned_{i}" for i, name in enumerate(categories[0])}
        for name, buffer in self.owned.items():
            self.register_buffer(buffer, stacked([category[name] for category in categories]))

    def forward(self, images: Tensor, category: Tensor, cells: Tensor | None = None) -> dict[str, Tensor]:
        """Run `Graph.forward` for a category, given by its number, () int64."""
        own = {f"network.{name}": getattr(self, buffer)[category] for name, buffer in self.owned.items()}
        return functional_call(self.whole, own, (images, cells))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors; shorter ones, of categories that were taught less, are padded with prototypes far away."""
    longest = max(len(tensor) if tensor.ndim else 0 for tensor in tensors)
    padded = [
        torch.cat([tensor, tensor.new_full((longest - len(tensor), *tensor.shape[1:]), FAR)])
        if tensor.ndim and len(tensor) < longest
        else tensor
        for tensor in tensors
    ]
    return torch.stack(padded)


def export(
    detector: Detector,
    path: str | Path,
    *,
    to: Target = "onnx",
    precision: Precision = "fp32",
    images: Sequence[ModelInput] = (),
) -> Path:
    """Write a detector as a graph with its metadata; docs/runtime.md specifies both.

    Args:
        detector: A fitted detector.
        path: File to write; for OpenVINO the `.xml` file, beside which the `.bin` file is written.
        to: Runtime that will run the graph.
        precision: "fp32" agrees with the detector up to rounding. "fp16" stores weights and memory banks in 16 bits
            and computes in 32, which halves the file. "int8" also computes the deeper half of the backbone in 8 bits.
        images: Good images for "int8", which determine the range of activations; the first 64 are used.

    Raises:
        DetectorError: The detector is not fitted, or "int8" is asked for and it has no backbone. ValueError: "int8"
            without images.
    """
    path = Path(path)
    if precision == "int8" and not images:
        raise ValueError("8 bits need good images that say which range they have to cover; give --data")
    detector.select(next(iter(detector.calibrations), None))  # raises if the detector is not fitted
    model = to_onnx(detector)
    if precision == "int8":
        from unflaw.runtime.quantisation import quantise

        model = quantise(model, images[:CALIBRATED_ON])
    for node in model.graph.node:
        del node.metadata_props[:]  # source locations of torch's code
        node.doc_string = ""
    exported: dict[str, Any] = {"to": to, "precision": precision, "opset": OPSET, "unflaw": __version__}
    exported["grid"] = detector.network.features.shape
    if detector.network.weight_samples > 1:
        exported["draws"] = detector.network.weight_samples
    metadata = detector.metadata() | {"exported": exported}
    if to == "openvino":
        _write_openvino(model, path, metadata)
        return path
    if precision != "fp32":
        store_as_float16(model)
    helper.set_model_props(model, {"unflaw": json.dumps(metadata)})
    write_atomically(path, lambda file: file.write_bytes(model.SerializeToString()))
    return path


def to_onnx(detector: Detector) -> ModelProto:
    """Convert a fitted detector to a float32 graph without metadata, for any number of images."""
    networks = [category.network for category in detector.categories_.values()]
    whole = Graph(networks[0], detector.display)
    graph: Graph | ByCategory = whole
    batch = torch.export.Dim("N", min=1)
    arguments: dict[str, tuple[Tensor, Any]] = {
        "images": (torch.rand(2, 3, *detector.config.preparation.canvas[::-1]), {0: batch})
    }
    if len(networks) > 1:
        graph = ByCategory(whole, [network.category_state() for network in networks])
        arguments["category"] = (torch.tensor(0), None)
    if not detector.config.preparation.covers:
        arguments["cells"] = (torch.ones(2, *detector.network.features.shape, dtype=torch.bool), {0: batch})
    inputs = tuple(example for example, _ in arguments.values())
    shapes: Any = tuple(dynamic for _, dynamic in arguments.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of versions of its own parts
        program = torch.onnx.export(
            graph.eval(),
            inputs,
            dynamo=True,
            input_names=list(arguments),
            output_names=list(graph(*inputs)),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.producer_name, model.producer_version = "unflaw", __version__
    return model


def store_as_float16(model: ModelProto) -> None:
    """Store large float32 tensors as float16, followed by a cast that runtimes do once, when they load the graph."""
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


def _write_openvino(model: ModelProto, path: Path, metadata: dict[str, Any]) -> None:
    """Write the `.xml` and the `.bin` file. The `.xml` holds the digest of the `.bin`, so that they cannot be mixed."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        source, written = Path(folder) / "graph.onnx", Path(folder) / "graph.xml"
        onnx.save(model, source)
        graph = openvino.convert_model(source)

        def save() -> None:
            try:
                openvino.save_model(graph, written, compress_to_fp16=metadata["exported"]["precision"] != "fp32")
            except RuntimeError as error:
                raise WriteError(Path(folder), error, "make room there, or name another folder with TMPDIR") from error

        save()
        weights = written.with_suffix(".bin").read_bytes()
        metadata["exported"]["weights"] = hashlib.sha256(weights).hexdigest()
        graph.set_rt_info(json.dumps(metadata), "unflaw")
        save()
        description = written.read_bytes()
    second = path.with_suffix(".bin")
    with holding(path):
        if path.is_file() and second.is_file():
            with suppress(DetectorError, KeyError):  # the two files are no pair to be kept
                old = read_weights(path, read_metadata(path)["exported"]["weights"])
                write_atomically(before(second), lambda file: file.write_bytes(old))
        write_atomically(second, lambda file: file.write_bytes(weights))
        write_atomically(path, lambda file: file.write_bytes(description))
        before(second).unlink(missing_ok=True)
