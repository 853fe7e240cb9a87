"""Pictures in: read any supported file into one kind of array, and bring it to the size that a detector works at.

Training, evaluation, prediction, the HTTP service and exported models all enter by `read` and `windows`, so that no two
of them can resize differently.
"""

import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from PIL import WebPImagePlugin as WebP

from unflaw import containers
from unflaw.drift import describe
from unflaw.layout import Box, Layout, Preparation, Window, layout

__all__ = ["Box", "Preparation"]

PIXEL, OVERHEAD = 16, 2**26  # bytes of a file: for a pixel at most, four floats, and for all else in it
AT_ONCE = 2**24  # pixels of a picture that are resized at once: above, in strips
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# Content decides, not the suffix. The decoders are called directly rather than through PIL.Image.open: no other format
# is ever parsed, and the limit on pixels is ours instead of a process-wide setting that at first only warns.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DECODERS: dict[bytes, Any] = {
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"\xff\xd8": JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"RIFF": WebP.WebPImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    **dict.fromkeys(_TIFF, TiffImagePlugin.TiffImageFile),
}
_ORIENTATION = 0x0112  # the tag in EXIF and in TIFF
SIDEWAYS = (5, 6, 7, 8)


class Readable(Protocol):
    """What reads the bytes of a file when it is asked to, such as an open file."""

    def read(self) -> bytes: ...


class ImageError(ValueError):
    """A picture that cannot be used. The message names the file, what is wrong with it and what to do."""


