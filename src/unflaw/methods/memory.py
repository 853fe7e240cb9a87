"""A memory of normal tokens: what "global normal semantics" means across pictures (our reading of URA-Net's RAM)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Generator, Tensor, nn

from unflaw.cache import allocate
from unflaw.features import Extractor, FeatureExtractor
from unflaw.methods.layers import coarser, greedy_coreset, largest, to_grid, to_tokens

CHUNK = 256  # tokens compared with the memory at a time: their (256, M) matrix stays in the processor's cache

MOST_TOKENS = 2**20  # that prototypes are chosen among: whole pictures, drawn at random where there are more

FAR = 1e4  # where prototypes lie that are not there: no token comes near


class Memory(nn.Module):
    """M prototypes and attention to them; of several categories M each, of which one is in use.

    Args:
        size: M; fewer tokens are repeated to fill it.
        channels: C.
        sharpness: Attention is softmax(−sharpness · d² / radius²) over the nearest prototypes.
        neighbours: How many. Attention over all of them recalls a blur (docs/research.md).
    """

    def __init__(self, size: int, channels: int, sharpness: float = 2.0, neighbours: int = 8) -> None:
        super().__init__()
        self.sharpness, self.neighbours = sharpness, min(neighbours, size)
        self.prototypes: Tensor
        self.extra: Tensor
        self.radius: Tensor
        self.register_buffer("prototypes", torch.zeros(size, channels))
        self.register_buffer("extra", torch.full((size // 4, channels), FAR))
        self.register_buffer("radius", torch.ones(()))
        # while training: the picture that each prototype comes from; what each category has taught; who is of which
        self.owners: Tensor | None = None
        self._owned: Tensor | None = None  # the picture of each row of then
        self._extended: Tensor | None = None  # the picture that each of `extra` comes from, once there are some
        self._taught: list[tuple[Tensor, Tensor, Tensor]] = []
        self._categories = torch.zeros(0, dtype=torch.long)
        self._pictures: Tensor | None = None  # of the rows to come: which picture each is of, which cells count
        self.valid: Tensor | None = None

    def arrange(self, pictures: Tensor, valid: Tensor | None) -> None:
        """As `Method.arrange`: what a picture taught is left out for all its windows."""
        self._pictures, self.valid = pictures, valid

    @torch.no_grad()
    def fit(self, features: Tensor, rng: Generator, categories: Tensor | None = None) -> None:
        """Chooses the prototypes among all tokens of cached features (N, C, g, g) by k-centre greedy coreset.

        `radius` becomes the median distance of training tokens to the nearest prototype from another picture.

        Args:
            features: Of all training pictures.
            rng: What it draws.
            categories: (N,) int64, the category of each, counted from 0; None: one. Each has prototypes of its own, and
                the first is in use.
        """
        self._categories = torch.zeros(len(features), dtype=torch.long) if categories is None else categories
        self._taught = []
        for category in self._categories.unique().tolist():
            self._fit(features, (self._categories == category).nonzero()[:, 0], rng)
            assert self.owners is not None
            self._taught.append((self.prototypes.clone(), self.owners, self.radius.clone()))
        self.use(0)

    def _fit(self, features: Tensor, pictures: Tensor, rng: Generator) -> None:
        """From some of the pictures, by their rows."""
        n, side = len(pictures), features.shape[-1]
        rows = pictures[torch.randperm(n, generator=rng)[: max(1, MOST_TOKENS // side**2)].sort().values]
        tokens = to_tokens(features[rows].float()).flatten(0, 1)
        owners = rows.repeat_interleave(side**2)
        if self.valid is not None:
            inside = self._inside(rows, side)
            tokens, owners = tokens[inside], owners[inside]
        size = len(self.prototypes)
        chosen = greedy_coreset(tokens, size, rng)
        chosen = chosen.repeat(-(-size // len(chosen)))[:size]
        self.prototypes.copy_(tokens[chosen])
        self.owners = owners[chosen] if self._pictures is None else self._pictures[owners[chosen]]
        self._owned = self._pictures
        self._forget()
        sample = pictures[torch.randperm(n, generator=rng)[: max(2, 2**14 // side**2)]]
        self._taught, taught = [], self._taught  # of those in use, whatever there was before
        distances = self(features[sample].float(), sample)[1].clamp_min(1e-6).flatten()
        if self.valid is not None:
            distances = distances[self._inside(sample, side)]
        self.radius.copy_(distances.median())
        self._taught = taught

    def _inside(self, rows: Tensor, side: int) -> Tensor:
        """(T,) bool, which tokens of some rows count, on a grid of this side."""
        assert self.valid is not None
        valid = self.valid[rows]
        return (valid if valid.shape[-1] == side else coarser(valid)).flatten()

    def use(self, category: int) -> None:
        """While training: what a category has taught comes into use, without what `extend` added."""
        prototypes, self.owners, radius = self._taught[category]
        self.prototypes.copy_(prototypes)
        self.radius.copy_(radius)
        self._forget()

    def _forget(self) -> None:
        """What `extend` added."""
        self.extra.fill_(FAR)
        self._extended = None

    def unit(self, pictures: Tensor | None = None) -> Tensor:
        """`radius`, (1,), or that of the category of each of the training pictures (N,): (N, 1, 1, 1)."""
        if pictures is None or self._extended is not None or len(self._taught) < 2:
            return self.radius
        radii = torch.stack([radius for *_, radius in self._taught])
        return radii[self._categories[pictures]].view(-1, 1, 1, 1).to(self.radius)

    @torch.no_grad()
    def extend(self, features: Tensor, rng: Generator) -> None:
        """Adds prototypes out of held-out pictures, F (N, C, g, g), which calibrate (ours).

        They serve the distance only, which can but fall by them, of every token. From then on `forward` takes rows of
        these pictures, and leaves out what each has added.
        """
        self._forget()
        parts = [to_tokens(part.float()).flatten(0, 1) for part in features.split(8)]
        distance, tokens = torch.cat([self.recall(part)[2] for part in parts]), torch.cat(parts)
        rows = torch.arange(len(features))
        owners = (rows if self._pictures is None else self._pictures).repeat_interleave(features[0, 0].numel())
        if self.valid is not None:
            inside = self._inside(rows, features.shape[-1])
            distance, tokens, owners = distance[inside], tokens[inside], owners[inside]
        unknown = distance.argsort(descending=True)[: 16 * len(self.extra)]
        chosen = unknown[greedy_coreset(tokens[unknown], len(self.extra), rng)]
        self.extra[: len(chosen)] = tokens[chosen]
        self._extended = torch.full((len(self.extra),), -1)
        self._extended[: len(chosen)] = owners[chosen]

    @torch.no_grad()
    def recall_cached(self, features: Tensor, budget: float) -> dict[str, Tensor]:
        """What `forward` says of cached features (N, C, g, g) that `fit` saw, each picture recalled without itself.

        Args:
            features: All of them.
            budget: Recalled features above this many bytes are memory-mapped.

        Returns:
            Tensors to cache: "recalled" (N, C, g, g) float16, "distance" (N, 1, g, g), "picture" (N,).
        """
        recalled, self._folder = allocate(tuple(features.shape), budget)
        distance = torch.empty(len(features), 1, *features.shape[2:])
        pictures = torch.arange(len(features))
        for rows in pictures.split(16):
            mixture, distance[rows], _ = self(features[rows].float(), rows)
            recalled[rows] = mixture.to(recalled.dtype)
        return {"recalled": recalled, "distance": distance, "picture": pictures}

    def recall(self, tokens: Tensor, leave: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(T, C) → attended mixture of prototypes (T, C), distance to the nearest one (T,), and the same with `extra`.

        The mixture is dot-product attention whose keys have the bias −‖p‖²: a soft nearest neighbour that needs no
        training.

        Args:
            tokens: Of any pictures.
            leave: (T, L) training pictures; what these taught the memory is left out for that token, unless it is all.
                The first is the one it belongs to, whose category's prototypes are used, and are in use afterwards.
        """
        if leave is None or self._extended is not None or len(self._taught) < 2:
            return self._recall_all(tokens, leave)
        if not len(tokens):  # asked only while training: a graph must not depend on it
            return self._recall_all(tokens, None)
        of = self._categories[leave[:, 0]]
        rows = [(of == category).nonzero()[:, 0] for category in range(len(self._taught))]
        found = []
        for category, own in enumerate(rows):
            if len(own):
                self.use(category)
                found.append(self._recall_all(tokens[own], leave[own]))
        order = torch.cat(rows).argsort()
        mixture, distance, least = (torch.cat(part)[order] for part in zip(*found, strict=True))
        return mixture, distance, least

    def _recall_all(self, tokens: Tensor, leave: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        keys, extra = _keys(self.prototypes), _keys(self.extra)
        if leave is None or self.owners is None:
            parts = [self._recall(part, keys, extra) for part in _chunks(tokens)]
        else:
            both = zip(tokens.split(CHUNK), leave.split(CHUNK), strict=True)
            parts = [self._recall(part, keys, extra, *self._closed(pictures)) for part, pictures in both]
        mixture, distance, least = (torch.cat(part) for part in zip(*parts, strict=True))
        return mixture, distance, least

    def _closed(self, pictures: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(T, L) pictures → (T, M) bool: the prototypes, or what was added, that these taught, unless that is all."""
        assert self.owners is not None
        if self._extended is not None:
            own = pictures if self._pictures is None else self._pictures[pictures]
            return None, (self._extended == own[..., None]).any(1)
        if self._owned is not None:
            pictures = self._owned[pictures]
        which, row = pictures.unique(dim=0, return_inverse=True)  # many tokens leave out the same
        own = (self.owners == which[..., None]).any(1)
        return (own & ~own.all(1, keepdim=True))[row], None

    def _recall(
        self,
        tokens: Tensor,
        keys: Tensor,
        extra: Tensor,
        closed: Tensor | None = None,
        closed_extra: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`recall` of a chunk. What is near is found by a matrix product; distances are then those of what was found.

        Differences of large squares, as the product gives them, would make small distances vanish in rounding, and
        differently in every runtime.
        """
        closeness = _closeness(tokens, keys)
        if closed is not None:
            closeness = closeness.masked_fill(closed.to(closeness.device), -torch.inf)
        closest, nearest = largest(closeness, self.neighbours)
        weights = (closest * (self.sharpness / self.radius.square())).softmax(1)
        recalled = self.prototypes[nearest]  # (T, k, C)
        mixture = torch.einsum("tk,tkc->tc", weights, recalled)
        least = distance = (tokens - recalled[:, 0]).norm(dim=1)
        if self.extra.shape[0]:
            closeness = _closeness(tokens, extra)
            if closed_extra is not None:
                closeness = closeness.masked_fill(closed_extra.to(closeness.device), -torch.inf)
            best, place = largest(closeness, 1)
            apart = (tokens - self.extra[place[:, 0]]).norm(dim=1)
            if closed_extra is not None:
                apart = apart.masked_fill(best[:, 0] == -torch.inf, torch.inf)
            least = torch.minimum(distance, apart)
        return mixture, distance, least

    def forward(self, features: Tensor, pictures: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """F (N, C, g, g) → what `recall` says of its tokens: (N, C, g, g) and twice (N, 1, g, g).

        Args:
            features: Of any pictures.
            pictures: (N,) rows of the cache that `fit` saw, where they are training pictures (leave one out).
        """
        tokens = to_tokens(features)
        leave = None if pictures is None else pictures.repeat_interleave(tokens.shape[1])[:, None]
        found = self.recall(tokens.flatten(0, 1), leave)
        mixture, *distances = (part.unflatten(0, (features.shape[0], -1)) for part in found)
        distance, least = (to_grid(d[..., None]) for d in distances)
        return to_grid(mixture), distance, least


def _chunks(tokens: Tensor) -> tuple[Tensor, ...]:
    return (tokens,) if torch.compiler.is_exporting() else tokens.split(CHUNK)


def _keys(prototypes: Tensor) -> Tensor:
    """(M, C) → (C + 1, M), so that (t, 1) times it is 2·t·p − ‖p‖² = ‖t‖² − d²: highest for what is nearest."""
    return torch.cat([2 * prototypes, -prototypes.square().sum(1, keepdim=True)], dim=1).T


def _closeness(tokens: Tensor, keys: Tensor) -> Tensor:
    """(T, C) and `_keys` → ‖t‖² − d² (T, M). The term of the token itself changes neither order nor softmax."""
    return torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1) @ keys


class Judge(nn.Module):
    """A memory of whole regions: the coarsest level on half the grid (ours).

    Fine levels say where a small defect is; whether a picture as a whole is normal is better seen in the coarsest one
    (docs/research.md). It has fewer tokens, so more prototypes cost the same. What all regions of a picture have in
    common, such as its exposure, is left out: a region stands out against its own picture.
    """

    def __init__(self, size: int, extractor: Extractor) -> None:
        super().__init__()
        extractor = cast(FeatureExtractor, extractor)  # methods that judge regions have features
        self.memory = Memory(size, extractor.coarse_channels, neighbours=1)
        self._coarsen = extractor.coarsen  # a bound method, so that the extractor is not registered twice

    def fit(self, features: Tensor, rng: Generator, categories: Tensor | None = None) -> None:
        """From cached features F (N, C, g, g), as `Memory.fit`."""
        self.memory.fit(self._all(features), rng, categories)

    def extend(self, features: Tensor, rng: Generator) -> None:
        """As `Memory.extend`."""
        self.memory.extend(self._all(features), rng)

    def forward(self, features: Tensor, pictures: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """F (N, C, g, g) → distance to the nearest region known, (N, 1, ⌈g/2⌉, ⌈g/2⌉).

        Args:
            features, pictures: As for `Memory`.
            valid: (N, g, g) bool, the cells that count; None: all.
        """
        return self.memory(self._regions(features, valid), pictures)[2]

    def _regions(self, features: Tensor, valid: Tensor | None) -> Tensor:
        coarse = self._coarsen(features)
        if valid is None:
            return coarse - coarse.mean((2, 3), keepdim=True)
        counts = coarser(valid)[:, None].to(coarse)
        common = (coarse * counts).sum((2, 3), keepdim=True) / counts.sum((2, 3), keepdim=True).clamp_min(1)
        return coarse - common

    def _all(self, features: Tensor) -> Tensor:
        """Regions of the rows that `Memory.arrange` told of."""
        valid = self.memory.valid
        cells = [None] * len(features.split(32)) if valid is None else valid.split(32)
        return torch.cat(
            [self._regions(part.float(), inside) for part, inside in zip(features.split(32), cells, strict=True)]
        )
