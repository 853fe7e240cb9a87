import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import textured

from unflaw.config import Weights
from unflaw.datasets import load_dataset
from unflaw.detector import Detector
from unflaw.errors import TrainingError, WriteError
from unflaw.evaluation.evaluate import evaluate
from unflaw.experiments.feature_store import ExperimentRunner
from unflaw.features.backbones import WeightsError
from unflaw.features.extractor import FeatureExtractor
from unflaw.postprocessing.results import Result

pytestmark = pytest.mark.slow

SMALL = {"features.backbone": "test_efficientnet"}  # where weights do not matter


@pytest.fixture(scope="module")
def motley(tmp_path_factory, parts):
    """Non-square images of two shapes, some that calibrate, some that cannot be read, and a mask-less defect."""
    root = tmp_path_factory.mktemp("motley") / "motley"
    shutil.copytree(parts, root)
    rng = np.random.default_rng(3)
    (root / "validation/good").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(textured(rng)).save(root / f"validation/good/{i}.png")
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        image = Image.open(path)
        width = 64 if "ground_truth" in path.parts or "square" in path.parts else (64, 96)[i % 2]
        image.crop((0, 8, 64, 56)).resize((width, 48)).save(path)
    for name in ("train/good/003", "validation/good/1", "test/good/002", "test/square/001"):
        (root / f"{name}.png").write_bytes(b"no image")
    (root / "ground_truth/square/003_mask.png").unlink()
    return root


def same(found: Detector, expected: Detector, dataset) -> None:
    """The two have learned the same and measure the same.

    Features in files are float32, so nothing is rounded that `Detector.fit` does not round. What is left is the last
    bit of float32, where a backbone sees an image beside others; it may turn the last bit of F in float16, a 1024th.
    """
    a, b = evaluate(found, dataset), evaluate(expected, dataset)
    for name in ("path", "label", "defect", "verdict"):
        assert [row[name] for row in a.rows] == [row[name] for row in b.rows]
    for name in ("score", "p_value"):
        assert [row[name] for row in a.rows] == pytest.approx([row[name] for row in b.rows], rel=1e-3, abs=1e-3)
    figures = [name for name, value in b.metrics.items() if value is None or isinstance(value, int | float)]
    assert len(figures) > 12
    for name in figures:
        if b.metrics[name] is None:
            assert a.metrics[name] is None, name
            continue
        assert a.metrics[name] == pytest.approx(b.metrics[name], rel=1e-3, abs=1e-3), name
    assert a.skipped == b.skipped and a.metrics["per_defect"].keys() == b.metrics["per_defect"].keys()
    for name in ("digest", "good_images", "held_out", "skipped", "weights"):
        assert found.record_[name] == expected.record_[name], name
    state = expected.network.state_dict()
    chosen = (
        "features.centre",
        "features.basis",
        "memory.prototypes",
        "regional_memory.memory.prototypes",
        "memory.added",
    )
    for name in filter(state.__contains__, chosen):  # of what is trained, scores tell: Adam makes much of little
        torch.testing.assert_close(found.network.state_dict()[name], state[name], rtol=1e-3, atol=1e-3)


def test_a_detector_from_a_file_is_that_of_the_images(detector, parts, weights, tmp_path):
    dataset = load_dataset(parts)
    same(ExperimentRunner(tmp_path, weights).fit(detector.config, dataset), detector, dataset)


@pytest.mark.parametrize("method, seed", [("nearest_neighbor", 1), ("draem", 2)])
def test_that_holds_for_motley_images_too(motley, weights, tiny, tmp_path, method, seed):
    few = {"training.steps": 2, "training.seed": seed, "preparation.fit": "pad", "training.display_steps": 0}
    config, dataset = tiny(method, **few), load_dataset(motley)
    found = ExperimentRunner(tmp_path, weights).fit(config, dataset)
    same(found, Detector(config=config, weights=weights).fit(dataset), dataset)
    measured = evaluate(found, dataset).metrics
    assert measured["n_images"] == 6 and len(measured["skipped"]) == 2 and len(found.record_["skipped"]) == 2
    outcomes = found.inspect_many((s.path for s in dataset.test), on_error="yield")
    boxes = {outcome.valid for outcome in outcomes if isinstance(outcome, Result)}
    assert len(boxes) == 2 and (0, 0, 64, 64) not in boxes


def test_features_are_computed_once(parts, tiny, tmp_path, monkeypatch):
    dataset, passed, stages = load_dataset(parts), [], []
    aggregate = FeatureExtractor.aggregate

    def counted(extractor, images):
        passed.append(len(images))
        return aggregate(extractor, images)

    monkeypatch.setattr(FeatureExtractor, "aggregate", counted)
    runner = ExperimentRunner(tmp_path, Weights.RANDOM)
    for smooth in (4.0, 1.0):
        config = tiny("nearest_neighbor", **SMALL | {"scoring.smooth": smooth, "training.display_steps": 0})
        detector = runner.fit(config, dataset, progress=lambda *report: stages.append(report))
        assert len(list(detector.inspect_many(sample.path for sample in dataset.test))) == 8
    assert sum(n for n in passed if n > 1) == 20  # all images of train and test
    assert {report[1:3] for report in stages if report[0] == "features"} > {(16, 20), (20, 20)}
    passed.clear()
    ExperimentRunner(tmp_path, Weights.RANDOM).fit(
        tiny("nearest_neighbor", **SMALL | {"training.display_steps": 0}), dataset
    )
    assert sum(n for n in passed if n > 1) == 0  # in another process neither
    assert list(tmp_path.iterdir()) == [runner.path(config, dataset)]


