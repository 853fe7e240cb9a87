"""Commissioning: the first images of a session move the calibration; `undo` takes it back."""

import numpy as np
import pytest
from PIL import Image
from tests.conftest import textured
from typer.testing import CliRunner

from unflaw.calibration import conformal
from unflaw.calibration.commission import move, warnings
from unflaw.calibration.scores import CalibrationScores
from unflaw.calibration.thresholds import CONTRADICTION, calibrate
from unflaw.cli import app
from unflaw.config import CalibrationOptions
from unflaw.detector import Detector
from unflaw.errors import DetectorError, TrainingError
from unflaw.io.versions import KEPT, keep_version, undo, versions_of


def session(scores):
    found = CalibrationScores()
    for i, score in enumerate(scores):
        found.add(score, np.full((8, 8), score), (0, 0, 8, 8))
        found.paths.append(f"{i}.png")
    return found


@pytest.mark.parametrize("n, share, shift", [(10, 0.0, 2.0), (10, 0.05, 2.0), (30, 0.05, 2.0), (60, 0.05, 0.0)])
def test_false_alarms_after_a_shift_are_about_those_promised(n, share, shift):
    """Scores of any shape, moved by a session; a share of the images are defects, and one more is allowed for."""
    rng, alarms, found, total, rates = np.random.default_rng(0), 0, 0, 0, []
    for _ in range(300):
        before = calibrate(rng.gumbel(size=60).tolist(), [0.0] * 60, 0.0, 0.02, reserve=1.0)
        defects = round(share * n)
        new = session([*(rng.gumbel(size=n - defects) + shift), *(rng.gumbel(size=defects) + shift + 8)])
        moved, suspects = move(before, new, share)
        assert moved.reserve == 0 and len(suspects) <= np.ceil(share * n)
        new.merge(moved)
        after = new.calibrate(CalibrationOptions(false_alarm_rate=0.02))
        alarms += sum(after.verdict(score) == "defect" for score in rng.gumbel(size=50) + shift)
        found += sum(after.verdict(score) == "defect" for score in rng.gumbel(size=50) + shift + 8)
        total, rates = total + 50, [*rates, after.rate]
    promised = float(np.mean(rates))
    assert 0.3 * promised < alarms / total < 2 * promised
    assert found / total > 0.95


