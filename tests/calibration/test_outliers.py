"""Good images that stand out: which are named, and that defective ones among the training images are."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.conftest import textured
from tests.test_detector import good_ones, unfitted
from typer.testing import CliRunner

from unflaw.calibration import crossfit
from unflaw.calibration.outliers import DEVIATIONS, MOST, describe_outliers, outliers
from unflaw.cli import app
from unflaw.datasets import Sample, load_dataset
from unflaw.detector import Detector
from unflaw.errors import TrainingError
from unflaw.training.loop import train

pytestmark = pytest.mark.slow


def named(scores: list[float]) -> list[str]:
    return [entry["path"] for entry in outliers({str(i): score for i, score in enumerate(scores)})]


def test_images_far_above_the_others_are_named():
    usual = [float(i) for i in range(20)]  # median 10 of 21, deviation 1.4826 · 5
    assert outliers({str(score): score for score in [*usual, 90.0]}) == [
        {"path": "90.0", "score": 90.0, "deviations": pytest.approx(80 / (1.4826 * 5), abs=0.05)}
    ]
    assert named([*usual, 90.0, -500.0, 200.0]) == ["22", "20"]  # the furthest first, and no low score
    many = [*map(float, range(100)), *[10_000.0 + i for i in range(MOST + 4)]]
    assert named(many) == [str(99 + MOST + 4 - i) for i in range(MOST)]


@given(st.lists(st.floats(-1e6, 1e6), max_size=30), st.floats(-1e3, 1e3), st.floats(0.1, 1e3))
def test_units_of_the_scores_do_not_matter(scores, shift, scale):
    found = outliers(dict(enumerate(scores)))
    assert len(found) <= MOST and all(entry["deviations"] >= DEVIATIONS for entry in found)
    if len(set(scores)) == len(scores) and min(abs(np.diff(np.sort(scores))), default=0) > 1e-3:
        moved = outliers({i: shift + scale * score for i, score in enumerate(scores)})
        assert [entry["path"] for entry in moved] == [entry["path"] for entry in found]


def test_usual_images_are_rarely_named():
    rng = np.random.default_rng(0)
    for n in (8, 20, 80):
        lists = sum(bool(named(rng.normal(size=n).tolist())) for _ in range(400))
        assert lists <= 12  # 3 %
    assert named([1.0] * 7 + [99.0]) == [] == named([])  # no spread, no images
    assert named([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 99.0]) == []  # too few


def test_the_message_names_the_images_of_each_category():
    entries = [
        {"path": "a/1.png", "score": 3.0, "deviations": 12.4, "category": "nut"},
        {"path": "b/2.png", "score": 2.0, "deviations": 7.0, "category": "bolt"},
        {"path": "a/3.png", "score": 2.0, "deviations": 6.6, "category": "nut"},
    ]
    assert describe_outliers({"strangest": entries, "strangest_among": "good images"}) == [
        "category nut: look at 2 images far apart from the other good images; remove what is defective, and train "
        "again:\n  a/1.png (12 deviations above the median)\n  a/3.png (7 deviations above the median)",
        "category bolt: look at 1 image far apart from the other good images; remove what is defective, and train "
        "again:\n  b/2.png (7 deviations above the median)",
    ]
    assert describe_outliers({}) == describe_outliers({"strangest": [], "strangest_among": "good images"}) == []


# Of a detector


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """24 good images, and two that are not: one with a bright square, one magenta all over."""
    folder, rng = tmp_path_factory.mktemp("mixed") / "good", np.random.default_rng(3)
    folder.mkdir()
    for i in range(24):
        Image.fromarray(textured(rng)).save(folder / f"{i:02d}.png")
    square = textured(rng)
    square[20:38, 10:28] = 255
    Image.fromarray(square).save(folder / "square.png")
    Image.new("RGB", (64, 64), (255, 0, 255)).save(folder / "magenta.png")
    return folder


def trained(tiny, weights, data, method="nearest_neighbor", **changes) -> Detector:
    return Detector(config=tiny(method, **{"training.display_steps": 0, **changes}), weights=weights).fit(data)


def names(detector: Detector) -> set[str]:
    return {entry["path"].rsplit("/", 1)[1] for entry in detector.record_["strangest"]}


@pytest.mark.parametrize("changes", [{}, {"training.seed": 1}, {"calibration.folds": 3}, {"calibration.holdout": 0.4}])
def test_defective_images_are_named_held_out_or_not(tiny, weights, mixed, changes):
    made = trained(tiny, weights, mixed, **changes)
    assert names(made) == {"square.png", "magenta.png"}, made.record_["strangest"]
    assert made.record_["strangest_among"] == "good images"
    first, second = made.record_["strangest"]
    assert first["deviations"] >= second["deviations"] > DEVIATIONS and first["score"] >= second["score"]


@pytest.mark.parametrize("method", ["uranet", "mfrnet"])
def test_a_trained_network_does_not_hide_what_it_has_learned_from(tiny, weights, mixed, method):
    assert names(trained(tiny, weights, mixed, method)) == {"square.png", "magenta.png"}


def test_nothing_stands_out_among_good_images(tiny, weights, mixed):
    good = [path for path in sorted(mixed.iterdir()) if path.stem.isdigit()]
    assert trained(tiny, weights, good).record_["strangest"] == []


@pytest.mark.parametrize("method", ["nearest_neighbor", "uranet"])
def test_the_strangest_are_left_out_on_request(tiny, weights, mixed, method):
    made = trained(tiny, weights, mixed, method, **{"calibration.drop_outliers": 0.08})
    assert {Path(path).name for path in made.record_["dropped"]} == {"square.png", "magenta.png"}
    assert "strangest 2 of 26 good images" in made.record_["drop"] and "7.7%" in made.record_["drop"]
    assert made.record_["good_images"] == 24 and names(made) == set()
    assert not {"square.png", "magenta.png"} & {Path(path).name for path in made.record_["strangest_tenth"]}
    assert len(made.record_["strangest_tenth"]) == 3


def test_what_cannot_be_left_out_is_said(tiny, weights, mixed):
    with pytest.raises(TrainingError, match="needs a memory"):
        trained(tiny, weights, mixed, "memae", **{"calibration.drop_outliers": 0.08})
    few = sorted(mixed.iterdir())[:10]
    with pytest.raises(TrainingError, match="leaves 6 good images, 8 are needed"):
        trained(tiny, weights, few, **{"calibration.drop_outliers": 0.4})


@pytest.mark.parametrize("folds", [0, 3])
def test_a_method_without_memory_judges_what_it_did_not_learn_from(tiny, weights, mixed, folds):
    """Held-out images only; with cross-fitting these are all of them."""
    changes = {"training.steps": 40, "calibration.holdout": 0.4, "calibration.folds": folds}
    made = trained(tiny, weights, mixed, "memae", **changes)
    assert made.record_["strangest_among"] == ("good images" if folds else "good images held out of training")
    held = made.record_["held_out"]
    assert len(made.calibration_.scores) == (26 if folds else held)
    scores = set(made.calibration_.scores)
    assert {entry["score"] for entry in made.record_["strangest"]} <= scores
    if folds:
        assert "magenta.png" in names(made)


def test_a_validation_part_is_compared_among_itself(tiny, weights, mixed, parts):
    """It may be of another day: that all of it lies far from the training images makes no image stand out."""
    rng, other = np.random.default_rng(5), []
    for i in range(12):
        path = mixed.parent / f"other{i}.png"
        Image.fromarray(np.clip(textured(rng).astype(int) * 2 - 60, 0, 255).astype(np.uint8)).save(path)
        other.append(Sample(path, 0))
    train = tuple(Sample(path, 0) for path in sorted(mixed.iterdir()) if path.stem.isdigit())
    dataset = replace(load_dataset(parts), train=train, validation=tuple(other))
    assert trained(tiny, weights, dataset).record_["strangest"] == []
    odd = replace(dataset, validation=(*other, Sample(mixed / "magenta.png", 0)))
    assert names(trained(tiny, weights, odd)) == {"magenta.png"}


def test_each_category_has_its_own(tiny, weights, mixed, parts):
    made = trained(tiny, weights, {"mixed": mixed, "plain": parts / "train/good"})
    assert {(entry["category"], entry["path"].rsplit("/", 1)[1]) for entry in made.record_["strangest"]} == {
        ("mixed", "square.png"),
        ("mixed", "magenta.png"),
    }


def test_what_an_image_taught_the_memory_does_not_speak_for_it(tiny):
    made, rng = unfitted(tiny, "nearest_neighbor"), torch.Generator().manual_seed(0)
    cache = good_ones(12, rng)
    cache.paths = [Path(f"{i}.png") for i in range(12)]
    train(made.network, cache, None, rng)
    alone = crossfit.memory_distances(made.network, cache, range(12), exclude_own=True)
    known = crossfit.memory_distances(made.network, cache, range(12), exclude_own=False)
    assert len(alone) == 12 and all(alone[path][0] >= known[path][0] - 1e-5 for path in alone)
    assert sum(score for score, *_ in alone.values()) > sum(score for score, *_ in known.values()) + 0.1


def test_the_command_and_info_name_them(tiny, weights, mixed, tmp_path):
    config = tiny("nearest_neighbor", **{"training.display_steps": 0})
    settings = {
        "features.backbone": config.features.backbone,
        "features.grid": config.features.grid,
        "features.components": config.features.components,
        "network.prototypes": 64,
        "network.regional_prototypes": 32,
        "training.display_steps": 0,
    }
    out = tmp_path / "m.safetensors"
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    command = [
        "train",
        "--method",
        "nearest_neighbor",
        "--data",
        mixed,
        "--out",
        out,
        "--size",
        64,
        "--weights",
        weights,
        *given,
    ]
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    said = "look at 2 images far apart from the other good images; remove what is defective, and train again:\n"
    assert f"note: {said}  {mixed}" in done.output
    shown = CliRunner().invoke(app, ["info", str(out)]).output
    record = json.loads(shown[shown.index("{\n") :])["record"]
    assert {entry["path"].rsplit("/", 1)[1] for entry in record["strangest"]} == {"square.png", "magenta.png"}
