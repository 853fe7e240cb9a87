"""A memory of normal tokens: what "global normal semantics" means across pictures (our reading of URA-Net's RAM)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from unflaw.methods.layers import greedy_coreset, squared_distances, to_grid, to_tokens

CHUNK = 256  # tokens compared with the memory at a time: their (256, M) matrix stays in the processor's cache

MOST_TOKENS = 2**20  # that prototypes are chosen among: whole pictures, drawn at random where there are more

FAR = 1e4  # where prototypes lie that are not there: no token comes near


class Memory(nn.Module):
    """M prototypes and attention to them.

    Args:
        size: M; fewer tokens are repeated to fill it.
        channels: C.
        sharpness: Attention is softmax(−sharpness · d² / radius²) over prototypes.
    """

    def __init__(self, size: int, channels: int, sharpness: float = 2.0) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.prototypes: Tensor
        self.radius: Tensor
        self.extra: Tensor
        self.register_buffer("prototypes", torch.zeros(size, channels))
        self.register_buffer("extra", torch.full((size // 4, channels), FAR))
        self.limit: Tensor
        self.register_buffer("radius", torch.ones(()))
        self.register_buffer("limit", torch.ones(()))

    @torch.no_grad()
    def fit(self, features: Tensor, rng: Generator) -> None:
        """Chooses the prototypes among all tokens of cached features (N, C, g, g) by k-centre greedy coreset.

        `radius` becomes the median distance of a sample of tokens to the nearest prototype, `limit` its 99th
        percentile: what lies nearer is as normal as a token can be shown to be.
        """
        n, _, side, _ = features.shape
        rows = torch.randperm(n, generator=rng)[: max(1, MOST_TOKENS // side**2)].sort().values
        tokens = to_tokens(features[rows].float()).flatten(0, 1)
        size = len(self.prototypes)
        chosen = tokens[greedy_coreset(tokens, size, rng)]
        self.prototypes.copy_(chosen.repeat(-(-size // len(chosen)), 1)[:size])
        self.extra.fill_(FAR)
        sample = tokens[torch.randint(len(tokens), (4096,), generator=rng)]
        distances = squared_distances(sample, self.prototypes).amin(1).sqrt().clamp_min(1e-6)
        self.radius.copy_(distances.median())
        self.limit.copy_(distances.quantile(0.99))

    @torch.no_grad()
    def extend(self, features: Tensor, rng: Generator) -> None:
        """Adds prototypes out of held-out pictures, F (N, C, g, g), after these have calibrated (ours).

        They serve the distance only, which can but fall by them, of every token. So no picture scores higher than when
        the threshold was set, and the certified false-alarm rate holds; yet what the held-out pictures show is known.
        """
        parts = [to_tokens(part.float()).flatten(0, 1) for part in features.split(8)]
        distance = torch.cat([self.recall(part)[1] for part in parts])
        far = distance.argsort(descending=True)[: 16 * len(self.extra)]
        tokens = torch.cat(parts)[far]
        chosen = tokens[greedy_coreset(tokens, len(self.extra), rng)]
        self.extra[: len(chosen)] = chosen

    def recall(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(T, C) → attended mixture of prototypes (T, C), and distance to the nearest one (T,).

        The mixture is dot-product attention whose keys have the bias −‖p‖²: a soft nearest neighbour that needs no
        training.
        """
        parts = [self._recall(part) for part in tokens.split(CHUNK)]
        return torch.cat([mixture for mixture, _ in parts]), torch.cat([distance for _, distance in parts])

    def _recall(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.sharpness / self.radius.square()
        # −scale · d² but for the term of the token itself, which softmax does not see; one product makes it all
        logits = torch.addmm(-scale * self.prototypes.square().sum(1), tokens * (2 * scale), self.prototypes.T)
        closeness = logits.amax(1) / scale
        if len(self.extra):
            more = torch.addmm(-self.extra.square().sum(1), 2 * tokens, self.extra.T).amax(1)
            closeness = torch.maximum(closeness, more)
        return logits.softmax(1) @ self.prototypes, (tokens.square().sum(1) - closeness).clamp_min(0).sqrt()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """F (N, C, g, g) → recalled (N, C, g, g) and distance (N, 1, g, g)."""
        n = len(features)
        mixture, distance = self.recall(to_tokens(features).flatten(0, 1))
        return to_grid(mixture.unflatten(0, (n, -1))), to_grid(distance.unflatten(0, (n, -1))[..., None])
