"""Where images come from: folders, tables in Parquet, shards of tar; on a disk or by URL.

Listing gives items, small descriptions of work that are the same every time; opening an item, later and elsewhere,
gives its images.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from unflaw.errors import ImageError
from unflaw.io.brief import brief
from unflaw.io.listing import Entry, Scan, counted, is_image, is_passed_over, note, walk
from unflaw.io.outputs import HEAD, SORTED, is_drawn, may_be_drawn, sorted_folders
from unflaw.io.words import count
from unflaw.scale.store import OWN, is_local, opened

TABLES = (".parquet",)
SHARDS = (".tar", ".tar.gz", ".tgz")
_IMAGES = ("image", "img", "picture", "bytes", "jpg", "jpeg", "png")
_PATHS = ("path", "image", "file", "filename", "file_name", "url", "uri")
_URLS = ("s3", "gs", "az", "abfs", "http", "https")
_NAMES = ("name", "key", "id", "image_id", *_PATHS)
ROWS = 32  # of a table that are in memory at once
LARGEST = 2**29  # bytes of a member of a shard: a compressed shard could promise any number


class Item(NamedTuple):
    """Images that are read together.

    Attributes:
        kind: "image": one file. "rows": `start` to `stop` of a table. "shard": a tar file, all of it.
        path: Of the file: absolute, or a URL.
        name: What the user calls it.
        size: Of the file in bytes; with `version` it tells whether the file has changed.
        version: Its ETag, or when it was last changed.
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
        """Of its images; nobody knows of a shard before it has been read."""
        return None if self.kind == "shard" else self.stop - self.start


@brief
class Found(NamedTuple):
    """An image of an item.

    Attributes:
        name: That of the file, or in the table, or of the member of the shard.
        source: The file that it is in, as the user calls it.
        number: Of its row in the table or of its place in the shard. With `source` it is unique.
        data: Its bytes, or what reads them, or why there are none.
    """

    name: str
    source: str
    number: int
    data: bytes | Later | ImageError


