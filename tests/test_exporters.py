"""Exported files of every format against the model: all injections, outputs and sizes, and their descriptions."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from ai_edge_litert import schema_py_generated
from ai_edge_litert.interpreter import Interpreter
from flax import nnx
from ml_collections import ConfigDict

from tests.parity import INJECTIONS, distance, settings_for
from tests.test_folding import randomized
from topformer_jax import config, models
from topformer_jax.exporters import (
    exported,
    litert_file,
    network,
    onnx_file,
    onnx_graph,
    stablehlo_file,
    verification,
)
from topformer_jax.exporters.exported import Exported
from topformer_jax.exporters.onnx_graph import Graph, Value
from topformer_jax.ops.resample import axis_matrix_of, bilinear_matrix, pooling_matrix
from topformer_jax.runtime.errors import UserError

FORMATS: dict[str, Any] = {"onnx": onnx_file, "tflite": litert_file, "stablehlo": stablehlo_file}
SIZE = (70, 99)


@dataclasses.dataclass
class Exporter:
    """A model with random BatchNorms, or fresh ones, with which labels differ from pixel to pixel; and its files."""

    settings: ConfigDict
    prepare: Callable[[Any], Any] = randomized

    @functools.cached_property
    def model(self) -> Any:
        return self.prepare(models.build(self.settings))

    def expected(self, images: np.ndarray, output: str, stride: int = 1) -> np.ndarray:
        function = network.make_function(self.model, output, stride, conv_impl="auto", fold=False)
        return np.asarray(jax.jit(function)(images))

    def export(self, format: str, output: str = "logits", stride: int = 1, **changes: Any) -> bytes:
        function = network.make_function(self.model, output, stride, by_rows=FORMATS[format].BY_ROWS)
        facts = describe(output=output, stride=stride, config=self.config, **changes)
        return bytes(FORMATS[format].write(function, facts))

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads(self.settings.to_json()))


def describe(**changes: Any) -> dict[str, Any]:
    facts = {"size": SIZE, "target": "cpu", "precision": "float32", "versions": {"topformer_jax": "0"}}
    return {"output": "logits", "stride": 1, "config": {}} | facts | changes


def open_data(format: str, data: bytes, **changes: Any) -> Exported:
    holds = FORMATS[format].HOLDS_DESCRIPTION
    return exported.open_bytes("FILE", data, FORMATS[format], None if holds else describe(**changes))


def pictures(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth ones: a random network makes much of little in noise."""
    random = np.random.default_rng(0)
    rows, columns = np.arange(size[0])[:, None, None] / 40, np.arange(size[1])[:, None] / 40
    waves = np.sin(rows * random.normal(size=3) + columns * random.normal(size=3) + random.normal(size=3))
    shift = random.integers(0, 20, (count, 1, 1, 1))
    return (120 + 90 * waves + shift).clip(0, 255).astype(np.uint8)


def fresh(model: Any) -> Any:
    model.eval()
    return model


@functools.cache
def tiny(prepare: Callable[[Any], Any] = randomized) -> Exporter:
    return Exporter(settings_for("tiny"), prepare)


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        *(("onnx", settings_for("tiny", model__injection=kind)) for kind in INJECTIONS),
        ("onnx", config.cityscapes("base")),  # neither the head's width nor its convolutions are the others'
        ("tflite", config.cityscapes("base")),
        ("tflite", settings_for("tiny", model__injection="fuse_multi")),
        ("stablehlo", settings_for("small")),
    ],
)
def test_logits(format: str, settings: ConfigDict) -> None:
    exporter = Exporter(settings)
    file = open_data(format, exporter.export(format), output="logits", config=exporter.config)
    for count in (1, 2) if format == "onnx" else (2,):
        assert distance(file(pictures(count)), exporter.expected(pictures(count), "logits")) < 1e-5


@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_any_size(format: str) -> None:
    file = open_data(format, tiny().export(format, size=None), size=None)
    for size in [(1, 1), (33, 64), SIZE]:
        assert distance(file(pictures(2, size)), tiny().expected(pictures(2, size), "logits")) < 1e-5


