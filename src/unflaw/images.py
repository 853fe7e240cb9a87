"""Pictures in: read any supported file into one kind of array, and bring it to the size that a detector works at.

Training, evaluation, prediction, the HTTP service and exported models all enter by `read` and `prepare`, so that no two
of them can resize differently.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from PIL import WebPImagePlugin as WebP
from pydantic import BaseModel, ConfigDict, Field

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are outside
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
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(ValueError):
    """A picture that cannot be used. The message names the file, what is wrong with it and what to do."""


def read(
    source: str | Path | bytes | BinaryIO | Image.Image | np.ndarray,
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
        pixels = _unit(_decode(source, max_pixels))
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
            height, width = _decode(data, max_pixels=200_000_000).shape[:2]
            return width, height
        image = _open(data)
        return image.size[::-1] if image.getexif().get(_ORIENTATION) in _SIDEWAYS else image.size


def visible_files(folder: str | Path) -> list[Path]:
    """All files under a folder, sorted, but for those that are hidden or lie in a hidden folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder}: there is no such folder; check the path")
    found = (f for f in folder.rglob("*") if not any(part.startswith(".") for part in f.relative_to(folder).parts))
    return sorted((f for f in found if f.is_file()), key=lambda f: f.as_posix())


def list_images(folder: str | Path) -> list[Path]:
    """The `visible_files` under a folder whose suffix is that of a picture."""
    return [f for f in visible_files(folder) if f.suffix.lower() in SUFFIXES]


class Preparation(BaseModel):
    """How pictures are brought to the canvas of a detector.

    `stretch` fills the canvas and gives up the aspect ratio; `pad` keeps it, centres the picture and repeats its edges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int = Field(256, ge=32, le=4096, description="side of the square canvas, pixels")
    fit: Literal["stretch", "pad"] = "stretch"


@dataclass(frozen=True)
class Prepared:
    """A picture on the canvas of a detector."""

    pixels: np.ndarray  # (3, size, size) float32 in [0, 1]
    box: Box  # the part of the canvas that the picture fills
    original_size: tuple[int, int]  # (width, height), pixels

    def view(self) -> np.ndarray:
        """The picture without the padding, (h, w, 3) uint8."""
        x0, y0, x1, y1 = self.box
        return (self.pixels[:, y0:y1, x0:x1].transpose(1, 2, 0) * 255).round().astype(np.uint8)

    def to_original(self, box: Box) -> Box:
        """A box on the canvas as a box in the original picture, rounded outward and clipped.

        A box that lies wholly in the padding comes back without area.
        """
        (left, top, right, bottom), (width, height) = self.box, self.original_size
        x0, x1 = _rescale(box[0] - left, box[2] - left, width, right - left)
        y0, y1 = _rescale(box[1] - top, box[3] - top, height, bottom - top)
        return x0, y0, x1, y1

    def area_to_original(self, area: float) -> float:
        """An area in pixels of the canvas as an area in pixels of the original picture."""
        (left, top, right, bottom), (width, height) = self.box, self.original_size
        return area * (width * height) / ((right - left) * (bottom - top))


def prepare(image: np.ndarray, preparation: Preparation) -> Prepared:
    """Bring (H, W, 3) from `read` to the canvas: bilinear, antialiased where it shrinks. The only resize rule there is.

    Pictures of 8 bits are resized in 8 bits, which is several times faster.
    """
    height, width = image.shape[:2]
    box, margins = _place(width, height, preparation)
    size = box[2] - box[0], box[3] - box[1]
    if image.dtype == np.uint8:
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        pixels = resized.transpose(2, 0, 1) / np.float32(255)
    else:
        channels = (Image.fromarray(channel) for channel in np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))
        pixels = np.stack([np.asarray(channel.resize(size, Image.Resampling.BILINEAR)) for channel in channels])
        pixels = pixels.clip(0, 1)  # rounding may leave the range
    pixels = np.pad(pixels, ((0, 0), *margins), mode="edge")
    return Prepared(np.ascontiguousarray(pixels), box, (width, height))


def try_prepare(path: Path, preparation: Preparation) -> Prepared | ImageError:
    """A prepared picture, or why it could not be read: one bad file must not end a batch."""
    try:
        return prepare(read(path), preparation)
    except ImageError as error:
        return error


def prepare_mask(mask: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Bring (H, W) bool to (size, size) bool in the geometry of `prepare`, by nearest pixel; the padding is False."""
    box, margins = _place(mask.shape[1], mask.shape[0], preparation)
    size = box[2] - box[0], box[3] - box[1]
    resized = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.pad(np.asarray(resized, dtype=bool), margins)


