"""Methods of anomalib, replaced by a stand-in of its models if anomalib is not installed.

With UNFLAW_ANOMALIB_PYTHON, the interpreter of an environment that has anomalib, the real methods run too.
"""

import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.conftest import make_parts
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import Dataset, load_dataset
from unflaw.errors import TrainingError
from unflaw.evaluation.metrics import PixelAccumulator, image_metrics
from unflaw.imaging.reading import read, read_mask
from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import prepare, prepare_mask
from unflaw.peers import PeerError, run_peer

pytestmark = pytest.mark.slow

SMALL = Preparation(size=64)
STAND_IN = '''
from types import SimpleNamespace
import timm, torch


class Model(torch.nn.Module):
    """Model with brightness as its anomaly map."""

    def __init__(self, backbone, layers):
        super().__init__()
        self.layers, self.seen = layers, 0
        self.feature_extractor = torch.nn.Module()
        names = [level["module"] for level in timm.create_model(backbone, features_only=True).feature_info.info]
        indices = [names.index(layer) for layer in layers]
        self.feature_extractor.feature_extractor = timm.create_model(backbone, features_only=True, out_indices=indices)

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        else:
            bright = x.mean(1)
            return SimpleNamespace(anomaly_map=bright[:, None], pred_score=bright.amax((1, 2)))


class Patchcore:
    def __init__(self, backbone, layers=("layer2", "layer3"), pre_trained=True, pre_processor=None, post_processor=None,
                 evaluator=None, visualizer=None, coreset_sampling_ratio=0.1, num_neighbors=9):
        self.model = Model(backbone, list(layers))

    @staticmethod
    def configure_pre_processor(size):
        return size

    def fit(self):
        self.model.memory_bank = torch.zeros(self.model.seen, 3)
'''


def interpreter(folder, package):
    """Make an executable that runs this Python with a package of the given files in place of anomalib."""
    for name, text in package.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    package = {"anomalib/__init__.py": "__version__ = '0'", "anomalib/models/__init__.py": STAND_IN}
    return interpreter(tmp_path_factory.mktemp("peer"), package)


@pytest.fixture(scope="module")
def dataset(parts):
    return load_dataset(parts)


def test_a_peer_sees_our_images_and_is_measured_by_our_metrics(python, dataset, weights, tmp_path):
    done = run_peer(python, "patchcore", dataset, SMALL, weights=weights, out=tmp_path / "out", spool=True)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels, scores = PixelAccumulator(), []
    for sample, anomaly_map in zip(dataset.test, done.maps, strict=True):
        image = prepare(read(sample.path), SMALL).pixels.transpose(1, 2, 0)
        expected = ((image - mean) / deviation).mean(2)
        assert np.allclose(anomaly_map, expected, atol=1e-5)
        pixels.update(anomaly_map, prepare_mask(read_mask(sample.mask), SMALL) if sample.mask else None)
        scores.append(float(anomaly_map.max()))
    metrics = done.evaluation.metrics
    labels = [sample.label for sample in dataset.test]
    for name, value in (pixels.compute() | image_metrics(scores, labels)).items():
        assert metrics[name] == pytest.approx(value)
    assert done.record["memory_bank"] == [len(dataset.train), 3]  # all good images: none is held out
    assert done.record["layers"] == ["layer2", "layer3"] and done.record["images"] == [12, 8]
    assert done.evaluation.images.names == [f"{sample.path.parent.name}/{sample.path.name}" for sample in dataset.test]
    assert json.loads((tmp_path / "out/record.json").read_text()) == done.record
    assert "verdict" not in done.evaluation.rows[0]


def test_images_that_cannot_be_read_are_named_and_skipped(python, weights, tmp_path):
    root = make_parts(tmp_path / "parts")
    for name in ("train/good/001.png", "test/square/002.png"):
        (root / name).write_bytes(b"no image")
    done = run_peer(python, "patchcore", load_dataset(root), SMALL, weights=weights)
    assert [Path(path).name for path, _ in done.evaluation.skipped] == ["001.png", "002.png"]
    assert done.record["images"] == [11, 7] and len(done.maps) == len(done.evaluation.rows) == 7