def test_a_file_serves_all_settings_that_features_do_not_depend_on(parts, tiny, tmp_path):
    dataset, runner = load_dataset(parts), ExperimentRunner(tmp_path, Weights.RANDOM)

    def path(method="nearest_neighbor", **changes):
        return runner.path(tiny(method, **SMALL | changes), dataset)

    same = [{"scoring.smooth": 1.0}, {"features.components": 5}, {"network.prototypes": 20}, {"training.seed": 1}]
    assert {path(**changes) for changes in same} == {path("uranet")}
    other = {"features.levels": (2,)}, {"features.grid": 6}, {"features.smooth": 1}
    other += {"preparation.size": 32}, {"preparation.fit": "pad"}
    paths = {path(), *(path(**changes) for changes in other), path("draem"), path("draem", **{"network.side": 32})}
    paths |= {runner.path(tiny("nearest_neighbor", **SMALL), replace(dataset, test=dataset.test[1:]))}
    assert len(paths) == 1 + 5 + 2 + 1
    assert path("draem") == path("memae")


def test_digests_stand_for_all_that_decides_figures(parts, weights, tiny, tmp_path):
    dataset, runner = load_dataset(parts), ExperimentRunner(tmp_path, weights)
    config = tiny("nearest_neighbor")
    first, second = dataset.train[:2]
    fewer = replace(dataset, train=dataset.train[1:])
    turned = replace(dataset, train=(second, first, *dataset.train[2:]))
    moved = replace(dataset, train=dataset.train[:-1], validation=dataset.train[-1:])
    unmasked = replace(dataset, test=tuple(replace(sample, mask=None) for sample in dataset.test))
    relabelled = replace(dataset, test=tuple(replace(sample, label=1) for sample in dataset.test))
    data = [dataset, fewer, turned, moved, unmasked, relabelled]
    digests = [runner.digest(config, each) for each in data]
    digests += [runner.digest(tiny("nearest_neighbor", **{"training.seed": 1}), dataset)]
    digests += [ExperimentRunner(tmp_path, Weights.RANDOM).digest(config, dataset)]
    assert len(set(digests)) == 8
    assert runner.path(config, dataset) != ExperimentRunner(tmp_path, Weights.RANDOM).path(config, dataset)
    torch.manual_seed(4)
    assert (
        ExperimentRunner(tmp_path / "other", Weights.RANDOM).digest(config, dataset) == digests[-1]
    )  # random, yet always the same
    copy = load_dataset(shutil.copytree(parts, tmp_path / "elsewhere"))
    assert runner.digest(config, copy) == digests[0]
    textures = tmp_path / "elsewhere/train/good"
    config = tiny("nearest_neighbor", **{"training.textures": str(textures)})
    before = runner.digest(config, dataset)
    shutil.copy(textures / "000.png", textures / "001.png")
    assert runner.digest(config, dataset) != before


def test_what_is_doubtful_is_for_review_as_in_the_detector(parts, weights, tiny, tmp_path):
    dataset, verdicts = load_dataset(parts), []
    for asked in (False, True):
        config = tiny(**{"calibration.review_uncertain": asked, "calibration.review_rate": 0.0})
        detector = ExperimentRunner(tmp_path, weights).fit(config, dataset)
        known = detector.categories_[""]
        low = {"threshold": -1e9, "pixel_threshold": -1e9, "uncertainty_threshold": -1.0}
        doubted = known.calibration.model_copy(update=low)
        detector.categories_[""] = known._replace(calibration=doubted)
        verdicts.append({row["verdict"] for row in evaluate(detector, dataset).rows})
    assert verdicts == [{"defect"}, {"review"}]


def test_methods_on_pixels_need_no_weights(parts, tiny, tmp_path):
    runner = ExperimentRunner(tmp_path, tmp_path / "nowhere.safetensors")
    runner.digest(tiny("memae"), load_dataset(parts))
    with pytest.raises(WeightsError, match="nowhere"):
        runner.digest(tiny("nearest_neighbor"), load_dataset(parts))


@pytest.mark.parametrize("harm", ["cut", "foreign", "other"])
def test_a_damaged_feature_file_is_named(parts, tiny, tmp_path, harm):
    config, dataset = tiny("nearest_neighbor", **SMALL | {"training.display_steps": 0}), load_dataset(parts)
    ExperimentRunner(tmp_path, Weights.RANDOM).fit(config, dataset)
    (file,) = tmp_path.iterdir()
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif harm == "foreign":
        file.write_bytes(b"")
    else:
        np.save(file, np.zeros(20, np.float32))
    with pytest.raises(ValueError, match=rf"{file.name}.*delete it"):
        ExperimentRunner(tmp_path, Weights.RANDOM).fit(config, dataset)


def test_a_folder_that_cannot_hold_features_is_named(parts, tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match=r"file: cannot be written.*name another folder"):
        ExperimentRunner(tmp_path / "file", Weights.RANDOM).fit(tiny("nearest_neighbor", **SMALL), load_dataset(parts))


def test_what_cannot_be_learned_from_is_said_as_ever(parts, tiny, tmp_path):
    dataset = load_dataset(parts)
    with pytest.raises(TrainingError, match="too few to learn from"):
        ExperimentRunner(tmp_path, Weights.RANDOM).fit(tiny("memae"), replace(dataset, train=dataset.train[:5]))
    with pytest.raises(ValueError, match="patches of 3"):
        ExperimentRunner(tmp_path, Weights.RANDOM).fit(
            tiny("uranet", **SMALL | {"network.restoration.patch": 3}), dataset
        )
