"""Metrics of a data set from anomaly maps and image scores of any source; in bounded memory, no torch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from unflaw.datasets import Dataset, Sample
from unflaw.datasets.samples import some
from unflaw.errors import ImageError
from unflaw.evaluation.bootstrap import MapSpool, PerImage
from unflaw.evaluation.metrics import (
    Array,
    OverlapAccumulator,
    PixelAccumulator,
    auroc,
    image_metrics,
    image_ranking,
    precision_recall_curve,
    roc_curve,
)
from unflaw.imaging.reading import read_mask
from unflaw.imaging.tiling import Box, Preparation
from unflaw.imaging.transforms import marked, prepare_mask
from unflaw.postprocessing.regions import EIGHT_CONNECTED, flagged


class RegionTally:
    """Counts of true regions, and of predicted ones above a pixel threshold and an area (share of the image)."""

    def __init__(self, threshold: float, minimum_area: float) -> None:
        self.threshold, self.minimum_area = threshold, minimum_area
        self.touched = self.true = self.good = self.good_with = self.false = 0

    def add(self, anomaly_map: Array, mask: Array | None, valid: Box, counted: Array | None = None) -> None:
        """Add a map (h, w) and the mask of a defective image; true regions are 8-connected as well."""
        labels, n = flagged(anomaly_map, self.threshold, valid, self.minimum_area, counted)
        if mask is None:
            self.good, self.good_with, self.false = self.good + 1, self.good_with + (n > 0), self.false + n
        else:
            areas, count = ndimage.label(mask, EIGHT_CONNECTED)
            self.true += count
            self.touched += len(np.setdiff1d(areas[labels > 0], 0))

    def metrics(self) -> dict[str, Any]:
        """Return region metrics; shares are None if undefined."""
        return {
            "region_recall": self.touched / self.true
            if self.true
            else None,  # true regions that a predicted one touches
            "regions_found": self.touched,
            "regions_true": self.true,
            "good_with_regions": self.good_with / self.good if self.good else None,  # share of good images with any
            "false_regions": self.false / self.good if self.good else None,  # per good image
        }


class Measurement:
    """Metrics of the test images of a data set, added one by one.

    Pixel metrics are computed on the prepared canvas (masks by nearest neighbour) over good images and defective ones
    with a mask that is not empty there; None if no image has a mask.

    Args:
        dataset: The data set; its test images tell whether there are masks.
        preparation: Preparation of the images.
        regions: Pixel threshold and minimum area of predicted regions, for region metrics.
        spool: Keep the maps in a file for `per_image`.

    Attributes:
        rows: Per image "path label defect score" and the facts given to `add`.
        vanished: Masks of small defects that are empty on the canvas; their images count for image metrics only.
    """

    def __init__(
        self,
        dataset: Dataset,
        preparation: Preparation,
        *,
        regions: tuple[float, float] | None = None,
        spool: bool = False,
    ) -> None:
        self.preparation = preparation
        self.masks_known = any(sample.mask for sample in dataset.test)
        self.rows: list[dict[str, Any]] = []
        self.vanished: list[str] = []
        self._pixels, self._overlap = PixelAccumulator(), OverlapAccumulator()
        self._saturated = PixelAccumulator() if any(sample.regions for sample in dataset.test) else None
        self._per_defect: dict[str, PixelAccumulator] = defaultdict(lambda: PixelAccumulator(limit=2**22))
        self._tally = None if regions is None else RegionTally(*regions)
        self._spool = MapSpool() if spool and self.masks_known else None

    def add(
        self,
        sample: Sample,
        score: float,
        anomaly_map: Array,
        valid: Box,
        counted: Array | None = None,
        **facts: Any,
    ) -> Array | None:
        """Add an image with its score, its map (h, w) and the box (x0, y0, x1, y1) of the canvas that it fills.

        `counted`: region of interest, (h, w) bool; None: all of `valid`. `facts`: further columns of its row. Returns
        the mask on the canvas, bool (h, w); None for a good image and for a missing, unreadable or vanished mask.
        """
        row = {"path": str(sample.path), "label": sample.label, "defect": sample.defect, "score": score}
        self.rows.append(row | facts)
        mask = self._mask(sample)
        if self._tally is not None and (sample.label == 0 or mask is not None):
            self._tally.add(anomaly_map, mask, valid, counted)
        if self.masks_known and (sample.label == 0 or mask is not None):
            x0, y0, x1, y1 = valid
            inside = np.s_[y0:y1, x0:x1]
            crop, truth = anomaly_map[inside], None if mask is None else mask[inside]
            counts = None if counted is None else counted[inside]
            self._pixels.update(crop, truth, counts)
            if counts is None:
                self._overlap.update(crop, truth)
            else:
                self._overlap.update(crop[counts], None if truth is None else truth[counts])
            if self._saturated is not None:
                regions = self._regions(sample, inside) if sample.regions else None
                self._saturated.update(crop, truth, counts, regions)
            if sample.label:
                self._per_defect[sample.defect].update(crop, truth, counts)
            if self._spool is not None:
                self._spool.add(len(self.rows) - 1, crop if counts is None else np.where(counts, crop, np.nan), truth)
        return mask

    def metrics(self) -> dict[str, Any]:
        """Return METRICS of `results`, None if undefined, region metrics, "per_defect", "n_images" and "n_good".

        "per_defect" compares each defect type with all good images, and has pixel AUROC within images of that type.
        """
        overlap = self._overlap.per_image()
        found = {
            **image_metrics(*self._scores_and_labels()),
            **self._pixels.compute(),
            "aupimo": None if overlap is None else float(overlap.mean()),
            "spro_05": None if self._saturated is None else self._saturated.compute()["aupro_05"],
        }
        if not self.masks_known:
            found |= {name: None for name in found if not name.startswith("image")}
        if self._tally is not None:
            found |= self._tally.metrics()
        labels = self._scores_and_labels()[1]
        counts = {"n_images": len(labels), "n_good": int((labels == 0).sum())}
        return {**found, "per_defect": self._per_defect_table(), **counts}

    def curves(self) -> dict[str, tuple[Array, Array]]:
        """Points for plots, `name -> (x, y)`: "roc" and "pr" over images, "pro" over pixels, where defined."""
        ranking = image_ranking(*self._scores_and_labels())
        curves = {"roc": roc_curve(ranking), "pr": precision_recall_curve(ranking)}
        if self.masks_known:
            curves["pro"] = self._pixels.curves()["pro"]
        return {name: (curve[:, 0], curve[:, 1]) for name, curve in curves.items() if curve is not None}

    def per_image(self) -> PerImage:
        """Data of each image for `bootstrap`; of pixels only with `spool` and masks."""
        scores, labels = self._scores_and_labels()
        paths = [Path(row["path"]).absolute() for row in self.rows]
        root = os.path.commonpath([path.parent for path in paths]) if paths else ""
        names = [path.relative_to(root).as_posix() for path in paths]  # independent of the folder of the data
        tables = None if self._spool is None else self._spool.tables(len(names), self._pixels.rankings()[0])
        return PerImage(names, labels, scores, tables)

    def _scores_and_labels(self) -> tuple[Array, Array]:
        return np.array([row["score"] for row in self.rows]), np.array([row["label"] for row in self.rows], int)

    def _mask(self, sample: Sample) -> Array | None:
        if not sample.label or sample.mask is None:
            return None
        try:
            original = read_mask(sample.mask)
            mask = prepare_mask(original, self.preparation)
        except ImageError:
            return None  # `load_dataset` reports unreadable masks
        if not mask.any() and marked(original, self.preparation).any():
            self.vanished.append(str(sample.mask))
            return None
        return mask

    @property
    def problems(self) -> list[str]:
        """A sentence on the vanished masks, if there are any."""
        return [f"Masks that show nothing at this size: {some(self.vanished)}."] if self.vanished else []

    def _regions(self, sample: Sample, inside: Any) -> Iterator[tuple[Array, float]]:
        """Iterate over masks and saturations on the canvas; a saturation keeps its share of the region."""
        for region in sample.regions:
            original = read_mask(region.mask)
            mask = prepare_mask(original, self.preparation)[inside]
            share = region.saturation if region.relative else region.saturation / original.sum()
            if mask.any():
                yield mask, min(share, 1) * mask.sum()

    def _per_defect_table(self) -> dict[str, dict[str, Any]]:
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self.rows:
            groups[row["defect"] if row["label"] else ""].append(row)
        good = [row["score"] for row in groups.pop("", [])]
        table: dict[str, dict[str, Any]] = {}
        for defect, members in sorted(groups.items()):
            scores = [row["score"] for row in members]
            ranking = image_ranking([*good, *scores], [0] * len(good) + [1] * len(scores))
            pixels = self._per_defect[defect].compute() if defect in self._per_defect else {}
            table[defect] = {
                "n_images": len(members),
                "image_auroc": auroc(ranking),
                "pixel_auroc": pixels.get("pixel_auroc"),
            }
            if "verdict" in members[0]:
                for column, verdict in (("found", "defect"), ("review", "review")):
                    table[defect][column] = sum(row["verdict"] == verdict for row in members)
        return table
