"""The configuration of a detector, validated and saved with it as JSON. Importing it does not import torch.

Options of a method are defined with the method; see `unflaw.registry`. `make_config("uranet", "paper")` returns
settings of the paper's scale.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from unflaw import registry
from unflaw.imaging.tiling import Preparation

DEFAULT_METHOD = "uranet"


class Settings(BaseModel):
    """Immutable settings that refuse unknown names, so that a misspelt setting is an error.

    Numbers have limits far above use, since a configuration may come from an untrusted file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Features(Settings):
    """Frozen backbone and aggregation."""

    backbone: str = Field(
        "tf_efficientnet_lite0", description="any timm model that supports features_only, or two or more, as in a+b"
    )
    levels: tuple[Annotated[int, Field(ge=0, le=64)], ...] = Field(
        (1, 2, 3), min_length=1, max_length=64, description="timm feature indices; 1, 2, 3 have strides 4, 8, 16"
    )
    grid: int = Field(32, ge=4, le=256, description="side of the common grid that all levels are resized to")
    smooth: Literal[1, 3, 5, 7] = Field(3, description="side of the mean filter over each level; 1 switches it off")
    standardise: Literal["level", "channel", "none"] = Field(
        "level", description="one scale per level, per channel, or none"
    )
    level_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 1.0, 1.0),
        min_length=1,
        description="share of each level, fine to coarse, in the squared norm of F; if standardised",
    )
    components: int | None = Field(192, ge=1, description="principal components kept; None keeps all channels")

    @field_validator("levels")
    @classmethod
    def _ascending(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError(f"levels must ascend, each named once: {', '.join(map(str, sorted(set(levels))))}")
        return levels


class Training(Settings):
    """Training loop and feature cache."""

    steps: int = Field(300, ge=0, description="optimiser steps")
    batch: int = Field(16, ge=1, description="images per step")
    accumulate: int = Field(1, ge=1, description="forward passes per batch and process; more passes use less memory")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of matrix products in training; auto: bfloat16 if the hardware supports it"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="same seed, same machine: same detector, bit for bit")
    cache_gb: float = Field(4.0, gt=0, description="cached features above this are memory-mapped on disk")
    textures: str | None = Field(None, description="folder of texture images; None: those of scikit-image")
    display_steps: int = Field(150, ge=0, description="steps for the decoder that draws restored images; 0: none")
    checkpoint_seconds: float = Field(30.0, ge=0, description="time between checkpoints for --resume")


class Scoring(Settings):
    """Anomaly map and image score from residuals."""

    smooth: float = Field(
        4.0,
        ge=0,
        le=256,
        description="standard deviation of the Gaussian filter of the map, in pixels at a side of 256",
    )
    top_fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01,),
        min_length=1,
        max_length=64,
        description="fractions of highest anomaly-map cells whose mean is the patch score",
    )
    regional_top_fraction: float = Field(
        0.4, gt=0, le=1, description="fraction of highest cells whose mean is the regional score"
    )
    regional_weight: float = Field(
        1.0, ge=0, description="of the regional score in the image score, as a multiple of its usual weight"
    )
    regional_map_weight: float = Field(0.4, ge=0, description="weight of the regional map in the anomaly map")


class CalibrationOptions(Settings):
    """Calibration images, and the rates that they are calibrated for."""

    holdout: float = Field(0.2, gt=0, lt=1, description="share of the good images kept out of training")
    groups: str = Field(
        "auto",
        min_length=1,
        description="images that stay together: auto finds bursts and near-copies; none; or a pattern of their paths",
    )
    folds: int = Field(0, ge=0, description="number of folds for cross-fitting on all images, 2 or more; 0: a hold-out")
    drop_outliers: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of the good images, the strangest, left out as presumed defective",
    )
    fewest: int = Field(
        20, ge=0, description="with fewer groups held out, all images calibrate, out of five folds of memories"
    )
    false_alarm_rate: float = Field(0.01, gt=0, lt=1, description="requested share of good images called defective")
    review_rate: float = Field(0.05, ge=0, lt=1, description="share of good images not called good; 0: no review")
    reserve: float = Field(
        1.0, ge=0, le=100, description="multiple of the estimated reserve of the threshold for other sessions; 0: none"
    )
    review_uncertain: bool = Field(False, description="review defects that are dominated by uncertainty")
    minimum_area: float = Field(0.0, ge=0, lt=1, description="smallest area of a region, as a share of the image")
    extrapolate_tail: bool = Field(False, description="estimate thresholds for rates that the images cannot certify")
    update_memory: bool = Field(
        True,
        description="add the held-out images to the memory and score them leave-one-out; False: a certified rate",
    )

    @field_validator("folds")
    @classmethod
    def _several(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold leaves nothing to learn from; give 2 or more, or 0 for a hold-out")
        return folds


class MethodOptions(Settings):
    """Options of one method. A subclass gives `method` a default, the name of the method."""

    method: str


class OpaqueOptions(MethodOptions):
    """Options of the method of an exported detector, which are not validated."""

    model_config = ConfigDict(extra="allow")


def _method_options(value: Any, info: ValidationInfo) -> Any:
    """Validates options by the options class of their method."""
    if isinstance(value, MethodOptions):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
        raise ValueError("the options of a method have its name as `method`")
    if info.context and info.context.get("exported"):
        return OpaqueOptions.model_validate(value)
    name = registry.canonical(value["method"])
    return registry.method_class(name).options_class.model_validate({**value, "method": name})


def _default_options() -> MethodOptions:
    return registry.method_class(DEFAULT_METHOD).options_class.model_validate({})


class Config(Settings):
    """All settings of a detector, without data and weights."""

    network: Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_method_options)] = Field(
        default_factory=_default_options
    )
    preparation: Preparation = Preparation()
    features: Features = Features()
    training: Training = Training()
    scoring: Scoring = Scoring()
    calibration: CalibrationOptions = CalibrationOptions()

    @property
    def method(self) -> str:
        return self.network.method


