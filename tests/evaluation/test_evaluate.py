import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import Dataset, Sample, load_dataset
from unflaw.detector import Detector
from unflaw.errors import TrainingError
from unflaw.evaluation import evaluate as module
from unflaw.evaluation.evaluate import evaluate
from unflaw.evaluation.results import Evaluation
from unflaw.evaluation.text import lines
from unflaw.imaging.reading import read_mask
from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import prepare_mask

IMAGE = ("image_auroc", "image_ap", "image_f1_max")
PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_30", "aupro_05")


@pytest.fixture(scope="module")
def dataset(parts) -> Dataset:
    """The generated one, with one good image called defective and one defective called good: mistakes to find."""
    found = load_dataset(parts)
    test = list(found.test)
    good = next(i for i, s in enumerate(test) if s.label == 0)
    bad = next(i for i, s in enumerate(test) if s.label == 1)
    test[good] = replace(test[good], label=1, defect="invisible")
    test[bad] = Sample(test[bad].path, 0)
    return replace(found, test=tuple(test))


@pytest.fixture(scope="module")
def evaluated(detector, dataset) -> Evaluation:
    return evaluate(detector, dataset)


def f1_max(labels, scores) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def test_the_record_has_every_metric_and_is_json(evaluated, detector):
    metrics = json.loads(json.dumps(evaluated.metrics, allow_nan=False))
    assert {*IMAGE, *PIXEL, "per_defect", "n_images", "timing", "config"} <= metrics.keys()
    assert (metrics["n_images"], metrics["n_good"], metrics["dataset"]) == (8, 4, "parts")
    assert metrics["config"] == detector.config.model_dump(mode="json")
    assert metrics["timing"]["seconds_per_image"] > 0
    calibration = detector.calibration_
    assert metrics["threshold"] == calibration.threshold
    assert metrics["calibration"] == calibration.describe()
    numbers = metrics["calibration_numbers"]
    assert (numbers["asked_rate"], numbers["rate"]) == (0.01, 1 / (len(calibration.scores) + 1))
    assert (numbers["n"], numbers["certified"]) == (len(calibration.scores), False)
    for name in (*IMAGE, *PIXEL):
        assert 0 <= metrics[name] <= 1


def test_rows_are_the_inspections_in_order(evaluated, detector, dataset):
    assert [row["path"] for row in evaluated.rows] == [str(sample.path) for sample in dataset.test]
    for row, sample in zip(evaluated.rows, dataset.test, strict=True):
        result = detector.inspect(sample.path)
        assert (row["label"], row["defect"]) == (sample.label, sample.defect)
        assert (row["p_value"], row["verdict"]) == (result.p_value, result.verdict)
        assert row["score"] == pytest.approx(result.score, rel=1e-5)


def test_image_metrics_are_those_of_scikit_learn(evaluated):
    labels, scores = ([row[name] for row in evaluated.rows] for name in ("label", "score"))
    metrics = evaluated.metrics
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert 0 < metrics["image_auroc"] < 1  # the mistakes see to it
    assert metrics["image_ap"] == pytest.approx(average_precision_score(labels, scores))
    assert metrics["image_f1_max"] == pytest.approx(f1_max(labels, scores))


def pixels(detector, samples) -> tuple[np.ndarray, np.ndarray]:
    maps, masks = [], []
    for sample in samples:
        if sample.label and not sample.mask:
            continue  # defective, but nobody knows where
        maps.append(detector.inspect(sample.path).map)
        empty = np.zeros_like(maps[-1], dtype=bool)
        masks.append(prepare_mask(read_mask(sample.mask), Preparation(size=64)) if sample.label else empty)
    return np.stack(masks).ravel(), np.stack(maps).ravel()


def test_pixel_metrics_are_those_of_scikit_learn(evaluated, detector, dataset):
    masks, maps = pixels(detector, dataset.test)
    assert evaluated.metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks, maps), abs=1e-4)
    assert evaluated.metrics["pixel_ap"] == pytest.approx(average_precision_score(masks, maps), abs=1e-3)
    assert evaluated.metrics["pixel_f1_max"] == pytest.approx(f1_max(masks, maps), abs=1e-3)


