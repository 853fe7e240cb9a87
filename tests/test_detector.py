import io
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import learn, textured

from unflaw import detector as module
from unflaw import load
from unflaw.config import Weights
from unflaw.datasets import DatasetError, Sample, load_dataset
from unflaw.detector import Detector
from unflaw.errors import DetectorError, ImageError, TrainingError
from unflaw.features import backbones
from unflaw.features.backbones import WeightsError
from unflaw.features.cache import Cache
from unflaw.imaging.tiling import Preparation, Window, layout
from unflaw.io.detector_file import FORMAT, read_metadata
from unflaw.postprocessing.results import Result

pytestmark = pytest.mark.slow


def network_state(detector: Detector) -> dict[str, torch.Tensor]:
    return detector.network.state_dict()


def assert_same(a: Result, b: Result, tolerance: float = 0.0) -> None:
    np.testing.assert_allclose(a.map, b.map, rtol=tolerance, atol=tolerance)
    assert a.score == pytest.approx(b.score, rel=tolerance, abs=tolerance)
    assert (a.p_value, a.verdict, a.valid, len(a.regions)) == (b.p_value, b.verdict, b.valid, len(b.regions))
    assert np.array_equal(a.image, b.image)
    assert a.layers.keys() == b.layers.keys()
    for name in a.layers:
        np.testing.assert_allclose(a.layers[name], b.layers[name], atol=max(tolerance, 0) + (name == "restored"))


