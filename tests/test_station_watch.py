"""Watching a folder: complete files only, once each, filed by verdict."""

import errno
import shutil
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from unflaw.errors import DetectorError
from unflaw.images import ImageError
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
        log = Log(f"sqlite:///{tmp_path / 'log.db'}", tmp_path / "pictures")

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
    """A picture that the detector calls good."""
    pictures = [path.read_bytes() for path in sorted((parts / "train/good").iterdir())]
    return next(data for data in pictures if served.inspect(data, name="")[0].verdict == "good")


@pytest.fixture(scope="module")
def bad(parts) -> bytes:
    return (parts / "test/square/000.png").read_bytes()


def test_pictures_move_to_the_folder_of_their_verdict(place, good, bad):
    (place.folder / "line 1").mkdir()
    (place.folder / "line 1/a.png").write_bytes(good)
    (place.folder / "b.PNG").write_bytes(bad)
    (place.folder / "notes.txt").write_text("no picture")
    (place.folder / ".hidden.png").write_bytes(good)
    assert place.watcher().look() == 0
    assert place.filed() == ["defect/b.PNG", "good/line 1/a.png"]
    assert sorted(path.name for path in place.folder.rglob("*") if path.is_file()) == [".hidden.png", "notes.txt"]
    assert place.logged() == ["b.PNG", "line 1/a.png"]
    (entry,) = place.log.find(Filter(verdict="defect"))
    assert entry.source == str(place.folder / "b.PNG") and entry.digest == sha256(bad)
    assert place.log.picture(entry.digest).read_bytes() == bad
    assert any(line.startswith("b.PNG: defect, score") for line in place.said)


def test_copies_stay_and_are_inspected_once_also_after_a_restart(place, good, bad):
    (place.folder / "a.png").write_bytes(good)
    watcher = place.watcher(copy=True)
    watcher.look(), watcher.look()
    place.watcher(copy=True).look()
    assert place.filed() == ["good/a.png"] and place.logged() == ["a.png"] and (place.folder / "a.png").exists()
    (place.folder / "a.png").write_bytes(bad)  # another picture under the same name
    place.watcher(copy=True).look()
    assert place.filed() == ["defect/a.png", "good/a.png"] and place.logged() == ["a.png", "a.png"]


def test_a_name_that_is_taken_gets_the_content_added(place, good, parts):
    (place.out / "good").mkdir(parents=True)
    (place.out / "good/a.png").write_bytes(b"of yesterday")
    (place.folder / "a.png").write_bytes(good)
    place.watcher().look()
    assert place.filed() == [f"good/a-{sha256(good)[:16]}.png", "good/a.png"]
    assert (place.out / "good/a.png").read_bytes() == b"of yesterday"


def test_the_same_picture_dropped_again_is_only_filed(place, good):
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


def test_a_picture_that_is_replaced_while_it_is_inspected_is_not_filed_for_the_old_one(place, good, bad, monkeypatch):
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


def test_the_sorted_pictures_may_lie_within(place, good):
    place.out = place.folder / "sorted"
    (place.folder / "a.png").write_bytes(good)
    watcher = place.watcher()
    watcher.look(), watcher.look()
    assert place.filed() == ["good/a.png"] and place.logged() == ["a.png"]


def test_the_sorted_pictures_are_known_by_whatever_way_they_are_reached(place, good, tmp_path):
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
    watcher = place.watcher(report=lambda _: stop.set())  # told so while the first is inspected
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
def test_sorted_pictures_do_not_go_where_nothing_would_be_inspected(place, tmp_path, out):
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
