import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.integrate import trapezoid
from skimage.measure import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from unflaw.evaluation import metrics
from unflaw.evaluation.metrics import OverlapAccumulator, PixelAccumulator, image_metrics, ranking, region_weights

RNG = np.random.default_rng
SKEWED = {
    "uniform": lambda x: x,
    "ties": lambda x: np.round(x * 8),
    "two values": lambda x: x > 0.6,
    "constant": lambda x: 0 * x + 0.3,
    "power": lambda x: x**30,
    "outlier": lambda x: np.where(x == x.max(), 1e6, 0.5 + 1e-6 * x),
    "exponential": lambda x: np.exp(20 * x),
    "negative": lambda x: -np.log1p(x),
}


def brute_force_aupro(maps, masks, limit):
    """AUPRO by its definition: one point of the curve for every distinct value, trapezoids, cut at the limit."""
    regions = []  # (image, pixels of the region)
    for i, mask in enumerate(masks):
        labels = label(mask, connectivity=2)
        regions += [(i, labels == k) for k in range(1, labels.max() + 1)]
    free = np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)])
    fpr, pro = [0.0], [0.0]
    for t in np.unique(maps)[::-1]:
        fpr.append(np.mean(free >= t))
        pro.append(np.mean([np.mean(maps[i][pixels] >= t) for i, pixels in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr, fpr[1:], pro, pro[1:], strict=False):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


def example(seed, shape=(5, 14, 17)):
    """Maps (N, H, W) float32 that hint at masks with regions of 1 to many pixels; the first image is good."""
    rng = RNG(seed)
    masks = ndimage.gaussian_filter(rng.random(shape), (0, 1, 1)) > 0.62
    masks |= rng.random(shape) > 0.99
    masks[0] = False
    masks[1, 2, 3] = masks[1, 3, 4] = True
    return (rng.random(shape) * 0.8 + 0.2 * masks).astype(np.float32), masks


def accumulate(maps, masks, **kwargs):
    pixels = PixelAccumulator(**{"limit": 2**16} | kwargs)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        pixels.update(anomaly_map, mask)
    return pixels


def sklearn_metrics(scores, labels):
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max()


@pytest.mark.parametrize("transform", SKEWED.values(), ids=SKEWED)
def test_pixel_metrics_match_sklearn_and_brute_force(transform):
    maps, masks = example(0)
    maps = transform(maps).astype(np.float32)
    result = accumulate(maps, masks).compute()
    expected = sklearn_metrics(maps.ravel(), masks.ravel())
    assert [result[k] for k in ("pixel_auroc", "pixel_ap", "pixel_f1_max")] == pytest.approx(expected, abs=1e-12)
    for name, limit in (("aupro_30", 0.3), ("aupro_05", 0.05)):
        assert result[name] == pytest.approx(brute_force_aupro(maps, masks, limit), abs=1e-12)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=60))
def test_image_metrics_match_sklearn(pairs):
    scores, labels = (np.array(column) for column in zip(*pairs, strict=True))
    result = image_metrics(scores / 7, labels)
    if labels.all() or not labels.any():
        assert result == {"image_auroc": None, "image_ap": None, "image_f1_max": None}
    else:
        assert list(result.values()) == pytest.approx(sklearn_metrics(scores / 7, labels), abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([0.01, 0.05, 0.3, 0.77, 1.0]))
def test_aupro_matches_brute_force(seed, levels, limit):
    maps, masks = example(seed, (3, 7, 8))
    maps = np.round(maps * levels)
    assert metrics.partial_auc(accumulate(maps, masks).rankings()[1], limit) == pytest.approx(
        brute_force_aupro(maps, masks, limit), abs=1e-12
    )


def test_aupro_by_hand():
    mask = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 0, 1]], bool)  # two regions, of 1 and 2 pixels
    scores = np.array([[9, 8, 5, 5, 7], [1, 1, 1, 1, 5]])  # FPR 1/7 at 8, from 1/7 to 3/7 at 5
    # PRO is 1/2 from FPR 0, 3/4 from 1/7, rises to 1 at 3/7
    by_region = accumulate([scores], [mask]).rankings()[1]
    assert metrics.partial_auc(by_region, 1 / 7) == pytest.approx(1 / 2)
    assert metrics.partial_auc(by_region, 2 / 7) == pytest.approx((1 / 2 + (3 / 4 + 7 / 8) / 2) / 2)
    assert metrics.partial_auc(by_region, 1.0) == pytest.approx((1 / 2 + 2 * 7 / 8 + 4) / 7)


