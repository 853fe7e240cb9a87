"""Plain vision transformers as backbones: any canvas, positions resampled. Their weights cannot be had here."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import unflaw
from unflaw.config import Features, Weights, make_config
from unflaw.detector import Detector
from unflaw.features.backbones import create_backbone, patch_of, patched_shape
from unflaw.features.extractor import FeatureExtractor

DINOV2 = "vit_small_patch14_reg4_dinov2"
DINOV3 = "vit_tiny_patch16_dinov3_qkvb"
PLAIN = "vit_tiny_patch16_224"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[DINOV2, DINOV3, PLAIN])
def transformer(request, tmp_path_factory):
    """Its name, the model of timm, and a file with its random weights for images of its usual size."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, pretrained=False).eval()
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return request.param, model, path


def config(name: str, **changes) -> Features:
    return Features(backbone=name, levels=(2, 5), level_weights=(1.0, 1.0), **{"grid": 4, "smooth": 1, **changes})


@pytest.mark.parametrize("canvas", [(112, 112), (224, 112), (100, 70)])
def test_any_canvas_is_cut_into_patches(transformer, canvas):
    name, _, path = transformer
    extractor = FeatureExtractor(config(name), path, canvas)
    patch = patch_of(extractor.backbone)
    assert patch == (14 if "patch14" in name else 16)
    images = torch.rand(2, 3, *canvas[::-1], generator=torch.Generator().manual_seed(0))
    raw = extractor.aggregate(images)
    rows, columns = extractor.shape
    assert raw.shape == (2, sum(extractor.level_channels), rows, columns) and raw.isfinite().all()
    assert min(rows, columns) == 4 and (rows < columns) == (canvas[1] * 2 <= canvas[0])
    height, width = patched_shape(canvas, patch)
    with torch.no_grad():
        shown = extractor.backbone(torch.rand(1, 3, height, width))
    assert [tuple(level.shape[2:]) for level in shown] == [(height // patch, width // patch)] * 2


def test_levels_are_blocks_of_the_whole_model(transformer):
    """By timm's own way to look into it, at its own size and at another one with resampled positions."""
    name, model, path = transformer
    patch = model.patch_embed.patch_size[0]
    for side in (model.patch_embed.img_size[0] if name == PLAIN else 8 * patch, 10 * patch):
        whole = timm.create_model(name, pretrained=False, dynamic_img_size=True).eval()
        whole.load_state_dict(model.state_dict())
        images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = whole.forward_intermediates(images, indices=[2, 5], intermediates_only=True, output_fmt="NCHW")
            found = create_backbone(name, (2, 5), path, (side, side)).eval()(images)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_weights_of_another_transformer_are_refused(transformer, tmp_path):
    from unflaw.features.backbones import WeightsError

    name, model, _ = transformer
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("blocks.3.")}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=rf"part\.safetensors: does not hold .* of {name}"):
        create_backbone(name, (2, 5), tmp_path / "part.safetensors", (112, 112))


@pytest.mark.parametrize("name", [DINOV2, DINOV3])
def test_a_detector_from_training_to_the_graph(name, parts, tiny, tmp_path):
    from unflaw.runtime.export import export

    changes = {
        "features.backbone": name,
        "features.levels": (2, 5),
        "features.level_weights": (1.0, 1.0),
        "preparation.size": (140, 112),
    }
    detector = Detector(config=tiny("nearest_neighbor", **changes), weights=Weights.RANDOM).fit(parts)
    path = parts / "test/square/000.png"
    bad = detector.inspect(path)
    assert bad.map.shape == (112, 140) and np.isfinite(bad.map).all()
    detector.save(tmp_path / "vit.safetensors")
    again = unflaw.load(tmp_path / "vit.safetensors").inspect(path)
    assert again.score == bad.score and np.array_equal(again.map, bad.map)
    other = unflaw.load(export(detector, tmp_path / "vit.onnx")).inspect(path)
    assert other.score == pytest.approx(bad.score, rel=2e-3, abs=2e-3)
    np.testing.assert_allclose(other.map, bad.map, atol=2e-2)


@pytest.mark.parametrize("method", ["uranet", "mfrnet", "nearest_neighbor"])
def test_the_dino_profile_has_a_cell_for_each_patch(method):
    made = make_config(method, "dino")
    assert made.features.backbone == "vit_small_patch14_reg4_dinov2.lvd142m" and timm.is_model(made.features.backbone)
    assert made.preparation.size == 14 * made.features.grid
    blocks = timm.create_model(DINOV2, pretrained=False, features_only=True, out_indices=made.features.levels)
    assert blocks.feature_info.channels() == [384] * 3
    assert made.training == make_config(method, "cpu").training


def test_convolutions_are_not_cut():
    assert patch_of(create_backbone("resnet18", (1, 2), Weights.RANDOM)) is None
    assert patched_shape((256, 256), 14) == (252, 252) and patched_shape((5, 30), 14) == (28, 14)