def test_errors_give_the_reason(python, dataset, weights, tmp_path):
    def refused(match, error=PeerError, *, python=python, method="patchcore", data=dataset, **options):
        with pytest.raises(error, match=match):
            run_peer(python, method, data, SMALL, weights=weights, **options)

    refused("there is no peer 'patchcor'; choose from patchcore, padim", method="patchcor")
    refused("cannot be started .*To make one: python3 -m venv", python=tmp_path / "nothing")
    refused("has no anomalib that can be imported", python=interpreter(tmp_path / "bare", {"other.py": ""}))
    refused("patchcore has no options", options={"depth": 3})
    refused("ResNet|resnet18 has no layer|level", (PeerError, ValueError, RuntimeError), levels=(9,))
    broken = {
        "anomalib/__init__.py": "__version__ = '0'",
        "anomalib/models/__init__.py": STAND_IN + "\nraise OSError('no room')",
    }
    refused("anomalib failed; its last lines:(.|\n)*no room", python=interpreter(tmp_path / "broken", broken))
    refused("there are no training images", TrainingError, data=Dataset("x", "folder", (), (), dataset.test, ()))


def test_maps_that_are_not_finite_are_refused(dataset, weights, tmp_path):
    text = STAND_IN.replace("bright = x.mean(1)", "bright = x.mean(1) / 0")
    package = {"anomalib/__init__.py": "__version__ = '0'", "anomalib/models/__init__.py": text}
    with pytest.raises(PeerError, match="NaN or infinite"):
        run_peer(interpreter(tmp_path, package), "patchcore", dataset, SMALL, weights=weights)


def test_peers_have_rows_in_the_table_of_a_benchmark(python, parts, weights, tmp_path):
    command = [
        "benchmark",
        "--data",
        str(parts),
        "--method",
        "memae",
        "--backbone",
        f"resnet18={weights}",
        "--size",
        "64",
    ]
    command += ["--seeds", "1", "--set", "training.steps=2", "--set", "network.widths=[8, 8]", "--out", str(tmp_path)]
    peer = ["--peer", "patchcore: coreset_sampling_ratio=0.5", "--peer-python", str(python)]
    result = CliRunner().invoke(app, [*command, *peer])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["method"], row["backbone"], row["n"]) for row in rows] == [
        ("memae", "", 1),
        ("anomalib patchcore", "resnet18", 1),
    ]
    assert rows[1]["memory"]["median"] > 0.1 and rows[1]["latency_1"]["median"] > 0
    lacking = CliRunner().invoke(app, [*command, "--peer", "padim"])
    assert lacking.exit_code == 2 and "peers need --peer-python" in lacking.output
    unknown = CliRunner().invoke(app, [*command, "--peer", "padimm", *peer[2:]])
    assert unknown.exit_code == 2 and "unknown peer 'padimm'" in unknown.output


@pytest.mark.parametrize(
    ("method", "options"),
    [("padim", {"n_features": 8}), ("patchcore", {}), ("reverse_distillation", {"steps": 2, "batch": 4})],
)
def test_the_real_anomalib(method, options, dataset, weights):
    python = os.environ.get("UNFLAW_ANOMALIB_PYTHON")
    if not python:
        pytest.skip("needs UNFLAW_ANOMALIB_PYTHON, an interpreter that has anomalib")
    done = run_peer(python, method, dataset, SMALL, weights=weights, options=options)
    assert done.maps.shape == (8, 64, 64) and 0 <= done.evaluation.metrics["image_auroc"] <= 1
    again = run_peer(python, method, dataset, SMALL, weights=weights, options=options)
    assert np.array_equal(done.maps, again.maps)  # seeded
    assert Image.fromarray(done.maps[0]).size == (64, 64)
