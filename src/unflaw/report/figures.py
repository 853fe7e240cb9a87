"""Figures of the steps of a method (`visualize`) and of its training data (`visualize_training`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from unflaw.datasets import Dataset, DatasetError, Sample
from unflaw.detector import Detector
from unflaw.features.cache import cells, stack
from unflaw.imaging.reading import read, read_mask
from unflaw.imaging.tiling import Box
from unflaw.imaging.transforms import ModelInput, prepare_mask, windows
from unflaw.io.files import holding, make_folder, write_png
from unflaw.io.progress import Progress, silent
from unflaw.methods import Context
from unflaw.methods.synthesis import texture_images
from unflaw.methods.visualization import Stage
from unflaw.postprocessing.results import Scale
from unflaw.report.panels import COVER, Column, colour_map, grey_map, heat_map, label, outline, overlay, sheet

TRAINING_IMAGES = 4  # number of good images in figures about training
_IMAGE, _HEAT_MAP = "Image", "Heat map"
_DRAWN = "Drawn: features decoded by the display decoder, for illustration only; it has no influence on scores."
_HEAT = "Heat map: blue up to the pixel threshold, the number in the middle, warm above it. Green: the true defect."


class _Line(NamedTuple):
    """Row of a figure."""

    name: list[str]  # lines of text
    stages: dict[str, Stage]  # by heading
    valid: Box  # part of the canvas to show


@torch.inference_mode()
def write_figures(
    detector: Detector,
    dataset: Dataset,
    out: Path,
    *,
    category: str | None = None,
    images: Sequence[Path] = (),
    count: int = 4,
    seed: int = 0,
    width: int = 1400,
    progress: Progress = silent,
) -> list[Path]:
    """Draw the steps of a detector on test images, and examples of its training data, as PNG files.

    The same detector, data and seed give the same bytes.

    Args:
        detector: Fitted detector of any method; the method determines the figures.
        dataset: Data set whose test images are shown. Its good test images, or else its training images, serve as
            examples in figures about training.
        out: Folder for the files; files of the same name are replaced.
        category: Category of the images, for a detector with several; None: that with the name of the data set.
        images: Test images to show, as paths or ends of paths such as scratch/003.png; empty: random choice.
        count: Number of images to choose: the kinds of defects in turn, and about a quarter good ones.
        seed: Random seed of the choice and of synthetic anomalies.
        width: Maximum width of the figures, pixels.

    Returns:
        The files, in the order of drawing.

    Raises:
        DatasetError: There are no test images, or an image of `images` is not one of them.
        ImageError: An image or mask cannot be read. DetectorError: As `Detector.select`.
        InUseError: Another run writes to `out`.
    """
    category = detector.match(dataset.name) if category is None else category
    scale = detector.select(category).scale
    samples = [_find(dataset, image) for image in images] or _choose(dataset, count, seed)
    make_folder(out)
    with holding(out):
        lines: dict[str, list[_Line]] = defaultdict(list)
        for i, sample in enumerate(samples):
            for figure, found in _inspection_lines(detector, sample, scale, category).items():
                lines[figure] += found
            progress("figures", i + 1, len(samples) + 1, None)
        good = [s for s in dataset.test if not s.label] or list(dataset.train)
        if good:
            lines |= _training_lines(detector, _shuffled(good, seed)[:TRAINING_IMAGES], seed, category)
        for figure, found in lines.items():
            drawn = _draw(found, scale, detector.config.preparation.canvas, width)
            write_png(out / f"{figure}.png", drawn, drawn=True)
        progress("figures", len(samples) + 1, len(samples) + 1, None)
    return [out / f"{figure}.png" for figure in lines]


def _find(dataset: Dataset, image: Path) -> Sample:
    """Return the test image with this path, or the one whose path ends with it."""
    exact = [s for s in dataset.test if s.path.resolve() == image.resolve()]
    found = exact or [s for s in dataset.test if s.path.parts[-len(image.parts) :] == image.parts]
    if len(found) != 1:
        fault = "is not among" if not found else f"is the name of {len(found)} of"
        example = "/".join(_test_images(dataset)[-1].path.parts[-2:])
        raise DatasetError(f"{image}: {fault} the test images of {dataset.name}; name one as in {example}")
    return found[0]


def _test_images(dataset: Dataset) -> Sequence[Sample]:
    if not dataset.test:
        raise DatasetError(f"{dataset.name}: there are no test images to show; give data that has some, as test/good")
    return dataset.test


def _choose(dataset: Dataset, count: int, seed: int) -> list[Sample]:
    """Choose defective images, the kinds in turn, then good ones: about a quarter, or more if defects are few."""
    kinds: dict[str, list[Sample]] = {"": []}
    for sample in _test_images(dataset):
        kinds.setdefault(sample.defect if sample.label else "", []).append(sample)
    good, *groups = (_shuffled(kinds[kind], seed) for kind in sorted(kinds))
    turns = [sample for turn in zip_longest(*groups) for sample in turn if sample is not None]
    wanted = min(len(good), max(count > 1, round(count / 4)))
    bad = turns[: count - wanted]
    return bad + good[: count - len(bad)]


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    return [samples[i] for i in np.random.default_rng(seed).permutation(len(samples))]


def _inspection_lines(detector: Detector, sample: Sample, scale: Scale, category: str | None) -> dict[str, list[_Line]]:
    """Return the rows of one test image, by figure: the image, the method's stages, the heat map."""
    network, preparation = detector.network_of(category), detector.config.preparation
    result = detector.inspect(sample.path, category=category)
    truth = np.zeros(result.map.shape, bool)
    if sample.label and sample.mask is not None:
        truth = prepare_mask(read_mask(sample.mask), preparation)
    heat = overlay(result.image, result.map, scale)
    # of tiles, the most anomalous one
    shown = max(windows(read(sample.path), preparation), key=lambda window: float(result.map[_on_map(window)].max()))
    here = _on_map(shown)
    first = {_IMAGE: _as_stage(outline(result.image, truth)[here])}
    last = {_HEAT_MAP: _as_stage(outline(heat, truth)[here])}
    name = [*label(result).split("/"), f"verdict {result.verdict}", f"p {result.p_value:.2g}"]
    features, image = network.embed(stack([shown])), result.image[here]
    inspection = network(features, Context(cells([shown.window], network.features.shape)))
    return {
        figure: [
            _Line([*name, line] if line else name, first | _drawable(detector, stages, image) | last, shown.box)
            for line, stages in rows
        ]
        for figure, rows in network.visualize(features, inspection).items()
    }


