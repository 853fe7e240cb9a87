"""Commands of the inspection station: serve, watch and log."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args
from urllib.parse import urlsplit

import typer

from unflaw.cli.common import Category, app, errors, said
from unflaw.io.words import count

if TYPE_CHECKING:
    from unflaw.station.log import Log

Store = Annotated[Path, typer.Option(help="Folder of the log and of kept images.")]
Database = Annotated[
    str | None,
    typer.Option(
        envvar="UNFLAW_DATABASE", help="URL of the log's database; default: SQLite in STORE/log.db.", show_envvar=True
    ),
]
Keep = Annotated[
    bool, typer.Option("--keep/--no-keep", help="Keep the images in STORE/images, for review and calibration.")
]
Sample = Annotated[float, typer.Option(min=0, max=1, help="Share of images drawn at random for review.")]
Days = typer.Option(min=0, max=365_000, help="Maximum age of records in days; older ones are removed.")
Gigabytes = typer.Option(min=0, max=1e9, help="Maximum size of all images in GB; the oldest are removed.")


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(help="Detector files, or NAME=FILE.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; any address except loopback requires a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port to listen on.")] = 8000,
    store: Store = Path("station"),
    database: Database = None,
    keep: Keep = True,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; the environment variable UNFLAW_TOKEN also sets it.")
    ] = None,
    sample: Sample = 0.05,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="Maximum size of an image file in MB.")] = 32,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Maximum number of megapixels of an image.")] = 50,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time limit of a request in seconds.")] = 30,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Maximum number of requests in progress or waiting; more are refused with 429.")
    ] = 16,
    cors: Annotated[
        list[str] | None, typer.Option(help="Another site whose pages may use the station; may be repeated.")
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path under which a reverse proxy publishes the station, such as /line3.")
    ] = "",
    retain_days: Annotated[float | None, Days] = None,
    retain_gigabytes: Annotated[float | None, Gigabytes] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file of the certificate; browsers allow the camera over https only.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
) -> None:
    """Serve detectors over HTTP, with a web page, a log, a review queue and metrics.

    Example:  unflaw serve parts.safetensors --port 8000  then open http://127.0.0.1:8000
    """
    with errors():
        import socket

        import uvicorn

        from unflaw.station.app import create_app
        from unflaw.station.detectors import load_all
        from unflaw.station.guard import is_loopback
        from unflaw.station.service import Limits, Station

        token = _token(token_file)
        if token is None and not is_loopback(host):
            raise ValueError(f"{host} can be reached by others: set a token with --token-file or UNFLAW_TOKEN")
        if (tls_certificate is None) != (tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together: give both, or neither")
        for origin in cors or ():
            scheme, site, *_ = urlsplit(origin)
            if scheme not in ("http", "https") or not site or origin != f"{scheme}://{site}":
                raise ValueError(f"--cors {origin}: is not an origin such as https://line.example:8080")
        limits = Limits(round(max_megabytes * 1e6), round(max_megapixels * 1e6), seconds, concurrency, sample)
        station = Station(load_all(models), _log(store, database, keep), limits)
        served = create_app(
            station,
            token=token,
            origins=cors or (),
            root_path=root_path,
            days=retain_days,
            image_bytes=_bytes(retain_gigabytes),
        )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port} ({error.strerror}); choose another --port") from error
        scheme = "https" if tls_certificate else "http"
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{root_path}"
        typer.echo(f"{', '.join(station.detectors)} on {address}")
        config = uvicorn.Config(
            served,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=round(seconds) + 1,
            ssl_certfile=tls_certificate,
            ssl_keyfile=tls_key,
        )
        with listening, suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
            uvicorn.Server(config).run(sockets=[listening])


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder where a camera writes images.")],
    model: Annotated[Path, typer.Option(help="Detector file.")],
    out: Annotated[Path, typer.Option(help="Folder for the folders good, defect, review and error.")],
    store: Store = Path("station"),
    database: Database = None,
    keep: Keep = True,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the images instead of moving them.")] = False,
    category: Category = None,
    sample: Sample = 0.05,
    every: Annotated[
        float, typer.Option("--poll-interval", min=0.01, help="Seconds between two looks at the folder.")
    ] = 1,
    settle: Annotated[
        float, typer.Option(min=0, help="Seconds for which a file must not change before it is read.")
    ] = 2,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds after which a file that cannot be read is filed as an error.")
    ] = 60,
    once: Annotated[bool, typer.Option("--once", help="Process the existing files, then exit.")] = False,
) -> None:
    """Inspect images as they arrive in a folder, once each, and move or copy them by verdict.

    Example:  unflaw watch camera --model parts.safetensors --out sorted
    """
    with errors():
        from unflaw.station.detectors import Served
        from unflaw.station.watch import Watcher

        stop, gone = threading.Event(), list[BrokenPipeError]()

        def report(line: str) -> None:
            try:
                typer.echo(said(line), err=line.startswith("note: "))
            except BrokenPipeError as error:  # finish the current image, then stop
                gone.append(error)
                stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        watcher = Watcher(
            Served(model.stem, model),
            _log(store, database, keep),
            folder,
            out,
            copy=copy,
            category=category,
            settle=settle,
            patience=patience,
            sample=sample,
            report=report,
        )
        watcher.run(stop, every=every, once=once)
        if gone:
            raise gone[0]


log_app = typer.Typer(
    help="Export the log of the station, or remove old records and images.",
    epilog="Example:  unflaw log export --out inspections.parquet  then  unflaw log prune --days 90",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(log_app, name="log")


@log_app.command("export")
def export_log(
    out: Annotated[Path, typer.Option(help="File to write, .csv or .parquet.")],
    store: Store = Path("station"),
    database: Database = None,
    since: Annotated[datetime | None, typer.Option(help="Earliest time, UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Time before which inspections were logged, UTC.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only this verdict: good, defect or review.")] = None,
    detector: Annotated[str | None, typer.Option(help="Only inspections by this detector.")] = None,
    decided: Annotated[
        bool | None, typer.Option("--decided/--undecided", help="Only inspections with or without a decision.")
    ] = None,
) -> None:
    """Write inspections as a table, one row each, oldest first.

    Example:  unflaw log export --out today.csv --since 2026-11-25
    """
    with errors():
        from unflaw.cli.common import writable
        from unflaw.postprocessing.results import Verdict
        from unflaw.station.export import export
        from unflaw.station.log import Filter

        if verdict not in (None, *get_args(Verdict)):
            raise ValueError(f"--verdict {verdict}: choose one of {', '.join(get_args(Verdict))}")
        writable(out)
        since, until = (moment and moment.replace(tzinfo=moment.tzinfo or timezone.utc) for moment in (since, until))
        wanted = Filter(verdict=verdict, detector=detector, since=since, until=until, decided=decided)
        written = export(_existing(store, database), out, wanted)
        typer.echo(f"{out}: {count(written, 'inspection')}")


@log_app.command("prune")
def prune_log(
    store: Store = Path("station"),
    database: Database = None,
    days: Annotated[float | None, Days] = None,
    gigabytes: Annotated[float | None, Gigabytes] = None,
) -> None:
    """Remove old records and images once. `unflaw serve --retain-days 90` does so every hour.

    Example:  unflaw log prune --days 90 --gigabytes 20
    """
    with errors():
        if days is None and gigabytes is None:
            raise ValueError("give --days, --gigabytes or both")
        done = _existing(store, database).prune(days=days, image_bytes=_bytes(gigabytes))
        records, images = count(done.records, "record"), count(done.images, "image")
        typer.echo(f"removed {records} and {images} ({done.bytes / 1e6:.1f} MB)")


def _log(store: Path, database: str | None, keep: bool) -> Log:
    from unflaw.station.log import Log

    if store.exists() and not store.is_dir():
        raise ValueError(f"{store}: is a file; --store names a folder")
    return Log(database or f"sqlite:///{(store / 'log.db').absolute()}", store / "images" if keep else None)


def _existing(store: Path, database: str | None) -> Log:
    if database is None and not (store / "log.db").is_file():
        raise ValueError(f"{store / 'log.db'}: there is no such log; give its folder with --store")
    return _log(store, database, keep=True)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else round(gigabytes * 1e9)


def _token(file: Path | None) -> str | None:
    token = file.read_text("utf-8").strip() if file else os.environ.get("UNFLAW_TOKEN")
    if token is not None and (len(token) < 16 or not (token.isascii() and token.isprintable()) or " " in token):
        raise ValueError("a token needs 16 or more ASCII letters and no spaces; create one with `openssl rand -hex 32`")
    return token
