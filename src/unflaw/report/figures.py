"""Sheets of figures of a method at work, drawn from `Method.visualize` and `Method.visualize_training`."""

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

EXERCISES = 4  # good images that training is shown on
_IMAGE, _HEAT_MAP = "Image", "Heat map"
_DRAWN = "Drawn: features as the display decoder draws them, for people only; it takes no part in scoring."
_HEAT = "Heat map: blue up to the pixel threshold, the number in the middle, warm above it. Green: the true defect."


class _Line(NamedTuple):
    """A row before it is drawn."""

    name: list[str]  # lines of text
    stages: dict[str, Stage]  # by heading
    valid: Box  # the part of the canvas to show


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
    """Draws how a detector works on test images, and what it is trained on, as PNG files.

    The same detector, data and seed give the same bytes.

    Args:
        detector: Fitted, of any method; the method decides which figures there are.
        dataset: Its test part is shown. Good images of it (where there are none, those to train on) stand for those
            that training alters.
        out: Folder to write to; files of the same names are replaced.
        category: What the images show, for a detector of several; None: the one that is called like the data set.
        images: Test images to show, by path or by the end of it, such as scratch/003.png; empty: chosen at random.
        count: How many are chosen: kinds of defects in turn, about a quarter of them good.
        seed: Of that choice and of artificial anomalies.
        width: Of the figures at most, pixels.

    Returns:
        The files, in the order of drawing.

    Raises:
        DatasetError: No test images, or an image of `images` that is not among them.
        ImageError: An image or mask that is needed cannot be read. DetectorError: as for `Detector.select`.
        InUseError: Another run writes to `out`.
    """
    category = detector.match(dataset.name) if category is None else category
    scale = detector.select(category).scale
    samples = [_named(dataset, image) for image in images] or _chosen(dataset, count, seed)
    make_folder(out)
    with holding(out):
        lines: dict[str, list[_Line]] = defaultdict(list)
        for i, sample in enumerate(samples):
            for figure, found in _inspected(detector, sample, scale, category).items():
                lines[figure] += found
            progress("figures", i + 1, len(samples) + 1, None)
        good = [s for s in dataset.test if not s.label] or list(dataset.train)
        if good:
            lines |= _exercises(detector, _drawn_from(good, EXERCISES, seed), seed, category)
        written = []
        for figure, found in lines.items():
            written.append(out / f"{figure}.png")
            drawn = _draw(found, scale, detector.config.preparation.size, width)
            write_png(written[-1], drawn, drawn=True)
        progress("figures", len(samples) + 1, len(samples) + 1, None)
    return written


def _named(dataset: Dataset, image: Path) -> Sample:
    """The test image of this path, or the one whose path ends so."""
    exact = [s for s in dataset.test if s.path.resolve() == image.resolve()]
    found = exact or [s for s in dataset.test if s.path.parts[-len(image.parts) :] == image.parts]
    if len(found) != 1:
        fault = "is not among" if not found else f"is the name of {len(found)} of"
        example = _example(dataset)
        raise DatasetError(f"{image}: {fault} the test images of {dataset.name}; name one as in {example}")
    return found[0]


def _example(dataset: Dataset) -> str:
    if not dataset.test:
        raise DatasetError(f"{dataset.name}: there are no test images to show; give data that has some, as test/good")
    return "/".join(dataset.test[-1].path.parts[-2:])


def _chosen(dataset: Dataset, count: int, seed: int) -> list[Sample]:
    """Defective images, their kinds in turn, then good ones: about a quarter, and all where there are no others."""
    _example(dataset)
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for sample in dataset.test:
        kinds[sample.defect if sample.label else ""].append(sample)
    good, *groups = ([s for s in _drawn_from(kinds[kind], count, seed)] for kind in sorted({*kinds, ""}))
    turns = [sample for turn in zip_longest(*groups) for sample in turn if sample is not None]
    wanted = min(len(good), max(count > 1, round(count / 4)))
    bad = turns[: count - wanted]
    return bad + good[: count - len(bad)]


def _drawn_from(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    order = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[i] for i in order]


def _inspected(detector: Detector, sample: Sample, scale: Scale, category: str | None) -> dict[str, list[_Line]]:
    """The rows of one test image, by figure: the image, the method's stages, the heat map."""
    network, preparation = detector.network_of(category), detector.config.preparation
    result = detector.inspect(sample.path, category=category)
    truth = np.zeros(result.map.shape, bool)
    if sample.label and sample.mask is not None:
        truth = prepare_mask(read_mask(sample.mask), preparation)
    heat = overlay(result.image, result.map, scale)
    seen = list(windows(read(sample.path), preparation))
    shown = max(seen, key=lambda window: float(result.map[_on_map(window)].max()))  # of tiles the most anomalous
    here = _on_map(shown)
    first = {_IMAGE: _pixels(outline(result.image, truth)[here])}
    last = {_HEAT_MAP: _pixels(outline(heat, truth)[here])}
    name = [*label(result).split("/"), f"verdict {result.verdict}", f"p {result.p_value:.2g}"]
    features, image = network.embed(stack([shown])), result.image[here]
    inspection = network(features, Context(cells([shown.window], network.features.grid)))
    return {
        figure: [
            _Line([*name, *filter(None, [line])], first | _shown(detector, stages, image) | last, shown.box)
            for line, stages in rows
        ]
        for figure, rows in network.visualize(features, inspection).items()
    }


