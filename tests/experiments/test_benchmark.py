import csv
import json
import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import OWN, TINY, make_parts
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.config import make_config
from unflaw.datasets import load_dataset
from unflaw.datasets.public import COLLECTIONS
from unflaw.evaluation.bootstrap import PerImage
from unflaw.experiments import benchmark as module
from unflaw.experiments.benchmark import RunError, benchmark, measure
from unflaw.experiments.grid import Grid, Run, plan, read_grid
from unflaw.experiments.leaderboard import intervals, latex, markdown, published, tabulate
from unflaw.experiments.leaderboard_page import page, plot
from unflaw.experiments.records import Record, images_file

pytestmark = pytest.mark.slow

SETTINGS = TINY | {"training.steps": 2, "training.display_steps": 0} | OWN["nearest_neighbor"]
SILENT = lambda *_: None  # noqa: E731


@pytest.fixture
def grid(weights):
    """`grid(**changes)`: a small grid of the nearest-neighbor search."""

    def make(**changes):
        settings = {name: v for name, v in SETTINGS.items() if name not in ("preparation.size", "features.backbone")}
        given = {
            "data": [Path("parts")],
            "methods": ["nearest_neighbor"],
            "backbones": [f"resnet18={weights}"],
            "sizes": [64],
        }
        return Grid(**given | {"seeds": 2, "settings": settings} | changes)

    return make


@pytest.fixture
def here(monkeypatch):
    """Runs in this process: only what a run gives is of interest. Returns the names of the runs."""
    done = []

    def run(run, out, progress):
        done.append(run.name)
        return measure(run, out, progress)

    monkeypatch.setattr(module, "_in_own_process", run)
    monkeypatch.setattr(module, "latencies", lambda *_: iter(()))
    return done


@pytest.fixture(scope="module")
def dataset(parts):
    return load_dataset(parts)


# The grid


