"""Public benchmarks: licence, source, citation and published counts, and checks of local copies.

Nothing is downloaded, since most of the licences must be accepted by a person.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unflaw.datasets import load_dataset
from unflaw.datasets.layouts import TEST_EVERY, categories, layout_of
from unflaw.datasets.samples import Dataset, DatasetError, subfolders
from unflaw.io.words import count

Masks = Literal["all", "some", "none"]  # of the defective images; "some": at least one
_COLUMNS = {
    "train": "train",
    "validation": "validation",
    "good": "test, good",
    "defective": "test, defective",
    "normal": "good in all",
}


@dataclass(frozen=True)
class Counts:
    """Numbers of images of a category; None if not known for sure."""

    train: int | None
    good: int | None  # good test images
    defective: int | None
    validation: int | None = 0
    normal: int | None = None  # all good images, if the split is ours
    masks: Masks = "all"


@dataclass(frozen=True)
class Collection:
    """One benchmark."""

    name: str
    layout: str  # of each category, a name in unflaw.datasets.layouts
    licence: str
    page: str
    citation: str
    split: str  # definition of training and test images
    counts: Mapping[str, tuple[Counts, ...]]  # by folder name, for each edition; "" without categories
    folders: Mapping[str, str] = field(default_factory=dict)  # patterns of folder names, if archives vary

    def category(self, folder: Path) -> str | None:
        """Return the category of a data set, by its layout and folder name; None if it is not of this collection."""
        layout = layout_of(folder)
        if layout is None or layout.name != self.layout:
            return None
        if "" in self.counts:
            return ""
        name = folder.absolute().name
        matches = (key for key in self.counts if re.fullmatch(self.folders.get(key, re.escape(key)), name, re.I))
        return next(matches, None)


@dataclass(frozen=True)
class Copy:
    """Local copy of a collection."""

    collection: Collection
    folders: Mapping[str, Path]  # by category
    strangers: tuple[Path, ...]  # data sets of other categories
    whole: bool  # True if the folder is the collection, False for one category

    @property
    def missing(self) -> list[str]:
        """Categories that are missing."""
        return [name for name in self.collection.counts if name not in self.folders] if self.whole else []


@dataclass
class Check:
    """Result of `check`."""

    copy: Copy
    found: dict[str, Counts]  # by category
    masks: dict[str, int]  # usable masks, by category
    wrong: list[str]  # sentences on missing and superfluous images
    notes: list[str]  # other problems that the reader reports

    @property
    def known(self) -> bool:
        """True if there are published counts."""
        counts = (e for name in self.found for e in self.copy.collection.counts[name])
        return any(number is not None for e in counts for number in (e.train, e.good, e.defective, e.normal))


def recognise(root: str | Path) -> Copy | None:
    """Return the collection in a folder, or of a category: the one to which most of its data sets belong."""
    root = Path(root)
    alone = layout_of(root) is not None
    folders = [root] if alone else categories(root)
    copies = []
    for collection in COLLECTIONS:
        named = {name: folder for folder in folders if (name := collection.category(folder)) is not None}
        strangers = tuple(folder for folder in folders if folder not in named.values())
        copies.append(Copy(collection, named, strangers, whole=not alone or "" in collection.counts))
    best = max(copies, key=lambda copy: len(copy.folders))
    return best if best.folders else None


def find(roots: Iterable[str | Path]) -> Iterator[tuple[Path, Copy]]:
    """Iterate over collections in folders and in their direct subfolders."""
    for root in map(Path, roots):
        if copy := recognise(root):
            yield root, copy
        else:
            yield from ((folder, copy) for folder in subfolders(root) if (copy := recognise(folder)))


def check(root: str | Path) -> Check:
    """Read a collection, or one category of it, and compare it with the published counts.

    Raises:
        DatasetError: The folder does not exist or holds no known collection.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: there is no such folder; check the path")
    if (copy := recognise(root)) is None:
        known = ", ".join(collection.name for collection in COLLECTIONS)
        raise DatasetError(f"{root}: is none of {known}, as they unpack; `unflaw datasets` says where to get them")
    result = Check(copy, {}, {}, [f"{name} is missing" for name in copy.missing], [])
    result.wrong += [f"{folder.name} is no category of {copy.collection.name}" for folder in copy.strangers]
    for name, folder in copy.folders.items():
        shown = f"{name}: " if name else ""
        try:
            dataset = load_dataset(folder)
        except DatasetError as error:
            result.wrong.append(f"{shown}{error}")
            continue
        found, masks = result.found[name], result.masks[name] = counted(dataset)
        editions = [_differences(found, masks, edition) for edition in copy.collection.counts[name]]
        result.wrong += [shown + text for text in min(editions, key=len, default=[])]
        result.notes += [shown + text for text in dataset.problems]
    return result


