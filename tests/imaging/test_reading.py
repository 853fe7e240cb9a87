import io
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from unflaw.detector import Detector
from unflaw.errors import ImageError, TrainingError
from unflaw.imaging.reading import image_size, read, read_mask
from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import prepare, prepare_mask
from unflaw.io.listing import list_images

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
WIDE = RNG.integers(0, 65536, (7, 5), dtype=np.uint16)
WIDE_COLOUR = RNG.integers(0, 65536, (7, 5, 3), dtype=np.uint16)


def triple(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def tiff(path: Path, pixels: np.ndarray, **options) -> Path:
    tifffile.imwrite(path, pixels, **options)
    return path


# What is read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WebP"])
def test_lossless_colour_comes_as_stored(kind):
    pixels = read(encoded(COLOUR, kind, **({"lossless": True} if kind == "WebP" else {})))
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, COLOUR)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_grey_is_repeated(kind):
    np.testing.assert_array_equal(read(encoded(GREY, kind)), triple(GREY))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("TIFF", "CMYK")])
def test_other_colour_models(kind, mode):
    flat = Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode)
    assert np.abs(read(encoded(flat, kind)).astype(int) - 200).max() <= 2


def test_palette_and_one_bit():
    palette = Image.fromarray(COLOUR).quantize(8)
    np.testing.assert_array_equal(read(encoded(palette)), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(read(encoded(Image.fromarray(GREY > 99))), triple((GREY > 99) * np.uint8(255)))


def test_transparency_is_put_on_black():
    alpha = np.array([[0, 128, 255]], np.uint8)
    rgba = np.dstack([np.full((1, 3, 3), 200, np.uint8), alpha])
    for pixels in read(encoded(rgba)), read(rgba), read(encoded(np.dstack([rgba[..., 0], alpha]))):
        np.testing.assert_array_equal(pixels[0, :, 1], [0, 100, 200])
    np.testing.assert_allclose(read(rgba / np.float32(255))[0, :, 0], [0, 0.3937, 0.7843], atol=1e-4)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([250, 0, 0, 0, 250, 0])
    np.testing.assert_array_equal(read(encoded(palette, transparency=0)), [[[0, 0, 0], [0, 250, 0]]])


def bmp(rgba: np.ndarray) -> bytes:
    """A BMP of 32 bits whose header has a mask for alpha; Pillow writes none."""
    height, width = rgba.shape[:2]
    body = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    info = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(body), 2835, 2835, 0, 0)
    info += struct.pack("<IIII4s48x", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    return b"BM" + struct.pack("<IHHI", 122 + len(body), 0, 0, 122) + info + body


def with_alpha(alpha: np.ndarray, folder: Path) -> dict[str, bytes | np.ndarray]:
    """The same colours, grey and RGB, under an alpha channel (H, W) uint8, in files and arrays that have one."""
    rgba, grey = np.dstack([COLOUR, alpha]), np.dstack([GREY, alpha])
    found: dict[str, bytes | np.ndarray] = {
        "png": encoded(rgba),
        "png grey": encoded(grey),
        "webp": encoded(rgba, "WebP", lossless=True, exact=True),
        "bmp": bmp(rgba),
        "tiff": encoded(rgba, "TIFF"),
        "tiff lzw": encoded(rgba, "TIFF", compression="tiff_lzw"),
        "tiff grey": encoded(grey, "TIFF"),
        "array": rgba,
        "array grey": grey,
        "array 16": rgba * np.uint16(257),
        "array float": rgba / 255,
    }
    for extra in "unassalpha", "assocalpha":
        for name, pixels in {"colour": rgba, "grey": grey}.items():
            for bits, stored in {8: pixels, 16: pixels * np.uint16(257)}.items():
                kind = "rgb" if name == "colour" else "minisblack"
                path = tiff(folder / "x.tif", stored, photometric=kind, extrasamples=[extra])
                found[f"tiff {name} {bits} {extra}"] = path.read_bytes()
    return found


@pytest.mark.parametrize("value", [0, 1])
def test_an_image_that_is_transparent_everywhere_is_refused(tmp_path, value):
    """Of grabbers that never fill the alpha channel; or fill it with 1 of 255: black, all the same."""
    for name, source in with_alpha(np.full((7, 5), value, np.uint8), tmp_path).items():
        with pytest.raises(ImageError, match=r"^part 7: is transparent everywhere.*; save it without"):
            print(f"{name}: read as {read(source, name='part 7').max()}")
    palette = Image.new("P", (4, 4), 3)
    with pytest.raises(ImageError, match="transparent everywhere"):
        read(encoded(palette, "GIF", transparency=3))
    (tmp_path / "mask.png").write_bytes(encoded(np.dstack([GREY, GREY * 0])))
    with pytest.raises(ImageError, match=r"mask\.png: is transparent everywhere"):
        read_mask(tmp_path / "mask.png")


def test_one_pixel_that_is_not_transparent_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("unflaw.imaging.reading.AT_ONCE", 5)  # a row at once
    alpha = np.zeros((7, 5), np.uint8)
    alpha[5, 2] = 255
    for name, source in with_alpha(alpha, tmp_path).items():
        pixels = read(source)
        expected = GREY[5, 2] if "grey" in name else COLOUR[5, 2]
        np.testing.assert_allclose(pixels[5, 2] / (255 if pixels.dtype == np.uint8 else 1), expected / 255, atol=1e-6)
        assert "assoc" in name or pixels.sum() == pixels[5, 2].sum(), name


def test_transparent_files_are_named_in_training_and_in_prediction(parts, weights, tiny, tmp_path):
    good = sorted((parts / "train/good").iterdir())
    for path in good:
        Image.open(path).convert("RGBA").save(tmp_path / path.name)
        image = Image.open(tmp_path / path.name)
        image.putalpha(0)
        image.save(tmp_path / path.name)
    clear = sorted(tmp_path.iterdir())
    untrained = Detector(config=tiny("nearest_neighbor", **{"training.display_steps": 0}), weights=weights)
    with pytest.raises(TrainingError, match=r"12 could not be read, first: .*\.png: is transparent everywhere"):
        untrained.fit(tmp_path)
    trained = untrained.fit([*good, clear[0]])
    assert trained.record_["good_images"] == 12
    ((path, reason),) = trained.record_["skipped"]
    assert path == str(clear[0]) and reason.startswith(f"{clear[0]}: is transparent everywhere")
    found, *errors = trained.inspect_many([good[0], *clear[:2]], on_error="yield")
    assert found.path == str(good[0])
    for path, error in zip(clear[:2], errors, strict=True):
        assert str(error).startswith(f"{path}: is transparent everywhere")


def test_16_bits_keep_their_depth(tmp_path):
    for source in encoded(WIDE), encoded(WIDE, "TIFF"), encoded(WIDE, "TIFF", compression="tiff_lzw"), WIDE:
        pixels = read(source)
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels, triple(WIDE / np.float32(65535)))
    np.testing.assert_array_equal(read(tiff(tmp_path / "b.tif", WIDE, byteorder=">")), triple(WIDE / np.float32(65535)))


