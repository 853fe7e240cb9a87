"""The command line: parse, call, print. Each module has the commands of one kind; importing it adds them."""

from unflaw.cli import learning, inspecting, runtime, research  # isort: skip - the order of the help
from unflaw.cli.common import app

__all__ = ["app", "inspecting", "learning", "main", "research", "runtime"]


def main() -> None:
    app()
