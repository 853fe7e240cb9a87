"""The contract between methods and everything around them (training, scoring, calibration, files, reports)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from unflaw.config import Config, MethodOptions, WeightSource
from unflaw.features.extractor import Extractor, FeatureExtractor, PixelExtractor
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import coarser, gaussian_blur
from unflaw.methods.memory_bank import MemoryBank, RegionalMemoryBank
from unflaw.methods.statistics import square_parts, top_fraction_mean, variance_between
from unflaw.methods.visualization import Stage, Stages

Batch = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

DIFFERENT_IMAGES = 0.4  # share of the variance of the regional map between images that leaves the patch score no weight

# Paper-scale settings that all methods share: WideResNet-50 on a 64×64 grid. Steps and learning rate are ours.
PAPER: dict[str, Any] = {
    "features.backbone": "wide_resnet50_2",
    "features.grid": 64,
    "features.components": 512,
    "training.steps": 20_000,
    "training.batch": 16,
    "training.learning_rate": 1e-4,
}
# A vision transformer: patches of 14 pixels give the same 32 × 32 cells. Blocks and size are ours, and not measured.
DINO: dict[str, Any] = {
    "features.backbone": "vit_small_patch14_reg4_dinov2.lvd142m",
    "features.levels": (3, 7, 11),
    "preparation.size": 448,
}
LEVEL_VARIANTS = (
    ("level-1: features.levels=[1]", "the finest level alone"),
    ("level-2: features.levels=[2]", "the middle level alone"),
    ("level-3: features.levels=[3]", "the coarsest level alone"),
)


@dataclass(frozen=True)
class Inspection:
    """Output of a method for a batch, on the feature grid.

    Attributes:
        anomaly_maps: (N, W, g, g), raw: one map or several, such as the residual of a restoration and the distance to a
            memory. `Method.fuse` makes them one.
        perceived: One more raw map (N, 1, g, g) for the image score alone; or None.
        regional: Further raw maps (N, R, h, h) on a coarser grid, which show better whether an image is anomalous than
            where; or None.
        restored: F̂ (N, C, g, g), or None where the method restores nothing.
        layers: Further maps (N, 1, g, g) in [0, 1], by name: "mean", "uncertainty", "mask".
    """

    anomaly_maps: Tensor
    perceived: Tensor | None = None
    regional: Tensor | None = None
    restored: Tensor | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)


TAUGHT = ("added", "added_spacing")  # buffers of memories that `Method.teach` lengthens


class Method(nn.Module, ABC):
    """A method on frozen features.

    A subclass has its options, profiles and named variants, implements `forward`, and what it needs of `fit_memory`,
    `loss`, `visualize` and `visualize_training`. One registration makes it known by name (`unflaw.registry`).

    Args:
        config: Of the detector; its `network` is an `options_class`.
        weights: Of the backbone, as for `FeatureExtractor`.
        n_maps: W, the number of anomaly maps.
        n_regional: Number of regional maps of the method's own, beside the distance to `regional_memory`.
        has_perceived: `Inspection.perceived` is given.
        prototypes: Size of `memory`; 0: there is none.
        regional_prototypes: Size of `regional_memory`; 0: there is none. With it `Inspection.regional` is given.

    Attributes:
        options_class: Its options; the default of their field `method` is the name of the method.
        profiles: By name, dotted settings that differ from the defaults.
        variants: Named variants for ablation: ("name: setting=value; …", "what it shows").
        on_pixels: It works on images themselves and has no backbone.
        scored_maps: The anomaly maps whose mean gives the patch score; by default all.
        window: Side in cells of the mean filter over the map before the image score; odd.
        uses_textures: `FeatureSet.textures` are used.
        weight_samples: Weight samples of a Bayesian network that inference averages; 1 for others.
        normalization_buffers: Buffers that `fit_normalization` writes.
    """

    options_class: ClassVar[type[MethodOptions]]
    profiles: ClassVar[dict[str, dict[str, Any]]] = {"cpu": {}, "paper": PAPER, "dino": DINO}
    variants: ClassVar[tuple[tuple[str, str], ...]] = ()
    on_pixels: ClassVar[bool] = False
    normalization_buffers: ClassVar[tuple[str, ...]] = ("normal", "normal_scores", "patch_weight")
    scored_maps: slice = slice(None)
    window = 3
    uses_textures = False
    weight_samples = 1

    def __init__(
        self,
        config: Config,
        weights: WeightSource = None,
        *,
        n_maps: int = 1,
        n_regional: int = 0,
        has_perceived: bool = False,
        prototypes: int = 0,
        regional_prototypes: int = 0,
    ) -> None:
        super().__init__()
        assert isinstance(config.network, self.options_class)
        self.config, self.options = config, config.network
        self.n_maps, self.has_perceived = n_maps, has_perceived
        self.n_regional = n_regional + (regional_prototypes > 0)
        self.has_regional = self.n_regional > 0
        self.features = self.make_extractor(weights)
        self.memory = MemoryBank(prototypes, self.features.channels) if prototypes else None
        self.regional_memory = RegionalMemoryBank(regional_prototypes, self.features) if regional_prototypes else None
        # mean and deviation on good training images: of each raw map, and of each statistic of the image score
        n_statistics = len(config.scoring.top_fractions) * (1 + has_perceived) + self.has_regional
        self.normal: Tensor
        self.normal_scores: Tensor
        self.patch_weight: Tensor
        self.register_buffer("normal", torch.tensor([0.0, 1.0]).repeat(n_maps + self.n_regional, 1))
        self.register_buffer("normal_scores", torch.tensor([0.0, 1.0]).repeat(n_statistics, 1))
        self.register_buffer("patch_weight", torch.tensor(0.5))

    def make_extractor(self, weights: WeightSource) -> Extractor:
        """Creates the part that turns images into F. A method on pixels overrides it."""
        return FeatureExtractor(self.config.features, weights, self.config.preparation.canvas)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] → F (N, C, g, g), without gradient."""
        return self.features(images)

    def fit_memory(self, data: FeatureSet, rng: Generator) -> Batch:
        """Fits what needs no gradient steps, the memories above all, to the features of all training images.

        Returns:
            Further tensors to cache, one row per row of `data`; `loss` gets them by name beside "features".
        """
        self.fit_memories(data, rng)
        return {}

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """Terms by name; "loss" is minimised.

        Args:
            batch: "features", F (B, C, g, g) float32, and rows of what `fit_memory` returned.
            rng: The only source of randomness.
        """
        raise TypeError(f"{type(self).__name__} has nothing to train")

    @abstractmethod
    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        """F (N, C, g, g) → raw maps on the feature grid. Deterministic, and changes nothing: threads may share it.

        Raises:
            RuntimeError: `context` has rows, but a memory does not know any more where its prototypes come from, as
                after loading.
        """

    def visualize(self, features: Tensor, inspection: Inspection) -> Stages:
        """Figures that show how the maps of one image, F (1, C, g, g), come about; by default the anomaly maps."""
        maps = inspection.anomaly_maps[0, :, None]
        return {"maps": [("", {f"Anomaly map {i}": Stage("map", values) for i, values in enumerate(maps, 1)})]}

    def visualize_training(self, images: Tensor, textures: Tensor | None, rng: Generator) -> Stages:
        """Figures of the training samples, where these are more than good images.

        Args:
            images: Good ones, (N, 3, H, W) in [0, 1].
            textures: Texture images (K, 3, S, S); None where the method uses none.
            rng: The same generator state gives the same figures.
        """
        return {}

    def regional_distance(self, features: Tensor, context: Context) -> Tensor | None:
        """Distance to the regional memory, (N, 1, ⌈g/2⌉, ⌈g/2⌉); None where there is none."""
        return None if self.regional_memory is None else self.regional_memory(features, context)

    @torch.no_grad()
    def fit_normalization(self, features: Tensor, context: Context) -> None:
        """After training: fits the normal range of maps and scores to some training images of a category.

        It is the mean and deviation of each map and each statistic of the image score. With a regional memory, also the
        weight of the patch score: 1 − v / .4, at least 0, where v is the share of the variance of the regional map that
        lies between images and not within them. Where good images are alike, single cells can be relied on; where they
        differ as wholes, such as anatomies, regions judge. Our own; docs/research.md, section 29.

        Writes `normalization_buffers`, and no others.

        Args:
            features: F (N, C, g, g, float16).
            context: With `training_rows`.
        """
        valid, inspection = context.valid, self._inspected(features, context)
        cells = [maps if valid is None else maps[valid] for maps in inspection.anomaly_maps.unbind(1)]
        if inspection.regional is not None:
            inside = None if valid is None else coarser(valid)
            cells += [maps if inside is None else maps[inside] for maps in inspection.regional.unbind(1)]
        self.normal.copy_(torch.stack([torch.stack([c.mean(), c.std().clamp_min(1e-6)]) for c in cells]))
        statistics = self._statistics(inspection, valid)
        deviation = statistics.std(0, correction=0).clamp_min(1e-3)
        self.normal_scores.copy_(torch.stack([statistics.mean(0), deviation], dim=-1))
        if (regional := self._standardised(inspection)[1]) is not None:
            inside = torch.ones_like(regional, dtype=torch.bool) if valid is None else coarser(valid)
            images = self._images(context, len(regional))
            parts = zip(square_parts(regional), square_parts(inside), strict=True)
            shares = [variance_between(part, counts, images) for part, counts in parts]
            self.patch_weight.copy_((1 - torch.stack(shares).mean() / DIFFERENT_IMAGES).clamp(0, 1))

    def _images(self, context: Context, n: int) -> Tensor:
        """(N,) the image that each of N training rows shows: several are windows of the same."""
        if self.regional_memory is None or context.training_rows is None:
            return torch.arange(n)
        return self.regional_memory.memory.images[context.training_rows]

    def _inspected(self, features: Tensor, context: Context) -> Inspection:
        """Output for many images, a few at a time; without `restored`."""
        parts = torch.arange(len(features)).split(8)
        found = [self(features[rows].float(), context[rows]) for rows in parts]
        anomaly_maps = torch.cat([inspection.anomaly_maps for inspection in found])
        expected = (len(features), self.n_maps, *features.shape[2:])
        if anomaly_maps.shape != expected or not anomaly_maps.isfinite().all():
            values = "" if anomaly_maps.isfinite().all() else ", not all of them finite"
            raise ValueError(
                f"{type(self).__name__}.forward gave anomaly maps of the shape {tuple(anomaly_maps.shape)}{values}; "
                f"expected are finite ones of {expected}, (N, n_maps, g, g)"
            )
        layers = {name: torch.cat([inspection.layers[name] for inspection in found]) for name in found[0].layers}
        return Inspection(anomaly_maps, _joined(found, "perceived"), _joined(found, "regional"), layers=layers)

    def _memory_banks(self) -> dict[str, MemoryBank]:
        return {name: part for name, part in self.named_modules() if isinstance(part, MemoryBank)}

    def select_category(self, category: int) -> None:
        """After training, before `fit_normalization`: memories take the prototypes of this category, from 0."""
        for bank in self._memory_banks().values():
            bank.select_category(category)

    @property
    def category_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that each category has for itself: the normal range, and memories."""
        own = ("prototypes", "added", "radius", "spacing", "added_spacing")
        return *self.normalization_buffers, *(f"{name}.{buffer}" for name in self._memory_banks() for buffer in own)

    def category_state(self) -> dict[str, Tensor]:
        """Returns copies of `category_buffers`."""
        state = self.state_dict()
        return {name: state[name].clone() for name in self.category_buffers}

    def with_category(self, state: Mapping[str, Tensor]) -> Method:
        """Returns this method for the inspection of one category.

        All weights are shared with this one; `category_buffers` are its own, so that several categories can be
        inspected at the same time. It has nothing that only training needs.

        Args:
            state: From `category_state`.

        Raises:
            RuntimeError: A buffer is missing or has another shape.
        """
        view = _sharing(self)
        for name in self.category_buffers:
            owner, _, buffer = name.rpartition(".")
            part, tensor = view.get_submodule(owner), state.get(name)
            if tensor is None or not fits(buffer, tensor.shape, getattr(part, buffer).shape):
                found = "missing" if tensor is None else tuple(tensor.shape)
                raise RuntimeError(f"{name} is {found}, not {tuple(getattr(part, buffer).shape)}")
            setattr(part, buffer, tensor)
        for bank in view._memory_banks().values():
            bank.end_training()
        return view.eval()

    def fit_memories(self, data: FeatureSet, rng: Generator) -> None:
        """Fits the memories, and nothing else, to the features of images."""
        for memory in (self.memory, self.regional_memory):
            if memory is not None:
                memory.fit(data, rng)

    def teach(self, data: FeatureSet, rng: Generator) -> int:
        """Adds images that a person calls good to the memories; see `MemoryBank.teach`.

        Returns:
            Number of prototypes added to all memories; 0 also where there is none.

        Raises:
            ValueError: A memory is full.
        """
        return sum(memory.teach(data, rng) for memory in (self.memory, self.regional_memory) if memory is not None)

    def add_prototypes(self, data: FeatureSet, rng: Generator) -> bool:
        """After `fit_normalization`: adds prototypes out of the images that calibrate the selected category.

        They can lower the score of an image and never raise it. From then on `Context.added_rows` excludes prototypes
        from some of these images, so that they still calibrate (`calibration.crossfit`).

        Returns:
            True where there is a memory.
        """
        memories = [memory for memory in (self.memory, self.regional_memory) if memory is not None]
        for memory in memories:
            memory.add_prototypes(data, rng)
        return bool(memories)

    def fuse(self, inspection: Inspection, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw maps → anomaly maps at canvas size, (N, H, W), and image scores (N,).

        The map is the mean of the anomaly maps, each in deviations from its normal mean, plus `regional_map_weight` ·
        (1 − w) times the same of the regional maps; bilinear, then a Gaussian.

        The image score is a weighted mean of a patch score and, where there is a regional map, a regional score, both
        in deviations above normal, of weights w and `regional_weight` · (1 − w), where w is `patch_weight`. The patch
        score is the mean of the highest `top_fractions` of the mean of `scored_maps` or the same of `perceived`,
        whichever is larger. The regional score is the mean of the highest `regional_top_fraction` of the regional
        maps' mean. On a canvas that is no square, each statistic is that of the square part where it is highest.

        Args:
            inspection: Of N images.
            valid: (N, g, g) bool, the cells that cover the image; None: all.
        """
        scoring, (width, height) = self.config.scoring, self.config.preparation.canvas
        every, regional = self._standardised(inspection)
        maps = every.mean(1)
        if valid is not None:  # what does not count must not blur into what does
            maps = torch.where(valid, maps, 0.0)
            regional = None if regional is None else torch.where(coarser(valid), regional, 0.0)
        scores, regional_scores = self._image_scores(inspection, valid)
        if regional_scores is not None:
            regional_weight = scoring.regional_weight * (1 - self.patch_weight)
            both = self.patch_weight * scores + regional_weight * regional_scores
            scores = both / (self.patch_weight + regional_weight)
        canvas = F.interpolate(maps[:, None], (height, width), mode="bilinear", align_corners=False)
        if regional is not None and scoring.regional_map_weight:
            sides = zip((height, width), regional.shape[1:], maps.shape[1:], strict=True)
            shape = [round(side * 2 * half / whole) for side, half, whole in sides]  # above the canvas if a side is odd
            wide = F.interpolate(regional[:, None], shape, mode="bilinear", align_corners=False)
            weight = scoring.regional_map_weight * (1 - self.patch_weight)
            canvas = canvas + weight * wide[..., :height, :width]
        return gaussian_blur(canvas, scoring.smooth * min(width, height) / 256)[:, 0], scores

    def _image_scores(self, inspection: Inspection, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patch score and regional score of each image, (N,) each, in deviations above normal."""
        mean, deviation = self.normal_scores.unbind(-1)
        statistics = (self._statistics(inspection, valid) - mean) / deviation
        patch = statistics[:, : len(mean) - self.has_regional].unflatten(
            1, (-1, len(self.config.scoring.top_fractions))
        )
        return patch.mean(2).amax(1), statistics[:, -1] if self.has_regional else None

    def _standardised(self, inspection: Inspection) -> tuple[Tensor, Tensor | None]:
        """Anomaly maps (N, W, g, g), and regional maps as one (N, h, h), all in deviations from normal."""
        mean, deviation = self.normal[..., None, None].unbind(1)
        n = self.n_maps
        anomaly_maps = (inspection.anomaly_maps - mean[:n]) / deviation[:n]
        if inspection.regional is None:
            return anomaly_maps, None
        return anomaly_maps, ((inspection.regional - mean[n:]) / deviation[n:]).mean(1)

    def _statistics(self, inspection: Inspection, valid: Tensor | None = None) -> Tensor:
        """Statistics of the image score, (N, Q): top fractions of the map, of `perceived` and of the regional map."""
        scoring = self.config.scoring
        maps, regional = self._standardised(inspection)

        def highest(maps: Tensor, fractions: Sequence[float], valid: Tensor | None, window: int = 3) -> Tensor:
            parts = square_parts(maps)
            inside = [None] * len(parts) if valid is None else square_parts(valid)
            found = [top_fraction_mean(m, fractions, v, window) for m, v in zip(parts, inside, strict=True)]
            return torch.stack(found).amax(0)

        found = [highest(maps[:, self.scored_maps].mean(1), scoring.top_fractions, valid, self.window)]
        if inspection.perceived is not None:
            found.append(highest(inspection.perceived[:, 0], scoring.top_fractions, valid, self.window))
        if regional is not None:
            inside = None if valid is None else coarser(valid)
            found.append(highest(regional, (scoring.regional_top_fraction,), inside))
        return torch.cat(found, dim=1)


def _sharing(module: Module) -> Module:
    """A copy of a module tree that shares every tensor, and the extractor as it is."""
    made = copy.copy(module)
    made.__dict__ |= {"_buffers": module._buffers.copy(), "_modules": module._modules.copy()}
    for name, part in module.named_children():
        if not isinstance(part, FeatureExtractor | PixelExtractor):
            made._modules[name] = _sharing(part)
    return made


def fits(name: str, shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """True if a buffer of a category has the wanted shape; prototypes that were taught add rows."""
    if name.rpartition(".")[2] not in TAUGHT or len(shape) != len(wanted):
        return tuple(shape) == tuple(wanted)
    return tuple(shape[1:]) == tuple(wanted[1:]) and wanted[0] <= shape[0] <= 4 * wanted[0]


def _joined(found: Sequence[Inspection], name: str) -> Tensor | None:
    """One map of all images; None where there is none."""
    parts = [getattr(inspection, name) for inspection in found]
    return None if parts[0] is None else torch.cat(parts)
