"""Watching a folder: complete files only, once each, filed by verdict."""

import errno
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from unflaw.errors import DetectorError, ImageError
from unflaw.station.detectors import Served
from unflaw.station.log import Filter, Log, sha256
from unflaw.station.watch import Watcher


@pytest.fixture(scope="module")
def served(saved) -> Served:
    return Served("parts", saved)


@pytest.fixture
def place(served, tmp_path):
    """`place.watcher(**options)` watches `place.folder`, with `place.log`; `place.said` is what it reported."""

    class Place:
        folder, out, said = tmp_path / "camera", tmp_path / "sorted", []
        log = Log(f"sqlite:///{tmp_path / 'log.db'}", tmp_path / "images")

        def watcher(self, **options) -> Watcher:
            whole = {"settle": 0, "patience": 0, "report": self.said.append} | options
            return Watcher(served, self.log, self.folder, self.out, **whole)

        def filed(self) -> list[str]:
            files = (path for path in self.out.rglob("*") if path.is_file())
            return sorted(path.relative_to(self.out).as_posix() for path in files)

        def logged(self) -> list[str]:
            return sorted(entry.name for entry in self.log.find(Filter()))

    Place.folder.mkdir()
    return Place()


@pytest.fixture(scope="module")
def good(parts, served) -> bytes:
    """An image that the detector calls good."""
    images = [path.read_bytes() for path in sorted((parts / "train/good").iterdir())]
    return next(data for data in images if served.inspect(data, name="")[0].verdict == "good")


@pytest.fixture(scope="module")
def bad(parts) -> bytes:
    return (parts / "test/square/000.png").read_bytes()


def test_images_move_to_the_folder_of_their_verdict(place, good, bad):
    (place.folder / "line 1").mkdir()
    (place.folder / "line 1/a.png").write_bytes(good)
    (place.folder / "b.PNG").write_bytes(bad)
    (place.folder / "notes.txt").write_text("no image")
    (place.folder / ".hidden.png").write_bytes(good)
    assert place.watcher().look() == 0
    assert place.filed() == ["defect/b.PNG", "good/line 1/a.png"]
    assert sorted(path.name for path in place.folder.rglob("*") if path.is_file()) == [".hidden.png", "notes.txt"]
    assert place.logged() == ["b.PNG", "line 1/a.png"]
    (entry,) = place.log.find(Filter(verdict="defect"))
    assert entry.source == str(place.folder / "b.PNG") and entry.digest == sha256(bad)
    assert place.log.image(entry.digest).read_bytes() == bad
    assert any(line.startswith("b.PNG: defect, score") for line in place.said)


def test_copies_stay_and_are_inspected_once_also_after_a_restart(place, good, bad):
    (place.folder / "a.png").write_bytes(good)
    watcher = place.watcher(copy=True)
    watcher.look(), watcher.look()
    place.watcher(copy=True).look()
    assert place.filed() == ["good/a.png"] and place.logged() == ["a.png"] and (place.folder / "a.png").exists()
    (place.folder / "a.png").write_bytes(bad)  # another image under the same name
    place.watcher(copy=True).look()
    assert place.filed() == ["defect/a.png", "good/a.png"] and place.logged() == ["a.png", "a.png"]


def test_a_name_that_is_taken_gets_the_content_added(place, good, parts):
    (place.out / "good").mkdir(parents=True)
    (place.out / "good/a.png").write_bytes(b"of yesterday")
    (place.folder / "a.png").write_bytes(good)
    place.watcher().look()
    assert place.filed() == [f"good/a-{sha256(good)[:16]}.png", "good/a.png"]
    assert (place.out / "good/a.png").read_bytes() == b"of yesterday"


def test_the_same_image_dropped_again_is_only_filed(place, good):
    for _ in range(2):
        (place.folder / "a.png").write_bytes(good)
        place.watcher().look()
    assert place.filed() == ["good/a.png"] and place.logged() == ["a.png"] and not list(place.folder.iterdir())


