"""Checks of a data set once it is listed: masks, and files that are there twice."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from unflaw.datasets.samples import Sample, relative, sha256_if_readable, some
from unflaw.errors import ImageError
from unflaw.imaging.reading import image_size, read_mask
from unflaw.io.words import count

# A mask that marks more than this share of its image, or of the border of its image, may be inverted
_AREA, _BORDER = 0.5, 0.9
_MASK = r"(?:masks?|gts?|ground[-_ ]?truth)"
_GONE = "There is no such mask"


def check_masks(samples: list[Sample], root: Path) -> tuple[list[Sample], list[str]]:
    """The samples without the masks that cannot be used, and what is wrong, a sentence each.

    Masks of good images are left out, too. Masks that may be inverted are reported, and used as they are: per kind of
    defect, where half of them or more mark more than half of the image or nearly all of its border.
    """
    wrong: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, list[tuple[Sample, bool]]] = defaultdict(list)
    any_masks = any(sample.mask for sample in samples if sample.label)
    checked = []
    for sample in samples:
        reason, mask = _looked_at(sample, any_masks)
        if reason:
            of = f"{relative(sample.mask, root)} of " if sample.mask and reason == _GONE else ""
            wrong[reason].append(of + relative(sample.path, root))
        if sample.label and mask is not None and not reason:
            kinds[sample.defect].append((sample, _is_implausible(mask)))
        drop = reason or not sample.label
        checked.append(replace(sample, mask=None, regions=()) if drop else sample)
    problems = [f"{reason}: {some(names)}." for reason, names in wrong.items()]
    return checked, problems + _inverted(kinds, root)


def _looked_at(sample: Sample, any_masks: bool) -> tuple[str, np.ndarray | None]:
    """Returns the fault of the mask of a sample, or "", and the mask, where it can be read."""
    if not sample.mask:
        return ("Defective, but without a mask" if sample.label and any_masks else ""), None
    if not os.path.exists(sample.mask):  # noqa: PTH110 - Path.exists raises where a name is too long
        return (_GONE if sample.label else ""), None
    reason = ""
    try:
        mask = read_mask(sample.mask)
        if not sample.label:
            reason = "Good, and counted as good, but the mask marks something" if mask.any() else ""
        elif not mask.any():
            reason = "The mask is empty and was left out"
        elif image_size(sample.path) != mask.shape[::-1]:
            reason = "The mask has another size than the image and was left out"
    except ImageError as error:
        if sample.label:
            why = str(error).removeprefix(f"{sample.mask}: ").removeprefix(f"{sample.path}: ")
            reason = f"The mask, or the image itself, cannot be read (it {why}); the mask was left out"
        return reason, None
    return reason, mask


def _is_implausible(mask: np.ndarray) -> bool:
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return bool(mask.mean() > _AREA or border.mean() > _BORDER)


def _inverted(kinds: dict[str, list[tuple[Sample, bool]]], root: Path) -> list[str]:
    named = []
    for kind, masks in kinds.items():
        odd = [sample.mask for sample, implausible in masks if implausible and sample.mask]
        if len(odd) > len(masks) / 2 or len(odd) >= max(2, len(masks) / 2):  # one of two may be large
            named.append(f"{kind} ({len(odd)} of {count(len(masks), 'mask')}, such as {relative(odd[0], root)})")
    if not named:
        return []
    return [
        "Masks that mark more than half of the image or nearly all of its border, and so may be inverted: "
        f"{', '.join(named[:3])}{', …' if len(named) > 3 else ''}. They are used as they are: 0 means good, all else "
        "defective. If that is wrong, invert the files."
    ]


def check_names(samples: Iterable[Sample], root: Path) -> list[str]:
    """A sentence on images that are called like masks of others beside them, or lie in a folder of masks; or none."""
    samples = list(samples)
    there = {(sample.path.parent, sample.path.stem.casefold()) for sample in samples}
    odd = []
    for sample in samples:
        like = re.fullmatch(rf"(.+?)[-_ ]?{_MASK}\d*", sample.path.stem.casefold())
        if (like and (sample.path.parent, like[1]) in there) or (
            sample.label and re.fullmatch(_MASK, sample.defect, re.I)
        ):
            odd.append(relative(sample.path, root))
    if not odd:
        return []
    return [
        f"Images that are called like masks, yet count as images: {some(odd)}. Masks belong in "
        "ground_truth/<defect>, or in the column mask of a table."
    ]


def check_copies(train: list[Sample], test: list[Sample], root: Path) -> list[str]:
    """Sentences on test images that are byte for byte the same as a training image, or good and defective at once.

    Only files of equal size are opened.
    """
    by_size: dict[int, list[tuple[Sample, bool]]] = defaultdict(list)
    for samples, for_test in ((train, False), (test, True)):
        for sample in samples:
            by_size[_size(sample.path)].append((sample, for_test))
    first: dict[str, tuple[Sample, bool]] = {}
    same, torn = [], []
    for alike in by_size.values():
        if len({(sample.label, for_test) for sample, for_test in alike}) == 1:
            continue
        for sample, for_test in alike:  # those to train on come first
            if not (content := sha256_if_readable(sample.path)):
                continue
            twin, twin_for_test = first.setdefault(content, (sample, for_test))
            names = f"{relative(sample.path, root)} = {relative(twin.path, root)}"
            if sample.label != twin.label:
                torn.append(names)
            elif for_test and not twin_for_test:
                same.append(names)
    problems = []
    if torn:
        problems.append(f"The same file is both good and defective, and one of the two is wrong: {some(torn)}.")
    if same:
        problems.append(f"Test images that are also training images, which flatters the results: {some(same)}.")
    return problems


def _size(path: Path) -> int:
    """Bytes; -1 of a file that has gone since it was listed."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
