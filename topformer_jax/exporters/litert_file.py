"""LiteRT (TensorFlow Lite) files: from StableHLO by litert-converter, without TensorFlow; one image at a time."""

import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.export
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from jaxtyping import UInt8

from topformer_jax.data import workers
from topformer_jax.exporters.exported import SEAL_BYTES, Run, need_packages, seal
from topformer_jax.exporters.litert_operations import use_own_operations
from topformer_jax.exporters.network import Function
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

HOLDS_DESCRIPTION = True
BY_ROWS = False
RUNTIME = f"LiteRT {metadata.version('ai-edge-litert')}"
INPUT, SIGNATURE = "images", "serving_default"
PIXELS = "pixels"  # the normalisation, for --keep-float
# Parts whose operations have other names than /PART/: the normalisation is in no part, the last one is the output's.
OTHER_NAMES = {PIXELS: r"^jit\(\w+\)/\w+;", "decode_head": "/decode_head/|^serving_default_"}
# In the zip archive at the end of the file, where LiteRT's tools look for metadata.
NOTE = "topformer_jax.json"


def write(function: Function, description: Mapping[str, Any]) -> bytes:
    """A function of images, from `network.make_function`, as a LiteRT file in float32 for one image.

    Raises:
        UserError: the size is open.
    """
    with need_packages("writing .tflite files needs litert-converter"), _quiet():
        from litert_converter import converter_api_ext as converter
        from litert_converter.mlir import ir, passmanager

    if description["size"] is None:
        raise UserError("a .tflite file is for images of one size: give --size HxW")
    shape = jax.ShapeDtypeStruct((1, *description["size"], 3), np.uint8)
    exported = jax.export.export(jax.jit(function), platforms=["cpu"])(shape)
    with ir.Context() as context, ir.Location.unknown():
        converter.prepare_mlir_context(context)
        module = ir.Module.parse(exported.mlir_module())
        use_own_operations(module, ir)
        passes, config = passmanager.PassManager(), converter.ConvertToTFLConfig()
        converter.run_convert_to_tfl_passes(module, passes, config)
        converter.set_signature(module.operation, SIGNATURE, [INPUT], [description["output"]])
        data = converter.export_flatbuffer_to_bytes(module.operation)
    return _append_note(data, description)


def lower_precision(
    data: bytes, description: Mapping[str, Any], images: Sequence[UInt8[np.ndarray, "h w 3"]] = ()
) -> bytes:
    """A float32 file with fewer bits.

    Args:
        data: from `write`.
        description: of the new file; its `precision` is "float16" or "int8".
        images: of the file's size, whose activations give the ranges of 8-bit integers.
    """
    if description["precision"] == "float16":
        data = _with_float16_weights(data)
    else:
        data = _with_integers(data, images, description.get("keep_float", ()))
    return _append_note(data, description)


def compare_layers(
    data: bytes, float_data: bytes, images: Sequence[UInt8[np.ndarray, "h w 3"]]
) -> tuple[float, str]:
    """Finds the layer that a file of fewer bits flattens most: a dead one gives the same wherever one looks.

    Args:
        data, float_data: the file, and the float32 file that it was made from.
        images: at least one.

    Returns:
        The spread of the layer's values over pixels as a share of their spread in float32, and the layer's name.
    """
    spreads, float_spreads = (_measure_spreads(content, images) for content in (data, float_data))
    share, name = min(
        (spreads[name] / spread, name) for name, spread in float_spreads.items() if spread and name in spreads
    )
    return share, name.partition(";")[0].partition("/")[2] or name


