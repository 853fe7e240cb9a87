import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from unflaw.config import make_config
from unflaw.errors import ImageError
from unflaw.imaging import tiling as module
from unflaw.imaging.tiling import Preparation, TilingGeometry, Window, layout
from unflaw.imaging.transforms import prepare, prepare_mask, try_load_windows, windows
from unflaw.postprocessing.stitching import TileStitcher, weights

RNG = np.random.default_rng(0)
SIDES = st.integers(1, 700)
PREPARATIONS = st.builds(
    Preparation,
    size=st.sampled_from([32, 48, 49]),
    fit=st.sampled_from(["stretch", "pad"]),
    tile=st.none() | st.integers(8, 300),
    overlap=st.floats(0, 0.75),
)


@pytest.fixture
def mask_file(tmp_path):
    """A disc in the right half of an image of 200 × 100."""
    y, x = np.mgrid[:100, :200]
    path = tmp_path / "roi.png"
    Image.fromarray(np.hypot(x - 140, y - 50) < 30).save(path)
    return path


def random_image(width: int, height: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


# Geometry


@settings(max_examples=80)
@given(SIDES, SIDES, PREPARATIONS)
def test_windows_cover_every_pixel_and_stay_on_the_canvas(width, height, preparation):
    laid, size = TilingGeometry(width, height, preparation), preparation.size
    covered = np.zeros(laid.canvas[::-1], int)
    for x, y in laid.places:
        assert 0 <= x <= laid.canvas[0] - size and 0 <= y <= laid.canvas[1] - size
        covered[y : y + size, x : x + size] += 1
    assert covered.all() and len(set(laid.places)) == len(laid)
    assert (len(laid) == 1) == (laid.canvas == (size, size))
    for axis, starts in ((0, laid.columns), (1, laid.rows)):
        steps = np.diff(starts)
        assert (steps > 0).all() and (steps <= max(laid.step, int(size * (1 - preparation.overlap)))).all(), axis


@settings(max_examples=80)
@given(SIDES, SIDES, PREPARATIONS, st.data())
def test_boxes_come_back_to_the_image(width, height, preparation, data):
    laid = TilingGeometry(width, height, preparation)
    h, w = laid.shape
    assert laid.to_original(laid.box) == laid.to_original((0, 0, w, h)) == (0, 0, width, height)
    x0, y0 = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, w)), data.draw(st.integers(y0 + 1, h))
    left, top, right, bottom = laid.to_original((x0, y0, x1, y1))
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
    # what it shows lies in the box
    sx0, sy0, sx1, sy1 = laid.source((x0 * laid.step, y0 * laid.step, x1 * laid.step, y1 * laid.step))
    assert left <= max(sx0, 0) + 1e-6 and top <= max(sy0, 0) + 1e-6
    assert right >= min(sx1, width) - 1e-6 and bottom >= min(sy1, height) - 1e-6