def counted(dataset: Dataset) -> tuple[Counts, int]:
    """Count the images of a data set and its masks."""
    defective = [sample for sample in dataset.test if sample.label]
    good = len(dataset.test) - len(defective)
    train, validation = len(dataset.train), len(dataset.validation)
    masks = sum(sample.mask is not None for sample in defective)
    kind: Masks = "none" if not masks else "all" if masks == len(defective) else "some"
    return Counts(train, good, len(defective), validation, train + validation + good, kind), masks


def _differences(found: Counts, masks: int, published: Counts) -> list[str]:
    wrong = []
    for name, title in _COLUMNS.items():
        here, there = getattr(found, name), getattr(published, name)
        if there is not None and here != there:
            how = f"{abs(here - there)} {'missing' if here < there else 'superfluous'}"
            wrong.append(f"{title}: {here}, published are {there}, {how}")
    if published.masks == "all" and found.masks != "all":
        lacking = (found.defective or 0) - masks
        lack = "lacks" if lacking == 1 else "lack"
        wrong.append(f"{count(lacking, 'defective image')} {lack} a mask that can be used")
    elif published.masks == "some" and not masks:
        wrong.append("there are no masks that can be used")
    return wrong


def _rows(text: str, columns: str = "train good defective", masks: Masks = "all") -> dict[str, tuple[Counts, ...]]:
    """Parse counts by category from lines or semicolons: a name, then a number for each column."""
    counts: dict[str, tuple[Counts, ...]] = {}
    for row in re.split(r"[;\n]", text):
        name, *cells = row.split()
        numbers: dict[str, Any] = dict(zip(columns.split(), map(int, cells), strict=True))
        counts[name] = (Counts(**numbers, masks=masks),)
    return counts


_NON_COMMERCIAL = "CC BY-NC-SA 4.0, not for commercial use"
_OURS = (
    f"Defined here, since there is no official one: good images whose name has a SHA-256 divisible by {TEST_EVERY}, "
    "about a fifth, are test images, and the others training images; so added files do not move others"
)

