"""A graph's file must be what the manifest says before a library loads it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rcod_runtime import Upscaler
from rcod_runtime.bundle import open_bundle
from rcod_runtime.errors import BackendError, BundleError, HashMismatch
from rcod_runtime.manifest import sha256_file
from rcod_runtime.onnx_check import _Refused, _Walk
from rcod_runtime.onnx_ops import REQUIRED_INPUTS, required_inputs

Change = Callable[[onnx.ModelProto], object]


def agree(bundle: Path, name: str, **more: Any) -> None:
    """The manifest of somebody who may write it: it agrees with a changed file."""
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    file = bundle / f"onnx/{name}.onnx"
    raw["graphs"][name].update(bytes=file.stat().st_size, sha256=sha256_file(file), **more)
    path.write_text(json.dumps(raw))


def change_graph(bundle: Path, name: str, change: Change) -> None:
    path = bundle / f"onnx/{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    agree(bundle, name)


def outside(location: str, **numbers: int) -> Change:
    """The blur's weights become external data at ``location``."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "blur")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **numbers}.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def in_a_constant(model: onnx.ModelProto) -> None:
    outside("../../secret")(model)
    tensor = model.graph.initializer.pop(0)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["blur"], value=tensor))


def in_a_branch(model: onnx.ModelProto) -> None:
    in_a_constant(model)
    node = model.graph.node.pop(0)
    inner = helper.make_graph([node], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["i"], then_branch=inner))


def set_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


WRONG: dict[str, tuple[Change, str]] = {
    "a path that climbs": (outside("../../../etc/passwd"), "'../../../etc/passwd', a file that"),
    "an absolute path": (outside("/etc/passwd"), "'/etc/passwd', a file that the manifest"),
    "a file not listed": (outside("weights.bin"), "'weights.bin', a file that the manifest"),
    "a place in memory": (outside("*/_ORT_MEM_ADDR_/*", offset=4096), "_ORT_MEM_ADDR_"),
    "no location": (outside(""), "'', a file that the manifest"),
    "weights of a constant": (in_a_constant, "'../../secret'"),
    "weights inside a branch": (in_a_branch, "'../../secret'"),
    "fewer weights than the shape": (
        lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234"),
        "weights of 4 bytes, where the shape .* needs 324",
    ),
    "weights of many dimensions": (
        lambda m: m.graph.initializer[0].dims.extend([1] * 61),
        "weights of 65 dimensions, expected at most 64",
    ),
    "no weights": (lambda m: m.graph.initializer[0].ClearField("raw_data"), "weights of 0 bytes"),
    "weights of text": (lambda m: setattr(m.graph.initializer[0], "data_type", 8), "the type 8"),
    "sparse weights": (lambda m: m.graph.sparse_initializer.add(), "a sparse"),
    "operators of another domain": (
        lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"),
        "the domain 'com.microsoft'",
    ),
    "an operator set of another domain": (
        lambda m: m.opset_import.append(helper.make_opsetid("evil", 1)),
        "the domain 'evil'",
    ),
    "another opset": (
        lambda m: setattr(m.opset_import[0], "version", 2**63 - 1),
        "opset 20 .* found 9223372036854775807",
    ),
    "two opsets": (lambda m: m.opset_import.append(helper.make_opsetid("", 20)), "found 20, 20"),
    "an attribute that libraries cut off": (
        lambda m: m.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("blocksize", 2**53)),
        "an attribute 9007199254740992, expected 32 bits",
    ),
    "a negative one": (
        lambda m: m.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("x", [-(2**40)])),
        "an attribute -1099511627776",
    ),
    "an operator without its inputs": (
        lambda m: m.graph.node[0].ClearField("input"),
        "an operator 'Conv' without the 2 inputs it needs",
    ),
    "an operator with an empty input": (
        lambda m: m.graph.node[0].input.__setitem__(1, ""),
        "an operator 'Conv' without the 2",
    ),
    "functions": (lambda m: m.functions.add(name="f"), "a function"),
    "training steps": (lambda m: m.training_info.add(), "a training"),
    "another input": (lambda m: setattr(m.graph.input[0], "name", "x"), "inputs image .* found x"),
    "another output": (lambda m: m.graph.output.pop(), "outputs adaptive, m_l, z_lq"),
    "an input of another type": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 7),
        "image: expected float32 .* found type 7",
    ),
    "an input of another shape": (set_shape, r"image: expected float32 \('batch', 3.* found"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_graph_that_is_not_what_the_manifest_says_is_not_loaded(
    own_bundle: Path, case: str
) -> None:
    change, message = WRONG[case]
    change_graph(own_bundle, "encoder", change)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(own_bundle)
    assert "encoder.onnx" in str(caught.value)


def external(bundle: Path, data: bytes, **numbers: int) -> None:
    change_graph(bundle, "encoder", outside("encoder.data", **numbers))
    (bundle / "onnx/encoder.data").write_bytes(data)
    digest = sha256_file(bundle / "onnx/encoder.data")
    agree(bundle, "encoder", data_files={"onnx/encoder.data": digest})


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_listed_weights_beside_a_graph_are_loaded(
    bundle: Path, own_bundle: Path, photo: Callable[..., np.ndarray], backend: str
) -> None:
    model = onnx.load(bundle / "onnx/encoder.onnx")
    blur = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "blur"))
    external(own_bundle, b"12345678" + blur.tobytes(), offset=8, length=blur.nbytes)
    with Upscaler(bundle, backend=backend) as inline, Upscaler(own_bundle, backend=backend) as own:
        np.testing.assert_array_equal(own(photo()), inline(photo()))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"offset": 4}, "up to byte 328 of encoder.data, which has 324"),
        ({"offset": 2**63}, "up to byte 9223372036854776132"),
        ({"offset": -4}, "expected numbers"),
        ({"length": 320}, "weights of 320 bytes, where the shape"),
    ],
)
def test_weights_beyond_the_end_of_their_file_are_refused(
    own_bundle: Path, numbers: dict[str, int], message: str
) -> None:
    external(own_bundle, bytes(324), **numbers)
    with pytest.raises(BundleError, match=message):
        open_bundle(own_bundle)


