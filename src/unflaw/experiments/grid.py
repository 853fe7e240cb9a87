"""The grid of a benchmark: from YAML and flags to runs, each checked before the first is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unflaw.config import METHODS, Config, Weights, WeightSource, applies, make_config
from unflaw.datasets import Dataset
from unflaw.experiments.variants import written

LARGEST, DEEPEST = 1_000_000, 32  # bytes of a file, and lists within lists
ON_PIXELS = ("draem", "memae")  # have no backbone: they are run once, whatever the backbones


class Grid(BaseModel):
    """What is to be run: every method with every backbone, size and seed on every data set."""

    model_config = ConfigDict(extra="forbid")

    methods: list[str] = ["uranet"]
    data: list[Path] = Field(min_length=1)
    backbones: list[str] = Field([], description="NAME or NAME=WEIGHTS, a file or random; none: the default one")
    sizes: list[int] = Field([], description="sides in pixels; none: the default one")
    seeds: int = Field(3, ge=1, le=10_000, description="the seeds 0 to seeds - 1")
    profile: str = "cpu"
    settings: dict[str, Any] = Field({}, description="dotted settings, of all methods that have them")
    peers: dict[str, dict[str, Any]] = Field({}, description="methods of anomalib and their options (`peers`)")
    peer_python: Path | None = Field(None, description="interpreter of the environment that has anomalib")
    features: Path | None = Field(None, description="folder of features that runs share; only figures are measured")


@dataclass(frozen=True)
class Run:
    """A place in the grid; equal digests give equal figures.

    Attributes:
        config: Of a peer, only backbone, preparation and seed count.
        peer: A method of anomalib instead of ours, its options and the interpreter that has anomalib.
        features: Folder of features that runs share; None: every run makes its own, which is timed.
    """

    dataset: Dataset
    config: Config
    weights: WeightSource
    settings: str
    digest: str
    peer: tuple[str, dict[str, Any], Path] | None = None
    features: Path | None = None

    @property
    def method(self) -> str:
        return f"anomalib {self.peer[0]}" if self.peer else self.config.method

    @property
    def backbone(self) -> str:
        return "" if self.method in ON_PIXELS else self.config.features.backbone

    @property
    def size(self) -> int:
        return self.config.preparation.size

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def name(self) -> str:
        backbone = f", {self.backbone}" if self.backbone else ""
        return f"{self.dataset.name}, {self.method}{backbone}, {self.size} pixels, seed {self.seed}"

    @property
    def row(self) -> tuple[str, str, str, int]:
        """Runs that differ by their seeds alone are one row of the table."""
        return self.dataset.name, self.method, self.backbone, self.size


def read_grid(path: Path | None, changes: dict[str, Any]) -> Grid:
    """A grid from a YAML file, if any, and what was said on the command line, which goes before it.

    Paths in the file are relative to its folder.

    Raises:
        ValueError: Not readable, or a field that is unknown or has a wrong value.
    """
    try:
        found = {} if path is None else _load_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold fields such as `methods: [uranet, mfrnet]`")
    if path is not None:
        for field in ("data", "backbones"):
            if isinstance(found.get(field), list):
                found[field] = [_beside(path.parent, field, str(value)) for value in found[field]]
        for field in ("peer_python", "features"):
            if isinstance(found.get(field), str):
                found[field] = path.parent / found[field]
    try:
        return Grid.model_validate(found | changes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        hint = f"; there are {', '.join(Grid.model_fields)}" if first["type"] == "extra_forbidden" else ""
        missing = "; name data sets with --data" if first["loc"] == ("data",) else ""
        source = f"{path}: " if path and where not in changes else ""
        raise ValueError(f"{source}{where}: {first['msg']}{hint}{missing}") from error


def _load_yaml(path: Path) -> Any:
    """Raises OSError or ValueError: unreadable, too large, or with aliases, which can stand for gigabytes."""
    import yaml

    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    text = content.decode("utf-8")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has an alias (*name); write out what that stands for")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:  # the parser's time grows with the square of it
                raise ValueError(f"it is nested more than {DEEPEST} deep; a grid is a few lists")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _beside(folder: Path, field: str, text: str) -> str:
    """The path of a data set, or `NAME` or `NAME=WEIGHTS` of a backbone, with paths as seen from here."""
    if field == "data":
        return str(folder / text)
    name, equals, path = text.partition("=")
    if not equals or path == Weights.RANDOM.value or not ("/" in path or (folder / path).exists()):
        return text
    return f"{name}={(folder / path).absolute()}"  # never `random`


def plan(grid: Grid, datasets: Sequence[Dataset]) -> list[Run]:
    """All runs of a grid in the order of the table, seeds last. That each can work is checked.

    Raises:
        ValueError, WeightsError, OSError: Settings, weights or data that cannot be used.
    """
    from unflaw.experiments.feature_store import ExperimentRunner

    for dataset in datasets:
        if not (dataset.train and dataset.test):
            lacking = "test" if dataset.train else "good training"
            raise ValueError(f"{dataset.name}: there are no {lacking} images; a benchmark needs both")
    if unknown := [method for method in grid.methods if method not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if not (grid.methods or grid.peers):
        raise ValueError("methods: there is nothing to run; name a method or a peer")
    if grid.peers:
        _check_peers(grid)
    if "training.seed" in grid.settings:
        raise ValueError("setting training.seed: every run has its own; --seeds says how many")
    # a setting that only some of the methods have is theirs alone; one that none has is an error below
    some = {name for name in grid.settings if any(applies(name, method) for method in grid.methods)}
    settings = {m: {n: v for n, v in grid.settings.items() if n not in some or applies(n, m)} for m in grid.methods}
    runs: dict[tuple[Any, ...], Run] = {}
    runners: dict[str, ExperimentRunner] = {}
    backbones = [backbone.partition("=")[::2] for backbone in grid.backbones] or [("", "")]
    for dataset, method in product(datasets, [*grid.methods, *grid.peers]):
        peer = None if method in METHODS else method
        for (name, weights), size in product([("", "")] if method in ON_PIXELS else backbones, grid.sizes or [0]):
            runner = runners.setdefault(weights, ExperimentRunner(Path(), Weights.parse(weights or None)))
            for seed in range(grid.seeds):
                changes = {} if peer else dict(settings[method])
                changes |= {"training.seed": seed}
                changes |= {"features.backbone": name} if name else {}
                changes |= {"preparation.size": size} if size else {}
                config = make_config("nearest_neighbor" if peer else method, "cpu" if peer else grid.profile, changes)
                digest, of, given = runner.digest(config, dataset), None, written(settings.get(method, {}))
                if peer:
                    assert grid.peer_python is not None
                    of, given = (peer, grid.peers[peer], grid.peer_python), written(grid.peers[peer])
                    digest = hashlib.sha256(json.dumps([digest, *of[:2]], sort_keys=True).encode()).hexdigest()
                run = Run(dataset, config, runner.weights, given, digest, of, grid.features)
                if runs.setdefault((*run.row, seed), run).digest != digest:
                    raise ValueError(f"{name}: has two weight files; a table holds one, give each an --out of its own")
    return list(runs.values())


def _check_peers(grid: Grid) -> None:
    from unflaw.peers import INSTALL, LEVELS

    if unknown := [peer for peer in grid.peers if peer not in LEVELS]:
        raise ValueError(f"unknown peer {unknown[0]!r}; there are {', '.join(LEVELS)}")
    if grid.peer_python is None:
        raise ValueError(f"peers need --peer-python, an interpreter that has anomalib; to make one: {INSTALL}")
    if not grid.peer_python.is_file():
        raise ValueError(f"{grid.peer_python}: there is no such interpreter; to make one: {INSTALL}")