def _place(width: int, height: int, preparation: Preparation) -> tuple[Box, tuple[tuple[int, int], tuple[int, int]]]:
    """Where on the canvas a picture lies, and the padding around it: rows above and below, columns left and right."""
    w = h = size = preparation.size
    if preparation.fit == "pad":
        w, h = (max(1, round(side * size / max(width, height))) for side in (width, height))
    x0, y0 = (size - w) // 2, (size - h) // 2
    return (x0, y0, x0 + w, y0 + h), ((y0, size - h - y0), (x0, size - w - x0))


def _rescale(start: int, end: int, original: int, canvas: int) -> tuple[int, int]:
    # in whole numbers, so that no rounding error pushes an exact edge outward
    start, end = int(start) * original // canvas, -(-int(end) * original // canvas)
    return min(max(start, 0), original), min(max(end, 0), original)


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
    except Exception as error:  # on damaged files decoders raise SyntaxError, OSError, struct.error, zlib.error, …
        raise ImageError(f"{name}: is damaged or of an unknown kind ({error}); save it again as PNG") from error


def _bytes(source: str | Path | bytes | BinaryIO) -> bytes:
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        return source.read()
    if Path(source).is_dir():
        raise ImageError("is a folder; name one picture in it")
    return Path(source).read_bytes()


def _open(data: bytes) -> Image.Image:
    """A picture of which only the header has been read."""
    if not data:
        raise ImageError("is empty; copy or save it again")
    for signature, decoder in _DECODERS.items():
        if data.startswith(signature):
            return decoder(io.BytesIO(data))
    raise ImageError("is not a picture of a kind that is read; save it as PNG, JPEG, BMP, TIFF, WebP or GIF")


def _check(size: tuple[int, int], frames: int, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"has {size[0]} × {size[1]} pixels, over the limit of {max_pixels:,}; scale it down or cut it")
    if frames > 1:
        raise ImageError(f"has {frames} frames or pages; save the one that counts as a picture of its own")


def _decode(source: Any, max_pixels: int) -> np.ndarray:
    """(H, W) or (H, W, channels), upright, in the depth of the source."""
    if isinstance(source, np.ndarray):
        return source
    if not isinstance(source, Image.Image):
        data = _bytes(source)
        if data[:4] in _TIFF and (deep := _decode_deep_tiff(data, max_pixels)) is not None:
            return deep
        source = _open(data)
    _check(source.size, getattr(source, "n_frames", 1), max_pixels)
    image = ImageOps.exif_transpose(source)
    if image.mode.startswith("I"):  # "I;16", or "I": so Pillow called 16-bit grey before version 11
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError("holds whole numbers outside 0 to 65535; save it in 8 or 16 bits without sign")
        return wide.astype(np.uint16)
    if image.mode != "F":
        grey = image.mode in ("1", "L")
        image = image.convert("RGBA" if image.has_transparency_data else "L" if grey else "RGB")
    return np.array(image)  # a copy: asarray would be read-only


def _decode_deep_tiff(data: bytes, max_pixels: int) -> np.ndarray | None:
    """A colour TIFF of more than 8 bits, of which Pillow would keep 8; None for the others."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        if page.bitspersample <= 8 or page.samplesperpixel == 1:
            return None
        _check((page.imagewidth, page.imagelength), len(tiff.pages), max_pixels)
        if page.photometric.name not in ("RGB", "MINISBLACK"):
            raise ImageError(f"is a {page.photometric.name} TIFF of more than 8 bits; save it as RGB or grey")
        pixels = page.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        if page.extrasamples != (tifffile.EXTRASAMPLE.UNASSALPHA,):  # on black already, or no transparency at all
            pixels = pixels[..., : page.samplesperpixel - len(page.extrasamples)]
        orientation = page.tags.valueof(_ORIENTATION, 1)
    if orientation in _SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


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
