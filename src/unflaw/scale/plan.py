"""What a run will do, written down before it begins, so that it can go on after any interruption.

`_unflaw/plan.json` in the output folder names inputs, detector and settings by digests; `_unflaw/items-…` lists what
each partition reads. A run that is started again lists its inputs anew: they must be the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from unflaw._version import __version__
from unflaw.io.detector_file import kind_of, weights_of
from unflaw.scale.sources import Item, listed
from unflaw.scale.store import OWN, Store, StoreError

PLAN = f"{OWN}/plan.json"
CHUNK = 256  # partitions whose items are in one file


class Plan(BaseModel):
    """What a run does; equal plans give equal results."""

    format: Literal[1] = 1
    inputs: list[str]
    listing: str  # digest of the names of all items
    contents: str  # digest of sizes and times, or ETags
    images: int | None  # None where there are shards, in which they have not been counted
    partitions: int
    size: int  # images of a partition at most, but for shards
    detector: str  # digest of its file
    category: str | None = None
    column: str | None = None
    version: str = __version__


def detector_files(model: Path) -> dict[str, bytes]:
    """What is in the file of a detector, or in the two of one exported to OpenVINO, by name."""
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
    """The plan of a run: a new one, written to the store, or the one that is there, if it is the same.

    With `retry` files may have changed, for so have those that were mended; then that is the plan from now on. `notes`
    gets what is to be said of the inputs, see `sources.listed`.

    Raises:
        StoreError: Another plan is there, or results without one. ValueError: As `sources.listed`.
    """
    known = _known(store)
    if known is None and any(name.endswith(".parquet") for name in store.names()):
        raise StoreError(f"{store.url}: holds Parquet files of another origin; name another --output")
    if known is not None:  # what can be told without listing millions of files
        _same(store, known, {"detector": detector, "category": category, "column": column, "size": size})
        _same(store, known, {"version": __version__})
    listing, contents, partitions, count, shards = hashlib.sha256(), hashlib.sha256(), 0, 0, False

    def counted() -> Iterator[list[Item]]:
        nonlocal partitions, count, shards
        for items in partitioned(listed(inputs, column, notes), size):
            partitions += 1
            for item in items:
                listing.update(json.dumps(item[:-2]).encode() + b"\n")
                contents.update(json.dumps(item[-2:]).encode() + b"\n")
                count, shards = count + (item.images or 0), shards or item.images is None
            yield items

    chunks = counted()
    number = 0
    while chunk := list(islice(chunks, CHUNK)):
        if known is None:
            store.write(_items_file(number), _written(chunk))
        number += 1
    plan = Plan(
        inputs=list(inputs),
        listing=listing.hexdigest(),
        contents=contents.hexdigest(),
        images=None if shards else count,
        partitions=partitions,
        size=size,
        detector=detector,
        category=category,
        column=column,
    )
    if known is not None:
        _same(store, known, {"listing": plan.listing} | ({} if retry else {"contents": plan.contents}))
        if plan.contents == known.contents:
            return known
    if not partitions:
        raise ValueError(f"{', '.join(inputs)}: there are no images to inspect")
    store.write(PLAN, plan.model_dump_json(indent=2).encode())
    return plan


def partitioned(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items of at most `size` images together. A shard stands alone; longer runs of rows are cut."""
    waiting: list[Item] = []
    held = 0
    for item in items:
        for part in _cut(item, size):
            count = size if part.images is None else part.images
            if held + count > size and waiting:
                yield waiting
                waiting, held = [], 0
            waiting.append(part)
            held += count
    if waiting:
        yield waiting


def _cut(item: Item, size: int) -> Iterator[Item]:
    if item.images is None:
        yield item
        return
    for start in range(item.start, item.stop, size):
        yield item._replace(start=start, stop=min(start + size, item.stop))


def items_of(store: Store, partition: int) -> list[Item]:
    """What a partition of a written plan reads."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(store.read(_items_file(partition // CHUNK))))
    return [_item(row) for row in file.read_row_group(partition % CHUNK).to_pylist()]


def _item(row: dict[str, Any]) -> Item:
    texts = {name: v.decode("utf-8", "surrogateescape") for name, v in row.items() if isinstance(v, bytes)}
    return Item(**(row | texts))


def _items_file(chunk: int) -> str:
    return f"{OWN}/items-{chunk:05d}.parquet"


def _written(chunk: Sequence[Sequence[Item]]) -> bytes:
    """A row group per partition. Texts are bytes: the name of a file need not be Unicode."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {str: pa.binary(), int: pa.int64()}
    fields = {"kind": str, "path": str, "name": str, "start": int, "stop": int, "size": int, "version": str}
    schema = pa.schema([(name, kinds[kind]) for name, kind in fields.items()])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema) as writer:
        for items in chunk:
            rows = [
                {
                    n: v.encode("utf-8", "surrogateescape") if isinstance(v, str) else v
                    for n, v in item._asdict().items()
                }
                for item in items
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return buffer.getvalue()


def _known(store: Store) -> Plan | None:
    try:
        return Plan.model_validate_json(store.read(PLAN))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise StoreError(f"{store.path(PLAN)}: is not a plan of this version; name another --output") from error


_SAID = {
    "detector": "another detector: its file differs",
    "category": "another --category",
    "column": "another --column",
    "size": "another --partition",
    "version": "another version of unflaw",
    "listing": "other inputs: images were added, removed or renamed",
    "contents": "other inputs: files have changed (--retry allows that, and does only those anew that failed)",
}


def _same(store: Store, known: Plan, now: dict[str, Any]) -> None:
    for name, value in now.items():
        before = getattr(known, name)
        if before != value:
            values = f" ({before}, now {value})" if name in ("category", "column", "size", "version") else ""
            raise StoreError(
                f"{store.url}: its run was begun with {_SAID[name]}{values}; give what it was begun with, or name "
                "another --output"
            )
