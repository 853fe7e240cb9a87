"""Layouts: how pictures, labels and masks lie in the folders of public benchmarks, as their archives unpack.

A layout is a recogniser, which looks at names only, and a reader, which gives paths. What a benchmark is, whose, and
how many pictures it should have, `unflaw.datasets.public` knows.
"""

import csv
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from unflaw.datasets.samples import (
    DatasetError,
    Found,
    Sample,
    Saturated,
    pictures,
    relative,
    some,
    stem,
    subfolders,
    unused,
)
from unflaw.images import ImageError, list_images, read, read_mask

TEST_EVERY = 5  # where a benchmark has no official split, one good picture in so many is for testing


@dataclass(frozen=True)
class Layout:
    """One way to lay out a data set."""

    name: str
    sketch: str  # the paths, for people
    fits: Callable[[Path], bool]
    read: Callable[[Path], Found]
    group: str = ""  # folders of one group beside each other are categories; "": such a data set stands alone


def layout_of(root: Path) -> Layout | None:
    """The layout of a data set, or None: a folder of categories, of pictures, or of anything else."""
    return next((layout for layout in LAYOUTS if layout.fits(root)), None)


def categories(root: Path) -> list[Path]:
    """The data sets of one group in a folder that is none itself."""
    groups: dict[str, list[Path]] = defaultdict(list)
    if not layout_of(root):
        for folder in subfolders(root):
            if (layout := layout_of(folder)) and layout.group:
                groups[layout.group].append(folder)
    return next((groups[layout.group] for layout in LAYOUTS if layout.group in groups), [])