def read(
    source: str | Path | bytes | Readable | Image.Image | np.ndarray,
    *,
    max_pixels: int = 200_000_000,
    name: str | None = None,
) -> np.ndarray:
    """Read one picture as RGB.

    Args:
        source: A path, the bytes of a file or a stream of them, a picture of Pillow, or an array (H, W) or
            (H, W, 1 to 4 channels) of bool, uint8, uint16, or floats in [0, 1].
        max_pixels: Refuse larger pictures before they are decoded.
        name: What messages call the picture; by default its path.

    Returns:
        (H, W, 3), contiguous: uint8, or float32 in [0, 1] for 16-bit sources (65535 is 1) and floats. Upright, as EXIF
        says; grey is repeated. What is transparent is put on black, since the colours stored under it are arbitrary.
        Colour PNG of 16 bits comes in 8, as Pillow decodes it: TIFF keeps 16. An array may come back as itself.

    Raises:
        ImageError: Missing, unreadable, empty, damaged, no picture of a supported format, several frames or pages, too
            large, or values outside the ranges above.
    """
    with _named(name or _name(source)):
        decoded = _decode(source, max_pixels)
        if isinstance(decoded, np.ndarray):
            return _rgb(decoded)
        width, height = decoded.size
        rows = max(1, AT_ONCE // max(width, 1))
        parts = (_rgb(_pixels(decoded.crop((0, y, width, min(y + rows, height))))) for y in range(0, height, rows))
        if rows >= height:
            return next(parts)
        first = next(parts)
        whole = np.empty((height, width, 3), first.dtype)  # a large picture in strips: no second copy is ever held
        for y, part in zip(range(0, height, rows), chain([first], parts), strict=True):
            whole[y : y + rows] = part
        return whole


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 1 to 4) of any accepted type → what `read` returns."""
    pixels = _unit(pixels)
    if pixels.shape[2] in (2, 4):
        pixels, alpha = pixels[..., :-1], pixels[..., -1:]
        if pixels.dtype == np.uint8:
            pixels = ((pixels.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)
        else:
            pixels = pixels * alpha
    return np.ascontiguousarray(pixels) if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask as (H, W) bool: True where any channel is not 0; in JPEG, which blurs, where it is over half.

    A folder stands for the union of the masks in it.

    Raises:
        ImageError: As `read`, or a folder without pictures or with pictures of several sizes.
    """
    if Path(path).is_dir():
        masks = [read_mask(file) for file in list_images(path)]
        if not masks:
            raise ImageError(f"{path}: holds no masks; put them there, or remove the folder")
        if len({mask.shape for mask in masks}) > 1:
            raise ImageError(f"{path}: holds masks of several sizes; all must have that of the picture")
        return np.logical_or.reduce(masks)
    red, green, blue = np.moveaxis(read(path), 2, 0)
    over = 127 if Path(path).suffix.lower() in {".jpg", ".jpeg"} else 0
    return (red > over) | (green > over) | (blue > over)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels that `read` would return, from the header alone where the format allows."""
    with _named(str(path)):
        data = _bytes(path)
        if data[:4] in _TIFF:  # many kinds, two readers: decoding is the one sure way
            decoded = _decode(data, max_pixels=200_000_000)
            return decoded.size if isinstance(decoded, Image.Image) else decoded.shape[1::-1]
        image = _open(data)
        return image.size[::-1] if image.getexif().get(_ORIENTATION) in SIDEWAYS else image.size


def visible_files(folder: str | Path) -> list[Path]:
    """All files under a folder, sorted, but for those that are hidden or lie in a hidden folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder; check the path")
    found, waiting = [], [folder]
    while waiting:  # Path.rglob calls itself for each level, and ends in a RecursionError
        with suppress(PermissionError, FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    waiting.append(Path(entry))
                elif not entry.name.startswith(".") and Path(entry).is_file():
                    found.append(Path(entry))
    return sorted(found, key=lambda f: f.as_posix())


def list_images(folder: str | Path) -> list[Path]:
    """The `visible_files` under a folder whose suffix is that of a picture."""
    return [f for f in visible_files(folder) if f.suffix.lower() in SUFFIXES]


@dataclass(frozen=True)
class Prepared:
    """What a window shows of a picture."""

    pixels: np.ndarray  # (3, size, size) float32 in [0, 1]
    window: Window

    @property
    def box(self) -> Box:
        """The part of the canvas that the picture fills."""
        return self.window.box

    def picture(self) -> np.ndarray:
        """(size, size, 3) uint8."""
        return (self.pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8)

    @property
    def layout(self) -> Layout:
        """Of the picture."""
        return self.window.layout


def prepare(image: np.ndarray, preparation: Preparation) -> Prepared:
    """Bring (H, W, 3) from `read` to one canvas: all of it, or of its region of interest, whatever `tile` says.

    Raises:
        ImageError: It has nothing in the region of interest.
    """
    return _cut(image, Window(_laid(image, preparation.model_copy(update={"tile": None})), 0))


def windows(image: np.ndarray, preparation: Preparation) -> Iterable[Prepared]:
    """(H, W, 3) from `read` window by window: bilinear, antialiased where it shrinks. The only resize rule there is.

    Pictures of 8 bits are resized in 8 bits, which is several times faster. What is outside of a region of interest is
    mid-grey. Of a picture in tiles one window at a time is made, when it is asked for.

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


def _laid(image: np.ndarray, preparation: Preparation) -> Layout:
    try:
        return layout(image.shape[1], image.shape[0], preparation)
    except ValueError as error:
        raise ImageError(str(error)) from error


def _cut(image: np.ndarray, window: Window) -> Prepared:
    (x, y), (x0, y0, x1, y1), side = window.place, window.box, window.layout.preparation.size
    pixels = _resized(image, window.layout, (x + x0, y + y0, x + x1, y + y1))
    pixels = np.pad(pixels, ((0, 0), (y0, side - y1), (x0, side - x1)), mode="edge")
    return Prepared(np.ascontiguousarray(pixels), window)


def _resized(image: np.ndarray, laid: Layout, box: Box) -> np.ndarray:
    """What a box of the canvas shows of a picture, (3, h, w) float32 in [0, 1]."""
    x0, y0, x1, y1 = box
    source = laid.source(box)
    if (source[2] - source[0]) * (source[3] - source[1]) > AT_ONCE and y1 - y0 > 1:
        middle = (y0 + y1) // 2
        return np.concatenate([_resized(image, laid, (x0, *rows)) for rows in ((y0, x1, middle), (middle, x1, y1))], 1)
    left, top, right, bottom = laid.crop
    size = x1 - x0, y1 - y0
    # with the pixels around that the filter may reach, so that every box is a cut-out of one resized picture
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


class Picture(NamedTuple):
    """A picture that has been read.

    Attributes:
        windows: What is seen of it; with tiles, made when asked for, once.
        described: What `drift.describe` says of it.
    """

    windows: Iterable[Prepared]
    described: np.ndarray


def show(image: np.ndarray, preparation: Preparation) -> Picture:
    """(H, W, 3) from `read`, ready to be looked at.

    Raises:
        ImageError: As `windows`.
    """
    cut = windows(image, preparation)
    whole = prepare(image, preparation) if preparation.tile is not None else next(iter(cut))
    x0, y0, x1, y1 = whole.box
    return Picture(cut, describe(whole.picture()[y0:y1, x0:x1]))


def try_show(
    source: Path | bytes | Readable, preparation: Preparation, name: str | None = None
) -> Picture | ImageError:
    """`show` of a file, or why it could not be read: one bad file must not end a batch.

    Args:
        source: As of `read`: its path, its bytes, or what reads them.
        name: What messages call it; by default its path.
    """
    name = name or _name(source)
    try:
        image = read(source, name=name)
    except ImageError as error:
        return error
    try:
        return show(image, preparation)
    except ImageError as error:  # the file is whole: what else goes wrong from here on is no fault of it
        return ImageError(f"{name}: {error}")


def try_prepare(path: Path, preparation: Preparation) -> Prepared | ImageError:
    """`prepare` of a file, or why it could not be read."""
    try:
        return prepare(read(path), preparation)
    except ImageError as error:
        return error


def prepare_mask(mask: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Bring (H, W) bool to the map of a picture in the geometry of `windows`, by nearest pixel, as bool.

    The padding is False, and so is what is outside of a region of interest.
    """
    laid = layout(mask.shape[1], mask.shape[0], preparation)
    x0, y0, x1, y1 = laid.box
    image = Image.fromarray(mask.astype(np.uint8))
    resized = image.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST, box=laid.crop)
    found = np.zeros(laid.shape, bool)
    found[y0:y1, x0:x1] = np.asarray(resized, bool)
    return found if laid.counted is None else found & laid.counted


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "") or "the picture")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with a picture into an ImageError that names it."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name}: there is no such file; check the path") from error
    except PermissionError as error:
        raise ImageError(f"{name}: may not be read; allow this user to read it") from error
    except MemoryError as error:
        raise ImageError(f"{name}: needs more memory than there is; scale it down or cut it") from error
    except OSError as error:
        if error.errno is None:  # Pillow's, of what is in the file
            raise ImageError(_damaged(name, error)) from error
        raise ImageError(f"{name}: cannot be read ({error.strerror}); check the path") from error
    except Exception as error:  # on damaged files decoders raise SyntaxError, ValueError, struct.error, zlib.error, …
        raise ImageError(_damaged(name, error)) from error


