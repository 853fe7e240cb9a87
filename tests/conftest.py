"""Small shared things: a generated data set, a tiny configuration with local weights, and a detector fitted on both."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network; set before anything imports the hub's client

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIDE = 64
# Everything as small as it may be and still take part. The tests hold for any numbers here.
TINY: dict[str, Any] = {
    "features.backbone": "resnet18",
    "features.levels": (1, 2, 3),
    "features.grid": 8,
    "features.components": 8,
    "preparation.size": SIDE,
    "training.steps": 12,
    "training.batch": 4,
    "training.display_steps": 3,
}
TINY_URANET: dict[str, Any] = {
    "network.perception.width": 8,
    "network.perception.draws": 4,
    "network.restoration.width": 24,
    "network.restoration.heads": 2,
    "network.restoration.depth": 1,
    "network.restoration.patch": 2,
    "network.restoration.prototypes": 64,
    "network.restoration.coarse_prototypes": 32,
}
OWN: dict[str, dict[str, Any]] = {
    "uranet": TINY_URANET,
    "lookup": {"network.prototypes": 64, "network.coarse_prototypes": 32},
    "mfrnet": {
        "network.k": (1, 2),
        "network.widths": (8, 16),
        "network.depth": 1,
        "network.heads": 2,
        "network.prototypes": 64,
        "network.coarse_prototypes": 32,
    },
    "draem": {"network.reconstructive": 4, "network.discriminative": 4},
    "memae": {"network.widths": (8, 8, 16), "network.items": 10},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def textured(rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Grey noise of two scales, (side, side, 3) uint8: no two pictures are the same."""
    coarse = np.kron(rng.normal(0, 12, (side // 8, side // 8)), np.ones((8, 8)))
    grey = np.clip(110 + coarse + rng.normal(0, 8, (side, side)), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def make_parts(root: Path, train: int = 12, good: int = 4, bad: int = 4) -> Path:
    """A data set in the layout of MVTec AD. The defect is a bright square; its mask says where."""
    rng = np.random.default_rng(7)
    for folder, count in (("train/good", train), ("test/good", good), ("test/square", bad)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            picture = textured(rng)
            if folder == "test/square":
                y, x = rng.integers(4, SIDE - 24, 2)
                picture[y : y + 18, x : x + 18] = 255
                mask = np.zeros((SIDE, SIDE), np.uint8)
                mask[y : y + 18, x : x + 18] = 255
                (root / "ground_truth/square").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/square/{i:03d}_mask.png")
            Image.fromarray(picture).save(root / folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and weights beside the checkout that are no part of it."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good pictures to learn from, 4 good and 4 defective ones to test on, 64×64. Only to be read."""
    return make_parts(tmp_path_factory.mktemp("data") / "parts")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file for ResNet-18: random, the same every time."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny(method, **{"dotted.name": value})`: a tiny configuration with changes."""
    from unflaw.config import make_config

    def make(method: str = "uranet", **changes: Any) -> Any:
        return make_config(method, "cpu", TINY | OWN[method] | changes)

    return make


@pytest.fixture(scope="session")
def detector(parts: Path, weights: Path, tiny: Callable[..., Any]) -> Any:
    """A fitted URA-Net. Only to be used, not to be changed."""
    from unflaw.detector import Detector

    return Detector(config=tiny(), weights=weights).fit(parts)


@pytest.fixture(scope="session")
def saved(detector: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of that detector. Only to be read."""
    path = tmp_path_factory.mktemp("saved") / "parts.safetensors"
    detector.save(path)
    return path


@pytest.fixture(scope="session")
def exported(detector: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That detector as a graph for ONNX Runtime. Only to be read."""
    from unflaw.runtime.export import export

    return export(detector, tmp_path_factory.mktemp("exported") / "parts.onnx")


@pytest.fixture(scope="session")
def odd_pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of many sizes and modes: grey, RGB, RGBA, palette, 16 bits, tiny, huge, long and thin."""
    import tifffile

    folder, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(11)
    picture = textured(rng)
    paths = []
    for mode, side in (("L", (30, 40)), ("RGB", (64, 64)), ("RGBA", (100, 33)), ("P", (7, 5)), ("RGB", (1500, 1100))):
        paths.append(folder / f"{mode}_{side[0]}.png")
        Image.fromarray(picture).resize(side).convert(mode).save(paths[-1])
    for name, side in (("wide", (900, 9)), ("tall", (3, 400)), ("dot", (1, 1))):
        paths.append(folder / f"{name}.jpg")
        Image.fromarray(picture).resize(side).save(paths[-1])
    paths += [folder / "grey16.png", folder / "colour16.tif"]
    Image.fromarray(rng.integers(0, 2**16, (50, 70), dtype=np.uint16)).save(paths[-2])
    tifffile.imwrite(paths[-1], rng.integers(0, 2**16, (45, 80, 3), dtype=np.uint16), photometric="rgb")
    return paths