def test_each_defect_is_measured_against_all_good_images(evaluated, detector, dataset):
    table = evaluated.metrics["per_defect"]
    assert table.keys() == {"invisible", "square"}
    good = [row["score"] for row in evaluated.rows if not row["label"]]
    for defect, entry in table.items():
        rows = [row for row in evaluated.rows if row["defect"] == defect]
        labels = [0] * len(good) + [1] * len(rows)
        assert entry["n_images"] == len(rows)
        assert entry["found"] == sum(row["verdict"] == "defect" for row in rows)
        assert entry["image_auroc"] == pytest.approx(roc_auc_score(labels, good + [row["score"] for row in rows]))
    squares = [sample for sample in dataset.test if sample.defect == "square"]
    assert table["square"]["pixel_auroc"] == pytest.approx(roc_auc_score(*pixels(detector, squares)), abs=1e-4)
    assert table["invisible"]["pixel_auroc"] is None


def test_verdicts_are_counted(evaluated):
    rows = evaluated.rows
    alarms = [row for row in rows if row["verdict"] == "defect" and not row["label"]]
    missed = [row for row in rows if row["verdict"] == "good" and row["label"]]
    assert (evaluated.metrics["false_alarms"], evaluated.metrics["missed"]) == (len(alarms), len(missed))
    review = [row["label"] for row in rows if row["verdict"] == "review"]
    assert evaluated.metrics["review_good"] + evaluated.metrics["review_defective"] == len(review)
    assert evaluated.metrics["review_defective"] == sum(review)
    assert alarms  # a bright square that was called good


def mistaken(item) -> bool:
    return item.result.verdict == ("good" if item.label else "defect")  # review is no mistake


def test_regions_are_those_of_the_inspections(evaluated, detector, dataset):
    good = [detector.inspect(sample.path).regions for sample in dataset.test if not sample.label]
    metrics = evaluated.metrics
    assert metrics["false_regions"] == np.mean([len(regions) for regions in good])
    assert metrics["good_with_regions"] == np.mean([bool(regions) for regions in good])
    squares = [sample for sample in dataset.test if sample.mask and sample.label]
    assert metrics["regions_true"] == len(squares) and metrics["region_recall"] == metrics["regions_found"] / len(
        squares
    )
    areas = metrics["risk"]["areas"]
    assert 0 <= areas["ideal"] <= areas["p_value"] <= 2 * areas["random"]


def test_mistakes_are_shown_first(evaluated, dataset):
    wrong = [mistaken(item) for item in evaluated.shown]
    assert len(evaluated.shown) == len(dataset.test)  # few enough to show all
    assert wrong == sorted(wrong, reverse=True)
    assert sum(wrong) == evaluated.metrics["false_alarms"] + evaluated.metrics["missed"]
    for item in evaluated.shown:
        assert (item.mask is not None) == (item.label == 1 and item.defect == "square")


def test_what_is_shown_is_bounded(monkeypatch, detector, dataset, evaluated):
    monkeypatch.setattr(module, "SHOWN", 4)
    shown = evaluate(detector, dataset).shown
    wrong = [mistaken(item) for item in shown]
    assert 0 < len(shown) <= 4
    assert wrong == sorted(wrong, reverse=True) and wrong[0]
    assert {item.result.path for item in shown} <= {row["path"] for row in evaluated.rows}


def test_curves_go_from_end_to_end(evaluated):
    assert evaluated.curves.keys() == {"roc", "pr", "pro", "risk", "risk_uncertainty"}
    fpr, tpr = evaluated.curves["roc"]
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(evaluated.metrics["image_auroc"])
    for x, y in evaluated.curves.values():
        assert len(x) == len(y) > 1 and np.isfinite(x).all() and np.isfinite(y).all()


def test_without_masks_there_are_no_pixel_metrics(detector, dataset, evaluated):
    bare = replace(dataset, test=tuple(replace(sample, mask=None) for sample in dataset.test))
    found = evaluate(detector, bare)
    assert all(found.metrics[name] is None for name in PIXEL)
    assert all(found.metrics[name] == pytest.approx(evaluated.metrics[name]) for name in IMAGE)
    assert "pro" not in found.curves
    assert all(entry["pixel_auroc"] is None for entry in found.metrics["per_defect"].values())
    json.dumps(found.metrics, allow_nan=False)