def test_stablehlo_needs_jax_alone(tmp_path: pathlib.Path) -> None:
    """And is for CPUs, GPUs and TPUs."""
    (tmp_path / "file").write_bytes(tiny().export("stablehlo", size=None))
    np.save(tmp_path / "images.npy", pictures(2, (33, 64)))
    program = """
import sys
import jax.export
import numpy as np
exported = jax.export.deserialize(bytearray(open("file", "rb").read()))
np.save("logits.npy", jax.jit(exported.call)(np.load("images.npy")))
print(*exported.platforms, "topformer_jax" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "cpu cuda tpu False\n"
    expected = tiny().expected(pictures(2, (33, 64)), "logits")
    assert distance(np.load(tmp_path / "logits.npy"), expected) < 1e-5


@pytest.mark.parametrize(
    ("format", "output", "stride"),
    [
        *((format, "labels", 1) for format in FORMATS),
        ("onnx", "labels", 8),
        ("stablehlo", "labels", 2),
        ("tflite", "probabilities", 4),
        ("onnx", "probabilities", 4),
    ],
)
def test_outputs(format: str, output: str, stride: int) -> None:
    drawn = tiny(fresh)
    file = open_data(format, drawn.export(format, output, stride), output=output, stride=stride)
    found, expected = file(pictures(2)), drawn.expected(pictures(2), output, stride)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.shape[1:3] == tuple(-(-side // stride) for side in SIZE)
    if output == "labels":
        assert len(np.unique(expected)) > 2
        assert (found != expected).mean() < 1e-4
    else:
        assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_the_classifier(format: str) -> None:
    classifier = Exporter(config.imagenet("tiny"))
    facts = {"output": "scores", "config": classifier.config}
    file = open_data(format, classifier.export(format, "scores", size=(64, 64)), size=(64, 64), **facts)
    found = file(pictures(2, (64, 64)))
    assert found.shape == (2, 1000)
    assert distance(found, classifier.expected(pictures(2, (64, 64)), "scores")) < 1e-5
    if format != "tflite":
        any_size = open_data(format, classifier.export(format, "scores", size=None), size=None, **facts)
        assert distance(any_size(pictures(1)), classifier.expected(pictures(1), "scores")) < 1e-5


def test_the_target_web_has_no_resize() -> None:
    """WebGPU computes it wrongly."""
    drawn = tiny(fresh)
    data = {target: drawn.export("onnx", "labels", size=None, target=target) for target in ("cpu", "web")}
    operations = {
        target: Counter(node.op_type for node in onnx.load_from_string(file).graph.node)
        for target, file in data.items()
    }
    assert operations["cpu"]["Resize"] == 1
    assert operations["web"]["Resize"] == 0
    labels = [open_data("onnx", file)(pictures(2, (96, 64))) for file in data.values()]
    assert (labels[0] != labels[1]).mean() < 1e-4


def test_an_onnx_graph_is_as_small_as_one_that_was_written_for_onnx() -> None:
    model = onnx.load_from_string(tiny().export("onnx"))
    operations = Counter(node.op_type for node in model.graph.node)
    assert operations["Conv"] == 66
    assert operations["Transpose"] <= 42  # 8 a block of attention, the input, the resizes, the output
    assert sum(operations.values()) < 330
    assert [dimension.dim_param for dimension in model.graph.input[0].type.tensor_type.shape.dim][:1] == ["n"]


@pytest.mark.parametrize(("size", "pools"), [((128, 64), 4), ((70, 99), 0)])
def test_a_litert_file_has_operations_of_its_own(size: tuple[int, int], pools: int) -> None:
    """No product with a matrix where LiteRT has an operation: poolings of windows that overlap stay products."""
    file = Interpreter(model_content=tiny().export("tflite", "labels", size=size))
    operations = Counter(operation["op_name"] for operation in file._get_ops_details())
    assert (operations["RESIZE_BILINEAR"], operations["AVERAGE_POOL_2D"]) == (9, pools)
    assert operations["FULLY_CONNECTED"] == 2 * (4 - pools)


@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_equal_exports_have_equal_bytes(format: str) -> None:
    assert tiny().export(format) == tiny().export(format)


def test_weights_of_16_bits() -> None:
    whole = tiny().export("tflite")
    data = {"float32": whole, "float16": litert_file.lower_precision(whole, describe(precision="float16"))}
    assert len(data["float16"]) < 0.56 * len(data["float32"])
    found = open_data("tflite", data["float16"])(pictures(2))
    assert 1e-6 < distance(found, tiny().expected(pictures(2), "logits")) < 2e-2


def test_parts_that_stay_float() -> None:
    """Their results are closer to the model's; the others stay integers."""
    whole = tiny().export("tflite")

    def convolutions(*parts: str) -> tuple[Counter[str], float]:
        facts = describe(precision="int8", keep_float=parts)
        data = litert_file.lower_precision(whole, facts, list(pictures(4)))
        tensors = Interpreter(model_content=data).get_tensor_details()
        kinds = Counter(tensor["dtype"].__name__ for tensor in tensors if "conv_general_dilated" in tensor["name"])
        found = open_data("tflite", data)(pictures(2))
        return kinds, distance(found, tiny().expected(pictures(2), "logits"))

    (all_kinds, all_distance), (kinds, found) = convolutions(), convolutions("pixels", "tpm", "decode_head")
    assert all_kinds["float32"] == 0
    assert kinds["float32"] > 15
    assert kinds["int8"] > 15
    assert found < 0.8 * all_distance
    with pytest.raises(UserError, match=r"^--keep-float layer99: expected .*SIM.*layer1.*pixels.*tpm.*trans"):
        convolutions("layer99")