def test_aupro_with_a_single_region():
    maps, _ = example(1)
    masks = np.zeros(maps.shape, bool)
    masks[2, 3:9, 4:8] = True
    result = accumulate(maps, masks)
    assert result.compute()["aupro_30"] == pytest.approx(brute_force_aupro(maps, masks, 0.3), abs=1e-12)
    by_pixel, by_region = result.rankings()
    assert metrics.auroc(by_region) == pytest.approx(metrics.auroc(by_pixel), abs=1e-12)


def test_f1_max_threshold_reaches_it():
    rng = RNG(0)
    negatives, positives = rng.normal(size=200), rng.normal(1.5, size=50)
    best, threshold = metrics.f1_max(ranking(negatives, positives))
    tp, fp = (positives >= threshold).sum(), (negatives >= threshold).sum()
    assert best == pytest.approx(2 * tp / (tp + fp + 50))


def test_image_scores_keep_double_precision():
    assert image_metrics([1.0, 1.0 + 1e-12], [0, 1])["image_auroc"] == 1


def test_region_weights():
    mask = np.zeros((6, 7), bool)
    mask[0, 0] = mask[1, 1] = mask[2, 0] = True  # joined by corners
    mask[4, 3:6] = mask[5, 4] = True
    assert region_weights(mask).tolist() == pytest.approx([1 / 3] * 3 + [1 / 4] * 4)
    assert region_weights(np.zeros((3, 3), bool)).shape == (0,)
    valid = mask.copy()
    valid[1, 1] = False  # no longer counts, still connects
    valid[4:] = False
    assert region_weights(mask, valid).tolist() == pytest.approx([1 / 2] * 2)


def test_only_valid_pixels_count():
    maps, masks = example(2)
    pixels, expected = PixelAccumulator(2**16), PixelAccumulator(2**16)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        inner = np.zeros(mask.shape, bool)
        inner[:, 5:] = True
        mask[:, 4:6] = False  # so that no region crosses the border
        pixels.update(np.where(inner, anomaly_map, np.nan), mask, inner)
        expected.update(anomaly_map[:, 5:], mask[:, 5:])
    assert pixels.compute() == expected.compute()


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_only_the_order_of_scores_matters(seed):
    maps, masks = example(seed)
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    order = RNG(seed).permutation(len(maps))
    result = accumulate(maps, masks).compute()
    assert accumulate(ranks**2 - 7.0, masks).compute() == pytest.approx(result, abs=1e-12)
    assert accumulate(maps[order], masks[order]).compute() == pytest.approx(result, abs=1e-12)


@settings(max_examples=50)
@given(st.lists(st.integers(-9, 9), min_size=1), st.lists(st.integers(-9, 9), min_size=1))
def test_auroc_of_negated_scores(negatives, positives):
    negatives, positives = np.array(negatives), np.array(positives)
    flipped = metrics.auroc(ranking(-negatives, -positives))
    assert metrics.auroc(ranking(negatives, positives)) == pytest.approx(1 - flipped, abs=1e-12)


@pytest.fixture(scope="module")
def many():
    return example(3, (48, 256, 256))


