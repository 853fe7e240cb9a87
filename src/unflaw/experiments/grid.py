"""The grid of an experiment: from YAML and options to runs, each checked before the first one starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from unflaw import registry
from unflaw.config import Config, Weights, WeightSource, applies, make_config
from unflaw.datasets import Dataset
from unflaw.experiments.variants import FULL, Variant, choose, named, parse, written
from unflaw.training.canvas import fit_canvas

if TYPE_CHECKING:
    from unflaw.experiments.feature_store import ExperimentRunner

LARGEST, DEEPEST = 1_000_000, 32  # bytes of a file, and lists within lists


class Grid(BaseModel):
    """Every method with every variant, backbone, size and seed on every data set."""

    model_config = ConfigDict(extra="forbid")

    methods: list[str] = ["uranet"]
    data: list[Path] = Field(min_length=1)
    variants: list[str] = Field([], description="names, or 'name: setting=value; …'; full is always there")
    backbones: list[str] = Field(
        [], description="NAME or NAME=WEIGHTS, a file or random, or several joined by +; none: the default one"
    )
    sizes: list[int | str] = Field([], description="256, or 512x224, in pixels; none: the default one")
    seeds: int = Field(3, ge=1, le=10_000, description="the seeds 0 to seeds - 1")
    profile: str = "cpu"
    settings: dict[str, Any] = Field({}, description="dotted settings, of all methods that have them")
    peers: dict[str, dict[str, Any]] = Field({}, description="methods of anomalib and their options (`peers`)")
    peer_python: Path | None = Field(None, description="interpreter of the environment that has anomalib")
    features: Path | None = Field(None, description="folder of features that runs share; only figures are measured")

    @field_validator("methods")
    @classmethod
    def _without_aliases(cls, methods: list[str]) -> list[str]:
        return [registry.canonical(method) for method in methods]


@dataclass(frozen=True)
class Run:
    """A cell of the grid and a seed; runs of equal digests have equal figures.

    Attributes:
        method: Name in tables, with "anomalib" before that of a peer.
        backbone, size: Values of the cell, whatever the variant changes; the backbone of a method on pixels is "".
        config: Configuration; for a peer, only preparation and seed are used.
        settings: Settings of the whole grid, as text.
        peer: Method of anomalib instead of ours, its options and the interpreter that has anomalib.
        features: Folder of features that runs share; None: every run computes its own, which is timed.
    """

    dataset: Dataset
    method: str
    variant: Variant
    backbone: str
    size: int | str
    config: Config
    weights: WeightSource
    settings: str
    digest: str
    peer: tuple[str, dict[str, Any], Path] | None = None
    features: Path | None = None

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def trained_backbone(self) -> str:
        """Backbone of the configuration; "" where the method that is trained, which a variant can change, has none."""
        return "" if _on_pixels(self.config.method) else self.config.features.backbone

    @property
    def row(self) -> tuple[str, str, str, str, int | str]:
        """Runs that differ by their seeds alone are one row of the table."""
        return self.dataset.name, self.method, self.variant.name, self.backbone, self.size

    @property
    def name(self) -> str:
        variant = "" if self.variant.name == FULL.name else f", variant {self.variant.name}"
        backbone = f", {self.backbone}" if self.backbone else ""
        return f"{self.dataset.name}, {self.method}{variant}{backbone}, {self.size} pixels, seed {self.seed}"


def read_grid(path: Path | None, changes: dict[str, Any]) -> Grid:
    """A grid from a YAML file, if any, and the options of the command line, which go before it.

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
    if len(parts := text.split("+")) > 1 and not (folder / text.partition("=")[2]).is_file():
        return "+".join(_beside(folder, field, part) for part in parts)
    name, equals, path = text.partition("=")
    if not equals or path == Weights.RANDOM.value or not ("/" in path or (folder / path).exists()):
        return text
    return f"{name}={(folder / path).absolute()}"  # never `random`


def plan(grid: Grid, datasets: Sequence[Dataset]) -> list[Run]:
    """All runs of a grid in the order of the table, seeds last. Each is checked.

    Raises:
        ValueError, WeightsError, OSError: Settings, weights or data that cannot be used.
    """
    from unflaw.experiments.feature_store import ExperimentRunner

    _check(grid, datasets)
    settings, variants = _settings(grid), _variants(grid)
    backbones = [_names_and_weights(backbone) for backbone in grid.backbones] or [("", "")]
    runners: dict[str, ExperimentRunner] = {}  # by weights
    runs: dict[tuple[Any, ...], Run] = {}
    for dataset, method in product(datasets, variants):
        peer = (method, grid.peers[method], grid.peer_python or Path()) if method in grid.peers else None
        ours, profile = ("nearest_neighbor", "cpu") if peer else (method, grid.profile)
        own = backbones[:1] if not peer and _on_pixels(method) else backbones
        cells = product(variants[method], own, grid.sizes or [0], range(grid.seeds))
        for variant, (name, weights), size, seed in cells:
            common = settings.get(method, {}) | ({"preparation.size": size} if size else {})
            with_backbone = common | ({"features.backbone": name} if name else {})
            changes = common if _on_pixels(ours) else with_backbone
            config = cell = make_config(ours, profile, changes | {"training.seed": seed})
            trained = variant.changes.get("method", ours)  # a variant can be another method
            if variant != FULL:
                config = variant.config(ours, common if _on_pixels(trained) else with_backbone, seed, profile)
            if not peer:
                good = [sample.path for sample in dataset.train]
                cell, config = fit_canvas(cell, good)[0], fit_canvas(config, good)[0]
            file = "" if _on_pixels(trained) else weights
            runner = runners.setdefault(file, ExperimentRunner(Path(), _weight_source(file, name)))
            digest = _digest(runner, variant, config, dataset)
            if peer:
                digest = hashlib.sha256(json.dumps([digest, *peer[:2]], sort_keys=True).encode()).hexdigest()
            run = Run(
                dataset=dataset,
                method=f"anomalib {method}" if peer else method,
                variant=variant,
                backbone="" if _on_pixels(ours) else cell.features.backbone,
                size=cell.preparation.size if isinstance(cell.preparation.size, int) else cell.preparation.size_text,
                config=config,
                weights=runner.weights,
                settings=written(grid.peers[method] if peer else settings[method]),
                digest=digest,
                peer=peer,
                features=grid.features,
            )
            if runs.setdefault((*run.row, seed), run).digest != digest:
                raise ValueError(f"{name}: has two weight files; a table holds one, give each an --out of its own")
    return list(runs.values())


