"""Data sets in: recognise how pictures are laid out on disk and list them as samples, which carry paths, not pixels."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from unflaw.datasets.layouts import (
    LAYOUTS,
    Dataset,
    DatasetError,
    Found,
    Sample,
    Saturated,
    is_mvtec,
    read_folder,
    read_mvtec,
    read_table,
    relative,
    shortened,
    subfolders,
)
from unflaw.datasets.public import collection_of
from unflaw.images import ImageError, image_size, list_images, read_mask

__all__ = [
    "Dataset",
    "DatasetError",
    "Sample",
    "Saturated",
    "digest",
    "fingerprint",
    "load_categories",
    "load_dataset",
    "short_digest",
]


def load_dataset(path: str | Path) -> Dataset:
    """Read a data set, recognising its layout.

    Layouts: those of public collections (`public`), that of MVTec AD (a mask is `<name>_mask.*` or `<name>.*`; without
    ground_truth there are image labels only), a plain folder of good pictures, or a table, for which see
    `layouts.read_table`. Masks that are unreadable, empty, or of another size than their picture are left out and
    reported. The pixels of the pictures are not looked at.

    Raises:
        DatasetError: Nothing there, no pictures, no known layout, or several categories at once.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    name, layout, (train, validation, test, problems) = _read(path)
    if not train and not test:
        raise DatasetError("\n".join([f"{path}: holds no pictures that can be used.", *problems, LAYOUTS]))
    test, mask_problems = _check_masks(test, root)
    problems += mask_problems + _check_overlap([*train, *validation], test, root)
    if not train:
        problems.append("There are no pictures to train on: this can only be used to evaluate.")
    if len({sample.label for sample in test}) == 1:
        problems.append(f"All test pictures are {'defective' if test[0].label else 'good'}: AUROC needs both kinds.")
    return Dataset(name, layout, tuple(train), tuple(validation), tuple(test), tuple(problems))


def _read(path: Path) -> tuple[str, str, Found]:
    if path.is_file():
        return path.stem, "table", read_table(path)
    if not path.is_dir():
        raise DatasetError(f"{path}: there is no such folder or table; check the path")
    name = path.resolve().name
    if collection := collection_of(path):
        return name, collection.name, collection.read(path)
    if is_mvtec(path):
        return name, "mvtec", read_mvtec(path)
    if categories := _categories(path):
        remedy = f"name one, as in {categories[0]}, or train one detector for all with --multi-class"
        raise DatasetError(f"{path}: holds categories; {remedy}: {', '.join(item.name for item in categories)}")
    return name, "folder", read_folder(path)


def _categories(root: Path) -> list[Path]:
    """The data sets in a folder that is none itself."""
    if collection_of(root) or is_mvtec(root):
        return []
    return [folder for folder in subfolders(root) if collection_of(folder) or is_mvtec(folder)]


def load_categories(paths: Iterable[str | Path]) -> dict[str, Dataset]:
    """Data sets by name; a folder of categories stands for all of these.

    A name is that of the folder or table. Where several have the same, so many folders are put before it as tell them
    apart, such as "nuts/good" and "bolts/good".

    Raises:
        DatasetError: As `load_dataset`, or one is given twice.
    """
    given = [found for path in map(Path, paths) for found in _categories(path) or [path]]
    ends = [(path.with_suffix("") if path.is_file() else path).resolve().parts for path in given]
    datasets = {}
    for path, parts in zip(given, ends, strict=True):
        dataset = load_dataset(path)
        unique = (n for n in range(1, len(parts) + 1) if sum(end[-n:] == parts[-n:] for end in ends) == 1)
        if not (length := next(unique, 0)):
            raise DatasetError(f"{path}: is given twice, or is part of what is given; name it once")
        name = dataset.name if length == 1 else "/".join(parts[-length:])
        datasets[name] = replace(dataset, name=name)
    return datasets


def digest(samples: Iterable[Sample]) -> str:
    """SHA-256, in hex, of the names and contents of pictures: the same in any order, and wherever their folder lies."""
    paths = [sample.path.absolute() for sample in samples]
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    lines = sorted(f"{path.relative_to(root).as_posix()}\0{_sha256(path)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def short_digest(path: Path) -> str:
    """The first 64 bits of the SHA-256 of a file, in hex: enough to know a picture again."""
    return _sha256(path)[:16]


def fingerprint(dataset: Dataset) -> str:
    """SHA-256, in hex, of all that figures of a data set depend on: contents of pictures and masks, labels and order.

    Raises:
        OSError: A file that may not be read.
    """
    parts = (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test))
    lines = [
        f"{name} {sample.label} {_sha256(sample.path)} {' '.join(map(_sha256, _mask_files(sample)))}\n"
        for name, samples in parts
        for sample in samples
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _mask_files(sample: Sample) -> list[Path]:
    if sample.mask is None:
        return []
    return list_images(sample.mask) if sample.mask.is_dir() else [sample.mask]


def _check_masks(samples: list[Sample], root: Path) -> tuple[list[Sample], list[str]]:
    """The samples without the masks that cannot be used, and what was wrong."""
    wrong: dict[str, list[str]] = defaultdict(list)
    any_masks = any(sample.mask for sample in samples)
    checked = []
    for sample in samples:
        reason = _mask_problem(sample, any_masks)
        if reason:
            wrong[reason].append(relative(sample.path, root))
        checked.append(replace(sample, mask=None, regions=()) if reason else sample)
    return checked, [f"{reason}: {shortened(names)}." for reason, names in wrong.items()]


def _mask_problem(sample: Sample, any_masks: bool) -> str:
    if not sample.mask:
        return "Defective, but without a mask" if sample.label and any_masks else ""
    try:
        mask = read_mask(sample.mask)
        if not mask.any():
            return "The mask is empty and was left out"
        same = image_size(sample.path) == mask.shape[::-1]
        return "" if same else "The mask has another size than the picture and was left out"
    except ImageError:
        return "The mask, or the picture itself, cannot be read; the mask was left out"


def _check_overlap(train: list[Sample], test: list[Sample], root: Path) -> list[str]:
    """Pictures that are byte for byte in both; only files of equal size are opened."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for sample in train:
        by_size[sample.path.stat().st_size].append(sample.path)
    digests: dict[int, dict[str, Path]] = {}
    same = []
    for sample in test:
        size = sample.path.stat().st_size
        if size in by_size:
            if size not in digests:
                digests[size] = {_sha256(path): path for path in by_size[size]}
            if twin := digests[size].get(_sha256(sample.path)):
                same.append(f"{relative(sample.path, root)} = {relative(twin, root)}")
    if not same:
        return []
    return [f"Test pictures that are also training pictures, which flatters the results: {shortened(same)}."]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
