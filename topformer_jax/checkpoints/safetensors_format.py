"""safetensors files: official names and layout, without PyTorch in either direction.

A string in the header, `topformer_jax`, holds `meta` and `config` as JSON, and another one the CRC-32 of that string
and of each tensor. The library is imported when a file is read or written.
"""

import json
import zlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np

from topformer_jax.checkpoints.orbax_store import Metadata, check_sums, checksum
from topformer_jax.checkpoints.torch_format import file_shape as file_shape, from_torch, json_part, to_torch
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError, need_packages

KEY, CRC_KEY = "topformer_jax", "topformer_jax_crc32"  # of the header
# By the format's names.
DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
}


class _Header(msgspec.Struct):
    strings: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def read(path: files.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the tensors of a file under its own names, in this package's layout, and its `meta` and `config`, if any.

    16-bit floats are read as float32, all integers as 32-bit ones.

    Raises:
        UserError: safetensors is not installed, or the file is damaged or none.
    """
    library = _import_safetensors()
    data = files.read_bytes(path, most=1 << 36)
    try:
        stored = library.deserialize(data)
    except (library.SafetensorError, ValueError) as error:
        reason = files.shorten(error, 120)
        raise UserError(f"{path} is not a safetensors file, or a damaged one: {reason}") from None
    if not stored:
        raise UserError(f"{path} holds no tensors")
    strings = files.read_json(data[8 : 8 + int.from_bytes(data[:8], "little")], _Header, path).strings
    text = strings.get(KEY, "{}").encode()
    sums = files.read_json(strings.get(CRC_KEY, "{}").encode(), dict[str, int], path)
    found = {KEY: zlib.crc32(text)} | {name: zlib.crc32(tensor["data"]) for name, tensor in stored}
    check_sums(found, sums, path)
    files.read_json(text, Metadata, path)  # a check; entries of other versions are returned too
    tensors = {name: _to_array(f"{path}: {files.shorten(name)}", tensor) for name, tensor in stored}
    return tensors, {"meta": {}, **files.read_json(text, dict[str, Any], path)}


def write(path: files.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all; a UserError if it exists, or cannot be written."""
    library = _import_safetensors()
    files.refuse_existing(path)
    # Only contiguous arrays: of others the library writes the memory as it is, and does not warn.
    contiguous = {name: to_torch(tensor) for name, tensor in tensors.items()}
    text = json.dumps(json_part(dict(metadata)))
    sums = {KEY: zlib.crc32(text.encode())} | {name: checksum(array) for name, array in contiguous.items()}
    header = {"format": "pt", KEY: text, CRC_KEY: json.dumps(sums)}
    files.write_file(path, library.numpy.save(contiguous, header))


def _to_array(what: str, stored: Mapping[str, Any]) -> np.ndarray:
    """Converts a tensor without loss: 16-bit floats to float32, integers to int32."""
    if stored["dtype"] not in DTYPES:
        raise UserError(f"{what} has dtype {stored['dtype']}: expected one of {', '.join(DTYPES)}")
    array = np.frombuffer(stored["data"], DTYPES[stored["dtype"]]).reshape(stored["shape"])
    if array.dtype.kind in "iub":
        return from_torch(array.astype(np.int64))
    return from_torch(array if array.dtype == np.float64 else array.astype(np.float32))


def _import_safetensors() -> ModuleType:
    with need_packages("reading and writing .safetensors files needs safetensors"):
        import safetensors
        import safetensors.numpy
    return safetensors
