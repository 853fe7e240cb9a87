"""Times every metric on 150 maps of 512 x 512, and checks AUPRO against its definition on very skewed maps.

python benchmarks/metrics_speed.py

With an interpreter that has anomalib (and `src` on PYTHONPATH), its AUPRO is timed in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from unflaw.evaluation.metrics import PixelAccumulator, image_metrics, partial_auc

Array = np.ndarray[Any, Any]

SKEWED: dict[str, Callable[[Array], Array]] = {
    "rand": lambda x: x,
    "rand ** 30": lambda x: x**30,
    "0.5 + 1e-6 rand, one pixel 1e6": lambda x: np.where(x == x.max(), 1e6, 0.5 + 1e-6 * x),
    "exp(20 rand)": lambda x: np.exp(20 * x),
    "8 levels": lambda x: np.floor(8 * x),
}


def examples(n: int, size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return smooth random maps (n, size, size) float32, and masks of which three quarters hold 1 to 10 discs."""
    maps = ndimage.gaussian_filter(rng.random((n, size, size), np.float32), (0, 3, 3))
    masks = np.zeros(maps.shape, bool)
    rows, columns = np.ogrid[:size, :size]
    for i in range(n // 4, n):
        for _ in range(rng.integers(1, 11)):
            y, x = rng.integers(0, size, 2)
            masks[i] |= (rows - y) ** 2 + (columns - x) ** 2 < rng.integers(2, size // 12) ** 2
    return maps + np.float32(0.05) * masks, masks


def definition_of_aupro(maps: Array, masks: Array, limit: float) -> float:
    """AUPRO from the overlap of every region and the FPR at every distinct value of the maps, by trapezoids."""
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        labels, n = ndimage.label(mask, np.ones((3, 3)))
        regions += [scores[labels == k] for k in range(1, n + 1)]
    thresholds = np.unique(maps)[::-1]

    def share(scores: Array) -> Array:  # share of scores >= each threshold, after a zero
        return np.append(0, 1 - np.searchsorted(np.sort(scores), thresholds) / len(scores))

    fpr, pro = share(maps[~masks]), np.mean([share(r) for r in regions], axis=0)
    inside = np.searchsorted(fpr, limit)
    x = np.append(fpr[:inside], limit)
    start, stop = inside - 1, inside
    slope = (pro[stop] - pro[start]) / (fpr[stop] - fpr[start])
    y = np.append(pro[:inside], pro[start] + slope * (limit - fpr[start]))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit)


def best_of(times: int, run: Callable[[], Any]) -> float:
    """Shortest of several wall times of a call, in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def theirs(maps: Array, masks: Array, ours: Callable[[], float | None]) -> None:
    """Print anomalib's AUPRO on the same maps and the ratio of its time to ours; the two run in turns."""
    import torch
    from anomalib.metrics.aupro import _AUPRO

    tensors = torch.from_numpy(maps)[:, None], torch.from_numpy(masks).int()[:, None]

    def run() -> float:
        metric = _AUPRO(fpr_limit=0.3)
        for scores, mask in zip(*tensors, strict=True):
            metric.update(scores, mask)
        return float(metric.compute())

    pairs = [(best_of(1, run), best_of(1, ours)) for _ in range(3)]
    slow, fast = (min(times) for times in zip(*pairs, strict=True))
    print(f"| anomalib, AUPRO at 0.3 | {slow:.2f}: {slow / fast:.0f} times ours |")
    print(f"| AUPRO at 0.3, ours and anomalib's | {ours():.6f}, {run():.6f} |")


def main() -> None:
    rng = np.random.default_rng(0)
    maps, masks = examples(150, 512, rng)
    labels = np.any(masks, axis=(1, 2))

    def filled(n: int = len(maps), **kwargs: int) -> PixelAccumulator:
        pixels = PixelAccumulator(**kwargs)
        for scores, mask in zip(maps[:n], masks[:n], strict=True):
            pixels.update(scores, mask)
        return pixels

    def aupro() -> float | None:
        return partial_auc(filled().rankings()[1], 0.3)

    def everything(n: int = len(maps)) -> None:
        image_metrics(maps[:n].max(axis=(1, 2)), labels[:n])
        filled(n).compute()

    few = slice(0, 50)
    truth, scores = masks[few].ravel(), maps[few].ravel()
    print("| what | seconds |\n| --- | --- |")
    print(f"| 150 updates of 512 x 512 | {best_of(3, filled):.2f} |")
    print(f"| updates and AUPRO at 0.3 | {best_of(3, aupro):.2f} |")
    print(f"| updates and all eight metrics | {best_of(3, everything):.2f} |")
    print(f"| the same on the first 50 maps | {best_of(3, lambda: everything(50)):.2f} |")
    sklearn = best_of(1, lambda: (roc_auc_score(truth, scores), average_precision_score(truth, scores)))
    print(f"| scikit-learn, pixel AUROC and AP alone, first 50 maps | {sklearn:.2f} |")

    if find_spec("anomalib"):
        theirs(maps, masks, aupro)

    limit = 2**22
    exact, bounded = filled().compute(), filled(limit=limit).compute()
    print(f"\n| metric | exact | difference with a buffer of {limit} |\n| --- | --- | --- |")
    for name, value in exact.items():
        print(f"| {name} | {value:.6f} | {bounded[name] - value:+.1e} |")  # type: ignore[operator]

    print(
        "\n| maps of 12 x 64 x 64 | AUPRO at 0.3 | off its definition | at 0.05 | off |\n| "
        + " | ".join(["---"] * 5)
        + " |"
    )
    _, masks = examples(12, 64, rng)
    noise = rng.random(masks.shape) * 0.8 + 0.2 * masks
    for name, transform in SKEWED.items():
        maps = transform(noise).astype(np.float32)
        result = filled(12).compute()
        cells = []
        for key, upto in (("aupro_30", 0.3), ("aupro_05", 0.05)):
            value = result[key] or 0.0
            cells.append(f"{value:.6f} | {abs(value - definition_of_aupro(maps, masks, upto)):.0e}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
