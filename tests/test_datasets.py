from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unflaw.datasets import Dataset, DatasetError, Sample, digest, load_dataset

SHARED = Path(__file__).parents[2] / "shared" / "data"


def picture(path: Path, value: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.fixture
def bolt(tmp_path):
    """A small data set in the layout of MVTec AD, with nothing wrong."""
    root = tmp_path / "bolt"
    for i in range(4):
        picture(root / f"train/good/{i}.png", i)
    for i in range(2):
        picture(root / f"test/good/{i}.png", 10 + i)
        picture(root / f"test/crack/{i}.png", 20 + i)
        picture(root / f"test/dent/{i}.png", 30 + i)
        picture(root / f"ground_truth/crack/{i}_mask.png", 255)
        picture(root / f"ground_truth/dent/{i}.bmp", 255)
    (root / "license.txt").write_text("not under train or test: nobody's business")
    return root


def only_problem(path: Path) -> str:
    (problem,) = load_dataset(path).problems
    return problem


# The layout of MVTec AD


def test_mvtec_layout(bolt):
    dataset = load_dataset(str(bolt))
    assert (dataset.name, dataset.layout, dataset.problems) == ("bolt", "mvtec", ())
    assert [sample.path.name for sample in dataset.train] == ["0.png", "1.png", "2.png", "3.png"]
    assert {sample.label for sample in dataset.train} == {0}
    crack, dent, good = dataset.test[0], dataset.test[2], dataset.test[4]
    assert crack == Sample(bolt / "test/crack/0.png", 1, bolt / "ground_truth/crack/0_mask.png", "crack")
    assert dent.mask == bolt / "ground_truth/dent/0.bmp"
    assert good == Sample(bolt / "test/good/0.png", 0, None, "good")


def test_validation_pictures_calibrate_and_must_not_be_tested_on(bolt):
    for i in range(3):
        picture(bolt / f"validation/good/{i}.png", 40 + i)
    dataset = load_dataset(bolt)
    assert len(dataset.validation) == 3 and len(dataset.train) == 4 and dataset.problems == ()
    (bolt / "validation/good/2.png").write_bytes((bolt / "test/good/0.png").read_bytes())
    assert "test/good/0.png" in only_problem(bolt)


def test_without_ground_truth_there_are_image_labels_only(bolt):
    (bolt / "ground_truth").rename(bolt.parent / "elsewhere")
    dataset = load_dataset(bolt)
    assert dataset.problems == () and [s.label for s in dataset.test] == [1, 1, 1, 1, 0, 0]
    assert all(sample.mask is None for sample in dataset.test)


def test_missing_mask(bolt):
    (bolt / "ground_truth/crack/1_mask.png").unlink()
    assert only_problem(bolt) == "Defective, but without a mask: test/crack/1.png (1 in all)."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: picture(path, 0), "mask is empty"),
        (lambda path: picture(path, 255, (4, 6)), "another size"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read (it is damaged"),
        (
            lambda path: Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(path),
            "cannot be read (it is transparent everywhere",
        ),
    ],
)
def test_masks_of_no_use_are_left_out(bolt, damage, message):
    damage(bolt / "ground_truth/crack/1_mask.png")
    problem = only_problem(bolt)
    assert message in problem and "left out: test/crack/1.png" in problem
    assert [sample.mask is None for sample in load_dataset(bolt).test if sample.label] == [False, True, False, False]


def test_pictures_in_both_training_and_test(bolt):
    (bolt / "test/good/7.png").write_bytes((bolt / "train/good/2.png").read_bytes())
    assert "test/good/7.png = train/good/2.png" in only_problem(bolt)


def test_empty_defect_folder(bolt):
    (bolt / "test/scratch").mkdir()
    assert only_problem(bolt) == "test/scratch holds no pictures."


def test_files_of_no_use(bolt):
    (bolt / "test/crack/0.txt").touch()
    (bolt / "train/good/.DS_Store").touch()
    picture(bolt / "train/odd/0.png")
    assert only_problem(bolt) == "Files that were not used: train/odd/0.png, test/crack/0.txt (2 in all)."


