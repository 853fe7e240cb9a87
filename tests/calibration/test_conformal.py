import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from unflaw.calibration.conformal import (
    COMBINATIONS,
    certifiable,
    combination_factor,
    combine,
    discoveries,
    fit_tail,
    least_discoveries,
    needed,
    p_value,
    rank,
)

pytestmark = pytest.mark.slow

probabilities = st.lists(st.floats(1e-6, 1), min_size=1, max_size=12)


# What n images certify


@pytest.mark.parametrize(
    "n, rate, certified", [(19, 0, 0.05), (19, 0.05, 0.05), (19, 0.11, 0.1), (99, 0.01, 0.01), (1, 0, 0.5)]
)
def test_certified_rates(n, rate, certified):
    found = certifiable(n, rate)
    assert found.rate == pytest.approx(certified)
    assert found.unlucky > found.rate or n == 1


@given(st.floats(0.001, 0.9))
def test_as_many_as_needed_certify_a_rate_and_one_fewer_do_not(rate):
    n = needed(rate)
    assert n == 0 or certifiable(n, rate).rate <= rate + 1e-9
    assert n < 2 or certifiable(n - 1, rate).rate > rate


def test_the_rate_of_one_calibration_is_a_beta_distribution():
    """For uniform scores the rate of alarms, given the calibration images, is 1 − the threshold."""
    n, rate = 59, 0.1
    scores = np.sort(np.random.default_rng(0).random((4000, n)), axis=1)
    realised = 1 - scores[:, -rank(n, rate)]
    found = certifiable(n, rate)
    assert realised.mean() == pytest.approx(found.rate, abs=0.002)
    assert (realised <= found.unlucky).mean() == pytest.approx(0.95, abs=0.015)


def test_no_images_certify_nothing():
    with pytest.raises(ValueError, match="0 images certify nothing"):
        certifiable(0)


# The tail


@pytest.mark.parametrize("shape", [0.0, 0.3])
def test_a_generalised_pareto_tail_is_found(shape):
    scores = np.sort(stats.genpareto.rvs(shape, scale=2, size=20_000, random_state=2))
    tail = fit_tail(scores.tolist())
    assert tail.share == pytest.approx(0.1, rel=1e-3)
    start = stats.genpareto.isf(0.1, shape, scale=2)
    assert tail.start == pytest.approx(start, rel=0.05)
    assert tail.shape == pytest.approx(shape, abs=0.06)
    assert tail.scale == pytest.approx(2 + shape * start, rel=0.1)  # of the excess over a threshold
    assert tail.goodness > 0.05
    exact = stats.genpareto.isf(1e-3, shape, scale=2)
    assert tail.threshold(1e-3) == pytest.approx(exact, rel=0.3) and tail.p_value(exact) == pytest.approx(1e-3, rel=0.5)


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 0.05))
def test_thresholds_and_p_values_of_a_tail_are_each_other_s_inverse(seed, rate):
    scores = np.sort(np.random.default_rng(seed).gumbel(size=60)).tolist()
    tail = fit_tail(scores)
    assert tail.shape >= 0 and tail.start == scores[-21] and tail.share == 20 / 61
    assert tail.p_value(tail.threshold(rate)) == pytest.approx(rate, rel=1e-6)
    assert tail.p_value(tail.start - 1) == tail.share


def test_a_tail_that_is_none_is_told():
    """Two groups of scores far apart are no Pareto tail; of exponential ones a twentieth is refused at 0.05."""
    rng = np.random.default_rng(0)
    apart = [*rng.random(180), *(100 + rng.random(10)), *(200 + rng.random(10))]
    assert fit_tail(sorted(apart)).goodness < 0.05
    refused = [fit_tail(sorted(rng.exponential(size=200))).goodness < 0.05 for _ in range(200)]
    assert 2 <= sum(refused) <= 22


@pytest.mark.parametrize("n, reached", [(99, 1e-3), (199, 1e-3)])
def test_estimated_rates_are_of_the_right_size(n, reached):
    """No certificate: on average over calibrations, up to ten times beyond what n certify, within a factor of three of
    exponential tails; fewer alarms than that where the tail is lighter, as a normal one is."""
    rng = np.random.default_rng(5)
    realised = {}
    for draw, beyond in ((rng.gumbel, stats.gumbel_r.sf), (rng.standard_normal, stats.norm.sf)):
        tails = [fit_tail(np.sort(draw(size=n)).tolist()) for _ in range(300)]
        realised[draw] = np.mean([beyond(tail.threshold(reached)) for tail in tails])
    assert reached / 3 < realised[rng.gumbel] < reached * 3
    assert reached / 10 < realised[rng.standard_normal] < reached


def test_too_few_scores_have_no_tail():
    assert fit_tail([float(i) for i in range(39)]) is None and fit_tail([1.0] * 50) is None


# Several images of a part


def test_combinations_by_hand():
    p = [0.01, 0.04]
    assert combine(p) == pytest.approx(0.02)
    assert combine(p, "mean") == pytest.approx(0.05)
    assert combine(p, "geometric") == pytest.approx(math.e * 0.02)
    assert combine(p, "harmonic") == pytest.approx(2 * 0.016)  # Vovk and Wang 2020: the factor of two is 2,
    assert combine([0.01] * 3, "harmonic") / 0.01 == pytest.approx(2.499 * math.log(3), abs=1e-3)  # of three 2.499 ln 3
    for wrong in ([], [0.0], [1.1], [math.nan]):
        with pytest.raises(ValueError, match="must lie in"):
            combine(wrong)


