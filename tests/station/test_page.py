"""The page of the station in a real Chromium, on a real detector."""

import io
import os
import re
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from tests.conftest import textured

import unflaw
from unflaw.station import service
from unflaw.station.app import create_app
from unflaw.station.detectors import load_all
from unflaw.station.log import Filter, Log
from unflaw.station.service import Busy, Limits, Station

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
CAMERA = "--no-first-run --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
expect.set_options(timeout=15_000)  # other tests may keep the processors busy
TOKEN = "sixteen-letters-or-more"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS.split(), *CAMERA.split()])
        yield launched
        launched.close()


class Site:
    """A station that can be stopped and started again at the same address."""

    def __init__(
        self,
        folder: Path,
        models: list[object],
        token: str | None = None,
        keep: bool = True,
        root_path: str = "",
        **limits,
    ):
        self._folder, self._models, self._token, self._keep, self._limits = folder, models, token, keep, limits
        self._root_path = root_path
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        log = Log(f"sqlite:///{self._folder / 'log.db'}", self._folder / "images" if self._keep else None)
        self.station = Station(load_all([str(model) for model in self._models]), log, Limits(**self._limits))
        app = create_app(self.station, token=self._token, root_path=self._root_path)
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="error", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def site(saved, tmp_path):
    """`site(**options)` starts a station with a detector of its own file, `site.model`."""
    started = []
    model = shutil.copy(saved, tmp_path / "parts.safetensors")

    def start(*more, **options) -> Site:
        started.append(Site(tmp_path, [model, *more], **options))
        started[-1].model = model
        return started[-1]

    yield start
    for one in started:
        one.stop()


@dataclass
class Published:
    """A station as a web server publishes it, under a path."""

    url: str


