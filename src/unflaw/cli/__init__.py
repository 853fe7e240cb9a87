"""The command line: parse, call, print. Each module has the commands of one kind; importing it adds them."""

from unflaw.cli import learning, inspecting, runtime, station, research  # isort: skip - the order of the help
from unflaw.cli.common import app

__all__ = ["app", "inspecting", "learning", "main", "research", "runtime", "station"]


def main() -> None:
    app()
