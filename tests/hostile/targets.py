"""Targets of the fuzzer: a reader, its inputs, and the only errors that it may raise.

`tests/hostile/test_fuzz.py` runs each with few examples, always the same; `benchmarks/fuzz.py` with as many as wanted.
"""

import json
import struct
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tests.conftest import OWN, TINY, make_parts
from tests.hostile.corpus import cases

LARGEST = 300_000  # bytes of an image that is mutated
# What a hostile hand puts where something else belongs.
ODD = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 1e308, -0.5, float("nan"), float("inf")),
    *(
        "",
        "\0",
        "x" * 10_000,
        "../../../../etc/passwd",
        "/etc/passwd",
        "a\nb",
        "\ud800",
        "AAAA",
        "nan",
        "!!python/none x",
    ),
    *(
        [],
        {},
        [[]],
        {"": {}},
        [None] * 1000,
        {"method": "uranet"},
        [1e9] * 4,
        ["x"],
        {"float16": "AAAA", "statistics": 0},
    ),
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.sampled_from(ODD) | st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


class Target(NamedTuple):
    """`run` is given a draw of `feed` and a folder that it may fill; only `allowed` may come out."""

    feed: st.SearchStrategy[Any]
    run: Callable[[Any, Path], object]
    allowed: tuple[type[Exception], ...]


class Material:
    """Real files to begin with, made once.

    Args:
        folder: To make them in.
    """

    def __init__(self, folder: Path) -> None:
        from unflaw.config import make_config
        from unflaw.detector import Detector
        from unflaw.io.detector_file import read_metadata

        self.parts = make_parts(folder / "parts")
        self.model = folder / "parts.safetensors"
        Detector(config=make_config("memae", "cpu", TINY | OWN["memae"] | {"training.steps": 2})).fit(self.parts).save(
            self.model
        )
        self.metadata = read_metadata(self.model)
        with self.model.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            self.header, self.tensors = header, file.read()
        self.images = [data for case in cases() if "bomb" not in case.name and len(data := case.make()) < LARGEST]

    def detector(self, metadata: str, header: dict[str, Any] | None = None) -> bytes:
        """A detector file with other metadata or another header."""
        written = json.dumps((header or self.header) | {"__metadata__": {"unflaw": metadata}}).encode()
        return struct.pack("<Q", len(written)) + written + self.tensors

    def graph(self, metadata: str) -> bytes:
        """An exported detector of two operators."""
        side, one = 64, TensorProto.FLOAT
        made = helper.make_graph(
            [
                helper.make_node("ReduceMean", ["images"], ["map"], axes=[1], keepdims=0),
                helper.make_node("ReduceMax", ["map"], ["score"], axes=[1, 2], keepdims=0),
            ],
            "detector",
            [helper.make_tensor_value_info("images", one, ["n", 3, side, side])],
            [
                helper.make_tensor_value_info("map", one, ["n", side, side]),
                helper.make_tensor_value_info("score", one, ["n"]),
            ],
        )
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        helper.set_model_props(model, {"unflaw": metadata})
        return model.SerializeToString()


def places(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all that is in a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    return [here, *(place for key, inner in items for place in places(inner, (*here, key)))]


@st.composite
def mutated(draw: Callable[..., Any], tree: Any) -> Any:
    """A JSON value in which one to three things are replaced, dropped or wrapped."""
    tree = deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(tree)))
        if not place:
            continue
        parent = tree
        for key in place[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(("replace", "replace", "replace", "drop", "wrap", "add")))
        if how == "drop":
            del parent[place[-1]]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "exported", "categories", "tail", "roi", "tile"]))] = deepcopy(
                draw(values)
            )
        else:
            parent[place[-1]] = [parent[place[-1]]] if how == "wrap" else deepcopy(draw(values))
    return tree


