import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from unflaw.calibration.scores import CalibrationScores
from unflaw.calibration.thresholds import Calibration, calibrate, calibrations
from unflaw.config import Config, make_config
from unflaw.postprocessing.regions import flagged
from unflaw.postprocessing.results import Region

SCORES = [3.0, 1.0, 2.0, 2.0]
finite = st.floats(-1e6, 1e6)
# few distinct values, so that ties are frequent
score_lists = st.lists(finite | st.integers(0, 4).map(float), min_size=1, max_size=60)
rates = st.floats(0.001, 0.9) | st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5])


@pytest.mark.parametrize(
    "score, expected",
    [(0.0, 5 / 5), (1.0, 5 / 5), (1.5, 4 / 5), (2.0, 4 / 5), (2.5, 2 / 5), (3.0, 2 / 5), (3.1, 1 / 5)],
)
def test_p_value_counts_good_images_that_score_at_least_as_high(score, expected):
    assert calibrate(SCORES, SCORES, 0.0, 0.2).p_value(score) == expected


@given(score_lists, rates, st.data())
def test_above_the_threshold_is_the_same_as_a_p_value_within_the_rate(scores, rate, data):
    calibration = calibrate(scores, scores, 0.0, rate)
    score = data.draw(finite | st.sampled_from(scores))
    assert (calibration.verdict(score) == "defect") == (score > calibration.threshold)
    assert (score > calibration.threshold) == (calibration.p_value(score) <= calibration.rate)


@given(score_lists, rates)
def test_the_certified_rate_is_the_asked_one_or_the_smallest_there_is(scores, rate):
    calibration = calibrate(scores, scores, 0.0, rate)
    n = len(scores)
    smallest = 1 / (n + 1)
    assert calibration.rate == pytest.approx(max(smallest, math.floor(rate * (n + 1) + 1e-6) / (n + 1)))
    assert calibration.certified == (calibration.rate <= rate)
    assert list(calibration.scores) == sorted(scores)
    assert calibration.pixel_threshold == calibration.threshold  # the same rule over peaks


@pytest.mark.parametrize("n, rate", [(30, 0.1), (99, 0.01), (7, 0.25)])
def test_good_images_raise_alarm_no_more_often_than_guaranteed(n, rate):
    """Averaged over calibration sets, P(alarm) = ⌊rate·(n + 1)⌋ / (n + 1) for continuous scores: exact for every n."""
    rng = np.random.default_rng(0)
    trials, fresh = 400, 200
    alarms = 0
    for _ in range(trials):
        calibration = calibrate(rng.gumbel(size=n).tolist(), [0.0] * n, 0.0, rate)
        alarms += int((rng.gumbel(size=fresh) > calibration.threshold).sum())
    expected = calibration.rate
    assert expected <= rate
    # the share of alarms given one calibration set has the variance of a beta distribution
    deviation = math.sqrt(expected * (1 - expected) * (1 / (n + 2) + 1 / fresh) / trials)
    assert alarms / (trials * fresh) == pytest.approx(expected, abs=4 * deviation)


def test_too_few_images_are_told_with_the_rate_they_certify_and_how_many_would_do():
    few = calibrate([float(i) for i in range(19)], [0.0] * 19, 0.0, 0.01)
    assert not few.certified and few.rate == 1 / 20
    assert few.threshold == 18.0  # the highest: nothing stricter can be guaranteed
    text = few.describe()
    assert "19 good images" in text and "5.00%" in text and "1.00%" in text and "99 would" in text
    enough = calibrate([float(i) for i in range(99)], [0.0] * 99, 0.0, 0.01)
    assert enough.certified and "1.00%" in enough.describe() and "99 good images" in enough.describe()


def test_peaks_have_a_threshold_of_their_own():
    calibration = calibrate([1.0, 2.0, 3.0, 4.0], [40.0, 10.0, 30.0, 20.0], 5.0, 0.4)
    assert (calibration.threshold, calibration.pixel_threshold) == (3.0, 30.0)
    scale = calibration.scale
    assert scale(np.array([0.0, 5.0, 30.0, 55.0, 99.0])).tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(
    "scores, peaks",
    [([], []), ([1.0, math.nan], [1.0, 1.0]), ([1.0, math.inf], [1.0, 1.0]), ([1.0, 1.0], [-math.inf, 1.0])],
)
def test_nothing_and_infinite_scores_are_refused(scores, peaks):
    with pytest.raises(ValueError, match="finite"):
        calibrate(scores, peaks, 0.0)


