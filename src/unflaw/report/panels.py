"""Images of a result: heat maps on the detector's fixed scale, outlines, and captioned panels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from unflaw.postprocessing.results import Result, Scale
from unflaw.report.text import Typeface

# Cold colours up to the pixel threshold, which is 0.5 on the scale, and warm ones above it.
# Lightness increases throughout, so that the order of values survives grey printing and colour blindness.
_STOPS = (0.0, 0.5, 0.51, 0.75, 1.0)
_COLOURS = np.array([(11, 16, 38), (74, 111, 165), (226, 82, 43), (250, 150, 20), (255, 232, 120)])

# Viridis, for a method's own maps: increasing lightness, and no colours of an alarm.
_MAP_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAP_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
COVER = (214, 228, 240)  # colour of covered parts of an image

_CAPTIONS = {"mean": "Mean map", "uncertainty": "Uncertainty", "mask": "Final mask", "restored": "Restored"}
_VERDICTS = {"good": "#1b6e3c", "review": "#8a5a00", "defect": "#b3261e"}
_MARGIN, _HEADER, _CAPTION = 12, 58, 22  # pixels of a panel
_GAP = 6  # pixels between the tiles of a sheet


def heat_map(anomaly_map: np.ndarray, scale: Scale) -> np.ndarray:
    """Colour raw map values (H, W) on the fixed scale: blue up to the threshold, warm above it. (H, W, 3) uint8."""
    return _coloured(scale(anomaly_map), _STOPS, _COLOURS)


def colour_map(values: np.ndarray, limit: float) -> np.ndarray:
    """Colour values (H, W) from 0 (violet) to `limit` (yellow), clipped. (H, W, 3) uint8."""
    return _coloured(values / max(limit, 1e-12), _MAP_STOPS, _MAP_COLOURS)


def grey_map(values: np.ndarray) -> np.ndarray:
    """Colour values (H, W) from 0 (black) to 1 (white), clipped. (H, W, 3) uint8."""
    return np.repeat((np.clip(values, 0, 1)[..., None] * 255).round(), 3, axis=2).astype(np.uint8)


def _coloured(values: np.ndarray, stops: Sequence[float], colours: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(values, stops, channel) for channel in colours.T], axis=-1).round().astype(np.uint8)


def overlay(image: np.ndarray, anomaly_map: np.ndarray, scale: Scale, opacity: float = 0.75) -> np.ndarray:
    """Blend the heat map over an image, more opaque for higher values; good areas stay unchanged. (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W), raw values.
        scale: Fixed scale of the detector.
        opacity: Opacity in [0, 1] for scaled values of 0.75 and more; half of it at the threshold, 0 below 0.25.
    """
    alpha = _opacity(anomaly_map, scale, opacity)
    return (image * (1 - alpha) + heat_map(anomaly_map, scale) * alpha).round().astype(np.uint8)


def heat_overlay(anomaly_map: np.ndarray, scale: Scale, opacity: float = 0.75) -> np.ndarray:
    """Return the layer that `overlay` blends over an image: (H, W, 4) uint8, RGB and opacity."""
    alpha = (255 * _opacity(anomaly_map, scale, opacity)).round().astype(np.uint8)
    return np.concatenate([heat_map(anomaly_map, scale), alpha], axis=-1)


def _opacity(anomaly_map: np.ndarray, scale: Scale, opacity: float) -> np.ndarray:
    """(H, W, 1) in [0, 1]."""
    return opacity * np.clip(2 * scale(anomaly_map) - 0.5, 0, 1)[..., None]


def outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (0, 230, 118)) -> np.ndarray:
    """Draw a line around every area of a mask, outside of it. Returns (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8; not changed.
        mask: (H, W), any type; true where not 0.
        colour: RGB of the line. A dark rim outside keeps it visible on any image.
    """
    inside, drawn = mask != 0, image.copy()
    width = max(1, round(max(mask.shape) / 128))
    for reach, paint in ((2 * width, (0, 0, 0)), (width, colour)):
        drawn[ndimage.binary_dilation(inside, iterations=reach) & ~inside] = paint
    return drawn


def views(result: Result, scale: Scale, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return the images that explain a result, by caption, without the padding of the canvas.

    Args:
        result: Result of an inspection.
        scale: Fixed scale of the detector, for the heat map. The method's own maps are grey: 0 black, 1 white.
        mask: True defect (size, size) on the same canvas; an empty one is not shown.

    Returns:
        Images (h, w, 3) uint8 by caption; h and w are those of `result.valid`.
    """
    x0, y0, x1, y1 = result.valid
    valid = np.s_[y0:y1, x0:x1]
    image, anomaly_map = result.image[valid], result.map[valid]
    shown = {"Image": image}
    if mask is not None and mask[valid].any():
        shown["Ground truth"] = outline(image, mask[valid])
    shown["Heat map"] = _boxed(overlay(image, anomaly_map, scale), result)
    for name, layer in result.layers.items():
        gain = 2 if name == "uncertainty" else 1  # the standard deviation of values in [0, 1] is 0.5 at most
        shown[_CAPTIONS.get(name, name)] = (layer if layer.ndim == 3 else grey_map(gain * layer))[valid]
    return shown


def panel(
    result: Result, scale: Scale, mask: np.ndarray | None = None, tile: int = 256, own_scale: bool = False
) -> Image.Image:
    """Draw all `views` of a result in a row with captions, under its name, verdict, score and p-value.

    Args:
        result: Result of an inspection.
        scale: Fixed scale of the detector.
        mask: True defect (size, size) on the same canvas, if known.
        tile: Longer side of each image, pixels.
        own_scale: Colour the heat map on a scale of its own (`Scale.up_to`).
    """
    shown = views(result, scale.up_to(result.map) if own_scale else scale, mask)
    width, height = _fitted(shown["Image"].shape, tile)
    step = max(width, 90) + _MARGIN  # a narrow image still leaves room for its caption
    row = Image.new("RGB", (max(260, _MARGIN + step * len(shown)), _HEADER + height + _CAPTION + _MARGIN), "white")
    draw, small, large = ImageDraw.Draw(row), Typeface(12), Typeface(15)
    large.draw(draw, (_MARGIN, 8), _shortened(label(result), large, row.width - 2 * _MARGIN), "black")
    verdict = f"{result.verdict}   score {result.score:.4g}   p {result.p_value:.3g}"
    small.draw(draw, (_MARGIN, 32), verdict, _VERDICTS[result.verdict])
    for x, (caption, pixels) in zip(range(_MARGIN, row.width, step), shown.items(), strict=False):
        row.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS), (x, _HEADER))
        small.draw(draw, (x, _HEADER + height + 4), caption, "#444444")
    return row


