"""Kills commands at random moments and prints, in Markdown, the state after each kill.

    python benchmarks/faults.py --runs 100

tests/faults defines the commands and how they are killed. Exit code 1 if a kill leaves something broken, or if the
next run gives another result than an uninterrupted one.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.harness import Server, campaign, prepare, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=100, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit for the kills, s")
    parser.add_argument("--only", help="name of a phase, to run it alone")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unflaw-faults-") as name:
        folder = Path(name)
        server = Server(folder)
        phases = [phase for phase in prepare(server, folder) if options.only in (None, phase.name)]
        ready = time.monotonic()
        for phase in phases:
            print(f"{phase.name}: {phase.whole.seconds:.2f} s, {phase.whole.events} file events", file=sys.stderr)
        found = campaign(server, phases, folder, options.runs, options.seed, options.seconds)
        server.close()
    print(table(found))
    print(f"prepared in {ready - started:.0f} s, {time.monotonic() - ready:.0f} s for the rest", file=sys.stderr)
    broken = [killed for killed in found if killed.faults]
    for killed in broken:
        print(f"{killed.phase}, {killed.how} {killed.at}: {'; '.join(killed.faults)}", file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
