"""MFRNet (arXiv 2404.13273): multi-feature reconstruction with crossed masks.

    F ──▶ n crossed masks M_i ──▶ M_i ⊙ F, one batch ──▶ restoration network R ──▶ F̂ = Σ_i (1 − M_i) ⊙ R(M_i ⊙ F)

The map is the hybrid loss of F and F̂. The multi-scale aggregator, the paper's first part, is `FeatureExtractor`. The
parts are the paper's; its hyper-parameters and the inside of its blocks are not public to us, so all of these are ours.
Ours as well are a memory, left out with `prototypes = 0`: features retrieved there fill what is hidden, and the
distance to it is a second anomaly map; and a second memory of whole regions (`RegionalMemoryBank`), left out with
`regional_prototypes = 0` (docs/research.md).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from unflaw.config import Config, MethodOptions, WeightSource
from unflaw.io.words import count
from unflaw.methods.base import LEVEL_VARIANTS, PAPER, Batch, Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import (
    Attention,
    gradient_magnitude_similarity,
    sincos_positions,
    ssim_map,
    to_grid,
    to_tokens,
)
from unflaw.methods.visualization import Row, Stage, Stages

WINDOW = 5  # of SSIM, in feature cells
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
        if not (self.pixel or self.ssim or self.gms):
            raise ValueError("the hybrid loss needs a weight above 0: pixel, ssim or gms")
        return self


def crossed_masks(side: int, k: int, n: int, rng: Generator) -> Tensor:
    """Crossed-mask generator: n random masks (n, side, side), 0 where hidden and 1 where visible.

    The grid of k×k cells is split at random into n subsets whose sizes differ by one cell at most; each mask hides one.
    So what they hide is disjoint and together complete. Where k does not divide the side, the last cells are smaller.

    Raises:
        ValueError: k larger than the side, or more masks than cells.
    """
    if k > side:
        raise ValueError(f"mask cells of {k} are larger than the grid of {side}; choose a smaller network.k")
    cells = -(-side // k)
    if n > cells**2:
        raise ValueError(f"{n} masks cannot share {count(cells**2, 'cell')}; choose a smaller network.n or network.k")
    subset = torch.randperm(cells**2, generator=rng).view(cells, cells) % n
    subset = subset.repeat_interleave(k, 0).repeat_interleave(k, 1)[:side, :side]
    return (subset != torch.arange(n).view(-1, 1, 1)).float()


class HybridBlock(nn.Module):
    """Hybrid transformer block: convolution for detail beside self-attention for context, then a feed-forward part.

    Both branches see the same normalised tokens, and their sum is added to the input (our reading).
    """

    def __init__(self, width: int, options: MFRNetOptions) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, options.heads) if options.attention else None
        self.convolution = nn.Conv2d(width, width, 3, padding=1) if options.convolution else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) → (N, T, width), the T tokens a square grid."""
        normal = self.norm1(x)
        if self.attention is not None:
            x = x + self.attention(normal)
        if self.convolution is not None:
            x = x + to_tokens(self.convolution(to_grid(normal)))
        return x + self.mlp(self.norm2(x))


