"""Resampling against known answers: scikit-learn on the resample itself, and images that were never drawn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from unflaw.evaluation.bootstrap import MapSpool, PerImage, interval, resampled, resamples
from unflaw.evaluation.metrics import PixelAccumulator


def made(seed=0, good=12, bad=9, side=64, masks=True):
    """Images whose defects score higher, and their maps and masks."""
    rng = np.random.default_rng(seed)
    pixels, spool, maps = PixelAccumulator(), MapSpool(), []
    labels = np.repeat([0, 1], [good, bad])
    for row, label in enumerate(labels):
        values, mask = rng.standard_normal((side, side)).astype(np.float32), np.zeros((side, side), bool)
        if label:
            mask[4:10, 4 : 9 + row % 3], mask[20:50, 18:40] = True, True
            values[mask] += rng.uniform(0, 3)
        pixels.update(values, mask if label else None)
        spool.add(row, values, mask if label else None)
        maps.append((values, mask))
    scores = rng.standard_normal(len(labels)) + 1.2 * labels
    tables = spool.tables(len(labels), pixels.rankings()[0]) if masks else None
    return PerImage([f"{i}.png" for i in range(len(labels))], labels, scores, tables), maps


def of_resample(maps, counts):
    """Exact pixel metrics of the images, each as often as it was drawn."""
    pixels = PixelAccumulator()
    for (values, mask), count in zip(maps, counts, strict=True):
        for _ in range(int(count)):
            pixels.update(values, mask)
    return pixels.compute()


def test_all_images_once_is_the_metric_itself():
    images, maps = made()
    once = np.ones((1, len(maps)))
    assert images.values("image_auroc", once)[0] == pytest.approx(roc_auc_score(images.labels, images.scores))
    exact = of_resample(maps, once[0])
    for name in ("pixel_auroc", "aupro_30"):
        assert images.values(name, once)[0] == pytest.approx(exact[name], abs=5e-4)


def test_a_resample_is_what_its_images_give():
    images, maps = made(1)
    counts = resamples(images.labels, 3)
    for row in counts:
        repeated = np.repeat(np.arange(len(row)), row.astype(int))
        auroc = roc_auc_score(images.labels[repeated], images.scores[repeated])
        assert images.values("image_auroc", row[None])[0] == pytest.approx(auroc)
        exact = of_resample(maps, row)
        for name in ("pixel_auroc", "aupro_30"):
            assert images.values(name, row[None])[0] == pytest.approx(exact[name], abs=2e-3)


def test_resamples_keep_the_number_of_each_kind_and_repeat():
    labels = np.repeat([0, 1], [7, 4])
    counts = resamples(labels, 50)
    assert (counts[:, :7].sum(1) == 7).all() and (counts[:, 7:].sum(1) == 4).all()
    assert np.array_equal(counts, resamples(labels, 50)) and not np.array_equal(counts[0], counts[1])


def test_the_interval_covers_what_images_of_the_same_kind_give():
    """95 % intervals of AUROC must contain the true one, known for two normals, in about 95 % of data sets."""
    from scipy.stats import norm

    rng, truth, hits = np.random.default_rng(3), norm.cdf(1.2 / 2**0.5), 0
    labels = np.repeat([0, 1], 60)
    for _ in range(200):
        scores = rng.standard_normal(120) + 1.2 * labels
        low, high = interval(resampled([PerImage(list("x") * 120, labels, scores, None)], "image_auroc", 300))
        hits += low <= truth <= high
    assert 180 <= hits <= 199


def test_seeds_are_averaged_not_taken_for_images():
    first, _ = made(2)
    second = PerImage(first.names, first.labels, first.scores[::-1].copy(), None)
    both = resampled([first, second], "image_auroc", 20)
    alone = [resampled([run], "image_auroc", 20) for run in (first, second)]
    assert both == pytest.approx(np.mean(alone, axis=0))


def test_what_is_undefined_is_none():
    images, _ = made(masks=False)
    assert resampled([images], "pixel_auroc") is None
    good = PerImage(["a", "b"], np.zeros(2, int), np.ones(2), None)
    assert resampled([good], "image_auroc") is None


def test_other_images_cannot_be_compared():
    first, _ = made()
    other = PerImage(first.names[::-1], first.labels, first.scores, first.pixels)
    with pytest.raises(ValueError, match="different images"):
        resampled([first, other], "image_auroc")


def test_it_comes_back_from_its_file(tmp_path):
    for masks in (True, False):
        images, _ = made(masks=masks)
        images.save(tmp_path / "deep/run.npz")
        back = PerImage.load(tmp_path / "deep/run.npz")
        counts = resamples(images.labels, 5)
        assert back.names == images.names
        for metric in ("image_auroc", "pixel_auroc", "aupro_30"):
            before, after = images.values(metric, counts), back.values(metric, counts)
            assert (before is None) == (after is None) and (before is None or np.array_equal(before, after))