class Later:
    """The bytes of a file, when they are asked for: a thread that reads ahead does so, not the one that lists."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self) -> bytes:
        fs, path = opened(self.path)
        try:
            return fs.cat_file(path)
        except (FileNotFoundError, PermissionError):
            raise
        except IsADirectoryError as error:
            raise ImageError("is a folder; name one image in it") from error
        except Exception as error:  # network file systems have errors of their own
            raise ImageError(f"could not be read ({error}); try again with --retry") from error


def listed(inputs: Sequence[str], column: str | None = None, notes: list[str] | None = None) -> Iterator[Item]:
    """All items of some inputs: folders, images, .parquet files, .tar shards, patterns of these, or URLs.

    A folder is taken for the one kind that it holds. The order is that of the inputs, and by name within each; a file
    that is named twice is there once. What is passed over in folders and patterns, and where links lead, `listing`
    says. Members of shards are all taken.

    Args:
        inputs: Paths, patterns and URLs.
        column: Of tables, what holds the images.
        notes: Gets a sentence on the files that were passed over, if there were any, once all are listed.

    Raises:
        ValueError: Nothing is there, or a folder holds several kinds. ImportError: As `store.opened`.
    """
    seen: set[str] = set()
    passed_over: dict[str, int] = {}
    for given in inputs:
        some = False
        for entry, name in _files(given, passed_over):
            some = True
            if entry["file"] in seen:
                continue
            seen.add(entry["file"])
            yield from _items(entry, entry["path"], name, column)
        if not some:
            text = f"{given}: there are no images, Parquet files or tar shards; check the path"
            raise ValueError(". ".join([text, *note(passed_over, "file")]))
    if notes is not None:
        notes += note(passed_over, "file")


def _kind(name: str) -> str | None:
    lower = name.lower()
    if lower.endswith(TABLES):
        return "rows"
    if lower.endswith(SHARDS):
        return "shard"
    return "image" if is_image(lower) else None


def _files(given: str, passed_over: dict[str, int]) -> Iterator[tuple[dict[str, Any], str]]:
    """What an input stands for: what the file system says of each file, with its full "path", and its name.

    "file" is the path by which it is the same, whatever links to folders lead to it.
    `passed_over` gets how many files are left out, by folder.
    """
    fs, root = opened(given)
    root = root.rstrip("/") or "/"
    fs.invalidate_cache()
    local, left = is_local(fs), list[Entry]()
    identify = lru_cache(256)(_identify(fs))

    def name_of(path: str) -> str:
        if not local:
            return str(fs.unstrip_protocol(path))
        # as `unflaw predict` calls it
        return path if "://" in given or Path(given).is_absolute() else os.path.relpath(path)

    if any(sign in given for sign in "*?[") and not fs.exists(root):
        found = _matching(fs, root, left)
    else:
        try:
            entry = fs.info(root)
        except FileNotFoundError:
            raise ValueError(f"{given}: there is no such file or folder; check the path") from None
        found = iter([entry]) if entry["type"] != "directory" else _in_folder(fs, root, given, left)
    for entry in found:
        path = entry["name"] if local else fs.unstrip_protocol(entry["name"])
        folder, _, last = path.rpartition("/")
        yield entry | {"path": path, "file": f"{identify(folder)}/{last}"}, name_of(entry["name"])
    for place, number in counted(left, _scan(fs), _identify(fs), lambda path: _kind(path) is not None).items():
        passed_over[name_of(place)] = number


def _matching(fs: Any, pattern: str, passed_over: list[Entry]) -> Iterator[dict[str, Any]]:
    """The files that a pattern matches, but for those that only its wildcards find in what is passed over."""
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?["))
    asked = [part for part in parts[fixed:] if part[:1] not in "*?["]
    for path in sorted(fs.glob(pattern)):
        entry = fs.info(path)
        if entry["type"] == "directory" or _drawn(fs, path):
            continue
        below = path.split("/")[fixed:]
        if any(is_passed_over(part) and not any(fnmatchcase(part, p) for p in asked) for part in below):
            passed_over.append(Entry(path, False, False))
        else:
            yield entry


def _in_folder(fs: Any, root: str, given: str, passed_over: list[Entry]) -> Iterator[dict[str, Any]]:
    """The files of the one kind that a folder holds. It is gone through twice rather than remembered."""
    kinds = set()
    for entry in _walk(fs, root, passed_over):
        kinds.add(_kind(entry["name"]))
        if len(kinds) > 1:
            called = {"image": "images", "rows": "Parquet files", "shard": "tar shards"}
            names = " and ".join(called[str(kind)] for kind in sorted(map(str, kinds)))
            raise ValueError(f"{given}: holds {names}; name those that are meant, such as {given.rstrip('/')}/*.tar")
    yield from _walk(fs, root, [])


def _walk(fs: Any, folder: str, passed_over: list[Entry]) -> Iterator[dict[str, Any]]:
    """Files of a known kind below a folder, in the order of their names, then those behind links to folders.

    What earlier runs of unflaw have written is left out: panels and figures, results of Ray, what a watcher has sorted.
    """

    def written(inner: str, entries: Sequence[Entry]) -> set[str]:
        names = {entry.path.rpartition("/")[2]: entry.path for entry in entries}
        if OWN in names:
            return {names[OWN]} if inner == folder else set(names.values())
        lines = fs.cat_file(names[SORTED]) if SORTED in names else b""
        return {f"{inner}/{name}" for name in sorted_folders(lines)}

    for entry in walk(folder, _scan(fs), _identify(fs), passed_over, written=written):
        if _kind(entry.path) and not _drawn(fs, entry.path):
            yield fs.info(entry.path) if entry.link else entry.info


def _drawn(fs: Any, path: str) -> bool:
    """True for an image that unflaw drew."""
    try:
        return may_be_drawn(path) and is_drawn(fs.cat_file(path, start=0, end=HEAD))
    except Exception:  # network file systems have errors of their own; it is said when it is read as an image
        return False


def _scan(fs: Any) -> Scan:
    def scan(folder: str) -> Iterator[Entry]:
        for info in fs.ls(folder, detail=True):
            path, kind, link = info["name"].rstrip("/"), info["type"], bool(info.get("islink"))
            is_folder = fs.isdir(path) if link else kind == "directory"
            is_file = fs.isfile(path) if link else kind == "file"
            if path != folder and (is_folder or is_file):  # a store may list the folder in itself
                yield Entry(path, is_folder, link, info)

    return scan


def _identify(fs: Any) -> Callable[[str], str]:
    return os.path.realpath if is_local(fs) else str


def _items(entry: dict[str, Any], path: str, name: str, column: str | None) -> Iterator[Item]:
    kind = _kind(entry["name"]) or "image"  # what is named alone is tried, whatever it is called
    changed = next((entry[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if entry.get(key)), "")
    size, version = int(entry.get("size") or 0), str(changed).strip('"')
    if kind != "rows":
        yield Item(kind, path, name, 0, 1, size, version)
        return
    with _table(path, name) as table:
        Columns.of(table, name, column)  # fails before the work
        start = 0
        for group in range(table.metadata.num_row_groups):
            stop = start + table.metadata.row_group(group).num_rows
            if stop > start:
                yield Item(kind, path, name, start, stop, size, version)
            start = stop


def images(item: Item, column: str | None = None) -> Iterator[Found]:
    """The images of an item, in order. What cannot be read is told of, and is no exception."""
    if item.kind == "image":
        yield Found(item.name, item.name, 0, Later(item.path))
    elif item.kind == "rows":
        yield from _rows(item, column)
    else:
        yield from _members(item, column)


class Columns(NamedTuple):
    """Which columns of a table hold the images, as bytes or as paths, and their names."""

    image: str
    nested: bool  # bytes and path of the image are fields of it, as Hugging Face's datasets write them
    paths: bool
    name: str | None

    @classmethod
    def of(cls, table: Any, called: str, wanted: str | None) -> Columns:
        """Raises: ValueError: It is not clear which, or `wanted` is not such a column."""
        from pyarrow import types

        schema = table.schema_arrow
        kinds = {field.name: field.type for field in schema}
        nested = {n for n, kind in kinds.items() if types.is_struct(kind) and kind.get_field_index("bytes") >= 0}
        binary = {n for n, kind in kinds.items() if types.is_binary(kind) or types.is_large_binary(kind)}
        text = {n for n, kind in kinds.items() if types.is_string(kind) or types.is_large_string(kind)}
        if wanted is not None:
            candidates = [wanted] if wanted in nested | binary | text else []
        else:
            held = sorted(nested | binary)
            candidates = held if len(held) == 1 else [n for n in _IMAGES if n in held][:1]
            candidates = candidates or [n for n in _PATHS if n in text and not held][:1]
        if not candidates:
            which = "is no column of bytes or paths" if wanted else "it is not clear which column holds the images"
            raise ValueError(
                f"{called}: {wanted + ' ' if wanted else ''}{which}; there are {', '.join(kinds)} (--column NAME)"
            )
        image = candidates[0]
        name = next((n for n in _NAMES if n in text), None)
        return cls(image, image in nested, image in text, image if image in text else name)


def _table(path: str, name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, inner = opened(path)
    try:
        return pq.ParquetFile(fs.open(inner, "rb"))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name}: is not a readable Parquet file ({error}); copy it again or leave it out") from error


def _rows(item: Item, column: str | None) -> Iterator[Found]:
    number = item.start
    try:
        with _table(item.path, item.name) as table:
            columns = Columns.of(table, item.name, column)
            for row, values in _values(table, item, columns):
                yield _of_row(item, columns, row, values)
                number = row + 1
    except Exception as error:  # from here on nothing can be read: all the rest is told of
        for row in range(number, item.stop):
            reason = f"{item.name}, row {row}: cannot be read ({error}); write the table again"
            yield Found(f"{item.name}#{row}", item.name, row, ImageError(reason))


def _values(table: Any, item: Item, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of an item, from as few row groups as hold them."""
    first, groups = 0, []
    before = None
    for group in range(table.metadata.num_row_groups):
        last = first + table.metadata.row_group(group).num_rows
        if first < item.stop and last > item.start:
            groups.append(group)
            before = first if before is None else before
        first = last
    row = before or 0
    wanted = [name for name in dict.fromkeys((columns.image, columns.name)) if name]
    for batch in table.iter_batches(ROWS, row_groups=groups, columns=wanted):
        keep = slice(max(0, item.start - row), max(0, item.stop - row))
        for i, values in enumerate(batch.slice(keep.start, max(0, keep.stop - keep.start)).to_pylist()):
            yield row + keep.start + i, values
        row += len(batch)
        if row >= item.stop:
            return


