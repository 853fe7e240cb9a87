"""Checks of a listed data set: masks, names of masks, and duplicate files."""

import os
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace

import numpy as np

from unflaw.datasets.samples import Sample, Tree, relative, sha256_if_readable
from unflaw.errors import ImageError
from unflaw.imaging.reading import image_size, read_mask
from unflaw.io.words import count

# A mask that covers more than this share of its image, or of the border of its image, may be inverted
_AREA, _BORDER = 0.5, 0.9
_MASK = r"(?:masks?|gts?|ground[-_ ]?truth)"
_MISSING = "There is no such mask"


def check_masks(samples: list[Sample], tree: Tree) -> list[Sample]:
    """Return samples without unusable masks and masks of good images, and report those.

    Masks that may be inverted are reported and kept: kinds of defect of which half of the masks or more cover more than
    half of the image or nearly all of its border.
    """
    wrong: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, list[tuple[Sample, bool]]] = defaultdict(list)
    any_masks = any(sample.mask for sample in samples if sample.label)
    checked = []
    for sample in samples:
        reason, mask = _read_sample_mask(sample, any_masks)
        if reason:
            of = f"{relative(sample.mask, tree.root)} of " if sample.mask and reason == _MISSING else ""
            wrong[reason].append(of + relative(sample.path, tree.root))
        if sample.label and mask is not None and not reason:
            kinds[sample.defect].append((sample, _is_implausible(mask)))
        drop = reason or not sample.label
        checked.append(replace(sample, mask=None, regions=()) if drop else sample)
    for reason, names in wrong.items():
        tree.report(reason, names)
    _report_inverted(kinds, tree)
    return checked


def _read_sample_mask(sample: Sample, any_masks: bool) -> tuple[str, np.ndarray | None]:
    """Return the fault of the mask of a sample, or "", and the mask if it can be read."""
    if not sample.mask:
        return ("Defective, but without a mask" if sample.label and any_masks else ""), None
    if not os.path.exists(sample.mask):  # noqa: PTH110 - Path.exists raises where a name is too long
        return (_MISSING if sample.label else ""), None
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


def _report_inverted(kinds: dict[str, list[tuple[Sample, bool]]], tree: Tree) -> None:
    named = []
    for kind, masks in kinds.items():
        odd = [sample.mask for sample, implausible in masks if implausible and sample.mask]
        if len(odd) > len(masks) / 2 or len(odd) >= max(2, len(masks) / 2):  # one of two may be large
            named.append(f"{kind} ({len(odd)} of {count(len(masks), 'mask')}, such as {relative(odd[0], tree.root)})")
    if named:
        tree.problems.append(
            "Masks that mark more than half of the image or nearly all of its border, and so may be inverted: "
            f"{', '.join(named[:3])}{', …' if len(named) > 3 else ''}. They are used as they are: 0 means good, all "
            "else defective. If that is wrong, invert the files."
        )


def check_names(samples: list[Sample], tree: Tree) -> None:
    """Report images that are named like masks of others beside them, or lie in a folder named like masks."""
    there = {(sample.path.parent, sample.path.stem.casefold()) for sample in samples}
    odd = []
    for sample in samples:
        like = re.fullmatch(rf"(.+?)[-_ ]?{_MASK}\d*", sample.path.stem.casefold())
        if (like and (sample.path.parent, like[1]) in there) or (
            sample.label and re.fullmatch(_MASK, sample.defect, re.I)
        ):
            odd.append(sample.path)
    rest = ". Masks belong in ground_truth/<defect>, or in the column mask of a table."
    tree.report("Images that are named like masks, but used as images", odd, rest)


def check_copies(train: list[Sample], test: list[Sample], tree: Tree) -> None:
    """Report test images with the same bytes as a training image, and files that are both good and defective.

    Only files of equal size are opened.
    """
    by_size: dict[int, list[tuple[Sample, bool]]] = defaultdict(list)
    for samples, for_test in ((train, False), (test, True)):
        for sample in samples:
            with suppress(OSError):  # removed since it was listed
                by_size[sample.path.stat().st_size].append((sample, for_test))
    first: dict[str, tuple[Sample, bool]] = {}
    same, contradictory = [], []
    for alike in by_size.values():
        if len({(sample.label, for_test) for sample, for_test in alike}) == 1:
            continue
        for sample, for_test in alike:  # training images come first
            if not (content := sha256_if_readable(sample.path)):
                continue
            twin, twin_for_test = first.setdefault(content, (sample, for_test))
            names = f"{relative(sample.path, tree.root)} = {relative(twin.path, tree.root)}"
            if sample.label != twin.label:
                contradictory.append(names)
            elif for_test and not twin_for_test:
                same.append(names)
    tree.report("The same file is both good and defective, and one of the two is wrong", contradictory)
    tree.report("Test images that are also training images, which flatters the results", same)
