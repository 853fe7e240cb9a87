"""The log as a table: CSV for spreadsheets, Parquet for everything else."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import JSON

from unflaw.io.files import write_atomically
from unflaw.station.log import Entry, Filter, Log

COLUMNS = [column.name for column in Entry.__table__.columns]
_NESTED = {column.name for column in Entry.__table__.columns if isinstance(column.type, JSON)}


def export(log: Log, out: Path, wanted: Filter) -> int:
    """Writes inspections, oldest first, a row each; `out` is whole or not there. Returns how many.

    Columns are those of `Entry`; regions are JSON text. Times are ISO 8601 in CSV, and microseconds in UTC in Parquet.

    Raises:
        ValueError: `out` ends in neither .csv nor .parquet. ImportError: Parquet without pyarrow.
    """
    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise ValueError(f"{out}: end the name in .csv or .parquet")
    count = 0

    def batches() -> Iterator[list[dict[str, Any]]]:
        nonlocal count
        for entries in log.stream(wanted):
            count += len(entries)
            yield [_row(entry) for entry in entries]

    write_atomically(out, lambda file: writers[out.suffix](file, batches()))
    return count


def _row(entry: Entry) -> dict[str, Any]:
    values = entry.to_json()
    return values | {name: json.dumps(values[name]) for name in _NESTED}


def _write_csv(path: Path, batches: Iterator[list[dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for rows in batches:
            writer.writerows({name: _told(value) for name, value in row.items()} for row in rows)


def _told(value: Any) -> Any:
    """A value that a spreadsheet shows and does not run: a name may begin like a formula."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _write_parquet(path: Path, batches: Iterator[list[dict[str, Any]]]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow; install it with: pip install 'unflaw[parquet]'") from error
    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string(), list: pa.string()}
    fields = []
    for column in Entry.__table__.columns:
        kind = column.type.python_type
        stored = kinds.get(kind, pa.timestamp("us", tz="UTC"))
        fields.append(pa.field(column.name, pa.string() if column.name in _NESTED else stored, column.nullable))
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema) as writer:
        for rows in batches:
            writer.write_table(pa.Table.from_pylist(rows, schema))
