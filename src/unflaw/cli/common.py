"""Options, errors and progress for all commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unflaw import registry
from unflaw.parallel.launch import report_failure

if TYPE_CHECKING:
    from unflaw.config import WeightSource
    from unflaw.datasets import Dataset
    from unflaw.detector import Detector
    from unflaw.inference.base import BasePredictor
    from unflaw.io.progress import Progress

app = typer.Typer(
    name="unflaw",
    help="Visual anomaly detection trained on good images only.",
    epilog="Example:  unflaw train --data parts/good --out parts.safetensors"
    "  then  unflaw predict parts.safetensors parts/new --out results --images",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from unflaw._version import __version__

        typer.echo(f"unflaw {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_KINDS = "Data set: MVTec layout, an unpacked public benchmark, a folder of good images, or a CSV table."
Data = Annotated[Path, typer.Option("--data", help=_KINDS)]
Several = Annotated[
    list[Path],
    typer.Option("--data", help=f"{_KINDS} May be repeated. A folder of categories means all of them."),
]
TAIL = "Estimate thresholds for rates that the images cannot certify, from the tail of their scores."
METHODS = f"Method: {', '.join(registry.names())}."

WeightFile = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Backbone weights (.safetensors or .pth), or random for random weights (./random is a file). "
        "Of several backbones: NAME=FILE, may be repeated.",
    ),
]
BackboneNames = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone", help="Backbone: any timm model that supports features_only. Repeated: several see each image."
    ),
]
Size = Annotated[
    str | None, typer.Option(help="Canvas that images are resized to, in pixels: 256, or width x height as 512x224.")
]
Category = Annotated[str | None, typer.Option(help="Category of the images, for a detector with several.")]
ModelFile = Annotated[Path, typer.Argument(help="Detector file (.safetensors, or exported: .onnx, .xml).")]
TrainedFile = Annotated[Path, typer.Argument(help="Detector file (.safetensors).")]


def levels_of(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2,3", param_hint="--levels") from None


def setting_of(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint="--set")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def writable(path: Path) -> None:
    """Fails if a file cannot be written there, before the work instead of after it."""
    from unflaw.io.files import make_folder, target_of

    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file")
    if path.is_file() or not path.exists():  # not a pipe or a device
        make_folder(target_of(path).parent)


def detector_file(path: Path) -> None:
    """Checks `writable`, and the suffix of a trained detector."""
    from unflaw.io.files import check_name

    check_name(path)
    writable(path)


def images_in(inputs: list[Path]) -> list[Path]:
    from unflaw.io.listing import Entry, counted, list_images, note

    passed_over: list[Entry] = []
    paths = [p for item in inputs for p in (list_images(item, passed_over) if item.is_dir() else [item])]
    report_problems(note(counted(passed_over)))
    if not paths:
        raise ValueError(f"{', '.join(map(str, inputs))}: there are no images to inspect")
    return paths


def load_detector(model: Path) -> BasePredictor:
    import unflaw

    return unflaw.load(model)


def load_trained(model: Path) -> Detector:
    from unflaw.detector import Detector

    return Detector.load(model)


def said(text: object) -> str:
    """Escapes what is not printable, such as terminal control codes or bytes that are no UTF-8 in file names."""
    legible = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in legible)


def weights_of(given: list[str] | None, backbone: str) -> WeightSource:
    """Parses `--weights`: a file or `random`, or NAME=FILE for each of several backbones, which `backbone` joins by +.

    Raises:
        ValueError: Several weights of one backbone, or without the names of theirs.
    """
    from unflaw.config import OneWeightSource, Weights

    names = backbone.split("+")
    by_name: dict[str, OneWeightSource] = {}
    common: OneWeightSource = None
    for text in given or []:
        name, equals, file = text.partition("=")
        if equals and name in names:
            by_name[name] = Weights.parse(file)
        else:
            if equals and len(names) > 1 and not Path(text).exists():
                raise ValueError(f"--weights {text}: {name} is none of the backbones {', '.join(names)}")
            common = Weights.parse(text)
            if by_name or (len(names) > 1 and len(given or []) > 1):
                raise ValueError(f"--weights {text}: of several, each needs its backbone, as in {names[0]}=FILE")
    return by_name or common


def report_problems(problems: Any) -> None:
    for problem in problems:
        typer.echo(said(f"note: {problem}"), err=True)


def report_dataset_problems(datasets: dict[str, Dataset]) -> None:
    several = len(datasets) > 1
    for name, dataset in datasets.items():
        report_problems(f"{name}: {problem}" if several else problem for problem in dataset.problems)


@contextmanager
def progress_bars(shown: bool = True, every: float = 30.0) -> Iterator[Progress]:
    """A bar per stage with loss and remaining time; without a terminal, a line every `every` seconds."""
    shown = shown and sys.stderr is not None  # None: for example in a service
    if shown and not sys.stderr.isatty():
        yield _progress_lines(every)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bars:

        def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, loss="")
            elif done < bars.tasks[tasks[stage]].completed:  # the same stage of another run
                bars.reset(tasks[stage])
            bars.update(tasks[stage], completed=done, total=total, loss="" if loss is None else f"loss {loss:.4f}")

        yield progress


def _progress_lines(every: float) -> Progress:
    """Prints lines such as `training: 60 of 200, loss 0.1234, about 5 min left`."""
    printed, began, reached = time.monotonic(), dict[str, tuple[float, int]](), dict[str, int]()

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        nonlocal printed
        now = time.monotonic()
        if done < reached.get(stage, done + 1):  # the stage begins, maybe of another run
            began[stage] = now, done
        reached[stage], (since, first) = done, began[stage]
        if now - printed < every:
            return
        printed = now
        line = f"{stage}: {done} of {total}" + ("" if loss is None else f", loss {loss:.4f}")
        if first < done < total:
            left = (now - since) * (total - done) / (done - first)
            line += f", about {left:.0f} s left" if left < 100 else f", about {left / 60:.0f} min left"
        with suppress(OSError):  # a closed stderr does not end the work
            typer.echo(said(line), err=True)

    return progress


def reader_gone() -> bool:
    """Returns True if standard output or standard error is closed, as after `unflaw … | head -1`."""
    if not hasattr(select, "poll"):  # Windows
        return True
    closed = select.poll()
    for handle in (1, 2):
        closed.register(handle, 0)
    return any(event & select.POLLERR for _, event in closed.poll(0))


_commands: list[Callable[[], str]] = []  # `stopped` of running commands, the outer one first


@contextmanager
def errors(stopped: Callable[[], str] = lambda: "stopped; the same command starts over") -> Iterator[None]:
    """Prints errors that a user can correct in one line, with exit code 2; Ctrl-C prints one line, with exit code 130.

    Args:
        stopped: Message for Ctrl-C: what is left, and how to go on. If commands are nested, the outer one's is printed.
    """
    from tempfile import gettempdir

    from unflaw.errors import FULL, WriteError, remedy

    _commands.append(stopped)
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        typer.echo(said(_commands[0]()), err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and reader_gone():
            raise  # `main` exits silently
        if isinstance(error, ImportError) and "unflaw[" not in str(error):
            error = ImportError(f"{error}; this command needs: pip install 'unflaw[all]'")
        elif isinstance(error, OSError) and error.filename and error.strerror:
            error = OSError(f"{error.filename}: {error.strerror}; {remedy(error.errno)}")
        elif isinstance(error, OSError) and error.errno in FULL and not isinstance(error, WriteError):
            error = OSError(f"{error.strerror}; make room for the output and for temporary files in {gettempdir()}")
        expected = not isinstance(error, RuntimeError) or type(error).__name__ == "WeightsError"
        if not report_failure(error, expected):
            if not expected:
                raise
            typer.echo(said(f"error: {error}"), err=True)
        raise typer.Exit(2) from error
    except Exception as error:
        if not report_failure(error, False):
            raise
        raise typer.Exit(2) from error
    finally:
        _commands.pop()
