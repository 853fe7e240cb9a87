"""The station over HTTP, with a real detector."""

import asyncio
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from PIL import Image
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient
from tests.conftest import SIDE, textured

import unflaw
from unflaw.errors import DetectorError
from unflaw.report.panels import heat_map
from unflaw.station import guard, service
from unflaw.station.app import create_app
from unflaw.station.detectors import load_all
from unflaw.station.log import Filter, Log, sha256
from unflaw.station.schemas import Inspection
from unflaw.station.service import Limits, Station

pytestmark = pytest.mark.slow

TOKEN = "a token of sixteen letters or more".replace(" ", "-")


@contextmanager
def running(folder: Path, models: list[Path], keep: bool = True, token: str | None = None, **options):
    """A client of a station with its log in `folder`; `client.station` is what it serves."""
    limits = Limits(**{name: options.pop(name) for name in list(options) if name in Limits.__dataclass_fields__})
    log = Log(f"sqlite:///{folder / 'log.db'}", folder / "images" if keep else None)
    station = Station(load_all([str(model) for model in models]), log, limits)
    app = create_app(station, token=token, **options)
    with TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False) as client:
        if token:
            client.headers["authorization"] = f"Bearer {token}"
        client.station = station
        yield client


@pytest.fixture
def client(saved, tmp_path):
    with running(tmp_path, [saved]) as client:
        yield client


@pytest.fixture(scope="module")
def bad(parts) -> bytes:
    return (parts / "test/square/000.png").read_bytes()


