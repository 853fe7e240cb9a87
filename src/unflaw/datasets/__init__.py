"""Data sets in: recognise how pictures are laid out on disk and list them as samples, which carry paths, not pixels."""

import csv
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from unflaw.datasets.layouts import categories, layout_of
from unflaw.datasets.samples import (
    Dataset,
    DatasetError,
    Found,
    Sample,
    Saturated,
    digest,
    fingerprint,
    pictures,
    relative,
    sha256_if_readable,
    some,
    subfolders,
    unused,
)
from unflaw.images import SUFFIXES, ImageError, image_size, read_mask

__all__ = [
    "DEFECT_LABELS",
    "GOOD_LABELS",
    "Dataset",
    "DatasetError",
    "Sample",
    "Saturated",
    "digest",
    "fingerprint",
    "load_categories",
    "load_dataset",
]

GOOD_LABELS = ("good", "normal", "nominal", "ok", "0")
DEFECT_LABELS = ("defect", "defective", "anomaly", "anomalous", "abnormal", "bad", "ng", "1")
_TEST_EVERY = 5  # of the good rows of a table that have no split

_LAYOUTS = """Read are:
  - the layout of MVTec AD: train/good/*, test/good/*, test/<defect>/*, and ground_truth/<defect>/<name>_mask.*;
    good pictures in validation/good/*, where there are any, calibrate
  - public benchmarks as they unpack: `unflaw datasets` lists them
  - a folder of good pictures, with no folders of pictures inside
  - a table (.csv) with the columns path, label[, mask][, defect][, split]"""


