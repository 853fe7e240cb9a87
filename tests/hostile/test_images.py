"""Hostile images: each is read or refused with a sentence, in little time and memory, and nothing else happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hostile.corpus import READ, cases

pytestmark = pytest.mark.slow

SECONDS, MEGABYTES = 10, 1000
# Reads files in a process of its own. Of each a line: seconds, megabytes that the peak grew by, and what came of it.
READER = """
import resource, sys, time, warnings
warnings.simplefilter("ignore")
from unflaw.errors import ImageError
from unflaw.imaging.reading import read
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
for path in sys.stdin.read().split("\\0"):
    before, start = peak(), time.process_time()
    try:
        found = "read %s %s" % (read(path).shape, read(path).dtype)
    except ImageError as error:
        found = "refused " + str(error)
    print(time.process_time() - start, peak() - before, found, sep="\\t", flush=True)
"""


def read_all(paths: list[Path]) -> dict[str, tuple[float, float, str]]:
    """Seconds, megabytes and outcome, by name of the file; a crash or a hang leaves them out."""
    names = "\0".join(map(str, paths))
    done = subprocess.run(
        [sys.executable, "-c", READER], input=names, capture_output=True, text=True, timeout=80, check=False
    )
    rows = [line.split("\t", 2) for line in done.stdout.splitlines()]
    assert len(rows) == len(paths), (paths[len(rows)], done.stderr[-2000:])
    return {path.name: (float(s), float(mb), found) for path, (s, mb, found) in zip(paths, rows, strict=True)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    paths = [folder / case.name for case in cases()]
    for path, case in zip(paths, cases(), strict=True):
        path.write_bytes(case.make())
    before = sorted(folder.iterdir())
    found = read_all(paths)
    assert sorted(folder.iterdir()) == before
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_hostile_image_is_read_or_refused_in_a_sentence(outcomes, case):
    seconds, megabytes, found = outcomes[case.name]
    assert seconds < SECONDS and megabytes < MEGABYTES, found
    if case.why == "?":  # bits were flipped: whatever came of it, it is an image or a refusal
        assert found.startswith(("read (", "refused "))
    elif case.why is READ:
        assert re.match(r"read \(\d+, \d+, 3\) (uint8|float32)$", found), found
    else:
        assert found.startswith("refused ") and case.why in found, found
    if found.startswith("refused "):
        assert found.count(f"/{case.name}: ") == 1 and ";" in found and "\n" not in found  # the file, and a remedy


def test_pipes_devices_folders_and_loops_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    with (tmp_path / "junk.png").open("wb") as file:
        file.truncate(2**31)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / ("n" * 251 + ".png")).write_bytes(b"x")
    (tmp_path / "below.png").write_bytes(b"x")
    too_long, below = tmp_path / ("n" * 300 + ".png"), tmp_path / "below.png/x.png"
    found = read_all([*sorted(tmp_path.iterdir()), too_long, below])
    why = {
        "pipe.png": "is a pipe or a device",
        "zero.png": "is a pipe or a device",
        "loop.png": "symbolic links",
        "folder.png": "is a folder",
        "sparse.png": "over the limit of 3,267,108,864",
        "junk.png": "not an image",
        "gone.png": "no such file",
        "n" * 251 + ".png": "not an image",
        too_long.name: "too long",
        below.name: "Not a directory",
        "below.png": "not an image",
    }
    assert found.keys() == why.keys()
    for name, (seconds, megabytes, text) in found.items():
        assert seconds < 1 and megabytes < 50 and why[name] in text and f"{name}: " in text, text


def test_a_folder_of_odd_names_is_listed_without_its_pipes_and_loops(tmp_path):
    from unflaw.io.listing import list_images

    names = ["ä.png", "\x1b[31m.png", "new\nline.png", "\udcff.png", "日本 語.PNG", "-rf.png", "'; rm.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "again").symlink_to(tmp_path)
    deep = tmp_path
    for _ in range(1100):  # deeper than Python may call itself
        deep /= "d"
        deep.mkdir()
    try:
        assert {path.name for path in list_images(tmp_path)} == set(names)
    finally:  # pytest's own clearing calls itself, too
        while deep != tmp_path:
            deep.rmdir()
            deep = deep.parent
