"""Detectors from 1 to 7 good images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import textured

import unflaw
from unflaw.calibration.thresholds import calibrate
from unflaw.datasets import load_dataset
from unflaw.detector import Detector
from unflaw.errors import TrainingError
from unflaw.features.cache import build_cache
from unflaw.methods import create
from unflaw.methods.feature_set import Context
from unflaw.methods.memory_bank import MemoryBank
from unflaw.training.few import VIEWS, altered, few_config, fit_few, read_views

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good(parts):
    return sorted((parts / "train/good").iterdir())


@pytest.fixture(scope="module")
def bad(parts):
    return sorted((parts / "test/square").iterdir())


def views_of(paths, config, weights):
    """A fitted cache of images and views, and the network that it belongs to."""
    network = create(few_config(config), weights).eval()
    source = read_views(network.features, config.preparation, 0)
    return network, build_cache(network.features, paths, config.preparation, 1e9, source=source)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_few_images_give_reviews_and_never_defects(n, good, bad, parts, weights, tiny, tmp_path):
    detector = Detector(config=tiny(), weights=weights).fit(good[:n])
    assert detector.config.method == "nearest_neighbor"  # nothing is trained
    calibration = detector.calibration_
    assert len(calibration.scores) == n and calibration.review_only
    assert {detector.inspect(path).verdict for path in bad} == {"review"}
    images = "1 good image: too few" if n == 1 else f"{n} good images: too few"
    assert calibration.describe().startswith(images) and "99 of them" in calibration.describe()
    assert detector.record_["good_images"] == n
    assert "too few to train on: nearest_neighbor instead of uranet" in detector.record_["few"]
    detector.save(tmp_path / "few.safetensors")
    again = unflaw.load(tmp_path / "few.safetensors")
    assert again.calibration_ == calibration and again.inspect(bad[0]).score == detector.inspect(bad[0]).score
    same = Detector(config=tiny(), weights=weights).fit(good[:n])
    assert same.calibration_ == calibration  # the same start, however often


def test_a_calibration_gives_verdicts(good, bad, weights, tiny):
    detector = Detector(config=tiny(), weights=weights).fit(good[:4])
    detector.calibrate(good[4:])
    assert not detector.calibration_.review_only
    assert {detector.inspect(path).verdict for path in bad} == {"defect"}


def test_so_does_a_validation_part(parts, good, bad, weights, tiny):
    dataset = load_dataset(parts)
    few = replace(dataset, train=dataset.train[:3], validation=dataset.train[4:])
    detector = Detector(config=tiny(), weights=weights).fit(few)
    assert not detector.calibration_.review_only and len(detector.calibration_.scores) == 8
    assert (detector.record_["good_images"], detector.record_["held_out"]) == (3, 8)
    assert detector.inspect(bad[0]).verdict == "defect"


def test_an_image_is_scored_without_its_views(good, weights, tiny):
    """As by the memory of the other images and their views alone."""
    network, cache = views_of(good[:3], tiny("nearest_neighbor"), weights)
    assert len(cache) == 3 * (1 + VIEWS) and [str(p) for p in cache.paths[:: 1 + VIEWS]] == [
        str(path) for path in dict.fromkeys(cache.paths)
    ]
    network.memory = MemoryBank(4096, network.features.channels)
    fit_few(network, cache)
    tokens = cache.features.float().flatten(2).transpose(1, 2)
    others = tokens[1 + VIEWS :].flatten(0, 1)
    expected = torch.cdist(tokens[0], others).amin(1)
    found = network.memory(cache.features[:1].float(), Context(training_rows=torch.tensor([0]))).distance
    torch.testing.assert_close(found.flatten(), expected, atol=1e-2, rtol=1e-2)
    assert network.memory(cache.features[:1].float()).distance.mean() < 0.1 * expected.mean()  # it is in the memory


def test_of_a_single_image_the_views_tell_how_far_is_usual(good, bad, weights, tiny):
    network, cache = views_of(good[:1], tiny("nearest_neighbor"), weights)
    calibration = fit_few(network, cache)
    assert len(cache) == 1 + VIEWS and len(calibration.scores) == 1 and calibration.scores[0] > 0


def test_views_are_mild_and_all_windows_alike():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(np.stack([textured(rng), textured(rng)])).permute(0, 3, 1, 2) / 255
    made = [altered(images, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(view.shape == images.shape and view.min() >= 0 and view.max() <= 1 for view in made)
    assert torch.equal(made[0], altered(images, torch.Generator().manual_seed(0)))
    moved = [float((view - images).abs().mean()) for view in made]
    assert min(moved) > 0.01 and max(moved) < 0.15
    alone = altered(images[:1], torch.Generator().manual_seed(3))
    torch.testing.assert_close(alone, made[3][:1], atol=0.02, rtol=0)  # the mean for the contrast is of all windows
    flat = torch.full((1, 3, 16, 48), 0.5)
    assert float(altered(flat, torch.Generator().manual_seed(1)).std()) < 1e-4  # no black border


def test_a_turn_keeps_its_angle_on_a_rectangle():
    """A point far along the longer side moves across by the sine of the angle."""
    image = torch.zeros(1, 3, 32, 128)
    image[..., 16, 112] = 1
    rng = torch.Generator().manual_seed(5)
    turn, dx, dy, scale, *_ = (2 * torch.rand(6, generator=torch.Generator().manual_seed(5)) - 1).tolist()
    peak = altered(image, rng)[0, 0].argmax()
    row, column = divmod(int(peak), 128)
    angle, size = np.radians(3) * turn, 1 + 0.03 * scale
    x, y = 112.5 - 64 - 0.04 * dx * 64, 16.5 - 16 - 0.04 * dy * 16
    expected = (np.cos(angle) * x + np.sin(angle) * y) / size, (-np.sin(angle) * x + np.cos(angle) * y) / size
    assert abs(column + 0.5 - 64 - expected[0]) < 1.5 and abs(row + 0.5 - 16 - expected[1]) < 1.5


def test_tiles_of_few_images(good, bad, weights, tiny):
    config = tiny("nearest_neighbor", **{"preparation.size": 32, "preparation.tile": 32, "features.grid": 4})
    detector = Detector(config=config, weights=weights).fit(good[:3])
    assert len(detector.calibration_.scores) == 3
    assert detector.inspect(bad[0]).verdict == "review"


def test_what_needs_more_images_says_so(good, tiny, weights):
    with pytest.raises(TrainingError, match="3 good images are too few to learn from: at least 8"):
        Detector(config=tiny("memae")).fit(good[:3])
    with pytest.raises(TrainingError, match="3 good images are too few"):
        Detector(config=tiny(), weights=weights).fit({"a": good[:3], "b": good[3:]})


def test_review_only_verdicts():
    made = calibrate([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.0).model_copy(update={"review_only": True})
    assert [made.verdict(score) for score in (0.5, 3.0, 3.1, 99.0)] == ["good", "good", "review", "review"]
    assert made.numbers()["review_only"] and "too few to call anything defective" in made.describe()


def test_the_graph_says_review_too(good, bad, weights, tiny, tmp_path):
    from unflaw.runtime.export import export

    detector = Detector(config=tiny("nearest_neighbor"), weights=weights).fit(good[:3])
    exported = unflaw.load(export(detector, tmp_path / "few.onnx"))
    found, expected = exported.inspect(bad[0]), detector.inspect(bad[0])
    assert found.verdict == expected.verdict == "review"
    assert found.score == pytest.approx(expected.score, rel=1e-3)
