"""Which files of a folder are listed: the same for data sets, prediction, watching and, in test_scale.py, for Ray."""

import os
from pathlib import Path

import pytest
from tests.conftest import make_parts
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import DatasetError, load_dataset
from unflaw.io.listing import counted, is_passed_over, list_images, note, visible_files, walk
from unflaw.io.words import count


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_images(root)]


SYSTEM = ["#recycle", "$RECYCLE.BIN", "@eaDir", ".Trash-1000", ".thumbnails", "thumbnails", "lost+found"]
SYSTEM += ["System Volume Information", "__MACOSX", "@Recycle", "#snapshot", "RECYCLER", ".AppleDouble"]


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_that_systems_make_are_passed_over_at_any_depth(tmp_path, name):
    touch(tmp_path, "a.png", f"{name}/b.png", f"sub/{name}/deep/c.png", "sub/d.png", f"sub/x{name}x/e.png")
    passed_over = []
    assert [p.name for p in list_images(tmp_path, passed_over)] == ["a.png", "d.png", "e.png"]
    found = {str(tmp_path / name): 1, str(tmp_path / "sub" / name): 1}
    assert counted(passed_over) == found and is_passed_over(name.upper())
    assert listed(tmp_path / name) == ["b.png"]  # whoever names it means it


def test_files_that_systems_make_are_passed_over():
    assert all(map(is_passed_over, ["Thumbs.db", "desktop.ini", ".DS_Store", "._001.png"]))
    assert not any(map(is_passed_over, ["thumbs.png", "recycle", "eaDir", "$a.png", "#1.png", "@1", "trash"]))


def test_the_note_counts_images_by_folder(tmp_path):
    touch(tmp_path, *(f"good/{folder}/{i}.png" for folder in ("@eaDir", "#recycle") for i in range(3)), "good/a.png")
    touch(tmp_path, "good/._a.png", "good/.DS_Store", "good/Thumbs.db", "@eaDir/index.db", "z/.b.jpg", ".git/logo.txt")
    passed_over = []
    assert [path.name for path in visible_files(tmp_path, passed_over)] == ["a.png"]
    (text,) = note({os.path.relpath(place, tmp_path): number for place, number in counted(passed_over).items()})
    assert text == (
        "Hidden files and folders of the system are passed over, 8 images in all: good (1), good/#recycle (3), "
        "good/@eaDir (3), …"
    )
    assert note({"a": 1}) == ["Hidden files and folders of the system are passed over, 1 image in all: a (1)."]
    assert note({}) == [] == note(counted([]))


# Links


def test_linked_folders_are_followed_once_each_and_by_their_own_path(tmp_path):
    root = touch(tmp_path / "root", "m/1.png", "m/n/2.png")
    touch(tmp_path / "other", "3.png", "n/4.png")
    (root / "a").symlink_to(root / "m")  # comes first by name, yet what it leads to has a path of its own
    (root / "b").symlink_to(tmp_path / "other")
    (root / "c").symlink_to(tmp_path / "other/n")
    (root / "again.png").symlink_to(root / "m/1.png")  # links to files are files
    assert listed(root) == ["again.png", "b/3.png", "b/n/4.png", "m/1.png", "m/n/2.png"]
    (tmp_path / "door").symlink_to(root)
    assert listed(tmp_path / "door") == listed(root)


def test_loops_end(tmp_path):
    root = touch(tmp_path / "root", "a/1.png")
    (root / "a/up").symlink_to(root)
    (root / "a/higher").symlink_to(tmp_path)
    (root / "self").symlink_to("self")
    (root / "x").symlink_to("y")
    (root / "y").symlink_to("x")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    touch(tmp_path, "beside/2.png")
    (tmp_path / "beside/back").symlink_to(root / "a")
    assert listed(root) == ["a/1.png", "a/higher/beside/2.png"]


def test_the_order_is_that_of_the_paths(tmp_path):
    touch(tmp_path, "a/b.png", "a.png", "a-c.png", "b/a.png")
    assert [entry.path for entry in walk(str(tmp_path))] == [
        str(tmp_path / name) for name in ("a/b.png", "a-c.png", "a.png", "b/a.png")
    ]


# The same everywhere


@pytest.fixture
def nas(tmp_path) -> Path:
    """A data set as a NAS leaves it: a defective image was deleted from the good ones, and there are thumbnails."""
    root = make_parts(tmp_path / "parts")
    (root / "train/good/#recycle").mkdir()
    (root / "train/good/#recycle/old.png").write_bytes((root / "test/square/000.png").read_bytes())
    for part in ("train/good", "test/good", "test"):
        folder = root / part / "@eaDir/000.png"
        folder.mkdir(parents=True)
        (folder / "SYNOPHOTO_THUMB_M.png").write_bytes((root / "train/good/000.png").read_bytes())
    return root


def test_system_folders_are_not_learned_from(nas):
    dataset = load_dataset(nas)
    assert (len(dataset.train), len(dataset.test)) == (12, 8)
    assert {sample.defect for sample in dataset.test} == {"good", "square"}  # @eaDir is no kind of defect
    assert dataset.problems == (
        "Hidden files and folders of the system are passed over, 4 images in all: test/@eaDir (1), "
        "test/good/@eaDir (1), train/good/#recycle (1), …",
    )
    good = load_dataset(nas / "train/good")  # a plain folder, which may not hold folders of images of the user's
    assert len(good.train) == 12 and "2 images in all: #recycle (1), @eaDir (1)." in good.problems[0]
    empty = nas.parent / "empty"
    (nas / "train/good").rename(empty)
    for path in empty.glob("*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"(?s)holds no images.*passed over, 2 images in all"):
        load_dataset(empty)


def test_predict_passes_them_over_and_says_so(nas, saved, tmp_path):
    asked = ["predict", str(saved), str(nas / "test/good"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 4
    assert f"note: Hidden files and folders of the system are passed over, 1 image in all: {nas}" in done.stderr


def test_linked_folders_in_data_sets(tmp_path):
    root = make_parts(tmp_path / "parts")
    (root / "train/good").rename(tmp_path / "good")
    (root / "train/good").symlink_to(tmp_path / "good")
    (root / "test/square").rename(tmp_path / "square")
    (root / "test/square").symlink_to(tmp_path / "square")
    (tmp_path / "more").mkdir()
    (tmp_path / "good/011.png").rename(tmp_path / "more/011.png")
    (tmp_path / "good/more").symlink_to(tmp_path / "more")
    (tmp_path / "good/loop").symlink_to(root)  # ends, yet everything would train: so that is said
    dataset = load_dataset(root)
    trained = {sample.path.relative_to(root).as_posix() for sample in dataset.train}
    assert {"train/good/more/011.png", "train/good/000.png"} <= trained
    assert any("both good and defective" in problem for problem in dataset.problems)
    (tmp_path / "good/loop").unlink()
    assert [len(part) for part in (load_dataset(root).train, load_dataset(root).test)] == [12, 8]
    assert load_dataset(root).problems == ()
    with pytest.raises(DatasetError, match=r"more/ with 1 image, 11 images beside it"):
        load_dataset(tmp_path / "good")


def test_numbers_never_are_negative(tmp_path):
    touch(tmp_path, "a/1.png", "a/2.png", "x.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DatasetError, match=r"a/ with 2 images, b/ with 0 images, 1 image beside them"):
        load_dataset(tmp_path)


def test_nouns_agree_with_their_numbers():
    assert [count(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert count(2, "category", "categories") == "2 categories" and count(1, "category", "categories") == "1 category"