def test_one_kind_only(bolt):
    (bolt / "test/good").rename(bolt.parent / "elsewhere")
    assert only_problem(bolt) == "All test pictures are defective: AUROC needs both kinds."


def test_nothing_to_train_on(bolt):
    (bolt / "train").rename(bolt.parent / "elsewhere")
    dataset = load_dataset(bolt)
    assert dataset.layout == "mvtec" and not dataset.train and "evaluate" in only_problem(bolt)


# A folder


def test_folder_of_good_pictures(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    dataset = load_dataset(tmp_path)
    assert dataset.layout == "folder" and dataset.test == () and dataset.problems == ()
    assert dataset.train == (Sample(tmp_path / "a.jpg", 0), Sample(tmp_path / "b.png", 0))


def test_what_is_refused_says_what_to_do(tmp_path, bolt):
    with pytest.raises(DatasetError, match=r"gone: there is no such folder or table; check"):
        load_dataset(tmp_path / "gone")
    with pytest.raises(DatasetError, match=r"holds categories; name one, as in .*bolt, or .* --multi-class: bolt$"):
        load_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"(?s)not known: crack/ with 2 pictures, .* 0 pictures beside.*train/good"):
        load_dataset(bolt / "test")
    picture(bolt / "test.png")
    with pytest.raises(DatasetError, match="neither a folder nor a table"):
        load_dataset(bolt / "test.png")
    (tmp_path / "void").mkdir()
    with pytest.raises(DatasetError, match=r"(?s)void: holds no pictures.*Read are"):
        load_dataset(tmp_path / "void")


def test_train_without_good_is_no_layout(bolt):
    (bolt / "train/good").rename(bolt / "train/normal")
    with pytest.raises(DatasetError, match="train/ with 4 pictures"):
        load_dataset(bolt)


# A table


def table(folder: Path, text: str, encoding: str = "utf-8") -> Dataset:
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return load_dataset(path)


@pytest.fixture
def shelf(tmp_path):
    for i in range(12):
        picture(tmp_path / f"p{i}.png", i)
    picture(tmp_path / "m.png", 255)
    return tmp_path


def names(samples: tuple[Sample, ...]) -> list[str]:
    return [sample.path.stem for sample in samples]


def test_table_with_splits(shelf):
    dataset = table(
        shelf,
        "path,label,mask,defect,split\np0.png,good,,,train\np1.png,OK,,,test\n"
        f"p2.png,1,m.png,crack,test\n{shelf / 'p3.png'},anomaly,m.png,,\np4.png,good,,,validation\n",
    )
    assert names(dataset.validation) == ["p4"]
    assert (dataset.name, dataset.layout, dataset.problems) == ("list", "table", ())
    assert dataset.train == (Sample(shelf / "p0.png", 0),)
    assert dataset.test == (
        Sample(shelf / "p1.png", 0),
        Sample(shelf / "p2.png", 1, shelf / "m.png", "crack"),
        Sample(shelf / "p3.png", 1, shelf / "m.png", "defect"),
    )


def test_table_without_splits(shelf):
    good = "path,label\n" + "".join(f"p{i}.png,0\n" for i in range(10))
    assert len(table(shelf, good).train) == 10
    dataset = table(shelf, good + "p10.png,1\n")
    assert names(dataset.test) == ["p4", "p9", "p10"]
    assert names(table(shelf, good + "p10.png,1\np11.png,0\n").test) == names(dataset.test)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_dialects(shelf, separator, encoding):
    text = ' Path ,"LABEL"\r\n"p0.png", good \r\n\r\np1.png,1\r\n'.replace(",", separator)
    dataset = table(shelf, text, encoding)
    assert names(dataset.train) == ["p0"] and names(dataset.test) == ["p1"]


