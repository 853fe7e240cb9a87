from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import OWN, SIDE, make_parts, textured
from torch import Tensor
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.datasets import DatasetError, load_dataset
from unflaw.detector import Detector
from unflaw.errors import DetectorError, ImageError
from unflaw.imaging.reading import read
from unflaw.imaging.transforms import prepare
from unflaw.methods.synthesis import texture_images
from unflaw.report import figures, outline, overlay
from unflaw.report.figures import write_figures
from unflaw.report.panels import COVER, Column, colour_map, grey_map, sheet

pytestmark = pytest.mark.slow

FILES = {
    "uranet": ["perception", "restoration", "fasm"],
    "nearest_neighbor": ["retrieval"],
    "mfrnet": ["masks", "restoration"],
    "draem": ["repair", "anomalies"],
    "memae": ["reconstruction"],
}
QUICK = {"training.steps": 2, "training.precision": "float32"}
Shown = dict[str, tuple[dict[str, Column], list[tuple[list[str], dict[str, np.ndarray]]]]]


@pytest.fixture(scope="module")
def fitted(parts, weights, tiny) -> Callable[..., Any]:
    """`fitted(method, **changes)`: a detector after two steps, the same one for the same arguments."""
    made: dict[str, Any] = {}

    def fit(method: str, **changes: Any) -> Any:
        key = f"{method} {changes}"
        if key not in made:
            made[key] = Detector(config=tiny(method, **QUICK, **changes), weights=weights).fit(parts)
        return made[key]

    return fit


@pytest.fixture
def drawn(parts, tmp_path, monkeypatch) -> Callable[..., Shown]:
    """`drawn(detector, …)`: columns by heading and rows of what is laid out, by figure."""

    def draw(detector: Any, data: Path = parts, **options: Any) -> Shown:
        sheets: list[Any] = []

        def keep(columns: Any, rows: Any, notes: Any, width: int) -> Any:
            sheets.append(({column.heading: column for column in columns}, rows))
            return Image.new("RGB", (1, 1))  # how it is laid out is tested below

        monkeypatch.setattr(figures, "sheet", keep)
        written = write_figures(detector, load_dataset(data), tmp_path / "figures", **options)
        return {path.stem: shown for path, shown in zip(written, sheets, strict=True)}

    return draw


def covered(pixels: np.ndarray) -> np.ndarray:
    return (pixels == COVER).all(axis=2)


def upright(mask: Tensor) -> np.ndarray:
    """A mask (g, g) of {0, 1} at the size of the canvas."""
    step = SIDE // len(mask)
    return np.kron(mask.numpy(), np.ones((step, step))) == 1


def path_of(parts: Path, name: list[str]) -> Path:
    """The image of a row."""
    return parts / "test" / name[0] / name[1]


def features_of(detector: Any, paths: list[Path]) -> Tensor:
    pixels = [prepare(read(path), detector.config.preparation).pixels for path in paths]
    return detector.network.embed(torch.from_numpy(np.stack(pixels)))


# Files


@pytest.mark.parametrize("method", OWN)
def test_every_method_has_figures_the_same_for_the_same_seed(method, fitted, parts, tmp_path):
    dataset = load_dataset(parts)

    def write(folder: str, **options: Any) -> list[bytes]:
        written = write_figures(fitted(method), dataset, tmp_path / folder, count=2, width=700, **options)
        assert [path.relative_to(tmp_path / folder).as_posix() for path in written] == [
            f"{name}.png" for name in FILES[method]
        ]
        assert sorted(written) == sorted((tmp_path / folder).iterdir())
        assert all(600 < Image.open(path).width <= 700 for path in written)
        return [path.read_bytes() for path in written]

    first = write("first")
    assert write("again") == first
    assert all(a != b for a, b in zip(first, write("other", seed=1), strict=True))


# What is shown is what is said


