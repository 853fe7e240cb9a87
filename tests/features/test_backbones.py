"""Two backbones that see the same image."""

import numpy as np
import pytest
import torch

import unflaw
from unflaw.cli.common import weights_of
from unflaw.config import Features, Weights
from unflaw.detector import Detector
from unflaw.experiments.grid import Grid, _beside, _names_and_weights, _weight_source, plan
from unflaw.features.backbones import WeightsError
from unflaw.features.extractor import FeatureExtractor

pytestmark = pytest.mark.slow
SECOND = "tf_efficientnet_lite0"
BOTH = f"resnet18+{SECOND}"


def extractor(name: str, weights=Weights.RANDOM, **changes) -> FeatureExtractor:
    torch.manual_seed(0)
    return FeatureExtractor(Features(backbone=name, grid=4, **changes), weights)


@pytest.fixture(scope="module")
def images():
    return torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_features_of_both_lie_beside_each_other(images, weights):
    """Each image normalised as each backbone wants it."""
    both = extractor(BOTH, {"resnet18": weights, SECOND: None})
    raw = both.aggregate(images)
    alone = [extractor("resnet18", weights).aggregate(images), extractor(SECOND, None).aggregate(images)]
    torch.testing.assert_close(raw, torch.cat(alone, dim=1))
    assert sum(both.level_channels) == raw.shape[1] and len(both.level_channels) == 6


def test_both_have_the_same_share(images, weights):
    both = extractor(BOTH, {"resnet18": weights}, components=None)
    raw = both.aggregate(images)
    energy = both.fit(raw).project(raw).square().mean((0, 2, 3)).split(both.level_channels)
    shares = torch.stack([part.sum() for part in energy])
    torch.testing.assert_close(shares, torch.full((6,), 1 / 6), atol=1e-3, rtol=0)


def test_regions_are_of_the_coarsest_level_of_each(images, weights):
    both = extractor(BOTH, {"resnet18": weights}, components=None)
    raw = both.aggregate(images)
    features = both.fit(raw).project(raw)
    levels = features.split(both.level_channels, dim=1)
    coarsest = torch.cat([levels[2], levels[5]], dim=1)
    pooled = torch.nn.functional.avg_pool2d(coarsest, 2).square().sum(1)
    found = both.to_regions(features).square().sum(1)
    assert (found <= pooled + 1e-4).all() and found.mean() > 0.5 * pooled.mean()  # 64 components of them
    moved = features.clone()
    for part in (0, 1, 3, 4):
        moved.split(both.level_channels, dim=1)[part].add_(1)
    torch.testing.assert_close(both.to_regions(moved), both.to_regions(features), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (BOTH, "FILE", r"of which of resnet18, tf_efficientnet_lite0\?.*--weights resnet18=FILE"),
        (BOTH, {"resnet34": "FILE"}, "weights of resnet34, which is none of the backbones resnet18, tf_eff"),
        ("resnet18+resnet18", Weights.RANDOM, "named twice"),
        ("resnet18+resnet19", Weights.RANDOM, "timm has no backbone 'resnet19'"),
        ("resnet18+", Weights.RANDOM, "timm has no backbone ''"),
    ],
)
def test_what_is_wrong_with_them_is_said(name, source, message):
    with pytest.raises(WeightsError, match=message):
        extractor(name, source)


def test_a_detector_with_both(parts, weights, tiny, tmp_path):
    """From training to one graph."""
    from unflaw.runtime.export import export

    config = tiny("nearest_neighbor", **{"features.backbone": BOTH})
    detector = Detector(config=config, weights={"resnet18": weights}).fit(parts)
    assert detector.record_["weights"] == f"resnet18={weights}"
    path = parts / "test/square/000.png"
    bad = detector.inspect(path)
    assert bad.verdict == "defect"
    detector.save(tmp_path / "both.safetensors")
    again = unflaw.load(tmp_path / "both.safetensors").inspect(path)
    assert again.score == bad.score and np.array_equal(again.map, bad.map)
    other = unflaw.load(export(detector, tmp_path / "both.onnx")).inspect(path)
    assert other.score == pytest.approx(bad.score, rel=2e-3)
    from unflaw.experiments.feature_store import ExperimentRunner

    stored = ExperimentRunner(tmp_path / "features", {"resnet18": weights}).fit(config, unflaw.load_dataset(parts))
    assert stored.calibration_.threshold == pytest.approx(detector.calibration_.threshold, rel=1e-3)


def test_weights_on_the_command_line():
    assert weights_of(None, "resnet18") is None and weights_of([], BOTH) is None
    assert weights_of(["a=b.pth"], "resnet18") == "a=b.pth"  # a file of that name
    assert weights_of(["a.pth", "b.pth"], "resnet18") == "b.pth"  # the last one, as with other options
    assert weights_of(["random"], BOTH) is Weights.RANDOM
    assert weights_of(["resnet18=a.pth"], BOTH) == {"resnet18": "a.pth"}
    assert weights_of(["resnet18=random", f"{SECOND}=b"], BOTH) == {"resnet18": Weights.RANDOM, SECOND: "b"}
    with pytest.raises(ValueError, match=r"--weights b\.pth: of several, each needs its backbone, as in resnet18=FILE"):
        weights_of(["resnet18=a.pth", "b.pth"], BOTH)


def test_both_in_a_grid(parts, weights, tmp_path, tiny):
    assert _names_and_weights(BOTH) == (BOTH, "")
    assert _names_and_weights(f"resnet18=a.pth+{SECOND}") == (BOTH, "resnet18=a.pth")
    assert _weight_source("resnet18=a.pth", BOTH) == {"resnet18": "a.pth"}
    odd = tmp_path / "a+b.pth"
    odd.write_bytes(b"")
    assert _names_and_weights(f"resnet18={odd}") == ("resnet18", str(odd))  # a file with a + in its name
    (tmp_path / "w.pth").write_bytes(b"")
    assert _beside(tmp_path, "backbones", f"resnet18=w.pth+{SECOND}") == f"resnet18={tmp_path / 'w.pth'}+{SECOND}"
    grid = Grid(methods=["nearest_neighbor"], data=[parts], backbones=[f"resnet18={weights}+{SECOND}"], seeds=1)
    (run,) = plan(grid, [unflaw.load_dataset(parts)])
    assert run.backbone == BOTH and run.weights == {"resnet18": str(weights)}
    peers = grid.model_copy(update={"peers": {"patchcore": {}}})
    with pytest.raises(ValueError, match="anomalib's methods take one"):
        plan(peers, [unflaw.load_dataset(parts)])
