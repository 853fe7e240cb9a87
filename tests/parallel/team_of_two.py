"""What `test_fabric` has two processes do, and does itself alone: python team_of_two.py DATA WEIGHTS OUT."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.conftest import OWN, TINY
from torch import Generator, Tensor, nn

from unflaw.config import Features, Training, Weights, make_config
from unflaw.detector import Detector
from unflaw.features.cache import build_cache
from unflaw.features.extractor import FeatureExtractor
from unflaw.imaging.reading import read
from unflaw.imaging.tiling import Preparation
from unflaw.io.listing import list_images
from unflaw.methods import create
from unflaw.parallel.shares import ALONE, Share, Team
from unflaw.training import loop as training
from unflaw.training.loop import optimise

METHODS = ("uranet", "mfrnet", "memae", "nearest_neighbor")
SETTINGS = Training(batch=7, learning_rate=0.05, precision="float32", checkpoint_seconds=0)


class Curve(nn.Module):
    """A small network whose loss has a mean, a quotient of sums, noise, and, if wanted, batch normalisation."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        norm = nn.BatchNorm2d(4) if normalised else nn.Identity()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, 1, 3)).double()

    def loss(self, data: Tensor, indices: Tensor, rng: Generator, share: Share) -> dict[str, Tensor]:
        x = data[share.take(indices)]
        noise = 0.1 * share.randn((len(x), 2, 8, 8), rng).to(x)
        p = self.layers(x + noise).sigmoid()
        quotient = share.total((p * x[:, :1, 2:-2, 2:-2]).sum()) / (share.total(p.sum()) + 1)
        error = (p - x.square().mean(1, keepdim=True)[:, :, 2:-2, 2:-2]).square().mean()
        return {"loss": error + 0.3 * quotient, "error": error}


def loop(team: Team, normalised: bool = False, accumulate: int = 1) -> dict[str, Any]:
    curve, data = Curve(normalised), torch.randn(20, 2, 8, 8, generator=Generator().manual_seed(1)).double()
    settings = SETTINGS.model_copy(update={"accumulate": accumulate})
    history = optimise(curve, lambda *given: curve.loss(data, *given), 20, 25, settings, team=team)
    return {"history": [list(terms.values()) for terms in history], **curve.state_dict()}


def cached(team: Team, data: Path, tile: int | None = None) -> dict[str, Any]:
    torch.manual_seed(2)
    extractor = FeatureExtractor(Features(backbone="resnet18", grid=8, components=8), Weights.RANDOM)
    paths = [*list_images(data / "train/good"), data / "none.png", *list_images(data / "test/good")]
    cache = build_cache(extractor, paths, Preparation(size=32, tile=tile), 1e9, batch=4, team=team)
    found = {"features": cache.features, "thumbnails": cache.thumbnails, "described": cache.described}
    return found | {"paths": list(map(str, cache.paths)), "skipped": cache.skipped, "basis": extractor.basis}


def fitted(team: Team, method: str, data: Path, weights: Path, **changes: Any) -> dict[str, Any]:
    own = TINY | OWN[method] | {"training.precision": "float32", "training.display_steps": 0}
    given = (
        [read(path) for path in list_images(data / "train/good")] if method == "nearest_neighbor" else data
    )  # arrays, too
    detector = Detector(config=make_config(method, "cpu", own | changes), weights=weights).fit(given, team=team)
    calibration = detector.calibration_
    assert calibration is not None
    return {"scores": torch.tensor(calibration.scores), **detector.network.state_dict()}


def gradients(team: Team, method: str) -> dict[str, Any]:
    """Of the first step of training on noise, and the terms of the loss; in double precision, even inside."""
    torch.manual_seed(4)
    network, settings = create(make_config(method, "cpu", TINY | OWN[method]), Weights.RANDOM), SETTINGS
    rng, device = Generator().manual_seed(6), team.device
    images, textures = (torch.rand(n, 3, 64, 64, generator=rng).double() for n in (7, 3))
    network.setup(images, textures, rng)

    def loss(indices: Tensor, rng: Generator, share: Share) -> dict[str, Tensor]:
        return network.loss({"features": images[indices].to(device)}, rng, share)

    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], settings.learning_rate)
    network.double().train()
    with mock.patch.object(Tensor, "float", Tensor.double), team.engine(network, optimiser, loss, False) as engine:
        terms = training._gradients(engine, torch.arange(7), Generator().manual_seed(7), 1, team)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"terms": torch.tensor(list(terms.values()))} | gradients


def failure(team: Team) -> str:
    """What a fault of the first process alone is to all."""

    def work() -> None:
        raise ValueError("cannot be read")

    try:
        team.first(work)
    except ValueError as error:
        return str(error)
    return ""


def everything(team: Team, data: Path, weights: Path) -> dict[str, Any]:
    return {
        "loop": loop(team),
        "loop, accumulated": loop(team, accumulate=2),
        "loop, normalised": loop(team, normalised=True),
        "cache": cached(team, data),
        "cache, tiles": cached(team, data, 40),
        **{f"{method}, gradients": gradients(team, method) for method in ("draem", "memae")},
        **{method: fitted(team, method, data, weights) for method in METHODS},
        "crossed": fitted(team, "uranet", data, weights, **{"calibration.folds": 2, "training.steps": 2}),
    }


def main(data: str, weights: str, out: str) -> None:
    from unflaw.parallel.fabric import FabricTeam

    torch.set_num_threads(1)
    team = FabricTeam(SETTINGS, devices=2, accelerator="cpu")
    assert (team.size, team.near, ALONE.size) == (2, 2, 1)
    assert team.gather(team.rank) == [0, 1] and team.broadcast(team.rank + 5) == 5
    assert team.total(torch.tensor([1.0 + team.rank])) == 3
    found = everything(team, Path(data), Path(weights)) | {"failure": failure(team)}
    torch.save(found, Path(out) / f"{team.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
