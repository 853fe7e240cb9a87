"""A memory of normal tokens: what "global normal semantics" means across images (our reading of URA-Net's RAM)."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from unflaw.features.cache import allocate
from unflaw.features.extractor import Extractor, FeatureExtractor
from unflaw.methods.layers import coarser, greedy_coreset, largest, to_grid, to_tokens

CHUNK = 256  # tokens compared with the memory at a time: their (256, M) matrix stays in the processor's cache

MOST_TOKENS = 2**20  # that prototypes are chosen among: whole images, drawn at random where there are more

FAR = 1e4  # where prototypes lie that are not there: no token comes near


class Bank(NamedTuple):
    """Prototypes of one category while training.

    Attributes:
        prototypes: (M, C).
        owners: (M,) int64, the image that each prototype comes from; None where that is not known any more.
        radius: (), the median distance of training tokens to the nearest prototype from another image.
    """

    prototypes: Tensor
    owners: Tensor | None
    radius: Tensor


class MemoryBank(nn.Module):
    """M prototypes and attention to them.

    While it is fitted it keeps a `Bank` for each category; its buffers hold those of one (`select_category`).
    Inspection reads the buffers only and changes nothing, so that threads may share it.

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
        self.end_training()

    def end_training(self) -> None:
        """Drops what only training needs: banks, and which image each prototype comes from."""
        self.banks: list[Bank] = []
        self._categories = torch.zeros(0, dtype=torch.long)  # of the rows that `fit` saw
        self._images: Tensor | None = None  # the image that each of these rows shows a window of; None: one each
        self._extra_owners: Tensor | None = None  # (M / 4,), the held-out image that each of `extra` comes from
        self._extra_images: Tensor | None = None  # as `_images`, of the rows that `extend` saw
        self._arranged: Tensor | None = None  # as `_images`, of the rows to come
        self.valid: Tensor | None = None  # of the rows to come: which cells count

    def arrange(self, images: Tensor, valid: Tensor | None) -> None:
        """As `Method.arrange`: what an image taught is left out for all its windows."""
        self._arranged, self.valid = images, valid

    @torch.no_grad()
    def fit(self, features: Tensor, rng: Generator, categories: Tensor | None = None) -> None:
        """Chooses the prototypes among all tokens of cached features (N, C, g, g) by k-centre greedy coreset.

        Args:
            features: Of all training images.
            rng: What it draws.
            categories: (N,) int64, the category of each, counted from 0; None: one. Each has a bank of its own, and
                the buffers hold the first.
        """
        self._categories = torch.zeros(len(features), dtype=torch.long) if categories is None else categories
        self._images, self.banks = self._arranged, []
        for category in self._categories.unique().tolist():
            self.banks.append(self._fit(features, (self._categories == category).nonzero()[:, 0], rng))
        self.select_category(0)

    def _fit(self, features: Tensor, images: Tensor, rng: Generator) -> Bank:
        """From some of the images, by their rows."""
        n, side = len(images), features.shape[-1]
        rows = images[torch.randperm(n, generator=rng)[: max(1, MOST_TOKENS // side**2)].sort().values]
        tokens = to_tokens(features[rows].float()).flatten(0, 1)
        owners = rows.repeat_interleave(side**2)
        if self.valid is not None:
            inside = self._inside(rows, side)
            tokens, owners = tokens[inside], owners[inside]
        size = len(self.prototypes)
        chosen = greedy_coreset(tokens, size, rng)
        chosen = chosen.repeat(-(-size // len(chosen)))[:size]
        owners = owners[chosen] if self._images is None else self._images[owners[chosen]]
        bank = Bank(tokens[chosen], owners, torch.ones(()))
        sample = images[torch.randperm(n, generator=rng)[: max(2, 2**14 // side**2)]]
        asked, own = to_tokens(features[sample].float()).flatten(0, 1), sample.repeat_interleave(side**2)
        distances = self._search(asked, bank, own[:, None], None)[1].clamp_min(1e-6)
        if self.valid is not None:
            distances = distances[self._inside(sample, side)]
        return bank._replace(radius=distances.median())

    def _inside(self, rows: Tensor, side: int) -> Tensor:
        """(T,) bool, which tokens of some rows count, on a grid of this side."""
        assert self.valid is not None
        valid = self.valid[rows]
        return (valid if valid.shape[-1] == side else coarser(valid)).flatten()

    def select_category(self, category: int) -> None:
        """While training: the buffers take the bank of a category, without what `extend` added."""
        self.prototypes.copy_(self.banks[category].prototypes)
        self.radius.copy_(self.banks[category].radius)
        self._forget()

    def _forget(self) -> None:
        """Drops the prototypes that `extend` added."""
        self.extra.fill_(FAR)
        self._extra_owners = self._extra_images = None

    def unit(self, images: Tensor | None = None) -> Tensor:
        """`radius`, (), or that of the category of each of the training images, (N,) or (N, L): (N, 1, 1, 1)."""
        if images is None or len(self.banks) < 2:
            return self.radius
        radii = torch.stack([bank.radius for bank in self.banks])
        first = images if images.ndim == 1 else images[:, 0]
        return radii[self._categories[first]].view(-1, 1, 1, 1).to(self.radius)

    @torch.no_grad()
    def extend(self, features: Tensor, rng: Generator) -> None:
        """Adds prototypes out of held-out images, F (N, C, g, g), which calibrate (ours).

        They serve the distance only, which can but fall by them, of every token. From then on `forward` takes rows of
        these images as `held_out`, and leaves out what each has added.
        """
        self._forget()
        parts = [to_tokens(part.float()).flatten(0, 1) for part in features.split(8)]
        distance, tokens = torch.cat([self.recall(part)[2] for part in parts]), torch.cat(parts)
        rows = torch.arange(len(features))
        self._extra_images = self._arranged
        owners = (rows if self._extra_images is None else self._extra_images).repeat_interleave(features[0, 0].numel())
        if self.valid is not None:
            inside = self._inside(rows, features.shape[-1])
            distance, tokens, owners = distance[inside], tokens[inside], owners[inside]
        unknown = distance.argsort(descending=True)[: 16 * len(self.extra)]
        chosen = unknown[greedy_coreset(tokens[unknown], len(self.extra), rng)]
        self.extra[: len(chosen)] = tokens[chosen]
        self._extra_owners = torch.full((len(self.extra),), -1)
        self._extra_owners[: len(chosen)] = owners[chosen]

    @torch.no_grad()
    def recall_cached(self, features: Tensor, budget: float) -> dict[str, Tensor]:
        """What `forward` says of cached features (N, C, g, g) that `fit` saw, each image recalled without itself.

        Args:
            features: All of them.
            budget: Recalled features above this many bytes are memory-mapped.

        Returns:
            Tensors to cache: "recalled" (N, C, g, g) float16, "distance" (N, 1, g, g), "image" (N,).
        """
        recalled, self._folder = allocate(tuple(features.shape), budget)
        distance = torch.empty(len(features), 1, *features.shape[2:])
        images = torch.arange(len(features))
        for rows in images.split(16):
            mixture, distance[rows], _ = self(features[rows].float(), rows)
            recalled[rows] = mixture.to(recalled.dtype)
        return {"recalled": recalled, "distance": distance, "image": images}

    def recall(
        self, tokens: Tensor, images: Tensor | None = None, held_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, C) → attended mixture of prototypes (T, C), distance to the nearest one (T,), and the same with `extra`.

        The mixture is dot-product attention whose keys have the bias −‖p‖²: a soft nearest neighbour that needs no
        training. The search is made in float32 also under autocast: in bfloat16 neighbours would be others.

        Args:
            tokens: Of any images.
            images: (T, L) rows that `fit` saw; what these images taught the memory is left out for that token, unless
                it is all. The first is the one it belongs to, whose category's prototypes are used.
            held_out: (T,) rows that `extend` saw; what that image added is left out.

        Raises:
            RuntimeError: Such rows are given, but where prototypes come from is not known.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            if images is None or not self.banks:
                return self._search(tokens, Bank(self.prototypes, None, self.radius), images, held_out)
            if len(self.banks) < 2 or not len(tokens):
                return self._search(tokens, self.banks[0], images, held_out)
            of = self._categories[images[:, 0]]
            rows = [(of == category).nonzero()[:, 0] for category in range(len(self.banks))]
            found = [
                self._search(tokens[own], bank, images[own], None if held_out is None else held_out[own])
                for own, bank in zip(rows, self.banks, strict=True)
                if len(own)
            ]
            order = torch.cat(rows).argsort()
            mixture, distance, least = (torch.cat(part)[order] for part in zip(*found, strict=True))
            return mixture, distance, least

    def _search(
        self, tokens: Tensor, bank: Bank, images: Tensor | None, held_out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`recall` with the prototypes of one bank."""
        keys, extra = _keys(bank.prototypes), _keys(self.extra)
        if images is None and held_out is None:
            parts = [self._recall(part, bank, keys, extra) for part in _chunks(tokens)]
        else:
            parts = []
            for rows in torch.arange(len(tokens)).split(CHUNK) or (torch.arange(0),):
                excluded = None if images is None else self._excluded(bank, images[rows])
                own = None if held_out is None else self._excluded_extra(held_out[rows])
                parts.append(self._recall(tokens[rows], bank, keys, extra, excluded, own))
        mixture, distance, least = (torch.cat(part) for part in zip(*parts, strict=True))
        return mixture, distance, least

    def _excluded(self, bank: Bank, rows: Tensor) -> Tensor:
        """(T, L) rows → (T, M) bool: the prototypes of these images, unless that is all."""
        if bank.owners is None:
            raise RuntimeError(
                "leave-one-out needs to know which training image each prototype comes from; a network knows it until "
                "its training has ended, a loaded one never does"
            )
        which, row = (rows if self._images is None else self._images[rows]).unique(dim=0, return_inverse=True)
        own = (bank.owners == which[..., None]).any(1)  # many tokens leave out the same
        return (own & ~own.all(1, keepdim=True))[row]

    def _excluded_extra(self, rows: Tensor) -> Tensor:
        """(T,) rows → (T, M / 4) bool: what these held-out images have added."""
        if self._extra_owners is None:
            raise RuntimeError("held-out images can be left out only once `extend` has seen them")
        return self._extra_owners == (rows if self._extra_images is None else self._extra_images[rows])[:, None]

    def _recall(
        self,
        tokens: Tensor,
        bank: Bank,
        keys: Tensor,
        extra: Tensor,
        excluded: Tensor | None = None,
        excluded_extra: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`recall` of a chunk. What is near is found by a matrix product; distances are then those of what was found.

        Differences of large squares, as the product gives them, would make small distances vanish in rounding, and
        differently in every runtime.
        """
        closeness = _closeness(tokens, keys)
        if excluded is not None:
            closeness = closeness.masked_fill(excluded.to(closeness.device), -torch.inf)
        closest, nearest = largest(closeness, self.neighbours)
        weights = (closest * (self.sharpness / bank.radius.square())).softmax(1)
        recalled = bank.prototypes[nearest]  # (T, k, C)
        mixture = torch.einsum("tk,tkc->tc", weights, recalled)
        least = distance = (tokens - recalled[:, 0]).norm(dim=1)
        if self.extra.shape[0]:
            closeness = _closeness(tokens, extra)
            if excluded_extra is not None:
                closeness = closeness.masked_fill(excluded_extra.to(closeness.device), -torch.inf)
            best, place = largest(closeness, 1)
            apart = (tokens - self.extra[place[:, 0]]).norm(dim=1)
            if excluded_extra is not None:
                apart = apart.masked_fill(best[:, 0] == -torch.inf, torch.inf)
            least = torch.minimum(distance, apart)
        return mixture, distance, least

    def forward(
        self, features: Tensor, images: Tensor | None = None, held_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """F (N, C, g, g) → what `recall` says of its tokens: (N, C, g, g) and twice (N, 1, g, g).

        Args:
            features: Of any images.
            images: (N,) or (N, L) rows that `fit` saw, to be left out; the first is the image's own.
            held_out: (N,) rows that `extend` saw, to be left out.
        """
        tokens = to_tokens(features)
        count = tokens.shape[1]
        if images is not None:
            images = images.view(len(images), -1).repeat_interleave(count, 0)
        if held_out is not None:
            held_out = held_out.repeat_interleave(count)
        found = self.recall(tokens.flatten(0, 1), images, held_out)
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


class RegionalMemoryBank(nn.Module):
    """A memory of whole regions: the coarsest level on half the grid (ours).

    Fine levels say where a small defect is; whether an image as a whole is normal is better seen in the coarsest one
    (docs/research.md). It has fewer tokens, so more prototypes cost the same. What all regions of an image have in
    common, such as its exposure, is left out: a region stands out against its own image.
    """

    def __init__(self, size: int, extractor: Extractor) -> None:
        super().__init__()
        extractor = cast(FeatureExtractor, extractor)  # methods that judge regions have features
        self.memory = MemoryBank(size, extractor.coarse_channels, neighbours=1)
        self._coarsen = extractor.coarsen  # a bound method, so that the extractor is not registered twice

    def fit(self, features: Tensor, rng: Generator, categories: Tensor | None = None) -> None:
        """From cached features F (N, C, g, g), as `MemoryBank.fit`."""
        self.memory.fit(self._all(features), rng, categories)

    def extend(self, features: Tensor, rng: Generator) -> None:
        """As `MemoryBank.extend`."""
        self.memory.extend(self._all(features), rng)

    def forward(
        self,
        features: Tensor,
        images: Tensor | None = None,
        valid: Tensor | None = None,
        held_out: Tensor | None = None,
    ) -> Tensor:
        """F (N, C, g, g) → distance to the nearest region known, (N, 1, ⌈g/2⌉, ⌈g/2⌉).

        Args:
            features, images, held_out: As for `MemoryBank`.
            valid: (N, g, g) bool, the cells that count; None: all.
        """
        return self.memory(self._regions(features, valid), images, held_out)[2]

    def _regions(self, features: Tensor, valid: Tensor | None) -> Tensor:
        coarse = self._coarsen(features)
        if valid is None:
            return coarse - coarse.mean((2, 3), keepdim=True)
        counts = coarser(valid)[:, None].to(coarse)
        common = (coarse * counts).sum((2, 3), keepdim=True) / counts.sum((2, 3), keepdim=True).clamp_min(1)
        return coarse - common

    def _all(self, features: Tensor) -> Tensor:
        """Regions of the rows that `MemoryBank.arrange` told of."""
        valid = self.memory.valid
        cells = [None] * len(features.split(32)) if valid is None else valid.split(32)
        return torch.cat(
            [self._regions(part.float(), inside) for part, inside in zip(features.split(32), cells, strict=True)]
        )
