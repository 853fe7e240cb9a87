"""Public benchmarks: each layout in miniature, as its archive unpacks, whole and damaged."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import Dataset, DatasetError, Saturated, fingerprint, load_categories, load_dataset, public
from unflaw.datasets.layouts import LAYOUTS, held_out, layout_of
from unflaw.datasets.public import COLLECTIONS, Counts, check, find, recognise
from unflaw.imaging.reading import read_mask

pytestmark = pytest.mark.slow

BY_NAME = {collection.name: collection for collection in COLLECTIONS}
numbers = itertools.count()


def image(path: Path, *, value: int | None = None, size: tuple[int, int] = (6, 4)) -> Path:
    """Noise, another each time, or one value everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(next(numbers)).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(noise if value is None else np.full(size[::-1], value, np.uint8)).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (6, 4)) -> Path:
    """Marks the left third."""
    path.parent.mkdir(parents=True, exist_ok=True)
    marked = np.zeros(size[::-1], np.uint8)
    marked[:, : size[0] // 3] = 255
    Image.fromarray(marked).save(path)
    return path


def fill(root: Path, images: dict[str, int], masks: dict[str, int] | None = None) -> Path:
    """Numbered images and masks, such as {"train/good/{}.png": 4}."""
    for pattern, count in images.items():
        for i in range(count):
            image(root / pattern.format(f"{i:03d}"))
    for pattern, count in (masks or {}).items():
        for i in range(count):
            mask(root / pattern.format(f"{i:03d}"))
    return root


def mvtec(root: Path) -> Path:
    images = {"train/good/{}.png": 4, "test/good/{}.png": 2, "test/crack/{}.png": 3}
    return fill(root, images, {"ground_truth/crack/{}_mask.png": 3})


def loco(root: Path) -> Path:
    fill(root, {"train/good/{}.png": 4, "validation/good/{}.png": 2, "test/good/{}.png": 2})
    fill(root, {"test/logical_anomalies/{}.png": 2, "test/structural_anomalies/{}.png": 1})
    for number, values in enumerate([(255,), (254, 255)]):
        for region, value in enumerate(values):
            mask = np.zeros((4, 6), np.uint8)
            mask[region, :2] = value
            path = root / f"ground_truth/logical_anomalies/{number:03d}/{region:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    marked = np.zeros((4, 6), np.uint8)
    marked[1, 1] = 253
    path = root / "ground_truth/structural_anomalies/000/000.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(marked).save(path)
    thresholds = [(255, 1.0, True), (254, 40, False), (253, 0.5, True)]
    kinds = [
        {"defect_name": f"d{value}", "pixel_value": value, "saturation_threshold": t, "relative_saturation": relative}
        for value, t, relative in thresholds
    ]
    (root / "defects_config.json").write_text(json.dumps(kinds))
    return root


def btad(root: Path) -> Path:
    images = {"train/ok/{}.bmp": 4, "test/ok/{}.bmp": 2, "test/ko/{}.bmp": 3}
    return fill(root, images, {"ground_truth/ko/{}.png": 3})


def visa(root: Path) -> Path:
    """One category, whose split is written beside it."""
    fill(root, {"Data/Images/Normal/{}.JPG": 5, "Data/Images/Anomaly/{}.JPG": 2}, {"Data/Masks/Anomaly/{}.png": 2})
    (root / "image_anno.csv").write_text("image,label,mask\n")
    table = root.parent / "split_csv" / "1cls.csv"
    table.parent.mkdir(exist_ok=True)
    lines = table.read_text().splitlines() if table.exists() else ["object,split,label,image,mask"]
    at = f"{root.name}/Data/Images"
    lines += [f"{root.name},{'test' if i < 2 else 'train'},normal,{at}/Normal/{i:03d}.JPG," for i in (4, 0, 3, 1, 2)]
    masks = f"{root.name}/Data/Masks/Anomaly"
    lines += [f"{root.name},test,anomaly,{at}/Anomaly/{i:03d}.JPG,{masks}/{i:03d}.png" for i in range(2)]
    table.write_text("\n".join(lines) + "\n")
    return root


def oct2017(root: Path) -> Path:
    images = {f"test/{kind}/{kind}-{{}}-1.jpeg": 2 for kind in ("CNV", "DME", "DRUSEN", "NORMAL")}
    images |= {"train/NORMAL/NORMAL-{}-2.jpeg": 4, "train/CNV/CNV-{}-2.jpeg": 3, "val/NORMAL/NORMAL-{}-3.jpeg": 1}
    return fill(root, images)


def kolektor(root: Path) -> Path:
    for part, good, bad in (("train", 4, 2), ("test", 2, 3)):
        for i in range(good + bad):
            image(root / part / f"{i:05d}.png")
            truth = root / part / f"{i:05d}_GT.png"
            image(truth, value=0) if i < good else mask(truth)
    return root


def magnetic_tile(root: Path) -> Path:
    names = {"Free": 30, "Blowhole": 3, "Break": 1, "Crack": 2, "Fray": 1, "Uneven": 1}
    for kind, count in names.items():
        for i in range(count):
            image(root / f"MT_{kind}/Imgs/exp1_num_{i}.jpg", size=(16, 16))
            truth = root / f"MT_{kind}/Imgs/exp1_num_{i}.png"
            image(truth, value=0, size=(16, 16)) if kind == "Free" else mask(truth, (16, 16))
    (root / "README.md").touch()
    return root


def aitex(root: Path) -> Path:
    for i in range(30):
        image(root / f"NODefect_images/23{i % 3}/{i:04d}_000_00.png")
    for name in ("0001_002_00", "0044_019_04", "0100_025_08"):
        image(root / f"Defect_images/{name}.png")
    for name in ("0001_002_00_mask", "0044_019_04_mask1", "0044_019_04_mask2"):
        mask(root / f"Mask_images/{name}.png")
    return root


def dagm(root: Path) -> Path:
    for part, good, bad in (("Train", 4, 2), ("Test", 2, 3)):
        lines = ["1"]
        for i in range(good + bad):
            image(root / f"{part}/{i:04d}.PNG")
            if i >= good:
                mask(root / f"{part}/Label/{i:04d}_label.PNG")
            lines.append(f"{i}\t{int(i >= good)}\t{i:04d}.PNG\t0\t{f'{i:04d}_label.PNG' if i >= good else 0}")
        (root / part / "Label/Labels.txt").write_text("\r\n".join(lines) + "\r\n")
    return root


def bmad_brain(root: Path) -> Path:
    images = {"train/good/{}.png": 4, "test/good/img/{}.png": 2, "test/Ungood/img/{}.png": 3}
    images |= {"valid/good/img/{}.png": 1, "valid/Ungood/img/{}.png": 1}
    return fill(root / "BraTS2021_slice", images, {"test/Ungood/label/{}.png": 3}).parent


def bmad_liver(root: Path) -> Path:
    images = {"train/good/{}.png": 4, "test/img/good/{}.png": 2, "test/img/Ungood/{}.png": 3}
    return fill(root / "hist_DIY", images, {"test/label/Ungood/{}.png": 3}).parent


def bmad_resc(root: Path) -> Path:
    images = {"Train/train/good/{}.png": 4, "Test/test/good/{}.png": 2, "Test/test/Ungood/{}.png": 3}
    return fill(root / "RESC", images, {"Test/test_label/Ungood/{}.png": 3}).parent


def bmad_chest(root: Path) -> Path:
    return fill(root, {"train/good/{}.png": 4, "test/good/{}.png": 2, "test/Ungood/{}.png": 3, "val/good/{}.png": 1})


# Where it lies, how it is made, its collection, category and layout, and what is in it: good ones to train on, to
# calibrate with, to test on, defective ones by kind, and masks
MINIATURES = [
    ("mvtec/bottle", mvtec, "MVTec AD", "bottle", "mvtec", 4, 0, 2, {"crack": 3}, 3),
    ("MPDD/tubes", mvtec, "MPDD", "tubes", "mvtec", 4, 0, 2, {"crack": 3}, 3),
    (
        *("loco/pushpins", loco, "MVTec LOCO AD", "pushpins", "mvtec_loco", 4, 2, 2),
        *({"logical_anomalies": 2, "structural_anomalies": 1}, 3),
    ),
    ("BTAD/01", btad, "BTAD", "01", "btad", 4, 0, 2, {"ko": 3}, 3),
    ("VisA/candle", visa, "VisA", "candle", "visa", 3, 0, 2, {"anomaly": 2}, 2),
    ("OCT2017 ", oct2017, "OCT-2017", "", "oct2017", 4, 0, 2, {"CNV": 2, "DME": 2, "DRUSEN": 2}, 0),
    ("KolektorSDD2", kolektor, "KolektorSDD2", "", "kolektorsdd2", 4, 0, 2, {"defect": 3}, 3),
    (
        *("tiles-master", magnetic_tile, "Magnetic Tile", "", "magnetic_tile", 19, 0, 11),
        *({"blowhole": 3, "break": 1, "crack": 2, "fray": 1, "uneven": 1}, 8),
    ),
    ("aitex", aitex, "AITEX", "", "aitex", 26, 0, 4, {"broken end": 1, "fuzzyball": 1, "warp ball": 1}, 1),
    ("DAGM/Class10", dagm, "DAGM 2007", "Class10", "dagm", 4, 0, 2, {"defect": 3}, 3),
    ("BMAD/Brain_AD", bmad_brain, "BMAD", "Brain", "bmad", 4, 0, 2, {"Ungood": 3}, 3),
    ("BMAD/Liver_AD", bmad_liver, "BMAD", "Liver", "bmad", 4, 0, 2, {"Ungood": 3}, 3),
    ("BMAD/Retina_RESC_AD", bmad_resc, "BMAD", "RESC", "bmad", 4, 0, 2, {"Ungood": 3}, 3),
    ("BMAD/Chest-RSNA", bmad_chest, "BMAD", "Chest", "bmad", 4, 0, 2, {"Ungood": 3}, 0),
]
each = pytest.mark.parametrize(
    ("at", "make", "name", "category", "layout", "train", "validation", "good", "kinds", "masks"),
    MINIATURES,
    ids=[row[0].strip() for row in MINIATURES],
)


@each
def test_every_layout(tmp_path, at, make, name, category, layout, train, validation, good, kinds, masks):
    root = make(tmp_path / at)
    copy = recognise(root)
    assert copy is not None and (copy.collection.name, dict(copy.folders)) == (name, {category: root})
    dataset = load_dataset(root)
    assert (dataset.layout, len(dataset.train), len(dataset.validation)) == (layout, train, validation)
    assert not any(sample.label for sample in dataset.train + dataset.validation)
    assert Counter(sample.defect for sample in dataset.test) == {"good": good, **kinds}
    assert all(bool(sample.label) == (sample.defect != "good") for sample in dataset.test)
    paths = [sample.path for sample in dataset.train + dataset.validation + dataset.test]
    assert len(paths) == len(set(paths)) and all(path.is_file() for path in paths)
    paired = [sample for sample in dataset.test if sample.mask]
    assert len(paired) == masks and all(sample.label for sample in paired)
    assert all(sample.mask.stem.startswith(sample.path.stem) for sample in paired)
    assert all(read_mask(sample.mask).any() for sample in paired)
    assert bool(dataset.problems) == (layout == "aitex")  # what is odd there is so in the archive
    assert load_categories([root]).keys() == {root.resolve().name}


@each
def test_a_folder_of_categories_stands_for_all(
    tmp_path, at, make, name, category, layout, train, validation, good, kinds, masks
):
    root = make(tmp_path / at)
    if not category:
        pytest.skip("has no categories")
    second = next(key for key in BY_NAME[name].counts if key != category)
    other = make(root.parent / (f"{second}_AD" if name == "BMAD" else second))
    assert load_categories([root.parent]).keys() == {root.name, other.name}
    with pytest.raises(DatasetError, match=f"holds categories; name one, .*{root.name}"):
        load_dataset(root.parent)
    (found,) = find([tmp_path])
    assert found[0] == root.parent and found[1].folders.keys() == {category, second}
    assert list(find([root.parent])) == [found]


def summed_up(dataset: Dataset) -> tuple:
    parts = [[sample.path.name for sample in part] for part in (dataset.train, dataset.validation)]
    kinds = Counter((sample.defect.casefold(), bool(sample.mask)) for sample in dataset.test)
    return dataset.layout, parts, kinds, len(dataset.problems)


@each
@pytest.mark.parametrize("change", [str.upper, str.lower, str.title])
def test_every_layout_is_known_whatever_the_case_of_its_folders(
    tmp_path, change, at, make, name, category, layout, train, validation, good, kinds, masks
):
    root = make(tmp_path / at)
    plain = summed_up(load_dataset(root))
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts)):
        folder.rename(folder.with_name(change(folder.name)))
    assert summed_up(load_dataset(root)) == plain
    copy = recognise(root)
    assert copy is not None and copy.collection.name == name