def test_a_file_for_a_newer_runtime_is_one_line() -> None:
    model = onnx.load_from_string(tiny().export("onnx"))
    model.opset_import[0].version = 999
    del model.metadata_props[-1]  # the checksum
    with pytest.raises(UserError, match=r"^FILE needs a newer onnxruntime than"):
        open_data("onnx", model.SerializeToString())


def test_an_unknown_primitive_is_named() -> None:
    program = jax.make_jaxpr(lambda x: jnp.sinh(x))(jnp.ones(3))
    graph = Graph()
    with pytest.raises(NotImplementedError, match="no ONNX rule for JAX's sinh"):
        onnx_graph.translate(graph, program, [graph.add_input("x", (3,), "float32")], {})


def test_a_wrong_file_is_refused() -> None:
    drawn = tiny(fresh)
    right = jax.jit(network.make_function(drawn.model, "logits"))

    def check(change: Callable[[np.ndarray], np.ndarray]) -> None:
        facts = describe(output="logits", stride=1, precision="float16")
        file = Exported("FILE", lambda images: change(np.array(right(images))), facts)
        assert "compared in its runtime at 70x99" in verification.verify(file, drawn.model)

    check(lambda values: values)
    with pytest.raises(UserError, match=r"the exported file differs from the model: .* nothing was written"):
        check(lambda values: values[..., ::-1])
    with pytest.raises(UserError, match="the logits differ by nan % of their spread"):
        check(lambda values: values * np.nan)
    with pytest.raises(UserError, match=r"gives \w+ \(1, .*, 1\) where the model gives"):
        check(lambda values: values[..., None])


