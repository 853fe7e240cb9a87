"""RAM, the restoration attention of URA-Net (arXiv 2603.22840), and its options.

Our reading of restoration "from global normal semantics": no place takes part in its own restoration.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unflaw.config import Settings
from unflaw.methods.layers import attend, sincos_positions, to_grid, to_tokens

TAPS = 5  # side of the convolution that reads the surroundings of a token
LIMIT = 5.0  # deviations of a component of a token: what is far from normal has no more say in its surroundings
MOST_PATCHES = 2**16  # that the linear restoration is fitted to


class Restoration(Settings):
    """RAM: restoration attention."""

    patch: int = Field(2, ge=1, le=256, description="side of a token in feature cells")
    token_width: int = Field(128, ge=4, le=8192, description="channels of a token")
    width: int = Field(192, ge=4, le=8192, multiple_of=4, description="channels of the surroundings of a token")
    depth: int = Field(2, ge=0, le=64, description="blocks of attention and feed-forward part")
    heads: int = Field(4, ge=1, le=1024)
    gap: int = Field(
        2,
        ge=0,
        le=64,
        description="a token is restored from those at least this many tokens away; 0: from all, itself too",
    )
    masked: bool = Field(True, description="keys only where M_final marks nothing; False: from marked ones as well")
    regional: bool = Field(False, description="a second restoration, of whole regions, for image score and map")
    regional_gap: int = Field(5, ge=0, le=64, description="as `gap`, in regions of two cells")
    prototypes: int = Field(4096, ge=0, le=10_000_000, description="memory of normal tokens across images; 0: none")
    regional_prototypes: int = Field(
        16384, ge=0, le=10_000_000, description="size of the memory of whole regions, for image score and map; 0: none"
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> Restoration:
        if self.width % self.heads:
            raise ValueError(f"the width of {self.width} cannot be cut into {self.heads} heads; choose a divisor")
        return self


class RestorationBlock(nn.Module):
    """Attention from the surroundings of each place to the tokens that it may see, and a feed-forward part.

    Queries are of surroundings; keys and values are of tokens. Tokens do not change from block to block: what a place
    learns from others holds nothing that these have learned from it.

    Args:
        width, heads: Of the surroundings, width divisible by the number of heads.
        token_width: Of the tokens.
    """

    def __init__(self, width: int, heads: int, token_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.keys_values = nn.Linear(width, width), nn.Linear(token_width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, tokens: Tensor, allowed: Tensor) -> Tensor:
        """x (N, T, width), tokens (N, T, token_width) → (N, T, width).

        `allowed` is broadcastable to (N, heads, T, T) bool: True where a place may see a token.
        """
        n, t, width = x.shape
        q = self.query(self.norm1(x)).view(n, t, self.heads, -1).transpose(1, 2)
        k, v = self.keys_values(tokens).view(n, t, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(q, k, v, allowed).transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


class RAM(nn.Module):
    """Restoration attention: each place is restored from the rest of the image, and from nothing of the place itself.

    1. Patches of p×p cells become tokens.
    2. A convolution of 5×5 taps that are `gap` tokens apart, without the one in the middle, reads the surroundings.
    3. Attention finds tokens of the image that fit these surroundings, among those at least `gap` tokens away that are
       not marked (`RestorationBlock`).
    4. F̂ is predicted from both. No cell of F is passed on as it is, so an anomaly cannot be copied, marked or not.

    The backbone's receptive fields reach into neighbouring cells: a gap of 1 would let a place be read off there.

    Marked tokens are left out of attention, and not of the surroundings: a mask token in their place cost up to .1 of
    AUPRO there, where much is marked (docs/research.md). Training alters the surroundings instead, so that anomalies
    in them have little influence.

    Training starts at the best linear restoration (`fit`); attention learns what that lacks.

    Args:
        channels: C.
        grid: g.
        options: Sizes and switches.
        patch, gap: Instead of those of the options. A gap larger than half the side of the tokens is taken as that.
    """

    def __init__(self, channels: int, grid: int, options: Restoration, patch: int, gap: int) -> None:
        super().__init__()
        width, outputs = options.width, channels * patch * patch
        if grid % patch:
            raise ValueError(f"the grid of {grid} cells cannot be cut into patches of {patch}; choose a divisor")
        self.patch, self.masked, side = patch, options.masked, grid // patch
        token_width = min(options.token_width, outputs)
        gap = min(gap, side // 2)
        self.dilation = max(gap, 1)
        self.narrow = nn.Linear(outputs, token_width)
        self.surroundings = nn.Conv2d(token_width, width, TAPS, dilation=self.dilation, padding=2 * self.dilation)
        self.linear = nn.Linear(width, outputs)
        self.locate = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(RestorationBlock(width, options.heads, token_width) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, outputs)
        for part in (self.locate.weight, self.linear.weight, self.linear.bias, self.widen.weight, self.widen.bias):
            nn.init.zeros_(part)

        taps, axis = torch.ones(TAPS, TAPS), torch.arange(side)
        taps[TAPS // 2, TAPS // 2] = float(gap == 0)
        rows, columns = axis.repeat_interleave(side), axis.repeat(side)
        apart = torch.maximum(*((place[:, None] - place).abs() for place in (rows, columns)))
        self.positions: Tensor
        self.taps: Tensor
        self.far: Tensor
        self.scale: Tensor
        self.register_buffer("positions", sincos_positions(side, width), persistent=False)
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("far", apart >= gap, persistent=False)  # (T, T)
        self.register_buffer("scale", torch.ones(outputs))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Fits the linear part to F (N, C, g, g) of good images, in closed form.

        Tokens are principal components of patches; a ridge regression of rank `width` predicts a patch from the tokens
        at the taps. It takes seconds and restores as well as hundreds of steps (docs/research.md).
        """
        patches = F.pixel_unshuffle(features[:: -(-features.shape[0] * self.far.shape[0] // MOST_PATCHES)], self.patch)
        parts = patches.split(8)
        n, outputs = patches[:, 0].numel(), patches.shape[1]
        covariance = torch.zeros(outputs, outputs)
        for part in parts:
            rows = to_tokens(part.float()).flatten(0, 1)
            covariance += rows.T @ rows / n
        self.scale.copy_(covariance.diagonal().sqrt().clamp_min(1e-6))
        energy, components = torch.linalg.eigh(covariance.double())
        width = self.narrow.out_features
        components = components[:, -width:] * energy[-width:].clamp_min(1e-9 * float(energy[-1])).rsqrt()
        self.narrow.weight.copy_(components.T)
        nn.init.zeros_(self.narrow.bias)

        used = self.taps.flatten().nonzero()[:, 0]
        size = width * len(used)
        gram, product = torch.zeros(size, size), torch.zeros(size, outputs)
        for part in parts:
            rows = to_tokens(part.float()).flatten(0, 1)
            seen = self._at_taps(self._tokens(part.float()), used)
            gram += seen.T @ seen / n
            product += seen.T @ rows / n
        ridge = gram + 1e-3 * gram.diagonal().mean() * torch.eye(size)
        solved = torch.linalg.solve(ridge, product)
        energy, directions = torch.linalg.eigh((solved.T @ gram @ solved).double())
        rank = min(self.linear.in_features, outputs)
        root = energy[-rank:].clamp_min(1e-9 * float(energy[-1])).sqrt()
        weights = (solved.double() @ directions[:, -rank:] / root).float()  # (size, rank), of outputs of variance 1
        kernel = torch.zeros(rank, width, TAPS * TAPS)
        kernel[..., used] = weights.view(len(used), width, rank).permute(2, 1, 0)
        self.surroundings.weight[:rank] = kernel.unflatten(2, (TAPS, TAPS))
        nn.init.zeros_(cast(Tensor, self.surroundings.bias))
        self.linear.weight[:, :rank] = (directions[:, -rank:] * root).float()

    def _tokens(self, patches: Tensor) -> Tensor:
        """Patches (N, C·p², side, side) → tokens (N, token_width, side, side)."""
        return to_grid(self.narrow(to_tokens(patches)).clamp(-LIMIT, LIMIT))

    def _at_taps(self, content: Tensor, used: Tensor) -> Tensor:
        """Input of the taps of `surroundings`, (N, token_width, side, side) → (N·T, taps · token_width)."""
        d, side = self.dilation, content.shape[-1]
        padded = F.pad(content, (2 * d,) * 4)
        places = [(int(tap) // TAPS * d, int(tap) % TAPS * d) for tap in used]
        return torch.cat([to_tokens(padded[..., y : y + side, x : x + side]) for y, x in places], dim=2).flatten(0, 1)

    def forward(self, features: Tensor, marked: Tensor) -> Tensor:
        """F (N, C, g, g) and marks (N, 1, g, g) in {0, 1} → F̂ (N, C, g, g)."""
        hidden = F.max_pool2d(marked, self.patch)  # (N, 1, side, side): a patch is marked if any of its cells is
        content = self._tokens(F.pixel_unshuffle(features, self.patch))
        d, ring = self.dilation, self.surroundings
        around = to_tokens(F.conv2d(content, ring.weight * self.taps, ring.bias, padding=2 * d, dilation=d))
        x, tokens = around + self.locate(self.positions), to_tokens(content)
        allowed = self.far[None, None]
        if self.masked:
            seen = allowed & (hidden.flatten(1) == 0)[:, None, None, :]
            allowed = seen | (allowed & ~seen.any(-1, keepdim=True))  # all marked: rather from these than from nothing
        for block in self.blocks:
            x = block(x, tokens, allowed)
        restored = self.linear(around) + self.widen(self.norm(x)) * self.scale
        return F.pixel_shuffle(to_grid(restored), self.patch)
