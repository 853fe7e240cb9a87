import csv
import math
import sys
from itertools import pairwise

import numpy as np
import pytest

from unflaw.config import make_config
from unflaw.datasets import Dataset
from unflaw.datasets.public import COLLECTIONS
from unflaw.evaluation.bootstrap import PerImage
from unflaw.evaluation.results import METRICS
from unflaw.experiments.grid import Run
from unflaw.experiments.page import page, plot
from unflaw.experiments.records import KEPT, Record, images_file
from unflaw.experiments.run import write_tables
from unflaw.experiments.tables import (
    COSTS,
    KEYS,
    bootstrap,
    by_run,
    comma_separated,
    describe,
    differences,
    latex,
    markdown,
    markdown_table,
    markdown_text,
    nested,
    preamble,
    sections,
    summarize,
)
from unflaw.experiments.variants import FULL, parse


def made(data="screw", method="uranet", backbone="resnet18", seed=0, auroc=0.9, variant=FULL, pixel=0.95, **changes):
    """A run and its record, as far as tables look at them."""
    config = make_config(method, "cpu", {"training.seed": seed} | ({"features.backbone": backbone} if backbone else {}))
    digest = f"{data}-{method}-{variant.name}-{backbone}-{seed}".ljust(64, "0")
    dataset = Dataset(data, "mvtec", (), (), (), ())
    run = Run(dataset, method, variant, backbone, 256, config, None, "", digest)
    metrics = dict.fromkeys(KEPT) | {"image_auroc": auroc, "pixel_auroc": pixel, "aupro_30": 0.8}
    record = Record(
        digest=digest,
        data=data,
        method=method,
        variant=variant.name,
        backbone=run.backbone,
        size=256,
        seed=seed,
        weights="w",
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


def of(pairs):
    """Runs, and records by digest."""
    return [run for run, _ in pairs], {record.digest: record for _, record in pairs if record}


def tabulate(pairs):
    return nested(summarize(by_run(*of(pairs))))


# Figures


def test_rows_are_medians_over_seeds_and_means_over_data_sets():
    pairs = [
        made(data, seed=seed, auroc=a)
        for data, values in (("screw", (0.9, 0.92, 0.99)), ("nut", (0.8,)))
        for seed, a in enumerate(values)
    ]
    screw, _, mean = tabulate(pairs)
    assert screw["image_auroc"]["median"] == 0.92 and screw["n"] == 3 and screw["training"]["median"] == 101
    assert (mean["data"], mean["n"]) == ("", 2) and mean["image_auroc"]["median"] == pytest.approx((0.92 + 0.8) / 2)
    assert mean["image_auroc"]["deviation"] is None
    assert screw["memory"]["median"] == 2.0 and screw["latency_1"]["median"] == pytest.approx(80)
    pairs[-1] = pairs[-1][0], None  # without nut there is no mean to compare
    assert [row["data"] for row in tabulate(pairs)] == ["screw", "nut"]


@pytest.fixture
def varied():
    """Three variants: one with three seeds, one with one, one that has not run."""
    less = parse("less: training.steps=1; features.levels=[1, 2]", "why")
    full = [
        made(seed=seed, auroc=a, pixel=0.5 + a / 2, seconds={"training": 10.0 * seed})
        for seed, a in enumerate((0.9, 0.96, 1.0))
    ]
    one = made(seed=1, auroc=0.95, pixel=1.0, variant=less, seconds={"training": 2.5})
    none = [(made(seed=seed, variant=variant)[0], None) for seed, variant in ((0, less), (0, parse("none:")))]
    return [*full, none[0], one, none[1]]


def test_a_row_has_mean_deviation_median_and_the_paired_difference(varied):
    full, less, none = tabulate(varied)
    assert [(row["data"], row["variant"], row["n"]) for row in (full, less, none)] == [
        ("screw", "full", 3),
        ("screw", "less", 1),
        ("screw", "none", 0),
    ]
    mean, deviation = 2.86 / 3, math.sqrt(((0.9 - 2.86 / 3) ** 2 + (0.96 - 2.86 / 3) ** 2 + (1 - 2.86 / 3) ** 2) / 2)
    nothing = {"mean": None, "deviation": None, "median": None}
    unknown = {"low": None, "high": None}  # without images
    expected = {"mean": mean, "deviation": deviation, "median": 0.96, "difference": 0} | unknown
    assert full["image_auroc"] == pytest.approx(expected)
    assert full["training"] == {"mean": 10.0, "deviation": 10.0, "median": 10.0}
    expected = {"mean": 0.95, "deviation": None, "median": 0.95, "difference": -0.01}  # from .96, of the same seed
    assert less["image_auroc"] == pytest.approx(expected | unknown)
    assert less["overrides"] == "training.steps=1; features.levels=[1, 2]" and less["why"] == "why"
    assert full["aupimo"] == nothing | {"difference": None} and none["image_auroc"] == full["aupimo"] | unknown
    assert none["training"] == nothing


def test_runs_of_equal_settings_share_a_record():
    run, record = made(seed=0)
    other = made(seed=0, variant=parse("same:"))[0]
    rows = nested(summarize(by_run([run, Run(**vars(other) | {"digest": run.digest})], {run.digest: record})))
    assert [(row["variant"], row["n"], row["image_auroc"]["median"]) for row in rows] == [
        ("full", 1, 0.9),
        ("same", 1, 0.9),
    ]


def test_intervals_and_differences_are_those_of_the_images(tmp_path):
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 60)
    noise = rng.standard_normal(120)
    pairs = [made(method=method) for method in ("uranet", "nearest_neighbor")] + [made(method="memae", backbone="")]
    pairs.insert(1, made(variant=parse("less:")))
    for (run, _), shift in zip(pairs, (2.0, 1.5, 1.9, 0.5), strict=True):
        names = [f"{i}.png" for i in range(120)]
        PerImage(names, labels, noise + shift * labels, None).save(images_file(tmp_path, run.digest))
    samples = bootstrap(*of(pairs), tmp_path)
    first, *_ = nested(summarize(by_run(*of(pairs)), samples))
    bounds = first["image_auroc"]
    assert bounds["low"] < bounds["high"] and first["pixel_auroc"]["low"] is None
    found = differences(samples)
    # memae has no backbone: it differs from the others in two things, and is not compared; nor is less with another
    assert [(d["a"], d["b"]) for d in found] == [
        ("uranet, less, resnet18", "uranet, resnet18"),
        ("uranet, resnet18", "nearest_neighbor, resnet18"),
    ]
    variant, method = (pair["image_auroc"] for pair in found)
    assert variant["difference"] < 0 and variant["high"] < 0 and variant["certain"]
    # the same images: the difference is far surer than either figure
    assert method["low"] < method["difference"] < method["high"]
    assert method["high"] - method["low"] < 0.3 * (bounds["high"] - bounds["low"])


