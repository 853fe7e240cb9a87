"""Groups of good images: named, found, and what they do to a calibration."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.conftest import SIDE, textured

from unflaw.calibration.groups import AUTO, describe_groups, find_groups, name_groups
from unflaw.detector import Detector
from unflaw.errors import TrainingError
from unflaw.training.splits import check_groups

SHIFT = 3


def scene(rng: np.random.Generator) -> np.ndarray:
    """A grey image of a few blobs, larger than a thumbnail."""
    y, x = np.mgrid[: 64 + 2 * SHIFT, : 64 + 2 * SHIFT]
    image = np.full(y.shape, 100.0)
    for _ in range(6):
        cy, cx, size = *rng.uniform(8, 60, 2), rng.uniform(3, 9)
        image += rng.uniform(-80, 80) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * size**2))
    return image


def burst(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Copies of one scene, shifted and in slightly other light."""
    whole, found = scene(rng), []
    for _ in range(count):
        dy, dx = rng.integers(0, 2 * SHIFT + 1, 2)
        light = rng.uniform(0.95, 1.05)
        found.append((whole[dy : dy + 64, dx : dx + 64] * light + rng.normal(0, 2, (64, 64))).clip(0, 255))
    return found


def test_bursts_are_found_by_order_and_by_likeness():
    rng = np.random.default_rng(0)
    images, truth = [], []
    for number in range(30):
        copies = burst(rng, 1 + number % 6)
        images += copies
        truth += [number] * len(copies)
    thumbnails, truth = np.stack(images).astype(np.uint8), np.array(truth)
    together = truth[:, None] == truth
    for order in (np.arange(len(truth)), rng.permutation(len(truth))):
        names = [f"img{place}.png" for place in range(len(truth))]  # img9 comes before img10
        found = find_groups(thumbnails[order], names)
        same = found[:, None] == found
        right = together[order][:, order]
        others = ~np.eye(len(truth), dtype=bool)
        assert same[right & others].mean() > (0.9 if (order == np.arange(len(truth))).all() else 0.6)
        assert same[~right].mean() < 0.02


def test_independent_images_stay_alone():
    rng = np.random.default_rng(1)
    thumbnails = np.stack([burst(rng, 1)[0] for _ in range(120)]).astype(np.uint8)
    found = find_groups(thumbnails, [f"{i}.png" for i in range(120)])
    assert len(set(found.tolist())) > 100


def test_a_film_is_divided():
    rng = np.random.default_rng(2)
    first, last = scene(rng)[:64, :64], scene(rng)[:64, :64]
    frames = np.stack([first + (last - first) * t for t in np.linspace(0, 1, 100)]).clip(0, 255).astype(np.uint8)
    sizes = np.bincount(find_groups(frames, [f"{i}.png" for i in range(100)]))
    assert 8 <= len(sizes) < 60 and sizes.max() <= 12


def test_names_with_fields_make_groups():
    rng = np.random.default_rng(3)
    thumbnails = np.stack([burst(rng, 1)[0] for _ in range(60)]).astype(np.uint8)
    strips = [f"strip{i // 4}_x{i % 4}.png" for i in range(60)]
    found = find_groups(thumbnails, strips)
    assert all(len(set(found[i : i + 4].tolist())) == 1 for i in range(0, 60, 4))
    cameras = [f"cam{i % 2}_{i}.png" for i in range(60)]  # two groups would be no groups
    assert len(set(find_groups(thumbnails, cameras).tolist())) > 40


def test_groups_are_named_by_a_pattern_or_by_the_data_set(tmp_path):
    paths = [tmp_path / "a/p1-1.png", tmp_path / "a/p1-2.png", tmp_path / "a/p2-1.png"]
    assert name_groups(paths, {}, r"/(p\d+)-") == ["p1", "p1", "p2"]
    assert name_groups(paths, {}, r"p\d+") == ["p1", "p1", "p2"]
    assert name_groups(paths, {}, AUTO) is None
    assert name_groups(paths, dict(zip(paths, "xxy", strict=True)), AUTO) == ["x", "x", "y"]
    with pytest.raises(TrainingError, match=r"p2-1\.png: --groups p1 does not match"):
        name_groups(paths, {}, "p1")
    with pytest.raises(TrainingError, match="no regular expression"):
        name_groups(paths, {}, "(")
    with pytest.raises(TrainingError, match=r"p2-1\.png: has no group"):
        name_groups(paths, dict(zip(paths[:2], "xx", strict=True)), AUTO)


def test_what_is_said_of_groups():
    assert describe_groups(True, 5, 5) == ""
    assert describe_groups(True, 5, 9).startswith("9 good images in 5 groups as named")
    assert "make 5 groups" in describe_groups(False, 5, 9)


def test_a_group_trains_or_validates():
    train, validation = [Path("a1.png"), Path("b1.png")], [Path("c1.png"), Path("b2.png")]
    check_groups(train, validation, AUTO, {})
    check_groups(train, validation[:1], "^[a-z]", {})
    with pytest.raises(TrainingError, match=r"b2\.png: is of the group 'b' in the validation part, and b1\.png"):
        check_groups(train, validation, "^[a-z]", {})


def test_many_images_take_seconds_and_the_order_of_the_files_does_not_matter():
    rng = np.random.default_rng(5)
    thumbnails = rng.integers(0, 255, (600, 32, 32), dtype=np.uint8)
    thumbnails[1::2] = np.clip(thumbnails[::2].astype(int) + rng.integers(-9, 9, (300, 32, 32)), 0, 255)
    names = [f"{i}.png" for i in range(600)]
    found, order = find_groups(thumbnails, names), rng.permutation(600)
    assert (found[::2] == found[1::2]).all() and len(set(found.tolist())) > 250
    again = find_groups(thumbnails[order], [names[i] for i in order])
    assert (again[:, None] == again).tolist() == (found[order][:, None] == found[order]).tolist()


@pytest.mark.slow
def test_whole_groups_calibrate_and_count_once(tmp_path, tiny, weights):
    """Copies of what calibrates would be in the memory, and lower its scores."""
    rng = np.random.default_rng(4)
    for number in range(12):
        image = textured(rng).astype(float)
        for copy in range(4):
            shown = (image + rng.normal(0, 1, (SIDE, SIDE, 1))).clip(0, 255).astype(np.uint8)
            Image.fromarray(shown).save(tmp_path / f"{number:02d}{copy}.png")
    made = {}
    for groups in ("none", r"/(\d\d)\d\.png"):
        changes = {"calibration.groups": groups, "calibration.fewest": 20, "network.prototypes": 4096}
        config = tiny("nearest_neighbor", **changes)
        made[groups] = Detector(config=config, weights=weights).fit(tmp_path)
    alone, grouped = (detector.calibration_ for detector in made.values())
    assert (len(alone.scores), alone.images) == (48, None)
    assert (len(grouped.scores), grouped.images) == (12, 48)  # few groups: all of them calibrate, each without itself
    assert "12 groups of 48" in grouped.describe() and "groups" in made[groups].record_
    fresh = [textured(rng) for _ in range(20)]
    alarms = {name: sum(r.verdict == "defect" for r in made[name].inspect_many(fresh)) for name in made}
    assert alarms["none"] > 15 and alarms[groups] <= 6