def _of_row(item: Item, columns: Columns, row: int, values: dict[str, Any]) -> Found:
    value = values[columns.image]
    name = values.get(columns.name) if columns.name else None
    if columns.nested and value is not None:
        name = name or value.get("path")
        value = value["bytes"] if value["bytes"] is not None else value.get("path")
    name = str(name) if name else f"{item.name}#{row}"
    if value is None:
        return Found(name, item.name, row, ImageError(f"{name}: row {row} of {item.name} holds no image"))
    if isinstance(value, bytes):
        return Found(name, item.name, row, value)
    if "::" in value or ("://" in value and value.partition("://")[0] not in {*_URLS, item.path.partition("://")[0]}):
        # fsspec knows kinds that unpack archives or run templates: a table is data, and may not ask for these
        return Found(name, item.name, row, ImageError(f"{value}: tables name files, or URLs of {', '.join(_URLS)}"))
    if "://" not in value and not Path(value).is_absolute():  # beside the table
        value = f"{item.path.rpartition('/')[0]}/{value}"
    return Found(name, item.name, row, Later(value))


def _members(item: Item, extension: str | None) -> Iterator[Found]:
    """Images in a tar file, read from its beginning to its end, one at a time."""
    number = 0
    try:
        fs, path = opened(item.path)
        with fs.open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as shard:
            for member in shard:
                if not member.isfile() or _kind(member.name) != "image" or not _has(member.name, extension):
                    continue
                data: bytes | ImageError = ImageError(f"{member.name}: takes {member.size:,} bytes, over {LARGEST:,}")
                if member.size <= LARGEST and (file := shard.extractfile(member)) is not None:
                    data = file.read()
                yield Found(member.name, item.name, number, data)
                number += 1
    except Exception as error:
        reason = f"{item.name}: cannot be read beyond {count(number, 'image')} ({error}); copy it again, then --retry"
        yield Found(f"{item.name}#{number}", item.name, number, ImageError(reason))


def _has(name: str, extension: str | None) -> bool:
    """A member of a WebDataset is KEY.EXTENSION, and the extension may have several dots."""
    last = name.rpartition("/")[2]
    return extension is None or last.partition(".")[2].lower() == extension.lower().lstrip(".")
