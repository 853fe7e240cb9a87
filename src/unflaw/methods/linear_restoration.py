"""The best linear restoration, in closed form: what the networks that restore start training from (ours)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unflaw.methods.layers import to_grid, to_tokens

LIMIT = 5.0  # deviations of a component of a token: what is far from normal has no more say in its surroundings
MOST_PATCHES = 2**16  # that it is fitted to
RIDGE = 1e-3  # of the mean variance of the inputs
LEAST_ENERGY = 1e-9  # of that of the leading component


class LinearRestoration(nn.Module):
    """Patches of F, restored by a linear function of what lies around them.

    1. Patches of p×p cells become tokens (`tokens`).
    2. A convolution with a hole reads the surroundings of each place (`around`): only taps that `taps` allows.
    3. The patch is a linear function of that (`forward`).

    `fit` finds all three in closed form: tokens are principal components of patches, and a ridge regression of rank
    `width` (reduced-rank regression, Izenman 1975) predicts patches from the tokens at the taps. It takes seconds and
    restores as well as hundreds of steps (docs/research.md).

    Args:
        channels: C.
        shape: Rows and columns of the grid.
        patch: p, a divisor of both.
        token_width: Channels of a token; at most C·p² are used.
        width: Channels of the surroundings.
        side: Odd side of the convolution, in taps.
        dilation: Tokens from tap to tap.

    Attributes:
        taps: (side, side), 1 where a tap is used and 0 in the hole; by default everything but the middle.
        scale: Root mean square of each value of a patch, (C·p²,).
    """

    def __init__(
        self,
        channels: int,
        shape: tuple[int, int],
        patch: int,
        token_width: int,
        width: int,
        side: int,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        outputs = channels * patch**2
        if shape[0] % patch or shape[1] % patch:
            raise ValueError(f"the grid of {min(shape)} cells cannot be cut into patches of {patch}; choose a divisor")
        self.patch, self.dilation = patch, dilation
        self.shape = shape[0] // patch, shape[1] // patch  # of the tokens
        self.narrow = nn.Linear(outputs, min(token_width, outputs))
        self.surroundings = nn.Conv2d(
            self.narrow.out_features, width, side, dilation=dilation, padding=side // 2 * dilation
        )
        self.linear = nn.Linear(width, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        taps = torch.ones(side, side)
        taps[side // 2, side // 2] = 0
        self.taps: Tensor
        self.scale: Tensor
        self.register_buffer("taps", taps)
        self.register_buffer("scale", torch.ones(outputs))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Fits all parameters to F (N, C, g, g) of good images."""
        tokens_of_each = self.shape[0] * self.shape[1]
        parts = features[:: -(-features.shape[0] * tokens_of_each // MOST_PATCHES)].split(8)
        n, outputs = sum(map(len, parts)) * tokens_of_each, self.scale.numel()
        covariance = torch.zeros(outputs, outputs)
        for part in parts:
            rows = self.patches(part.float()).flatten(0, 1)
            covariance += rows.T @ rows / n
        self.scale.copy_(covariance.diagonal().sqrt().clamp_min(1e-6))
        self.narrow.weight.copy_(principal_components(covariance, self.narrow.out_features))
        nn.init.zeros_(self.narrow.bias)

        used = self.taps.flatten().nonzero()[:, 0]
        width = self.narrow.out_features
        nn.init.zeros_(self.surroundings.weight)
        nn.init.zeros_(cast(Tensor, self.surroundings.bias))
        nn.init.zeros_(self.linear.weight)
        if not len(used):
            return
        size = width * len(used)
        gram, product = torch.zeros(size, size), torch.zeros(size, outputs)
        for part in parts:
            rows = self.patches(part.float()).flatten(0, 1)
            seen = self._at_taps(self.tokens(part.float()), used)
            gram += seen.T @ seen / n
            product += seen.T @ rows / n
        if not gram.any():  # no tap ever lies on the grid
            return
        rank = min(self.linear.in_features, outputs)
        weights, back = reduced_rank_regression(gram, product, rank)
        kernel = torch.zeros(rank, width, self.taps.numel())
        kernel[..., used] = weights.view(len(used), width, rank).permute(2, 1, 0)
        self.surroundings.weight[:rank] = kernel.unflatten(2, tuple(self.taps.shape))
        self.linear.weight[:, :rank] = back

    def patches(self, features: Tensor) -> Tensor:
        """(N, C, g, g) → (N, T, C·p²)."""
        return to_tokens(F.pixel_unshuffle(features, self.patch))

    def tokens(self, features: Tensor) -> Tensor:
        """(N, C, g, g) → (N, token_width, *shape), within ±`LIMIT` deviations."""
        return to_grid(self.narrow(self.patches(features)).clamp(-LIMIT, LIMIT), self.shape)

    def around(self, tokens: Tensor) -> Tensor:
        """`tokens` → the surroundings of each place, (N, T, width). Nothing in the hole has any influence."""
        conv = self.surroundings
        read = F.conv2d(tokens, conv.weight * self.taps, conv.bias, padding=conv.padding, dilation=conv.dilation)
        return to_tokens(read)

    def forward(self, around: Tensor) -> Tensor:
        """`around` → restored patches (N, T, C·p²)."""
        return self.linear(around)

    def to_features(self, patches: Tensor) -> Tensor:
        """(N, T, C·p²) → (N, C, g, g)."""
        return F.pixel_shuffle(to_grid(patches, self.shape), self.patch)

    def _at_taps(self, tokens: Tensor, used: Tensor) -> Tensor:
        """Input of the taps of `surroundings`, (N, token_width, *shape) → (N·T, taps · token_width)."""
        d, (rows, columns), reach = self.dilation, self.shape, len(self.taps)
        padded = F.pad(tokens, (reach // 2 * d,) * 4)
        places = [(int(tap) // reach * d, int(tap) % reach * d) for tap in used]
        return torch.cat([to_tokens(padded[..., y : y + rows, x : x + columns]) for y, x in places], 2).flatten(0, 1)


def principal_components(covariance: Tensor, width: int) -> Tensor:
    """The leading components of rows with this second moment (D, D), scaled to a mean square of 1: (width, D)."""
    energy, components = torch.linalg.eigh(covariance.double())
    scale = energy[-width:].clamp_min(LEAST_ENERGY * float(energy[-1])).rsqrt()
    return (components[:, -width:] * scale).T.float()


def reduced_rank_regression(gram: Tensor, product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Ridge regression of rank at most `rank` (Izenman 1975), as a product of two matrices.

    Args:
        gram: Mean of x xᵀ, (D, D).
        product: Mean of x yᵀ, (D, E).
        rank: At most E.

    Returns:
        A (D, rank) and B (E, rank): y is predicted as B Aᵀ x, where Aᵀ x has a mean square of 1 in every component.
    """
    ridge = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solved = torch.linalg.solve(ridge, product)
    energy, directions = torch.linalg.eigh((solved.T @ gram @ solved).double())
    root = energy[-rank:].clamp_min(LEAST_ENERGY * float(energy[-1])).sqrt()
    directions = directions[:, -rank:]
    return (solved.double() @ directions / root).float(), (directions * root).float()
