"""Small shared things: a generated data set, a tiny configuration with local weights, and a detector fitted on both."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network; set before anything imports the hub's client
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: the tests themselves use all processors

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from unflaw.detector import Detector
    from unflaw.features.cache import Cache
    from unflaw.methods import Context

settings.register_profile("unhurried", deadline=None)  # a busy machine is no fault
settings.load_profile("unhurried")

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
    # of so few images, all would calibrate
    "calibration.fewest": 0,
    "calibration.groups": "none",
    "calibration.reserve": 0.0,
}
TINY_URANET: dict[str, Any] = {
    "network.perception.width": 8,
    "network.perception.draws": 4,
    "network.restoration.width": 24,
    "network.restoration.heads": 2,
    "network.restoration.depth": 1,
    "network.restoration.patch": 2,
    "network.restoration.regional": True,
    "network.restoration.prototypes": 64,
    "network.restoration.regional_prototypes": 32,
}
OWN: dict[str, dict[str, Any]] = {
    "uranet": TINY_URANET,
    "nearest_neighbor": {"network.prototypes": 64, "network.regional_prototypes": 32},
    "mfrnet": {
        "network.k": (1, 2),
        "network.n": 4,
        "network.margin": 0,
        "network.token_width": 8,
        "network.widths": (8, 16),
        "network.depth": 1,
        "network.heads": 2,
        "network.prototypes": 64,
        "network.regional_prototypes": 32,
    },
    "draem": {"network.reconstructive": 4, "network.discriminative": 4},
    "memae": {"network.widths": (8, 8, 16), "network.items": 10},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=10, help="commands that tests/faults kills at random moments")
    parser.addoption("--kill-seed", type=int, default=0, help="of these moments")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def textured(rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Grey noise of two scales, (side, side, 3) uint8: no two images are the same."""
    coarse = np.kron(rng.normal(0, 12, (side // 8, side // 8)), np.ones((8, 8)))
    grey = np.clip(110 + coarse + rng.normal(0, 8, (side, side)), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def make_parts(root: Path, train: int = 12, good: int = 4, bad: int = 4) -> Path:
    """A data set in the layout of MVTec AD. The defect is a bright square; its mask says where."""
    rng = np.random.default_rng(7)
    for folder, count in (("train/good", train), ("test/good", good), ("test/square", bad)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            image = textured(rng)
            if folder == "test/square":
                y, x = rng.integers(4, SIDE - 24, 2)
                image[y : y + 18, x : x + 18] = 255
                mask = np.zeros((SIDE, SIDE), np.uint8)
                mask[y : y + 18, x : x + 18] = 255
                (root / "ground_truth/square").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/square/{i:03d}_mask.png")
            Image.fromarray(image).save(root / folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and weights beside the checkout that are no part of it."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared beside the checkout")
    return folder


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """`ctrl_c()` is what the key does to this process. Commands that ran here before may have left their handlers."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def holder() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """`holder(path)`: a process of its own that holds a file or folder, as a run does that writes there."""
    code = "import sys; from pathlib import Path; from unflaw.io.files import holding\n"
    code += "with holding(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    started: list[subprocess.Popen[str]] = []

    def hold(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(path)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None and started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good images to learn from, 4 good and 4 defective ones to test on, 64×64. Only to be read."""
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
def export_again(detector: Any) -> Callable[..., Path]:
    """`export` of that detector, whose graph is made once: making it takes seconds, writing it does not."""
    import onnx

    from unflaw.runtime import export

    graph = export.to_onnx(detector).SerializeToString()

    def again(path: Path, **options: Any) -> Path:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(export, "to_onnx", lambda _: onnx.load_from_string(graph))
            return export.export(detector, path, **options)

    return again


@pytest.fixture(scope="session")
def exported(export_again: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That detector as a graph for ONNX Runtime. Only to be read."""
    return export_again(tmp_path_factory.mktemp("exported") / "parts.onnx")


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of many sizes and modes: grey, RGB, RGBA, palette, 16 bits, tiny, huge, long and thin."""
    import tifffile

    folder, rng = tmp_path_factory.mktemp("odd"), np.random.default_rng(11)
    image = textured(rng)
    paths = []
    for mode, side in (("L", (30, 40)), ("RGB", (64, 64)), ("RGBA", (100, 33)), ("P", (7, 5)), ("RGB", (1500, 1100))):
        paths.append(folder / f"{mode}_{side[0]}.png")
        Image.fromarray(image).resize(side).convert(mode).save(paths[-1])
    for name, side in (("wide", (900, 9)), ("tall", (3, 400)), ("dot", (1, 1))):
        paths.append(folder / f"{name}.jpg")
        Image.fromarray(image).resize(side).save(paths[-1])
    paths += [folder / "grey16.png", folder / "colour16.tif"]
    Image.fromarray(rng.integers(0, 2**16, (50, 70), dtype=np.uint16)).save(paths[-2])
    tifffile.imwrite(paths[-1], rng.integers(0, 2**16, (45, 80, 3), dtype=np.uint16), photometric="rgb")
    return paths


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a socket in a temporary folder."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    if not installed:
        pytest.skip("needs PostgreSQL (apt-get install postgresql)")
    owner = "postgres" if os.getuid() == 0 else None  # the server does not run as root
    folder = Path(tempfile.mkdtemp(prefix="unflaw-pg-"))  # a short path: sockets have a limit
    if owner:
        shutil.chown(folder, owner)

    def run(*command: object) -> None:
        subprocess.run([str(part) for part in command], check=True, user=owner, cwd=folder, stdout=subprocess.DEVNULL)

    control = (installed[-1] / "pg_ctl", "-D", folder / "data", "-w")
    run(installed[-1] / "initdb", "-D", folder / "data", "-U", "unflaw", "-A", "trust", "-E", "UTF8", "--no-sync")
    try:
        run(*control, "-l", folder / "log", "-o", f"-k {folder} -c listen_addresses= -c fsync=off", "start")
        yield f"postgresql://unflaw@/postgres?host={folder}"
    finally:
        run(*control, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, of each kind that the log is kept in."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'log.db'}"
        return
    import psycopg

    server: str = request.getfixturevalue("postgres")
    name = f"t{os.urandom(6).hex()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload]
        yield server.replace("/postgres?", f"/{name}?")
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]


class StationProcess:
    """`unflaw serve` in a process of its own, on a free port."""

    def __init__(self, store: Path, models: tuple[object, ...], options: list[object], token: str | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.store, self._token = f"http://127.0.0.1:{self.port}", store, token
        command = [sys.executable, "-c", "from unflaw.cli import main; main()", "serve", *models, "--store", store]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"UNFLAW_TOKEN": token} if token else {})
        self.process = subprocess.Popen(
            [str(part) for part in (*command, "--port", self.port, *options)],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for _ in range(600):
            try:
                self.ask("/health")
                return
            except OSError:
                assert self.process.poll() is None, "the station has ended"
                time.sleep(0.1)
        raise AssertionError("the station does not start")

    def ask(self, path: str, data: bytes | None = None) -> Any:
        """GET, or POST of some bytes; the answer, or AssertionError where it is not 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        connection.request("GET" if data is None else "POST", path, data, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == 200, body
        return json.loads(body)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start_station(tmp_path: Path) -> Iterator[Callable[..., StationProcess]]:
    """`start_station(*models, store=…, token=…, options=[…])`."""
    started: list[StationProcess] = []

    def start(
        *models: object, store: Path | None = None, token: str | None = None, options: Any = ()
    ) -> StationProcess:
        started.append(StationProcess(store or tmp_path / "station", models, list(options), token))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def first_rows(features: "Tensor", valid: "Tensor | None" = None) -> "Context":
    """The context of features (N, C, g, g) that are the first N training rows."""
    import torch

    from unflaw.methods import Context

    return Context(valid, torch.arange(len(features)))


def learn(detector: "Detector", cache: "Cache", validation: "Cache | None" = None) -> None:
    """Trains and calibrates a detector from cached features."""
    from unflaw.training.fit import fit_cached

    detector._take(fit_cached(detector.network, cache, validation))
