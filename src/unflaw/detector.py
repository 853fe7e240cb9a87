"""Detector: fit, inspect, save, load. The one object a user holds; it only assembles the parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unflaw.calibration.drift import Reference, references
from unflaw.calibration.recalibrate import recalibrate
from unflaw.calibration.thresholds import Calibration, calibrations
from unflaw.config import CalibrationOptions, Config, Weights, WeightSource, make_config
from unflaw.errors import DetectorError
from unflaw.features.backbones import WeightsError
from unflaw.features.cache import Source, cells, stack
from unflaw.imaging.inputs import ImageLike, inputs
from unflaw.imaging.transforms import ModelInput
from unflaw.inference.base import BasePredictor, Outputs
from unflaw.io.detector_file import FORMAT, first_fault, read_metadata
from unflaw.io.files import check_name, write_atomically
from unflaw.io.progress import Progress, silent
from unflaw.methods import Method, create
from unflaw.methods.decoder import DisplayDecoder
from unflaw.methods.graph import Graph
from unflaw.parallel.process_group import SINGLE_PROCESS, ProcessGroup
from unflaw.training.fit import Fitted, fit
from unflaw.training.loop import seeded
from unflaw.training.splits import Category, Data


class Detector(BasePredictor):
    """Learns what good looks like and says of a new image whether and where it differs.

    Args:
        method: Its name, see `unflaw.registry.names`; "uranet" by default.
        profile: "cpu" (default) or "paper".
        weights: Backbone weight file, or `Weights.RANDOM`; see `FeatureExtractor` for what happens without.
        config: A whole configuration, instead of method, profile and settings.
        **settings: Dotted settings with `__` for the dot, such as `training__seed=1`, `features__backbone="resnet18"`.

    Raises:
        ValueError: Unknown method, profile or setting, a value out of range, or any of these beside `config`.
        WeightsError: As `create_backbone`.

    Attributes set by `fit`:
        categories_: What is known of each category, by name; of a detector of one, which needs no name, that is "".
        record_: How it was trained: data, digest, times, losses, versions.

    Example:
        >>> detector = Detector().fit("parts/train/good")        # doctest: +SKIP
        >>> detector.inspect("parts/new/0001.png").verdict  # doctest: +SKIP
        'defect'
        >>> detector.fit({"nut": "nuts", "bolt": "bolts"}).inspect("new.png", category="nut")  # doctest: +SKIP
    """

    def __init__(
        self,
        method: str | None = None,
        *,
        profile: str | None = None,
        weights: WeightSource = None,
        config: Config | None = None,
        **settings: Any,
    ) -> None:
        changes = {name.replace("__", "."): value for name, value in settings.items()}
        if config is not None and (ignored := [*filter(None, (method, profile)), *settings]):
            raise ValueError(
                f"{ignored[0]} cannot be given beside config, which is a whole configuration; "
                "give config alone, or method, profile and settings without it"
            )
        self.config = config or make_config(method or "uranet", profile or "cpu", changes)
        self.weights = Weights.name_of(weights)
        self._source: Path | None = None  # the file that it was loaded from, whatever that is called
        self.categories_: dict[str, Category] = {}
        self.record_ = {}
        with seeded(self.config.training.seed):
            self.network = create(self.config, weights).eval()
        self.display: DisplayDecoder | None = None

    @property
    def calibration_(self) -> Calibration | None:
        """Threshold, p-values and heat-map scale of the only category; None before `fit`. Several: DetectorError."""
        return self.select() if self.categories_ else None

    def fit(
        self,
        data: Data | Mapping[str, Data],
        *,
        progress: Progress = silent,
        checkpoint: Path | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> Detector:
        """Learns from good images: features once, training on them, calibration on those held out.

        Args:
            data: A data set that `load_dataset` recognises, or images as `inspect_many` takes them: paths or arrays.
                Its validation part calibrates; where there is none, a share `calibration.holdout` of the training part
                is kept out of training for that. Of files that are the same, byte for byte, and of equal arrays, one
                counts: a copy of a training image must not calibrate.
                Several, by name (`load_categories` finds them), make a detector of these categories: one network,
                trained on all of them as they come, but what is normal, and the calibration, are each category's own.
            progress: Called as `progress(stage, done, total, loss)`.
            checkpoint: Where to save progress; an interrupted `fit` with the same arguments goes on from there and
                gives the same detector. Delete it once that is saved.
            group: Several processes that all call `fit` with the same arguments, such as `fabric.FabricGroup`. They
                share caching and training, and every one gets the detector.

        Raises:
            TrainingError, DatasetError: Data that cannot work, of any category. TypeError: Something that is no image.
        """
        self.categories_, self.display, self.record_ = {}, None, {}
        return self._take(
            fit(
                self.config,
                data,
                self.network.features.backbone,
                weights=self.weights,
                source=self._feature_source(),
                progress=progress,
                checkpoint=checkpoint,
                group=group,
            )
        )

    def _take(self, fitted: Fitted) -> Detector:
        """Makes the result of a training its own."""
        self.network, self.display = fitted.network, fitted.display
        self.categories_, self.record_ = fitted.categories, fitted.record
        return self

    def _feature_source(self) -> Source | None:
        """Where raw features come from; None: the images."""
        return None

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """By category; "" is the category of a detector that has no others; empty before `fit`."""
        return {name: known.calibration for name, known in self.categories_.items()}

    @property
    def references(self) -> dict[str, Reference]:
        """By category; empty before `fit`, and where the file is of an unflaw that did not remember images."""
        return {name: known.reference for name, known in self.categories_.items() if known.reference is not None}

    def network_of(self, category: str | None = None) -> Method:
        """Returns the network of a category: all weights are common, memories and what is normal are its own.

        Args:
            category: None will do where there is one only.

        Raises:
            DetectorError: Not fitted, or a category is missing or not known.
        """
        return self.categories_[self.category(category)].network

    def calibrate(
        self,
        good: Iterable[ImageLike],
        defects: Iterable[ImageLike] = (),
        *,
        rate: float | None = None,
        miss_rate: float | None = None,
        cost_ratio: float | None = None,
        category: str | None = None,
        keep: bool = False,
        progress: Progress = silent,
        **settings: Any,
    ) -> Calibration:
        """Sets thresholds and p-values anew, without training, from images of today.

        What the network has learned stays, and so does what evidence it holds normal. `record_["calibrations"]` gets an
        entry: when, on how many images, what came of it, and which good images stand out among those given.

        Args:
            good: Good images that it has not learned from, as `inspect_many` takes them. Of those that are the same,
                byte for byte, one counts.
            defects, miss_rate, cost_ratio: As for `calibration.calibrate`.
            rate: False-alarm rate asked for; None: that of the configuration.
            category: Of a detector of several.
            keep: Also counts the scores it was calibrated with before; right where both kinds of images will come.
            **settings: `review_rate`, `review_uncertain`, `minimum_area` and `extrapolate_tail` in place of those of
                the configuration.

        Returns:
            The new calibration, which is also in the detector.

        Raises:
            TrainingError: No good image that can be read, one that it has learned from, or, with `keep`, one that
                counts already. DetectorError: as for `select`. ValueError: As for `calibration.calibrate`.
        """
        name = self.category(category)
        own = self.categories_[name]
        made = recalibrate(
            lambda images: self.inspect_named(((str(image), image) for image in images), category=name),
            own.calibration,
            own.reference,
            self.record_,
            list(inputs(good, "good image")),
            list(inputs(defects, "defective image")),
            category=name,
            options=CalibrationOptions.model_validate(self.config.calibration.model_dump() | settings),
            rate=rate,
            miss_rate=miss_rate,
            cost_ratio=cost_ratio,
            keep=keep,
            progress=progress,
        )
        self.categories_[name] = own._replace(calibration=made.calibration, reference=made.reference)
        self.record_ = made.record
        return made.calibration

    def save(self, path: str | Path) -> None:
        """Writes the detector as one `.safetensors` file, backbone included; never a half-written one.

        Raises:
            DetectorError: Not fitted, or `path` is neither a `.safetensors` file nor the one that it was loaded from.
            WriteError: It cannot be written.
        """
        if Path(path) != self._source:
            check_name(Path(path))
        self.select(next(iter(self.categories_), None))  # fails where there is none
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.display is not None:
            tensors |= {f"display.{name}": tensor for name, tensor in self.display.state_dict().items()}
        for i, (name, category) in enumerate(self.categories_.items()):
            tensors |= {f"{_place(name, i)}.{buffer}": t for buffer, t in category.network.category_state().items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(Path(path), lambda file: save_file(tensors, file, {"unflaw": json.dumps(self.metadata())}))

    def metadata(self) -> dict[str, Any]:
        """All that a file says of a detector besides its tensors."""
        known = {
            name: calibration.model_dump(mode="json", exclude_defaults=True)
            for name, calibration in self.calibrations.items()
        }
        by_defects = any(calibration.defects for calibration in self.calibrations.values())
        return {
            "format": 1 if "" in known and not by_defects else FORMAT,
            "config": self.config.model_dump(mode="json"),
            **({"calibration": known[""]} if "" in known else {"categories": known}),
            "drift": {name: reference.to_json() for name, reference in self.references.items()},
            "record": self.record_,
        }

    @classmethod
    def load(cls, path: str | Path) -> Detector:
        """Reads a saved detector. Needs no network and executes nothing from the file.

        Raises:
            DetectorError: Missing, damaged, not a detector, or of a newer format.
        """
        metadata = read_metadata(path)
        if "exported" in metadata:
            raise DetectorError(f"{path}: was exported, and only inspects; name the .safetensors file it was made of")
        try:
            known, drift = calibrations(metadata), references(metadata)
            config = Config.model_validate(metadata["config"])
            with safe_open(path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                _check_shapes(config, shapes)
                tensors = {name: file.get_tensor(name) for name in shapes}
            detector = cls(config=config, weights=Weights.LATER)
        except (KeyError, ValueError, WeightsError, SafetensorError) as error:
            reason = first_fault(error)
            raise DetectorError(f"{path}: its metadata cannot be used ({reason}); train it again") from error
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "display": {}, "categories": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        try:
            if len(parts) > 3:
                raise RuntimeError(f"unknown parts {sorted(set(parts) - {'network', 'display', 'categories'})}")
            detector.network.load_state_dict(parts["network"], assign=True)
            if parts["display"]:
                with seeded(0):
                    detector.display = DisplayDecoder(detector.network.features.channels).eval()
                detector.display.load_state_dict(parts["display"])
            for i, (name, calibration) in enumerate(known.items()):
                normal = {
                    buffer: tensors[f"{_place(name, i)}.{buffer}"] for buffer in detector.network.category_buffers
                }
                network = detector.network.with_category(normal)  # fails where a shape is wrong
                detector.categories_[name] = Category(calibration, network, drift.get(name))
        except (RuntimeError, KeyError) as error:
            raise DetectorError(f"{path}: its tensors do not fit its configuration ({error})") from error
        detector.record_ = metadata.get("record", {})
        detector._source = Path(path)
        detector.weights = detector.record_.get("weights", "unknown")  # of the backbone that another `fit` will use
        return detector

    @torch.inference_mode()
    def compute(self, images: Sequence[ModelInput], category: str) -> Outputs:
        """What the network finds in windows, of images of a category; see `BasePredictor.compute`."""
        network = self.network_of(category)
        inside = cells([image.window for image in images], network.features.grid)
        found = Graph(network, self.display)(stack(images), inside)
        return Outputs.of({name: values.numpy() for name, values in found.items()})


def _check_shapes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises: ValueError: The configuration asks for other tensors than there are. No memory is taken for them."""
    with torch.device("meta"):
        wanted = {f"network.{name}": tuple(t.shape) for name, t in create(config, Weights.LATER).state_dict().items()}
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise ValueError(f"its tensors do not fit its configuration: {name} is {shapes.get(name)}, not {shape}")


def _place(category: str, number: int) -> str:
    """Where a file has what is normal for a category: without a name, at its place in the network."""
    return f"categories.{number}" if category else "network"