@st.composite
def damaged(draw: Callable[..., Any], files: list[bytes]) -> bytes:
    """A file with bytes changed, cut out, doubled or put in from another one."""
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("change", "change", "number", "cut", "double", "splice", "end")))
        if kind == "change" and start < len(data):
            data[start] = draw(st.integers(0, 255))
        elif kind == "number":
            width, order = draw(st.sampled_from((2, 4, 8))), draw(st.sampled_from("<>"))
            number = draw(st.sampled_from((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)))
            data[start : start + width] = (
                struct.pack(f"{order}Q", number)[-width:] if order == ">" else struct.pack("<Q", number)[:width]
            )
        elif kind == "cut":
            del data[start : start + draw(st.integers(1, 64))]
        elif kind == "double":
            data[start:start] = data[start : start + draw(st.integers(1, 64))]
        elif kind == "splice":
            other = draw(st.sampled_from(files))
            place = draw(st.integers(0, len(other)))
            data[start:start] = other[place : place + draw(st.integers(1, 200))]
        elif kind == "end":
            del data[start:]
    return bytes(data)


def _text(tree: Any) -> str:
    return json.dumps(tree)


def _use(path: Path, images: list[Path]) -> None:
    """All that a detector file is used for."""
    import unflaw

    detector = unflaw.load(path)
    for name in detector.calibrations:
        detector.select(name).describe()
        detector.inspect(images[0], category=name).to_json()
        if name in detector.references:
            detector.references[name].test([detector.inspect(p, category=name).described for p in images[:2]])


