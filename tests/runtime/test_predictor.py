"""Exported detectors: loading and running without torch, the commands, and the refusal of invalid files."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from unflaw import Detector, evaluate, load, load_dataset
from unflaw.cli import app
from unflaw.errors import DetectorError
from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import prepare
from unflaw.io.detector_file import read_metadata
from unflaw.io.listing import list_images
from unflaw.runtime.verification import Comparison

ALONE = """
import sys
import unflaw
detector = unflaw.load({path!r})
one = detector.inspect({image!r})
many = list(detector.inspect_many([{image!r}] * 3))
heavy = {{"torch", "timm", "torchvision", "onnx", "onnxscript"}} & set(sys.modules)
assert not heavy, heavy
assert [result.score for result in many] == [one.score] * 3
print(one.verdict, one.score, one.p_value, len(one.regions), sorted(one.layers))
"""


@pytest.fixture
def copy(exported, tmp_path):
    """A model to modify, and a path to write it to."""
    return onnx.load(exported), tmp_path / "modified.onnx"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspection_imports_no_torch_and_gives_the_same_result(exported, detector, parts):
    image = list_images(parts / "test/square")[0]
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(path=str(exported), image=str(image))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = detector.inspect(image)
    verdict, score, p_value, regions, *layers = done.stdout.split(maxsplit=4)
    assert (verdict, int(regions)) == (expected.verdict, len(expected.regions))
    assert float(score) == pytest.approx(expected.score, rel=1e-4) and float(p_value) == expected.p_value
    assert layers == [f"{sorted(expected.layers)}\n"]


def test_it_has_the_attributes_of_the_trained_detector(exported, detector):
    found = load(exported, threads=1)
    assert found.config.model_dump(mode="json") == detector.config.model_dump(mode="json")
    assert found.record_ == detector.record_
    assert found.calibrations == detector.calibrations and found.select() == detector.calibration_
    assert found.references.keys() == detector.references.keys()
    with pytest.raises(DetectorError, match="has no categories"):
        found.inspect(np.zeros((9, 9), np.uint8), category="nut")


def test_images_of_a_batch_do_not_touch_each_other(exported, parts):
    found, paths = load(exported, threads=1), list_images(parts / "test")
    together = list(found.inspect_many(paths, batch=5))
    alone = [found.inspect(path) for path in paths]
    assert [result.score for result in together] == [result.score for result in alone]


def test_evaluation_agrees(exported, detector, parts):
    dataset = load_dataset(parts)
    a, b = (evaluate(found, dataset).metrics for found in (detector, load(exported)))
    assert a["image_auroc"] == b["image_auroc"] and a["aupro_30"] == pytest.approx(b["aupro_30"], abs=1e-3)


def test_commands_take_either_file(exported, parts, tmp_path):
    lines = run("info", exported)
    assert lines.exit_code == 0 and "exported to onnx in fp32" in lines.output and "backbone" in lines.output
    assert run("predict", exported, parts / "test", "--out", tmp_path, "--images").exit_code == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 8
    assert run("evaluate", exported, "--data", parts).exit_code == 0
    refused = run("calibrate", exported, "--good", parts / "test/good")
    assert refused.exit_code == 2 and "is an exported detector, which only inspects" in refused.output


def test_verify_compares_and_fails_above_the_tolerance(exported, saved, parts, copy):
    same = run("verify", saved, exported, "--data", parts)
    assert same.exit_code == 0 and "8 images" in same.output and "verdicts  0 differ" in same.output
    assert run("verify", saved, exported, "--data", parts, "--tolerance", 0).exit_code == 1
    model, path = copy
    for tensor in model.graph.initializer:  # another backbone
        if tensor.name.endswith("backbone.conv1.weight"):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1.05), tensor.name))
    onnx.save(model, path)
    other = run("verify", saved, path, "--data", parts)
    assert other.exit_code == 1 and "their scores and maps differ by more than 0.0001" in other.output


def test_verify_gives_the_reason_why_two_do_not_agree(exported, saved, detector, parts, copy, tmp_path):
    again = Detector.load(saved)
    again.calibrate(list_images(parts / "test/good"))
    again.save(tmp_path / "again.safetensors")
    done = run("verify", tmp_path / "again.safetensors", exported, "--data", parts)
    thresholds = f"thresholds {detector.calibration_.threshold:.4g} and {again.calibration_.threshold:.4g}"
    assert done.exit_code == 2 and f"is calibrated otherwise than the trained detector ({thresholds})" in done.output
    assert str(exported) in done.output and "export the trained one again" in done.output
    model, path = copy
    with_metadata(model, lambda m: m["config"]["preparation"].update(fit="pad"))
    onnx.save(model, path)
    assert "prepares images otherwise than the trained" in run("verify", saved, path, "--data", parts).output
    with_metadata(model, lambda m: m["config"]["preparation"].update(fit="stretch"))
    with_metadata(model, lambda m: m.update(categories={"nut": m.pop("calibration")}))
    onnx.save(model, path)
    assert "has other categories than the trained" in run("verify", saved, path, "--data", parts).output
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/0.png").write_bytes(b"no image")
    done = run("verify", saved, exported, "--data", tmp_path / "torn")
    assert done.exit_code == 1 and "no image could be read, so nothing was compared" in done.output
    assert "differ by more" not in done.output


def test_verdicts_that_differ_are_a_reason_of_their_own():
    agreed = Comparison(images=3, score=1e-5, map=1e-5)
    assert agreed.agrees(1e-4) and not Comparison().agrees(1e-4)
    turned = replace(agreed, verdicts=["a.png"])
    assert turned.faults(1e-4) == ["they give 1 image another verdict"] and not turned.agrees(1e-4)
    assert replace(agreed, verdicts=["a", "b"], map=1).faults(1e-4) == [
        "their maps differ by more than 0.0001",
        "they give 2 images another verdict",
    ]


def test_export_on_the_command_line(saved, tmp_path):
    misnamed = tmp_path / "parts.onnx"
    misnamed.write_bytes(saved.read_bytes())
    assert "is the detector itself" in run("export", misnamed).output and misnamed.read_bytes() == saved.read_bytes()
    misnamed.unlink()
    missing = run("export", misnamed)  # its name is that of the output
    assert missing.exit_code == 2 and "parts.onnx: there is no such file; check the path" in missing.output
    assert "lost" not in missing.output
    assert run("export", saved, "--to", "tflite").exit_code == 2
    assert "is called parts.xml" in run("export", saved, "--to", "openvino", "--out", tmp_path / "parts.onnx").output
    assert "--data" in run("export", saved, "--precision", "int8", "--out", tmp_path / "parts.onnx").output
    assert not list(tmp_path.iterdir())


def test_files_without_a_detector_are_refused(copy, exported, tmp_path):
    _, path = copy
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), path)
    for content, reason in (
        (path.read_bytes(), "but not a detector"),
        (exported.read_bytes()[:100_000], "ends too early"),
        (b"", "not an ONNX model"),
        (b"<net><rt_info/></net>", "but not a detector"),
        (b"<net", "not a readable OpenVINO .xml"),
    ):
        path.write_bytes(content)
        with pytest.raises(DetectorError, match=f"modified.onnx: .*{reason}"):
            load(path)
    with pytest.raises(DetectorError, match="there is no such file"):
        load(tmp_path / "none.onnx")


def with_metadata(model, change):
    properties = {entry.key: entry.value for entry in model.metadata_props}
    metadata = json.loads(properties["unflaw"])
    change(metadata)
    helper.set_model_props(model, {"unflaw": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format=99), "newer unflaw"),
        (lambda m: m.pop("calibration"), "metadata cannot be used"),
        (lambda m: m["config"].update(method="?"), "metadata cannot be used"),
        (lambda m: m.pop("exported"), "metadata cannot be used"),
    ],
)
def test_odd_metadata_is_an_error_that_names_the_file(copy, change, reason):
    model, path = copy
    with_metadata(model, change)
    onnx.save(model, path)
    with pytest.raises(DetectorError, match=f"modified.onnx: .*{reason}"):
        load(path)


def test_a_graph_with_other_outputs_is_refused(copy):
    model, path = copy
    model.graph.output[1].name = "points"
    for node in model.graph.node:
        node.output[:] = ["points" if name == "score" else name for name in node.output]
    onnx.save(model, path)
    with pytest.raises(DetectorError, match="not those of a detector"):
        load(path)


def test_tensors_in_other_files_are_not_read(copy):
    model, path = copy
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DetectorError, match="tensors in other files"):
        load(path)


def test_a_detector_does_not_take_an_exported_file(exported):
    assert "exported" in read_metadata(exported)
    with pytest.raises(DetectorError, match="is an exported detector"):
        Detector.load(exported)


EXAMPLES = Path(__file__).parents[2] / "docs/examples"
MAIN = """
#include "prepare.hpp"
#include <cstdio>
#include <iostream>
int main() {
    int width, height, across, down;
    std::cin >> width >> height >> across >> down;
    std::cin.get();
    std::vector<uint8_t> rgb(size_t(3) * width * height);
    std::cin.read(reinterpret_cast<char*>(rgb.data()), std::streamsize(rgb.size()));
    const auto pixels = unflaw::prepare(rgb, width, height, across, down);
    std::fwrite(pixels.data(), 4, pixels.size(), stdout);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_preparation_in_cpp_is_that_of_unflaw(tmp_path):
    (tmp_path / "main.cpp").write_text(MAIN)
    program = tmp_path / "prepare"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{EXAMPLES}"]
    subprocess.run(["g++", *flags, str(tmp_path / "main.cpp"), "-o", str(program)], check=True)
    rng = np.random.default_rng(3)
    for width, height in ((64, 64), (500, 333), (3, 500), (1, 1), (90, 31), (31, 90), (60, 100), (2000, 7)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for size in ((64, 64), (96, 32), (32, 200)):
            given = f"{width} {height} {size[0]} {size[1]}\n".encode() + image.tobytes()
            done = subprocess.run([program], input=given, capture_output=True, check=True)
            pixels = np.frombuffer(done.stdout, np.float32).reshape(3, *size[::-1])
            np.testing.assert_array_equal(pixels, prepare(image, Preparation(size=size)).pixels)


def test_the_python_example_needs_no_unflaw(exported, detector, parts):
    images = list_images(parts / "test")
    code = "import sys, runpy; runpy.run_path(sys.argv.pop(1)); assert not {'unflaw', 'torch'} & set(sys.modules)"
    arguments = [sys.executable, "-c", code, EXAMPLES / "inspect_onnx.py", exported, *images]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, path in zip(done.stdout.splitlines(), images, strict=True):
        expected = detector.inspect(path)
        found = re.match(r"(.*): (good|defect), score (\S+), p-value (\S+),", line)
        assert found and found[1] == str(path) and found[2] == expected.verdict
        assert float(found[3]) == pytest.approx(expected.score, abs=2e-4)
        assert float(found[4]) == pytest.approx(expected.p_value, abs=1e-4)
