import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import ModelInput, prepare
from unflaw.postprocessing.regions import EIGHT_CONNECTED, find_regions, flagged, outline, region_level

RNG = np.random.default_rng(0)


def canvas(width: int, height: int, size: int = 64, fit: str = "stretch") -> ModelInput:
    return prepare(np.zeros((height, width, 3), np.uint8), Preparation(size=size, fit=fit))


def test_regions_have_boxes_and_areas_in_pixels_of_the_original():
    prepared = canvas(128, 32)  # stretched to 64×64: x doubles, y halves on the way back
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[8:16, 20:30] = 2.0
    anomaly_map[10, 25] = 7.0
    (region,) = find_regions(anomaly_map, 1.0, prepared.layout)
    assert region.box == (40, 4, 60, 8)
    assert region.area == 8 * 10  # 80 cells of 2 × 0.5 pixels
    assert region.peak == 7.0


def test_a_region_is_eight_connected_and_strictly_above_the_threshold():
    prepared = canvas(64, 64)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[[3, 4, 5], [3, 4, 5]] = 2.0  # a diagonal: one region
    anomaly_map[3, 7] = 3.0  # one cell apart from it: another
    anomaly_map[40:50, 40:50] = 1.0  # at the threshold: none
    high, low = find_regions(anomaly_map, 1.0, prepared.layout)
    assert (high.box, high.area) == ((7, 3, 8, 4), 1)
    assert (low.box, low.area) == ((3, 3, 6, 6), 3)
    assert find_regions(anomaly_map, 3.0, prepared.layout) == ()


def test_regions_come_by_peak_and_the_highest_are_kept():
    prepared = canvas(64, 64)
    anomaly_map = np.zeros((64, 64), np.float32)
    peaks = RNG.permutation(np.arange(1, 101)).reshape(10, 10)
    anomaly_map[2:62:6, 2:62:6] = peaks
    regions = find_regions(anomaly_map, 0.5, prepared.layout)
    assert [r.peak for r in regions] == list(range(100, 0, -1))
    assert [r.peak for r in find_regions(anomaly_map, 0.5, prepared.layout, limit=3)] == [100, 99, 98]


def test_padding_has_no_regions_and_adds_none():
    prepared = canvas(100, 50, fit="pad")  # rows 16 to 48 of the canvas are the image
    assert prepared.box == (0, 16, 64, 48)
    anomaly_map = np.full((64, 64), 9.0, np.float32)
    anomaly_map[16:48] = 0.0
    assert find_regions(anomaly_map, 1.0, prepared.layout) == ()
    anomaly_map[16:20, 0:8] = 2.0  # touches the padding
    (region,) = find_regions(anomaly_map, 1.0, prepared.layout)
    assert region.peak == 2.0
    assert region.box == (0, 0, 13, 7)  # 8 and 4 cells of 100 / 64 pixels, rounded outward
    assert region.area == round(32 * (100 / 64) ** 2)


masks = arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8)))


@given(masks)
def test_an_outline_encloses_its_area_and_the_holes_in_it(mask):
    labels, n = ndimage.label(mask, EIGHT_CONNECTED)
    for i in range(1, n + 1):
        x, y = outline(labels == i).T
        enclosed = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2  # positive: clockwise, y pointing down
        assert enclosed == ndimage.binary_fill_holes(labels == i).sum()
        steps = np.abs(np.diff(np.column_stack([x, y]), axis=0, append=[[x[0], y[0]]]))
        assert ((steps > 0).sum(1) == 1).all()  # along the axes, and no corner is none


def test_contours_and_uncertainty_are_those_of_the_region():
    prepared = canvas(128, 32)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[8:16, 20:30] = 2.0
    doubt = np.zeros((64, 64))
    doubt[8:12, 20:30] = 0.5
    (region,) = find_regions(anomaly_map, 1.0, prepared.layout, uncertainty=doubt)
    assert region.contour == ((40, 4), (60, 4), (60, 8), (40, 8)) and region.uncertainty == 0.25
    assert region.to_json() == {"box": [40, 4, 60, 8], "area": 80, "peak": 2.0, "uncertainty": 0.25}
    assert region.to_json(contour=True)["contour"] == [[40, 4], [60, 4], [60, 8], [40, 8]]


@given(arrays(np.float32, (12, 9), elements=st.integers(0, 6).map(float)), st.floats(0, 0.6))
def test_below_its_level_a_map_has_a_region_and_from_it_on_none(anomaly_map, minimum):
    valid = (1, 2, 9, 12)
    level = region_level(anomaly_map, valid, minimum)
    assert flagged(anomaly_map, level, valid, minimum)[1] == 0
    assert flagged(anomaly_map, np.nextafter(level, -np.inf), valid, minimum)[1] > 0
    if not minimum:
        assert level == anomaly_map[2:12, 1:9].max()


def test_small_areas_are_no_regions():
    prepared = canvas(64, 64)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[10, 10] = 9.0
    anomaly_map[20:24, 20:24] = 2.0
    (region,) = find_regions(anomaly_map, 1.0, prepared.layout, minimum_area=16 / 64**2)
    assert region.box == (20, 20, 24, 24) and region.area == 16
    assert find_regions(anomaly_map, 1.0, prepared.layout, minimum_area=17 / 64**2) == ()


def test_what_does_not_count_is_no_region_even_where_all_that_counts_is_anomalous(tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[8:24, 8:24] = mask[40:44, 40:44] = True  # whose box is wider than it
    Image.fromarray(mask).save(tmp_path / "roi.png")
    laid = prepare(np.zeros((64, 64, 3), np.uint8), Preparation(size=64, roi=str(tmp_path / "roi.png"))).layout
    assert laid.counted is not None and 0 < laid.counted.mean() < 0.5
    anomaly_map = np.full((64, 64), 5.0, np.float32)
    first, second = find_regions(anomaly_map, 1.0, laid)
    assert (first.area, second.area) == pytest.approx((256, 16), rel=0.05) and first.box == (8, 8, 24, 24)
    assert region_level(anomaly_map, laid.box, 0.3, laid.counted) == 5.0
    # less counts than the minimum area: no region at any threshold, and a level that is a value of the map
    anomaly_map[laid.counted] = np.linspace(2, 3, laid.counted.sum())
    assert region_level(anomaly_map, laid.box, 0.9, laid.counted) == 2.0
    assert find_regions(anomaly_map, 2.0, laid, minimum_area=0.9) == ()
