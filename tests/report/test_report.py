import builtins
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from unflaw.evaluation.results import Evaluation, Inspected
from unflaw.postprocessing.results import Region, Result, Scale
from unflaw.report import heat_map, outline, overlay, panel, text, views, write_report
from unflaw.report.text import Typeface

SIZE = 48
SCALE = Scale(low=1.0, threshold=3.0)
VALID = (0, 8, 48, 40)  # a wide image with padding above and below
DEFECT = np.s_[16:24, 10:20]


def make_result(defect: bool, path: str | None, layers: bool = False, **changes: Any) -> Result:
    rng = np.random.default_rng(0)
    anomaly_map = rng.uniform(1, 2, (SIZE, SIZE)).astype(np.float32)
    if defect:
        anomaly_map[DEFECT] = 5
    image = np.full((SIZE, SIZE, 3), 200, np.uint8)
    image[:8] = image[40:] = (255, 0, 255)  # padding, which must not be seen
    grey = np.linspace(0, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    made = Result(
        score=4.125 if defect else 1.5,
        p_value=0.02 if defect else 0.75,
        verdict="defect" if defect else "good",
        map=anomaly_map,
        regions=(Region((20, 16, 40, 32), 320, 5.0),) if defect else (),
        image=image,
        valid=VALID,
        layers={"mean": grey, "uncertainty": grey, "mask": grey, "restored": image} if layers else {},
        path=path,
        size=(96, 64),
        crop=(0, 0, 96, 64),
    )
    return replace(made, **changes)


@pytest.fixture
def evaluation() -> Evaluation:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[DEFECT] = True
    shown = [
        Inspected(make_result(True, "test/good/<script>alert(1)</script>.png", layers=True), 0, "good", None),
        Inspected(make_result(False, "test/Kratzer/größe_漢字.png"), 1, "Kratzer", mask),
        Inspected(make_result(True, "test/Kratzer/002.png"), 1, "Kratzer", mask),
        Inspected(make_result(False, None), 0, "good", None),
    ]
    rows = [
        {name: getattr(i.result, name) for name in ("path", "score", "p_value", "verdict")}
        | {"label": i.label, "defect": i.defect}
        for i in shown
    ]
    metrics = {
        "image_auroc": 0.98765,
        "aupro_30": None,
        "pixel_ap": float("nan"),
        "threshold": 2.5,
        "per_defect": {"good": {"n_images": 2}, "Kratzer": {"n_images": 2, "image_auroc": 0.4321, "own_metric": None}},
        "config": {"method": "uranet", "training": {"lr": 1e-4}},
        "timing": {"inspect_ms": 41.2},
    }
    ramp = np.linspace(0, 1, 11)
    curves = {"roc": (ramp, ramp), "pro": (np.array([0, 0.2, 1]), np.array([0, 0.5, 1]))}
    return Evaluation(metrics, rows, curves, shown, [("test/good/broken.png", "cut off <half way>")])


@pytest.fixture
def render(tmp_path: Path) -> Callable[..., str]:
    def write(evaluation: Evaluation, **options: Any) -> str:
        path = tmp_path / "deep" / "report.html"
        given: dict[str, Any] = {"title": "URA-Net on <screw>", "scale": SCALE} | options
        write_report(evaluation, path, **given)
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]  # nothing temporary is left
        return path.read_text("utf-8")

    return write


def test_page_needs_nothing_else(evaluation: Evaluation, render: Callable[..., str]) -> None:
    page = render(evaluation)
    assert not re.search(r"https?://|@import|url\(|<link|<script src|<iframe", page)
    sources = re.findall(r'<img[^>]*\bsrc="([^"]*)"', page)
    assert len(sources) == 1 + 6 + 3 + 3 + 2  # the colour bar, and the views of each image
    assert all(source.startswith("data:image/") for source in sources)
    assert page.count("<img") == len(re.findall(r'<img[^>]*\balt="[^"]+"', page))


def test_page_shows_mistakes_as_given_and_marked(evaluation: Evaluation, render: Callable[..., str]) -> None:
    cards = re.findall(r"<article.*?</article>", render(evaluation), re.S)
    badges = [re.search(r'class="badge (\w+)">([^<]+)<', card).groups() for card in cards]  # type: ignore[union-attr]
    assert badges == [("wrong", "false alarm"), ("wrong", "missed"), ("right", "correct"), ("right", "correct")]
    assert "größe_漢字.png" in cards[1]
    assert "Ground truth" in cards[1]
    assert "Ground truth" not in cards[0]
    assert "Uncertainty" in cards[0]
    assert "x 20–40, y 16–32 · 320 px · peak 5" in cards[2]


def test_page_escapes_what_it_is_given(evaluation: Evaluation, render: Callable[..., str]) -> None:
    page = render(evaluation, notes=["<b>bold</b>"])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "URA-Net on &lt;screw&gt;" in page
    assert "&lt;b&gt;bold" in page
    assert "cut off &lt;half way&gt;" in page


