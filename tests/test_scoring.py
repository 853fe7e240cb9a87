import numpy as np

from unflaw.images import Preparation, Prepared, prepare
from unflaw.scoring import find_regions

RNG = np.random.default_rng(0)


def canvas(width: int, height: int, size: int = 64, fit: str = "stretch") -> Prepared:
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
    prepared = canvas(100, 50, fit="pad")  # rows 16 to 48 of the canvas are the picture
    assert prepared.box == (0, 16, 64, 48)
    anomaly_map = np.full((64, 64), 9.0, np.float32)
    anomaly_map[16:48] = 0.0
    assert find_regions(anomaly_map, 1.0, prepared.layout) == ()
    anomaly_map[16:20, 0:8] = 2.0  # touches the padding
    (region,) = find_regions(anomaly_map, 1.0, prepared.layout)
    assert region.peak == 2.0
    assert region.box == (0, 0, 13, 7)  # 8 and 4 cells of 100 / 64 pixels, rounded outward
    assert region.area == round(32 * (100 / 64) ** 2)
