"""Teaching: reviewed good images join the memory, scores fall, and it can be undone."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import textured
from tests.test_detector import good_ones, unfitted
from typer.testing import CliRunner

from unflaw import load
from unflaw.calibration.crossfit import feature_set
from unflaw.cli import app
from unflaw.detector import Detector
from unflaw.errors import DetectorError, TrainingError
from unflaw.runtime import export

pytestmark = pytest.mark.slow


def striped(rng: np.random.Generator) -> np.ndarray:
    """A good image of a kind that was not trained on."""
    image = textured(rng).astype(int)
    image[::4] += 60
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture
def stripes(tmp_path):
    rng = np.random.default_rng(3)
    for folder, count in (("shown", 6), ("later", 6)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            Image.fromarray(striped(rng)).save(tmp_path / folder / f"{i}.png")
    return tmp_path


def scores(detector, folder):
    return np.array([result.score for result in detector.inspect_many(sorted(folder.iterdir()))])


@pytest.mark.parametrize("method", ["nearest_neighbor", "uranet", "mfrnet"])
def test_what_was_taught_scores_lower_and_nothing_higher(tiny, weights, parts, stripes, method):
    detector = Detector(config=tiny(method), weights=weights).fit(parts)
    good = scores(detector, parts / "test/good")
    bad = scores(detector, parts / "test/square")
    shown, later = scores(detector, stripes / "shown"), scores(detector, stripes / "later")
    calibration, length = detector.calibration_, len(detector.network.memory.added)
    added, skipped = detector.teach(sorted((stripes / "shown").iterdir()))
    assert added > 0 and not skipped and detector.calibration_ == calibration
    assert length < len(detector.network.memory.added) <= length + len(detector.network.memory.prototypes) // 8
    assert (scores(detector, stripes / "shown") < shown - 0.2 * np.ptp(good)).all()
    assert np.median(scores(detector, stripes / "later")) < np.median(later)
    assert (scores(detector, parts / "test/good") <= good + 1e-4).all()
    assert (scores(detector, parts / "test/square") <= bad + 1e-4).all()
    assert np.median(scores(detector, parts / "test/square")) > np.median(scores(detector, stripes / "shown"))


def test_it_is_saved_loaded_and_exported(tiny, weights, parts, stripes, tmp_path):
    detector = Detector(config=tiny("nearest_neighbor"), weights=weights).fit(parts)
    detector.teach(sorted((stripes / "shown").iterdir()))
    detector.save(tmp_path / "taught.safetensors")
    again = Detector.load(tmp_path / "taught.safetensors")
    expected = scores(detector, stripes / "later")
    np.testing.assert_allclose(scores(again, stripes / "later"), expected, rtol=1e-5)
    export.export(again, tmp_path / "taught.onnx")
    np.testing.assert_allclose(scores(load(tmp_path / "taught.onnx"), stripes / "later"), expected, rtol=1e-3)
    with pytest.raises(TrainingError, match="trained on this image"):
        again.calibrate(sorted((stripes / "shown").iterdir()))
    again.teach(sorted((stripes / "later").iterdir()))
    assert [entry["good"] for entry in again.record_["taught"]] == [6, 6]


def test_a_memory_can_be_full_and_methods_can_have_none(tiny):
    made, rng = unfitted(tiny, "nearest_neighbor"), torch.Generator().manual_seed(0)
    bank, cache = made.network.memory, good_ones(6, rng)
    bank.fit(feature_set(cache, made.network), rng)
    far = [feature_set(good_ones(6, rng), made.network) for _ in range(20)]
    with pytest.raises(ValueError, match="taught all it can hold"):
        for i, data in enumerate(far):
            bank.teach(type(data)(data.features * (i + 2), data.images), rng)
    assert len(bank.added) <= len(bank.prototypes)
    with pytest.raises(DetectorError):
        made.teach([np.zeros((8, 8, 3), np.uint8)])


def test_the_command_teaches_and_undo_takes_it_back(saved, stripes, tmp_path):
    model = tmp_path / "parts.safetensors"
    model.write_bytes(saved.read_bytes())
    run = CliRunner().invoke(app, ["teach", str(model), "--good", str(stripes / "shown")])
    assert run.exit_code == 0 and "6 good images taught" in run.output, run.output
    assert model.read_bytes() != saved.read_bytes()
    assert CliRunner().invoke(app, ["undo", str(model)]).exit_code == 0
    assert model.read_bytes() == saved.read_bytes()
    (stripes / "shown/broken.png").write_bytes(b"no image")
    run = CliRunner().invoke(app, ["teach", str(model), "--good", str(stripes / "shown")])
    assert run.exit_code == 0 and "broken.png" in run.output and "6 good images taught" in run.output