def test_a_file_that_grows_is_waited_for(place, good):
    path, watcher = place.folder / "a.png", place.watcher(settle=0.15, patience=60)
    for end in (1000, 2000, 3000):
        path.write_bytes(good[:end])
        assert watcher.look() == 1
        time.sleep(0.1)  # less than it must stand still
    path.write_bytes(good)
    assert watcher.look() == 1 and place.logged() == []
    time.sleep(0.2)
    assert watcher.look() == 0 and place.filed() == ["good/a.png"]


def test_half_a_file_that_stands_still_is_waited_for_and_then_an_error(place, good):
    path, watcher = place.folder / "a.png", place.watcher(patience=0.3)
    path.write_bytes(good[:2000])
    assert watcher.look() == 1 and place.filed() == [] and path.exists()
    time.sleep(0.35)
    assert watcher.look() == 0 and place.filed() == ["error/a.png"] and place.logged() == []
    assert any(line.startswith("note: ") and "a.png" in line for line in place.said)
    path.write_bytes(good[:2000])
    half = place.watcher(patience=60)
    assert half.look() == 1
    path.write_bytes(good)  # the camera was slow, that is all
    assert half.look() == 0 and place.filed() == ["error/a.png", "good/a.png"]


def test_a_crash_between_log_and_filing_is_mended(place, good, monkeypatch):
    (place.folder / "a.png").write_bytes(good)
    with monkeypatch.context() as patched:
        patched.setattr(Watcher, "_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            place.watcher().look()
    assert place.logged() == ["a.png"] and place.filed() == []
    place.watcher().look()
    assert place.logged() == ["a.png"] and place.filed() == ["good/a.png"] and not list(place.folder.iterdir())


def test_between_file_systems_it_is_copied_whole_before_it_is_removed(place, good, monkeypatch):
    def elsewhere(self, target):
        raise OSError(errno.EXDEV, "another file system")

    path = place.folder / "a.png"
    path.write_bytes(good)
    changed = path.stat().st_mtime_ns
    unlink = Path.unlink
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", elsewhere)
        patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))  # killed before
        with pytest.raises(KeyboardInterrupt):
            place.watcher().look()
        assert place.filed() == ["good/a.png"] and path.exists()
        patched.setattr(Path, "unlink", unlink)
        place.watcher().look()
    assert not path.exists() and place.filed() == ["good/a.png"] and place.logged() == ["a.png"]
    assert (place.out / "good/a.png").read_bytes() == good and (place.out / "good/a.png").stat().st_mtime_ns == changed


def test_an_image_that_is_replaced_while_it_is_inspected_is_not_filed_for_the_old_one(place, good, bad, monkeypatch):
    path = place.folder / "a.png"
    path.write_bytes(good)
    add = Log.add

    def replaced(self, *given):
        if path.read_bytes() == good:
            path.write_bytes(bad)
        return add(self, *given)

    monkeypatch.setattr(Log, "add", replaced)
    watcher = place.watcher()
    assert watcher.look() == 1 and place.filed() == []
    assert watcher.look() == 0 and place.filed() == ["defect/a.png"] and len(place.logged()) == 2


def test_a_share_or_a_database_that_is_away_is_waited_for(place, good, monkeypatch):
    watcher = place.watcher()
    shutil.rmtree(place.folder)
    assert watcher.look() == watcher.look() == 0
    assert len([line for line in place.said if str(place.folder) in line]) == 1  # said once
    place.folder.mkdir()
    (place.folder / "a.png").write_bytes(good)
    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", lambda *_: (_ for _ in ()).throw(OperationalError("", {}, Exception("no server"))))
        assert watcher.look() == 1 and any("no server" in line for line in place.said) and place.filed() == []
    assert watcher.look() == 0 and place.filed() == ["good/a.png"]


def test_the_sorted_images_may_lie_within(place, good):
    place.out = place.folder / "sorted"
    (place.folder / "a.png").write_bytes(good)
    watcher = place.watcher()
    watcher.look(), watcher.look()
    assert place.filed() == ["good/a.png"] and place.logged() == ["a.png"]


