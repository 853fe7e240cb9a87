"""Export of regions for labelling tools: COCO and LabelMe."""

from __future__ import annotations

import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

from unflaw.errors import ImageError
from unflaw.inference.aggregation import Sink
from unflaw.io.files import write_atomically
from unflaw.io.words import count
from unflaw.postprocessing.results import Result

LABEL = "anomaly"


class Coco(Sink):
    """COCO object detection annotations: a category, a box and a polygon per region, with its peak as "score"."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        if not isinstance(outcome, Result):
            return
        width, height = outcome.size
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": str(path), "width": width, "height": height})
        for region in outcome.regions:
            x0, y0, x1, y1 = region.box
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": region.area,
                    "segmentation": [list(chain.from_iterable(region.contour))],
                    "iscrowd": 0,
                    "score": region.peak,
                }
            )

    def close(self) -> str:
        written = {
            "info": {"description": "Regions found by unflaw"},
            "licenses": [],
            "images": self.images,
            "categories": [{"id": 1, "name": LABEL, "supercategory": ""}],
            "annotations": self.annotations,
        }
        write_atomically(self.file, lambda file: file.write_text(json.dumps(written), "utf-8"))
        return f"{self.file}: {count(len(self.annotations), 'region')} on {count(len(self.images), 'image')} (COCO)"


class LabelMe(Sink):
    """LabelMe files, one per image: a polygon per region, with its peak as description, and the verdict as flags."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = self._written = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        number, self._number = self._number, self._number + 1
        if not isinstance(outcome, Result):
            return
        width, height = outcome.size
        shapes: list[dict[str, Any]] = [
            {
                "label": LABEL,
                "points": [list(point) for point in region.contour],
                "group_id": None,
                "description": f"peak {region.peak:.4g}",
                "shape_type": "polygon",
                "flags": {},
            }
            for region in outcome.regions
        ]
        written = {
            "version": "5.0.0",  # of the LabelMe format
            "flags": {name: name == outcome.verdict for name in ("good", "review", "defect")},
            "shapes": shapes,
            "imagePath": os.path.relpath(path, self.folder),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        file = self.folder / f"{numbered(number, path)}.json"
        write_atomically(file, lambda temporary: temporary.write_text(json.dumps(written), "utf-8"))
        self._written += 1

    def close(self) -> str:
        return f"{self.folder}: {count(self._written, 'file')} (LabelMe)"


def numbered(number: int, path: Path) -> str:
    """File name, without suffix, for output that belongs to an image; the name is shortened."""
    return f"{number:05d}_{path.stem.encode(errors='replace')[:100].decode(errors='ignore')}"
