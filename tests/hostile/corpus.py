"""Hostile images, made by code: what each file is, and what must become of it."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image, PngImagePlugin

BOMB = 50_000  # side; 2.5 billion pixels
READ = None  # in the place of a reason: the file is an image, odd as it is, and must be read


class Case(NamedTuple):
    """`make()` gives the bytes of the file `name`; `why` is part of the reason for which it is refused."""

    name: str
    make: Callable[[], bytes]
    why: str | None


def grey(side: int = 40) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (side, side), dtype=np.uint8)


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """An image as Pillow writes it."""
    data = io.BytesIO()
    Image.fromarray(grey()).convert(mode).save(data, kind, **options)
    return data.getvalue()


def written(pixels: np.ndarray, **options: object) -> bytes:
    """An image as tifffile writes it."""
    data = io.BytesIO()
    tifffile.imwrite(data, pixels, **options)
    return data.getvalue()


def moving(kind: str) -> bytes:
    """Three frames."""
    frames = [Image.fromarray(np.roll(grey(), 5 * i)) for i in range(3)]
    data = io.BytesIO()
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], duration=40)
    return data.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deflated(total: int, block: int = 2**20) -> bytes:
    """So many zeros, compressed a thousandfold."""
    press, zeros = zlib.compressobj(9), bytes(block)
    return b"".join(press.compress(zeros[: min(block, total - at)]) for at in range(0, total, block)) + press.flush()


def png(width: int, height: int, body: bytes, *more: bytes, bits: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, tuple[int, ...]]], body: bytes = b"", following: int = 0) -> bytes:
    """One page of `{tag: (3 for 16 or 4 for 32 bits, values)}`; -1 among the offsets stands for `body`."""
    start = 8 + 2 + 12 * len(tags) + 4
    values = b""
    table = b""
    sizes = sum(max(4, (2 if kind == 3 else 4) * len(v)) for kind, v in tags.values())
    for tag, (kind, given) in sorted(tags.items()):
        numbers = [start + sizes if number == -1 else number for number in given]
        packed = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers).ljust(4, b"\0")
        table += struct.pack("<HHI", tag, kind, len(numbers))
        table += packed if len(packed) == 4 else struct.pack("<I", start + len(values))
        values += b"" if len(packed) == 4 else packed
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + table + struct.pack("<I", following)
    return head + values.ljust(sizes, b"\0") + body


def rgb16(width: int, height: int, body: bytes, **more: tuple[int, tuple[int, ...]]) -> bytes:
    """A colour TIFF of 16 bits in one strip, compressed with Deflate."""
    extra = {int(tag.removeprefix("t")): value for tag, value in more.items()}
    tags = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, (16, 16, 16)),
        259: (3, (8,)),
        262: (3, (2,)),
        273: (4, (-1,)),
        277: (3, (3,)),
        278: (4, (height,)),
        279: (4, (len(body),)),
    }
    return tiff(tags | extra, body)


def twelve(width: int, height: int, body: bytes, **more: tuple[int, tuple[int, ...]]) -> bytes:
    """A grey TIFF of 12 bits in one strip, compressed with Deflate."""
    return rgb16(width, height, body, **({"t258": (3, (12,)), "t262": (3, (1,)), "t277": (3, (1,))} | more))


def strips(side: int, rows: int) -> bytes:
    """A grey TIFF whose strips are all the same few compressed bytes: every pixel is there."""
    strip, count = zlib.compress(bytes(side * rows), 9), side // rows
    offset = 8 + 2 + 12 * 9 + 4 + 4 * 7 + 8 * count
    tags = {
        **{256: (4, (side,)), 257: (4, (side,)), 258: (3, (8,)), 259: (3, (8,)), 262: (3, (1,))},
        **{273: (4, (offset,) * count), 277: (3, (1,)), 278: (4, (rows,)), 279: (4, (len(strip),) * count)},
    }
    return tiff(tags, strip)


def webp(width: int, height: int) -> bytes:
    """A small image whose canvas claims to be larger."""
    inner = saved("WEBP")[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<IB3x", 10, 0)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int) -> bytes:
    frame = saved("GIF", "P")
    return frame[:6] + struct.pack("<HH", width, height) + frame[10:]


def bmp(width: int, height: int) -> bytes:
    data = bytearray(saved("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def noted(kind: str, size: int) -> bytes:
    """With a colour profile, EXIF and, in PNG, a text of so many bytes."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "x" * size, zip=True)
    more = {"pnginfo": notes} if kind == "PNG" else {}
    exif = Image.Exif()
    exif[0x9286] = "y" * min(size, 60_000)
    return saved(kind, "RGB", icc_profile=bytes(size), exif=exif, **more)


def flipped(data: bytes, seed: int, count: int = 8) -> bytes:
    """With some bits turned."""
    rng, found = np.random.default_rng(seed), bytearray(data)
    for place in rng.integers(0, len(found), count):
        found[place] ^= 1 << int(rng.integers(8))
    return bytes(found)


