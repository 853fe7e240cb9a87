"""Public benchmarks as they unpack: where they come from, how they lie on disk, and which pictures train.

A collection has categories, each a data set of its own; some have only one, which is the folder itself. Counts are
those that the authors publish, where we are sure of them: (training, good for test, defective for test).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unflaw.datasets.layouts import (
    Dataset,
    DatasetError,
    Found,
    Sample,
    Saturated,
    images,
    is_mvtec,
    read_mvtec,
    subfolders,
)
from unflaw.images import ImageError, read

Counts = tuple[int, int, int]
KINDS = "training", "good test", "defective test"
NON_COMMERCIAL = "CC BY-NC-SA 4.0: not for commercial use"


@dataclass(frozen=True)
class Collection:
    """A public benchmark.

    Attributes:
        name: As in `Dataset.layout`.
        title, licence, source, citation: For people; `source` is the page that has it.
        layout: What a category looks like on disk.
        split: Which pictures train and which are for test.
        here: Whether a folder is a category, by names alone.
        read: Train, validation, test and problems of a category.
        categories: Counts by category, where they are known; the single category of some is "".
    """

    name: str
    title: str
    licence: str
    source: str
    citation: str
    layout: str
    split: str
    here: Callable[[Path], bool]
    read: Callable[[Path], Found]
    categories: Mapping[str, Counts | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """What `check` finds of a collection.

    Attributes:
        collection: Which one it is.
        found: Counts by category.
        faults: What is missing or too much, a sentence each.
    """

    collection: Collection
    found: dict[str, Counts]
    faults: list[str]


def collection_of(folder: Path) -> Collection | None:
    """The collection that a folder is a category of; None for layouts that are no collection's own, as MVTec AD's."""
    return next((c for c in COLLECTIONS if c.read is not read_mvtec and c.here(folder)), None)


def find(roots: Iterable[Path]) -> dict[str, Path]:
    """Where collections lie, by name: at the roots, or up to two folders below them; the first of each."""
    found: dict[str, Path] = {}
    for root in roots:
        below = subfolders(root)
        for folder in [root, *below, *(deep for parent in below for deep in subfolders(parent))]:
            if collection := recognise(folder):
                found.setdefault(collection.name, folder)
    return found


def recognise(folder: Path) -> Collection | None:
    """The collection in a folder that holds some of its categories, or is the only one; None if there is none."""
    for collection in COLLECTIONS:
        if "" in collection.categories:
            if collection.here(folder):
                return collection
        elif any((folder / name).is_dir() and collection.here(folder / name) for name in collection.categories):
            return collection
    return None


def check(folder: Path, load: Callable[[Path], Dataset]) -> Check:
    """Compares a collection on disk with what was published.

    Args:
        folder: Of the whole collection.
        load: `load_dataset`.

    Raises:
        DatasetError: No collection is recognised.
    """
    collection = recognise(folder)
    if collection is None:
        known = ", ".join(c.name for c in COLLECTIONS)
        raise DatasetError(f"{folder}: is none of {known}; name the folder that holds its categories, as it unpacks")
    found, faults = {}, []
    for name, expected in collection.categories.items():
        place, label = folder / name, name or folder.name
        if not (place.is_dir() and collection.here(place)):
            faults.append(f"{label}: is missing.")
            continue
        try:
            dataset = load(place)
        except DatasetError as error:
            faults.append(f"{label}: {error}")
            continue
        bad = sum(sample.label for sample in dataset.test)
        found[label] = len(dataset.train), len(dataset.test) - bad, bad
        if expected:
            for kind, have, want in zip(
                ("training", "good test", "defective test"), found[label], expected, strict=True
            ):
                if have != want:
                    faults.append(f"{label}: {have} {kind} pictures, published are {want}.")
        faults += [f"{label}: {problem}" for problem in dataset.problems]
    return Check(collection, found, faults)


# Readers


def _in(folder: Path) -> list[Path]:
    """Pictures right in a folder."""
    return [path for path in images(folder) if path.parent == folder]


def _for_test(path: Path) -> bool:
    """A fifth of good pictures, by a digest of their names: no other file changes the side of one."""
    return int(hashlib.sha256(path.stem.encode()).hexdigest()[:8], 16) % 5 == 0


def _good(paths: Iterable[Path]) -> list[Sample]:
    return [Sample(path, 0) for path in paths]


def _same_name(folder: Path, name: str) -> Path | None:
    """The picture of a name in a folder, whatever its suffix."""
    return (
        next((path for path in sorted(folder.glob(f"{name}.*")) if path.is_file()), None) if folder.is_dir() else None
    )


def _loco(root: Path) -> Found:
    train, validation, test, problems = read_mvtec(root)
    file = root / "defects_config.json"
    try:
        entries = json.loads(file.read_text("utf-8"))
        limits = {e["pixel_value"]: (float(e["saturation_threshold"]), bool(e["relative_saturation"])) for e in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file}: cannot be read ({error!r}); unpack the data again") from error
    return train, validation, [_saturated(sample, limits, problems) for sample in test], problems


def _saturated(sample: Sample, limits: Mapping[int, tuple[float, bool]], problems: list[str]) -> Sample:
    if sample.mask is None or not sample.mask.is_dir():
        return sample
    regions = []
    for path in _in(sample.mask):
        try:
            value = int(read(path).max())
            regions.append(Saturated(path, *limits[value]))
        except (ImageError, KeyError) as error:
            problems.append(f"{path}: has no saturation ({error}); sPRO leaves its picture out of regions.")
            return sample
    return Sample(sample.path, sample.label, sample.mask, sample.defect, tuple(regions))


def _btad(root: Path) -> Found:
    truth = root / "ground_truth" / "ko"
    test = _good(images(root / "test" / "ok"))
    test += [Sample(path, 1, _same_name(truth, path.stem), "ko") for path in images(root / "test" / "ko")]
    return _good(images(root / "train" / "ok")), [], test, []


def _visa(root: Path) -> Found:
    table = root.parent / "split_csv" / "1cls.csv"
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["object"] == root.name]
        train, test, problems = list[Sample](), list[Sample](), list[str]()
        for row in rows:
            path, bad = root.parent / row["image"], row["label"] != "normal"
            if not path.is_file():
                problems.append(f"{row['image']}: stands in {table.name}, but is missing.")
                continue
            mask = root.parent / row["mask"] if bad and row["mask"] else None
            sample = Sample(path, int(bad), mask, "anomaly" if bad else "good")
            (train if row["split"] == "train" else test).append(sample)
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(
            f"{table}: cannot be read as the split of VisA ({error!r}); unpack the data again"
        ) from error
    return train, [], test, problems


def _oct(root: Path) -> Found:
    test = [
        Sample(path, int(folder.name != "NORMAL"), None, "good" if folder.name == "NORMAL" else folder.name)
        for folder in subfolders(root / "test")
        for path in images(folder)
    ]
    return _good(images(root / "train" / "NORMAL")), [], test, []


def _kolektor(root: Path) -> Found:
    def part(name: str) -> list[Sample]:
        paths = {path.stem: path for path in _in(root / name)}
        samples = []
        for stem, path in paths.items():
            if not stem.endswith("_GT"):
                mask = paths.get(f"{stem}_GT")
                bad = mask is not None and bool(read(mask).max())
                samples.append(Sample(path, int(bad), mask if bad else None, "defect" if bad else "good"))
        return samples

    return [sample for sample in part("train") if not sample.label], [], part("test"), []


def _magnetic_tile(root: Path) -> Found:
    def pictures(kind: str) -> list[Path]:
        return [path for path in images(root / kind / "Imgs") if path.suffix.lower() == ".jpg"]

    good = pictures("MT_Free")
    test = _good(path for path in good if _for_test(path))
    for folder in subfolders(root):
        kind = folder.name.removeprefix("MT_")
        if folder.name.startswith("MT_") and kind != "Free":
            test += [Sample(path, 1, _mask_beside(path), kind.lower()) for path in pictures(folder.name)]
    return _good(path for path in good if not _for_test(path)), [], test, []


def _mask_beside(path: Path) -> Path | None:
    mask = path.with_suffix(".png")
    return mask if mask.is_file() else None


def _aitex(root: Path) -> Found:
    masks = {path.stem: path for path in images(root / "Mask_images")}
    test, problems = [], []
    for path in images(root / "Defect_images"):
        several = [masks[name] for name in sorted(masks) if name.startswith(f"{path.stem}_mask")]
        if len(several) > 1:
            problems.append(f"{path.name}: has {len(several)} masks; only {several[0].name} is used.")
        test.append(Sample(path, 1, several[0] if several else None, "defect"))
    good = images(root / "NODefect_images")
    test += _good(path for path in good if _for_test(path))
    return _good(path for path in good if not _for_test(path)), [], test, problems


def _dagm(root: Path) -> Found:
    def part(name: str) -> list[Sample]:
        labels = root / name / "Label"
        masks = [(path, _same_name(labels, f"{path.stem}_label")) for path in _in(root / name)]
        return [Sample(path, int(mask is not None), mask, "defect" if mask else "good") for path, mask in masks]

    return [sample for sample in part("Train") if not sample.label], [], part("Test"), []


def _bmad(root: Path) -> Found:
    def pictures(folder: Path) -> list[Path]:
        return images(folder / "img") if (folder / "img").is_dir() else _in(folder)

    bad = root / "test" / "Ungood"
    test = _good(pictures(root / "test" / "good"))
    test += [Sample(path, 1, _same_name(bad / "label", path.stem), "Ungood") for path in pictures(bad)]
    return _good(images(root / "train" / "good")), _good(pictures(root / "valid" / "good")), test, []


# Collections

MVTEC_AD: dict[str, Counts] = {
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "hazelnut": (391, 40, 70),
    "leather": (245, 32, 92),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "tile": (230, 33, 84),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "wood": (247, 19, 60),
    "zipper": (240, 32, 119),
}
OFFICIAL = "official"
COLLECTIONS: tuple[Collection, ...] = (
    Collection(
        "mvtec_ad",
        "MVTec AD",
        NON_COMMERCIAL,
        "mvtec.com/company/research/datasets/mvtec-ad",
        "Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021",
        "train/good, test/<defect>, ground_truth/<defect>/<name>_mask.png",
        OFFICIAL,
        is_mvtec,
        read_mvtec,
        MVTEC_AD,
    ),
    Collection(
        "mvtec_loco",
        "MVTec LOCO AD",
        NON_COMMERCIAL,
        "mvtec.com/company/research/datasets/mvtec-loco",
        "Bergmann et al., Beyond Dents and Scratches, IJCV 2022",
        "as MVTec AD, with validation/good, ground_truth/<defect>/<name>/*.png, and defects_config.json",
        OFFICIAL,
        lambda folder: is_mvtec(folder) and (folder / "defects_config.json").is_file(),
        _loco,
        {
            "breakfast_box": (351, 102, 173),
            "juice_bottle": (335, 94, 236),
            "pushpins": (372, 138, 172),
            "screw_bag": (360, 122, 219),
            "splicing_connectors": (354, 119, 193),
        },
    ),
    Collection(
        "btad",
        "BTAD, beanTech anomaly detection",
        "CC BY-NC-SA 4.0, says its page: not for commercial use",
        "avires.dimi.uniud.it/papers/btad/btad.zip",
        "Mishra et al., VT-ADL, ISIE 2021",
        "train/ok, test/ok, test/ko, ground_truth/ko",
        OFFICIAL,
        lambda folder: (folder / "train" / "ok").is_dir() and (folder / "test").is_dir(),
        _btad,
        {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)},
    ),
    Collection(
        "visa",
        "VisA, Visual Anomaly",
        "CC BY 4.0",
        "github.com/amazon-science/spot-diff",
        "Zou et al., SPot-the-Difference, ECCV 2022",
        "Data/Images/{Normal,Anomaly}, Data/Masks/Anomaly; beside the categories split_csv/1cls.csv",
        "official, split_csv/1cls.csv",
        lambda folder: (folder / "Data" / "Images" / "Normal").is_dir(),
        _visa,
        {
            "candle": (900, 100, 100),
            "capsules": (542, 60, 100),
            "cashew": (450, 50, 100),
            "chewinggum": (453, 50, 100),
            "fryum": (450, 50, 100),
            "macaroni1": (900, 100, 100),
            "macaroni2": (900, 100, 100),
            "pcb1": (904, 100, 100),
            "pcb2": (901, 100, 100),
            "pcb3": (905, 101, 100),
            "pcb4": (904, 101, 100),
            "pipe_fryum": (450, 50, 100),
        },
    ),
    Collection(
        "oct2017",
        "OCT-2017, retinal OCT of Kermany et al., version 3",
        "CC BY 4.0",
        "data.mendeley.com/datasets/rscbjbr9sj/3",
        "Kermany et al., Identifying Medical Diagnoses and Treatable Diseases, Cell 2018",
        "train/{CNV,DME,DRUSEN,NORMAL}, test/{CNV,DME,DRUSEN,NORMAL}",
        "official; of train only NORMAL, and val, of eight pictures each, is not used",
        lambda folder: all((folder / part / "NORMAL").is_dir() for part in ("train", "test")),
        _oct,
        {"": (26315, 242, 726)},
    ),
    Collection(
        "kolektorsdd2",
        "KolektorSDD2",
        NON_COMMERCIAL,
        "vicos.si/resources/kolektorsdd2",
        "Božič et al., Mixed supervision for surface-defect detection, Computers in Industry 2021",
        "train/<name>.png and <name>_GT.png, test likewise",
        "official; of train only the good pictures",
        lambda folder: any((folder / "train").glob("*_GT.png")) and (folder / "test").is_dir(),
        _kolektor,
        {"": (2085, 894, 110)},
    ),
    Collection(
        "magnetic_tile",
        "Magnetic tile surface defects",
        "for research, with citation",
        "github.com/abin24/Magnetic-tile-defect-datasets.",
        "Huang et al., Surface defect saliency of magnetic tile, The Visual Computer 2020",
        "MT_Free/Imgs/*.jpg, MT_<defect>/Imgs/*.jpg and *.png (masks)",
        "ours, there is no official one: all defects and a fifth of MT_Free, by a digest of the names, are for test",
        lambda folder: (folder / "MT_Free" / "Imgs").is_dir(),
        _magnetic_tile,
        {"": None},
    ),
    Collection(
        "aitex",
        "AITEX fabric",
        "as on its page",
        "aitex.es/afid",
        "Silvestre-Blanes et al., A Public Fabric Database for Defect Detection, Autex Research Journal 2019",
        "NODefect_images/<fabric>/*.png, Defect_images/*.png, Mask_images/<name>_mask*.png",
        "ours, there is no official one: all defects and, by a digest of names, a fifth of the good are for test",
        lambda folder: (folder / "NODefect_images").is_dir() and (folder / "Defect_images").is_dir(),
        _aitex,
        {"": None},
    ),
    Collection(
        "dagm2007",
        "DAGM 2007",
        "as on its page",
        "hci.iwr.uni-heidelberg.de/content/weakly-supervised-learning-industrial-optical-inspection",
        "Wieler and Hahn, Weakly Supervised Learning for Industrial Optical Inspection, DAGM 2007",
        "Train/*.PNG, Train/Label/<name>_label.PNG, Test likewise",
        "official; of Train only the good pictures",
        lambda folder: (folder / "Train" / "Label").is_dir() and (folder / "Test").is_dir(),
        _dagm,
        {f"Class{number}": None for number in range(1, 11)},
    ),
    Collection(
        "mpdd",
        "MPDD, metal parts",
        NON_COMMERCIAL,
        "github.com/stepanje/MPDD",
        "Jezek et al., Deep learning-based defect detection of metal parts, ICUMT 2021",
        "as MVTec AD",
        OFFICIAL,
        is_mvtec,
        read_mvtec,
        {
            "bracket_black": (289, 32, 47),
            "bracket_brown": (185, 26, 51),
            "bracket_white": (110, 30, 30),
            "connector": (128, 30, 14),
            "metal_plate": (54, 26, 71),
            "tubes": (122, 32, 69),
        },
    ),
    Collection(
        "bmad",
        "BMAD, six medical sets",
        "CC BY-NC-SA 4.0, and the licences of its sources: not for commercial use",
        "github.com/DorisBao/BMAD",
        "Bao et al., BMAD: Benchmarks for Medical Anomaly Detection, CVPR workshops 2024",
        "train/good, valid and test/{good,Ungood}: the pictures, or img/ with label/ (masks)",
        "official; the good pictures of valid calibrate",
        lambda folder: (folder / "train" / "good").is_dir() and (folder / "test" / "Ungood").is_dir(),
        _bmad,
        dict.fromkeys(("Brain", "Chest", "Histopathology", "Liver", "Retina_OCT2017", "Retina_RESC")),
    ),
)
