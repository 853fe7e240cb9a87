"""`unflaw predict --engine ray` on a Ray of two processors in this process: what test_scale.py does not need it for."""

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from tests.conftest import make_parts, textured
from typer.testing import CliRunner

from unflaw import scale
from unflaw.cli import app
from unflaw.detector import Detector
from unflaw.experiments.per_category import RayWorker, WorkerConfig, members, train_fleet, training_workers
from unflaw.scale import partitions
from unflaw.scale.on_ray import running
from unflaw.scale.store import OWN, Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """Ray, started once: it takes seconds."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 images and two that cannot be read."""
    made, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(5)
    for i in range(60):
        (made / f"{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(textured(rng)).save(made / f"{i % 3}/{i:03d}.png")
    (made / "1/broken.png").write_bytes(b"\x89PNG broken")
    (made / "2/empty.png").write_bytes(b"")
    return made


@pytest.fixture(scope="module")
def plain(exported, folder, tmp_path_factory) -> dict[str, dict]:
    """What plain `predict` writes of each."""
    out = tmp_path_factory.mktemp("plain")
    assert predict(exported, folder, "--out", out).exit_code == 3
    lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {line["path"]: line for line in lines}


def predict(model, *arguments):
    return CliRunner().invoke(app, ["predict", *map(str, (model, *arguments))])


def rows_of(out):
    store = Store(str(out))
    return [row for number in partitions.finished(store) for row in partitions.read(store, number)]


def every_image_once(out, plain):
    """Holds results to plain ones, by names, numbers and scores; returns them."""
    rows = rows_of(out)
    assert Counter(row["name"] for row in rows) == dict.fromkeys(plain, 1)
    for row in rows:
        line = plain[row["name"]]
        assert row["status"] == ("failed" if "error" in line else "ok") and row["verdict"] == line.get("verdict")
        assert row["score"] == (pytest.approx(line["score"], rel=1e-5) if "score" in line else None)
        assert row["error"] == line.get("error")
    return rows


def test_two_workers_give_what_plain_predict_gives_and_go_on(cluster, exported, folder, plain, tmp_path):
    out = tmp_path / "out"
    options = ("--engine", "ray", "--input", folder, "--output", out, "--partition", 8, "--workers", 2)
    done = predict(exported, *options)
    assert done.exit_code == 3 and "8 of 8 partitions: " in done.output and "2 failed" in done.output, done.output
    every_image_once(out, plain)

    for number in (2, 5):
        (out / partitions.file_of(number)).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    done = predict(exported, *options)
    assert "8 of 8 partitions, 6 found finished" in done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(list(out.glob("*.parquet"))) == 8
    every_image_once(out, plain)

    (folder / "2/empty.png").write_bytes((folder / "0/000.png").read_bytes())
    try:
        done = predict(exported, *options)
        assert done.exit_code == 2 and "files have changed" in done.output
        done = predict(exported, *options, "--retry")
        assert (
            done.exit_code == 3 and "8 of 8 partitions, 8 found finished" in done.output and "1 failed" in done.output
        )
    finally:
        (folder / "2/empty.png").write_bytes(b"")
    scores = {Path(row["name"]).name: row["score"] for row in rows_of(out)}
    assert scores["empty.png"] == pytest.approx(scores["000.png"], rel=1e-5) and len(scores) == 62


def test_a_detector_of_torch_by_url_and_another_one_is_refused(cluster, saved, exported, detector, folder, tmp_path):
    out = tmp_path / "out"
    options = ("--engine", "ray", "--input", f"{folder}/0", "--input", f"{folder}/2/0[0-2]*.png", "--partition", 50)
    done = predict(saved, *options, "--output", out.as_uri(), "--workers", 1)
    rows = rows_of(out)
    paths = [*sorted(folder.glob("0/*.png")), *sorted(folder.glob("2/0[0-2]*.png"))]
    assert [row["name"] for row in rows] == [str(path) for path in paths] and done.exit_code == 0, done.output
    found = detector.inspect_many(paths)
    assert [row["score"] for row in rows] == pytest.approx([result.score for result in found], rel=1e-5)
    done = predict(exported, *options, "--output", out)
    assert done.exit_code == 2 and "begun with another detector" in done.output


def test_a_worker_that_is_killed_loses_and_doubles_nothing(cluster, exported, folder, plain, tmp_path):
    out, killed = tmp_path / "out", []
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set() and len(killed) < 2:
            for note in (out / OWN).glob("doing-*.json"):
                try:
                    noted = json.loads(note.read_text())
                except (OSError, ValueError):
                    continue
                if noted["pid"] not in killed and (len(killed) == 0 or list(out.glob("part-*.parquet"))):
                    os.kill(noted["pid"], signal.SIGKILL)
                    killed.append(noted["pid"])
                    break
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        totals = scale.predict(exported, [str(folder)], str(out), workers=2, partition=8)
    finally:
        ended.set()
        thread.join()
    assert len(killed) == 2  # one in its first partition, one later
    assert totals.errors == {} and totals.finished == 8 and sum(totals.counts.values()) == 62
    every_image_once(out, plain)
    assert sorted(path.name for path in (out / OWN).iterdir()) == ["items-00000.parquet", "lock", "plan.json"]
    assert all(path.name.startswith(("part-", OWN)) for path in out.iterdir())


def test_workers_that_find_no_processor_stop_nothing(cluster, exported, folder, tmp_path):
    totals = scale.predict(exported, [f"{folder}/0"], str(tmp_path / "out"), workers=3, partition=4)
    assert totals.finished == 5 and totals.counts["failed"] == 0 and sum(totals.counts.values()) == 20
    with pytest.raises(ValueError, match="--threads 3: Ray has fewer processors"):
        scale.predict(exported, [f"{folder}/0"], str(tmp_path / "other"), threads=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--engine", "spark", "--input", "a", "--output", "b"), "--engine spark: there is ray"),
        (("--engine", "ray", "--input", "a"), "needs --input and --output"),
        (("--engine", "ray", "--output", "a"), "needs --input and --output"),
        (("--engine", "ray", "a", "--output", "b"), "a: with --engine ray, name inputs by --input"),
        (("--engine", "ray", "--input", "a", "--out", "b"), "by --output"),
        (("--engine", "ray", "--input", "a", "--output", "b", "--group-by", "folder"), "--group-by does not go with"),
        (("--engine", "ray", "--input", "a", "--output", "b", "--images"), "--images does not go with"),
        (("a", "--out", "b", "--workers", 2), "--workers goes with --engine ray"),
        (("a", "--out", "b", "--output", "c"), "--output goes with --engine ray"),
        (("a",), "name images and --out"),
        (("--out", "a"), "name images and --out"),
        (("--engine", "ray", "--input", "PARENT", "--output", "PARENT/out"), "lies in the input"),
        (("--engine", "ray", "--input", "PARENT/none", "--output", "PARENT/out"), "no such file or folder"),
        (("--engine", "ray", "--input", "a", "--output", "b", "--category", "screw"), "has no categories"),
    ],
)
def test_wrong_options_are_told_before_the_work(saved, tmp_path, arguments, message):
    done = predict(saved, *(str(part).replace("PARENT", str(tmp_path)) for part in arguments))
    assert done.exit_code == 2 and message in done.output and not list(tmp_path.glob("**/part-*"))


