from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from unflaw.errors import ImageError
from unflaw.imaging.tiling import Preparation
from unflaw.methods.synthesis import Synthesis, perlin, perlin_masks, synthesise, texture_files, texture_images

SOURCES = ("textures", "others", "shuffles", "jitter")
Draw = Callable[..., Tensor]


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def only(source: str, **changes: object) -> Synthesis:
    """One source of foreign features, at full strength, in every image."""
    weights = {name: float(name == source) for name in SOURCES}
    return Synthesis(**{"clean": 0.0, "strength": (1.0, 1.0), **weights, **changes})


@pytest.fixture
def features() -> Tensor:
    return torch.randn(6, 5, 16, 16, generator=rng(1))


@pytest.fixture
def textures() -> Tensor:
    return torch.randn(3, 5, 16, 16, generator=rng(2)) + 20


def test_perlin_noise_fills_its_range_and_never_leaves_it():
    for scale in range(6):
        noise = perlin(64, (32, 32), scale, rng(scale))
        assert noise.shape == (64, 32, 32)
        assert noise.abs().max() <= 1 + 1e-5
        assert noise.max() > 0.4 and noise.min() < -0.4
        assert noise.mean().abs() < 0.1


def test_perlin_noise_gets_finer_with_the_scale():
    steps = [perlin(64, (64, 64), scale, rng()).diff(dim=-1).abs().mean() for scale in (0, 2, 5)]
    assert 1.5 * steps[0] < steps[1] and 1.5 * steps[1] < steps[2]
    # at scale 0 a row crosses one cell of the lattice: a smooth curve with few turns, where its steps change sign
    turns = perlin(64, (64, 64), 0, rng()).diff(dim=-1).sign().diff(dim=-1) != 0
    assert turns.float().sum(-1).mean() < 4


def test_perlin_noise_is_a_function_of_the_generator_and_works_on_a_side_below_its_frequency():
    assert torch.equal(perlin(4, (16, 16), 5, rng(3)), perlin(4, (16, 16), 5, rng(3)))
    assert not torch.equal(perlin(4, (16, 16), 5, rng(3)), perlin(4, (16, 16), 5, rng(4)))
    assert perlin(8, (4, 4), 7, rng()).isfinite().all()


def test_perlin_noise_of_a_rectangle():
    noise = perlin(64, (16, 48), 3, rng())
    assert noise.shape == (64, 16, 48) and noise.abs().max() <= 1 + 1e-5 and noise.max() > 0.4
    slow = perlin(64, (16, 48), 0, rng())
    turns = [(slow.diff(dim=axis).sign().diff(dim=axis) != 0).float().sum(axis).mean() for axis in (1, 2)]
    assert max(turns) < 4  # one cell of the lattice across either side


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.99, 5.0])
@pytest.mark.parametrize("max_scale", [0, 5])
def test_masks_are_never_empty(threshold, max_scale):
    masks = perlin_masks(200, (16, 16), Synthesis(threshold=threshold, max_scale=max_scale), rng())
    assert masks.shape == (200, 1, 16, 16)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks.flatten(1).sum(1) >= 1).all()


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_alone_changes_what_the_mask_marks_and_nothing_else(features, textures, source):
    made = synthesise(features, textures, only(source), rng())
    inside = made.mask.expand_as(features).bool()
    assert made.mask.shape == (6, 1, 16, 16) and (made.mask.flatten(1).sum(1) > 0).all()
    assert torch.equal(made.features[~inside], features[~inside])
    assert (made.features - features).abs().sum(1)[made.mask[:, 0].bool()].median() > 0.5
    again = synthesise(features, textures, only(source), rng())
    assert torch.equal(made.features, again.features) and torch.equal(made.mask, again.mask)
    assert not torch.equal(made.mask, synthesise(features, textures, only(source), rng(1)).mask)


