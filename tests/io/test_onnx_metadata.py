"""The wire format of ONNX files, read without ONNX, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from unflaw.io.onnx_metadata import read_properties


def made(nodes=None, tensors=(), functions=(), properties=None):
    nodes = nodes or [helper.make_node("Add", ["x", "w"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    weights = [numpy_helper.from_array(np.ones(2, np.float32), "w"), *tensors]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), functions=functions)
    helper.set_model_props(model, {"unflaw": "{}"} if properties is None else properties)
    return model


def elsewhere(path="../../etc/passwd"):
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "far")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=path)
    return tensor


@given(st.dictionaries(st.text(max_size=300), st.text(max_size=300), max_size=4))
@settings(max_examples=40)
def test_properties_are_those_that_onnx_writes(properties):
    assert read_properties(made(properties=properties).SerializeToString()) == properties


def in_a_branch(tensor):
    inner = helper.make_tensor_value_info("v", TensorProto.FLOAT, [2])
    then, other = (
        helper.make_graph([helper.make_node("Constant", [], ["v"], value=value)], "b", [], [inner])
        for value in (tensor, numpy_helper.from_array(np.ones(2, np.float32)))
    )
    return made([helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)])


def sparse(tensor):
    model = made()
    indices = numpy_helper.from_array(np.array([0, 1]), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [4]))
    return model


@pytest.mark.parametrize(
    "model",
    [
        made(tensors=[elsewhere()]),
        made([helper.make_node("Constant", [], ["y"], value=elsewhere("/etc/passwd"))]),
        in_a_branch(elsewhere("weights.bin")),
        sparse(elsewhere()),
    ],
    ids=["initializer", "constant", "branch", "sparse"],
)
def test_tensors_in_other_files_are_refused(model):
    with pytest.raises(ValueError, match="tensors in other files"):
        read_properties(model.SerializeToString())


def test_a_location_alone_is_refused():
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "w2")
    tensor.data_location = TensorProto.EXTERNAL
    with pytest.raises(ValueError, match="tensors in other files"):
        read_properties(made(tensors=[tensor]).SerializeToString())


def test_operators_of_others_and_functions_are_refused():
    custom = made([helper.make_node("Run", ["x"], ["y"], domain="evil.ops")])
    with pytest.raises(ValueError, match=r"operators of evil\.ops"):
        read_properties(custom.SerializeToString())
    body = helper.make_node("Relu", ["a"], ["b"])
    function = helper.make_function("mine", "F", ["a"], ["b"], [body], [helper.make_opsetid("", 18)])
    with pytest.raises(ValueError, match="functions"):
        read_properties(made(functions=[function]).SerializeToString())


def _length(size):
    return (size,) if size < 128 else (size & 127 | 128, size >> 7)


def test_what_is_nested_too_deep_is_refused():
    graph = b""
    for _ in range(20):  # a node's attribute is a graph with a node
        for field in (6, 5, 1):
            graph = bytes([field << 3 | 2, *_length(len(graph))]) + graph
    model = bytes([7 << 3 | 2, *_length(len(graph))]) + graph
    with pytest.raises(ValueError, match="too deep"):
        read_properties(model)


@given(st.data())
@settings(max_examples=300)
def test_damage_is_an_error_or_harmless(data):
    content = bytearray(made().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    try:
        read_properties(bytes(content))
    except ValueError:  # UnicodeDecodeError is one
        return


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"\x08", bytes(64), b"\xff" * 20])
def test_other_files_are_no_models(content):
    with pytest.raises(ValueError, match=r"ONNX model|ends too early"):
        read_properties(content)
