"""The whole configuration of a detector: plain, validated, saved with it as JSON. Importing it does not import torch.

Defaults are the CPU profile; `make_config("uranet", "paper")` gives the paper-scale settings.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from unflaw.imaging.tiling import Preparation


class Settings(BaseModel):
    """Immutable settings which refuse unknown names, so that a typing slip is not silently a default.

    Numbers have limits far above use: a configuration may come from a stranger's file, and must not ask for a terabyte.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Features(Settings):
    """Frozen backbone and aggregation."""

    backbone: str = Field("tf_efficientnet_lite0", description="any timm model that supports features_only")
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


class Synthesis(Settings):
    """FASM: how artificial anomalies are made at feature level. A share of 0 switches a source off."""

    clean: float = Field(0.3, ge=0, le=1, description="share of samples left without anomaly")
    max_scale: int = Field(5, ge=0, le=7, description="Perlin frequency is 2^0 .. 2^max_scale per axis")
    threshold: float = Field(0.5, description="Perlin noise above this is anomalous")
    textures: float = Field(1.0, ge=0, description="weight of features of texture images")
    others: float = Field(1.0, ge=0, description="weight of features of other good images, at other places")
    shuffles: float = Field(1.0, ge=0, description="weight of the image's own features, shuffled among places")
    jitter: float = Field(1.0, ge=0, description="weight of Gaussian noise scaled by the feature norm")
    strength: tuple[float, float] = Field((0.2, 1.0), description="range of the opacity β")


class Perception(Settings):
    """UIAPM: the Bayesian network that marks anomalous regions and ambiguous boundaries."""

    width: int = Field(32, ge=1, le=8192)
    depth: int = Field(2, ge=1, le=64, description="hidden Bayesian convolutions of 3×3")
    draws: int = Field(8, ge=1, le=1024, description="weight samples S at inspection")
    prior: float = Field(0.1, gt=0, description="standard deviation of the Gaussian prior over weights")
    kl_weight: float = Field(1.0, ge=0, description="weight of KL / N")
    bayesian: bool = Field(True, description="False: plain convolutions, no uncertainty map, M_final = M_U")
    input: Literal["distance", "features"] = Field(
        "distance", description="what it sees: distances of F to the memory, where there is one, or F itself"
    )
    in_score: bool = Field(True, description="U takes part in the image score")
    mean_threshold: float = Field(0.5, ge=0, le=1, description="τ_U: M_U = [U ≥ τ_U]")
    deviation_threshold: float = Field(0.2, ge=0, description="τ_V: M_final = M_U ∨ [V ≥ τ_V]")


class Restoration(Settings):
    """RAM: restoration attention."""

    patch: int = Field(2, ge=1, le=256, description="side of a token in feature cells")
    width: int = Field(192, ge=4, le=8192, multiple_of=4)
    depth: int = Field(3, ge=0, le=64)
    heads: int = Field(3, ge=1, le=1024)
    masked: bool = Field(True, description="keys only where M_final marks nothing; False: plain self-attention")
    prototypes: int = Field(
        4096, ge=0, le=10_000_000, description="memory of normal tokens across images; 0: the image alone"
    )
    coarse_prototypes: int = Field(
        16384, ge=0, le=10_000_000, description="memory of whole regions, for image score and map; 0: none"
    )
    sharpness: float = Field(2.0, gt=0, description="softmax(−sharpness·d²/radius²) over the nearest prototypes")

    @model_validator(mode="after")
    def _heads_fit(self) -> Restoration:
        if self.width % self.heads:
            raise ValueError(f"the width of {self.width} cannot be cut into {self.heads} heads; choose a divisor")
        return self


class URANetOptions(Settings):
    """URA-Net (arXiv 2603.22840)."""

    method: Literal["uranet"] = "uranet"
    synthesis: Synthesis = Synthesis()
    perception: Perception = Perception()
    restoration: Restoration = Restoration()


class NearestNeighborOptions(Settings):
    """Distance to the nearest normal prototype; nothing is trained."""

    method: Literal["nearest_neighbor"] = "nearest_neighbor"
    prototypes: int = Field(4096, ge=1, le=10_000_000)
    coarse_prototypes: int = Field(
        16384, ge=0, le=10_000_000, description="memory of whole regions, for image score and map; 0: none"
    )


