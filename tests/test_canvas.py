"""Canvases that are no squares, for elongated products."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from tests.conftest import OWN, TINY, textured
from typer.testing import CliRunner

from unflaw.config import Config, make_config
from unflaw.detector import Detector
from unflaw.errors import ImageError
from unflaw.imaging.tiling import MOST_CELLS, Preparation, TilingGeometry, Window, grid_shape, parse_size
from unflaw.imaging.transforms import prepare, windows
from unflaw.training.canvas import fit_canvas

WIDE = {"preparation.size": (128, 32), "features.grid": 4}


def strip(rng: np.random.Generator, width: int = 256, height: int = 64) -> np.ndarray:
    """As `textured`, elongated."""
    return np.concatenate([textured(rng, 64) for _ in range(-(-width // 64))], axis=1)[:height, :width]


@pytest.fixture(scope="module")
def strips(tmp_path_factory) -> Path:
    """12 good images of 256 × 64, 4 good ones to test on and 4 with a spot at three quarters of their length."""
    folder, rng = tmp_path_factory.mktemp("strips"), np.random.default_rng(3)
    for name, count in (("train/good", 12), ("test/good", 4), ("test/spot", 4)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = strip(rng)
            if name == "test/spot":
                image[20:44, 180:204] = (250, 20, 20)
            Image.fromarray(image).save(folder / name / f"{i:02d}.png")
    return folder


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("256", 256), ("512x224", (512, 224)), (" 512 X 224 ", (512, 224)), ("64×64", 64), ("96,32", (96, 32))],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size
    made = Preparation(size=text)
    assert made.size == size and made.canvas == (size if isinstance(size, tuple) else (size, size))
    assert parse_size(made.size_text) == size
    assert Preparation.model_validate_json(made.model_dump_json()) == made
    assert Preparation(size=list(made.canvas)) == made


@pytest.mark.parametrize("text", ["", "x", "512x", "x224", "512x224x3", "-5", "512 224", "1e3", "big"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(ValueError, match=re.escape(repr(text)) + ".*such as 512x224"):
        parse_size(text)
    with pytest.raises(ValueError, match=r"preparation\.size.*512x224"):
        make_config("uranet", "cpu", {"preparation.size": text})


@pytest.mark.parametrize("size", [(16, 64), (64, 5000), (64,), (64, 64, 64), 31, "20x64"])
def test_sizes_out_of_range(size):
    with pytest.raises(ValidationError):
        Preparation(size=size)


def test_tiles_are_square():
    with pytest.raises(ValidationError, match=r"tiles are square.*128x64"):
        Preparation(size=(128, 64), tile=64)


@given(st.integers(4, 64), st.integers(32, 1024), st.integers(32, 1024), st.sampled_from([1, 2, 4]))
def test_cells_are_about_square(shorter, width, height, multiple):
    if shorter * max(shorter, round(shorter * max(width, height) / min(width, height))) > MOST_CELLS // 2:
        return
    rows, columns = grid_shape(shorter, (width, height), multiple)
    assert min(rows, columns) <= shorter <= max(rows, columns) + multiple
    longer, exact = max(rows, columns), shorter * max(width, height) / min(width, height)
    assert abs(longer - exact) <= multiple / 2 + 0.5 or longer == multiple
    assert grid_shape(shorter, (width, width), multiple) == (shorter, shorter)


def test_a_grid_of_too_many_cells_is_refused(tiny, weights):
    config = tiny("nearest_neighbor", **{"preparation.size": (4096, 32), "features.grid": 256})
    with pytest.raises(ValueError, match=r"too many; lower features\.grid"):
        Detector(config=config, weights=weights)


# Geometry


@settings(max_examples=60)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.tuples(st.integers(32, 96), st.integers(32, 96)),
    st.sampled_from(["stretch", "pad"]),
)
def test_images_fill_the_canvas_or_keep_their_ratio(width, height, size, fit):
    laid = TilingGeometry(width, height, Preparation(size=size, fit=fit))
    assert laid.canvas == size and laid.places == [(0, 0)] and laid.shape == size[::-1]
    x0, y0, x1, y1 = laid.filled
    if fit == "stretch":
        assert laid.filled == (0, 0, *size)
    else:
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] and (x1 - x0 == size[0] or y1 - y0 == size[1])
        assert x1 - x0 == pytest.approx(width * min(size[0] / width, size[1] / height), abs=1)
        assert y1 - y0 == pytest.approx(height * min(size[0] / width, size[1] / height), abs=1)
    assert laid.to_original(laid.box) == (0, 0, width, height)
    shape = grid_shape(8, size)
    marked = Window(laid, 0).cells(shape)
    assert marked.shape == shape and marked.any() and (marked.all() or fit == "pad")


def test_a_strip_is_shown_as_it_is():
    image = strip(np.random.default_rng(0), 128, 32)
    shown = prepare(image, Preparation(size=(128, 32)))
    np.testing.assert_array_equal(shown.image(), image)
    (padded,) = windows(image[:, :64], Preparation(size=(128, 32), fit="pad"))
    np.testing.assert_array_equal(padded.image()[:, 32:96], image[:, :64])
    assert padded.box == (32, 0, 96, 32) and (padded.image()[:, :32] == padded.image()[:, 32:33]).all()


# Everything with it


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("method", list(OWN))
def test_every_method_takes_a_rectangle(method, fit, strips, weights, tiny, tmp_path):
    """It finds the defect where it is, comes back from its file, and says the same as a graph."""
    config = tiny(method, **WIDE, **{"preparation.fit": fit, "training.steps": 30})
    detector = Detector(config=config, weights=None if method in ("draem", "memae") else weights).fit(strips)
    bad, good = (detector.inspect(strips / f"test/{name}/00.png") for name in ("spot", "good"))
    assert bad.map.shape == (32, 128) and bad.image.shape == (32, 128, 3) and bad.size == (256, 64)
    if method in ("uranet", "nearest_neighbor", "mfrnet"):  # the others need more steps
        row, column = np.unravel_index(bad.map.argmax(), (32, 128))
        assert bad.score > good.score and 88 <= column <= 104 and 8 <= row <= 24
    detector.save(tmp_path / "strips.safetensors")
    import unflaw

    again = unflaw.load(tmp_path / "strips.safetensors").inspect(strips / "test/spot/00.png")
    assert again.score == bad.score and np.array_equal(again.map, bad.map)
    if (method, fit) in (("uranet", "pad"), ("mfrnet", "stretch"), ("draem", "stretch")):
        from unflaw.runtime.export import export

        other = unflaw.load(export(detector, tmp_path / "strips.onnx")).inspect(strips / "test/spot/00.png")
        assert other.score == pytest.approx(bad.score, rel=1e-3, abs=1e-3)
        np.testing.assert_allclose(other.map, bad.map, rtol=1e-2, atol=1e-2)


# The choice


def images(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for i, size in enumerate(sizes):
        paths.append(folder / f"{i:02d}.png")
        Image.new("L", size).save(paths[-1])
    return paths


def chosen(config: Config, paths: list[Path]) -> tuple[int | tuple[int, int], int, str]:
    made, said = fit_canvas(config, paths)
    return made.preparation.size, made.features.grid, said


@pytest.mark.parametrize(
    ("sizes", "size", "grid"),
    [
        ([(1024, 256)] * 3, (1024, 256), 32),
        ([(200, 800)] * 3, (256, 1024), 32),
        ([(640, 360)] * 3, (448, 256), 32),
        ([(4000, 500)] * 3, (1024, 128), 16),
        ([(9000, 300)] * 3, (1024, 32), 4),
        ([(1024, 1000)] * 3, 256, 32),
        ([(380, 256)] * 3, 256, 32),  # nearly a square
        ([(1024, 256), (256, 1024), (256, 256)], 256, 32),  # of different ratios
        ([(1024, 256)] * 9 + [(1100, 260)] * 7, (1024, 256), 32),  # of about the same
        ([(1024, 256)] * 15 + [(256, 256)], (1024, 256), 32),  # one odd image decides nothing
    ],
)
def test_the_canvas_follows_the_good_images(sizes, size, grid, tmp_path):
    found = chosen(make_config("nearest_neighbor"), images(tmp_path, *sizes))
    assert found[:2] == (size, grid)
    if size != 256:
        assert f"{size[0]} × {size[1]}" in found[2] and "--size 256" in found[2]
    else:
        assert found[2] == ""


def test_what_is_given_is_not_changed(tmp_path):
    paths = images(tmp_path, *[(1024, 256)] * 3)
    for asked in ({"preparation.size": 256}, {"preparation.fit": "pad"}, {"preparation.tile": 256}):
        config = make_config("nearest_neighbor", "cpu", asked)
        assert fit_canvas(config, paths) == (config, "")
    assert chosen(make_config("nearest_neighbor", "cpu", {"features.grid": 24}), paths)[:2] == ((1024, 256), 24)
    twice, _ = fit_canvas(make_config("uranet"), paths)
    assert fit_canvas(twice, images(tmp_path / "others", (64, 64))) == (twice, "")


def test_much_larger_images_are_named(tmp_path):
    size, grid, said = chosen(make_config("uranet"), images(tmp_path, *[(3072, 2560)] * 3))
    assert (size, grid) == (256, 32)
    assert "3072 × 2560" in said and "about 40 pixels" in said and "--set preparation.tile=512" in said


def test_images_that_cannot_be_read_choose_nothing(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert fit_canvas(make_config("uranet"), [tmp_path / "broken.png"])[1] == ""
    assert fit_canvas(make_config("uranet"), [])[1] == ""
    paths = [tmp_path / "broken.png", *images(tmp_path / "good", *[(1024, 256)] * 15)]
    assert fit_canvas(make_config("uranet"), paths)[0].preparation.size == (1024, 256)


@pytest.mark.slow
def test_the_command_says_what_it_chose(strips, weights, tmp_path):
    from unflaw.cli import app

    own = TINY | OWN["nearest_neighbor"] | {"features.grid": 8}
    given = [
        text
        for name, value in own.items()
        if name != "preparation.size"
        for text in ("--set", f"{name}={list(value) if isinstance(value, tuple) else value}")
    ]
    arguments = ["train", "--data", str(strips), "--method", "nearest_neighbor", "--weights", str(weights), *given]
    runner, model = CliRunner(), tmp_path / "strips.safetensors"
    done = runner.invoke(app, [*arguments, "--out", str(model)])
    assert done.exit_code == 0, done.output
    assert "256 × 64 pixels: the canvas is 1024 × 256 pixels" in " ".join(done.output.split())
    done = runner.invoke(app, [*arguments, "--out", str(model), "--size", "128x32"])
    assert done.exit_code == 0 and "the canvas is" not in done.output
    done = runner.invoke(app, ["evaluate", str(model), "--data", str(strips)])
    assert done.exit_code == 0 and "image_auroc 1.0000" in done.output, done.output
    done = runner.invoke(app, [*arguments, "--out", str(model), "--size", "wide"])
    assert done.exit_code == 2 and "512x224" in done.output


def test_one_side_of_an_image_in_a_region_of_no_pixels():
    with pytest.raises(ImageError):
        prepare(np.zeros((4, 4, 3), np.uint8), Preparation(size=(64, 32), roi=(10, 10, 20, 20)))