def test_it_survives_json():
    calibration = calibrate([0.1, 1 / 3, math.pi], [1e-30, 2.5, 1e30], 0.1 + 0.2, 0.3)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


# Defects


@given(score_lists, score_lists, st.floats(0.01, 0.9))
def test_a_miss_rate_is_kept_by_the_defects_given_or_refused(scores, defects, rate):
    k = math.floor(rate * (len(defects) + 1) + 1e-9)
    if k < 1:
        with pytest.raises(ValueError, match=rf"cannot certify a miss rate of {rate:.2%}; \d+ would"):
            calibrate(scores, scores, 0.0, defects=defects, miss_rate=rate)
        return
    calibration = calibrate(scores, scores, 0.0, defects=defects, miss_rate=rate)
    missed = sum(calibration.verdict(score) == "good" for score in defects)
    assert missed <= k - 1 and calibration.miss_rate == k / (len(defects) + 1) <= rate + 1e-9
    alarms = sum(calibration.verdict(score) == "defect" for score in scores)
    assert calibration.rate == pytest.approx((1 + alarms) / (len(scores) + 1))


@pytest.mark.parametrize("m, rate", [(20, 0.1), (39, 0.05)])
def test_new_defects_are_missed_no_more_often_than_guaranteed(m, rate):
    rng, missed = np.random.default_rng(1), 0
    trials, fresh = 400, 200
    for _ in range(trials):
        defects = rng.normal(2, 1, m)
        calibration = calibrate([0.0], [0.0], 0.0, defects=defects.tolist(), miss_rate=rate)
        missed += (rng.normal(2, 1, fresh) <= calibration.threshold).sum()
    guaranteed = math.floor(rate * (m + 1)) / (m + 1)
    # the spread over calibration sets is that of the Beta distribution of the guaranteed rate
    spread = math.sqrt(guaranteed * (1 - guaranteed) / (m + 2) / trials)
    assert missed / (trials * fresh) == pytest.approx(guaranteed, abs=4 * spread)


@given(score_lists, score_lists, st.floats(0.01, 100))
def test_the_threshold_of_least_cost_costs_least(scores, defects, ratio):
    def cost(threshold):
        alarms = np.mean([score > threshold for score in scores])
        return alarms + ratio * np.mean([score <= threshold for score in defects])

    calibration = calibrate(scores, scores, 0.0, defects=defects, cost_ratio=ratio)
    everywhere = [-1e7, *scores, *defects, 1e7]
    assert cost(calibration.threshold) <= min(map(cost, everywhere)) + 1e-9
    assert calibration.miss_rate is None and "least cost" in calibration.describe()


def test_what_defects_set_is_said():
    calibration = calibrate([1, 2, 3], [1, 2, 3], 0.0, defects=[5, 2.5, 6, 7], miss_rate=0.4)
    assert calibration.threshold < 5 and calibration.verdict(5) == "defect" and calibration.verdict(4.9) == "good"
    assert calibration.describe() == (
        "miss rate 40.00% or less, certified by 4 labelled defects, of which 3 are found; "
        "false-alarm rate about 25.00%, from 3 good images"
    )
    for wrong in ({"miss_rate": 0.1}, {"cost_ratio": 1.0}, {"defects": [math.nan], "miss_rate": 0.5}):
        with pytest.raises(ValueError):
            calibrate([1, 2, 3], [1, 2, 3], 0.0, **wrong)


def test_a_threshold_that_defects_set_certifies_no_false_alarm_rate():
    scores = [float(i) for i in range(99)]
    for asked in ({"cost_ratio": 2.0}, {"miss_rate": 0.5}):
        made = calibrate(scores, scores, 0.0, 0.01, defects=[200.0, 300.0], **asked)
        numbers = made.numbers()
        assert made.rate == 0.01 and not made.certified and numbers["certified"] is False
        assert numbers["asked_rate"] is None and numbers["n_defects"] == 2
        assert numbers["miss_rate"] == (1 / 3 if "miss_rate" in asked else None)
        assert (
            "false-alarm rate about 1.00%" in made.describe()
            and "could certify 1.00% at best" in made.describe_achievable_rate()
        )
        assert "certified" not in made.describe().replace("miss rate 33.33% or less, certified by 2 labelled", "")


