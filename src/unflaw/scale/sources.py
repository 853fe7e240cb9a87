"""Inputs of a run: folders of images, Parquet tables and tar shards, on a disk or by URL.

Inputs are first listed as items, small descriptions of work that are the same every time. A worker then reads the
images of its items.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from unflaw.errors import ImageError
from unflaw.io.brief import brief
from unflaw.io.listing import Entry, Scan, counted, is_image, is_passed_over, note, walk
from unflaw.io.outputs import HEAD, SORTED, is_drawn, may_be_drawn, sorted_folders
from unflaw.io.words import count
from unflaw.scale.store import OWN, is_local, open_filesystem

_KINDS = {"image": "images", "rows": "Parquet files", "shard": "tar shards"}
_IMAGES = ("image", "img", "picture", "bytes", "jpg", "jpeg", "png")
_PATHS = ("path", "image", "file", "filename", "file_name", "url", "uri")
_URLS = ("s3", "gs", "az", "abfs", "http", "https")
_NAMES = ("name", "key", "id", "image_id", *_PATHS)
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "created")  # of what file systems report, the first there is
ROWS = 32  # table rows in memory at once
LARGEST = 2**29  # maximum size of a shard member in bytes, since a compressed shard could hold any amount


class Item(NamedTuple):
    """Images that are read together.

    Attributes:
        kind: "image", a file; "rows", the rows `start` to `stop` of a table; or "shard", a whole tar file.
        path: Absolute path or URL of the file.
        name: Name of the file as the user gave it.
        size: Size of the file in bytes.
        version: ETag or modification time of the file; with `size` it tells whether the file has changed.
    """

    kind: str
    path: str
    name: str
    start: int
    stop: int
    size: int
    version: str

    @property
    def images(self) -> int | None:
        """Number of images; None for a shard, whose images are counted only when it is read."""
        return None if self.kind == "shard" else self.stop - self.start


@brief
class SourceImage(NamedTuple):
    """An image of an item.

    Attributes:
        name: Name of the file, of the table row or of the shard member.
        source: File that holds the image, as the user calls it.
        number: Row in the table or place in the shard; unique together with `source`.
        data: Bytes of the image, a reader for them, or the reason why there are none.
    """

    name: str
    source: str
    number: int
    data: bytes | FileReader | ImageError


class FileReader:
    """Reads the bytes of a file on demand, in the thread that reads ahead."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> bytes:
        fs, path = open_filesystem(self.path)
        try:
            return fs.cat_file(path)
        except (FileNotFoundError, PermissionError):
            raise
        except IsADirectoryError as error:
            raise ImageError("is a folder; name one image in it") from error
        except Exception as error:  # network file systems have errors of their own
            raise ImageError(f"could not be read ({error}); try again with --retry") from error


def list_items(inputs: Sequence[str], column: str | None = None, notes: list[str] | None = None) -> Iterator[Item]:
    """List the items of the inputs, in the order of the inputs and by name within each, every file once.

    A folder must hold files of one kind only. `unflaw.io.listing` says which files are skipped in folders and
    patterns, and how links are followed.

    Args:
        inputs: Folders, images, .parquet files, .tar shards, patterns of these; local paths or URLs.
        column: Table column that holds the images.
        notes: Receives a sentence about the skipped files, if any, once all files are listed.

    Raises:
        ValueError: There are no such files, or a folder holds several kinds. ImportError: See
            `store.open_filesystem`.
    """
    seen: set[str] = set()
    passed_over: dict[str, int] = {}
    for given in inputs:
        empty = True
        for identity, item in _files(given, passed_over):
            empty = False
            if identity in seen:
                continue
            seen.add(identity)
            if item.kind == "rows":
                yield from _row_groups(item, column)
            else:
                yield item
        if empty:
            text = f"{given}: there are no images, Parquet files or tar shards; check the path"
            raise ValueError(". ".join([text, *note(passed_over, "file")]))
    if notes is not None:
        notes += note(passed_over, "file")


def _kind(name: str) -> str | None:
    lower = name.lower()
    if lower.endswith(".parquet"):
        return "rows"
    if lower.endswith((".tar", ".tar.gz", ".tgz")):
        return "shard"
    return "image" if is_image(lower) else None


