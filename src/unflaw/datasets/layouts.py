"""Layouts of public benchmarks on disk, as their archives unpack: recognition, and reading of samples.

The case of names does not matter. Licences and published counts are in `unflaw.datasets.public`.
"""

import csv
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from unflaw.datasets.samples import (
    DatasetError,
    Sample,
    Saturated,
    Splits,
    Tree,
    relative,
    stem,
    subfolders,
)
from unflaw.errors import ImageError
from unflaw.imaging.reading import read, read_mask
from unflaw.io.listing import is_image, list_images, walk

TEST_EVERY = 5  # without an official split, one good image in five is for testing


@dataclass(frozen=True)
class Layout:
    """Layout of a data set."""

    name: str
    sketch: str  # the paths, for documentation
    fits: Callable[[Tree], bool]
    read: Callable[[Tree], Splits]
    group: str = ""  # folders of one group are categories of one data set; "": it has none


def layout_of(root: Path) -> Layout | None:
    """Return the layout of a data set, or None, as for a folder of categories or of images."""
    tree = Tree(root)
    return next((layout for layout in LAYOUTS if layout.fits(tree)), None)


def categories(root: Path) -> list[Path]:
    """List the categories in a folder that is not itself a data set."""
    groups: dict[str, list[Path]] = defaultdict(list)
    if not layout_of(root):
        for folder in subfolders(root):
            if (layout := layout_of(folder)) and layout.group:
                groups[layout.group].append(folder)
    return next((groups[layout.group] for layout in LAYOUTS if layout.group in groups), [])


def held_out(name: str) -> bool:
    """Return True if a good image of this name is for testing, by the SHA-256 of the name alone."""
    return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % TEST_EVERY == 0


def _match_masks(names: Iterable[str], masks: Mapping[str, Path], *forms: str) -> dict[str, Path]:
    """Match names of images and masks by forms such as "{}_mask": first with exact spelling, then ignoring case."""
    names = list(names)
    wanted = [(name, form.format(name)) for form in reversed(forms) for name in names]
    found = {name: masks[called] for name, called in wanted if called in masks}
    taken = set(found.values())
    left = {called.casefold(): path for called, path in masks.items() if path not in taken}
    return {name: left[called.casefold()] for name, called in wanted if called.casefold() in left} | found


# MVTec AD and its kin

_MASK_FOLDERS = r"(ground[-_ ]?)?truths?|gts?|masks?|labels?|annotations?|segmentations?"


def _is_mvtec(tree: Tree) -> bool:
    return _has("train/good")(tree) or (not tree.path("train").exists() and _has("test/good")(tree))


def _good(tree: Tree, folder: str) -> list[Sample]:
    return [Sample(path, 0) for path in tree.images(tree.path(folder))]


def _mvtec(tree: Tree, good: str = "good") -> Splits:
    train, validation, test = _good(tree, f"train/{good}"), _good(tree, f"validation/{good}"), _test_samples(tree, good)
    parts = ("train", "validation", "test", "ground_truth")
    tree.report_unused([tree.path(part) for part in parts[:3]], [*train, *validation, *test])
    known = [folder for folder in subfolders(tree.root) if folder.name.casefold() in parts] + _mask_folders(tree)
    others = [folder for folder in subfolders(tree.root) if folder not in known]
    others = [folder for folder in others if any(is_image(entry.path) for entry in walk(os.fspath(folder)))]
    tree.report("Folders with images that were not used", others, f"; used are {', '.join(parts)}.")
    return train, validation, test


def _mask_folders(tree: Tree) -> list[Path]:
    """List the folder of masks, ground_truth; without it, folders with similar names."""
    truth = tree.path("ground_truth")
    others = [folder for folder in subfolders(tree.root) if re.fullmatch(_MASK_FOLDERS, folder.name, re.I)]
    return [truth] if truth.is_dir() else others