def test_flags_go_before_the_file_and_its_paths_are_relative_to_it(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/r.pth").touch()
    (tmp_path / "screw").mkdir()
    file = tmp_path / "grid.yaml"
    file.write_text("methods: [uranet]\ndata: [screw]\nbackbones: [resnet18=weights/r.pth, resnet34]\nseeds: 5\n")
    file.write_text(file.read_text() + "features: cache\npeer_python: /usr/bin/python\n")
    found = read_grid(file, {"seeds": 1})
    assert (found.features, found.peer_python) == (tmp_path / "cache", Path("/usr/bin/python"))
    assert (found.methods, found.seeds, found.data) == (["uranet"], 1, [tmp_path / "screw"])
    assert found.backbones == [f"resnet18={tmp_path / 'weights/r.pth'}", "resnet34"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [a]\nmethod: [uranet]", "grid.yaml: method: .* there are methods, data"),
        ("methods: [uranet]", "data: Field required; name data sets with --data"),
        ("data: [a]\nseeds: 0", "grid.yaml: seeds"),
        ("- a", "must hold fields"),
        ("data: [a", "cannot be read as YAML"),
    ],
)
def test_a_wrong_grid_names_the_field(text, message, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_grid(tmp_path / "grid.yaml", {})


def test_every_place_of_the_grid_is_planned_and_methods_on_pixels_once(grid, dataset, weights):
    wanted = grid(
        methods=["nearest_neighbor", "memae"], backbones=[f"resnet18={weights}", "test_resnet=random"], sizes=[32, 64]
    )
    runs = plan(wanted, [dataset])
    assert len(runs) == len({run.digest for run in runs}) == (2 + 1) * 2 * 2
    assert [run.row for run in runs[::2]] == [
        ("parts", method, backbone, size)
        for method, backbone in (("nearest_neighbor", "resnet18"), ("nearest_neighbor", "test_resnet"), ("memae", ""))
        for size in (32, 64)
    ]
    assert runs[0].weights == str(weights) and runs[0].config.preparation.size == 32


def test_paths_in_a_file_may_hold_equals_signs(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("data: [x=1/screw]\nbackbones: [resnet18=x=1/r.pth]\n")
    found = read_grid(file, {})
    assert found.data == [tmp_path / "x=1/screw"] and found.backbones == [f"resnet18={tmp_path}/x=1/r.pth"]


def test_what_cannot_work_is_said_before_the_first_run(grid, dataset, tmp_path, parts, weights):
    for changes, message in (
        ({"methods": ["uranett"]}, "unknown method 'uranett'"),
        ({"methods": []}, "there is nothing to run"),
        ({"settings": {"training.stepz": 1}}, "stepz"),
        ({"settings": {"steps": 5}}, "steps"),
        ({"settings": {"training.seed": 5}}, "--seeds says how many"),
        ({"backbones": [f"resnet18={weights}", "resnet18=random"]}, "two weight files"),
        ({"backbones": ["resnet18=nothing.pth"]}, "nothing.pth"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            plan(grid(**changes), [dataset])
    with pytest.raises(ValueError, match="there are no test images"):
        plan(grid(), [load_dataset(parts / "train/good")])


# Runs


def test_a_run_is_measured_from_files_and_never_done_twice(grid, dataset, here, tmp_path):
    runs = plan(grid(), [dataset])
    reports = []
    records, failed = benchmark(runs, tmp_path, lambda *r: reports.append(r[1:3]) if r[0] == "runs" else None)
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
    again, _ = benchmark(plan(grid(seeds=3), [dataset]), tmp_path, SILENT)
    assert len(here) == 3 and [r.digest for r in again[:2]] == [r.digest for r in records]


def test_runs_that_share_features_have_the_same_figures_and_digests(grid, dataset, here, tmp_path):
    apart, _ = benchmark(plan(grid(), [dataset]), tmp_path / "apart", SILENT)
    wanted = grid(methods=["nearest_neighbor", "memae"], features=tmp_path / "features")
    together, failed = benchmark(plan(wanted, [dataset]), tmp_path / "together", SILENT)
    assert not failed and len(list((tmp_path / "features").glob("*.npy"))) == 2  # of a backbone and of pixels
    for one, other in zip(apart, together[:2], strict=True):
        assert one.digest == other.digest and one.metrics == pytest.approx(other.metrics, abs=1e-4)
    assert not apart[0].shared and all(record.shared for record in together)
    assert all(record.seconds["training"] > 0 and not record.latency and record.memory is None for record in together)
    table = (tmp_path / "together/table.md").read_text()
    assert "Of 4 runs with shared features it counts from these on." in table
    assert "| training s | file MB | n |" in table  # what was not measured has no column
    benchmark(plan(grid(features=tmp_path / "features"), [dataset]), tmp_path / "apart", SILENT)
    assert len(here) == 2 + 4  # what was measured from files is not done again


def test_data_may_be_named_by_another_path_later(grid, dataset, here, tmp_path, parts, monkeypatch):
    benchmark(plan(grid(seeds=1), [dataset]), tmp_path / "out", SILENT)
    monkeypatch.chdir(parts.parent)
    records, failed = benchmark(plan(grid(seeds=2), [load_dataset(Path(parts.name))]), tmp_path / "out", SILENT)
    assert len(records) == 2 and len(here) == 2 and not failed


def test_names_that_are_no_utf8_do_not_end_a_run(grid, dataset, here, tmp_path):
    record = measure(plan(grid(seeds=1), [dataset])[0], tmp_path, SILENT)
    told = record.model_dump() | {"skipped": {"caf\udce9.png": "caf\udce9.png: is damaged"}}
    assert "caf\\\\udce9.png" in Record.model_validate(told).model_dump_json()


def test_a_run_that_fails_ends_no_other(grid, dataset, tmp_path, monkeypatch):
    runs = plan(grid(), [dataset])

    def run(run, out, progress):
        if run.seed == 0:
            raise RunError("TrainingError: no room")
        return measure(run, out, progress)

    monkeypatch.setattr(module, "_in_own_process", run)
    monkeypatch.setattr(module, "latencies", lambda *_: iter(()))
    records, failed = benchmark(runs, tmp_path, SILENT)
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

    with pytest.raises(RunError, match="exit code -9; most likely out of memory"):
        module._in_own_process(run, tmp_path, kill)


def test_errors_cross_the_process(grid, dataset, tmp_path):
    (run,) = plan(grid(seeds=1), [dataset])
    (tmp_path / "images").write_text("a file where a folder should be")
    with pytest.raises(RunError, match=r"(FileExists|NotADirectory)Error.*images"):
        module._in_own_process(run, tmp_path, SILENT)


# Tables


def made(data="screw", method="uranet", backbone="resnet18", seed=0, auroc=0.9, **changes):
    """A run and its record, as far as tables look at them."""
    config = make_config(method, "cpu", {"training.seed": seed} | ({"features.backbone": backbone} if backbone else {}))
    digest = f"{data}-{method}-{backbone}-{seed}".ljust(64, "0")
    dataset = load_dataset_stub(data)
    run = Run(dataset, config, None, "", digest)
    metrics = dict.fromkeys(module.KEPT) | {"image_auroc": auroc, "pixel_auroc": 0.95, "aupro_30": 0.8}
    record = Record(
        digest=digest,
        data=data,
        method=method,
        backbone=run.backbone,
        size=256,
        seed=seed,
        weights="w",
        settings="",
        metrics=metrics,
        skipped={},
        seconds={"training": 100.0 + seed, "metrics": 1.0},
        memory=2_000_000_000,
        file=27_000_000,
        latency={"1": {"median": 0.08, "p95": 0.1}, "32": {"median": 0.05, "p95": 0.06}},
        machine="m",
        unflaw="0",
        torch="0",
    )
    return run, record.model_copy(update=changes)


def load_dataset_stub(name):
    from unflaw.datasets import Dataset

    return Dataset(name, "mvtec", (), (), (), ())


def test_rows_are_medians_over_seeds_and_means_over_data_sets():
    pairs = [
        made(data, seed=seed, auroc=a)
        for data, values in (("screw", (0.9, 0.92, 0.99)), ("nut", (0.8,)))
        for seed, a in enumerate(values)
    ]
    runs, records = [run for run, _ in pairs], {record.digest: record for _, record in pairs}
    screw, _, mean = tabulate(runs, records)
    assert screw["image_auroc"]["median"] == 0.92 and screw["n"] == 3 and screw["training"]["median"] == 101
    assert (mean["data"], mean["n"]) == ("", 2) and mean["image_auroc"]["median"] == pytest.approx((0.92 + 0.8) / 2)
    assert screw["memory"]["median"] == 2.0 and screw["latency_1"]["median"] == pytest.approx(80)
    del records[pairs[-1][1].digest]  # without nut there is no mean to compare
    assert [row["data"] for row in tabulate(runs, records)] == ["screw", "nut"]


def test_intervals_and_differences_are_those_of_the_images(tmp_path):
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 60)
    noise = rng.standard_normal(120)
    pairs = [made(method=method) for method in ("uranet", "nearest_neighbor", "memae")]
    for (run, _), shift in zip(pairs, (2.0, 1.9, 0.5), strict=True):
        names = [f"{i}.png" for i in range(120)]
        PerImage(names, labels, noise + shift * labels, None).save(images_file(tmp_path, run.digest))
    runs, records = [run for run, _ in pairs], {record.digest: record for _, record in pairs}
    bounds, differences = intervals(runs, records, tmp_path)
    assert bounds[0]["image_auroc"]["low"] < bounds[0]["image_auroc"]["high"] and bounds[0]["pixel_auroc"] is None
    # memae has no backbone: it differs from the others in two things, and is not compared
    assert [(d["a"], d["b"]) for d in differences] == [("uranet, resnet18", "nearest_neighbor, resnet18")]
    found = differences[0]["image_auroc"]
    # the same images: the difference is far surer than either figure
    assert found["low"] < found["difference"] < found["high"]
    assert found["high"] - found["low"] < 0.3 * (bounds[0]["image_auroc"]["high"] - bounds[0]["image_auroc"]["low"])


def test_text_tables():
    pairs = [made(), made("magnetic_tile"), made(method="memae", backbone=""), made("magnetic_tile", "memae", "")]
    rows = tabulate([run for run, _ in pairs], {record.digest: record for _, record in pairs})
    bounds = [
        {"data": "screw", "method": "uranet", "backbone": "resnet18", "size": 256}
        | {"image_auroc": {"low": 0.85, "high": 0.95}}
    ]
    about = {"runs": 4, "finished": 4, "seeds": 1, "shared": 0}
    about |= {"weights": [], "settings": [], "machines": ["m"], "versions": []}
    text = markdown(rows, bounds, [], about)
    assert "| uranet | resnet18 | 256 | .900 [.850, .950] |" in text and "## Mean over 2 data sets" in text
    assert "AUPIMO" not in text
    lines = latex(rows).splitlines()
    assert lines[2] == r"method & backbone & size & screw & magnetic\_tile & mean \\"
    assert lines[4] == r"uranet & resnet18 & 256 & 90.0 / 95.0 / 80.0 & 90.0 / 95.0 / 80.0 & 90.0 / 95.0 / 80.0 \\"
    assert lines[5].startswith("memae & -- & 256")
    shown = page(rows, bounds, [], about)
    assert "0.850–0.950" in shown and "magnetic_tile" in shown and "<script>" in shown


def test_the_plot_keeps_its_points_inside():
    pairs = [made(auroc=1.0), made("nut", auroc=0.5)]
    rows = tabulate([run for run, _ in pairs], {record.digest: record for _, record in pairs})
    drawn = plot(rows)
    assert all(56 <= x <= 700 and 10 <= y <= 316 for _, x, y, *_ in drawn["points"])
    heights = {auroc: y for _, _, y, _, auroc, _ in drawn["points"]}
    assert heights[1.0] < heights[0.75] < heights[0.5] and len(drawn["up"]) > 2


def test_labels_of_the_plot_do_not_lie_on_each_other():
    pairs = [made(method=method) for method in ("uranet", "nearest_neighbor", "mfrnet")]
    drawn = plot(tabulate([run for run, _ in pairs], {record.digest: record for _, record in pairs}))
    labels = sorted(label for *_, label in drawn["points"])
    assert len(labels) == 3 and min(b - a for a, b in pairwise(labels)) >= 12


def test_published_figures_stand_only_beside_all_of_mvtec_ad():
    all_of_it = [{"data": name} for name in COLLECTIONS[0].counts]
    assert published([*all_of_it, {"data": ""}]) and not published(all_of_it[1:])


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
