"""The command line: parse, call, print. Each module has the commands of one kind; importing it adds them."""

import os
import sys

from unflaw.cli import learning, calibrating, inspecting, runtime, station, research  # isort: skip - the order of the help
from unflaw.cli.common import app

__all__ = ["app", "calibrating", "inspecting", "learning", "main", "research", "runtime", "station"]


def main() -> None:
    try:
        app()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # as other programs, which this signal ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still to be flushed
            sys.exit(128 + 13)
        raise