def _damaged(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{name}: is damaged or of an unknown kind ({reason}); save it again as PNG"


def read_file(path: str | Path, max_pixels: int = 200_000_000) -> bytes:
    """The bytes of a picture's file; of what is none, and of what cannot be of so many pixels, nothing is read.

    Raises:
        ImageError: A folder, a pipe or a device, too large, empty or no picture. OSError: Not readable.
    """
    status, most = Path(path).stat(), OVERHEAD + PIXEL * max_pixels
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder; name one picture in it")
    if not stat.S_ISREG(status.st_mode):  # one could wait for it, or read it, for ever
        raise ImageError("is a pipe or a device, not a file; name a picture's file")
    if status.st_size > most:
        raise ImageError(f"has {status.st_size:,} bytes, over the limit of {most:,}; save it again or cut it")
    with Path(path).open("rb") as file:
        head = file.read(64)
        _decoder(head)
        return head + file.read(most)


def _bytes(source: str | Path | bytes | Readable, max_pixels: int = 200_000_000) -> bytes:
    if isinstance(source, bytes):
        return source
    return read_file(source, max_pixels) if isinstance(source, str | Path) else source.read()


def _decoder(data: bytes) -> Any:
    if not data:
        raise ImageError("is empty; copy or save it again")
    for signature, decoder in _DECODERS.items():
        if data.startswith(signature):
            return decoder
    raise ImageError("is not a picture of a kind that is read; save it as PNG, JPEG, BMP, TIFF, WebP or GIF")


def _open(data: bytes) -> Image.Image:
    """A picture of which only the header has been read."""
    decoder = _decoder(data)
    _refuse(containers.crowded(data))
    return decoder(io.BytesIO(data))


def _refuse(fault: str) -> None:
    if fault:
        raise ImageError(fault)


def _decode(source: Any, max_pixels: int) -> np.ndarray | Image.Image:
    """An array (H, W) or (H, W, channels), or a picture of Pillow; upright, in the depth of the source."""
    if isinstance(source, np.ndarray):
        return source
    data, given = b"", isinstance(source, Image.Image)
    if not given:
        data = _bytes(source, max_pixels)
        if data[:4] in _TIFF:
            from unflaw.tiff import decode_deep

            _refuse(containers.crowded(data))
            if (deep := decode_deep(data, max_pixels)) is not None:
                return deep
        source = _open(data)
    check(source.size, getattr(source, "is_animated", False), max_pixels)  # n_frames would look at all of them
    _refuse(containers.slow(data, source.size))
    if given:
        return ImageOps.exif_transpose(source)
    ImageOps.exif_transpose(source, in_place=True)
    return source


def check(size: tuple[int, int], several: bool, max_pixels: int) -> None:
    """Refuses, by ImageError, what is too large and what is several pictures."""
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"has {size[0]} × {size[1]} pixels, over the limit of {max_pixels:,}; scale it down or cut it")
    if several:
        raise ImageError("has several frames or pages; save the one that counts as a picture of its own")


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, channels), in the depth of the source."""
    if image.mode.startswith("I"):  # "I;16", or "I": so Pillow called 16-bit grey before version 11
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError("holds whole numbers outside 0 to 65535; save it in 8 or 16 bits without sign")
        return wide.astype(np.uint16)
    if image.mode != "F":
        grey = image.mode in ("1", "L")
        image = image.convert("RGBA" if image.has_transparency_data else "L" if grey else "RGB")
    return np.array(image)  # a copy: asarray would be read-only


def _unit(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 1 to 4) of any accepted type → (H, W, 1 to 4) uint8, or float32 in [0, 1]."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or not pixels.size:
        raise ImageError(f"has the shape {pixels.shape}; give (height, width) or (height, width, 1 to 4 channels)")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return pixels / np.float32(65535)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ImageError(f"holds {pixels.dtype}; give uint8, uint16, or floats from 0 to 1")
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # so written, it refuses NaN too
        raise ImageError("holds numbers that are not finite or outside 0 to 1; divide by the largest possible value")
    return pixels.astype(np.float32, copy=False)
