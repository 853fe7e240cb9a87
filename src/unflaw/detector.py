"""Detector: fit, inspect, calibrate, save, load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unflaw.calibration.commission import describe_commissioning
from unflaw.calibration.drift import Reference, references
from unflaw.calibration.recalibrate import recalibrate
from unflaw.calibration.thresholds import Calibration, calibrations
from unflaw.config import CalibrationOptions, Config, Weights, WeightSource, make_config
from unflaw.errors import DetectorError
from unflaw.features.backbones import WeightsError
from unflaw.features.cache import Source, cells, stack
from unflaw.imaging.inputs import ImageLike, Input, inputs
from unflaw.imaging.transforms import ModelInput
from unflaw.inference.base import BasePredictor, Outputs
from unflaw.io.detector_file import FORMAT, first_fault, read_metadata
from unflaw.io.files import check_name, write_atomically
from unflaw.io.progress import Progress, silent
from unflaw.io.versions import keep_version
from unflaw.methods import Method, create
from unflaw.methods.base import fits
from unflaw.methods.decoder import DisplayDecoder
from unflaw.methods.graph import Graph
from unflaw.parallel.process_group import SINGLE_PROCESS, ProcessGroup
from unflaw.training.fit import Fitted, fit
from unflaw.training.loop import seeded
from unflaw.training.splits import Category, Data
from unflaw.training.teach import teach


class Detector(BasePredictor):
    """Learns from good images, and detects and locates anomalies in new ones.

    Args:
        method: Name of the method, see `unflaw.registry.names`; "uranet" by default.
        profile: "cpu" (default) or "paper".
        weights: Backbone weight file, or `Weights.RANDOM`; for None see `FeatureExtractor`.
        config: Complete configuration, instead of method, profile and settings.
        **settings: Settings with `__` for the dot, such as `training__seed=1`, `features__backbone="resnet18"`.

    Raises:
        ValueError: Unknown method, profile or setting, a value out of range, or any of these beside `config`.
        WeightsError: See `create_backbone`.

    Attributes set by `fit`:
        categories_: State of each category by name; a single category has the name "".
        record_: Facts about the training: data, digest, times, losses, versions.

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
                f"{ignored[0]} cannot be given beside config, which is a complete "
                "configuration; give config alone, or method, profile and settings without it"
            )
        self.config = config or make_config(method or "uranet", profile or "cpu", changes)
        self.weights = Weights.name_of(weights)
        self._source: Path | None = None  # the file that it was loaded from
        self.categories_: dict[str, Category] = {}
        self.record_ = {}
        with seeded(self.config.training.seed):
            self.network = create(self.config, weights).eval()
        self.display: DisplayDecoder | None = None

    @property
    def calibration_(self) -> Calibration | None:
        """Calibration of the only category; None before `fit`. Raises DetectorError if there are several."""
        return self.select() if self.categories_ else None

    def fit(
        self,
        data: Data | Mapping[str, Data],
        *,
        progress: Progress = silent,
        checkpoint: Path | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> Detector:
        """Trains on good images and calibrates on held-out ones.

        Args:
            data: A data set that `load_dataset` recognises, or images as in `inspect_many`: paths or arrays. Its
                validation part calibrates; without one, a share `calibration.holdout` of the training part is held out.
                Of identical files or arrays one counts: a copy of a training image must not calibrate. Several data
                sets by name (see `load_categories`) make a detector of several categories: the network is shared,
                memories, normalization and calibration are separate.
            progress: Called as `progress(stage, done, total, loss)`.
            checkpoint: File for saved progress. An interrupted `fit` with the same arguments resumes from it and
                returns the same detector. Delete it after saving the detector.
            group: Process group whose processes all call `fit` with the same arguments, such as `fabric.FabricGroup`.
                They share caching and training, and each gets the detector.

        Raises:
            TrainingError, DatasetError: Unusable data. TypeError: An input is not an image.
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
        """Takes over the result of a training."""
        self.network, self.display = fitted.network, fitted.display
        self.config = fitted.network.config  # `fit` chooses a canvas where none was given
        self.categories_, self.record_ = fitted.categories, fitted.record
        return self

    def _feature_source(self) -> Source | None:
        """Source of raw features; None: the images."""
        return None

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """Calibrations by category; a single category has the name "". Empty before `fit`."""
        return {name: known.calibration for name, known in self.categories_.items()}

    @property
    def references(self) -> dict[str, Reference]:
        """Drift references by category; empty before `fit`, and for files of versions without them."""
        return {name: known.reference for name, known in self.categories_.items() if known.reference is not None}

    def network_of(self, category: str | None = None) -> Method:
        """Returns the network of a category; weights are shared, memories and normalization are its own.

        Args:
            category: Name; may be None for a single category.

        Raises:
            DetectorError: Not fitted, or the category is missing or unknown.
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
        append: bool = False,
        progress: Progress = silent,
        **settings: Any,
    ) -> Calibration:
        """Recalibrates thresholds and p-values on new images, without training.

        The network and its normalization are unchanged. `record_["calibrations"]` gets an entry with time, number of
        images, result and outliers among the good images.

        Args:
            good: Good images that it was not trained on, as in `inspect_many`. Of identical images one counts.
            defects, miss_rate, cost_ratio: See `thresholds.calibrate`.
            rate: Requested false-alarm rate; None: that of the configuration.
            category: Name, for a detector with several categories.
            append: Also use the scores of the previous calibration. Right if both kinds of images will come.
            **settings: `review_rate`, `review_uncertain`, `minimum_area` and `extrapolate_tail` in place of those of
                the configuration.

        Returns:
            The new calibration, which the detector uses from now on.

        Raises:
            TrainingError: There is no readable good image, or one is a training image or, with `append`, counts
                already. DetectorError: See `select`. ValueError: See `thresholds.calibrate`.
        """
        return self._recalibrate(
            list(inputs(good, "good image")),
            list(inputs(defects, "defective image")),
            category=category,
            options=CalibrationOptions.model_validate(self.config.calibration.model_dump() | settings),
            rate=rate,
            miss_rate=miss_rate,
            cost_ratio=cost_ratio,
            append=append,
            progress=progress,
        )

    def commission(
        self,
        images: Iterable[ImageLike],
        *,
        share: float = 0.05,
        category: str | None = None,
        progress: Progress = silent,
    ) -> str:
        """Moves the calibration to a new session, such as another line or light, by its first images.

        They are presumed good; `calibration.commission` says what is assumed. The drift reference is theirs from now
        on. `record_["calibrations"]` gets an entry with "suspects", the paths of presumed defects.

        Args:
            images: At least 5, as in `inspect_many`; 30 to 100 are usual.
            share: Largest share of defects expected among them, in [0, 1); 0: they were all reviewed.
            category: Name, for a detector with several categories.
            progress: See `fit`.

        Returns:
            A sentence on the rate that follows.

        Raises:
            TrainingError: There are too few images, or one trained or calibrates the detector already. DetectorError:
                See `select`.
        """
        if not 0 <= share < 1:
            raise ValueError(f"a share of defects must lie between 0 and 1, such as 0.05, not {share:g}")
        before = self.select(category)
        after = self._recalibrate(
            list(inputs(images, "image")), [], category=category, suspected=share, progress=progress
        )
        done = self.record_["calibrations"][-1]
        return describe_commissioning(done["good"], before, after, len(done["suspects"]))

    def teach(
        self, good: Iterable[ImageLike], *, category: str | None = None, progress: Progress = silent
    ) -> tuple[int, list[tuple[str, str]]]:
        """Adds reviewed good images to the memory, without training.

        Scores can only fall, so the thresholds and the promised rate stay; these images do not calibrate. `record_`
        gets an entry in "taught", and their digests join "seen", so that they cannot calibrate later, either.

        Args:
            good: Good images, such as those that were called defective; as in `inspect_many`.
            category: Name, for a detector with several categories.
            progress: See `fit`.

        Returns:
            Number of prototypes added, and path and reason of each image that could not be read.

        Raises:
            TrainingError: The method has no memory, no image can be read, all are known, or the memory is full.
        """
        name = self.category(category)
        network = self.categories_[name].network
        done = teach(network, self.config, list(inputs(good, "good image")), self.record_, name, progress)
        if name == "":
            self.network = network
        self.record_ = done.record
        return done.prototypes, done.skipped

    def set_threshold(self, threshold: float, *, category: str | None = None) -> Calibration:
        """Sets the threshold to a score that a person has chosen; see `Calibration.at`.

        `record_["calibrations"]` gets an entry. Returns the new calibration.

        Raises:
            DetectorError: See `select`. ValueError: Not finite.
        """
        name = self.category(category)
        own = self.categories_[name]
        after = own.calibration.at(threshold)
        self.categories_[name] = own._replace(calibration=after)
        entry = {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **({"category": name} if name else {}),
            "by_hand": True,
            "kept": len(after.scores),
            "threshold": threshold,
            "described": after.describe(),
            "numbers": after.numbers(),
        }
        self.record_ = {**self.record_, "calibrations": [*self.record_.get("calibrations", []), entry]}
        return after

    def _recalibrate(
        self,
        good: list[Input],
        defects: list[Input],
        *,
        category: str | None,
        options: CalibrationOptions | None = None,
        append: bool = False,
        suspected: float | None = None,
        progress: Progress,
        **rates: float | None,
    ) -> Calibration:
        """`recalibrate` of one category, whose calibration, drift reference and record are replaced."""
        name = self.category(category)
        own = self.categories_[name]
        made = recalibrate(
            lambda images: self.inspect_named(((str(image), image) for image in images), category=name),
            own.calibration,
            own.reference,
            self.record_,
            good,
            defects,
            category=name,
            options=options or self.config.calibration,
            rate=rates.get("rate"),
            miss_rate=rates.get("miss_rate"),
            cost_ratio=rates.get("cost_ratio"),
            append=append,
            progress=progress,
            suspected=suspected,
        )
        self.categories_[name] = own._replace(calibration=made.calibration, reference=made.reference)
        self.record_ = made.record
        return made.calibration

    def save(self, path: str | Path, *, keep: bool = False) -> None:
        """Writes the detector with its backbone to a `.safetensors` file, atomically.

        Args:
            path: File to write.
            keep: Keep the file that it replaces as an earlier version, for `versions.undo`, unless it is this detector.

        Raises:
            DetectorError: Not fitted, or `path` is neither a `.safetensors` file nor the one that it was loaded from.
            WriteError: The file cannot be written.
        """
        if Path(path) != self._source:
            check_name(Path(path))
        self.select(next(iter(self.categories_), None))  # raises if there is none
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.display is not None:
            tensors |= {f"display.{name}": tensor for name, tensor in self.display.state_dict().items()}
        for i, (name, category) in enumerate(self.categories_.items()):
            tensors |= {f"{_place(name, i)}.{buffer}": t for buffer, t in category.network.category_state().items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"unflaw": json.dumps(self.metadata())}
        write = partial(save_file, tensors, metadata=metadata)
        keep = keep and not _is_same(Path(path), metadata["unflaw"])
        write_atomically(Path(path), write, keep_version if keep else lambda replaced: None)

    def metadata(self) -> dict[str, Any]:
        """Metadata of the detector file: format, configuration, calibrations, drift references and record."""
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
        """Loads a saved detector, without network access and without running code from the file.

        Raises:
            DetectorError: The file is missing, damaged, not a detector, or of a newer format.
        """
        metadata = read_metadata(path)
        if "exported" in metadata:
            raise DetectorError(f"{path}: is an exported detector, which only inspects; name its .safetensors file")
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
            for name, buffer in detector.network.named_buffers():
                if name in parts["network"] and fits(name, parts["network"][name].shape, buffer.shape):
                    owner, _, last = name.rpartition(".")  # what was taught has added rows
                    setattr(detector.network.get_submodule(owner), last, parts["network"][name])
            detector.network.load_state_dict(parts["network"], assign=True)
            if parts["display"]:
                with seeded(0):
                    detector.display = DisplayDecoder(detector.network.features.channels).eval()
                detector.display.load_state_dict(parts["display"])
            for i, (name, calibration) in enumerate(known.items()):
                normal = {
                    buffer: tensors[f"{_place(name, i)}.{buffer}"] for buffer in detector.network.category_buffers
                }
                network = detector.network.with_category(normal)  # raises if a shape is wrong
                detector.categories_[name] = Category(calibration, network, drift.get(name))
        except (RuntimeError, KeyError) as error:
            raise DetectorError(f"{path}: its tensors do not fit its configuration ({error})") from error
        detector.record_ = metadata.get("record", {})
        detector._source = Path(path)
        detector.weights = detector.record_.get("weights", "unknown")  # those that another `fit` uses
        return detector

    @torch.inference_mode()
    def compute(self, images: Sequence[ModelInput], category: str) -> Outputs:
        """Computes the outputs of the network for windows of images of a category; see `BasePredictor.compute`."""
        network = self.network_of(category)
        inside = cells([image.window for image in images], network.features.shape)
        found = Graph(network, self.display)(stack(images), inside)
        return Outputs.of({name: values.numpy() for name, values in found.items()})


def _check_shapes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises: ValueError: The tensors of the configuration differ. Allocates no memory for them."""
    with torch.device("meta"):
        wanted = {f"network.{name}": tuple(t.shape) for name, t in create(config, Weights.LATER).state_dict().items()}
    for name, shape in wanted.items():
        if not fits(name, shapes.get(name, ()), shape):
            raise ValueError(f"its tensors do not fit its configuration: {name} is {shapes.get(name)}, not {shape}")


def _is_same(path: Path, metadata: str) -> bool:
    """True if a file has the same metadata but for times, as after the same command again."""

    def undated(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: undated(inner) for name, inner in value.items() if name != "when"}
        return [undated(inner) for inner in value] if isinstance(value, list) else value

    try:
        return bool(undated(read_metadata(path)) == undated(json.loads(metadata)))
    except DetectorError:
        return False


def _place(category: str, number: int) -> str:
    """Prefix of a category's buffers in a file; those of a category without a name are in the network."""
    return f"categories.{number}" if category else "network"