def scanned(side: int, scans: int) -> bytes:
    """A progressive JPEG that is refined again and again."""
    data = io.BytesIO()
    Image.new("L", (side, side)).save(data, "JPEG", progressive=True)
    whole = data.getvalue()
    return whole[:-2] + whole[whole.rfind(b"\xff\xda") : -2] * scans + b"\xff\xd9"


def before(kind: str, block: bytes) -> bytes:
    """With blocks put before the pixels."""
    data = saved(kind, "P" if kind == "GIF" else "RGB")
    place = 2 if kind == "JPEG" else 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:place] + block + data[place:]


def runs(width: int, height: int) -> bytes:
    """A run-length compressed BMP with nothing in it but ends of lines."""
    body = b"\1\7\0\0" * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 1, 1, 256, 0)
    start = 14 + len(header) + 1024
    return struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start) + header + bytes(1024) + body


REAL = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)


def _with(value: float) -> np.ndarray:
    pixels = REAL.copy()
    pixels[3, 3] = value
    return pixels


def cases() -> list[Case]:
    """All that are one file."""
    row = BOMB // 8 + 1
    kinds = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
    whole = {kind: saved(kind, "P" if kind == "GIF" else "RGB") for kind in kinds}
    return [
        *(Case(f"cut-{kind}", lambda data=data: data[: len(data) // 2], "damaged") for kind, data in whole.items()),
        *(Case(f"head-{kind}", lambda data=data: data[:6], "") for kind, data in whole.items()),
        Case("empty.png", bytes, "is empty"),
        Case("zeros.png", lambda: bytes(1000), "not an image"),
        Case("suffix-is-wrong.png", lambda: whole["JPEG"], READ),
        Case("page.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        Case("program.jpg", lambda: b"\x7fELF" + bytes(500), "not an image"),
        # bombs
        Case("claims.png", lambda: png(BOMB, BOMB, zlib.compress(b"")), "over the limit"),
        Case("bomb.png", lambda: png(BOMB, BOMB, deflated(BOMB * row), bits=1), "over the limit"),
        Case("claims-most.png", lambda: png(2**31 - 1, 2**31 - 1, b""), "over the limit"),
        Case("small-but-long.png", lambda: png(40, 40, deflated(2**30)), READ),
        Case("bomb.tif", lambda: strips(BOMB, 500), "over the limit"),
        Case("bomb-strip.tif", lambda: rgb16(40, 40, deflated(2**31)), "more than its size"),
        Case("bomb-deep.tif", lambda: rgb16(BOMB, BOMB, deflated(2**20)), "over the limit"),
        Case("bomb-samples.tif", lambda: rgb16(9000, 9000, deflated(2**20), t277=(3, (4000,))), "channels"),
        Case("bomb-tile.tif", lambda: rgb16(40, 40, b"x", t322=(4, (2**20,)), t323=(4, (2**20,))), "tiles"),
        Case("bomb-depth.tif", lambda: rgb16(40, 40, deflated(2**20), t32997=(4, (2**30,))), "deep"),
        Case("claims.webp", lambda: webp(2**24, 2**8), ""),
        Case("claims-16383.webp", lambda: webp(16383, 16383), "exceeds limit"),
        Case("claims.gif", lambda: gif(65535, 65535), "over the limit"),
        Case("claims.bmp", lambda: bmp(BOMB, BOMB), "over the limit"),
        Case("negative.bmp", lambda: bmp(-40, 40), ""),
        Case(
            "text-bomb.png",
            lambda: png(40, 40, zlib.compress(bytes(1640)), chunk(b"zTXt", b"a\0\0" + deflated(2**30))),
            "",
        ),
        Case(
            "profile-bomb.png",
            lambda: png(40, 40, zlib.compress(bytes(1640)), chunk(b"iCCP", b"a\0\0" + deflated(2**30))),
            "",
        ),
        # long to read
        Case("chunks.png", lambda: png(40, 40, zlib.compress(bytes(1640)), chunk(b"abCd", b"") * 10**6), "blocks"),
        Case("segments.jpg", lambda: before("JPEG", b"\xff\xfe\0\2" * 10**6), "blocks"),
        Case("fill.jpg", lambda: before("JPEG", b"\xff" * 10**7), "blocks"),
        Case("comments.gif", lambda: before("GIF", b"!\xfe\0" * 10**6), "blocks"),
        Case("comment.gif", lambda: before("GIF", b"!\xfe" + b"\1x" * 10**6 + b"\0"), "blocks"),
        Case("scans.jpg", lambda: scanned(6000, 1000), "1006 scans"),
        Case("runs.bmp", lambda: runs(12_000, 12_000), "run-length"),
        Case(
            "strips.tif",
            lambda: tiff(
                {
                    256: (4, (40,)),
                    257: (4, (40,)),
                    258: (3, (8,)),
                    259: (3, (1,)),
                    262: (3, (1,)),
                    277: (3, (1,)),
                    278: (4, (1,)),
                    273: (4, (8,) * 2 * 10**6),
                    279: (4, (40,) * 2 * 10**6),
                }
            ),
            "blocks",
        ),
        # several images in one
        *(Case(f"moving-{kind}", lambda kind=kind: moving(kind), "several frames") for kind in ("GIF", "WEBP", "PNG")),
        Case("pages.tif", lambda: moving("TIFF"), "several frames or pages"),
        Case(
            "pages-deep.tif",
            lambda: written(np.zeros((3, 40, 40, 3), np.uint16), photometric="rgb"),
            "several frames or pages",
        ),
        Case("ring.tif", lambda: tiff({256: (4, (40,)), 257: (4, (40,))}, following=8), ""),
        Case(
            "many-pages.tif",
            lambda: written(np.zeros((3000, 2, 2), np.uint8), photometric="minisblack"),
            "several frames",
        ),
        # kinds of pixels
        Case("cmyk.jpg", lambda: saved("JPEG", "CMYK"), READ),
        Case("cmyk.tif", lambda: saved("TIFF", "CMYK"), READ),
        Case("palette.png", lambda: saved("PNG", "P"), READ),
        Case("one-bit.png", lambda: saved("PNG", "1"), READ),
        Case("one-bit.tif", lambda: saved("TIFF", "1", compression="group4"), READ),
        Case("ycbcr.tif", lambda: saved("TIFF", "YCbCr"), READ),
        Case("lab.tif", lambda: saved("TIFF", "LAB"), READ),
        Case("sixteen.png", lambda: saved("PNG", "I;16"), READ),
        Case("float.tif", lambda: written(REAL), READ),
        Case("float-colour.tif", lambda: written(np.repeat(REAL[..., None], 3, 2), photometric="rgb"), READ),
        Case("double.tif", lambda: written(REAL.astype(np.float64)), READ),
        Case("half.tif", lambda: written(REAL.astype(np.float16)), READ),
        Case("white-is-zero.tif", lambda: written(REAL, photometric="miniswhite"), READ),
        Case("cut-double.tif", lambda: written(REAL.astype(np.float64))[:-5000], "damaged"),
        Case("nan.tif", lambda: written(_with(np.nan)), "not finite"),
        Case("inf.tif", lambda: written(_with(np.inf)), "not finite"),
        Case("huge.tif", lambda: written(_with(1e30)), "outside 0 to 1"),
        Case(
            "nan-colour.tif",
            lambda: written(np.repeat(_with(np.nan)[..., None], 3, 2), photometric="rgb"),
            "not finite",
        ),
        Case("complex.tif", lambda: written(REAL.astype(np.complex64)), "complex"),
        Case("wide-numbers.tif", lambda: written((REAL * 1e9).astype(np.uint32)), "outside 0 to 65535"),
        Case("signed.tif", lambda: written((REAL * -9).astype(np.int16)), "negative"),
        Case("twelve.tif", lambda: twelve(40, 40, zlib.compress(bytes(2400))), READ),
        Case("cut-twelve.tif", lambda: twelve(40, 40, zlib.compress(bytes(2000))), "damaged"),
        Case("cut-deflate-twelve.tif", lambda: twelve(40, 40, zlib.compress(bytes(2400), 0)[:-900]), "damaged"),
        Case("bomb-twelve.tif", lambda: twelve(40, 40, deflated(2**24)), "more than its size"),
        Case("half-twelve.tif", lambda: twelve(40, 40, zlib.compress(bytes(1200)), t278=(4, (20,))), "lacks some"),
        Case("half-rgb16.tif", lambda: rgb16(40, 40, zlib.compress(bytes(4800)), t278=(4, (20,))), "lacks some"),
        Case("claims-twelve.tif", lambda: twelve(BOMB, BOMB, b""), "over the limit"),
        Case("claims-most-twelve.tif", lambda: twelve(14_000, 14_000, zlib.compress(b"")), "damaged"),
        Case("no-strips-twelve.tif", lambda: twelve(40, 40, b"", t273=(4, ()), t279=(4, ())), ""),
        Case("five-channels.tif", lambda: written(np.zeros((40, 40, 5), np.uint16), photometric="rgb"), READ),
        # notes
        Case("notes.png", lambda: noted("PNG", 3_000_000), "too large"),  # Pillow takes a megabyte
        *(Case(f"notes-{kind}", lambda kind=kind: noted(kind, 3_000_000), READ) for kind in ("JPEG", "TIFF", "WEBP")),
        Case(
            "text-long.png",
            lambda: png(40, 40, zlib.compress(bytes(1640)), chunk(b"tEXt", b"a\0" + b"x" * 2**24)),
            READ,
        ),
        *(
            Case(f"flipped-{kind}-{seed}", lambda data=data, seed=seed: flipped(data, seed), "?")
            for kind, data in whole.items()
            for seed in range(6)
        ),
    ]
