import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from unflaw.experiments.processes import ChildProcess, TaskError


class Counter:
    """Counts its tasks; one is to be killed, one fails."""

    def __init__(self):
        self.done = 0

    def work(self, task, progress):
        if task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "fails":
            raise ValueError("not this one")
        self.done += 1
        progress("counting", 1, 1)
        return self.done, os.getpid()


def test_a_process_keeps_its_state_until_it_is_killed():
    reports = []
    with closing(ChildProcess(Counter().work, ", take less")) as child:
        first, second = child("a", progress=lambda *now: reports.append(now)), child("b")
        assert (first[0], second[0]) == (1, 2) and first[1] == second[1] != os.getpid()
        assert reports == [("counting", 1, 1)]
        with pytest.raises(TaskError, match=r"^ValueError: not this one$"):
            child("fails")
        assert child("c") == (3, first[1])
        with pytest.raises(TaskError, match="exit code -9; most likely out of memory, take less"):
            child("killed")
        count, pid = child("d")
        assert count == 1 and pid != first[1]


def test_a_process_ends_with_its_parent_even_where_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\nfrom unflaw.experiments.processes import ChildProcess\n"
        "def work(progress):\n    print('begun', flush=True)\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    ChildProcess(work)()\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "begun\n"
    parent.kill()
    assert parent.communicate(timeout=60)[0] == ""  # the pipe is closed once the child has ended, too
