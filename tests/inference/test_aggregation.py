import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from tests.conftest import textured
from tests.report.test_report import make_result
from typer.testing import CliRunner

from unflaw.calibration.conformal import COMBINATIONS
from unflaw.calibration.thresholds import calibrate
from unflaw.cli import app
from unflaw.errors import ImageError
from unflaw.inference.aggregation import Discoveries, Parts, part_of
from unflaw.io.words import count

pytestmark = pytest.mark.slow

N = 39
SCORES = [float(i) for i in range(N)]
CALIBRATION = calibrate(SCORES, SCORES, 0.0, 0.05, review_rate=0.2)


def inspected(score: float, path: Path, calibration=CALIBRATION):
    p_value, estimated = calibration.p_value(score), calibration.estimated_p_value(score)
    verdict = calibration.verdict(score)
    return make_result(False, str(path), score=score, p_value=p_value, p_estimated=estimated, verdict=verdict)


@pytest.mark.parametrize("drifted", [False, True])
def test_a_batch_with_a_drift_alarm_goes_to_review(saved, tmp_path, drifted):
    rng = np.random.default_rng(8)
    (tmp_path / "new").mkdir()
    for i in range(24):
        image = textured(rng) * (0.5 if drifted else 1.0)
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"new/{i}.png")
    command = ["predict", str(saved), str(tmp_path / "new"), "--out", str(tmp_path / "out"), "--review-on-drift"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "out/drift.json").read_text())["alarm"] is drifted
    assert all(line["verdict"] == "review" for line in lines) is drifted
    assert all("verdict_without_drift" in line for line in lines) is drifted
    assert ("24 images sent to review" in run.output) is drifted
    assert ("0 good, 24 for review, 0 defective" in run.output) is drifted
    assert ("the light or the focus has changed" in run.output and "unflaw commission" in run.output) is drifted


def test_the_part_is_a_folder_or_what_a_pattern_says():
    path = Path("line3/0017_cam2.png")
    assert part_of(path, "folder") == "line3"
    assert part_of(path, r"(\d+)_cam") == "0017" and part_of(path, r"line\d") == "line3"
    assert part_of(path, r"(line\d)/(\d+)") == "line3"
    with pytest.raises(ValueError, match=r"0017_cam2.png: 'top' does not match it"):
        part_of(path, "top")
    with pytest.raises(ValueError, match="neither 'folder' nor a regular expression"):
        part_of(path, "(")
    for rule in ("line|(scratch)", "x*"):  # else images that have nothing in common would be one part
        with pytest.raises(ValueError, match=r"finds in it is empty"):
            part_of(path, rule)


def missing_of(said: str) -> int:
    return int(re.search(r"; (\d+) more good calibration images? would allow a verdict$", said)[1])


def parts_of(tmp_path, scores: dict[str, list[float | None]], calibration=CALIBRATION, method="bonferroni") -> dict:
    paths = {Path(part) / f"{i}.png": score for part, own in scores.items() for i, score in enumerate(own)}
    sink = Parts(tmp_path / "parts.jsonl", paths, "folder", calibration, method)
    for path, score in paths.items():
        sink.add(path, ImageError("broken") if score is None else inspected(score, path, calibration))
    said = sink.close()
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert said.startswith(f"{tmp_path / 'parts.jsonl'}: of {count(len(lines), 'part')} ")
    for line in lines:
        assert line["verdict"] != "defect" or line["p_value"] <= line["rate"] + 1e-12
        assert ("missing" in line) == ("reason" in line) == (line["verdict"] is None)
        assert line["verdict"] is not None or line["reason"] in said or line["missing"] < missing_of(said)
    return {line.pop("part"): line for line in lines}


