"""Data sets: recognition of layouts on disk, and lists of samples, which hold paths, not pixels."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from unflaw.datasets.checks import check_copies, check_masks, check_names
from unflaw.datasets.layouts import categories, layout_of
from unflaw.datasets.samples import (
    Dataset,
    DatasetError,
    Sample,
    Saturated,
    Tree,
    digest,
    fingerprint,
    subfolders,
)
from unflaw.datasets.table import DEFECT_LABELS, GOOD_LABELS, TableError, read_table
from unflaw.io.words import count

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

_LAYOUTS = """Read are:
  - the layout of MVTec AD: train/good/*, test/good/*, test/<defect>/*, and ground_truth/<defect>/<name>_mask.*;
    good images in validation/good/*, where there are any, calibrate
  - public benchmarks as they unpack: `unflaw datasets` lists them
  - a folder of good images, with no folders of images inside
  - a table (.csv) with the columns path, label[, mask][, defect][, split][, group]"""


def load_dataset(path: str | Path) -> Dataset:
    """Read a data set of any known layout.

    Known are the layout of MVTec AD (a mask is `<name>_mask.*`, `<name>.*`, or a folder `<name>` of masks; ground_truth
    is optional), those of other public benchmarks (`layouts`), a plain folder of good images, and tables (`table`). The
    case of folder names does not matter. Links to folders are followed; hidden and system files are ignored
    (`io.listing`).

    Masks that are unreadable, empty, or not of the size of their image are left out and reported. Unused files, masks
    without an image, and masks that may be inverted are reported. The pixels of the images are not read.

    Raises:
        DatasetError: The path does not exist, holds no images, no known layout or several categories, or lacks the file
            that defines the split or the labels of a benchmark.
    """
    path = Path(path)
    tree = Tree(path if path.is_dir() else path.parent)
    name = path.resolve().name
    if path.is_file():
        try:
            name, layout, (train, validation, test) = path.stem, "table", read_table(path, tree)
        except TableError as error:
            raise DatasetError(f"{error}\n{_LAYOUTS}") from error
    elif not path.is_dir():
        raise DatasetError(f"{path}: there is no such folder or table; check the path")
    elif known := layout_of(path):
        layout, (train, validation, test) = known.name, known.read(tree)
    else:
        layout, train, validation, test = "folder", _folder(tree), [], []
    tree.problems += tree.notes()
    if not train and not test:
        raise DatasetError("\n".join([f"{path}: holds no images that can be used.", *tree.problems, _LAYOUTS]))
    test = check_masks(test, tree)
    learned = [*train, *validation]
    check_names([*learned, *test], tree)
    check_copies(learned, test, tree)
    if not train:
        tree.problems.append("There are no images to train on: this can only be used to evaluate.")
    if len({sample.label for sample in test}) == 1:
        kind = "defective" if test[0].label else "good"
        tree.problems.append(f"All test images are {kind}: AUROC needs both kinds.")
    return Dataset(name, layout, tuple(train), tuple(validation), tuple(test), tuple(tree.problems))


def load_categories(paths: Iterable[str | Path]) -> dict[str, Dataset]:
    """Read data sets by name; a folder of categories of a benchmark is expanded.

    The name is that of the folder or table. Equal names are preceded by as many folders as distinguish them, such as
    "nuts/good" and "bolts/good".

    Raises:
        DatasetError: See `load_dataset`; also if a data set is given twice.
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


def _folder(tree: Tree) -> list[Sample]:
    root = tree.root
    if several := categories(root):
        remedy = f"name one, as in {several[0]}, or train one detector for all with --multi-class"
        raise DatasetError(f"{root}: holds categories; {remedy}: {', '.join(path.name for path in several)}")
    images = tree.images(root)
    beside = [path for path in images if path.parent == root]
    if len(beside) < len(images):
        within = [path.relative_to(root).parts[0] for path in images if path.parent != root]
        found = [f"{folder.name}/ with {count(within.count(folder.name), 'image')}" for folder in subfolders(root)]
        found.append(f"{count(len(beside), 'image')} beside {'it' if len(found) == 1 else 'them'}")
        raise DatasetError(f"{root}: this layout is not known: {', '.join(found)}.\n{_LAYOUTS}")
    tree.report_unused([root], images)
    return [Sample(path, 0) for path in images]
