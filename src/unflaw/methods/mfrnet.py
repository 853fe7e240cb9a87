"""MFRNet (arXiv 2404.13273): multi-feature reconstruction with crossed masks.

    F ──▶ n crossed masks M_i ──▶ M_i ⊙ F, one batch ──▶ restoration network R ──▶ F̂ = Σ_i K_i ⊙ R(M_i ⊙ F)

The map is the hybrid loss of F and F̂. The multi-scale aggregator, the paper's first part, is `FeatureExtractor`. The
parts are the paper's; its hyper-parameters and the inside of its blocks are not public to us, so all of these are ours.

Masks and network are in `crossed_masks.py`. Ours is a memory, left out with `prototypes = 0`: the distance to it is a
second anomaly map, and it judges the image; and a second memory of whole regions (`RegionalMemoryBank`), left out with
`regional_prototypes = 0` (docs/research.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from unflaw.config import Config, WeightSource
from unflaw.methods.base import DINO, LEVEL_VARIANTS, PAPER, Batch, Inspection, Method
from unflaw.methods.crossed_masks import CrossedMasks, MFRNetOptions, RestorationNetwork, crossed_masks
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import gradient_magnitude_similarity, ssim_map
from unflaw.methods.visualization import Row, Stage, Stages

WINDOW = 5  # of SSIM, in feature cells
SHOWN_MASKS = 4  # in figures
SCALES = 3  # of gradient magnitude similarity
STABLE = 10.0  # C1, C2 and c of the two, where the mean squared norm of F is 1; less, and empty background dominates


# The method without our memories
RESTORATION: dict[str, Any] = {"network.prototypes": 0, "network.regional_prototypes": 0}


CPU: dict[str, Any] = {"training.steps": 150, "training.batch": 8, "training.learning_rate": 2e-3}


class MFRNet(Method):
    """Assembly; see the module. The hybrid loss of every cell is the anomaly map, beside the distance to the memory."""

    options_class = MFRNetOptions
    options: MFRNetOptions
    profiles = {  # noqa: RUF012
        "cpu": CPU,
        "dino": CPU | DINO,
        "restoration": RESTORATION | {"training.steps": 1500, "training.batch": 8, "training.learning_rate": 4e-3},
        "paper": PAPER
        | RESTORATION
        | {
            "features.backbone": "vgg16.tv_in1k",
            "features.levels": (2, 3, 4),
            "network.n": 3,
            "network.margin": 0,
            "network.arrangement": "random",
            "network.token_width": 128,
            "network.widths": (512, 768),
            "network.depth": 4,
            "network.heads": 8,
        },
    }
    variants = (
        ("k-4: network.k=[4]", "larger mask cells"),
        ("k-8: network.k=[8]", "larger mask cells"),
        ("k-2-4-8: network.k=[2, 4, 8]", "maps of several sizes of mask cells, averaged"),
        ("n-25: network.n=25", "more masks, each hides less"),
        ("no-margin: network.margin=0", "what touches a mask cell is visible"),
        ("margin-1: network.margin=1", "a smaller margin"),
        ("random: network.arrangement=random", "what a mask hides lies at random places"),
        (
            "paper-masks: network.arrangement=random; network.margin=0; network.n=3",
            "the paper's masks: a third at random, without a margin",
        ),
        ("nothing-hidden: network.masked=false", "a plain autoencoder, which may copy"),
        ("no-memory: network.prototypes=0", "no memory of cells: the residual judges the image, too"),
        ("no-regional-memory: network.regional_prototypes=0", "without the memory of whole regions"),
        ("paper-parts: network.prototypes=0; network.regional_prototypes=0", "the paper's parts alone"),
        ("untrained: training.steps=0", "the linear restoration alone: what training adds"),
        ("nearest_neighbor: method=nearest_neighbor", "distance to the memory alone, the floor"),
        ("no-attention: network.attention=false", "blocks of convolution alone"),
        ("no-convolution: network.convolution=false", "blocks of attention alone"),
        ("l2-only: network.ssim=0; network.gms=0", "loss and map without structure"),
        ("ssim-only: network.pixel=0; network.gms=0", "loss and map of SSIM alone"),
        ("gms-only: network.pixel=0; network.ssim=0", "loss and map of gradients alone"),
        ("no-ssim: network.ssim=0", "loss and map without SSIM"),
        ("no-gms: network.gms=0", "loss and map without gradients"),
        *LEVEL_VARIANTS,
    )

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        options = config.network
        assert isinstance(options, MFRNetOptions)
        super().__init__(
            config,
            weights,
            n_maps=1 + (options.prototypes > 0),
            prototypes=options.prototypes,
            regional_prototypes=options.regional_prototypes,
        )
        if options.prototypes:
            self.scored_maps = slice(1, 2)  # the residual shows where; the distance tells better whether
        self.terms = {name: w for name in ("pixel", "ssim", "gms") if (w := getattr(options, name))}
        self.restoration = RestorationNetwork(self.features.channels, self.features.shape, options)
        drawn = self._draw_all(torch.Generator().manual_seed(0))
        self.visible: Tensor
        self.kept: Tensor
        self.scale: Tensor
        self.register_buffer("visible", torch.stack([masks.visible for masks in drawn]))  # (K, n, g, g)
        self.register_buffer("kept", torch.stack([masks.kept for masks in drawn]))
        self.register_buffer("scale", torch.ones(()))

    def fit_memory(self, data: FeatureSet, rng: Generator) -> Batch:
        """Draws the masks of inspection, fits the linear restoration, and measures the norm of F.

        The norm makes structural terms free of units.
        """
        drawn = self._draw_all(rng)
        for i, masks in enumerate(drawn):
            self.visible[i], self.kept[i] = masks
        energy = torch.stack([part.float().square().sum(1).mean() for part in data.features.split(16)])
        self.scale.copy_(energy.mean().sqrt().clamp_min(1e-6))
        self.restoration.fit(data.features, drawn)
        return super().fit_memory(data, rng)

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """Hybrid loss of F and F̂ where F̂ is kept; every step draws one k, as RIAD does, and a mask for each image."""
        clean = batch["features"]
        k = self.options.k[int(torch.randint(len(self.options.k), (1,), generator=rng))]
        masks = self._draw(k, rng)
        which = torch.randint(len(masks.kept), (len(clean),), generator=rng)
        visible, kept = (m[which][:, None].to(clean) for m in masks)
        restored = self.restoration(clean, visible, kept).float()
        terms = self.compare(clean, torch.where(kept > 0, restored, clean))
        terms["loss"] = self.hybrid(terms)
        return {name: term.sum() / kept.sum() for name, term in terms.items()}

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        """Maps and restored features are means over k."""
        distance = [] if self.memory is None else [self.memory(features, context).scored]
        restored = self.restore(features)  # (N, K, C, g, g)
        n_sets = restored.shape[1]
        terms = self.compare(features.repeat_interleave(n_sets, 0), restored.flatten(0, 1))
        maps = self.hybrid(terms).sqrt().unflatten(0, (-1, n_sets)).mean(1)
        anomaly_maps = torch.cat([maps, *distance], dim=1)
        return Inspection(anomaly_maps, regional=self.regional_distance(features, context), restored=restored.mean(1))

    def visualize(self, features: Tensor, inspection: Inspection) -> Stages:
        """Masks, a row for each k: what the first ones leave visible and keep, and the sum. Restoration: terms."""
        assert inspection.restored is not None
        assembled = self.restore(features)[0]  # (K, C, g, g)
        shown_masks = range(min(SHOWN_MASKS, self.kept.shape[1]))
        rows: list[Row] = []
        for j, restored in enumerate(assembled):
            shown = f"k = {self.options.k[j]}" if self.options.masked else "nothing hidden"
            visible = {f"Visible {i + 1}": Stage("cover", self.visible[j][i : i + 1]) for i in shown_masks}
            kept = {
                f"Restored {i + 1}, drawn": Stage("features", restored, seen=self.kept[j][i : i + 1])
                for i in shown_masks
            }
            rows.append((shown, visible | kept | {"Assembled, drawn": Stage("features", restored)}))
        tiles = {"Features, drawn": Stage("features", features[0])}
        tiles["Restored, drawn"] = Stage("features", inspection.restored[0])
        titles = {"pixel": "L2", "ssim": "1 - SSIM", "gms": "1 - GMS"}
        terms = self.compare(features.expand_as(assembled), assembled)
        tiles |= {titles[name]: Stage("map", term.mean(0)) for name, term in terms.items()}
        titles_of_maps = ["Hybrid", "Distance to the memory"][: self.n_maps]
        maps = zip(titles_of_maps, inspection.anomaly_maps[0], strict=True)
        tiles |= {title: Stage("map", values[None]) for title, values in maps}
        if inspection.regional is not None:
            tiles["Regional distance"] = Stage("map", inspection.regional[0])
        return {"masks": rows, "restoration": [("", tiles)]}

    def restore(self, features: Tensor) -> Tensor:
        """F (N, C, g, g) → F̂ by the masks of each k, (N, K, C, g, g)."""
        restored = []
        for masks in zip(self.visible, self.kept, strict=True):
            visible, kept = (m.expand(features.shape[0], -1, -1, -1) for m in masks)
            restored.append(self.restoration(features, visible, kept))
        return torch.stack(restored, dim=1)

    def compare(self, features: Tensor, restored: Tensor) -> dict[str, Tensor]:
        """The terms of the hybrid loss at every cell, F and F̂ (N, C, g, g) → (N, 1, g, g) each, 0 where they agree."""
        x, y = features / self.scale, restored.float() / self.scale
        terms = {}
        if "pixel" in self.terms:
            terms["pixel"] = (x - y).square().sum(1, keepdim=True)
        if "ssim" in self.terms:
            terms["ssim"] = 1 - ssim_map(x, y, WINDOW, (STABLE, STABLE))
        if "gms" in self.terms:
            terms["gms"] = 1 - gradient_magnitude_similarity(x, y, STABLE, SCALES)
        return terms

    def hybrid(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms at every cell, at least 0."""
        return torch.stack([self.terms[name] * term for name, term in terms.items()]).sum(0).clamp_min(0)

    def _draw_all(self, rng: Generator) -> list[CrossedMasks]:
        """The masks of inspection, a set for each k; unmasked: one set."""
        return [self._draw(k, rng) for k in self.options.k[: None if self.options.masked else 1]]

    def _draw(self, k: int, rng: Generator) -> CrossedMasks:
        """The n masks of one k; unmasked: one that hides nothing and keeps everything."""
        shape, options = self.features.shape, self.options
        if not options.masked:
            return CrossedMasks(torch.ones(1, *shape), torch.ones(1, *shape))
        return crossed_masks(shape, k, options.n, rng, options.margin, options.arrangement)