@pytest.fixture
def publish():
    """`publish(a=site, b=other)` starts a web server that passes /a/… and /b/… on; `prefix=True` leaves that in."""
    servers = []

    def start(prefix: bool = False, **sites: Site) -> list[Published]:
        class Proxy(BaseHTTPRequestHandler):
            def pass_on(self) -> None:
                name, _, rest = self.path[1:].partition("/")
                if name not in sites:
                    return self.send_error(404)
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                connection = HTTPConnection("127.0.0.1", sites[name].port, timeout=30)
                try:
                    path = self.path if prefix else f"/{rest}"
                    connection.request(self.command, path, body or None, dict(self.headers))
                    answer = connection.getresponse()
                except OSError:
                    return self.send_error(502)
                data = answer.read()
                self.send_response(answer.status)
                for header in answer.getheaders():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(data)
                connection.close()

            do_GET = do_POST = do_PUT = pass_on

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Proxy))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return [Published(f"http://127.0.0.1:{servers[-1].server_port}/{name}/") for name in sites]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def visit(browser):
    """`visit(site)` opens its page. At the end nothing must have been refused by the browser or thrown."""
    faults, contexts = [], []

    def open_page(site: Site | Published, path: str = "", **options):
        contexts.append(browser.new_context(**({"viewport": {"width": 1024, "height": 768}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if "Content Security Policy" in m.text else None)
        page.on("request", lambda r: faults.append(r.url) if not r.url.startswith((site.url, "blob:")) else None)
        page.goto(site.url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="module")
def bad(parts) -> dict:
    return {"name": "bad 1.png", "mimeType": "image/png", "buffer": (parts / "test/square/000.png").read_bytes()}


def good(number: int) -> dict:
    data = io.BytesIO()
    Image.fromarray(textured(np.random.default_rng(500 + number))).save(data, "PNG")
    return {"name": f"good {number}.png", "mimeType": "image/png", "buffer": data.getvalue()}


def choose(page, *files: dict) -> None:
    page.set_input_files("#files", list(files))
    expect(page.locator("#strip .mark.busy")).to_have_count(0)


def shown(page, selector: str) -> np.ndarray:
    """Screenshot of an element, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(float)


# Inspect


def test_an_image_gets_a_verdict_that_nobody_can_overlook(site, visit, bad):
    station = site()
    page = visit(station)
    expect(page.locator("#empty")).to_be_visible()
    choose(page, bad)
    expect(page.locator("#verdict")).to_have_class("defect")
    expect(page.locator("#verdict")).to_contain_text("Defect")
    expect(page.locator("#verdict")).to_contain_text("bad 1.png")
    assert page.locator("#verdict").get_attribute("aria-live") == "assertive"
    (entry,) = station.station.log.find(Filter())
    assert entry.name == "bad 1.png" and entry.verdict == "defect"
    expect(page.locator("#measure")).to_contain_text(f"{entry.threshold:.4g}".replace("-", "−"))
    expect(page.locator("#regions button")).to_have_count(len(entry.regions))
    expect(page.locator("#outlines polygon.edge")).to_have_count(len(entry.regions))
    page.locator("#regions button").first.click()
    expect(page.locator("#outlines .chosen")).to_have_count(1)
    page.get_by_label("Outlines").uncheck()
    expect(page.locator("#outlines polygon")).to_have_count(0)


def test_blending_goes_from_the_image_to_the_map(site, visit, bad):
    page = visit(site())
    choose(page, bad)
    page.get_by_label("Outlines").uncheck()
    looks = {}
    for name in ("Image", "Heat map", "Uncertainty", "Restored"):
        page.get_by_role("radio", name=name).check()
        if name == "Image":
            expect(page.locator("#blend")).to_be_disabled()
            page.wait_for_timeout(200)
            looks[name] = shown(page, "#stage")
            continue
        for share in (0, 50, 100):
            page.locator("#blend").fill(str(share))
            expect(page.locator("#over")).to_be_visible()
            page.wait_for_timeout(300)  # until it has faded
            looks[name, share] = shown(page, "#stage")
    for name in ("Heat map", "Uncertainty", "Restored"):
        difference = [np.abs(looks[name, share] - looks["Image"]).mean() for share in (0, 50, 100)]
        # the legend stands in a corner of the map
        assert difference[0] < 3 and difference[0] < difference[1] < difference[2], (name, difference)
    half = (looks["Restored", 0] + looks["Restored", 100]) / 2
    assert np.abs(half - looks["Restored", 50]).mean() < 3
    red, _, blue = np.moveaxis(looks["Heat map", 100], 2, 0)
    assert (red > blue + 60).mean() > 0.02  # warm where the defect is
    page.reload()
    choose(page, bad)
    expect(page.locator("#layers input:checked")).to_have_value("restored")  # as it was left
    expect(page.locator("#blend")).to_have_value("100")


def test_several_images_and_the_keys_between_them(site, visit, bad):
    page = visit(site())
    choose(page, bad, good(1), good(2))
    expect(page.locator("#position")).to_have_text("1 of 3")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#verdict")).to_contain_text("good 1.png")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")  # there is no fourth
    expect(page.locator("#position")).to_have_text("3 of 3")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#verdict")).to_contain_text("good 1.png")
    page.keyboard.press("1")
    expect(page.locator("#layers input:checked")).to_have_value("image")
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()


def test_several_detectors_can_be_chosen(site, visit, saved, bad):
    station = site(f"other={saved}")
    page = visit(station)
    page.get_by_label("Detector", exact=True).first.select_option("other")
    choose(page, bad)
    assert station.station.log.find(Filter())[0].detector == "other"
    expect(page.locator("#facts")).to_contain_text("other")


def test_images_can_be_dropped(site, visit, bad):
    page = visit(site())
    transfer = page.evaluate_handle(
        """data => { const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(data)], "dropped.png", {type: "image/png"})); return transfer; }""",
        list(bad["buffer"]),
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#verdict")).to_contain_text("dropped.png")
    expect(page.locator("#drop")).to_be_hidden()


def test_the_camera_gives_an_image(site, visit):
    station = site()
    page = visit(station, permissions=["camera"])
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#camera")).to_be_visible()
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Inspect this image").click()
    expect(page.locator("#camera")).to_be_hidden()
    expect(page.locator("#verdict")).to_have_class(re.compile("good|defect|review"))
    (entry,) = station.station.log.find(Filter())
    assert entry.name.startswith("camera-") and entry.width > entry.height > 100


# Review, history, calibration


def test_a_person_decides_with_keys(site, visit, bad):
    station = site(sample=1.0)
    page = visit(station)
    choose(page, bad, good(1), good(2))
    page.get_by_role("button", name="Review").click()
    expect(page.get_by_text("Good or defect?")).to_be_visible()
    expect(page.locator("#position")).to_have_text("1 of 3")
    page.keyboard.press("g")
    expect(page.locator("#notices")).to_contain_text("your name")
    assert not any(entry.decision for entry in station.station.log.find(Filter()))
    page.get_by_label("Your name").fill("Ada")
    page.keyboard.press("g")  # goes into the name
    page.get_by_label("Your name").fill("Ada")
    page.locator("#verdict").click()
    names = [entry.name for entry in station.station.log.find(Filter())]
    expect(page.locator("#verdict")).to_contain_text(names[0])
    page.keyboard.press("g")
    expect(page.locator("#verdict")).to_contain_text(names[1])
    page.keyboard.press("ArrowRight")
    expect(page.locator("#verdict")).to_contain_text(names[2])
    page.keyboard.press("d")
    expect(page.locator("#verdict")).to_contain_text(names[1])
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#decided")).to_contain_text("Good, decided by Ada")
    page.keyboard.press("u")
    expect(page.locator("#decided")).to_contain_text("No decision")
    page.get_by_role("button", name="Good G").click()
    expect(page.locator("#verdict")).to_contain_text(names[1])
    page.get_by_role("button", name="Defect D").click()
    expect(page.locator("#idle")).to_be_visible()
    expect(page.locator("#waiting")).to_be_hidden()
    found = station.station.log.find(Filter())
    assert [entry.decision for entry in found] == ["good", "defect", "defect"]
    assert {entry.decided_by for entry in found} == {"Ada"}


def test_decisions_become_a_new_threshold(site, visit, bad):
    station = site(sample=1.0)
    page = visit(station)
    choose(page, *(good(i) for i in range(9)))
    before = station.station.detector(None).detector.select().threshold
    page.get_by_role("button", name="Detectors").click()
    card = page.locator(".card")
    expect(card.locator(".big")).to_have_text(f"{before:.4g}".replace("-", "−"))
    card.get_by_role("button", name="Recalibrate").click()
    expect(card.locator(".wrong")).to_contain_text("decide some first")
    page.get_by_role("button", name="Review").click()
    page.get_by_label("Your name").fill("Ada")
    for left in range(9, 0, -1):
        expect(page.locator("#waiting")).to_have_text(str(left))
        page.get_by_role("button", name="Good G").click()
    expect(page.locator("#idle")).to_be_visible()
    page.get_by_role("button", name="Detectors").click()
    expect(card).to_contain_text("9 good, of which 9 drawn at random")
    expect(card.get_by_label("only good images drawn at random")).to_be_checked()
    card.get_by_label("Also use").uncheck()
    card.get_by_role("button", name="Recalibrate").click()
    expect(card.locator(".done")).to_contain_text("with 9 good images and 0 defective images")
    page.evaluate("document.activeElement.blur()")
    page.get_by_role("button", name="Detectors").click()  # asks anew, and what was said stays
    expect(card).to_contain_text("9 good images outside of training")
    expect(card.locator(".done")).to_be_visible()
    threshold = unflaw.load(str(station.model)).select().threshold
    highest = max(entry.score for entry in station.station.log.find(Filter()))
    assert threshold == pytest.approx(highest, rel=1e-4) and threshold != before
    expect(card.locator(".big")).to_have_text(f"{threshold:.4g}".replace("-", "−"))


def test_an_exported_detector_hides_calibration_and_says_why(site, visit, exported):
    page = visit(site(f"graph={exported}"))
    page.get_by_role("button", name="Detectors").click()
    expect(page.locator(".card")).to_have_count(2)
    card = page.get_by_role("article", name="graph")
    expect(card).to_contain_text("is an exported detector")
    expect(card.locator("form")).to_be_hidden()
    expect(page.get_by_role("article", name="parts").locator("form")).to_be_visible()


def test_history_is_filtered_and_opened(site, visit, bad):
    station = site()
    page = visit(station)
    choose(page, bad, *(good(i) for i in range(3)))
    defects = [entry.name for entry in station.station.log.find(Filter(verdict="defect"))]
    page.get_by_role("button", name="History").click()
    rows = page.locator("#rows tr")
    expect(rows).to_have_count(4)
    page.get_by_label("Verdict").select_option("defect")
    expect(rows).to_have_count(len(defects))
    page.get_by_label("Verdict").select_option("")
    page.get_by_label("Name contains").fill("GOOD 2")
    expect(rows).to_contain_text("good 2.png")
    rows.get_by_role("button").click()
    expect(page.locator("#verdict")).to_contain_text("good 2.png")
    expect(page.locator("#base")).to_have_attribute("src", re.compile("^blob:"))
    page.get_by_role("button", name="Back to the list").click()
    page.get_by_label("Name contains").fill("")
    page.get_by_label("From", exact=True).fill("2100-01-01T00:00")
    expect(page.locator("#none")).to_be_visible()
    page.get_by_label("From", exact=True).fill("")
    page.get_by_label("To", exact=True).fill("2100-01-01T00:00")
    expect(rows).to_have_count(4)


def test_what_is_not_kept_is_said(site, visit, bad):
    station = site(keep=False)
    page = visit(station)
    choose(page, bad)
    expect(page.locator("#over")).to_be_visible()
    station.station._recent.clear()
    page.reload()
    page.get_by_role("button", name="History").click()
    page.locator("#rows button").click()
    expect(page.locator("#verdict")).to_contain_text("Defect")
    expect(page.locator("#unseen")).to_contain_text("not kept")


# Whatever may go wrong


def test_images_that_cannot_be_inspected_are_named(site, visit, bad):
    station = site(bytes=20_000)
    page = visit(station)
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG half"}
    large = {"name": "large.png", "mimeType": "image/png", "buffer": b"\x89PNG" + bytes(30_000)}
    expect(page.locator("#detector option")).to_have_count(1)  # it knows the limits
    choose(page, broken, large, bad)
    expect(page.locator("#verdict")).to_have_class("error")
    expect(page.locator("#verdict")).to_contain_text("broken.png: is damaged")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#verdict")).to_contain_text("large.png has 31 kB; this station takes 20 kB")
    expect(page.locator(".details")).to_be_hidden()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#verdict")).to_have_class("defect")
    assert station.station.log.count(Filter()) == 1


def test_a_busy_station_is_waited_for(site, visit, bad, monkeypatch):
    page = visit(site())
    left = [2]

    def full(_) -> None:
        if left[0]:
            left[0] -= 1
            raise Busy

    with monkeypatch.context() as patched:
        whole = service.Slot
        patched.setattr(service, "Slot", lambda station: full(station) or whole(station))
        page.set_input_files("#files", [bad])
        expect(page.locator("#verdict")).to_contain_text("busy")
        expect(page.locator("#verdict")).to_have_class("defect")
    assert left == [0]


def test_a_station_that_is_gone_is_missed_until_it_is_back(site, visit, bad):
    station = site()
    page = visit(station)
    choose(page, bad)
    station.stop()
    choose(page, good(1))
    expect(page.locator("#lost")).to_be_visible()
    expect(page.locator("#verdict")).to_contain_text("does not answer")
    station.start()
    expect(page.locator("#lost")).to_be_hidden()
    choose(page, good(2))
    expect(page.locator("#verdict")).to_contain_text("good 2.png")
    expect(page.locator("#verdict")).to_have_class(re.compile("good|defect|review"))


def test_the_token_is_asked_for_and_remembered(site, visit, bad):
    page = visit(site(token=TOKEN))
    expect(page.locator("#login")).to_be_visible()
    page.locator("#token").fill("not the token of this")
    page.keyboard.press("Enter")
    expect(page.locator("#wrong")).to_be_visible()
    page.locator("#token").fill(TOKEN)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#login")).to_be_hidden()
    choose(page, bad)
    expect(page.locator("#verdict")).to_have_class("defect")
    expect(page.locator("#over")).to_be_visible()
    page.reload()
    expect(page.locator("#detector option")).to_have_count(1)
    expect(page.locator("#login")).to_be_hidden()


# Behind a web server


@pytest.mark.parametrize("prefix", [False, True], ids=["path removed", "path left"])
def test_a_station_may_be_published_under_a_path(site, visit, publish, bad, prefix):
    station = site(sample=1.0, root_path="/line3" if prefix else "")
    (published,) = publish(line3=station, prefix=prefix)
    page = visit(published)  # which sees to it that nothing outside that path is asked for
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgba(0, 0, 0, 0)"
    assert page.evaluate("document.querySelector('.brand img').naturalWidth") > 0
    choose(page, bad)
    expect(page.locator("#verdict")).to_have_class("defect")
    expect(page.locator("#over")).to_have_attribute("src", re.compile("^blob:"))
    page.get_by_role("button", name="Review").click()
    page.get_by_label("Your name").fill("Ada")
    page.get_by_role("button", name="Defect D").click()
    expect(page.locator("#idle")).to_be_visible()
    page.get_by_role("button", name="History").click()
    expect(page.locator("#rows tr")).to_have_count(1)
    page.get_by_role("button", name="Detectors").click()
    page.locator(".card").get_by_role("button", name="Recalibrate").click()
    expect(page.locator(".card .wrong")).to_contain_text("decide some first")
    station.stop()
    page.get_by_role("button", name="History").click()
    expect(page.locator("#lost")).to_be_visible()
    station.start()
    expect(page.locator("#lost")).to_be_hidden()


def test_a_token_goes_to_the_station_that_it_is_for(site, visit, publish, bad):
    """Stations under one web server are one site to a browser."""
    first, second = publish(line3=site(token=TOKEN), line4=site(token=f"{TOKEN}-of-line-4"))
    page = visit(Published(first.url.removesuffix("line3/")), path="line3/")
    page.locator("#token").fill(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#detector option")).to_have_count(1)
    asked = []
    page.on("request", lambda request: asked.append(request.headers.get("authorization", "")))
    page.goto(second.url)
    expect(page.locator("#login")).to_be_visible()
    assert asked and not any(asked)
    page.goto(first.url)
    expect(page.locator("#detector option")).to_have_count(1)
    expect(page.locator("#login")).to_be_hidden()


# For everybody

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] > 250) return colour;
      if (at.id === "legend") return [69, 69, 69]; // its glass over the brightest image
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const unseen = element.closest(".unseen, .skip, option, script, noscript, button:disabled");
    if (!own || unseen || !element.checkVisibility()) continue;
    const [a, b] = [light(rgba(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([Math.round(ratio * 100) / 100, element.outerHTML.slice(0, 90)]);
  }
  return found;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, select, img, dialog, nav")].filter((element) => {
  if (!element.checkVisibility() && element.tagName !== "DIALOG") return false;
  const named = element.getAttribute("aria-label") || element.getAttribute("aria-labelledby")
    || element.labels?.length || element.textContent.trim() || element.alt;
  return !named && !(element.tagName === "IMG" && element.hasAttribute("alt"));
}).map((element) => element.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(site, visit, bad, scheme):
    page = visit(site(sample=1.0), color_scheme=scheme)

    def check(where: str, least: int) -> None:
        page.wait_for_timeout(150)
        found = page.evaluate(CONTRAST)
        assert len(found) >= least, (where, found)
        assert [text for text in found if text[0] < 4.5] == [], where
        assert page.evaluate(NAMELESS) == [], where

    check("empty", 6)
    choose(page, bad, good(1), {"name": "no.png", "mimeType": "image/png", "buffer": b"no"})
    page.get_by_label("Your name").fill("Ada")
    for name in ("defect", "good"):
        check(name, 20)
        page.keyboard.press("Escape")
        page.locator("#verdict").click()
        page.keyboard.press("d")
        expect(page.locator("#decided")).to_contain_text("Ada")
        check(f"{name}, decided", 20)
        page.keyboard.press("ArrowRight")
    check("not inspected", 6)
    page.evaluate("document.querySelector('#verdict').className = 'review'")
    check("to be reviewed", 6)
    for view in ("Review", "History", "Detectors"):
        page.get_by_role("button", name=view).click()
        check(view, 8)
    page.get_by_role("button", name="Keys").click()
    check("keys", 10)


def test_the_theme_can_be_turned_and_stays(site, visit):
    page = visit(site(), color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Light or dark").click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("size", [(1024, 768), (768, 1024), (390, 844), (1440, 900)], ids=str)
def test_it_fits_every_screen(site, visit, bad, size):
    page = visit(site(), viewport={"width": size[0], "height": size[1]})
    choose(page, bad)
    expect(page.locator("#over")).to_be_visible()
    for view in ("Inspect", "Review", "History", "Detectors"):
        page.get_by_role("button", name=view).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], view
    page.get_by_role("button", name="Inspect").click()
    box = page.locator("#verdict").bounding_box()
    stage = page.locator("#stage").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= size[1]  # without scrolling
    assert stage["width"] == pytest.approx(stage["height"], abs=1) and stage["width"] > 200  # of a square image
    if size[0] >= 1024:
        decide = page.get_by_role("button", name="Defect D").bounding_box()
        assert decide["y"] + decide["height"] <= size[1]
    if folder := os.environ.get("UNFLAW_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{size[0]}x{size[1]}.png")