def test_a_threshold_by_hand_has_the_rate_that_follows():
    scores = [float(i) for i in range(99)]
    made = calibrate(scores, scores, 0.0, 0.02, review_rate=0.05, reserve=3.0).at(89.5)
    assert (made.threshold, made.rate, made.reserve, made.review_threshold) == (89.5, 0.1, 0.0, None)
    assert not made.certified and made.numbers()["asked_rate"] is None
    assert (
        made.describe()
        == "threshold set by hand: false-alarm rate about 10.00%, from 99 good images outside of training"
    )
    higher = made.at(200.0)
    assert (higher.rate, higher.verdict(150.0)) == (0.01, "good")
    kept = calibrate(scores, scores, 0.0, 0.02, review_rate=0.05).at(150.0)
    assert (kept.verdict(100.0), kept.review_rate) == ("review", 0.05)
    with pytest.raises(ValueError, match="a threshold is a score"):
        made.at(math.nan)


def test_the_numbers_say_what_the_sentence_does():
    scores = [float(i) for i in range(99)]
    made = calibrate(scores, scores, 0.0, 0.02, review_rate=0.05)
    assert made.numbers() == {
        "asked_rate": 0.02,
        "rate": 0.02,
        "n": 99,
        "certified": True,
        "smallest_rate": 0.01,
        "estimated": False,
        "out_of_fold": False,
        "review_rate": 0.05,
        "miss_rate": None,
        "n_defects": 0,
        "n_images": None,
        "review_only": False,
        "by_hand": False,
        "reserve": 0.0,
    }
    few = calibrate(scores[:5], scores[:5], 0.0, 0.01, out_of_fold=True).numbers()
    assert (few["asked_rate"], few["rate"], few["n"], few["certified"], few["out_of_fold"]) == (
        0.01,
        1 / 6,
        5,
        False,
        True,
    )
    tail = calibrate(scores, scores, 0.0, 0.002, extrapolate_tail=True).numbers()
    assert (tail["rate"], tail["smallest_rate"], tail["certified"], tail["estimated"]) == (0.002, 0.01, False, True)


# Review


@given(score_lists, rates, rates, st.data())
def test_review_lies_between_two_rates_and_takes_nothing_from_the_first(scores, rate, wider, data):
    plain = calibrate(scores, scores, 0.0, rate)
    calibration = calibrate(scores, scores, 0.0, rate, review_rate=wider)
    assert (calibration.threshold, calibration.rate) == (plain.threshold, plain.rate)
    score = data.draw(finite | st.sampled_from(scores))
    p, verdict = calibration.p_value(score), calibration.verdict(score)
    assert (verdict == "defect") == (p <= calibration.rate)
    if calibration.review_rate is None:  # too few images, or none with a score between
        assert verdict == plain.verdict(score)
    else:
        assert calibration.rate < calibration.review_rate <= max(wider + 1e-9, 1 / (len(scores) + 1))
        assert (verdict == "review") == (calibration.rate < p <= calibration.review_rate)


def test_good_images_are_called_so_as_often_as_guaranteed():
    rng, n = np.random.default_rng(3), 99
    trials, fresh = 400, 200
    verdicts = []
    for _ in range(trials):
        calibration = calibrate(rng.gumbel(size=n).tolist(), [0.0] * n, 0.0, 0.01, review_rate=0.05)
        verdicts += [calibration.verdict(score) for score in rng.gumbel(size=fresh)]
    assert calibration.describe().endswith("; with those for review 5.00%")
    for kinds, guaranteed in ((("defect",), 0.01), (("defect", "review"), 0.05)):
        deviation = math.sqrt(guaranteed * (1 - guaranteed) * (1 / (n + 2) + 1 / fresh) / trials)
        assert np.isin(verdicts, kinds).mean() == pytest.approx(guaranteed, abs=4 * deviation)


