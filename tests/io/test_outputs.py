"""Outputs are no inputs of a later run, and do not remain beside what a later run writes."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import load_dataset
from unflaw.io.files import write_png
from unflaw.io.listing import list_images
from unflaw.io.outputs import SORTED, Earlier, drawn, note_sorted
from unflaw.scale.sources import list_items as listed
from unflaw.scale.store import OWN

pytestmark = pytest.mark.slow


def unflaw(*words: object) -> str:
    """All that a command says that must succeed."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def inspected(out: Path) -> list[str]:
    return [Path(json.loads(line)["path"]).name for line in (out / "results.jsonl").read_text().splitlines()]


def age(folder: Path, seconds: float = 60.0) -> None:
    """All that is in a folder was written earlier."""
    for path in folder.rglob("*"):
        status = path.stat()
        os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


def image(path: Path, by_unflaw: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, Image.new("RGB", (4, 4)), drawn=by_unflaw)
    return path


@pytest.fixture
def new(parts, tmp_path) -> Path:
    """Four images in a folder, one of which is called like a panel."""
    shutil.copytree(parts / "test/good", tmp_path / "new")
    (tmp_path / "new/images").mkdir()
    (tmp_path / "new/003.png").rename(tmp_path / "new/images/00003_003.png")
    return tmp_path / "new"


# No input


@pytest.mark.parametrize("out", ["new", "new/results", "new/{}"])
def test_results_beside_the_images_are_not_inspected(saved, new, tmp_path, out):
    expected = ["000.png", "001.png", "002.png", "00003_003.png"]
    for day in ("monday", "tuesday", "wednesday"):
        place = tmp_path / out.format(day)
        unflaw("predict", saved, new, "--out", place, "--images", "--labelme")
        assert inspected(place) == expected
        panels = [json.loads(line)["image"] for line in (place / "results.jsonl").read_text().splitlines()]
        assert len(panels) == 4 and all(drawn(place / panel) for panel in panels)
        assert [item.name for item in listed([str(new)])] == [str(path) for path in list_images(new)]
    assert [path.name for path in list_images(new)] == expected
    (new / "images/00003_003.png").rename(new / "003.png")  # data are a flat folder
    assert len(load_dataset(new).train) == 4  # nor are they learned from


def test_what_an_interrupted_run_left_and_figures_are_not_inspected(saved, parts, new):
    unflaw("predict", saved, new, "--out", new / "a", "--images")
    (new / "a/results.jsonl").unlink()
    unflaw("figures", saved, "--data", parts, "--out", new / "figures", "--count", 1, "--width", 600)
    assert len(names(new / "figures")) == 3
    unflaw("predict", saved, new, "--out", new / "b", "--images")
    assert len(inspected(new / "b")) == 4


def test_only_what_unflaw_drew_is_left_out(tmp_path):
    for name in ("images/00000_a.png", "images/123456_ä b.png", "perception.png", "deep/er/images/00001_.png"):
        assert drawn(image(tmp_path / name, True))
        assert not drawn(image(tmp_path / "own" / name, False))
    (tmp_path / "own/images/00009_empty.png").touch()
    (tmp_path / "own/images/00009_tEXtSoftware.png").write_bytes(b"\x89PNG tEXtSoftware\0other")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == [f"own/{name}" for name in names(tmp_path / "own")] and len(found) == 6
    assert sorted(Path(item.name).relative_to(tmp_path).as_posix() for item in listed([str(tmp_path)])) == found
    assert len(list(listed([f"{tmp_path}/**/*.png"]))) == 6
    assert [item.name for item in listed([f"{tmp_path}/perception.png"])] == [f"{tmp_path}/perception.png"]  # is named


