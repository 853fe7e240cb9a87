"""Cross-fitting: every good image is scored by a network that did not learn from it."""

import math

import pytest
import torch
from tests.conftest import learn
from tests.test_detector import good_ones, scores_of, unfitted

from unflaw.detector import Detector
from unflaw.errors import TrainingError
from unflaw.training import fit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "method, changes, trials",
    [
        ("nearest_neighbor", {"calibration.folds": 2}, 150),
        ("nearest_neighbor", {"calibration.fewest": 20}, 100),  # by memories that did not see them
        ("uranet", {"calibration.folds": 2, "training.steps": 1}, 20),
    ],
)
def test_good_images_raise_about_as_many_alarms_as_asked_for(tiny, method, changes, trials):
    """From 19 images, none of them given up; at most twice as many is what theory has of `nearest_neighbor`."""
    made, rng = unfitted(tiny, method, **changes), torch.Generator().manual_seed(0)
    n, fresh, alarms = 19, 20, 0
    for _ in range(trials):
        learn(made, good_ones(n, rng))
        alarms += sum(made.calibration_.verdict(score) == "defect" for score in scores_of(made, good_ones(fresh, rng)))
    calibration = made.calibration_
    assert (len(calibration.scores), calibration.rate, calibration.out_of_fold) == (n, 0.1, True)
    deviation = math.sqrt(0.1 * 0.9 * (1 / (n + 2) + 1 / fresh) / trials)
    assert 0.05 - 4 * deviation < alarms / (trials * fresh) < 0.1 + 4 * deviation


def test_what_an_image_taught_the_memory_is_left_out(tiny):
    made, rng = unfitted(tiny, "nearest_neighbor", **{"calibration.folds": 5}), torch.Generator().manual_seed(0)
    cache = good_ones(12, rng)
    learn(made, cache)
    known = sorted(scores_of(made, cache))
    assert all(left_out >= whole - 1e-4 for left_out, whole in zip(made.calibration_.scores, known, strict=True))
    assert sum(made.calibration_.scores) > sum(known) + 1


def test_each_fold_is_scored_by_a_network_that_did_not_see_it(tiny, monkeypatch):
    made, rng = (
        unfitted(tiny, "uranet", **{"training.steps": 1, "calibration.folds": 3}),
        torch.Generator().manual_seed(0),
    )
    cache, seen = good_ones(10, rng), []
    whole = fit.train

    def spy(network, part, *rest, **options):
        seen.append((network is made.network, {row.tobytes() for row in part.features.numpy()}))
        return whole(network, part, *rest, **options)

    monkeypatch.setattr(fit, "train", spy)
    learn(made, cache)
    every = {row.tobytes() for row in cache.features.numpy()}
    assert seen[0] == (True, every) and [own for own, _ in seen[1:]] == [False] * 3
    left = [every - part for _, part in seen[1:]]
    assert set.union(*left) == every and sum(map(len, left)) == 10


def test_the_detector_is_the_one_that_learns_from_all(tiny, parts, weights):
    """Folds decide thresholds only, and the file says how they came about."""
    small = {"training.steps": 2, "training.display_steps": 0}
    made = Detector(config=tiny(**small, **{"calibration.folds": 4}), weights=weights).fit(parts)
    again = Detector(config=tiny(**small, **{"calibration.folds": 3}), weights=weights).fit(parts)
    assert all(
        torch.equal(a, b)
        for a, b in zip(made.network.state_dict().values(), again.network.state_dict().values(), strict=True)
    )
    assert len(made.calibration_.scores) == 12 == made.record_["good_images"] and made.record_["held_out"] == 0
    assert made.calibration_.scores != again.calibration_.scores
    assert "12 cross-validated good images give a false-alarm rate of about 7.69%" in made.calibration_.describe()


def test_more_folds_than_images_are_refused(tiny):
    made = unfitted(tiny, "uranet", **{"training.steps": 0, "calibration.folds": 13})
    with pytest.raises(TrainingError, match="12 images cannot make 13 folds; lower"):
        learn(made, good_ones(12, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="one fold leaves nothing"):
        tiny(**{"calibration.folds": 1})
