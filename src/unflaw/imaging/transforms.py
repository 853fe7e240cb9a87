"""Preparation of images and masks: resized to a detector's size and cut into windows.

Training, evaluation, prediction, the HTTP service and exported models all use `read` and `windows`, so that resizing is
the same everywhere.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unflaw.errors import ImageError
from unflaw.imaging.inputs import InMemory, Readable
from unflaw.imaging.limits import AT_ONCE
from unflaw.imaging.reading import name_of, read
from unflaw.imaging.statistics import describe
from unflaw.imaging.tiling import Box, Preparation, TilingGeometry, Window, layout
from unflaw.io.brief import brief


@brief
@dataclass(frozen=True)
class ModelInput:
    """The pixels of a window of an image."""

    pixels: np.ndarray  # (3, H, W) float32 in [0, 1], as large as the canvas or a tile
    window: Window

    @property
    def box(self) -> Box:
        """The part of the window that the image fills."""
        return self.window.box

    def image(self) -> np.ndarray:
        """Convert the pixels to (H, W, 3) uint8."""
        return (self.pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8)

    @property
    def layout(self) -> TilingGeometry:
        """Geometry of the image."""
        return self.window.layout


def prepare(image: np.ndarray, preparation: Preparation) -> ModelInput:
    """Resize (H, W, 3) from `read`, or its region of interest, to one window; `tile` is ignored.

    Raises ImageError if the image has no pixels in the region of interest.
    """
    return _model_input(image, Window(_geometry(image, preparation.model_copy(update={"tile": None})), 0))


def windows(image: np.ndarray, preparation: Preparation) -> Iterable[ModelInput]:
    """Resize (H, W, 3) from `read` to windows: bilinear, antialiased when shrinking.

    Images of 8 bits are resized in 8 bits, which is several times faster. Pixels outside a region of interest become
    mid-grey. With tiles, the windows are computed lazily. Raises ImageError if the image has no pixels in the region.
    """
    geometry = _geometry(image, preparation)
    if not geometry.places or (geometry.counted is not None and not geometry.counted.any()):
        width, height = geometry.original_size
        raise ImageError(
            f"has {width} × {height} pixels, of which the mask in preparation.roi leaves none once it is resized; "
            "mark larger areas or raise preparation.size"
        )
    made = (_model_input(image, Window(geometry, number)) for number in range(len(geometry)))
    return made if preparation.tile is not None else list(made)


def _geometry(image: np.ndarray, preparation: Preparation) -> TilingGeometry:
    try:
        return layout(image.shape[1], image.shape[0], preparation)
    except ValueError as error:
        raise ImageError(str(error)) from error


def _model_input(image: np.ndarray, window: Window) -> ModelInput:
    (x, y), (x0, y0, x1, y1), (width, height) = window.place, window.box, window.layout.preparation.canvas
    pixels = _resize(image, window.layout, (x + x0, y + y0, x + x1, y + y1))
    pixels = np.pad(pixels, ((0, 0), (y0, height - y1), (x0, width - x1)), mode="edge")
    return ModelInput(np.ascontiguousarray(pixels), window)


def _resize(image: np.ndarray, geometry: TilingGeometry, box: Box) -> np.ndarray:
    """Resize the part of an image in a box of the canvas, (3, h, w) float32 in [0, 1]."""
    x0, y0, x1, y1 = box
    source = geometry.source(box)
    if (source[2] - source[0]) * (source[3] - source[1]) > AT_ONCE and y1 - y0 > 1:
        middle = (y0 + y1) // 2
        return np.concatenate(
            [_resize(image, geometry, (x0, *rows)) for rows in ((y0, x1, middle), (middle, x1, y1))], 1
        )
    left, top, right, bottom = geometry.crop
    size = x1 - x0, y1 - y0
    # with the surrounding pixels that the filter may reach, so that every box equals a crop of one resized image
    reach = [2 + int((end - start) / side) for start, end, side in zip(source[:2], source[2:], size, strict=True)]
    x_start, y_start = max(int(source[0]) - reach[0], left), max(int(source[1]) - reach[1], top)
    x_end, y_end = min(ceil(source[2]) + reach[0], right), min(ceil(source[3]) + reach[1], bottom)
    part = image[y_start:y_end, x_start:x_end]
    if isinstance(geometry.preparation.roi, str):
        counts = geometry.region_of((x_start, y_start, x_end, y_end), (x_end - x_start, y_end - y_start))
        part = np.where(counts[..., None], part, part.dtype.type(128 if part.dtype == np.uint8 else 0.5))
    exact = source[0] - x_start, source[1] - y_start, source[2] - x_start, source[3] - y_start
    limits = (part.shape[1], part.shape[0]) * 2
    within = tuple(min(max(edge, 0), limit) for edge, limit in zip(exact, limits, strict=True))  # except for rounding
    if part.dtype == np.uint8:
        resized = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR, within))
        return resized.transpose(2, 0, 1) / np.float32(255)
    channels = (Image.fromarray(channel) for channel in np.ascontiguousarray(part.transpose(2, 0, 1), np.float32))
    pixels = np.stack([np.asarray(channel.resize(size, Image.Resampling.BILINEAR, within)) for channel in channels])
    return pixels.clip(0, 1)  # rounding may leave the range


@brief
class PreparedImage(NamedTuple):
    """An image that has been read and prepared.

    Attributes:
        windows: Its windows; with tiles, a lazy iterator that can be consumed once.
        described: Its `statistics.describe`.
    """

    windows: Iterable[ModelInput]
    described: np.ndarray


def load_windows(image: np.ndarray, preparation: Preparation) -> PreparedImage:
    """Prepare (H, W, 3) from `read`. Raises ImageError, see `windows`."""
    cut = windows(image, preparation)
    whole = prepare(image, preparation) if preparation.tile is not None else next(iter(cut))
    x0, y0, x1, y1 = whole.box
    return PreparedImage(cut, describe(whole.image()[y0:y1, x0:x1]))


def try_load_windows(
    source: Path | bytes | Readable | InMemory, preparation: Preparation, name: str | None = None
) -> PreparedImage | ImageError:
    """Apply `load_windows` to a source of `read`, or return the ImageError: one bad file must not end a batch.

    `name`: name of the image in messages; by default its path.
    """
    name = name or name_of(source)
    try:
        image = read(source, name=name)
    except ImageError as error:
        return error
    try:
        return load_windows(image, preparation)
    except ImageError as error:  # the file is whole: what else goes wrong from here on is no fault of it
        return ImageError(f"{name}: {error}")


def try_prepare(path: Path, preparation: Preparation) -> ModelInput | ImageError:
    """Apply `prepare` to a file, or return the ImageError."""
    try:
        return prepare(read(path), preparation)
    except ImageError as error:
        return error


def marked(mask: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Crop a mask (H, W) to the region of interest, bool, not resized."""
    geometry = layout(mask.shape[1], mask.shape[0], preparation)
    x0, y0, x1, y1 = geometry.crop
    inside = mask[y0:y1, x0:x1]
    return inside & geometry.region_of(geometry.crop, inside.shape[::-1])


def prepare_mask(mask: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Resize a mask (H, W) bool to the map of its image, by nearest neighbour, as bool.

    The padding and the pixels outside a region of interest are False.
    """
    geometry = layout(mask.shape[1], mask.shape[0], preparation)
    x0, y0, x1, y1 = geometry.box
    image = Image.fromarray(mask.astype(np.uint8))
    resized = image.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST, box=geometry.crop)
    found = np.zeros(geometry.shape, bool)
    found[y0:y1, x0:x1] = np.asarray(resized, bool)
    return found if geometry.counted is None else found & geometry.counted
