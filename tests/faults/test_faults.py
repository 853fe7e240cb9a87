"""A full disk, a read-only folder, files that cannot be read or have gone, a wrong clock: a sentence, an exit code,
and nothing good lost."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tests.conftest import TINY, TINY_URANET, make_parts
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.detector import Detector
from unflaw.errors import InUseError
from unflaw.station.log import Filter, Log

pytestmark = pytest.mark.slow

MEGABYTE = 2**20


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mounted(megabytes)`: a folder on a disk of this size of its own; `mounted.locked(folder)` makes it read-only."""
    folders: list[Path] = []

    def mount(megabytes: float) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        size = f"size={int(megabytes * MEGABYTE) // 4096 * 4096}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("needs the right to mount a small disk, as root has it")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)


def read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def unflaw(*words: object) -> tuple[int, str]:
    """Exit code of a command, and all that it says; an exception that nobody caught is none of ours."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done.exit_code, done.output


def refused(*words: object, says: str) -> None:
    code, said = unflaw(*words)
    assert code == 2 and "error: " in said and says in said.replace("\n", " "), said


def settings(changes: dict[str, Any]) -> list[object]:
    return [word for name, value in changes.items() for word in ("--set", f"{name}={json.dumps(value)}")]


@pytest.fixture
def train(parts: Path, weights: Path) -> Callable[..., list[object]]:
    def words(out: Path, data: Path = parts, **changes: Any) -> list[object]:
        options = TINY | TINY_URANET | {name.replace("__", "."): value for name, value in changes.items()}
        return ["train", "--data", data, "--weights", weights, "--out", out, *settings(options)]

    return words


def visible_and_hidden(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# A full disk


def test_calibrating_on_a_full_disk_leaves_the_detector_as_it_was(mounted, saved, parts):
    disk = mounted(1.4 * saved.stat().st_size / MEGABYTE)
    model = Path(shutil.copy(saved, disk / "parts.safetensors"))
    advice = f"{model}: cannot be written (No space left on device); make room there, or name another folder"
    refused("calibrate", model, "--good", parts / "test/good", says=advice)
    assert model.read_bytes() == saved.read_bytes() and visible_and_hidden(disk) == ["parts.safetensors"]


def test_a_training_whose_detector_has_no_room_is_not_lost(mounted, train, tmp_path):
    steps = {"training__checkpoint_seconds": 0, "training__steps": 6}
    assert unflaw(*train(tmp_path / "whole.safetensors", **steps))[0] == 0
    disk = mounted(2)
    model = disk / "parts.safetensors"
    refused(*train(model, **steps), says=f"{model}: cannot be written (No space left on device); make room there")
    assert visible_and_hidden(disk) == ["parts.safetensors.checkpoint"]
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert unflaw(*train(model, **steps), "--resume")[0] == 0
    assert visible_and_hidden(disk) == ["parts.safetensors"]
    whole, resumed = load_file(tmp_path / "whole.safetensors"), load_file(model)
    assert whole.keys() == resumed.keys() and all((whole[name] == resumed[name]).all() for name in whole)


def test_a_checkpoint_without_room_ends_the_training_with_a_sentence(mounted, train):
    model = mounted(0.05) / "parts.safetensors"
    refused(*train(model, training__checkpoint_seconds=0), says=f"{model}.checkpoint: cannot be written (No space")
    assert visible_and_hidden(model.parent) == []


def test_predicting_on_a_full_disk_leaves_the_results_of_yesterday(mounted, saved, parts):
    out = mounted(0.1) / "results"
    out.mkdir()
    (out / "results.jsonl").write_text("yesterday\n")
    refused("predict", saved, parts / "test", "--out", out, "--images", says=".png: cannot be written (No space")
    assert (out / "results.jsonl").read_text() == "yesterday\n"
    with (out / "full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    says = "results.jsonl: cannot be written (No space left on device); make room there"
    refused("predict", saved, parts / "test", "--out", out, says=says)
    assert (out / "results.jsonl").read_text() == "yesterday\n"


def test_evaluating_and_exporting_on_a_full_disk(mounted, saved, parts, export_again):
    disk = mounted(0.05)
    report = disk / "r.html"
    refused("evaluate", saved, "--data", parts, "--report", report, says=f"{report}: cannot be written (No space")
    with pytest.raises(OSError, match=r"d\.onnx: cannot be written \(No space left on device\); make room there"):
        export_again(disk / "d.onnx")
    assert visible_and_hidden(disk) == []


def test_two_exports_to_openvino_do_not_leave_halves_of_both(export_again, tmp_path, holder):
    path, other = tmp_path / "d.xml", holder(tmp_path / "d.xml")
    with pytest.raises(InUseError, match=rf"d\.xml: cannot be written \(in use by process {other.pid} on"):
        export_again(path, to="openvino")
    other.communicate("")
    assert visible_and_hidden(tmp_path) == []


def test_features_for_which_there_is_no_room(mounted, train, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(mounted(4096 / MEGABYTE)))
    says = "of features need space there, or in a folder that TMPDIR names"
    refused(*train(tmp_path / "d.safetensors", training__cache_gb=1e-9), says=says)


def test_a_camera_folder_on_a_full_disk_keeps_its_images(mounted, saved, parts, tmp_path):
    disk, camera = mounted(0.5), tmp_path / "camera"
    shutil.copytree(parts / "test/good", camera)
    watch = ["watch", camera, "--model", saved, "--out", tmp_path / "sorted", "--store", disk, "--once"]
    watch += ["--settle", 0, "--poll-interval", 0.01, "--patience", 0.2]
    assert Log(f"sqlite:///{disk / 'log.db'}").count(Filter()) == 0  # its tables find room
    with (disk / "full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    before = visible_and_hidden(camera)
    refused(*watch, says="they stay where they are: mend that, the same command goes on")
    assert visible_and_hidden(camera) == before
    (disk / "full").unlink()
    assert unflaw(*watch)[0] == 0 and visible_and_hidden(camera) == []
    log = Log(f"sqlite:///{disk / 'log.db'}")
    assert sorted(entry.name for entry in log.find(Filter())) == before


# Read-only


def test_a_read_only_folder_is_refused_before_the_work(mounted, saved, parts, train, monkeypatch):
    disk = mounted(32)
    model = Path(shutil.copy(saved, disk / "parts.safetensors"))
    read_only(disk)
    monkeypatch.setattr(Detector, "fit", lambda *_, **__: pytest.fail("it has begun"))
    monkeypatch.setattr(Detector, "calibrate", lambda *_, **__: pytest.fail("it has begun"))
    says = f"{disk}: cannot be written (Read-only file system); change its permissions, or name another folder"
    refused(*train(model), says=says)
    refused("calibrate", model, "--good", parts / "test/good", says=says)
    refused("predict", saved, parts / "test", "--out", disk, says=says)
    refused("evaluate", saved, "--data", parts, "--json", disk / "m.json", says=says)
    refused("export", model, says=says)
    refused("figures", saved, "--data", parts, "--out", disk, says=says)
    refused("predict", saved, parts / "test", "--out", disk / "new", says="new: cannot be written (Read-only")
    watch = ["watch", parts / "test", "--model", saved, "--out", disk / "sorted"]
    refused(*watch, "--store", disk.parent / "store", says="name a folder that can be written")
    refused("log", "prune", "--store", disk, "--days", 3, says="there is no such log")
    assert model.read_bytes() == saved.read_bytes()


def test_a_detector_in_a_read_only_folder_is_calibrated_into_another(mounted, saved, parts, tmp_path):
    disk = mounted(32)
    model = Path(shutil.copy(saved, disk / "parts.safetensors"))
    read_only(disk)
    assert unflaw("calibrate", model, "--good", parts / "test/good", "--out", tmp_path / "new.safetensors")[0] == 0


def test_a_log_that_cannot_be_written(mounted, saved, parts, tmp_path):
    disk = mounted(4)
    Log(f"sqlite:///{disk / 'log.db'}").close()
    read_only(disk)
    refused("log", "prune", "--store", disk, "--days", 3, says="log.db: the log's database does not answer")


# Files that cannot be read


def unreadable(path: Path) -> Path:
    """A file whose content the system refuses to give, also to root."""
    memory = Path("/proc/self/mem")  # at its beginning there is nothing to read: an input/output error
    if not memory.exists():
        pytest.skip("needs /proc/self/mem for a file that cannot be read")
    path.symlink_to(memory)
    return path


def test_an_image_that_cannot_be_read_is_named_and_the_others_go_on(saved, parts, tmp_path, train):
    data = make_parts(tmp_path / "parts")
    broken = unreadable(data / "train/good/broken.png")
    code, said = unflaw(*train(tmp_path / "d.safetensors", data))
    assert code == 0 and f"note: skipped {broken}: " in said and "Input/output error" in said
    code, said = unflaw("predict", saved, data / "train/good", "--out", tmp_path / "out")
    assert code == 3 and str(broken) in said
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines if "error" in line] == [str(broken)] and len(lines) == 13
    code, said = unflaw("calibrate", saved, "--good", data / "train/good", "--out", tmp_path / "c.safetensors")
    assert code == 2 and "was trained on this image" in said, said  # these it knows; the broken one does not hide that
    broken = unreadable(data / "test/square/broken.png")
    code, said = unflaw("calibrate", saved, "--good", data / "test/square", "--out", tmp_path / "c.safetensors")
    assert code == 0 and f"note: skipped {broken}: " in said
    unreadable(data / "test/good/broken.png")
    code, said = unflaw("evaluate", saved, "--data", data)
    assert code == 0 and f"skipped {data / 'test/good/broken.png'}: " in said


def test_a_detector_that_cannot_be_read(parts, tmp_path):
    model = unreadable(tmp_path / "d.safetensors")
    says = f"{model}: cannot be read (Input/output error); mend that, or copy it again"
    refused("predict", model, parts / "test", "--out", tmp_path / "out", says=says)
    refused("info", model, says=says)


# Files that go while the work is on


def test_an_image_that_goes_between_listing_and_reading_is_skipped(saved, tmp_path, train, monkeypatch):
    from unflaw import datasets
    from unflaw.cli import inspecting

    data, load, listed = make_parts(tmp_path / "parts"), datasets.load_dataset, inspecting.images_in

    def loses(path: Path) -> Any:
        found = load(path)
        (data / "train/good/003.png").unlink()
        return found

    monkeypatch.setattr(datasets, "load_dataset", loses)
    code, said = unflaw(*train(tmp_path / "d.safetensors", data))
    assert code == 0 and f"note: skipped {data / 'train/good/003.png'}: " in said

    def lists(inputs: list[Path]) -> list[Path]:
        found = listed(inputs)
        found[1].unlink()
        return found

    monkeypatch.setattr(inspecting, "images_in", lists)
    code, said = unflaw("predict", saved, data / "test/good", "--out", tmp_path / "out")
    assert code == 3 and "1 not readable" in said
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert ["error" in line for line in lines] == [False, True, False, False]


def test_an_image_that_goes_once_it_was_read_changes_nothing(tmp_path, train, monkeypatch):
    """Its hash is that of the bytes that were decoded: nothing is read a second time."""
    from unflaw.training import fit

    data, whole = make_parts(tmp_path / "parts"), fit.fit_cached
    assert unflaw(*train(tmp_path / "whole.safetensors", data))[0] == 0

    def goes(network: Any, cache: Any, *rest: Any, **options: Any) -> Any:
        (data / "train/good/003.png").write_bytes(b"another image")
        (data / "train/good/004.png").unlink()
        return whole(network, cache, *rest, **options)

    monkeypatch.setattr(fit, "fit_cached", goes)
    code, said = unflaw(*train(tmp_path / "d.safetensors", data))
    assert code == 0, said
    found, expected = (Detector.load(tmp_path / f"{name}.safetensors") for name in ("d", "whole"))
    assert found.record_["seen"] == expected.record_["seen"] and found.record_["digest"] == expected.record_["digest"]
    assert found.calibration_ == expected.calibration_


# A wrong clock


def test_training_goes_on_from_a_checkpoint_of_the_future(train, tmp_path, monkeypatch):
    model, steps = tmp_path / "d.safetensors", {"training__checkpoint_seconds": 0, "training__steps": 6}
    save = Detector.save
    monkeypatch.setattr(Detector, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert unflaw(*train(model, **steps))[0] == 2
    monkeypatch.setattr(Detector, "save", save)
    checkpoint = tmp_path / "d.safetensors.checkpoint"
    os.utime(checkpoint, (time.time() + 1e6,) * 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert unflaw(*train(model, **steps), "--resume")[0] == 0 and not checkpoint.exists()


def test_a_clock_that_jumps_does_not_stop_a_watcher(saved, parts, tmp_path, monkeypatch):
    camera = tmp_path / "camera"
    shutil.copytree(parts / "test/good", camera)
    for number, file in enumerate(sorted(camera.iterdir())):
        os.utime(file, (time.time() + (-1e9, 1e9, 0, 1e6)[number],) * 2)
    jumping = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(jumping))  # an hour back at every look
    watch = ["watch", camera, "--model", saved, "--out", tmp_path / "sorted", "--store", tmp_path / "store", "--once"]
    assert unflaw(*watch, "--settle", 0.1, "--poll-interval", 0.05)[0] == 0 and visible_and_hidden(camera) == []
    assert Log(f"sqlite:///{tmp_path / 'store/log.db'}").count(Filter()) == 4
