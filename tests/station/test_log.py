"""The log: the same in SQLite and in a real PostgreSQL."""

import csv
import json
import os
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update

from unflaw.station.export import COLUMNS, export
from unflaw.station.log import Base, Entry, Filter, Log, LogError, legible, sha256

NOON = datetime(2026, 11, 25, 12, 0, 0, 123456, tzinfo=timezone.utc)
REGIONS = [{"box": [1, 2, 3, 4], "area": 4, "peak": 1.25, "contour": [[1, 2], [3, 4]]}]


def entry(**fields: object) -> Entry:
    whole = {
        "time": NOON,
        "name": "a.png",
        "digest": sha256(b"a"),
        "size": 1,
        "width": 640,
        "height": 480,
        "source": None,
        "detector": "screw",
        "detector_digest": sha256(b"detector"),
        "category": "",
        "score": 1.1,
        "p_value": 0.25,
        "threshold": 3.0,
        "verdict": "good",
        "regions": [],
        "sampled": False,
    }
    return Entry(**(whole | fields))


@pytest.fixture
def log(database, tmp_path):
    log = Log(database, tmp_path / "images")
    yield log
    log.close()


def ids(found) -> list[int]:
    return [item.id for item in found]


# What is written is read


def test_an_inspection_comes_back_as_it_was(log):
    zone = timezone(timedelta(hours=5, minutes=30))
    written = log.add(entry(time=NOON.astimezone(zone), regions=REGIONS, name="Prüfling 件.png", score=1e-300))
    found = log.get(written.id)
    assert found.to_json() == written.to_json() | {"time": NOON, "decision": None}
    assert found.regions == REGIONS and found.score == 1e-300 and found.time.utcoffset() == timedelta(0)
    assert log.get(written.id + 1) is None


def test_a_source_has_each_content_once(log):
    first = log.add(entry(source="/camera/1.png"))
    assert log.add(entry(source="/camera/1.png")) is None
    other = log.add(entry(source="/camera/1.png", digest=sha256(b"b")))
    assert log.of_source("/camera/1.png", sha256(b"b")).id == other.id
    assert ids(log.find(Filter())) == [other.id, first.id]
    assert log.add(entry()) and log.add(entry())  # over HTTP the same image may come again


def test_two_writers_agree_on_who_was_first(log, database):
    others = [log, Log(database), Log(database)]
    barrier, won = threading.Barrier(3), []

    def write(own: Log) -> None:
        for i in range(15):
            barrier.wait()
            if own.add(entry(source=f"/{i}")) is not None:
                won.append(i)

    threads = [threading.Thread(target=write, args=(own,)) for own in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(15)) and log.count(Filter()) == 15


def test_filters_choose(log):
    rows = [
        log.add(entry(verdict="good", name="line-3/ok_1.png")),
        log.add(entry(verdict="defect", detector="nut", time=NOON + timedelta(hours=1), name="100%.png")),
        log.add(entry(verdict="review", category="left", time=NOON + timedelta(hours=2))),
        log.add(entry(verdict="good", sampled=True, time=NOON + timedelta(hours=3))),
    ]
    good, defect, review, sampled = (row.id for row in rows)

    def find(**wanted: object) -> list[int]:
        found = ids(log.find(Filter(**wanted)))
        assert log.count(Filter(**wanted)) == len(found)
        assert sorted(found) == [e.id for batch in log.stream(Filter(**wanted), batch=1) for e in batch]
        return found

    assert find() == [sampled, review, defect, good]
    assert find(verdict="good") == [sampled, good]
    assert find(detector="nut") == [defect] and find(category="left") == [review]
    assert find(since=NOON + timedelta(hours=1), until=NOON + timedelta(hours=3)) == [review, defect]
    assert find(text="LINE-3") == [good] and find(text="0%.") == [defect] and find(text="_1") == [good]
    assert find(waiting=True) == [sampled, review, defect]
    log.decide(defect, "good", "Ada")
    assert find(waiting=True) == [sampled, review]
    assert find(decided=True) == [defect] == find(decision="good") and find(decided=False) == [sampled, review, good]
    assert find(sampled=True) == [sampled] and find(sampled=False) == [review, defect, good]
    assert ids(log.find(Filter(), limit=2)) == [sampled, review]
    assert ids(log.find(Filter(), before=review, limit=2)) == [defect, good]