def test_a_verdict_for_each_part(tmp_path):
    found = parts_of(
        tmp_path, {"a": [50, 2], "b": [1, 2], "c": [37.5, 0], "d": [50], "e": [None, 1], "f": [None], "g": [37.5]}
    )
    a = found["a"]
    assert a["images"] == ["a/0.png", "a/1.png"] and a["combination"] == "bonferroni"
    assert a["p_value"] == pytest.approx(2 / 40) and a["rate"] == 0.05 and a["verdict"] == "defect"
    assert found["b"]["verdict"] == "good" and found["b"]["p_value"] == 1
    assert found["c"]["p_value"] == pytest.approx(4 / 40) and found["c"]["verdict"] == "review"
    assert found["d"]["rate"] == 0.05 and found["d"]["verdict"] == "defect"
    assert found["e"]["unread"] == 1 and found["e"]["verdict"] == "review" and found["e"]["p_value"] == 0.975
    assert found["f"] == {"images": ["f/0.png"], "unread": 1, "verdict": "review"}
    assert found["g"]["p_value"] == found["g"]["rate"] and found["g"]["verdict"] == "defect"


@pytest.mark.parametrize("score", [0.0, 100.0])
def test_a_p_value_that_cannot_reach_the_rate_is_no_verdict(tmp_path, score):
    """Ten good calibration images and ten images of a part: the smallest combined p-value is 0.91."""
    few = calibrate(SCORES[:10], SCORES[:10], 0.0, 0.01, review_rate=0.2)
    found = parts_of(tmp_path, {"a": [score] * 10, "b": [score]}, few)
    a = found["a"]
    assert a["p_value"] == pytest.approx(10 / 11 if score else 1.0) and a["rate"] == 1 / 11
    assert a["verdict"] is None and a["missing"] == 989
    assert a["reason"] == (
        "with 10 good calibration images the p-value of 10 images together cannot be below 0.9091, and the false-alarm "
        "rate is 0.09091; 989 more good calibration images would allow a verdict"
    )
    assert found["b"]["verdict"] == ("defect" if score else "good")


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(2, 12),
    st.sampled_from(COMBINATIONS),
    st.sampled_from([0.3, 0.1, 0.05, 0.011]),
    st.booleans(),
)
def test_as_many_images_as_are_missing_allow_a_verdict(tmp_path_factory, n, k, method, rate, tail):
    def judged(n: int):
        made = calibrate([math.sqrt(i) for i in range(n)], [0.0] * n, 0.0, rate, extrapolate_tail=tail)
        return parts_of(tmp_path_factory.getbasetemp(), {"a": [1e6] * k}, made, method)["a"]

    found = judged(n)
    if found["verdict"] is None:
        enough = judged(n + found["missing"])
        assert enough["verdict"] == "defect", (found, enough)
        assert found["missing"] == 1 or judged(n + found["missing"] - 1)["verdict"] is None
    else:
        assert found["verdict"] == "defect" and found["p_value"] <= found["rate"] + 1e-12


def test_a_part_of_one_image_is_judged_as_the_image_is(tmp_path):
    """Also where labelled defects set the threshold, which then lies between or above the scores of good images."""
    by_defects = calibrate(SCORES, SCORES, 0.0, 0.05, review_rate=0.2, defects=[60.0, 70.0], cost_ratio=1.0)
    for calibration in (CALIBRATION, by_defects):
        scores = {str(score): [score] for score in (0.0, 33.5, 37.5, 45.0, 65.0)}
        found = parts_of(tmp_path, scores, calibration)
        assert {part: line["verdict"] for part, line in found.items()} == {
            part: calibration.verdict(own[0]) for part, own in scores.items()
        }


def test_good_parts_raise_no_more_alarms_than_their_rate(tmp_path):
    rng, alarms, rates, parts = np.random.default_rng(0), 0, set(), 40
    for _ in range(60):
        calibration = calibrate(rng.normal(size=59).tolist(), [0.0] * 59, 0.0, 0.05)
        scores = {
            str(i): (rng.normal() * np.sqrt(0.5) + rng.normal(size=3) * np.sqrt(0.5)).tolist() for i in range(parts)
        }
        for line in parts_of(tmp_path, scores, calibration).values():
            alarms += line["verdict"] == "defect"
            rates.add(line["rate"])
    assert rates == {0.05}
    deviation = np.sqrt(0.05 * 0.95 * (1 / 61 + 1 / parts) / 60)
    assert alarms / (60 * parts) < 0.05 + 3 * deviation


