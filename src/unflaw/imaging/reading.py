"""Reading of image files, in-memory images and masks to RGB and boolean arrays."""

import hashlib
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from PIL import WebPImagePlugin as WebP

from unflaw.errors import ImageError
from unflaw.imaging.inputs import InMemory, Readable, check_kind
from unflaw.imaging.limits import (
    AT_ONCE,
    SIDEWAYS,
    TRANSPARENT,
    check_blocks,
    check_decoding,
    check_size,
    visible,
)
from unflaw.io.listing import list_images

PIXEL, OVERHEAD = 16, 2**26  # largest file in bytes: per pixel (four floats), and for everything else

# The content decides, not the suffix. Decoders are called directly rather than through PIL.Image.open: no other format
# is ever parsed, and the limit on pixels is an argument instead of a process-wide setting that at first only warns.
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


def read(
    source: str | Path | bytes | Readable | InMemory | Image.Image | np.ndarray,
    *,
    max_pixels: int = 200_000_000,
    name: str | None = None,
) -> np.ndarray:
    """Read one image as RGB.

    Args:
        source: A path, the bytes of a file, an open file, a Pillow image, or an array (H, W) or (H, W, 1 to 4 channels)
            of bool, uint8, uint16, or floats in [0, 1].
        max_pixels: Maximum number of pixels; larger images are refused before they are decoded.
        name: Name of the image in messages; by default its path.

    Returns:
        (H, W, 3), contiguous: uint8, or float32 in [0, 1] for floats and for more than 8 bits (n bits are divided
        by 2^n - 1). Upright according to EXIF; grey is repeated. Transparent pixels are put on black, since the colours
        stored under them are arbitrary. Pillow decodes 16-bit colour PNG to 8 bits; TIFF keeps 16 bits and is read as
        its header says (see `tiff.decode_tiff`). An array may be returned unchanged.

    Raises:
        ImageError: Missing, unreadable, empty or damaged file, unsupported format, several frames or pages, too many
            pixels, transparent everywhere, or values outside the ranges above.
        TypeError: The source has another type.
    """
    check_kind(source, name or name_of(source))
    with _image_errors(name or name_of(source)):
        decoded = _decode(source, max_pixels)
        if isinstance(decoded, np.ndarray):
            whole, seen = _to_rgb(decoded)
        else:
            width, height = decoded.size
            rows = max(1, AT_ONCE // max(width, 1))
            parts = (
                _to_rgb(_to_array(decoded.crop((0, y, width, min(y + rows, height))))) for y in range(0, height, rows)
            )
            whole, seen = first = next(parts)
            if rows < height:  # in strips, without a second copy of a large image
                whole = np.empty((height, width, 3), whole.dtype)
                for y, (part, visible_part) in zip(range(0, height, rows), chain([first], parts), strict=True):
                    whole[y : y + rows] = part
                    seen |= visible_part
        if not seen:
            raise ImageError(TRANSPARENT)
        return whole


def _to_rgb(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Convert (H, W) or (H, W, 1 to 4) of any accepted type to RGB as in `read`; also True if anything is `visible`."""
    pixels, seen = _to_unit(pixels), True
    if pixels.shape[2] in (2, 4):
        pixels, alpha = pixels[..., :-1], pixels[..., -1:]
        seen = visible(alpha)
        if pixels.dtype == np.uint8:
            pixels = ((pixels.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)
        else:
            pixels = pixels * alpha
    return np.ascontiguousarray(pixels) if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2), seen


def image_size(path: str | Path | InMemory) -> tuple[int, int]:
    """Return (width, height) in pixels of the image that `read` returns, from the header alone if possible."""
    if isinstance(path, InMemory):
        return read(path).shape[1::-1]
    with _image_errors(str(path)):
        data = _read_bytes(path)
        if data[:4] in _TIFF:  # two decoders read many kinds: only decoding is certain
            decoded = _decode(data, max_pixels=200_000_000)
            return decoded.size if isinstance(decoded, Image.Image) else decoded.shape[1::-1]
        image = _open_image(data)
        return image.size[::-1] if image.getexif().get(_ORIENTATION) in SIDEWAYS else image.size


def name_of(source: Any) -> str:
    """Name of an image in messages: its path or its attribute `name`."""
    return str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "") or "the image")


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Turn any error about an image into an ImageError with its name."""
    try:
        yield
    except Exception as error:
        raise ImageError(f"{name}: {_fault(error)}") from error


def _fault(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "there is no such file; check the path"
    if isinstance(error, PermissionError):
        return "may not be read; allow this user to read it"
    if isinstance(error, MemoryError):
        return "needs more memory than there is; scale it down or crop it"
    if isinstance(error, OSError) and error.errno is not None:  # Pillow raises OSError without a number
        return f"cannot be read ({error.strerror}); check the path"
    reason = " ".join(str(error).split())[:200]  # SyntaxError, ValueError, struct.error, zlib.error, … of decoders
    return f"is damaged or of an unknown kind ({reason}); save it again as PNG"


def _read_bytes(source: str | Path | bytes | Readable, max_pixels: int = 200_000_000) -> bytes:
    """Read the bytes of an image; the type, size and first bytes of a file are checked before the rest is read."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        return source.read()
    status, most = Path(source).stat(), OVERHEAD + PIXEL * max_pixels
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder; name one image in it")
    if not stat.S_ISREG(status.st_mode):  # reading could block, or never end
        raise ImageError("is a pipe or a device, not a file; name an image's file")
    if status.st_size > most:
        raise ImageError(f"has {status.st_size:,} bytes, over the limit of {most:,}; save it again or crop it")
    with Path(source).open("rb") as file:
        head = file.read(64)
        _decoder(head)
        return head + file.read(most)


def read_hashed(path: str | Path | InMemory) -> tuple[bytes | InMemory, str]:
    """Reads a file once: its bytes, for `read`, and their SHA-256 in hex. An array is hashed with its shape and type.

    Raises:
        ImageError: As `read`.
    """
    if not isinstance(path, InMemory):
        with _image_errors(str(path)):
            data = _read_bytes(path)
            return data, hashlib.sha256(data).hexdigest()
    if isinstance(path.source, bytes):
        return path, hashlib.sha256(path.source).hexdigest()
    pixels = read(path)
    return path, hashlib.sha256(f"{pixels.dtype} {pixels.shape} ".encode() + pixels.tobytes()).hexdigest()


def _decoder(data: bytes) -> Any:
    if not data:
        raise ImageError("is empty; copy or save it again")
    for signature, decoder in _DECODERS.items():
        if data.startswith(signature):
            return decoder
    raise ImageError("is not an image of a kind that is read; save it as PNG, JPEG, BMP, TIFF, WebP or GIF")


def _open_image(data: bytes) -> Image.Image:
    """Open an image; only its header is read."""
    decoder = _decoder(data)
    check_blocks(data)
    return decoder(io.BytesIO(data))


def _decode(source: Any, max_pixels: int) -> np.ndarray | Image.Image:
    """Decode to an array (H, W) or (H, W, channels) or to a Pillow image, upright, in the depth of the source."""
    source = source.source if isinstance(source, InMemory) else source
    if isinstance(source, np.ndarray):
        return source
    data, given = b"", isinstance(source, Image.Image)
    if not given:
        data = _read_bytes(source, max_pixels)
        if data[:4] in _TIFF:
            from unflaw.imaging.tiff import decode_tiff

            check_blocks(data)
            if (decoded := decode_tiff(data, max_pixels)) is not None:
                return decoded
        source = _open_image(data)
    check_size(source.size, getattr(source, "is_animated", False), max_pixels)  # n_frames would read all frames
    check_decoding(data, source.size)
    if given:
        return ImageOps.exif_transpose(source)
    ImageOps.exif_transpose(source, in_place=True)
    return source


def _to_array(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to (H, W) or (H, W, channels), in the depth of the source."""
    if image.mode.startswith("I"):  # "I;16", or "I" for 16-bit grey before Pillow 11
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError("holds whole numbers outside 0 to 65535; save it in 8 or 16 bits without sign")
        wide = wide.astype(np.uint16)
        if (clear := image.info.get("transparency")) is None:
            return wide
        return np.dstack([wide, np.where(wide == clear, 0, 65535).astype(np.uint16)])
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.mode != "F":
        grey = image.mode in ("1", "L")
        image = image.convert("RGBA" if image.has_transparency_data else "L" if grey else "RGB")
    return np.array(image)  # a copy: asarray would be read-only


def _to_unit(pixels: np.ndarray) -> np.ndarray:
    """Convert (H, W) or (H, W, 1 to 4) of any accepted type to (H, W, 1 to 4) uint8, or float32 in [0, 1]."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4 or not pixels.size:
        several = ", and several images to inspect_many" * (pixels.ndim > 3)
        given = f"has the shape {pixels.shape}"
        raise ImageError(f"{given}; give (height, width) or (height, width, 1 to 4 channels){several}")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return pixels / np.float32(65535)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ImageError(f"holds {pixels.dtype}; give uint8, uint16, or floats from 0 to 1")
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # written so that NaN is refused too
        raise ImageError("holds numbers that are not finite or outside 0 to 1; divide by the largest possible value")
    return pixels.astype(np.float32, copy=False)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask as (H, W) bool: True where any channel is not 0, or above 127 in JPEG, which blurs.

    For a folder, return the union of its masks. Raises ImageError, see `read`; also if a folder has no images, or
    images of several sizes.
    """
    if Path(path).is_dir():
        masks = [read_mask(file) for file in list_images(path)]
        if not masks:
            raise ImageError(f"{path}: holds no masks; put them there, or remove the folder")
        if len({mask.shape for mask in masks}) > 1:
            raise ImageError(f"{path}: holds masks of several sizes; all must have that of the image")
        return np.logical_or.reduce(masks)
    red, green, blue = np.moveaxis(read(path), 2, 0)
    over = 127 if Path(path).suffix.lower() in {".jpg", ".jpeg"} else 0
    return (red > over) | (green > over) | (blue > over)