def test_image_and_heat_map_are_those_of_the_inspection(fitted, drawn, parts):
    detector = fitted("nearest_neighbor")
    _, rows = drawn(detector, images=[Path("square/001.png"), parts / "test/good/002.png"])["retrieval"]
    truth = np.asarray(Image.open(parts / "ground_truth/square/001_mask.png"))
    for (name, tiles), path, mask in zip(rows, ("square/001.png", "good/002.png"), (truth, 0 * truth), strict=True):
        result = detector.inspect(parts / "test" / path)
        assert name == [*path.split("/"), f"verdict {result.verdict}", f"p {result.p_value:.2g}"]
        first, *_, last = tiles
        assert (first, last) == ("Image", "Heat map")
        assert np.array_equal(tiles["Image"], outline(result.image, mask))
        heat = overlay(result.image, result.map, detector.calibration_.scale)
        assert np.array_equal(tiles["Heat map"], outline(heat, mask))


def test_a_column_has_one_scale_that_its_bar_states(fitted, drawn, parts):
    detector = fitted("nearest_neighbor")
    columns, rows = drawn(detector)["retrieval"]
    paths = [path_of(parts, name) for name, _ in rows]
    distance = detector.network(features_of(detector, paths)).anomaly_maps
    sized = torch.nn.functional.interpolate(distance, (SIDE, SIDE), mode="bilinear")[:, 0].detach().numpy()
    column = columns["Distance to the memory"]
    assert column.marks == {0.0: "0", 1.0: f"{sized.max():.2g}"}
    assert np.array_equal(column.bar, colour_map(np.linspace(0, 1, 256)[None], 1))
    for (_, tiles), values in zip(rows, sized, strict=True):
        difference = tiles["Distance to the memory"].astype(int) - colour_map(values, sized.max())
        assert np.abs(difference).max() <= 1
    low, threshold = columns["Heat map"].marks.values()
    assert float(low) == pytest.approx(detector.calibration_.scale.low, rel=0.06)
    assert float(threshold) == pytest.approx(detector.calibration_.scale.threshold, rel=0.06)


def test_masks_are_the_detectors_disjoint_and_complete(fitted, drawn, parts):
    detector = fitted("mfrnet")
    _, rows = drawn(detector, count=2)["masks"]
    assert [name[-1] for name, _ in rows] == ["k = 1", "k = 2"] * 2
    for i, (name, tiles) in enumerate(rows):
        visible_by, kept_by = detector.network.visible[i % 2], detector.network.kept[i % 2]
        image = detector.inspect(path_of(parts, name)).image
        restored_by = []
        for number, (mask, keeping) in enumerate(zip(visible_by, kept_by, strict=True), 1):
            visible, restored = tiles[f"Visible {number}"], tiles[f"Restored {number}, drawn"]
            seen = ~covered(visible)
            assert np.array_equal(seen, upright(mask))
            assert np.array_equal(visible[seen], image[seen])
            restored_by.append(~covered(restored))
            assert np.array_equal(restored_by[-1], upright(keeping)) and not (restored_by[-1] & seen).any()
            assert np.array_equal(restored[restored_by[-1]], tiles["Assembled, drawn"][restored_by[-1]])
        assert (np.sum(restored_by, axis=0) == 1).all()


def test_of_many_masks_the_first_are_shown(fitted, drawn):
    changes = {"network.k": (1,), "network.n": 16, "network.margin": 1}
    _, ((_, tiles), *_) = drawn(fitted("mfrnet", **changes), count=1)["masks"]
    assert [name for name in tiles if name.startswith("Visible")] == [f"Visible {i}" for i in range(1, 5)]
    seen, kept = ~covered(tiles["Visible 2"]), ~covered(tiles["Restored 2, drawn"])
    assert not (seen & kept).any() and not (seen | kept).all()  # the margin is neither


@pytest.mark.parametrize("prototypes", [32, 0])
def test_what_is_assembled_is_restored_by_that_k(prototypes, fitted, parts):
    detector = fitted("mfrnet", **{"network.prototypes": prototypes})
    network = detector.network
    features = features_of(detector, [parts / "test/square/000.png"])
    rows = network.visualize(features, network(features))["masks"]
    both = network.restore(features)[0]
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    for (_, tiles), restored in zip(rows, both, strict=True):
        assert torch.allclose(tiles["Assembled, drawn"].values, restored, atol=1e-5)