def test_an_estimated_calibration_gives_estimated_parts(tmp_path):
    rng = np.random.default_rng(1)
    calibration = calibrate(rng.gumbel(size=99).tolist(), [0.0] * 99, 0.0, 0.002, extrapolate_tail=True)
    found = parts_of(tmp_path, {"a": [30.0, 0.0], "b": [0.0, 0.0], "c": [1e9, 0.0], "d": [1e9, 0.0, 0.0]}, calibration)
    assert found["a"]["estimated"] and found["a"]["rate"] == 0.002 and found["a"]["p_value"] == pytest.approx(0.002)
    assert found["c"]["p_value"] == found["a"]["p_value"]  # a tail is not trusted further
    assert [found[part]["verdict"] for part in "abcd"] == ["defect", "good", "defect", None]
    assert found["d"]["missing"] == 50  # 3 / (10 · 150) = 0.002


def test_discoveries_are_marked_in_the_results(tmp_path):
    file = tmp_path / "results.jsonl"
    scores = [50.0, 1.0, 60.0, 70.0, 2.0]
    sink = Discoveries(0.1, CALIBRATION)
    lines = []
    for i, score in enumerate(scores):
        path = Path(os.fsdecode(b"\xff%d.png" % i))
        sink.add(path, inspected(score, path))
        lines.append(inspected(score, path).to_json())
    lines.insert(1, {"path": "broken.png", "error": "is broken"})
    sink.add(Path("broken.png"), ImageError("is broken"))
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8", "backslashreplace")
    sink.amend(file)
    said = sink.close()
    marked = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [line.get("discovery") for line in marked] == [True, None, False, True, True, False]
    assert [{k: v for k, v in line.items() if k != "discovery"} for line in marked] == lines
    assert said == (
        "3 discoveries among 5 images at a false discovery rate of 10.00%; with this calibration there are none, or at "
        "least 2"
    )
    with pytest.raises(ValueError, match="must lie between"):
        Discoveries(1.5, CALIBRATION)


def test_discoveries_that_there_cannot_be_are_told():
    few = calibrate(SCORES[:8], SCORES[:8], 0.0, 0.05, out_of_fold=True)
    sink = Discoveries(0.1, few)
    for i in range(3):
        sink.add(Path(f"{i}.png"), inspected(1e6, Path(f"{i}.png"), few))
    assert sink.close() == (
        "0 discoveries among 3 images at a false discovery rate of about 10.00%; none are possible: with 8 good "
        "calibration images no p-value is below 0.1111; 1 more would allow some"
    )
    enough = calibrate(SCORES[:9], SCORES[:9], 0.0, 0.05)
    sink = Discoveries(0.1, enough)
    sink.add(Path("0.png"), inspected(1e6, Path("0.png"), enough))
    assert sink.close() == "1 discovery among 1 image at a false discovery rate of 10.00%"


# The command