def load_dataset(path: str | Path) -> Dataset:
    """Read a data set, recognising its layout.

    Layouts: that of MVTec AD (a mask is `<name>_mask.*`, `<name>.*`, or a folder `<name>` of masks; without
    ground_truth there are image labels only), those of other public benchmarks (`layouts`), a plain folder of
    good pictures, or a table, for which see `_table`. Masks that are unreadable, empty, or of another size than their
    picture are left out and reported. The pixels of the pictures are not looked at.

    Raises:
        DatasetError: Nothing there, no pictures, no known layout, several categories at once, or a benchmark without
            the file that says how it is split or labelled.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    known = layout_of(path) if path.is_dir() else None
    if path.is_file():
        name, layout, (train, validation, test, problems) = path.stem, "table", _table(path)
    elif not path.is_dir():
        raise DatasetError(f"{path}: there is no such folder or table; check the path")
    elif known:
        name, layout, (train, validation, test, problems) = path.resolve().name, known.name, known.read(path)
    else:
        name, layout, (train, validation, test, problems) = path.resolve().name, "folder", _folder(path)
    if not train and not test:
        raise DatasetError("\n".join([f"{path}: holds no pictures that can be used.", *problems, _LAYOUTS]))
    test, mask_problems = _check_masks(test, root)
    problems += mask_problems + _check_overlap([*train, *validation], test, root)
    if not train:
        problems.append("There are no pictures to train on: this can only be used to evaluate.")
    if len({sample.label for sample in test}) == 1:
        problems.append(f"All test pictures are {'defective' if test[0].label else 'good'}: AUROC needs both kinds.")
    return Dataset(name, layout, tuple(train), tuple(validation), tuple(test), tuple(problems))


def load_categories(paths: Iterable[str | Path]) -> dict[str, Dataset]:
    """Data sets by name; a folder of categories, of MVTec AD or another benchmark, stands for all of these.

    A name is that of the folder or table. Where several have the same, so many folders are put before it as tell them
    apart, such as "nuts/good" and "bolts/good".

    Raises:
        DatasetError: As `load_dataset`, or one is given twice.
    """
    given = [found for path in map(Path, paths) for found in categories(path) or [path]]
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


def _folder(root: Path) -> Found:
    counts = {folder.name: len(pictures(folder)) for folder in subfolders(root)}
    if several := categories(root):
        remedy = f"name one, as in {several[0]}, or train one detector for all with --multi-class"
        raise DatasetError(f"{root}: holds categories; {remedy}: {', '.join(path.name for path in several)}")
    images = pictures(root)
    if any(counts.values()):
        found = [f"{name}/ with {count} pictures" for name, count in counts.items()]
        found.append(f"{len(images) - sum(counts.values())} pictures beside them")
        raise DatasetError(f"{root}: this layout is not known: {', '.join(found)}.\n{_LAYOUTS}")
    train = [Sample(path, 0) for path in images]
    return train, [], [], unused([root], train, root)


def _table(path: Path) -> Found:
    """A table with the columns path, label[, mask][, defect][, split], parted by commas, semicolons or tabs; UTF-8.

    Paths are absolute or relative to the table, labels are GOOD_LABELS or DEFECT_LABELS, splits are `train`,
    `validation` or `test`.
    A row without a split is for testing if it is defective; of the good ones every fifth is, counted down the table, if
    the table has defective rows at all. So no row changes sides when rows are appended to a table that has
    defective ones. Mask and defect of good rows are not looked at.
    """
    if path.suffix.lower() not in {".csv", ".tsv", ".txt"}:
        raise DatasetError(f"{path}: is neither a folder nor a table.\n{_LAYOUTS}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline().lower()
            delimiter = max(",;\t", key=header.count)
            columns = [column.strip() for column in next(csv.reader([header], delimiter=delimiter), [])]
            reader = csv.DictReader(file, columns, delimiter=delimiter, restval="")
            rows = [(reader.line_num + 1, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    if missing := [column for column in ("path", "label") if column not in columns]:
        raise DatasetError(f"{path}: the first line lacks {' and '.join(missing)}.\n{_LAYOUTS}")
    placed, problems = [], []
    for line, row in rows:
        try:
            placed.append(_row(row, path.parent))
        except ValueError as error:
            problems.append(f"{path.name}, line {line}: {error}; the row is left out.")
    has_defects = any(sample.label for sample, _ in placed)
    sides: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    open_rows = 0
    for sample, split in placed:
        open_rows += not split and not sample.label
        for_test = sample.label or (has_defects and open_rows % _TEST_EVERY == 0)
        sides[split or ("test" if for_test else "train")].append(sample)
    return sides["train"], sides["validation"], sides["test"], problems


def _row(row: dict[str, str], folder: Path) -> tuple[Sample, str]:
    """The sample and the split ("train", "test", or "") of a row of a table; ValueError says what is wrong with it."""
    if None in row:
        raise ValueError("more cells than the first line has; quote paths that contain the separator")
    name, label, split, mask, defect = (row.get(c, "").strip() for c in ("path", "label", "split", "mask", "defect"))
    label, split, path = label.lower(), split.lower(), folder / name
    if label not in GOOD_LABELS + DEFECT_LABELS:
        raise ValueError(f"label {label!r} is none of {', '.join(GOOD_LABELS + DEFECT_LABELS)}")
    if split not in ("", "train", "validation", "test"):
        raise ValueError(f"split {split!r} is none of train, validation, test")
    if split in ("train", "validation") and label in DEFECT_LABELS:
        raise ValueError("a defective picture can neither train nor calibrate")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name!r} is not a picture by its suffix ({', '.join(sorted(SUFFIXES))})")
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a name is too long
        raise ValueError(f"there is no file {name!r} beside the table")
    if label in GOOD_LABELS:
        return Sample(path, 0), split
    return Sample(path, 1, folder / mask if mask else None, defect or "defect"), split


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
    return checked, [f"{reason}: {some(names)}." for reason, names in wrong.items()]


def _mask_problem(sample: Sample, any_masks: bool) -> str:
    if not sample.mask:
        return "Defective, but without a mask" if sample.label and any_masks else ""
    try:
        mask = read_mask(sample.mask)
        if not mask.any():
            return "The mask is empty and was left out"
        same = image_size(sample.path) == mask.shape[::-1]
        return "" if same else "The mask has another size than the picture and was left out"
    except ImageError as error:
        reason = str(error).removeprefix(f"{sample.mask}: ").removeprefix(f"{sample.path}: ")
        return f"The mask, or the picture itself, cannot be read (it {reason}); the mask was left out"


def _size(path: Path) -> int:
    """Bytes; -1 of a file that has gone since it was listed."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _check_overlap(train: list[Sample], test: list[Sample], root: Path) -> list[str]:
    """Pictures that are byte for byte in both; only files of equal size are opened."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for sample in train:
        by_size[_size(sample.path)].append(sample.path)
    digests: dict[int, dict[str, Path]] = {}
    same = []
    for sample in test:
        size = _size(sample.path)
        if size in by_size:
            if size not in digests:
                digests[size] = {sha256_if_readable(path): path for path in by_size[size]}
            if (content := sha256_if_readable(sample.path)) and (twin := digests[size].get(content)):
                same.append(f"{relative(sample.path, root)} = {relative(twin, root)}")
    return [f"Test pictures that are also training pictures, which flatters the results: {some(same)}."] if same else []
