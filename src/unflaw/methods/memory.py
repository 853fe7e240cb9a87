"""A memory of normal tokens: what "global normal semantics" means across pictures (our reading of URA-Net's RAM)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from unflaw.methods.layers import greedy_coreset, squared_distances, to_tokens

CHUNK = 2048  # tokens compared with the memory at a time: bounds the (tokens, M) matrix to a few dozen megabytes


class Memory(nn.Module):
    """M prototypes out of the tokens of all good pictures, and attention to them.

    Args:
        size: M; fewer tokens are repeated to fill it.
        channels: C.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.prototypes: Tensor
        self.radius: Tensor
        self.register_buffer("prototypes", torch.zeros(size, channels))
        self.register_buffer("radius", torch.ones(()))

    @torch.no_grad()
    def fit(self, features: Tensor, rng: Generator) -> None:
        """Chooses the prototypes among all tokens of cached features (N, C, g, g).

        `radius` becomes the median distance of a sample of tokens to their nearest prototype: the unit of length.
        """
        tokens = to_tokens(features.float()).flatten(0, 1)
        chosen = tokens[greedy_coreset(tokens, len(self.prototypes), rng)]
        self.prototypes.copy_(chosen.repeat(-(-len(self.prototypes) // len(chosen)), 1)[: len(self.prototypes)])
        sample = tokens[torch.randint(len(tokens), (4096,), generator=rng)]
        self.radius.copy_(self.nearest(sample)[0].median())

    def nearest(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(…, C) → distance to the nearest prototype (…), and that prototype (…, C)."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        squared, index = zip(
            *(squared_distances(part, self.prototypes).min(-1) for part in flat.split(CHUNK)), strict=True
        )
        return torch.cat(squared).sqrt().view(tokens.shape[:-1]), self.prototypes[torch.cat(index)].view(tokens.shape)

    def attend(self, tokens: Tensor, sharpness: float) -> Tensor:
        """Attention to the prototypes, softmax(−sharpness·d²/radius²): a soft nearest neighbour, (…, C) → (…, C).

        This is dot-product attention with the bias −‖p‖² of each key; untrained it already restores.
        """
        flat = tokens.reshape(-1, tokens.shape[-1])
        scale = sharpness / self.radius.square()
        bias = -scale * self.prototypes.square().sum(1)
        parts = [
            torch.softmax(torch.addmm(bias, part * (2 * scale), self.prototypes.T), -1) @ self.prototypes
            for part in flat.split(CHUNK)
        ]
        return torch.cat(parts).view(tokens.shape)