@dataclass(frozen=True)
class Column:
    """Column of a `sheet`.

    Attributes:
        heading: Text above the column.
        bar: Colours of the scale, (1, n, 3) uint8.
        marks: Texts below the bar, by position in [0, 1].
    """

    heading: str
    bar: np.ndarray | None = None
    marks: Mapping[float, str] = field(default_factory=dict)


def sheet(
    columns: Sequence[Column],
    rows: Sequence[tuple[Sequence[str], Mapping[str, np.ndarray]]],
    notes: Sequence[str] = (),
    width: int = 1400,
) -> Image.Image:
    """Draw images in rows and columns: headings above, names on the left, scales and notes below.

    Args:
        columns: Columns from left to right.
        rows: Name (lines of text) and images (h, w, 3) uint8 by heading; all images of a row have one shape. Columns
            without an image stay empty.
        notes: Lines of text.
        width: Maximum width in pixels; tiles are 24 to 240 pixels wide.
    """
    small, tiny, line = Typeface(12), Typeface(10), 17
    names = max((math.ceil(small.getlength(text)) for lines, _ in rows for text in lines), default=0)
    left = _MARGIN + min(_MARGIN + names, width // 6)
    tile = max(24, min(240, (width - left) // len(columns) - _GAP))
    headings = [_wrapped(column.heading, small, tile) for column in columns]
    sizes = [_fitted(next(iter(images.values())).shape, tile) for _, images in rows]
    heights = [max(size[1], line * len(lines)) + _GAP for size, (lines, _) in zip(sizes, rows, strict=True)]
    top = _MARGIN + line * max(map(len, headings))
    *tops, bottom = np.cumsum([top, *heights]).tolist()
    below = bottom + (30 if any(column.bar is not None for column in columns) else 0)
    full = left + (tile + _GAP) * len(columns), below + line * len(notes) + _MARGIN
    drawn = Image.new("RGB", full, "white")
    draw = ImageDraw.Draw(drawn)

    def write(x: int, y: int, lines: Sequence[str], colour: str = "#222222") -> None:
        for i, text in enumerate(lines):
            small.draw(draw, (x, y + line * i), text, colour)

    for (lines, _), y in zip(rows, tops, strict=True):
        write(_MARGIN, y, [_shortened(text, small, left - 2 * _MARGIN) for text in lines])
    for i, (column, heading) in enumerate(zip(columns, headings, strict=True)):
        x = left + i * (tile + _GAP)
        write(x, top - 4 - line * len(heading), heading)
        for (_, images), size, y in zip(rows, sizes, tops, strict=True):
            if column.heading in images:
                drawn.paste(Image.fromarray(images[column.heading]).resize(size, Image.Resampling.LANCZOS), (x, y))
        if column.bar is not None:
            drawn.paste(Image.fromarray(column.bar).resize((tile, 8)), (x, bottom))
            for place, text in column.marks.items():
                tiny.draw(draw, (x + place * (tile - tiny.getlength(text)), bottom + 10), text, "#444444")
    write(_MARGIN, below, notes, "#444444")
    return drawn


def _fitted(shape: Sequence[int], tile: int) -> tuple[int, int]:
    """Return width and height of an image, scaled so that its longer side is `tile`."""
    width, height = (max(1, round(tile * side / max(shape[:2]))) for side in (shape[1], shape[0]))
    return width, height


def _wrapped(text: str, font: Typeface, width: float) -> list[str]:
    """Break a text into lines that fit a width in pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_shortened(line, font, width) for line in lines]


def _shortened(text: str, font: Typeface, width: float) -> str:
    """Return a text, or its end if it is too long."""
    while len(text) > 1 and font.getlength(text) > width:
        text = "…" + text[2:]
    return text


def label(result: Result) -> str:
    """Return the name of a result: its file with the folder, which in most layouts is the defect type."""
    return "/".join(Path(result.path).parts[-2:]) if result.path else "image"


def _boxed(image: np.ndarray, result: Result) -> np.ndarray:
    """Outline the boxes of the regions, which are in pixels of the file, on the image (h, w, 3) of its crop."""
    left, top, right, bottom = result.crop
    height, width = image.shape[:2]
    across, down = width / max(right - left, 1), height / max(bottom - top, 1)
    for region in result.regions:
        x0, x1 = (round((x - left) * across) for x in region.box[::2])
        y0, y1 = (round((y - top) * down) for y in region.box[1::2])
        box = np.zeros(image.shape[:2], bool)
        box[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
        image = outline(image, box, (255, 255, 255))
    return image
