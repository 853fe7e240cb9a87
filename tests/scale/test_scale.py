"""Reading inputs, planning, and writing partitions, without Ray, which only runs them (test_on_ray.py)."""

import io
import json
import os
import platform
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import dataset
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.errors import ImageError
from unflaw.io.listing import list_images
from unflaw.postprocessing.results import Result
from unflaw.scale import partitions, plan, store, worker
from unflaw.scale.sources import Columns, Item, images, list_items
from unflaw.scale.store import OWN, Store, StoreError
from unflaw.scale.worker import Worker


@pytest.fixture(scope="module")
def test_images(parts) -> dict[str, bytes]:
    """Bytes of eight images by file name."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(parts.glob("test/*/*.png"))}


@pytest.fixture
def memory():
    """URL of an empty folder in memory."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return "memory:///bucket"


def tar_of(path, images, mode="w", extra=()):
    with tarfile.open(path, mode) as file:
        for name, data in [*images.items(), *extra]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def read_all(inputs, column=None):
    """Return (name, source, number, bytes or error) of every image of the inputs."""
    found = []
    for item in list_items([str(given) for given in inputs], column):
        for image in images(item, column):
            data = image.data
            if not isinstance(data, bytes | ImageError):
                try:
                    data = data.read()
                except (OSError, ImageError) as error:
                    data = error
            found.append((image.name, image.source, image.number, data))
    return found


# Sources