def _on_map(window: ModelInput) -> tuple[slice, slice]:
    """Return the part of an image's map that a window covers."""
    (x, y), step, size = window.window.place, window.layout.step, window.layout.preparation.canvas
    return slice(y // step, (y + size[1]) // step), slice(x // step, (x + size[0]) // step)


def _training_lines(
    detector: Detector, samples: Sequence[Sample], seed: int, category: str | None
) -> dict[str, list[_Line]]:
    """Return the rows of the figures about training."""
    network, preparation = detector.network_of(category), detector.config.preparation
    textures = None
    if network.uses_textures:
        textures = torch.from_numpy(np.stack(texture_images(detector.config.training.textures, preparation)))
    tiles = [list(windows(read(sample.path), preparation)) for sample in samples]
    images = stack([of_image[len(of_image) // 2] for of_image in tiles])
    whole = (0, 0, *preparation.canvas)
    return {
        figure: [_Line([name], _drawable(detector, stages), whole) for name, stages in rows]
        for figure, rows in network.visualize_training(images, textures, Generator().manual_seed(seed)).items()
    }


def _drawable(detector: Detector, stages: dict[str, Stage], image: np.ndarray | None = None) -> dict[str, Stage]:
    """Decode features, or leave them out if there is no decoder, and convert covers to parts of the image."""
    drawable = {}
    for heading, stage in stages.items():
        if stage.kind == "cover" and image is not None:
            drawable[heading] = _as_stage(image)._replace(seen=stage.values)
        elif stage.kind != "features":
            drawable[heading] = stage
        elif detector.display is not None:
            drawable[heading] = stage._replace(values=detector.display(stage.values[None].float())[0])
    return drawable


def _as_stage(image: np.ndarray) -> Stage:
    """Convert an image (h, w, 3) uint8."""
    return Stage("image", torch.from_numpy(image).permute(2, 0, 1) / 255)


def _draw(lines: Sequence[_Line], scale: Scale, size: tuple[int, int], width: int) -> Image.Image:
    """Draw one figure: all rows, with one colour scale for each column."""
    columns: list[Column] = []
    tiles: list[dict[str, np.ndarray]] = [{} for _ in lines]
    notes: list[str] = []
    for heading in dict.fromkeys(heading for line in lines for heading in line.stages):
        rows = [i for i, line in enumerate(lines) if heading in line.stages]
        stages = [lines[i].stages[heading] for i in rows]
        values = [_on_canvas(s.values, size, s.kind, lines[i].valid) for i, s in zip(rows, stages, strict=True)]
        limit = max(float(v.max()) if s.limit is None else s.limit for v, s in zip(values, stages, strict=True))
        for i, stage, shown in zip(rows, stages, values, strict=True):
            tiles[i][heading] = _coloured(shown, stage.kind, limit)
            if stage.seen is not None:
                tiles[i][heading][_on_canvas(stage.seen, size, "mask", lines[i].valid)[..., 0] == 0] = COVER
        if stages[0].kind == "features" and not notes:
            notes.append(_DRAWN)
        columns.append(_column(heading, stages[0].kind, limit, scale))
    if columns[-1].heading == _HEAT_MAP:
        notes.append(_HEAT)
    return sheet(columns, [(line.name, shown) for line, shown in zip(lines, tiles, strict=True)], notes, width)


def _on_canvas(values: Tensor, size: tuple[int, int], kind: str, valid: Box) -> np.ndarray:
    """Resize (C, H, W) to the canvas, masks by nearest neighbour, and crop it to the valid part, (h, w, C)."""
    mode = "nearest" if kind == "mask" else "bilinear"
    x0, y0, x1, y1 = valid
    return F.interpolate(values[None].float(), size[::-1], mode=mode)[0, :, y0:y1, x0:x1].permute(1, 2, 0).numpy()


def _coloured(values: np.ndarray, kind: str, limit: float) -> np.ndarray:
    """Colour values (h, w, C) as (h, w, 3) uint8."""
    if kind == "map":
        return colour_map(values[..., 0], limit)
    if kind in ("mask", "share"):
        return grey_map(values[..., 0])
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _column(heading: str, kind: str, limit: float, scale: Scale) -> Column:
    """Create a column with its colour bar."""
    if heading == _HEAT_MAP:
        bar = heat_map(np.linspace(scale.low, 2 * scale.threshold - scale.low, 256)[None], scale)
        return Column(heading, bar, {0.0: f"{scale.low:.2g}", 0.5: f"{scale.threshold:.2g}"})
    if kind == "map":
        return Column(heading, colour_map(np.linspace(0, limit, 256)[None], limit), {0.0: "0", 1.0: f"{limit:.2g}"})
    if kind == "share":
        return Column(heading, grey_map(np.linspace(0, 1, 256)[None]), {0.0: "0", 1.0: "1"})
    return Column(heading)
