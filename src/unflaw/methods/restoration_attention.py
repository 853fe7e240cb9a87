"""RAM, the restoration attention of URA-Net (arXiv 2603.22840), and its options.

Our reading of restoration "from global normal semantics": no place takes part in its own restoration.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unflaw.config import Settings
from unflaw.methods.layers import attend, sincos_positions, to_tokens
from unflaw.methods.linear_restoration import LinearRestoration

TAPS = 5  # side of the convolution that reads the surroundings of a token


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
        shape: Rows and columns of the grid.
        options: Sizes and switches.
        patch, gap: Instead of those of the options. The gap is at most half the shorter side, in tokens.
    """

    def __init__(self, channels: int, shape: tuple[int, int], options: Restoration, patch: int, gap: int) -> None:
        super().__init__()
        width, outputs = options.width, channels * patch * patch
        gap = min(gap, min(shape) // patch // 2)
        self.masked = options.masked
        self.linear = LinearRestoration(channels, shape, patch, options.token_width, width, TAPS, max(gap, 1))
        self.linear.taps[TAPS // 2, TAPS // 2] = float(gap == 0)
        token_width = self.linear.narrow.out_features
        self.locate = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(RestorationBlock(width, options.heads, token_width) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, outputs)
        for part in (self.locate.weight, self.widen.weight, self.widen.bias):
            nn.init.zeros_(part)

        tokens = self.linear.shape
        rows, columns = torch.arange(tokens[0]).repeat_interleave(tokens[1]), torch.arange(tokens[1]).repeat(tokens[0])
        apart = torch.maximum(*((place[:, None] - place).abs() for place in (rows, columns)))
        self.positions: Tensor
        self.far: Tensor
        self.register_buffer("positions", sincos_positions(tokens, width), persistent=False)
        self.register_buffer("far", apart >= gap, persistent=False)  # (T, T)

    def fit(self, features: Tensor) -> None:
        """Fits the linear part to F (N, C, g, g) of good images, in closed form (`LinearRestoration`)."""
        self.linear.fit(features)

    def forward(self, features: Tensor, marked: Tensor) -> Tensor:
        """F (N, C, g, g) and marks (N, 1, g, g) in {0, 1} → F̂ (N, C, g, g)."""
        hidden = F.max_pool2d(marked, self.linear.patch)  # a patch is marked if any of its cells is
        content = self.linear.tokens(features)
        around = self.linear.around(content)
        x, tokens = around + self.locate(self.positions), to_tokens(content)
        allowed = self.far[None, None]
        if self.masked:
            seen = allowed & (hidden.flatten(1) == 0)[:, None, None, :]
            allowed = seen | (allowed & ~seen.any(-1, keepdim=True))  # all marked: rather from these than from nothing
        for block in self.blocks:
            x = block(x, tokens, allowed)
        return self.linear.to_features(self.linear(around) + self.widen(self.norm(x)) * self.linear.scale)