def test_system_folders_are_left_alone_which_is_said_once(place, good, bad):
    (place.folder / "$RECYCLE.BIN").mkdir()
    (place.folder / "$RECYCLE.BIN/$R1.png").write_bytes(bad)
    (place.folder / "a.png").write_bytes(good)
    watcher = place.watcher()
    watcher.look(), watcher.look()
    assert place.filed() == ["good/a.png"] and (place.folder / "$RECYCLE.BIN/$R1.png").exists()
    (place.folder / "line/@eaDir").mkdir(parents=True)
    (place.folder / "line/@eaDir/t.jpg").write_bytes(good)
    watcher.look(), watcher.look()
    told = [line for line in place.said if "passed over" in line]
    assert [line.rpartition("/camera/")[2] for line in told] == ["$RECYCLE.BIN (1).", "line/@eaDir (1)."]


def test_linked_folders_are_watched_and_loops_end(place, good, bad, tmp_path):
    (tmp_path / "line").mkdir()
    (tmp_path / "line/a.png").write_bytes(good)
    (tmp_path / "line/loop").symlink_to(place.folder)
    (place.folder / "one").symlink_to(tmp_path / "line")
    (place.folder / "two").symlink_to(tmp_path / "line")
    place.watcher().look()
    assert place.filed() == ["good/one/a.png"] and place.logged() == ["one/a.png"]


def test_the_sorted_images_are_known_by_whatever_way_they_are_reached(place, good, tmp_path):
    (place.folder / "a.png").write_bytes(good)
    (tmp_path / "link").symlink_to(place.folder)
    place.folder, place.out = tmp_path / "camera/../link", place.folder / "sorted"
    watcher = place.watcher()
    watcher.look(), watcher.look()
    assert place.filed() == ["good/a.png"] and place.logged() == ["a.png"]


def test_once_does_not_end_well_where_the_folder_is_gone(place):
    watcher = place.watcher()
    shutil.rmtree(place.folder)
    with pytest.raises(OSError, match="the same command goes on"):
        watcher.run(threading.Event(), once=True)


def test_it_ends_when_told_and_finishes_what_it_has_begun(place, good, bad):
    for i, data in enumerate((good, bad)):
        (place.folder / f"{i}.png").write_bytes(data)
    stop = threading.Event()
    # told so while the first is inspected
    watcher = place.watcher(report=lambda line: stop.set() if line.startswith("0.png") else None)
    watcher.run(stop, every=0.01)
    assert place.filed() == ["good/0.png"] and place.logged() == ["0.png"] and (place.folder / "1.png").exists()
    place.watcher().run(threading.Event(), every=0.01, once=True)
    assert place.filed() == ["defect/1.png", "good/0.png"]


def test_what_cannot_work_is_said_at_the_start(place, served):
    with pytest.raises(ImageError, match="nowhere"):
        Watcher(served, place.log, Path("nowhere"), place.out)
    with pytest.raises(DetectorError, match="nut"):
        place.watcher(category="nut")


@pytest.mark.parametrize("out", ["camera", ".", "elsewhere/../camera"])
def test_sorted_images_do_not_go_where_nothing_would_be_inspected(place, tmp_path, out):
    place.out = tmp_path / out
    with pytest.raises(ValueError, match="is or holds the watched folder"):
        place.watcher()
    assert not list(place.folder.iterdir())


def test_a_target_that_is_no_folder_is_said_before_the_first_inspection(place, good):
    (place.folder / "a.png").write_bytes(good)
    place.out.write_text("a file")
    with pytest.raises(ValueError, match=f"--out {place.out}: cannot hold"):
        place.watcher()
    assert place.logged() == [] and (place.folder / "a.png").exists()


