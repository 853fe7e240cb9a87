"""Log of the station: every inspection in a database and, optionally, the images on disk."""

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

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.types import TypeDecorator

from unflaw.io.files import write_atomically
from unflaw.io.progress import batched

BUSY = 30.0  # seconds that SQLite waits for another writer
_ORPHAN = 3600.0  # seconds after which an image without a record is a leftover of a crash, not a new one
_LOCK = 0x756E666C  # advisory lock of PostgreSQL, held during migrations

# SQL text, since a partial index only serves queries with literally the same condition
_WAITING = sa.text("decision IS NULL AND (verdict <> 'good' OR sampled)")
_DECIDED = sa.text("decision IS NOT NULL")


class LogError(ValueError):
    """The log cannot be used. The message says what to do."""


class _UTC(TypeDecorator[datetime]):
    """Times with their time zone, which SQLite would drop."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value and value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value and (value.astimezone(timezone.utc) if value.tzinfo else value.replace(tzinfo=timezone.utc))


class Base(DeclarativeBase):
    """Base of the tables; the migrations produce the same schema."""


class Entry(Base):
    """Inspection, a row of the log. `schemas.Inspection` describes the columns.

    Attributes:
        digest: SHA-256 of the image file, in hex; also the name of the kept image.
        source: Path of a watched file, of which each content is logged once; None for images sent over HTTP.
        category: "" for a detector without categories.
        decision: Decision of a person, "good" or "defect"; None if there is none.
        decided_by, decided_at: Person and time (UTC) of the decision.
    """

    __tablename__ = "inspections"
    __table_args__ = (
        sa.UniqueConstraint("source", "digest", name="uq_inspections_source"),
        sa.Index("ix_inspections_waiting", "id", sqlite_where=_WAITING, postgresql_where=_WAITING),
        sa.Index(
            "ix_inspections_decided",
            "detector",
            "category",
            "decision",
            sqlite_where=_DECIDED,
            postgresql_where=_DECIDED,
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    time: Mapped[datetime] = mapped_column(_UTC, index=True)
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(sa.String(64), index=True)
    size: Mapped[int] = mapped_column(sa.BigInteger)
    width: Mapped[int]
    height: Mapped[int]
    source: Mapped[str | None]
    detector: Mapped[str]
    detector_digest: Mapped[str] = mapped_column(sa.String(64))
    category: Mapped[str]
    score: Mapped[float] = mapped_column(sa.Double)
    p_value: Mapped[float] = mapped_column(sa.Double)
    p_estimated: Mapped[float | None] = mapped_column(sa.Double)
    threshold: Mapped[float] = mapped_column(sa.Double)
    verdict: Mapped[str] = mapped_column(sa.String(16), index=True)
    regions: Mapped[list[dict[str, Any]]] = mapped_column(sa.JSON)
    sampled: Mapped[bool]
    decision: Mapped[str | None] = mapped_column(sa.String(16))
    decided_by: Mapped[str | None]
    decided_at: Mapped[datetime | None] = mapped_column(_UTC)

    def to_json(self) -> dict[str, Any]:
        """Return all columns by name."""
        return {column.name: getattr(self, column.name) for column in Entry.__table__.columns}


@dataclass(frozen=True)
class Filter:
    """Conditions for inspections; None means no condition.

    Attributes:
        verdict, detector, category, decision: Values of these columns.
        since, until: Bounds of the time of logging, with a time zone; `until` is exclusive.
        text: Part of the image's name.
        waiting: Only those that wait for a decision: verdict other than good, or drawn at random.
        decided: Only those with a decision, or only those without.
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

    def apply(self, query: sa.Select[Any]) -> sa.Select[Any]:
        """Add the conditions to a query for entries."""
        columns = ("verdict", "detector", "category", "decision", "sampled")
        query = query.where(*(getattr(Entry, c) == getattr(self, c) for c in columns if getattr(self, c) is not None))
        if self.since is not None:
            query = query.where(Entry.time >= self.since)
        if self.until is not None:
            query = query.where(Entry.time < self.until)
        if self.text:
            query = query.where(Entry.name.icontains(legible(self.text), autoescape=True))
        if self.waiting:
            query = query.where(_WAITING)
        if self.decided is not None:
            query = query.where(Entry.decision.is_not(None) if self.decided else Entry.decision.is_(None))
        return query


