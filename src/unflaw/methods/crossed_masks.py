"""Crossed masks, and the network that restores what they hide: the parts of MFRNet (arXiv 2404.13273), and its options.

In the paper K_i = 1 − M_i: all that a mask hides is kept of its restoration. Ours (`crossed_masks`): a mask also hides
a margin around what is kept, and what the masks hide lies on a regular lattice. The receptive fields of the backbone
reach beyond a cell, so that its neighbours show what is wrong with it; and where surroundings are hidden at random, how
well a place can be restored is random too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from unflaw.config import MethodOptions
from unflaw.io.words import count
from unflaw.methods.layers import Attention, sincos_positions, to_grid, to_tokens
from unflaw.methods.linear_restoration import LinearRestoration

TAPS = 7  # side of the convolution that reads the surroundings of a token


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
