"""`Detector.calibrate`: thresholds anew, without training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.conftest import make_parts, textured
from typer.testing import CliRunner

from unflaw.calibration.thresholds import calibrate
from unflaw.cli import app
from unflaw.detector import Detector
from unflaw.errors import TrainingError
from unflaw.io.detector_file import read_metadata

pytestmark = pytest.mark.slow


@pytest.fixture
def loaded(saved):
    return Detector.load(saved)


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    """Folders of good and defective images that the detector has not seen."""
    root = tmp_path_factory.mktemp("today")
    rng = np.random.default_rng(99)
    (root / "good").mkdir()
    for i in range(9):
        Image.fromarray(textured(rng)).save(root / f"good/{i}.png")
    make_parts(root / "parts", good=0, bad=6)
    return root / "good", root / "parts/test/square"


def test_thresholds_are_those_of_the_new_images(loaded, today, tmp_path):
    good, _ = today
    paths = sorted(good.iterdir())
    results = [loaded.inspect(path) for path in paths]
    before = loaded.calibration_
    found = loaded.calibrate(paths, rate=0.2)
    peaks = [float(result.map.max()) for result in results]
    low = float(np.median([np.median(result.map) for result in results]))
    expected = calibrate([result.score for result in results], peaks, low, 0.2)
    assert found.scores == pytest.approx(expected.scores, rel=1e-5) and found.rate == expected.rate == 0.2
    assert found.threshold == pytest.approx(expected.threshold, rel=1e-5) and found.threshold != before.threshold
    assert found.pixel_threshold == pytest.approx(expected.pixel_threshold, rel=1e-4)
    assert loaded.inspect(paths[0]).p_value == found.p_value(loaded.inspect(paths[0]).score)
    loaded.save(tmp_path / "again.safetensors")
    back = Detector.load(tmp_path / "again.safetensors")
    assert back.calibration_ == found and read_metadata(tmp_path / "again.safetensors")["format"] == 1
    (entry,) = back.record_["calibrations"]
    assert (entry["good"], entry["defects"], entry["kept"]) == (9, 0, 0) and entry["threshold"] == found.threshold


def test_kept_scores_count_too(loaded, today):
    before = loaded.calibration_
    found = loaded.calibrate(today[0].iterdir(), append=True)
    assert len(found.scores) == 9 + len(before.scores) and set(before.scores) <= set(found.scores)
    assert loaded.calibrate(today[0].iterdir()).asked_rate == loaded.config.calibration.false_alarm_rate
    assert len(loaded.record_["calibrations"]) == 2


def test_defects_set_the_threshold(loaded, today, tmp_path):
    good, bad = today
    found = loaded.calibrate(good.iterdir(), bad.iterdir(), miss_rate=0.2)
    assert found.miss_rate == 1 / 7 and all(loaded.inspect(path).verdict == "defect" for path in bad.iterdir())
    loaded.save(tmp_path / "by_defects.safetensors")
    assert read_metadata(tmp_path / "by_defects.safetensors")["format"] == 3  # an older unflaw must not misread it
    assert Detector.load(tmp_path / "by_defects.safetensors").calibration_ == found


def test_images_that_it_learned_from_are_refused(loaded, parts, today, tmp_path):
    before, record = loaded.calibration_, loaded.record_
    shutil.copy(parts / "train/good/003.png", tmp_path / "renamed.png")
    with pytest.raises(TrainingError, match=r"renamed.png: the detector was trained on this image, and scores"):
        loaded.calibrate([*today[0].iterdir(), tmp_path / "renamed.png"])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(TrainingError, match=r"no good images to calibrate with; .*broken.png"):
        loaded.calibrate([tmp_path / "broken.png"])
    with pytest.raises(TrainingError, match="among the good images and among the defective"):
        loaded.calibrate(today[0].iterdir(), today[0].iterdir(), miss_rate=0.3)
    with pytest.raises(TrainingError, match="no good images"):
        loaded.calibrate([])
    assert loaded.calibration_ == before and loaded.record_ == record


def test_images_that_cannot_be_read_are_left_out_and_named(loaded, today, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    expected = loaded.calibrate(today[0].iterdir())
    assert loaded.calibrate([tmp_path / "broken.png", *today[0].iterdir()]).scores == pytest.approx(expected.scores)
    entry = loaded.record_["calibrations"][-1]
    ((path, why),) = entry["skipped"]
    assert Path(path).name == "broken.png" and "broken.png" in why and entry["good"] == 9 == len(entry["images"])


def test_a_defective_image_among_the_good_ones_is_named(saved, today, tmp_path):
    """It alone sets the threshold of nine good images."""
    model, good = tmp_path / "m.safetensors", tmp_path / "good"
    shutil.copytree(today[0], good)
    plain = CliRunner().invoke(app, ["calibrate", str(saved), "--good", str(good), "--out", str(model)])
    assert "look at" not in plain.output
    shutil.copy(sorted(today[1].iterdir())[0], good / "odd.png")
    done = CliRunner().invoke(app, ["calibrate", str(saved), "--good", str(good), "--out", str(model)])
    told = "note: look at 1 image far apart from the other good images; remove what is defective, and calibrate again:"
    assert told in done.output
    assert f"\n  {good / 'odd.png'} (" in done.output
    (entry,) = Detector.load(model).record_["calibrations"]
    assert [Path(each["path"]).name for each in entry["strangest"]] == ["odd.png"]
    loaded, files = Detector.load(saved), sorted(good.iterdir())
    loaded.calibrate([np.asarray(Image.open(path)) for path in files])  # in memory they have names of their own
    (found,) = loaded.record_["calibrations"][-1]["strangest"]
    assert found["path"] == f"good image {files.index(good / 'odd.png')}"


def test_a_copy_does_not_count_and_is_named(loaded, today, tmp_path):
    """Ten copies of one image certify no more than it alone does."""
    good = sorted(today[0].iterdir())
    expected = loaded.calibrate(good, rate=0.2)
    copies = [Path(shutil.copy(good[0], tmp_path / f"copy{i}.png")) for i in range(10)]
    assert loaded.calibrate([*good, *copies, good[1]], rate=0.2) == expected
    entry = loaded.record_["calibrations"][-1]
    assert entry["good"] == 9 == len(entry["images"]) and [path for path, _ in entry["skipped"]] == [*map(str, copies)]
    assert entry["skipped"][0][1] == f"{copies[0]}: is the same image as {good[0]} and counts once"


def test_the_same_calibration_again_is_one_entry_of_the_record(loaded, today, tmp_path):
    """As when the power failed after the file was written: the command is given again."""
    loaded.calibrate(today[0].iterdir(), rate=0.2)
    loaded.save(tmp_path / "d.safetensors")
    back = Detector.load(tmp_path / "d.safetensors")
    back.calibrate(today[0].iterdir(), rate=0.2)
    assert len(back.record_["calibrations"]) == 1
    back.calibrate(today[0].iterdir(), rate=0.3)
    assert len(back.record_["calibrations"]) == 2


def test_no_image_counts_twice(loaded, today):
    good = sorted(today[0].iterdir())
    loaded.calibrate(good[:5])
    assert loaded.record_["calibrations"][-1]["kept"] == 0
    loaded.calibrate(good[5:], append=True)
    with pytest.raises(TrainingError, match=r"0\.png: this image and 8 more .* calibrated the detector before"):
        loaded.calibrate(good, append=True)
    assert len(loaded.calibrate(good).scores) == 9


def test_the_command_replaces_the_file_or_writes_another(saved, today, tmp_path):
    model = tmp_path / "m.safetensors"
    shutil.copy(saved, model)
    good, bad = today

    def run(*arguments):
        return CliRunner().invoke(app, ["calibrate", str(model), "--good", str(good), *map(str, arguments)])

    first = run("--rate", 0.3, "--out", tmp_path / "new.safetensors")
    assert first.exit_code == 0 and "false-alarm rate 30.00% or less, certified by 9 good images" in first.output
    assert model.read_bytes() == saved.read_bytes()
    for wrong, words in ((("--out", tmp_path / "new.onnx"), ".safetensors file"), (("--miss-rate", 0.1), "--defect")):
        refused = run(*wrong)
        assert refused.exit_code == 2 and words in refused.output
    second = run("--defect", bad, "--cost-ratio", 5)
    assert second.exit_code == 0 and "threshold of least cost, set by 6 labelled defects" in second.output
    shown = CliRunner().invoke(app, ["info", str(model)])
    assert "threshold of least cost" in shown.output
    assert "certif" not in shown.output[: shown.output.index("{")].replace("9 good images could certify", "")
    (entry,) = json.loads(shown.output[shown.output.index("{") :])["record"]["calibrations"]
    assert entry["defects"] == 6 and (entry["numbers"]["certified"], entry["numbers"]["asked_rate"]) == (False, None)
    for arguments, message in (
        (("--defect", bad), "--defect needs --miss-rate or --cost-ratio"),
        (("--rate", 0.1, "--miss-rate", 0.1), "give one of them"),
        (("--miss-rate", 0.1), "need labelled defects"),
        (("--defect", bad, "--miss-rate", 0.01), "6 defects cannot certify a miss rate of 1.00%; 99 would"),
        (("--rate", 0), "must lie between 0 and 1"),
    ):
        wrong = run(*arguments)
        assert wrong.exit_code == 2 and message in wrong.output