def test_a_slider_says_what_another_threshold_would_do(evaluation: Evaluation, render: Callable[..., str]) -> None:
    page = render(evaluation, model=Path("my parts.safetensors"))
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
    known = json.loads(found)
    assert known["good"] == [row["score"] for row in evaluation.rows if not row["label"]]
    assert known["defective"] == [row["score"] for row in evaluation.rows if row["label"]]
    assert known["threshold"] == 2.5 and known["low"] <= 2.5 <= known["high"]
    assert known["model"] == "'my parts.safetensors'"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page()
        shown.set_content(page)
        counts, command = shown.locator(".slider output").all_text_contents()
        assert counts.startswith("Threshold 2.500: false alarms 1 of 2 (50.0 %), missed 1 of 2 (50.0 %)")
        assert command == "unflaw threshold 'my parts.safetensors' 2.50000"
        shown.locator(".slider input").evaluate("(range, to) => { range.value = to; range.oninput(); }", known["low"])
        counts, command = shown.locator(".slider output").all_text_contents()
        above = sum(score > known["low"] for score in known["good"])
        assert f"false alarms {above} of 2" in counts and command.split()[-1] == f"{known['low']:.6g}".ljust(7, "0")
        browser.close()


def test_a_broken_promise_stands_at_the_top(evaluation: Evaluation, render: Callable[..., str]) -> None:
    evaluation.metrics["promise"] = "PROMISE BROKEN: 8 of 20"
    assert re.search(r'class="alarm">PROMISE BROKEN: 8 of 20<', render(evaluation).split("<main>")[0])


def test_a_scale_of_its_own_shows_what_is_below_the_threshold() -> None:
    values = np.array([[0.0, 1.0], [0.5, 0.2]])
    scale = Scale(0.0, 4.0)
    assert scale(values).max() < 0.5 and scale.up_to(values)(values).max() == 1.0
    assert scale.up_to(values * 8) == scale


def test_page_states_the_numbers(evaluation: Evaluation, render: Callable[..., str]) -> None:
    page = render(evaluation)
    assert (
        "At the calibrated threshold, 1 of 2 good images (50.0%) raised a false alarm"
        " and 1 of 2 defective images (50.0%) passed as good." in page
    )
    for number in ("0.988", "0.432", "4.125", "threshold 2.5", "0.0001", "41.2", ">–<"):
        assert number in page
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page)
    assert 'points="0,1 0.667,0.5 1,0.438"' in page  # PRO ends at 0.3, between two points


def test_page_without_anything(render: Callable[..., str]) -> None:
    page = render(Evaluation({}, [], {}, []))
    assert "No image was inspected." in page
    assert "<article" not in page


@pytest.mark.parametrize("threshold", [None, 1.0, 2.0, 9.0])
@pytest.mark.parametrize("scores", [[2.0], [2.0, 2.0, 2.0], [0.1, 0.7, 1e6], [-3.3, 1 / 3, 2.1]])
def test_histogram_counts_every_score_on_its_side(scores: list[float], threshold: float | None) -> None:
    from unflaw.report.html import _histogram

    rows = [{"score": score, "label": index % 2} for index, score in enumerate(scores)]
    drawn = _histogram(rows, threshold)
    counts = drawn["good"] + drawn["defective"]
    assert counts.sum() == len(scores)
    if threshold is not None:
        assert counts[drawn["edges"][:-1] >= threshold].sum() == sum(score >= threshold for score in scores)


def test_failed_write_leaves_the_old_page(
    evaluation: Evaluation, render: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = render(evaluation)

    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        render(evaluation, title="another")
    files = list((tmp_path / "deep").iterdir())
    assert [file.name for file in files] == ["report.html"]
    assert files[0].read_text("utf-8") == before


def test_undecodable_name(evaluation: Evaluation, render: Callable[..., str]) -> None:
    evaluation.rows[0]["path"] = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert r"caf\udce9.png" in render(evaluation)


def test_missing_jinja_names_the_remedy(
    evaluation: Evaluation, render: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_jinja(name: str, *args: Any) -> Any:
        if name == "jinja2":
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    with pytest.raises(ImportError, match=re.escape("pip install 'unflaw[report]'")):
        render(evaluation)


def test_import_is_light() -> None:
    code = "import sys, unflaw.report; print({'torch', 'jinja2', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_good_maps_are_not_warm() -> None:
    values = np.linspace(-2, 3, 200)[None]  # up to the threshold, whatever is highest in this one image
    red, _, blue = heat_map(values, SCALE).astype(int).transpose(2, 0, 1)
    assert (red < blue).all()
    red, _, blue = heat_map(values + 5.05, SCALE).astype(int).transpose(2, 0, 1)
    assert (red > blue).all()
    lightness = heat_map(np.linspace(1, 5, 200)[None], SCALE)[0] @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) >= -1).all()  # but for rounding


def test_overlay_keeps_good_areas() -> None:
    result = make_result(True, None)
    laid = overlay(result.image, np.where(result.map > 3, 5, 1.5), SCALE)
    changed = (laid != result.image).any(axis=2)
    assert np.array_equal(changed, result.map > 3)
    assert laid.dtype == np.uint8