def test_16_bit_colour_that_needs_another_package_is_not_called_damaged(tmp_path, monkeypatch):
    path = tiff(tmp_path / "lzw.tif", WIDE_COLOUR, photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(5)  # to write LZW takes imagecodecs as well
    monkeypatch.setattr("unflaw.imaging.tiff.find_spec", lambda _: None)
    with pytest.raises(ImageError, match="save it with Deflate or uncompressed"):
        read(path)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_16_bit_colour_tiff(tmp_path, planar, compression):
    stored = WIDE_COLOUR if planar == "contig" else np.moveaxis(WIDE_COLOUR, 2, 0)
    path = tiff(tmp_path / "c.tif", stored, photometric="rgb", planarconfig=planar, compression=compression)
    np.testing.assert_array_equal(read(path), WIDE_COLOUR / np.float32(65535))
    assert image_size(path) == (5, 7)


@pytest.mark.parametrize(("extra", "on_black"), [("unassalpha", True), ("assocalpha", False), ("unspecified", False)])
def test_16_bit_tiff_with_a_fourth_channel(tmp_path, extra, on_black):
    stored = np.dstack([WIDE_COLOUR, np.full((7, 5), 32768, np.uint16)])
    pixels = read(tiff(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=[extra]))
    np.testing.assert_allclose(pixels, WIDE_COLOUR / 65535 * (32768 / 65535 if on_black else 1), atol=1e-6)


def test_float_tiff(tmp_path):
    unit = RNG.random((7, 5), dtype=np.float32)
    np.testing.assert_array_equal(read(tiff(tmp_path / "g.tif", unit)), triple(unit))
    np.testing.assert_array_equal(read(tiff(tmp_path / "c.tif", triple(unit), photometric="rgb")), triple(unit))
    for bad in unit * 300, unit - 0.5, np.where(unit > 0.5, np.nan, unit), np.where(unit > 0.5, np.inf, unit):
        with pytest.raises(ImageError, match=r"bad\.tif: .*divide"):
            read(tiff(tmp_path / "bad.tif", bad.astype(np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_agrees_in_every_reader(tmp_path, orientation):
    def exif() -> Image.Exif:
        tags = Image.Exif()
        tags[0x0112] = orientation
        return tags

    upright = read(encoded(COLOUR, exif=exif()))
    by_hand = {1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1]}
    by_hand |= {5: COLOUR.swapaxes(0, 1), 6: np.rot90(COLOUR, -1), 8: np.rot90(COLOUR)}
    by_hand[7] = by_hand[5][::-1, ::-1]
    np.testing.assert_array_equal(upright, by_hand[orientation])
    assert read(encoded(COLOUR, "JPEG", exif=exif())).shape == upright.shape
    np.testing.assert_array_equal(read(encoded(COLOUR, "TIFF", exif=exif())), upright)
    deep = COLOUR.astype(np.uint16) * 257
    path = tiff(tmp_path / "o.tif", deep, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    np.testing.assert_allclose(read(path), upright / 255, atol=1e-6)
    for kind in "PNG", "JPEG", "TIFF":
        (tmp_path / "o").write_bytes(encoded(COLOUR, kind, exif=exif()))
        assert image_size(tmp_path / "o") == upright.shape[1::-1]


def test_every_source_gives_the_same(tmp_path):
    path = tmp_path / "ä b.png"
    path.write_bytes(encoded(COLOUR))
    with path.open("rb") as stream:
        sources = [path, str(path), path.read_bytes(), stream, io.BytesIO(path.read_bytes()), Image.open(path), COLOUR]
        for source in sources:
            np.testing.assert_array_equal(read(source), COLOUR)
    assert image_size(path) == (5, 7)


def test_arrays():
    np.testing.assert_array_equal(read(GREY[..., None]), triple(GREY))
    np.testing.assert_array_equal(read(GREY > 9), triple((GREY > 9) * np.uint8(255)))
    half = read(np.full((2, 2), 0.5))
    assert half.dtype == np.float32 and (half == 0.5).all()


# TIFF headers

LIGHT = np.tile([0, 0.25, 0.8, 1], (3, 1))  # what a viewer shows: black at 0, white at 1


def retagged(path: Path, **values: object) -> Path:
    """A TIFF with other values in its header, or without some tags (None)."""
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = file.pages[0].tags
        for name, value in values.items():
            if value is not None:
                tags[name].overwrite(value)
            else:  # under a number that nobody knows
                order = "little" if file.byteorder == "<" else "big"
                file.filehandle.seek(tags[name].offset)
                file.filehandle.write((tags[name].code - 1).to_bytes(2, order))
    return path


def packed(path: Path, numbers: np.ndarray, bits: int, **options) -> Path:
    """A TIFF of (H, W) or (H, W, 3) numbers of so many bits without gaps; rows begin with a byte."""
    places = np.arange(bits - 1, -1, -1)
    rows = np.packbits((numbers.reshape(len(numbers), -1, 1) >> places & 1).reshape(len(numbers), -1), axis=1)
    values = {"ImageWidth": numbers.shape[1], "BitsPerSample": bits}
    if numbers.ndim == 3:
        values |= {"BitsPerSample": (bits,) * 3, "SamplesPerPixel": 3, "PhotometricInterpretation": 2}
    return retagged(tiff(path, rows.astype(np.uint8), **options), **values)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planes_of_grey_and_alpha_keep_their_alpha(tmp_path, compression):
    planes = np.stack([np.full((5, 6), 200), np.full((5, 6), 255)]).astype(np.uint8)
    planes[1, 0] = 0
    path = tmp_path / "planes.tif"
    tifffile.imwrite(
        path, planes, photometric="minisblack", planarconfig="separate", compression=compression, extrasamples=[2]
    )
    expected = np.full((5, 6), 200, np.uint8)
    expected[0] = 0
    np.testing.assert_array_equal(read(path), triple(expected))


def test_bits_in_reverse_order_are_put_right_or_refused(tmp_path):
    values = np.arange(60, dtype=np.uint8).reshape(6, 10)
    stored = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)[values]
    path = tmp_path / "reverse.tif"
    Image.fromarray(stored).save(path, tiffinfo={266: 2})
    np.testing.assert_array_equal(read(path), triple(values))
    with pytest.raises(ImageError, match=r"reverse order \(FillOrder 2\)"):
        read(retagged(path, PhotometricInterpretation=0))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("zero", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i1", "i2", "f2", "f4", "f8"])
def test_grey_tiff_is_as_light_as_its_header_says(tmp_path, kind, zero, order, compression):
    most = np.iinfo(kind).max if kind[0] in "ui" else 1
    stored = ((LIGHT if zero == "minisblack" else 1 - LIGHT) * most).astype(kind)
    options = {"byteorder": order, "compression": compression}
    path = tiff(tmp_path / "x.tif", stored, photometric=zero, **options)
    pixels = read(path)
    assert pixels.dtype == (np.uint8 if kind == "u1" else np.float32) and image_size(path) == (4, 3)
    np.testing.assert_allclose(pixels / (255 if kind == "u1" else 1), triple(LIGHT), atol=1 / 127)
    mask = np.array([[0, 0, 1], [1, 0, 0]], bool)
    stored = np.where(mask == (zero == "minisblack"), most, 0).astype(kind)
    np.testing.assert_array_equal(read_mask(tiff(tmp_path / "m.tif", stored, photometric=zero, **options)), mask)


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(("kind", "most"), [("u1", 255), ("u2", 65535), ("i2", 32767)])
def test_planar_and_predicted_big_endian_colour(tmp_path, kind, most, planar, predictor):
    colours = np.stack([LIGHT, LIGHT[:, ::-1], LIGHT**2], axis=2)
    stored = (colours * most).astype(kind)
    if planar == "separate":
        stored = np.moveaxis(stored, 2, 0)
    options = {"compression": "zlib", "predictor": True} if predictor else {}
    pixels = read(tiff(tmp_path / "x.tif", stored, photometric="rgb", planarconfig=planar, byteorder=">", **options))
    np.testing.assert_allclose(pixels / (255 if kind == "u1" else 1), colours, atol=1 / 255)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("bits", [6, 10, 12, 14])
def test_packed_bits_have_the_white_of_their_depth(tmp_path, bits, compression):
    most = 2**bits - 1
    numbers = RNG.integers(0, most + 1, (7, 5), dtype=np.uint16)
    numbers[0, :2] = 0, most
    expected, tolerance = triple(numbers / most), 1 / 500 if bits < 8 else 1e-6
    options = {"compression": compression, "rowsperstrip": 3}
    for number, (photometric, order) in enumerate([("minisblack", "<"), ("minisblack", ">"), ("miniswhite", "<")]):
        path = packed(tmp_path / f"{number}.tif", numbers, bits, photometric=photometric, byteorder=order, **options)
        pixels = read(path) / (255 if bits < 8 else 1)
        shown = 1 - expected if photometric == "miniswhite" else expected
        np.testing.assert_allclose(pixels, shown, atol=tolerance)
        np.testing.assert_array_equal(read_mask(path), shown[..., 0] > 0)
    colours = RNG.integers(0, most + 1, (7, 5, 3), dtype=np.uint16)
    pixels = read(packed(tmp_path / "colour.tif", colours, bits, photometric="minisblack", **options))
    np.testing.assert_allclose(pixels / (255 if bits < 8 else 1), colours / most, atol=tolerance)


def test_12_bits_in_16_are_numbers_of_16_bits_whatever_the_largest(tmp_path):
    """TIFF 6.0: MaxSampleValue is not to be used for display."""
    numbers = np.array([[0, 4095]], np.uint16)
    for options in {}, {"extratags": [(281, "H", 1, 4095, True)]}:
        pixels = read(tiff(tmp_path / "x.tif", numbers, **options))
        np.testing.assert_allclose(pixels[0, :, 0], [0, 4095 / 65535], atol=1e-6)
    with pytest.raises(ImageError, match="stores 16 bits per value where its header says 12"):
        read(retagged(tiff(tmp_path / "y.tif", numbers), BitsPerSample=12))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "F"])
def test_white_is_zero_where_only_pillow_decompresses(tmp_path, mode):
    light = np.array([[0, 0.25, 1]])
    stored = light.astype(np.float32) if mode == "F" else (light * 65535).astype("<u2" if mode == "I;16" else ">u2")
    image = Image.frombytes(mode, (3, 1), stored.tobytes())
    image.save(tmp_path / "x.tif", "TIFF", compression="tiff_lzw")
    for zero, expected in ((1, light), (0, 1 - light)):
        pixels = read(retagged(tmp_path / "x.tif", PhotometricInterpretation=zero))
        np.testing.assert_allclose(pixels, triple(expected), atol=1e-4)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(("bits", "kind"), [(8, np.uint8), (16, np.uint16)])
@pytest.mark.parametrize(("extra", "factor"), [("unassalpha", 128 / 255), ("assocalpha", 1), ("unspecified", 1)])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
def test_further_channels_are_what_the_header_calls_them(tmp_path, photometric, extra, factor, bits, kind, planar):
    colours, most = 3 if photometric == "rgb" else 1, 2**bits - 1
    value = np.full((2, 3, colours), 100 * most // 255, kind)
    stored = np.dstack([value, np.full((2, 3), 128 * most // 255, kind)])
    if planar == "separate":
        stored = np.moveaxis(stored, 2, 0)
    path = tiff(tmp_path / "x.tif", stored, photometric=photometric, planarconfig=planar, extrasamples=[extra])
    if (photometric, extra) == ("miniswhite", "assocalpha"):
        with pytest.raises(ImageError, match="without alpha"):
            read(path)
        return
    expected = (155 if photometric == "miniswhite" else 100) / 255 * factor
    np.testing.assert_allclose(read(path) / (255 if bits == 8 else 1), expected, atol=1 / 255)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize(("colours", "photometric"), [(3, "rgb"), (1, "minisblack")])
def test_a_channel_that_the_header_does_not_explain_is_refused(tmp_path, colours, photometric, kind):
    path = tiff(tmp_path / "x.tif", np.ones((4, 5, colours + 1), kind), photometric=photometric, planarconfig="contig")
    assert read(retagged(path, ExtraSamples=0)).shape == (4, 5, 3)
    with pytest.raises(ImageError, match=rf"x\.tif: has {colours + 1} channels, .*no ExtraSamples.*; save it without"):
        read(retagged(path, ExtraSamples=None))


def test_palettes_of_8_bits_are_not_black(tmp_path):
    colours = np.zeros((3, 256), np.uint16)
    colours[:, 1], colours[:, 2] = (250, 120, 1), (0, 0, 9)
    for scale in 1, 257:
        path = tiff(
            tmp_path / "x.tif", np.array([[0, 1, 2]], np.uint8), photometric="palette", colormap=colours * scale
        )
        np.testing.assert_array_equal(read(path), [[[0, 0, 0], [250, 120, 1], [0, 0, 9]]])
        np.testing.assert_array_equal(read_mask(path), [[False, True, True]])


REFUSED = {
    "negative": ("i2", {}, {}, "negative numbers"),
    "large": ("u4", {}, {}, "whole numbers outside 0 to 65535"),
    "large64": ("u8", {}, {}, "whole numbers outside 0 to 65535"),
    "white32": ("u4", {"photometric": "miniswhite"}, {}, "has 0 as white"),
    "complex": ("c8", {}, {}, "complex numbers"),
    "unmeant": ("u1", {}, {"PhotometricInterpretation": None}, "no PhotometricInterpretation"),
    "raw": ("u1", {}, {"PhotometricInterpretation": 32803}, "8-bit CFA TIFF"),
    "lzw": ("f8", {}, {"Compression": 5}, "compressed by LZW, which is not read in 64 bits"),
    "jpeg2000": ("u1", {}, {"Compression": 34712}, "compressed by JPEG2000"),
    "twenty": ("u4", {}, {"BitsPerSample": 20}, "unsigned numbers of 20 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tiff_that_is_not_read_is_refused_with_the_reason(tmp_path, monkeypatch, case):
    monkeypatch.setattr("unflaw.imaging.tiff.find_spec", lambda _: None)
    kind, options, tags, reason = REFUSED[case]
    stored = np.full((4, 5), -5 if kind == "i2" else 70_000 if kind in ("u4", "u8") else 1, kind)
    path = retagged(tiff(tmp_path / "x.tif", stored, **options), **tags)
    for reader in read, read_mask:
        with pytest.raises(ImageError, match=rf"x\.tif: .*{reason}.*; save it"):
            reader(path)


def test_grey_png_of_16_bits_with_a_transparent_value():
    image = Image.fromarray(np.array([[0, 30000, 65535]], np.uint16))
    np.testing.assert_allclose(read(encoded(image, transparency=65535))[0, :, 0], [0, 30000 / 65535, 0], atol=1e-6)


# What is refused


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2, 5)), np.zeros((0, 4, 3)), np.zeros((2, 2, 3), int)])
def test_arrays_of_other_shapes_and_types_are_refused(array):
    with pytest.raises(ImageError, match=r"^the image: .*give"):
        read(array)


DAMAGED = {
    "empty": (b"", "is empty"),
    "text": (b"hello, world", "not an image"),
    "vector": (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
    "head": (encoded(COLOUR)[:20], "damaged"),
    "flipped": (encoded(COLOUR).replace(b"IDAT", b"IDAT\1", 1), "damaged"),
    **{f"half_{kind}": (encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), kind), "damaged")
       for kind in ("PNG", "JPEG", "BMP", "TIFF", "WebP", "GIF")},
    "animation": (encoded(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(~GREY)]), "sev"),
    "pages": (encoded(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]), "several"),
    "signed": (encoded(Image.fromarray(np.full((3, 3), -5, np.int32)), "TIFF"), "negative numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_bad_files_are_named(tmp_path, case):
    data, message = DAMAGED[case]
    path = tmp_path / f"{case}.png"
    path.write_bytes(data[: len(data) // 2] if case.startswith("half") else data)
    with pytest.raises(ImageError, match=message) as caught:
        read(path)
    assert str(caught.value).count(str(path)) == 1


def test_deep_tiff_of_several_pages_or_odd_colours(tmp_path):
    with pytest.raises(ImageError, match="several frames"):
        read(tiff(tmp_path / "p.tif", np.stack([WIDE_COLOUR, WIDE_COLOUR]), photometric="rgb"))
    with pytest.raises(ImageError, match="SEPARATED"):
        read(tiff(tmp_path / "k.tif", np.dstack([WIDE_COLOUR, WIDE]), photometric="separated"))


def test_no_file_or_a_folder(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: there is no such file"):
        read(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ImageError, match="no such folder"):
        list_images(tmp_path / "gone")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(COLOUR))
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(ImageError, match="may not be read"):
        read(tmp_path / "x.png")


def test_size_is_checked_before_decoding(tmp_path):
    # the header announces 40000 × 40000 pixels: decoding would fail as damaged, Pillow's own guard would name a bomb
    header = bytearray(encoded(COLOUR, "BMP"))
    header[18:26] = (40000).to_bytes(4, "little") * 2
    with pytest.raises(ImageError, match=r"40000 × 40000 pixels, over the limit of 200,000,000"):
        read(bytes(header))
    for source in encoded(COLOUR), Image.fromarray(COLOUR), tiff(tmp_path / "c.tif", WIDE_COLOUR, photometric="rgb"):
        with pytest.raises(ImageError, match="over the limit of 34"):
            read(source, max_pixels=34)
        assert read(source, max_pixels=35).shape == (7, 5, 3)


def test_the_limit_is_ours_and_warns_of_nothing(recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    assert read(encoded(COLOUR)).shape == (7, 5, 3)
    assert not recwarn.list


def test_uploads_can_be_named():
    with pytest.raises(ImageError, match=r"^part 7: is empty"):
        read(b"", name="part 7")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=60)
@given(data=st.data())
def test_damage_raises_nothing_else(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WebP", "GIF"]))
    content = bytearray(encoded(COLOUR, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ImageError):
        assert read(bytes(content), max_pixels=10_000).shape[2] == 3


# Folders and masks


def test_list_images(tmp_path):
    for name in ["b.png", "a.JPG", "sub/c.tiff", ".hidden.png", ".cache/d.png", "notes.txt", "sub/._e.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["a.JPG", "b.png", "sub/c.tiff"]


def test_read_mask(tmp_path):
    mask = GREY > 99
    for name, image in {
        "255": mask,
        "1": mask.astype(np.uint8),
        "colour": np.dstack([mask * 0, mask * 0, mask * 7]),
    }.items():
        (tmp_path / name).write_bytes(encoded(image if image.dtype == bool else image.astype(np.uint8)))
        found = read_mask(tmp_path / name)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, mask)
    square = np.zeros((32, 32), bool)
    square[5:20, 9:21] = True
    (tmp_path / "m.jpg").write_bytes(encoded(square * np.uint8(255), "JPEG", quality=60))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg"), square)


# Preparation


def test_preparation_is_strict_and_frozen():
    for wrong in {"size": 31}, {"size": 4097}, {"fit": "crop"}, {"resize": 256}:
        with pytest.raises(ValidationError):
            Preparation(**wrong)
    with pytest.raises(ValidationError):
        Preparation().size = 64


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(64, 64, 3), (50, 200, 3), (33, 20, 3), (1, 300, 3)])
def test_8_and_16_bits_are_prepared_alike(fit, shape):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    preparation = Preparation(size=48, fit=fit)
    narrow, wide = prepare(image, preparation), prepare(image / np.float32(255), preparation)
    assert narrow.pixels.shape == (3, 48, 48) and narrow.pixels.dtype == wide.pixels.dtype == np.float32
    assert narrow.pixels.flags.c_contiguous and narrow.layout.original_size == shape[1::-1] and narrow.box == wide.box
    np.testing.assert_allclose(narrow.pixels, wide.pixels, atol=1.5 / 255)  # two passes, each rounded to 8 bits


def test_shrinking_is_antialiased():
    stripes = triple(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    inner = prepare(stripes, Preparation(size=64)).pixels[:, :, 2:-2]
    np.testing.assert_allclose(inner, 0.5, atol=0.02)


def test_same_size_is_left_alone():
    image = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        prepare(image, Preparation(size=32)).pixels, image.transpose(2, 0, 1) / np.float32(255)
    )


def test_padding_repeats_the_edge():
    prepared = prepare(RNG.integers(0, 256, (100, 50, 3), dtype=np.uint8), Preparation(size=64, fit="pad"))
    assert prepared.box == (16, 0, 48, 64)
    np.testing.assert_array_equal(prepared.pixels[:, :, :16], np.repeat(prepared.pixels[:, :, 16:17], 16, axis=2))
    np.testing.assert_array_equal(prepared.pixels[:, :, 48:], np.repeat(prepared.pixels[:, :, 47:48], 16, axis=2))
    assert prepared.layout.area_to_original(32 * 64) == 5000
    assert prepared.layout.to_original((0, 0, 10, 64)) == (0, 0, 0, 100)  # wholly padding: no area


geometry = {
    "width": st.integers(1, 400),
    "height": st.integers(1, 400),
    "size": st.integers(32, 300),
    "fit": st.sampled_from(["stretch", "pad"]),
}


@settings(max_examples=60)
@given(**geometry, corners=st.tuples(*[st.floats(0, 1)] * 4))
def test_boxes_come_back(width, height, size, fit, corners):
    preparation = Preparation(size=size, fit=fit)
    prepared = prepare(np.zeros((height, width, 3), np.uint8), preparation)
    left, top, right, bottom = prepared.box
    assert 0 <= left < right <= size and 0 <= top < bottom <= size
    assert (
        prepared.layout.to_original(prepared.box)
        == prepared.layout.to_original((0, 0, size, size))
        == (0, 0, width, height)
    )
    assert prepared.layout.area_to_original((right - left) * (bottom - top)) == pytest.approx(width * height)
    (x0, x1), (y0, y1) = (
        sorted(round(c * side) for c in cs) for cs, side in ((corners[:2], width), (corners[2:], height))
    )
    sx, sy = (right - left) / width, (bottom - top) / height
    there = (int(left + x0 * sx), int(top + y0 * sy), int(np.ceil(left + x1 * sx)), int(np.ceil(top + y1 * sy)))
    back = prepared.layout.to_original(there)
    slack = [1 + 1 / s for s in (sx, sy, sx, sy)]  # a pixel of the canvas and one of the original
    assert all(abs(a - b) <= s for a, b, s in zip(back, (x0, y0, x1, y1), slack, strict=True))
    assert back[0] <= x0 and back[1] <= y0 and back[2] >= x1 and back[3] >= y1


@settings(max_examples=40)
@given(**geometry)
def test_masks_share_the_geometry_of_images(width, height, size, fit):
    preparation = Preparation(size=size, fit=fit)
    mask = prepare_mask(np.ones((height, width), bool), preparation)
    left, top, right, bottom = prepare(np.zeros((height, width, 3), np.uint8), preparation).box
    assert mask.shape == (size, size) and mask.dtype == bool
    assert mask[top:bottom, left:right].all() and mask.sum() == (right - left) * (bottom - top)


def test_mask_lies_on_the_defect():
    image, mask = np.zeros((120, 80, 3), np.uint8), np.zeros((120, 80), bool)
    image[30:60, 20:50], mask[30:60, 20:50] = 255, True
    for fit in "stretch", "pad":
        preparation = Preparation(size=64, fit=fit)
        bright = prepare(image, preparation).pixels[0] > 0.5
        assert (bright != prepare_mask(mask, preparation)).mean() < 0.02


def test_a_directory_that_announces_endless_entries_ends():
    header = struct.pack("<4sHHQ", b"II+\0", 8, 0, 16)
    with pytest.raises(ImageError, match="damaged"):
        read(header + struct.pack("<Q", 2**60) + bytes(60))
