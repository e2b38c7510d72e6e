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

from topformer_jax.data import loader
from topformer_jax.exporters.exported import SEAL_BYTES, Run, seal
from topformer_jax.exporters.network import Function
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError, need_packages

HOLDS_DESCRIPTION = True
BY_ROWS = False
RUNTIME = f"LiteRT {metadata.version('ai-edge-litert')}"
INPUT, SIGNATURE = "images", "serving_default"
PIXELS = "pixels"  # the name of the normalisation for --keep-float
# Parts whose operations have other names than /PART/: the normalisation is in no part, the last one is the output's.
OTHER_NAMES = {PIXELS: r"^jit\(\w+\)/\w+;", "decode_head": "/decode_head/|^serving_default_"}
# In the zip archive at the end of the file, where LiteRT's tools look for metadata.
METADATA = "topformer_jax.json"
Images = Sequence[UInt8[np.ndarray, "h w 3"]]
# An operation's name, further operands (constants) and attributes, as text.
Operation = tuple[str, list[str], dict[str, str]]


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
        _use_own_operations(module, ir)
        passes, config = passmanager.PassManager(), converter.ConvertToTFLConfig()
        converter.run_convert_to_tfl_passes(module, passes, config)
        converter.set_signature(module.operation, SIGNATURE, [INPUT], [description["output"]])
        data = converter.export_flatbuffer_to_bytes(module.operation)
    return _append_metadata(data, description)


