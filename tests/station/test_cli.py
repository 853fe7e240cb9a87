"""The station on the command line, and the ways in which it is started elsewhere."""

import csv
import os
import re
import socket
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unflaw.cli import app
from unflaw.station.log import Entry, Filter, Log, sha256

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def unflaw(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def complaint(done: Result) -> str:
    assert done.exit_code == 2 and "Traceback" not in done.output, (done.output, done.exception)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def store(tmp_path) -> Path:
    """A log with three inspections, one of them old, of one image."""
    log = Log(f"sqlite:///{tmp_path / 'station/log.db'}", tmp_path / "station/images")
    for year, verdict in ((2020, "good"), (2026, "defect"), (2026, "good")):
        entry = Entry(
            time=datetime(year, 11, 25, 12, tzinfo=timezone.utc),
            name=f"{verdict}.png",
            digest=sha256(b"x"),
            size=1,
            width=1,
            height=1,
            detector="parts",
            detector_digest=sha256(b"detector"),
            category="",
            score=1.0,
            p_value=0.5,
            threshold=2.0,
            verdict=verdict,
            regions=[],
            sampled=False,
        )
        log.add(entry, b"x")
    log.close()
    return tmp_path / "station"


def test_the_log_becomes_a_table(store, tmp_path):
    out = tmp_path / "tables/log.csv"
    assert "3 inspections" in unflaw("log", "export", "--store", store, "--out", out).stdout
    done = unflaw("log", "export", "--store", store, "--out", out, "--since", "2026-01-01", "--verdict", "defect")
    assert done.exit_code == 0 and done.stdout.endswith(": 1 inspection\n")
    with out.open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["defect.png"]
    assert ": 1 inspection\n" in unflaw("log", "export", "--store", store, "--out", out, "--until", "2026-01-01").stdout
    assert "3 inspections" in unflaw("log", "export", "--store", store, "--out", out, "--undecided").stdout
    url = f"sqlite:///{store / 'log.db'}"
    assert "3 inspections" in unflaw("log", "export", "--out", out, UNFLAW_DATABASE=url).stdout


def test_a_port_that_is_taken(saved, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = unflaw("serve", saved, "--store", tmp_path / "station", "--port", taken.getsockname()[1])
    assert "choose another --port" in complaint(done)


def test_the_log_is_pruned(store):
    assert "removed 1 record and 0 images" in unflaw("log", "prune", "--store", store, "--days", 2000).stdout
    done = unflaw("log", "prune", "--store", store, "--gigabytes", 0)
    assert "removed 0 records and 1 image (" in done.stdout
    assert Log(f"sqlite:///{store / 'log.db'}").count(Filter()) == 2


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["log", "export", "--store", "nowhere", "--out", "log.csv"], "nowhere"),
        (["log", "export", "--store", "STORE", "--out", "log.xlsx"], ".parquet"),
        (["log", "export", "--store", "STORE", "--out", "."], "folder"),
        (["log", "prune", "--store", "STORE"], "--days"),
        (["log", "prune", "--database", "mysql://host/name", "--days", "3"], "mysql"),
        (["serve", "MODEL", "--host", "0.0.0.0"], "--token-file"),
        (["serve", "MODEL", "--host", "192.168.1.7"], "--token-file"),
        (["serve", "MODEL", "--token-file", "nowhere"], "nowhere"),
        (["serve", "MODEL", "--token-file", "short"], "16 or more ASCII letters"),
        (["serve", "MODEL", "--tls-key", "key.pem"], "--tls-certificate"),
        (["serve", "MODEL", "--cors", "line.example"], "https://line.example"),
        (["serve", "MODEL", "--cors", "https://line.example/page"], "https://line.example:8080"),
        (["serve", "MODEL", "--store", "short"], "names a folder"),
        (["serve", "MODEL", "--root-path", "line3"], "give one such as /line3"),
        (["serve", "MODEL", "--root-path", "/station"], "choose another prefix"),
        (
            ["log", "export", "--store", "STORE", "--out", "log.csv", "--verdict", "bad"],
            "good, review, defect",
        ),
        (["serve", "nowhere.safetensors"], "nowhere.safetensors"),
        (["serve", "MODEL", "MODEL"], "two detectors"),
        (["watch", "nowhere", "--model", "MODEL", "--out", "out"], "nowhere"),
        (["watch", ".", "--model", "MODEL", "--out", "out", "--category", "nut"], "nut"),
        (["watch", ".", "--model", "nowhere.safetensors", "--out", "out"], "nowhere.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(store, saved, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("123456\n")
    given = {"STORE": store, "MODEL": saved}
    assert named in complaint(unflaw(*(given.get(argument, argument) for argument in arguments)))


def test_a_token_in_a_file_opens_the_station_to_others(start_station, saved, tmp_path):
    (tmp_path / "token").write_text("a-token-of-many-letters\n")
    server = start_station(saved, options=["--host", "0.0.0.0", "--token-file", tmp_path / "token"])
    with pytest.raises(AssertionError, match="needs its token"):
        server.ask("/station")
    server._token = "a-token-of-many-letters"
    assert server.ask("/station")["detectors"][0]["name"] == "parts"


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--help"],
        ["watch", "--help"],
        ["log", "export", "--store", "STORE", "--out", "OUT"],
        ["serve", "m", "--host", "::"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_before_a_detector_needs_it(store, tmp_path, arguments):
    given = {"STORE": store, "OUT": tmp_path / "log.csv"}
    code = (
        "import sys\nfrom unflaw.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print({'torch', 'timm'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, *(str(given.get(argument, argument)) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"})
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_a_folder_is_watched_until_nothing_is_left(saved, parts, tmp_path):
    camera = tmp_path / "camera"
    camera.mkdir()
    for path in sorted((parts / "test").rglob("*.png")):
        (camera / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    options = ["--store", tmp_path / "station", "--settle", 0, "--patience", 0, "--poll-interval", 0.01, "--once"]
    (camera / "broken.png").write_bytes(b"no image")
    (camera / "\x1b[2Jescape.png").write_bytes((camera / "square-000.png").read_bytes())
    Path(os.fsdecode(bytes(camera) + b"/not \xff UTF-8.png")).write_bytes((camera / "square-000.png").read_bytes())
    (camera / "IMG_1.HEIC").write_bytes(b"a kind that is not read")
    done = unflaw("watch", camera, "--model", saved, "--out", tmp_path / "sorted", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "square-000.png: defect, score" in done.stdout and "broken.png" in done.stderr
    assert "\\x1b[2Jescape.png: defect" in done.stdout and "not \\udcff UTF-8.png: defect" in done.stdout
    first, *_, last = done.stdout.splitlines()
    assert f"{camera}: watched every 0.01 s until no image waits, with {saved}; images are moved to" in first
    assert "10 images inspected (" in last and last.endswith("1 file unreadable, 1 file passed over")
    assert "IMG_1.HEIC is passed over" in done.stderr and [path.name for path in camera.iterdir()] == ["IMG_1.HEIC"]
    assert len(list((tmp_path / "sorted").rglob("*.png"))) == 11
    assert (tmp_path / "sorted/error/broken.png").is_file() and (tmp_path / "sorted/defect/square-000.png").is_file()
    assert Log(f"sqlite:///{tmp_path / 'station/log.db'}").count(Filter()) == 10


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "deploy").iterdir()))
def test_what_starts_it_elsewhere_uses_options_that_there_are(file):
    text = (ROOT / "deploy" / file).read_text("utf-8").replace('", "', " ").replace('"', " ")
    (command,) = re.findall(r"unflaw (serve|watch) (.*)", text.split("ENTRYPOINT")[-1])
    options = re.findall(r"--[a-z-]+", command[1])
    known = unflaw(command[0], "--help", COLUMNS="200").stdout
    assert options and all(re.search(rf"{option}\b", known) for option in options)