def test_outline_leaves_image_and_defect() -> None:
    image, mask = np.full((32, 32, 3), 90, np.uint8), np.zeros((32, 32), np.uint8)
    mask[10:20, 10:20] = 255
    drawn = outline(image, mask, (1, 2, 3))
    assert (image == 90).all()
    assert (drawn[10:20, 10:20] == 90).all()
    assert (drawn[9, 10:20] == (1, 2, 3)).all()
    assert (drawn[8, 10:20] == 0).all()
    assert (drawn[7] == 90).all()


def test_boxes_of_a_region_of_interest_lie_where_they_are() -> None:
    """Its image is a cut-out; boxes count pixels of the whole."""
    whole, part = make_result(True, None), make_result(True, None, size=(500, 400), crop=(300, 200, 396, 264))
    moved = replace(part.regions[0], box=(320, 216, 340, 232))
    boxed, expected = (views(shown, SCALE)["Heat map"] for shown in (replace(part, regions=(moved,)), whole))
    assert np.array_equal(boxed, expected) and not np.array_equal(boxed, views(part, SCALE)["Heat map"])


def test_views_are_cropped_and_boxed() -> None:
    shown = views(make_result(True, None, layers=True), SCALE, np.zeros((SIZE, SIZE), bool))
    assert list(shown) == ["Image", "Heat map", "Mean map", "Uncertainty", "Final mask", "Restored"]
    for pixels in shown.values():
        assert pixels.shape == (32, 48, 3)
        assert pixels.dtype == np.uint8
        assert not (pixels == (255, 0, 255)).all(axis=2).any()
    assert (shown["Heat map"][7, 10:20] == 255).all()  # the box lies around rows 8 to 16 of the cropped image
    quiet = views(make_result(True, None, regions=()), SCALE)["Heat map"]
    assert not (quiet == 255).all(axis=2).any()


@pytest.mark.parametrize("valid", [VALID, (20, 0, 22, 48), (0, 0, 48, 1)])
def test_panel_size(valid: tuple[int, int, int, int]) -> None:
    sheet = panel(make_result(True, "a/" + "long" * 90 + "é.png", layers=True, valid=valid), SCALE, tile=96)
    assert sheet.mode == "RGB"
    assert sheet.width >= 6 * 90
    height, width = valid[3] - valid[1], valid[2] - valid[0]
    assert sheet.height == 58 + round(96 * height / max(height, width)) + 22 + 12
    assert panel(make_result(False, None, valid=valid), SCALE).width >= 260


def heading(name: str) -> bytes:
    """The pixels of the first line of a panel."""
    return panel(make_result(False, name), SCALE).crop((0, 0, 260, 30)).tobytes()


def test_names_are_legible_in_panels() -> None:
    assert len({heading(f"Kratzer/gr{letter}e.png") for letter in "üßäöéñçøåšžłőЖλ"}) == 15  # boxes would be the same
    assert heading(unicodedata.normalize("NFD", "größe_Ä.png")) == heading("größe_Ä.png")


def test_every_character_is_drawn_or_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(text: str) -> bytes:
        image = Image.new("L", (200, 30))
        Typeface(14).draw(ImageDraw.Draw(image), (0, 0), text, "white")
        assert Typeface(14).getlength(text) > 0
        return image.tobytes()

    monkeypatch.setattr("unflaw.report.text.SYSTEM_FONTS", ())
    blocks = [*range(0xA1, 0xAD), *range(0xAE, 0x180), *range(0x3B1, 0x3CA), *range(0x410, 0x450)]
    own = {chr(code): drawn(chr(code)) for code in blocks}
    assert not [letter for letter in own if own[letter] == drawn(letter.encode("unicode_escape").decode())]
    assert len(set(own.values())) > len(own) - 20  # boxes would all be the same; a few letters of two scripts are
    for name, spelled in {"漢字_ü": r"\u6f22\u5b57_ü", "a\nb\x1b": r"a\nb\x1b", "caf\udce9": r"caf\udce9"}.items():
        assert drawn(name) == drawn(spelled)
    assert heading("test/漢\nü\udce9.png") == heading(r"test/漢\nü\udce9.png")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere fonts of the system lie in fixed folders")
def test_other_scripts_are_drawn_in_a_font_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own font has no ü: here it stands for ours, and ours for a font of the system."""
    narrow, system = tmp_path / "narrow.otf", tmp_path / "fonts/other.ttf"
    narrow.write_bytes(ImageFont.load_default(23).path.getvalue())  # type: ignore[union-attr]
    system.parent.mkdir()
    shutil.copy(text.FONT, system)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    own, other = (ImageFont.truetype(path, 23) for path in (narrow, text.FONT))
    monkeypatch.setattr(text, "FONT", narrow)
    fallback = own.getlength("ab") + other.getlength("ü")
    for name, expected in {"absent.ttf": own.getlength(r"a\xfcb"), "other.ttf": fallback}.items():
        monkeypatch.setattr(text, "SYSTEM_FONTS", ("gone.ttf", name))
        for cache in text._own, text._system, text._piece:
            cache.cache_clear()
        try:
            assert Typeface(23).getlength("aüb") == pytest.approx(expected, abs=1)
        finally:
            for cache in text._own, text._system, text._piece:
                cache.cache_clear()
