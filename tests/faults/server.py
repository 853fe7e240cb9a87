"""Loads torch once, then runs the command line in a fork for every request, and kills it where it is told to.

    python server.py WEIGHTS < requests > answers

Writes random weights of a tiny backbone to WEIGHTS. A request is a line of JSON: "argv", the folder "root" whose writes
are counted, a file "log" for what it says, and one of

* "seconds": SIGKILL after so long,
* "event": SIGKILL just before that many-th opening for writing, renaming, removing or flushing,
* "byte": the kernel ends it, by SIGXFSZ, at that byte of any file, in the middle of a write,
* "here": it runs in this process, so that all forks have what it loads,

or none of them. The answer: "code" (exit code, or minus the signal), "seconds" and the number of "events".
"""

import atexit
import gc
import json
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

FILES = {"open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.utime", "os.truncate"}


def preload(weights: str) -> None:
    import jinja2  # noqa: F401
    import onnx
    import onnxscript  # noqa: F401
    import openvino  # noqa: F401
    import timm
    import torch
    import torch.onnx
    from safetensors.torch import save_file

    import unflaw.cli
    import unflaw.detector
    import unflaw.experiments.run
    import unflaw.report
    import unflaw.station.watch  # noqa: F401
    from unflaw.runtime import export

    make, graphs = export.to_onnx, dict[str, bytes]()

    def once(detector: Any) -> Any:
        """The graph of a detector takes seconds to make, and writes nothing: what is killed is what comes after."""
        key = detector.config.model_dump_json()
        if key not in graphs:
            graphs[key] = make(detector).SerializeToString()
        return onnx.load_from_string(graphs[key])

    export.to_onnx = once
    torch.set_num_threads(1)
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)


def count_events(root: str, counter: mmap.mmap, last: int | None) -> None:
    """Counts what changes files, from now on, and ends this process with SIGKILL just before number `last`."""
    done = 0

    def happens() -> None:
        nonlocal done
        done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        counter[:8] = done.to_bytes(8, "little")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in FILES or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(root):  # noqa: PTH100 - pathlib would raise events
            happens()

    flush = os.fsync

    def fsync(handle: int) -> None:
        happens()
        flush(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def become(request: dict[str, object], counter: mmap.mmap) -> None:
    """In the child: the command line, which ends the process."""
    for handle, file, flags in (
        (0, "/dev/null", os.O_RDONLY),
        (1, request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["log"], os.O_WRONLY | os.O_APPEND),
    ):
        os.dup2(os.open(str(file), flags, 0o600), handle)
    if (byte := request.get("byte")) is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python would ignore
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(str(byte)),) * 2)
    event = request.get("event")
    count_events(str(request["root"]), counter, None if event is None else int(str(event)))
    code = run(request["argv"])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without taking apart the many modules, which takes longer than most commands


def run(argv: object) -> int:
    from unflaw.cli import app

    try:
        app(argv, prog_name="unflaw")
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(pid: int, seconds: float | None) -> int:
    """Exit code of a child, or minus its signal; it is killed after so many seconds."""
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if passed > (300 if seconds is None else seconds):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def main() -> None:
    preload(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        request, counter, started = json.loads(line), mmap.mmap(-1, 8), time.monotonic()
        if request.get("here"):
            with Path(request["log"]).open("w") as log, redirect_stdout(log), redirect_stderr(log):
                code = run(request["argv"])
            gc.freeze()
            print(json.dumps({"code": code, "seconds": time.monotonic() - started, "events": 0}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become(request, counter)
        code = wait(pid, request.get("seconds"))
        answer = {"code": code, "seconds": time.monotonic() - started, "events": int.from_bytes(counter[:8], "little")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