@pytest.fixture
def pieces(parts, tmp_path):
    """Two images of each of two parts, larger than the canvas, and one that cannot be read."""
    for name, kind in (("one", "good"), ("two", "square")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(2):
            Image.open(parts / f"test/{kind}/00{i}.png").resize((160, 96)).save(tmp_path / "in" / name / f"{i}.png")
    return tmp_path / "in"


def predict(saved, *arguments):
    return CliRunner().invoke(app, ["predict", str(saved), *map(str, arguments)])


def test_predict_writes_parts_discoveries_and_annotations(saved, pieces, tmp_path):
    out, coco = tmp_path / "out", tmp_path / "deep/coco.json"
    done = predict(
        saved, pieces, "--out", out, "--group-by", "folder", "--fdr", 0.5, "--coco", coco, "--labelme", "--exit-code"
    )
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    verdicts = [line["verdict"] for line in lines]
    assert done.exit_code == (4 if "defect" in verdicts else 5 if "review" in verdicts else 0), done.output
    assert len(lines) == 4 and all("discovery" in line for line in lines) and lines[3]["regions"]
    assert all(0 <= region["uncertainty"] <= 0.5 for line in lines for region in line["regions"])
    parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    assert [Path(line["part"]).name for line in parts] == ["one", "two"] and "of 2 parts" in done.output

    written = json.loads(coco.read_text())
    assert [image["file_name"] for image in written["images"]] == [line["path"] for line in lines]
    assert {(image["width"], image["height"]) for image in written["images"]} == {(160, 96)}
    per_image = [[a for a in written["annotations"] if a["image_id"] == image["id"]] for image in written["images"]]
    assert [len(own) for own in per_image] == [len(line["regions"]) for line in lines]
    for own, line in zip(per_image, lines, strict=True):
        for annotation, region in zip(own, line["regions"], strict=True):
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == region["box"] and annotation["score"] == region["peak"]
            (polygon,) = annotation["segmentation"]
            drawn = Image.new("1", (1600, 960))
            ImageDraw.Draw(drawn).polygon([round(10 * value) for value in polygon], fill=1)
            assert drawn.getbbox() == pytest.approx(
                [10 * v for v in region["box"]], abs=30
            )  # boxes are rounded outward
            area = np.asarray(drawn).sum() / 100
            assert 0.9 * annotation["area"] < area  # and holes are filled

    files = sorted((out / "labelme").iterdir())
    assert [file.name for file in files] == [f"{i:05d}_{i % 2}.json" for i in range(4)]
    for file, line in zip(files, lines, strict=True):
        label = json.loads(file.read_text())
        assert (file.parent / label["imagePath"]).resolve() == Path(line["path"]).resolve()
        assert (label["imageWidth"], label["imageHeight"], label["imageData"]) == (160, 96, None)
        assert len(label["shapes"]) == len(line["regions"]) and label["flags"][line["verdict"]]


def test_what_cannot_be_read_is_told_by_all(saved, pieces, tmp_path):
    (pieces / "two/9.png").write_bytes(b"no image")
    out = tmp_path / "out"
    done = predict(saved, pieces, "--out", out, "--group-by", r"in/(\w+)", "--labelme", "--coco", tmp_path / "c.json")
    assert done.exit_code == 3
    parts = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    assert [line["part"] for line in parts] == ["one", "two"] and parts[1]["unread"] == 1
    assert len(list((out / "labelme").iterdir())) == len(json.loads((tmp_path / "c.json").read_text())["images"]) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--group-by", "cam"), "does not match it"),
        (("--combine", "fisher"), "there are bonferroni, harmonic, geometric, mean"),
        (("--fdr", "0"), "must lie between 0 and 1"),
    ],
)
def test_wrong_options_are_told_before_the_work(saved, pieces, tmp_path, arguments, message):
    done = predict(saved, pieces, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2 and re.search(message, done.output) and not (tmp_path / "out/results.jsonl").exists()


def test_calibrate_sets_review_tail_and_area_anew(saved, parts, tmp_path):
    model = tmp_path / "m.safetensors"
    shutil.copy(saved, model)
    good = tmp_path / "good"
    good.mkdir()
    rng = np.random.default_rng(4)  # of 3, the highest score lies above the estimate, which it then bounds
    from tests.conftest import textured

    for i in range(45):
        Image.fromarray(textured(rng)).save(good / f"{i}.png")

    def calibrated(*arguments):
        done = CliRunner().invoke(app, ["calibrate", str(model), "--good", str(good), *map(str, arguments)])
        assert done.exit_code == 0, done.output
        from unflaw.detector import Detector

        return Detector.load(model).calibration_, done.output

    plain, said = calibrated()
    assert plain.tail is None and plain.review_rate == 2 / 46 and "with those for review 4.35%" in said
    other, said = calibrated("--extrapolate-tail", "--review-rate", 0.2, "--minimum-area", 0.01)
    assert other.review_rate == 9 / 46 and other.minimum_area == 0.01 and other.pixel_threshold < plain.pixel_threshold
    assert other.estimated and other.rate == 0.01 and other.threshold > plain.threshold
    assert "false-alarm rate 1.00%, estimated from the tail of the scores" in said
    info = CliRunner().invoke(app, ["info", str(model)]).output
    assert "45 good images certify 2.17% at best" in info and "1.00% takes 99, 0.10% takes 999" in info
