"""Representation of objects in an interactive session."""

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from unflaw.config import make_config
from unflaw.evaluation.results import Evaluation, Inspected
from unflaw.imaging.reading import read
from unflaw.imaging.transforms import load_windows
from unflaw.io.brief import brief
from unflaw.postprocessing.results import Region

LIMIT = 1000  # letters


@brief
@dataclass
class Record:
    name: str
    score: float
    map: np.ndarray
    tensor: torch.Tensor
    points: tuple[tuple[float, float], ...]
    numbers: list[int]
    hidden: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(9))


@brief
class Pair(NamedTuple):
    first: np.ndarray
    second: bytes


@brief
class Model(BaseModel):
    scores: tuple[float, ...]
    text: str = "short"


def test_arrays_are_shown_by_shape_and_many_values_by_the_first():
    record = Record("a", 1 / 3, np.zeros((2, 3), np.uint8), torch.zeros(4), ((0.0, 1.0),) * 7, list(range(500)))
    assert (
        repr(record)
        == str(record)
        == (
            "Record(name='a', score=0.333333, map=<2×3 uint8>, tensor=<4 float32>, points=<7 × tuple>, "
            "numbers=[0, 1, 2, 3, ...])"
        )
    )
    assert repr(Pair(np.zeros(2), b"x" * 1000)) == "Pair(first=<2 float64>, second=<1000 bytes>)"
    model = Model(scores=(0.5,) * 300)
    assert repr(model) == str(model) == "Model(scores=(0.5, 0.5, 0.5, 0.5, ...), text='short')"


def test_no_public_object_prints_its_arrays(detector, parts):
    path = sorted((parts / "test/square").iterdir())[0]
    result = detector.inspect(path)
    region = Region((0, 0, 5, 5), 25, 2.0, contour=tuple((float(i), 0.0) for i in range(500)))
    long = replace(result, regions=(region,) * 300)
    image = load_windows(read(path), detector.config.preparation)
    (window,) = image.windows
    calibration = detector.calibration_.model_copy(update={"scores": tuple(np.linspace(0, 1, 500).tolist())})
    curves = {"roc": (np.zeros(500), np.zeros(500))}
    shown = [Inspected(long, 1, "square", np.zeros((64, 64), bool))] * 40
    evaluation = Evaluation({"config": detector.config.model_dump()}, [{"path": str(path)}] * 500, curves, shown)
    objects = [long, region, calibration, image, window, evaluation, shown[0], detector.compute([window], "")]
    for thing in [*objects, detector.categories_, detector]:
        for text in (repr(thing), str(thing)):
            assert len(text) < LIMIT and "array(" not in text and "tensor(" not in text, text
    assert {f.name for f in fields(long) if f"{f.name}=" not in repr(long)} == {"described", "counted"}
    assert f"verdict='{long.verdict}'" in repr(long) and "map=<64×64 float32>" in repr(long)
    assert "regions=<300 × Region>" in repr(long) and repr(region).endswith("contour=<500 × tuple>)")


def test_a_configuration_with_a_mask_is_short(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((400, 400)) > 0.5).save(tmp_path / "roi.png")
    config = make_config("nearest_neighbor", "cpu", {"preparation.roi": str(tmp_path / "roi.png")})
    assert len(config.preparation.roi) > 10_000 and len(repr(config)) < 1500
