"""Pictures of a result: heat maps on the detector's fixed scale, outlines, and captioned panels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from unflaw.results import Result, Scale

# Cold up to the pixel threshold, which the scale puts at 0.5, and warm above it: nothing on a good part looks alarming.
# Lighter throughout, so that the order of values survives grey printing and colour blindness.
_STOPS = (0.0, 0.5, 0.51, 0.75, 1.0)
_COLOURS = np.array([(11, 16, 38), (74, 111, 165), (226, 82, 43), (250, 150, 20), (255, 232, 120)])

_CAPTIONS = {"mean": "Mean map", "uncertainty": "Uncertainty", "mask": "Final mask", "restored": "Restored"}
_MARGIN, _HEADER, _CAPTION = 12, 58, 22  # pixels of a panel


def heat_map(anomaly_map: np.ndarray, scale: Scale) -> np.ndarray:
    """Colours raw map values (H, W) on the fixed scale as (H, W, 3) uint8: blue up to the threshold, warm above it."""
    shown = scale(anomaly_map)
    return np.stack([np.interp(shown, _STOPS, channel) for channel in _COLOURS.T], axis=-1).round().astype(np.uint8)


def overlay(image: np.ndarray, anomaly_map: np.ndarray, scale: Scale, opacity: float = 0.75) -> np.ndarray:
    """Lays the heat map over the picture, more opaque where it is higher; good areas stay the picture. (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        anomaly_map: (H, W), raw values.
        scale: The detector's fixed scale.
        opacity: Weight in [0, 1] of the heat map from a scaled value of 0.75 on; half at the threshold, none to 0.25.
    """
    alpha = opacity * np.clip(2 * scale(anomaly_map) - 0.5, 0, 1)[..., None]
    return (image * (1 - alpha) + heat_map(anomaly_map, scale) * alpha).round().astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = (0, 230, 118)) -> np.ndarray:
    """Draws a line around, not over, every area of a mask; returns (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8; left as it is.
        mask: (H, W), any type; true where not 0.
        colour: RGB. A dark rim outside the line keeps it legible on any picture.
    """
    inside, drawn = mask != 0, image.copy()
    width = max(1, round(max(mask.shape) / 128))
    for reach, paint in ((2 * width, (0, 0, 0)), (width, colour)):
        drawn[ndimage.binary_dilation(inside, iterations=reach) & ~inside] = paint
    return drawn


def views(result: Result, scale: Scale, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The pictures that explain a result, by caption, without the padding of the canvas.

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
    shown = {"Picture": image}
    if mask is not None and mask[valid].any():
        shown["Ground truth"] = outline(image, mask[valid])
    shown["Heat map"] = _boxed(overlay(image, anomaly_map, scale), anomaly_map, scale.threshold, len(result.regions))
    for name, layer in result.layers.items():
        gain = 2 if name == "uncertainty" else 1  # a deviation of values in [0, 1] is at most one half
        pixels = (
            layer if layer.ndim == 3 else np.repeat(np.clip(gain * layer, 0, 1)[..., None] * 255, 3, axis=2).round()
        )
        shown[_CAPTIONS.get(name, name)] = pixels[valid].astype(np.uint8)
    return shown


def panel(result: Result, scale: Scale, mask: np.ndarray | None = None, tile: int = 256) -> Image.Image:
    """All `views` of a result in one captioned row, under its name, verdict, score and p-value.

    Args:
        result: An inspection.
        scale: The detector's fixed scale.
        mask: (size, size), the true defect on the same canvas, if it is known.
        tile: Longer side of each picture, pixels.
    """
    shown = views(result, scale, mask)
    height, width = (max(1, round(tile * side / max(shown["Picture"].shape))) for side in shown["Picture"].shape[:2])
    step = max(width, 90) + _MARGIN  # a narrow picture still leaves room for its caption
    sheet = Image.new("RGB", (max(260, _MARGIN + step * len(shown)), _HEADER + height + _CAPTION + _MARGIN), "white")
    draw, small = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    name, large = label(result), ImageFont.load_default(16)
    while len(name) > 1 and large.getlength(name) > sheet.width - 2 * _MARGIN:
        name = "…" + name[2:]
    draw.text((_MARGIN, 8), name, "black", large)
    verdict = f"{result.verdict}   score {result.score:.4g}   p {result.p_value:.3g}"
    draw.text((_MARGIN, 32), verdict, "#b3261e" if result.verdict == "defect" else "#1b6e3c", small)
    for x, (caption, pixels) in zip(range(_MARGIN, sheet.width, step), shown.items(), strict=False):
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS), (x, _HEADER))
        draw.text((x, _HEADER + height + 4), caption, "#444444", small)
    return sheet


def label(result: Result) -> str:
    """What to call a result: its file with the folder, which in most layouts is the defect type."""
    return "/".join(Path(result.path).parts[-2:]) if result.path else "picture"


def _boxed(image: np.ndarray, anomaly_map: np.ndarray, threshold: float, count: int) -> np.ndarray:
    """Boxes the `count` areas with the largest peaks. `Region.box` itself counts pixels of the file, not these."""
    areas, _ = ndimage.label(anomaly_map > threshold, np.ones((3, 3)))
    for where in sorted(ndimage.find_objects(areas), key=lambda where: -anomaly_map[where].max())[:count]:
        box = np.zeros(anomaly_map.shape, bool)
        box[where] = True
        image = outline(image, box, (255, 255, 255))
    return image
