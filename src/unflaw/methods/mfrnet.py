"""MFRNet (arXiv 2404.13273): multi-feature reconstruction with crossed masks.

    F ──▶ n crossed masks M_i ──▶ M_i ⊙ F, one batch ──▶ restoration network R ──▶ F̂ = Σ_i K_i ⊙ R(M_i ⊙ F)

The map is the hybrid loss of F and F̂. The multi-scale aggregator, the paper's first part, is `FeatureExtractor`. The
parts are the paper's; its hyper-parameters and the inside of its blocks are not public to us, so all of these are ours.

In the paper K_i = 1 − M_i: all that a mask hides is kept of its restoration. Ours (`crossed_masks`): a mask also hides
a margin around what is kept, and what the masks hide lies on a regular lattice. The receptive fields of the backbone
reach beyond a cell, so that its neighbours show what is wrong with it; and where surroundings are hidden at random, how
well a place can be restored is random too.

Ours as well are a memory, left out with `prototypes = 0`: the distance to it is a second anomaly map, and it judges
the image; and a second memory of whole regions (`RegionalMemoryBank`), left out with `regional_prototypes = 0`
(docs/research.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from unflaw.config import Config, MethodOptions, WeightSource
from unflaw.io.words import count
from unflaw.methods.base import DINO, LEVEL_VARIANTS, PAPER, Batch, Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import (
    Attention,
    gradient_magnitude_similarity,
    sincos_positions,
    ssim_map,
    to_grid,
    to_tokens,
)
from unflaw.methods.linear_restoration import LinearRestoration
from unflaw.methods.visualization import Row, Stage, Stages

WINDOW = 5  # of SSIM, in feature cells
TAPS = 7  # side of the convolution that reads the surroundings of a token
SHOWN_MASKS = 4  # in figures
SCALES = 3  # of gradient magnitude similarity
STABLE = 10.0  # C1, C2 and c of the two, where the mean squared norm of F is 1; less, and empty background dominates


class MFRNetOptions(MethodOptions):
    """MFRNet (arXiv 2404.13273). k and n are those of the paper's figure 3; its other hyper-parameters are not public
    to us: their numbers are ours."""

    method: Literal["mfrnet"] = "mfrnet"
    k: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        (2,),
        min_length=1,
        max_length=16,
        description="side of a mask cell, in feature cells; the maps of several are averaged",
    )
    n: int = Field(16, ge=2, le=256, description="crossed masks: together they restore everything once")
    margin: int = Field(2, ge=0, le=64, description="cells hidden around each mask cell and not restored; 0: the paper")
    arrangement: Literal["regular", "random"] = Field(
        "regular", description="of what masks hide; regular: on a lattice, n a square number; random: as in the paper"
    )
    masked: bool = Field(True, description="False: nothing is hidden, a plain autoencoder")
    patch: int = Field(2, ge=1, le=256, description="side of a token in feature cells, at the finest scale")
    token_width: int = Field(192, ge=4, le=8192, description="channels of a token")
    widths: tuple[Annotated[int, Field(ge=4, le=8192, multiple_of=4)], ...] = Field(
        (192,), min_length=1, max_length=8, description="of the tokens per scale; each scale halves the side"
    )
    depth: int = Field(1, ge=1, le=64, description="hybrid blocks per scale of the encoder, and of the decoder")
    heads: int = Field(4, ge=1, le=1024)
    attention: bool = Field(True, description="self-attention in the hybrid blocks")
    convolution: bool = Field(True, description="convolution in the hybrid blocks")
    pixel: float = Field(1.0, ge=0, description="weight of L2 in the hybrid loss, for training and map")
    ssim: float = Field(1.0, ge=0, description="weight of 1 − SSIM, likewise")
    gms: float = Field(1.0, ge=0, description="weight of 1 − gradient magnitude similarity, likewise")
    prototypes: int = Field(4096, ge=0, le=10_000_000, description="memory of normal tokens across images; 0: none")
    regional_prototypes: int = Field(
        16384, ge=0, le=10_000_000, description="size of the memory of whole regions, for image score and map; 0: none"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> MFRNetOptions:
        for width in self.widths:
            if width % self.heads:
                raise ValueError(f"a width of {width} cannot be cut into {self.heads} heads; choose a divisor")
        if not (self.attention or self.convolution):
            raise ValueError("a hybrid block needs attention, convolution or both")
        if self.masked and self.arrangement == "regular":
            if math.isqrt(self.n) ** 2 != self.n:
                raise ValueError(
                    f"{self.n} masks cannot lie on a square lattice; choose 4, 9, 16, 25, ... for network.n"
                )
            for k in self.k:
                if k + 2 * self.margin >= k * math.isqrt(self.n):
                    raise ValueError(
                        f"with {self.n} masks, mask cells of {k} and a margin of {self.margin}, everything is hidden; "
                        "choose a larger network.n or network.k, or a smaller network.margin"
                    )
        if not (self.pixel or self.ssim or self.gms):
            raise ValueError("the hybrid loss needs a weight above 0: pixel, ssim or gms")
        return self


class CrossedMasks(NamedTuple):
    """n masks, 1 or 0 at each cell: M_i is 1 where visible, K_i where the restoration of the rest is kept.

    The K_i are disjoint and together complete; M_i is 0 wherever K_i is 1.

    Attributes:
        visible, kept: (n, *shape) float.
    """

    visible: Tensor
    kept: Tensor


def crossed_masks(
    shape: tuple[int, int],
    k: int,
    n: int,
    rng: Generator,
    margin: int = 0,
    arrangement: Literal["regular", "random"] = "random",
) -> CrossedMasks:
    """Crossed-mask generator: the grid of k×k cells is split into n subsets; mask i restores the i-th and hides it.

    Random subsets are the paper's; their sizes differ by one cell at most where there is no margin. A regular subset is
    a lattice: every √n-th cell of every √n-th row, so that all places have the same surroundings. Where k does not
    divide a side, the last cells are smaller.

    Args:
        shape: Rows and columns of the grid.
        k: Side of a mask cell.
        n: Number of masks; a square number if they are regular.
        rng: Draws random subsets.
        margin: Cells around each mask cell that are hidden as well. At the border of the grid they are hidden as if it
            went on.

    Raises:
        ValueError: k larger than the shorter side, or more masks than cells.
    """
    if k > min(shape):
        raise ValueError(f"mask cells of {k} are larger than the grid of {min(shape)}; choose a smaller network.k")
    rows, columns = (-(-side // k) for side in shape)
    if n > rows * columns:
        cells = count(rows * columns, "cell")
        raise ValueError(f"{n} masks cannot share {cells}; choose a smaller network.n or network.k")
    beyond = -(-margin // k)  # mask cells on each side of the grid, so that its border is like the rest
    rows, columns = rows + 2 * beyond, columns + 2 * beyond
    if arrangement == "regular":
        period = math.isqrt(n)
        subset = torch.arange(rows)[:, None] % period * period + torch.arange(columns) % period
    else:
        subset = torch.randperm(rows * columns, generator=rng).view(rows, columns) % n
    subset = subset.repeat_interleave(k, 0).repeat_interleave(k, 1)
    kept = (subset == torch.arange(n).view(-1, 1, 1)).float()
    hidden = F.max_pool2d(kept[:, None], 2 * margin + 1, 1, margin)[:, 0]
    y, x = (slice(beyond * k, beyond * k + side) for side in shape)
    return CrossedMasks(1 - hidden[:, y, x], kept[:, y, x])


class HybridBlock(nn.Module):
    """Hybrid transformer block: convolution for detail beside self-attention for context, then a feed-forward part.

    Both branches see the same normalised tokens, and their sum is added to the input (our reading).
    """

    def __init__(self, width: int, options: MFRNetOptions, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, options.heads) if options.attention else None
        self.convolution = nn.Conv2d(width, width, 3, padding=1) if options.convolution else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) → (N, T, width), the T tokens a grid of `shape`."""
        normal = self.norm1(x)
        if self.attention is not None:
            x = x + self.attention(normal)
        if self.convolution is not None:
            x = x + to_tokens(self.convolution(to_grid(normal, self.shape)))
        return x + self.mlp(self.norm2(x))


