"""Geometry of resizing, tiling and regions of interest; no pixels.

Without tiles, one window shows the whole canvas. With tiles, the canvas is as large as the image needs, and overlapping
windows of the detector's size cover it. Other code need not distinguish the two cases.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import ceil, inf
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from unflaw.io.brief import brief

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are outside
ROI_SIDE = 1024  # largest side of a mask in the detector file
MAP_PIXELS = 2**22  # largest map; larger canvases have maps at a fraction of their resolution
MOST_CELLS = 2**16  # of a feature grid
Side = Annotated[int, Field(ge=32, le=4096)]
_PNG = "data:image/png;base64,"


@brief
class Preparation(BaseModel):
    """Options for resizing images to the canvas of a detector.

    `stretch` fills the canvas and changes the aspect ratio; `pad` keeps it, centres the image and repeats its edges.
    `tile` keeps the aspect ratio too, and pads an image smaller than a tile at the right and below. For elongated
    products, a canvas of their aspect ratio keeps small defects visible.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: Side | tuple[Side, Side] = Field(256, description="canvas, pixels: side of a square, or width and height")
    fit: Literal["stretch", "pad"] = "stretch"
    tile: int | None = Field(
        None, ge=8, description="side of the square tiles that an image is cut into, its pixels; None: no tiles"
    )
    overlap: float = Field(0.25, ge=0, le=0.75, description="least overlap of adjacent tiles, share of their side")
    roi: str | tuple[float, float, float, float] | None = Field(
        None,
        description="region of interest: x0, y0, x1, y1, in pixels or, up to 1, in shares of the sides; or a mask file",
    )

    @field_validator("size", mode="before")
    @classmethod
    def _sides(cls, size: Any) -> Any:
        size = parse_size(size) if isinstance(size, str) else size
        sides = size if isinstance(size, list | tuple) else [size]
        if not all(isinstance(side, int) and 32 <= side <= 4096 for side in sides):
            raise ValueError("each side needs 32 to 4096 pixels, as in 256 or 512x224")
        return size[0] if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] else size

    @model_validator(mode="after")
    def _tiles_are_square(self) -> Preparation:
        if self.tile is not None and not isinstance(self.size, int):
            raise ValueError(f"tiles are square; give one side for preparation.size, not {self.size_text}")
        return self

    @field_validator("roi")
    @classmethod
    def _region(cls, roi: Any) -> Any:
        if roi is None:
            return None
        if isinstance(roi, str):
            try:
                x0, y0, x1, y1 = roi = tuple(map(float, roi.split(",")))
            except ValueError:
                return _checked_mask(roi) if roi.startswith(_PNG) else _encoded_mask(roi)
        x0, y0, x1, y1 = roi
        if not (0 <= x0 < x1 < inf and 0 <= y0 < y1 < inf):
            raise ValueError("a region of interest needs finite numbers with 0 ≤ x0 < x1 and 0 ≤ y0 < y1")
        return roi

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the canvas."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def size_text(self) -> str:
        """The size as `parse_size` takes it: 256, or 512x224."""
        return str(self.size) if isinstance(self.size, int) else f"{self.size[0]}x{self.size[1]}"

    @property
    def covers(self) -> bool:
        """True if every image fills its canvas."""
        return self.fit == "stretch" and self.tile is None and not isinstance(self.roi, str)