def _measure_spreads(data: bytes, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> dict[str, float]:
    """The standard deviation over pixels of each result of a file, by its name; 0 where it is rounding."""
    with _quiet():
        interpreter = Interpreter(
            model_content=data,
            num_threads=workers.count_cores(),
            # Fused operations have no results between them.
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        interpreter.allocate_tensors()
    (images_at,) = (tensor["index"] for tensor in interpreter.get_input_details())
    variances: dict[str, float] = {}
    for image in images:
        interpreter.set_tensor(images_at, image[None])
        interpreter.invoke()
        for tensor in interpreter.get_tensor_details():
            scale, zero = tensor["quantization"]
            is_integer = tensor["dtype"] == np.int8 and scale
            is_result = tensor["name"].startswith(("jit(", SIGNATURE)) and len(tensor["shape"]) > 1
            if not is_result or not (is_integer or tensor["dtype"] == np.float32):
                continue  # working memory, for one
            values = interpreter.get_tensor(tensor["index"]).astype(np.float64)
            values = (values - zero) * scale if is_integer else values
            variance = float(values.var(tuple(range(values.ndim - 1))).sum())
            is_rounding = variance <= np.square(1e-6 * np.abs(values).max()) * values.shape[-1]
            name = tensor["name"]
            variances[name] = variances.get(name, 0.0) + (0.0 if is_rounding else variance)
    return {name: math.sqrt(variance) for name, variance in variances.items()}


def _with_float16_weights(data: bytes) -> bytes:
    """Weights as 16-bit floats; the computation stays in 32 bits where the device has no others."""
    with need_packages("16-bit weights need ai-edge-quantizer"):
        from ai_edge_quantizer import quantizer

    weights = {"num_bits": 16, "symmetric": True, "granularity": "TENSORWISE", "dtype": "FLOAT"}
    options = {"weight_tensor_config": weights, "compute_precision": "FLOAT", "explicit_dequantize": True}
    recipe = [
        {"regex": ".*", "operation": operation, "algorithm_key": "float_casting", "op_config": options}
        for operation in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    ]
    with _quiet():
        return bytes(quantizer.Quantizer(bytearray(data), recipe).quantize().quantized_model)


def _with_integers(
    data: bytes, images: Sequence[UInt8[np.ndarray, "h w 3"]], keep_float: Sequence[str]
) -> bytes:
    """Weights (a scale for each channel) and activations as 8-bit integers, but for some parts."""
    with need_packages("8-bit integers need ai-edge-quantizer"):
        from ai_edge_quantizer import quantizer, recipe

    # The output stays float32, so that files of any precision give the same.
    floats = [{"regex": ".*", "operation": "OUTPUT"}]
    names = _tensor_names(data) if keep_float else []
    known = {part for name in names for part in re.findall(r"(?<=/)\w+(?=/)", name)}
    for part in keep_float:
        if part not in known | {PIXELS}:
            raise UserError(f"--keep-float {part}: expected {', '.join(sorted(known | {PIXELS}))}")
        floats.append({"regex": OTHER_NAMES.get(part, f"/{part}/"), "operation": "*"})
    with _quiet():
        rules = [*recipe.static_wi8_ai8(), *(rule | {"algorithm_key": "no_quantize"} for rule in floats)]
        job = quantizer.Quantizer(bytearray(data), rules)
        ranges = job.calibrate({SIGNATURE: [{INPUT: image[None]} for image in images]})
        return bytes(job.quantize(ranges).quantized_model)


def _tensor_names(data: bytes) -> list[str]:
    """A file's results by the paths of their operations, as jit(compute)/tpm/layer1/add; fused ones have several."""
    with _quiet():
        interpreter = Interpreter(model_content=data)
    return [tensor["name"] for tensor in interpreter.get_tensor_details()]


def _append_note(data: bytes, description: Mapping[str, Any]) -> bytes:
    """A zip archive with the description after the model, as LiteRT's metadata has its files."""
    stream = io.BytesIO()
    stream.write(data)
    with zipfile.ZipFile(stream, "a") as archive:
        note = zipfile.ZipInfo(NOTE, date_time=(1980, 1, 1, 0, 0, 0))  # equal exports have equal bytes
        archive.writestr(note, json.dumps(dict(description), indent=1))
        archive.comment = bytes(SEAL_BYTES)
    return seal(stream.getvalue()[:-SEAL_BYTES])


def open_bytes(data: bytes) -> tuple[Run, bytes]:
    """What runs a file, and the JSON text of its description.

    Raises:
        UserError: it is damaged.
    """
    try:
        description = b"{}"
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if NOTE in archive.namelist() and archive.getinfo(NOTE).file_size < files.MOST_BYTES:
                    description = archive.read(NOTE)
        with _quiet():
            interpreter = Interpreter(model_content=data, num_threads=workers.count_cores())
            interpreter.allocate_tensors()
        (images_at,), (output_at,) = (
            [tensor["index"] for tensor in tensors]
            for tensors in (interpreter.get_input_details(), interpreter.get_output_details())
        )
    except Exception as error:  # of many types
        reason = files.shorten(str(error) or type(error).__name__, 150)
        raise UserError(f"is not a LiteRT file, or a damaged one: {reason}") from None

    def run(images: np.ndarray) -> np.ndarray:
        outputs = []
        for image in images:
            interpreter.set_tensor(images_at, image[None])
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(output_at))
        return np.concatenate(outputs)

    return run, description


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines and bars that LiteRT's libraries print from C++ and Python."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(1), os.dup(2)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            sys.stdout.flush()
            for number, copy in enumerate(saved, 1):
                os.dup2(copy, number)
                os.close(copy)
