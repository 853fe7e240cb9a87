"""The contract between methods and everything around them (training, scoring, calibration, files, reports)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from unflaw.config import Config, Synthesis, WeightSource
from unflaw.features.extractor import Extractor, FeatureExtractor, PixelExtractor
from unflaw.methods.layers import coarser, gaussian_blur
from unflaw.methods.memory_bank import MemoryBank, RegionalMemoryBank
from unflaw.methods.synthesis import synthesise
from unflaw.methods.visualization import Stages
from unflaw.parallel.shares import WHOLE, Share

Batch = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

ALTERED = 2  # times that each of the first training images is altered, for the say of fine evidence
MUTE = 1e-3  # the least say of fine evidence: where there is no other, it still decides


@dataclass(frozen=True)
class Inspection:
    """Output of a method for a batch, on the feature grid.

    Attributes:
        witnesses: Anomaly maps (N, W, g, g), raw: W kinds of evidence, such as the residual of the restoration and the
            distance to the memory. `Method.fuse` makes them one map.
        perceived: One more map (N, 1, g, g) of evidence, raw, that judges the image and has no part in the map; or
            None.
        coarse: One more map (N, 1, h, h) of evidence, raw, on a coarser grid: says whether an image is anomalous
            better than where; or None.
        restored: F̂ (N, C, g, g), or None where the method restores nothing.
        layers: Further maps (N, 1, g, g) in [0, 1], by name: "mean", "uncertainty", "mask".
    """

    anomaly_maps: Tensor
    perceived: Tensor | None = None
    coarse: Tensor | None = None
    restored: Tensor | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A method on frozen features. Subclasses implement `forward`, and what they need of `setup` and `loss`."""

    kinds = 1  # W, kinds of evidence
    perceives = False  # whether `Inspection.perceived` is given
    judges = False  # whether `Inspection.coarse` is given
    window = 3  # side in cells of the mean filter over the map that judges an image; odd
    uses_textures = False  # whether `setup` wants texture images
    finishes: tuple[str, ...] = ("normal", "normal_scores", "patch_weight")  # buffers that `finish` writes

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        super().__init__()
        self.config = config
        self.features = self.extractor(config, weights)
        self.normal: Tensor
        self.normal_scores: Tensor
        # mean and deviation on good training images: of every kind of evidence, and of what judges an image
        statistics = len(config.scoring.shares) * (1 + self.perceives) + self.judges
        self.register_buffer("normal", torch.tensor([0.0, 1.0]).repeat(self.kinds + self.judges, 1))
        self.register_buffer("normal_scores", torch.tensor([0.0, 1.0]).repeat(statistics, 1))
        self.patch_weight: Tensor
        self.register_buffer("patch_weight", torch.tensor(1.0))

    def extractor(self, config: Config, weights: WeightSource) -> Extractor:
        """What makes F of images; a method on pixels has its own, which uses no weights."""
        return FeatureExtractor(config.features, weights, config.preparation.size)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] → F (N, C, g, g), without gradient."""
        return self.features(images)

    def setup(
        self, features: Tensor, textures: Tensor | None, rng: Generator, categories: Tensor | None = None
    ) -> Batch:
        """Learns what needs no gradient steps from all cached features (N, C, g, g, float16).

        Args:
            features: Of all training images.
            textures: F of texture images, for methods that use them.
            rng: What it draws.
            categories: (N,) int64, the category of each image, counted from 0; None: one.

        Returns:
            Further tensors to cache, one row per image; `loss` gets them by name beside "features".
        """
        return {}

    def arrange(self, images: Tensor, valid: Tensor | None) -> None:
        """Before `setup` and `extend`: tells the memories of the rows that they will be given.

        Args:
            images: (N,) int64, the number of the image that each row shows a window of.
            valid: (N, g, g) bool, the cells that count; None: all.
        """
        for part in self.modules():
            if isinstance(part, MemoryBank):
                part.arrange(images, valid)

    def loss(self, batch: Batch, rng: Generator, share: Share = WHOLE) -> dict[str, Tensor]:
        """Terms by name; "loss" is minimised.

        Args:
            batch: The whole batch; "features" is F (B, C, g, g) float32.
            rng: Draws the same whatever the share.
            share: The rows that terms are about, as means over them; `Share.total` is for terms that are no means.
        """
        raise TypeError(f"{type(self).__name__} has nothing to train")

    def forward(
        self,
        features: Tensor,
        images: Tensor | None = None,
        valid: Tensor | None = None,
        held_out: Tensor | None = None,
    ) -> Inspection:
        """F (N, C, g, g) → evidence on the feature grid. Deterministic, and changes nothing: threads may share it.

        Args:
            features: Of any images.
            images: (N,) or (N, L) rows of the cache that `setup` saw, where they are training images: what a memory
                keeps of them is left out, so that their evidence is that of new good images. The first is the image's
                own row; further ones are of images that its features were altered with.
            valid: (N, g, g) bool, the cells that count; None: all.
            held_out: (N,) rows of the features that `extend` saw: what a memory keeps of them is left out.

        Raises:
            RuntimeError: Rows are given to a method with a memory that no longer knows where its prototypes come from,
                as after loading.
        """
        raise NotImplementedError

    def stages(self, features: Tensor, inspection: Inspection) -> Stages:
        """For people: how the evidence on one image, F (1, C, g, g), comes about."""
        raise NotImplementedError

    def exercises(self, images: Tensor, textures: Tensor | None, rng: Generator) -> Stages:
        """For people: what training is done on, where it is more than good images.

        Args:
            images: Good ones, (N, 3, S, S) in [0, 1].
            textures: Texture images (K, 3, S, S); None where the method uses none.
            rng: The same generator state gives the same stages.
        """
        return {}

    @torch.no_grad()
    def finish(self, features: Tensor, valid: Tensor | None = None, images: Tensor | None = None) -> None:
        """After training: what evidence is like on the first training images of a category.

        Mean and deviation of each kind; and, of a method that judges, the say of fine evidence: how far artificial
        anomalies move it, in its normal deviations (of an image, 3 at most), at most 1. So where altered places
        drown in what varies anyway, whole regions judge. An altered image is compared with the same image unaltered,
        both without what itself and the image that it was altered with taught: else altered cells would be found in
        the memory that they come from. Our own; docs/research.md, section 17.

        Writes the buffers `finishes`, and no others.

        Args:
            features: F (N, C, g, g, float16).
            valid: (N, g, g) bool, as for `fuse`.
            images: (N,) rows of the cache that `setup` saw; None: the first N.
        """
        rows = torch.arange(len(features)) if images is None else images
        inspection = self._inspected(features, rows, valid)
        cells = [kind if valid is None else kind[valid] for kind in inspection.anomaly_maps.unbind(1)]
        if inspection.coarse is not None:
            coarse = inspection.coarse[:, 0]
            cells.append(coarse if valid is None else coarse[coarser(valid)])
        self.normal.copy_(torch.stack([torch.stack([c.mean(), c.std().clamp_min(1e-6)]) for c in cells]))
        statistics = self._statistics(inspection, valid)
        deviation = statistics.std(0, correction=0).clamp_min(1e-3)
        self.normal_scores.copy_(torch.stack([statistics.mean(0), deviation], dim=-1))
        if self.judges:
            self.patch_weight.copy_(self._moved(features, rows, valid, self._image_scores(inspection, valid)[0]))

    def _moved(self, features: Tensor, rows: Tensor, valid: Tensor | None, unaltered: Tensor) -> Tensor:
        """Mean shift of the patch score by synthetic anomalies, (); see `finish`. `unaltered`: scores before, (N,)."""
        rng, options, moved = Generator().manual_seed(0), Synthesis(clean=0), []

        def fine(features: Tensor, made_of: Tensor, inside: Tensor | None) -> Tensor:
            return self._image_scores(self._inspected(features, made_of, inside), inside)[0]

        for _ in range(ALTERED):
            made, before = synthesise(features.float(), None, options, rng), unaltered.clone()
            made_of = torch.stack([rows, rows[made.origin]], dim=1)
            mixed = (made.origin != torch.arange(len(rows))).nonzero()[:, 0]  # with another image
            if len(mixed):
                before[mixed] = fine(features[mixed], made_of[mixed], None if valid is None else valid[mixed])
            moved.append((fine(made.features, made_of, valid) - before).clamp(0, 3))
        return torch.cat(moved).mean().clamp(MUTE, 1)

    def _inspected(self, features: Tensor, rows: Tensor, valid: Tensor | None) -> Inspection:
        """Evidence on training images, as they are or altered; `rows` and `valid` as `forward` takes them."""
        cells = [None] * len(features.split(8)) if valid is None else valid.split(8)
        parts = zip(features.split(8), rows.split(8), cells, strict=True)
        found = [self(part.float(), i, inside) for part, i, inside in parts]
        anomaly_maps = torch.cat([inspection.anomaly_maps for inspection in found])
        layers = {name: torch.cat([inspection.layers[name] for inspection in found]) for name in found[0].layers}
        return Inspection(anomaly_maps, _joined(found, "perceived"), _joined(found, "coarse"), layers=layers)

    def select_category(self, category: int) -> None:
        """After training, before `finish`: memories take the prototypes of this category, counted from 0."""
        for part in self.modules():
            if isinstance(part, MemoryBank):
                part.select_category(category)

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the buffers that are one category's own: what `finish` writes, and memories."""
        memories = [name for name, part in self.named_modules() if isinstance(part, MemoryBank)]
        return *self.finishes, *(f"{name}.{own}" for name in memories for own in ("prototypes", "extra", "radius"))

    def finished_state(self) -> dict[str, Tensor]:
        """Copies of the buffers `finished`, which are one category's own."""
        state = self.state_dict()
        return {name: state[name].clone() for name in self.finished}

    def with_category(self, state: Mapping[str, Tensor]) -> Method:
        """Returns this method for the inspection of one category.

        All weights are shared with this one; the buffers `finished` are its own, so that several categories can be
        inspected at the same time. It has nothing that only training needs.

        Args:
            state: As `finished_state` gives it.

        Raises:
            RuntimeError: A buffer is missing or has another shape.
        """
        view = _sharing(self)
        for name in self.finished:
            owner, _, buffer = name.rpartition(".")
            part, tensor = view.get_submodule(owner), state.get(name)
            if tensor is None or tensor.shape != getattr(part, buffer).shape:
                found = "missing" if tensor is None else tuple(tensor.shape)
                raise RuntimeError(f"{name} is {found}, not {tuple(getattr(part, buffer).shape)}")
            setattr(part, buffer, tensor)
        for part in view.modules():
            if isinstance(part, MemoryBank):
                part.end_training()
        return view.eval()

    def extend(self, features: Tensor, rng: Generator) -> bool:
        """After `finish`: learns from the images that calibrate the category in use, F (N, C, g, g, float16).

        Only what can lower the evidence of an image and never raise it. From then on `forward` takes rows of these
        images, and leaves out for each what it has taught here, so that they still calibrate (see `crossfit`).

        Returns:
            Whether anything was learned: whether there is a memory.
        """
        parts = [part for part in self.children() if isinstance(part, MemoryBank | RegionalMemoryBank)]
        for part in parts:
            part.extend(features, rng)
        return bool(parts)

    def fuse(self, inspection: Inspection, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Evidence → anomaly maps at canvas size, (N, S, S), and image scores (N,).

        The map is the mean of the witnesses, each in deviations from its normal mean, plus `coarse_weight` times the
        coarse evidence in its deviations; bilinear, then a Gaussian.

        The score is made of statistics, each in deviations above its normal value: the mean of the highest `shares` of
        the anomaly maps or the same of what is perceived, whichever is larger, with the weight `patch_weight`; and,
        with the weight `regional_weight`, the mean of the highest `coarse_share` of the coarse evidence.

        Args:
            inspection: Of N images.
            valid: (N, g, g) bool, the cells that the image covers; None: all.
        """
        scoring, size = self.config.scoring, self.config.preparation.size
        maps, coarse = self._standardised(inspection)
        if valid is not None:  # what does not count must not blur into what does
            maps = torch.where(valid, maps, 0.0)
            coarse = None if coarse is None else torch.where(coarser(valid), coarse, 0.0)
        scores, wide_scores = self._image_scores(inspection, valid)
        if wide_scores is not None:
            both = self.patch_weight * scores + scoring.regional_weight * wide_scores
            scores = both / (self.patch_weight + scoring.regional_weight)
        canvas = F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)
        if coarse is not None and scoring.coarse_weight:
            side = round(size * 2 * coarse.shape[-1] / maps.shape[-1])  # more than the canvas where the grid is odd
            wide = F.interpolate(coarse[:, None], (side, side), mode="bilinear", align_corners=False)
            canvas = canvas + scoring.coarse_weight * wide[..., :size, :size]
        return gaussian_blur(canvas, scoring.smooth * size / 256)[:, 0], scores

    def _image_scores(self, inspection: Inspection, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patch score and regional score of each image, (N,) each, in deviations above normal."""
        mean, deviation = self.normal_scores.unbind(-1)
        statistics = (self._statistics(inspection, valid) - mean) / deviation
        kinds = statistics[:, : len(mean) - self.judges].unflatten(1, (-1, len(self.config.scoring.shares)))
        return kinds.mean(2).amax(1), statistics[:, -1] if self.judges else None

    def _standardised(self, inspection: Inspection) -> tuple[Tensor, Tensor | None]:
        """Witnesses as one map (N, g, g), and the coarse evidence (N, h, h), both in deviations from normal."""
        mean, deviation = self.normal[..., None, None].unbind(1)
        anomaly_maps = ((inspection.anomaly_maps - mean[: self.kinds]) / deviation[: self.kinds]).mean(1)
        if inspection.coarse is None:
            return anomaly_maps, None
        return anomaly_maps, (inspection.coarse[:, 0] - mean[-1]) / deviation[-1]

    def _statistics(self, inspection: Inspection, valid: Tensor | None = None) -> Tensor:
        """What judges an image, (N, Q): shares of the witnesses, shares of what is perceived, the coarse evidence."""
        scoring = self.config.scoring
        maps, coarse = self._standardised(inspection)
        found = [highest(maps, scoring.shares, valid, self.window)]
        if inspection.perceived is not None:
            found.append(highest(inspection.perceived[:, 0], scoring.shares, valid, self.window))
        if coarse is not None:
            found.append(highest(coarse, (scoring.coarse_share,), None if valid is None else coarser(valid)))
        return torch.cat(found, dim=1)


def _sharing(module: Module) -> Module:
    """A copy of a module tree that shares every tensor, and the extractor as it is."""
    made = copy.copy(module)
    made.__dict__ |= {"_buffers": module._buffers.copy(), "_modules": module._modules.copy()}
    for name, part in module.named_children():
        if not isinstance(part, FeatureExtractor | PixelExtractor):
            made._modules[name] = _sharing(part)
    return made


def _joined(found: Sequence[Inspection], name: str) -> Tensor | None:
    """One kind of evidence of all images; None where there is none."""
    parts = [getattr(inspection, name) for inspection in found]
    return None if parts[0] is None else torch.cat(parts)


def highest(maps: Tensor, shares: Sequence[float], valid: Tensor | None = None, window: int = 3) -> Tensor:
    """(N, g, g) → (N, Q): mean of the highest share q of the valid cells, after a mean over a square `window`."""
    inside = torch.ones_like(maps) if valid is None else valid.to(maps)
    around = (window, 1, window // 2)
    covered = F.avg_pool2d(inside[:, None], *around)  # so that the padding does not blur into the image
    smooth = (F.avg_pool2d((maps * inside)[:, None], *around) / covered.clamp_min(1e-6)).flatten(1)
    cells = smooth if valid is None else smooth.masked_fill(~valid.flatten(1), -torch.inf)
    ordered = cells.sort(dim=1, descending=True).values
    present = torch.full((maps.shape[0],), cells.shape[1]) if valid is None else valid.flatten(1).sum(1)
    rank = torch.arange(cells.shape[1], device=maps.device)
    counts = [(q * present).round().clamp_min(1)[:, None] for q in shares]
    return torch.stack([torch.where(rank < k, ordered, 0).sum(1) / k[:, 0] for k in counts], dim=1)