def test_first_is_said_what_is_watched_and_last_what_was_done(place, served, good, bad):
    (place.folder / "before.png").write_bytes(good)
    place.watcher().look()
    place.said.clear()
    for name, data in (("before", good), ("a", good), ("b", bad), ("c", bad), ("broken", b"no image")):
        (place.folder / f"{name}.png").write_bytes(data)
    (place.folder / "notes.txt").write_text("no image")
    place.watcher().run(threading.Event(), every=0.01, once=True)
    first, *lines, last = place.said
    assert first == (
        f"{place.folder}: watched every 0.01 s until no image waits, with {served.path}; images are moved to "
        f"good, defect, review and error in {place.out}"
    )
    assert len(lines) == 6
    assert last == (
        f"{place.folder}: 3 images inspected (1 good, 2 defect, 0 for review), 1 image inspected before, "
        "1 file unreadable, 1 file passed over"
    )
    place.said.clear()
    (place.folder / "d.png").write_bytes(good)
    stop = threading.Event()
    stop.set()
    place.watcher(copy=True).run(stop)
    assert "images are copied to" in place.said[0] and "0 images inspected (0 good" in place.said[-1]
    place.said.clear()
    watcher = place.watcher(settle=60, report=lambda line: (place.said.append(line), watcher.look(), stop.set()))
    stop.clear()
    watcher.run(stop)
    assert place.said[-1].endswith("1 file passed over, 1 image still waiting")


def test_an_image_that_was_inspected_before_does_not_go_without_a_word(place, good, bad):
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC by parts"
    for data, verdict in ((good, "good"), (bad, "defect")):
        for _ in range(2):
            place.said.clear()
            (place.folder / "a.png").write_bytes(data)
            place.watcher().look()
        (line,) = place.said
        target = re.escape(str(place.out / verdict / "a.png"))
        assert re.fullmatch(
            rf"a.png: {verdict}, inspected before, {when}; removed here, since it is in {target} already", line
        )
    (place.out / "good/a.png").unlink()  # somebody took it away
    (place.folder / "a.png").write_bytes(good)
    place.said.clear()
    place.watcher().look()
    assert re.fullmatch(
        rf"a.png: good, inspected before, {when}; moved to {re.escape(str(place.out))}/good/a.png", *place.said
    )
    assert place.filed() == ["defect/a.png", "good/a.png"] and len(place.logged()) == 2


def test_copies_that_are_there_already_take_one_line(place, good):
    for i in range(8):
        (place.folder / f"{i}.png").write_bytes(good)
    place.watcher(copy=True).look()
    place.said.clear()
    watcher = place.watcher(copy=True)
    watcher.look(), watcher.look()
    named = "0.png, 1.png, 2.png, 3.png, 4.png and 3 others"
    assert place.said == [f"{place.folder}: {named} were inspected before, with copies in {place.out}"]


def test_an_unreadable_file_is_named_with_the_place_that_it_went_to(place):
    (place.folder / "a.png").write_bytes(b"no image")
    place.watcher().look()
    (line,) = place.said
    assert line.startswith(f"note: {place.folder / 'a.png'}: is not an image of a kind that is read; save it as PNG")
    assert line.endswith(f"; moved to {place.out / 'error/a.png'}")


def test_files_of_kinds_that_are_not_read_are_named_once(place, good):
    for name in ("IMG_1.HEIC", "IMG_2.heic", "a.mov", "scan.pdf", "README", ".hidden", "a.png"):
        (place.folder / name).write_bytes(good)
    watcher = place.watcher()
    watcher.look()
    (place.folder / "scan.pdf").write_bytes(b"it grows")
    watcher.look()
    for line, (names, kind, what) in zip(
        [line for line in place.said if line.startswith("note: ")],
        [
            ("README is passed over and stays", "files without a suffix", "images"),
            ("IMG_1.HEIC and IMG_2.heic are passed over and stay", ".heic files", "images"),
            ("a.mov is passed over and stays", ".mov files", "the frames to inspect"),
            ("scan.pdf is passed over and stays", ".pdf files", "images"),
        ],
        strict=True,
    ):
        expected = f"{names} there, since {kind} are not read; save {what} as PNG, JPEG, BMP, TIFF, WebP or GIF"
        assert line == f"note: {place.folder}: {expected}"
    assert len(list(place.folder.iterdir())) == 6 and place.filed() == ["good/a.png"]
    (place.folder / "later.pdf").write_bytes(b"")
    watcher.look()
    assert "later.pdf is passed over" in place.said[-1]