def held_out(name: str) -> bool:
    """Whether a good picture of this name is for testing, by the SHA-256 of the name: no other file has a say in it."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % TEST_EVERY == 0


# MVTec AD and its kin


def _is_mvtec(root: Path) -> bool:
    return (root / "train/good").is_dir() or (not (root / "train").exists() and (root / "test/good").is_dir())


def _mvtec(root: Path, good: str = "good") -> Found:
    train, validation = ([Sample(path, 0) for path in pictures(root / part / good)] for part in ("train", "validation"))
    test, problems = _tested(root, good)
    folders = [root / part for part in ("train", "validation", "test")]
    return train, validation, test, problems + unused(folders, [*train, *validation, *test], root)


def _tested(root: Path, good: str) -> tuple[list[Sample], list[str]]:
    """The pictures in test/<kind>, with their masks in ground_truth/<kind>: a file each, or a folder of regions."""
    test, problems = [], []
    for folder in subfolders(root / "test"):
        images = pictures(folder)
        if not images:
            problems.append(f"test/{folder.name} holds no pictures.")
        truth = root / "ground_truth" / folder.name
        if folder.name == good:
            test += [Sample(path, 0) for path in images]
            continue
        masks = {path.name: path for path in subfolders(truth)}
        masks |= {stem(path, truth): path for path in pictures(truth)}
        for path in images:
            name = stem(path, folder)
            test.append(Sample(path, 1, masks.get(name + "_mask") or masks.get(name), folder.name))
    return test, problems


def _loco(root: Path) -> Found:
    """As MVTec AD; what a pixel of a mask is worth says which defect it is, and defects_config.json how that saturates.

    Raises:
        DatasetError: That file cannot be read.
    """
    train, validation, test, problems = _mvtec(root)
    config = root / "defects_config.json"
    try:
        defects = json.loads(config.read_text("utf-8"))
        kinds = {
            int(kind["pixel_value"]): (float(kind["saturation_threshold"]), bool(kind["relative_saturation"]))
            for kind in defects
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{config}: cannot be read ({error!r}); unpack the archive again") from error
    unknown, whole = [], []
    for sample in test:
        regions = []
        for mask in list_images(sample.mask) if sample.mask and sample.mask.is_dir() else ():
            try:
                kind = kinds.get(int(read(mask).max()))
            except ImageError:
                kind = None  # reported with the masks of the sample
            if kind:
                regions.append(Saturated(mask, *kind))
            else:
                unknown.append(relative(mask, root))
        whole.append(replace(sample, regions=tuple(regions)))
    if unknown:
        problems.append(f"Masks whose pixel value is not in {config.name}, left out of the regions: {some(unknown)}.")
    return train, validation, whole, problems


def _oct2017(root: Path) -> Found:
    train = [Sample(path, 0) for path in pictures(root / "train/NORMAL")]
    test, problems = _tested(root, "NORMAL")
    return train, [], test, problems + unused([root / "train/NORMAL", root / "test"], [*train, *test], root)


# BMAD: each of its archives has ways of its own to lay out pictures and masks

_BMAD = (  # {s} is a split, {S} capitalised, {l} a label
    ("{s}/{l}/img", "{s}/{l}/label"),
    ("{s}/img/{l}", "{s}/label/{l}"),
    ("{S}/{s}/{l}", "{S}/{s}_label/{l}"),
    ("{s}/{l}", "{s}_label/{l}"),
)


def _bmad_folders(root: Path, split: str, label: str) -> tuple[Path, Path] | None:
    """Where the pictures of a split and label lie, and where their masks would."""
    for name in (label, label.lower()):
        for images, masks in _BMAD:
            names = {"s": split, "S": split.title(), "l": name}
            if (folder := root / images.format(**names)).is_dir():
                return folder, root / masks.format(**names)
    return None


def _bmad_home(root: Path) -> Path | None:
    """The folder itself, or the only one in it, as in Brain_AD/BraTS2021_slice."""
    inner = subfolders(root) if root.name.lower().endswith(("_ad", "-ad")) else []
    homes = [root, *inner] if len(inner) == 1 else [root]
    splits = ("train", "good"), ("test", "Ungood")
    return next((home for home in homes if all(_bmad_folders(home, *split) for split in splits)), None)


def _bmad(root: Path) -> Found:
    home = _bmad_home(root) or root
    found: dict[tuple[str, str], list[Sample]] = {}
    for split, label in (("train", "good"), ("test", "good"), ("test", "Ungood")):
        folder, truth = _bmad_folders(home, split, label) or (root, root)
        masks = {stem(path, truth): path for path in pictures(truth)} if label == "Ungood" else {}
        images = pictures(folder) if folder != root else []
        found[split, label] = [
            Sample(path, 1, masks.get(stem(path, folder)), label) if label == "Ungood" else Sample(path, 0)
            for path in images
        ]
    return found["train", "good"], [], found["test", "Ungood"] + found["test", "good"], []


# Others


def _visa(root: Path) -> Found:
    """The official split of one category, from the table beside it.

    Raises:
        DatasetError: The table is not there, cannot be read, or does not know the category.
    """
    category = root.absolute()
    table = category.parent / "split_csv" / "1cls.csv"
    if not table.is_file():
        raise DatasetError(f"{table}: is missing, and it says which pictures train; copy it there from the archive")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["object"] == category.name]
        if not rows:
            raise DatasetError(
                f"{table}: lists no {category.name!r}; give the folder the name that it has in the archive"
            )
        train, test, missing = [], [], []
        for row in rows:
            path, bad = _below(root, row["image"]), row["label"] != "normal"
            if not path.is_file():
                missing.append(row["image"])
            elif row["split"] == "test":
                mask = _below(root, row["mask"]) if row["mask"] else None
                test.append(Sample(path, 1, mask, "anomaly") if bad else Sample(path, 0))
            elif not bad:
                train.append(Sample(path, 0))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError) as error:
        raise DatasetError(f"{table}: cannot be read ({error!r}); copy it again from the archive") from error
    problems = [f"Listed in {table.name}, yet not there: {some(missing)}."] if missing else []
    return train, [], test, problems + unused([root / "Data/Images"], [*train, *test], root)


def _below(root: Path, path: str) -> Path:
    """A path that begins with the name of the category, from its folder on."""
    return root.joinpath(*Path(path).parts[1:])


def _dagm(root: Path) -> Found:
    """Train and Test hold both kinds; what Label/Labels.txt says is defective is so, and what has a mask.

    Raises:
        DatasetError: A Label folder is missing, or a line of Labels.txt makes no sense.
    """
    found: dict[str, list[Sample]] = {}
    problems = []
    for part in ("Train", "Test"):
        folder, labels = root / part, root / part / "Label"
        if not labels.is_dir():
            raise DatasetError(f"{labels}: is missing, and it says what is defective; unpack the archive again")
        masks = {path.stem.removesuffix("_label"): path for path in pictures(labels)}
        defective = set(masks) | _dagm_defective(labels / "Labels.txt")
        images = [path for path in pictures(folder) if path.parent == folder]
        found[part] = [
            Sample(path, 1, masks.get(path.stem), "defect") if path.stem in defective else Sample(path, 0)
            for path in images
        ]
        if alone := sorted(defective - {path.stem for path in images}):
            problems.append(f"Labelled in {part}/Label, yet not there: {some(alone)}.")
    return [sample for sample in found["Train"] if not sample.label], [], found["Test"], problems


def _dagm_defective(table: Path) -> set[str]:
    """The names of the defective pictures in Labels.txt: number, label, picture, ..., parted by tabs."""
    try:
        rows = [line.split("\t") for line in table.read_text("latin-1").splitlines() if "\t" in line.strip()]
        return {Path(row[2]).stem for row in rows if int(row[1])} if rows else set()
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{table}: cannot be read ({error}); unpack the archive again") from error


def _kolektor(root: Path) -> Found:
    """Every picture has a mask <name>_GT.png, black where it is good: only by opening all of them are labels known."""
    found: dict[str, list[Sample]] = {}
    lacking = []
    for part in ("train", "test"):
        images = {path.stem: path for path in pictures(root / part)}
        found[part] = []
        for name, path in images.items():
            if name.endswith("_GT"):
                continue
            mask = images.get(f"{name}_GT")
            try:
                bad = read_mask(mask).any() if mask else None
            except ImageError:
                bad = None
            if bad is None:
                lacking.append(relative(path, root))
            else:
                found[part].append(Sample(path, 1, mask, "defect") if bad else Sample(path, 0))
    problems = [f"Left out, for want of a mask (_GT) that can be read: {some(lacking)}."] if lacking else []
    return [sample for sample in found["train"] if not sample.label], [], found["test"], problems


def _magnetic_tile(root: Path) -> Found:
    folders = [folder / "Imgs" for folder in subfolders(root) if folder.name.startswith("MT_")]
    train: list[Sample] = []
    test: list[Sample] = []
    masks: list[Sample] = []
    for folder in folders:
        kind = folder.parent.name.removeprefix("MT_").lower()
        truths = {path.stem: path for path in pictures(folder) if path.suffix.lower() == ".png"}
        masks += [Sample(path, 0) for path in truths.values()]
        for path in pictures(folder):
            if path.suffix.lower() in (".jpg", ".jpeg"):
                sample = Sample(path, 0) if kind == "free" else Sample(path, 1, truths.get(path.stem), kind)
                (test if sample.label or held_out(path.name) else train).append(sample)
    return train, [], test, unused(folders, [*train, *test, *masks], root)


_AITEX = {
    **{"002": "broken end", "006": "broken yarn", "010": "broken pick", "016": "weft curling", "019": "fuzzyball"},
    **{"022": "cut selvage", "023": "crease", "025": "warp ball", "027": "knots", "029": "contamination"},
    **{"030": "nep", "036": "weft crack"},
}


def _aitex(root: Path) -> Found:
    """Names are <number>_<code of the defect>_<code of the fabric>, masks <name>_mask.png."""
    train: list[Sample] = []
    test: list[Sample] = []
    for path in pictures(root / "NODefect_images"):
        (test if held_out(path.name) else train).append(Sample(path, 0))
    truth = root / "Mask_images"
    masks = {path.stem: path for path in pictures(truth)}
    several = []
    for path in pictures(root / "Defect_images"):
        code = path.stem.split("_")[1] if path.stem.count("_") > 1 else ""
        if f"{path.stem}_mask1" in masks:
            several.append(relative(path, root))
        test.append(Sample(path, 1, masks.get(f"{path.stem}_mask"), _AITEX.get(code, code or "defect")))
    problems = [] if truth.is_dir() else [f"{truth.name} is missing; unpack it beside Defect_images."]
    if several:
        problems.append(f"Several masks (_mask1, …) of one picture; make one <name>_mask.png of them: {some(several)}.")
    return train, [], test, problems


def _has(*folders: str) -> Callable[[Path], bool]:
    return lambda root: all((root / folder).is_dir() for folder in folders)


LAYOUTS = (  # the first that fits
    Layout(
        "bmad",
        "train/good/*, test/good/*, test/Ungood/*; with masks test/Ungood/img/* and test/Ungood/label/*, or as the "
        "archives Liver_AD and Retina_RESC_AD have them",
        lambda root: _bmad_home(root) is not None,
        _bmad,
        "mvtec",
    ),
    Layout(
        "mvtec_loco",
        "train/good/*, validation/good/*, test/<kind>/*, ground_truth/<kind>/<name>/*.png a region each, "
        "defects_config.json",
        lambda root: _is_mvtec(root) and (root / "defects_config.json").is_file(),
        _loco,
        "mvtec",
    ),
    Layout(
        "mvtec",
        "train/good/*, test/good/*, test/<defect>/*, ground_truth/<defect>/<name>_mask.*",
        _is_mvtec,
        _mvtec,
        "mvtec",
    ),
    Layout(
        "btad",
        "train/ok/*, test/ok/*, test/ko/*, ground_truth/ko/<name>.*",
        _has("train/ok", "test"),
        lambda root: _mvtec(root, "ok"),
        "btad",
    ),
    Layout(
        "visa",
        "Data/Images/{Normal,Anomaly}/*, Data/Masks/Anomaly/*, and split_csv/1cls.csv beside the categories",
        _has("Data/Images/Normal"),
        _visa,
        "visa",
    ),
    Layout(
        "dagm",
        "Train/*, Train/Label/<name>_label.*, Train/Label/Labels.txt, and Test likewise",
        lambda root: _has("Train/Label")(root) or _has("Test/Label")(root),
        _dagm,
        "dagm",
    ),
    Layout("oct2017", "train/NORMAL/*, test/{CNV,DME,DRUSEN,NORMAL}/*", _has("train/NORMAL", "test/NORMAL"), _oct2017),
    Layout(
        "kolektorsdd2",
        "train/<name>.png, train/<name>_GT.png, and test likewise",
        lambda root: any(any((root / part).glob("*_GT.png")) for part in ("train", "test")),
        _kolektor,
    ),
    Layout(
        "magnetic_tile",
        "MT_<kind>/Imgs/<name>.jpg, MT_<kind>/Imgs/<name>.png the mask",
        _has("MT_Free/Imgs"),
        _magnetic_tile,
    ),
    Layout(
        "aitex",
        "NODefect_images/<roll>/*, Defect_images/*, Mask_images/<name>_mask.png",
        _has("NODefect_images", "Defect_images"),
        _aitex,
    ),
)