def test_without_a_rate_or_with_too_few_images_nothing_is_reviewed():
    scores = [float(i) for i in range(50)]
    assert calibrate(scores, scores, 0.0, 0.02).review_threshold is None
    assert calibrate(scores[:18], scores[:18], 0.0, 0.01, review_rate=0.05).review_threshold is None
    assert calibrate(scores, scores, 0.0, 0.1, review_rate=0.05).review_threshold is None
    assert calibrate(scores, scores, 0.0, 0.02, review_rate=0.1).review_threshold == 45


def test_an_uncertain_region_sends_a_defect_to_review_and_nothing_else():
    scores = [float(i) for i in range(39)]
    uncertainty = [i / 100 for i in range(39)]
    calibration = calibrate(
        scores, scores, 0.0, 0.05, review_rate=0.1, max_uncertainty=uncertainty, review_uncertain=True
    )
    assert calibration.uncertainty_threshold == 0.35  # the fourth: one tenth of 40
    doubtful, sure = (Region((0, 0, 1, 1), 1, 9.0, uncertainty) for uncertainty in (0.36, 0.35))
    assert (
        calibration.verdict(99, [doubtful, sure]) == "review" and calibration.verdict(99, [sure, doubtful]) == "defect"
    )
    assert calibration.verdict(99) == "defect" and calibration.verdict(0, [doubtful]) == "good"
    assert calibrate(scores, scores, 0.0, 0.05, max_uncertainty=uncertainty).verdict(99, [doubtful]) == "defect"


def test_without_review_the_false_alarm_rate_says_what_is_uncertain():
    """A review rate of 0 sends no image to review by its p-value, and is no rate for the uncertainty."""
    scores, uncertainty = [float(i) for i in range(39)], [i / 100 for i in range(39)]
    options: dict[str, Any] = {"max_uncertainty": uncertainty, "review_uncertain": True}
    made = calibrate(scores, scores, 0.0, 0.1, review_rate=0.0, **options)
    assert made.uncertainty_threshold == 0.35 != max(uncertainty)  # the fourth: one tenth of 40
    assert {made.verdict(score) for score in range(-1, 41)} == {"good", "defect"}
    doubtful = Region((0, 0, 1, 1), 1, 9.0, 0.36)
    assert made.verdict(99, [doubtful]) == "review"
    by_cost = calibrate(scores, scores, 0.0, 0.05, defects=[2.0], cost_ratio=100.0, **options)
    assert by_cost.rate > 0.9 and by_cost.uncertainty_threshold == 0.37  # of the rate asked for, not of what follows
    again = CalibrationScores()
    again.max_uncertainty = [0.9]
    again.merge(made)
    assert sorted(again.max_uncertainty) == [0.35] * 36 + [0.9] * 4  # three of 39 exceed it, nobody knows how far


def test_evidence_is_gathered_within_the_image():
    found = CalibrationScores()
    anomaly_map, doubt = np.zeros((2, 8, 8))
    anomaly_map[0], doubt[0] = 9, 9  # padding
    anomaly_map[3, 3], doubt[4, 4] = 2, 0.25
    for score in range(24):
        found.add(score, anomaly_map + score, (0, 2, 8, 8), doubt)
    made = found.calibrate(make_config(changes={"calibration.review_uncertain": True}).calibration, rate=0.04)
    assert made.scores == tuple(range(24)) and made.pixel_threshold == 2 + 23 and made.low == 11.5
    assert made.uncertainty_threshold == 0.25 and made.review_rate is None  # 5 % are no more images than 4 %
    again = CalibrationScores()
    again.add(99.0, anomaly_map, (0, 2, 8, 8), doubt)
    again.merge(made)
    assert sorted(again.scores)[-2:] == [23, 99] and sorted(again.peaks)[0] == 2 and again.peaks.count(25) == 24


@pytest.mark.parametrize("rate", [0.1, 0.05])
def test_kept_images_leave_the_pixel_rate_as_guaranteed(rate):
    """Also where a smaller one is asked for than they were calibrated with, of which their maps are not known."""
    rng, n, fresh, trials = np.random.default_rng(8), 39, 200, 150
    shown = 0.0
    for _ in range(trials):
        first, second, new = rng.exponential(size=(2, n)), rng.exponential(size=(2, n)), rng.exponential(size=fresh)
        old = calibrate(*first.tolist(), 0.0, 0.1)
        found = CalibrationScores()
        found.scores, found.peaks, found.medians = [*second[0]], [*second[1]], [0.0] * n
        found.merge(old)
        made = found.calibrate(make_config().calibration, rate=rate)
        assert made.rate <= rate and len(made.scores) == 2 * n
        shown += float((new > made.pixel_threshold).mean())
    assert shown / trials < rate + 3 * math.sqrt(rate * (1 - rate) * (1 / (2 * n) + 1 / fresh) / trials)


