"""Decoding of TIFF files of kinds that Pillow reads only in part: depth, sign, byte order, zero as white, channels."""

from __future__ import annotations

import io
import zlib
from importlib.util import find_spec
from math import ceil, prod
from typing import Any

import numpy as np
from PIL import ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from unflaw.errors import ImageError
from unflaw.imaging.limits import AT_ONCE, SIDEWAYS, TRANSPARENT, check_size, has_pages, visible

SAMPLES = 16  # channels at most
SPARE = 2**22  # pixels that strips and tiles may have more than the image
_ORIENTATION, _PHOTOMETRIC = 0x0112, 0x0106
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = range(4)
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, 5: 4, 6: 3, 8: 3}  # CMYK, YCbCr, CIELAB
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = range(1, 5)  # SampleFormat; the last is read as the first, as libtiff does
_KNOWN = {_UNSIGNED: (*range(1, 17), 32, 64), _SIGNED: (8, 16, 32, 64), _FLOAT: (16, 32, 64)}  # bits
_KNOWN[_UNDEFINED] = _KNOWN[_UNSIGNED]
_TYPES = {_UNSIGNED: "unsigned", _SIGNED: "signed", _FLOAT: "floating-point", _UNDEFINED: "unsigned"}
_ASSOCIATED, _ALPHA = 1, (2, 999)  # ExtraSamples; Corel Draw writes 999
_JPEG, _LZW, _DEFLATE, _PACKBITS, _OLD_DEFLATE = (6, 7), 5, 8, 32773, 32946  # Compression