def _names_and_weights(text: str) -> tuple[str, str]:
    """`A`, `A=FILE` and `A=FILE+B` as names joined by + and the text of their weights; "" for the default ones."""
    parts = [part.partition("=")[::2] for part in text.split("+")]
    first, _, weights = text.partition("=")
    if len(parts) == 1 or not all(name for name, _ in parts) or (weights and Path(weights).exists()):
        return first, weights
    return "+".join(name for name, _ in parts), "+".join(f"{n}={w}" for n, w in parts if w)


def _weight_source(text: str, name: str) -> WeightSource:
    """The weights of `_names_and_weights`."""
    if "+" not in name or not text:
        return Weights.parse(text or None)
    return {own: Weights.parse(file) for own, _, file in (part.partition("=") for part in text.split("+"))}


def _on_pixels(method: str) -> bool:
    """Methods on pixels have no backbone: they are run once, whatever the backbones."""
    return registry.method_class(method).on_pixels


def _digest(runner: ExperimentRunner, variant: Variant, config: Config, dataset: Dataset) -> str:
    from unflaw.features.backbones import WeightsError

    try:
        return runner.digest(config, dataset)
    except (ValueError, WeightsError) as error:
        if variant == FULL:
            raise
        kind = WeightsError if isinstance(error, WeightsError) else ValueError
        raise kind(f"variant {variant.name!r}: {error}") from error


def _check(grid: Grid, datasets: Sequence[Dataset]) -> None:
    for dataset in datasets:
        if not (dataset.train and dataset.test):
            lacking = "test" if dataset.train else "good training"
            raise ValueError(f"{dataset.name}: there are no {lacking} images; an experiment needs both")
    for method in grid.methods:
        registry.method_class(method)  # fails where there is none of this name
    if not (grid.methods or grid.peers):
        raise ValueError("methods: there is nothing to run; name a method or a peer")
    if "training.seed" in grid.settings:
        raise ValueError("setting training.seed: every run has its own; --seeds says how many")
    if grid.peers:
        from unflaw.peers import INSTALL, LEVELS

        if several := [text for text in grid.backbones if "+" in _names_and_weights(text)[0]]:
            raise ValueError(f"backbone {several[0]}: anomalib's methods take one; leave --peer out, or name one")
        if unknown := [peer for peer in grid.peers if peer not in LEVELS]:
            raise ValueError(f"unknown peer {unknown[0]!r}; there are {', '.join(LEVELS)}")
        if grid.peer_python is None:
            raise ValueError(f"peers need --peer-python, an interpreter that has anomalib; to make one: {INSTALL}")
        if not grid.peer_python.is_file():
            raise ValueError(f"{grid.peer_python}: there is no such interpreter; to make one: {INSTALL}")


def _settings(grid: Grid) -> dict[str, dict[str, Any]]:
    """Settings by method: one that only some methods have is theirs alone, one that none has is an error later."""
    some = {name for name in grid.settings if any(applies(name, method) for method in grid.methods)}
    return {m: {n: v for n, v in grid.settings.items() if n not in some or applies(n, m)} for m in grid.methods}


def _variants(grid: Grid) -> dict[str, tuple[Variant, ...]]:
    """Variants by method: as for settings, one that only some methods can have is theirs alone. Peers have `FULL`."""

    def fits(text: str, method: str) -> bool:
        if ":" not in text:
            return text in [variant.name for variant in named(method)]
        changes = parse(text).changes
        trained = changes.get("method", method)
        return trained in registry.names() and all(applies(name, trained) for name in changes)

    found: dict[str, tuple[Variant, ...]] = {}
    for method in grid.methods:
        own = [v for v in grid.variants if fits(v, method) or not any(fits(v, other) for other in grid.methods)]
        names = [text for text in own if ":" not in text]
        found[method] = choose(method, [FULL.name, *names], [text for text in own if ":" in text])
    return found | dict.fromkeys(grid.peers, (FULL,))