def test_a_file_that_is_passed_over_is_not_waited_for_but_named_at_the_end(place):
    (place.folder / "camera.log").write_text("it grows for ever")
    watcher = place.watcher(settle=60)
    assert watcher.look() == 0 and place.said == []  # it may be an image that has its name only when it is whole
    watcher.run(threading.Event(), every=0.01, once=True)
    assert [".log files" in line for line in place.said] == [False, True, False]
    assert place.said[-1].endswith("1 file passed over")


@pytest.mark.parametrize("letter", ["n", "ä", "日"])
def test_a_name_as_long_as_names_may_be_is_filed_however_often_it_comes(place, parts, letter):
    images = [path.read_bytes() for path in sorted((parts / "test/square").iterdir())[:3]]
    name = letter * (250 // len(letter.encode())) + ".png"
    for data in images:
        (place.folder / name).write_bytes(data)
        assert place.watcher().look() == 0
    assert not list(place.folder.iterdir()) and len(place.logged()) == 3
    filed = {path.name: path.read_bytes() for path in place.out.rglob("*") if path.is_file()}
    assert sorted(filed.values()) == sorted(images) and filed[name] == images[0]
    assert {f"{sha256(data)[:16]}.png" for data in images[1:]} == {other[-20:] for other in set(filed) - {name}}
    assert all(other.startswith(letter * 70) for other in filed)
    assert any(f"moved to {place.out}" in line and "cannot keep its name" in line for line in place.said)
    (place.folder / name).write_bytes(b"no image")
    (place.out / "error" / name).write_bytes(b"another one")
    assert place.watcher().look() == 0 and len(place.filed()) == 5 and not list(place.folder.iterdir())


def test_nothing_is_removed_that_is_not_filed(place, good):
    """The target may hold a folder, or files with other content."""
    (place.out / "good/a.png").mkdir(parents=True)
    (place.folder / "a.png").write_bytes(good)
    assert place.watcher().look() == 0 and place.filed() == [f"good/a-{sha256(good)[:16]}.png"]
    (place.out / place.filed()[0]).write_bytes(b"changed by hand")
    (place.folder / "a.png").write_bytes(good)
    assert place.watcher().look() == 0
    assert (place.out / f"good/a-{sha256(good)}.png").read_bytes() == good
    (place.out / f"good/a-{sha256(good)}.png").write_bytes(b"this, too")
    (place.folder / "a.png").write_bytes(good)
    assert place.watcher().look() == 1 and (place.folder / "a.png").read_bytes() == good
    assert "all possible names are taken in the target folder; rename it" in place.said[-1]


def test_an_image_is_not_removed_for_a_link_to_itself(place, good):
    (place.folder / "a.png").write_bytes(good)
    (place.out / "good").mkdir(parents=True)
    (place.out / "good/a.png").symlink_to(place.folder / "a.png")
    place.watcher().look()
    assert (place.out / f"good/a-{sha256(good)[:16]}.png").read_bytes() == good


def test_of_a_link_the_image_is_filed(place, good, tmp_path):
    (tmp_path / "elsewhere.png").write_bytes(good)
    (place.folder / "a.png").symlink_to("../elsewhere.png")
    place.watcher().look()
    assert (place.out / "good/a.png").read_bytes() == good and not (place.out / "good/a.png").is_symlink()
    assert not list(place.folder.iterdir()) and (tmp_path / "elsewhere.png").read_bytes() == good


def test_what_waits_to_be_filed_is_inspected_counted_and_told_once(place, good, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (place.folder / "a.png").write_bytes(good)
    (place.folder / "b.png").write_bytes(b"no image")
    watcher = place.watcher()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        assert watcher.look() == watcher.look() == watcher.look() == 2
        patched.setattr(Log, "of_source", full)
        assert watcher.look() == 2
    assert len(place.said) == 3 and sum("No space left" in line for line in place.said) == 2
    place.said.clear()
    watcher.run(threading.Event(), once=True)
    assert place.filed() == ["error/b.png", "good/a.png"] and len(place.said) == 3
    assert "1 image inspected (1 good" in place.said[-1] and "0 images inspected before, 1 file unr" in place.said[-1]