def test_bad_rows_are_reported_by_line(shelf):
    (shelf / "notes.txt").touch()
    dataset = table(
        shelf,
        "path,label,split\np0.png,good\ngone.png,good\np1.png,fine\n\np1.png,0,val\np1.png,1,train\nnotes.txt,0\n"
        f"p1.png,0,test,extra\n{'x' * 5000}.png,0\n,0\n",
    )
    assert names(dataset.train) == ["p0"]
    lines = [problem.split(":")[0] for problem in dataset.problems]
    assert lines == [f"list.csv, line {n}" for n in (3, 4, 6, 7, 8, 9, 10, 11)]
    reasons = [
        "no file",
        "'fine'",
        "none of train, validation, test",
        "neither train nor calibrate",
        "suffix",
        "more cells",
        "no file",
        "suffix",
    ]
    assert all(reason in problem for reason, problem in zip(reasons, dataset.problems, strict=True))


def test_missing_mask_of_a_row(shelf):
    dataset = table(shelf, "path,label,mask\np0.png,0,\np1.png,1,m.png\np2.png,1,gone.png\n")
    assert [sample.mask is None for sample in dataset.test] == [False, True]
    assert "p2.png" in dataset.problems[0]


def test_tables_of_no_use(shelf):
    with pytest.raises(DatasetError, match="first line lacks label"):
        table(shelf, "path,class\np0.png,0\n")
    with pytest.raises(DatasetError, match="first line lacks path and label"):
        table(shelf, "")
    with pytest.raises(DatasetError, match=r"UTF-8"):
        table(shelf, "path,label\nä.png,0\n", "latin-1")
    with pytest.raises(DatasetError, match=r"(?s)no pictures.*line 2"):
        table(shelf, "path,label\ngone.png,0\n")


cell = st.one_of(
    st.sampled_from(
        ["p0.png", "p1.png", "m.png", "good", "1", "train", "test", "path", "label", "mask", "..", "\0", '"']
    ),
    st.text(max_size=8),
)


@settings(max_examples=80)
@given(rows=st.lists(st.lists(cell, max_size=6), max_size=6), separator=st.sampled_from(",;\t"), whole=st.booleans())
def test_any_table_is_read_or_refused(tmp_path_factory, rows, separator, whole):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        for i in range(2):
            picture(folder / f"p{i}.png", i)
        picture(folder / "m.png", 255)
    text = "\n".join(separator.join(row) for row in ([["path", "label", "mask", "split"]] if whole else []) + rows)
    (folder / "list.csv").write_text(text, encoding="utf-8", errors="replace")
    try:
        dataset = load_dataset(folder / "list.csv")
    except DatasetError as error:
        assert "list.csv" in str(error)
    else:
        assert all(sample.label == 0 for sample in dataset.train) and (dataset.train or dataset.test)
        assert all(sample.path.is_file() for sample in dataset.train + dataset.test)


# Digest


def test_digest_knows_names_and_contents_only(bolt):
    train = load_dataset(bolt).train
    first = digest(train)
    assert len(first) == 64 and first == digest(reversed(train)) and first != digest(train[1:])
    moved = bolt.rename(bolt.parent / "moved")
    assert digest(load_dataset(moved).train) == first
    picture(moved / "train/good/0.png", 99)
    assert digest(load_dataset(moved).train) != first
    assert digest(train[:0]) == digest([])


# Real ones


@pytest.mark.parametrize(
    ("name", "train", "good", "defective", "masks"),
    [("mvtec_ad/screw", 320, 41, 119, 119), ("magnetic_tile", 500, 200, 392, 388), ("brain_mri", 227, 100, 180, 0)],
)
def test_real_layouts(name, train, good, defective, masks):
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared data {name} is not beside this checkout")
    dataset = load_dataset(SHARED / name)
    labels = [sample.label for sample in dataset.test]
    assert (dataset.layout, len(dataset.train)) == ("mvtec", train)
    assert (labels.count(0), labels.count(1)) == (good, defective)
    assert sum(sample.mask is not None for sample in dataset.test) == masks
    assert len(dataset.problems) == (name == "magnetic_tile")  # four of its masks are empty
