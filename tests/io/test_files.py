"""Files are whole or not there, whoever else writes them and whatever is left of earlier times."""

import errno
import os
import pickle
import platform
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unflaw.errors import InUseError, WriteError
from unflaw.experiments.records import Finished
from unflaw.experiments.records import Log as Runs
from unflaw.io import files
from unflaw.io.files import growing, holding, make_folder, scratch, write_atomically, write_png
from unflaw.station.log import Log


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".")]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "a.txt"
    write_atomically(file, lambda temporary: temporary.write_text("old"))

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError, match=r"a\.txt: cannot be written \(No space left on device\); make room there"):
        write_atomically(file, fail)
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    file, stray = tmp_path / "a.txt", tmp_path / ".a.txt.part"
    stray.write_text("half of something long")
    write_atomically(file, lambda temporary: temporary.write_text("new"))
    assert file.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_file_that_another_writes_is_left_to_it(tmp_path):
    file, inside, go = tmp_path / "a.txt", threading.Event(), threading.Event()

    def slowly(temporary: Path) -> None:
        temporary.write_text("slow")
        inside.set()
        assert go.wait(10)
        assert temporary.read_text() == "slow"

    thread = threading.Thread(target=write_atomically, args=(file, slowly))
    thread.start()
    assert inside.wait(10)
    write_atomically(file, lambda temporary: temporary.write_text("quick"))
    assert file.read_text() == "quick"
    go.set()
    thread.join()
    assert file.read_text() == "slow" and hidden(tmp_path) == []


def test_many_writers_of_one_file_leave_one_of_theirs(tmp_path):
    file, contents = tmp_path / "a.txt", [str(number) * 1000 for number in range(8)]

    def write(content: str) -> None:
        for _ in range(25):
            write_atomically(file, lambda temporary: temporary.write_text(content))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not file.exists() or file.read_text() in contents
    assert file.read_text() in contents and hidden(tmp_path) == []


def test_file_and_folder_are_flushed_around_the_renaming(tmp_path, monkeypatch):
    seen, flush = [], os.fsync

    def fsync(handle: int) -> None:
        seen.append((Path(f"/proc/self/fd/{handle}").readlink().name, (tmp_path / "a.txt").exists()))
        flush(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see what is flushed")
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "a.txt", lambda temporary: temporary.write_text("new"))
    assert seen == [(".a.txt.part", False), (tmp_path.name, True)]


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def rights(file: Path) -> int:
    return file.stat().st_mode & 0o7777


def write_both(folder: Path, name: str = "") -> tuple[Path, Path]:
    """Two files of this name, one written at once and one that grew."""
    folder.mkdir(exist_ok=True)
    whole, grown = folder / f"{name}a.txt", folder / f"{name}a.jsonl"
    write_atomically(whole, lambda temporary: temporary.write_text("new"))
    with growing(grown) as lines:
        lines.write("new\n")
    return whole, grown


