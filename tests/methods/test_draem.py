import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from unflaw.config import make_config
from unflaw.detector import Detector
from unflaw.methods import draem
from unflaw.methods.draem import DRAEM, UNet, augment, focal_loss
from unflaw.methods.feature_set import FeatureSet
from unflaw.methods.layers import ssim_map
from unflaw.methods.synthesis import synthesise

pytestmark = pytest.mark.slow

SIDE = 64


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=rng(seed))


def network(tiny, **changes) -> DRAEM:
    torch.manual_seed(0)
    made = DRAEM(tiny("draem", **changes)).eval()
    made.fit_memory(FeatureSet.of(rand(4, 3, SIDE, SIDE).half(), textures=rand(5, 3, SIDE, SIDE, seed=1)), rng())
    return made


# The networks


@pytest.mark.parametrize("skips", [False, True])
def test_a_network_gives_back_the_side_and_halves_as_often_as_asked(skips):
    made = UNet(3, 2, 4, 3, skips)
    assert made(rand(2, 3, 24, 16)).shape == (2, 2, 24, 16)
    widths = [block[1][0].out_channels for block in made.encoder]
    assert widths == [4, 8, 16, 32]
    assert [block[1][0].out_channels for block in UNet(3, 2, 4, 5, skips).encoder] == [4, 8, 16, 32, 32, 32]
    deepest: list[Tensor] = []
    made.encoder[-1].register_forward_hook(lambda module, inputs, output: deepest.append(output))
    made(rand(2, 3, 24, 16))
    assert deepest[0].shape == (2, 32, 3, 2)


def test_without_skips_all_passes_the_bottleneck():
    torch.manual_seed(0)  # a network may happen to pass nothing on
    for skips in (False, True):
        made = UNet(3, 2, 4, 3, skips).eval()
        made.encoder[-1].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        first, second = made(rand(1, 3, 16, 16)), made(rand(1, 3, 16, 16, seed=1))
        assert torch.equal(first, second) != skips


def test_the_discriminative_network_sees_image_and_reconstruction(tiny):
    made, images = network(tiny), rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        restored = made.reconstructive(images)
        expected = made.discriminative(torch.cat([restored, images], dim=1)).softmax(1)[:, 1:]
        found = made(images)
    assert torch.equal(found.anomaly_maps, expected) and torch.equal(found.restored, restored)
    assert found.anomaly_maps.shape == (2, 1, SIDE, SIDE)
    assert found.anomaly_maps.min() >= 0 and found.anomaly_maps.max() <= 1


# The losses