class RestorationNetwork(nn.Module):
    """R: an encoder–decoder of hybrid blocks from what is visible to all of F.

    Tokens are patches of what is visible; where the restoration is kept, what lies around the place is added. Each
    further scale halves the side, and the decoder adds the output of the encoder at its scale. The output is a
    correction, at first 0, of a linear restoration (`LinearRestoration`), which `fit` finds in closed form and which
    stays as it is: each mask supervises too few places to train it as well (docs/research.md).

    The linear restoration uses the taps that are visible around every place that is kept. Among regular masks these
    are the same everywhere; among random ones there are none, and the hybrid blocks are alone.

    Args:
        channels: C.
        shape: Rows and columns of the grid.
        options: Sizes and switches.
    """

    def __init__(self, channels: int, shape: tuple[int, int], options: MFRNetOptions) -> None:
        super().__init__()
        p, widths = options.patch, options.widths
        multiple = p * 2 ** (len(widths) - 1)
        if shape[0] % multiple or shape[1] % multiple:
            raise ValueError(
                f"the grid of {min(shape)} cells cannot be cut into patches of {p} and halved "
                f"{count(len(widths) - 1, 'time')}; "
                f"choose a multiple of {multiple} for features.grid, another network.patch or fewer network.widths"
            )
        self.linear = LinearRestoration(channels, shape, p, options.token_width, widths[0], TAPS).requires_grad_(False)
        self.embed = nn.Linear(self.linear.narrow.out_features + 1, widths[0])
        rows, columns = self.linear.shape
        self.shapes = [(rows >> scale, columns >> scale) for scale in range(len(widths))]  # of the tokens, per scale

        def blocks(scale: int) -> nn.Sequential:
            made = (HybridBlock(widths[scale], options, self.shapes[scale]) for _ in range(options.depth))
            return nn.Sequential(*made)

        *finer, coarsest = map(blocks, range(len(widths)))
        self.encoder, self.bottom = nn.ModuleList(finer), coarsest
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(map(blocks, range(len(widths) - 1)))
        self.norm = nn.LayerNorm(widths[0])
        self.widen = nn.Linear(widths[0], channels * p**2)
        nn.init.zeros_(self.widen.weight)
        nn.init.zeros_(self.widen.bias)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(self.shapes[0], widths[0]), persistent=False)

    @torch.no_grad()
    def fit(self, features: Tensor, masks: Sequence[CrossedMasks]) -> None:
        """Fits the linear part to F (N, C, g, g) of good images, for these masks."""
        visible, kept = (torch.cat(parts)[:, None] for parts in zip(*masks, strict=True))
        whole = -F.max_pool2d(-visible, self.linear.patch)  # tokens all of whose cells are visible
        wanted = F.max_pool2d(kept, self.linear.patch).flatten(1) > 0
        reach = TAPS // 2
        around = F.unfold(F.pad(whole, (reach,) * 4, value=1.0), TAPS).transpose(1, 2)[wanted]  # (places, taps)
        self.linear.taps.copy_(around.amin(0).view(TAPS, TAPS))
        self.linear.fit(features)

    def forward(self, features: Tensor, visible: Tensor, kept: Tensor) -> Tensor:
        """Σ_i K_i ⊙ R(M_i ⊙ F): F (N, C, g, g), M and K (N, m, g, g) in {0, 1} → (N, C, g, g).

        All m masked maps of all images are one batch. Where no K_i is 1, the output means nothing.
        """
        m, linear = visible.shape[1], self.linear
        around = linear.around(linear.tokens(features))
        visible, kept = (masks.flatten(0, 1)[:, None] for masks in (visible, kept))  # (N·m, 1, g, g)
        seen = linear.tokens(features.repeat_interleave(m, 0) * visible)
        share, wanted = F.avg_pool2d(visible, linear.patch), F.max_pool2d(kept, linear.patch)
        x = self.embed(to_tokens(torch.cat([seen, share.to(seen)], dim=1))) + self.positions
        x = x + to_tokens(wanted) * around.repeat_interleave(m, 0)
        skipped = []
        for blocks, down, shape in zip(self.encoder, self.down, self.shapes, strict=False):
            x = blocks(x)
            skipped.append(x)
            x = to_tokens(down(to_grid(x, shape)))
        x = self.bottom(x)
        for blocks, up, shape in zip(reversed(self.decoder), reversed(self.up), reversed(self.shapes), strict=False):
            x = blocks(to_tokens(up(to_grid(x, shape))) + skipped.pop())
        correction = linear.to_features(self.widen(self.norm(x)) * linear.scale) * kept
        return linear.to_features(linear(around)) + correction.unflatten(0, (-1, m)).sum(1)


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
