"""Tasks in a process of their own: one that fails or is killed ends no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from unflaw.io.progress import Progress, silent


class TaskError(RuntimeError):
    """A task that failed; others go on."""


class ChildProcess:
    """A process that does one task after another. It starts with the first task, and anew after it was killed.

    Args:
        work: Called in the process as `work(*task, progress)`. It is pickled once, so it can keep state between tasks.
        memory_hint: Added to the message where the process was killed, most likely for its memory.
    """

    def __init__(self, work: Callable[..., Any], memory_hint: str = "") -> None:
        self.work, self.memory_hint = work, memory_hint
        self.process: Any = None

    def __call__(self, *task: Any, progress: Progress = silent) -> Any:
        """The result of the task.

        Raises:
            TaskError: The task raised an exception, or its process ended.
        """
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(self.work, theirs), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(task)
            while (message := self.pipe.recv())[0] == "progress":
                progress(*message[1])
        except (EOFError, OSError):
            self.process.join()
            code, self.process = self.process.exitcode, None
            hint = f"; most likely out of memory{self.memory_hint}" if code == -signal.SIGKILL else ""
            raise TaskError(f"its process ended with exit code {code}{hint}") from None
        if message[0] == "failed":
            raise TaskError(message[1])
        return message[1]

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.join()


def _serve(work: Callable[..., Any], pipe: Connection) -> None:
    """Main function of the process: receives tasks and sends results."""
    # an interruption is the parent's to handle; not SIG_IGN, which processes started from here would inherit
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    last = 0.0

    def progress(*content: Any) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1 or content[1] == content[2]:
            last = time.monotonic()
            pipe.send(("progress", content))

    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", work(*task, progress)))
        except TaskError as error:
            pipe.send(("failed", str(error)))
        except Exception as error:  # whatever it is, it is reported
            pipe.send(("failed", f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """Ends this process when its parent ends, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