def test_without_masks_nothing_is_covered(fitted, drawn):
    _, rows = drawn(fitted("mfrnet", **{"network.masked": False}), count=1)["masks"]
    ((name, tiles),) = rows
    assert name[-1] == "nothing hidden"
    assert not any(covered(pixels).any() for pixels in tiles.values())


@pytest.mark.parametrize(
    ("changes", "headings"),
    [
        ({}, ["L2", "1 - SSIM", "1 - GMS", "Hybrid", "Distance to the memory"]),
        ({"network.ssim": 0.0}, ["L2", "1 - GMS", "Hybrid", "Distance to the memory"]),
        (
            {"network.prototypes": 0, "network.regional_prototypes": 0, "network.pixel": 0.0},
            ["1 - SSIM", "1 - GMS", "Hybrid"],
        ),
    ],
)
def test_evidence_of_mfrnet_has_its_names(changes, headings, fitted, parts):
    network = fitted("mfrnet", **changes).network
    features = features_of(fitted("mfrnet", **changes), [parts / "test/square/000.png"])
    inspection = network(features)
    ((_, tiles),) = network.visualize(features, inspection)["restoration"]
    maps = {heading: stage.values for heading, stage in tiles.items() if stage.kind == "map"}
    if network.memory is not None:
        assert torch.equal(maps.pop("Regional distance"), inspection.regional[0])
    assert list(maps) == headings
    evidence = torch.cat([shown for heading, shown in maps.items() if heading in ("Hybrid", "Distance to the memory")])
    assert torch.equal(evidence, inspection.anomaly_maps[0])
    restored = network.restore(features)[0]
    terms = network.compare(features.expand_as(restored), restored)
    assert torch.allclose(maps["1 - GMS"], terms["gms"].mean(0), atol=1e-5)


def test_perception_shows_the_layers_of_the_inspection(fitted, drawn, parts):
    detector = fitted("uranet", **{"network.perception.mean_threshold": 0.01})
    _, rows = drawn(detector)["perception"]
    marked = []
    for name, tiles in rows:
        layers = detector.inspect(path_of(parts, name)).layers
        assert np.array_equal(tiles["M_final"], grey_map(layers["mask"]))
        assert np.abs(tiles["U, mean map"].astype(int) - grey_map(layers["mean"])).max() <= 1
        marked.append(((tiles["M_U, anomalous"] == 255) <= (tiles["M_final"] == 255)).all())
    assert all(marked)
    largest = max(detector.inspect(path_of(parts, name)).layers["uncertainty"].max() for name, _ in rows)
    for name, tiles in rows:
        uncertainty = detector.inspect(path_of(parts, name)).layers["uncertainty"]
        assert np.abs(tiles["V, uncertainty"].astype(int) - colour_map(uncertainty, largest)).max() <= 2


def test_m_u_leaves_out_what_is_only_ambiguous(fitted, parts):
    network = fitted("uranet").network
    features = features_of(fitted("uranet"), [parts / "test/square/000.png"])
    inspection = network(features)
    limits = network.perception.thresholds.clone()
    try:
        network.perception.thresholds.copy_(torch.tensor([2.0, 0.0]))  # nothing anomalous, all ambiguous
        ((_, tiles),) = network.visualize(features, network(features))["perception"]
        assert tiles["M_U, anomalous"].values.sum() == 0
        assert tiles["M_final"].values.all()
    finally:
        network.perception.thresholds.copy_(limits)
    ((_, tiles),) = network.visualize(features, inspection)["restoration"]
    restored = tiles["Restored, drawn"].values
    assert torch.allclose(tiles["Residual"].values[0], (features[0] - restored).norm(dim=0), atol=1e-5)
    assert torch.equal(tiles["Distance to the memory"].values[0], inspection.anomaly_maps[0, 1])
    assert torch.equal(tiles["Regional residual"].values, inspection.regional[0, :1])
    assert torch.equal(tiles["Regional distance"].values, inspection.regional[0, 1:])


def test_without_a_memory_there_is_no_distance(fitted, drawn):
    without = {"network.restoration.prototypes": 0, "network.restoration.regional_prototypes": 0}
    shown = drawn(fitted("uranet", **without), count=1)
    columns, _ = shown["restoration"]
    residuals = ["Residual", "Regional residual"]
    assert list(columns) == ["Image", "Features, drawn", "Restored, drawn", *residuals, "Heat map"]
    assert list(shown) == FILES["uranet"]


