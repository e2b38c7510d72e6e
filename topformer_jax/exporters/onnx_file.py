"""ONNX files: written from the traced program, run by onnxruntime."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime

from topformer_jax.exporters import onnx_labels, onnx_rules
from topformer_jax.exporters.exported import KEY, Run, seal
from topformer_jax.exporters.network import Function, input_shape
from topformer_jax.exporters.onnx_graph import Graph, Value
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

HOLDS_DESCRIPTION = True
BY_ROWS = False
RUNTIME = f"onnxruntime {onnxruntime.__version__}"
INPUT = "images"


def write(function: Function, description: Mapping[str, Any]) -> bytes:
    """A function of images as an ONNX file, with any number of images."""
    shape = input_shape(description["size"])
    program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, np.uint8))
    graph = Graph()
    images = graph.add_input(INPUT, shape, "uint8")
    # The order of the first convolution, at once: 3 channels last make the normalisation ten times slower.
    order = (0, 3, 1, 2)
    pixels = Value(shape, "uint8", order, graph.stored(images, order))
    # What is fast on a CPU, WebGPU computes wrongly or slowly; the program's own products are right there.
    overrides = {} if description["target"] == "web" else onnx_labels.RULES
    outputs = onnx_rules.translate(graph, program, [pixels], overrides)
    model = graph.model([images], [(description["output"], outputs[0])])
    model.producer_name, model.producer_version = KEY, description["versions"][KEY]
    onnx.helper.set_model_props(model, {KEY: json.dumps(dict(description))})
    onnx.checker.check_model(model, full_check=True)
    return seal(bytes(model.SerializeToString()))


def open_bytes(data: bytes) -> tuple[Run, bytes]:
    """What runs a file, and the JSON text of its description.

    Raises:
        UserError: it is damaged, or asks for a newer onnxruntime.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
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
