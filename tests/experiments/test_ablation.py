import csv
import json
import math
from dataclasses import replace

import pytest
from tests.conftest import OWN, TINY, make_parts

from unflaw.config import Weights, make_config
from unflaw.datasets import load_dataset
from unflaw.errors import TrainingError
from unflaw.evaluation.evaluate import evaluate
from unflaw.experiments.ablation import METRICS, Record, Run, ablate, markdown, tabulate
from unflaw.experiments.feature_store import ExperimentRunner
from unflaw.experiments.run_log import Log
from unflaw.experiments.tables import comma_separated
from unflaw.experiments.variants import FULL, choose, parse

SMALL = TINY | {"features.backbone": "test_efficientnet", "training.steps": 2}
COMMON = SMALL | OWN["nearest_neighbor"]


@pytest.fixture(scope="module")
def dataset(parts):
    return load_dataset(parts)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def run(dataset, features, tmp_path):
    """`run(*variants, …)`: an ablation of `nearest_neighbor` into tmp_path, and what it reported."""

    def run(*variants, data=None, seeds=2, method="nearest_neighbor", common=COMMON, out=tmp_path, **options):
        reports = []
        options = {"cache": features, "weights": Weights.RANDOM} | options
        variants = choose(method, ["full"], variants)
        options["progress"] = lambda *report: reports.append(report[1:3]) if report[0] == "runs" else None
        records = ablate(method, data or [dataset], variants, common, seeds=seeds, out=out, **options)
        return records, reports

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


# A whole ablation


def test_an_ablation_runs_every_variant_and_seed(run, dataset, features, tmp_path):
    records, reports = run("small: network.prototypes=16", "pixels: method=memae; network.widths=[8, 8]")
    assert [(r.variant, r.seed, r.method) for r in records] == [
        (name, seed, "memae" if name == "pixels" else "nearest_neighbor")
        for name in ("full", "small", "pixels")
        for seed in (0, 1)
    ]
    assert reports == [(i, 6) for i in range(7)]
    assert lines(tmp_path) == [record.model_dump(mode="json") for record in records]
    config = make_config("nearest_neighbor", "cpu", COMMON | {"network.prototypes": 16, "training.seed": 1})
    expected = evaluate(ExperimentRunner(features, Weights.RANDOM).fit(config, dataset), dataset).metrics
    assert records[3].metrics == {name: expected[name] for name in records[3].metrics}
    assert {*METRICS, "false_alarms", "missed"} < records[3].metrics.keys()
    assert records[3].overrides == "network.prototypes=16" and records[3].common["features.grid"] == 8
    assert (records[3].backbone, records[3].weights, records[3].data) == ("test_efficientnet", "random", "parts")
    assert len({record.digest for record in records}) == 6
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))["rows"]
    assert [(row["variant"], row["n"]) for row in rows] == [("full", 2), ("small", 2), ("pixels", 2)]
    found = [record.metrics["pixel_auroc"] for record in records[2:4]]
    assert rows[1]["pixel_auroc"]["mean"] == pytest.approx(sum(found) / 2)
    page = (tmp_path / "table.md").read_text("utf-8")
    assert "`nearest_neighbor`, test_efficientnet (random weights), 64 × 64" in page
    assert "seeds 0 to 1" in page and "1 thread," in page
    assert page.count("\n| ") == 4 and "| small |" in page and "`network.prototypes=16`" in page
    table = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert float(table[1]["pixel_auroc_mean"]) == rows[1]["pixel_auroc"]["mean"] and table[2]["n"] == "2"


@pytest.mark.parametrize("name", ["no-fasm", "no-memory", "no-uncertainty", "untrained", "nearest_neighbor", "level-1"])
def test_variants_that_leave_parts_out_can_be_trained(dataset, features, tmp_path, name):
    common = SMALL | OWN["uranet"]
    options = {"seeds": 1, "out": tmp_path, "cache": features, "weights": Weights.RANDOM, "progress": lambda *_: None}
    for record in ablate("uranet", [dataset], choose("uranet", [name])[1:], common, **options):
        assert record.variant == name and record.metrics["image_auroc"] is not None


