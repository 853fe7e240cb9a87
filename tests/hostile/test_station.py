"""The station under requests that no honest client sends: documented answers only, never 500, nothing kept of them."""

import asyncio
import json
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from tests.hostile.corpus import cases
from tests.hostile.targets import Material

from unflaw.station.app import create_app
from unflaw.station.detectors import load_all
from unflaw.station.log import Filter, Log
from unflaw.station.service import Limits, Station

pytestmark = pytest.mark.slow

DOCUMENTED = {400, 403, 404, 405, 413, 422, 429}
LIMIT = 300_000  # bytes


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def good(material) -> bytes:
    return (material.parts / "test/good/000.png").read_bytes()


@pytest.fixture
def client(material, tmp_path):
    log = Log(f"sqlite:///{tmp_path / 'log.db'}", tmp_path / "images")
    station = Station(load_all([str(material.model)]), log, Limits(bytes=LIMIT, pixels=1_000_000, seconds=5))
    with TestClient(create_app(station), base_url="http://localhost:8000", raise_server_exceptions=False) as client:
        client.station = station
        yield client


def refused(answer, statuses=frozenset(DOCUMENTED)) -> str:
    assert answer.status_code in statuses, (answer.status_code, answer.text[:500])
    return answer.json()["detail"]


def test_every_hostile_image_is_inspected_or_refused(client, tmp_path):
    start, taken = time.monotonic(), 0
    sent = [case for case in cases() if not case.name.startswith(("flipped", "bomb-strip", "small", "text", "profile"))]
    for case in sent:
        answer = client.post("/inspect", content=case.make(), params={"name": case.name})
        taken += answer.status_code == 200
        if answer.status_code != 200:
            assert case.name in refused(answer, {413, 422}) or answer.status_code == 413
    assert 10 < taken < len(sent) and client.station.log.count(Filter()) == taken
    assert time.monotonic() - start < 60
    kept = [path for path in (tmp_path / "images").rglob("*") if path.is_file()]
    assert len(kept) <= taken and all(len(path.stem) == 64 for path in kept)


NAMES = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x.png",
    "a\r\nSet-Cookie: x=1\r\n\r\n<script>.png",
    "\x00\x1b[2J.png",
    "ä日本\u202e.png",
    "x" * 5000,
    '"; filename="y.png',
    "",
    "CON.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_and_nothing_else(client, good, tmp_path, name):
    answer = client.post("/inspect", files={"image": (name, good)})
    assert answer.status_code in (200, 400, 422), answer.text  # 400: a name of 5000 letters is no header of a form
    assert "set-cookie" not in answer.headers
    if answer.status_code == 200:
        told = answer.json()
        assert told["name"].isprintable() and len(told["name"]) <= 200
        assert client.get(f"/inspections/{told['id']}").json() == told
    assert {path.name for path in tmp_path.iterdir()} <= {"images", "log.db", "log.db-wal", "log.db-shm"}


EXTENDED = [
    "UTF-8''..%2F..%2F..%2Fetc%2Fpasswd",
    "UTF-8''%0D%0ASet-Cookie:%20x=1%0D%0A%0D%0A",
    "UTF-8''" + "%C3%A4" * 600,
    "UTF-8''%ED%A0%80.png",  # a lone surrogate
    "zip''x",
    "''''",
    "UTF-8''%",
    "UTF-8''%zz; filename*=UTF-8''b",
    "\xff''%41",
]


@pytest.mark.parametrize("value", EXTENDED)
def test_percent_encoded_names_are_text_and_nothing_else(client, good, tmp_path, value):
    head = f'--x\r\nContent-Disposition: form-data; name="image"; filename*={value}\r\n\r\n'.encode("latin-1")
    body, kind = head + good + b"\r\n--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}
    answer = client.post("/inspect", content=body, headers=kind)
    assert answer.status_code in (200, 400), answer.text  # 400: so long a header
    assert "set-cookie" not in answer.headers
    if answer.status_code == 200:
        told = answer.json()
        assert told["name"].isprintable() and 0 < len(told["name"]) <= 200
    assert {path.name for path in tmp_path.iterdir()} <= {"images", "log.db", "log.db-wal", "log.db-shm"}


def test_forms_of_thousands_of_parts(client, good):
    fields = {f"f{i}": "x" for i in range(2000)}
    assert "fields" in refused(client.post("/inspect", files={"image": good}, data=fields), {400})
    files = [("image", (f"{i}.png", b"x")) for i in range(1000)]
    assert "files" in refused(client.post("/inspect", files=files), {400})
    refused(client.post("/inspect", files=files * 4), {413})
    boundary = {"content-type": "multipart/form-data; boundary=x"}
    for body in (b"--x\r\n" * 50_000, b"--x\r\nContent-Disposition: form-data" + b"; a=b" * 50_000, b"\r\n" * 100_000):
        refused(client.post("/inspect", content=body, headers=boundary), {400, 413, 422})
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "x" * 20_000,
    ):
        refused(client.post("/inspect", content=b"--x--", headers={"content-type": kind}), {400, 422})
    assert client.station.working == 0


