"""Export of the log as a table: CSV for spreadsheets, Parquet for everything else."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import JSON

from unflaw.io.files import write_atomically
from unflaw.station.log import Entry, Filter, Log

Rows = Iterator[list[dict[str, Any]]]
COLUMNS = [column.name for column in Entry.__table__.columns]
_NESTED = {column.name for column in Entry.__table__.columns if isinstance(column.type, JSON)}


def export(log: Log, out: Path, wanted: Filter) -> int:
    """Write inspections to a file, oldest first, one row each, and return their number.

    The columns are those of `Entry`; regions are JSON text. Times are ISO 8601 in CSV, and microseconds in UTC in
    Parquet. The file is written atomically.

    Raises:
        ValueError: The name of `out` ends in neither .csv nor .parquet. ImportError: pyarrow is not installed.
    """
    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise ValueError(f"{out}: end the name in .csv or .parquet")
    count = 0

    def batches() -> Rows:
        nonlocal count
        for entries in log.stream(wanted):
            count += len(entries)
            rows = [entry.to_json() for entry in entries]
            yield [row | {name: json.dumps(row[name]) for name in _NESTED} for row in rows]

    write_atomically(out, lambda file: writers[out.suffix](file, batches()))
    return count


def _write_csv(path: Path, batches: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for rows in batches:
            writer.writerows({name: _csv_value(value) for name, value in row.items()} for row in rows)


def _csv_value(value: Any) -> Any:
    """Convert a value so that a spreadsheet shows it as text and does not run it as a formula."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _write_parquet(path: Path, batches: Rows) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow; install it with: pip install 'unflaw[parquet]'") from error
    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}
    fields = []
    for column in Entry.__table__.columns:
        other = pa.string() if column.name in _NESTED else pa.timestamp("us", tz="UTC")
        fields.append(pa.field(column.name, kinds.get(column.type.python_type, other), column.nullable))
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema) as writer:
        for rows in batches:
            writer.write_table(pa.Table.from_pylist(rows, schema))