def test_focal_loss_by_hand():
    """p = 3/4 for the true class at one pixel and 1/4 at the other."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(3)]]).view(1, 2, 1, 2)
    mask = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    expected = (0.25**2 * -math.log(0.75) + 0.75**2 * -math.log(0.25)) / 2
    assert focal_loss(logits, mask).item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_the_sum_of_its_terms(tiny, monkeypatch):
    monkeypatch.setattr(draem, "augment", lambda texture, rng: texture)
    made, clean = network(tiny), rand(4, 3, SIDE, SIDE)
    with torch.no_grad():
        terms = made.loss({"features": clean}, rng(6))
        same = rng(6)
        drawn = torch.randint(5, (4,), generator=same)
        anomalies = synthesise(clean, made.textures[drawn], made.options.synthesis, same)
        restored = made.reconstructive(anomalies.features)
        logits = made.discriminative(torch.cat([restored, anomalies.features], dim=1))
    similarity = torch.stack([ssim_map(restored[:, c : c + 1], clean[:, c : c + 1]) for c in range(3)])
    expected = {"l2": (restored - clean).square().mean(), "ssim": 1 - similarity.mean()}
    expected["focal"] = focal_loss(logits, anomalies.mask)
    assert anomalies.mask.any()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert terms["loss"].item() == pytest.approx(sum(value.item() for value in expected.values()), rel=1e-4)


# Anomalies


def test_anomalies_are_textures_alone(tiny):
    config = tiny("draem").network.synthesis
    assert (config.others, config.shuffles, config.jitter) == (0, 0, 0) and config.textures > 0
    clean, texture = torch.zeros(64, 3, 32, 32), torch.ones(1, 3, 32, 32)
    anomalies = synthesise(clean, texture, config, rng())
    shown = (anomalies.features * anomalies.mask).amax((1, 2, 3))
    assert torch.equal(anomalies.features > 0, (anomalies.mask > 0).expand_as(clean))
    assert (shown == 0).float().mean() == pytest.approx(0.5, abs=0.2)  # half of the images stay clean
    assert 0.1 <= shown[shown > 0].min() < 0.3 and 0.8 < shown.max() <= 1
    changed = make_config("draem", "cpu", {"network.synthesis.clean": 0.2}).network.synthesis
    assert changed.clean == 0.2 and changed.others == 0  # the rest stays DRAEM's


def test_textures_are_augmented_within_range():
    texture = rand(3, 32, 32)
    seen = torch.stack([augment(texture, rng(seed)) for seed in range(60)])
    assert seen.shape == (60, 3, 32, 32) and seen.min() >= 0 and seen.max() <= 1 and seen.isfinite().all()
    assert len({image.numpy().tobytes() for image in seen}) == 60
    assert torch.equal(augment(texture, rng(3)), seen[3])


@pytest.mark.parametrize("alter", draem._ALTERATIONS, ids=lambda alter: alter.__name__)
@pytest.mark.parametrize("amount", [0.0, 0.999])
def test_every_alteration_of_a_flat_texture_is_finite(alter, amount):
    for level in (0.0, 0.5, 1.0):
        assert alter(torch.full((3, 16, 16), level), amount).isfinite().all()


def test_alterations_by_hand():
    x = torch.tensor([0.0, 0.2, 0.6, 1.0]).expand(3, 1, 4)
    torch.testing.assert_close(draem._posterise(x, 0.0)[0, 0], torch.tensor([0.0, 0, 1, 1]))
    torch.testing.assert_close(draem._solarise(x, 0.5)[0, 0], torch.tensor([0.0, 0.2, 0.4, 0]))
    torch.testing.assert_close(draem._equalise(x, 0.5)[0, 0], torch.tensor([0.0, 0.25, 0.5, 0.75]))
    torch.testing.assert_close(draem._stretch(0.5 * x, 0.5), x)
    torch.testing.assert_close(draem._recolour(x, 0.7), x)  # grey stays grey


def test_it_trains_without_textures(tiny):
    made = network(tiny, **{"network.synthesis.textures": 0.0, "network.synthesis.others": 1.0})
    made.textures = None
    assert not made.uses_textures and network(tiny).uses_textures
    assert made.loss({"features": rand(4, 3, SIDE, SIDE)}, rng())["loss"].isfinite()


# Settings


@pytest.mark.parametrize("size, side, grid, window", [(256, None, 256, 21), (256, 128, 128, 11), (64, 128, 64, 7)])
def test_it_works_at_the_side_asked_for_and_judges_by_the_published_share(size, side, grid, window):
    changes = {"preparation.size": size, "network.side": side, "network.reconstructive": 1, "network.discriminative": 1}
    made = DRAEM(make_config("draem", "cpu", changes)).eval()
    assert made.features.shape == (grid, grid) and made.window == window
    with torch.no_grad():
        features = made.embed(rand(1, 3, size, size))
        maps, scores = made.fuse(made(features))
    assert features.shape == (1, 3, grid, grid) and maps.shape == (1, size, size) and scores.isfinite().all()


def test_a_side_that_cannot_be_halved_is_named(tiny):
    with pytest.raises(ValueError, match=r"side of 80 pixels.*halved 5 times.*multiple of 32.*network\.side"):
        DRAEM(tiny("draem", **{"network.side": 80, "preparation.size": 96}))


def test_the_paper_profile_has_the_published_widths():
    options = make_config("draem", "paper").network
    assert (options.reconstructive, options.discriminative, options.side) == (128, 64, None)
    assert make_config("draem", "paper", {"network.reconstructive": 8}).network.reconstructive == 8


# With everything around it


def test_it_finds_an_obvious_defect_and_is_saved_whole(parts, tiny, tmp_path):
    made = Detector(config=tiny("draem", **{"training.steps": 120, "training.learning_rate": 3e-3})).fit(parts)
    bad, good = (sorted((parts / "test" / name).iterdir()) for name in ("square", "good"))
    results = {path: made.inspect(path) for path in bad + good}
    assert min(results[path].score for path in bad) > max(results[path].score for path in good)
    assert made.display is None and results[bad[0]].layers["restored"].shape == (SIDE, SIDE, 3)
    made.save(tmp_path / "parts.safetensors")
    assert Detector.load(tmp_path / "parts.safetensors").inspect(bad[0]).score == results[bad[0]].score


def test_the_same_seed_gives_the_same_detector_of_padded_images_too(parts, tiny, tmp_path):
    config = tiny("draem", **{"training.steps": 3, "preparation.fit": "pad"})
    made, again = Detector(config=config).fit(parts), Detector(config=config).fit(parts)
    wide = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    result = made.inspect(wide)
    assert result.valid == (0, 16, 64, 48) and math.isfinite(result.score)
    assert again.inspect(wide).score == result.score and again.calibration_ == made.calibration_
    made.save(tmp_path / "parts.safetensors")
    loaded = Detector.load(tmp_path / "parts.safetensors").fit(parts)  # a loaded detector learns again
    assert loaded.calibration_ == made.calibration_
