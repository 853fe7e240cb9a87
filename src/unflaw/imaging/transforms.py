"""Images in: find files, read them, and bring them to the size that a detector works at.

Training, evaluation, prediction, the HTTP service and exported models all enter by `read` and `windows`, so that no two
of them can resize differently.
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
from unflaw.imaging.reading import image_size, name_of, read
from unflaw.imaging.statistics import describe
from unflaw.imaging.tiling import Box, Preparation, TilingGeometry, Window, layout
from unflaw.io.brief import brief
from unflaw.io.listing import SUFFIXES, list_images, visible_files

__all__ = [
    "SUFFIXES",
    "Box",
    "ImageError",
    "Preparation",
    "Readable",
    "image_size",
    "list_images",
    "read",
    "visible_files",
]

AT_ONCE = 2**24  # pixels of an image that are resized at once: above, in strips


@brief
@dataclass(frozen=True)
class ModelInput:
    """What a window shows of an image."""

    pixels: np.ndarray  # (3, size, size) float32 in [0, 1]
    window: Window

    @property
    def box(self) -> Box:
        """The part of the canvas that the image fills."""
        return self.window.box

    def image(self) -> np.ndarray:
        """(size, size, 3) uint8."""
        return (self.pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8)

    @property
    def layout(self) -> TilingGeometry:
        """Of the image."""
        return self.window.layout


def prepare(image: np.ndarray, preparation: Preparation) -> ModelInput:
    """Bring (H, W, 3) from `read` to one canvas: all of it, or of its region of interest, whatever `tile` says.

    Raises:
        ImageError: It has nothing in the region of interest.
    """
    return _cut(image, Window(_laid(image, preparation.model_copy(update={"tile": None})), 0))


def windows(image: np.ndarray, preparation: Preparation) -> Iterable[ModelInput]:
    """(H, W, 3) from `read` window by window: bilinear, antialiased where it shrinks. The only resize rule there is.

    Images of 8 bits are resized in 8 bits, which is several times faster. What is outside of a region of interest is
    mid-grey. Of an image in tiles one window at a time is made, when it is asked for.

    Raises:
        ImageError: It has nothing in the region of interest.
    """
    laid = _laid(image, preparation)
    if not laid.places or (laid.counted is not None and not laid.counted.any()):
        width, height = laid.original_size
        raise ImageError(
            f"has {width} × {height} pixels, of which the mask in preparation.roi leaves none once it is resized; "
            "mark larger areas or raise preparation.size"
        )
    made = (_cut(image, Window(laid, number)) for number in range(len(laid)))
    return made if preparation.tile is not None else list(made)


def _laid(image: np.ndarray, preparation: Preparation) -> TilingGeometry:
    try:
        return layout(image.shape[1], image.shape[0], preparation)
    except ValueError as error:
        raise ImageError(str(error)) from error


def _cut(image: np.ndarray, window: Window) -> ModelInput:
    (x, y), (x0, y0, x1, y1), side = window.place, window.box, window.layout.preparation.size
    pixels = _resized(image, window.layout, (x + x0, y + y0, x + x1, y + y1))
    pixels = np.pad(pixels, ((0, 0), (y0, side - y1), (x0, side - x1)), mode="edge")
    return ModelInput(np.ascontiguousarray(pixels), window)


def _resized(image: np.ndarray, laid: TilingGeometry, box: Box) -> np.ndarray:
    """What a box of the canvas shows of an image, (3, h, w) float32 in [0, 1]."""
    x0, y0, x1, y1 = box
    source = laid.source(box)
    if (source[2] - source[0]) * (source[3] - source[1]) > AT_ONCE and y1 - y0 > 1:
        middle = (y0 + y1) // 2
        return np.concatenate([_resized(image, laid, (x0, *rows)) for rows in ((y0, x1, middle), (middle, x1, y1))], 1)
    left, top, right, bottom = laid.crop
    size = x1 - x0, y1 - y0
    # with the pixels around that the filter may reach, so that every box is a cut-out of one resized image
    reach = [2 + int((end - start) / side) for start, end, side in zip(source[:2], source[2:], size, strict=True)]
    x_start, y_start = max(int(source[0]) - reach[0], left), max(int(source[1]) - reach[1], top)
    x_end, y_end = min(ceil(source[2]) + reach[0], right), min(ceil(source[3]) + reach[1], bottom)
    part = image[y_start:y_end, x_start:x_end]
    if isinstance(laid.preparation.roi, str):
        counts = laid.region_of((x_start, y_start, x_end, y_end), (x_end - x_start, y_end - y_start))
        part = np.where(counts[..., None], part, part.dtype.type(128 if part.dtype == np.uint8 else 0.5))
    exact = source[0] - x_start, source[1] - y_start, source[2] - x_start, source[3] - y_start
    limits = (part.shape[1], part.shape[0]) * 2
    within = tuple(min(max(edge, 0), limit) for edge, limit in zip(exact, limits, strict=True))  # but for rounding
    if part.dtype == np.uint8:
        resized = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR, within))
        return resized.transpose(2, 0, 1) / np.float32(255)
    channels = (Image.fromarray(channel) for channel in np.ascontiguousarray(part.transpose(2, 0, 1), np.float32))
    pixels = np.stack([np.asarray(channel.resize(size, Image.Resampling.BILINEAR, within)) for channel in channels])
    return pixels.clip(0, 1)  # rounding may leave the range


@brief
class PreparedImage(NamedTuple):
    """An image that has been read.

    Attributes:
        windows: What is seen of it; with tiles, made when asked for, once.
        described: What `drift.describe` says of it.
    """

    windows: Iterable[ModelInput]
    described: np.ndarray


def load_windows(image: np.ndarray, preparation: Preparation) -> PreparedImage:
    """(H, W, 3) from `read`, ready to be looked at.

    Raises:
        ImageError: As `windows`.
    """
    cut = windows(image, preparation)
    whole = prepare(image, preparation) if preparation.tile is not None else next(iter(cut))
    x0, y0, x1, y1 = whole.box
    return PreparedImage(cut, describe(whole.image()[y0:y1, x0:x1]))


def try_load_windows(
    source: Path | bytes | Readable | InMemory, preparation: Preparation, name: str | None = None
) -> PreparedImage | ImageError:
    """`load_windows` of a file, or why it could not be read: one bad file must not end a batch.

    Args:
        source: As of `read`: its path, its bytes, or what reads them.
        name: What messages call it; by default its path.
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
    """`prepare` of a file, or why it could not be read."""
    try:
        return prepare(read(path), preparation)
    except ImageError as error:
        return error


def marked(mask: np.ndarray, preparation: Preparation) -> np.ndarray:
    """What a mask (H, W) marks of what counts of its image: a cut-out of it, bool, not resized."""
    laid = layout(mask.shape[1], mask.shape[0], preparation)
    x0, y0, x1, y1 = laid.crop
    inside = mask[y0:y1, x0:x1]
    return inside & laid.region_of(laid.crop, inside.shape[::-1]) if isinstance(preparation.roi, str) else inside


def prepare_mask(mask: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Bring (H, W) bool to the map of an image in the geometry of `windows`, by nearest pixel, as bool.

    The padding is False, and so is what is outside of a region of interest.
    """
    laid = layout(mask.shape[1], mask.shape[0], preparation)
    x0, y0, x1, y1 = laid.box
    image = Image.fromarray(mask.astype(np.uint8))
    resized = image.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST, box=laid.crop)
    found = np.zeros(laid.shape, bool)
    found[y0:y1, x0:x1] = np.asarray(resized, bool)
    return found if laid.counted is None else found & laid.counted
