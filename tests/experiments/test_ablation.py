"""Ablations: `full` and other variants of a method, with shared features; the runs are done in this process."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from tests.conftest import OWN, TINY, make_parts
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.config import Weights, make_config
from unflaw.datasets import load_dataset
from unflaw.evaluation.evaluate import evaluate
from unflaw.evaluation.results import METRICS
from unflaw.experiments import run as module
from unflaw.experiments.feature_store import ExperimentRunner
from unflaw.experiments.grid import Grid, plan
from unflaw.experiments.processes import TaskError
from unflaw.experiments.records import Log, Record
from unflaw.experiments.run import measure, run_experiment

SMALL = TINY | {"features.backbone": "test_efficientnet", "training.steps": 2, "training.display_steps": 0}
COMMON = SMALL | OWN["nearest_neighbor"]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def run(dataset, features, tmp_path, here):
    """`run(*variants, …)`: an ablation of `nearest_neighbor` into tmp_path: its records and what it reported."""

    def run(
        *variants,
        data=None,
        seeds=2,
        method="nearest_neighbor",
        common=COMMON,
        out=tmp_path,
        weights="random",
        features=features,
    ):
        reports = []
        grid = Grid(
            methods=[method],
            data=[Path("parts")],
            variants=variants,
            backbones=[f"={weights}"],
            seeds=seeds,
            settings=common,
            features=features,
        )
        runs = plan(grid, data or [dataset])
        progress = lambda *report: reports.append(report[1:3]) if report[0] == "runs" else None  # noqa: E731
        records, failed = run_experiment(runs, out, progress)
        assert not failed
        return records, reports

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


# A whole ablation


def test_an_ablation_runs_every_variant_and_seed(run, dataset, features, tmp_path):
    records, reports = run("small: network.prototypes=16", "pixels: method=memae; network.widths=[8, 8]")
    assert [(r.variant, r.seed, r.method) for r in records] == [
        (name, seed, "nearest_neighbor") for name in ("full", "small", "pixels") for seed in (0, 1)
    ]
    assert reports == [(i, 6) for i in range(7)]
    assert lines(tmp_path) == [record.model_dump(mode="json") for record in records]
    config = make_config("nearest_neighbor", "cpu", COMMON | {"network.prototypes": 16, "training.seed": 1})
    expected = evaluate(ExperimentRunner(features, Weights.RANDOM).fit(config, dataset), dataset).metrics
    assert records[3].metrics == {name: expected[name] for name in records[3].metrics}
    assert {*METRICS, "false_alarms", "missed"} < records[3].metrics.keys()
    assert records[3].overrides == "network.prototypes=16" and "features.grid=8" in records[3].settings
    assert (records[3].backbone, records[3].weights, records[3].data) == ("test_efficientnet", "random", "parts")
    assert len({record.digest for record in records}) == 6
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))["rows"]
    assert [(row["variant"], row["n"]) for row in rows] == [("full", 2), ("small", 2), ("pixels", 2)]
    found = [record.metrics["pixel_auroc"] for record in records[2:4]]
    assert rows[1]["pixel_auroc"]["mean"] == pytest.approx(sum(found) / 2)
    page = (tmp_path / "table.md").read_text("utf-8")
    assert "Weights: test_efficientnet: random. Settings: features.backbone=test_efficientnet; " in page
    assert "seeds 0 to 1" in page and "1 thread." in page and "For 6 runs with shared features" in page
    assert page.count("\n| nearest_neighbor ") == 3 and "| nearest_neighbor | small | test_efficientnet | 64 |" in page
    assert "`network.prototypes=16`" in page
    table = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert float(table[1]["pixel_auroc_mean"]) == rows[1]["pixel_auroc"]["mean"] and table[2]["n"] == "2"


@pytest.mark.parametrize("name", ["no-fasm", "no-memory", "no-uncertainty", "untrained", "nearest_neighbor", "level-1"])
def test_variants_that_leave_parts_out_can_be_trained(dataset, features, tmp_path, name):
    grid = Grid(
        data=[Path("parts")],
        variants=[name],
        backbones=["=random"],
        seeds=1,
        settings=SMALL | OWN["uranet"],
        features=features,
    )
    record = measure(plan(grid, [dataset])[1], tmp_path, lambda *_: None)
    assert record.variant == name and record.metrics["image_auroc"] is not None


def test_without_masks_there_are_no_pixel_figures(run, dataset, tmp_path):
    data = [dataset, replace(dataset, name="blind", test=tuple(replace(s, mask=None) for s in dataset.test))]
    records, _ = run(data=data, seeds=1)
    assert records[1].metrics["pixel_auroc"] is None and records[1].metrics["image_auroc"] is not None
    page = (tmp_path / "table.md").read_text("utf-8")
    assert page.index("## parts") < page.index("## blind")
    blind, whole = (page[page.index(f"## {name}") :].split("\n## ")[0] for name in ("blind", "parts"))
    assert blind.count("| – | – | – | – | – |") == 1 and "–" not in whole


def test_images_that_cannot_be_read_are_named(run, tmp_path):
    make_parts(tmp_path / "parts")
    broken = [tmp_path / "parts" / name for name in ("train/good/003.png", "test/good/001.png")]
    for path in broken:
        path.write_bytes(b"no image")
    (record,), _ = run(data=[load_dataset(tmp_path / "parts")], seeds=1, features=tmp_path / "features")
    assert record.skipped.keys() == {str(path) for path in broken} and record.metrics["n_images"] == 7
    assert all(path in reason for path, reason in record.skipped.items())


# Going on


def test_finished_runs_are_not_done_again(run, tmp_path, monkeypatch):
    fit, fitted = ExperimentRunner.fit, []

    def counted(self, config, *arguments, **options):
        fitted.append((config.network.prototypes, config.training.seed))
        if len(fitted) == 3:
            raise KeyboardInterrupt
        return fit(self, config, *arguments, **options)

    monkeypatch.setattr(ExperimentRunner, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        run("small: network.prototypes=16")
    assert fitted == [(64, 0), (64, 1), (16, 0)]
    begun = lines(tmp_path)
    assert [(line["variant"], line["seed"]) for line in begun] == [("full", 0), ("full", 1)]
    assert [row["n"] for row in json.loads((tmp_path / "table.json").read_text("utf-8"))["rows"]] == [2, 0]
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write(json.dumps(begun[0] | {"digest": "killed"})[:-3])
    _, reports = run("small: network.prototypes=16")
    assert fitted[3:] == [(16, 0), (16, 1)] and reports == [(0, 2), (1, 2), (2, 2)]
    assert len(lines(tmp_path)) == 4 and lines(tmp_path)[:2] == begun
    records, reports = run("another name: network.prototypes=16", "as it is:")
    assert len(fitted) == 5 and reports == [(0, 0)]
    assert [record.digest for record in records[2:]] == [line["digest"] for line in lines(tmp_path)[2:]] + [
        line["digest"] for line in begun
    ]


def test_variants_that_come_to_the_same_are_run_once(run, tmp_path):
    records, _ = run("same:", seeds=1)
    assert len(records) == 2 and len(lines(tmp_path)) == 1


def test_a_log_of_an_earlier_version_goes_on(run, tmp_path, here):
    """Of `ablate`, when it had records of its own, and of `benchmark` without variants."""
    run("small: network.prototypes=16", seeds=1)
    ablation, benchmark = lines(tmp_path)
    for name in ("size", "settings", "memory", "file", "latency", "shared"):
        del ablation[name]
    ablation |= {"common": {"features.grid": 8}, "seconds": {"training": 2.0, "evaluation": 1.0}}
    del benchmark["variant"], benchmark["overrides"]
    (tmp_path / "runs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in (ablation, benchmark)))
    (record, _), reports = run("small: network.prototypes=16", seeds=1)
    assert reports == [(0, 0)] and len(here) == 2 and record.metrics == ablation["metrics"]


def test_a_log_with_other_lines_is_named(run, tmp_path):
    run(seeds=1)
    whole = (tmp_path / "runs.jsonl").read_text()
    for wrong in ("{}\n", "\n", whole[: len(whole) // 2] + "\n", whole.replace('"metrics":{', '"metrics":{"x":"y",')):
        (tmp_path / "runs.jsonl").write_text(whole + wrong + whole)
        with pytest.raises(ValueError, match=r"runs\.jsonl, line 2: .*delete the line"):
            run(seeds=1)


def test_places_that_cannot_be_written_are_named(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file/runs\.jsonl: .*another folder"):
        run(out=tmp_path / "file")
    (tmp_path / "out/runs.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"out/runs\.jsonl: .*another folder"):
        run(out=tmp_path / "out")
    (record, *_), _ = run(seeds=1)
    log = Log(tmp_path / "new/runs.jsonl", Record)
    (tmp_path / "new/runs.jsonl").unlink()
    (tmp_path / "new").rmdir()
    with pytest.raises(ValueError, match=r"new/runs\.jsonl: cannot be written"):
        log.append(record)


# What is wrong is said before the first run


def test_all_variants_are_checked_before_the_first_run(run, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(ExperimentRunner, "fit", lambda *_, **__: pytest.fail("a run has started"))
    with pytest.raises(ValueError, match=r"variant 'odd'.*network\.k"):
        run("odd: method=mfrnet; network.k=[9]")
    with pytest.raises(ValueError, match=r"variant 'odd'.*prototypes"):
        run("odd: network.prototypes=-1")
    with pytest.raises(RuntimeError, match=r"variant 'odd'.*levels"):
        run("odd: features.levels=[17]")
    with pytest.raises(RuntimeError, match=r"nowhere\.safetensors"):
        run(weights=tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="parts: there are no test images"):
        run(data=[replace(dataset, test=())])
    with pytest.raises(ValueError, match="parts: there are no good training images"):
        run(data=[replace(dataset, train=())])


def test_a_run_that_fails_is_named_and_ends_no_other(dataset, features, tmp_path, here, monkeypatch):
    def run(run, out, progress):
        try:
            return measure(run, out, progress)
        except Exception as error:
            raise TaskError(f"{type(error).__name__}: {error}") from error

    monkeypatch.setattr(module, "_in_own_process", run)
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    broken = replace(dataset, train=(replace(dataset.train[0], path=empty),), name="broken")
    data = [broken, dataset]
    grid = Grid(methods=["nearest_neighbor"], data=[Path("parts")], backbones=["=random"], seeds=1, settings=COMMON)
    records, failed = run_experiment(plan(grid, data), tmp_path, lambda *_: None)
    assert [record.data for record in records] == ["parts"]
    ((name, reason),) = failed.items()
    assert name == "broken, nearest_neighbor, test_efficientnet, 64 pixels, seed 0"
    assert reason.startswith("TrainingError: 0 good images") and "empty.png" in reason


# What an ablation says


def test_the_paired_difference_is_that_of_the_log(run, tmp_path):
    run("few: network.prototypes=8", seeds=2)
    found = {(line["variant"], line["seed"]): line["metrics"] for line in lines(tmp_path)}
    full, few = json.loads((tmp_path / "table.json").read_text("utf-8"))["rows"]
    assert (full["variant"], few["variant"], few["n"], few["overrides"]) == ("full", "few", 2, "network.prototypes=8")
    differs = False
    for name in METRICS:
        values = [found["few", seed][name] for seed in (0, 1)]
        if values[0] is None:
            assert few[name]["mean"] is None
            continue
        by_hand = ((values[0] - found["full", 0][name]) + (values[1] - found["full", 1][name])) / 2
        assert few[name]["difference"] == pytest.approx(by_hand, abs=1e-12)
        assert few[name]["mean"] == pytest.approx(fmean(values))
        assert few[name]["deviation"] == pytest.approx(stdev(values))
        differs |= abs(by_hand) > 1e-4
    assert differs
    page = (tmp_path / "table.md").read_text("utf-8")
    mean, deviation = few["aupro_30"]["mean"], few["aupro_30"]["deviation"]
    assert f" ± {deviation:.3f}".replace("0.", ".") in page and f"{mean:.3f}"[1:] in page


def test_an_ablation_and_a_benchmark_of_the_same_grid_give_the_same(parts, tmp_path, here):
    words = [f"--set={name}={json.dumps(value)}" for name, value in COMMON.items()]
    words += [
        "--method",
        "nearest_neighbor",
        "--data",
        str(parts),
        "--seeds",
        "2",
        "--variant",
        "few: network.prototypes=8",
    ]

    def tables(*command):
        done = CliRunner().invoke(app, [*command, *words, "--out", str(tmp_path / command[0])])
        assert done.exit_code == 0, done.output
        folder = tmp_path / command[0]
        rows = json.loads((folder / "table.json").read_text("utf-8"))["rows"]
        return [(line["digest"], line["metrics"]) for line in lines(folder)], [
            {name: value for name, value in row.items() if name not in ("training", "file")} for row in rows
        ]

    benchmark = tables("benchmark", "--backbone", "test_efficientnet=random", "--features", str(tmp_path / "features"))
    assert tables("ablate", "--weights", "random", "--only", "full") == benchmark
    assert len(benchmark[0]) == 4 and len(here) == 8
