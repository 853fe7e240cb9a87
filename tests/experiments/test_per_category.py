import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.conftest import OWN, TINY, make_parts
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import DatasetError
from unflaw.detector import Detector
from unflaw.experiments.feature_store import ExperimentRunner
from unflaw.experiments.per_category import (
    Record,
    Worker,
    WorkerConfig,
    members,
    shares,
    train_fleet,
    training_workers,
)
from unflaw.experiments.processes import ChildProcess, TaskError

pytestmark = pytest.mark.slow

SETTINGS = TINY | {"training.display_steps": 0} | OWN["nearest_neighbor"]


class Here(Worker):
    """Says what it trained; the categories in `broken` fail."""

    def __init__(self, worker_config, broken=()):
        super().__init__(worker_config)
        self.broken, self.trained = broken, []

    def train(self, task, *progress):
        if task.category in self.broken:
            raise TaskError("it broke")
        record = super().train(task, *progress)
        self.trained += [] if record is None else [task.category]
        return record


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """Two categories of one layout, a folder of good images, one with a broken image, and notes."""
    root = tmp_path_factory.mktemp("products") / "products"
    for i, name in enumerate(("bolt", "nut")):
        make_parts(root / name, train=10 + i)
    shutil.copytree(root / "nut/train/good", root / "washer")
    (root / "ring").mkdir()
    (root / "ring/000.png").write_bytes((root / "nut/train/good/000.png").read_bytes()[:99])
    (root / "notes").mkdir()
    (root / "notes/licence.txt").write_text("free")
    return root


@pytest.fixture
def worker_config(tmp_path, weights):
    return WorkerConfig(tmp_path / "features", None, str(weights), 1)


@pytest.fixture
def config(tiny):
    return tiny("nearest_neighbor")


def run(products, config, out, worker, progress=lambda *_: None):
    found, failed = members(products)
    return train_fleet(found, config, out, [worker], progress, failed)


def test_each_category_gets_a_detector_and_a_line(products, config, worker_config, tmp_path, weights):
    said = []
    records, failed = run(products, config, tmp_path, Here(worker_config), lambda *now: said.append(now[:3]))
    assert [record.category for record in records] == ["bolt", "nut", "washer"]
    assert list(failed) == ["ring"] and "1 could not be read" in failed["ring"]
    assert said[-1] == ("detectors", 4, 4)
    bolt, _, washer = records
    assert (bolt.good_images, bolt.metrics["n_images"], washer.metrics) == (10, 8, {})
    expected = Detector(config=config, weights=weights).fit(products / "bolt")
    found = Detector.load(tmp_path / bolt.file)
    image = products / "bolt/test/square/000.png"
    assert found.inspect(image).score == pytest.approx(expected.inspect(image).score, rel=1e-3)
    assert found.record_["digest"] == expected.record_["digest"] and bolt.guarantee == expected.select().describe()
    table = (tmp_path / "fleet.md").read_text()
    assert table.count("\n") == 6 and "| ring |" in table and "failed: TrainingError" in table
    rows = json.loads((tmp_path / "fleet.json").read_text())
    assert [row["category"] for row in rows] == ["bolt", "nut", "washer", "ring"] and rows[0]["error"] is None
    assert (tmp_path / "fleet.csv").read_text().count("\n") == 5


def test_it_goes_on_and_does_anew_what_changed(products, config, tiny, worker_config, tmp_path):
    copied = tmp_path / "products"
    shutil.copytree(products, copied, ignore=shutil.ignore_patterns("ring"))
    out = tmp_path / "out"
    first = Here(worker_config, broken=["nut"])
    assert [r.category for r in run(copied, config, out, first)[0]] == ["bolt", "washer"]
    second = Here(worker_config)
    assert [r.category for r in run(copied, config, out, second)[0]] == ["bolt", "nut", "washer"]
    assert second.trained == ["nut"]
    (out / "washer.safetensors").unlink()
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(copied / "bolt/train/good/new.png")
    assert len(run(copied, config, out, second)[0]) == 3 and sorted(second.trained) == ["bolt", "nut", "washer"]
    again = Here(worker_config)
    run(copied, config, out, again)
    assert not again.trained
    run(copied, tiny("nearest_neighbor", **{"training.seed": 5}), out, again)
    assert len(again.trained) == 3
    run(copied, config, out, again)  # the digests are known, yet the files are of another seed
    assert len(again.trained) == 6
    (out / "nut.safetensors").write_bytes((out / "bolt.safetensors").read_bytes())  # a file that the log is silent of
    run(copied, config, out, again)
    assert again.trained[6:] == ["nut"]


def test_a_detector_is_replaced_once_all_is_known_of_it(products, config, tiny, worker_config, tmp_path, monkeypatch):
    run(products, config, tmp_path, Here(worker_config))
    before = (tmp_path / "bolt.safetensors").read_bytes()
    monkeypatch.setattr("unflaw.evaluation.evaluate.evaluate", lambda *_, **__: 1 / 0)
    records, failed = run(products, tiny("nearest_neighbor", **{"training.seed": 5}), tmp_path, Here(worker_config))
    assert [record.category for record in records] == ["washer"] and "ZeroDivisionError" in failed["bolt"]
    assert (tmp_path / "bolt.safetensors").read_bytes() == before