# FASM


@pytest.fixture
def exercised(fitted, parts) -> Any:
    """Good images (4, 3, S, S), textures, and the rows of FASM on them."""
    detector = fitted("uranet")
    preparation = detector.config.preparation
    paths = sorted((parts / "test/good").iterdir())
    images = torch.from_numpy(np.stack([prepare(read(path), preparation).pixels for path in paths]))
    textures = torch.from_numpy(np.stack(texture_images(None, preparation)))
    with torch.no_grad():
        rows = detector.network.visualize_training(images, textures, torch.Generator().manual_seed(3))["fasm"]
    return detector.network, images, textures, rows


def test_altered_features_are_those_of_the_source_shown(exercised):
    network, images, textures, rows = exercised
    assert [name for name, _ in rows] == ["textures", "others", "shuffles", "jitter"]
    candidates = torch.cat([images, textures])
    features, (_, _, grid, _) = network.embed(candidates), network.embed(images).shape
    step = SIDE // grid
    for i, (name, tiles) in enumerate(rows):
        mask, altered = tiles["Mask M, the label"].values[0], tiles["beta 1: altered, drawn"].values
        assert torch.equal(tiles["Good image"].values, images[i])
        assert ("Foreign T, its source" in tiles) == (name != "jitter")
        assert mask.any()
        for y, x in mask.nonzero().tolist() if name != "jitter" else []:
            shown = tiles["Foreign T, its source"].values[:, step * y :, step * x :][:, :step, :step]
            cells = torch.nn.functional.unfold(candidates, step, stride=step).view(len(candidates), 3, step, step, -1)
            same = (cells - shown[None, ..., None]).abs().amax((1, 2, 3)) < 1e-6
            assert same.sum() >= 1
            image, place = same.nonzero()[0].tolist()
            origin = {"textures": image >= len(images), "others": image != i, "shuffles": image == i}
            assert origin[name]
            assert torch.allclose(altered[:, y, x], features[image].flatten(1)[:, place], atol=1e-4)


def test_distance_grows_with_beta_under_the_mask_only(exercised):
    network, images, _, rows = exercised
    clean = network.embed(images)
    limits = set()
    for i, (_, tiles) in enumerate(rows):
        mask = tiles["Mask M, the label"].values[0] == 1
        weak, strong = (tiles[f"beta {beta}: distance from clean"] for beta in (0.2, 1))
        assert (strong.values[0][~mask] == 0).all() and (strong.values[0][mask] > 0).all()
        assert torch.allclose(weak.values, 0.2 * strong.values, atol=1e-4)
        altered = tiles["beta 1: altered, drawn"].values
        assert torch.allclose(strong.values[0], (altered - clean[i]).norm(dim=0), atol=1e-4)
        with torch.no_grad():
            seen = network(altered[None]).layers["mean"][0]
        assert torch.equal(tiles["beta 1: U of UIAPM"].values, seen)
        limits |= {weak.limit, strong.limit}
    assert limits == {max(float(t["beta 1: distance from clean"].values.max()) for _, t in rows)}


def test_sources_of_no_weight_are_not_shown(fitted, drawn):
    changes = {"network.synthesis.textures": 0.0, "network.synthesis.shuffles": 0.0}
    _, rows = drawn(fitted("uranet", **changes), count=1)["fasm"]
    assert [name for name, _ in rows] == [["others"], ["jitter"]]


def test_the_seed_decides_what_is_made(fitted, drawn):
    shown = [drawn(fitted("uranet"), count=1, seed=seed)["fasm"][1] for seed in (0, 1)]
    masks = [{tiles["Mask M, the label"].tobytes() for _, tiles in rows} for rows in shown]
    assert masks[0].isdisjoint(masks[1])


# Pixels