def dead_layers(model: Any) -> Iterator[tuple[str, dict[str, jax.Array]]]:
    """The weights of a model without one layer, in turn: its outputs are 0, or those before its BatchNorm are.

    Scores of attention are dead without queries, its results without values.
    """
    tensors = models.state_dict(model)
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and tensor.ndim > 1:
            block = layer.rpartition(".")[0]
            yield f"{layer}, constant", tensors | {name: jnp.zeros_like(tensor)}
            shifts = [f"{layer}.bias", f"{block}.bn.weight", f"{block}.bn.bias"]
            zeros = {key: jnp.zeros_like(tensors[key]) for key in [name, *shifts] if key in tensors}
            yield f"{layer}, zero", tensors | zeros


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_any_dead_layer_is_outside_of_the_limits(output: str) -> None:
    """In float32, of a network of fresh weights, in which a layer matters least."""
    model = tiny(fresh).model
    graphdef = nnx.graphdef(model)

    @jax.jit
    def run(tensors: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        model = models.merge_state_dict(graphdef, tensors)
        return network.make_function(model, output, conv_impl="auto", fold=False)(images)

    images = jnp.asarray(verification.draw_images((96, 128)))
    right = np.asarray(run(models.state_dict(model), images))
    least = math.inf
    for name, tensors in dead_layers(model):
        found = verification.Comparison(output, [np.asarray(run(tensors, images))], [right])
        assert not found.is_within(verification.LIMITS["float32"]), name
        least = min(least, 1 - found.shares[0] if found.difference is None else found.difference)
    print(f"{output}: a dead layer changes at least {least:.2g}")
    assert least > 20 * verification.LIMITS["float32"][0]


def dead_integers(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Files of int8 in which the range of one product is so wide that all of its results become 0."""
    products = ("CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL")
    operations = Interpreter(model_content=data)._get_ops_details()
    for operation in operations:
        if operation["op_name"] in products:
            changed = bytearray(data)
            graph = schema_py_generated.Model.GetRootAs(changed).Subgraphs(0)
            result = graph.Tensors(operation["outputs"][0])
            scales = result.Quantization().ScaleAsNumpy()  # a view of the bytes
            scales *= 1e4
            yield result.Name().decode(), bytes(changed)


def test_dead_layers_of_integers(request: pytest.FixtureRequest) -> None:
    """Each of them is found; a whole file's layers vary nearly as in float32."""
    whole = tiny().export("tflite")
    data = litert_file.lower_precision(whole, describe(precision="int8"), list(pictures(4)))
    share, _ = litert_file.compare_layers(data, whole, list(pictures(2)))
    assert share > 4 * verification.LEAST_SPREAD
    files = list(dead_integers(data))
    assert len(files) == 66 + 8  # convolutions, and two products a block of attention
    for name, file in files if request.config.getoption("--all") else files[::15]:
        share, found = litert_file.compare_layers(file, whole, list(pictures(1)))
        with pytest.raises(UserError, match=r"^int8 makes .* constant: its values vary by 0% of .*--keep-float"):
            verification.check_layer(share, found, "int8")
        print(name, share, found)


@pytest.mark.parametrize("make", [bilinear_matrix, pooling_matrix])
def test_matrices_of_sizes_that_are_symbols(make: Callable[..., np.ndarray]) -> None:
    before, after = jax.export.symbolic_shape("before, after")

    def matrix(x: jax.Array, y: jax.Array) -> Any:
        return axis_matrix_of(make, x.shape[0], y.shape[0])

    shapes = [jax.ShapeDtypeStruct((extent,), np.float32) for extent in (before, after)]
    program = jax.export.export(jax.jit(matrix))(*shapes)
    for size, new_size in [(1, 1), (1, 5), (5, 1), (6, 42), (11, 6), (125, 8), (63, 63), (8, 512)]:
        found = program.call(np.zeros(size, np.float32), np.zeros(new_size, np.float32))
        assert np.abs(found - make(size, new_size)).max() < 1e-6


def run_graph(graph: Graph, value: Value, logits: np.ndarray) -> np.ndarray:
    """What a graph computes of logits."""
    model = graph.model([Value(logits.shape, "float32", (0, 1, 2, 3), "logits")], [("result", value)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"logits": logits})[0])


def label(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The labels that an ONNX file finds."""
    graph = Graph()
    inputs = [graph.add_input("logits", logits.shape, "float32")]
    program = jax.make_jaxpr(lambda values: network.label_pixels(values, size=size))(logits)
    (value,) = onnx_graph.translate(graph, program, inputs, onnx_file.RULES)
    return run_graph(graph, value, logits)


def possible_classes(logits: np.ndarray) -> list[int]:
    """The classes that an ONNX file keeps."""
    graph = Graph()
    inputs = graph.add_input("logits", logits.shape, "float32")
    name = onnx_file._possible_classes(graph, graph.stored(inputs, onnx_file.CLASSES_FIRST))
    return [int(number) for number in run_graph(graph, Value(("k",), "int64", (0,), name), logits)]


def possible_plainly(logits: np.ndarray) -> list[int]:
    """A loop over all cells."""
    n, h, w, _ = logits.shape
    padded = np.pad(logits, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    found: set[int] = set()
    for image, i, j in itertools.product(range(n), range(h + 1), range(w + 1)):
        corners = padded[image, i : i + 2, j : j + 2].reshape(4, -1)
        found |= set(np.flatnonzero(corners.max(axis=0) >= corners.min(axis=0).max()).tolist())
    return sorted(found)


def blobs(seed: int, n: int, h: int, w: int, classes: int, noise: float) -> np.ndarray:
    """Logits of regions, as a trained network's: the wave that is highest, and noise."""
    rng = np.random.default_rng(seed)
    phase, pace = rng.uniform(0, 6, (2, n, 1, 1, classes)), rng.uniform(-1, 1, (2, n, 1, 1, classes))
    y, x = np.arange(h)[:, None, None], np.arange(w)[:, None]
    waves = np.sin(phase[0] + pace[0] * y) + np.sin(phase[1] + pace[1] * x)
    waves -= np.linspace(0, 6, classes)  # the last ones are rare
    return np.asarray(3 * waves + noise * rng.standard_normal(waves.shape), np.float32)


@pytest.mark.parametrize(
    ("shape", "size", "noise"),
    [
        ((1, 8, 8, 150), (64, 64), 0.1),
        ((2, 5, 7, 19), (35, 51), 0.0),
        ((3, 4, 6, 60), (17, 41), 1.0),
        ((1, 6, 6, 30), (48, 48), 50.0),  # all classes stay
        ((1, 1, 5, 2), (3, 40), 1.0),
        ((2, 20, 16, 40), (9, 7), 0.1),  # smaller than the logits
    ],
)
def test_labels_are_those_of_all_classes(
    shape: tuple[int, int, int, int], size: tuple[int, int], noise: float
) -> None:
    logits = blobs(0, *shape, noise)
    kept = possible_classes(logits)
    assert kept == possible_plainly(logits)
    assert (len(kept) == shape[3]) == (noise == 50.0)
    scores = np.asarray(network.enlarge(logits, size=size))
    found = label(logits, size)
    assert (found.dtype, found.shape) == (np.uint8, (shape[0], *size))
    lost = scores.max(axis=-1) - np.take_along_axis(scores, found[..., None].astype(int), axis=-1)[..., 0]
    assert lost.max() <= 1e-5 * np.abs(scores).max()
    assert (found != scores.argmax(axis=-1)).mean() <= 1e-3


def test_labels_of_special_logits() -> None:
    last = np.zeros((3, 4, 4, 6), np.float32)
    last[..., 1] = 2
    last[2, 3, 3, 4] = 9  # a class of the last image only
    assert possible_classes(last) == [1, 4]
    assert label(last, (32, 32))[2, 31, 31] == 4
    equal = np.zeros((1, 3, 3, 5), np.float32)
    equal[..., 0] = -1
    assert possible_classes(equal) == [1, 2, 3, 4]
    assert (label(equal, (24, 24)) == 1).all()  # the first of equals
    for value in (np.nan, np.inf, -np.inf):
        for logits in (np.full((1, 3, 3, 5), value, np.float32), blobs(1, 1, 3, 3, 5, 1.0)):
            logits[0, 1, 1] = value
            assert possible_classes(logits)
            assert label(logits, (24, 24)).max() < 5
