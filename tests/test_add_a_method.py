"""The page docs/add-a-method.md: its code is a method with which everything else works."""

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import TINY
from torch import Tensor

from unflaw import registry
from unflaw.config import make_config
from unflaw.datasets import load_dataset
from unflaw.detector import Detector
from unflaw.errors import DetectorError
from unflaw.evaluation.evaluate import evaluate
from unflaw.experiments.variants import choose
from unflaw.methods import FeatureSet, create
from unflaw.runtime.export import export

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "add-a-method.md"
CODE = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)[1]
SMALL = {name: value for name, value in TINY.items() if not name.startswith(("network.", "training."))}


@pytest.fixture
def padim(tmp_path, monkeypatch):
    """The method of the page, imported from a file, and forgotten after the test."""
    (tmp_path / "padim.py").write_text(CODE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.delitem(sys.modules, "padim", raising=False)
    import padim

    yield padim
    del sys.modules["padim"]


def test_it_is_one_short_file():
    assert CODE.count("\n") < 100


def test_its_map_is_the_mahalanobis_distance(padim, weights):
    config = make_config("padim", changes=SMALL | {"network.components": 4})
    method = create(config, weights)
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(40, method.features.channels, 8, 8, generator=rng) * torch.rand(1, 8, 8, generator=rng)
    method.fit_memory(FeatureSet.of(features.half()), rng)
    found = method(features[:3]).anomaly_maps
    y, x = 5, 2
    cell = features.half().float()[:, :4, y, x].double().numpy()
    every = features.half().float()[:, :4].flatten(2).double().numpy()
    variance = np.mean([np.cov(every[..., i].T).diagonal() for i in range(64)])
    covariance = np.cov(cell.T) + config.network.shrinkage * variance * np.eye(4)
    apart = features[:3, :4, y, x].double().numpy() - cell.mean(0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", apart, np.linalg.inv(covariance), apart))
    np.testing.assert_allclose(found[:, 0, y, x].numpy(), expected, rtol=1e-3)


def test_everything_works_with_it(padim, parts, weights, tmp_path):
    """Training, calibration, evaluation, files, export, variants."""
    detector = Detector(config=make_config("padim", changes=SMALL), weights=weights).fit(parts)
    metrics = evaluate(detector, load_dataset(parts), shown=0).metrics
    assert metrics["image_auroc"] > 0.7 and metrics["pixel_auroc"] > 0.7
    detector.save(tmp_path / "d.safetensors")
    image = sorted((parts / "test/square").iterdir())[0]
    expected = detector.inspect(image)
    assert Detector.load(tmp_path / "d.safetensors").inspect(image).score == expected.score
    import unflaw

    exported = unflaw.load(export(Detector.load(tmp_path / "d.safetensors"), tmp_path / "d.onnx"))
    assert exported.inspect(image).score == pytest.approx(expected.score, abs=1e-3)
    (_, ten) = choose("padim")
    assert ten.config("padim", SMALL, 0).network.components == 10
    registry._registered.clear()
    with pytest.raises(DetectorError, match=r"d\.safetensors.*unknown method 'padim'.*has to be installed"):
        Detector.load(tmp_path / "d.safetensors")
    assert unflaw.load(tmp_path / "d.onnx").inspect(image).score == exported.inspect(image).score


def test_its_images_are_cross_fitted_by_learning_anew(padim, parts, weights, monkeypatch):
    """It has no memory to leave an image out of: scores of images that it knows would give too optimistic a rate."""
    seen: list[int] = []
    whole = padim.PaDiM.fit_memory

    def spy(self, data: FeatureSet, rng) -> dict[str, Tensor]:
        seen.append(len(data.features))
        return whole(self, data, rng)

    monkeypatch.setattr(padim.PaDiM, "fit_memory", spy)
    config = make_config("padim", changes=SMALL | {"calibration.folds": 3})
    made = Detector(config=config, weights=weights).fit(parts)
    assert seen == [12, 8, 8, 8] and len(made.calibration_.scores) == 12
    known = [made.inspect(path).score for path in sorted((parts / "train/good").iterdir())]
    assert np.mean(made.calibration_.scores) > np.mean(known)


def test_an_installed_package_is_known_to_the_command_line(parts, weights, tmp_path):
    (tmp_path / "padim.py").write_text(CODE, "utf-8")
    (tmp_path / "padim-1.0.dist-info").mkdir()
    (tmp_path / "padim-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: padim\nVersion: 1.0\n")
    (tmp_path / "padim-1.0.dist-info/entry_points.txt").write_text("[unflaw.methods]\npadim = padim:PaDiM\n")
    settings = [part for name, value in SMALL.items() for part in ("--set", f"{name}={setting(value)}")]
    out = tmp_path / "d.safetensors"
    command = ["train", "--method", "padim", "--data", parts, "--weights", weights, "--out", out, *settings]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}

    def run(*arguments) -> str:
        call = [sys.executable, "-m", "unflaw", *map(str, arguments)]
        done = subprocess.run(call, check=False, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "padim" in run("train", "--help") and "ten-components" in run("ablate", "--method", "padim", "--list")
    run(*command)
    assert "padim" in run("info", out)
    assert "image_auroc" in run("evaluate", out, "--data", parts)


def setting(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def test_a_registration_that_cannot_work_is_named(padim, monkeypatch):
    with pytest.raises(ValueError, match=r"Thing\.options_class needs a name of its own"):
        registry.register(type("Thing", (), {}))
    entry = EntryPoint("other", "padim:PaDiM", registry.GROUP)
    gone = EntryPoint("gone", "no_such_module:Method", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry, gone])
    with pytest.raises(ValueError, match=r"method 'other': the entry point .* the name 'padim'; make them equal"):
        registry.method_class("other")
    with pytest.raises(ValueError, match=r"method 'gone': its package cannot be imported \(No module named"):
        registry.method_class("gone")
