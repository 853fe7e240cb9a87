"""Starts the processes of a training, monitors them, and ends all of them if one fails. No torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unflaw.errors import TrainingError

FAILURE_FOLDER = "UNFLAW_FAILURE_FOLDER"  # environment variable of a started process: the folder for its failure report
STOPPING = 60.0  # seconds for all processes to stop after Ctrl-C; a second Ctrl-C ends them at once
PATIENCE = 2.0  # seconds for the others to report a failure, after one has failed


def launched() -> bool:
    """Returns True in a process of a group, started by `launch`, torchrun or srun."""
    return "LOCAL_RANK" in os.environ or ("SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1")


def launch(arguments: Sequence[str], processes: int, nodes: int = 1) -> int:
    """Runs `python -m unflaw` with some arguments as several processes, the first of which prints.

    With several nodes, each node runs this, with MASTER_ADDR and MASTER_PORT of the first node and its own NODE_RANK
    in the environment.

    Returns:
        0; 2 if a process failed: all have ended, and the first failure is on stderr; 130 if all have stopped at
        Ctrl-C, and the first process has printed where.

    Raises:
        KeyboardInterrupt: Ctrl-C, and no process has reported that it stopped.
        TrainingError: Several nodes, and variables are missing in the environment.
    """
    if nodes > 1 and (missing := [n for n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if n not in os.environ]):
        raise TrainingError(
            f"--nodes {nodes} needs {', '.join(missing)} in the environment of every node; or start it with torchrun"
        )
    with tempfile.TemporaryDirectory(prefix="unflaw-") as folder:
        group: list[subprocess.Popen[bytes]] = []
        try:
            common = _environment(processes, nodes)
            for rank in range(processes):
                group.append(_start(arguments, rank, Path(folder), common))
            while any(process.poll() is None for process in group) and not any(process.poll() for process in group):
                time.sleep(0.1)
            if not any(process.poll() for process in group):
                return 0
            patient = time.monotonic() + PATIENCE
            while any(process.poll() is None for process in group) and time.monotonic() < patient:
                time.sleep(0.1)
            sys.stderr.write(f"error: {_reason([process.poll() for process in group], Path(folder))}\n")
            return 2
        except KeyboardInterrupt:
            if group and _stop(group) == 130:
                return 130
            raise
        finally:
            _end(group)


def watch_parent() -> None:
    """In a process started by `launch`: ends it when the launching process is gone."""
    if FAILURE_FOLDER not in os.environ:
        return

    def wait() -> None:
        if not os.read(0, 1):
            os._exit(2)

    threading.Thread(target=wait, daemon=True).start()


def report_failure(error: BaseException, expected: bool) -> bool:
    """In a process started by `launch`: reports why it fails to the launching process.

    Args:
        error: The failure.
        expected: True: report the message only. False: report the traceback.

    Returns:
        False if this process was not started by `launch` and has to print the error itself.
    """
    if FAILURE_FOLDER not in os.environ:
        return False
    message = str(error) if expected else "".join(traceback.format_exception(error))
    report = {"time": time.time(), "expected": expected, "message": message}
    path = Path(os.environ[FAILURE_FOLDER], f"{os.environ['LOCAL_RANK']}.json")
    path.with_suffix(".part").write_text(json.dumps(report), "utf-8")
    path.with_suffix(".part").replace(path)
    return True


def _environment(processes: int, nodes: int = 1) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    found = {**meeting, "OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
    return found if nodes > 1 else found | meeting  # variables of an earlier training are ignored


def _start(arguments: Sequence[str], rank: int, folder: Path, common: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = common | {"LOCAL_RANK": str(rank), FAILURE_FOLDER: str(folder)}
    command = [sys.executable, "-m", "unflaw", *arguments]
    # a session of its own: only this process sends Ctrl-C, once to each
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.PIPE, "start_new_session": True}
    if rank == 0:
        return subprocess.Popen(command, **options)
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, **options)


def _reason(codes: Sequence[int | None], folder: Path) -> str:
    """Reason of a failure: a killed process, else the first report, else a process that ended without one."""
    failed = {rank: code for rank, code in enumerate(codes) if code}
    for rank, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
            hint = "; perhaps memory ran out" if name == "SIGKILL" else ""
            return f"process {rank + 1} of {len(codes)} was ended by signal {-code} ({name}){hint}; train again"
    reports = [(json.loads(path.read_text("utf-8")), int(path.stem)) for path in folder.glob("*.json")]
    if reports:
        first, rank = min(reports, key=lambda item: (not item[0]["expected"], item[0]["time"]))
        failed_at = "" if first["expected"] else f"process {rank + 1} of {len(codes)} failed:\n"
        return failed_at + first["message"]
    rank, code = next(iter(failed.items()))
    log = folder / f"{rank}.log"
    lines = log.read_text("utf-8", "replace").strip().splitlines()[-5:] if log.is_file() else []
    return "\n".join([f"process {rank + 1} of {len(codes)} ended with exit code {code}", *lines])


def _stop(group: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Forwards Ctrl-C and waits for the end of the step; returns the exit code of the first process, if any."""
    for process in group:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    patient = time.monotonic() + STOPPING
    while any(process.poll() is None for process in group) and time.monotonic() < patient:
        time.sleep(0.1)
    return group[0].poll()


def _end(group: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminates running processes, and kills those that do not end."""
    for process in group:
        if process.poll() is None:
            process.terminate()
    for process in group:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