@pytest.mark.parametrize("transform", SKEWED.values(), ids=SKEWED)
def test_summaries_stay_close_and_bounded(transform, many):
    limit = 2**19
    maps, masks = transform(many[0]).astype(np.float32), many[1]
    pixels = accumulate(maps, masks, limit=limit)
    for store, room in ((pixels._negatives, limit), (pixels._positives, limit // 8)):
        assert store.total > 3 * room
        assert len(store.values) == room
        assert 0 < len(store.summary[0]) < room
    exact = accumulate(maps, masks, limit=2**22).compute()
    assert pixels.compute() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("transform", SKEWED.values(), ids=SKEWED)
def test_summaries_bound_the_error_of_every_rank(transform):
    limit, fills = 2**14, 12
    values = transform(RNG(7).random(limit * fills)).astype(np.float32)
    store = metrics._Store(limit, weighted=False)
    for chunk in np.split(values, 64):
        store.add(chunk)
    thresholds = np.unique(values)
    for counted, exact in zip(store.count(thresholds), metrics._count(np.sort(values), thresholds), strict=True):
        assert (np.abs(counted - exact) <= fills * 2 * 128 / limit * exact).all()
        assert np.abs(counted - exact).max() <= 4 / store.keep * len(values)  # the errors largely cancel
    assert len(store.summary[0]) < limit // 2


def test_summary_bounds_both_weights():
    rng, keep = RNG(5), 200
    values = -np.sort(-rng.random(9000).astype(np.float32))
    weights = np.column_stack([rng.integers(1, 5, 9000), rng.random(9000) ** 9 + 1e-3])
    weights[[3000, 4000, 4001], [0, 1, 0]] = 1e5  # heavier than a cell
    values = np.unique(values)[::-1]
    cumulative = np.cumsum(weights[: len(values)], axis=0)
    grouped, grouped_weights = metrics._grouped(values, cumulative, keep)
    assert len(grouped) < len(values) / 2
    assert np.array_equal(grouped[:keep], values[:keep])
    assert np.isin(values[[3000, 4000, 4001]], grouped).all()
    at_or_above = np.searchsorted(-grouped, -values, "right")
    ranks = np.concatenate([np.zeros((1, 2)), np.cumsum(grouped_weights, axis=0)])[at_or_above]
    assert (np.abs(ranks - cumulative) <= 2.1 / keep * cumulative).all()


def test_results_so_far_can_be_read_between_updates():
    maps, masks = example(4)
    pixels = PixelAccumulator(2**11)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        pixels.update(anomaly_map, mask)
        pixels.compute()
    assert pixels.compute() == pytest.approx(accumulate(maps, masks, limit=2**11).compute(), abs=1e-12)


def test_curves():
    maps, masks = example(6)
    pixels = accumulate(maps, masks)
    by_pixel, by_region = pixels.rankings()
    for full, area in ((metrics.roc_curve(by_pixel), metrics.auroc(by_pixel)), (metrics.roc_curve(by_region), None)):
        assert full[0].tolist() == [0, 0]
        assert full[-1] == pytest.approx([1, 1])
        assert (np.diff(full, axis=0) >= 0).all()
        assert area is None or np.diff(full[:, 0]) @ (full[1:, 1] + full[:-1, 1]) / 2 == pytest.approx(area)
    full = metrics.roc_curve(by_region)
    thin = pixels.curves(50)
    assert {name: len(curve) <= 50 for name, curve in thin.items()} == {"roc": True, "pro": True, "pr": True}
    assert thin["pro"][[0, -1]].tolist() == full[[0, -1]].tolist()
    assert {tuple(point) for point in thin["pro"]} <= {tuple(point) for point in full}
    precision, recall, _ = precision_recall_curve(masks.ravel(), maps.ravel())
    expected = {(r, p) for r, p in zip(recall, precision, strict=True)}
    assert {tuple(point) for point in metrics.precision_recall_curve(by_pixel)} <= expected
    assert PixelAccumulator(2**11).curves() == {"roc": None, "pro": None, "pr": None}


@pytest.mark.parametrize("mask", [None, np.zeros((4, 5), bool), np.ones((4, 5), bool)])
def test_undefined_is_none(mask):
    pixels = PixelAccumulator(2**11)
    assert set(pixels.compute().values()) == {None}
    pixels.update(RNG(0).random((4, 5)), mask)
    assert set(pixels.compute().values()) == {None}


def test_errors():
    pixels = PixelAccumulator(2**11)
    good = np.zeros((4, 5))
    pixels.update(good)
    for bad in (np.nan, np.inf, 1e39):
        with pytest.raises(ValueError, match="update 1 "):
            pixels.update(np.where(np.eye(4, 5), bad, 0))
    with pytest.raises(ValueError, match=r"\(4, 5\) and mask \(5, 4\)"):
        pixels.update(good, good.T)
    with pytest.raises(ValueError, match=r"\(4, 5\) and valid \(4, 4\)"):
        pixels.update(good, None, np.ones((4, 4), bool))
    with pytest.raises(ValueError, match=r"\(1, 4, 5\)"):
        pixels.update(good[None])
    assert pixels._negatives.total == good.size
    with pytest.raises(ValueError, match="limit"):
        PixelAccumulator(10)
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        image_metrics([1, 2], [0])
    with pytest.raises(ValueError, match="labels"):
        image_metrics([1, 2], [0, 2])
    with pytest.raises(ValueError, match="NaN"):
        image_metrics([1, np.nan], [0, 1])
    with pytest.raises(ValueError, match="1 weight for 2 positives"):
        ranking([1], [1, 2], [1])
    with pytest.raises(ValueError, match="limit"):
        metrics.partial_auc(ranking([1], [2]), 0)


# sPRO and AUPIMO against their definitions


def spro_by_definition(images, limit):
    """Area under mean sPRO over FPR, thresholds at every value: `images` of (map, regions with saturations)."""
    union = [
        np.any([region for region, _ in regions], axis=0) if regions else np.zeros(m.shape, bool)
        for m, regions in images
    ]
    clean = np.concatenate([m[~u] for (m, _), u in zip(images, union, strict=True)])
    points = [(0.0, 0.0)]
    for t in np.unique(np.concatenate([m.ravel() for m, _ in images]))[::-1]:
        found = [min((m[r] >= t).sum() / s, 1) for m, regions in images for r, s in regions]
        points.append(((clean >= t).mean(), float(np.mean(found))))
    x, y = np.array(points).T
    end = np.interp(limit, x, y)
    inside = x < limit
    return trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit


@pytest.mark.parametrize("levels", [0, 12])
def test_spro_is_its_definition(levels):
    rng = np.random.default_rng(4)
    images, pixels = [], PixelAccumulator()
    for i in range(5):
        values = (
            rng.random((14, 11), np.float32) if not levels else rng.integers(0, levels, (14, 11)).astype(np.float32)
        )
        first, second = np.zeros((2, 14, 11), bool)
        first[2:6, 1:5], second[5:9, 4:9] = True, True  # they overlap, and one of them saturates at a fifth
        regions = [(first, 16.0), (second, 4.0)] if i % 2 else []
        images.append((values, regions))
        pixels.update(values, first | second if regions else None, regions=regions or None)
    for limit in (0.3, 0.05):
        got = pixels.compute()[f"aupro_{limit * 100:02.0f}"]
        assert got == pytest.approx(spro_by_definition(images, limit), abs=1e-9)


def test_unsaturated_spro_is_pro():
    rng = np.random.default_rng(5)
    mask = np.zeros((20, 20), bool)
    mask[2:5, 3:9] = mask[10:18, 10:12] = True
    parts = [np.zeros_like(mask), np.zeros_like(mask)]
    parts[0][:8], parts[1][8:] = mask[:8], mask[8:]
    plain, saturated = PixelAccumulator(), PixelAccumulator()
    for _ in range(3):
        values = rng.random((20, 20))
        plain.update(values, mask)
        saturated.update(values, mask, regions=[(part, 1e9) for part in parts])
    for name, value in plain.compute().items():
        assert saturated.compute()[name] == pytest.approx(value, abs=1e-12)


def test_aupimo_is_its_definition():
    rng = np.random.default_rng(6)
    good, masks = rng.standard_normal((4, 200, 200)).astype(np.float32), np.zeros((3, 200, 200), bool)
    bad = rng.standard_normal((3, 200, 200)).astype(np.float32)
    for i, shift in enumerate((0, 3, 8)):
        masks[i, 20:40, 30:70] = True
        bad[i][masks[i]] += shift
    overlaps = OverlapAccumulator()
    for values in good:
        overlaps.update(values)
    for values, mask in zip(bad, masks, strict=True):
        overlaps.update(values, mask)
    rates = np.geomspace(1e-5, 1e-4, 2001)
    descending = np.sort(good, axis=None)[::-1]
    # at a rate z the threshold lies just above the first value that would make the rate exceed z
    thresholds = descending[np.floor(rates * good.size + 1e-9).astype(int)]
    recalls = np.array([[(v[m] > t).mean() for t in thresholds] for v, m in zip(bad, masks, strict=True)])
    expected = trapezoid(recalls, np.log(rates)) / np.log(10)
    assert overlaps.per_image() == pytest.approx(expected, abs=2e-3)
    assert expected[0] < 0.01 < expected[1] < expected[2]


def test_aupimo_needs_enough_good_pixels():
    overlaps = OverlapAccumulator()
    mask = np.eye(50, dtype=bool)
    overlaps.update(np.zeros((50, 50)))
    overlaps.update(np.ones((50, 50)), mask)
    assert overlaps.per_image() is None
    for _ in range(40):
        overlaps.update(np.zeros((50, 50)))
    assert overlaps.per_image().tolist() == [1.0]