def new_good(seed: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(textured(np.random.default_rng(1000 + seed))).save(data, "PNG")
    return data.getvalue()


def complaint(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["detail"]
    return answer.json()["detail"]


# Inspecting


def test_the_answer_is_what_the_detector_says_and_what_the_log_holds(client, saved, bad):
    answer = client.post("/inspect", content=bad, params={"name": "line 3/ä.png"})
    assert answer.status_code == 200
    told, expected = answer.json(), unflaw.load(str(saved)).inspect(bad)
    assert told["score"] == pytest.approx(expected.score, rel=1e-5)
    assert (told["verdict"], told["p_value"]) == (expected.verdict, expected.p_value)
    assert told["regions"] == [region.to_json(contour=True) for region in expected.regions] and told["regions"]
    assert told["digest"] == sha256(bad) and told["detector_digest"] == sha256(saved.read_bytes())
    assert (told["name"], told["width"], told["height"], told["size"]) == ("line 3/ä.png", SIDE, SIDE, len(bad))
    assert (told["detector"], told["category"], told["source"]) == ("parts", "", None)
    logged = client.station.log.get(told["id"])
    assert Inspection.model_validate(logged).model_dump(mode="json") == told
    assert client.get(f"/inspections/{told['id']}").json() == told
    assert client.station.log.image(told["digest"]).read_bytes() == bad


def test_a_form_does_as_well_as_raw_bytes(client, bad):
    raw = client.post("/inspect", content=bad, headers={"content-type": "image/png"}).json()
    form = client.post("/inspect", files={"image": ("new/0001.png", bad)}).json()
    named = client.post("/inspect", files={"image": ("x.png", bad)}, data={"name": "mine", "detector": "parts"}).json()
    assert [raw["name"], form["name"], named["name"]] == ["image", "new/0001.png", "mine"]
    assert raw["score"] == form["score"] == named["score"]


@pytest.mark.parametrize("kind", ["Multipart/Form-Data; Boundary=x", "MULTIPART/FORM-DATA ;BOUNDARY=x"])
def test_types_and_names_of_parameters_have_any_case(client, bad, kind):
    body = b'--x\r\nCONTENT-disposition: Form-Data; Name="image"; FileName="a.png"\r\n\r\n' + bad + b"\r\n--x--\r\n"
    told = client.post("/inspect", content=body, headers={"content-type": kind}).json()
    assert (told["name"], told["digest"]) == ("a.png", sha256(bad))
    assert client.post("/inspect", content=bad, headers={"content-type": "IMAGE/PNG"}).json()["digest"] == sha256(bad)
    decided = client.put(
        f"/inspections/{told['id']}/review",
        content='{"decision": "good", "by": "Ada"}',
        headers={"content-type": "Application/JSON"},
    )
    assert decided.status_code == 200 and decided.json()["decision"] == "good"


@pytest.mark.parametrize(
    "given, name",
    [
        ("filename*=UTF-8''%C3%A4%20%E2%82%AC.png", "ä €.png"),
        ("filename*=utf-8'de'%c3%a4.png", "ä.png"),
        ("FileName* = iso-8859-1'en'%E4.png", "ä.png"),
        ("""filename="a.png"; filename*=UTF-8''%C3%A4.png""", "ä.png"),
        ("""filename*=UTF-8''%C3%A4.png; filename="a.png\"""", "ä.png"),
        ('filename="ä.png"', "ä.png"),
        ("""filename="a.png"; filename*=UTF-8''%E4.png""", "a.png"),  # what cannot be decoded does not count
        ("""filename="a.png"; filename*=punycode''%C3%A4.png""", "a.png"),
        ('filename="a.png"; filename*=%C3%A4.png', "a.png"),
        ("filename*=UTF-8''%FF", "image"),
        ("filename*=", "image"),
        ("""filename="a; filename*=UTF-8''b.png\"""", "a; filename*=UTF-8''b.png"),  # is part of the name
        ("filename*=UTF-8''%0D%0Aa%00.png", "\ufffd\ufffda\ufffd.png"),
    ],
)
def test_names_of_files_may_be_percent_encoded(client, bad, given, name):
    head = f'--x\r\nContent-Disposition: form-data; name="image"; {given}\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + bad + b"\r\n--x--\r\n"
    answer = client.post("/inspect", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["name"], answer.json()["digest"]) == (name, sha256(bad))


def test_several_detectors_need_a_name(saved, bad, tmp_path):
    with running(tmp_path, [saved, f"other={saved}"]) as client:
        assert "parts, other" in complaint(client.post("/inspect", content=bad), 404)
        assert "no detector nut" in complaint(client.post("/inspect?detector=nut", content=bad), 404)
        assert client.post("/inspect?detector=other", content=bad).json()["detector"] == "other"
        form = client.post("/inspect?detector=parts", files={"image": bad}, data={"detector": "other"})
        assert form.json()["detector"] == "other"
        assert [d["name"] for d in client.get("/station").json()["detectors"]] == ["parts", "other"]
        assert [e["detector"] for e in client.get("/inspections?detector=other").json()["items"]] == ["other"] * 2


def test_two_detectors_of_one_name_are_refused(saved):
    with pytest.raises(DetectorError, match="parts"):
        load_all([str(saved), str(saved)])


def test_categories(parts, weights, tiny, bad, tmp_path):
    other = Path(shutil.copytree(parts, tmp_path / "other"))
    for path in (other / "train/good").iterdir():  # a copy of an image in another category is refused
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    model = tmp_path / "both.safetensors"
    unflaw.Detector(config=tiny("nearest_neighbor"), weights=weights).fit({"left": parts, "right": other}).save(model)
    with running(tmp_path, [model]) as client:
        assert "left, right" in complaint(client.post("/inspect", content=bad), 404)
        assert "nut" in complaint(client.post("/inspect?category=nut", content=bad), 404)
        images = [new_good(i) for i in range(4)] * 4
        sides = ["left", "right"] * 8

        def ask(pair):
            return client.post(f"/inspect?category={pair[1]}", content=pair[0]).json()

        with ThreadPoolExecutor(4) as pool:  # categories at once do not disturb each other
            told = list(pool.map(ask, zip(images, sides, strict=True)))
        detector = unflaw.load(str(model))
        for image, side, answer in zip(images, sides, told, strict=True):
            assert answer["category"] == side
            assert answer["score"] == pytest.approx(detector.inspect(image, category=side).score, rel=1e-4)
        assert set(client.get("/station").json()["detectors"][0]["categories"]) == {"left", "right"}
        assert len(client.get("/inspections?category=left").json()["items"]) == 8


# Images of an inspection


def test_images_can_be_had_from_memory_and_later_from_what_is_kept(client, bad, saved):
    number = client.post("/inspect", content=bad).json()["id"]
    names = client.get(f"/inspections/{number}/images").json()["images"]
    assert names[:3] == ["image", "heat", "overlay"] and {"uncertainty", "restored"} <= set(names)
    contours = client.get(f"/inspections/{number}/images").json()["contours"]
    for contour, region in zip(contours, unflaw.load(str(saved)).inspect(bad).regions, strict=True):
        assert [tuple(corner) for corner in contour] == list(region.contour)
    fetched = {name: client.get(f"/inspections/{number}/images/{name}").content for name in names}
    client.station._recent.clear()
    for name in names:
        answer = client.get(f"/inspections/{number}/images/{name}")
        assert answer.headers["content-type"] == "image/png" and answer.content == fetched[name]
    assert client.get("/inspections").json()["items"][0]["id"] == number  # seen again, but not logged again
    image = np.asarray(Image.open(io.BytesIO(fetched["image"])))
    assert (image == np.asarray(Image.open(io.BytesIO(bad)).convert("RGB"))).all()
    result = unflaw.load(str(saved)).inspect(bad)
    heat = np.asarray(Image.open(io.BytesIO(fetched["heat"]))).astype(int)
    warm = heat[..., 0] > heat[..., 2]
    assert (warm == (result.map > unflaw.load(str(saved)).select().pixel_threshold)).mean() > 0.99
    veil = np.asarray(Image.open(io.BytesIO(fetched["overlay"])))
    assert (veil[..., :3] == heat).all() and veil[..., 3].max() <= 192 and not veil[result.map < 0, 3].any()
    assert "no image nose" in complaint(client.get(f"/inspections/{number}/images/nose"), 404)


@pytest.mark.parametrize("masked", [False, True])
def test_maps_of_a_region_of_interest_lie_where_it_is(saved, parts, weights, tiny, bad, tmp_path, masked):
    """The page lays them over the whole image."""
    marked = np.zeros((64, 64), bool)
    marked[16:48, 32:64] = True
    marked[20:28, 40:48] = not masked
    Image.fromarray(marked).save(tmp_path / "roi.png")
    roi = str(tmp_path / "roi.png") if masked else (0.5, 0.25, 1.0, 0.75)
    config = tiny("nearest_neighbor", **{"preparation.roi": roi, "training.display_steps": 3})
    detector = unflaw.Detector(config=config, weights=weights).fit(parts)
    detector.save(tmp_path / "roi.safetensors")
    large = Image.open(io.BytesIO(bad)).resize((2000, 1000))
    file = io.BytesIO()
    large.save(file, "PNG")
    with running(tmp_path, [tmp_path / "roi.safetensors"]) as client:
        for data, size in ((bad, (64, 64)), (file.getvalue(), (1600, 800))):
            number = client.post("/inspect", content=data).json()["id"]
            result, scale = detector.inspect(data), detector.select().scale
            for name in client.get(f"/inspections/{number}/images").json()["images"]:
                image = Image.open(io.BytesIO(client.get(f"/inspections/{number}/images/{name}").content))
                assert image.size == size
                if name in ("image", "overlay"):
                    continue
                shown = np.asarray(image.resize((64, 64), Image.Resampling.NEAREST))
                assert ((shown[..., 3] > 127) == marked).mean() > 0.99
                if name == "heat":
                    expected = Image.fromarray(heat_map(result.map, scale)).resize((32, 32))
                    seen = shown[16:48, 32:64, :3][marked[16:48, 32:64]].astype(int)
                    assert np.abs(seen - np.asarray(expected)[marked[16:48, 32:64]]).mean() < 4


def test_without_kept_images_only_what_memory_holds_is_shown(saved, bad, tmp_path):
    with running(tmp_path, [saved], keep=False) as client:
        number = client.post("/inspect", content=bad).json()["id"]
        assert client.get(f"/inspections/{number}/images/heat").status_code == 200
        client.station._recent.clear()
        assert "not kept" in complaint(client.get(f"/inspections/{number}/images/heat"), 404)
        assert not (tmp_path / "images").exists()
        assert "--keep" in complaint(client.post("/detectors/parts/calibrate", json={}), 409)


def test_memory_of_results_is_bounded(client, monkeypatch):
    monkeypatch.setattr(service, "RECENT", 400_000)
    numbers = [client.post("/inspect", content=new_good(i)).json()["id"] for i in range(12)]
    held = list(client.station._recent)
    assert 1 <= len(held) < 12 and held == numbers[-len(held) :]
    assert client.station._recent_bytes == sum(service._bytes(*v) for v in client.station._recent.values()) <= 400_000


# Review and calibration


def test_decisions_make_a_new_threshold_and_a_new_file(saved, bad, tmp_path):
    model = shutil.copy(saved, tmp_path / "parts.safetensors")
    with running(tmp_path, [model], sample=1.0) as client:
        asked = {"append": False}
        assert "decide some" in complaint(client.post("/detectors/parts/calibrate", json=asked), 409)
        told = [client.post("/inspect", content=new_good(i)).json() for i in range(9)]
        told.append(client.post("/inspect", content=bad).json())
        assert client.get("/station").json()["waiting"] == 10
        for answer in told[:-1]:
            client.put(f"/inspections/{answer['id']}/review", json={"decision": "good", "by": "Ada"})
        decided = client.put(f"/inspections/{told[-1]['id']}/review", json={"decision": "defect", "by": "Ada"}).json()
        assert (decided["decision"], decided["decided_by"]) == ("defect", "Ada") and decided["decided_at"]
        state = client.get("/station").json()
        category = state["detectors"][0]["categories"][""]
        assert state["waiting"] == 0 and category["decided_good"] == 9 == category["decided_good_sampled"]
        assert category["decided_defect"] == 1

        done = client.post("/detectors/parts/calibrate", json=asked).json()
        assert (done["good"], done["defects"], done["seen"], done["lost"]) == (9, 0, 0, 0)
        assert done["after"]["threshold"] == pytest.approx(max(a["score"] for a in told[:-1]), rel=1e-4)
        fresh = unflaw.load(str(model))
        assert fresh.select().threshold == done["after"]["threshold"]
        assert fresh.record_["calibrations"][-1]["good"] == 9
        again = client.post("/inspect", content=new_good(99)).json()
        assert again["threshold"] == done["after"]["threshold"]
        assert (
            again["detector_digest"] == done["digest"] == sha256(Path(model).read_bytes()) != told[0]["detector_digest"]
        )

        assert "9 that count already" in complaint(client.post("/detectors/parts/calibrate", json={}), 409)
        client.put(f"/inspections/{again['id']}/review", json={"decision": "good", "by": "Ada"})
        kept = client.post("/detectors/parts/calibrate", json={"append": True}).json()
        assert (kept["good"], kept["counted"]) == (1, 9) and "10 good images" in kept["after"]["described"]
        assert "10 that count already" in complaint(client.post("/detectors/parts/calibrate", json={}), 409)
        missed = client.post("/detectors/parts/calibrate", json={"append": False, "miss_rate": 0.5}).json()
        assert missed["defects"] == 1 and "miss rate" in missed["after"]["described"]
        assert "certify" in complaint(
            client.post("/detectors/parts/calibrate", json={"append": False, "miss_rate": 0.01}), 409
        )


def test_only_the_sampled_do_not_bend_the_threshold(saved, tmp_path):
    model = shutil.copy(saved, tmp_path / "parts.safetensors")
    with running(tmp_path, [model]) as client:
        told = [client.post("/inspect", content=new_good(i)).json() for i in range(4)]
        with client.station.log._session.begin() as session:
            session.get(service.Entry, told[0]["id"]).sampled = True
        for answer in told:
            client.put(f"/inspections/{answer['id']}/review", json={"decision": "good", "by": "Ada"})
        done = client.post("/detectors/parts/calibrate", json={"append": False, "sampled": True}).json()
        assert done["good"] == 1 and done["after"]["threshold"] == pytest.approx(told[0]["score"], rel=1e-4)
        again = client.post("/detectors/parts/calibrate", json={"sampled": True})
        assert "1 that counts already and 0 not kept" in complaint(again, 409)


def test_what_it_has_learned_from_does_not_calibrate_it(saved, parts, tmp_path):
    model = shutil.copy(saved, tmp_path / "parts.safetensors")
    with running(tmp_path, [model]) as client:
        images = [(parts / "train/good/000.png").read_bytes(), new_good(1), new_good(2)]
        numbers = [client.post("/inspect", content=image).json()["id"] for image in images]
        for number in numbers:
            client.put(f"/inspections/{number}/review", json={"decision": "good", "by": "Ada"})
        client.station.log.image(sha256(images[2])).unlink()
        done = client.post("/detectors/parts/calibrate", json={}).json()
        assert (done["good"], done["seen"], done["lost"]) == (1, 1, 1)


def test_the_last_decision_on_an_image_counts(saved, tmp_path):
    model = shutil.copy(saved, tmp_path / "parts.safetensors")
    with running(tmp_path, [model]) as client:
        numbers = [client.post("/inspect", content=image).json()["id"] for image in (new_good(1), *[new_good(2)] * 2)]
        for number, decision in zip(numbers, ["good", "defect", "good"], strict=True):
            client.put(f"/inspections/{number}/review", json={"decision": decision, "by": "Ada"})
        assert client.post("/detectors/parts/calibrate", json={"append": False}).json()["good"] == 2
        client.put(f"/inspections/{numbers[1]}/review", json={"decision": "defect", "by": "Ada"})
        assert client.post("/detectors/parts/calibrate", json={"append": False}).json()["good"] == 1


def test_a_file_that_changed_or_cannot_be_written_is_not_replaced(saved, tmp_path, monkeypatch):
    model = Path(shutil.copy(saved, tmp_path / "parts.safetensors"))
    with running(tmp_path, [model]) as client:
        number = client.post("/inspect", content=new_good(1)).json()["id"]
        client.put(f"/inspections/{number}/review", json={"decision": "good", "by": "Ada"})
        before = client.get("/station").json()["detectors"][0]

        def fail(*_, **__):
            raise PermissionError(13, "not allowed", str(model))

        with monkeypatch.context() as patched:
            patched.setattr("unflaw.detector.Detector.save", fail)
            assert "not allowed" in complaint(client.post("/detectors/parts/calibrate", json={}), 409)
        after = client.get("/station").json()["detectors"][0]
        assert (after["digest"], after["categories"][""]["threshold"]) == (
            before["digest"],
            before["categories"][""]["threshold"],
        )
        unflaw.load(str(model)).fit  # noqa: B018 - it is whole
        model.write_bytes(model.read_bytes() + b" ")
        assert "has changed" in complaint(client.post("/detectors/parts/calibrate", json={}), 409)


def test_an_exported_detector_is_served_but_not_calibrated(saved, exported, bad, tmp_path):
    with running(tmp_path, [saved, f"exported={exported}"]) as client:
        trained, graph = (client.post(f"/inspect?detector={n}", content=bad).json() for n in ("parts", "exported"))
        assert graph["verdict"] == trained["verdict"] and graph["score"] == pytest.approx(trained["score"], rel=1e-3)
        images = client.get(f"/inspections/{graph['id']}/images").json()["images"]
        assert {"image", "heat", "uncertainty"} <= set(images)
        told = {detector["name"]: detector["fixed"] for detector in client.get("/station").json()["detectors"]}
        assert told["parts"] is None and "exported" in told["exported"]
        assert "exported" in complaint(client.post("/detectors/exported/calibrate", json={}), 409)


# History


def test_history_goes_page_by_page(client):
    numbers = [client.post("/inspect", content=new_good(i), params={"name": f"{i}.png"}).json()["id"] for i in range(5)]
    first = client.get("/inspections?limit=3").json()
    second = client.get(f"/inspections?limit=3&before={first['next']}").json()
    assert [e["id"] for e in first["items"] + second["items"]] == numbers[::-1] and second["next"] is None
    assert [e["name"] for e in client.get("/inspections?text=3.p").json()["items"]] == ["3.png"]
    assert client.get("/inspections?since=2100-01-01T00:00:00Z").json() == {"items": [], "next": None}
    assert "until" in complaint(client.get("/inspections?until=yesterday"), 422)
    assert "time zone" in complaint(client.get("/inspections?until=2026-01-01T00:00:00"), 422).replace(
        "timezone", "time zone"
    )
    assert "limit" in complaint(client.get("/inspections?limit=0"), 422)
    assert "no inspection 99" in complaint(
        client.put("/inspections/99/review", json={"decision": "good", "by": "A"}), 404
    )


# Limits


@pytest.mark.parametrize("data, named", [(b"", "empty"), (b"no image", "not an image"), (b"\x89PNG cut", "damaged")])
def test_what_is_no_image_is_named_and_not_logged(client, data, named):
    assert named in complaint(client.post("/inspect", content=data, params={"name": "n.png"}), 422)
    assert "n.png" in complaint(client.post("/inspect", files={"image": ("n.png", data)}), 422)
    assert client.get("/inspections").json()["items"] == []


def test_forms_without_an_image_or_in_pieces(client, bad):
    assert "image" in complaint(client.post("/inspect", files={"photo": bad}), 422)
    assert "detector" in complaint(client.post("/inspect", files={"image": bad}, data={"detector": "x" * 201}), 422)
    broken = client.post("/inspect", content=b"--x", headers={"content-type": "multipart/form-data"})
    assert complaint(broken, 400)


def test_images_over_the_limits_are_refused(saved, bad, tmp_path):
    with running(tmp_path, [saved], bytes=len(bad) - 1, pixels=SIDE * SIDE) as client:
        assert f"{len(bad) - 1:,}" in complaint(client.post("/inspect", content=bad), 413)
        assert complaint(client.post("/inspect", files={"image": bad}), 413)
        assert complaint(client.post("/inspect", content=bad * 100), 413)
        assert complaint(client.post("/inspect", content=iter([bad] * 100)), 413)  # of unknown length
        small, large = io.BytesIO(), io.BytesIO()
        Image.new("RGB", (SIDE, SIDE)).save(small, "PNG"), Image.new("RGB", (SIDE, SIDE + 1)).save(large, "PNG")
        assert client.post("/inspect", content=small.getvalue()).status_code == 200
        assert "limit of 4,096" in complaint(client.post("/inspect", content=large.getvalue()), 422)


@contextmanager
def held(client, monkeypatch):
    """Inspections begin, and go on when `held` ends."""
    served = next(iter(client.station.detectors.values()))
    inspect, gate = served.inspect, threading.Event()

    def slow(*args, **named):
        gate.wait(30)
        return inspect(*args, **named)

    monkeypatch.setattr(served, "inspect", slow)
    try:
        yield gate
    finally:
        gate.set()


def test_a_busy_station_says_when_to_come_back(saved, bad, tmp_path, monkeypatch):
    with (
        running(tmp_path, [saved], concurrency=3) as client,
        ThreadPoolExecutor(8) as pool,
        held(client, monkeypatch) as gate,
    ):
        first = [pool.submit(client.post, "/inspect", content=bad) for _ in range(3)]
        while client.station.working < 3:
            time.sleep(0.01)
        refused = client.post("/inspect", content=bad)
        assert "busy" in complaint(refused, 429) and int(refused.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200 and client.get("/inspections").status_code == 200
        assert "unflaw_working 3.0" in client.get("/metrics").text
        gate.set()
        assert [answer.result().status_code for answer in first] == [200] * 3
        assert client.post("/inspect", content=bad).status_code == 200 and client.station.working == 0
        assert client.station.log.count(Filter()) == 4


def test_what_takes_too_long_is_given_up_but_counts_until_it_ends(saved, bad, tmp_path, monkeypatch):
    with running(tmp_path, [saved], seconds=0.2, concurrency=1) as client:
        with held(client, monkeypatch):
            assert "0.2 seconds" in complaint(client.post("/inspect", content=bad), 503)
            assert complaint(client.post("/inspect", content=bad), 429)  # its thread still computes
        for _ in range(200):
            if client.station.working == 0:
                break
            time.sleep(0.01)
        assert client.station.working == 0 and client.station.log.count(Filter()) == 0
        monkeypatch.undo()
        answers = (client.post("/inspect", content=bad).status_code for _ in range(50))
        assert 200 in answers  # soon: on a busy machine one may take longer than the limit


def test_the_rest_of_a_refused_request_is_read():
    """Else the connection would be reset under a client that still sends, and it would never see why."""
    app = guard.Guard(
        guard._problem(429, "busy"),
        metrics=SimpleNamespace(answers=SimpleNamespace(labels=lambda *_: SimpleNamespace(inc=lambda: None))),
        max_bytes=100,
        token=None,
    )
    parts = [{"type": "http.request", "body": b"x" * 10, "more_body": i < 4} for i in range(5)]
    sent = []

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append((len(parts), message["type"]))

    scope = {"type": "http", "method": "POST", "path": "/inspect", "headers": [(b"host", b"localhost")]}
    asyncio.run(app(scope, receive, send))
    assert sent[0] == (0, "http.response.start")


def test_a_client_that_goes_away_in_the_middle_leaves_no_trace(client, bad):
    messages = [{"type": "http.request", "body": bad[:100], "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/inspect", "query_string": b"", "http_version": "1.1"}
    asyncio.run(client.app(scope | {"headers": [(b"host", b"localhost")]}, receive, send))
    assert client.station.working == 0 and client.station.log.count(Filter()) == 0
    assert 'status="500"' not in client.get("/metrics").text


def test_an_inspection_that_cannot_be_logged_is_not_acknowledged(client, bad, monkeypatch):
    def fail(*_):
        raise OperationalError("INSERT", {}, Exception("disk is full"))

    with monkeypatch.context() as patched:
        patched.setattr(Log, "add", fail)
        assert "disk is full" in complaint(client.post("/inspect", content=bad), 503)
    assert client.station.working == 0 and client.post("/inspect", content=bad).status_code == 200


def test_a_fault_of_the_station_is_said_without_its_insides(client, bad, monkeypatch):
    def fail(*_, **__):
        raise KeyError("secret")

    monkeypatch.setattr(next(iter(client.station.detectors.values())), "inspect", fail)
    assert "secret" not in complaint(client.post("/inspect", content=bad), 500)
    assert client.station.working == 0


# Who may ask


def test_with_a_token_nothing_but_page_and_health_is_open(saved, bad, tmp_path):
    with running(tmp_path, [saved], token=TOKEN) as client:
        assert client.post("/inspect", content=bad).status_code == 200
        for wrong in ("", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer ü", "Bearer"):
            client.headers = {"authorization": wrong.encode()}
            for path in (
                "/inspections",
                "/station",
                "/metrics",
                "/inspections/1/images/heat",
                "/openapi.json",
                "/nope",
            ):
                refused = client.get(path)
                assert "token" in complaint(refused, 401) and refused.headers["www-authenticate"] == "Bearer"
            assert complaint(client.post("/inspect", content=bad), 401)
        for path in ("/", "/health", "/page/page.js", "/page/page.css"):
            assert client.get(path).status_code == 200
        assert client.station.log.count(Filter()) == 1


def test_without_a_token_other_sites_cannot_use_the_browser(client, bad):
    assert complaint(client.post("/inspect", content=bad, headers={"origin": "http://evil.example"}), 403)
    assert complaint(client.post("/inspect", content=bad, headers={"origin": "null"}), 403)
    assert complaint(client.post("/inspect", content=bad, headers={"origin": "http://localhost:8001"}), 403)
    assert complaint(client.get("/inspections", headers={"host": "evil.example"}), 403)  # DNS rebinding
    assert client.post("/inspect", content=bad, headers={"origin": "http://localhost:8000"}).status_code == 200
    assert complaint(client.get("/inspections", headers={"host": "[::1"}), 403)
    assert complaint(client.post("/inspect", content=bad, headers={"origin": "http://["}), 403)
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost"):
        assert client.get("/inspections", headers={"host": host}).status_code == 200


@contextmanager
def wired(client):
    """`ask(request)` sends bytes to the station over a socket; the answer's head and body."""
    server = uvicorn.Server(uvicorn.Config(client.app, port=0, log_level="error", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()

    def ask(request: bytes) -> tuple[str, bytes]:
        with socket.create_connection(listening.getsockname(), timeout=30) as connection:
            connection.sendall(request)
            head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        return head.decode().lower(), body

    try:
        yield ask
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def test_head_is_answered_as_get_without_a_body(client, bad):
    number = client.post("/inspect", content=bad).json()["id"]
    documented = client.get("/openapi.json").json()["paths"]
    readable = [path for path, operations in documented.items() if "get" in operations]
    assert len(readable) > 6
    places = [path.format(id=number, image="heat") for path in readable]
    places += ["/", "/page/page.js", "/openapi.json", "/nope", "/inspections/99", "/inspect", "/inspections/x"]
    with wired(client) as ask:
        for path in places:
            line = f"{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            heads, bodies = zip(*(ask(f"{method} {line}".encode()) for method in ("GET", "HEAD")), strict=True)
            first, second = (set(head.splitlines()) for head in heads)
            changing = ("date: ", "content-length: ") if path == "/metrics" else ("date: ",)
            assert all(line.startswith(changing) for line in first ^ second), path
            assert bodies[0] and not bodies[1] and "content-length: " in heads[1], path
    assert client.head("/health").status_code == 200 and client.head("/inspect").headers["allow"] == "POST"
    assert client.post("/health").headers["allow"] == "GET, HEAD"
    assert 'unflaw_answers_total{method="HEAD",path="/health",status="200"} 2.0' in client.get("/metrics").text


def test_head_needs_the_token_that_get_needs(saved, tmp_path):
    with running(tmp_path, [saved], token=TOKEN) as client:
        assert client.head("/inspections").status_code == 200
        del client.headers["authorization"]
        assert client.head("/inspections").status_code == client.head("/metrics").status_code == 401
        assert client.head("/health").status_code == client.head("/").status_code == 200


def test_a_request_without_a_host_line_gets_what_is_open_and_no_data(saved, bad, tmp_path):
    """Old monitors ask so, by HTTP/1.0; but a proxy that drops the line could pass on what a browser sends."""
    post = f"POST /inspect HTTP/1.0\r\nContent-Length: {len(bad)}\r\n".encode()
    private = ("/inspections", "/station", "/metrics", "/openapi.json", "/inspections/1/images/heat", "/nope")
    private += ("//health", "/health/../inspections", "http://evil.example/health")
    with running(tmp_path, [saved]) as client, wired(client) as ask:
        for line in ("GET /health", "HEAD /health", "GET /", "HEAD /", "GET /page/page.js"):
            assert ask(f"{line} HTTP/1.0\r\n\r\n".encode())[0].startswith("http/1.1 200")
            for host in ("evil.example", "", "localhost.evil.example"):  # as strict as ever where the line is there
                assert ask(f"{line} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())[0].startswith("http/1.1 403")
            assert ask(f"{line} HTTP/1.1\r\n\r\n".encode())[0].startswith("http/1.1 400")  # there it must be
        for path in private:
            head, body = ask(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert head.startswith("http/1.1 403") and b"Host: localhost" in body, path
        assert ask(post + b"\r\n" + bad)[0].startswith("http/1.1 403")
        assert client.station.log.count(Filter()) == 0
    with running(tmp_path, [saved], token=TOKEN) as client, wired(client) as ask:
        assert ask(b"GET /health HTTP/1.0\r\n\r\n")[0].startswith("http/1.1 200")
        for path in private:
            assert ask(f"GET {path} HTTP/1.0\r\n\r\n".encode())[0].startswith("http/1.1 401")
        assert ask(post + b"\r\n" + bad)[0].startswith("http/1.1 401")
        assert ask(post + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode() + bad)[0].startswith("http/1.1 200")


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "left"])
def test_a_prefix_may_be_removed_by_the_proxy_or_left(saved, bad, tmp_path, removed):
    at = "" if removed else "/plant/line3"
    with running(tmp_path, [saved], token=TOKEN, root_path="/plant/line3/") as client:
        number = client.post(f"{at}/inspect", content=bad).json()["id"]
        for path in ("/", "/health", "/station", "/page/page.js", f"/inspections/{number}/images/heat"):
            assert client.get(at + path).status_code == 200
        assert client.get(f"{at}/page/page.js").headers["cache-control"] == "no-cache"
        assert client.get(f"{at}/openapi.json").json()["servers"] == [{"url": "/plant/line3"}]
        client.get(f"{at}/inspections/{number}")
        counted = 'unflaw_answers_total{method="GET",path="/inspections/{id}",status="200"} 1.0'
        assert counted in client.get(f"{at}/metrics").text
        moved = client.get("/plant/line3", follow_redirects=False)
        assert moved.headers["location"] == "http://localhost:8000/plant/line3/"
        del client.headers["authorization"]
        for path in ("/", "/health", "/page/page.js"):
            assert client.get(at + path).status_code == 200
        for path in ("/station", "/inspections", "/metrics", "/page"):
            assert complaint(client.get(at + path), 401)
        assert complaint(client.get("/plant/line3/plant/line3/health"), 401)  # a prefix is taken off once


@pytest.mark.parametrize(
    "root_path, named",
    [
        ("line3", "such as /line3"),
        ("/line 3", "such as /line3"),
        ("//evil.example", "such as /line3"),
        ("/a/../b", "such as /line3"),
        ("/ä", "such as /line3"),
        ("/page", "/page of its own"),
        ("/station", "/station of its own"),
        ("/inspections/line3/", "/inspections of its own"),
        ("/openapi.json", "of its own"),
    ],
)
def test_a_prefix_that_cannot_be_told_apart_is_refused(client, root_path, named):
    with pytest.raises(ValueError, match=named):
        create_app(client.station, root_path=root_path)


def test_cors_is_off_unless_asked_for(saved, tmp_path):
    ask = {"origin": "https://line.example", "access-control-request-method": "POST"}
    with running(tmp_path, [saved], token=TOKEN) as client:
        assert "access-control-allow-origin" not in client.options("/inspect", headers=ask).headers
    with running(tmp_path, [saved], token=TOKEN, origins=["https://line.example"]) as client:
        del client.headers["authorization"]
        allowed = client.options("/inspect", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://line.example"
        other = client.options("/inspect", headers=ask | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_every_answer_has_strict_headers_and_the_page_names_no_other_host(client):
    for path in ("/", "/page/page.js", "/health", "/inspections", "/nope"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    page = client.get("/").text + client.get("/page/page.js").text + client.get("/page/page.css").text
    assert set(re.findall(r"https?://[^\s\"')]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert client.get("/page/../app.py").status_code == 404 and client.get("/page/%2e%2e/app.py").status_code == 404


# What machines read


def test_metrics_count(client, bad):
    client.post("/inspect", content=bad)
    client.post("/inspect", content=b"no image")
    text = client.get("/metrics").text
    assert 'unflaw_inspections_total{category="",detector="parts",verdict="defect"} 1.0' in text
    assert 'unflaw_answers_total{method="POST",path="/inspect",status="422"} 1.0' in text
    assert 'unflaw_p_value_count{category="",detector="parts"} 1.0' in text
    threshold = client.get("/station").json()["detectors"][0]["categories"][""]["threshold"]
    assert f'unflaw_threshold{{category="",detector="parts"}} {threshold!r}' in text


def test_health_says_when_the_log_does_not_answer(client, monkeypatch):
    assert client.get("/health").json() == {"status": "ok", "version": unflaw.__version__}

    def fail(*_):
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(Log, "ping", fail)
    assert "gone" in complaint(client.get("/health"), 503)


def test_retention_runs_by_itself(saved, bad, tmp_path):
    with running(tmp_path, [saved], image_bytes=0, every=0.05) as client:
        digest = client.post("/inspect", content=bad).json()["digest"]
        for _ in range(100):
            if client.station.log.image(digest) is None:
                break
            time.sleep(0.02)
        assert client.station.log.image(digest) is None and client.station.log.count(Filter()) == 1


def test_examples_in_the_openapi_document_are_valid(client):
    document = client.get("/openapi.json").json()
    models = {name: schema for name, schema in document["components"]["schemas"].items() if "examples" in schema}
    assert {"Inspection", "History", "Problem", "Review", "Recalibration", "DetectorState"} <= set(models)
    from unflaw.station import schemas

    for name, schema in models.items():
        for example in schema["examples"]:
            getattr(schemas, name).model_validate(json.loads(json.dumps(example)))


def test_the_station_holds_the_openapi_document(start_station, saved, tmp_path):
    """Hundreds of requests by the document, right ones and wrong ones, against a real server."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.is_file():
        pytest.skip("needs schemathesis")
    server = start_station(shutil.copy(saved, tmp_path / "parts.safetensors"), token=TOKEN)
    server.ask("/inspect", new_good(0))
    config = tmp_path / "schemathesis.toml"
    # which bytes are an image, no schema can say: there, and only there, what it allows may be refused
    accepted = 'positive_data_acceptance = {expected-statuses = ["2xx", 401, 404, 422, 429]}'
    config.write_text(f'[[operations]]\ninclude-name = "POST /inspect"\n[operations.checks]\n{accepted}\n')
    command = [program, "--config-file", config, "run", f"{server.url}/openapi.json", "--checks", "all"]
    command += ["--max-examples", "8", "--seed", "1", "-H", f"Authorization: Bearer {TOKEN}", "--no-color"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
