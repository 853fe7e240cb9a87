"""Memory of normal tokens: the "global normal semantics" across images of URA-Net's RAM (our reading)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from unflaw.features.cache import allocate
from unflaw.features.extractor import Extractor, FeatureExtractor
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import coarser, greedy_coreset, largest, to_grid, to_tokens

CHUNK = 256  # tokens compared with the memory at a time: their (256, M) matrix stays in the processor's cache
MOST_TOKENS = (
    2**20
)  # tokens that prototypes are chosen from: those of whole images, drawn at random where there are more
FAR = 1e4  # coordinate of missing prototypes, far from every token
DENSITY = 0.25  # share of the spacing of the nearest prototype that is subtracted from the distance to it
CANDIDATES = 4  # nearest prototypes of which one gives the scored distance
SPACED = 4  # nearest other prototypes whose mean distance is the spacing of a prototype


class Retrieved(NamedTuple):
    """Output of a memory for T tokens, or for the cells of N images.

    Attributes:
        mixture: Attended mixture of prototypes, (T, C) or (N, C, g, g).
        distance: To the nearest prototype, (T,) or (N, 1, g, g).
        extended: To the nearest prototype, those added included, likewise.
        scored: The smallest distance to one of the `CANDIDATES` nearest prototypes less `DENSITY` of its spacing, those
            added included, at least 0, likewise: where normal tokens lie far apart, a distance means less (density as
            in REB, arXiv 2308.12577; docs/research.md, section 29). Being a minimum, it does not jump where two
            prototypes are about equally near, which runtimes may order differently.
    """

    mixture: Tensor
    distance: Tensor
    extended: Tensor
    scored: Tensor


class Bank(NamedTuple):
    """Prototypes of one category while training.

    Attributes:
        prototypes: (M, C).
        source_images: (M,) int64, the image that each prototype comes from; None where that is not known any more.
        radius: (), the median distance of training tokens to the nearest prototype from another image.
        spacing: (M,), the mean distance of each prototype to its `SPACED` nearest others.
        nearby: (M, K), distances of each prototype to its nearest others; None where that is not known any more.
        nearby_rows: (M, K) int64, the rows of these others.
    """

    prototypes: Tensor
    source_images: Tensor | None
    radius: Tensor
    spacing: Tensor
    nearby: Tensor | None = None
    nearby_rows: Tensor | None = None

    def spacing_without(self, rows: Tensor, excluded: Tensor | None) -> Tensor:
        """Spacing of prototypes (T, k) as if the excluded ones, (T, M) bool, did not exist, (T, k)."""
        if excluded is None or self.nearby is None or self.nearby_rows is None:
            return self.spacing[rows]
        near = self.nearby_rows[rows]  # (T, k, K)
        others = ~excluded.gather(1, near.flatten(1)).view(near.shape)
        others &= others.cumsum(2) <= SPACED
        return (self.nearby[rows] * others).sum(2) / others.sum(2).clamp_min(1)


class MemoryBank(nn.Module):
    """M prototypes and attention to them.

    During training it keeps a `Bank` for each category; its buffers hold those of one (`select_category`). Inference
    reads the buffers only and changes nothing, so that threads may share it.

    Args:
        size: M; fewer tokens are repeated to fill it.
        channels: C.
        sharpness: Attention is softmax(−sharpness · d² / radius²) over the nearest prototypes.
        neighbours: Number of nearest prototypes. Attention over all of them gives a blur (docs/research.md).
    """

    def __init__(self, size: int, channels: int, sharpness: float = 2.0, neighbours: int = 8) -> None:
        super().__init__()
        self.sharpness, self.neighbours = sharpness, min(neighbours, size)
        self.prototypes: Tensor
        self.added: Tensor
        self.radius: Tensor
        self.register_buffer("prototypes", torch.zeros(size, channels))
        self.register_buffer("added", torch.full((size // 4, channels), FAR))
        self.register_buffer("radius", torch.ones(()))
        self.spacing: Tensor
        self.added_spacing: Tensor
        self.register_buffer("spacing", torch.zeros(size))
        self.register_buffer("added_spacing", torch.zeros(size // 4))
        self.end_training()

    def end_training(self) -> None:
        """Drops the data that only training needs: the banks, and which image each prototype comes from."""
        self.banks: list[Bank] = []
        self._categories = self._origins = self.images = torch.zeros(0, dtype=torch.long)  # of the rows that `fit` saw
        self._added_sources: Tensor | None = None  # (M / 4,), the group that each of `added` comes from
        self._added_origins = self.images  # of the rows that `add_prototypes` saw

    @torch.no_grad()
    def fit(self, data: FeatureSet, rng: Generator) -> None:
        """Chooses the prototypes of each category among all tokens by k-centre greedy coreset.

        The buffers then hold those of the first category.
        """
        rows = torch.zeros(len(data.features), dtype=torch.long)
        self._categories = rows if data.categories is None else data.categories
        self.images, self._origins = data.images, data.origins
        self.banks = []
        for category in self._categories.unique().tolist():
            self.banks.append(self._fit(data, (self._categories == category).nonzero()[:, 0], rng))
        self.select_category(0)

    def _fit(self, data: FeatureSet, own: Tensor, rng: Generator) -> Bank:
        """A bank from the rows `own`."""
        n, cells = len(own), data.features[0, 0].numel()
        rows = own[torch.randperm(n, generator=rng)[: max(1, MOST_TOKENS // cells)].sort().values]
        tokens, source_images, _ = _tokens(data, rows)
        size = len(self.prototypes)
        chosen = greedy_coreset(tokens, size, rng)
        fill = torch.arange(size) % len(chosen)
        apart, others = nearest_others(tokens[chosen], tokens[chosen], 4 * SPACED)
        spacing, chosen = apart[:, :SPACED].mean(1), chosen[fill]
        nearby = (spacing[fill], apart[fill], others[fill])
        bank = Bank(tokens[chosen], source_images[chosen], torch.ones(()), *nearby)
        sample = own[torch.randperm(n, generator=rng)[: max(2, 2**14 // cells)]]
        queries, _, of = _tokens(data, sample)
        return bank._replace(radius=self._search(queries, bank, of[:, None], None)[1].clamp_min(1e-6).median())

    def select_category(self, category: int) -> None:
        """During training: copies the bank of a category to the buffers, without prototypes added later."""
        self.prototypes.copy_(self.banks[category].prototypes)
        self.radius.copy_(self.banks[category].radius)
        self.spacing.copy_(self.banks[category].spacing)
        self.added.fill_(FAR)
        self.added_spacing.zero_()
        self._added_sources = None

    def unit(self, training_rows: Tensor | None = None) -> Tensor:
        """Returns `radius`, (), or for training rows, (N,) or (N, L), that of the category of each, (N, 1, 1, 1)."""
        if training_rows is None or len(self.banks) < 2:
            return self.radius
        radii = torch.stack([bank.radius for bank in self.banks])
        first = training_rows if training_rows.ndim == 1 else training_rows[:, 0]
        return radii[self._categories[first]].view(-1, 1, 1, 1).to(self.radius)

    @torch.no_grad()
    def add_prototypes(self, data: FeatureSet, rng: Generator) -> None:
        """Adds M / 4 prototypes out of held-out images (ours).

        They serve the distances `extended` and `scored` only, which they can only lower. From then on
        `Context.added_rows` excludes prototypes from some of these images.
        """
        self.added.fill_(FAR)
        tokens, source_images, _ = _tokens(data, torch.arange(len(data.features)))
        distance = torch.cat([self.retrieve(part).extended for part in tokens.split(2**13)])
        unknown = distance.argsort(descending=True)[: 16 * len(self.added)]
        chosen = unknown[greedy_coreset(tokens[unknown], len(self.added), rng)]
        self.added[: len(chosen)] = tokens[chosen]
        others = torch.cat([self.prototypes, tokens[chosen]])
        self.added_spacing[: len(chosen)] = nearest_others(tokens[chosen], others, SPACED)[0].mean(1)
        self._added_origins = data.origins
        self._added_sources = torch.full((len(self.added),), -1)
        self._added_sources[: len(chosen)] = source_images[chosen]

    @torch.no_grad()
    def teach(self, data: FeatureSet, rng: Generator) -> int:
        """Adds what is unlike the memory in images that a person calls good (ours); `added` grows.

        Tokens further away than training images usually are from each other (`radius`) are new; a coreset of them,
        at most M / 8, is added. Distances can only fall.

        Returns:
            Number of prototypes added.

        Raises:
            ValueError: The memory has been taught as much as it can hold, M prototypes in all.
        """
        tokens, _, _ = _tokens(data, torch.arange(len(data.features)))
        distance = torch.cat([self.retrieve(part).extended for part in tokens.split(2**13)])
        unknown = distance.argsort(descending=True)[: int((distance > self.radius).sum())][: 16 * len(self.prototypes)]
        size = min(len(unknown), max(1, len(self.prototypes) // 8))
        if not size:
            return 0
        if len(self.added) + size > len(self.prototypes):
            raise ValueError("the memory has been taught all it can hold; train again with these images")
        chosen = tokens[unknown[greedy_coreset(tokens[unknown], size, rng)]]
        others = torch.cat([self.prototypes, self.added, chosen])
        spacing = nearest_others(chosen, others, SPACED)[0].mean(1)
        self.added = torch.cat([self.added, chosen])
        self.added_spacing = torch.cat([self.added_spacing, spacing])
        return len(chosen)

    @torch.no_grad()
    def retrieve_cached(self, features: Tensor, budget: float) -> dict[str, Tensor]:
        """Output of `forward` for the features that `fit` saw, each image without its own prototypes.

        Args:
            features: F (N, C, g, g), all of them.
            budget: Retrieved features above this many bytes are memory-mapped.

        Returns:
            Tensors to cache: "retrieved" (N, C, g, g) float16, "distance" (N, 1, g, g), "row" (N,).
        """
        retrieved, self._file = allocate(tuple(features.shape), budget)
        distance = torch.empty(len(features), 1, *features.shape[2:])
        for rows in torch.arange(len(features)).split(16):
            found = self(features[rows].float(), Context(training_rows=rows))
            retrieved[rows], distance[rows] = found.mixture.to(retrieved.dtype), found.distance
        return {"retrieved": retrieved, "distance": distance, "row": torch.arange(len(features))}

    def retrieve(
        self, tokens: Tensor, training_rows: Tensor | None = None, added_rows: Tensor | None = None
    ) -> Retrieved:
        """Attention to the nearest prototypes, and distances.

        The mixture is dot-product attention whose keys have the bias −‖p‖²: a soft nearest neighbour that needs no
        training. The search is made in float32 also under autocast: in bfloat16 neighbours would be others.

        Args:
            tokens: (T, C).
            training_rows: (T, L) rows that `fit` saw. Prototypes from their images are excluded for that token, unless
                these are all prototypes. The category of the first row is searched.
            added_rows: (T,) rows that `add_prototypes` saw; prototypes that their images added are excluded.

        Raises:
            RuntimeError: Rows are given, but where prototypes come from is not known.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            if training_rows is None or not self.banks:
                bank = Bank(self.prototypes, None, self.radius, self.spacing)
                return self._search(tokens, bank, training_rows, added_rows)
            if len(self.banks) < 2 or not len(tokens):
                return self._search(tokens, self.banks[0], training_rows, added_rows)
            of = self._categories[training_rows[:, 0]]
            rows = [(of == category).nonzero()[:, 0] for category in range(len(self.banks))]
            found = [
                self._search(tokens[own], bank, training_rows[own], None if added_rows is None else added_rows[own])
                for own, bank in zip(rows, self.banks, strict=True)
                if len(own)
            ]
            order = torch.cat(rows).argsort()
            return Retrieved(*(torch.cat(part)[order] for part in zip(*found, strict=True)))

    def _search(self, tokens: Tensor, bank: Bank, training_rows: Tensor | None, added_rows: Tensor | None) -> Retrieved:
        """`retrieve` with the prototypes of one bank."""
        keys, added_keys = _keys(bank.prototypes), _keys(self.added)
        if training_rows is None and added_rows is None:
            parts = [self._search_chunk(part, bank, keys, added_keys) for part in _chunks(tokens)]
        else:
            parts = []
            for rows in torch.arange(len(tokens)).split(CHUNK) or (torch.arange(0),):
                excluded = None if training_rows is None else self._excluded(bank, training_rows[rows])
                excluded_added = None if added_rows is None else self._excluded_added(added_rows[rows])
                parts.append(self._search_chunk(tokens[rows], bank, keys, added_keys, excluded, excluded_added))
        return Retrieved(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _excluded(self, bank: Bank, rows: Tensor) -> Tensor:
        """(T, L) rows → (T, M) bool, the prototypes of their images, unless these are all prototypes."""
        if bank.source_images is None:
            raise RuntimeError(
                "leave-one-out needs to know which training image each prototype comes from; a network knows it until "
                "its training has ended, a loaded one never does"
            )
        images, inverse = self._origins[rows].unique(dim=0, return_inverse=True)
        own = (bank.source_images == images[..., None]).any(1)  # many tokens exclude the same images
        return (own & ~own.all(1, keepdim=True))[inverse]

    def _excluded_added(self, rows: Tensor) -> Tensor:
        """(T,) rows → (T, M / 4) bool, the prototypes that their images have added."""
        if self._added_sources is None:
            raise RuntimeError("held-out images can be excluded only once `add_prototypes` has seen them")
        return self._added_sources == self._added_origins[rows][:, None]

    def _search_chunk(
        self,
        tokens: Tensor,
        bank: Bank,
        keys: Tensor,
        added_keys: Tensor,
        excluded: Tensor | None = None,
        excluded_added: Tensor | None = None,
    ) -> Retrieved:
        """`retrieve` of a chunk. Neighbours are found by a matrix product; distances are computed from differences.

        The product gives differences of large squares: small distances would vanish in rounding, and differently in
        every runtime.
        """
        closeness = _closeness(tokens, keys)
        if excluded is not None:
            closeness = closeness.masked_fill(excluded.to(closeness.device), -torch.inf)
        k = self.neighbours
        closest, nearest = largest(closeness, min(max(k, CANDIDATES), closeness.shape[1]))
        weights = (closest[:, :k] * (self.sharpness / bank.radius.square())).softmax(1)
        neighbours = bank.prototypes[nearest]  # (T, k, C)
        mixture = torch.einsum("tk,tkc->tc", weights, neighbours[:, :k])
        apart = (tokens[:, None] - neighbours[:, :CANDIDATES]).norm(dim=2)
        extended = distance = apart[:, 0]
        candidates = apart - DENSITY * bank.spacing_without(nearest[:, :CANDIDATES], excluded)
        if excluded is not None:  # the nearest one is never excluded
            candidates = candidates.masked_fill(closest[:, :CANDIDATES] == -torch.inf, torch.inf)
        scored = candidates.amin(1)
        if self.added.shape[0]:
            closeness = _closeness(tokens, added_keys)
            if excluded_added is not None:
                closeness = closeness.masked_fill(excluded_added.to(closeness.device), -torch.inf)
            best, place = largest(closeness, min(CANDIDATES, closeness.shape[1]))
            apart = (tokens[:, None] - self.added[place]).norm(dim=2)
            if excluded_added is not None:
                apart = apart.masked_fill(best == -torch.inf, torch.inf)
            extended = torch.minimum(distance, apart[:, 0])
            scored = torch.minimum(scored, (apart - DENSITY * self.added_spacing[place]).amin(1))
        return Retrieved(mixture, distance, extended, scored.clamp_min(0))

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Retrieved:
        """F (N, C, g, g) → output of `retrieve` for its tokens, on the grid."""
        tokens, training_rows, added_rows = to_tokens(features), context.training_rows, context.added_rows
        cells = tokens.shape[1]
        if training_rows is not None:
            training_rows = training_rows.view(len(training_rows), -1).repeat_interleave(cells, 0)
        if added_rows is not None:
            added_rows = added_rows.repeat_interleave(cells)
        found = self.retrieve(tokens.flatten(0, 1), training_rows, added_rows)
        mixture, *distances = (part.unflatten(0, (features.shape[0], -1)) for part in found)
        shape = features.shape[2:]
        return Retrieved(to_grid(mixture, shape), *(to_grid(distance[..., None], shape) for distance in distances))


def nearest_others(prototypes: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest others of each prototype: distances and rows of `others`, (M, k); of a single one, 0 and itself.

    Args:
        prototypes: (M, C).
        others: (K, C), the prototypes themselves among them. Where there are fewer than k, all of them are returned.
    """
    if len(others) < 2:
        return torch.zeros(len(prototypes), 1), torch.zeros(len(prototypes), 1, dtype=torch.long)
    keys, k = _keys(others), min(k, len(others) - 1)
    rows = torch.cat([largest(_closeness(part, keys), k + 1)[1][:, 1:] for part in prototypes.split(CHUNK)])
    distances = [
        (p[:, None] - others[r]).norm(dim=2) for p, r in zip(prototypes.split(16), rows.split(16), strict=True)
    ]
    return torch.cat(distances), rows


def _tokens(data: FeatureSet, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of some rows that count, (T, C) float32, and the image and the row of each, (T,)."""
    of = rows.repeat_interleave(data.features[0, 0].numel())
    tokens = to_tokens(data.features[rows].float()).flatten(0, 1)
    if data.valid is not None:
        inside = data.valid[rows].flatten()
        tokens, of = tokens[inside], of[inside]
    return tokens, data.origins[of], of


def _chunks(tokens: Tensor) -> tuple[Tensor, ...]:
    return (tokens,) if torch.compiler.is_exporting() else tokens.split(CHUNK)


def _keys(prototypes: Tensor) -> Tensor:
    """(M, C) → (C + 1, M), so that (t, 1) times it is 2·t·p − ‖p‖² = ‖t‖² − d²: highest for what is nearest."""
    return torch.cat([2 * prototypes, -prototypes.square().sum(1, keepdim=True)], dim=1).T


def _closeness(tokens: Tensor, keys: Tensor) -> Tensor:
    """(T, C) and `_keys` → ‖t‖² − d² (T, M). The term of the token itself changes neither order nor softmax."""
    return torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1) @ keys


class RegionalMemoryBank(nn.Module):
    """Memory of whole regions: the coarsest level on half the grid (ours).

    Fine levels show where a small defect is; the coarsest one shows better whether an image as a whole is normal
    (docs/research.md). It has fewer tokens, so more prototypes cost the same. The mean over all regions of an image,
    such as its exposure, is subtracted: a region is compared with its own image.
    """

    def __init__(self, size: int, extractor: Extractor) -> None:
        super().__init__()
        extractor = cast(FeatureExtractor, extractor)  # methods with a regional memory have features
        self.memory = MemoryBank(size, extractor.regional_channels, neighbours=1)
        self._coarsen = extractor.to_regions  # a bound method, so that the extractor is not registered twice

    def fit(self, data: FeatureSet, rng: Generator) -> None:
        """Calls `MemoryBank.fit` with the regions of features F."""
        self.memory.fit(self._regional(data), rng)

    def add_prototypes(self, data: FeatureSet, rng: Generator) -> None:
        """Calls `MemoryBank.add_prototypes` with the regions of features F."""
        self.memory.add_prototypes(self._regional(data), rng)

    def teach(self, data: FeatureSet, rng: Generator) -> int:
        """Calls `MemoryBank.teach` with the regions of features F."""
        return self.memory.teach(self._regional(data), rng)

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Tensor:
        """F (N, C, g, g) → distance to the nearest known region as it is scored, (N, 1, ⌈g/2⌉, ⌈g/2⌉)."""
        return cast(Retrieved, self.memory(self._regions(features, context.valid), context)).scored

    def _regions(self, features: Tensor, valid: Tensor | None) -> Tensor:
        coarse = self._coarsen(features)
        if valid is None:
            return coarse - coarse.mean((2, 3), keepdim=True)
        counts = coarser(valid)[:, None].to(coarse)
        common = (coarse * counts).sum((2, 3), keepdim=True) / counts.sum((2, 3), keepdim=True).clamp_min(1)
        return coarse - common

    @torch.no_grad()
    def _regional(self, data: FeatureSet) -> FeatureSet:
        """The same set with regions for features."""
        parts = torch.arange(len(data.features)).split(32)
        regions = [
            self._regions(data.features[r].float(), None if data.valid is None else data.valid[r]) for r in parts
        ]
        return replace(data, features=torch.cat(regions), valid=None if data.valid is None else coarser(data.valid))
