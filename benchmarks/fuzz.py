"""Fuzzes every reader of untrusted files; see docs/reliability.md, "Hostile input".

python benchmarks/fuzz.py --examples 2000
"""

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.hostile.targets import Material, Target, targets

SLOW = 10.0  # seconds


def fuzz(target: Target, examples: int, folder: Path, seed: int) -> tuple[Counter[str], list[str], float]:
    """Return the number of outcomes of each kind, each fault once, and the longest time of an example in seconds."""
    counts: Counter[str] = Counter()
    faults: dict[str, str] = {}
    longest = 0.0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.feed)
    def run(fed: object) -> None:
        nonlocal longest
        start = time.perf_counter()
        try:
            target.run(fed, folder)
            counts["taken"] += 1
        except target.allowed:
            counts["refused"] += 1
        except Exception as error:  # the faults searched for
            frame = next(
                (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "unflaw" in f.filename), None
            )
            where = f"{Path(frame.filename).name}:{frame.lineno}" if frame else "?"
            key = f"{type(error).__name__} at {where}"
            counts["fault"] += 1
            faults.setdefault(key, f"{key}: {str(error)[:200]!r} of {str(fed)[:300]!r}")
        longest = max(longest, time.perf_counter() - start)

    random.seed(seed)
    run.hypothesis.inner_test._hypothesis_internal_use_seed = seed  # type: ignore[attr-defined]
    run()
    return counts, list(faults.values()), longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of the names of the targets to run", default="")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # tifffile warns of every damaged file
    found = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| target | inputs | taken | refused | faults | longest, s |\n|---|---|---|---|---|---|")
        for title, target in targets(Material(folder)).items():
            if options.only not in title:
                continue
            counts, faults, longest = fuzz(target, options.examples, folder, options.seed)
            row = (title, counts.total(), counts["taken"], counts["refused"], len(faults), f"{longest:.1f}")
            print("|", " | ".join(map(str, row)), "|", flush=True)
            for fault in faults:
                print("   fault:", fault, flush=True)
            found += len(faults) + (longest > SLOW)
    return min(found, 1)


if __name__ == "__main__":
    raise SystemExit(main())
