"""Plan of a run, written before the work begins, so that the run can be resumed after any interruption.

`_unflaw/plan.json` in the output folder records inputs, detector and settings by digests; `_unflaw/items-….parquet`
lists what each partition reads. A resumed run lists its inputs again and must find the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from unflaw._version import __version__
from unflaw.io.detector_file import kind_of, weights_of
from unflaw.io.progress import batched
from unflaw.scale.sources import Item, list_items
from unflaw.scale.store import OWN, Store, StoreError

PLAN = f"{OWN}/plan.json"
CHUNK = 256  # partitions in one items file


class Plan(BaseModel):
    """Description of a run; equal plans give equal results."""

    format: Literal[1] = 1
    inputs: list[str]
    listing: str  # digest of the names of all items
    contents: str  # digest of sizes and times, or ETags
    images: int | None  # None if there are shards, whose images are not counted beforehand
    partitions: int
    size: int  # maximum number of images in a partition, except for shards
    detector: str  # digest of the detector file
    category: str | None = None
    column: str | None = None
    version: str = __version__


def detector_files(model: Path) -> dict[str, bytes]:
    """Read the file of a detector, or both files of one exported to OpenVINO, by name."""
    paths = [model, weights_of(model)] if kind_of(model) == "openvino" else [model]
    return {path.name: path.read_bytes() for path in paths}


def detector_digest(files: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in files.values())).hexdigest()


def prepare(
    store: Store,
    inputs: Sequence[str],
    detector: str,
    *,
    size: int,
    category: str | None = None,
    column: str | None = None,
    retry: bool = False,
    notes: list[str] | None = None,
) -> Plan:
    """Write the plan of a new run, or return that of the run to be resumed if it is the same.

    With `retry`, changed files are accepted, such as repaired ones, and the plan is updated. The other arguments are
    entries of the plan, or those of `sources.list_items`.

    Raises:
        StoreError: The store holds another plan, or results without one. ValueError: See `sources.list_items`.
    """
    known = _load(store)
    settings = {"detector": detector, "category": category, "column": column, "size": size}
    if known is None and any(name.endswith(".parquet") for name in store.names()):
        raise StoreError(f"{store.url}: holds Parquet files of another origin; name another --output")
    if known is not None:  # before millions of files are listed
        _check_same(store, known, settings | {"version": __version__})
    listing, contents = hashlib.sha256(), hashlib.sha256()
    images: int | None = 0
    partitions = 0
    for number, chunk in enumerate(batched(partitioned(list_items(inputs, column, notes), size), CHUNK)):
        for item in (item for items in chunk for item in items):
            listing.update(json.dumps(item[:-2]).encode() + b"\n")
            contents.update(json.dumps(item[-2:]).encode() + b"\n")
            images = None if images is None or item.images is None else images + item.images
        partitions += len(chunk)
        if known is None:
            store.write(_items_file(number), _to_parquet(chunk))
    digests = {"listing": listing.hexdigest(), "contents": contents.hexdigest()}
    if known is not None:
        _check_same(store, known, {name: digests[name] for name in digests if not (retry and name == "contents")})
        if known.contents == digests["contents"]:
            return known
    if not partitions:
        raise ValueError(f"{', '.join(inputs)}: there are no images to inspect")
    plan = Plan(inputs=list(inputs), images=images, partitions=partitions, **digests, **settings)
    store.write(PLAN, plan.model_dump_json(indent=2).encode())
    return plan


def partitioned(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Group consecutive items into partitions of at most `size` images.

    A shard is a partition of its own. Rows of a table are split into runs of at most `size`.
    """
    group: list[Item] = []
    held = 0
    for item in items:
        for start in [item.start] if item.images is None else range(item.start, item.stop, size):
            part = item if item.images is None else item._replace(start=start, stop=min(start + size, item.stop))
            count = part.images or size
            if group and held + count > size:
                yield group
                group, held = [], 0
            group.append(part)
            held += count
    if group:
        yield group


def items_of(store: Store, partition: int) -> list[Item]:
    """Read the items of a partition of a written plan."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(store.read(_items_file(partition // CHUNK))))
    rows = file.read_row_group(partition % CHUNK).to_pylist()
    return [Item(*map(_decode, row.values())) for row in rows]


def _to_parquet(chunk: Sequence[Sequence[Item]]) -> bytes:
    """Encode partitions as a Parquet file with a row group for each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.binary(), int: pa.int64()}
    schema = pa.schema([(name, types[type(value)]) for name, value in chunk[0][0]._asdict().items()])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema) as writer:
        for items in chunk:
            columns = [list(map(_encode, values)) for values in zip(*items, strict=True)]
            writer.write_table(pa.table(columns, schema))
    return buffer.getvalue()


def _encode(value: Any) -> Any:  # names of files need not be Unicode, so texts are stored as bytes
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _decode(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _items_file(chunk: int) -> str:
    return f"{OWN}/items-{chunk:05d}.parquet"


def _load(store: Store) -> Plan | None:
    try:
        return Plan.model_validate_json(store.read(PLAN))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise StoreError(f"{store.path(PLAN)}: is not a plan of this version; name another --output") from error


_DIFFERENCES = {
    "detector": "another detector: its file differs",
    "category": "another --category ({before}, now {now})",
    "column": "another --column ({before}, now {now})",
    "size": "another --partition ({before}, now {now})",
    "version": "another version of unflaw ({before}, now {now})",
    "listing": "other inputs: images were added, removed or renamed",
    "contents": "other inputs: files have changed (--retry allows that, and does only those anew that failed)",
}


def _check_same(store: Store, known: Plan, values: dict[str, Any]) -> None:
    for name, now in values.items():
        if (before := getattr(known, name)) != now:
            difference = _DIFFERENCES[name].format(before=before, now=now)
            advice = "give what it was begun with, or name another --output"
            raise StoreError(f"{store.url}: its run was begun with {difference}; {advice}")