def _test_samples(tree: Tree, good: str) -> list[Sample]:
    """Read the images in test/<kind>, with their masks in ground_truth/<kind>: files, or folders of regions."""
    tested, truth, fine = tree.path("test"), tree.path("ground_truth"), tree.path(f"test/{good}")
    # the tree reports names that differ from `good` only by case
    kinds = [folder for folder in subfolders(tested) if folder == fine or folder.name.casefold() != good.casefold()]
    folded = [folder.name.casefold() for folder in kinds]
    alike = [folder for folder in kinds if folded.count(folder.name.casefold()) > 1]
    tree.report("Kinds of defect whose names differ by case only, and count as several", alike)
    test = []
    for folder in kinds:
        images = tree.images(folder)
        if not images:
            tree.problems.append(f"{relative(folder, tree.root)} holds no images.")
        of_kind = truth / folder.name if folder in alike else tree.path(folder.name, truth)
        masks = {path.name: path for path in subfolders(of_kind)}
        masks |= {stem(path, of_kind): path for path in tree.images(of_kind)}
        of = _match_masks((stem(path, folder) for path in images), masks, "{}_mask", "{}")
        label, kind = (0, "good") if folder == fine else (1, folder.name)
        test += [Sample(path, label, of.get(stem(path, folder)), kind) for path in images]

    def name(sample: Sample) -> str:
        below = f"{truth.name}/{stem(sample.path, tested)}"
        return f"{below}_mask.* or {below}.*"

    truths = _mask_folders(tree)
    tree.report_masks(truths, [path for folder in truths for path in tree.images(folder)], test, name)
    return test


