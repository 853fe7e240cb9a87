"""Work that `test_fabric` has two processes do, and does itself alone: python group_of_two.py DATA WEIGHTS OUT."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.conftest import OWN, TINY
from torch import Generator, Tensor, nn

from unflaw.config import Features, Training, Weights, make_config
from unflaw.datasets import load_dataset
from unflaw.detector import Detector
from unflaw.evaluation.evaluate import evaluate
from unflaw.features.cache import build_cache
from unflaw.features.extractor import FeatureExtractor
from unflaw.imaging.reading import read
from unflaw.imaging.tiling import Preparation
from unflaw.io.listing import list_images
from unflaw.methods import FeatureSet, create
from unflaw.parallel.process_group import SINGLE_PROCESS, ProcessGroup
from unflaw.training import loop as training
from unflaw.training.loop import optimise

METHODS = ("uranet", "mfrnet", "memae", "nearest_neighbor")
SETTINGS = Training(batch=8, learning_rate=0.05, precision="float32", checkpoint_seconds=0)


class Curve(nn.Module):
    """A small network whose loss has a mean, a quotient of sums, noise, and, if wanted, batch normalisation."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        norm = nn.BatchNorm2d(4) if normalised else nn.Identity()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Conv2d(4, 1, 3)).double()

    def loss(self, data: Tensor, rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        x = data[rows]
        p = self.layers(x + 0.1 * torch.randn(x.shape, generator=rng)).sigmoid()
        quotient = (p * x[:, :1, 2:-2, 2:-2]).sum() / (p.sum() + 1)
        error = (p - x.square().mean(1, keepdim=True)[:, :, 2:-2, 2:-2]).square().mean()
        return {"loss": error + 0.3 * quotient, "error": error}


def loop(group: ProcessGroup, passes: int, normalised: bool = False) -> dict[str, Any]:
    curve, data = Curve(normalised), torch.randn(20, 2, 8, 8, generator=Generator().manual_seed(1)).double()
    settings = SETTINGS.model_copy(update={"accumulate": passes})
    history = optimise(curve, lambda *given: curve.loss(data, *given), 20, 25, settings, group=group)
    return {"history": [list(terms.values()) for terms in history], **curve.state_dict()}


def cached(group: ProcessGroup, data: Path, tile: int | None = None) -> dict[str, Any]:
    torch.manual_seed(2)
    extractor = FeatureExtractor(Features(backbone="resnet18", grid=8, components=8), Weights.RANDOM)
    paths = [*list_images(data / "train/good"), data / "none.png", *list_images(data / "test/good")]
    cache = build_cache(extractor, paths, Preparation(size=32, tile=tile), 1e9, batch=4, group=group)
    found = {"features": cache.features, "thumbnails": cache.thumbnails, "described": cache.described}
    return found | {"paths": list(map(str, cache.paths)), "skipped": cache.skipped, "basis": extractor.basis}


def fitted(group: ProcessGroup, method: str, data: Path, weights: Path, passes: int, **changes: Any) -> dict[str, Any]:
    """A detector trained with a batch of 8 in parts of 4, or of 8: its weights, scores and image AUROC."""
    own = TINY | OWN[method] | {"training.precision": "float32", "training.display_steps": 0, "training.batch": 8}
    given: Any = data
    if method == "nearest_neighbor":  # arrays, too
        given = [read(path) for path in list_images(data / "train/good")]
    config = make_config(method, "cpu", own | changes | {"training.accumulate": passes})
    detector = Detector(config=config, weights=weights).fit(given, group=group)
    calibration = detector.calibration_
    assert calibration is not None
    auroc = evaluate(detector, load_dataset(data), shown=0).metrics["image_auroc"]
    return {"auroc": torch.tensor(auroc), "scores": torch.tensor(calibration.scores), **detector.network.state_dict()}


def gradients(group: ProcessGroup, method: str, passes: int) -> dict[str, Any]:
    """The gradients of one step on noise in parts of 4, and the terms of the loss; in double precision, even inside."""
    torch.manual_seed(4)
    config = make_config(method, "cpu", TINY | OWN[method] | {"training.batch": 8, "training.accumulate": passes})
    network, rng = create(config, Weights.RANDOM), Generator().manual_seed(6)
    images, textures = (torch.rand(n, 3, 64, 64, generator=rng) for n in (12, 3))
    features, bank = network.embed(images).detach(), network.embed(textures).detach()
    tensors = {"features": features, **network.fit_memory(FeatureSet.of(features, textures=bank), rng)}

    def loss(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        return network.loss({name: t[rows].double().to(group.device) for name, t in tensors.items()}, rng)

    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 0.1)
    network.double().train()
    if network.memory is not None:  # its banks are no buffers
        network.memory.banks = [b._replace(prototypes=b.prototypes.double()) for b in network.memory.banks]
    with mock.patch.object(Tensor, "float", Tensor.double), group.engine(network, optimiser, loss, False) as engine:
        terms = training._gradients(engine, 12, config.training, 3, group.size * passes, group)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"terms": torch.tensor(list(terms.values()))} | gradients


def failure(group: ProcessGroup) -> str:
    """The message that a fault of the first process alone has in all of them."""

    def work() -> None:
        raise ValueError("cannot be read")

    try:
        group.on_main(work)
    except ValueError as error:
        return str(error)
    return ""


def everything(group: ProcessGroup, data: Path, weights: Path) -> dict[str, Any]:
    """All of the above in two parts for each batch: by two processes, or in two passes."""
    passes = 2 // group.size
    folds = {"calibration.folds": 2, "training.steps": 2}
    return {
        "loop": loop(group, passes),
        "loop, four parts": loop(group, 2 * passes),
        "loop, normalised": loop(group, passes, normalised=True),
        "cache": cached(group, data),
        "cache, tiles": cached(group, data, 40),
        **{f"{name}, gradients": gradients(group, name, passes) for name in ("uranet", "mfrnet", "draem", "memae")},
        **{method: fitted(group, method, data, weights, passes) for method in METHODS},
        "crossed": fitted(group, "uranet", data, weights, passes, **folds),
    }


def main(data: str, weights: str, out: str) -> None:
    from unflaw.parallel.fabric import FabricGroup

    torch.set_num_threads(1)
    group = FabricGroup(SETTINGS, devices=2, accelerator="cpu")
    assert (group.size, group.local_size, SINGLE_PROCESS.size) == (2, 2, 1)
    assert group.all_gather(group.rank) == [0, 1] and group.broadcast(group.rank + 5) == 5
    assert group.all_reduce(torch.tensor([1.0 + group.rank])) == 3
    found = everything(group, Path(data), Path(weights)) | {"failure": failure(group)}
    torch.save(found, Path(out) / f"{group.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