def test_results_of_ray_are_no_input_unless_they_are_named(tmp_path):
    for name in ("a.png", "results/part-00000.parquet", f"results/{OWN}/plan.json", f"results/{OWN}/items.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [Path(item.name).name for item in listed([str(tmp_path)])] == ["a.png"]
    with pytest.raises(ValueError, match=r"part-00000\.parquet: is not a readable Parquet file"):
        list(listed([str(tmp_path / "results")]))


def test_what_a_watcher_has_sorted_is_no_input_unless_it_is_named(saved, new, tmp_path):
    (new / "images/00003_003.png").rename(new / "003.png")
    watch = ["--model", saved, "--store", tmp_path / "store", "--once", "--settle", 0, "--poll-interval", 0.01]
    shutil.copy(new / "000.png", new / "late.png")
    late = (new / "late.png").rename(tmp_path / "late.png")
    unflaw("watch", new, "--out", new / "a/sorted", *watch)
    assert len(names(new / "a/sorted")) == 4 and list_images(new) == [] == list(listed_or_none(new))
    late.rename(new / "late.png")
    image(new / "images/00000_late.png", True)  # which `unflaw predict` left
    unflaw("watch", new, "--out", new / "other", *watch)
    assert len(names(new / "a/sorted")) == 4 and [Path(name).name for name in names(new / "other")] == ["late.png"]
    assert (new / "images/00000_late.png").exists()
    assert (new / SORTED).read_text() == "a/sorted\nother\n"
    assert len(list_images(new / "a/sorted")) == len(list(listed([str(new / "a")]))) == 4
    note_sorted(new, tmp_path / "elsewhere")
    assert (new / SORTED).read_text() == "a/sorted\nother\n"


def listed_or_none(folder: Path) -> list[object]:
    try:
        return list(listed([str(folder)]))
    except ValueError:
        return []


# Not beside what is new


def test_a_smaller_run_into_a_used_folder_leaves_only_its_own(saved, parts, tmp_path):
    out, options = tmp_path / "out", ["--images", "--labelme", "--group-by", "folder"]
    unflaw("predict", saved, parts / "test", "--out", out, *options)
    assert len(names(out)) == 8 + 8 + 3
    own = ["notes.txt", "images/00007_mine.png", "images/photo.png", "labelme/00001_mine.json", "labelme/a.json"]
    for name in own:
        (out / name).write_text("of the user")
    edited, changed = out / "labelme/00002_002.json", out / "labelme/00003_003.json"
    edited.write_text(json.dumps(json.loads(edited.read_text()), indent=2))  # as LabelMe saves
    age(out)
    changed.write_text(changed.read_text())  # whatever was changed since
    kept = [*own, "labelme/00002_002.json", "labelme/00003_003.json"]
    said = unflaw("predict", saved, parts / "test/square/000.png", "--out", out, "--labelme")
    assert names(out) == sorted([*kept, "drift.json", "labelme/00000_000.json", "results.jsonl"])
    assert f"note: {out}: removed files of an earlier run: 8 files in images, 5 files in labelme, parts.jsonl\n" in said
    assert (
        f"note: {out}: kept older files that are changed or not from unflaw: 1 file in images, 3 files in labelme\n"
        in said
    )
    assert json.loads((out / "labelme/00000_000.json").read_text())["flags"]["defect"]
    said = unflaw("predict", saved, parts / "test", "--out", out, *options)
    assert "removed" not in said and len(names(out)) == 8 + 8 + 3 + len(own)


def test_folders_that_become_empty_go_and_what_an_interrupted_run_left(saved, parts, tmp_path):
    out = tmp_path / "out"
    unflaw("predict", saved, parts / "test", "--out", out, "--images", "--labelme")
    (out / "results.jsonl").rename(out / "results.jsonl.part")  # as if it had been killed before its end
    (out / "drift.json").unlink()
    unflaw("predict", saved, parts / "test/good", "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["drift.json", "results.jsonl"]


def test_files_of_unknown_origin_and_links_stay(tmp_path):
    panel = image(tmp_path / "out/images/00000_a.png", True)
    (tmp_path / "out/images/00001_a.png").symlink_to(panel)
    (tmp_path / "out/parts.jsonl").write_text('{"mine": 1}\n')
    earlier = Earlier(tmp_path / "out")  # without a results file nobody knows when a run ended
    (said,) = earlier.clear()
    assert said.endswith(": 2 files in images, parts.jsonl") and "kept" in said
    (tmp_path / "out/results.jsonl").touch()
    assert Earlier(tmp_path / "out").clear()[0].endswith("removed files of an earlier run: 1 file in images")
    assert names(tmp_path / "out") == ["parts.jsonl", "results.jsonl"]
    assert (tmp_path / "out/images/00001_a.png").is_symlink()


def test_a_run_that_fails_removes_nothing(saved, parts, tmp_path):
    out = tmp_path / "out"
    unflaw("predict", saved, parts / "test", "--out", out, "--labelme")
    age(out)
    before = names(out)
    done = CliRunner().invoke(
        app, ["predict", str(saved), str(parts / "test/good"), "--out", str(out), "--coco", str(out / "labelme")]
    )
    assert done.exit_code == 2 and names(out) == before


def test_figures_of_another_method_are_named(saved, parts, tmp_path):
    out = tmp_path / "figures"
    image(out / "masks.png", True), image(out / "photo.png", False)
    said = unflaw("figures", saved, "--data", parts, "--out", out, "--count", 1, "--width", 600)
    assert f"note: {out / 'masks.png'}: stays from an earlier run\n" in said and said.count("note: ") == 1
    assert time.time() - (out / "fasm.png").stat().st_mtime < 600


@pytest.mark.parametrize("name", ["panels/00001_x.png", "00001_x.png", "Images (1)/00001_a.PNG", "masks2.png"])
def test_what_was_drawn_is_known_wherever_it_lies_and_however_it_is_called(tmp_path, name):
    mine, theirs = tmp_path / name, tmp_path / f"own-{Path(name).name}"
    mine.parent.mkdir(parents=True, exist_ok=True)
    write_png(mine, Image.new("RGB", (4, 4)), drawn=True)
    write_png(theirs, Image.new("RGB", (4, 4)))
    assert list_images(tmp_path) == [theirs]