def test_the_queue_and_the_decisions_are_found_without_reading_the_whole_log(tmp_path):
    log = Log(f"sqlite:///{tmp_path / 'log.db'}")
    for wanted, index in (
        (Filter(waiting=True), "waiting"),
        (Filter(detector="screw", category="", decision="good"), "decided"),
        (Filter(detector="screw", category="", decided=True), "decided"),
    ):
        query = str(
            wanted.apply(select(func.count(Entry.id))).compile(log.engine, compile_kwargs={"literal_binds": True})
        )
        with log.engine.connect() as connection:
            (step,) = connection.execute(text(f"EXPLAIN QUERY PLAN {query}"))
        assert f"ix_inspections_{index}" in step.detail


def test_a_decision_has_a_name_and_a_time_and_can_be_taken_back(log):
    number = log.add(entry(verdict="defect")).id
    before = datetime.now(timezone.utc)
    decided = log.decide(number, "good", "Ada")
    assert (decided.decision, decided.decided_by) == ("good", "Ada")
    assert before <= log.get(number).decided_at <= datetime.now(timezone.utc)
    assert log.decide(number, "defect", "Bob").decided_by == "Bob"
    taken = log.decide(number, None, "Bob")
    assert (taken.decision, taken.decided_by, taken.decided_at) == (None, None, None)
    assert log.decide(number + 1, "good", "Ada") is None


@given(st.text(max_size=30), st.binary(max_size=10))
def test_any_name_becomes_one_that_can_be_stored(written, raw):
    for name in (written, os.fsdecode(raw)):
        stored = legible(name)
        assert stored.encode().decode() == stored and stored.isprintable() and legible(stored) == stored
    assert legible("Prüfling 件 1.png") == "Prüfling 件 1.png"


# Tables


def test_migrations_arrive_at_the_model(log):
    with log.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_first_start_may_happen_several_times_at_once(database, tmp_path):
    code = f"from unflaw.station.log import Log; Log({database!r})"
    starting = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[1] for process in starting] == [b"", b"", b""]
    Log(database).add(entry())


def test_a_log_of_a_newer_version_is_left_alone(log, database):
    with log.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '999'"))
    with pytest.raises(LogError, match="newer unflaw"):
        Log(database)
    assert log.add(entry())


@pytest.mark.parametrize(
    "url, named",
    [
        ("log.db", "sqlite:///"),
        ("mysql://host/name", "mysql"),
        ("sqlite://", "in memory"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "does not answer"),
    ],
)
def test_a_url_that_cannot_be_used_is_named(url, named):
    with pytest.raises(LogError, match=named) as caught:
        Log(url)
    assert "secret" not in str(caught.value)


def test_sqlite_is_written_to_disk_before_it_is_said(tmp_path):
    with Log(f"sqlite:///{tmp_path / 'new folder' / 'log.db'}").engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL


# Images and retention


def keep(log: Log, data: bytes, age: timedelta = timedelta()) -> Entry:
    return log.add(entry(time=datetime.now(timezone.utc) - age, digest=sha256(data)), data)


def test_an_image_is_kept_once_by_its_content(log, tmp_path):
    keep(log, b"one"), keep(log, b"one"), keep(log, b"two")
    files = [path for path in (tmp_path / "images").rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in files) == [b"one", b"two"]
    assert log.image(sha256(b"one")).read_bytes() == b"one"
    assert log.image(sha256(b"three")) is None


def test_retention_by_days_removes_records_and_their_images(log):
    day = timedelta(days=1)
    keep(log, b"old", 3 * day), keep(log, b"both", 3 * day)
    stay = [keep(log, b"both", 1 * day).id, keep(log, b"new").id]
    for data in (b"old", b"both", b"new"):
        os.utime(log.image(sha256(data)), (0, 0))
    done = log.prune(days=2)
    assert (done.records, done.images, done.bytes) == (2, 1, 3)
    assert sorted(ids(log.find(Filter()))) == stay
    assert log.image(sha256(b"old")) is None and log.image(sha256(b"both")) and log.image(sha256(b"new"))
    assert log.prune(days=2).records == 0


def test_a_clock_that_was_wrong_for_a_while_makes_no_record_old_and_keeps_none_for_ever(log):
    day = timedelta(days=1)
    old = [keep(log, b"%d" % age, age * day).id for age in (400, 200, -5000, 120)]  # one of the future among them
    stay = [keep(log, b"yesterday", day).id]
    lost = (20_000 * day, 19_999 * day)  # a camera that took it for 1970
    stay += [keep(log, b"%d" % age.days, age).id for age in lost]
    stay += [keep(log, b"of the future", -5000 * day).id, keep(log, b"now").id]
    assert log.prune(days=90).records == len(old) and sorted(ids(log.find(Filter()))) == stay
    assert log.prune(days=90).records == 0


def test_where_all_is_old_all_goes(log):
    for age in (400, 200, 20_000):
        keep(log, b"%d" % age, timedelta(days=age))
    assert log.prune(days=90).records == 3 and log.count(Filter()) == 0