def _files(given: str, passed_over: dict[str, int]) -> Iterator[tuple[str, Item]]:
    """Yield each file of an input as an item, after the path that identifies it, whatever links lead to it.

    `passed_over` receives the number of skipped files by folder.
    """
    fs, root = open_filesystem(given)
    root = root.rstrip("/") or "/"
    fs.invalidate_cache()
    local, skipped = is_local(fs), list[Entry]()
    identify = lru_cache(256)(_identify(fs))

    def name_of(path: str) -> str:
        if not local:
            return str(fs.unstrip_protocol(path))
        # as `unflaw predict` calls it
        return path if "://" in given or Path(given).is_absolute() else os.path.relpath(path)

    if any(sign in given for sign in "*?[") and not fs.exists(root):
        entries = _in_pattern(fs, root, skipped)
    else:
        try:
            entry = fs.info(root)
        except FileNotFoundError:
            raise ValueError(f"{given}: there is no such file or folder; check the path") from None
        entries = _in_folder(fs, root, given, skipped) if entry["type"] == "directory" else iter([entry])
    for entry in entries:
        path = entry["name"] if local else fs.unstrip_protocol(entry["name"])
        folder, _, last = path.rpartition("/")
        kind = _kind(path) or "image"  # a file that is named alone is tried, whatever its suffix
        version = str(next((entry[key] for key in _VERSIONS if entry.get(key)), "")).strip('"')
        item = Item(kind, path, name_of(entry["name"]), 0, 1, int(entry.get("size") or 0), version)
        yield f"{identify(folder)}/{last}", item
    for place, number in counted(skipped, _scan(fs), _identify(fs), lambda path: _kind(path) is not None).items():
        passed_over[name_of(place)] = number


def _in_pattern(fs: Any, pattern: str, skipped: list[Entry]) -> Iterator[dict[str, Any]]:
    """Yield the files that match, except hidden and system files that only a wildcard matches."""
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?["))
    explicit = [part for part in parts[fixed:] if part[:1] not in "*?["]
    for path in sorted(fs.glob(pattern)):
        entry = fs.info(path)
        if entry["type"] == "directory" or _is_drawn(fs, path):
            continue
        below = path.split("/")[fixed:]
        if any(is_passed_over(part) and not any(fnmatchcase(part, p) for p in explicit) for part in below):
            skipped.append(Entry(path, False, False))
        else:
            yield entry


def _in_folder(fs: Any, root: str, given: str, skipped: list[Entry]) -> Iterator[dict[str, Any]]:
    """Yield the files below a folder by name, those behind links to folders last.

    Outputs of earlier runs of unflaw are left out: panels, figures, partitions, and folders that `unflaw watch`
    sorts into.
    """

    def outputs(folder: str, entries: Sequence[Entry]) -> set[str]:
        names = {entry.path.rpartition("/")[2]: entry.path for entry in entries}
        if OWN in names:
            return {names[OWN]} if folder == root else set(names.values())
        lines = fs.cat_file(names[SORTED]) if SORTED in names else b""
        return {f"{folder}/{name}" for name in sorted_folders(lines)}

    kinds: set[str] = set()
    for entry in walk(root, _scan(fs), _identify(fs), skipped, written=outputs):
        kind = _kind(entry.path)
        if kind is None or _is_drawn(fs, entry.path):
            continue
        kinds.add(kind)
        if len(kinds) > 1:
            names = " and ".join(_KINDS[kind] for kind in sorted(kinds))
            raise ValueError(f"{given}: holds {names}; name those that are meant, such as {given.rstrip('/')}/*.tar")
        yield fs.info(entry.path) if entry.link else entry.info


def _is_drawn(fs: Any, path: str) -> bool:
    """True for an image that unflaw drew."""
    try:
        return may_be_drawn(path) and is_drawn(fs.cat_file(path, start=0, end=HEAD))
    except Exception:  # network file systems have errors of their own; reading the image reports them
        return False


def _scan(fs: Any) -> Scan:
    def scan(folder: str) -> Iterator[Entry]:
        for info in fs.ls(folder, detail=True):
            path, kind, link = info["name"].rstrip("/"), info["type"], bool(info.get("islink"))
            is_folder = fs.isdir(path) if link else kind == "directory"
            is_file = fs.isfile(path) if link else kind == "file"
            if path != folder and (is_folder or is_file):  # an object store may list the folder itself
                yield Entry(path, is_folder, link, info)

    return scan


def _identify(fs: Any) -> Callable[[str], str]:
    return os.path.realpath if is_local(fs) else str


def _row_groups(item: Item, column: str | None) -> Iterator[Item]:
    with _open_table(item) as table:
        Columns.of(table, item.name, column)  # fails before the work
        starts = _row_starts(table)
    for start, stop in pairwise(starts):
        if stop > start:
            yield item._replace(start=start, stop=stop)


def _row_starts(table: Any) -> list[int]:
    """Return the first row of each row group, and the number of rows at the end."""
    lengths = (table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups))
    return list(accumulate(lengths, initial=0))


def images(item: Item, column: str | None = None) -> Iterator[SourceImage]:
    """Yield the images of an item in order. An image that cannot be read carries an `ImageError`; none is raised."""
    if item.kind == "image":
        yield SourceImage(item.name, item.name, 0, FileReader(item.path))
    elif item.kind == "rows":
        yield from _table_images(item, column)
    else:
        yield from _shard_images(item, column)