def test_changed_weights_beside_a_graph_are_found(own_bundle: Path) -> None:
    external(own_bundle, bytes(324))
    (own_bundle / "onnx/encoder.data").write_bytes(b"x" + bytes(323))
    with pytest.raises(HashMismatch, match="encoder.data"):
        open_bundle(own_bundle)


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\xff\xff\xff\xff\x0f",  # a graph of 4 GB
        b"\x3a\x05abc",  # a graph that ends outside of the file
        b"\x0b",  # a group, which protobuf gave up
        b"\x08" + b"\xff" * 12,  # a number without end
        b"\x08\x80\x80\x80\x80\x90\x80\x80\x80\x80\x02",  # 2^64 + 2^32: cut to 64 bits, 2^32
        b"\xba\x80\x80\x80\x80\x02\x00",  # field 2^33 + 7: cut to 32 bits it is a graph
        b"<?xml version='1.0'?><net/>",  # another format that OpenVINO reads
    ],
)
def test_bytes_that_are_no_onnx_model_are_refused(own_bundle: Path, data: bytes) -> None:
    (own_bundle / "onnx/vpim.onnx").write_bytes(data)
    agree(own_bundle, "vpim")
    with pytest.raises(BundleError, match="vpim.onnx: expected an ONNX model"):
        open_bundle(own_bundle)