def mask_files(dataset: Dataset) -> list[Path]:
    paths = [sample.mask for sample in dataset.test if sample.mask]
    return [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


@each
def test_inverted_masks_of_every_layout_are_named(
    tmp_path, at, make, name, category, layout, train, validation, good, kinds, masks
):
    if not masks:
        pytest.skip("has no masks")
    root = make(tmp_path / at)
    dataset = load_dataset(root)
    for file in mask_files(dataset):
        Image.fromarray(np.where(np.asarray(Image.open(file)) > 0, 0, 253).astype(np.uint8)).save(file)
    after = load_dataset(root)
    (problem,) = set(after.problems) - set(dataset.problems)
    assert "may be inverted" in problem and any(f"{kind} (" in problem for kind in kinds)
    assert [sample.mask for sample in after.test] == [sample.mask for sample in dataset.test]


@each
def test_masks_that_fit_no_image_of_every_layout_are_named(
    tmp_path, at, make, name, category, layout, train, validation, good, kinds, masks
):
    if not masks:
        pytest.skip("has no masks")
    root = make(tmp_path / at)
    dataset = load_dataset(root)
    for sample in dataset.test:
        if sample.mask:
            sample.mask.rename(sample.mask.with_name(f"odd-{sample.mask.name}"))
    said = " ".join(load_dataset(root).problems)
    assert "odd-" in said and any(word in said for word in ("fit no image", "not used", "but missing"))


# Masks and regions of MVTec LOCO AD


def test_regions_know_how_they_saturate(tmp_path):
    root = loco(tmp_path / "pushpins")
    first, second, third = (sample for sample in load_dataset(root).test if sample.label)
    truth = root / "ground_truth/logical_anomalies"
    assert first.mask == truth / "000" and first.regions == (Saturated(truth / "000/000.png", 1.0, True),)
    assert second.regions == (
        Saturated(truth / "001/000.png", 40.0, False),
        Saturated(truth / "001/001.png", 1.0, True),
    )
    assert third.regions[0].saturation == 0.5
    assert np.argwhere(read_mask(second.mask)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_damaged_regions(tmp_path):
    root = loco(tmp_path / "pushpins")
    before = fingerprint(load_dataset(root))
    truth = root / "ground_truth/logical_anomalies"
    marked = np.zeros((4, 6), np.uint8)
    marked[1, 1] = 7
    Image.fromarray(marked).save(truth / "001/001.png")
    shutil.rmtree(truth / "000")
    dataset = load_dataset(root)
    assert [len(sample.regions) for sample in dataset.test if sample.label] == [0, 1, 1]
    unknown, without = dataset.problems
    assert "not in defects_config.json" in unknown and "logical_anomalies/001/001.png" in unknown
    assert without == "Defective, but without a mask: test/logical_anomalies/000.png (1 in all)."
    assert fingerprint(dataset) != before
    (truth / "001/000.png").write_bytes(b"no image")
    sample = next(sample for sample in load_dataset(root).test if sample.path.stem == "001" and sample.label)
    assert sample.mask is None and sample.regions == ()


def test_figures_depend_on_regions(tmp_path):
    root = loco(tmp_path / "pushpins")
    before = fingerprint(load_dataset(root))
    config = root / "defects_config.json"
    config.write_text(config.read_text().replace("40", "41"))
    assert fingerprint(load_dataset(root)) != before


@pytest.mark.parametrize("text", ["", "{}[", "[1]", '[{"pixel_value": 1}]', "null"])
def test_saturation_that_cannot_be_read(tmp_path, text):
    root = loco(tmp_path / "pushpins")
    (root / "defects_config.json").write_text(text)
    with pytest.raises(DatasetError, match=r"defects_config.json: cannot be read .*unpack the archive again"):
        load_dataset(root)


# Damaged ones


def test_visa_without_its_split(tmp_path):
    root = visa(tmp_path / "VisA/candle")
    table = tmp_path / "VisA/split_csv/1cls.csv"
    (root / "Data/Images/Normal/003.JPG").unlink()
    image(root / "Data/Images/Normal/900.JPG")
    missing, superfluous = load_dataset(root).problems
    assert "candle/Data/Images/Normal/003.JPG (1 in all)" in missing and "Normal/900.JPG" in superfluous
    renamed = root.rename(tmp_path / "VisA/kerze")
    with pytest.raises(DatasetError, match=r"1cls.csv: lists no 'kerze'; give the folder the name"):
        load_dataset(renamed)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(DatasetError, match=r"1cls.csv: cannot be read .* copy it again"):
        load_dataset(renamed)
    table.unlink()
    with pytest.raises(DatasetError, match=r"1cls.csv: is missing, .* copy it there"):
        load_dataset(renamed)


def test_visa_is_read_from_within(tmp_path, monkeypatch):
    monkeypatch.chdir(visa(tmp_path / "VisA/candle"))
    dataset = load_dataset(".")
    assert dataset.name == "candle" and len(dataset.train) == 3 and dataset.problems == ()


def test_dagm_without_labels(tmp_path):
    root = dagm(tmp_path / "Class1")
    (root / "Test/Label/0003_label.PNG").unlink()
    (root / "Test/0004.PNG").unlink()
    dataset = load_dataset(root)
    assert sum(sample.label for sample in dataset.test) == 2  # Labels.txt still says what is defective
    assert dataset.problems == (
        "Labelled in Test/Label, but missing: 0004 (1 in all).",
        "Defective, but without a mask: Test/0003.PNG (1 in all).",
    )
    (root / "Train/Label/Labels.txt").unlink()
    assert len(load_dataset(root).train) == 4
    (root / "Test/Label/Labels.txt").write_text("1\tx\t0001.PNG\n")
    with pytest.raises(DatasetError, match=r"Labels.txt: cannot be read"):
        load_dataset(root)
    shutil.rmtree(root / "Train/Label")
    with pytest.raises(DatasetError, match=r"Train/Label: is missing, and it says what is defective"):
        load_dataset(root)


def test_kolektor_without_masks(tmp_path):
    root = kolektor(tmp_path / "KolektorSDD2")
    (root / "train/00000_GT.png").unlink()
    (root / "test/00004_GT.png").write_bytes(b"no image")
    dataset = load_dataset(root)
    assert (len(dataset.train), len(dataset.test)) == (3, 4)
    assert dataset.problems == (
        "Left out, because the mask (_GT) is missing or cannot be read: train/00000.png, test/00004.png (2 in all).",
    )


def test_aitex_says_what_is_odd(tmp_path):
    root = aitex(tmp_path / "aitex")
    several, without = load_dataset(root).problems
    assert "0044_019_04.png (1 in all)" in several and "make one <name>_mask.png" in several
    assert "0100_025_08.png (2 in all)" in without
    shutil.rmtree(root / "Mask_images")
    assert load_dataset(root).problems == ("Mask_images is missing; unpack it beside Defect_images.",)
    image(root / "Defect_images/new.png")
    assert "defect" in {sample.defect for sample in load_dataset(root).test}


def test_files_that_are_nothing_in_magnetic_tile(tmp_path):
    root = magnetic_tile(tmp_path / "tiles")
    (root / "MT_Crack/Imgs/exp1_num_0.png").unlink()
    (root / "MT_Fray/Imgs/notes.txt").touch()
    mask(root / "MT_Fray/Imgs/exp1_num_9.png", (16, 16))
    unused, without = load_dataset(root).problems
    assert (
        "MT_Fray/Imgs/exp1_num_9.png, MT_Fray/Imgs/notes.txt (2 in all)" in unused
        and "MT_Crack/Imgs/exp1_num_0.jpg (1 in all)" in without
    )


# Splits of our own


def sides(dataset: Dataset) -> dict[str, set[str]]:
    parts = {"train": dataset.train, "test": [sample for sample in dataset.test if not sample.label]}
    return {part: {sample.path.name for sample in samples} for part, samples in parts.items()}


@pytest.mark.parametrize("make", [magnetic_tile, aitex])
def test_no_added_image_moves_another(tmp_path, make):
    root = make(tmp_path / "data")
    before = sides(load_dataset(root))
    folder = root / ("MT_Free/Imgs" if make is magnetic_tile else "NODefect_images/230")
    for i in range(1000, 1010):
        image(folder / f"{i}{'.jpg' if make is magnetic_tile else '.png'}")
    after = sides(load_dataset(root))
    assert all(before[part] <= after[part] for part in before) and after != before


@given(st.sets(st.text(min_size=1, max_size=12), min_size=200, max_size=200))
def test_about_a_fifth_is_held_out(names):
    assert 0.05 < sum(map(held_out, names)) / 200 < 0.4


# What is recognised


def test_what_is_no_benchmark_is_none(tmp_path):
    assert layout_of(tmp_path) is None and recognise(tmp_path) is None and recognise(tmp_path / "gone") is None
    own = mvtec(tmp_path / "own")
    assert layout_of(own).name == "mvtec" and recognise(own) is None and list(find([tmp_path, own])) == []
    fill(tmp_path / "good", {"{}.png": 3})
    assert load_dataset(tmp_path / "good").layout == "folder"


def test_only_categories_of_one_kind_stand_beside_each_other(tmp_path):
    mvtec(tmp_path / "own")
    for make, name in ((btad, "01"), (kolektor, "kolektor"), (oct2017, "oct")):
        make(tmp_path / name)
    assert load_categories([tmp_path]).keys() == {"own"}


# Whether a copy is whole


@pytest.fixture
def small(monkeypatch):
    """BTAD as if it had been published in miniature: 01 and 02."""
    collection = replace(BY_NAME["BTAD"], counts=dict.fromkeys(("01", "02"), (Counts(4, 2, 3),)))
    monkeypatch.setattr(public, "COLLECTIONS", (collection,))
    return collection


def test_a_whole_copy(tmp_path, small):
    for name in small.counts:
        btad(tmp_path / name)
    result = check(tmp_path)
    assert result.wrong == result.notes == [] and result.known and result.masks == {"01": 3, "02": 3}
    assert result.found["01"] == Counts(4, 2, 3, normal=6)
    done = CliRunner().invoke(app, ["datasets", "check", str(tmp_path)])
    assert done.exit_code == 0 and "not for commercial use" in done.stdout
    assert done.stdout.splitlines()[-3:] == [
        "01      4           0     2          3      3",
        "02      4           0     2          3      3",
        "as published",
    ]


def test_a_copy_that_is_not_whole(tmp_path, small):
    root = btad(tmp_path / "01")
    btad(tmp_path / "04")
    (root / "train/ok/000.bmp").unlink()
    image(root / "test/ok/100.bmp")
    shutil.rmtree(root / "ground_truth")
    wrong = [
        "02 is missing",
        "04 is no category of BTAD",
        "01: train: 3, published are 4, 1 missing",
        "01: test, good: 3, published are 2, 1 superfluous",
        "01: 3 defective images lack a mask that can be used",
    ]
    assert check(tmp_path).wrong == wrong
    assert check(root).wrong == wrong[2:]  # of one category the others are not asked for
    done = CliRunner().invoke(app, ["datasets", "check", str(tmp_path)])
    assert done.exit_code == 1 and [f"wrong: {sentence}" for sentence in wrong] == done.stderr.splitlines()


def test_a_category_that_cannot_be_read_is_wrong(tmp_path):
    visa(tmp_path / "VisA/candle")
    (tmp_path / "VisA/split_csv/1cls.csv").unlink()
    result = check(tmp_path / "VisA/candle")
    assert result.found == {} and len(result.wrong) == 1 and "1cls.csv: is missing" in result.wrong[0]


def test_editions_and_unknown_counts(tmp_path, monkeypatch):
    root = oct2017(tmp_path / "oct")
    editions = (Counts(9, 9, 9, masks="none"), Counts(4, 2, 6, masks="none"))
    monkeypatch.setattr(public, "COLLECTIONS", (replace(BY_NAME["OCT-2017"], counts={"": editions}),))
    assert check(root).wrong == []
    (root / "test/CNV/CNV-000-1.jpeg").unlink()
    assert check(root).wrong == ["test, defective: 5, published are 6, 1 missing"]
    monkeypatch.undo()
    tiles = check(magnetic_tile(tmp_path / "tiles"))
    assert tiles.wrong == [
        "test, defective: 8, published are 392, 384 missing",
        "good in all: 30, published are 952, 922 missing",
    ]
    fabric = aitex(tmp_path / "aitex")
    assert check(fabric).wrong == [] and not check(fabric).known
    shutil.rmtree(fabric / "Mask_images")
    assert check(fabric).wrong == ["there are no masks that can be used"]


def test_check_says_what_to_do(tmp_path):
    for path, named in ((tmp_path / "gone", "check the path"), (tmp_path, "is none of MVTec AD")):
        done = CliRunner().invoke(app, ["datasets", "check", str(path)])
        assert done.exit_code == 2 and named in done.stderr and done.stderr.count("\n") == 1


def test_the_list_says_what_is_there(tmp_path, monkeypatch):
    btad(tmp_path / "data/BTAD/01")
    kolektor(tmp_path / "data/KolektorSDD2")
    done = CliRunner().invoke(app, ["datasets", str(tmp_path / "data")])
    assert done.exit_code == 0
    assert f"BTAD: found in {tmp_path}/data/BTAD (1 of 3 categories)\n" in done.stdout
    assert f"KolektorSDD2: found in {tmp_path}/data/KolektorSDD2\n" in done.stdout
    for collection in COLLECTIONS:
        assert f"\n    {collection.licence}\n    {collection.page}\n" in done.stdout
    assert done.stdout.count(": not found") == len(COLLECTIONS) - 2
    monkeypatch.chdir(tmp_path / "data/BTAD")
    here = CliRunner().invoke(app, ["datasets"]).stdout
    assert "BTAD: found in . (1 of 3 categories)" in here
    assert here == CliRunner().invoke(app, ["datasets", "list"]).stdout
    assert CliRunner().invoke(app, ["datasets", "gone"]).exit_code == 2


# What is known of them


@pytest.mark.parametrize(
    ("name", "categories", "train", "validation", "good", "defective"),
    [
        ("MVTec AD", 15, 3629, 0, 467, 1258),
        ("MVTec LOCO AD", 5, 1418, 245, 575, 993),  # of one category the first two are not known for sure
        ("BTAD", 3, 1799, 0, 451, 290),
        ("VisA", 12, 8659, 0, 962, 1200),
        ("DAGM 2007", 10, 7004, 0, 6996, 1054),
        ("MPDD", 6, 888, 0, 176, 282),
    ],
)
def test_counts_add_up_to_the_published_totals(name, categories, train, validation, good, defective):
    counts = [edition for editions in BY_NAME[name].counts.values() for edition in editions]
    assert len(counts) == categories
    totals = [sum(getattr(c, part) or 0 for c in counts) for part in ("train", "validation", "good", "defective")]
    assert totals == [train, validation, good, defective]


def describe(collection: public.Collection) -> str:
    """Section on a collection in docs/datasets.md."""
    layout = next(layout for layout in LAYOUTS if layout.name == collection.layout)
    lines = [
        f"### {collection.name}",
        f"* **Licence:** {collection.licence}.",
        f"* **Get it:** {collection.page}",
        f"* **Cite:** {collection.citation}.",
        f"* **Layout:** {'' if '' in collection.counts else 'in each category '}`{layout.sketch}`",
        f"* **Split:** {collection.split}.",
    ]
    rows = [(name, edition) for name, editions in collection.counts.items() for edition in editions]
    columns = [column for column in public._COLUMNS if any(getattr(edition, column) for _, edition in rows)]
    if columns:
        lines += [
            "",
            f"| | {' | '.join(public._COLUMNS[column] for column in columns)} |",
            "|---|" + "---|" * len(columns),
        ]
    for name, edition in rows if columns else ():
        cells = (getattr(edition, column) for column in columns)
        lines.append(f"| {name} | {' | '.join('–' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def test_the_documentation_agrees():
    """After a change: copy what `describe` gives for each collection into docs/datasets.md."""
    text = (Path(__file__).parents[2] / "docs/datasets.md").read_text("utf-8")
    assert text.endswith("\n\n".join(map(describe, COLLECTIONS)) + "\n")
    assert all(
        collection.name.startswith("MVTec") <= ("commercial" in collection.licence) for collection in COLLECTIONS
    )


def test_the_real_one_is_as_published(shared):
    root = shared / "data" / "mvtec_ad"
    if not (root / "screw").is_dir():
        pytest.skip("needs MVTec AD's screw beside the checkout")
    result = check(root / "screw")
    assert result.wrong == result.notes == [] and result.found["screw"] == Counts(320, 41, 119, normal=361)
    missing = [name for name in BY_NAME["MVTec AD"].counts if not (root / name).is_dir()]
    assert [w for w in check(root).wrong if w.endswith("is missing")] == [f"{name} is missing" for name in missing]
