"""State after a kill -9 at work: nothing acknowledged is lost, nothing is inspected twice."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text
from tests.conftest import textured

from unflaw.station.log import Filter, Log, sha256

pytestmark = pytest.mark.slow


def image(seed: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(textured(np.random.default_rng(seed))).save(data, "PNG")
    return data.getvalue()


def test_every_acknowledged_inspection_is_in_the_log_after_a_kill(start_station, saved, database):
    server = start_station(saved, options=["--database", database])
    acknowledged: list[tuple[int, str]] = []
    stop = threading.Event()

    def load(number: int) -> None:
        for i in range(10_000):
            if stop.is_set():
                return
            data = image(10_000 * number + i)
            try:
                answer = server.ask("/inspect", data)
            except (OSError, ValueError, AssertionError):  # it is dead, or was before the answer was whole
                return
            acknowledged.append((answer["id"], sha256(data)))

    clients = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for client in clients:
        client.start()
    while len(acknowledged) < 20:
        time.sleep(0.01)
    time.sleep(0.5)
    server.kill()
    stop.set()
    for client in clients:
        client.join()
    log = Log(database, server.store / "images")
    if "sqlite" in database:
        with log.engine.connect() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    found = {entry.id: entry for entry in log.find(Filter(), limit=100_000)}
    assert len(acknowledged) >= 20 and {number for number, _ in acknowledged} <= set(found)
    for number, digest in acknowledged:
        assert found[number].digest == digest and sha256(log.image(digest).read_bytes()) == digest
    again = start_station(saved, options=["--database", database])  # and it starts anew
    assert again.ask("/inspect", image(1))["id"] > max(found)


def test_a_watcher_that_is_killed_again_and_again_inspects_each_image_once(saved, tmp_path):
    folder, out, store, runs = tmp_path / "camera", tmp_path / "sorted", tmp_path / "station", 3
    folder.mkdir()
    command = [sys.executable, "-c", "from unflaw.cli import main; main()", "watch", folder, "--model", saved]
    command += ["--out", out, "--store", store, "--settle", "0", "--poll-interval", "0.01"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    contents = {f"{i:03d}.png": image(i) for i in range(60)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    for run in range(runs):
        last = run == runs - 1
        process = subprocess.Popen(
            [str(part) for part in (*command, *(["--once"] if last else []))],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        if last:
            assert process.communicate()[0] is not None and process.returncode == 0
            break
        for _ in range(5 + 3 * run):  # killed at some point of its work
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    log = Log(f"sqlite:///{store / 'log.db'}")
    found = log.find(Filter(), limit=1000)
    assert sorted(entry.name for entry in found) == sorted(contents)
    assert not list(folder.iterdir())
    for entry in found:
        assert (out / entry.verdict / entry.name).read_bytes() == contents[entry.name]
    assert sum(path.is_file() and not path.name.startswith(".") for path in out.rglob("*")) == len(contents)
