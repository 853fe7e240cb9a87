import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unflaw.calibration.thresholds import calibrate
from unflaw.evaluation.risk_coverage import errors_left, review_order, risk

GOOD = [float(i) for i in range(9)]  # the threshold is 8, that of review 6; regions are dominated from 0.3 on
CALIBRATION = calibrate(GOOD, GOOD, 0.0, 0.1, review_rate=0.3, max_uncertainty=[score / 20 for score in GOOD])


def row(score: float, label: int, uncertainty: float | None = None) -> dict:
    return {"score": score, "label": label, "uncertainty": uncertainty}


def test_review_widens_from_the_threshold_down_and_then_takes_the_surest():
    rows = [row(3, 0), row(9, 1, 0.1), row(7, 1), row(12, 0, 0.4), row(5, 0), row(8, 1), row(10, 1, 0.35)]
    assert review_order(rows, CALIBRATION).tolist() == [5, 2, 4, 0, 1, 6, 3]
    assert review_order(rows, CALIBRATION, uncertainty=True).tolist() == [3, 6, 5, 2, 4, 0, 1]
    in_review = [i for i, r in enumerate(rows) if CALIBRATION.verdict(r["score"]) == "review"]
    assert sorted(review_order(rows, CALIBRATION)[: len(in_review)].tolist()) == in_review == [2, 5]


def test_areas_by_hand():
    rows = [row(3, 0), row(7, 1), row(12, 0, 0.4), row(10, 1, 0.1)]  # one missed, one false alarm
    record, curves = risk(rows, CALIBRATION)
    assert record["error_rate"] == 0.5
    # by p-value: 7, 3, 10, 12; with uncertainty: 12, 7, 3, 10
    assert curves["risk"][1].tolist() == [1, 0.5, 0.5, 0.5, 0]
    assert curves["risk_uncertainty"][1].tolist() == [1, 0.5, 0, 0, 0]
    assert record["areas"] == pytest.approx({"p_value": 0.25, "uncertainty": 0.125, "ideal": 0.125, "random": 0.25})
    assert record["reviewed"][5] == 0.25 and record["errors_left"]["uncertainty"][5] == 0.25


def test_without_an_uncertainty_map_only_the_p_value_orders():
    record, curves = risk([row(3, 0), row(12, 1)], calibrate(GOOD, GOOD, 0.0, 0.1))
    assert curves.keys() == {"risk"} and record["errors_left"].keys() == {"p_value"}
    assert record["error_rate"] == 0 and not curves["risk"][1].any()


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 1), st.none() | st.floats(0, 0.5)), min_size=1, max_size=30))
def test_no_order_beats_the_ideal_one(given_rows):
    rows = [row(*values) for values in given_rows]
    record, curves = risk(rows, CALIBRATION)
    for name in ("p_value", "uncertainty"):
        assert record["areas"]["ideal"] - 1e-9 <= record["areas"][name] <= record["error_rate"]
    for share, left in curves.values():
        assert (np.diff(left) <= 0).all() and left[-1] == pytest.approx(0, abs=1e-9) and share[-1] == 1
    wrong = np.array([r["label"] for r in rows], bool)
    assert errors_left(wrong, np.arange(len(rows)))[1][0] == wrong.mean()