def _on_map(window: ModelInput) -> tuple[slice, slice]:
    """Where a window lies on the map of its image."""
    (x, y), step, size = window.window.place, window.layout.step, window.layout.preparation.size
    return slice(y // step, (y + size) // step), slice(x // step, (x + size) // step)


def _exercises(
    detector: Detector, samples: Sequence[Sample], seed: int, category: str | None
) -> dict[str, list[_Line]]:
    """The rows of figures about training."""
    network, preparation = detector.network_of(category), detector.config.preparation
    textures = None
    if network.uses_textures:
        textures = torch.from_numpy(np.stack(texture_images(detector.config.training.textures, preparation)))
    seen = [list(windows(read(sample.path), preparation)) for sample in samples]
    images = stack([shown[len(shown) // 2] for shown in seen])
    whole = (0, 0, preparation.size, preparation.size)
    return {
        figure: [_Line([name], _shown(detector, stages), whole) for name, stages in rows]
        for figure, rows in network.visualize_training(images, textures, Generator().manual_seed(seed)).items()
    }


def _shown(detector: Detector, stages: dict[str, Stage], image: np.ndarray | None = None) -> dict[str, Stage]:
    """Stages ready to be drawn: features decoded, or left out where there is no decoder; covers as parts of image."""

    def ready(stage: Stage) -> Stage:
        if stage.kind == "cover" and image is not None:
            return _pixels(image)._replace(seen=stage.values)
        if stage.kind == "features" and detector.display is not None:
            return stage._replace(values=detector.display(stage.values[None].float())[0])
        return stage

    left_out = () if detector.display is not None else ("features",)
    return {heading: ready(stage) for heading, stage in stages.items() if stage.kind not in left_out}


def _pixels(image: np.ndarray) -> Stage:
    """An image (h, w, 3) uint8."""
    return Stage("image", torch.from_numpy(image).permute(2, 0, 1) / 255)


def _draw(lines: Sequence[_Line], scale: Scale, size: int, width: int) -> Image.Image:
    """One figure: all rows, and one colour scale for each column."""
    columns: list[Column] = []
    tiles: list[dict[str, np.ndarray]] = [{} for _ in lines]
    kinds = set()
    for heading in dict.fromkeys(heading for line in lines for heading in line.stages):
        found = [(i, line.stages[heading]) for i, line in enumerate(lines) if heading in line.stages]
        values = [_canvas(stage.values, size, stage.kind, lines[i].valid) for i, stage in found]
        limit = max(float(v.max()) if s.limit is None else s.limit for v, (_, s) in zip(values, found, strict=True))
        for shown, (i, stage) in zip(values, found, strict=True):
            pixels = _coloured(shown, stage.kind, limit)
            if stage.seen is not None:
                pixels[_canvas(stage.seen, size, "mask", lines[i].valid)[..., 0] == 0] = COVER
            tiles[i][heading] = pixels
        kinds.add(found[0][1].kind)
        columns.append(_column(heading, found[0][1].kind, limit, scale))
    notes = [_DRAWN] * ("features" in kinds) + [_HEAT] * (columns[-1].heading == _HEAT_MAP)
    return sheet(columns, [(line.name, shown) for line, shown in zip(lines, tiles, strict=True)], notes, width)


def _canvas(values: Tensor, size: int, kind: str, valid: Box) -> np.ndarray:
    """(C, h, w) at the size of the canvas, masks by nearest neighbour; the part that the image covers, (h, w, C)."""
    mode = "nearest" if kind == "mask" else "bilinear"
    x0, y0, x1, y1 = valid
    return F.interpolate(values[None].float(), (size, size), mode=mode)[0, :, y0:y1, x0:x1].permute(1, 2, 0).numpy()


def _coloured(values: np.ndarray, kind: str, limit: float) -> np.ndarray:
    """(h, w, C) → (h, w, 3) uint8."""
    if kind == "map":
        return colour_map(values[..., 0], limit)
    if kind in ("mask", "share"):
        return grey_map(values[..., 0])
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _column(heading: str, kind: str, limit: float, scale: Scale) -> Column:
    """A column and its colour bar."""
    if heading == _HEAT_MAP:
        bar = heat_map(np.linspace(scale.low, 2 * scale.threshold - scale.low, 256)[None], scale)
        return Column(heading, bar, {0.0: f"{scale.low:.2g}", 0.5: f"{scale.threshold:.2g}"})
    if kind == "map":
        return Column(heading, colour_map(np.linspace(0, limit, 256)[None], limit), {0.0: "0", 1.0: f"{limit:.2g}"})
    if kind == "share":
        return Column(heading, grey_map(np.linspace(0, 1, 256)[None]), {0.0: "0", 1.0: "1"})
    return Column(heading)