@dataclass(frozen=True)
class Pruned:
    """Numbers of removed records and images, and bytes of the images."""

    records: int
    images: int
    bytes: int


class Log:
    """Database of inspections and folder of images. Several threads and processes may use them at once.

    Args:
        url: Database URL as in SQLAlchemy: `sqlite:///station/log.db`, `postgresql://host/unflaw`. Tables are created
            or migrated.
        images: Folder for the images, one file for each content; None keeps no images.

    Raises:
        LogError: The database is of an unknown kind, does not answer, is damaged, or was made by a newer unflaw.
    """

    def __init__(self, url: str, images: Path | None = None) -> None:
        self.images = images
        self.engine = _engine(url)
        self._session = sessionmaker(self.engine, expire_on_commit=False)
        try:
            _migrate(self.engine)
        except DatabaseError as error:
            fault = "is not a log of unflaw, or damaged; move it away or restore the backup"
            if isinstance(error, OperationalError):
                fault = f"the log's database does not answer: {str(error.orig).strip()}"
            raise LogError(f"{self.engine.url.render_as_string(hide_password=True)}: {fault}") from error

    def add(self, entry: Entry, data: bytes | None = None) -> Entry | None:
        """Write an image and then its entry to disk. Return None if this source is already logged with this content."""
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
        """Return the inspection of a watched file with this content."""
        with self._session() as session:
            return session.scalar(sa.select(Entry).where(Entry.source == source, Entry.digest == digest))

    def find(self, wanted: Filter, *, before: int | None = None, limit: int = 50) -> Sequence[Entry]:
        """Return a page of inspections, newest first, with ids below `before`."""
        query = wanted.apply(sa.select(Entry)).order_by(Entry.id.desc()).limit(limit)
        with self._session() as session:
            return session.scalars(query if before is None else query.where(Entry.id < before)).all()

    def count(self, wanted: Filter) -> int:
        with self._session() as session:
            return session.scalar(wanted.apply(sa.select(sa.func.count(Entry.id)))) or 0

    def stream(self, wanted: Filter, batch: int = 5000) -> Iterator[Sequence[Entry]]:
        """Yield all inspections, oldest first, in batches, so that memory does not grow with the log."""
        query = wanted.apply(sa.select(Entry)).order_by(Entry.id).execution_options(yield_per=batch)
        with self._session() as session:
            yield from session.scalars(query).partitions()

    def decide(self, number: int, decision: str | None, by: str) -> Entry | None:
        """Record a decision; None withdraws an earlier one. Return None if there is no such inspection."""
        with self._session.begin() as session:
            session.connection(execution_options={"immediate": True})  # reads before it writes: SQLite would not wait
            entry = session.get(Entry, number)
            if entry is not None:
                entry.decision = decision
                entry.decided_by = by if decision else None
                entry.decided_at = datetime.now(timezone.utc) if decision else None
            return entry

    def image(self, digest: str) -> Path | None:
        """Return the file of a kept image, or None."""
        if self.images is None:
            return None
        path = self.images / digest[:2] / digest
        return path if path.is_file() else None

    def prune(self, *, days: float | None = None, image_bytes: int | None = None) -> Pruned:
        """Remove old records and images.

        Ids give the order of records, so a clock that was wrong for a while neither ages records nor keeps them
        forever: a record is at least as old as any later one with a correct time.

        Args:
            days: Records older than this are removed, and images without a record once they are an hour old.
            image_bytes: Then the oldest images are removed until the rest fits this size; their records stay.
        """
        records = 0 if days is None else self._forget(timedelta(days=days))
        kept, gone = [], []  # (last record, bytes, time of change, path)
        # the pattern also finds the hidden parts of files that a killed process was writing
        for files in batched(() if self.images is None else self.images.glob("[0-9a-f][0-9a-f]/*"), 500):
            query = sa.select(Entry.digest, sa.func.max(Entry.id)).group_by(Entry.digest)
            with self.engine.connect() as connection:
                found = connection.execute(query.where(Entry.digest.in_([file.name for file in files])))
                newest = {digest: last for digest, last in found}
            for path in files:
                with suppress(FileNotFoundError):
                    status = path.stat()
                    file = newest.get(path.name, 0), status.st_size, status.st_mtime, path
                    if path.name in newest:
                        kept.append(file)
                    elif time.time() - status.st_mtime > _ORPHAN:
                        gone.append(file)
        if image_bytes is not None:
            excess = sum(size for _, size, *_ in kept) - image_bytes
            for file in sorted(kept):
                if excess <= 0:
                    break
                gone.append(file)
                excess -= file[1]
        removed = []
        for _, size, changed, path in gone:
            with suppress(FileNotFoundError):
                if path.stat().st_mtime == changed:  # else the image was sent again meanwhile
                    path.unlink()
                    removed.append(size)
        return Pruned(records, len(removed), sum(removed))

    def _forget(self, age: timedelta) -> int:
        """Remove records older than `age`; return their number."""
        now = datetime.now(timezone.utc)
        cutoff = now - age
        young = sa.select(sa.func.min(Entry.id)).where(Entry.time >= cutoff, Entry.time <= now)
        old = sa.select(sa.func.max(Entry.id)).where(Entry.time < cutoff)
        with self.engine.connect().execution_options(immediate=True) as connection, connection.begin():
            if (first := connection.scalar(young)) is not None:
                old = old.where(Entry.id < first)
            last = connection.scalar(old)
            return 0 if last is None else connection.execute(sa.delete(Entry).where(Entry.id <= last)).rowcount

    def ping(self) -> None:
        """Query the database; SQLAlchemyError if it does not answer."""
        with self.engine.connect() as connection:
            connection.execute(sa.select(1))

    def close(self) -> None:
        self.engine.dispose()

    def _put(self, digest: str, data: bytes) -> None:
        """Write an image unless it is kept already."""
        if self.images is None:
            return
        path = self.images / digest[:2] / digest
        with suppress(FileNotFoundError):
            os.utime(path)  # retention, here or in another process, treats the image as new
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write_bytes(data))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def legible(name: str) -> str:
    """Replace the characters of a name that databases and pages cannot hold: invalid UTF-8 and control characters."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise LogError(f"{url}: not a database URL such as sqlite:///log.db or postgresql://host/name") from error
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        try:
            return sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
        except ImportError as error:
            raise ImportError("PostgreSQL needs psycopg; install it with: pip install 'unflaw[postgres]'") from error
    if kind != "sqlite":
        raise LogError(f"{kind}: this kind of database is not supported; use sqlite or postgresql")
    if not parsed.database:
        raise LogError("a log in memory would be lost; name a file, such as sqlite:///log.db")
    file = Path(parsed.database)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not parsed.database.startswith("file:"):
        with suppress(OSError):  # SQLite will report it
            file.touch(exist_ok=False)  # with the rights of the umask; SQLite would not let a group write
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY})

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # else the driver begins transactions late, and ends them for CREATE TABLE
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # commits survive a power failure

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        immediate = connection.get_execution_options().get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _migrate(engine: sa.Engine) -> None:
    """Migrate the tables in one transaction; other processes wait."""
    config = Config()
    config.set_main_option("script_location", "unflaw.station:migrations")
    config.set_main_option("path_separator", "os")
    with engine.connect().execution_options(immediate=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise LogError(f"the log was made by a newer unflaw ({error}); run pip install -U unflaw") from error