def test_a_graph_nested_without_end_is_refused(own_bundle: Path) -> None:
    def wrapped(field: int, inner: bytes) -> bytes:
        size, number = len(inner), bytearray()
        while True:
            number.append(size & 0x7F | (0x80 if size > 0x7F else 0))
            size >>= 7
            if not size:
                return bytes([field << 3 | 2]) + bytes(number) + inner

    data = b""
    for _ in range(1000):  # graph in attribute in node in graph ...
        data = wrapped(1, wrapped(5, wrapped(6, data)))
    (own_bundle / "onnx/vpim.onnx").write_bytes(wrapped(7, data))
    agree(own_bundle, "vpim")
    with pytest.raises(BundleError, match="nested more than"):
        open_bundle(own_bundle)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_output_of_another_shape_is_named_and_not_stretched(
    own_bundle: Path, photo: Callable[..., np.ndarray], backend: str
) -> None:
    """One grey plane would be spread over three by numpy; the file itself leaves its axes open."""

    def one_plane(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "three"
        model.graph.node.append(
            helper.make_node("ReduceMean", ["three", "plane"], ["image"], keepdims=1)
        )
        model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "plane"))
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "c"

    change_graph(own_bundle, "decoder", one_plane)
    with (
        Upscaler(own_bundle, backend=backend) as upscaler,
        pytest.raises(BackendError, match=r"output image: expected float32 \(1, 3, 64, 64\)"),
    ):
        upscaler(photo())


def test_openvino_refuses_a_shape_before_it_computes(
    own_bundle: Path, photo: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length beyond 32 bits became another one, and values went where no memory was (fuzz with
    seed 1, bundles 1489)."""

    def wide(model: onnx.ModelProto) -> None:
        shape = next(t for t in model.graph.initializer if t.name == "shape")
        shape.raw_data = np.array([0, 2**32 + 3, 4]).tobytes()

    change_graph(own_bundle, "vpim", wide)

    def run(*_: object) -> None:
        raise AssertionError("it computed")

    monkeypatch.setattr("rcod_runtime.backends.openvino_backend.OpenVinoSession.run", run)
    with (
        Upscaler(own_bundle, backend="openvino") as upscaler,
        pytest.raises(
            BackendError, match=r"vpim.onnx: output tokens: expected float32 \(1, 4, 3\)"
        ),
    ):
        upscaler(photo())


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_names_that_are_not_utf_8_are_a_typed_error(
    own_bundle: Path, backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """OpenVINO's binding raised UnicodeDecodeError (fuzz, bundles 290); ONNX Runtime's printed its
    second try to stdout, where commands print what they wrote."""
    path = own_bundle / "onnx/vpim.onnx"
    path.write_bytes(path.read_bytes().replace(b"AveragePool", b"Average\xff\xfeol"))
    agree(own_bundle, "vpim")
    with pytest.raises(BackendError, match="vpim.onnx"):
        Upscaler(own_bundle, backend=backend)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_names_in_messages_do_not_steer_the_terminal(own_bundle: Path, backend: str) -> None:
    def hostile(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "\x1b[2JWiped"

    change_graph(own_bundle, "vpim", hostile)
    with pytest.raises(BackendError) as caught:
        Upscaler(own_bundle, backend=backend)
    assert "\x1b" not in str(caught.value) and r"\x1b[2JWiped" in str(caught.value)


def test_needed_inputs_are_those_of_the_specification() -> None:
    """Of every operator, the least that a version from opset 17 on needs."""
    names = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    for name in names:
        needed = []
        for opset in range(17, onnx.defs.onnx_opset_version() + 1):
            with contextlib.suppress(onnx.defs.SchemaError):
                schema = onnx.defs.get_schema(name, opset)
                needed += [] if schema.deprecated else [schema.min_input]
        if needed:
            assert required_inputs(name) <= min(needed), name
            assert name not in REQUIRED_INPUTS or required_inputs(name) == min(needed), name


def test_an_attribute_has_one_tensor() -> None:
    """Messages of one field are joined: two of 4 numbers would be one of 4 x 4, with 4 numbers."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "weights")
    one = helper.make_attribute("value", tensor).SerializeToString()
    joined = onnx.AttributeProto.FromString(one + one)
    assert list(joined.t.dims) == [4, 4] and len(joined.t.raw_data) == 16
    _Walk("", {}).message("attribute", memoryview(one), 1)
    with pytest.raises(_Refused, match="several tensors in the place of one"):
        _Walk("", {}).message("attribute", memoryview(one + one), 1)