COLLECTIONS = (
    Collection(
        "MVTec AD",
        "mvtec",
        _NON_COMMERCIAL,
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        "Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 129, 2021",
        "Official",
        _rows(
            """bottle 209 20 63; cable 224 58 92; capsule 219 23 109; carpet 280 28 89; grid 264 21 57
            hazelnut 391 40 70; leather 245 32 92; metal_nut 220 22 93; pill 267 26 141; screw 320 41 119
            tile 230 33 84; toothbrush 60 12 30; transistor 213 60 40; wood 247 19 60; zipper 240 32 119"""
        ),
    ),
    Collection(
        "MVTec LOCO AD",
        "mvtec_loco",
        _NON_COMMERCIAL,
        "https://www.mvtec.com/company/research/datasets/mvtec-loco",
        "Bergmann et al., Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and "
        "Localization, IJCV 130, 2022",
        "Official; its validation images are used for calibration",
        _rows(
            """breakfast_box 351 62 102 173; juice_bottle 335 54 94 236; pushpins 372 69 138 172
            screw_bag 360 60 122 219""",
            "train validation good defective",
        )
        # sources differ by 6 and 1 in how many of these train and calibrate
        | {"splicing_connectors": (Counts(None, 119, 193, validation=None),)},
    ),
    Collection(
        "BTAD",
        "btad",
        f"{_NON_COMMERCIAL} (as anomalib states it)",
        "https://github.com/pankajmishra000/VT-ADL",
        "Mishra et al., VT-ADL: A Vision Transformer Network for Image Anomaly Detection and Localization, ISIE 2021",
        "Official",
        _rows("01 400 21 49; 02 399 30 200; 03 1000 400 41", masks="some"),
    ),
    Collection(
        "VisA",
        "visa",
        "CC BY 4.0",
        "https://github.com/amazon-science/spot-diff",
        "Zou et al., SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and Segmentation, "
        "ECCV 2022",
        "Official, for one class: split_csv/1cls.csv",
        _rows(
            """candle 900 100 100; capsules 542 60 100; cashew 450 50 100; chewinggum 453 50 100; fryum 450 50 100
            macaroni1 900 100 100; macaroni2 900 100 100; pcb1 904 100 100; pcb2 901 100 100; pcb3 905 101 100
            pcb4 904 101 100; pipe_fryum 450 50 100"""
        ),
    ),
    Collection(
        "OCT-2017",
        "oct2017",
        "CC BY 4.0",
        "https://data.mendeley.com/datasets/rscbjbr9sj",
        "Kermany et al., Identifying Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning, Cell 172, "
        "2018",
        "train/NORMAL for training, all of test for testing; the defective training images and val, which only the "
        "copy on Kaggle has, are left out. The first row counts that copy, the second is from the paper",
        {"": (Counts(26315, 242, 726, masks="none"), Counts(51140, 250, 750, masks="none"))},
    ),
    Collection(
        "KolektorSDD2",
        "kolektorsdd2",
        _NON_COMMERCIAL,
        "https://www.vicos.si/resources/kolektorsdd2/",
        "Božič, Tabernik, Skočaj, Mixed supervision for surface-defect detection: from weakly to fully supervised "
        "learning, Computers in Industry 129, 2021",
        "Official, without the 246 defective training images. Images with a black mask are good",
        {"": (Counts(2085, 894, 110, masks="some"),)},
    ),
    Collection(
        "Magnetic Tile",
        "magnetic_tile",
        "none named: the authors welcome its use and ask to be cited",
        "https://github.com/abin24/Magnetic-tile-defect-datasets.",
        "Huang, Qiu, Yuan, Surface defect saliency of magnetic tile, The Visual Computer 36, 2020",
        _OURS,
        {"": (Counts(None, None, 392, normal=952, masks="some"),)},
    ),
    Collection(
        "AITEX",
        "aitex",
        "CC0 1.0 (as Dataset Ninja states it)",
        "https://www.aitex.es/afid/",
        "Silvestre-Blanes et al., A Public Fabric Database for Defect Detection Methods and Results, Autex Research "
        "Journal 19, 2019",
        f"{_OURS}. Counts are not compared: the paper's 140 good and 105 defective images are 141 and 106 in some "
        "copies. Where an image has several masks, merge them",
        {"": (Counts(None, None, None, masks="some"),)},
    ),
    Collection(
        "DAGM 2007",
        "dagm",
        "CC BY 4.0 (as Dataset Ninja states it of the copy on Zenodo)",
        "https://zenodo.org/record/8086136",
        "Wieler, Hahn, Weakly Supervised Learning for Industrial Optical Inspection, DAGM symposium 2007",
        "Official, without the defective training images. Its masks are ellipses around the defects",
        _rows(
            """Class1 496 504 71; Class2 509 491 84; Class3 509 491 84; Class4 493 507 68; Class5 505 495 80
            Class6 492 508 67; Class7 1000 1000 150; Class8 1000 1000 150; Class9 1000 1000 150
            Class10 1000 1000 150"""
        ),
    ),
    Collection(
        "MPDD",
        "mvtec",
        f"{_NON_COMMERCIAL} (as anomalib states it; the authors' page names none)",
        "https://github.com/stepanje/MPDD",
        "Jezek et al., Deep learning-based defect detection of metal parts: evaluating current methods in complex "
        "conditions, ICUMT 2021",
        "Official",
        _rows(
            """bracket_black 289 32 47; bracket_brown 185 26 51; bracket_white 110 30 30; connector 128 30 14
            metal_plate 54 26 71; tubes 122 32 69""",
            masks="some",
        ),
    ),
    Collection(
        "BMAD",
        "bmad",
        f"{_NON_COMMERCIAL} (as anomalib states it); the data sets it is made of have terms of their own",
        "https://github.com/DorisBao/BMAD",
        "Bao et al., BMAD: Benchmarks for Medical Anomaly Detection, CVPR Workshops 2024",
        "Official; its validation images, good and defective ones for model selection, are left out",
        _rows("Brain 7500 640 3075; Liver 1542 833 660; RESC 4297 1041 764", masks="some")
        | _rows("OCT2017 26315 242 726; Chest 8000 781 16413; Camelyon16 5088 1000 997", masks="none"),
        {
            "Brain": ".*(brain|brats).*",
            "Liver": ".*(liver|hist_diy).*",
            "RESC": ".*resc.*",
            "OCT2017": ".*oct.?(20)?17.*",
            "Chest": ".*(chest|rsna).*",
            "Camelyon16": ".*(camelyon|histo).*",
        },
    ),
)