@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
@pytest.mark.parametrize("value, expected", [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_new_files_have_the_rights_that_the_umask_leaves(tmp_path, value, expected):
    with umask(0o027):  # what killed processes have left under another umask counts for nothing
        for name in (".a.txt.part", "a.jsonl.part"):
            (tmp_path / name).write_text("half")
    with umask(value):
        assert [rights(file) for file in write_both(tmp_path)] == [expected] * 2
        with_png = tmp_path / "a.png"
        write_png(with_png, Image.new("L", (2, 2)))
        Log(f"sqlite:///{tmp_path / 'log.db'}").close()
        assert [rights(with_png), rights(tmp_path / "log.db")] == [expected] * 2
        inside, go = threading.Event(), threading.Event()  # two at once: one of them takes a random name
        slowly = threading.Thread(
            target=write_atomically, args=(tmp_path / "b.txt", lambda _: (inside.set(), go.wait(10)))
        )
        slowly.start()
        assert inside.wait(10)
        write_atomically(tmp_path / "b.txt", lambda temporary: temporary.write_text("new"))
        assert rights(tmp_path / "b.txt") == expected
        go.set()
        slowly.join()
        assert rights(tmp_path / "b.txt") == expected


@pytest.mark.skipif(os.name != "posix", reason="rights as POSIX has them")
@pytest.mark.parametrize("before", [0o600, 0o664, 0o640])
def test_a_file_that_is_replaced_keeps_its_rights_also_while_it_is_written(tmp_path, before):
    for file in write_both(tmp_path):
        file.chmod(before)
    with umask(0o022):
        assert [rights(file) for file in write_both(tmp_path)] == [before] * 2
        seen: list[int] = []
        write_atomically(tmp_path / "a.txt", lambda temporary: seen.append(rights(temporary)))
        with growing(tmp_path / "a.jsonl"):
            seen.append(rights(tmp_path / "a.jsonl.part"))
        assert seen == [before] * 2

        def replace(temporary: Path) -> None:  # as some libraries write
            temporary.with_name("other").write_text("new")
            temporary.with_name("other").replace(temporary)

        write_atomically(tmp_path / "a.txt", replace)
        assert rights(tmp_path / "a.txt") == before


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give files away")
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path):
    for file in write_both(tmp_path):
        os.chown(file, 1234, 5678)
        file.chmod(0o600)
    found = [file.stat() for file in write_both(tmp_path)]
    assert [(status.st_uid, status.st_gid, status.st_mode & 0o777) for status in found] == [(1234, 5678, 0o600)] * 2


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_points_to_is_written(tmp_path, there):
    real, links = tmp_path / "real", tmp_path / "links"
    real.mkdir(), links.mkdir()
    for name in ("a.txt", "a.jsonl"):
        (links / f"via-{name}").symlink_to(f"../real/{name}")
        (links / name).symlink_to(f"via-{name}")
        if there:
            (real / name).write_text("old")
    write_both(links)
    assert (real / "a.txt").read_text() == "new" and (real / "a.jsonl").read_text() == "new\n"
    assert all(link.is_symlink() for link in links.iterdir()) and len(names(links)) == 4
    assert names(real) == ["a.jsonl", "a.txt"]


def test_a_link_to_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere/b.txt")
    with pytest.raises(WriteError, match=r"a\.txt: cannot be written \(No such file or directory\)"):
        write_atomically(tmp_path / "a.txt", lambda temporary: temporary.write_text("new"))
    assert names(tmp_path) == ["a.txt"]


def test_the_longest_names_have_room_for_a_temporary_one(tmp_path):
    file = tmp_path / ("ä" * 125 + ".json")  # 255 bytes
    write_atomically(file, lambda temporary: temporary.write_text("new"))
    assert file.read_text() == "new" and hidden(tmp_path) == []


def test_a_device_is_written_as_it_is():
    write_atomically(Path(os.devnull), lambda file: file.write_text("gone"))
    assert not Path(os.devnull).is_file()


def test_an_error_of_another_file_is_not_said_to_be_of_this_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        write_atomically(tmp_path / "a.txt", lambda _: Path("elsewhere/b.txt").read_bytes())
    assert names(tmp_path) == []


def test_lines_grow_under_another_name_until_they_are_whole(tmp_path):
    file, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    with growing(file) as lines:
        lines.write("old\n")
    with pytest.raises(KeyboardInterrupt), growing(file) as lines:
        lines.write("one\n")
        lines.flush()
        assert partial.read_text() == "one\n"
        raise KeyboardInterrupt
    assert file.read_text() == "old\n" and partial.read_text() == "one\n"
    with growing(file, [lambda whole: whole.write_text(whole.read_text().upper())]) as lines:
        lines.write("two\n")
    assert file.read_text() == "TWO\n" and names(tmp_path) == ["a.jsonl"]


# One at a time


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_another_process_holds_is_refused_and_it_is_named(tmp_path, holder, kind):
    path = named = tmp_path / "out"
    if kind != "file":
        path.mkdir()
    if kind == "link":
        named = tmp_path / "link"
        named.symlink_to(path)
    before, other = datetime.now().astimezone().replace(microsecond=0), holder(path)
    with pytest.raises(InUseError) as refused, holding(named):
        pytest.fail("two hold it")
    found = re.fullmatch(
        rf"{named}: cannot be written \(in use by process (\d+) on (\S+), since (.+)\); "
        "wait until it has ended, or name another output",
        str(refused.value),
    )
    assert found and int(found[1]) == other.pid and found[2] == platform.node()
    assert before <= datetime.fromisoformat(found[3]) <= datetime.now().astimezone()
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    other.communicate("")  # it ends
    with holding(named):
        pass
    assert hidden(tmp_path) == [] and (kind == "file" or names(path) == [])  # no lock is left


def test_a_killed_process_holds_nothing(tmp_path, holder):
    for _ in range(2):
        other = holder(tmp_path / "a.jsonl")
        other.kill()
        other.wait()
        assert hidden(tmp_path) == [".a.jsonl.lock"]
        (tmp_path / ".a.jsonl.lock").chmod(0o400)
    with growing(tmp_path / "a.jsonl") as lines:
        lines.write("whole\n")
    assert names(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("system", ["posix", "without fcntl"])
def test_of_two_threads_one_writes(tmp_path, monkeypatch, system):
    if system != "posix":
        monkeypatch.setattr(files, "fcntl", None)
    file, inside, go = tmp_path / "a.jsonl", threading.Event(), threading.Event()

    def slowly() -> None:
        with growing(file) as lines:
            lines.write("one\n")
            inside.set()
            assert go.wait(10)
            lines.write("two\n")

    thread = threading.Thread(target=slowly)
    thread.start()
    assert inside.wait(10)
    who = f"process {os.getpid()} on " if system == "posix" else "another process"
    with pytest.raises(InUseError, match=f"a.jsonl: cannot be written .in use by {who}"), growing(file):
        pytest.fail("two write it")
    go.set()
    thread.join()
    assert file.read_text() == "one\ntwo\n"
    with growing(file) as lines:
        lines.write("three\n")
    assert file.read_text() == "three\n" and names(tmp_path) == ["a.jsonl"]


def test_many_threads_that_hold_and_let_go_are_never_two(tmp_path):
    inside, most, refused = [0], [0], [0]

    def work() -> None:
        for _ in range(50):
            try:
                with holding(tmp_path / "a"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except InUseError:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and refused[0] < 8 * 50 and names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_a_lock_that_is_given_back_while_it_is_asked_for_is_asked_for_again(tmp_path, monkeypatch):
    lock, really = tmp_path / ".a.lock", files.fcntl.flock
    lock.touch()

    def flock(handle: int, how: int) -> None:
        monkeypatch.undo()
        lock.unlink()  # by the one that had it
        really(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with holding(tmp_path / "a"), pytest.raises(InUseError), holding(tmp_path / "a"):
        pytest.fail("two hold it")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_where_a_disk_knows_no_locks_each_writes_under_a_name_of_its_own(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with holding(tmp_path) as held:
        assert held is False and names(tmp_path) == []
    file = tmp_path / "a.jsonl"
    with growing(file) as one, growing(file) as two:
        for lines, word in ((one, "one"), (two, "two"), (one, "one")):
            lines.write(f"{word}\n")
            lines.flush()
        assert len(names(tmp_path)) == 2
    assert file.read_text() == "one\none\n" and names(tmp_path) == ["a.jsonl"]  # the one that ended last


def test_a_lock_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(WriteError, match=r"nowhere/a: cannot be written \(No such"), holding(tmp_path / "nowhere/a"):
        pass


def test_a_log_is_added_to_by_one_process(tmp_path, holder):
    file = tmp_path / "runs.jsonl"
    with Runs(file, Finished) as runs:
        runs.append(Finished(digest="a"))
    other = holder(file)
    with pytest.raises(InUseError, match=f"runs.jsonl: cannot be written .in use by process {other.pid} "):
        Runs(file, Finished)
    other.kill()
    other.wait()
    runs, more = Runs(file, Finished), Runs(file, Finished)
    with more:
        more.append(Finished(digest="b"))
        with pytest.raises(InUseError), runs:
            pytest.fail("two add to it")
    with runs:  # knows what was added meanwhile
        assert list(runs.records) == ["a", "b"]
    assert names(tmp_path) == ["runs.jsonl"]


def test_a_folder_in_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match=r"file/in: cannot be written \(Not a directory\); check the path"):
        make_folder(tmp_path / "file/in")


def test_scratch_where_the_system_cannot_reserve_space(monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with scratch(10_000, "") as file:
        assert file.write(bytes(10_000)) == 10_000


def test_scratch_has_room_and_no_name():
    with scratch(10_000, "") as file:
        status = os.fstat(file.fileno())
        assert status.st_size == 10_000 and status.st_nlink == 0
    with pytest.raises(WriteError, match="another disk"):
        scratch(2**60, "take another disk")


def test_the_error_goes_to_other_processes_whole():
    error = WriteError(Path("a.txt"), OSError(errno.EROFS, os.strerror(errno.EROFS)))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and (again.errno, again.strerror) == (errno.EROFS, "Read-only file system")
    assert (
        str(error) == "a.txt: cannot be written (Read-only file system); change its permissions, or name another folder"
    )
    assert WriteError(Path("a"), RuntimeError("Os { code: 28, kind: StorageFull }")).errno == errno.ENOSPC


@pytest.mark.parametrize(("mask", "rights"), [(0o077, 0o600), (0o002, 0o664)])
def test_a_library_that_replaces_the_file_does_not_decide_its_rights(tmp_path, mask, rights):
    """As safetensors does, which makes a file of its own that only its owner may read."""
    from safetensors.numpy import save_file

    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "new.safetensors", lambda file: save_file({"a": np.zeros(3)}, file))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.safetensors").stat().st_mode) == rights
    (tmp_path / "new.safetensors").chmod(0o640)
    write_atomically(tmp_path / "new.safetensors", lambda file: save_file({"a": np.ones(3)}, file))
    assert stat.S_IMODE((tmp_path / "new.safetensors").stat().st_mode) == 0o640
