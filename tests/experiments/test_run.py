import csv
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import make_parts
from tests.experiments.conftest import SETTINGS
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import load_dataset
from unflaw.evaluation.bootstrap import PerImage
from unflaw.experiments import run as module
from unflaw.experiments.grid import plan
from unflaw.experiments.processes import TaskError
from unflaw.experiments.records import Record, images_file
from unflaw.experiments.run import measure, run_experiment

pytestmark = pytest.mark.slow

SILENT = lambda *_: None  # noqa: E731


# Runs


def test_a_run_is_measured_from_files_and_never_done_twice(grid, dataset, here, tmp_path):
    runs = plan(grid(), [dataset])
    reports = []
    records, failed = run_experiment(runs, tmp_path, lambda *r: reports.append(r[1:3]) if r[0] == "runs" else None)
    assert not failed and here == [run.name for run in runs] and reports == [(0, 2), (1, 2), (2, 2)]
    first = records[0]
    assert (first.data, first.method, first.backbone, first.size, first.seed) == (
        "parts",
        "nearest_neighbor",
        "resnet18",
        64,
        0,
    )
    assert 0 < first.metrics["image_auroc"] <= 1 and first.seconds["training"] > 0
    assert first.memory > 1e8 and first.file > 1e5 and first.weights == "resnet18.safetensors"
    kept = PerImage.load(images_file(tmp_path, first.digest))
    assert len(kept.names) == first.metrics["n_images"]
    assert kept.values("image_auroc", np.ones((1, len(kept.names))))[0] == pytest.approx(first.metrics["image_auroc"])
    again, _ = run_experiment(plan(grid(seeds=3), [dataset]), tmp_path, SILENT)
    assert len(here) == 3 and [r.digest for r in again[:2]] == [r.digest for r in records]


def test_runs_that_share_features_have_the_same_figures_and_digests(grid, dataset, here, tmp_path):
    apart, _ = run_experiment(plan(grid(), [dataset]), tmp_path / "apart", SILENT)
    wanted = grid(methods=["nearest_neighbor", "memae"], features=tmp_path / "features")
    together, failed = run_experiment(plan(wanted, [dataset]), tmp_path / "together", SILENT)
    assert not failed and len(list((tmp_path / "features").glob("*.npy"))) == 2  # of a backbone and of pixels
    for one, other in zip(apart, together[:2], strict=True):
        assert one.digest == other.digest and one.metrics == pytest.approx(other.metrics, abs=1e-4)
    assert not apart[0].shared and all(record.shared for record in together)
    assert all(record.seconds["training"] > 0 and not record.latency and record.memory is None for record in together)
    table = (tmp_path / "together/table.md").read_text()
    assert "For 4 runs with shared features, training excludes extraction." in table
    assert "| training s | file MB | n |" in table  # what was not measured has no column
    run_experiment(plan(grid(features=tmp_path / "features"), [dataset]), tmp_path / "apart", SILENT)
    assert len(here) == 2 + 4  # what was measured from files is not done again


def test_data_may_be_named_by_another_path_later(grid, dataset, here, tmp_path, parts, monkeypatch):
    run_experiment(plan(grid(seeds=1), [dataset]), tmp_path / "out", SILENT)
    monkeypatch.chdir(parts.parent)
    records, failed = run_experiment(plan(grid(seeds=2), [load_dataset(Path(parts.name))]), tmp_path / "out", SILENT)
    assert len(records) == 2 and len(here) == 2 and not failed


def test_names_that_are_no_utf8_do_not_end_a_run(grid, dataset, here, tmp_path):
    record = measure(plan(grid(seeds=1), [dataset])[0], tmp_path, SILENT)
    told = record.model_dump() | {"skipped": {"caf\udce9.png": "caf\udce9.png: is damaged"}}
    assert "caf\\\\udce9.png" in Record.model_validate(told).model_dump_json()


def test_a_run_that_fails_ends_no_other(grid, dataset, tmp_path, monkeypatch):
    runs = plan(grid(), [dataset])

    def run(run, out, progress):
        if run.seed == 0:
            raise TaskError("TrainingError: no room")
        return measure(run, out, progress)

    monkeypatch.setattr(module, "_in_own_process", run)
    monkeypatch.setattr(module, "latencies", lambda *_: {})
    records, failed = run_experiment(runs, tmp_path, SILENT)
    assert [record.seed for record in records] == [1]
    assert failed == {"parts, nearest_neighbor, resnet18, 64 pixels, seed 0": "TrainingError: no room"}
    assert "1 is not finished" in (tmp_path / "table.md").read_text()


def test_a_run_in_its_own_process_reports_and_gives_the_same(grid, dataset, tmp_path):
    (run,) = plan(grid(seeds=1), [dataset])
    stages = []
    record = module._in_own_process(run, tmp_path / "apart", lambda *report: stages.append(report[0]))
    here = measure(run, tmp_path, SILENT)
    assert {"features", "evaluating"} <= set(stages)
    assert record.metrics == pytest.approx(here.metrics, nan_ok=True) and record.digest == here.digest
    assert record.latency["1"].median > 0 and record.latency["32"].p95 > 0


def test_a_process_that_is_killed_is_a_run_that_failed(grid, dataset, tmp_path):
    (run,) = plan(grid(seeds=1), [dataset])

    def kill(*_):
        import multiprocessing

        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.2)

    with pytest.raises(TaskError, match="exit code -9; most likely out of memory"):
        module._in_own_process(run, tmp_path, kill)


def test_errors_cross_the_process(grid, dataset, tmp_path):
    (run,) = plan(grid(seeds=1), [dataset])
    (tmp_path / "images").write_text("a file where a folder should be")
    with pytest.raises(TaskError, match=r"(FileExists|NotADirectory)Error.*images"):
        module._in_own_process(run, tmp_path, SILENT)


# The command


def test_the_command_writes_every_table(weights, tmp_path):
    parts = make_parts(tmp_path / "parts")
    grid = tmp_path / "grid.yaml"
    settings = json.dumps({k: v for k, v in SETTINGS.items() if k not in ("preparation.size", "features.backbone")})
    grid.write_text(f"methods: [nearest_neighbor]\ndata: [parts]\nsizes: [64]\nseeds: 1\nsettings: {settings}\n")
    command = ["benchmark", "--grid", str(grid), "--backbone", f"resnet18={weights}", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.search(r"\| nearest_neighbor \| resnet18 \| 64 \| [.\d]+ \[", result.output)
    (row,) = csv.DictReader((tmp_path / "out/table.csv").open())
    record = json.loads((tmp_path / "out/table.json").read_text())
    assert float(row["image_auroc_median"]) == record["rows"][0]["image_auroc"]["median"]
    assert {path.suffix for path in (tmp_path / "out").glob("table.*")} == {".md", ".csv", ".json", ".tex", ".html"}
    assert parts.is_dir()
    wrong = CliRunner().invoke(app, [*command[:3], "--method", "nothing", "--out", str(tmp_path / "out")])
    assert wrong.exit_code == 2 and "unknown method 'nothing'" in wrong.output
