"""The log of the station: every inspection in a database and, where asked for, the images on disk."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    DateTime,
    Dialect,
    Double,
    Engine,
    Index,
    Integer,
    Select,
    String,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.types import TypeDecorator

from unflaw.io.files import write_atomically
from unflaw.io.progress import batched

BUSY = 30.0  # seconds that SQLite waits for another writer
_ORPHAN = 3600.0  # seconds after which an image without a record was left behind by a crash, and is not on its way in
_LOCK = 0x756E666C  # of PostgreSQL, held while the tables are brought up to date


# Written out, since an index on some rows only serves queries that say the same, word by word.
_WAITING = text("decision IS NULL AND (verdict <> 'good' OR sampled)")
_DECIDED = text("decision IS NOT NULL")


class LogError(ValueError):
    """A log that cannot be used. The message says what to do."""


class _UTC(TypeDecorator[datetime]):
    """Moments with their time zone, which SQLite would drop."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value and value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo:
            return value and value.astimezone(timezone.utc)
        return value.replace(tzinfo=timezone.utc)


class Base(DeclarativeBase):
    """What the migrations must arrive at."""


class Entry(Base):
    """One inspection.

    Attributes:
        time: When it was logged, UTC.
        name: What the image is called; for people.
        digest: SHA-256 of the file's bytes, in hex. Where images are kept, it is the name of the file.
        size: Bytes of the file.
        width, height: Of the image, upright, pixels. Regions are in these.
        source: The path of a watched file, which is inspected once for each content; None for what came over HTTP.
        detector, category: Names; the category is "" for a detector that has no others.
        detector_digest: SHA-256 of the detector's file, in hex.
        score, p_value, p_estimated, verdict: As in `Result`.
        threshold: What the score was compared with.
        regions: As in `Region.to_json`.
        sampled: Whether it was drawn at random for review, whatever its verdict.
        decision: What a person decided, "good" or "defect"; None: nobody has.
        decided_by, decided_at: Who and when, UTC.
    """

    __tablename__ = "inspections"
    __table_args__ = (
        UniqueConstraint("source", "digest", name="uq_inspections_source"),
        Index("ix_inspections_waiting", "id", sqlite_where=_WAITING, postgresql_where=_WAITING),
        Index(
            "ix_inspections_decided",
            *("detector", "category", "decision"),
            sqlite_where=_DECIDED,
            postgresql_where=_DECIDED,
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    time: Mapped[datetime] = mapped_column(_UTC, index=True)
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(String(64), index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int]
    height: Mapped[int]
    source: Mapped[str | None]
    detector: Mapped[str]
    detector_digest: Mapped[str] = mapped_column(String(64))
    category: Mapped[str]
    score: Mapped[float] = mapped_column(Double)
    p_value: Mapped[float] = mapped_column(Double)
    p_estimated: Mapped[float | None] = mapped_column(Double)
    threshold: Mapped[float] = mapped_column(Double)
    verdict: Mapped[str] = mapped_column(String(16), index=True)
    regions: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    sampled: Mapped[bool]
    decision: Mapped[str | None] = mapped_column(String(16))
    decided_by: Mapped[str | None]
    decided_at: Mapped[datetime | None] = mapped_column(_UTC)

    def to_json(self) -> dict[str, Any]:
        """All columns by name."""
        return {column.name: getattr(self, column.name) for column in Entry.__table__.columns}


@dataclass(frozen=True)
class Filter:
    """Which inspections; what is None does not count.

    Attributes:
        since, until: Of the time logged, with a time zone; `until` is exclusive.
        text: Part of the image's name.
        waiting: Only those that a person should decide and nobody has: verdicts other than good, and the sampled.
        decided: Only those that a person has decided, or has not.
        decision: Only those decided so.
        sampled: Only those drawn at random, or only the others.
    """

    verdict: str | None = None
    detector: str | None = None
    category: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    text: str | None = None
    waiting: bool = False
    decided: bool | None = None
    decision: str | None = None
    sampled: bool | None = None

    def apply(self, query: Select[Any]) -> Select[Any]:
        equal = {
            Entry.verdict: self.verdict,
            Entry.detector: self.detector,
            Entry.category: self.category,
            Entry.decision: self.decision,
            Entry.sampled: self.sampled,
        }
        conditions = [column == value for column, value in equal.items() if value is not None]
        if self.since is not None:
            conditions.append(Entry.time >= self.since)
        if self.until is not None:
            conditions.append(Entry.time < self.until)
        if self.text:
            conditions.append(Entry.name.icontains(legible(self.text), autoescape=True))
        if self.waiting:
            query = query.where(_WAITING)
        if self.decided is not None:
            conditions.append(Entry.decision.is_not(None) if self.decided else Entry.decision.is_(None))
        return query.where(*conditions)


@dataclass(frozen=True)
class Pruned:
    """What retention removed: records, images, and bytes of the latter."""

    records: int
    images: int
    bytes: int


class Log:
    """The database and the folder of images. Safe to use from several threads, and several processes at once.

    Args:
        url: Of a database, as SQLAlchemy writes them: `sqlite:///station/log.db`, `postgresql://host/unflaw`. Tables
            are made or brought up to date.
        images: Folder for the images, a file for each content; None keeps none.

    Raises:
        LogError: An unknown kind of database, one that does not answer, is damaged, or was made by a newer unflaw.
    """

    def __init__(self, url: str, images: Path | None = None) -> None:
        self.images = images
        self.engine = _engine(url)
        self._session = sessionmaker(self.engine, expire_on_commit=False)
        try:
            _migrate(self.engine)
        except OperationalError as error:
            where = self.engine.url.render_as_string(hide_password=True)
            raise LogError(f"{where}: the log's database does not answer: {str(error.orig).strip()}") from error
        except DatabaseError as error:
            where = self.engine.url.render_as_string(hide_password=True)
            raise LogError(f"{where}: is no log of unflaw, or damaged; move it away or restore the backup") from error

    def add(self, entry: Entry, data: bytes | None = None) -> Entry | None:
        """Writes an inspection; when this returns it is on disk, image first. None: this source has it already."""
        if data is not None:
            self._put(entry.digest, data)
        try:
            with self._session.begin() as session:
                session.add(entry)
        except IntegrityError:
            if entry.source is not None and self.of_source(entry.source, entry.digest) is not None:
                return None
            raise
        return entry

    def get(self, number: int) -> Entry | None:
        with self._session() as session:
            return session.get(Entry, number)

    def of_source(self, source: str, digest: str) -> Entry | None:
        """The inspection of a watched file's content."""
        with self._session() as session:
            return session.scalar(select(Entry).where(Entry.source == source, Entry.digest == digest))

    def find(self, wanted: Filter, *, before: int | None = None, limit: int = 50) -> Sequence[Entry]:
        """Newest first; `before` is the id that the last page ended with."""
        query = wanted.apply(select(Entry)).order_by(Entry.id.desc()).limit(limit)
        with self._session() as session:
            return session.scalars(query if before is None else query.where(Entry.id < before)).all()

    def count(self, wanted: Filter) -> int:
        with self._session() as session:
            return session.scalar(wanted.apply(select(func.count(Entry.id)))) or 0

    def stream(self, wanted: Filter, batch: int = 5000) -> Iterator[Sequence[Entry]]:
        """All of them, oldest first, in batches: memory does not grow with the log."""
        last = 0
        with self._session() as session:
            while True:
                query = wanted.apply(select(Entry)).where(Entry.id > last).order_by(Entry.id).limit(batch)
                if not (found := session.scalars(query).all()):
                    return
                yield found
                last = found[-1].id
                session.expunge_all()

    def decide(self, number: int, decision: str | None, by: str) -> Entry | None:
        """What a person decided, instead of any earlier decision; None takes that back. No such id: returns None."""
        with self._session.begin() as session:
            session.connection(execution_options={"immediate": True})  # it reads first: SQLite would not wait to write
            entry = session.get(Entry, number)
            if entry is not None:
                entry.decision = decision
                entry.decided_by = by if decision else None
                entry.decided_at = datetime.now(timezone.utc) if decision else None
            return entry

    def image(self, digest: str) -> Path | None:
        """The file of a kept image."""
        path = self._path(digest)
        return path if path is not None and path.is_file() else None

    def prune(self, *, days: float | None = None, image_bytes: int | None = None) -> Pruned:
        """Retention.

        A clock that was wrong for a while makes no record old and keeps none for ever: records lie in time as they do
        in the log, so none is older than one before it, or younger than one after it, that has a right time.

        Args:
            days: Records older than this go, and images that no record names any more, once they are an hour old.
            image_bytes: Then the oldest images go until the rest takes no more than this; their records stay.
        """
        records = 0 if days is None else self._forget(timedelta(days=days))
        kept, gone = [], []  # (last record, bytes, time of change, path)
        for files in batched(self._kept(), 500):
            query = select(Entry.digest, func.max(Entry.id)).group_by(Entry.digest)
            with self.engine.connect() as connection:
                found = connection.execute(query.where(Entry.digest.in_([file.name for file in files])))
                newest = {digest: last for digest, last in found}
            for path in files:
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.name in newest:
                    kept.append((newest[path.name], status.st_size, status.st_mtime, path))
                elif time.time() - status.st_mtime > _ORPHAN:
                    gone.append((0, status.st_size, status.st_mtime, path))
        total = sum(size for _, size, *_ in kept)
        for item in sorted(kept):
            if image_bytes is None or total <= image_bytes:
                break
            gone.append(item)
            total -= item[1]
        removed = []
        for _, size, changed, path in gone:
            with suppress(FileNotFoundError):
                if path.stat().st_mtime == changed:  # else it came again meanwhile
                    path.unlink()
                    removed.append(size)
        return Pruned(records, len(removed), sum(removed))

    def _forget(self, age: timedelta) -> int:
        now = datetime.now(timezone.utc)
        cutoff = now - age
        young = select(func.min(Entry.id)).where(Entry.time >= cutoff, Entry.time <= now)
        old = select(func.max(Entry.id)).where(Entry.time < cutoff)
        with self.engine.connect().execution_options(immediate=True) as connection, connection.begin():
            if (first := connection.scalar(young)) is not None:
                old = old.where(Entry.id < first)
            last = connection.scalar(old)
            return 0 if last is None else connection.execute(delete(Entry).where(Entry.id <= last)).rowcount

    def ping(self) -> None:
        """Raises SQLAlchemyError where the database does not answer."""
        with self.engine.connect() as connection:
            connection.execute(select(1))

    def close(self) -> None:
        self.engine.dispose()

    def _path(self, digest: str) -> Path | None:
        return self.images and self.images / digest[:2] / digest

    def _kept(self) -> Iterator[Path]:
        """Images, and hidden beside them what a killed process was writing, which no record names."""
        return iter(()) if self.images is None else self.images.glob("[0-9a-f][0-9a-f]/*")

    def _put(self, digest: str, data: bytes) -> None:
        path = self._path(digest)
        if path is None:
            return
        with suppress(FileNotFoundError):
            os.utime(path)  # it is there; so retention, here or in another process, takes it for new
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write_bytes(data))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def legible(name: str) -> str:
    """A name as databases and pages can hold it: no bytes that are not UTF-8, no control characters."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise LogError(
            f"{url}: not the URL of a database; such as sqlite:///log.db or postgresql://host/name"
        ) from error
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        try:
            return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
        except ImportError as error:
            raise ImportError("PostgreSQL needs psycopg; install it with: pip install 'unflaw[postgres]'") from error
    if kind != "sqlite":
        raise LogError(f"{kind}: not a kind of database that the log is kept in; use sqlite or postgresql")
    if not parsed.database:
        raise LogError("a log in memory would be lost; name a file, such as sqlite:///log.db")
    file = Path(parsed.database)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not parsed.database.startswith("file:"):
        with suppress(OSError):  # SQLite will say it
            file.touch(exist_ok=False)  # by the umask; SQLite would not let a group write
    engine = create_engine(parsed, connect_args={"timeout": BUSY})

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions late, and end them for CREATE TABLE
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # committed is on disk, also when the power fails

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _migrate(engine: Engine) -> None:
    """Brings the tables up to date, in one transaction that no other process can come between."""
    config = Config()
    config.set_main_option("script_location", "unflaw.station:migrations")
    config.set_main_option("path_separator", "os")
    with engine.connect().execution_options(immediate=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise LogError(
                f"the log was made by a newer unflaw ({error}); update with pip install -U unflaw"
            ) from error
