"""Categories of images, and the split into training and calibration. A single category has the name ""."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unflaw.calibration.drift import Reference
from unflaw.calibration.thresholds import Calibration
from unflaw.datasets import Dataset, load_dataset
from unflaw.datasets.samples import distinct
from unflaw.errors import TrainingError
from unflaw.features.cache import Cache
from unflaw.imaging.inputs import ImageLike, Input, inputs
from unflaw.io.brief import brief
from unflaw.io.words import count
from unflaw.methods import Method

Data = str | Path | Dataset | Iterable[ImageLike]  # what `load_dataset` recognises, or images as `inputs` takes them


@brief
class Category(NamedTuple):
    """State of one category of a detector; everything else is shared by its categories."""

    calibration: Calibration
    network: Method  # from `Method.with_category`
    reference: Reference | None = None


def resolve_data(data: Data | Mapping[str, Data]) -> tuple[list[Input], list[Input], dict[Input, str]]:
    """Returns training images, validation images, and the category of each.

    Raises:
        TrainingError, DatasetError: Unusable data of any category. TypeError: See `inputs`.
    """
    if isinstance(data, Mapping) and not (data and all(data)):
        raise TrainingError("there is no category, or one without a name; give {name: data, …}")
    train: list[Input] = []
    validation: list[Input] = []
    categories: dict[Input, str] = {}
    for name, given in (data if isinstance(data, Mapping) else {"": data}).items():
        found = load_dataset(given) if isinstance(given, str | Path) else given
        title, images, calibrating = name, list[Input](), list[Input]()
        if isinstance(found, Dataset):
            title = name or found.name
            images += [sample.path for sample in found.train]
            calibrating += [sample.path for sample in found.validation]
        else:
            images += inputs(found, f"{name} image".lstrip())
        if title and not images:
            raise TrainingError(f"{title}: there are no good images to train on")
        for path in [*images, *calibrating]:
            if categories.setdefault(path, name) != name:
                raise TrainingError(f"{path}: is in two categories, {categories[path]} and {name}; leave it in one")
        train += images
        validation += calibrating
    return train, validation, categories


def without_copies(
    train: Sequence[Input], validation: Sequence[Input], categories: Mapping[Input, str], contents: Mapping[Input, str]
) -> tuple[list[Input], list[Input], list[tuple[str, str]]]:
    """Removes training and validation images that are copies of another file.

    An image that trains and calibrates, or calibrates twice, would score lower than new ones, and the certified rate
    would be wrong.

    Args:
        train, validation: Images.
        categories: Category of each image.
        contents: Keys from `samples.content_keys`.

    Returns:
        The rest of both, and (path, reason) of each removed image.

    Raises:
        TrainingError: Two categories have copies of one image: it would train the shared weights and calibrate.
    """
    copies: dict[Input, Input] = dict(distinct([*train, *validation], contents)[1])
    for path, first in copies.items():
        if categories[first] != categories[path]:
            raise TrainingError(
                f"{path}: is the same image as {first}, but of another category, {categories[path]} and "
                f"{categories[first]}; leave it in one"
            )
    learned = set(train)
    copies |= {path: path for path in validation if path in learned}
    reasons = [(str(path), f"{path}: is the same image as {first} and counts once") for path, first in copies.items()]
    fitting = [path for path in dict.fromkeys(train) if copies.get(path, path) == path]
    return fitting, [path for path in dict.fromkeys(validation) if path not in copies], reasons


def split_calibration(
    cache: Cache, validation: Cache | None, share: float, budget: float
) -> tuple[Cache, dict[str, Cache]]:
    """Splits off the calibration images of each category: its validation part, or without one its last images.

    Args:
        cache: All good images except validation parts.
        validation: Validation parts, if any.
        share: Share of the images of a category to hold out, at least two images; 0: none.
        budget: See `Cache.take`.

    Returns:
        Training images, and calibration images by category.

    Raises:
        TrainingError: The share leaves too few images to train on.
    """
    given = {} if validation is None else validation.rows()
    trained: list[int] = []
    calibrating: dict[str, Cache] = {}
    for name, rows in cache.rows().items():
        first = len(rows)
        if validation is not None and name in given:
            calibrating[name] = validation.take(given[name], budget)
        elif share:
            heads = cache.heads(rows)
            left = len(heads) - max(2, round(share * len(heads)))
            if left < 2:
                of = f"{name}: " if name else ""
                raise TrainingError(f"{of}calibration.holdout leaves {count(left, 'image')} to train on; lower it")
            first = rows.index(heads[left])  # the windows of one image stay together
            calibrating[name] = cache.take(rows[first:], budget)
        trained += rows[:first]
    return cache.take(sorted(trained), budget), calibrating


def build_drift_reference(train: Cache, rows: Sequence[int], held: Cache | None, seed: int) -> Reference:
    """Drift reference of a category: its training images, by rows, and its held-out ones, in random order."""
    described = [train.described[train.heads(rows)].numpy()]
    if held is not None:
        described.append(held.described[held.heads()].numpy())
    return Reference(np.random.default_rng(seed).permutation(np.concatenate(described)))
