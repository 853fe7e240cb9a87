"""How data sets lie on disk: what samples are, and the layouts that are no public collection's own."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unflaw.images import SUFFIXES, list_images, visible_files

GOOD_LABELS = ("good", "normal", "nominal", "ok", "0")
DEFECT_LABELS = ("defect", "defective", "anomaly", "anomalous", "abnormal", "bad", "ng", "1")
_TEST_EVERY = 5  # of the good rows of a table that have no split

LAYOUTS = """Read are:
  - the layout of MVTec AD: train/good/*, test/good/*, test/<defect>/*, and ground_truth/<defect>/<name>_mask.*;
    good pictures in validation/good/*, where there are any, calibrate
  - a folder of good pictures, with no folders of pictures inside
  - a table (.csv) with the columns path, label[, mask][, defect][, split]"""


class DatasetError(ValueError):
    """A data set that cannot be used. The message names the path, what was found there and what to do."""


@dataclass(frozen=True)
class Saturated:
    """One region of a defect, of which so much must be found that the whole counts as found (sPRO of MVTec LOCO AD)."""

    mask: Path  # a picture, not 0 where the region is
    saturation: float  # pixels of that picture; if relative, share of the region's area
    relative: bool


@dataclass(frozen=True)
class Sample:
    """One picture and what is known of it."""

    path: Path
    label: int  # 0 good, 1 defect
    mask: Path | None = None  # a picture of the same size, not 0 where the defect is, or a folder of such
    defect: str = "good"  # "good", or the kind of defect
    regions: tuple[Saturated, ...] = ()  # of the mask, where they have a saturation


@dataclass(frozen=True)
class Dataset:
    """The samples of one category of products."""

    name: str
    layout: str  # "mvtec", "folder", "table", or the name of a public collection
    train: tuple[Sample, ...]  # good ones only
    validation: tuple[Sample, ...]  # good ones to calibrate with; where empty, some of `train` are held out for it
    test: tuple[Sample, ...]
    problems: tuple[str, ...]  # what is wrong with the data, yet not enough to stop; a sentence each


Found = tuple[list[Sample], list[Sample], list[Sample], list[str]]  # train, validation, test, problems


def is_mvtec(root: Path) -> bool:
    return (root / "train" / "good").is_dir() or (not (root / "train").exists() and (root / "test" / "good").is_dir())


def read_mvtec(root: Path) -> Found:
    train, validation = ([Sample(path, 0) for path in images(root / part / "good")] for part in ("train", "validation"))
    test, problems = [], []
    for folder in subfolders(root / "test"):
        pictures = images(folder)
        if not pictures:
            problems.append(f"test/{folder.name} holds no pictures.")
        is_defect = folder.name != "good"
        truth = root / "ground_truth" / folder.name
        masks = {stem(path, truth): path for path in images(truth)} if is_defect else {}
        for path in pictures:
            name = stem(path, folder)
            mask = masks.get(f"{name}_mask") or masks.get(name) or (truth / name if (truth / name).is_dir() else None)
            test.append(Sample(path, int(is_defect), mask if is_defect else None, folder.name))
    unused = report_unused(
        [root / part for part in ("train", "validation", "test")], [*train, *validation, *test], root
    )
    return train, validation, test, problems + unused


def read_folder(root: Path) -> Found:
    """A plain folder of good pictures."""
    counts = {folder.name: len(images(folder)) for folder in subfolders(root)}
    pictures = images(root)
    if any(counts.values()):
        found = [f"{name}/ with {count} pictures" for name, count in counts.items()]
        found.append(f"{len(pictures) - sum(counts.values())} pictures beside them")
        raise DatasetError(f"{root}: this layout is not known: {', '.join(found)}.\n{LAYOUTS}")
    train = [Sample(path, 0) for path in pictures]
    return train, [], [], report_unused([root], train, root)


def read_table(path: Path) -> Found:
    """A table with the columns path, label[, mask][, defect][, split], parted by commas, semicolons or tabs; UTF-8.

    Paths are absolute or relative to the table, labels are GOOD_LABELS or DEFECT_LABELS, splits are `train`,
    `validation` or `test`.
    A row without a split is for testing if it is defective; of the good ones every fifth is, counted down the table, if
    the table has defective rows at all. So no row changes sides when rows are appended to a table that has
    defective ones. Mask and defect of good rows are not looked at.
    """
    if path.suffix.lower() not in {".csv", ".tsv", ".txt"}:
        raise DatasetError(f"{path}: is neither a folder nor a table.\n{LAYOUTS}")
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
        raise DatasetError(f"{path}: the first line lacks {' and '.join(missing)}.\n{LAYOUTS}")
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


def report_unused(folders: Iterable[Path], samples: Iterable[Sample], root: Path) -> list[str]:
    used = {sample.path for sample in samples}
    files = [path for folder in folders if folder.is_dir() for path in visible_files(folder) if path not in used]
    return [f"Files that were not used: {shortened([relative(path, root) for path in files])}."] if files else []


def shortened(names: Sequence[str], limit: int = 3) -> str:
    return f"{', '.join(names[:limit])}{', …' if len(names) > limit else ''} ({len(names)} in all)"


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def images(folder: Path) -> list[Path]:
    return list_images(folder) if folder.is_dir() else []


def subfolders(folder: Path) -> list[Path]:
    visible = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in visible if entry.is_dir() and not entry.name.startswith("."))


def stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()