@pytest.mark.parametrize(
    "kind", ["application/json", "text/plain", "x", "", "image/png; charset=\xff", "multipart/mixed"]
)
def test_other_content_types_are_judged_by_content(client, good, kind):
    headers = {"content-type": kind.encode("latin-1")}
    assert client.post("/inspect", content=good, headers=headers).status_code == 200
    refused(client.post("/inspect", content=b'{"a": 1}', headers=headers), {422})


@pytest.mark.parametrize("length", ["-1", "1e9", "99999999999999999999", "0x10", "٣", "5, 6"])
def test_lengths_that_lie(client, good, length):
    answer = client.post("/inspect", content=good, headers={"content-length": length.encode()})
    assert answer.status_code in {200, *DOCUMENTED}, answer.text


PATHS = [
    "/inspections/..%2f..%2fetc%2fpasswd",
    "/inspections/0",
    "/inspections/-1",
    "/inspections/1e3",
    "/inspections/9223372036854775808",
    f"/inspections/{'9' * 5000}",
    "/inspections/1/images/..%2f..%2f..%2flog.db",
    "/inspections/1/images/" + "x" * 5000,
    "/inspections/1/images/%00",
    "/page/..%2f..%2fapp.py",
    "/page/%2e%2e/%2e%2e/app.py",
    "/page//etc/passwd",
    "/page/%00",
    "/page/" + "x" * 5000,
    "/page/%ff%fe",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/inspections?limit=1e9",
    "/inspections?limit=" + "9" * 5000,
    "/inspections?before=0",
    "/inspections?since=9999-12-31T23:59:59-23:59",
    "/inspections?since=0001-01-01T00:00:00%2b23:59",
    "/inspections?text=" + "%25" * 300,
    "/inspections?verdict=%00",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_absurd_paths_and_numbers(client, path):
    refused(client.get(path))


@pytest.mark.parametrize("text", ["%00", "%25_%25", "'; DROP TABLE inspections;--", "%ff", "\u202e", "_" * 200])
def test_absurd_searches_find_nothing_and_break_nothing(client, good, text):
    client.post("/inspect", content=good, params={"name": "one.png"})
    answer = client.get(f"/inspections?text={text}")
    assert answer.status_code == 200 and answer.json()["items"] == []
    assert client.station.log.count(Filter()) == 1


BODIES = [
    *(
        b"",
        b"null",
        b"[]",
        b'{"decision": "good"}',
        b'{"decision": NaN, "by": "A"}',
        b'{"by": 1e999, "decision": "good"}',
    ),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"decision": "good", "by": "' + b"x" * 10**6, b"9" * 100_000),
    *(
        b'{"decision": "good", "by": "\\ud800", "x": 1}',
        b'{"decision": "maybe", "by": "A"}',
        b'"' + b"\\u0000" * 1000 + b'"',
    ),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:20]))
def test_absurd_json(client, good, body):
    number = client.post("/inspect", content=good).json()["id"]
    for method, path in (("PUT", f"/inspections/{number}/review"), ("POST", "/detectors/parts/calibrate")):
        answer = client.request(method, path, content=body, headers={"content-type": "application/json"})
        refused(answer, {400, 409, 413, 422})
    assert client.get(f"/inspections/{number}").json()["decision"] is None


def test_a_lone_surrogate_in_a_name_is_kept_as_text(client, good):
    number = client.post("/inspect", content=good).json()["id"]
    body = b'{"decision": "good", "by": "\\ud800 \\u0000 A"}'
    answer = client.put(f"/inspections/{number}/review", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 422), answer.text
    assert client.get("/inspections").status_code == 200


def test_a_body_that_does_not_come_is_given_up(material, good, tmp_path):
    """A body that arrives too slowly is aborted after the time limit of a request."""
    log = Log(f"sqlite:///{tmp_path / 'log.db'}", None)
    station = Station(load_all([str(material.model)]), log, Limits(seconds=0.5, concurrency=1))
    sent = []

    async def receive():
        await asyncio.sleep(0.1)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/inspect", "query_string": b"", "http_version": "1.1"}
    start = time.monotonic()
    with TestClient(create_app(station), base_url="http://localhost:8000") as client:
        asyncio.run(client.app(scope | {"headers": [(b"host", b"localhost")]}, receive, send))
        assert sent[0]["status"] == 503 and b"0.5 seconds" in sent[1]["body"] and station.working == 0
    assert time.monotonic() - start < 20


def test_what_is_open_says_nothing_of_files(client):
    told = json.dumps(client.get("/openapi.json").json()) + client.get("/station").text + client.get("/metrics").text
    assert str(Path.home()) not in told and "/tmp" not in told
