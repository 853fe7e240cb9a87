"""Categories of images, and the split into training and calibration. A single category has the name ""."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unflaw.calibration.drift import Reference
from unflaw.calibration.groups import AUTO, describe_groups, find_groups, name_groups
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


class Resolved(NamedTuple):
    """Images that may take part in a training.

    Attributes:
        train, validation: Training and validation images.
        categories: Category of each.
        groups: Group of each image for which the data set names one.
    """

    train: list[Input]
    validation: list[Input]
    categories: dict[Input, str]
    groups: dict[Input, str]


def resolve_data(data: Data | Mapping[str, Data]) -> Resolved:
    """Returns the images of a data set, or of several categories.

    Raises:
        TrainingError, DatasetError: Unusable data of any category. TypeError: See `inputs`.
    """
    if isinstance(data, Mapping) and not (data and all(data)):
        raise TrainingError("there is no category, or one without a name; give {name: data, …}")
    train: list[Input] = []
    validation: list[Input] = []
    categories: dict[Input, str] = {}
    groups: dict[Input, str] = {}
    for name, given in (data if isinstance(data, Mapping) else {"": data}).items():
        found = load_dataset(given) if isinstance(given, str | Path) else given
        title, images, calibrating = name, list[Input](), list[Input]()
        if isinstance(found, Dataset):
            title = name or found.name
            images += [sample.path for sample in found.train]
            calibrating += [sample.path for sample in found.validation]
            groups |= {sample.path: sample.group for sample in (*found.train, *found.validation) if sample.group}
        else:
            images += inputs(found, f"{name} image".lstrip())
        if title and not images:
            raise TrainingError(f"{title}: there are no good images to train on")
        for path in [*images, *calibrating]:
            if categories.setdefault(path, name) != name:
                raise TrainingError(f"{path}: is in two categories, {categories[path]} and {name}; leave it in one")
        train += images
        validation += calibrating
    return Resolved(train, validation, categories, groups)


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


def with_groups(cache: Cache, pattern: str, named: Mapping[Input, str]) -> tuple[Cache, str]:
    """Returns a cache with the groups of its images, and a sentence on them; see `calibration.groups`.

    Args:
        cache: Good images.
        pattern: `calibration.groups`.
        named: Groups that the data set names.

    Raises:
        TrainingError: See `name_groups`.
    """
    numbers, said = [0] * len(cache), list[str]()
    first = 0
    for category, rows in cache.rows().items():
        heads = cache.heads(rows)
        paths = [cache.paths[row] for row in heads]
        names, how = name_groups(paths, named, pattern), "named"
        if names is not None:
            own = np.unique(names, return_inverse=True)[1]
        elif pattern == AUTO:
            own, how = find_groups(cache.thumbnails[heads].numpy(), paths), "found"
        else:
            own = np.arange(len(heads))
        sentence = describe_groups(how == "named", len(set(own.tolist())), len(heads))
        said += [f"{category}: {sentence}" if category else sentence] if sentence else []
        of = dict(zip(cache.image_numbers[heads].tolist(), own.tolist(), strict=True))
        for row in rows:
            numbers[row] = first + of[int(cache.image_numbers[row])]
        first += len(heads)
    return replace(cache, groups=numbers), "\n".join(said)


def check_groups(train: Sequence[Input], validation: Sequence[Input], pattern: str, named: Mapping[Input, str]) -> None:
    """Raises: TrainingError: A named group is in the training and in the validation part; see also `name_groups`."""
    names = name_groups([*train, *validation], named, pattern)
    learned = dict(zip(names or [], train, strict=False))
    for path, name in zip(validation, (names or [])[len(train) :], strict=False):
        if name in learned:
            raise TrainingError(
                f"{path}: is of the group {name!r} in the validation part, and {learned[name]} of the same group is in "
                "the training part; leave each group in one"
            )


def split_calibration(
    cache: Cache, validation: Cache | None, share: float, budget: float, seed: int = 0
) -> tuple[Cache, dict[str, Cache]]:
    """Splits off the calibration images of each category: its validation part, or without one its last images.

    Args:
        cache: All good images except validation parts.
        validation: Validation parts, if any.
        share: Share of the images of a category to hold out, at least two of them, and whole groups; 0: none.
        budget: See `Cache.take`.
        seed: Seed of the choice of groups.

    Returns:
        Training images, and calibration images by category.

    Raises:
        TrainingError: The share leaves too few images or groups to train on.
    """
    given = {} if validation is None else validation.rows()
    trained: list[int] = []
    calibrating: dict[str, Cache] = {}
    for name, rows in cache.rows().items():
        if validation is not None and name in given:
            calibrating[name] = validation.take(given[name], budget)
        elif share:
            heads = cache.heads(rows)
            groups = [cache.groups[head] for head in heads]
            out = _held_out(groups, max(2, round(share * len(heads))), seed)
            left = sum(group not in out for group in groups)
            if left < 2:
                of = f"{name}: " if name else ""
                if len(set(groups)) < 3 <= len(heads):
                    found = count(len(set(groups)), "group")
                    raise TrainingError(
                        f"{of}all good images make {found}; 3 are needed to train and calibrate, so name smaller ones"
                    )
                raise TrainingError(
                    f"{of}calibration.holdout leaves {count(left, 'image')} to train on; lower it"
                    + ("" if len(set(groups)) == len(heads) else ", or name smaller groups")
                )
            calibrating[name] = cache.take([row for row in rows if cache.groups[row] in out], budget)
            trained += [row for row in rows if cache.groups[row] not in out]
            continue
        trained += rows
    return cache.take(sorted(trained), budget), calibrating


def _held_out(groups: Sequence[int], wanted: int, seed: int) -> set[int]:
    """Chooses two or more groups at random, with at least as many images as wanted.

    Args:
        groups: Group of each image, in random order; if all differ, the last images are chosen.
        wanted: Number of images. Groups with more images than that are chosen last, the smallest first.
        seed: Seed of the choice: the last images would more often be of large groups.
    """
    sizes, out = Counter(groups), set[int]()
    latest = list(dict.fromkeys(reversed(groups)))
    if len(latest) < len(groups):
        latest = np.random.default_rng(seed).permutation(sorted(latest)).tolist()
    for group in sorted(latest, key=lambda group: max(wanted, sizes[group])):
        if len(out) > 1 and sum(sizes[chosen] for chosen in out) >= wanted:
            break
        out.add(group)
    return out


def build_drift_reference(train: Cache, rows: Sequence[int], held: Cache | None, seed: int) -> Reference:
    """Drift reference of a category: its training images, by rows, and its held-out ones, in random order."""
    described = [train.described[train.heads(rows)].numpy()]
    if held is not None:
        described.append(held.described[held.heads()].numpy())
    return Reference(np.random.default_rng(seed).permutation(np.concatenate(described)))
