"""From an image's file, whatever it holds, to one kind of array; what cannot be used is refused in a sentence."""

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
from unflaw.imaging import limits as containers
from unflaw.imaging.inputs import InMemory, Readable, check_kind
from unflaw.imaging.limits import AT_ONCE, SIDEWAYS, TRANSPARENT, check, visible
from unflaw.io.listing import list_images

PIXEL, OVERHEAD = 16, 2**26  # bytes of a file: for a pixel at most, four floats, and for all else in it

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


def read(
    source: str | Path | bytes | Readable | InMemory | Image.Image | np.ndarray,
    *,
    max_pixels: int = 200_000_000,
    name: str | None = None,
) -> np.ndarray:
    """Read one image as RGB.

    Args:
        source: A path, the bytes of a file or a stream of them, an image of Pillow, or an array (H, W) or
            (H, W, 1 to 4 channels) of bool, uint8, uint16, or floats in [0, 1].
        max_pixels: Refuse larger images before they are decoded.
        name: What messages call the image; by default its path.

    Returns:
        (H, W, 3), contiguous: uint8, or float32 in [0, 1] for sources of more than 8 bits (of n bits, 2^n - 1 is 1)
        and floats. Upright, as EXIF says; grey is repeated. What is transparent is put on black, since the colours
        stored under it are arbitrary. Colour PNG of 16 bits comes in 8, as Pillow decodes it: TIFF keeps 16, and is
        read as its header says (see `tiff.decode_tiff`). An array may come back as itself.

    Raises:
        ImageError: Missing, unreadable, empty, damaged, no image of a supported format, several frames or pages, too
            large, transparent everywhere, or values outside the ranges above. TypeError: Anything else than these
            sources.
    """
    check_kind(source, name or name_of(source))
    with _named(name or name_of(source)):
        decoded = _decode(source, max_pixels)
        if isinstance(decoded, np.ndarray):
            whole, seen = _rgb(decoded)
        else:
            width, height = decoded.size
            rows = max(1, AT_ONCE // max(width, 1))
            parts = (_rgb(_pixels(decoded.crop((0, y, width, min(y + rows, height))))) for y in range(0, height, rows))
            whole, seen = first = next(parts)
            if rows < height:  # a large image in strips: no second copy is ever held
                whole = np.empty((height, width, 3), whole.dtype)
                for y, (part, visible_part) in zip(range(0, height, rows), chain([first], parts), strict=True):
                    whole[y : y + rows] = part
                    seen |= visible_part
        if not seen:
            raise ImageError(TRANSPARENT)
        return whole


def _rgb(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """(H, W) or (H, W, 1 to 4) of any accepted type → what `read` returns, and whether anything of it is `visible`."""
    pixels, seen = _unit(pixels), True
    if pixels.shape[2] in (2, 4):
        pixels, alpha = pixels[..., :-1], pixels[..., -1:]
        seen = visible(alpha)
        if pixels.dtype == np.uint8:
            pixels = ((pixels.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)
        else:
            pixels = pixels * alpha
    return np.ascontiguousarray(pixels) if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2), seen


def image_size(path: str | Path | InMemory) -> tuple[int, int]:
    """(width, height) in pixels that `read` would return, from the header alone where the format allows."""
    if isinstance(path, InMemory):
        return read(path).shape[1::-1]
    with _named(str(path)):
        data = _bytes(path)
        if data[:4] in _TIFF:  # many kinds, two readers: decoding is the one sure way
            decoded = _decode(data, max_pixels=200_000_000)
            return decoded.size if isinstance(decoded, Image.Image) else decoded.shape[1::-1]
        image = _open(data)
        return image.size[::-1] if image.getexif().get(_ORIENTATION) in SIDEWAYS else image.size


def name_of(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "") or "the image")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with an image into an ImageError that names it."""
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
    """The bytes of an image's file; of what is none, and of what cannot be of so many pixels, nothing is read.

    Raises:
        ImageError: A folder, a pipe or a device, too large, empty or no image. OSError: Not readable.
    """
    status, most = Path(path).stat(), OVERHEAD + PIXEL * max_pixels
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a folder; name one image in it")
    if not stat.S_ISREG(status.st_mode):  # one could wait for it, or read it, for ever
        raise ImageError("is a pipe or a device, not a file; name an image's file")
    if status.st_size > most:
        raise ImageError(f"has {status.st_size:,} bytes, over the limit of {most:,}; save it again or cut it")
    with Path(path).open("rb") as file:
        head = file.read(64)
        _decoder(head)
        return head + file.read(most)


def read_hashed(path: str | Path | InMemory) -> tuple[bytes | InMemory, str]:
    """Reads a file once: its bytes, for `read`, and their SHA-256 in hex. An array is hashed with its shape and type.

    Raises:
        ImageError: As `read`.
    """
    if not isinstance(path, InMemory):
        with _named(str(path)):
            data = read_file(path)
            return data, hashlib.sha256(data).hexdigest()
    if isinstance(path.source, bytes):
        return path, hashlib.sha256(path.source).hexdigest()
    pixels = read(path)
    return path, hashlib.sha256(f"{pixels.dtype} {pixels.shape} ".encode() + pixels.tobytes()).hexdigest()


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
    raise ImageError("is not an image of a kind that is read; save it as PNG, JPEG, BMP, TIFF, WebP or GIF")


def _open(data: bytes) -> Image.Image:
    """An image of which only the header has been read."""
    decoder = _decoder(data)
    _refuse(containers.crowded(data))
    return decoder(io.BytesIO(data))


def _refuse(fault: str) -> None:
    if fault:
        raise ImageError(fault)


def _decode(source: Any, max_pixels: int) -> np.ndarray | Image.Image:
    """An array (H, W) or (H, W, channels), or an image of Pillow; upright, in the depth of the source."""
    source = source.source if isinstance(source, InMemory) else source
    if isinstance(source, np.ndarray):
        return source
    data, given = b"", isinstance(source, Image.Image)
    if not given:
        data = _bytes(source, max_pixels)
        if data[:4] in _TIFF:
            from unflaw.imaging.tiff import decode_tiff

            _refuse(containers.crowded(data))
            if (decoded := decode_tiff(data, max_pixels)) is not None:
                return decoded
        source = _open(data)
    check(source.size, getattr(source, "is_animated", False), max_pixels)  # n_frames would look at all of them
    _refuse(containers.slow(data, source.size))
    if given:
        return ImageOps.exif_transpose(source)
    ImageOps.exif_transpose(source, in_place=True)
    return source


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, channels), in the depth of the source."""
    if image.mode.startswith("I"):  # "I;16", or "I": so Pillow called 16-bit grey before version 11
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


def _unit(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 1 to 4) of any accepted type → (H, W, 1 to 4) uint8, or float32 in [0, 1]."""
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
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # so written, it refuses NaN too
        raise ImageError("holds numbers that are not finite or outside 0 to 1; divide by the largest possible value")
    return pixels.astype(np.float32, copy=False)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask as (H, W) bool: True where any channel is not 0; in JPEG, which blurs, where it is over half.

    A folder stands for the union of the masks in it.

    Raises:
        ImageError: As `read`, or a folder without images or with images of several sizes.
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