def parse_size(text: str) -> int | tuple[int, int]:
    """Parses `256`, the side of a square, or `512x224`, width and height. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,6})(?:\s*[x×,]\s*(\d{1,6}))?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is no size; give a side such as 256, or width x height such as 512x224")
    width, height = int(found[1]), int(found[2] or found[1])
    return width if width == height else (width, height)


def grid_shape(shorter: int, canvas: tuple[int, int], multiple: int = 1, most: int = MOST_CELLS) -> tuple[int, int]:
    """Rows and columns of a grid of about square cells.

    Args:
        shorter: Cells along the shorter side of the canvas.
        canvas: Width and height in pixels.
        multiple: The number of cells along the longer side is one of it.
        most: Largest number of cells.

    Raises:
        ValueError: The grid has too many cells.
    """
    least = min(canvas)
    columns, rows = (
        shorter if side == least else max(1, round(shorter * side / least / multiple)) * multiple for side in canvas
    )
    if rows * columns > most:
        raise ValueError(
            f"a canvas of {canvas[0]} × {canvas[1]} pixels has {rows} × {columns} cells, which are too many; lower "
            "features.grid, or choose a canvas that is less elongated"
        )
    return rows, columns


def _encoded_mask(path: str) -> str:
    """Encode a mask file as text for a configuration: a 1-bit PNG; when shrunk, a pixel is the maximum of its box."""
    from unflaw.imaging.reading import read_mask

    mask = read_mask(path)
    shrink = min(1, ROI_SIDE / max(mask.shape))
    for axis, side in enumerate(mask.shape):
        boxes = max(1, round(side * shrink))
        mask = np.logical_or.reduceat(mask, np.arange(boxes) * side // boxes, axis)
    if not mask.any():
        raise ValueError(f"{path}: marks nothing; what counts must not be black")
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", optimize=True)
    return _PNG + base64.b64encode(file.getvalue()).decode()


@lru_cache(8)
def _decoded_mask(roi: str) -> Image.Image:
    image = PngImageFile(io.BytesIO(base64.b64decode(roi.removeprefix(_PNG))))
    if max(image.size) > ROI_SIDE:
        raise ValueError(f"a region of interest of {image.width} × {image.height} pixels is too large")
    return image.convert("L")


def _checked_mask(roi: str) -> str:
    """Return an encoded mask. Raises ValueError if it is damaged, too large or empty."""
    try:
        marked = _decoded_mask(roi).getbbox()
    except Exception as error:  # whatever decoders raise
        raise ValueError(f"the mask of the region of interest is damaged ({error})") from error
    if marked is None:
        raise ValueError("the mask of the region of interest marks nothing")
    return roi


class Window(NamedTuple):
    """The part of an image that a network processes at once.

    Attributes:
        layout: Geometry of the image.
        number: Index of the window.
    """

    layout: TilingGeometry
    number: int

    @property
    def place(self) -> tuple[int, int]:
        """Top left corner (x, y) on the canvas of the image."""
        return self.layout.places[self.number]

    @property
    def box(self) -> Box:
        """The part of the window that the image fills."""
        (x, y), (width, height) = self.place, self.layout.preparation.canvas
        x0, y0, x1, y1 = self.layout.filled
        return max(x0 - x, 0), max(y0 - y, 0), min(x1 - x, width), min(y1 - y, height)

    def cells(self, grid: int | Sequence[int]) -> np.ndarray:
        """Cells of a grid over the window that overlap the image or its region of interest, (rows, columns) bool.

        `grid`: rows and columns; a number stands for both.
        """
        (width, height), (x, y), (x0, y0, x1, y1) = self.layout.preparation.canvas, self.place, self.box
        shape = (grid, grid) if isinstance(grid, int) else tuple(grid)
        counts = np.zeros((height, width), bool)
        counts[y0:y1, x0:x1] = self.layout.region((x + x0, y + y0, x + x1, y + y1), (x1 - x0, y1 - y0))
        sums = np.pad(counts.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        (top, bottom), (left, right) = (
            (np.arange(n) * side // n, -(-np.arange(1, n + 1) * side // n))
            for n, side in zip(shape, (height, width), strict=True)
        )
        rows = sums[bottom] - sums[top]
        return (rows[:, right] - rows[:, left]) > 0


class TilingGeometry:
    """Position of an image on its canvas, of the windows over it, and of the map.

    Args:
        width, height: Size of the image, pixels.
        preparation: Preparation of the detector.

    Attributes:
        crop: The region of interest, or its bounding box, in pixels of the image.
        filled: The part of the canvas that `crop` fills.
        canvas: Width and height of the canvas: the detector's size, or with tiles as large as the image needs.
        places: Top left corners of the windows on the canvas. Together they cover the region of interest.
        step: Pixels of the canvas per pixel of the map and axis: 1 unless the map would exceed MAP_PIXELS.
    """

    def __init__(self, width: int, height: int, preparation: Preparation) -> None:
        self.original_size, self.preparation = (width, height), preparation
        size = preparation.canvas
        self.crop = _crop(width, height, preparation.roi)
        x0, y0, x1, y1 = self.crop
        w, h = x1 - x0, y1 - y0
        self.step = 1
        if preparation.tile is None:
            across, down = size
            if preparation.fit == "pad":
                wider = w * size[1] > h * size[0]  # than the canvas
                limit, side = (size[0], w) if wider else (size[1], h)
                across, down = (max(1, round(length * limit / side)) for length in (w, h))
            left, top = (size[0] - across) // 2, (size[1] - down) // 2
            self.canvas = size
        else:
            side = size[0]
            across, down = (max(1, round(length * side / preparation.tile)) for length in (w, h))
            left = top = 0
            divisors = [step for step in range(1, side + 1) if side % step == 0]
            fits = [step for step in divisors if across * down <= MAP_PIXELS * step**2]
            self.step = next(iter(fits), side)
            wide, high = (max(side, -(-length // self.step) * self.step) for length in (across, down))
            self.canvas = wide, high
        self.filled: Box = (left, top, left + across, top + down)
        self.columns, self.rows = (
            _window_starts(length, side, preparation.overlap, self.step)
            for length, side in zip(self.canvas, size, strict=True)
        )
        self.places = [(x, y) for y in self.rows for x in self.columns]
        if isinstance(preparation.roi, str) and len(self.places) > 1:
            used = [Window(self, number).cells(32).any() for number in range(len(self.places))]
            self.places = [place for place, use in zip(self.places, used, strict=True) if use]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.places)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (h, w) of the map."""
        return self.canvas[1] // self.step, self.canvas[0] // self.step

    @property
    def box(self) -> Box:
        """The part of the map that the image, or the box around its region of interest, fills."""
        x0, y0, x1, y1 = self.filled
        return x0 // self.step, y0 // self.step, -(-x1 // self.step), -(-y1 // self.step)

    def inside(self, values: np.ndarray) -> np.ndarray:
        """Values of a map (h, w) inside the region of interest, (n,)."""
        x0, y0, x1, y1 = self.box
        return values[y0:y1, x0:x1].ravel() if self.counted is None else values[self.counted]

    @cached_property
    def counted(self) -> np.ndarray | None:
        """Region of interest on the map, (h, w) bool; None if that is all of `box`."""
        if not isinstance(self.preparation.roi, str):
            return None
        counts = np.zeros(self.shape, bool)
        x0, y0, x1, y1 = self.box
        counts[y0:y1, x0:x1] = self.region(self.filled, (x1 - x0, y1 - y0))
        return counts

    def region(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Region of interest in a box of the canvas, (h, w) bool of the `size` (w, h), by nearest neighbour."""
        return self.region_of(self.source(box), size)

    def region_of(self, source: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
        """Region of interest in a box of the image, (h, w) bool of the `size` (w, h), by nearest neighbour."""
        if not isinstance(self.preparation.roi, str):
            return np.ones(size[::-1], bool)
        mask = _decoded_mask(self.preparation.roi)
        scale = (mask.width / self.original_size[0], mask.height / self.original_size[1]) * 2
        sides = (mask.width, mask.height) * 2
        x0, y0, x1, y1 = (min(max(edge * by, 0), side) for edge, by, side in zip(source, scale, sides, strict=True))
        return np.asarray(mask.resize(size, Image.Resampling.NEAREST, (x0, y0, x1, y1)), bool)

    def source(self, box: Box) -> tuple[float, float, float, float]:
        """Convert a box of the canvas to pixels of the image."""
        (left, top, right, bottom), (x0, y0, x1, y1) = self.filled, self.crop
        across, down = (x1 - x0) / (right - left), (y1 - y0) / (bottom - top)
        return (
            x0 + (box[0] - left) * across,
            y0 + (box[1] - top) * down,
            x0 + (box[2] - left) * across,
            y0 + (box[3] - top) * down,
        )

    def to_original(self, box: Box) -> Box:
        """Convert a box of the map to pixels of the image, rounded outward and clipped to `crop`.

        A box wholly in the padding has no area in the result.
        """
        (left, top, right, bottom), (x0, y0, x1, y1), step = self.filled, self.crop, self.step
        left_edge, right_edge = _rescale(box[0] * step - left, box[2] * step - left, x1 - x0, right - left)
        top_edge, bottom_edge = _rescale(box[1] * step - top, box[3] * step - top, y1 - y0, bottom - top)
        return x0 + left_edge, y0 + top_edge, x0 + right_edge, y0 + bottom_edge

    def points_to_original(self, points: np.ndarray) -> np.ndarray:
        """Convert points (..., 2), x and y on the map, to the image: float64, clipped to `crop`."""
        (left, top, right, bottom), (x0, y0, x1, y1) = self.filled, np.array(self.crop)
        scale = np.array([x1 - x0, y1 - y0]) / (right - left, bottom - top)
        return ((points * self.step - (left, top)) * scale + (x0, y0)).clip((x0, y0), (x1, y1))

    def area_to_original(self, area: float) -> float:
        """Convert an area in pixels of the map to pixels of the image."""
        (left, top, right, bottom), (x0, y0, x1, y1) = self.filled, self.crop
        return area * self.step**2 * ((x1 - x0) * (y1 - y0)) / ((right - left) * (bottom - top))


@lru_cache(256)
def layout(width: int, height: int, preparation: Preparation) -> TilingGeometry:
    """Return the `TilingGeometry` of an image; images of one size share it."""
    return TilingGeometry(width, height, preparation)


def _crop(width: int, height: int, roi: Any) -> Box:
    if roi is None:
        return 0, 0, width, height
    if isinstance(roi, str):
        mask = np.asarray(_decoded_mask(roi), bool)
        (y0, y1), (x0, x1) = (np.flatnonzero(mask.any(axis))[[0, -1]] + (0, 1) for axis in (1, 0))
        roi = x0 / mask.shape[1], y0 / mask.shape[0], x1 / mask.shape[1], y1 / mask.shape[0]
    if max(roi) <= 1:
        roi = roi[0] * width, roi[1] * height, roi[2] * width, roi[3] * height
    if roi[0] >= width or roi[1] >= height:
        raise ValueError(
            f"has {width} × {height} pixels, all outside of the region of interest {roi}; change preparation.roi"
        )
    left, top = min(int(roi[0] + 1e-6), width - 1), min(int(roi[1] + 1e-6), height - 1)
    right, bottom = (min(ceil(edge - 1e-6), side) for edge, side in zip(roi[2:], (width, height), strict=True))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _window_starts(side: int, size: int, overlap: float, step: int) -> list[int]:
    """Starts of evenly spaced windows that cover a side, multiples of `step`."""
    if side <= size:
        return [0]
    stride = max(step, int(size * (1 - overlap)) // step * step)
    count = -(-(side - size) // stride) + 1
    return [round(i * (side - size) / (count - 1) / step) * step for i in range(count)]


def _rescale(start: int, end: int, original: int, canvas: int) -> tuple[int, int]:
    # in whole numbers, so that no rounding error pushes an exact edge outward
    start, end = int(start) * original // canvas, -(-int(end) * original // canvas)
    return min(max(start, 0), original), min(max(end, 0), original)
