"""Kills the command line at random moments, again and again, and says what it left behind."""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tests.conftest import TINY, TINY_URANET, make_parts

SMALL = TINY | {"features.backbone": "test_resnet"}
LOOKUP = SMALL | {"network.prototypes": 64, "network.regional_prototypes": 32, "training.display_steps": 3}
UNFINISHED = (".part", ".checkpoint", ".before")  # endings of files that are there while something is on its way
Print = dict[str, Any]  # what is in each file of an output folder, but for times


@dataclass
class Answer:
    """Of the server: exit code, or minus the signal; seconds; and how often files were touched."""

    code: int
    seconds: float
    events: int
    said: str


class Server:
    """Runs commands in forks of one process that has loaded everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.weights = folder, folder / "weights.safetensors"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), str(self.weights)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready\n"

    def run(self, root: Path, argv: Sequence[object], **kill: float) -> Answer:
        """A command, as `server.py` says; `root` is the folder that it writes to."""
        log = self.folder / "said.txt"
        request = {"root": str(root), "log": str(log), "argv": [str(word) for word in argv], **kill}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Answer(**json.loads(self._line()), said=log.read_text("utf-8", "replace"))

    def done(self, root: Path, *argv: object, here: bool = False) -> Answer:
        """A command that must succeed; `here`: in the server itself, which then has loaded what the command needs."""
        answer = self.run(root, argv, here=here)
        assert answer.code == 0, f"{' '.join(map(str, argv))}: {answer.code}\n{answer.said}"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@dataclass
class Phase:
    """A command to be killed.

    Attributes:
        name: In the table.
        argv: The command, from the folder of a run.
        main: The file of its output that is old or new; "" where it adds to a log.
        kinds: Of kills, see `server.py`.
        resume: Further words, where the command is told to go on: it refuses that where no checkpoint was left.
        start: Folder that a run begins with.
        new: What a run leaves that nobody kills.
        old: What was there before.
    """

    name: str
    argv: Callable[[Path], list[object]]
    main: str
    kinds: tuple[str, ...] = ("seconds", "event", "byte")
    resume: tuple[str, ...] = ()
    start: Path = Path()
    old: Print = field(default_factory=dict)
    new: Print = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    whole: Answer = field(default_factory=lambda: Answer(0, 0, 0, ""))

    def again(self, root: Path) -> list[object]:
        """The command that goes on with what a run has left."""
        return [*self.argv(root), *(self.resume if list((root / "out").glob("*.checkpoint")) else ())]


@dataclass
class Killed:
    """A kill and what came of it.

    Attributes:
        left: "old", "new", "none" or, of a log, "part" is what stood in the main file afterwards.
        faults: What must not be; empty: the run has survived.
        equal: Whether the same command, afterwards, left what it leaves when nobody kills it.
    """

    phase: str
    how: str
    at: float
    left: str
    faults: list[str]
    equal: bool


def settings(changes: dict[str, Any]) -> list[object]:
    return [word for name, value in changes.items() for word in ("--set", f"{name}={json.dumps(value)}")]


def prepare(server: Server, folder: Path) -> list[Phase]:
    """All phases: the folders that runs begin with, and what the commands leave when nobody kills them."""
    parts = make_parts(folder / "parts")
    good, test = parts / "test/good", parts / "test"
    (folder / "out").mkdir()
    a, b, trained = folder / "a.safetensors", folder / "b.safetensors", folder / "u.safetensors"
    weights: list[object] = ["--data", parts, "--weights", server.weights]
    nearest_neighbor = ["train", "--method", "nearest_neighbor", *weights, *settings(LOOKUP)]
    uranet = ["train", *weights, *settings(SMALL | TINY_URANET | {"training.checkpoint_seconds": 0})]
    for file, command in (
        (a, [*nearest_neighbor, "--seed", 0]),
        (b, [*nearest_neighbor, "--seed", 1]),
        (trained, [*uranet, "--seed", 0]),
    ):
        server.done(folder, *command, "--out", file, here=file == a)

    def predict(model: Path, root: Path) -> list[object]:
        out = root / "out"
        options = ["--images", "--labelme", "--coco", out / "coco.json", "--group-by", "folder", "--fdr", 0.1]
        return ["predict", model, test, "--out", out, *options]

    def evaluate(model: Path, root: Path) -> list[object]:
        return ["evaluate", model, "--data", parts, "--json", root / "out/m.json", "--report", root / "out/r.html"]

    def export(model: Path, to: str, name: str) -> Callable[[Path], list[object]]:
        return lambda root: ["export", model, "--to", to, "--out", root / "out" / name]

    def watch(root: Path) -> list[object]:
        folders = [root / "camera", "--model", a, "--out", root / "out/sorted", "--store", root / "out/store"]
        return ["watch", *folders, "--once", "--settle", 0, "--poll-interval", 0.01, "--sample", 0]

    def ablate(root: Path) -> list[object]:
        varied = ["--variant", "few: network.prototypes=16", "--only", "full", "--seeds", 1]
        return ["ablate", "--method", "nearest_neighbor", *weights, *settings(LOOKUP), *varied, "--out", root / "out"]

    def log_export(root: Path) -> list[object]:
        return ["log", "export", "--store", root / "store", "--out", root / "out/log.csv"]

    def start(name: str, *files: tuple[Path, str]) -> Path:
        root = folder / "start" / name
        (root / "out").mkdir(parents=True)
        for source, target in files:
            (shutil.copytree if source.is_dir() else shutil.copy)(source, root / target)
        return root

    d = "out/d.safetensors"
    phases = [
        Phase(
            "training", lambda root: [*uranet, "--seed", 1, "--out", root / d], "d.safetensors", resume=("--resume",)
        ),
        Phase("caching", ablate, "runs.jsonl"),
        Phase(
            "saving",
            lambda root: [*nearest_neighbor, "--seed", 1, "--out", root / d],
            "d.safetensors",
            ("event", "byte"),
        ),
        Phase("calibrating", lambda root: ["calibrate", root / d, "--good", good], "d.safetensors"),
        Phase("exporting to ONNX", export(b, "onnx", "d.onnx"), "d.onnx"),
        Phase("exporting to OpenVINO", export(b, "openvino", "d.xml"), "d.xml"),
        Phase("predicting", lambda root: predict(b, root), "results.jsonl"),
        Phase("evaluating", lambda root: evaluate(b, root), "m.json"),
        Phase("logging (watch)", watch, ""),
        Phase("exporting the log", log_export, "log.csv"),
    ]
    for phase in phases:
        match phase.name:
            case "training":
                phase.start = start(phase.name, (trained, d))
            case "saving" | "calibrating":
                phase.start = start(phase.name, (a, d))
            case "logging (watch)":
                phase.start = start(phase.name, (test, "camera"))
            case "exporting the log":
                phase.start = start(phase.name, (folder / "whole/logging (watch)/out/store", "store"))
                (phase.start / "out/log.csv").write_text("the table of yesterday\n")
            case _:
                phase.start = start(phase.name)
        match phase.name:  # what was there before
            case "exporting to ONNX":
                server.done(folder, *export(a, "onnx", "d.onnx")(phase.start), here=True)
            case "exporting to OpenVINO":
                server.done(folder, *export(a, "openvino", "d.xml")(phase.start), here=True)
            case "predicting":
                server.done(folder, *predict(a, phase.start), here=True)
            case "evaluating":
                server.done(folder, *evaluate(a, phase.start), here=True)
        root = folder / "whole" / phase.name
        shutil.copytree(phase.start, root)
        phase.old = printed(root / "out")
        if phase.name == "exporting to ONNX":
            server.done(folder, *export(b, "onnx", "b.onnx")(folder), here=True)  # so that forks have its graph
        phase.whole = server.done(root, *phase.argv(root))
        phase.new = printed(root / "out")
        phase.sizes = [size for file in (root / "out").rglob("*") if file.is_file() and (size := file.stat().st_size)]
        assert phase.new != phase.old
    return phases


def kill(server: Server, phase: Phase, root: Path, rng: random.Random, how: str) -> Killed | None:
    """Kills a run at a random moment, looks at what is left, and lets the command run once more; None: it had ended."""
    shutil.copytree(phase.start, root)
    if how == "seconds":
        at: float = rng.uniform(0, phase.whole.seconds)
    elif how == "event":
        at = rng.randint(1, phase.whole.events)
    else:
        at = rng.randrange(rng.choice(phase.sizes))
    argv = phase.argv(root)
    ended = server.run(root, argv, **{how: at})
    try:
        if ended.code >= 0:
            return None
        left, faults = judged(phase, root / "out")
        again = server.run(root, phase.again(root))
        if again.code:
            faults.append(f"the next run ends with {again.code}: {again.said[-500:]}")
        found = printed(root / "out")
        different = [name for name in {*found, *phase.new} if found.get(name) != phase.new.get(name)]
        strays = [*(root / "out").rglob(".*.part*"), *(root / "out").rglob(".*.lock")]
        hidden = [str(file.relative_to(root)) for file in strays]
        faults += [f"{name}: is still there after the next run" for name in hidden]
        faults += [f"{name}: is not what an unbroken run leaves" for name in different]
        return Killed(phase.name, how, at, left, faults, not different and not again.code)
    finally:
        shutil.rmtree(root)


def twice(server: Server, phase: Phase) -> list[str]:
    """Files that a run leaves otherwise where one has ended already: so a kill between the end and the exit would."""
    root = server.folder / "whole" / phase.name
    server.done(root, *phase.again(root))
    found = printed(root / "out")
    return [name for name in {*found, *phase.new} if found.get(name) != phase.new.get(name)]


def judged(phase: Phase, out: Path) -> tuple[str, list[str]]:
    """Content of the main file, and the files that are neither the old nor the new ones."""
    faults, logged = [], 0
    found = printed(out)
    for name, seen in found.items():
        if name.endswith(UNFINISHED) or name.startswith("table"):  # tables are made anew after each line of a log
            continue
        if isinstance(seen, list):  # a log: what is in it is right, and the rest may be missing
            logged = len(seen)
            if not (seen == phase.new[name][:logged] if name == "runs.jsonl" else set(seen) <= set(phase.new[name])):
                faults.append(f"{name}: holds what no unbroken run logs")
        elif seen not in (phase.old.get(name), phase.new.get(name)):
            faults.append(f"{name}: is neither the old file nor the new one")
    faults += [f"{name}: was there and has gone" for name in phase.old if name not in found]
    log = phase.main or "store/log.db"
    if isinstance(phase.new[log], list):
        return ("none" if not logged else "new" if logged == len(phase.new[log]) else "part"), faults
    seen = found.get(phase.main)
    return ("none" if seen is None else "old" if seen == phase.old.get(phase.main) else "new"), faults


def printed(out: Path) -> Print:
    """Content of each visible file, without times; of logs a list."""
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    found = {file.relative_to(out).as_posix(): file for file in files}
    return {name: _printed(file) for name, file in found.items() if ".db-" not in name}


def _printed(file: Path) -> Any:  # noqa: PLR0911 - a kind of file per line
    data = file.read_bytes()
    match file.suffix:
        case ".safetensors":
            return _detector(file)
        case ".db":
            with sqlite3.connect(f"{file.as_uri()}", uri=True) as connection:
                tables = connection.execute("SELECT name FROM sqlite_master WHERE name = 'inspections'").fetchall()
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                query = "SELECT name, digest, verdict, score FROM inspections ORDER BY name"
                return connection.execute(query).fetchall() if tables else []
        case ".json" if file.name == "table.json":
            return _untimed(json.loads(data), "training", "file")
        case ".json":
            return _untimed(json.loads(data))
        case ".html":
            return data.endswith(b"</html>\n") or data.rstrip().endswith(b"</html>")
        case ".jsonl" if file.name == "runs.jsonl":
            *lines, _ = data.split(b"\n")  # a last line without an end does not count
            return [json.dumps(_untimed(json.loads(line), "file")) for line in lines]
        case ".md" | ".tex":  # holds times
            return data.endswith(b"\n")
        case ".csv" if file.name == "table.csv":
            return len(data.splitlines())
        case ".csv":
            return data.decode()
    return hashlib.sha256(data).hexdigest()


def _detector(file: Path) -> Any:
    tensors = hashlib.sha256()
    with safe_open(file, "np") as opened:
        metadata = json.loads(opened.metadata()["unflaw"])
        for name in sorted(opened.keys()):
            tensors.update(name.encode() + opened.get_tensor(name).tobytes())
    return [tensors.hexdigest(), json.dumps(_untimed(metadata), sort_keys=True)].__repr__()


def _untimed(value: Any, *costs: str) -> Any:
    """Without times, and without these costs, which depend on them: a detector file holds its seconds as text."""
    if isinstance(value, dict):
        timed = ("seconds", "timing", "trained", "calibrated", "machines", "when", "time", *costs)
        return {name: _untimed(inner, *costs) for name, inner in value.items() if name not in timed}
    return [_untimed(inner, *costs) for inner in value] if isinstance(value, list) else value


def campaign(
    server: Server, phases: Sequence[Phase], folder: Path, kills: int, seed: int = 0, seconds: float = float("inf")
) -> list[Killed]:
    """So many kills, in turn over the phases and the ways to kill; fewer where `seconds` are over.

    A run that ends before its kill does not count.
    """
    rng, done, started = random.Random(seed), list[Killed](), time.monotonic()
    turns: Counter[str] = Counter()
    while len(done) < kills and time.monotonic() - started < seconds:
        phase = phases[len(done) % len(phases)]
        how = phase.kinds[turns[phase.name] % len(phase.kinds)]
        found = kill(server, phase, folder / "runs/run", rng, how)
        if found is not None:
            turns[phase.name] += 1
            done.append(found)
    return done


def table(found: Sequence[Killed]) -> str:
    """A row for each phase, in Markdown."""
    heads = ["phase", "killed", "of these at a time / a file event / a byte", "old file left", "new file", "none yet"]
    heads += ["log with whole lines", "survived", "resumed equal"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in [*dict.fromkeys(killed.phase for killed in found), "all"]:
        own = [killed for killed in found if name in (killed.phase, "all")]
        how, left = Counter(killed.how for killed in own), Counter(killed.left for killed in own)
        cells = [name, len(own), " / ".join(str(how[kind]) for kind in ("seconds", "event", "byte"))]
        cells += [left[state] for state in ("old", "new", "none", "part")]
        cells += [sum(not killed.faults for killed in own), sum(killed.equal for killed in own)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
