"""Text in images: DejaVu Sans, which is installed with unflaw, and for other scripts a font of the system."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

FONT = Path(__file__).with_name("fonts") / "DejaVuSans.ttf"  # Latin, Greek, Cyrillic, Arabic, Hebrew and more
# Fonts of other scripts as systems name them. Pillow looks for them in the folders of the system.
SYSTEM_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansJP-Regular.ttf", "ipag.ttf", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc"),
    *("YuGothM.ttc", "msgothic.ttc", "msyh.ttc", "malgun.ttf", "Nirmala.ttf", "LeelawUI.ttf"),  # Windows
    *("Arial Unicode.ttf", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),  # macOS
    *("NotoSansThai-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "unifont.otf", "unifont.ttf"),
)
_NO_CHARACTER = "\U0010fffe"  # every font shows its sign for a missing glyph


class Typeface:
    """Draw and measure lines of text in one size.

    Each character is drawn in the first font that has it. A character that no font has, or that does not print, is
    drawn as its escape, such as \\u6f22, so that names can still be told apart.

    Args:
        size: Pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def getlength(self, text: str) -> float:
        """Measure the width of a line in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, image: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, fill: str) -> None:
        """Draw a line on an image; `xy` is its upper left corner in pixels."""
        x, y = xy[0], xy[1] + _own(self.size).getmetrics()[0]
        for font, run in self._runs(text):
            image.text((x, y), run, fill, font, anchor="ls")
            x += font.getlength(run)

    def _runs(self, text: str) -> Iterator[tuple[FreeTypeFont, str]]:
        """Split a line where the font changes."""
        # letters and accents that are stored apart, as macOS does in file names, become one character
        pieces = [_piece(character, self.size) for character in unicodedata.normalize("NFC", text)]
        for font, run in groupby(pieces, lambda piece: piece[0]):
            yield font, "".join(text for _, text in run)


@lru_cache(4096)
def _piece(character: str, size: int) -> tuple[FreeTypeFont, str]:
    """Choose the font for a character, or replace it by its escape."""
    own = _own(size)
    if character.isprintable():
        if _has(own, character):
            return own, character
        for name in SYSTEM_FONTS:
            font = _system(name, size)
            if font is not None and _has(font, character):
                return font, character
    return own, character.encode("unicode_escape").decode()


@lru_cache
def _own(size: int) -> FreeTypeFont:
    return ImageFont.truetype(FONT, size)


@lru_cache
def _system(name: str, size: int) -> FreeTypeFont | None:
    if Path(name).exists():  # Pillow would take a file of the working directory first, which may be anyone's
        return None
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not installed
        return None


def _has(font: FreeTypeFont, character: str) -> bool:
    """Return True if a font has a glyph for a character."""
    shown, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    return shown.size != missing.size or bytes(shown) != bytes(missing)
