"""Timing: the stages, and that they add up; durations are not tested."""

import pytest
from typer.testing import CliRunner

from unflaw import load
from unflaw.cli import app
from unflaw.imaging.reading import read
from unflaw.io.listing import list_images
from unflaw.runtime.bench import COMPUTED, measure, synthetic_jpegs, throughput

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("batch", [1, 3])
def test_stages_of_a_trained_detector_add_up(detector, parts, batch):
    stages = measure(detector, list_images(parts / "test"), batch=batch, rounds=4)
    assert {"decode", "prepare", "compute", *COMPUTED} <= stages.keys()
    assert ("inspect" in stages) == (batch == 1)
    for name, stage in stages.items():
        assert len(stage.clock) == len(stage.processor) == 4, name
        assert min(stage.clock) > 0
    for i in range(4):
        assert sum(stages[piece].clock[i] for piece in COMPUTED) == pytest.approx(stages["compute"].clock[i])
    assert not detector.network._forward_hooks and not detector.network.features._forward_hooks


def test_an_exported_detector_has_one_compute_stage(exported, parts):
    found = load(exported, threads=1)
    assert list(measure(found, list_images(parts / "test"), batch=1, rounds=1)) == [
        *("decode", "prepare", "compute", "inspect"),
    ]
    assert throughput(found, list_images(parts / "test"), 10) > 0


def test_synthetic_jpegs_images_can_be_read_and_differ():
    images = [read(content) for content in synthetic_jpegs(2, 64)]
    assert images[0].shape == (64, 64, 3) and (images[0] != images[1]).any()
    assert synthetic_jpegs(2, 64) == synthetic_jpegs(2, 64)


def test_the_command(saved, exported, parts):
    result = CliRunner().invoke(app, ["bench", str(saved), str(exported), "--data", str(parts), "--rounds", "1"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "1 thread, 1 round, 8 images"
    assert sum(line.startswith("| parts.onnx | 1 |") for line in lines) == 4
    assert sum(line.startswith("| parts.safetensors | 32 |") for line in lines) == 6
    assert sum(line.endswith("images/s, files to results") for line in lines) == 2