@given(probabilities, st.sampled_from(COMBINATIONS), st.data())
def test_combined_p_values_are_some_and_grow_with_each(p, method, data):
    found = combine(p, method)
    assert min(p) <= found + 1e-12 and found <= 1
    higher = [data.draw(st.floats(value, 1)) for value in p]
    assert combine(higher, method) >= found - 1e-9
    assert combine(p[:1], method) == p[0]


@given(probabilities, st.sampled_from(COMBINATIONS))
def test_no_combined_p_value_lies_below_the_smallest_one(p, method):
    """Which images reach that all have the smallest p-value there is."""
    k, least = len(p), min(p)
    factor = combination_factor(k, method)
    assert factor >= 1
    assert combine(p, method) >= min(1, factor * least) * (1 - 1e-9)
    assert combine([least] * k, method) == pytest.approx(min(1, factor * least))


@given(st.floats(0.002, 0.5), st.integers(1, 12), st.sampled_from(COMBINATIONS))
def test_as_many_as_needed_certify_a_rate_of_several_images_and_one_fewer_do_not(rate, k, method):
    def certifies(n: int) -> bool:
        return combination_factor(k, method) <= math.floor(rate * (n + 1) + 1e-9) + 1e-9

    n = needed(rate, k, method)
    assert certifies(n) and not certifies(n - 1)


@pytest.mark.parametrize("method", COMBINATIONS)
def test_good_parts_raise_no_more_alarms_than_asked_for_however_images_depend(method):
    """Equal, opposite, independent, and in pairs: of a good part, P(p ≤ α) ≤ α."""
    u = np.random.default_rng(0).random((2000, 4))
    kinds = {"equal": u[:, [0] * 4], "opposite": np.column_stack([u[:, :2], 1 - u[:, :2]]), "independent": u}
    for alpha, (kind, p) in itertools.product((0.02, 0.1), kinds.items()):
        alarms = np.mean([combine(row, method) <= alpha for row in np.maximum(p, 1e-9).tolist()])
        assert alarms <= alpha + 3 * math.sqrt(alpha / 2000), kind


def test_conformal_p_values_of_a_part_share_their_calibration():
    """Four views of a part that is light or dark as a whole, 99 good images: combined, about 4 % of alarms at 4 %."""
    rng, alarms, trials = np.random.default_rng(2), 0, 4000
    for _ in range(trials):
        calibrating = np.sort(rng.normal(size=99) + rng.normal(size=99))
        views = rng.normal() + rng.normal(size=4)
        alarms += combine([p_value(calibrating, view) for view in views]) <= 0.04
    assert 0.015 < alarms / trials <= 0.04 + 3 * math.sqrt(0.04 / trials)


# Many parts a day


def test_discoveries_by_hand():
    assert discoveries([0.01, 0.02, 0.03, 0.5], 0.05) == [True, True, True, False]
    assert discoveries([0.03, 0.04, 0.5, 0.9], 0.05) == [False] * 4
    assert discoveries([], 0.1) == []
    with pytest.raises(ValueError, match="false discovery rate must lie between 0 and 1"):
        discoveries([0.5], 0.0)


@given(probabilities, st.floats(0.01, 0.5))
def test_discoveries_are_those_of_the_step_up_rule(p, rate):
    ordered = sorted(p)
    passing = [i for i, value in enumerate(ordered, 1) if value <= rate * i / len(p)]
    limit = ordered[passing[-1] - 1] if passing else 0.0
    assert discoveries(p, rate) == [value <= limit for value in p]


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_the_false_discovery_rate_of_conformal_p_values_is_kept(step):
    """Bates et al. 2023: at most the share of good parts times the rate, over calibrations and batches; ties count as
    higher scores, so it holds for scores in steps as well."""
    rng, false, found = np.random.default_rng(4), [], []
    for _ in range(400):
        calibrating, scores = rng.normal(size=199), np.append(rng.normal(size=60), rng.normal(4, 1, 20))
        if step:
            calibrating, scores = (np.round(values / step) * step for values in (calibrating, scores))
        calibrating = np.sort(calibrating)
        chosen = np.array(discoveries([p_value(calibrating, score) for score in scores], 0.2))
        false.append(chosen[:60].sum() / max(chosen.sum(), 1))
        found.append(chosen[60:].mean())
    assert np.mean(false) <= 0.15 + 3 * np.std(false) / math.sqrt(400) and np.mean(false) > (0.0 if step else 0.05)
    assert np.mean(found) > 0.8


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.3]), st.data())
def test_there_are_no_discoveries_or_as_many_as_said(m, n, rate, data):
    p = [(1 + data.draw(st.integers(0, min(n, 3)))) / (n + 1) for _ in range(m)]
    least = least_discoveries(m, 1 / (n + 1), rate)
    assert sum(discoveries(p, rate)) in {0, *range(least, m + 1)}
    if least <= m:  # reached
        assert sum(discoveries([1 / (n + 1)] * least + [1.0] * (m - least), rate)) == least