def test_a_folder_is_its_images_as_plain_predict_names_them(parts, test_images, tmp_path, monkeypatch):
    monkeypatch.chdir(parts)
    found = read_all(["test"])
    assert {name: data for name, _, _, data in found} == {f"test/{n}": data for n, data in test_images.items()}
    assert all(source == name and number == 0 for name, source, number, _ in found)
    assert [name for name, *_ in read_all([parts / "test"])] == [str(parts / "test" / name) for name in test_images]
    (tmp_path / "deep/.hidden").mkdir(parents=True)
    for name in ("deep/b.PNG", "deep/.c.png", "deep/.hidden/d.png", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deep/loop").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert [name for name, *_ in read_all(["."])] == ["a.jpg", "deep/b.PNG", "link.png"]
    found = read_all(["deep/*.PNG", "a.jpg", "deep", "./a.jpg"])  # each file is listed once
    assert [name for name, *_ in found] == ["deep/b.PNG", "a.jpg", "deep/loop/link.png"]


def test_links_to_folders_are_followed_as_plain_predict_does(tmp_path, monkeypatch):
    for name in ("in/m/1.png", "in/m/n/2.png", "other/3.png", "in/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "in/a").symlink_to(tmp_path / "in/m")
    (tmp_path / "in/b").symlink_to(tmp_path / "other")
    (tmp_path / "other/up").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    names = [name for name, *_ in read_all(["in"])]
    assert names == ["in/m/1.png", "in/m/n/2.png", "in/z.png", "in/b/3.png"]
    assert sorted(names) == [str(path) for path in list_images("in")]


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_system_folders_are_passed_over_and_counted(tmp_path, memory, where):
    fs, root = fsspec.filesystem("memory"), "/bucket/in"
    if where == "disk":
        fs, root = fsspec.filesystem("file"), str(tmp_path / "in")
    url = tmp_path / "in" if where == "disk" else f"{memory}/in"
    there = ["a.png", "b/c.png"]
    for name in (*there, "@eaDir/a.png/t.jpg", "b/#recycle/d.png", "b/._c.png", "b/Thumbs.db", ".x/notes.txt"):
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", b"x")
    notes: list[str] = []
    assert [item.name for item in list_items([str(url)], notes=notes)] == [f"{url}/{name}" for name in there]
    assert notes == [
        f"Hidden files and folders of the system are passed over, 3 files in all: {url}/@eaDir (1), {url}/b (1), "
        f"{url}/b/#recycle (1)."
    ]
    notes.clear()
    assert len(list(list_items([f"{url}/**/*.png", f"{url}/a.png"], notes=notes))) == 2 and "2 files in all" in notes[0]
    assert (
        len(list(list_items([f"{url}/b/#recycle", f"{url}/@*/*/*.jpg", f"{url}/b/._*.png"]))) == 3
    )  # named explicitly
    with pytest.raises(ValueError, match=r"no images, .* passed over, 1 file in all"):
        list(list_items([f"{url}/*/*/t.jpg"]))


def test_images_by_url(memory, test_images):
    fs = fsspec.filesystem("memory")
    for name, data in test_images.items():
        fs.pipe_file(f"/bucket/in/{name}", data)
    found = read_all([f"{memory}/in"])
    assert {name: data for name, _, _, data in found} == {f"{memory}/in/{n}": d for n, d in test_images.items()}
    assert len(read_all([f"{memory}/in/square/*.png"])) == 4


def test_a_table_of_bytes(tmp_path, test_images):
    names, data = list(test_images), list(test_images.values())
    pq.write_table(pa.table({"id": names, "image": data, "label": [1] * 8}), tmp_path / "t.parquet", row_group_size=3)
    items = list(list_items([str(tmp_path)]))
    assert [(item.kind, item.start, item.stop) for item in items] == [("rows", 0, 3), ("rows", 3, 6), ("rows", 6, 8)]
    source = str(tmp_path / "t.parquet")
    expected = [(name, source, i, test_images[name]) for i, name in enumerate(names)]
    assert read_all([tmp_path]) == read_all([tmp_path / "*.parquet"]) == expected
    part = items[0]._replace(start=2, stop=7)  # across row groups
    assert [found.number for found in images(part)] == [2, 3, 4, 5, 6]


def test_a_table_as_datasets_write_it_and_holes_in_it(tmp_path, test_images, parts):
    first = next(iter(test_images.values()))
    path = str(parts / "test/good/000.png")
    rows = [{"bytes": first, "path": "a.png"}, {"bytes": None, "path": path}, None, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": rows, "text": ["x"] * 4}), tmp_path / "t.parquet")
    found = read_all([tmp_path])
    assert [name for name, *_ in found][:2] == ["a.png", path] and found[1][3] == first
    assert [number for *_, number, _ in found] == [0, 1, 2, 3]
    assert all("holds no image" in str(data) for *_, data in found[2:])


def test_a_table_of_paths_beside_it_and_elsewhere(tmp_path, test_images, parts):
    (tmp_path / "images").mkdir()
    data = next(iter(test_images.values()))
    (tmp_path / "images/a.png").write_bytes(data)
    paths = ["images/a.png", str(parts / "test/good/001.png"), "images/none.png"]
    pq.write_table(pa.table({"path": paths, "note": ["", "", ""]}), tmp_path / "t.parquet")
    found = read_all([tmp_path / "t.parquet"])
    assert [name for name, *_ in found] == paths and found[0][3] == data and isinstance(found[1][3], bytes)
    assert isinstance(found[2][3], FileNotFoundError)
    asked = ["zip://a.png::s3://b/c.zip", "reference://x", "file:///etc/hostname", "github://a:b@c/d.png"]
    pq.write_table(pa.table({"path": asked}), tmp_path / "u.parquet")
    assert all("tables name files, or URLs of s3" in str(data) for *_, data in read_all([tmp_path / "u.parquet"]))


@pytest.mark.parametrize(
    "columns, wanted, expected",
    [
        ({"a": pa.binary(), "b": pa.binary()}, None, "not clear which column holds the images; there are a, b"),
        ({"a": pa.binary(), "b": pa.binary()}, "b", "b"),
        ({"a": pa.binary(), "image": pa.large_binary()}, None, "image"),
        ({"n": pa.int64()}, None, "not clear"),
        ({"n": pa.int64()}, "n", "n is no column of bytes or paths"),
        ({"path": pa.string(), "n": pa.int64()}, None, "path"),
        ({"path": pa.string(), "x": pa.binary()}, None, "x"),
        ({"where": pa.large_string()}, "where", "where"),
    ],
)
def test_the_column_of_images(tmp_path, columns, wanted, expected):
    schema = pa.schema(list(columns.items()))
    pq.write_table(schema.empty_table(), tmp_path / "t.parquet")
    with pq.ParquetFile(tmp_path / "t.parquet") as table:
        if expected in columns:
            assert Columns.of(table, "t", wanted).image == expected
        else:
            with pytest.raises(ValueError, match=expected):
                Columns.of(table, "t", wanted)


@pytest.mark.parametrize("suffix, mode", [(".tar", "w"), (".tar.gz", "w:gz")])
def test_shards(tmp_path, test_images, suffix, mode):
    extra = [("0.json", b"{}"), ("0.mask.png", b"m"), (".hidden.png", b"h")]
    path = tar_of(tmp_path / f"s-000{suffix}", test_images, mode, extra)
    items = list(list_items([str(tmp_path)]))
    assert [(item.kind, item.images) for item in items] == [("shard", None)]
    expected = [(name, str(path), i, data) for i, (name, data) in enumerate(test_images.items())]
    assert read_all([tmp_path])[:8] == expected and read_all([path], "png") == expected
    assert [data for *_, data in read_all([path], "mask.png")] == [b"m"]


def test_a_truncated_shard_gives_its_whole_members_and_an_error(tmp_path, test_images):
    path = tar_of(tmp_path / "s.tar", test_images)
    path.write_bytes(path.read_bytes()[: 3 * path.stat().st_size // 5])
    *whole, last = read_all([path])
    assert 2 <= len(whole) < 8 and [data for *_, data in whole] == list(test_images.values())[: len(whole)]
    assert f"cannot be read beyond {len(whole)} images" in str(last[3]) and last[2] == len(whole)


def test_a_damaged_table_gives_an_error_for_every_row(tmp_path, test_images):
    path = tmp_path / "t.parquet"
    data = [os.urandom(4000) for _ in range(6)]
    pq.write_table(pa.table({"image": data}), path, row_group_size=3, compression="zstd")
    items = list(list_items([str(path)]))
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 200)
    found = [image for item in items for image in images(item)]
    assert [image.number for image in found] == list(range(6))
    assert [image.data for image in found[:3]] == data[:3]
    assert all("write the table again" in str(image.data) for image in found[3:])


def test_inputs_that_cannot_be_listed_raise(tmp_path, memory):
    (tmp_path / "both").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "both/a.png").write_bytes(b"x")
    (tmp_path / "both/b.tar").write_bytes(b"x")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but not really PAR1")
    for given, message in (
        ("both", "holds images and tar shards; name those that are meant"),
        ("empty", "there are no images"),
        ("none", "no such file or folder"),
        ("none/*.png", "there are no images"),
        ("no.parquet", "not a readable Parquet file"),
    ):
        with pytest.raises(ValueError, match=message):
            list(list_items([str(tmp_path / given)]))
    with pytest.raises(StoreError, match="not a URL that fsspec knows"):
        list(list_items(["nothing://bucket"]))


# The store


@pytest.fixture(params=["disk", "file URL", "memory", "renaming"])
def url(request, tmp_path, memory, monkeypatch):
    if request.param == "renaming":  # a server, such as FTP, without atomic uploads
        monkeypatch.setattr(store, "_ATOMIC_UPLOAD", set())
    if request.param in ("memory", "renaming"):
        return f"{memory}/out"
    return str(tmp_path / "out") if request.param == "disk" else (tmp_path / "out").as_uri()


def test_a_store_reads_what_it_wrote_and_sweeps(url):
    made = Store(url)
    assert made.names() == set() == made.names(OWN)
    with pytest.raises(FileNotFoundError):
        made.read("a.parquet")
    for data in (b"first", b"second"):
        made.write("a.parquet", data)
        made.write(f"{OWN}/plan.json", data)
        assert made.read("a.parquet") == data
    assert made.names() == {"a.parquet"} and made.names(OWN) == {"plan.json"}
    made.fs.pipe_file(made.path(".part-00000.parquet.x1"), b"half")
    made.sweep()
    made.remove(f"{OWN}/plan.json")
    made.remove("none")
    assert made.names() == {"a.parquet"} and made.names(OWN) == set()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    made = Store(str(tmp_path))
    made.write("a.parquet", b"good")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        made.write("a.parquet", b"other")
    assert made.read("a.parquet") == b"good" and made.names() == {"a.parquet"}


def test_one_run_at_a_time(url, monkeypatch):
    monkeypatch.setattr(store, "BEAT", 0.05)
    with Store(url).lock(), pytest.raises(StoreError, match="another run writes there"), Store(url).lock():
        pass
    with Store(url).lock():  # the lock was released
        pass
    if "memory" in url:
        Store(url).write(f"{OWN}/lock.json", b"left by a killed run")
        with Store(url).lock():
            pass


def test_the_message_names_the_run_that_holds_the_lock(url, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BEAT", 0.05)
    code = "import sys; from unflaw.scale.store import Store\n"
    code += "with Store(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    message = rf"another run writes there \(in use by process (\d+) on {platform.node()}, since 20.*\); wait until"
    if "memory" in url:
        with Store(url).lock(), pytest.raises(StoreError, match=message) as refused, Store(url).lock():
            pass
        assert f"process {os.getpid()} on" in str(refused.value)
        return
    command = [sys.executable, "-c", code, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=message) as refused, Store(url).lock():
            pass
        assert f"process {other.pid} on" in str(refused.value)
        other.kill()
        other.wait()
    with Store(url).lock():  # the lock ended with its process
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(StoreError, match="is a file"):
        Store(str(tmp_path / "out"))


# The plan


def item(name, images=1, kind="image"):
    return Item(kind, f"/{name}", name, 0, images, 10, "v")


def test_partitions_are_cut_and_filled():
    rows = item("t", 10, "rows")
    found = list(plan.partitioned([item("a"), item("b"), rows, item("c"), item("s", 1, "shard"), item("d")], 4))
    assert [[(i.name, i.start, i.stop) for i in items] for items in found] == [
        [("a", 0, 1), ("b", 0, 1)],
        [("t", 0, 4)],
        [("t", 4, 8)],
        [("t", 8, 10), ("c", 0, 1)],
        [("s", 0, 1)],
        [("d", 0, 1)],
    ]


def test_a_plan_is_kept_and_other_ones_are_refused(url, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 2)
    made, images = Store(url), tmp_path / "in"
    images.mkdir()
    for i in range(7):
        (images / f"{i}.png").write_bytes(b"x")
    odd = os.fsdecode(b"\xff7.png")
    (images / odd).write_bytes(b"x")
    inputs = [str(images)]
    first = plan.prepare(made, inputs, "digest", size=3)
    (images / "@eaDir").mkdir()
    (images / "@eaDir/0.png").write_bytes(b"x")
    notes: list[str] = []
    assert plan.prepare(made, inputs, "digest", size=3, notes=notes) == first and "1 file in all" in notes[0]
    assert (first.images, first.partitions) == (8, 3) and plan.prepare(made, inputs, "digest", size=3) == first
    names = [item.name for i in range(3) for item in plan.items_of(made, i)]
    assert names == [str(images / name) for name in [*(f"{i}.png" for i in range(7)), odd]]
    for changes, message in (
        ({"size": 4}, r"another --partition \(3, now 4\)"),
        ({"category": "screw"}, r"another --category \(None, now screw\)"),
        ({"column": "png"}, "another --column"),
        ({"detector": "other"}, "another detector"),
    ):
        with pytest.raises(StoreError, match=message):
            plan.prepare(made, inputs, **({"detector": "digest", "size": 3} | changes))
    (images / "3.png").write_bytes(b"other")
    with pytest.raises(StoreError, match="files have changed"):
        plan.prepare(made, inputs, "digest", size=3)
    repaired = plan.prepare(made, inputs, "digest", size=3, retry=True)
    assert repaired == plan.prepare(made, inputs, "digest", size=3) != first
    (images / "more.png").write_bytes(b"x")
    with pytest.raises(StoreError, match="images were added, removed or renamed"):
        plan.prepare(made, inputs, "digest", size=3, retry=True)
    made.write(plan.PLAN, b'{"format": 99}')
    with pytest.raises(StoreError, match="not a plan of this version"):
        plan.prepare(made, inputs, "digest", size=3)
    made.remove(plan.PLAN)
    made.write("other.parquet", b"x")
    with pytest.raises(StoreError, match="Parquet files of another origin"):
        plan.prepare(made, inputs, "digest", size=3)


# The worker


@pytest.fixture
def inputs(parts, tmp_path):
    """Folder of eight images and two files that cannot be read."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, path in enumerate(sorted(parts.glob("test/*/*.png"))):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    (folder / "2x.png").write_bytes(b"no image")
    (folder / "9.png").write_bytes(b"")
    return folder


def start_run(saved, inputs, url, size=4, retry=False):
    files = plan.detector_files(saved)
    made = Store(str(url))
    planned = plan.prepare(made, [str(inputs)], plan.detector_digest(files), size=size)
    return made, planned, Worker(made, planned, files, retry=retry)


def rows_of(made):
    return [row for number in partitions.finished(made) for row in partitions.read(made, number)]


def same_as_plain(rows, saved, inputs, out):
    """Compare rows with the results of plain `predict` for the same images."""
    CliRunner().invoke(app, ["predict", str(saved), str(inputs), "--out", str(out)])
    lines = {line["path"]: line for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert Counter(row["name"] for row in rows) == Counter(lines.keys())
    for row in rows:
        line = lines[row["name"]]
        assert (row["status"], row["error"]) == (("failed", line["error"]) if "error" in line else ("ok", None))
        for name in ("score", "p_value", "drift"):
            assert row[name] == (pytest.approx(line[name], rel=1e-5) if name in line else None)
        assert row["verdict"] == line.get("verdict")
        assert [tuple(region["box"]) for region in row["regions"] or []] == [
            tuple(region["box"]) for region in line.get("regions", [])
        ]


def test_rows_equal_the_results_of_plain_predict(saved, inputs, tmp_path):
    made, planned, runner = start_run(saved, inputs, tmp_path / "out")
    done = [runner.process(number) for number in range(planned.partitions)]
    assert all(one.error is None for one in done) and sum((one.counts for one in done), Counter())["failed"] == 2
    rows = rows_of(made)
    same_as_plain(rows, saved, inputs, tmp_path / "plain")
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert {row["detector"] for row in rows} == {planned.detector}
    assert any(row["regions"] and row["regions"][0]["uncertainty"] is not None for row in rows)
    assert partitions.finished(made) == {i: one.counts for i, one in enumerate(done)}
    table = dataset.dataset(str(tmp_path / "out"), format="parquet").to_table()  # other readers see one table
    assert table.num_rows == 10 and table.schema.names == partitions.schema().names
    assert made.names(OWN) == {"items-00000.parquet", "plan.json"}


def test_only_failed_images_are_inspected_again(saved, inputs, tmp_path):
    made, planned, runner = start_run(saved, inputs, tmp_path / "out")
    for number in range(planned.partitions):
        runner.process(number)
    before = {name: made.read(name) for name in made.names()}
    assert runner.process(0).counts["failed"] == 1 and made.read("part-00000.parquet") == before["part-00000.parquet"]
    made.remove("part-00001.parquet")
    assert runner.process(1).error is None and pq.read_table(io.BytesIO(made.read("part-00001.parquet"))).equals(
        pq.read_table(io.BytesIO(before["part-00001.parquet"]))
    )

    (inputs / "2x.png").write_bytes((inputs / "2.png").read_bytes())  # repaired
    runner.retry, asked = True, []
    inspect = runner.detector.inspect_named

    def watched(named, **options):
        return inspect((asked.append(name) or (name, data) for name, data in named), **options)

    runner.detector.inspect_named = watched
    assert [runner.process(number).counts["failed"] for number in range(3)] == [0, 0, 1]
    assert sorted(Path(name).name for name in asked) == ["2x.png", "9.png"]
    scores = {Path(row["name"]).name: row["score"] for row in rows_of(made)}
    assert len(scores) == 10 and scores["2x.png"] == runner.detector.inspect(inputs / "2.png").score  # alone as well


class Killed(BaseException):
    """Stands for the death of a process: no code handles it."""


def fail_at(runner, name, error):
    """Make a worker raise an error at the image of this name."""
    inspect = runner.detector.inspect_named

    def checked(named):
        for image, data in named:
            if Path(image).name == name:
                raise error
            yield image, data

    runner.detector.inspect_named = lambda named, **options: inspect(checked(named), **options)
    return runner


def test_an_image_that_kills_workers_is_recorded_as_failed(saved, inputs, tmp_path):
    made, planned, _ = start_run(saved, inputs, tmp_path / "out", size=10)
    deaths = 0
    for _ in range(10):
        runner = fail_at(start_run(saved, inputs, tmp_path / "out", size=10)[2], "5.png", Killed())
        try:
            done = runner.process(0)
            break
        except Killed:
            deaths += 1
            assert made.names() == set()
    assert (
        deaths == 3 and done.error is None and planned.partitions == 1
    )  # once in a batch, twice when inspected singly
    rows = {Path(row["name"]).name: row for row in rows_of(made)}
    assert len(rows) == 10 and "the worker that inspected it died" in rows["5.png"]["error"]
    assert sum(row["status"] == "failed" for row in rows.values()) == 3 and f"doing-{0:05d}.json" not in made.names(OWN)


def test_a_partition_that_never_begins_is_given_up(saved, inputs, tmp_path, monkeypatch):
    def dies(store, partition):
        raise Killed

    made, _, runner = start_run(saved, inputs, tmp_path / "out", size=10)
    with monkeypatch.context() as patched:
        patched.setattr(worker, "items_of", dies)
        for _ in range(worker.MAX_STARTS):
            with pytest.raises(Killed):
                runner.process(0)
        assert "died 5 times before the first image" in runner.process(0).error
    assert runner.process(0).error is None and len(rows_of(made)) == 10  # the next run tries again


def test_an_unforeseen_error_costs_one_image(saved, inputs, tmp_path):
    made, _, runner = start_run(saved, inputs, tmp_path / "out", size=10)
    assert fail_at(runner, "5.png", MemoryError("no more")).process(0).error is None
    rows = {Path(row["name"]).name: row for row in rows_of(made)}
    assert len(rows) == 10 and "could not be inspected (MemoryError: no more)" in rows["5.png"]["error"]
    assert rows["6.png"]["status"] == "ok"


def test_an_error_of_the_whole_partition_is_returned(saved, inputs, tmp_path, monkeypatch):
    made, _, runner = start_run(saved, inputs, tmp_path / "out")
    monkeypatch.setattr(made, "write", lambda name, data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in runner.process(0).error and made.names() == set()


def test_images_of_tables_and_shards_are_inspected_and_broken_ones_recorded(saved, test_images, tmp_path):
    broken = {"bad.png": b"\x89PNG broken"}
    tar_of(tmp_path / "s.tar", test_images | broken)
    table = pa.table({"name": [*test_images, "bad.png"], "data": [*test_images.values(), *broken.values()]})
    pq.write_table(table, tmp_path / "t.parquet")
    scores = []
    for given in ("s.tar", "t.parquet"):
        made, planned, runner = start_run(saved, tmp_path / given, tmp_path / f"out-{given}", size=5)
        assert planned.partitions == (1 if given == "s.tar" else 2)
        assert all(runner.process(number).error is None for number in range(planned.partitions))
        rows = rows_of(made)
        assert [row["number"] for row in rows] == list(range(9)) and rows[8]["error"].startswith("bad.png: is damaged")
        assert [row["name"] for row in rows] == [*test_images, "bad.png"]
        scores.append([row["score"] for row in rows[:8]])
    assert np.allclose(*scores, rtol=1e-5)


# Bytes with names, as the worker uses them


def test_bytes_with_a_name_are_inspected_like_files(detector, parts):
    paths = sorted(parts.glob("test/*/*.png"))
    named = [(f"n{i}", path.read_bytes() if i % 2 else path) for i, path in enumerate(paths)]
    named[1:1] = [("broken", b"x"), ("gone", ImageError("gone: was never there")), ("none", Path("none.png"))]
    found = list(detector.inspect_named(named))
    failed = [outcome for outcome in found if isinstance(outcome, ImageError)]
    assert [str(error).partition(":")[0] for error in failed] == ["broken", "gone", "none"]
    plain = list(detector.inspect_many(paths))
    whole = [outcome for outcome in found if isinstance(outcome, Result)]
    assert [outcome.path for outcome in whole] == [f"n{i}" for i in range(8)]
    assert [outcome.score for outcome in whole] == [outcome.score for outcome in plain]