def test_draem_alters_under_the_mask_only_and_shows_both_networks(fitted, parts):
    detector = fitted("draem")
    preparation = detector.config.preparation
    paths = sorted((parts / "test/good").iterdir())
    images = torch.from_numpy(np.stack([prepare(read(path), preparation).pixels for path in paths]))
    textures = torch.from_numpy(np.stack(texture_images(None, preparation)))
    with torch.no_grad():
        rows = detector.network.visualize_training(images, textures, torch.Generator().manual_seed(3))["anomalies"]
        assert len(rows) == len(images)
        for image, (_, tiles) in zip(images, rows, strict=True):
            inside = tiles["Mask M, the label"].values[0] == 1
            altered = tiles["Altered"].values
            same = (altered == image).all(0)
            assert torch.equal(tiles["Good image"].values, image)
            assert inside.any() and same[~inside].all() and not same[inside].any()
            inspection = detector.network(altered[None])
            assert torch.allclose(tiles["Repair"].values, inspection.restored[0], atol=1e-6)
            assert torch.allclose(tiles["Probability of anomaly"].values, inspection.anomaly_maps[0], atol=1e-6)


def test_memae_shows_the_error_of_its_reconstruction(fitted, parts):
    network = fitted("memae").network
    image = features_of(fitted("memae"), [parts / "test/square/000.png"])
    with torch.no_grad():
        ((_, tiles),) = network.visualize(image, network(image))["reconstruction"]
    seen, made = tiles["Image it sees"].values, tiles["Reconstruction"].values
    assert torch.equal(seen, image[0])
    assert torch.allclose(tiles["Squared error"].values[0], (seen - made).square().mean(0), atol=1e-6)


# Choices and errors


def test_kinds_of_defects_take_turns_and_a_quarter_is_good(fitted, drawn, tmp_path):
    data = make_parts(tmp_path / "parts", good=5, bad=3)
    for kind in ("dent", "hole"):
        (data / "test" / kind).mkdir()
        for i in range(3):
            Image.fromarray(textured(np.random.default_rng(i))).save(data / f"test/{kind}/{i}.png")

    def shown(**options: Any) -> list[str]:
        return [name[0] for name, _ in drawn(fitted("memae"), data, **options)["reconstruction"][1]]

    assert shown(count=1) == ["dent"]
    assert shown() == ["dent", "hole", "square", "good"]
    assert shown(count=8) == ["dent", "hole", "square", "dent", "hole", "square", "good", "good"]
    assert shown(count=12) == 3 * ["dent", "hole", "square"] + 3 * ["good"]
    assert shown(images=[Path("good/001.png"), data / "test/dent/../hole/2.png"]) == ["good", "hole"]


def test_data_without_defects_shows_good_images(fitted, drawn, tmp_path):
    data = make_parts(tmp_path / "parts", bad=0)
    (data / "test/square").rmdir()
    names = [name[:2] for name, _ in drawn(fitted("nearest_neighbor"), data, count=3)["retrieval"][1]]
    assert len(names) == 3 and {folder for folder, _ in names} == {"good"}


def test_data_without_good_test_images_shows_training_on_those_to_train_on(fitted, drawn, tmp_path):
    data = make_parts(tmp_path / "parts", good=0)
    (data / "test/good").rmdir()
    shown = drawn(fitted("draem"), data, count=3)
    assert [name[0] for name, _ in shown["repair"][1]] == 3 * ["square"]
    assert len(shown["anomalies"][1]) == 4


def test_without_a_decoder_nothing_is_said_to_be_drawn(fitted, drawn, parts):
    shown = drawn(fitted("uranet", **{"training.display_steps": 0}), count=1)
    assert list(shown) == FILES["uranet"]
    headings = [heading for columns, _ in shown.values() for heading in columns]
    assert "Residual" in headings and not any("drawn" in heading for heading in headings)


def test_padding_is_not_shown(fitted, drawn, tmp_path):
    data = make_parts(tmp_path / "parts")
    wide = textured(np.random.default_rng(1))[16:48]
    Image.fromarray(wide).save(data / "test/good/wide.png")
    detector, given = fitted("nearest_neighbor", **{"preparation.fit": "pad"}), []
    network = detector.network
    network.register_forward_pre_hook(lambda _, args: given.append(args[1].valid))
    ((_, tiles),) = drawn(detector, data, images=[Path("wide.png")])["retrieval"][1]
    assert {pixels.shape for pixels in tiles.values()} == {(32, 64, 3)}
    assert np.array_equal(tiles["Image"], wide)
    grid = network.features.shape[0]
    assert given[-1][0].sum() == grid * grid / 2  # nor does it take part in what is shown


