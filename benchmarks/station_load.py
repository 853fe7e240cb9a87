"""Load test of the station on loopback: requests/s, latencies, status codes, and memory over many requests.

    python benchmarks/station_load.py parts.safetensors --images parts/test/good

Starts `unflaw serve` in a process of its own with its log on disk. A client that gets status 429 tries again after the
seconds that the answer gives. Latencies are those of answers with a verdict, from the first byte sent to the last
received. The clients run in this process, on the same processors, with a minimal HTTP implementation to save CPU time.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import numpy as np

from unflaw.io.listing import list_images


@dataclass
class Outcome:
    """Outcome of one run."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds, of answers with a verdict
    statuses: Counter[str] = field(default_factory=Counter)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, float]:
    """Send a request; return the status, and the seconds that a refused client should wait."""
    writer.write(request)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lines = dict(line.split(": ", 1) for line in head.splitlines()[1:] if ": " in line)
    await reader.readexactly(int(lines.get("content-length", 0)))
    return int(head.split(" ", 2)[1]), float(lines.get("retry-after", 0))


async def client(port: int, requests: Iterator[bytes], outcome: Outcome) -> None:
    """Send requests over one connection until there are none left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in requests:
        while True:
            started = time.perf_counter()
            try:
                status, wait = await ask(reader, writer, request)
            except (OSError, asyncio.IncompleteReadError) as error:
                outcome.statuses[type(error).__name__] += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            outcome.statuses[str(status)] += 1
            if status != 429:
                if status == 200:
                    outcome.latencies.append(time.perf_counter() - started)
                break
            await asyncio.sleep(wait)
    writer.close()


async def load(port: int, bodies: list[bytes], clients: int, count: int) -> Outcome:
    """Send `count` inspections from `clients` concurrent clients."""
    head = "POST /inspect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: {}\r\n\r\n"
    requests = (head.format(len(body)).encode() + body for body, _ in zip(cycle(bodies), range(count), strict=False))
    outcome, started = Outcome(), time.perf_counter()
    await asyncio.gather(*(client(port, requests, outcome) for _ in range(clients)))
    outcome.seconds = time.perf_counter() - started
    return outcome


@contextmanager
def station(model: Path, options: list[str]) -> Iterator[tuple[int, int]]:
    """Run `unflaw serve`; yield its port and process id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as store:
        command = [
            sys.executable,
            "-c",
            "from unflaw.cli import main; main()",
            "serve",
            str(model),
            "--port",
            str(port),
        ]
        process = subprocess.Popen([*command, "--store", store, *options], stdout=subprocess.DEVNULL)
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit("the station has ended") from None
                    time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def memory(process: int) -> float:
    """Resident memory in MB; Linux only."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder of images to send")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=1000, help="requests per number of clients")
    parser.add_argument("--soak", type=int, default=20_000, help="number of requests over which memory is measured")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of unflaw serve")
    given = parser.parse_args()
    bodies = [path.read_bytes() for path in list_images(given.images)[:64]]
    figures: dict[str, list[dict[str, object]]] = {"load": [], "memory": []}
    with station(given.model, given.serve) as (port, process):
        asyncio.run(load(port, bodies, 2, 20))  # warm up
        print("| clients | requests/s | p50 ms | p95 ms | p99 ms | answers |\n|---|---|---|---|---|---|")
        for clients in given.clients:
            outcome = asyncio.run(load(port, bodies, clients, given.requests))
            p50, p95, p99 = (1000 * np.percentile(outcome.latencies, share) for share in (50, 95, 99))
            rate = len(outcome.latencies) / outcome.seconds
            answers = ", ".join(f"{status}: {count}" for status, count in sorted(outcome.statuses.items()))
            print(f"| {clients} | {rate:.1f} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {answers} |", flush=True)
            row = {"clients": clients, "rate": rate, "p50": p50, "p95": p95, "p99": p99, "answers": outcome.statuses}
            figures["load"].append(row)
        if given.soak:
            print(f"\n| of {given.soak} requests | resident MB |\n|---|---|")
        done = 0
        while done < given.soak:
            part = min(given.soak - done, max(1, given.soak // 10))
            outcome = asyncio.run(load(port, bodies, 8, part))
            done += part
            if set(outcome.statuses) - {"200", "429"}:
                print(f"not only 200 and 429: {dict(outcome.statuses)}")
            figures["memory"].append({"requests": done, "megabytes": memory(process)})
            print(f"| {done} | {memory(process):.0f} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
