"""StableHLO files: one program of `jax.export` for CPUs, GPUs and TPUs, and for any size.

`jax.export.deserialize` reads them without this package; their description is a JSON file beside them.
"""

from collections.abc import Mapping
from typing import Any

import flatbuffers  # noqa: F401  jax.export needs it
import jax
import jax.export
import numpy as np

from topformer_jax.errors import UserError
from topformer_jax.exporters.exported import Run
from topformer_jax.exporters.network import Function, input_shape

HOLDS_DESCRIPTION = False
BY_ROWS = True
RUNTIME = f"jax {jax.__version__}"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(function: Function, description: Mapping[str, Any]) -> bytes:
    """A function of images as a file, with any number of images."""
    shape = jax.ShapeDtypeStruct(input_shape(description["size"]), np.uint8)
    # A program's locations name the files that it was traced from: folders are nobody's business who gets it.
    name = "jax_hlo_source_file_canonicalization_regex"
    before = jax.config.values[name]
    jax.config.update(name, ".*")
    try:
        return bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(shape).serialize())
    finally:
        jax.config.update(name, before)


def open_bytes(data: bytes) -> tuple[Run, dict[str, Any]]:
    """What runs a file; it holds no description.

    Raises:
        UserError: it is damaged.
    """
    try:
        exported = jax.export.deserialize(bytearray(data))
        call = jax.jit(exported.call)
        call.lower(jax.ShapeDtypeStruct(_example_shape(exported), np.uint8))
    except Exception as error:  # of flatbuffers and of MLIR, classes of all kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"is not a StableHLO file of jax.export, or a damaged one: {reason}") from None
    return lambda images: np.asarray(call(images)), {}


def _example_shape(exported: jax.export.Exported) -> tuple[int, ...]:
    """A shape that the program takes: symbols become 1 (images) and 64 (pixels)."""
    (aval,) = exported.in_avals
    return tuple(
        extent if isinstance(extent, int) else (1, 64, 64, 3)[axis] for axis, extent in enumerate(aval.shape)
    )