def assert_same_detector(a: Detector, b: Detector) -> None:
    first, second = network_state(a), network_state(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert a.calibration_ == b.calibration_
    assert (a.display is None) == (b.display is None)
    if a.display is not None and b.display is not None:
        second = b.display.state_dict()
        assert all(torch.equal(tensor, second[name]) for name, tensor in a.display.state_dict().items())


@pytest.fixture(scope="session")
def bad(parts) -> list[Path]:
    return sorted((parts / "test/square").iterdir())


@pytest.fixture(scope="session")
def good(parts) -> list[Path]:
    return sorted((parts / "test/good").iterdir())


# Learning


def test_the_same_seed_gives_the_same_file(detector, saved, parts, weights, tiny, tmp_path):
    again = Detector(config=tiny(), weights=weights)
    torch.rand(3)  # what happened before does not matter
    again.fit(parts)
    assert_same_detector(again, detector)
    again.save(tmp_path / "again.safetensors")
    first, second = load_file(saved), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    a, b = read_metadata(saved), read_metadata(tmp_path / "again.safetensors")
    for metadata in (a, b):
        for name in ("trained", "seconds"):
            del metadata["record"][name]
    assert a == b


def test_a_second_fit_starts_afresh_and_another_seed_differs(parts, weights, tiny):
    def fitted(*paths: Path, seed: int = 0) -> Detector:
        made = Detector(
            config=tiny("nearest_neighbor", **{"training.seed": seed, "training.display_steps": 0}), weights=weights
        )
        for path in paths:
            made.fit(path)
        return made

    once, twice = fitted(parts), fitted(parts / "test/good/..//../train/good", parts)
    assert_same_detector(once, twice)
    assert fitted(parts, seed=1).calibration_ != once.calibration_


def test_an_interrupted_fit_goes_on_to_the_same_detector(detector, parts, weights, tiny, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    config = tiny(**{"training.checkpoint_seconds": 0.0})
    heard = []

    def stop(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "training" and done == total - 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector(config=config, weights=weights).fit(parts, progress=stop, checkpoint=checkpoint)
    assert checkpoint.is_file()
    resumed = Detector(config=config, weights=weights)
    resumed.fit(parts, progress=lambda *report: heard.append(report), checkpoint=checkpoint)
    assert_same_detector(resumed, detector)
    assert resumed.record_["history"] == detector.record_["history"]
    first_step = next(done for stage, done, *_ in heard if stage == "training")
    assert first_step > 1
    assert checkpoint.is_file()  # until the detector is saved


@pytest.mark.parametrize("other", ["settings", "images", "weights"])
def test_a_checkpoint_of_another_fit_is_refused(parts, weights, tiny, tmp_path, other):
    checkpoint = tmp_path / "run.checkpoint"
    changes = {"training.checkpoint_seconds": 0.0}
    paths = sorted((parts / "train/good").iterdir())

    def stop(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector(config=tiny(**changes), weights=weights).fit(paths, progress=stop, checkpoint=checkpoint)
    if other == "settings":
        changes["network.synthesis.clean"] = 0.25
    elif other == "images":
        paths = paths[1:]
    else:
        state = {name: 2 * t if name.endswith("conv1.weight") else t for name, t in load_file(weights).items()}
        weights = tmp_path / "other.safetensors"
        save_file(state, weights)
    with pytest.raises(TrainingError, match=r"run\.checkpoint.*other images or settings"):
        Detector(config=tiny(**changes), weights=weights).fit(paths, checkpoint=checkpoint)


def test_the_record_says_how_it_was_trained(detector, parts, weights):
    record = detector.record_
    held = record["held_out"]
    assert record["good_images"] == 12 and 0 < held < 12
    assert len(detector.calibration_.scores) == held
    assert record["weights"] == str(weights) and record["skipped"] == []
    assert record["history"] and all(math.isfinite(step["loss"]) for step in record["history"])
    assert record["seconds"]["total"] > 0
    json.dumps(record, allow_nan=False)


def test_it_learns_from_a_list_and_skips_what_cannot_be_read(parts, weights, tiny, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [*sorted((parts / "train/good").iterdir()), tmp_path / "broken.png"]
    made = Detector(config=tiny("nearest_neighbor", **{"training.display_steps": 0}), weights=weights).fit(paths)
    assert made.record_["good_images"] == 12
    ((path, reason),) = made.record_["skipped"]
    assert path == str(tmp_path / "broken.png") and path in reason


def test_it_learns_from_arrays_as_from_files(parts, weights, tiny, tmp_path):
    def arrays(folder: str) -> list[np.ndarray]:
        return [np.array(Image.open(path)) for path in sorted((parts / folder).iterdir())]

    def fitted(data: Any, method: str = "nearest_neighbor", **options: Any) -> Detector:
        config = tiny(method, **{"training.checkpoint_seconds": 0.0, "training.display_steps": 0})
        return Detector(config=config, weights=weights).fit(data, **options)

    paths, good = sorted((parts / "train/good").iterdir()), arrays("train/good")
    expected = fitted(paths)
    for data in (good, np.stack(good), iter(good), [*paths[:5], *good[5:]]):
        made = fitted(data)
        assert_same_detector(made, expected)
        assert made.record_["skipped"] == [] and len(made.record_["seen"]) == len(good)
    json.dumps(made.record_, allow_nan=False)
    # what is said of them and checked on the way
    worse = fitted([*good, good[3].copy(), good[4] * 1.0, *(path.read_bytes() for path in paths[:2])])
    names = {name: reason.partition(": ")[2] for name, reason in worse.record_["skipped"]}
    assert names == {
        "image 12": "is the same image as image 3 and counts once",
        "image 13": "holds numbers that are not finite or outside 0 to 1; divide by the largest possible value",
    }
    with pytest.raises(TrainingError, match=r"0 good images .* 9 could not be read, first: nut image \d: holds int64"):
        fitted({"nut": [image.astype(int) for image in good[:9]], "bolt": arrays("test/square") * 2})
    with pytest.raises(TrainingError, match=r"good image 0: the detector was trained on this image"):
        made.calibrate([good[5]])
    found = expected.calibrate(arrays("test/good"), arrays("test/square"), miss_rate=0.5)
    scores = [expected.inspect(image).score for image in arrays("test/good")]
    assert list(found.scores) == pytest.approx(sorted(scores)) and len(found.defects) == 4
    # an interruption is as for files
    checkpoint = tmp_path / "run.checkpoint"

    def stop(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "training" and done == total - 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(good, "uranet", progress=stop, checkpoint=checkpoint)
    assert_same_detector(fitted(good, "uranet", checkpoint=checkpoint), fitted(paths, "uranet"))
    with pytest.raises(TrainingError, match="other images or settings"):
        fitted(good[1:], "uranet", checkpoint=checkpoint)


def test_data_that_cannot_work_is_refused(parts, weights, tiny, tmp_path):
    untrained = Detector(config=tiny("nearest_neighbor"), weights=weights)
    with pytest.raises(DatasetError, match="nowhere"):
        untrained.fit(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match="0 good images"):
        untrained.fit([])
    only_tests = replace(load_dataset(parts), train=())
    with pytest.raises(TrainingError, match=r"parts.*no good images to train on"):
        untrained.fit(only_tests)
    with pytest.raises(TrainingError, match="5 good images are too few to learn from: at least 8"):
        Detector(config=tiny("memae")).fit(sorted((parts / "train/good").iterdir())[:5])


def test_a_validation_part_calibrates_and_is_not_trained_on(parts, weights, tiny):
    """Of any size: what is too few to learn from is not too few to calibrate with."""
    dataset = load_dataset(parts)
    validation = tuple(sample for sample in dataset.test if not sample.label)[:3]
    config = tiny("nearest_neighbor", **{"training.display_steps": 0, "calibration.update_memory": False})
    made = Detector(config=config, weights=weights).fit(replace(dataset, validation=validation))
    assert (made.record_["good_images"], made.record_["held_out"]) == (12, 3)
    inspected = sorted(made.inspect(sample.path).score for sample in validation)
    assert list(made.calibration_.scores) == pytest.approx(
        inspected, rel=0.02
    )  # features were cached in half precision


def test_calibration_leaves_padding_out_as_inspection_does(parts, weights, tiny, tmp_path):
    """Otherwise scores of the two are not comparable."""
    for path in sorted((parts / "train/good").iterdir()):
        Image.open(path).crop((0, 0, 64, 24)).save(tmp_path / path.name)
    paths = sorted(tmp_path.iterdir())
    config = tiny(
        "nearest_neighbor",
        **{"preparation.fit": "pad", "training.display_steps": 0, "calibration.update_memory": False},
    )
    dataset = load_dataset(tmp_path)
    samples = tuple(Sample(path, 0) for path in paths)
    made = Detector(config=config, weights=weights).fit(replace(dataset, train=samples[:9], validation=samples[9:]))
    results = [made.inspect(path) for path in paths[9:]]
    expected = sorted(result.score for result in results)
    assert list(made.calibration_.scores) == pytest.approx(expected, rel=0.02, abs=0.02)
    peaks = [result.map[y0:y1, x0:x1].max() for result in results for x0, y0, x1, y1 in [result.valid]]
    assert made.calibration_.pixel_threshold == pytest.approx(max(peaks), rel=0.02, abs=0.02)


def unfitted(tiny, method: str, **changes) -> Detector:
    prototypes = {"nearest_neighbor": "network.prototypes", "uranet": "network.restoration.prototypes"}
    own = {prototypes[method]: 16} if method in prototypes else {}
    small = {"features.grid": 4, "training.display_steps": 0, "scoring.top_fractions": (0.05, 0.3, 1.0)}
    config = tiny(method, **small, **own, **{"calibration.false_alarm_rate": 0.1}, **changes)
    return Detector(config=config, weights=Weights.RANDOM)


def good_ones(n: int, rng: torch.Generator, channels: int = 8) -> Cache:
    """Some of them far less usual than others: all over, or in a cell or some."""
    usual = torch.randn(n, channels, 4, 4, generator=rng)
    scale = torch.randn(n, 1, 1, 1, generator=rng).mul(0.7).exp()
    spots = (torch.rand(n, 1, 4, 4, generator=rng) < 0.1) * torch.randn(n, 1, 1, 1, generator=rng).mul(1.5).exp()
    thumbnails, windows = torch.zeros(n, 0), [Window(layout(64, 64, Preparation(size=64)), 0)] * n
    return Cache((usual * (scale + spots)).half(), thumbnails, windows, torch.zeros(n, 87), [Path(__file__)] * n)


def scores_of(detector: Detector, cache: Cache) -> list[float]:
    with torch.inference_mode():
        return detector.network.fuse(detector.network(cache.features.float()))[1].tolist()


@pytest.mark.parametrize("method", ["nearest_neighbor", "uranet", "mfrnet"])
def test_good_images_raise_no_more_alarms_than_certified(tiny, method):
    """Averaged over draws of the held-out images: the guarantee of `Calibration`, kept by the whole of `learn`."""
    changes = {"training.steps": 1, "calibration.update_memory": False}
    made, rng = unfitted(tiny, method, **changes), torch.Generator().manual_seed(0)
    train, held, fresh, trials, alarms = good_ones(20, rng), 9, 20, 150, 0
    for _ in range(trials):
        learn(made, train, good_ones(held, rng))
        alarms += sum(made.calibration_.verdict(score) == "defect" for score in scores_of(made, good_ones(fresh, rng)))
    rate = made.calibration_.rate
    assert rate == 0.1
    deviation = math.sqrt(rate * (1 - rate) * (1 / (held + 2) + 1 / fresh) / trials)
    assert abs(alarms / (trials * fresh) - rate) < 4 * deviation  # not far fewer either: exchangeable


@pytest.mark.parametrize("method", ["nearest_neighbor", "uranet", "mfrnet"])
def test_images_that_calibrate_have_no_other_part(tiny, method):
    """The reason why the guarantee is exact: of ten images, each in turn the new one, a single one raises an alarm."""
    changes = {"training.steps": 0, "calibration.update_memory": False}
    made, rng = unfitted(tiny, method, **changes), torch.Generator().manual_seed(1)
    train, ten, states, alarms = good_ones(20, rng), good_ones(10, rng), [], []
    for i in range(10):
        others = [j for j in range(10) if j != i]
        held = Cache(
            ten.features[others], ten.thumbnails[others], ten.windows[:9], ten.described[others], ten.paths[:9]
        )
        learn(made, train, held)
        (score,) = scores_of(made, ten[i : i + 1])
        alarms.append(made.calibration_.verdict(score) == "defect")
        states.append({name: tensor.clone() for name, tensor in made.network.state_dict().items()})
    assert sum(alarms) == 1
    for state in states[1:]:
        assert [name for name, tensor in state.items() if not torch.equal(tensor, states[0][name])] == []


def test_an_image_too_thin_for_any_cell_is_judged_all_the_same(parts, weights, tiny):
    """Padded, it covers the centre of no feature cell; its score must still be a number that JSON has."""
    config = tiny("nearest_neighbor", **{"preparation.fit": "pad", "training.display_steps": 0})
    made = Detector(config=config, weights=weights).fit(parts)
    thin = np.random.default_rng(0).integers(0, 256, (8, 256, 3), dtype=np.uint8)
    result = made.inspect(thin)
    assert result.valid == (0, 31, 64, 33)
    assert math.isfinite(result.score)
    json.dumps(result.to_json(), allow_nan=False)


def test_it_learns_from_images_too_thin_for_any_cell(weights, tiny, tmp_path):
    for i in range(12):
        thin = np.random.default_rng(i).integers(0, 256, (8, 256, 3), dtype=np.uint8)
        Image.fromarray(thin).save(tmp_path / f"{i:02d}.png")
    config = tiny("nearest_neighbor", **{"preparation.fit": "pad", "training.display_steps": 0})
    made = Detector(config=config, weights=weights).fit(tmp_path)
    assert math.isfinite(made.inspect(tmp_path / "00.png").score)


def test_one_image_to_calibrate_with_is_enough(parts, weights, tiny):
    dataset = load_dataset(parts)
    config = tiny("nearest_neighbor", **{"training.display_steps": 0})
    made = Detector(config=config, weights=weights).fit(replace(dataset, validation=dataset.test[:1]))
    assert made.calibration_.rate == 0.5


def test_a_validation_part_that_cannot_be_read_is_an_error(parts, weights, tiny, tmp_path):
    dataset = load_dataset(parts)
    broken = (Sample(tmp_path / "broken.png", 0),)
    with pytest.raises(TrainingError, match=r"broken\.png"):
        Detector(config=tiny("nearest_neighbor"), weights=weights).fit(replace(dataset, validation=broken))


def test_a_fit_that_fails_leaves_no_half_fitted_detector(parts, weights, tiny, good, bad):
    made = Detector(config=tiny("nearest_neighbor", **{"training.display_steps": 0}), weights=weights).fit(parts)
    before = made.inspect(bad[0])
    with pytest.raises(TrainingError):
        made.fit([])
    try:
        after = made.inspect(bad[0])
    except DetectorError:
        return  # not fitted any more: fair as well
    assert_same(after, before)


# Inspecting


def test_a_defect_scores_higher_than_what_is_good(detector, good, bad):
    good_scores, bad_scores = ([detector.inspect(path).score for path in paths] for paths in (good, bad))
    assert min(bad_scores) > max(good_scores)
    assert all(detector.inspect(path).verdict == "defect" for path in bad)


def test_a_result_is_what_its_docstring_says(detector, bad):
    result = detector.inspect(bad[0])
    threshold = detector.calibration_.pixel_threshold
    assert result.map.shape == (64, 64) and result.map.dtype == np.float32 and np.isfinite(result.map).all()
    assert np.array_equal(result.image, np.asarray(Image.open(bad[0])))
    assert (result.valid, result.path) == ((0, 0, 64, 64), str(bad[0]))
    assert {"mean", "uncertainty", "mask", "restored"} <= result.layers.keys()
    for name, layer in result.layers.items():
        if name == "restored":
            assert layer.shape == (64, 64, 3) and layer.dtype == np.uint8
        else:
            assert layer.shape == (64, 64) and layer.min() >= 0 and layer.max() <= 1
    assert result.uncertainty is result.layers["uncertainty"]
    assert set(np.unique(result.layers["mask"])) <= {0.0, 1.0}
    assert sum(region.area for region in result.regions) == (result.map > threshold).sum()
    assert result.regions[0].peak == result.map.max()
    json.dumps(result.to_json(), allow_nan=False)


def test_p_values_are_those_of_held_out_images(detector, good, bad):
    n = len(detector.calibration_.scores)
    for path in good + bad:
        result = detector.inspect(path)
        assert 1 / (n + 1) <= result.p_value <= 1
        assert result.p_value * (n + 1) == pytest.approx(round(result.p_value * (n + 1)))
        assert (result.verdict == "defect") == (result.p_value <= detector.calibration_.rate)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("method", ["nearest_neighbor", "uranet"])
def test_learning_what_calibrated_raises_no_score(tiny, method, given):
    """New images score lower if at all otherwise; so do held-out ones that calibrate, each without what it taught.

    Those of a validation part may be alike among themselves: they calibrate before anything is learned from them.
    """
    scores, thresholds = [], []
    for extend in (False, True):
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(2)
        made = unfitted(tiny, method, **{"training.steps": 1, "calibration.update_memory": extend})
        learn(made, good_ones(29, rng), good_ones(9, rng) if given else None)
        scores.append(scores_of(made, good_ones(40, rng)))
        thresholds.append([*made.calibration_.scores, made.calibration_.pixel_threshold])
        assert made.calibration_.out_of_fold == (extend and not given)
    assert all(after <= before + 1e-5 for before, after in zip(*thresholds, strict=True))
    assert (thresholds[0] == thresholds[1]) == given
    assert all(after <= before + 1e-5 for before, after in zip(*scores, strict=True)) and scores[0] != scores[1]


def test_an_image_that_it_was_calibrated_on_is_good(parts, weights, tiny):
    """Held-out images are among the training ones: each calibration score is found again, and none is above them."""
    detector = Detector(config=tiny(**{"calibration.update_memory": False}), weights=weights).fit(parts)
    scores = detector.calibration_.scores
    inspected = [detector.inspect(path).score for path in sorted((parts / "train/good").iterdir())]
    for score in scores:  # cached features are in half precision
        assert min(abs(score / other - 1) for other in inspected) < 0.02


def test_paths_bytes_and_arrays_are_the_same_image(detector, bad):
    by_path = detector.inspect(bad[0])
    for source in (str(bad[0]), bad[0].read_bytes(), np.array(Image.open(bad[0])), Image.open(bad[0])):
        result = detector.inspect(source)
        assert_same(result, by_path)
        assert result.path == (str(bad[0]) if isinstance(source, str) else None)


def test_one_and_many_agree(detector, good, bad, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    paths = [*good, broken, *bad, tmp_path / "missing.png"]
    outcomes = list(detector.inspect_many(paths, batch=3, on_error="yield"))
    assert len(outcomes) == len(paths)
    for path, outcome in zip(paths, outcomes, strict=True):
        if isinstance(outcome, Result):
            assert outcome.path == str(path)
            assert_same(outcome, detector.inspect(path), 1e-5)
        else:
            assert isinstance(outcome, ImageError) and str(outcome).startswith(f"{path}: ")
            assert path.parent == tmp_path
    assert sum(isinstance(outcome, Result) for outcome in outcomes) == len(good) + len(bad)
    assert list(detector.inspect_many([])) == []


def test_by_default_all_that_come_are_results(detector, good, bad, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    found, seen = detector.inspect_many([*good, broken, *bad], batch=3), []
    with pytest.raises(ImageError, match=r"broken\.png: is not an image"):
        seen += [result.path for result in iter(lambda: next(found), None)]
    found = detector.inspect_many([*good, broken, *bad], batch=3)
    assert [next(found).path for _ in good] == list(map(str, good))  # those before it come first
    with pytest.raises(ImageError, match=r"broken\.png"):
        next(found)
    with pytest.warns(UserWarning, match=r"^skipped .*broken\.png: is not an image"):
        left = list(detector.inspect_many([*good, broken, *bad], batch=3, on_error="skip"))
    assert [result.path for result in left] == list(map(str, good + bad))
    with pytest.raises(ValueError, match="on_error='ignore' is not known; give raise, skip or yield"):
        detector.inspect_many(good, on_error="ignore")


def test_many_arrays_and_files_are_inspected_alike(detector, good, bad):
    expected = list(detector.inspect_many(good + bad))
    arrays = [np.array(Image.open(path)) for path in good + bad]
    mixed = [arrays[0], bad[0].read_bytes(), Image.open(bad[0]), str(bad[0]), io.BytesIO(bad[0].read_bytes())]
    for given in (arrays, np.stack(arrays), iter(arrays)):
        found = list(detector.inspect_many(given))
        assert [result.path for result in found] == [None] * len(arrays)
        for result, other in zip(found, expected, strict=True):
            assert_same(result, other)
    found = list(detector.inspect_many(mixed))
    assert [result.path for result in found] == [None, None, None, str(bad[0]), None]
    for result in found[1:]:
        assert_same(result, detector.inspect(bad[0]), 1e-5)
    wrong = list(detector.inspect_many([arrays[0], np.zeros((5, 5), int)], on_error="yield"))
    assert str(wrong[1]).startswith("image 1: holds int64; give uint8, uint16, or floats from 0 to 1")


def test_what_is_no_image_is_refused_by_name_of_what_is_taken(detector, good, tiny):
    array, untrained = np.array(Image.open(good[0])), Detector(config=tiny("nearest_neighbor"), weights=Weights.RANDOM)
    tensor, taken = torch.from_numpy(array).permute(2, 0, 1), "give a path, .* or a NumPy array"

    def by_category(images: Any) -> Detector:
        return untrained.fit({"nut": images})

    for wrong, sentence in [
        ([good[0]], "list and is not an image; give one image to inspect, and several to inspect_many"),
        (tensor, rf"torch\.Tensor and is not an image; {taken} .*permute\(1, 2, 0\)\.numpy\(force=True\)"),
        (None, f"NoneType and is not an image; {taken}"),
        (torch.nn.Identity(), rf"torch\.nn\.\S*Identity and is not an image; {taken}"),
    ]:
        with pytest.raises(TypeError, match=f"^the image: has the type {sentence}"):
            detector.inspect(wrong)
        for several in (detector.inspect_many, untrained.fit, by_category):
            with pytest.raises(TypeError, match=f"image 1: has the type {sentence}"):
                list(several([array, wrong]))
        with pytest.raises(TypeError, match=f"^defective image 1: has the type {sentence}"):
            detector.calibrate([array], [array, wrong])
    for wrong, sentence in [
        (str(good[0]), r"000\.png: is not a list of images; give a list of paths or arrays"),
        (good[0].read_bytes(), "an object of the type bytes: is not a list of images"),
        (7, "an object of the type int: is not a list of images"),
        ({"a": array}, "an object of the type dict: is not a list of images"),
        (io.BytesIO(good[0].read_bytes()), "an object of the type BytesIO: is not a list of images"),
        (array, r"an array of the shape \(64, 64, 3\) is not a list of images; give \(N, H, W, C\), or a list"),
    ]:
        for several in (detector.inspect_many, detector.calibrate, untrained.fit):
            if several == untrained.fit and isinstance(wrong, str | dict):
                continue  # which is a data set, or several categories
            with pytest.raises(TypeError, match=sentence):
                several(wrong)
    with pytest.raises(ImageError, match=r"has the shape \(2, 64, 64, 3\).* several images to inspect_many"):
        detector.inspect(np.stack([array, array]))
    assert_same(detector.inspect(tensor.permute(1, 2, 0).numpy(force=True)), detector.inspect(array))  # as it says


def test_an_image_that_cannot_be_read_is_an_error(detector, tmp_path):
    with pytest.raises(ImageError, match="missing"):
        detector.inspect(tmp_path / "missing.png")


def test_before_fit_nothing_works_but_says_so(weights, tiny, good, tmp_path):
    untrained = Detector(config=tiny(), weights=weights)
    with pytest.raises(DetectorError, match="fit"):
        untrained.inspect(good[0])
    with pytest.raises(DetectorError, match="fit"):
        untrained.save(tmp_path / "untrained.safetensors")
    assert not list(tmp_path.iterdir())


def test_settings_by_name(weights):
    made = Detector("nearest_neighbor", weights=weights, features__backbone="resnet18", training__seed=3)
    assert (made.config.method, made.config.features.backbone, made.config.training.seed) == (
        "nearest_neighbor",
        "resnet18",
        3,
    )
    with pytest.raises(ValueError, match=r"training\.sed"):
        Detector("nearest_neighbor", weights=weights, training__sed=3)


@pytest.mark.parametrize(
    "given, named",
    [
        ({"training__seed": 7}, "training__seed"),
        ({"method": "nearest_neighbor"}, "nearest_neighbor"),
        ({"profile": "cpu"}, "cpu"),
    ],
)
def test_a_configuration_is_whole_and_nothing_beside_it_is_ignored(tiny, given, named):
    with pytest.raises(ValueError, match=f"{named} cannot be given beside config"):
        Detector(config=tiny("nearest_neighbor"), weights=Weights.RANDOM, **given)


def test_threads_may_train_at_the_same_time(parts, weights, tiny):
    """Each as if alone, and the global generator stays where it was."""

    def trained(seed: int) -> float:
        config = tiny("uranet", **{"training.seed": seed, "training.steps": 3})
        return Detector(config=config, weights=weights).fit(parts).calibration_.threshold

    alone, state = [trained(seed) for seed in (1, 2)], torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(trained, (1, 2))) == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_leaves_the_global_generators_as_they_were(parts, weights, tiny):
    import random

    def states():
        state = np.random.get_state()  # noqa: NPY002 - the global one
        return torch.get_rng_state().tolist(), random.getstate(), [np.array(part).tolist() for part in state]

    made = Detector(config=tiny(), weights=weights)
    before = states()
    made.fit(parts)
    assert states() == before
    with pytest.raises(TrainingError):
        made.fit([])
    assert states() == before


def test_a_file_called_random_is_a_file(monkeypatch, parts, weights, tiny, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = tiny("nearest_neighbor", **{"training.display_steps": 0})
    for name in ("random", Path("random"), "./random"):
        with pytest.raises(WeightsError, match="no such weight file"):
            Detector(config=config, weights=name)
    torch.save(load_file(weights), "random")
    expected = network_state(Detector(config=config, weights=weights))["features.backbone.conv1.weight"]
    for name in ("random", Path("random"), "./random"):
        made = Detector(config=config, weights=name)
        assert torch.equal(network_state(made)["features.backbone.conv1.weight"], expected)
        assert made.fit(parts).record_["weights"] == "./random"
    assert Detector(config=config, weights=Weights.RANDOM).fit(parts).record_["weights"] == "random"


@pytest.mark.parametrize("name", ["parts.onnx", "parts", "parts.xml", "parts.SafeTensors.bin"])
def test_a_detector_is_not_saved_under_the_name_of_something_else(detector, tmp_path, name):
    with pytest.raises(DetectorError, match=rf"{name}: a trained detector is a \.safetensors file; name it parts"):
        detector.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_name_that_was_loaded_can_be_replaced(saved, tmp_path):
    shutil.copy(saved, tmp_path / "parts.model")
    loaded = Detector.load(tmp_path / "parts.model")
    loaded.record_ = loaded.record_ | {"note": "calibrated"}
    loaded.save(tmp_path / "parts.model")
    assert Detector.load(tmp_path / "parts.model").record_["note"] == "calibrated"


def test_the_lookup_with_padded_images(parts, weights, tiny, tmp_path):
    config = tiny("nearest_neighbor", **{"preparation.fit": "pad", "training.display_steps": 0})
    made = Detector(config=config, weights=weights).fit(parts)
    wide = np.array(Image.open(parts / "train/good/000.png"))
    wide = np.concatenate([wide, wide[:, ::-1]], axis=1)
    wide[20:50, 90:120] = 255
    result = made.inspect(wide)
    assert result.valid == (0, 16, 64, 48)
    x0, y0, x1, y1 = result.regions[0].box
    assert 0 <= x0 < x1 <= 128 and 0 <= y0 < y1 <= 64
    assert x0 < 105 < x1 and y0 < 35 < y1
    made.save(tmp_path / "nearest_neighbor.safetensors")
    assert_same(load(str(tmp_path / "nearest_neighbor.safetensors")).inspect(wide), result)


# Saving and loading


def test_a_loaded_detector_is_the_saved_one(detector, saved, bad):
    loaded = Detector.load(saved)
    assert_same_detector(loaded, detector)
    assert loaded.config == detector.config
    assert loaded.record_ == json.loads(json.dumps(detector.record_))
    for path in bad:
        assert_same(loaded.inspect(path), detector.inspect(path))
        assert loaded.inspect(path).to_json() == detector.inspect(path).to_json()


def test_saving_a_loaded_detector_changes_nothing(saved, tmp_path):
    Detector.load(saved).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_a_loaded_detector_learns_again_on_its_own_backbone_or_says_that_it_cannot(saved, detector, parts, bad):
    loaded = Detector.load(saved)
    backbone = {name: tensor.clone() for name, tensor in loaded.network.features.backbone.state_dict().items()}
    try:
        loaded.fit(parts)
    except (DetectorError, TrainingError, WeightsError):
        return  # fair as well: the file of the weights is not known
    again = loaded.network.features.backbone.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in backbone.items())
    assert loaded.record_["weights"] == detector.record_["weights"]
    assert_same(loaded.inspect(bad[0]), detector.inspect(bad[0]))


def test_loading_needs_neither_network_nor_weight_files(monkeypatch, detector, saved, bad):
    create = timm.create_model

    def offline(*args, pretrained=False, **options):
        assert not pretrained
        return create(*args, pretrained=False, **options)

    def unreadable(*args):
        raise AssertionError(f"{args} was read")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(backbones, "_read_state", unreadable)
    monkeypatch.setattr(torch, "load", unreadable)
    assert Detector.load(saved).inspect(bad[0]).score == detector.inspect(bad[0]).score


def rewritten(saved: Path, path: Path, drop: str = "", rename: tuple[str, str] = ("", ""), **changes) -> Path:
    with safe_open(saved, "pt") as file:
        metadata = json.loads(file.metadata()["unflaw"]) | changes
    tensors = {name.replace(*rename) if rename[0] else name: t for name, t in load_file(saved).items()}
    tensors.pop(drop, None)
    save_file(tensors, path, {"unflaw": json.dumps({k: v for k, v in metadata.items() if v is not None})})
    return path


def test_files_that_are_no_detectors_are_told_apart(saved, tmp_path):
    file = tmp_path / "odd.safetensors"

    def problem() -> str:
        with pytest.raises(DetectorError, match=r"odd\.safetensors") as caught:
            Detector.load(file)
        return str(caught.value)

    assert "no such file" in problem()
    file.write_bytes(b"")
    assert "not a readable" in problem()
    file.write_bytes(b"something else altogether")
    assert "not a readable" in problem()
    file.write_bytes(saved.read_bytes()[:-1000])  # a copy that was cut off
    assert "not a readable" in problem()
    save_file({"x": torch.zeros(1)}, file)
    assert "not a detector" in problem()
    save_file({"x": torch.zeros(1)}, file, {"unflaw": "{}"})
    assert "not a detector" in problem()
    rewritten(saved, file, format=FORMAT + 1)
    assert "newer" in problem() and "upgrade" in problem()
    first = next(name for name in load_file(saved) if name.startswith("network.") and name.endswith("weight"))
    rewritten(saved, file, drop=first)
    assert "do not fit" in problem()


@pytest.mark.parametrize(
    "changes", [{"format": "new"}, {"calibration": None}, {"config": {"network": 5}}, {"rename": ("network.", "net.")}]
)
def test_a_file_with_odd_metadata_is_an_error_that_names_it(saved, tmp_path, changes):
    file = rewritten(saved, tmp_path / "odd.safetensors", **changes)
    with pytest.raises(DetectorError, match=r"odd\.safetensors"):
        Detector.load(file)


def test_saving_never_leaves_half_a_file(monkeypatch, detector, saved, tmp_path):
    path = tmp_path / "parts.safetensors"
    detector.save(path)
    before = path.read_bytes()

    def fail(tensors, file, metadata=None):
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        detector.save(path)
    with pytest.raises(OSError, match="no space"):
        detector.save(tmp_path / "new.safetensors")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["parts.safetensors"]


def test_nothing_is_learned_from_the_images_that_calibrate(parts, weights, tiny, monkeypatch):
    """Neither standardisation nor components: the extractor is fitted on images that stay in training."""
    from unflaw.features.extractor import FeatureExtractor

    seen: list[int] = []
    fit = FeatureExtractor.fit
    monkeypatch.setattr(FeatureExtractor, "fit", lambda self, raw: (seen.append(len(raw)), fit(self, raw))[1])
    made = Detector(config=tiny("nearest_neighbor", **{"calibration.holdout": 0.5}), weights=weights).fit(parts)
    record = made.record_
    assert 2 <= seen[0] <= record["good_images"] - record["held_out"]


def test_copies_neither_calibrate_what_was_learned_nor_count_twice(parts, weights, tiny, tmp_path):
    """A certified rate rests on images that training has not seen."""
    own = Path(shutil.copytree(parts, tmp_path / "parts"))
    good = sorted((own / "train/good").iterdir())
    rng = np.random.default_rng(9)
    (own / "validation/good").mkdir(parents=True)
    shutil.copy(good[4], own / "validation/good/copied.png")
    for i in range(3):
        Image.fromarray(textured(rng)).save(own / f"validation/good/{i}.png")
    shutil.copy(good[0], own / "train/good/twin.png")
    (own / "train/good/torn.png").write_bytes(b"no image")
    (own / "train/good/worn.png").write_bytes(b"no image")
    config = tiny("nearest_neighbor", **{"training.display_steps": 0})
    found = Detector(config=config, weights=weights).fit(own)
    reasons = dict(found.record_["skipped"])
    assert reasons[str(own / "validation/good/copied.png")].endswith(f"is the same image as {good[4]} and counts once")
    assert f"is the same image as {good[0]}" in reasons[str(own / "train/good/twin.png")]
    assert len(reasons) == 4 and found.record_["good_images"] == len(good)
    assert len(found.calibration_.scores) == 3 == found.record_["held_out"]
    assert len(found.record_["seen"]) == len(good) + 3
    (own / "validation/good/copied.png").unlink()
    (own / "train/good/twin.png").unlink()
    assert Detector(config=config, weights=weights).fit(own).calibration_ == found.calibration_
    # where all that would calibrate are copies, some of the training part do
    for path in (own / "validation/good").iterdir():
        shutil.copy(good[int(path.stem) % len(good)], path)
    assert 0 < Detector(config=config, weights=weights).fit(own).record_["held_out"] < len(good)