def test_without_masks_there_are_no_pixel_figures(run, dataset, tmp_path):
    data = [dataset, replace(dataset, name="blind", test=tuple(replace(s, mask=None) for s in dataset.test))]
    records, _ = run(data=data, seeds=1)
    assert records[1].metrics["pixel_auroc"] is None and records[1].metrics["image_auroc"] is not None
    page = (tmp_path / "table.md").read_text("utf-8")
    assert page.index("## parts") < page.index("## blind")
    assert page[page.index("## blind") :].count("| – | – | – |") == 1
    assert "–" not in page[page.index("## parts") : page.index("## blind")]


def test_images_that_cannot_be_read_are_named(run, tmp_path):
    make_parts(tmp_path / "parts")
    broken = [tmp_path / "parts" / name for name in ("train/good/003.png", "test/good/001.png")]
    for path in broken:
        path.write_bytes(b"no image")
    (record,), _ = run(data=[load_dataset(tmp_path / "parts")], seeds=1, cache=tmp_path / "features")
    assert record.skipped.keys() == {str(path) for path in broken} and record.metrics["n_images"] == 7
    assert all(path in reason for path, reason in record.skipped.items())


# Going on


def test_finished_runs_are_not_done_again(run, tmp_path, monkeypatch):
    fit, fitted = ExperimentRunner.fit, []

    def counted(self, config, *arguments, **options):
        fitted.append((config.network.prototypes, config.training.seed))
        if len(fitted) == 3:
            raise KeyboardInterrupt
        detector = fit(self, config, *arguments, **options)
        detector.record_["seconds"] = {"features": 5.0, "training": 2.0, "total": 7.0}
        return detector

    monkeypatch.setattr(ExperimentRunner, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        run("small: network.prototypes=16")
    assert fitted == [(64, 0), (64, 1), (16, 0)]
    begun = lines(tmp_path)
    assert [line["seconds"]["training"] for line in begun] == [2, 2]
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
    log = Log(tmp_path / "new/runs.jsonl", Record)
    (tmp_path / "new/runs.jsonl").unlink()
    (tmp_path / "new").rmdir()
    with pytest.raises(ValueError, match=r"new/runs\.jsonl: cannot be written"):
        log.append(record(0.5))


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


def test_a_run_that_fails_is_named(run, dataset):
    with pytest.raises(TrainingError, match=r"parts, variant 'full', seed 0: 5 good images.*goes on"):
        run(data=[replace(dataset, train=dataset.train[:5])])


# The table


def record(auroc, *, digest="d", pixel=None, seconds=1.0):
    metrics = dict.fromkeys(METRICS) | {"image_auroc": auroc, "pixel_auroc": pixel}
    words = {name: name for name in ("data", "variant", "method", "backbone", "weights", "overrides")}
    words |= {name: name for name in ("machine", "unflaw", "torch")}
    return Record(**words, digest=digest, seed=0, common={}, metrics=metrics, skipped={}, seconds={"training": seconds})


@pytest.fixture
def rows(dataset):
    """Of a plan of three variants: one with three seeds, one with one, one that has not run."""
    variants = [FULL, parse("less: training.steps=1; features.levels=[1, 2]", "why"), parse("none:")]
    configs = [make_config("nearest_neighbor", "cpu", {"training.seed": seed}) for seed in range(3)]
    plan = [Run(dataset, v, config, f"{v.name}{seed}") for v in variants for seed, config in enumerate(configs)]
    records = {f"full{i}": record(a, pixel=0.5 + a / 2, seconds=10.0 * i) for i, a in enumerate((0.9, 0.96, 1.0))}
    return tabulate(plan, records | {"less1": record(0.95, pixel=1.0, seconds=2.5)})


def test_a_row_has_mean_deviation_and_median(rows):
    assert [(row["data"], row["variant"], row["n"]) for row in rows] == [
        ("parts", "full", 3),
        ("parts", "less", 1),
        ("parts", "none", 0),
    ]
    mean, deviation = 2.86 / 3, math.sqrt(((0.9 - 2.86 / 3) ** 2 + (0.96 - 2.86 / 3) ** 2 + (1 - 2.86 / 3) ** 2) / 2)
    nothing = {"mean": None, "deviation": None, "median": None}
    full = {"mean": mean, "deviation": deviation, "median": 0.96, "difference": 0.0}
    assert rows[0]["image_auroc"] == pytest.approx(full)
    assert rows[0]["seconds"] == {"mean": 10.0, "deviation": 10.0, "median": 10.0}
    less = {"mean": 0.95, "deviation": None, "median": 0.95, "difference": -0.01}  # from .96, of the same seed
    assert rows[1]["image_auroc"] == pytest.approx(less)
    assert rows[1]["overrides"] == "training.steps=1; features.levels=[1, 2]" and rows[1]["why"] == "why"
    assert rows[0]["aupro_30"] == rows[2]["image_auroc"] == nothing | {"difference": None}
    assert rows[2]["seconds"] == nothing


def test_markdown_shows_differences_from_full(rows):
    made = {
        "method": "nearest_neighbor",
        "backbone": "b",
        "weights": ["w"],
        "size": 256,
        "seeds": 3,
        "machines": ["m, 2 threads"],
    }
    common = {"features.backbone": "b", "training.steps": 4}
    other = [row | {"data": "other"} for row in rows[1:]]
    caption, *text = markdown(rows + other, made | {"unflaw": "9", "common": common}).split("\n")
    assert caption.startswith(
        "`nearest_neighbor`, b (w weights), 256 × 256, `training.steps=4`, seeds 0 to 2, m, 2 threads, unflaw 9. "
    )
    assert text == [
        "",
        "## parts",
        "",
        "| variant | image AUROC | image AP | pixel AUROC | AUPRO | pixel AP | seconds | n | changed |",
        "|---|---|---|---|---|---|---|---|---|",
        "| full | .953 ± .050 | – | .977 ± .025 | – | – | 10.0 ± 10.0 | 3 |  |",
        "| less | .950 (−.010) | – | 1.000 (+.020) | – | – | 2.5 | 1 | `training.steps=1; features.levels=[1, 2]` |",
        "| none | – | – | – | – | – | – | 0 |  |",
        "",
        "## other",
        "",
        "| variant | image AUROC | image AP | pixel AUROC | AUPRO | pixel AP | seconds | n | changed |",
        "|---|---|---|---|---|---|---|---|---|",
        "| less | .950 (−.010) | – | 1.000 (+.020) | – | – | 2.5 | 1 | `training.steps=1; features.levels=[1, 2]` |",
        "| none | – | – | – | – | – | – | 0 |  |",
        "",
    ]


def test_a_difference_that_rounds_to_nothing_has_no_sign_of_loss(rows):
    less = rows[1] | {"image_auroc": rows[0]["image_auroc"] | {"deviation": None, "difference": -1e-5}}
    made = {
        "method": "nearest_neighbor",
        "backbone": "b",
        "weights": [],
        "size": 1,
        "seeds": 1,
        "machines": [],
        "unflaw": "9",
    }
    assert ".953 (+.000)" in markdown([rows[0], less], made | {"common": {}})


def test_csv_has_a_column_for_each_number(rows):
    table = list(csv.DictReader(comma_separated(rows).splitlines()))
    assert [row["variant"] for row in table] == ["full", "less", "none"]
    columns = {f"{name}_{number}" for name in (*METRICS, "seconds") for number in ("mean", "deviation", "median")}
    columns |= {f"{name}_difference" for name in METRICS}
    assert table[0].keys() == columns | {"data", "variant", "overrides", "why", "n"}
    assert float(table[0]["image_auroc_median"]) == 0.96 and float(table[1]["pixel_auroc_mean"]) == 1
    assert table[1]["image_auroc_deviation"] == table[0]["aupro_30_mean"] == table[2]["seconds_mean"] == ""