class MFRNetOptions(Settings):
    """MFRNet (arXiv 2404.13273). k and n are those of the paper's figure 3; its other hyper-parameters are not public
    to us: their numbers are ours."""

    method: Literal["mfrnet"] = "mfrnet"
    k: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        (2,),
        min_length=1,
        max_length=16,
        description="side of a mask cell, in feature cells; the maps of several are averaged",
    )
    n: int = Field(3, ge=2, le=64, description="crossed masks: disjoint, and together they hide everything once")
    masked: bool = Field(True, description="False: nothing is hidden, a plain autoencoder")
    patch: int = Field(2, ge=1, le=256, description="side of a token in feature cells, at the finest scale")
    widths: tuple[Annotated[int, Field(ge=4, le=8192, multiple_of=4)], ...] = Field(
        (96, 192), min_length=1, max_length=8, description="of the tokens per scale; each scale halves the side"
    )
    depth: int = Field(2, ge=1, le=64, description="hybrid blocks per scale of the encoder, and of the decoder")
    heads: int = Field(4, ge=1, le=1024)
    attention: bool = Field(True, description="self-attention in the hybrid blocks")
    convolution: bool = Field(True, description="convolution in the hybrid blocks")
    pixel: float = Field(1.0, ge=0, description="weight of L2 in the hybrid loss, for training and map")
    ssim: float = Field(1.0, ge=0, description="weight of 1 − SSIM, likewise")
    gms: float = Field(1.0, ge=0, description="weight of 1 − gradient magnitude similarity, likewise")
    prototypes: int = Field(
        4096, ge=0, le=10_000_000, description="memory of normal tokens that fills what is hidden; 0: none"
    )
    coarse_prototypes: int = Field(
        16384, ge=0, le=10_000_000, description="memory of whole regions, for image score and map; 0: none"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> MFRNetOptions:
        for width in self.widths:
            if width % self.heads:
                raise ValueError(f"a width of {width} cannot be cut into {self.heads} heads; choose a divisor")
        if not (self.attention or self.convolution):
            raise ValueError("a hybrid block needs attention, convolution or both")
        if not (self.pixel or self.ssim or self.gms):
            raise ValueError("the hybrid loss needs a weight above 0: pixel, ssim or gms")
        return self


class PixelSynthesis(Synthesis):
    """DRAEM's artificial anomalies: textures only, half of the images clean, β from 0.1 on (sections 3.3 and 4)."""

    clean: float = Field(0.5, ge=0, le=1, description="share of samples left without anomaly")
    others: float = Field(0.0, ge=0, description="weight of other good images, at other places")
    shuffles: float = Field(0.0, ge=0, description="weight of the image's own pixels, shuffled among places")
    jitter: float = Field(0.0, ge=0, description="weight of Gaussian noise scaled by the norm of pixels")
    strength: tuple[float, float] = Field((0.1, 1.0), description="range of the opacity β")


class DRAEMOptions(Settings):
    """DRAEM (arXiv 2108.07610), on pixels."""

    method: Literal["draem"] = "draem"
    side: int | None = Field(
        128, ge=32, le=4096, description="pixels it works at, at most preparation.size; None: all of them"
    )
    reconstructive: int = Field(
        16, ge=1, le=4096, description="channels at full resolution of the reconstructive network"
    )
    discriminative: int = Field(
        16, ge=1, le=4096, description="channels at full resolution of the discriminative network"
    )
    synthesis: PixelSynthesis = PixelSynthesis()


class MemAEOptions(Settings):
    """MemAE (arXiv 1904.02639), on pixels."""

    method: Literal["memae"] = "memae"
    side: int | None = Field(
        128, ge=32, le=4096, description="pixels it works at, at most preparation.size; None: all of them"
    )
    widths: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        (16, 32, 32, 64),
        min_length=1,
        max_length=12,
        description="channels of the encoder's layers, each of which halves the side",
    )
    items: int = Field(100, ge=1, le=1_000_000, description="size of the memory")
    shrinkage: float = Field(1.0, ge=0, le=3, description="weights up to this multiple of 1 / items become 0")
    entropy: float = Field(0.0002, ge=0, description="weight of the entropy of addressing weights in the loss")


