"""Images in tiles and regions of interest, from training to report: what a whole detector makes of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unflaw import load
from unflaw.datasets import load_dataset
from unflaw.detector import Detector
from unflaw.evaluation.evaluate import evaluate
from unflaw.experiments.feature_store import ExperimentRunner
from unflaw.features.cache import build_cache
from unflaw.features.extractor import FeatureExtractor
from unflaw.imaging.reading import read
from unflaw.imaging.tiling import Preparation
from unflaw.postprocessing.results import Result
from unflaw.report.figures import write_figures
from unflaw.training.splits import split_calibration

pytestmark = pytest.mark.slow

TILED = {"preparation.tile": 40, "preparation.overlap": 0.25, "training.display_steps": 0}


@pytest.fixture(scope="module")
def tiled(parts, weights, tiny) -> Detector:
    return Detector(config=tiny("nearest_neighbor", **TILED), weights=weights).fit(parts)


def test_windows_of_an_image_stay_together(parts, tiny, weights):
    paths = sorted((parts / "train/good").iterdir())
    extractor = FeatureExtractor(tiny().features, weights)
    cache = build_cache(extractor, paths, Preparation(size=64, tile=40), 1e9)
    assert len(cache) == 12 * 4 and cache.count == 12
    assert cache.image_numbers.tolist() == [number for number in range(12) for _ in range(4)]
    train, held = split_calibration(cache, None, 0.25, 1e9)
    assert train.count == 9 and held[""].count == 3 and not set(train.paths) & set(held[""].paths)
    first = cache.mixed(range(len(cache)))[:12]
    assert sorted(cache.image_numbers[first].tolist()) == list(range(12))
    assert len({cache.windows[row].number for row in first}) == 4


def test_what_an_image_taught_is_left_out_for_all_its_windows(tiled):
    memory = tiled.network.memory
    assert set(memory.banks[0].source_images.tolist()) <= set(
        range(10)
    )  # 12 images less 2 that calibrated, not 40 windows


def test_one_tile_is_as_no_tiles(parts, weights, tiny):
    """The images are 64 × 64: tiles of 64 change nothing."""
    made = [
        Detector(config=tiny("nearest_neighbor", **{"training.display_steps": 0} | more), weights=weights).fit(parts)
        for more in ({}, {"preparation.tile": 64})
    ]
    assert made[0].calibration_ == made[1].calibration_
    path = sorted((parts / "test/square").iterdir())[0]
    whole, one = (detector.inspect(path) for detector in made)
    assert np.array_equal(whole.map, one.map) and np.array_equal(whole.image, one.image) and whole.score == one.score
    assert whole.regions == one.regions and whole.drift == one.drift


def test_tiles_give_one_result(tiled, parts):
    for path in sorted((parts / "test").rglob("*.png")):
        result = tiled.inspect(path)
        assert result.map.shape == result.image.shape[:2] == (102, 102) and result.valid == (0, 0, 102, 102)
        assert result.layers.keys() == set() or all(layer.shape[:2] == (102, 102) for layer in result.layers.values())
        small = np.asarray(Image.fromarray(result.image).resize((64, 64), Image.Resampling.BOX), int)
        assert np.abs(small - read(path)).mean() < 6
    mask = np.asarray(Image.open(parts / "ground_truth/square/000_mask.png"), bool)
    found = tiled.inspect(parts / "test/square/000.png")
    y, x = np.unravel_index(found.map.argmax(), found.map.shape)
    assert mask[round(y * 64 / 102), round(x * 64 / 102)]
    assert all(0 <= region.box[0] < region.box[2] <= 64 for region in found.regions)


def test_many_at_once_are_as_one_by_one_and_errors_stay_in_place(tiled, parts, tmp_path):
    paths = sorted((parts / "test").rglob("*.png"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    mixed = [tmp_path / "bad.png", *paths[:3], tmp_path / "bad.png", paths[3], tmp_path / "none.png"]
    for path, outcome in zip(mixed, tiled.inspect_many(mixed, batch=3, on_error="yield"), strict=True):
        if path in paths:
            alone = tiled.inspect(path)
            assert isinstance(outcome, Result) and outcome.path == str(path)
            assert outcome.score == pytest.approx(alone.score, rel=1e-4)
            np.testing.assert_allclose(outcome.map, alone.map, atol=1e-3)
        else:
            assert not isinstance(outcome, Result) and str(path) in str(outcome)


def test_calibration_is_made_the_same_way_as_inspection(parts, weights, tiny):
    """The scores of held-out images are those that inspection gives them."""
    paths = sorted((parts / "train/good").iterdir())
    made = Detector(
        config=tiny("nearest_neighbor", **TILED, **{"calibration.update_memory": False}), weights=weights
    ).fit(paths)
    scores = [made.inspect(path).score for path in paths]
    for score in made.calibration_.scores:
        assert min(abs(score - other) for other in scores) < 0.02 * abs(score) + 0.01


def test_a_file_an_evaluation_a_prediction_and_figures(tiled, parts, tmp_path):
    tiled.save(tmp_path / "tiled.safetensors")
    again, dataset = load(tmp_path / "tiled.safetensors"), load_dataset(parts)
    assert again.config == tiled.config
    path = dataset.test[-1].path
    assert np.array_equal(again.inspect(path).map, tiled.inspect(path).map)
    found = evaluate(again, dataset, spool=True)
    assert found.metrics["n_images"] == 8 and found.metrics["pixel_auroc"] > 0.8
    assert found.images.pixels is not None and found.shown[0].result.map.shape == (102, 102)
    assert {file.name for file in write_figures(again, dataset, tmp_path / "figures", count=2)} == {"retrieval.png"}
    before = again.calibration_
    again.calibrate(sample.path for sample in dataset.test if not sample.label)
    assert again.calibration_ != before


@pytest.mark.parametrize("more", [TILED, {"preparation.roi": (0.1, 0.2, 0.9, 0.9)}])
def test_features_from_a_file_are_the_same(parts, weights, tiny, tmp_path, more):
    dataset = load_dataset(parts)
    config = tiny("nearest_neighbor", **{"training.display_steps": 0} | more)
    found, expected = ExperimentRunner(tmp_path, weights).fit(config, dataset), Detector(config=config, weights=weights)
    expected.fit(dataset)
    assert found.calibration_.scores == pytest.approx(expected.calibration_.scores, rel=1e-3)
    paths = [sample.path for sample in dataset.test]
    for a, b in zip(found.inspect_many(paths), expected.inspect_many(paths), strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-3, abs=1e-3) and a.valid == b.valid
        np.testing.assert_allclose(a.map, b.map, rtol=1e-2, atol=1e-2)


# Regions of interest


@pytest.fixture(scope="module")
def masked(parts, weights, tiny, tmp_path_factory) -> Detector:
    """Only the left half of images counts."""
    mask = np.zeros((64, 64), bool)
    mask[4:60, 4:32], mask[4:60, 60:62] = True, True  # its box is wider than what counts
    path = tmp_path_factory.mktemp("roi") / "mask.png"
    Image.fromarray(mask).save(path)
    changes = {"preparation.roi": str(path), "training.display_steps": 0}
    return Detector(config=tiny("nearest_neighbor", **changes), weights=weights).fit(parts)


def test_what_lies_outside_changes_nothing(masked, parts):
    path: Path = sorted((parts / "test/good").iterdir())[0]
    image = read(path).copy()
    spoilt = image.copy()
    spoilt[:, 34:58] = 255
    a, b = masked.inspect(image), masked.inspect(spoilt)
    assert a.score == b.score and np.array_equal(a.map, b.map) and a.drift == b.drift and a.verdict == b.verdict
    spoilt[20:40, 8:28] = 255
    assert masked.inspect(spoilt).score > a.score
    assert not a.map[:, 40:55].max() > a.map[a.counted].min()


def test_nothing_outside_is_a_token_of_the_memory(masked, parts):
    cells = masked.inspect(sorted((parts / "test/good").iterdir())[0])
    grey = np.full((64, 64, 3), 128, np.uint8)
    features = masked.network.embed(_stacked(masked, grey))
    nearest = (masked.network.memory.prototypes - features[0, :, 4, 5]).norm(dim=1).min()
    assert nearest > 0 and cells.counted.any()
    assert len(masked.network.memory.banks[0].source_images) == 64


def _stacked(detector, image):
    from unflaw.features.cache import stack
    from unflaw.imaging.transforms import prepare

    return stack([prepare(image, detector.config.preparation)])


def test_pixel_metrics_are_those_inside(masked, parts):
    from unflaw.evaluation.metrics import PixelAccumulator
    from unflaw.imaging.reading import read_mask
    from unflaw.imaging.transforms import prepare_mask

    dataset = load_dataset(parts)
    found, expected = evaluate(masked, dataset), PixelAccumulator()
    for sample in dataset.test:
        result = masked.inspect(sample.path)
        truth = (
            prepare_mask(read_mask(sample.mask), masked.config.preparation)[result.counted] if sample.label else None
        )
        expected.update(result.map[result.counted][None], None if truth is None else truth[None])
    assert found.metrics["pixel_auroc"] == pytest.approx(expected.compute()["pixel_auroc"])
    assert all(region.box[2] <= 62 for shown in found.shown for region in shown.result.regions)
