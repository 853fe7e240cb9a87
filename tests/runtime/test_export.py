"""Agreement of exported detectors with the trained ones, and the content of exported files."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from tests.conftest import OWN, textured

from unflaw import load
from unflaw.detector import Detector
from unflaw.errors import DetectorError
from unflaw.imaging.reading import read
from unflaw.imaging.transforms import prepare
from unflaw.io.detector_file import read_metadata
from unflaw.io.listing import list_images
from unflaw.runtime.export import export
from unflaw.runtime.verification import compare

pytestmark = pytest.mark.slow


def agree(detector, path, images, tolerance=1e-4, **options):
    found = compare(detector, load(path, threads=1), images, tolerance=tolerance, **options)
    assert found.images == len(images) and found.agrees(tolerance), found


@pytest.fixture(scope="module")
def images(parts, odd_images):
    return [*list_images(parts / "test"), *odd_images]


# both kinds of canvas, since padding is part of the graph
@pytest.mark.parametrize(("method", "fit"), [(m, "pad" if m in ("uranet", "draem") else "stretch") for m in OWN])
def test_every_method_agrees_with_its_graph(method, fit, parts, weights, tiny, images, tmp_path):
    given = None if method in ("draem", "memae") else weights
    detector = Detector(config=tiny(method, **{"preparation.fit": fit}), weights=given).fit(parts)
    path = export(detector, tmp_path / "parts.onnx")
    # DRAEM's scores hardly vary after twelve steps: a deviation is 0.005 of float32 probabilities near 0.56
    agree(detector, path, images, 5e-3 if method == "draem" else 1e-4)
    result = load(path).inspect(images[0])
    assert result.layers.keys() == detector.inspect(images[0]).layers.keys()


def test_the_file_holds_the_metadata_of_the_detector(exported, detector):
    metadata = read_metadata(exported)
    how = metadata.pop("exported")
    assert metadata == json.loads(json.dumps(detector.metadata()))
    assert (how["to"], how["precision"], how["draws"]) == ("onnx", "fp32", detector.config.network.perception.draws)


def test_the_graph_is_standard_and_holds_no_paths_of_the_machine(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [i.name for i in model.graph.input] == ["images"]
    assert [o.name for o in model.graph.output] == ["map", "score", "mean", "uncertainty", "mask", "restored"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert b"site-packages" not in exported.read_bytes() and b"stack_trace" not in exported.read_bytes()


def test_draws_are_frozen(exported, parts):
    image = list_images(parts / "test")[0]
    first, second = (load(exported).inspect(image) for _ in range(2))
    assert first.score == second.score and (first.uncertainty == second.uncertainty).all()
    assert first.uncertainty.max() > 0


def test_categories_have_their_own_memories_in_one_graph(parts, weights, tiny, tmp_path):
    square = list_images(parts / "test/square")
    detector = Detector(config=tiny("nearest_neighbor", **{"preparation.fit": "pad"}), weights=weights)
    detector.fit({"plain": parts / "train/good", "odd": list_images(parts / "test")})
    detector.teach([textured(np.random.default_rng(5))], category="plain")  # its memory is longer now
    path = export(detector, tmp_path / "both.onnx")
    both = load(path)
    assert list(both.calibrations) == ["plain", "odd"]
    for category in both.calibrations:
        agree(detector, path, square, category=category)
    assert both.inspect(square[0], category="plain").score != both.inspect(square[0], category="odd").score
    work = [(image, category) for image in square for category in both.calibrations] * 3
    expected = [both.inspect(image, category=category).score for image, category in work]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda item: both.inspect(item[0], category=item[1]).score, work)) == expected
    with pytest.raises(DetectorError, match="needs a category"):
        both.inspect(square[0])
    owned = {name: values.numel() for name, values in detector.network.category_state().items()}
    numbers = sum(tensor.numel() for tensor in detector.network.state_dict().values()) + sum(owned.values())
    assert path.stat().st_size < 4 * numbers + 600_000  # weights once, memory banks twice


def test_half_the_bits_are_half_the_file(detector, export_again, exported, images, tmp_path):
    path = export_again(tmp_path / "half.onnx", precision="fp16")
    assert path.stat().st_size < 0.6 * exported.stat().st_size
    found = compare(detector, load(path), images)
    assert 0 < found.score < 0.1 and found.map < 0.1


def test_openvino_agrees_too(detector, export_again, images, tmp_path):
    pytest.importorskip("openvino")
    path = export_again(tmp_path / "parts.xml", to="openvino")
    agree(detector, path, images)
    weights = path.with_suffix(".bin")
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(DetectorError, match=r"parts\.bin: is not the file that belongs to parts\.xml"):
        load(path)
    with pytest.raises(DetectorError, match=r"name that file"):
        load(weights)
    weights.unlink()
    with pytest.raises(DetectorError, match=r"parts\.bin: is missing"):
        load(path)


def test_eight_bits_are_for_the_backbone(detector, export_again, parts, tmp_path):
    with pytest.raises(ValueError, match="--data"):
        export(detector, tmp_path / "small.onnx", precision="int8")
    good = [prepare(read(path), detector.config.preparation) for path in list_images(parts / "train/good")]
    path = export_again(tmp_path / "small.onnx", precision="int8", images=good)
    nodes = onnx.load(path).graph.node
    restored = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    eight = [node for node in nodes if node.op_type == "Conv" and node.input[1] in restored]
    whole = [node for node in nodes if node.op_type == "Conv" and node not in eight]
    assert eight and whole
    assert {node.domain for node in nodes} == {""}
    result = load(path).inspect(list_images(parts / "test/square")[0])
    assert result.score == result.score and result.map.shape == (64, 64)


def test_pixels_have_no_backbone_to_quantise(parts, tiny, tmp_path):
    detector = Detector(config=tiny("memae")).fit(parts)
    good = [prepare(read(path), detector.config.preparation) for path in list_images(parts / "train/good")]
    with pytest.raises(DetectorError, match="no backbone"):
        export(detector, tmp_path / "m.onnx", precision="int8", images=good)


def test_only_a_fitted_detector_can_be_exported(tiny, tmp_path):
    with pytest.raises(DetectorError, match="not learned"):
        export(Detector(config=tiny("memae")), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
