"""Detectors that were exported: run by ONNX Runtime or OpenVINO, without torch and timm."""

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
from unflaw.io.detector_file import kind_of, read_metadata, read_weights

INPUTS = ("images", "cells", "category")  # of which every graph has the first

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class ExportedDetector(BasePredictor):
    """A detector that `unflaw export` wrote. It inspects as the one that it was made of.

    Args:
        path: The `.onnx` file, or the `.xml` file of OpenVINO, whose `.bin` file lies beside it.
        threads: That compute an image; None: as many as the runtime likes, usually one per core.

    Raises:
        DetectorError: Missing, damaged, not a detector, of a newer format, or with parts that no exported detector has.
        ImportError: The runtime is not installed.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        metadata = read_metadata(path)
        try:
            self._calibrations, self._references = calibrations(metadata), references(metadata)
            self.config = Config.model_validate(metadata["config"], context={"exported": True})
            self.exported: Mapping[str, Any] = metadata["exported"]
        except (KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DetectorError(f"{path}: its metadata cannot be used ({reason}); export it again") from error
        self.record_ = metadata.get("record", {})
        open_graph = _open_onnx if kind_of(path) == "onnx" else _open_openvino
        self.inputs, outputs, self._run = open_graph(Path(path), threads)
        if not {"map", "score"} <= set(outputs) or not {"images"} <= set(self.inputs) <= set(INPUTS):
            raise DetectorError(
                f"{path}: its graph has the inputs {', '.join(self.inputs)} and the outputs {', '.join(outputs)}, "
                "which are not those of a detector; export it again"
            )

    @property
    def calibrations(self) -> Mapping[str, Calibration]:
        return self._calibrations

    @property
    def references(self) -> Mapping[str, Reference]:
        return self._references

    def compute(self, images: Sequence[ModelInput], category: str) -> Outputs:
        """What the graph finds in windows, of images of a category; see `BasePredictor.compute`.

        One image at a time: matrices of one stay in the processor's cache, those of several do not.
        """
        number = list(self.calibrations).index(category)
        found = [self._run(self.feeds([image], number)) for image in images]
        return Outputs.of({name: np.concatenate([one[name] for one in found]) for name in found[0]})

    def feeds(self, images: Sequence[ModelInput], category: int = 0) -> dict[str, np.ndarray]:
        """What goes into the graph, by the names of its inputs."""
        fed = {
            "images": np.stack([image.pixels for image in images]),
            "cells": np.stack([image.window.cells(self.exported["grid"]) for image in images]),
            "category": np.array(category, np.int64),
        }
        return {name: fed[name] for name in self.inputs}


def _open_onnx(path: Path, threads: int | None) -> tuple[list[str], list[str], Run]:
    """Names of inputs and of outputs, and what runs the graph. From bytes that were looked at, not from a path."""
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
    except Exception as error:  # ONNX Runtime raises classes of its own that share no base
        raise DetectorError(f"{path}: ONNX Runtime refuses it ({_first(error)}); export it again") from error
    outputs = [output.name for output in session.get_outputs()]

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    return [node.name for node in session.get_inputs()], outputs, run


def _open_openvino(path: Path, threads: int | None) -> tuple[list[str], list[str], Run]:
    """As `_open_onnx`. In float32: on some processors OpenVINO would else compute in bfloat16, which is coarser."""
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
        raise DetectorError(f"{path}: OpenVINO refuses it ({_first(error)}); export it again") from error
    outputs = [output.any_name for output in compiled.outputs]
    busy = threading.Lock()  # a compiled model has one request, and its results are views of that

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with busy:
            found = compiled(feeds)
            return {name: np.array(found[i]) for i, name in enumerate(outputs)}

    return [node.any_name for node in compiled.inputs], outputs, run


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