def _use_own_operations(module: Any, ir: Any) -> None:
    """Replaces resizes and poolings in a StableHLO module of one image by LiteRT's own operations.

    The products with matrices that they replace need transposes of whole feature maps. Products of all classes at the
    size of the labels cost more than the network. `ir` is the Python package of the module.
    """
    calls: list[Any] = []

    def collect(operation: Any) -> Any:
        if operation.operation.name == "func.call":
            calls.append(operation.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    for call in calls:
        name = str(call.attributes["callee"])
        translate = next((rule for known, rule in OWN_OPERATIONS.items() if known in name), None)
        shapes = [ir.RankedTensorType(value.type).shape[1:3] for value in (*call.operands, *call.results)]
        found = translate and translate(*shapes)
        if not found:
            continue
        new_name, constants, texts = found
        place = ir.InsertionPoint(call)
        operands = list(call.operands)
        for value in map(ir.Attribute.parse, constants):
            options = {"attributes": {"value": value}, "ip": place}
            operands.append(ir.Operation.create("arith.constant", [value.type], **options).results[0])
        attributes = {key: ir.Attribute.parse(text) for key, text in texts.items()}
        types = [call.results[0].type]
        new = ir.Operation.create(new_name, types, operands, attributes, loc=call.location, ip=place)
        call.results[0].replace_all_uses_with(new.results[0])
        call.erase()


def _resize(before: Sequence[int], after: Sequence[int]) -> Operation:
    size = f"dense<[{after[0]}, {after[1]}]> : tensor<2xi32>"
    return "tfl.resize_bilinear", [size], {"align_corners": "false", "half_pixel_centers": "true"}


def _pool(before: Sequence[int], after: Sequence[int]) -> Operation | None:
    if before[0] % after[0] or before[1] % after[1]:
        return None  # windows of several sizes, which overlap
    attributes = {"padding": '"VALID"', "fused_activation_function": '"NONE"'}
    for side, length in zip(("height", "width"), (before[0] // after[0], before[1] // after[1]), strict=True):
        attributes |= {f"filter_{side}": f"{length} : i32", f"stride_{side[0]}": f"{length} : i32"}
    return "tfl.average_pool_2d", [], attributes


OWN_OPERATIONS: dict[str, Any] = {"plain_resize": _resize, "plain_pool": _pool}  # jitted functions by name


def lower_precision(data: bytes, description: Mapping[str, Any], images: Images = ()) -> bytes:
    """A file of `write` with the precision of a description, "float16" or "int8".

    The activations of images, of the file's size, give the ranges of 8-bit integers.
    """
    is_half = description["precision"] == "float16"
    keep_float = description.get("keep_float", ())
    data = _round_to_float16(data) if is_half else _quantize_int8(data, images, keep_float)
    return _append_metadata(data, description)


def compare_layers(data: bytes, float_data: bytes, images: Images) -> tuple[float, str]:
    """Finds the layer that a file of fewer bits flattens most: a dead layer gives the same value everywhere.

    Returns the spread of its values over pixels as a share of their spread in the float32 file, and its name.
    """
    spreads, wide = (_measure_spreads(content, images) for content in (data, float_data))
    shares = {name: spreads[name] / spread for name, spread in wide.items() if spread and name in spreads}
    name = min(shares, key=lambda name: (shares[name], name))
    return shares[name], name.partition(";")[0].partition("/")[2] or name


def _measure_spreads(data: bytes, images: Images) -> dict[str, float]:
    """The standard deviation over pixels of each result of a file, by its name; 0 where it is rounding."""
    # Fused operations have no results between them.
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = _open(data, experimental_op_resolver_type=plain, experimental_preserve_all_tensors=True)
    (source,) = interpreter.get_input_details()
    variances: dict[str, float] = {}
    for image in images:
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        for tensor in interpreter.get_tensor_details():
            name = tensor["name"]
            scale, zero = tensor["quantization"]
            is_integer = tensor["dtype"] == np.int8 and scale
            is_result = name.startswith(("jit(", SIGNATURE)) and len(tensor["shape"]) > 1
            if not is_result or not (is_integer or tensor["dtype"] == np.float32):
                continue  # working memory, for example
            values = interpreter.get_tensor(tensor["index"]).astype(np.float64)
            values = (values - zero) * scale if is_integer else values
            variance = float(values.var(tuple(range(values.ndim - 1))).sum())
            is_rounding = variance <= np.square(1e-6 * np.abs(values).max()) * values.shape[-1]
            variances[name] = variances.get(name, 0.0) + (0.0 if is_rounding else variance)
    return {name: math.sqrt(variance) for name, variance in variances.items()}


def _round_to_float16(data: bytes) -> bytes:
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


def _quantize_int8(data: bytes, images: Images, keep_float: Sequence[str]) -> bytes:
    """Weights (a scale for each channel) and activations as 8-bit integers, except for some parts."""
    with need_packages("8-bit integers need ai-edge-quantizer"):
        from ai_edge_quantizer import quantizer, recipe

    # The output stays float32, so that files of any precision give the same.
    floats = [{"regex": ".*", "operation": "OUTPUT"}]
    if keep_float:
        # A result's name is the path of its operation, as jit(compute)/tpm/layer1/add; fused ones have several.
        names = [tensor["name"] for tensor in _open(data).get_tensor_details()]
        known = {PIXELS, *(part for name in names for part in re.findall(r"(?<=/)\w+(?=/)", name))}
    for part in keep_float:
        if part not in known:
            raise UserError(f"--keep-float {part}: expected {', '.join(sorted(known))}")
        floats.append({"regex": OTHER_NAMES.get(part, f"/{part}/"), "operation": "*"})
    with _quiet():
        rules = [*recipe.static_wi8_ai8(), *(rule | {"algorithm_key": "no_quantize"} for rule in floats)]
        job = quantizer.Quantizer(bytearray(data), rules)
        ranges = job.calibrate({SIGNATURE: [{INPUT: image[None]} for image in images]})
        return bytes(job.quantize(ranges).quantized_model)


def _append_metadata(data: bytes, description: Mapping[str, Any]) -> bytes:
    """A model with its description in a zip archive behind it, where LiteRT's tools look for metadata."""
    stream = io.BytesIO()
    stream.write(data)
    with zipfile.ZipFile(stream, "a") as archive:
        entry = zipfile.ZipInfo(METADATA, date_time=(1980, 1, 1, 0, 0, 0))  # equal exports have equal bytes
        archive.writestr(entry, json.dumps(dict(description), indent=1))
        archive.comment = bytes(SEAL_BYTES)
    return seal(stream.getvalue()[:-SEAL_BYTES])


def _open(data: bytes, **options: Any) -> Interpreter:
    with _quiet():
        interpreter = Interpreter(model_content=data, num_threads=loader.count_cores(), **options)
        interpreter.allocate_tensors()
    return interpreter


def open_bytes(data: bytes) -> tuple[Run, bytes]:
    """The function that runs a file, and the JSON text of its description.

    Raises:
        UserError: it is damaged.
    """
    try:
        description = b"{}"
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if METADATA in archive.namelist() and archive.getinfo(METADATA).file_size < files.MOST_BYTES:
                    description = archive.read(METADATA)
        interpreter = _open(data)
        (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    except Exception as error:  # of many types
        reason = files.shorten(str(error) or type(error).__name__, 150)
        raise UserError(f"is not a LiteRT file, or a damaged one: {reason}") from None

    def run(images: np.ndarray) -> np.ndarray:
        outputs = []
        for image in images:
            interpreter.set_tensor(source["index"], image[None])
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(result["index"]))
        return np.concatenate(outputs)

    return run, description


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the lines and bars that LiteRT's libraries print from C++ and Python."""
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