def test_opacity_mixes_foreign_features_in(features, textures):
    """F_a = (1 − M) ⊙ F + M ⊙ (β·T + (1 − β)·F): with T from β = 1, every other β is known."""
    full = synthesise(features, textures, only("textures"), rng())
    for beta in (0.0, 1e-4, 0.25, 0.7):
        part = synthesise(features, textures, only("textures", strength=(beta, beta)), rng())
        assert torch.equal(part.mask, full.mask)
        torch.testing.assert_close(part.features, features + beta * (full.features - features))
    assert torch.equal(synthesise(features, textures, only("textures", strength=(0.0, 0.0)), rng()).features, features)


def test_textures_come_from_the_bank(features, textures):
    made = synthesise(features, textures, only("textures"), rng())
    for i in range(len(features)):
        marked = made.mask[i, 0].bool()
        distances = [(made.features[i, :, marked] - texture[:, marked]).abs().max() for texture in textures]
        assert min(distances) < 1e-4


def test_other_images_and_shuffles_bring_real_features(features):
    for source, own in (("others", False), ("shuffles", True)):
        made = synthesise(features, None, only(source), rng())
        for i in range(len(features)):
            new = made.features[i, :, made.mask[i, 0].bool()].T  # (cells, C)
            pool = features[i : i + 1] if own else torch.cat([features[:i], features[i + 1 :]])
            cells = pool.transpose(0, 1).flatten(1).T
            exact = "donot_use_mm_for_euclid_dist"
            assert torch.cdist(new, cells, compute_mode=exact).amin(1).max() < 1e-5


def test_jitter_is_as_large_as_the_features(features):
    made = synthesise(7 * features, None, only("jitter", threshold=-2.0), rng())
    change = (made.features - 7 * features).pow(2).mean().sqrt()
    assert change == pytest.approx(7.0, rel=0.1)


def test_clean_images_stay_as_they_are(features, textures):
    made = synthesise(features, textures, Synthesis(clean=1.0), rng())
    assert torch.equal(made.features, features) and not made.mask.any()
    many = features.repeat(50, 1, 1, 1)
    made = synthesise(many, textures, Synthesis(clean=0.3), rng())
    clean = made.mask.flatten(1).sum(1) == 0
    assert clean.float().mean() == pytest.approx(0.3, abs=0.1)
    assert torch.equal(made.features[clean], many[clean])


@pytest.mark.parametrize("source", ["others", "shuffles", "jitter"])
def test_anomalies_name_the_image_they_come_from(source):
    constant = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 4, 8, 8).contiguous()  # tells from which image a cell is
    made = synthesise(constant, None, only(source, strength=(1.0, 1.0), clean=0.0), rng(1))
    assert made.origin.shape == (6,)
    if source == "others":
        whence = torch.where(made.mask.bool(), made.origin.view(-1, 1, 1, 1), torch.arange(6).view(-1, 1, 1, 1))
        assert torch.equal(made.features, whence.expand(6, 4, 8, 8).float())
    assert (made.origin == torch.arange(6)).all() == (source != "others")


def test_without_sources_nothing_is_made(features):
    made = synthesise(features, None, only("textures"), rng())  # no bank of textures, and nothing else is on
    assert torch.equal(made.features, features) and not made.mask.any()


def test_texture_images_come_from_a_folder_or_from_scikit_image(tmp_path):
    preparation = Preparation(size=32)
    for i in range(5):
        Image.new("RGB", (40, 50), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    found = texture_images(tmp_path, preparation)
    assert [p.shape for p in found] == [(3, 32, 32)] * 5
    assert [round(float(p[0].mean()) * 255) for p in found] == [0, 10, 20, 30, 40]
    assert [path.name for path in texture_files(tmp_path, limit=3)] == ["0.png", "1.png", "2.png"]
    packaged = texture_images(None, preparation)
    assert len(packaged) > 4 and all(p.shape == (3, 32, 32) for p in packaged)
    assert min(np.std(p) for p in packaged) > 0.02
    with pytest.raises(ImageError, match="nowhere"):
        texture_images(tmp_path / "nowhere", preparation)


def test_textures_have_no_region_of_interest():
    found = texture_images(None, Preparation(size=32, roi=(0, 600, 900, 900)))
    assert len(found) > 1 and found[0].shape == (3, 32, 32)