class Weights(enum.Enum):
    """Backbone weights without a file."""

    RANDOM = "random"  # for tests and comparisons
    LATER = "later"  # untrained: weights come with a detector file, or with another backbone

    @classmethod
    def parse(cls, text: str | Path | None) -> OneWeightSource:
        """Parses weights of the command line and of grids: `random` is RANDOM, `./random` is a file."""
        return cls.RANDOM if text == cls.RANDOM.value else text

    @staticmethod
    def name_of(source: WeightSource, short: bool = False) -> str:
        """Returns the name of a source: "default", "random", "later" or its path; if `short`, its file name."""
        if source is None or isinstance(source, Weights):
            return "default" if source is None else source.value
        if isinstance(source, Mapping):
            return "+".join(f"{backbone}={Weights.name_of(own, short)}" for backbone, own in source.items())
        name = Path(source).name if short else str(source)
        return f"./{name}" if name in ("default", *(known.value for known in Weights)) else name


# Backbone weights: a file (.safetensors or .pth), or None: an installed package, else the hub of timm.
OneWeightSource = str | Path | Weights | None
# Those of several backbones by name; backbones that are not named have the default.
WeightSource = OneWeightSource | Mapping[str, OneWeightSource]


def make_config(method: str = "uranet", profile: str = "cpu", changes: dict[str, Any] | None = None) -> Config:
    """Makes a configuration from a method, a profile and dotted changes such as `{"training.steps": 100}`.

    Raises:
        ValueError: Unknown method, profile or setting, or a value out of range; the message names it.
    """
    method = registry.canonical(method)
    profiles = registry.method_class(method).profiles
    if profile not in profiles:
        raise ValueError(f"unknown profile {profile!r}; {method} has {', '.join(profiles)}")
    tree: dict[str, Any] = {"network": {"method": method}}
    for name, value in {**profiles[profile], **(changes or {})}.items():
        *parents, leaf = name.split(".")
        branch: Any = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise ValueError(f"setting {name}: {parent} is a value and has no settings of its own")
        branch[leaf] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            name = next((name for name in changes or {} if f"{name}.".startswith(f"{where}.")), where)
            value = (changes or {}).get(name, first["input"])
            raise ValueError(
                f"setting {name}: {method} has no such setting; {_nearest(name, method)} (given: {value!r})"
            ) from error
        raise ValueError(f"setting {where}: {first['msg']} (given: {first['input']!r})") from error


def _nearest(name: str, method: str) -> str:
    """Hint for an unknown setting: the most similar settings, else those of its group."""
    known = list(_names(Config, method))
    group, _, leaf = name.rpartition(".")
    for others in ([other for other in known if other.rpartition(".")[0] == group], known):
        leaves = {other.rpartition(".")[2] for other in others}
        near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
        if near:
            return f"did you mean {' or '.join(other for other in others if other.rpartition('.')[2] == near[0])}?"
    while group and not any(other.startswith(f"{group}.") for other in known):
        group = group.rpartition(".")[0]
    start = f"{group}." if group else ""
    there = dict.fromkeys(o.removeprefix(start).partition(".")[0] for o in known if o.startswith(start))
    return f"{group or 'a configuration'} has {', '.join(there)}"


def _names(settings: type[BaseModel], method: str, start: str = "") -> Iterator[str]:
    """Yields the dotted names of all settings of a method."""
    for name, field in settings.model_fields.items():
        inner: Any = field.annotation
        if settings is Config and name == "network":
            inner = registry.method_class(method).options_class
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _names(inner, method, f"{start}{name}.")
        elif name != "method":
            yield start + name


def applies(name: str, method: str) -> bool:
    """Returns True if a method has a setting, by its dotted name; False for `network` settings of other methods."""
    group, _, rest = name.partition(".")
    return group != "network" or rest.partition(".")[0] in registry.method_class(method).options_class.model_fields
