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

# Cold up to the pixel threshold, which the scale puts at 0.5, and warm above it: nothing on a good part looks alarming.
# Lighter throughout, so that the order of values survives grey printing and colour blindness.
_STOPS = (0.0, 0.5, 0.51, 0.75, 1.0)
_COLOURS = np.array([(11, 16, 38), (74, 111, 165), (226, 82, 43), (250, 150, 20), (255, 232, 120)])

# A method's own maps, 0 dark and the stated limit light: lighter throughout too, and free of the colours of an alarm.
_MAP_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAP_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])
COVER = (214, 228, 240)  # what is covered in an image

_CAPTIONS = {"mean": "Mean map", "uncertainty": "Uncertainty", "mask": "Final mask", "restored": "Restored"}
_VERDICTS = {"good": "#1b6e3c", "review": "#8a5a00", "defect": "#b3261e"}
_MARGIN, _HEADER, _CAPTION = 12, 58, 22  # pixels of a panel
_GAP = 6  # pixels between the tiles of a sheet


def heat_map(anomaly_map: np.ndarray, scale: Scale) -> np.ndarray:
    """Colours raw map values (H, W) on the fixed scale as (H, W, 3) uint8: blue up to the threshold, warm above it."""
    return _coloured(scale(anomaly_map), _STOPS, _COLOURS)


def colour_map(values: np.ndarray, limit: float) -> np.ndarray:
    """Colours values (H, W) from 0 to `limit` as (H, W, 3) uint8, violet to yellow; what is outside gets the ends."""
    return _coloured(values / max(limit, 1e-12), _MAP_STOPS, _MAP_COLOURS)


def grey_map(values: np.ndarray) -> np.ndarray:
    """Values (H, W) from 0 to 1 as (H, W, 3) uint8, black to white; what is outside gets the ends."""
    return np.repeat((np.clip(values, 0, 1)[..., None] * 255).round(), 3, axis=2).astype(np.uint8)


def _coloured(values: np.ndarray, stops: Sequence[float], colours: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(values, stops, channel) for channel in colours.T], axis=-1).round().astype(np.uint8)


def overlay(image: np.ndarray, anomaly_map: np.ndarray, scale: Scale, opacity: float = 0.75) -> np.ndarray:
    """Lays the heat map over the image, more opaque where it is higher; good areas stay the image. (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W), raw values.
        scale: The detector's fixed scale.
        opacity: Weight in [0, 1] of the heat map from a scaled value of 0.75 on; half at the threshold, none to 0.25.
    """
    alpha = _opacity(anomaly_map, scale, opacity)
    return (image * (1 - alpha) + heat_map(anomaly_map, scale) * alpha).round().astype(np.uint8)


def heat_overlay(anomaly_map: np.ndarray, scale: Scale, opacity: float = 0.75) -> np.ndarray:
    """What `overlay` lays over an image, as (H, W, 4) uint8: colours and their opacity."""
    alpha = (255 * _opacity(anomaly_map, scale, opacity)).round().astype(np.uint8)
    return np.concatenate([heat_map(anomaly_map, scale), alpha], axis=-1)


def _opacity(anomaly_map: np.ndarray, scale: Scale, opacity: float) -> np.ndarray:
    """(H, W, 1) in [0, 1]."""
    return opacity * np.clip(2 * scale(anomaly_map) - 0.5, 0, 1)[..., None]


def outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (0, 230, 118)) -> np.ndarray:
    """Draws a line around, not over, every area of a mask; returns (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8; left as it is.
        mask: (H, W), any type; true where not 0.
        colour: RGB. A dark rim outside the line keeps it legible on any image.
    """
    inside, drawn = mask != 0, image.copy()
    width = max(1, round(max(mask.shape) / 128))
    for reach, paint in ((2 * width, (0, 0, 0)), (width, colour)):
        drawn[ndimage.binary_dilation(inside, iterations=reach) & ~inside] = paint
    return drawn


