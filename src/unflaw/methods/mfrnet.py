"""MFRNet (arXiv 2404.13273): multi-feature reconstruction with crossed masks.

    F ──▶ n crossed masks M_i ──▶ M_i ⊙ F, one batch ──▶ restoration network R ──▶ F̂ = Σ_i (1 − M_i) ⊙ R(M_i ⊙ F)

The map is the hybrid loss of F and F̂. The multi-scale aggregator, the paper's first part, is `FeatureExtractor`. The
parts are the paper's; its hyper-parameters and the inside of its blocks are not public to us, so all of these are ours.
Ours as well are a memory, left out with `prototypes = 0`: what is hidden is filled with its recall, and the distance to
it is one more anomaly map; and a second memory of whole regions (`RegionalMemoryBank`), left out with
`coarse_prototypes = 0`, which joins map and score (docs/research.md).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from unflaw.config import Config, MFRNetOptions, WeightSource
from unflaw.io.words import count
from unflaw.methods.base import Batch, Inspection, Method
from unflaw.methods.layers import (
    Attention,
    gradient_magnitude_similarity,
    sincos_positions,
    ssim_map,
    to_grid,
    to_tokens,
)
from unflaw.methods.memory_bank import MemoryBank, RegionalMemoryBank
from unflaw.methods.visualization import Row, Stage, Stages
from unflaw.parallel.shares import WHOLE, Share

WINDOW = 5  # of SSIM, in feature cells
SCALES = 3  # of gradient magnitude similarity
STABLE = 10.0  # C1, C2 and c of the two, where the mean squared norm of F is 1; less, and empty background judges


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

    What is hidden is filled first, with blurred surroundings or with what a memory recalls. Tokens are patches of that
    and of the mask; each further scale halves the side, and the decoder adds what the encoder had at its scale.
    Predicted is a correction of the filling, at first 0.
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

    def forward(self, seen: Tensor, visible: Tensor, recalled: Tensor | None = None) -> Tensor:
        """M ⊙ F (N, C, g, g), M (N, 1, g, g) in {0, 1} and what to fill with, if known → R(M ⊙ F), (N, C, g, g)."""
        filling = self.fill(seen, visible) if recalled is None else recalled
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
    """Assembly; see the module. The hybrid loss of every cell is the evidence, beside the distance to the memory."""

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        options = config.network
        assert isinstance(options, MFRNetOptions)
        self.options = options
        self.terms = {name: w for name in ("pixel", "ssim", "gms") if (w := getattr(options, name))}
        self.kinds = 1 + (options.prototypes > 0)
        self.judges = options.coarse_prototypes > 0
        super().__init__(config, weights)
        self.memory = MemoryBank(options.prototypes, self.features.channels) if options.prototypes else None
        self.judge = RegionalMemoryBank(options.coarse_prototypes, self.features) if self.judges else None
        self.restoration = RestorationNetwork(self.features.channels, self.features.grid, options)
        self.masks: Tensor
        self.scale: Tensor
        self.register_buffer("masks", self._draw(options.k, torch.Generator().manual_seed(0)))
        self.register_buffer("scale", torch.ones(()))

    def setup(
        self, features: Tensor, textures: Tensor | None, rng: Generator, categories: Tensor | None = None
    ) -> Batch:
        """Draws the masks of inspection and measures the norm of F, which makes structural terms free of units."""
        self.masks.copy_(self._draw(self.options.k, rng))
        energy = torch.stack([part.float().square().sum(1).mean() for part in features.split(16)])
        self.scale.copy_(energy.mean().sqrt().clamp_min(1e-6))
        if self.memory is not None:
            self.memory.fit(features, rng, categories)
        if self.judge is not None:
            self.judge.fit(features, rng, categories)
        if self.memory is None:
            return {}
        return self.memory.recall_cached(features, self.config.training.cache_gb * 2**30)

    def loss(self, batch: Batch, rng: Generator, share: Share = WHOLE) -> dict[str, Tensor]:
        """Hybrid loss of F and F̂; every step draws one k, as RIAD does, and new masks."""
        batch = {name: share.take(rows) for name, rows in batch.items()}
        k = self.options.k[int(torch.randint(len(self.options.k), (1,), generator=rng))]
        masks = self._draw((k,), rng).to(batch["features"])
        restored = self.restore(batch["features"], masks, batch.get("recalled"))[:, 0]
        terms = self.compare(batch["features"], restored)
        return {name: term.mean() for name, term in terms.items()} | {"loss": self.hybrid(terms).mean()}

    def forward(
        self,
        features: Tensor,
        images: Tensor | None = None,
        valid: Tensor | None = None,
        held_out: Tensor | None = None,
    ) -> Inspection:
        """All masks of all k in one batch; maps and restored features are means over k."""
        recalled, distance = None, []
        if self.memory is not None:
            recalled, _, least = self.memory(features, images, held_out)
            distance = [least]
        coarse = None if self.judge is None else self.judge(features, images, valid, held_out)
        restored = self.restore(features, self.masks, recalled)  # (N, K, C, g, g)
        kinds = self.masks.shape[0]
        terms = self.compare(features.repeat_interleave(kinds, 0), restored.flatten(0, 1))
        maps = self.hybrid(terms).sqrt().unflatten(0, (-1, kinds)).mean(1)
        anomaly_maps = torch.cat([maps, *distance], dim=1)
        return Inspection(anomaly_maps, coarse=coarse, restored=restored.mean(1))

    def stages(self, features: Tensor, inspection: Inspection) -> Stages:
        """Masks, a row for each k: what each leaves visible, what R restores, and the sum. Restoration: terms."""
        assert inspection.restored is not None
        recalled = None if self.memory is None else self.memory(features)[0]
        assembled = self.restore(features, self.masks, recalled)[0]  # (K, C, g, g)
        rows: list[Row] = []
        for j, (masks, restored) in enumerate(zip(self.masks[:, :, None], assembled, strict=True)):  # (n, 1, g, g)
            visible = {f"Visible {i}": Stage("cover", mask) for i, mask in enumerate(masks, 1)}
            hidden = [1 - mask if self.options.masked else mask for mask in masks]
            kept = {f"Restored {i}, drawn": Stage("features", restored, seen=h) for i, h in enumerate(hidden, 1)}
            whole = {"Assembled, drawn": Stage("features", restored)}
            name = f"k = {self.options.k[j]}" if self.options.masked else "nothing hidden"
            rows.append((name, visible | kept | whole))
        tiles = {"Features, drawn": Stage("features", features[0])}
        if recalled is not None:
            tiles["Recalled, drawn"] = Stage("features", recalled[0])
        tiles["Restored, drawn"] = Stage("features", inspection.restored[0])
        titles = {"pixel": "L2", "ssim": "1 - SSIM", "gms": "1 - GMS"}
        terms = self.compare(features.expand_as(assembled), assembled)
        tiles |= {titles[name]: Stage("map", term.mean(0)) for name, term in terms.items()}
        kinds = ["Hybrid", "Distance to the memory"][: self.kinds]
        tiles |= {kind: Stage("map", m[None]) for kind, m in zip(kinds, inspection.anomaly_maps[0], strict=True)}
        if inspection.coarse is not None:
            tiles["Coarse evidence"] = Stage("map", inspection.coarse[0])
        return {"masks": rows, "restoration": [("", tiles)]}

    def restore(self, features: Tensor, masks: Tensor, recalled: Tensor | None = None) -> Tensor:
        """F (N, C, g, g), K sets of n masks (K, n, g, g), recall of F (N, C, g, g) → F̂ of each set, (N, K, C, g, g).

        All K·n masked maps are one batch, and of each only the hidden cells are kept. Unmasked: all of one map.
        """
        sets, n = masks.shape[:2]
        visible = masks.flatten(0, 1)[:, None].repeat(features.shape[0], 1, 1, 1)  # (N·K·n, 1, g, g)
        seen = features.repeat_interleave(sets * n, 0) * visible
        filling = None if recalled is None else recalled.repeat_interleave(sets * n, 0)
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