class Training(Settings):
    """The loop, and the cache it runs on."""

    steps: int = Field(300, ge=0, description="optimiser steps")
    batch: int = Field(16, ge=1, description="images per step")
    accumulate: int = Field(1, ge=1, description="passes that a process makes its share of a batch in; saves memory")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the one-cycle schedule")
    weight_decay: float = Field(0.01, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products in training; auto: bfloat16 where the processor multiplies it itself"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="same seed, same machine: same detector, bit for bit")
    cache_gb: float = Field(4.0, gt=0, description="cached features above this are memory-mapped on disk")
    textures: str | None = Field(None, description="folder of texture images; None: those that come with scikit-image")
    display_steps: int = Field(150, ge=0, description="steps for the decoder that draws restored images; 0: none")
    checkpoint_seconds: float = Field(30.0, ge=0, description="time between checkpoints for --resume")


class Scoring(Settings):
    """From residual to map to image score."""

    smooth: float = Field(
        4.0, ge=0, le=256, description="deviation of the Gaussian over the map, pixels at a side of 256"
    )
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01,),
        min_length=1,
        max_length=64,
        description="the image score looks at these highest shares of the witnesses",
    )
    coarse_share: float = Field(0.4, gt=0, le=1, description="and at this highest share of the coarse evidence")
    regional_weight: float = Field(1.0, ge=0, description="weight of the coarse evidence in the image score")
    coarse_weight: float = Field(0.4, ge=0, description="weight of the coarse evidence in the map")


