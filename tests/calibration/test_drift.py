import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from threadpoolctl import threadpool_info, threadpool_limits

from unflaw import load
from unflaw.calibration.drift import KEPT, SHUFFLES, Drift, Reference, references
from unflaw.errors import DetectorError
from unflaw.imaging.reading import read
from unflaw.imaging.statistics import STATISTICS, describe
from unflaw.inference.predict import predict
from unflaw.io.detector_file import read_metadata

D = len(STATISTICS)
NAMES = list(STATISTICS)


def scene(rng: np.random.Generator, side: int = 256) -> np.ndarray:
    """A bright part on a dark ground, at about the same place, with noise of its own."""
    y, x = np.mgrid[:side, :side] / side
    cx, cy = 0.5 + rng.normal(0, 0.01, 2)
    part = 90 * (np.hypot(x - cx, y - cy) < 0.3) + 60 + rng.normal(0, 2)
    grain = ndimage.gaussian_filter(rng.normal(0, 1, (side, side)), 1)
    return np.clip(part + 30 * grain, 0, 255).astype(np.uint8)[..., None].repeat(3, 2)


@pytest.fixture(scope="module")
def learned() -> Reference:
    rng = np.random.default_rng(1)
    return Reference(np.stack([describe(scene(rng)) for _ in range(60)]))