def test_the_same_session_moves_nothing_though_groups_calibrated():
    """Scores of groups are the highest of each, and lie above those of images."""
    rng = np.random.default_rng(3)
    found = session(rng.gumbel(size=200))
    found.groups = [i // 10 for i in range(200)]
    before = found.calibrate(CalibrationOptions())
    assert (len(before.scores), before.images) == (20, 200) and np.median(before.scores) > before.centre + 1
    new = session(rng.gumbel(size=100))
    moved, _ = move(before, new, 0.0)
    assert moved.threshold == pytest.approx(before.threshold, abs=0.5)
    assert moved.centre == pytest.approx(np.median(new.scores)) == pytest.approx(before.centre, abs=0.5)
    assert not warnings(before, moved, new)


def test_few_images_cannot_commission():
    before = calibrate([1.0, 2.0], [1.0, 2.0], 0.0)
    with pytest.raises(TrainingError, match="4 images cannot commission; give 5 at least"):
        move(before, session([1.0] * 4), 0.0)


@pytest.mark.parametrize("n, k", [(19, 1), (60, 3)])
def test_the_chance_of_alarms_is_that_of_exchangeable_scores(n, k):
    rng, images, draws = np.random.default_rng(0), 20, 20_000
    scores = np.sort(rng.random((draws, n)), 1)[:, -k]
    alarms = (rng.random((draws, images)) > scores[:, None]).sum(1)
    for few in (0, 1, 3, 6):
        share = float((alarms >= few).mean())
        assert conformal.chance_of_alarms(few, images, n, k / (n + 1)) == pytest.approx(share, abs=0.015)


def test_a_broken_promise_is_said_with_its_cure():
    made = calibrate([float(i) for i in range(60)], [0.0] * 60, 0.0, 0.01)
    chance, said = made.check(1, 41)
    assert chance > CONTRADICTION and said.startswith("promise kept: 1 of 41")
    chance, said = made.check(8, 20)
    assert chance < CONTRADICTION and said.startswith("PROMISE BROKEN: 8 of 20") and "unflaw commission" in said


@pytest.mark.slow
def test_versions_are_kept_and_taken_back(saved, tmp_path):
    path = tmp_path / "parts.safetensors"
    path.write_bytes(saved.read_bytes())
    detector = Detector.load(path)
    for number in range(KEPT + 2):
        detector.set_threshold(float(number))
        detector.save(path, keep=True)
        detector.save(path, keep=True)  # the same again
    assert len(versions_of(path)) == KEPT
    for number in range(KEPT, 0, -1):
        undo(path)
        assert Detector.load(path).calibration_.threshold == number
    assert versions_of(path) == []
    keep_version(path)  # what a run leaves that is killed before it writes: the file itself
    with pytest.raises(DetectorError, match="has no earlier version"):
        undo(path)


@pytest.mark.slow
def test_the_command_moves_the_threshold_and_undo_restores_the_file(saved, tmp_path):
    model = tmp_path / "parts.safetensors"
    model.write_bytes(saved.read_bytes())
    rng = np.random.default_rng(9)
    (tmp_path / "today").mkdir()
    for i in range(12):
        Image.fromarray((textured(rng) * 0.7).astype(np.uint8)).save(tmp_path / f"today/{i}.png")
    bad = textured(rng)
    bad[10:40, 10:40] = 255
    Image.fromarray(bad).save(tmp_path / "today/bad.png")
    before = Detector.load(model)
    run = CliRunner().invoke(app, ["commission", str(model), str(tmp_path / "today")])
    assert run.exit_code == 0, run.output
    assert "bad.png: presumed defective and left out" in run.output and "12 images of this session" in run.output
    after = Detector.load(model)
    scores = [result.score for result in after.inspect_many(sorted((tmp_path / "today").glob("[0-9]*.png")))]
    assert np.median(after.calibration_.scores) == pytest.approx(np.median(scores), abs=0.5 * np.ptp(scores))
    assert after.references[""].described.shape[0] == 13 and not after.calibration_.certified
    assert after.record_["calibrations"][-1]["commissioned"]
    again = CliRunner().invoke(app, ["commission", str(model), str(tmp_path / "today")])
    assert again.exit_code == 2 and "would count twice" in again.output
    run = CliRunner().invoke(app, ["undo", str(model)])
    assert run.exit_code == 0 and "as it was trained" in run.output, run.output
    assert model.read_bytes() == saved.read_bytes()
    assert Detector.load(model).calibration_ == before.calibration_
    run = CliRunner().invoke(app, ["undo", str(model)])
    assert run.exit_code == 2 and "has no earlier version" in run.output


@pytest.mark.slow
def test_undo_loses_nothing(saved, tiny, weights, parts, tmp_path):
    model = tmp_path / "parts.safetensors"
    model.write_bytes(saved.read_bytes())
    run = CliRunner().invoke
    assert run(app, ["threshold", str(model), "2"]).exit_code == 0
    by_hand = model.read_bytes()
    (version,) = versions_of(model)
    whole = version.read_bytes()
    version.write_bytes(whole[:1000])  # damaged
    found = run(app, ["undo", str(model)])
    assert found.exit_code == 2 and str(version) in found.output.replace("\n", "") and model.read_bytes() == by_hand
    version.write_bytes(whole)
    Detector(config=tiny("nearest_neighbor"), weights=weights).fit(parts).save(model)  # another training
    trained = model.read_bytes()
    found = run(app, ["undo", str(model)])
    assert found.exit_code == 2 and "of another training" in found.output and model.read_bytes() == trained
    model.write_bytes(by_hand)
    found = run(app, ["undo", str(model)])
    assert found.exit_code == 0 and model.read_bytes() == whole
    assert (tmp_path / "parts.safetensors.versions/undone.safetensors").read_bytes() == by_hand


@pytest.mark.slow
def test_commissioning_warns_of_what_is_no_mild_change(saved, parts, tmp_path):
    model = tmp_path / "parts.safetensors"
    model.write_bytes(saved.read_bytes())
    found = CliRunner().invoke(app, ["commission", str(model), str(parts / "test"), "--share", "0.1"])
    assert found.exit_code == 0 and "would be called defective and count as good" in found.output, found.output
    model.write_bytes(saved.read_bytes())
    rng = np.random.default_rng(1)
    (tmp_path / "other").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"other/{i}.png")
    found = CliRunner().invoke(app, ["commission", str(model), str(tmp_path / "other")])
    assert found.exit_code == 0 and "deviations: images so different may hide defects" in found.output, found.output
