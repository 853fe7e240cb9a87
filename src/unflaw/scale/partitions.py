"""Result partitions: Parquet files with one row for each image, written as a whole or not at all."""

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
from unflaw.scale.sources import SourceImage
from unflaw.scale.store import Store

KEY = b"unflaw"  # metadata key of a partition: JSON with the digest of the detector, and counts
Row = dict[str, Any]


def file_of(partition: int) -> str:
    return f"part-{partition:05d}.parquet"


def schema() -> Any:
    """Columns of a partition.

    `source` is the file that holds the image and `number` its place in that file; together they are unique. `status`
    is "ok" or "failed"; `error` gives the reason. `detector` is the digest of the detector file. The other columns
    are those of `Result`.
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


def make_row(image: SourceImage, outcome: Result | ImageError, detector: str) -> Row:
    """Return the row of an image; `detector` is the digest of the detector file."""
    row: Row = {"name": text(image.name), "source": text(image.source), "number": image.number, "detector": detector}
    if isinstance(outcome, ImageError):
        return row | {"status": "failed", "error": text(str(outcome))}
    columns = outcome.to_json()
    del columns["path"]
    return row | {"status": "ok"} | columns


def text(name: str) -> str:
    """Return a name with backslash escapes for what is not Unicode in it, as in results.jsonl."""
    return name.encode("utf-8", "backslashreplace").decode()


def count_verdicts(rows: Iterable[Row]) -> Counter[str]:
    """Count the images that are "good", "review", "defect" and "failed"."""
    return Counter(row["verdict"] if row["status"] == "ok" else "failed" for row in rows)


def write(store: Store, partition: int, rows: Sequence[Row], detector: str) -> None:
    """Write or replace a partition."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows), schema())
    table = table.replace_schema_metadata({KEY: json.dumps({"detector": detector, "counts": count_verdicts(rows)})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    store.write(file_of(partition), buffer.getvalue())


def read(store: Store, partition: int) -> list[Row]:
    """Raises: FileNotFoundError."""
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(store.read(file_of(partition)))).to_pylist()


def finished(store: Store) -> dict[int, Counter[str]]:
    """Return the finished partitions, in order, with their `count_verdicts`, read from the footers of their files."""
    import pyarrow.parquet as pq

    def count(partition: int) -> Counter[str]:
        with store.fs.open(store.path(file_of(partition)), "rb") as file:
            return Counter(json.loads(pq.read_metadata(file).metadata[KEY])["counts"])

    matches = (re.fullmatch(r"part-(\d{5,})\.parquet", name) for name in store.names())
    numbers = sorted(int(match[1]) for match in matches if match)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(numbers, pool.map(count, numbers), strict=True))
