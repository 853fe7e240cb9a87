"""Exported detectors, run by ONNX Runtime or OpenVINO without torch and timm."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unflaw.calibration.drift import Reference, references
from unflaw.calibration.thresholds import Calibration, calibrations
from unflaw.config import Config
from unflaw.errors import DetectorError
from unflaw.imaging.transforms import ModelInput
from unflaw.inference.base import BasePredictor, Outputs
from unflaw.io.detector_file import first_fault, kind_of, read_metadata, read_weights

INPUTS = ("images", "cells", "category")  # of a graph; every graph has the first

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], dict[str, np.ndarray]]


class ExportedDetector(BasePredictor):
    """A detector that `unflaw export` wrote. Its results are those of the trained detector.

    Args:
        path: The `.onnx` file, or the `.xml` file of OpenVINO, beside which the `.bin` file lies.
        threads: Computing threads; None: the runtime's default, usually one per core.

    Raises:
        DetectorError: The file is missing, damaged, of a newer format or not an exported detector.
        ImportError: The runtime is not installed.
    """

    calibrations: Mapping[str, Calibration] = {}
    references: Mapping[str, Reference] = {}

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        metadata = read_metadata(path)
        try:
            self.calibrations, self.references = calibrations(metadata), references(metadata)
            self.config = Config.model_validate(metadata["config"], context={"exported": True})
            self.exported: Mapping[str, Any] = metadata["exported"]
        except (KeyError, ValueError) as error:
            reason = first_fault(error)
            raise DetectorError(f"{path}: its metadata cannot be used ({reason}); export it again") from error
        self.record_ = metadata.get("record", {})
        open_graph = _open_onnx if kind_of(path) == "onnx" else _open_openvino
        self.inputs, outputs, self._run = open_graph(Path(path), threads)
        if not {"map", "score"} <= set(outputs) or not {"images"} <= set(self.inputs) <= set(INPUTS):
            raise DetectorError(
                f"{path}: its graph has the inputs {', '.join(self.inputs)} and the outputs {', '.join(outputs)}, "
                "which are not those of a detector; export it again"
            )

    def compute(self, images: Sequence[ModelInput], category: str) -> Outputs:
        """Run the graph on windows of one category; see `BasePredictor.compute`.

        Windows are run one at a time: the matrices of one fit into the processor's cache, those of several do not.
        """
        number = list(self.calibrations).index(category)
        runs = [self._run(graph_feeds([image], self.exported["grid"], self.inputs, number)) for image in images]
        return Outputs.of({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})


def graph_feeds(images: Sequence[ModelInput], grid: Sequence[int], inputs: Sequence[str], category: int = 0) -> Feeds:
    """Return the arrays for the inputs of a graph by name.

    Args:
        images: N windows of one category.
        grid: Rows and columns of the feature grid.
        inputs: Names of the inputs that the graph has.
        category: Number of the category.
    """
    feeds = {
        "images": np.stack([image.pixels for image in images]),
        "cells": np.stack([image.window.cells(grid) for image in images]),
        "category": np.array(category, np.int64),
    }
    return {name: feeds[name] for name in inputs}


def _open_onnx(path: Path, threads: int | None) -> tuple[list[str], list[str], Run]:
    """Return names of inputs and outputs, and a function that runs the graph.

    The runtime gets the bytes that were checked, not a path whose content may change.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path}: running it needs: pip install 'unflaw[runtime]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    data = path.read_bytes()
    read_metadata(path, data)
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime share no base class
        raise DetectorError(f"{path}: ONNX Runtime refuses it ({_reason(error)}); export it again") from error
    outputs = [output.name for output in session.get_outputs()]

    def run(feeds: Feeds) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    return [node.name for node in session.get_inputs()], outputs, run


def _open_openvino(path: Path, threads: int | None) -> tuple[list[str], list[str], Run]:
    """Do the same as `_open_onnx`, in float32: by default OpenVINO uses bfloat16 on some processors."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"{path}: running it needs: pip install 'unflaw[openvino]'") from error
    graph = path.read_bytes()
    weights = read_weights(path, read_metadata(path, graph)["exported"].get("weights"))
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    try:
        model = core.read_model(graph, openvino.Tensor(np.frombuffer(weights, np.uint8)))
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise DetectorError(f"{path}: OpenVINO refuses it ({_reason(error)}); export it again") from error
    outputs = [output.any_name for output in compiled.outputs]
    busy = threading.Lock()  # a compiled model has one request, and its results are views of it

    def run(feeds: Feeds) -> dict[str, np.ndarray]:
        with busy:
            results = compiled(feeds)
            return {name: np.array(results[i]) for i, name in enumerate(outputs)}

    return [node.any_name for node in compiled.inputs], outputs, run


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
