"""Starts the processes of a team, watches them, and ends all of them where one fails. No torch."""

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

OURS = "UNFLAW_TEAM"  # environment of a process started here: the folder where it leaves why it failed
STOPPING = 60.0  # seconds that they have after Ctrl-C; the second one ends them at once
PATIENCE = 2.0  # seconds that the others have to say why they fail, once one has failed


def launched() -> bool:
    """Whether this is already one process of a team: started here, by torchrun, or by srun."""
    return "LOCAL_RANK" in os.environ or ("SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1")


def launch(arguments: Sequence[str], processes: int, nodes: int = 1) -> int:
    """Runs `python -m unflaw` with some arguments as several processes, whose first one speaks.

    Where there are several nodes, each one runs this, with MASTER_ADDR and MASTER_PORT of the first and its own
    NODE_RANK in the environment.

    Returns:
        0, or 2 where a process failed: then all have ended, and what the first one to fail said is on stderr. 130
        where all have stopped at Ctrl-C, and the first process has said at what.

    Raises:
        KeyboardInterrupt: Ctrl-C, and nobody has said that they stopped.
        TrainingError: Several nodes, and an environment that does not say where they meet.
    """
    if nodes > 1 and (missing := [n for n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if n not in os.environ]):
        raise TrainingError(
            f"--nodes {nodes} needs {', '.join(missing)} in the environment of every node; or start it with torchrun"
        )
    with tempfile.TemporaryDirectory(prefix="unflaw-team-") as folder:
        team: list[subprocess.Popen[bytes]] = []
        try:
            common = _environment(processes, nodes)
            for rank in range(processes):
                team.append(_start(arguments, rank, Path(folder), common))
            while any(process.poll() is None for process in team) and not any(process.poll() for process in team):
                time.sleep(0.1)
            if not any(process.poll() for process in team):
                return 0
            patient = time.monotonic() + PATIENCE
            while any(process.poll() is None for process in team) and time.monotonic() < patient:
                time.sleep(0.1)
            sys.stderr.write(f"error: {_reason([process.poll() for process in team], Path(folder))}\n")
            return 2
        except KeyboardInterrupt:
            if team and _stop(team) == 130:
                return 130
            raise
        finally:
            _end(team)


def watch_parent() -> None:
    """In a process of a team that was started here: ends it when the one that started it is gone."""
    if OURS not in os.environ:
        return

    def wait() -> None:
        if not os.read(0, 1):
            os._exit(2)

    threading.Thread(target=wait, daemon=True).start()


def leave_word(error: BaseException, expected: bool) -> bool:
    """In a process of a team that was started here: leaves why it fails to the one that started it.

    Args:
        error: What happened.
        expected: A message for the user, rather than a fault to be traced.

    Returns:
        Whether somebody will read it; otherwise it has to be said here.
    """
    if OURS not in os.environ:
        return False
    message = str(error) if expected else "".join(traceback.format_exception(error))
    word = {"time": time.time(), "expected": expected, "message": message}
    path = Path(os.environ[OURS], f"{os.environ['LOCAL_RANK']}.json")
    path.with_suffix(".part").write_text(json.dumps(word), "utf-8")
    path.with_suffix(".part").replace(path)
    return True


def _environment(processes: int, nodes: int = 1) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    found = {**meeting, "OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
    return found if nodes > 1 else found | meeting  # what is left of another training counts for nothing


def _start(arguments: Sequence[str], rank: int, folder: Path, common: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = common | {"LOCAL_RANK": str(rank), OURS: str(folder)}
    command = [sys.executable, "-m", "unflaw", *arguments]
    # of a session of its own: Ctrl-C comes from this process, to all of them once
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.PIPE, "start_new_session": True}
    if rank == 0:
        return subprocess.Popen(command, **options)
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, **options)


def _reason(codes: Sequence[int | None], folder: Path) -> str:
    """Why a team failed: a process that was killed, else the first that left word, else one that ended without."""
    failed = {rank: code for rank, code in enumerate(codes) if code}
    for rank, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
            hint = "; perhaps memory ran out" if name == "SIGKILL" else ""
            return f"process {rank + 1} of {len(codes)} was ended by signal {-code} ({name}){hint}; train again"
    words = [(json.loads(path.read_text("utf-8")), int(path.stem)) for path in folder.glob("*.json")]
    for word, rank in sorted(words, key=lambda item: (not item[0]["expected"], item[0]["time"])):
        if word["expected"]:
            return word["message"]
        return f"process {rank + 1} of {len(codes)} failed:\n{word['message']}"
    rank, code = next(iter(failed.items()))
    log = folder / f"{rank}.log"
    said = log.read_text("utf-8", "replace").strip().splitlines()[-5:] if log.is_file() else []
    return "\n".join([f"process {rank + 1} of {len(codes)} ended with exit code {code}", *said])


def _stop(team: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Hands on Ctrl-C, after which a training still finishes its step; the exit code of the first process, if any."""
    for process in team:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    patient = time.monotonic() + STOPPING
    while any(process.poll() is None for process in team) and time.monotonic() < patient:
        time.sleep(0.1)
    return team[0].poll()


def _end(team: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs: politely, then not."""
    for process in team:
        if process.poll() is None:
            process.terminate()
    for process in team:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
