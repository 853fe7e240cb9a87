"""Loading a file never executes what is in it, opens no other file, and takes no memory that the file only asks for."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from tests.hostile.targets import Material

import unflaw
from unflaw.detector import Detector
from unflaw.errors import DetectorError
from unflaw.features.backbones import WeightsError, create_backbone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.mktemp("material"))


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def as_archive(path, pickled: bytes) -> None:
    """Archive as written by torch.save, with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("name", ["x.safetensors", "x.onnx", "x.pt", "x.pth", "x.bin", "x.xml", "x"])
@pytest.mark.parametrize("archived", [False, True])
def test_a_pickle_is_executed_under_no_name(tmp_path, name, archived):
    mark, path = tmp_path / "executed", tmp_path / name
    pickled = pickle.dumps({"conv1.weight": Payload(mark)}, protocol=2)
    as_archive(path, pickled) if archived else path.write_bytes(pickled)
    with pytest.raises(DetectorError, match=str(path)):
        unflaw.load(path)
    with pytest.raises(WeightsError, match=str(path)):
        create_backbone("resnet18", (1, 2), path)
    assert not mark.exists()
    pickle.loads(pickled)  # the payload does work
    assert mark.exists()


def test_a_pickle_as_calibration_or_feature_file_is_not_executed(tmp_path):
    from unflaw.evaluation.bootstrap import PerImage

    mark, path = tmp_path / "executed", tmp_path / "x.npz"
    np.savez(path, names=np.array([Payload(mark)], dtype=object))
    with pytest.raises(ValueError):
        PerImage.load(path)
    assert not mark.exists()


def with_external(location: str) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    tensor = numpy_helper.from_array(np.ones(2, np.float32), "far")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "far"], ["y"])], "g", [x], [y], [tensor])
    model = helper.make_model(graph)
    helper.set_model_props(model, {"unflaw": "{}"})
    return model.SerializeToString()


@pytest.mark.parametrize("location", ["/etc/passwd", "../../../etc/passwd", "weights.bin", "/dev/zero", ""])
def test_a_graph_opens_no_other_file(tmp_path, location):
    path = tmp_path / "x.onnx"
    path.write_bytes(with_external(location))
    with pytest.raises(DetectorError, match="tensors in other files"):
        unflaw.load(path)


def test_an_openvino_graph_expands_nothing_and_opens_no_other_file(tmp_path):
    path = tmp_path / "x.xml"
    path.with_suffix(".bin").write_bytes(b"")
    laughs = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    for declared, used in ((f'<!ENTITY e0 "ha">{laughs}', "&e11;"), ('<!ENTITY e SYSTEM "file:///etc/passwd">', "&e;")):
        path.write_text(f'<!DOCTYPE net [{declared}]><net><rt_info><unflaw value="{used}"/></rt_info></net>')
        with pytest.raises(DetectorError) as caught:
            unflaw.load(path)
        assert "root:" not in str(caught.value) and len(str(caught.value)) < 1000


HUGE = {
    "network.widths": [8192] * 3,
    "network.items": 10**6,
    "network.side": 4096,
    "preparation.size": 4096,
}


@pytest.mark.parametrize("setting", HUGE)
def test_metadata_that_asks_for_much_gets_an_error_and_no_memory(material, tmp_path, setting):
    metadata = json.loads(json.dumps(material.metadata))
    room, field = setting.split(".")
    metadata["config"][room][field] = HUGE[setting]
    path = tmp_path / "x.safetensors"
    path.write_bytes(material.detector(json.dumps(metadata)))
    program = (
        "import resource, sys, unflaw\n"
        "from unflaw.errors import DetectorError\n"
        "import unflaw.detector\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    unflaw.load(sys.argv[1]); print('loaded')\n"
        "except DetectorError as error:\n    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60, check=True)
    said, megabytes = done.stdout.rsplit("\n", 2)[:2]
    assert int(megabytes) < 200
    if setting in ("network.widths", "network.items"):
        assert "do not fit its configuration" in said


def test_tensors_that_lie_about_their_place_are_refused(material, tmp_path):
    path = tmp_path / "x.safetensors"
    name = next(name for name in material.header if name != "__metadata__")
    for offsets in ([0, 2**40], [2**62, 2**63], [4, 0], [0, 3]):
        header = material.header | {name: material.header[name] | {"data_offsets": offsets}}
        path.write_bytes(material.detector(json.dumps(material.metadata), header))
        with pytest.raises(DetectorError, match=str(path)):
            unflaw.load(path)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{")
    with pytest.raises(DetectorError, match=str(path)):
        unflaw.load(path)


def test_category_names_are_no_paths(material, tmp_path):
    """All files of `predict` lie in its folder, for any names of categories."""
    path, out = tmp_path / "in/x.safetensors", tmp_path / "in/out"
    path.parent.mkdir()
    detector = Detector.load(material.model)
    detector.categories_ = {"../../../outside\n\x1b[31m": detector.categories_.pop("")}
    detector.save(path)
    before = {p for p in tmp_path.rglob("*")}
    command = [
        sys.executable,
        "-c",
        "from unflaw.cli import main; main()",
        "predict",
        path,
        material.parts / "test/good",
    ]
    done = subprocess.run(
        [*command, "--out", out, "--images", "--labelme"], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    made = {p for p in tmp_path.rglob("*")} - before
    assert made and all(p.is_relative_to(out) for p in made)