def test_without_ray_it_says_what_to_install(saved, tmp_path, monkeypatch):
    found = scale.find_spec
    monkeypatch.setattr(scale, "find_spec", lambda name: None if name == "ray" else found(name))
    done = predict(saved, "--engine", "ray", "--input", tmp_path, "--output", tmp_path / "out")
    assert done.exit_code == 2 and "pip install 'unflaw[ray]'" in done.output


def test_a_wrong_detector_fails_before_anything_is_written(tmp_path, folder):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    done = predict(tmp_path / "m.onnx", "--engine", "ray", "--input", folder, "--output", tmp_path / "out")
    assert done.exit_code == 2 and "not a readable .onnx file" in done.output and not (tmp_path / "out").exists()


def test_how_ray_is_started_or_joined(monkeypatch):
    asked = []

    def refuse(address, **options):
        asked.append((address, options.get("num_cpus")))
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in (None, "auto"):
        with pytest.raises(ValueError, match=r"Ray is not to be reached there \(nobody answers\)"), running(address, 3):
            pass
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(ValueError, match="--address head:6379"), running(None, 3):
        pass
    assert asked == [("local", 3), ("auto", None), ("head:6379", None)]


def test_a_worker_that_cannot_begin_ends_the_run(cluster, exported, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("unflaw.scale.on_ray.__version__", "0.0.0")  # of the driver; the workers have theirs
    with pytest.raises(ValueError, match=r"Ray has ended the run \(.*install the same.*the same command goes on"):
        scale.predict(exported, [str(folder)], str(tmp_path / "out"), workers=1)


def test_a_fleet_is_trained_over_ray_and_a_lost_worker_ends_its_category_only(cluster, weights, tiny, tmp_path):
    root = tmp_path / "products"
    for name in ("bolt", "nut", "washer"):
        make_parts(root / name, train=9)
    (root / "ring/train/good").mkdir(parents=True)
    (root / "ring/train/good/one.png").write_bytes(b"no image")
    told, config = WorkerConfig(tmp_path / "features", None, str(weights), 1), tiny("nearest_neighbor")
    data, failed = members(root)

    class Lost(RayWorker):
        """Its actor is killed at the first nut."""

        def train(self, task):
            if task.category == "nut" and not killed:
                killed.append(task.category)
                self.actor = self.kind.remote(self.worker_config)
                ray.kill(self.actor)
            return super().train(task)

    killed: list[str] = []
    records, failed = train_fleet(data, config, tmp_path / "out", [Lost(told)], lambda *_: None, failed)
    assert [record.category for record in records] == ["bolt", "washer"] and killed == ["nut"]
    assert "was lost" in failed["nut"] and "TrainingError" in failed["ring"]
    with training_workers(told, 2, "ray") as places:
        records, failed = train_fleet(data, config, tmp_path / "out", places, lambda *_: None)
    assert [record.category for record in records] == ["bolt", "nut", "washer"] and list(failed) == ["ring"]
    with pytest.raises(ValueError, match="--workers 3 with --threads 1 are more than the 2 processors"):
        training_workers(told, 3, "ray").__enter__()
    assert ray.is_initialized()  # it was not started here
    expected = Detector(config=config, weights=weights).fit(root / "nut")
    image = root / "nut/test/square/000.png"
    found = Detector.load(tmp_path / "out/nut.safetensors").inspect(image).score
    assert found == pytest.approx(expected.inspect(image).score, rel=1e-3)