def test_what_a_killed_process_was_writing_goes_with_retention(log, tmp_path):
    log._put(sha256(b"whole"), b"whole")
    stray = log.image(sha256(b"whole")).with_name(f".{sha256(b'half')}.part")
    stray.write_bytes(b"ha")
    assert log.prune(days=1).images == 0 and stray.exists()  # perhaps it is being written
    os.utime(stray, (0, 0))
    assert log.prune(days=1).images == 1 and not stray.exists()


def test_retention_by_bytes_removes_the_oldest_images_and_no_record(log):
    for data in (b"1" * 10, b"2" * 10, b"3" * 10):
        keep(log, data)
    keep(log, b"1" * 10)  # seen again: now the newest
    done = log.prune(image_bytes=20)
    assert (done.records, done.images, done.bytes) == (0, 1, 10) and log.count(Filter()) == 4
    assert log.image(sha256(b"2" * 10)) is None and log.image(sha256(b"1" * 10)) and log.image(sha256(b"3" * 10))


def test_an_image_on_its_way_in_is_not_taken_for_left_behind(log, tmp_path):
    log._put(sha256(b"no record yet"), b"no record yet")
    assert log.prune(days=1).images == 0
    os.utime(log.image(sha256(b"no record yet")), (0, 0))
    assert log.prune(days=1).images == 1


def test_an_image_that_comes_again_while_old_ones_go_stays(log, monkeypatch):
    for data in (b"1" * 10, b"2" * 10):
        keep(log, data)
        os.utime(log.image(sha256(data)), (0, 0))
    unlink = Path.unlink

    def meanwhile(path, **options):  # the first one goes, once all have been looked at
        log._put(sha256(b"2" * 10), b"2" * 10)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    assert log.prune(image_bytes=0).images == 1 and log.image(sha256(b"2" * 10))


def test_a_decision_waits_for_another_writer(database, tmp_path):
    log, other = Log(database, tmp_path / "images"), Log(database, tmp_path / "images")
    number, decided = keep(log, b"one").id, threading.Event()
    with other.engine.connect().execution_options(immediate=True) as connection, connection.begin():
        connection.execute(update(Entry).values(score=2.0))
        work = threading.Thread(target=lambda: (log.decide(number, "good", "me"), decided.set()))
        work.start()
        assert not decided.wait(0.3)
    work.join(20)
    assert decided.is_set() and log.get(number).decision == "good" and log.get(number).score == 2.0
    log.close(), other.close()


def test_a_number_is_not_given_twice(log):
    first = keep(log, b"one", timedelta(days=3)).id
    log.prune(days=1)
    assert keep(log, b"two").id > first


# Export


def test_csv_and_parquet_hold_every_column(log, tmp_path):
    written = [
        log.add(entry(regions=REGIONS, name='ä "quoted",\nbroken.png')),
        log.add(entry(name="=1+1.png", score=-2.5, source="/camera/1.png")),
    ]
    log.decide(written[0].id, "defect", "Ada")
    assert export(log, tmp_path / "log.csv", Filter()) == export(log, tmp_path / "log.parquet", Filter()) == 2
    with (tmp_path / "log.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == COLUMNS and first["name"] == 'ä "quoted",\nbroken.png'
    assert json.loads(first["regions"]) == REGIONS and datetime.fromisoformat(first["time"]) == NOON
    assert first["decision"] == "defect" and second["decision"] == "" and float(second["score"]) == -2.5
    assert second["name"] == "'=1+1.png"  # text, and no formula
    table = pq.read_table(tmp_path / "log.parquet")
    assert table.column_names == COLUMNS
    rows = table.to_pylist()
    assert rows[0]["time"] == NOON and rows[0]["decided_by"] == "Ada" and rows[1]["name"] == "=1+1.png"
    assert [row["id"] for row in rows] == [e.id for e in written] and json.loads(rows[0]["regions"]) == REGIONS
    assert export(log, tmp_path / "none.parquet", Filter(verdict="review")) == 0
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_a_table_of_an_unknown_kind_is_refused(log, tmp_path):
    with pytest.raises(ValueError, match=r"\.parquet"):
        export(log, tmp_path / "log.xlsx", Filter())
    assert not Path(tmp_path / "log.xlsx").exists()


def test_a_file_that_is_no_database_is_said(tmp_path):
    (tmp_path / "log.db").write_text("no database " * 100)
    with pytest.raises(LogError, match=r"log.db: is not a log of unflaw, or damaged"):
        Log(f"sqlite:///{tmp_path / 'log.db'}")