@pytest.mark.parametrize("minimum", [0.0, 0.02])
def test_regions_show_on_no_more_good_images_than_guaranteed(minimum):
    """Whatever the minimum area: the pixel threshold is calibrated with it."""
    rng, valid, n, fresh, trials = np.random.default_rng(6), (0, 0, 24, 24), 19, 20, 40
    options = make_config(changes={"calibration.false_alarm_rate": 0.1}).calibration
    shown = 0
    for _ in range(trials):
        maps = gaussian_filter(rng.normal(size=(n + fresh, 24, 24)), (0, 1.5, 1.5)) * rng.gamma(
            4, size=(n + fresh, 1, 1)
        )
        found = CalibrationScores(minimum)
        for anomaly_map in maps[:n]:
            found.add(0.0, anomaly_map, valid)
        made = found.calibrate(options)
        shown += sum(flagged(anomaly_map, made.pixel_threshold, valid, minimum)[1] > 0 for anomaly_map in maps[n:])
    deviation = math.sqrt(0.1 * 0.9 * (1 / (n + 2) + 1 / fresh) / trials)
    assert shown / (trials * fresh) == pytest.approx(0.1, abs=4 * deviation)


# Cross-fitting, and tails


def test_what_is_not_certified_is_said():
    scores = [float(i) for i in range(99)]
    crossed = calibrate(scores, scores, 0.0, 0.02, out_of_fold=True)
    assert not crossed.certified
    assert crossed.describe() == "false-alarm rate about 2.00%, from 99 cross-validated good images"
    assert "99 good images give about 1.00% at best" in crossed.describe_achievable_rate()
    few = calibrate(scores, scores, 0.0, 0.001, out_of_fold=True)
    assert few.describe() == (
        "99 cross-validated good images give a false-alarm rate of about 1.00%, not the 0.10% asked for; 999 would"
    )


@given(st.lists(finite, min_size=1, max_size=120), st.floats(0.0005, 0.2))
def test_a_tail_estimates_only_what_images_cannot_certify(scores, rate):
    plain, made = (calibrate(scores, scores, 0.0, rate, extrapolate_tail=tail) for tail in (False, True))
    n = len(scores)
    if made.tail is None:
        assert made == plain and (n < 40 or rate >= 1 / (n + 1) - 1e-9 or len(set(scores)) < n)
        assert made.estimated_p_value(scores[0]) is None
        return
    assert made.estimated and not made.certified and "estimated from the tail" in made.describe()
    assert made.rate == pytest.approx(max(rate, 0.1 / (n + 1))) and made.threshold >= plain.threshold
    assert made.pixel_threshold == plain.pixel_threshold  # regions stay certified
    for score in (min(scores), *sorted(scores)[-3:], max(scores) + 1.0, made.threshold):
        assert made.estimated_p_value(score) <= made.p_value(score)
    assert made.estimated_p_value(max(scores) + 1e300) == pytest.approx(0.1 / (n + 1))  # as far as a tail is trusted
    if made.threshold > max(scores):
        assert made.estimated_p_value(made.threshold) == pytest.approx(made.rate, rel=1e-3)


def test_what_files_of_before_say_is_read_as_it_was():
    old = {"scores": [1.0, 2.0], "asked_rate": 0.5, "rate": 1 / 3, "threshold": 2.0, "pixel_threshold": 9.0, "low": 0.0}
    (made,) = calibrations({"calibration": old}).values()
    assert [made.verdict(score) for score in (1.5, 2.0, 2.5)] == ["good", "good", "defect"]
    assert made.describe() == "false-alarm rate 33.33% or less, certified by 2 good images outside of training"
    config = make_config().model_dump()
    config["calibration"] = {"holdout": 0.2, "false_alarm_rate": 0.01, "update_memory": True}
    assert Config.model_validate(config) == make_config()
