"""Partitions of results: files of Parquet, each whole or not there, a row for each image."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from unflaw.errors import ImageError
from unflaw.postprocessing.results import Result
from unflaw.scale.sources import Found
from unflaw.scale.store import Store

KEY = b"unflaw"  # of the metadata of a partition: digest of the detector, and counts
VERDICTS = ("good", "review", "defect")
Row = dict[str, Any]


def file_of(partition: int) -> str:
    return f"part-{partition:05d}.parquet"


def schema() -> Any:
    """Columns of a partition.

    name: of the image. source, number: the file that it is in and its place there; together unique. status: "ok" or
    "failed", and then error says why. The others are of `Result`; regions is a list. detector: digest of its file.
    """
    import pyarrow as pa

    region = pa.struct(
        [("box", pa.list_(pa.int32())), ("area", pa.int64()), ("peak", pa.float64()), ("uncertainty", pa.float64())]
    )
    return pa.schema(
        [
            pa.field("name", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("number", pa.int64(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            ("error", pa.string()),
            ("score", pa.float64()),
            ("p_value", pa.float64()),
            ("p_estimated", pa.float64()),
            ("verdict", pa.string()),
            ("drift", pa.float64()),
            ("regions", pa.list_(region)),
            pa.field("detector", pa.string(), nullable=False),
        ]
    )


def row_of(found: Found, outcome: Result | ImageError, detector: str) -> Row:
    """A row of a partition."""
    row: Row = {"name": text(found.name), "source": text(found.source), "number": found.number, "detector": detector}
    if isinstance(outcome, ImageError):
        return row | {"status": "failed", "error": text(str(outcome))}
    line = outcome.to_json()
    del line["path"]
    return row | {"status": "ok"} | line


def text(name: str) -> str:
    """A name as it is written: what is no Unicode in it as backslash escapes, as in results.jsonl."""
    return name.encode("utf-8", "backslashreplace").decode()


def counted(rows: Iterable[Row]) -> Counter[str]:
    """How many are "good", "review", "defect" and "failed"."""
    return Counter(row["verdict"] if row["status"] == "ok" else "failed" for row in rows)


def write(store: Store, partition: int, rows: Sequence[Row], detector: str) -> None:
    """Puts a partition in its place, instead of the one that may be there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows), schema())
    table = table.replace_schema_metadata({KEY: json.dumps({"detector": detector, "counts": counted(rows)})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    store.write(file_of(partition), buffer.getvalue())


def read(store: Store, partition: int) -> list[Row]:
    """Raises: FileNotFoundError."""
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(store.read(file_of(partition)))).to_pylist()


def finished(store: Store) -> list[int]:
    """The numbers of partitions that are there."""
    found = (re.fullmatch(r"part-(\d{5,})\.parquet", name) for name in store.names())
    return sorted(int(match[1]) for match in found if match)


def counts(store: Store, partitions: Iterable[int]) -> dict[int, Counter[str]]:
    """What `counted` said of each, from the ends of their files."""
    import pyarrow.parquet as pq

    def count(partition: int) -> Counter[str]:
        with store.fs.open(store.path(file_of(partition)), "rb") as file:
            return Counter(json.loads(pq.read_metadata(file).metadata[KEY])["counts"])

    numbers = list(partitions)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(numbers, pool.map(count, numbers), strict=True))