def views(result: Result, scale: Scale, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The images that explain a result, by caption, without the padding of the canvas.

    Args:
        result: An inspection.
        scale: The detector's fixed scale, for the heat map. The method's own maps are grey, 0 black and 1 white.
        mask: (size, size), the true defect on the same canvas; nothing is shown for an empty one.

    Returns:
        caption -> (h, w, 3) uint8, h and w those of `result.valid`.
    """
    x0, y0, x1, y1 = result.valid
    valid = np.s_[y0:y1, x0:x1]
    image, anomaly_map = result.image[valid], result.map[valid]
    shown = {"Image": image}
    if mask is not None and mask[valid].any():
        shown["Ground truth"] = outline(image, mask[valid])
    shown["Heat map"] = _boxed(overlay(image, anomaly_map, scale), result)
    for name, layer in result.layers.items():
        gain = 2 if name == "uncertainty" else 1  # a deviation of values in [0, 1] is at most one half
        shown[_CAPTIONS.get(name, name)] = (layer if layer.ndim == 3 else grey_map(gain * layer))[valid]
    return shown


def panel(result: Result, scale: Scale, mask: np.ndarray | None = None, tile: int = 256) -> Image.Image:
    """All `views` of a result in one captioned row, under its name, verdict, score and p-value.

    Args:
        result: An inspection.
        scale: The detector's fixed scale.
        mask: (size, size), the true defect on the same canvas, if it is known.
        tile: Longer side of each image, pixels.
    """
    shown = views(result, scale, mask)
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
    """A column of a `sheet`: its heading, and the colours of its scale (1, n, 3) with texts by place in [0, 1]."""

    heading: str
    bar: np.ndarray | None = None
    marks: Mapping[float, str] = field(default_factory=dict)


def sheet(
    columns: Sequence[Column],
    rows: Sequence[tuple[Sequence[str], Mapping[str, np.ndarray]]],
    notes: Sequence[str] = (),
    width: int = 1400,
) -> Image.Image:
    """Images in rows and columns on white: headings above, names at the left, scales and notes below.

    Args:
        columns: From left to right.
        rows: Lines of the name and images (h, w, 3) uint8 by heading, all of a row of one shape; where a column has
            none, the place stays empty.
        notes: Lines of text.
        width: At most this many pixels; tiles are 24 to 240 pixels wide.
    """
    small, tiny = Typeface(12), Typeface(10)
    margin = _MARGIN + max((math.ceil(small.getlength(line)) for lines, _ in rows for line in lines), default=0)
    margin = min(margin, width // 6)
    tile = max(24, min(240, (width - margin - _MARGIN) // len(columns) - _GAP))
    headings = [_wrapped(column.heading, small, tile) for column in columns]
    top = _MARGIN + 17 * max(map(len, headings))
    sizes = [_fitted(next(iter(images.values())).shape, tile) for _, images in rows]
    heights = [max(height, 17 * len(lines)) for (_, height), (lines, _) in zip(sizes, rows, strict=True)]
    bottom = top + sum(heights) + _GAP * len(heights)
    scaled = 30 if any(column.bar is not None for column in columns) else 0
    full = margin + _MARGIN + (tile + _GAP) * len(columns)
    drawn = Image.new("RGB", (full, bottom + scaled + 17 * len(notes) + _MARGIN), "white")
    draw = ImageDraw.Draw(drawn)
    for i, (column, heading) in enumerate(zip(columns, headings, strict=True)):
        x, y = margin + _MARGIN + i * (tile + _GAP), top
        for j, line in enumerate(heading):
            small.draw(draw, (x, top - 4 - 17 * (len(heading) - j)), line, "#222222")
        for (_, images), (w, h), height in zip(rows, sizes, heights, strict=True):
            if column.heading in images:
                image = Image.fromarray(images[column.heading]).resize((w, h), Image.Resampling.LANCZOS)
                drawn.paste(image, (x, y))
            y += height + _GAP
        if column.bar is not None:
            drawn.paste(Image.fromarray(column.bar).resize((tile, 8)), (x, bottom))
            for place, text in column.marks.items():
                tiny.draw(draw, (x + place * (tile - tiny.getlength(text)), bottom + 10), text, "#444444")
    y = top
    for (lines, _), height in zip(rows, heights, strict=True):
        for j, line in enumerate(lines):
            small.draw(draw, (_MARGIN, y + 17 * j), _shortened(line, small, margin - _MARGIN), "#222222")
        y += height + _GAP
    for j, note in enumerate(notes):
        small.draw(draw, (_MARGIN, bottom + scaled + 17 * j), note, "#444444")
    return drawn


def _fitted(shape: Sequence[int], tile: int) -> tuple[int, int]:
    """Width and height of an image whose longer side is `tile`."""
    width, height = (max(1, round(tile * side / max(shape[:2]))) for side in (shape[1], shape[0]))
    return width, height


def _wrapped(text: str, font: Typeface, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_shortened(line, font, width) for line in lines]


def _shortened(text: str, font: Typeface, width: float) -> str:
    """The end of a text that is too long."""
    while len(text) > 1 and font.getlength(text) > width:
        text = "…" + text[2:]
    return text


def label(result: Result) -> str:
    """What to call a result: its file with the folder, which in most layouts is the defect type."""
    return "/".join(Path(result.path).parts[-2:]) if result.path else "image"


def _boxed(image: np.ndarray, result: Result) -> np.ndarray:
    """Boxes the regions of a result, whose places are in pixels of its file, on the image of its crop."""
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
