"""Files that an experiment writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from unflaw.experiments.grid import Run
from unflaw.experiments.leaderboard import intervals, latex, markdown, tabulate
from unflaw.experiments.records import Record
from unflaw.experiments.tables import comma_separated
from unflaw.io.files import write_text


def write_tables(out: Path, runs: Sequence[Run], records: Mapping[str, Record]) -> None:
    """`table.md`, `table.csv`, `table.json`, `table.tex` and `table.html`: each whole, or as it was before.

    Raises:
        OSError: `out` cannot be written. ImportError: Jinja2 is not installed.
    """
    rows, (bounds, pairs) = tabulate(runs, records), intervals(runs, records, out)
    finished = [records[run.digest] for run in runs if run.digest in records]
    made = {
        "runs": len(runs),
        "finished": len(finished),
        "seeds": max(run.seed for run in runs) + 1,
        "settings": sorted({run.settings for run in runs if run.settings}),
        "weights": sorted({f"{r.backbone}: {r.weights}" for r in finished if r.backbone}),
        "machines": sorted({record.machine for record in finished}),
        "versions": sorted({f"unflaw {record.unflaw}, torch {record.torch}" for record in finished}),
        "shared": sum(record.shared for record in finished),
    }
    everything = made | {"rows": rows, "intervals": bounds, "differences": pairs}
    write_text(out / "table.md", markdown(rows, bounds, pairs, made))
    write_text(out / "table.csv", comma_separated(rows))
    write_text(out / "table.json", json.dumps(everything, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "table.tex", latex(rows))
    from unflaw.experiments.leaderboard_page import page

    write_text(out / "table.html", page(rows, bounds, pairs, made))