def decode_tiff(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Decode a TIFF file as its header says.

    White is 2^n - 1 for integers of n bits, 2^(n-1) - 1 for signed ones, 1 for floats. Integers of 32 and 64 bits count
    as 16 bits, because programs use these types to store 16-bit images. MinSampleValue and MaxSampleValue are ignored:
    TIFF 6.0 excludes them from display. Channels that the header calls unspecified are left out.

    Args:
        data: Content of the file.
        max_pixels: Maximum number of pixels, see `reading.read`.

    Returns:
        (H, W, 1 to 4 channels) uint8, uint16, or floats with black at 0 and white at 1, upright; the last of 2 or 4
        channels is alpha. None for a file that Pillow decodes as its header says.

    Raises:
        ImageError: The header leaves the meaning of values open, the kind is not read, or see `reading.read`.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        check_size((page.imagewidth, page.imagelength), has_pages(data), max_pixels)
        _check_meaning(page)
        if page.photometric == _PALETTE and page.samplesperpixel == 1 and page.colormap.max() < 256:
            # colours of 8 bits instead of 16, which libtiff reads and Pillow shows as black
            return page.colormap.T.astype(np.uint8)[_decode_with_pillow(data)]
        if _is_plain(page, data):
            return None
        _check_memory(page, data, max_pixels)
        _check_kind(page)
        _check_decoder(page)
        return _scaled_pixels(_stored_pixels(page, data), page)


def _check_meaning(page: Any) -> None:
    """Raise ImageError if the header leaves the meaning of values open."""
    if _PHOTOMETRIC not in page.tags and page.compression not in _JPEG:
        raise ImageError(
            "does not say whether 0 is black or white (no PhotometricInterpretation); save it again as PNG"
        )
    samples = page.samplesperpixel
    colours = _COLOURS.get(page.photometric, samples)
    if samples - colours > len(page.extrasamples):
        raise ImageError(
            f"has {samples} channels, and its header does not say what is in those after the first {colours} "
            "(no ExtraSamples): alpha or something else; save it without them, or with ExtraSamples"
        )


def _is_plain(page: Any, data: bytes) -> bool:
    """Return True if Pillow decodes the page as its header says."""
    bits = page.bitspersample
    deep = bits == 16 and page.samplesperpixel == 1 and page.photometric == _BLACK_IS_ZERO
    if page.sampleformat != _UNSIGNED or not (deep or bits in (1, 2, 4, 8)):
        return False
    if page.planarconfig == 2 and page.extrasamples and (page.compression == 1 or page.samplesperpixel == 2):
        return False  # Pillow reads such planes as one, or loses their alpha
    if page.fillorder != 1 and bits == 8 and (page.planarconfig == 2 or page.photometric == _WHITE_IS_ZERO):
        return False  # Pillow ignores FillOrder in planes, and does not support it where zero is white
    try:
        TiffImageFile(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _check_memory(page: Any, data: bytes, max_pixels: int) -> None:
    """Raise ImageError for a page of tifffile whose channels, strips or tiles hold far more than the image shows."""
    samples, pixels = page.samplesperpixel, page.imagewidth * page.imagelength
    bits = max(page.bitspersample) if isinstance(page.bitspersample, tuple) else page.bitspersample
    if max(page.imagedepth, page.tiledepth) > 1:
        raise ImageError(f"is {page.imagedepth} images deep; save the one to inspect as a separate image")
    if samples > SAMPLES or samples * bits * pixels > 128 * max_pixels:
        raise ImageError(f"has {samples} channels of {bits} bits; save it as RGB or grey in 8 or 16 bits")
    if prod(page.chunks) > (pixels + SPARE) * samples or len(page.dataoffsets) > pixels * samples + 1:
        raise ImageError("is cut into strips or tiles that do not go with its size; save it again")
    if page.compression in (_DEFLATE, _OLD_DEFLATE):
        most = prod(page.chunks) * ceil(bits / 8) + 1
        for start, length in zip(page.dataoffsets, page.databytecounts, strict=False):
            inflate = zlib.decompressobj()
            if len(inflate.decompress(data[start : start + length], most)) >= most:
                raise ImageError("holds strips or tiles that are more than its size once decompressed; save it again")


def _check_kind(page: Any) -> None:
    """Raise ImageError for a kind of image that is not read."""
    kind, bits, samples = page.sampleformat, page.bitspersample, page.samplesperpixel
    if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        raise ImageError(f"is a {bits}-bit {_name(page.photometric)} TIFF; save it as RGB or grey in 8 or 16 bits")
    if samples < _COLOURS[page.photometric]:
        raise ImageError(f"has {samples} of the 3 channels of colour; save it as RGB or grey")
    if bits not in _KNOWN.get(kind, ()):
        raise ImageError(f"holds {_TYPES.get(kind, 'complex')} numbers of {bits} bits; save it in 8 or 16 bits")
    if page.photometric == _WHITE_IS_ZERO and _ASSOCIATED in page.extrasamples:
        raise ImageError(
            "has 0 as white and values multiplied by alpha, which do not go together; save it without alpha"
        )
    if page.photometric == _WHITE_IS_ZERO and kind != _FLOAT and bits > 16:
        raise ImageError(
            f"has 0 as white, and which of its {bits}-bit numbers is black is not known; save it in 16 bits"
        )


def _check_decoder(page: Any) -> None:
    """Raise ImageError if neither tifffile nor Pillow can decompress the page."""
    bits = page.bitspersample
    if len(page.dataoffsets) < prod(page.chunked) or not all(page.dataoffsets) or not all(page.databytecounts):
        raise ImageError("lacks some of its strips or tiles; save it again")
    if page.fillorder != 1:
        raise ImageError("holds the bits of each byte in reverse order (FillOrder 2); save it again without")
    if bits % 8 and (page.is_tiled or page.predictor != 1):
        raise ImageError(f"holds {bits} bits per value in tiles or with a predictor; save it in 16 bits")
    if not (_is_decoded_by_tifffile(page) or _is_decoded_by_pillow(page)):
        predictor = "" if page.predictor == 1 else f" with predictor {_name(page.predictor)}"
        how = f"{_name(page.compression)}{predictor}"
        raise ImageError(
            f"is compressed by {how}, which is not read in {bits} bits; save it with Deflate or uncompressed"
        )


def _name(value: Any) -> str:
    return getattr(value, "name", str(value))


def _is_decoded_by_tifffile(page: Any) -> bool:
    """Return True if tifffile decompresses the page; without imagecodecs it supports few compressions."""
    more = find_spec("imagecodecs") is not None and page.bitspersample % 8 == 0
    known = (1, _DEFLATE, _PACKBITS, _OLD_DEFLATE, *((_LZW,) if more else ()))
    return page.compression in known and page.predictor in (1, 2, *((3,) if more else ()))


def _is_decoded_by_pillow(page: Any) -> bool:
    """Return True if Pillow decompresses the page correctly; it swaps bytes of big-endian signed and float numbers."""
    kind, little = (page.sampleformat, page.bitspersample), page.parent.byteorder == "<"
    known = kind == (_UNSIGNED, 16) or (little and kind in ((_SIGNED, 16), (_SIGNED, 32), (_FLOAT, 32)))
    return known and page.samplesperpixel == 1 and page.tags[_PHOTOMETRIC].dtype == 3


def _stored_pixels(page: Any, data: bytes) -> np.ndarray:
    """Decompress the page to (H, W, channels) with the numbers as stored, upright."""
    if not _is_decoded_by_tifffile(page):
        place = page.tags[_PHOTOMETRIC].valueoffset  # Pillow supports all depths where zero is black
        black = _BLACK_IS_ZERO.to_bytes(2, "little" if page.parent.byteorder == "<" else "big")
        return _decode_with_pillow(data[:place] + black + data[place + 2 :])[..., None]
    height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
    pixels = _unpack_bits(page, data) if page.bitspersample % 8 else page.asarray()
    if page.planarconfig == 2:
        pixels = np.moveaxis(pixels.reshape(samples, height, width), 0, -1)
    pixels = pixels.reshape(height, width, samples)
    orientation = page.tags.valueof(_ORIENTATION, 1)
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """Decode a file with Pillow to (H, W), upright, without a palette."""
    image = TiffImageFile(io.BytesIO(data))
    ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(image)


def _unpack_bits(page: Any, data: bytes) -> np.ndarray:
    """Unpack numbers of up to 15 bits, stored without gaps within a row, to (planes × H, numbers of a row) uint16."""
    import tifffile

    bits, planes = page.bitspersample, page.samplesperpixel if page.planarconfig == 2 else 1
    count = page.imagewidth * (page.samplesperpixel // planes)  # numbers of a row
    stride = ceil(count * bits / 8)
    decompress = bytes if page.compression == 1 else tifffile.TIFF.DECOMPRESSORS[page.compression]
    at = np.arange(count) * bits
    first, shift = at // 8, (24 - bits - at % 8).astype(np.uint32)
    found = np.empty((planes * page.imagelength, count), np.uint16)
    row = 0
    for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        rows = min(page.rowsperstrip, page.imagelength - row % page.imagelength)
        strip = np.frombuffer(decompress(data[start : start + length]), np.uint8)
        if bits > 8 and len(strip) >= 2 * rows * count:
            raise ImageError(f"stores 16 bits per value where its header says {bits}; save it in 16 bits")
        strip = strip[: rows * stride].reshape(rows, stride)  # fails where it is cut off
        for y in range(0, rows, step := max(1, AT_ONCE // count)):
            wide = np.pad(strip[y : y + step], ((0, 0), (0, 2))).astype(np.uint32)
            three = wide[:, first] << 16 | wide[:, first + 1] << 8 | wide[:, first + 2]  # three bytes from each start
            found[row + y : row + min(y + step, rows)] = three >> shift & 2**bits - 1
        row += rows
    return found


def _scaled_pixels(pixels: np.ndarray, page: Any) -> np.ndarray:
    """Convert the numbers of the file to what `decode_tiff` returns."""
    bits, colours, extra = page.bitspersample, _COLOURS[page.photometric], list(page.extrasamples)
    if pixels.dtype.kind == "i" and pixels.min() < 0:
        raise ImageError("holds negative numbers, and which is black is not known; save it in 16 bits without sign")
    if page.sampleformat == _FLOAT:
        pixels, white = pixels.astype(np.float32, copy=False), 1
    elif bits > 16:
        if pixels.max() > 65535:
            raise ImageError("holds whole numbers outside 0 to 65535; save it in 8 or 16 bits without sign")
        pixels, white = pixels.astype(np.uint16), 65535
    elif page.sampleformat == _SIGNED or 8 < bits < 16:
        pixels, white = pixels.astype(np.float32) / (2 ** (bits - (page.sampleformat == _SIGNED)) - 1), 1
    elif bits < 8:
        pixels, white = (pixels * (255 / (2**bits - 1))).round().astype(np.uint8), 255
    else:
        white = 2**bits - 1
    if page.photometric == _WHITE_IS_ZERO:
        pixels = np.concatenate([white - pixels[..., :1], pixels[..., 1:]], axis=2)
    if _ASSOCIATED in extra and not visible(pixels[..., colours + extra.index(_ASSOCIATED)]):
        raise ImageError(TRANSPARENT)
    kept = [*range(colours), *(colours + place for place, kind in enumerate(extra) if kind in _ALPHA)][: colours + 1]
    return pixels if len(kept) == pixels.shape[2] else pixels[..., kept]