class Columns(NamedTuple):
    """Table columns that hold the images, as bytes or as paths, and their names."""

    image: str
    name: str | None

    @classmethod
    def of(cls, table: Any, called: str, wanted: str | None) -> Columns:
        """Choose the columns of a Parquet table.

        Raises:
            ValueError: The choice is not clear, or `wanted` is no column of images.
        """
        from pyarrow import types

        kinds = {field.name: field.type for field in table.schema_arrow}
        text = [n for n, kind in kinds.items() if types.is_string(kind) or types.is_large_string(kind)]
        held = [
            n
            for n, kind in kinds.items()
            if types.is_binary(kind)
            or types.is_large_binary(kind)
            or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)  # as Hugging Face's datasets write them
        ]
        if wanted is not None:
            candidates = [n for n in (*held, *text) if n == wanted]
        elif held:
            candidates = held if len(held) == 1 else [n for n in _IMAGES if n in held]
        else:
            candidates = [n for n in _PATHS if n in text]
        if not candidates:
            which = f"{wanted} is no column of bytes or paths"
            which = which if wanted else "it is not clear which column holds the images"
            raise ValueError(f"{called}: {which}; there are {', '.join(kinds)} (--column NAME)")
        image = candidates[0]
        return cls(image, image if image in text else next((n for n in _NAMES if n in text), None))


def _open_table(item: Item) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = open_filesystem(item.path)
    try:
        return pq.ParquetFile(fs.open(path, "rb"))
    except pa.ArrowInvalid as error:
        advice = "copy it again or leave it out"
        raise ValueError(f"{item.name}: is not a readable Parquet file ({error}); {advice}") from error


def _table_images(item: Item, column: str | None) -> Iterator[SourceImage]:
    number = item.start
    try:
        with _open_table(item) as table:
            columns = Columns.of(table, item.name, column)
            for row, values in _rows(table, item, columns):
                yield _row_image(item, columns, row, values)
                number = row + 1
    except Exception as error:  # no row from here on can be read
        for row in range(number, item.stop):
            reason = f"{item.name}, row {row}: cannot be read ({error}); write the table again"
            yield SourceImage(f"{item.name}#{row}", item.name, row, ImageError(reason))


def _rows(table: Any, item: Item, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the numbers and values of an item's rows. Only row groups that hold such rows are read."""
    starts = _row_starts(table)
    groups = [g for g, (start, stop) in enumerate(pairwise(starts)) if start < item.stop and stop > item.start]
    row = starts[groups[0]]
    wanted = [name for name in dict.fromkeys(columns) if name]
    for batch in table.iter_batches(ROWS, row_groups=groups, columns=wanted):
        first = max(row, item.start)
        yield from enumerate(batch.slice(first - row, item.stop - first).to_pylist(), first)
        row += len(batch)
        if row >= item.stop:
            return


def _row_image(item: Item, columns: Columns, row: int, values: dict[str, Any]) -> SourceImage:
    value = values[columns.image]
    name = values.get(columns.name) if columns.name else None
    if isinstance(value, dict):
        name = name or value.get("path")
        value = value["bytes"] if value["bytes"] is not None else value.get("path")
    name = str(name) if name else f"{item.name}#{row}"
    if value is None:
        return SourceImage(name, item.name, row, ImageError(f"{name}: row {row} of {item.name} holds no image"))
    if isinstance(value, bytes):
        return SourceImage(name, item.name, row, value)
    if "::" in value or ("://" in value and value.partition("://")[0] not in {*_URLS, item.path.partition("://")[0]}):
        # fsspec has protocols that unpack archives or run templates; a table is data and must not use these
        error = ImageError(f"{value}: tables name files, or URLs of {', '.join(_URLS)}")
        return SourceImage(name, item.name, row, error)
    if "://" not in value and not Path(value).is_absolute():  # beside the table
        value = f"{item.path.rpartition('/')[0]}/{value}"
    return SourceImage(name, item.name, row, FileReader(value))


def _shard_images(item: Item, extension: str | None) -> Iterator[SourceImage]:
    """Yield the images in a tar file, read from beginning to end, one at a time.

    A member of a WebDataset is KEY.EXTENSION; the extension may contain dots.
    """
    number, suffix = 0, extension and extension.lower().lstrip(".")
    try:
        fs, path = open_filesystem(item.path)
        with fs.open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as shard:
            for member in shard:
                own = member.name.rpartition("/")[2].partition(".")[2].lower()
                if not member.isfile() or _kind(member.name) != "image" or suffix not in (None, own):
                    continue
                data: bytes | ImageError = ImageError(f"{member.name}: takes {member.size:,} bytes, over {LARGEST:,}")
                if member.size <= LARGEST and (file := shard.extractfile(member)) is not None:
                    data = file.read()
                yield SourceImage(member.name, item.name, number, data)
                number += 1
    except Exception as error:
        reason = f"{item.name}: cannot be read beyond {count(number, 'image')} ({error}); copy it again, then --retry"
        yield SourceImage(f"{item.name}#{number}", item.name, number, ImageError(reason))
