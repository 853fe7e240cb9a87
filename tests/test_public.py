"""Readers of public benchmarks, on miniatures of their layouts."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import DatasetError, Saturated, load_categories, load_dataset
from unflaw.datasets.public import COLLECTIONS, MVTEC_AD, check, collection_of, find, recognise
from unflaw.images import ImageError, read_mask
from unflaw.leaderboard import MVTEC_AD as COMPARED

SHARED = Path(__file__).parents[2] / "shared" / "data"
DOCS = Path(__file__).parents[1] / "docs/datasets.md"


def picture(path, value=90, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(abs(hash(path.as_posix())) % 2**32).integers(0, 9, size[::-1])
    Image.fromarray((noise + value).astype(np.uint8)).save(path)
    return path


def mask(path, value=255, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[1:3, 2:5] = value
    Image.fromarray(pixels).save(path)
    return path


def several(folder, names, suffix=".png"):
    return [picture(folder / f"{name}{suffix}") for name in names]


def mvtec(root, defects=("scratch",)):
    several(root / "train/good", ["000", "001", "002"])
    several(root / "test/good", ["000", "001"])
    for defect in defects:
        several(root / "test" / defect, ["000"])
        mask(root / "ground_truth" / defect / "000_mask.png")


def loco(root):
    mvtec(root, [])
    several(root / "validation/good", ["000"])
    for defect, count in (("logical_anomalies", 2), ("structural_anomalies", 1)):
        several(root / "test" / defect, ["000"])
        for i in range(count):
            mask(root / "ground_truth" / defect / "000" / f"{i:03d}.png", 255 - i)
    config = [
        {"defect_name": "a", "pixel_value": 255, "saturation_threshold": 4, "relative_saturation": False},
        {"defect_name": "b", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True},
    ]
    (root / "defects_config.json").write_text(json.dumps(config))


def btad(root):
    several(root / "train/ok", ["0000", "0001", "0002"], ".bmp")
    several(root / "test/ok", ["0000", "0001"], ".bmp")
    several(root / "test/ko", ["0000"], ".bmp")
    mask(root / "ground_truth/ko/0000.png")


def visa(root):
    rows = []
    for i, split in enumerate(["train", "train", "train", "test", "test"]):
        several(root / "Data/Images/Normal", [f"{i:04d}"], ".JPG")
        rows.append((root.name, split, "normal", f"{root.name}/Data/Images/Normal/{i:04d}.JPG", ""))
    several(root / "Data/Images/Anomaly", ["000"], ".JPG")
    mask(root / "Data/Masks/Anomaly/000.png", 1)
    names = f"{root.name}/Data/Images/Anomaly/000.JPG", f"{root.name}/Data/Masks/Anomaly/000.png"
    rows += [(root.name, "test", "anomaly", *names), ("other", "train", "normal", "other/x.JPG", "")]
    (root.parent / "split_csv").mkdir(exist_ok=True)
    with (root.parent / "split_csv/1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def oct2017(root):
    several(root / "train/NORMAL", ["NORMAL-1-1", "NORMAL-1-2", "NORMAL-2-1"], ".jpeg")
    several(root / "train/CNV", ["CNV-1-1"], ".jpeg")
    several(root / "test/NORMAL", ["NORMAL-7-1", "NORMAL-8-1"], ".jpeg")
    several(root / "test/DME", ["DME-7-1"], ".jpeg")
    several(root / "val/NORMAL", ["NORMAL-9-1"], ".jpeg")


def kolektor(root):
    for part, good in (("train", 3), ("test", 2)):
        for i in range(good):
            picture(root / part / f"1000{i}.png")
            mask(root / part / f"1000{i}_GT.png", 0)
        picture(root / part / "20000.png")
        mask(root / part / "20000_GT.png")


def magnetic_tile(root):
    from unflaw.datasets.public import _for_test

    names = [f"exp1_num_{i}" for i in range(40)]
    chosen = [name for name in names if not _for_test(Path(name))][:3] + [n for n in names if _for_test(Path(n))][:2]
    for name in chosen:
        picture(root / "MT_Free/Imgs" / f"{name}.jpg")
        mask(root / "MT_Free/Imgs" / f"{name}.png", 0)
    picture(root / "MT_Blowhole/Imgs/exp1_num_77.jpg")
    mask(root / "MT_Blowhole/Imgs/exp1_num_77.png")


def aitex(root):
    from unflaw.datasets.public import _for_test

    names = [f"{i:04d}_000_04" for i in range(40)]
    chosen = [name for name in names if not _for_test(Path(name))][:3] + [n for n in names if _for_test(Path(n))][:2]
    several(root / "NODefect_images/2306881-210020u", chosen)
    several(root / "Defect_images", ["0044_019_04"])
    mask(root / "Mask_images/0044_019_04_mask.png")


def dagm(root):
    for part, good in (("Train", 3), ("Test", 2)):
        several(root / part, [f"{i:04d}" for i in range(good + 1)], ".PNG")
        mask(root / part / "Label" / f"{good:04d}_label.PNG")
        (root / part / "Label/Labels.txt").write_text("1\n")


def bmad(root):
    several(root / "train/good", ["a", "b", "c"])
    for part in ("valid", "test"):
        several(root / part / "good/img", [f"{part}1", f"{part}2"])
        mask(root / part / "good/label" / f"{part}1.png", 0)
        several(root / part / "Ungood/img", [f"{part}9"])
        mask(root / part / "Ungood/label" / f"{part}9.png")


MADE = {
    "mvtec_ad": (mvtec, "screw"),
    "mvtec_loco": (loco, "pushpins"),
    "btad": (btad, "01"),
    "visa": (visa, "candle"),
    "oct2017": (oct2017, ""),
    "kolektorsdd2": (kolektor, ""),
    "magnetic_tile": (magnetic_tile, ""),
    "aitex": (aitex, ""),
    "dagm2007": (dagm, "Class1"),
    "mpdd": (mvtec, "tubes"),
    "bmad": (bmad, "Brain"),
}


@pytest.fixture(params=MADE)
def made(request, tmp_path):
    """Name of the collection, its folder, and the folder of one category."""
    make, category = MADE[request.param]
    root = tmp_path / request.param
    make(root / category)
    return request.param, root, root / category


def test_every_collection_has_a_miniature():
    assert set(MADE) == {collection.name for collection in COLLECTIONS}


def test_a_category_is_read_as_it_unpacks(made):
    name, _, folder = made
    dataset = load_dataset(folder)
    assert len(dataset.train) == 3 and not any(sample.label for sample in dataset.train)
    bad = [sample for sample in dataset.test if sample.label]
    assert len(dataset.test) - len(bad) == 2 and len(bad) == (2 if name == "mvtec_loco" else 1)
    assert dataset.layout == ("mvtec" if name in ("mvtec_ad", "mpdd") else name)
    if name == "oct2017":
        assert {sample.defect for sample in bad} == {"DME"} and not any(sample.mask for sample in dataset.test)
    else:
        assert all(read_mask(sample.mask).sum() == 6 for sample in bad)
    assert not any(sample.mask for sample in dataset.test if not sample.label)
    assert len(dataset.validation) == {"mvtec_loco": 1, "bmad": 2}.get(name, 0)
    assert dataset.problems == ()
    paths = [sample.path for part in (dataset.train, dataset.validation, dataset.test) for sample in part]
    assert len(set(paths)) == len(paths)


def test_a_collection_is_recognised_and_found(made, tmp_path):
    name, root, folder = made
    assert recognise(root).name == name and find([tmp_path]) == {name: root}
    assert find([root / "nothing"]) == {}
    (dataset,) = load_categories([root]).values()
    assert dataset.name == folder.name and len(dataset.train) == 3


def test_check_counts_and_says_what_is_missing(made):
    name, root, folder = made
    done = check(root, load_dataset)
    assert done.found[folder.name] == (3, 2, 2 if name == "mvtec_loco" else 1)
    others = [category for category in done.collection.categories if category and category != folder.name]
    assert [f"{category}: is missing." for category in others] == [f for f in done.faults if "is missing" in f]
    wrong = [fault for fault in done.faults if "published are" in fault]
    assert bool(wrong) == bool(done.collection.categories.get(folder.name, done.collection.categories.get("")))


def test_regions_of_loco_have_their_saturations(tmp_path):
    loco(tmp_path / "pushpins")
    logical, structural = (sample for sample in load_dataset(tmp_path / "pushpins").test if sample.label)
    first, second = sorted(logical.mask.iterdir())
    assert logical.regions == (Saturated(first, 4.0, False), Saturated(second, 0.5, True))
    assert len(structural.regions) == 1


def test_what_is_damaged_is_said(tmp_path):
    loco(tmp_path / "pushpins")
    mask(tmp_path / "pushpins/ground_truth/logical_anomalies/000/002.png", 17)
    dataset = load_dataset(tmp_path / "pushpins")
    assert any("002.png: has no saturation" in problem for problem in dataset.problems)
    (tmp_path / "pushpins/defects_config.json").write_text("[{}]")
    with pytest.raises(DatasetError, match=r"defects_config.json: cannot be read .*unpack the data again"):
        load_dataset(tmp_path / "pushpins")
    visa(tmp_path / "visa/candle")
    (tmp_path / "visa/candle/Data/Images/Normal/0001.JPG").unlink()
    assert any(
        "0001.JPG: stands in 1cls.csv, but is missing" in p for p in load_dataset(tmp_path / "visa/candle").problems
    )
    (tmp_path / "visa/split_csv/1cls.csv").unlink()
    with pytest.raises(DatasetError, match=r"1cls.csv: cannot be read as the split of VisA"):
        load_dataset(tmp_path / "visa/candle")
    assert any("1cls.csv" in fault for fault in check(tmp_path / "visa", load_dataset).faults)
    with pytest.raises(DatasetError, match="is none of mvtec_ad, "):
        check(tmp_path / "nothing", load_dataset)


def test_several_masks_of_a_fabric_are_said(tmp_path):
    aitex(tmp_path)
    mask(tmp_path / "Mask_images/0044_019_04_mask2.png")
    assert load_dataset(tmp_path).problems == ("0044_019_04.png: has 2 masks; only 0044_019_04_mask.png is used.",)


def test_a_split_of_ours_does_not_depend_on_other_files(tmp_path):
    magnetic_tile(tmp_path)
    before = {sample.path for sample in load_dataset(tmp_path).train}
    several(tmp_path / "MT_Free/Imgs", [f"exp6_num_{i}" for i in range(9)], ".jpg")
    after = load_dataset(tmp_path)
    assert before <= {sample.path for sample in after.train} and len(after.train) > len(before)


def test_masks_of_a_folder_are_joined(tmp_path):
    mask(tmp_path / "m/0.png")
    Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(tmp_path / "m/1.png")
    assert read_mask(tmp_path / "m").sum() == (read_mask(tmp_path / "m/0.png") | read_mask(tmp_path / "m/1.png")).sum()
    mask(tmp_path / "m/2.png", size=(9, 9))
    with pytest.raises(ImageError, match="several sizes"):
        read_mask(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no mask"):
        read_mask(tmp_path / "empty")


def test_other_layouts_are_nobodys(tmp_path):
    mvtec(tmp_path / "mine")
    several(tmp_path / "plain", "abc")
    assert collection_of(tmp_path / "mine") is None and collection_of(tmp_path / "plain") is None
    assert load_dataset(tmp_path / "mine").layout == "mvtec" and recognise(tmp_path) is None


def test_published_totals():
    known = {c.name: c.categories.values() for c in COLLECTIONS if None not in c.categories.values()}
    totals = {name: [sum(column) for column in zip(*counts, strict=True)] for name, counts in known.items()}
    assert totals["mvtec_ad"] == [3629, 467, 1258] and totals["mvtec_loco"] == [1772, 575, 993]
    assert sum(totals["btad"]) == 2540 and totals["visa"] == [8659, 962, 1200]
    assert totals["mpdd"] == [888, 176, 282] and totals["kolektorsdd2"] == [2085, 894, 110]
    assert set(MVTEC_AD) == set(COMPARED)


def test_real_screws():
    if not (SHARED / "mvtec_ad").is_dir():
        pytest.skip("needs ../shared beside the checkout")
    done = check(SHARED / "mvtec_ad", load_dataset)
    assert done.found == {"screw": MVTEC_AD["screw"]} and len(done.faults) == 14


# The command and the page


def test_the_command_lists_and_checks(tmp_path):
    mvtec(tmp_path / "data/tubes")
    listed = CliRunner().invoke(app, ["datasets", "--root", str(tmp_path)])
    assert listed.exit_code == 0 and f"mpdd: MPDD, metal parts; found in {tmp_path / 'data'}" in listed.output
    assert "visa: VisA, Visual Anomaly; not found" in listed.output
    checked = CliRunner().invoke(app, ["datasets", "check", str(tmp_path / "data")])
    assert checked.exit_code == 1 and "tubes: 3 training, 2 good test, 1 defective test" in checked.output
    assert "wrong: tubes: 3 training pictures, published are 122." in checked.output
    unknown = CliRunner().invoke(app, ["datasets", "check", str(tmp_path / "data/tubes/train")])
    assert unknown.exit_code == 2 and "is none of" in unknown.output


def test_the_page_has_every_collection():
    text = DOCS.read_text("utf-8")
    for c in COLLECTIONS:
        layout = c.layout.replace("<", "\\<")
        cells = f"`{c.name}`", c.title, str(len(c.categories)), c.source, c.licence, layout, c.split, c.citation
        assert f"| {' | '.join(cells)} |" in text
