import os
import time

import pytest

from unflaw.experiments.disk_cache import ABANDONED, DiskCache, DiskCacheFull
from unflaw.io.files import write_atomically


@pytest.fixture
def put(tmp_path):
    """`put(name, size, limit)` writes a file of that size to a shelf with that limit."""

    def write(name, size, limit=100):
        def fill(temporary):
            DiskCache(tmp_path, limit).reserve(temporary, size)
            with temporary.open("rb+") as file:
                file.write(b"x" * size)

        write_atomically(tmp_path / name, fill)

    return write


def there(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def aged(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_what_was_not_used_for_longest_makes_room(put, tmp_path):
    for age, name in enumerate("abc"):
        put(name, 30)
        aged(tmp_path / name, 30 - age)
    aged(tmp_path / "a", 0)  # is used again
    put("d", 30)
    assert there(tmp_path) == ["a", "c", "d"]
    put("e", 100)
    assert there(tmp_path) == ["e"]


def test_what_fits_deletes_nothing(put, tmp_path):
    for name in "abc":
        put(name, 30)
    put("d", 10)
    assert there(tmp_path) == ["a", "b", "c", "d"]
    put("e", 1000, None)
    assert there(tmp_path) == ["a", "b", "c", "d", "e"]


def test_one_larger_than_the_limit_is_refused_and_leaves_all(put, tmp_path):
    put("a", 60)
    with pytest.raises(DiskCacheFull, match="do not fit"):
        put("b", 101)
    assert there(tmp_path) == ["a"]


def test_what_others_write_counts_and_stays_unless_it_is_abandoned(put, tmp_path):
    other = tmp_path / ".other.tmp"
    other.touch()
    DiskCache(tmp_path, 100).reserve(other, 80)
    assert other.stat().st_size == 80
    with pytest.raises(DiskCacheFull, match="others are writing"):
        put("a", 30)
    aged(other, ABANDONED + 1)
    put("a", 30)
    assert there(tmp_path) == ["a"]


def test_an_open_file_can_still_be_read(put, tmp_path):
    put("a", 100)
    with (tmp_path / "a").open("rb") as file:
        put("b", 100)
        assert there(tmp_path) == ["b"] and len(file.read()) == 100