# Text


def test_text_tables():
    pairs = [made(), made("magnetic_tile"), made(method="memae", backbone=""), made("magnetic_tile", "memae", "")]
    table, about = summarize(by_run(*of(pairs))), preamble(describe(*of(pairs)))
    first = table.index.to_frame()["data"].eq("screw") & table.index.to_frame()["method"].eq("uranet")
    table["image_auroc", "low"], table["image_auroc", "high"] = (first.map({True: x}) for x in (0.85, 0.95))
    text = markdown(sections(table, []), about)
    assert "| uranet | resnet18 | 256 | .900 [.850, .950] |" in text and "## Mean over 2 data sets" in text
    assert "AUPIMO" not in text and "variant" not in text and "changed" not in text
    lines = latex(table).splitlines()
    assert lines[2] == r"method & backbone & size & screw & magnetic\_tile & mean \\"
    assert lines[4] == r"uranet & resnet18 & 256 & 90.0 / 95.0 / 80.0 & 90.0 / 95.0 / 80.0 & 90.0 / 95.0 / 80.0 \\"
    assert lines[5].startswith("memae & -- & 256")
    shown = page(sections(table, []), about)
    assert "[.850, .950]" in shown and "magnetic_tile" in shown and "<script>" in shown


def test_markdown_shows_differences_from_full(varied):
    about = describe(*of(varied))
    assert (about["runs"], about["finished"], about["seeds"], about["variants"]) == (6, 4, 3, ["full", "less", "none"])
    other = [(made("other", seed=run.seed, variant=run.variant)[0], record) for run, record in varied[3:]]
    other = [(run, record and record.model_copy(update={"digest": run.digest})) for run, record in other]
    caption, *text = markdown(sections(summarize(by_run(*of(varied + other))), []), preamble(about)).split("\n")
    start = "4 runs, seeds 0 to 2; 2 are not finished. Weights: resnet18: w. m. unflaw 0, torch 0. Metrics: mean ± "
    assert caption.startswith(start)
    heads = "| method | variant | backbone | size | image AUROC | image AP | image F1 max | pixel AUROC | pixel AP "
    heads += (
        "| pixel F1 max | AUPRO | AUPRO 5 % | training s | memory GB | file MB | ms per image | p95 | ms, batch 32 "
    )
    start, costs, changed = "| uranet |", "2.0 | 27 | 80 | 100 | 50", "`training.steps=1; features.levels=[1, 2]`"
    none = f"{start} none | resnet18 | 256 {'| – ' * 14}| 0 |  |"
    less = (
        f"{start} less | resnet18 | 256 | .950 {{}} | – | – | 1.000 {{}} | – | – | .800 {{}} | – | 2 | {costs} | 1 | "
    )
    assert text[: text.index("## Mean over 2 data sets")] == [
        "",
        "## screw",
        "",
        heads + "| n | changed |",
        "|---" * 20 + "|",
        f"{start} full | resnet18 | 256 | .953 ± .050 | – | – | .977 ± .025 | – | – | .800 ± .000 | – | 10 | {costs} "
        "| 3 |  |",
        less.format("(−.010)", "(+.020)", "(+.000)") + changed + " |",
        none,
        "",
        "## other",
        "",
        heads + "| n | changed |",
        "|---" * 20 + "|",
        less.replace(" {}", "") + changed + " |",
        none,
        "",
    ]