def test_padding_takes_no_part(parts, weights, tiny, tmp_path):
    for path in parts.rglob("*.png"):
        flat = tmp_path / path.relative_to(parts)
        flat.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((64, 32), Image.Resampling.NEAREST).save(flat)
    flat_dataset = load_dataset(tmp_path)
    config = tiny("nearest_neighbor", **{"preparation.fit": "pad", "training.display_steps": 0})
    detector = Detector(config=config, weights=weights).fit(flat_dataset)
    found = evaluate(detector, flat_dataset)
    maps = [detector.inspect(sample.path).map[16:48] for sample in flat_dataset.test]
    masks = [read_mask(s.mask) if s.mask else np.zeros((32, 64), bool) for s in flat_dataset.test]
    expected = roc_auc_score(np.stack(masks).ravel(), np.stack(maps).ravel())
    assert found.metrics["pixel_auroc"] == pytest.approx(expected, abs=1e-4)


def test_masks_that_fit_nothing_or_are_inverted_are_said_before_the_figures(parts, saved, tmp_path):
    root = tmp_path / "parts"
    shutil.copytree(parts, root)
    asked = ["evaluate", str(saved), "--data", str(root)]
    whole = CliRunner().invoke(app, asked)
    for path in (root / "ground_truth/square").iterdir():
        ImageOps.invert(Image.open(path)).save(path)
    wrong = CliRunner().invoke(app, asked)
    for path in (root / "ground_truth/square").iterdir():
        path.rename(path.with_name(path.name.replace("_mask", "_gt")))
    none = CliRunner().invoke(app, asked)
    assert "note" not in whole.output and "pixel_auroc –" not in whole.output
    note, _, figures = wrong.output.partition("image_auroc")
    assert note.startswith("note: Masks that mark more than half") and "square (4 of 4 masks, such as" in note
    assert "pixel_auroc –" not in figures and "note" not in figures  # measured as they are
    note, _, figures = none.output.partition("image_auroc")
    assert (
        note.startswith("note: Mask files that fit no image: ground_truth/square/000_gt.png, ") and "(4 in all)" in note
    )
    assert "ground_truth/square/000_mask.* or ground_truth/square/000.*" in note and "pixel_auroc –" in figures


def test_nouns_agree_with_their_numbers(evaluated):
    ones = dict.fromkeys(("n_images", "n_good", "false_alarms", "missed", "review_good", "review_defective"), 1)
    ones |= {"regions_found": 1, "regions_true": 1, "region_recall": 1.0, "n_images": 2}
    text = lines(evaluated.metrics | ones)
    assert "2 images: 1 false alarm among 1 good one, 1 missed of 1 defective one, for review 1 good and 1 def" in text
    assert "1 of 1 true region is touched by one" in text
    assert "2 of 3 true regions are touched by one" in lines(
        evaluated.metrics | {"regions_found": 2, "regions_true": 3}
    )


@pytest.mark.parametrize("label", [0, 1])
def test_one_kind_of_image_alone_has_no_ranking(detector, dataset, label):
    kind = replace(dataset, test=tuple(sample for sample in dataset.test if sample.label == label))
    found = evaluate(detector, kind)
    assert found.metrics["image_auroc"] is None
    assert found.metrics["n_images"] == 4 and len(found.shown) == 4
    json.dumps(found.metrics, allow_nan=False)


def test_images_that_cannot_be_read_are_skipped_and_reported(detector, dataset, evaluated, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    test = (dataset.test[0], Sample(broken, 1, None, "square"), *dataset.test[1:])
    seen = []
    found = evaluate(detector, replace(dataset, test=test), progress=lambda *report: seen.append(report))
    ((path, reason),) = found.skipped
    assert path == str(broken) and "broken.png" in reason
    assert found.metrics["n_images"] == 8 and found.metrics["skipped"] == found.skipped
    for name in (*IMAGE, *PIXEL):
        assert found.metrics[name] == pytest.approx(evaluated.metrics[name], abs=1e-6)
    assert [report[1:3] for report in seen] == [(i, 9) for i in range(1, 10)]


def test_nothing_to_measure_is_an_error(detector, dataset, tmp_path):
    with pytest.raises(TrainingError, match=r"parts.*no test images"):
        evaluate(detector, replace(dataset, test=()))
    missing = tuple(Sample(tmp_path / f"{i}.png", i) for i in range(2))
    with pytest.raises(TrainingError, match=r"none of 2 test images .*0\.png"):
        evaluate(detector, replace(dataset, test=missing))