def test_features_serve_again_within_a_limit(products, config, tiny, worker_config, tmp_path, monkeypatch):
    run(products, config, tmp_path, Here(worker_config))
    files = {path.name: path.stat().st_size for path in worker_config.cache.glob("*.npy")}
    assert len(files) == 4  # the one that cannot be read was tried too
    monkeypatch.setattr("unflaw.experiments.feature_store.read_parts", lambda *_: pytest.fail("images are read again"))
    run(products, tiny("nearest_neighbor", **{"training.seed": 1}), tmp_path, Here(worker_config))
    monkeypatch.undo()
    shutil.rmtree(worker_config.cache)
    little = WorkerConfig(worker_config.cache, 1.5 * max(files.values()), worker_config.weights, 1)
    records, _ = run(products, tiny("nearest_neighbor", **{"training.seed": 2}), tmp_path, Here(little))
    kept = [path.stat().st_size for path in worker_config.cache.iterdir()]
    assert len(records) == 3 and 0 < sum(kept) <= little.limit
    nothing = WorkerConfig(worker_config.cache, 1.0, worker_config.weights, 1)
    with_room = [record.metrics for record in records]
    again, _ = run(products, tiny("nearest_neighbor", **{"training.seed": 2}), tmp_path / "other", Here(nothing))
    for found, expected in zip([record.metrics for record in again], with_room, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)


def test_a_file_that_vanishes_is_made_again(products, config, worker_config, weights):
    runner, dataset = ExperimentRunner(worker_config.cache, weights), members(products)[0]["bolt"]
    path = runner.path(config, dataset)
    runner.fit(config, dataset)
    assert path.is_file()
    path.unlink()
    ExperimentRunner(worker_config.cache, weights).fit(config, dataset)
    assert path.is_file()


def test_folders_that_cannot_be_a_fleet_are_refused(products, tmp_path):
    for folder, message in [
        (tmp_path / "none", "no such folder"),
        (products / "bolt", "one data set"),
        (products / "washer", "one data set"),
        (products / "notes", "no folders of images"),
    ]:
        with pytest.raises(DatasetError, match=message):
            members(folder)


def test_all_processors_are_made_use_of(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    asked = {(None, None): (8, 1), (2, None): (2, 4), (None, 2): (4, 2), (3, 3): (3, 3), (16, None): (16, 1)}
    assert {each: shares(*each, most=20) for each in asked} == asked
    assert (shares(None, None, most=2), shares(16, None, most=0)) == ((2, 4), (1, 8))


class Killed(Worker):
    """Its process is killed at a category called nut, as if memory had run out."""

    def train(self, task, *progress):
        if task.category == "nut":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(task, *progress)


def test_a_process_that_is_killed_ends_its_category_only(products, config, worker_config, tmp_path, monkeypatch):
    started = []
    real = ChildProcess.__call__

    def call(self, *task, **options):
        try:
            return real(self, *task, **options)
        finally:
            started.append(self.process)

    monkeypatch.setattr(ChildProcess, "__call__", call)
    monkeypatch.setattr("unflaw.experiments.per_category.Worker", Killed)
    found, _ = members(products)
    found = {name: found[name] for name in ("bolt", "nut", "washer")}
    with training_workers(worker_config, 1) as places:
        records, failed = train_fleet(found, config, tmp_path, places, lambda *_: None)
    assert [record.category for record in records] == ["bolt", "washer"]
    assert "exit code -9; most likely out of memory" in failed["nut"]
    assert started.count(None) == 1 and not any(process and process.is_alive() for process in started)
    assert not (tmp_path / "nut.safetensors").exists()


def test_the_command(products, weights, tmp_path):
    out = tmp_path / "out"
    settings = [f"--set={name}={json.dumps(v) if not isinstance(v, str) else v}" for name, v in SETTINGS.items()]
    command = [
        "fleet",
        str(products),
        "--out",
        str(out),
        "--method",
        "nearest_neighbor",
        "--weights",
        str(weights),
        *settings,
    ]
    done = CliRunner().invoke(app, [*command, "--workers", "2"])
    assert done.exit_code == 3, done.output
    assert "error: ring:" in done.output and "| washer | 11 |" in done.output
    names = {path.name for path in out.iterdir()}
    detectors = {"bolt.safetensors", "nut.safetensors", "washer.safetensors"}
    assert names == detectors | {"fleet.jsonl", "fleet.md", "fleet.csv", "fleet.json", "features"}
    assert all(Record.model_validate_json(line) for line in (out / "fleet.jsonl").read_text().splitlines())
    for wrong, message in [
        (["--engine", "threads"], "choose processes or ray"),
        (["--address", "auto"], "add --engine ray"),
        (["--weights", "none.pth"], "none.pth"),
    ]:
        done = CliRunner().invoke(app, [*command, *wrong])
        assert done.exit_code == 2 and message in done.output
    assert Path(out / "fleet.md").read_text().count("\n") == 6
