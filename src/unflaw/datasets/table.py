"""Reading of tables of images and labels."""

import csv
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unflaw.datasets.samples import DatasetError, Sample, Splits, Tree, relative
from unflaw.io.listing import SUFFIXES, is_image
from unflaw.io.words import count

# Case, spaces and dots are ignored. i.O. and n.i.O. are German: "in Ordnung" (in order) and "nicht in Ordnung"
GOOD_LABELS = ("good", "normal", "nominal", "ok", "i.O.", "pass", "false", "0")
DEFECT_LABELS = (
    *("defect", "defective", "anomaly", "anomalous", "abnormal", "bad"),
    *("ng", "nok", "not ok", "n.i.O.", "fail", "true", "1"),
)
_EXTRA = "\n"  # key of cells beyond the columns of the first line; no column has this name
_TEST_EVERY = 5  # every fifth good row without a split is for testing

Row = tuple[int, Sample, str]  # line, sample, and split, which may be ""


class TableError(DatasetError):
    """Error for a file that is not a table of images."""


class _RowError(ValueError):
    """Error for an unusable row: fault, cell and remedy."""


def read_table(path: Path, tree: Tree) -> Splits:
    """Read a table in UTF-8 of the columns path, label[, mask][, defect][, split][, group].

    Cells are separated by commas, semicolons or tabs.

    Paths are absolute or relative to the table, with slashes or backslashes. Labels are GOOD_LABELS or DEFECT_LABELS,
    splits are `train`, `validation` or `test`. Empty rows are ignored. Unusable rows are left out and reported, and so
    are all rows of a file that is listed both as good and as defective.

    Rows without a split are test rows if they are defective. If the table has any defective row, so is every fifth good
    row, counted down the table, so that rows appended later change no split. The defect of good rows is ignored. Images
    with the same group belong together (`calibration.groups`).

    Raises:
        TableError: The suffix or the first line is not that of such a table.
        DatasetError: The file cannot be read.
    """
    if path.suffix.lower() not in {".csv", ".tsv", ".txt"}:
        raise TableError(f"{path}: is neither a folder nor a table.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline().lower()
            delimiter = max(",;\t", key=header.count)
            columns = [column.strip() for column in next(csv.reader([header], delimiter=delimiter), [])]
            reader = csv.DictReader(file, columns, restkey=_EXTRA, delimiter=delimiter, restval="")
            rows = [(reader.line_num + 1, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as a table ({error}); save it as CSV in UTF-8") from error
    if missing := [column for column in ("path", "label") if column not in columns]:
        raise TableError(f"{path}: the first line lacks {' and '.join(missing)}.")
    placed: list[Row] = []
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    has_booleans = False
    for line, cells in rows:
        texts = {name: cell.strip() for name, cell in cells.items() if isinstance(cell, str)}
        extra = any(cell.strip() for cell in cells.get(_EXTRA, []))
        if not any(texts.values()) and not extra:
            continue
        try:
            placed.append((line, *_sample_of_row(texts, path.parent, extra)))
            has_booleans |= texts["label"].lower() in ("true", "false")
        except _RowError as error:
            reason, cell, remedy = error.args
            wrong[reason, remedy].append(f"line {line} {_quoted(cell)}")
    tree.problems += [
        f"{path.name}: {count(len(at), 'row')} {'was' if len(at) == 1 else 'were'} left out ({reason}): {_first(at)}; "
        f"{remedy}."
        for (reason, remedy), at in wrong.items()
    ]
    if has_booleans:
        tree.problems.append(f"{path.name}: the label True means defective, like 1, and False means good, like 0.")
    dropped = _duplicates(placed, path, tree)
    has_defects = any(sample.label for _, sample, _ in placed)
    sides: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
    open_rows = 0
    for line, sample, split in placed:
        open_rows += not split and not sample.label
        for_test = sample.label or (has_defects and open_rows % _TEST_EVERY == 0)
        side = split or ("test" if for_test else "train")
        if line not in dropped:
            sides[side].append(sample if side == "test" else replace(sample, mask=None))
    return sides["train"], sides["validation"], sides["test"]


def _sample_of_row(texts: dict[str, str], folder: Path, extra: bool) -> tuple[Sample, str]:
    """Return the sample and the split of a row. Raises _RowError if it cannot be used."""
    name, label, split, mask, defect = (texts.get(c, "") for c in ("path", "label", "split", "mask", "defect"))
    path, value, split = _resolve(folder, name), _label_value(label), split.lower()
    if extra:
        raise _RowError("more cells than the first line", name, "quote paths that contain the separator")
    if not name:
        raise _RowError("no path", label, "name an image")
    if value is None:
        kind = "unknown label" if label else "no label"
        raise _RowError(kind, label or name, f"labels are {', '.join(GOOD_LABELS + DEFECT_LABELS)}")
    if split not in ("", "train", "validation", "test"):
        raise _RowError("unknown split", split, "splits are train, validation, test")
    if split in ("train", "validation") and value:
        raise _RowError(f"defective, in the split {split}", name, "only good images train and calibrate")
    if not is_image(path):
        raise _RowError("not an image by its suffix", name, f"images end in {', '.join(sorted(SUFFIXES))}")
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a name is too long
        raise _RowError("no such file", name, "paths are absolute or relative to the folder of the table")
    at = _resolve(folder, mask) if mask else None
    return Sample(path, value, at, (defect or "defect") if value else "good", group=texts.get("group", "")), split


def _label_value(label: str) -> int | None:
    """Return 1 for a defective label, 0 for a good one, None for any other."""
    plain = _normalized(label)
    return 1 if plain in map(_normalized, DEFECT_LABELS) else 0 if plain in map(_normalized, GOOD_LABELS) else None


def _normalized(label: str) -> str:
    if label[:1].isdigit():
        return label.removesuffix(".0")  # as pandas writes numbers of a column with gaps
    return re.sub(r"(?<=\w)[\s._-]+", "", label.casefold())


def _resolve(folder: Path, name: str) -> Path:
    """Resolve a path of a table; backslashes separate folders unless a file has them in its name."""
    path = folder / name
    return path if "\\" not in name or os.path.exists(path) else folder / name.replace("\\", "/")  # noqa: PTH110


def _duplicates(placed: Sequence[Row], table: Path, tree: Tree) -> set[int]:
    """Report files that are listed twice, and return the lines to leave out."""
    by_file: dict[str, list[Row]] = defaultdict(list)
    for row in placed:
        by_file[os.path.realpath(row[1].path)].append(row)
    dropped: set[int] = set()
    contradictory, repeated = [], []
    for rows in by_file.values():
        if len(rows) == 1:
            continue
        name = f"{relative(rows[0][1].path, table.parent)} (lines {_first([str(line) for line, _, _ in rows])})"
        if len({sample.label for _, sample, _ in rows}) > 1:
            contradictory.append(name)
            dropped.update(line for line, _, _ in rows)
        else:
            repeated.append(name)
            first = {(sample, split): line for line, sample, split in reversed(rows)}
            dropped.update(line for line, _, _ in rows if line not in first.values())
    kinds = (
        (contradictory, "both as good and as defective", "the rows are left out; keep those that are right"),
        (repeated, "more than once", "equal rows count once, all others each"),
    )
    for names, how, remedy in kinds:
        if names:
            verb = "is" if len(names) == 1 else "are"
            listed = f"{count(len(names), 'file')} {verb} listed {how}"
            tree.problems.append(f"{table.name}: {listed}: {_first(names)}; {remedy}.")
    return dropped


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _quoted(cell: str) -> str:
    return f"'{cell}'" if len(cell) <= 80 else f"'{cell[:40]}…{cell[-39:]}'"