def test_what_cannot_be_shown_is_said(fitted, tiny, parts, weights, tmp_path):
    detector, dataset, out = fitted("memae"), load_dataset(parts), tmp_path / "figures"
    for given, message in (
        ("no.png", "no.png: is not among the test images of parts; name one as in square/003.png"),
        ("000.png", "000.png: is the name of 2 of the test images"),
        (parts / "train/good/000.png", "is not among"),
    ):
        with pytest.raises(DatasetError, match=message):
            write_figures(detector, dataset, out, images=[Path(given)])
    for options in ({}, {"images": [Path("000.png")]}):
        with pytest.raises(DatasetError, match="good: there are no test images to show"):
            write_figures(detector, load_dataset(parts / "train/good"), out, **options)
    with pytest.raises(DetectorError, match="has not learned yet"):
        write_figures(Detector(config=tiny("memae"), weights=weights), dataset, out)
    assert not out.exists()
    broken = make_parts(tmp_path / "parts")
    (broken / "test/square/000.png").write_text("no image")
    with pytest.raises(ImageError, match=r"000\.png"):
        write_figures(detector, load_dataset(broken), out, images=[Path("square/000.png")])


# The sheet


def test_a_sheet_has_its_images_in_rows_and_columns():
    red, blue, green = (np.full((8, 16, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200), (0, 200, 0)))
    bar = np.full((1, 4, 3), (90, 0, 90), np.uint8)
    columns = [Column("a"), Column("b", bar, {0.0: "0", 1.0: "9"})]
    drawn = np.asarray(sheet(columns, [(["one"], {"a": red, "b": blue}), (["two"], {"b": green})], ["a note"]))

    def box(colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
        y, x = np.nonzero((drawn == colour).all(axis=2))
        assert len(y) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)  # a whole rectangle
        return x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()

    (rx, ry, *size), (bx, by, *same), (gx, gy, *last) = box((200, 0, 0)), box((0, 0, 200)), box((0, 200, 0))
    assert size == same == last == [240, 120]
    assert ry == by < by + 120 < gy and gx == bx > rx + 240
    assert box((90, 0, 90))[:2] == (bx, gy + 120 + 6)
    assert (drawn[gy : gy + 120, rx : rx + 240] == 255).all()  # nothing where there is none
    assert (drawn[gy + 140 :, :rx] < 128).any()  # the note


def test_many_columns_keep_to_the_width():
    row = {str(i): np.zeros((64, 64, 3), np.uint8) for i in range(12)}
    drawn = sheet([Column(heading) for heading in row], [(["a name that is far too long " * 9], row)])
    assert 1300 < drawn.width <= 1400


# The command


def test_the_command(fitted, parts, tmp_path):
    model = tmp_path / "memae.safetensors"
    fitted("memae").save(model)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["figures", str(model), "--data", str(parts), *map(str, arguments)])

    out = tmp_path / "deep/figures"
    done = run("--out", out, "--image", "square/001.png", "--image", "good/000.png", "--seed", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(out / "reconstruction.png")]
    options: dict[str, Any] = {"images": [Path("square/001.png"), Path("good/000.png")], "seed": 1}
    (same,) = write_figures(fitted("memae"), load_dataset(parts), tmp_path / "same", **options)
    assert (out / "reconstruction.png").read_bytes() == same.read_bytes()
    heights = []
    for count in (1, 3):
        assert run("--out", out, "--count", count).exit_code == 0
        heights.append(Image.open(out / "reconstruction.png").height)
    assert heights[1] > 2 * heights[0]
    assert run("--out", out, "--width", 700).exit_code == 0
    assert 600 < Image.open(out / "reconstruction.png").width <= 700
    wrong = run("--out", out, "--image", "no.png")
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: no.png: is not among")
    assert run("--out", out, "--count", 0).exit_code == 2