class CalibrationOptions(Settings):
    """Good images kept out of training, and the promise made from them."""

    holdout: float = Field(0.2, gt=0, lt=1, description="share of the good images kept out of training")
    folds: int = Field(0, ge=0, description="2 or more: cross-fitting on all images instead; 0: none")
    false_alarm_rate: float = Field(0.01, gt=0, lt=1)
    review_rate: float = Field(0.05, ge=0, lt=1, description="rate of good images not called good; 0: no review")
    review_uncertain: bool = Field(False, description="review also where the uncertainty map dominates a defect")
    minimum_area: float = Field(0.0, ge=0, lt=1, description="smaller areas are no regions; share of the image")
    tail: bool = Field(False, description="estimate thresholds of rates that the images cannot certify")
    update_memory: bool = Field(
        True,
        description="the memory learns them too, and each is judged without what it taught; False: a certified rate",
    )

    @field_validator("folds")
    @classmethod
    def _several(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold leaves nothing to learn from; give 2 or more, or 0 for a hold-out")
        return folds


Network = Annotated[
    URANetOptions | NearestNeighborOptions | MFRNetOptions | DRAEMOptions | MemAEOptions, Field(discriminator="method")
]
_OPTIONS: dict[str, type[Settings]] = {
    "uranet": URANetOptions,
    "nearest_neighbor": NearestNeighborOptions,
    "mfrnet": MFRNetOptions,
    "draem": DRAEMOptions,
    "memae": MemAEOptions,
}
METHODS = tuple(_OPTIONS)


class Config(Settings):
    """Everything that makes a detector, but for data and weights."""

    network: Network = URANetOptions()
    preparation: Preparation = Preparation()
    features: Features = Features()
    training: Training = Training()
    scoring: Scoring = Scoring()
    calibration: CalibrationOptions = CalibrationOptions()

    @property
    def method(self) -> str:
        return self.network.method


class Weights(enum.Enum):
    """Backbone weights that are in no file of their own."""

    RANDOM = "random"  # for tests and comparisons
    LATER = "later"  # whatever timm begins with: they come with the file of a detector, or with another backbone

    @classmethod
    def parse(cls, text: str | Path | None) -> WeightSource:
        """Reads what the command line and grids call weights: `random` is RANDOM, `./random` a file of that name."""
        return cls.RANDOM if text == cls.RANDOM.value else text

    @staticmethod
    def name_of(source: WeightSource, short: bool = False) -> str:
        """Returns what records call a source: "default", "random", "later" or its path; if `short`, its file name."""
        if source is None or isinstance(source, Weights):
            return "default" if source is None else source.value
        name = Path(source).name if short else str(source)
        return f"./{name}" if name in ("default", *(known.value for known in Weights)) else name


# Of a backbone: a file (.safetensors or .pth), or None: those of an installed package, else of the hub that timm uses.
WeightSource = str | Path | Weights | None

# What the paper-scale profile changes: WideResNet-50 on a 64×64 grid, eight 768-wide blocks.
PAPER: dict[str, Any] = {
    "features.backbone": "wide_resnet50_2",
    "features.grid": 64,
    "features.components": 512,
    "training.steps": 20_000,
    "training.batch": 16,
    "training.learning_rate": 1e-4,
    "network.restoration.width": 768,
    "network.restoration.depth": 8,
    "network.restoration.heads": 12,
    "network.restoration.patch": 4,
    "network.restoration.prototypes": 0,
    "network.restoration.coarse_prototypes": 0,
    "network.perception.width": 256,
    "network.perception.draws": 16,
}
PROFILES: dict[str, dict[str, Any]] = {"cpu": {}, "paper": PAPER}
# What single methods have in a profile in place of that. In `paper`, widths and learning rates of DRAEM and MemAE are
# published ones (MemAE's widths and items those for CIFAR-10); steps, and all of MFRNet beside its backbone, are ours.
OWN: dict[tuple[str, str], dict[str, Any]] = {
    ("uranet", "cpu"): {"training.batch": 8},
    ("mfrnet", "cpu"): {"training.steps": 150, "training.batch": 4, "training.learning_rate": 2e-3},
    ("mfrnet", "paper"): {
        "features.backbone": "vgg16.tv_in1k",
        "features.levels": (2, 3, 4),
        "network.prototypes": 0,
        "network.coarse_prototypes": 0,
        "network.widths": (512, 768),
        "network.depth": 4,
        "network.heads": 8,
    },
    ("draem", "cpu"): {"training.steps": 600, "training.batch": 4},
    ("draem", "paper"): {
        "training.batch": 8,
        "network.side": None,
        "network.reconstructive": 128,
        "network.discriminative": 64,
    },
    ("memae", "cpu"): {"training.steps": 1000},
    ("memae", "paper"): {"network.side": None, "network.widths": (64, 128, 128, 256), "network.items": 500},
}


def make_config(method: str = "uranet", profile: str = "cpu", changes: dict[str, Any] | None = None) -> Config:
    """A configuration from a method, a profile and dotted changes such as `{"training.steps": 100}`.

    Raises:
        ValueError: Unknown method, profile or setting, or a value out of range; the message names it.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
    profiled = {name: value for name, value in PROFILES[profile].items() if applies(name, method)}
    profiled |= OWN.get((method, profile), {})
    tree: dict[str, Any] = {"network": {"method": method}}
    for name, value in {**profiled, **(changes or {})}.items():
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
        where = ".".join(str(part) for part in first["loc"] if part != method)
        if first["type"] == "extra_forbidden":
            name = next((name for name in changes or {} if f"{name}.".startswith(f"{where}.")), where)
            value = (changes or {}).get(name, first["input"])
            raise ValueError(
                f"setting {name}: {method} has no such setting; {_nearest(name, method)} (given: {value!r})"
            ) from error
        raise ValueError(f"setting {where}: {first['msg']} (given: {first['input']!r})") from error


def _nearest(name: str, method: str) -> str:
    """For a message: the settings of a method that are most like an unknown one, else those of the group it names."""
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
    """The dotted names of all settings that a method has."""
    for name, field in settings.model_fields.items():
        inner = _OPTIONS[method] if settings is Config and name == "network" else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _names(inner, method, f"{start}{name}.")
        elif name != "method":
            yield start + name


def applies(name: str, method: str) -> bool:
    """Whether a method has this setting: profiles name settings of all methods."""
    room, _, rest = name.partition(".")
    return room != "network" or rest.partition(".")[0] in _OPTIONS[method].model_fields