def test_a_difference_that_rounds_to_nothing_has_no_sign_of_loss():
    pairs = [made(auroc=0.9), made(auroc=0.9 - 1e-5, variant=parse("less:"))]
    assert ".900 (+.000)" in markdown(sections(summarize(by_run(*of(pairs))), []), "")


def test_csv_has_a_column_for_each_number(varied):
    table = list(csv.DictReader(comma_separated(summarize(by_run(*of(varied))).reset_index()).splitlines()))
    assert [row["variant"] for row in table] == ["full", "less", "none"]
    columns = {f"{name}_{number}" for name in (*METRICS, *COSTS) for number in ("mean", "deviation", "median")}
    columns |= {f"{name}_difference" for name in METRICS}
    columns |= {f"{name}_{bound}" for name in ("image_auroc", "pixel_auroc", "aupro_30") for bound in ("low", "high")}
    assert table[0].keys() == columns | {*KEYS, "overrides", "why", "n"}
    assert float(table[0]["image_auroc_median"]) == 0.96 and float(table[1]["pixel_auroc_mean"]) == 1
    assert table[1]["image_auroc_deviation"] == table[0]["aupimo_mean"] == table[2]["training_mean"] == ""
    assert [row["n"] for row in table] == ["3", "1", "0"]


def test_the_plot_keeps_its_points_inside():
    drawn = plot(summarize(by_run(*of([made(auroc=1.0), made("nut", auroc=0.5)]))))
    assert all(56 <= x <= 700 and 10 <= y <= 316 for _, x, y, *_ in drawn["points"])
    heights = {auroc: y for _, _, y, _, auroc, _ in drawn["points"]}
    assert heights[1.0] < heights[0.75] < heights[0.5] and len(drawn["up"]) > 2


def test_labels_of_the_plot_do_not_lie_on_each_other():
    drawn = plot(summarize(by_run(*of([made(method=method) for method in ("uranet", "nearest_neighbor", "mfrnet")]))))
    labels = sorted(label for *_, label in drawn["points"])
    assert len(labels) == 3 and min(b - a for a, b in pairwise(labels)) >= 12


def test_published_figures_stand_only_beside_all_of_mvtec_ad():
    pairs = [made(name) for name in COLLECTIONS[0].counts]
    parts, fewer = (sections(summarize(by_run(*of(some))), []) for some in (pairs, pairs[1:]))
    assert "| PaDiM, ResNet-18 | .891 | .968 | – | anomalib" in markdown(parts, "") and "PaDiM" in page(parts, "")
    assert "PaDiM" not in markdown(fewer, "")


@pytest.mark.parametrize("missing, remedy", [("pandas", "unflaw[train]"), ("jinja2", "unflaw[report]")])
def test_what_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch, missing, remedy):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"(?i){missing}.*pip install '{remedy}'".replace("[", r"\[")):
        write_tables(tmp_path, *of([made()]))
    assert not list(tmp_path.iterdir())


def test_names_cannot_break_a_table():
    import pandas as pd

    name = "Teile Ü|x <b>a&b_50%"
    assert markdown_text(f"{name}\n") == "Teile Ü\\|x &lt;b>a&b_50%"
    (head, _, row) = markdown_table(pd.DataFrame([[name, "1"]], columns=["data", "n"])).splitlines()
    assert head == "| data | n |" and row.replace("\\|", "").count("|") == 3
