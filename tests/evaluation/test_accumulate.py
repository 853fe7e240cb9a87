from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from unflaw.datasets import Dataset, Sample, Saturated
from unflaw.evaluation.accumulate import Measurement, RegionTally
from unflaw.evaluation.metrics import PixelAccumulator
from unflaw.imaging.tiling import Preparation

SIDE = 32


@pytest.fixture
def regions(tmp_path):
    """One good and one defective image whose mask has two regions, on masks of twice the canvas."""
    whole = np.zeros((2, 2 * SIDE, 2 * SIDE), np.uint8)
    whole[0, 4:20, 4:20], whole[1, 30:60, 30:40] = 255, 255
    paths = []
    for i, mask in enumerate([*whole, whole.max(0)]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(mask).save(paths[-1])
    saturated = Saturated(paths[0], 64.0, False), Saturated(paths[1], 0.5, True)
    bad = Sample(tmp_path / "bad.png", 1, paths[2], "two", saturated)
    dataset = Dataset("parts", "mvtec", (), (), (Sample(tmp_path / "good.png", 0), bad), ())
    return dataset, [mask[::2, ::2] > 0 for mask in whole]


def test_saturations_shrink_with_the_image(regions):
    dataset, (first, second) = regions
    measured, rng = Measurement(dataset, Preparation(size=SIDE)), np.random.default_rng(0)
    maps = rng.random((2, SIDE, SIDE), np.float32)
    maps[1] += 0.5 * (first | second)
    for sample, values in zip(dataset.test, maps, strict=True):
        measured.add(sample, float(values.max()), values, (0, 0, SIDE, SIDE))
    expected = PixelAccumulator()
    expected.update(maps[0])
    # 64 of 256 pixels of the mask are a quarter of the region, whatever its size on the canvas
    expected.update(maps[1], first | second, regions=[(first, first.sum() / 4), (second, second.sum() / 2)])
    metrics = measured.metrics()
    assert metrics["spro_05"] == pytest.approx(expected.compute()["aupro_05"])
    assert metrics["spro_05"] > metrics["aupro_05"]


def test_only_regions_with_saturations_have_spro(regions):
    dataset, _ = regions
    good, bad = dataset.test
    plain = Dataset("parts", "mvtec", (), (), (good, Sample(bad.path, 1, bad.mask, "two")), ())
    measured = Measurement(plain, Preparation(size=SIDE))
    for sample in plain.test:
        measured.add(sample, 1.0, np.ones((SIDE, SIDE)), (0, 0, SIDE, SIDE))
    metrics = measured.metrics()
    assert metrics["spro_05"] is None and metrics["aupimo"] is None and metrics["aupro_05"] is not None


def test_images_are_kept_for_resampling_only_where_asked_for(regions):
    dataset, _ = regions
    for spool in (True, False):
        measured = Measurement(dataset, Preparation(size=SIDE), spool=spool)
        for i, sample in enumerate(dataset.test):
            measured.add(sample, float(i), np.random.default_rng(i).random((SIDE, SIDE)), (0, 4, SIDE, SIDE))
        kept = measured.per_image()
        assert kept.names == [sample.path.name for sample in dataset.test] and kept.labels.tolist() == [0, 1]
        assert (kept.pixels is not None) == spool
    measured = Measurement(dataset, Preparation(size=SIDE), spool=True)
    measured.add(dataset.test[0], 0.0, np.ones((SIDE, SIDE)), (0, 4, SIDE, SIDE))
    assert measured.per_image().pixels.clean[0, -1] == SIDE * (SIDE - 4)  # padding does not count


def test_regions_are_counted_against_true_ones():
    tally = RegionTally(1.0, 4 / 64)
    anomaly_map, mask = np.zeros((8, 8)), np.zeros((8, 8), bool)
    mask[0:2, 0:2] = mask[4:6, 4:6] = mask[7, 0] = True  # three
    mask[2, 2] = True  # touches the first at a corner
    anomaly_map[1:3, 2:4] = 2  # four pixels, one of them true
    anomaly_map[5, 5] = anomaly_map[7, 0] = 9  # too small
    tally.add(anomaly_map, mask, (0, 0, 8, 8))
    tally.add(anomaly_map, None, (0, 0, 8, 8))
    tally.add(np.zeros((8, 8)), None, (0, 0, 8, 8))
    assert tally.metrics() == {
        "region_recall": pytest.approx(1 / 3),
        "regions_found": 1,
        "regions_true": 3,
        "good_with_regions": 0.5,
        "false_regions": 0.5,
    }
    assert set(RegionTally(1.0, 0).metrics().values()) == {None, 0}


def test_a_mask_that_vanishes_makes_no_good_pixels(tmp_path, regions):
    dataset, _ = regions
    good, bad = dataset.test
    thin = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
    thin[:, 6] = 255  # between the pixels that the nearest neighbour takes
    Image.fromarray(thin).save(tmp_path / "thin.png")
    dataset = replace(
        dataset, test=(good, Sample(bad.path, 1, bad.mask, "two"), Sample(bad.path, 1, tmp_path / "thin.png", "thin"))
    )
    expected, measured = (Measurement(dataset, Preparation(size=SIDE), regions=(0.5, 0)) for _ in range(2))
    for number, sample in enumerate(dataset.test):
        anomaly_map = np.random.default_rng(number).random((SIDE, SIDE))
        box = 0, 0, SIDE, SIDE
        mask = measured.add(sample, float(number), anomaly_map, box)
        assert (mask is None) == (number != 1)
        if number < 2:
            expected.add(sample, float(number), anomaly_map, box)
    assert expected.problems == [] and measured.vanished == [str(tmp_path / "thin.png")]
    assert measured.problems == [f"Masks that show nothing at this size: {tmp_path / 'thin.png'} (1 in all)."]
    found, without = measured.metrics(), expected.metrics()
    assert found["per_defect"]["thin"]["pixel_auroc"] is None and found["n_images"] == 3
    for name in ("pixel_auroc", "aupro_30", "pixel_ap", "region_recall", "regions_true", "false_regions"):
        assert found[name] == without[name] is not None
