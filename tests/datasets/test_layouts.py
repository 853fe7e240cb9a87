from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from unflaw.datasets import DEFECT_LABELS, GOOD_LABELS, Dataset, DatasetError, Sample, digest, load_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"


def image(path: Path, value: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def mask(path: Path, marked: tuple[int, int, int, int] = (1, 1, 3, 3), size: tuple[int, int] = (6, 4)) -> Path:
    """A mask that marks a box: left, top, right, bottom."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size)
    image.paste(255, marked)
    image.save(path)
    return path


@pytest.fixture
def bolt(tmp_path):
    """A small data set in the layout of MVTec AD, with nothing wrong."""
    root = tmp_path / "bolt"
    for i in range(4):
        image(root / f"train/good/{i}.png", i)
    for i in range(2):
        image(root / f"test/good/{i}.png", 10 + i)
        image(root / f"test/crack/{i}.png", 20 + i)
        image(root / f"test/dent/{i}.png", 30 + i)
        mask(root / f"ground_truth/crack/{i}_mask.png")
        mask(root / f"ground_truth/dent/{i}.bmp")
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


def test_validation_images_calibrate_and_must_not_be_tested_on(bolt):
    for i in range(3):
        image(bolt / f"validation/good/{i}.png", 40 + i)
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
        (lambda path: image(path, 0), "mask is empty"),
        (lambda path: mask(path, size=(4, 6)), "another size"),
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


def renamed(folder: Path, name: str) -> None:
    for path in list(folder.glob("*_mask.png")):
        path.rename(path.with_name(name.format(path.stem.removesuffix("_mask")) + ".png"))


@pytest.mark.parametrize("name", ["{}_gt", "{}-mask", "{}_label", "mask_{}"])
def test_masks_that_fit_no_image_are_named(bolt, name):
    renamed(bolt / "ground_truth/crack", name)
    assert load_dataset(bolt).problems == (
        f"Mask files that fit no image: ground_truth/crack/{name.format(0)}.png, "
        f"ground_truth/crack/{name.format(1)}.png (2 in all). The mask of test/crack/0.png would be "
        "ground_truth/crack/0_mask.* or ground_truth/crack/0.*.",
        "Defective, but without a mask: test/crack/0.png, test/crack/1.png (2 in all).",
    )
    renamed(bolt / "ground_truth/dent", name)
    for path in (bolt / "ground_truth/dent").iterdir():
        path.rename(path.with_name(name.format(path.stem) + ".png"))
    problem = only_problem(bolt)
    assert "… (4 in all). The mask of test/crack/0.png would be" in problem
    assert problem.endswith("So no image has a mask, and there are no pixel metrics.")


@pytest.mark.parametrize(
    ("old", "new"),
    [("ground_truth/crack", "ground_truth/cracks"), ("ground_truth", "masks"), ("ground_truth", "Ground Truths")],
)
def test_folders_of_masks_that_fit_no_kind_are_named(bolt, old, new):
    (bolt / old).rename(bolt / new)
    problem = load_dataset(bolt).problems[0]
    assert problem.startswith(f"Mask files that fit no image: {new}/")
    assert "The mask of test/crack/0.png would be ground_truth/crack/0_mask.* or ground_truth/crack/0.*." in problem


def test_one_mask_too_many_is_named(bolt):
    mask(bolt / "ground_truth/crack/7_mask.png")
    mask(bolt / "ground_truth/dent/1_mask.png")  # as well as 1.bmp
    assert only_problem(bolt) == (
        "Mask files that fit no image: ground_truth/crack/7_mask.png, ground_truth/dent/1.bmp (2 in all)."
    )


def test_folders_that_are_not_used_are_named(bolt):
    image(bolt / "valid/good/0.png")
    mask(bolt / "masks/crack/0.png")
    (bolt / "docs").mkdir()
    (bolt / "docs/readme.txt").touch()
    assert only_problem(bolt) == (
        "Folders with images that were not used: masks, valid (2 in all); used are train, validation, test, "
        "ground_truth."
    )


def inverted(path: Path) -> None:
    ImageOps.invert(Image.open(path)).save(path)


def test_inverted_masks_are_named_and_used_as_they_are(bolt):
    for path in (bolt / "ground_truth/dent").iterdir():
        inverted(path)
    assert only_problem(bolt) == (
        "Masks that mark more than half of the image or nearly all of its border, and so may be inverted: dent (2 of 2 "
        "masks, such as ground_truth/dent/0.bmp). They are used as they are: 0 means good, all else defective. If that "
        "is wrong, invert the files."
    )
    assert all(sample.mask for sample in load_dataset(bolt).test if sample.label)
    inverted(bolt / "ground_truth/crack/0_mask.png")  # one of two may be a large defect
    assert "crack" not in only_problem(bolt)
    inverted(bolt / "ground_truth/crack/1_mask.png")
    assert "crack (2 of 2 masks, such as ground_truth/crack/0_mask.png), dent (2 of 2" in only_problem(bolt)


def test_half_of_several_masks_inverted_are_named(bolt):
    for i in range(2, 4):
        image(bolt / f"test/crack/{i}.png", 60 + i)
        mask(bolt / f"ground_truth/crack/{i}_mask.png")
    for i in range(2):
        inverted(bolt / f"ground_truth/crack/{i}_mask.png")
    assert "crack (2 of 4 masks" in only_problem(bolt)


def test_masks_of_a_kind_that_is_not_read_are_named(bolt):
    for path in (bolt / "ground_truth/crack").iterdir():
        path.unlink()
    (bolt / "ground_truth/crack/0_mask.npy").write_bytes(b"an array")
    told = "Files among the masks that are no images: ground_truth/crack/0_mask.npy (1 in all). Save masks as PNG."
    assert told in load_dataset(bolt).problems


def test_masks_that_mark_the_border_are_named(bolt):
    size = (60, 40)
    for i in range(2):
        image(bolt / f"test/dent/{i}.png", 30 + i, size)
        path = mask(bolt / f"ground_truth/dent/{i}.bmp", (0, 0, *size), size)
        frame = Image.open(path)
        frame.paste(0, (4, 4, 56, 36))  # 35 % are left
        frame.save(path)
    assert "dent (2 of 2 masks, such as" in only_problem(bolt)
    for i in range(2):
        mask(bolt / f"ground_truth/dent/{i}.bmp", (0, 0, 60, 19), size)  # a defect at the edge, under one half
    assert load_dataset(bolt).problems == ()


def test_masks_of_good_images_may_mark_nothing(bolt):
    image(bolt / "ground_truth/good/0_mask.png", 0)
    assert load_dataset(bolt).problems == () and load_dataset(bolt).test[4].mask is None
    mask(bolt / "ground_truth/good/1_mask.png")
    assert only_problem(bolt) == "Good, and counted as good, but the mask marks something: test/good/1.png (1 in all)."


def test_masks_beside_their_images_are_no_images(bolt):
    mask(bolt / "test/crack/0_mask.png")
    assert "Images that are named like masks, but used as images: test/crack/0_mask.png (1 in all)." in str(
        load_dataset(bolt).problems
    )
    (bolt / "test/crack/0_mask.png").rename(bolt / "test/crack/face mask.png")  # a product, it may be
    assert "named like masks" not in str(load_dataset(bolt).problems)
    mask(bolt / "test/ground_truth/0.png", (0, 0, 2, 2))
    assert "used as images: test/ground_truth/0.png (1 in all)" in str(load_dataset(bolt).problems)


def test_the_same_file_as_good_and_defective(bolt):
    (bolt / "test/good/7.png").write_bytes((bolt / "test/crack/0.png").read_bytes())
    (bolt / "train/good/7.png").write_bytes((bolt / "test/dent/1.png").read_bytes())
    assert only_problem(bolt) == (
        "The same file is both good and defective, and one of the two is wrong: test/dent/1.png = train/good/7.png, "
        "test/good/7.png = test/crack/0.png (2 in all)."
    )


def test_images_in_both_training_and_test(bolt):
    (bolt / "test/good/7.png").write_bytes((bolt / "train/good/2.png").read_bytes())
    assert "test/good/7.png = train/good/2.png" in only_problem(bolt)


def test_empty_defect_folder(bolt):
    (bolt / "test/scratch").mkdir()
    assert only_problem(bolt) == "test/scratch holds no images."


def test_files_of_no_use(bolt):
    (bolt / "test/crack/0.txt").touch()
    (bolt / "train/good/.DS_Store").touch()
    image(bolt / "train/odd/0.png")
    assert only_problem(bolt) == "Files that were not used: train/odd/0.png, test/crack/0.txt (2 in all)."


def test_one_kind_only(bolt):
    (bolt / "test/good").rename(bolt.parent / "elsewhere")
    assert only_problem(bolt) == "All test images are defective: AUROC needs both kinds."


def test_nothing_to_train_on(bolt):
    (bolt / "train").rename(bolt.parent / "elsewhere")
    dataset = load_dataset(bolt)
    assert dataset.layout == "mvtec" and not dataset.train and "evaluate" in only_problem(bolt)


# The case of names


def test_names_of_folders_are_known_whatever_their_case(bolt):
    plain = load_dataset(bolt)
    for old, new in (
        *(("train/good", "train/Good"), ("train", "Train"), ("test/good", "test/GOOD"), ("test", "TEST")),
        *(("ground_truth/crack", "ground_truth/Crack"), ("ground_truth", "Ground_Truth")),
    ):
        (bolt / old).rename(bolt / new)
    renamed(bolt / "Ground_Truth/Crack", "{}_MASK")
    dataset = load_dataset(bolt)
    assert (dataset.layout, dataset.problems) == ("mvtec", ())
    assert [sample.path.parts[-2:] for sample in dataset.train] == [("Good", f"{i}.png") for i in range(4)]
    found = {sample.path.name + sample.defect: sample for sample in dataset.test}
    for sample in plain.test:
        twin = found[sample.path.name + sample.defect]
        assert twin.label == sample.label and (twin.mask is None) == (sample.mask is None)
    assert found["1.pngcrack"].mask == bolt / "Ground_Truth/Crack/1_MASK.png"


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "Case").touch()
    if (tmp_path / "case").exists():
        pytest.skip("this file system takes names that differ by case only for one")


def test_of_folders_that_differ_by_case_only_one_is_read(bolt, cases):
    image(bolt / "Train/good/9.png", 90)
    image(bolt / "train/GOOD/8.png", 91)
    dataset = load_dataset(bolt)
    assert names(dataset.train) == ["0", "1", "2", "3"]
    assert dataset.problems == (
        "Files that were not used: train/GOOD/8.png (1 in all).",
        "Folders whose names differ by case only: train is read, and not Train; train/good is read, and not GOOD.",
    )


def test_kinds_that_differ_by_case_only_keep_their_masks(bolt, cases):
    for i in range(2):
        image(bolt / f"test/Crack/{i}.png", 60 + i)
    assert [sample.mask is None for sample in load_dataset(bolt).test if sample.defect == "Crack"] == [True, True]
    mask(bolt / "ground_truth/Crack/0_mask.png")
    masks = {s.path.relative_to(bolt).as_posix(): s.mask for s in load_dataset(bolt).test if s.label}
    assert masks["test/Crack/0.png"] == bolt / "ground_truth/Crack/0_mask.png" and masks["test/Crack/1.png"] is None
    assert masks["test/crack/1.png"] == bolt / "ground_truth/crack/1_mask.png"
    assert load_dataset(bolt).problems[0] == (
        "Kinds of defect whose names differ by case only, and count as several: test/Crack, test/crack (2 in all)."
    )


# A folder


def test_folder_of_good_images(tmp_path):
    image(tmp_path / "b.png")
    image(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    dataset = load_dataset(tmp_path)
    assert dataset.layout == "folder" and dataset.test == () and dataset.problems == ()
    assert dataset.train == (Sample(tmp_path / "a.jpg", 0), Sample(tmp_path / "b.png", 0))


def test_what_is_refused_says_what_to_do(tmp_path, bolt):
    with pytest.raises(DatasetError, match=r"gone: there is no such folder or table; check"):
        load_dataset(tmp_path / "gone")
    with pytest.raises(DatasetError, match=r"holds categories; name one, as in .*bolt, or .* --multi-class: bolt$"):
        load_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"(?s)not known: crack/ with 2 images, .* 0 images beside.*train/good"):
        load_dataset(bolt / "test")
    image(bolt / "test.png")
    with pytest.raises(DatasetError, match="neither a folder nor a table"):
        load_dataset(bolt / "test.png")
    (tmp_path / "void").mkdir()
    with pytest.raises(DatasetError, match=r"(?s)void: holds no images.*Read are"):
        load_dataset(tmp_path / "void")


def test_train_without_good_is_no_layout(bolt):
    (bolt / "train/good").rename(bolt / "train/normal")
    with pytest.raises(DatasetError, match="train/ with 4 images"):
        load_dataset(bolt)


# A table


def table(folder: Path, text: str, encoding: str = "utf-8") -> Dataset:
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return load_dataset(path)


@pytest.fixture
def shelf(tmp_path):
    for i in range(12):
        image(tmp_path / f"p{i}.png", i)
    mask(tmp_path / "m.png")
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


def test_bad_rows_are_reported_by_kind_and_line(shelf):
    (shelf / "notes.txt").touch()
    dataset = table(
        shelf,
        "path,label,split\np0.png,good\ngone.png,good\np1.png,fine\n\np1.png,0,val\np1.png,1,train\nnotes.txt,0\n"
        f"p1.png,0,test,extra\n{'x' * 5000}.png,0\n,0\np1.png,\n",
    )
    assert names(dataset.train) == ["p0"]
    long = f"{'x' * 40}…{'x' * 35}.png"
    assert [problem.partition(";")[0] for problem in dataset.problems] == [
        f"list.csv: 2 rows were left out (no such file): line 3 'gone.png', line 10 '{long}'",
        "list.csv: 1 row was left out (unknown label): line 4 'fine'",
        "list.csv: 1 row was left out (unknown split): line 6 'val'",
        "list.csv: 1 row was left out (defective, in the split train): line 7 'p1.png'",
        "list.csv: 1 row was left out (not an image by its suffix): line 8 'notes.txt'",
        "list.csv: 1 row was left out (more cells than the first line): line 9 'p1.png'",
        "list.csv: 1 row was left out (no path): line 11 '0'",
        "list.csv: 1 row was left out (no label): line 12 'p1.png'",
    ]
    assert dataset.problems[1].endswith("; labels are " + ", ".join(GOOD_LABELS + DEFECT_LABELS) + ".")


def test_what_is_wrong_with_many_rows_fits_on_a_screen(shelf):
    text = "path,label\n" + "".join(f"images/{i:05}.png,{'ok' if i % 2 else 'odd'}\n" for i in range(3000))
    with pytest.raises(DatasetError) as error:
        table(shelf, text)
    lines = str(error.value).splitlines()
    assert len(lines) < 12 and max(map(len, lines)) < 400
    assert "list.csv: 1500 rows were left out (unknown label): line 2 'odd', line 4 'odd', line 6 'odd', …;" in lines[1]
    gone = "(no such file): line 3 'images/00001.png', line 5 'images/00003.png', line 7 'images/00005.png', …;"
    assert gone in lines[2]


def test_tables_as_excel_on_windows_saves_them(shelf):
    (shelf / "sub").mkdir()
    (shelf / "p1.png").rename(shelf / "sub/p1.png")
    mask(shelf / "sub/m1.png")
    text = (
        "path;label;mask;;\n.\\p0.png;ok;;;\nsub\\p1.png;NOK;sub\\m1.png\n"
        + ";;;;\n" * 300
        + " ; \n;;;;;;;;\np2.png;ok;;;;\n"
    )
    dataset = table(shelf, text.replace("\n", "\r\n"), "utf-8-sig")
    (problem,) = dataset.problems  # rows of separators alone, and separators at the end of a row, mean nothing
    assert problem.startswith("All test images are defective")
    assert dataset.train == (Sample(shelf / "p0.png", 0), Sample(shelf / "p2.png", 0))
    assert dataset.test == (Sample(shelf / "sub/p1.png", 1, shelf / "sub/m1.png", "defect"),)


def test_a_backslash_may_be_part_of_a_name(shelf):
    if "\\" in str(shelf):
        pytest.skip("Windows parts folders by it")
    image(shelf / "a\\b.png")
    assert table(shelf, "path,label\na\\b.png,0\n").train[0].path == shelf / "a\\b.png"


@pytest.mark.parametrize("label", ["Good", " OK ", "i.O.", "I. O.", "io", "0", "0.0", "False", "PASS", "nominal"])
def test_labels_of_good_images(shelf, label):
    assert [s.label for s in table(shelf, f"path,label\np0.png,{label}\n").train] == [0]


@pytest.mark.parametrize(
    "label", ["NOK", "n.i.O.", "N. i. O.", "nio", "NiO", "not ok", "Not-OK", "NG", "1", "1.0", "True", "fail", "defect"]
)
def test_labels_of_defective_images(shelf, label):
    assert [s.label for s in table(shelf, f"path,label\np0.png,{label}\n").test] == [1]


@pytest.mark.parametrize("label", ["-1", "10", "0.5", "2", "n", "i", ".", "goods", "true?"])
def test_labels_that_are_not_guessed(shelf, label):
    with pytest.raises(DatasetError, match=r"1 row was left out \(unknown label\)"):
        table(shelf, f"path,label\np0.png,{label}\n")


def test_what_true_and_false_mean_is_said(shelf):
    dataset = table(shelf, "path,label\np0.png,False\np1.png,True\n")
    assert names(dataset.train) == ["p0"] and names(dataset.test) == ["p1"]
    assert dataset.problems[0] == ("list.csv: the label True means defective, like 1, and False means good, like 0.")
    assert "True" not in str(table(shelf, "path,label\np0.png,0\np1.png,1\n").problems)


def test_a_file_that_is_good_and_defective_is_left_out_and_named(shelf):
    rows = "".join(f"p{i}.png,ok\n" for i in range(6)) + "p6.png,ng\n"
    plain = table(shelf, f"path,label\n{rows}")
    (shelf / "link.png").symlink_to(shelf / "p2.png")
    dataset = table(shelf, f"path,label\n{rows}./p0.png,NG\nlink.png,ng\n")
    assert dataset.problems[0] == (
        "list.csv: 2 files are listed both as good and as defective: p0.png (lines 2, 9), p2.png (lines 4, 10); the "
        "rows are left out; keep those that are right."
    )
    assert names(plain.train) == ["p0", "p1", "p2", "p3", "p5"] and names(dataset.train) == ["p1", "p3", "p5"]
    assert names(dataset.test) == names(plain.test) == ["p4", "p6"]  # no row changes sides


def test_rows_that_are_there_twice_count_once(shelf):
    mask(shelf / "n.png")
    text = "path,label,mask\np0.png,1,m.png\np0.png,1,m.png\np1.png,1,m.png\np1.png,1,n.png\np2.png,ok,\n"
    dataset = table(shelf, text)
    assert names(dataset.test) == ["p0", "p1", "p1"]
    assert "2 files are listed more than once: p0.png (lines 2, 3), p1.png (lines 4, 5); equal" in dataset.problems[0]


def test_missing_mask_of_a_row(shelf):
    dataset = table(shelf, "path,label,mask\np0.png,0,\np1.png,1,m.png\np2.png,1,gone.png\n")
    assert [sample.mask is None for sample in dataset.test] == [False, True]
    assert dataset.problems[0] == "There is no such mask: gone.png of p2.png (1 in all)."


def test_tables_of_no_use(shelf):
    with pytest.raises(DatasetError, match="first line lacks label"):
        table(shelf, "path,class\np0.png,0\n")
    with pytest.raises(DatasetError, match="first line lacks path and label"):
        table(shelf, "")
    with pytest.raises(DatasetError, match=r"UTF-8"):
        table(shelf, "path,label\nä.png,0\n", "latin-1")
    with pytest.raises(DatasetError, match=r"(?s)no images.*line 2"):
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
            image(folder / f"p{i}.png", i)
        image(folder / "m.png", 255)
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
    image(moved / "train/good/0.png", 99)
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