@settings(max_examples=60)
@given(st.integers(8, 64), st.integers(0, 400), st.floats(0, 0.75), st.sampled_from([1, 2, 4]))
def test_weights_sum_to_one(size, more, overlap, step):
    size, more = size * 4, more * 4
    starts = module._window_starts(size + more, size, overlap, step)
    found = weights(starts, size, step)
    assert found.shape == (len(starts), (size + more) // step)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    assert (found >= 0).all() and (more > 0 or (found == 1).all())


def test_a_map_stays_small_however_large_the_image():
    laid = layout(8000, 6000, Preparation(tile=256))
    assert laid.step == 4 and laid.shape == (1500, 2000) and laid.canvas == (8000, 6000)
    assert layout(8000, 6000, Preparation(tile=1024)).step == 1
    assert np.prod(layout(60_000, 60, Preparation(tile=64)).shape) <= module.MAP_PIXELS * 20
    assert laid.to_original((10, 20, 11, 22)) == (40, 80, 44, 88) and laid.area_to_original(2) == 32


# Pixels


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_windows_are_cut_out_of_one_resized_image(kind):
    image = random_image(330, 250) if kind == "uint8" else RNG.random((250, 330, 3), np.float32)
    preparation = Preparation(size=32, tile=57, overlap=0.3)
    laid = layout(330, 250, preparation)
    whole = np.asarray(
        [
            Image.fromarray(image[..., c]).resize(laid.canvas, Image.Resampling.BILINEAR, (0, 0, 330, 250))
            for c in range(3)
        ],
        np.float32,
    ) / (255 if kind == "uint8" else 1)
    for window in windows(image, preparation):
        x, y = window.window.place
        np.testing.assert_allclose(window.pixels, whole[:, y : y + 32, x : x + 32], atol=1.01 / 255)


def test_large_images_are_resized_in_strips_to_the_same(monkeypatch):
    from unflaw.imaging import transforms as images

    image, preparation = random_image(300, 400), Preparation(size=64, fit="pad")
    expected = prepare(image, preparation).pixels
    monkeypatch.setattr(images, "AT_ONCE", 5000)
    np.testing.assert_allclose(prepare(image, preparation).pixels, expected, atol=1.01 / 255)


def test_one_tile_is_the_whole_image():
    image = random_image(100, 100)
    one = list(windows(image, Preparation(size=32, tile=100)))
    assert len(one) == 1 and np.array_equal(one[0].pixels, prepare(image, Preparation(size=32)).pixels)


def test_an_image_smaller_than_a_tile_is_padded():
    (window,) = windows(random_image(20, 40), Preparation(size=32, tile=64))
    assert window.box == (0, 0, 10, 20) and window.window.cells(8).sum() == 3 * 5
    assert (window.pixels[:, :20, 10:] == window.pixels[:, :20, 9:10]).all()


# Regions of interest


def test_a_box_is_cut_out():
    image = random_image(200, 100)
    for roi in ((0.25, 0.1, 0.75, 0.9), (50, 10, 150, 90), "50,10,150,90"):
        preparation = Preparation(size=32, roi=roi)
        found = prepare(image, preparation)
        assert np.array_equal(found.pixels, prepare(image[10:90, 50:150], Preparation(size=32)).pixels)
        assert found.layout.to_original((0, 0, 32, 32)) == (50, 10, 150, 90)
    mask = np.zeros((100, 200), bool)
    mask[:, :100] = True
    assert prepare_mask(mask, preparation)[:, :16].all() and not prepare_mask(mask, preparation)[:, 16:].any()


@pytest.mark.parametrize("tile", [None, 20])
def test_nothing_outside_of_a_mask_is_seen(mask_file, tile):
    preparation = Preparation(size=32, tile=tile, roi=str(mask_file))
    counts = np.asarray(Image.open(mask_file), bool)
    image, other = random_image(200, 100), random_image(200, 100)
    other[counts] = image[counts]
    laid = layout(200, 100, preparation)
    assert laid.crop == (111, 21, 170, 80)
    for a, b in zip(windows(image, preparation), windows(other, preparation), strict=True):
        assert np.array_equal(a.pixels, b.pixels)
    shown = np.zeros((100, 200), bool)
    for row in range(laid.shape[0]):
        for column in np.flatnonzero(laid.counted[row]):
            x0, y0, x1, y1 = laid.to_original((column, row, column + 1, row + 1))
            shown[y0:y1, x0:x1] = True
    assert shown[counts].mean() > 0.98 and shown[~counts].mean() < 0.04
    truth = prepare_mask(np.ones((100, 200), bool), preparation)
    assert np.array_equal(truth, laid.counted)


def test_cells_touch_what_counts(mask_file):
    laid = layout(200, 100, Preparation(size=32, roi=str(mask_file)))
    cells = Window(laid, 0).cells(8)
    assert cells[3:5, :].all() and not cells[0, 0] and not cells[-1, -1] and cells[0, 3]
    assert np.array_equal(cells, laid.counted.reshape(8, 4, 8, 4).any((1, 3)))


def test_windows_without_anything_that_counts_are_left_out(mask_file):
    every = layout(200, 100, Preparation(size=32, tile=8, roi="0.555,0.21,0.85,0.8"))
    some = layout(200, 100, Preparation(size=32, tile=8, roi=str(mask_file)))
    assert set(some.places) < set(every.places) and some.canvas == every.canvas


def test_a_mask_travels_in_the_configuration(mask_file):
    config = make_config("nearest_neighbor", changes={"preparation.roi": str(mask_file)})
    mask_file.unlink()
    again = type(config).model_validate_json(config.model_dump_json())
    assert again == config and again.preparation.roi.startswith("data:image/png")
    assert layout(200, 100, again.preparation).crop == (111, 21, 170, 80)
    assert len(config.preparation.roi) < 1000


@pytest.mark.parametrize("roi", [(0.5, 0, 0.4, 1), (-1, 0, 5, 5), "1,2,3", "0,0,inf,inf", "no-such-file.png"])
def test_regions_that_make_no_sense_are_refused(roi):
    with pytest.raises(ValidationError):
        Preparation(roi=roi)


def test_an_empty_mask_and_an_image_without_the_region_are_refused(tmp_path):
    Image.new("1", (9, 9)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"empty\.png: marks nothing"):
        make_config(changes={"preparation.roi": str(tmp_path / "empty.png")})
    with pytest.raises(ImageError, match="outside of the region of interest"):
        prepare(random_image(40, 40), Preparation(roi=(50, 0, 90, 20)))


def test_one_white_pixel_of_a_large_mask_counts(tmp_path):
    mask = np.zeros((3000, 5000), bool)
    mask[1501, 2503] = True
    Image.fromarray(mask).save(tmp_path / "speck.png")
    for tile in (None, 512):
        laid = layout(5000, 3000, Preparation(size=32, tile=tile, roi=str(tmp_path / "speck.png")))
        x0, y0, x1, y1 = laid.crop
        assert x0 <= 2503 < x1 <= x0 + 7 and y0 <= 1501 < y1 <= y0 + 7 and laid.counted.any()


@pytest.mark.parametrize("tile", [None, 600])
def test_mistakes_of_geometry_are_not_damaged_files(tmp_path, monkeypatch, tile):
    mask = np.zeros((600, 600), bool)
    mask[[0, 599], [0, 599]] = True
    Image.fromarray(mask).save(tmp_path / "specks.png")
    path = tmp_path / "part.png"
    Image.fromarray(random_image(600, 600)).save(path)
    preparation = Preparation(size=32, tile=tile, roi=str(tmp_path / "specks.png"))
    error = try_load_windows(path, preparation)
    assert str(error).startswith(f"{path}: has 600 × 600 pixels, of which the mask") and "damaged" not in str(error)
    monkeypatch.setattr("unflaw.imaging.transforms.describe", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_load_windows(path, Preparation(size=32))


# Blending


@settings(max_examples=40)
@given(st.integers(30, 400), st.integers(30, 400), st.integers(20, 120), st.floats(0, 0.7), st.booleans())
def test_what_windows_agree_on_is_blended_without_seams(width, height, tile, overlap, small):
    preparation = Preparation(size=32, tile=tile, overlap=overlap)
    laid = TilingGeometry(width, height, preparation)
    if small:
        laid.step = 2
        laid = _stepped(laid)
    whole = RNG.random(laid.canvas[::-1]).astype(np.float32)
    colours = RNG.integers(0, 256, (*laid.canvas[::-1], 3), dtype=np.uint8)
    stitcher = TileStitcher(laid)
    for number, (x, y) in enumerate(laid.places):
        assert not stitcher.complete
        here = np.s_[y : y + 32, x : x + 32]
        stitcher.add(float(number), {"map": whole[here], "image": colours[here], "mask": np.ones((32, 32))})
    score, found = stitcher.result()
    assert stitcher.complete and score == len(laid) - 1
    step, (h, w) = laid.step, laid.shape
    expected = whole.reshape(h, step, w, step).mean((1, 3))
    np.testing.assert_allclose(found["map"], expected, atol=1e-5)
    assert found["image"].dtype == np.uint8 and found["image"].shape == (h, w, 3)
    assert np.abs(found["image"] - colours.reshape(h, step, w, step, 3).mean((1, 3))).max() <= 0.51
    assert (found["mask"] == 1).all()


def _stepped(laid: TilingGeometry) -> TilingGeometry:
    """As if the map were too large for every pixel of the canvas."""
    laid.canvas = tuple(max(32, -(-side // 2) * 2) for side in laid.canvas)
    laid.columns, laid.rows = (module._window_starts(side, 32, laid.preparation.overlap, 2) for side in laid.canvas)
    laid.places = [(x, y) for y in laid.rows for x in laid.columns]
    return laid


def test_one_window_comes_out_as_it_went_in():
    laid = layout(50, 80, Preparation(size=32))
    stitcher, values = TileStitcher(laid), RNG.normal(size=(32, 32)).astype(np.float32)
    stitcher.add(3.25, {"map": values})
    score, found = stitcher.result()
    assert score == 3.25 and np.array_equal(found["map"], values) and found["map"].dtype == np.float32


def test_what_does_not_count_has_the_lowest_value(mask_file):
    laid = layout(200, 100, Preparation(size=32, roi=str(mask_file)))
    stitcher = TileStitcher(laid)
    stitcher.add(0.0, {"map": np.where(laid.counted, 5.0, 99.0).astype(np.float32)})
    assert (stitcher.result()[1]["map"] == 5).all()
