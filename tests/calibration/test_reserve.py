"""The reserve of a threshold: alterations, and how far scores move under them."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import SIDE, textured
from tests.test_detector import good_ones

from unflaw.calibration.reserve import KINDS, alterations, reserve_of, score_rises
from unflaw.calibration.thresholds import calibrate
from unflaw.detector import Detector
from unflaw.methods.feature_set import NEW_IMAGES


def test_alterations_are_mild_stay_in_range_and_leave_clipped_pixels():
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(2, 3, 256, 300, generator=generator)
    images[:, :, :50], images[:, :, 200:] = 0.0, 1.0
    made = alterations()
    assert {name for names in KINDS for name in names} == set(made)
    for name, alter in made.items():
        altered = alter(images)
        assert altered.shape == images.shape and altered.min() >= 0 and altered.max() <= 1, name
        assert torch.equal(altered[:, :, :50], images[:, :, :50]) and torch.equal(
            altered[:, :, 200:], images[:, :, 200:]
        )
        changed = (altered - images)[:, :, 50:200].abs().mean()
        assert 0.001 < changed < 0.3, name
        assert torch.equal(altered, alter(images)), name  # the same every time


def test_noise_is_a_share_of_the_own_noise():
    noise = alterations()["noise"]
    clean = torch.full((1, 3, 64, 64), 0.5)
    assert torch.equal(noise(clean), clean)
    for level in (0.01, 0.04):
        noisy = clean + level * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        assert float((noise(noisy) - noisy).std()) == pytest.approx(0.5 * level, rel=0.15)


def test_opposite_changes_do_not_come_together():
    assert reserve_of({"brighter": 3.0, "darker": 2.0, "less sharp": 4.0, "sharper": -1.0}) == 5.0
    assert reserve_of({"brighter": -3.0}) == 0.0 == reserve_of({})


def test_the_reserve_raises_the_threshold_and_what_lies_within_is_reviewed():
    scores = [float(i) for i in range(99)]
    plain = calibrate(scores, scores, 0.0, 0.02, review_rate=0.05)
    made = calibrate(scores, scores, 0.0, 0.02, review_rate=0.05, reserve=10.0)
    assert made.threshold == plain.threshold + 10 and made.review_threshold == plain.review_threshold
    assert [made.verdict(score) for score in (94.0, 95.0, 107.0, 107.5)] == ["good", "review", "review", "defect"]
    assert (made.rate, made.review_rate, made.pixel_threshold) == (0.02, 0.05, plain.pixel_threshold)
    assert "estimated reserve of 10" in made.describe() and "for review" in made.describe()
    few = calibrate(scores[:9], scores[:9], 0.0, 0.01, review_rate=0.05, reserve=1.0)  # no share between the rates
    assert few.review_threshold == 8 and few.review_rate == few.rate == 0.1
    without = calibrate(scores, scores, 0.0, 0.02, reserve=10.0)  # no review: a higher threshold
    assert without.review_threshold is None and without.verdict(105.0) == "good"
    by_defects = calibrate(scores, scores, 0.0, defects=[120.0, 130.0], cost_ratio=1.0, reserve=10.0)
    assert by_defects.reserve == 0 and by_defects.threshold < 120


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest_neighbor", "uranet", "memae"])
def test_rises_are_those_of_altered_files(tmp_path, tiny, weights, method):
    """What `score_rises` says of images that were not trained on is what inspection of altered files says."""
    rng = np.random.default_rng(5)
    for folder, count in (("train", 10), ("other", 6)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            Image.fromarray(textured(rng)).save(tmp_path / folder / f"{i}.png")
    detector = Detector(config=tiny(method), weights=weights).fit(tmp_path / "train")
    paths = sorted((tmp_path / "other").iterdir())
    cache = good_ones(6, torch.Generator().manual_seed(0))
    cache.paths = list(paths)
    found = score_rises(detector.network, cache, NEW_IMAGES)
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2) / 255
    usual = np.array([result.score for result in detector.inspect_many(paths)])
    for name, alter in alterations().items():
        altered = alter(images).permute(0, 2, 3, 1).numpy()
        scores = np.array([result.score for result in detector.inspect_many(list(altered))])
        assert found[name] == pytest.approx(float(np.median(scores - usual)), abs=0.02 * np.ptp(usual)), name


@pytest.mark.slow
def test_a_multiple_of_the_reserve_is_added_but_not_for_a_validation_part(tmp_path, tiny, weights):
    rng = np.random.default_rng(6)
    for folder, count in (("parts/train/good", 24), ("parts/test/good", 1), ("parts/test/bad", 1)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            image = textured(rng) if folder != "parts/test/bad" else np.zeros((SIDE, SIDE, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")

    def fitted(multiple):
        config = tiny("nearest_neighbor", **{"calibration.reserve": multiple})
        return Detector(config=config, weights=weights).fit(tmp_path / "parts").calibration_

    none, one, two = map(fitted, (0.0, 1.0, 2.0))
    assert none.reserve == 0 < one.reserve and two.reserve == pytest.approx(2 * one.reserve)
    assert one.threshold == pytest.approx(none.threshold + one.reserve) and one.scores == none.scores
    (tmp_path / "parts/validation/good").mkdir(parents=True)
    for i in range(8):
        Image.fromarray(textured(rng)).save(tmp_path / f"parts/validation/good/{i}.png")
    assert fitted(1.0).reserve == 0