def _loco(tree: Tree) -> Splits:
    """Read MVTec LOCO AD: the value of a mask gives the kind of defect, and defects_config.json its saturation."""
    train, validation, test = _mvtec(tree)
    config = tree.path("defects_config.json", file=True)
    try:
        kinds = {
            int(kind["pixel_value"]): (float(kind["saturation_threshold"]), bool(kind["relative_saturation"]))
            for kind in json.loads(config.read_text("utf-8"))
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
                unknown.append(mask)
        whole.append(replace(sample, regions=tuple(regions)))
    tree.report(f"Masks whose pixel value is not in {config.name}, left out of the regions", unknown)
    return train, validation, whole


def _oct2017(tree: Tree) -> Splits:
    train, test = _good(tree, "train/NORMAL"), _test_samples(tree, "NORMAL")
    tree.report_unused([tree.path("train/NORMAL"), tree.path("test")], [*train, *test])
    return train, [], test


# BMAD: its archives have different layouts

_BMAD = (  # {s} is a split, {S} capitalised, {l} a label
    ("{s}/{l}/img", "{s}/{l}/label"),
    ("{s}/img/{l}", "{s}/label/{l}"),
    ("{S}/{s}/{l}", "{S}/{s}_label/{l}"),
    ("{s}/{l}", "{s}_label/{l}"),
)


def _bmad_folders(tree: Tree, split: str, label: str) -> tuple[Path, Path] | None:
    """Return the folders of the images of a split and label and of their masks."""
    for images, masks in _BMAD:
        names = {"s": split, "S": split.title(), "l": label}
        if (folder := tree.path(images.format(**names))).is_dir():
            return folder, tree.path(masks.format(**names))
    return None


def _bmad_home(root: Path) -> Tree | None:
    """Return the folder itself, or the only one in it, as in Brain_AD/BraTS2021_slice."""
    inner = subfolders(root) if root.name.lower().endswith(("_ad", "-ad")) else []
    homes = [Tree(home) for home in ([root, *inner] if len(inner) == 1 else [root])]
    splits = ("train", "good"), ("test", "Ungood")
    return next((home for home in homes if all(_bmad_folders(home, *split) for split in splits)), None)


def _bmad(tree: Tree) -> Splits:
    home = _bmad_home(tree.root)
    assert home is not None
    found: dict[str, list[Sample]] = {"train/good": [], "test/good": [], "test/Ungood": []}
    folders, masks = [], []
    truth = home.root
    for part in found:
        split, label = part.split("/")
        if (where := _bmad_folders(home, split, label)) is None:
            continue
        folder, truth = where
        folders.append(folder)
        images, truths = home.images(folder), home.images(truth) if split == "test" else []
        of = _match_masks((stem(path, folder) for path in images), {stem(path, truth): path for path in truths}, "{}")
        bad, kind = (1, label) if label == "Ungood" else (0, "good")
        found[part] = [Sample(path, bad, of.get(stem(path, folder)), kind) for path in images]
        masks += truths
    train, test = found["train/good"], found["test/Ungood"] + found["test/good"]
    home.report_masks([truth], masks, test, lambda sample: f"{relative(truth, home.root)}/{sample.path.stem}.*")
    home.report_unused(folders, [*train, *test])
    tree.problems += home.problems + home.notes()
    return train, [], test


# Others


def _visa(tree: Tree) -> Splits:
    """Read the official split of one category from the table beside it."""
    category = tree.root.absolute()
    table = Tree(category.parent).path("split_csv/1cls.csv", file=True)
    if not table.is_file():
        raise DatasetError(f"{table}: is missing, and it says which images train; copy it there from the archive")
    train, test, missing, listed = [], [], [], {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["object"].casefold() == category.name.casefold()]
        for row in rows:
            path, bad = _in_category(tree, row["image"]), row["label"] != "normal"
            if not path.is_file():
                missing.append(row["image"])
            elif row["split"] == "test":
                listed[path] = row["mask"]
                mask = _in_category(tree, row["mask"]) if row["mask"] else None
                mask = mask if mask and mask.is_file() else None
                test.append(Sample(path, 1, mask, "anomaly") if bad else Sample(path, 0, mask))
            elif not bad:
                train.append(Sample(path, 0))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{table}: cannot be read ({error!r}); copy it again from the archive") from error
    if not rows:
        raise DatasetError(f"{table}: lists no {category.name!r}; give the folder the name that it has in the archive")
    tree.report(f"Listed in {table.name}, but missing", missing)
    truth = tree.path("Data/Masks")
    unlisted = f"what {table.name} says, if anything"
    tree.report_masks([truth], tree.images(truth), test, lambda sample: listed[sample.path] or unlisted)
    tree.report_unused([tree.path("Data/Images")], [*train, *test])
    return train, [], test


def _in_category(tree: Tree, path: str) -> Path:
    """Resolve a path of the table, which begins with the name of the category."""
    return tree.path("/".join(Path(path).parts[1:]), file=True)


def _dagm(tree: Tree) -> Splits:
    """Read DAGM 2007: images of Train and Test are defective if Label/Labels.txt says so or they have a mask."""
    found: dict[str, list[Sample]] = {}
    for part in ("Train", "Test"):
        folder, labels = tree.path(part), tree.path(f"{part}/Label")
        if not labels.is_dir():
            raise DatasetError(f"{labels}: is missing, and it says what is defective; unpack the archive again")
        table = tree.path("Labels.txt", labels, file=True)
        masks = {re.sub("_label$", "", path.stem, flags=re.I): path for path in tree.images(labels)}
        images = [path for path in tree.images(folder) if path.parent == folder]
        of = _match_masks((path.stem for path in images), masks, "{}")
        labelled = _dagm_defective(table)
        defective = {name.casefold() for name in [*of, *labelled]}
        found[part] = [
            Sample(path, 1, of.get(path.stem), "defect") if path.stem.casefold() in defective else Sample(path, 0)
            for path in images
        ]
        there = {path.stem.casefold() for path in images}
        alone = sorted(name for name in {*masks, *labelled} if name.casefold() not in there)
        hint = "." if labelled.issuperset(alone) else ". A mask is called <name>_label.*."
        tree.report(f"Labelled in {relative(labels, tree.root)}, but missing", alone, hint)
        tree.report_unused([folder], [*images, *tree.images(labels), table])
    return [sample for sample in found["Train"] if not sample.label], [], found["Test"]


def _dagm_defective(table: Path) -> set[str]:
    """Read the names of the defective images in Labels.txt: number, label, image, ..., separated by tabs."""
    try:
        rows = [line.split("\t") for line in table.read_text("latin-1").splitlines() if "\t" in line.strip()]
        return {Path(row[2]).stem for row in rows if int(row[1])} if rows else set()
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{table}: cannot be read ({error}); unpack the archive again") from error


def _is_kolektor(tree: Tree) -> bool:
    names = (Path(name) for part in ("train", "test") for name in tree.names(tree.path(part)))  # in lower case
    return any(name.stem.endswith("_gt") and is_image(name) for name in names)


def _kolektor(tree: Tree) -> Splits:
    """Read KolektorSDD2: every image has a mask <name>_GT.png, which is black if the image is good."""
    found: dict[str, list[Sample]] = {"train": [], "test": []}
    lacking, used = [], []
    for part, samples in found.items():
        images = {path.stem: path for path in tree.images(tree.path(part))}
        truths = {name: images.pop(name) for name in list(images) if name.casefold().endswith("_gt")}
        of = _match_masks(images, truths, "{}_GT")
        used += [*images.values(), *of.values()]
        for name, path in images.items():
            try:
                bad = read_mask(of[name]).any()
            except (KeyError, ImageError):
                lacking.append(path)
            else:
                samples.append(Sample(path, 1, of[name], "defect") if bad else Sample(path, 0))
    tree.report("Left out, because the mask (_GT) is missing or cannot be read", lacking)
    tree.report_unused([tree.path(part) for part in found], used)
    return [sample for sample in found["train"] if not sample.label], [], found["test"]


def _magnetic_tile(tree: Tree) -> Splits:
    kinds = [folder for folder in subfolders(tree.root) if folder.name.casefold().startswith("mt_")]
    folders = [tree.path("Imgs", folder) for folder in kinds]
    train: list[Sample] = []
    test: list[Sample] = []
    masks: list[Path] = []
    for folder in folders:
        kind = folder.parent.name[len("MT_") :].lower()
        files = tree.images(folder)
        truths = {path.stem: path for path in files if path.suffix.lower() == ".png"}
        images = [path for path in files if path.suffix.lower() in (".jpg", ".jpeg")]
        of = _match_masks((path.stem for path in images), truths, "{}")
        masks += of.values()
        for path in images:
            sample = Sample(path, 0) if kind == "free" else Sample(path, 1, of.get(path.stem), kind)
            (test if sample.label or held_out(path.name) else train).append(sample)
    tree.report_unused(folders, [*train, *test, *masks])
    return train, [], test


_AITEX = {
    **{"002": "broken end", "006": "broken yarn", "010": "broken pick", "016": "weft curling", "019": "fuzzyball"},
    **{"022": "cut selvage", "023": "crease", "025": "warp ball", "027": "knots", "029": "contamination"},
    **{"030": "nep", "036": "weft crack"},
}


def _aitex(tree: Tree) -> Splits:
    """Read AITEX: images are <number>_<code of the defect>_<code of the fabric>, masks <name>_mask.png."""
    train: list[Sample] = []
    test: list[Sample] = []
    fine, broken, truth = (tree.path(name) for name in ("NODefect_images", "Defect_images", "Mask_images"))
    for path in tree.images(fine):
        (test if held_out(path.name) else train).append(Sample(path, 0))
    images, masks = tree.images(broken), {path.stem: path for path in tree.images(truth)}
    of = _match_masks((path.stem for path in images), masks, "{}_mask")
    parts = {path: re.sub(r"_mask\d+$", "", path.stem, flags=re.I) for path in masks.values()}
    several = {path.stem: path for path in images if path.stem in parts.values()}
    for path in images:
        code = path.stem.split("_")[1] if path.stem.count("_") > 1 else ""
        test.append(Sample(path, 1, of.get(path.stem), _AITEX.get(code, code or "defect")))
    if not truth.is_dir():
        tree.problems.append(f"{truth.name} is missing; unpack it beside Defect_images.")
    tree.report("Several masks (_mask1, …) of one image; make one <name>_mask.png of them", several.values())
    left = [path for path, name in parts.items() if name not in several]
    tree.report_masks([truth], left, test, lambda sample: f"{truth.name}/{sample.path.stem}_mask.*")
    tree.report_unused([fine, broken], [*train, *test])
    return train, [], test


def _has(*folders: str) -> Callable[[Tree], bool]:
    return lambda tree: all(tree.path(folder).is_dir() for folder in folders)


LAYOUTS = (  # the first that fits
    Layout(
        "bmad",
        "train/good/*, test/good/*, test/Ungood/*; with masks test/Ungood/img/* and test/Ungood/label/*, or as the "
        "archives Liver_AD and Retina_RESC_AD have them",
        lambda tree: _bmad_home(tree.root) is not None,
        _bmad,
        "mvtec",
    ),
    Layout(
        "mvtec_loco",
        "train/good/*, validation/good/*, test/<kind>/*, ground_truth/<kind>/<name>/*.png a region each, "
        "defects_config.json",
        lambda tree: _is_mvtec(tree) and tree.path("defects_config.json", file=True).is_file(),
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
        lambda tree: _mvtec(tree, "ok"),
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
        lambda tree: _has("Train/Label")(tree) or _has("Test/Label")(tree),
        _dagm,
        "dagm",
    ),
    Layout("oct2017", "train/NORMAL/*, test/{CNV,DME,DRUSEN,NORMAL}/*", _has("train/NORMAL", "test/NORMAL"), _oct2017),
    Layout(
        "kolektorsdd2",
        "train/<name>.png, train/<name>_GT.png, and test likewise",
        _is_kolektor,
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