class RestorationNetwork(nn.Module):
    """R: an encoder–decoder of hybrid blocks from what is visible to all of F.

    What is hidden is filled first, with blurred surroundings or with features retrieved from a memory. Tokens are
    patches of that and of the mask; each further scale halves the side, and the decoder adds the output of the encoder
    at its scale. Predicted is a correction of the filling, at first 0.
    """

    def __init__(self, channels: int, grid: int, options: MFRNetOptions) -> None:
        super().__init__()
        p, widths = options.patch, options.widths
        multiple = p * 2 ** (len(widths) - 1)
        if grid % multiple:
            raise ValueError(
                f"the grid of {grid} cells cannot be cut into patches of {p} and halved "
                f"{count(len(widths) - 1, 'time')}; "
                f"choose a multiple of {multiple} for features.grid, another network.patch or fewer network.widths"
            )
        self.patch = p
        self.narrow = nn.Conv2d(channels + 1, widths[0], p, p)
        *finer, coarsest = (nn.Sequential(*(HybridBlock(w, options) for _ in range(options.depth))) for w in widths)
        self.encoder, self.bottom = nn.ModuleList(finer), coarsest
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(
            nn.Sequential(*(HybridBlock(w, options) for _ in range(options.depth))) for w in widths[:-1]
        )
        self.norm = nn.LayerNorm(widths[0])
        self.widen = nn.Linear(widths[0], channels * p * p)
        nn.init.zeros_(self.widen.weight)
        nn.init.zeros_(self.widen.bias)
        self.positions: Tensor
        self.nearness: Tensor
        self.register_buffer("positions", sincos_positions(grid // p, widths[0]), persistent=False)
        distance = torch.arange(grid) - torch.arange(grid)[:, None]
        self.register_buffer("nearness", torch.exp(-0.5 * (distance / (grid / 16)) ** 2), persistent=False)

    def forward(self, seen: Tensor, visible: Tensor, retrieved: Tensor | None = None) -> Tensor:
        """M ⊙ F (N, C, g, g), M (N, 1, g, g) in {0, 1} and what to fill with, if known → R(M ⊙ F), (N, C, g, g)."""
        filling = self.fill(seen, visible) if retrieved is None else retrieved
        x = to_tokens(self.narrow(torch.cat([seen + (1 - visible) * filling, visible], dim=1))) + self.positions
        skipped = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            x = blocks(x)
            skipped.append(x)
            x = to_tokens(down(to_grid(x)))
        x = self.bottom(x)
        for blocks, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            x = blocks(to_tokens(up(to_grid(x))) + skipped.pop())
        return filling + F.pixel_shuffle(to_grid(self.widen(self.norm(x))), self.patch)

    def fill(self, seen: Tensor, visible: Tensor) -> Tensor:
        """Mean of what is visible around each place, weighted by a Gaussian of a sixteenth of the grid."""
        around = self.nearness @ seen @ self.nearness
        return around / (self.nearness @ visible @ self.nearness).clamp_min(1e-6)


class MFRNet(Method):
    """Assembly; see the module. The hybrid loss of every cell is the anomaly map, beside the distance to the memory."""

    options_class = MFRNetOptions
    options: MFRNetOptions
    profiles = {  # noqa: RUF012
        "cpu": {"training.steps": 150, "training.batch": 4, "training.learning_rate": 2e-3},
        "paper": PAPER
        | {
            "features.backbone": "vgg16.tv_in1k",
            "features.levels": (2, 3, 4),
            "network.prototypes": 0,
            "network.regional_prototypes": 0,
            "network.widths": (512, 768),
            "network.depth": 4,
            "network.heads": 8,
        },
    }
    variants = (
        ("k-1: network.k=[1]", "smaller mask cells"),
        ("k-4: network.k=[4]", "larger mask cells"),
        ("k-8: network.k=[8]", "larger mask cells"),
        ("k-2-4-8: network.k=[2, 4, 8]", "maps of several sizes of mask cells, averaged"),
        ("n-2: network.n=2", "fewer masks, each hides more"),
        ("n-4: network.n=4", "more masks, each hides less"),
        ("nothing-hidden: network.masked=false", "a plain autoencoder, which may copy"),
        ("no-memory: network.prototypes=0", "what is hidden is restored from its surroundings alone"),
        ("no-regional-memory: network.regional_prototypes=0", "without the memory of whole regions"),
        ("paper-parts: network.prototypes=0; network.regional_prototypes=0", "the paper's parts alone"),
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
        self.terms = {name: w for name in ("pixel", "ssim", "gms") if (w := getattr(options, name))}
        self.restoration = RestorationNetwork(self.features.channels, self.features.grid, options)
        self.masks: Tensor
        self.scale: Tensor
        self.register_buffer("masks", self._draw(options.k, torch.Generator().manual_seed(0)))
        self.register_buffer("scale", torch.ones(()))

    def fit_memory(self, data: FeatureSet, rng: Generator) -> Batch:
        """Draws the masks of inspection and measures the norm of F, which makes structural terms free of units."""
        self.masks.copy_(self._draw(self.options.k, rng))
        energy = torch.stack([part.float().square().sum(1).mean() for part in data.features.split(16)])
        self.scale.copy_(energy.mean().sqrt().clamp_min(1e-6))
        super().fit_memory(data, rng)
        if self.memory is None:
            return {}
        return self.memory.retrieve_cached(data.features, self.config.training.cache_gb * 2**30)

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """Hybrid loss of F and F̂; every step draws one k, as RIAD does, and new masks."""
        k = self.options.k[int(torch.randint(len(self.options.k), (1,), generator=rng))]
        masks = self._draw((k,), rng).to(batch["features"])
        restored = self.restore(batch["features"], masks, batch.get("retrieved"))[:, 0]
        terms = self.compare(batch["features"], restored)
        return {name: term.mean() for name, term in terms.items()} | {"loss": self.hybrid(terms).mean()}

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        """All masks of all k in one batch; maps and restored features are means over k."""
        retrieved, distance = None, []
        if self.memory is not None:
            retrieved, _, least = self.memory(features, context)
            distance = [least]
        restored = self.restore(features, self.masks, retrieved)  # (N, K, C, g, g)
        n_sets = self.masks.shape[0]
        terms = self.compare(features.repeat_interleave(n_sets, 0), restored.flatten(0, 1))
        maps = self.hybrid(terms).sqrt().unflatten(0, (-1, n_sets)).mean(1)
        anomaly_maps = torch.cat([maps, *distance], dim=1)
        return Inspection(anomaly_maps, regional=self.regional_distance(features, context), restored=restored.mean(1))

    def visualize(self, features: Tensor, inspection: Inspection) -> Stages:
        """Masks, a row for each k: what each leaves visible, what R restores, and the sum. Restoration: terms."""
        assert inspection.restored is not None
        retrieved = None if self.memory is None else self.memory(features)[0]
        assembled = self.restore(features, self.masks, retrieved)[0]  # (K, C, g, g)
        rows: list[Row] = []
        for j, (masks, restored) in enumerate(zip(self.masks[:, :, None], assembled, strict=True)):  # (n, 1, g, g)
            visible = {f"Visible {i}": Stage("cover", mask) for i, mask in enumerate(masks, 1)}
            hidden = [1 - mask if self.options.masked else mask for mask in masks]
            kept = {f"Restored {i}, drawn": Stage("features", restored, seen=h) for i, h in enumerate(hidden, 1)}
            whole = {"Assembled, drawn": Stage("features", restored)}
            name = f"k = {self.options.k[j]}" if self.options.masked else "nothing hidden"
            rows.append((name, visible | kept | whole))
        tiles = {"Features, drawn": Stage("features", features[0])}
        if retrieved is not None:
            tiles["Retrieved, drawn"] = Stage("features", retrieved[0])
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

    def restore(self, features: Tensor, masks: Tensor, retrieved: Tensor | None = None) -> Tensor:
        """F and retrieved features (N, C, g, g), K sets of n masks (K, n, g, g) → F̂ of each set, (N, K, C, g, g).

        All K·n masked maps are one batch, and of each only the hidden cells are kept. Unmasked: all of one map.
        """
        sets, n = masks.shape[:2]
        visible = masks.flatten(0, 1)[:, None].repeat(features.shape[0], 1, 1, 1)  # (N·K·n, 1, g, g)
        seen = features.repeat_interleave(sets * n, 0) * visible
        filling = None if retrieved is None else retrieved.repeat_interleave(sets * n, 0)
        kept = self.restoration(seen, visible, filling) * (1 - visible if self.options.masked else 1)
        return kept.view(features.shape[0], sets, n, *features.shape[1:]).sum(2)

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

    def _draw(self, sizes: tuple[int, ...], rng: Generator) -> Tensor:
        """A set of n masks for each k, (K, n, g, g); unmasked: one that hides nothing."""
        grid = self.features.grid
        if not self.options.masked:
            return torch.ones(1, 1, grid, grid)
        return torch.stack([crossed_masks(grid, k, self.options.n, rng) for k in sizes])
