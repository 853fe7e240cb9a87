"""Arguments of methods: cached features to learn from, and facts about the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureSet:
    """Cached features of good images; an image in tiles has a row for each of its windows.

    Attributes:
        features: F (N, C, g, g) float16.
        images: (N,) int64, the number of the image that each row shows.
        valid: (N, g, g) bool, the cells that cover the image; None: all.
        categories: (N,) int64, the category of each row, counted from 0; None: one category.
        groups: (N,) int64, the group of each row: what is compared without an image is compared without its group.
            None: every image is its own.
        textures: F of texture images (K, C, g, g), for methods that use them.
    """

    features: Tensor
    images: Tensor
    valid: Tensor | None = None
    categories: Tensor | None = None
    textures: Tensor | None = None
    groups: Tensor | None = None

    @property
    def origins(self) -> Tensor:
        """(N,) what is excluded together: `groups`, or images where there are none."""
        return self.images if self.groups is None else self.groups

    @classmethod
    def of(cls, features: Tensor, **others: Tensor | None) -> FeatureSet:
        """A set in which every row is an image of its own."""
        return cls(features, torch.arange(len(features)), **others)


def joined(parts: Sequence[FeatureSet]) -> FeatureSet:
    """Several sets of one category as one; images and groups of different sets are different."""
    images, groups, first = [], [], 0
    for part in parts:
        images.append(part.images + first)
        groups.append(part.origins + first)
        first += int(max(part.images.max(), part.origins.max())) + 1
    valid = None if parts[0].valid is None else torch.cat([part.valid for part in parts if part.valid is not None])
    return FeatureSet(torch.cat([part.features for part in parts]), torch.cat(images), valid, groups=torch.cat(groups))


@dataclass(frozen=True)
class Context:
    """Facts about the N images of a batch; by default they are new images, and all of their cells count.

    Attributes:
        valid: (N, g, g) bool, the cells that count; None: all.
        training_rows: Rows of the `FeatureSet` that `Method.fit_memory` saw, (N,) or (N, L), where these are training
            images. Prototypes from them are excluded, so that the images score as new good ones do. The first row is
            the image's own; further ones are of images that its features were altered with.
        added_rows: (N,) rows of the `FeatureSet` that `Method.add_prototypes` saw; prototypes from them are excluded.
    """

    valid: Tensor | None = None
    training_rows: Tensor | None = None
    added_rows: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> Context:
        """The context of some of the images."""
        parts = (self.valid, self.training_rows, self.added_rows)
        return Context(*(None if part is None else part[rows] for part in parts))


NEW_IMAGES = Context()