def targets(material: Material) -> dict[str, Target]:
    """By name."""
    import typer
    from typer.testing import CliRunner

    from unflaw.cli import app
    from unflaw.datasets import DatasetError, load_dataset
    from unflaw.errors import DetectorError, ImageError
    from unflaw.experiments.grid import read_grid
    from unflaw.experiments.records import Log, Record
    from unflaw.imaging.reading import read

    images = sorted((material.parts / "test/good").iterdir())
    deep = st.integers(100, 5000).map(lambda n: '{"format":1,"x":' + "[" * n + "]" * n + "}")
    text = mutated(material.metadata).map(_text) | deep | st.text(max_size=60)

    def image(data: bytes, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on damaged notes
            pixels = read(data, max_pixels=2_000_000)
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype in (np.uint8, np.float32)

    def detector(metadata: str, folder: Path) -> None:
        path = folder / "x.safetensors"
        path.write_bytes(material.detector(metadata))
        _use(path, images)

    def told(metadata: str, folder: Path) -> None:
        path = folder / "x.safetensors"
        path.write_bytes(material.detector(metadata))
        done = CliRunner().invoke(app, ["info", str(path)])
        assert done.exit_code in (0, 2), done.output
        if done.exception is not None and not isinstance(done.exception, SystemExit | typer.Exit):
            raise done.exception

    def tensors(header: Any, folder: Path) -> None:
        path = folder / "x.safetensors"
        path.write_bytes(material.detector(_text(material.metadata), header if isinstance(header, dict) else {}))
        _use(path, images)

    def file(data: bytes, folder: Path) -> None:
        path = folder / "x.safetensors"
        path.write_bytes(data)
        _use(path, images)

    def graph(metadata: str, folder: Path) -> None:
        path = folder / "x.onnx"
        path.write_bytes(material.graph(metadata.encode(errors="replace").decode()))
        _use(path, images)

    def damaged_graph(data: bytes, folder: Path) -> None:
        path = folder / "x.onnx"
        path.write_bytes(data)
        _use(path, images)

    def table(content: bytes, folder: Path) -> None:
        path = material.parts / "table.csv"
        path.write_bytes(content)
        load_dataset(path)

    def grid(content: bytes, folder: Path) -> None:
        path = folder / "grid.yaml"
        path.write_bytes(content)
        read_grid(path, {}).model_dump_json()

    def log(content: bytes, folder: Path) -> None:
        path = folder / "runs.jsonl"
        path.write_bytes(content)
        for record in Log(path, Record).records.values():
            record.model_dump_json()

    row = {
        "digest": "d",
        "data": "a",
        "variant": "full",
        "seed": 0,
        "method": "uranet",
        "backbone": "b",
        "weights": "default",
    }
    row |= {"overrides": "", "common": "", "metrics": {"image_auroc": 0.5}, "skipped": {}, "machine": "x"}
    cells = st.sampled_from(
        [
            *(
                "test/good/000.png",
                "test/square/001.png",
                "ground_truth/square/001_mask.png",
                "../../x.png",
                "/etc/passwd",
            ),
            *("0", "1", "good", "defect", "train", "test", "validation", "", '"', "\0", "x" * 5000, "x" * 300 + ".png"),
            *("pipe\n.png", "=1+1"),
        ]
    ) | st.text(max_size=12)
    right = st.sampled_from(
        ["test/good/000.png,good,,,", "test/square/001.png,bad,ground_truth/square/001_mask.png,a,test"]
    )
    rows = st.lists(right | st.lists(cells, max_size=6).map(",".join), max_size=6)
    header = st.sampled_from(
        ["path,label", "path,label,mask,defect,split", "label;path;split", "path\tlabel\tmask", ""]
    )
    tables = st.tuples(header, rows).map(lambda t: "\n".join([t[0], *t[1]]).encode(errors="surrogatepass"))
    yaml = st.sampled_from(
        [
            b"methods: [uranet]\ndata: [parts]\nseeds: 3\nsettings: {training.steps: 3}\npeers: {padim: {a: 1}}\n",
            b"a: &a [x,x]\nb: &b [*a,*a,*a,*a]\ndata: [*b,*b]\n",
            b"data: [!!python/object/apply:os.system ['true']]\n",
            b"data: &a [*a]\n",
            b"<<: {data: [x]}\nsettings: 2001-02-30\n",
            b"data: [" + b"[" * 3000 + b"]" * 3000 + b"]\n",
            b"{data: [parts], seeds: 1e9, sizes: [0x7fffffffffff]}",
        ]
    )
    grids = (
        damaged([b"data: [parts]\nseeds: 2\n"])
        | yaml
        | yaml.flatmap(lambda data: damaged([data]))
        | st.binary(max_size=80)
    )
    # JSON is YAML, too
    fields = {
        "methods": ["uranet"],
        "data": ["x"],
        "backbones": ["a=b"],
        "sizes": [64],
        "seeds": 2,
        "settings": {"a": 1},
    }
    grids |= mutated(fields).map(lambda tree: json.dumps(tree).encode())
    logs = st.lists(mutated(row).map(_text) | st.just(_text(row)), max_size=3).map(
        lambda lines: "\n".join([*lines, ""]).encode()
    )
    logs |= logs.flatmap(lambda data: damaged([data or b"x"])) | st.binary(max_size=60)
    whole, exported = material.model.read_bytes(), material.graph(_text(_exported(material)))
    return {
        "images": Target(damaged(material.images), image, (ImageError,)),
        "detector metadata": Target(text, detector, (DetectorError, ImageError)),
        "unflaw info": Target(text, told, ()),
        "tensors": Target(mutated(material.header), tensors, (DetectorError,)),
        "detector files": Target(damaged([whole]), file, (DetectorError, ImageError)),
        "graph metadata": Target(mutated(_exported(material)).map(_text) | deep, graph, (DetectorError, ImageError)),
        "graphs": Target(damaged([exported]), damaged_graph, (DetectorError,)),
        "tables": Target(tables | st.binary(max_size=80), table, (DatasetError,)),
        "grids": Target(grids, grid, (ValueError,)),
        "run logs": Target(logs, log, (ValueError,)),
    }


def _exported(material: Material) -> dict[str, Any]:
    return material.metadata | {"exported": {"to": "onnx", "precision": "fp32", "grid": 16, "layers": []}}