def batch(change=lambda image: image, n: int = 12, seed: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [describe(change(scene(rng))) for _ in range(n)]


# Describing


def test_descriptions_of_known_images():
    flat = dict(zip(NAMES, describe(np.full((256, 256, 3), 51, np.uint8)), strict=True))
    assert flat["median of the light"] == pytest.approx(0.2, abs=1e-3) == flat["shadows of the light"]
    assert flat["red against green"] == flat["light of cell 3, 4"] == 0
    assert flat["strong edges, 1 px across"] == pytest.approx(np.log(1 / 1024), abs=0.01)
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    found = dict(zip(NAMES, describe(stripes), strict=True))
    assert found["median edges, 1 px across"] > -0.1 and found["median edges, 1 px down"] < -6
    assert found["median edges, 2 px across"] < -6  # the next octave no longer sees them
    corner = np.zeros((256, 256, 3), np.uint8)
    corner[:32, 32:64, 0] = 255
    found = dict(zip(NAMES, describe(corner), strict=True))
    assert found["light of cell 0, 1"] == pytest.approx(1 / 3, abs=1e-3) and found["light of cell 1, 0"] == 0


@settings(max_examples=20)
@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_any_image_is_described(image):
    described = describe(image)
    assert described.shape == (D,) and described.dtype == np.float16 and np.isfinite(described).all()


def test_a_local_defect_moves_little_but_the_light_of_its_cell():
    rng = np.random.default_rng(3)
    image = rng.normal(120, 12, (256, 256)).clip(0, 255).astype(np.uint8)[..., None].repeat(3, 2)
    spoilt = image.copy()
    spoilt[100:116, 100:116] = 255
    moved = np.abs(describe(spoilt).astype(float) - describe(image))
    assert NAMES[moved.argmax()] == "light of cell 3, 3" and np.sort(moved)[-2] < moved.max() / 2


# One image


def test_single_images_keep_their_guarantee():
    rng, hits, trials = np.random.default_rng(4), 0, 400
    for _ in range(trials):
        described = rng.gamma(2, 1, (30, 6)) @ rng.normal(size=(6, 6))
        hits += Reference(described[:-1]).p_value(described[-1]) <= 0.1
    assert hits / trials <= 0.1 + 3 * (0.09 / trials) ** 0.5


def test_an_odd_image_has_the_least_p_value(learned):
    n = len(learned)
    assert learned.p_value(describe(np.zeros((40, 30, 3), np.uint8))) == 1 / (n + 1)
    assert np.mean([learned.p_value(described) for described in batch(n=20)]) > 0.2


def test_the_last_digit_of_a_tie_does_not_count():
    same = np.ones((10, D))
    assert Reference(same).p_value(same[0]) == 1
    assert Reference(same).test(same[:3]).p_value == 1


# Batches


def test_batches_keep_their_guarantee():
    rng, alarms, trials = np.random.default_rng(5), 0, 150
    for _ in range(trials):
        described = np.clip(rng.standard_cauchy((30, 5)), -50, 50) @ rng.normal(size=(5, 5))
        alarms += Reference(described[:-6]).test(described[-6:], 0.1).alarm
    assert alarms / trials <= 0.1 + 3 * (0.09 / trials) ** 0.5


@pytest.mark.parametrize(
    ("matter", "way", "change"),
    [
        ("light", 1, lambda image: (image + np.minimum(image // 6, 255 - image)).astype(np.uint8)),
        ("light", -1, lambda image: (image * 0.85).astype(np.uint8)),
        ("sharpness", -1, lambda image: ndimage.gaussian_filter(image, (1, 1, 0))),
        ("place", None, lambda image: np.roll(image, 15, axis=1)),
        ("colour", None, lambda image: (image * [1.1, 1, 1]).astype(np.uint8)),
    ],
)
def test_what_has_changed_is_named(learned, matter, way, change):
    found = learned.test(batch(change))
    assert found.alarm and matter in found.moved and way in (None, found.moved[matter])
    assert found.p_value == 1 / (SHUFFLES + 1) and found.images == 12
    assert found.describe().startswith("drift: ")


def test_ordinary_images_raise_nothing_and_a_few_odd_ones_do_not_decide(learned):
    ordinary = learned.test(batch())
    assert not ordinary.alarm and ordinary.moved == {} and ordinary.describe().startswith("no drift")
    odd = [describe(np.full((9, 9, 3), 255, np.uint8))]
    assert not learned.test([*batch(n=11), *odd]).alarm


def test_a_batch_of_one_and_the_order_do_not_matter(learned):
    described = batch()
    assert learned.test(described[:1]).p_value > 1 / (len(learned) + 2)
    assert learned.test(described).p_value == pytest.approx(learned.test(described[::-1]).p_value, abs=0.05)


@pytest.mark.parametrize("rate", [0, -1, 1, 1e-4])
def test_a_rate_that_cannot_be_kept_is_refused(learned, rate):
    with pytest.raises(ValueError, match="false-alarm rate"):
        learned.test(batch(n=1), rate)


# In files


def test_metadata_hold_them(learned):
    written = json.loads(json.dumps({"drift": {"": learned.to_json()}}))
    assert np.array_equal(references(written)[""].described, learned.described)
    assert references({}) == {}
    assert len(Reference(np.zeros((KEPT + 9, D)))) == KEPT
    written["drift"][""]["statistics"] = 1  # of another version
    assert references(written) == {}
    del written["drift"][""]["float16"]
    with pytest.raises(KeyError):
        references(written)


def test_a_detector_remembers_the_images_it_learned_from(detector, saved, parts):
    own = {describe(read(path)).tobytes() for path in (parts / "train/good").iterdir()}
    for made in (detector, load(saved)):
        assert {row.tobytes() for row in made.references[""].described} == own
    result = detector.inspect(sorted((parts / "test/good").iterdir())[0])
    assert result.to_json()["drift"] == result.drift == detector.references[""].p_value(result.described)


def test_a_damaged_memory_is_reported(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    metadata = read_metadata(saved)
    metadata["drift"][""]["float16"] = "?"
    save_file(load_file(saved), tmp_path / "bad.safetensors", {"unflaw": json.dumps(metadata)})
    with pytest.raises(DetectorError, match="metadata"):
        load(tmp_path / "bad.safetensors")


def test_prediction_says_whether_the_batch_has_drifted(detector, parts, tmp_path):
    good = sorted((parts / "train/good").iterdir())
    counts, drift = predict(detector, good, tmp_path)
    assert isinstance(drift, Drift) and not drift.alarm and sum(counts.values()) == drift.images == len(good)
    dark: list[Path] = []
    from PIL import Image

    for path in good:
        dark.append(tmp_path / path.name)
        Image.fromarray(read(path) // 3).save(dark[-1])
    assert predict(detector, dark, tmp_path)[1].alarm
    written = json.loads((tmp_path / "drift.json").read_text())
    assert written["alarm"] and written["images"] == len(good) and written["moved"]["light"] == -1
    assert all("drift" in json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())


def test_calibrating_on_images_of_today_ends_the_alarm(parts, weights, tiny, tmp_path):
    from PIL import Image

    from unflaw.detector import Detector

    made = Detector(config=tiny("nearest_neighbor", **{"training.display_steps": 0}), weights=weights).fit(parts)
    rng, today = np.random.default_rng(0), []
    for i, path in enumerate([*(parts / "train/good").iterdir()] * 2):
        today.append(tmp_path / f"{i}.png")
        Image.fromarray((read(path) // 2 + rng.integers(0, 9, (64, 64, 1))).astype(np.uint8)).save(today[-1])
    described = [describe(read(path)) for path in today[12:]]
    assert made.references[""].test(described).alarm
    made.calibrate(today[:12])
    assert len(made.references[""]) == 12 and not made.references[""].test(described).alarm
    made.calibrate(today[12:], append=True)
    assert len(made.references[""]) == 24


def test_linear_algebra_wakes_no_threads_that_then_wait_busily(learned, monkeypatch):
    """They would keep cores from other images long after this one is done."""
    seen, solve = [], np.linalg.solve

    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    monkeypatch.setattr(np.linalg, "solve", lambda *given: seen.append(threads()) or solve(*given))
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        learned.p_value(batch(n=1)[0])
        assert len(seen) == 1 and before and set(before) == {2}
        # of the libraries that were loaded when it was first asked; NumPy's is among them
        assert 1 in seen[0] and threads() == before
