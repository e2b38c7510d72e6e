"""ONNX files: written from the traced program, run by onnxruntime.

A file for CPUs first leaves out the classes that are the label of no pixel. Every pixel lies in a cell: four
neighbouring logits of each class, whose average by the pixel's weights is the class's score there. A class whose
largest corner is below the smallest corner of another class has a lower score at every pixel of the cell. Where that
holds in every cell of all images, the class is dropped before the logits are enlarged. The labels are those of all
classes, except for ties by rounding; labels of logits with NaN or infinities are arbitrary.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime

from topformer_jax import models
from topformer_jax.data.transforms import Size
from topformer_jax.exporters import network
from topformer_jax.exporters.exported import KEY, Run, seal
from topformer_jax.exporters.onnx_graph import ELEMENT_TYPES, Graph, Rule, Value, translate
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

HOLDS_DESCRIPTION = True
BY_ROWS = False
RUNTIME = f"onnxruntime {onnxruntime.__version__}"
INPUT = "images"
CLASSES_FIRST = (0, 3, 1, 2)  # as convolutions take and give their maps


def write(function: network.Function, description: Mapping[str, Any]) -> bytes:
    """A function of images as an ONNX file, with any number of images."""
    # WebGPU runs the rules for CPUs wrongly or slowly, so a file for the web keeps the program's own products.
    overrides = {} if description["target"] == "web" else RULES
    model = _make_model(function, description["size"], description["output"], overrides)
    model.producer_name, model.producer_version = KEY, description["versions"][KEY]
    onnx.helper.set_model_props(model, {KEY: json.dumps(dict(description))})
    onnx.checker.check_model(model, full_check=True)
    return seal(bytes(model.SerializeToString()))


def _make_model(
    function: network.Function, size: Sequence[int] | None, output: str, overrides: Mapping[str, Rule]
) -> onnx.ModelProto:
    shape = network.input_shape(size)
    program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, np.uint8))
    graph = Graph()
    images = graph.add_input(INPUT, shape, "uint8")
    # Channels first, as the first convolution wants them: with 3 channels last, normalisation is ten times slower.
    pixels = Value(shape, "uint8", CLASSES_FIRST, graph.stored(images, CLASSES_FIRST))
    outputs = translate(graph, program, [pixels], overrides)
    return graph.model([images], [(output, outputs[0])])


def open_model(model: models.Segmenter) -> Run:
    """A model's network as a function of images of any size, which onnxruntime computes: see `Predictor`.

    The function raises NotImplementedError if there is no rule for an operation of the network.
    """
    function = network.make_function(model, "logits")
    sizes: set[Size] = set()

    @functools.cache
    def open_for(size: Size | None) -> Run:
        made = _make_model(function, size, "logits", RULES)
        return open_bytes(bytes(made.SerializeToString()), spin=False)[0]  # JAX's threads want the cores next

    def run(images: np.ndarray) -> np.ndarray:
        size = (images.shape[1], images.shape[2])
        sizes.add(size)
        # A graph for one size is made in a tenth of the time: enough for a single picture.
        return open_for(size if len(sizes) == 1 else None)(images)

    return run


def open_bytes(data: bytes, *, spin: bool = True) -> tuple[Run, bytes]:
    """The function that runs a file, and the JSON text of its description.

    With `spin`, idle threads keep their cores busy for a while: faster if nothing else wants them.

    Raises:
        UserError: it is damaged, or needs a newer onnxruntime.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # only errors
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(KEY, "{}")
    except Exception as error:  # pybind's own classes
        reason = files.shorten(error, 150)
        if "opset" in reason or "IR version" in reason:
            raise UserError(f"needs a newer onnxruntime than {onnxruntime.__version__}: {reason}") from None
        raise UserError(f"is not an ONNX file, or a damaged one: {reason}") from None

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {INPUT: np.ascontiguousarray(images)})[0])

    return run, text.encode()


def _enlarge(graph: Graph, equation: Any, logits: Value) -> Value:
    """The rule of `network.enlarge`: ONNX's own resize, with classes last."""
    shape = tuple(equation.outvars[0].aval.shape)
    name = _resize(graph, graph.stored(logits), graph.shape_name(shape))
    return Value(shape, logits.dtype, (0, 1, 2, 3), name)


def _label_pixels(graph: Graph, equation: Any, logits: Value) -> Value:
    """The rule of `network.label_pixels`: the largest class of each pixel, among those that can be it."""
    result = equation.outvars[0].aval
    kept = _possible_classes(graph, graph.stored(logits, CLASSES_FIRST))
    picked = graph.add("Gather", graph.stored(logits, CLASSES_FIRST), kept, axis=1)
    size = graph.add("Concat", graph.shape_name(result.shape), graph.add("Shape", kept), axis=0)
    values = _resize(graph, graph.add("Transpose", picked, perm=(0, 2, 3, 1)), size)
    found = graph.add("ArgMax", values, axis=3, keepdims=0)
    labels = graph.add("Cast", kept, to=ELEMENT_TYPES[result.dtype.name])
    name = graph.add("Gather", labels, found, axis=0)
    return Value(tuple(result.shape), result.dtype.name, (0, 1, 2), name)


def _resize(graph: Graph, name: str, size: str) -> str:
    # WebGPU computes Resize of these axes wrongly and says nothing, so its files do without these rules.
    how = "half_pixel"
    return str(graph.add("Resize", name, "", "", size, mode="linear", coordinate_transformation_mode=how))


def _possible_classes(graph: Graph, logits: str) -> str:
    """The classes, int64 `[possible]`, of logits `[n, classes, h, w]` that may be some pixel's label."""

    def largest(name: str, axes: Sequence[int], keepdims: int = 0) -> str:
        return str(graph.add("ReduceMax", name, graph.integers(axes), keepdims=keepdims))

    def largest_corner(name: str) -> str:  # of each cell; those at the border have two corners or one
        return str(graph.add("MaxPool", name, kernel_shape=(2, 2), pads=(1, 1, 1, 1)))

    smallest_corner = graph.add("Neg", largest_corner(graph.add("Neg", logits)))
    surely_reached = largest(smallest_corner, [1], keepdims=1)
    # The lead of each class where it leads most.
    lead = largest(graph.add("Sub", largest_corner(logits), surely_reached), [0, 2, 3])
    # NaN and infinities may leave no class that leads; a label is needed, so the classes closest to leading stay.
    bound = graph.add("Min", largest(lead, [0]), graph.constant_name(np.float32(0)))
    stays = graph.add("Not", graph.add("Less", lead, bound))
    return str(graph.add("Squeeze", graph.add("NonZero", stays), graph.integers([0])))


RULES: dict[str, Rule] = {"enlarge": _enlarge, "label_pixels": _label_pixels}  # of jitted functions by name
