"""StableHLO files: one program of `jax.export` for CPUs, GPUs and TPUs, and for any size.

`jax.export.deserialize` reads them without this package; their description is a JSON file beside them.
"""

from collections.abc import Mapping
from typing import Any

import flatbuffers  # noqa: F401  jax.export needs it
import jax
import jax.export
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from topformer_jax.exporters.exported import Run, seal
from topformer_jax.exporters.network import Function, input_shape
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

HOLDS_DESCRIPTION = False
BY_ROWS = True
RUNTIME = f"jax {jax.__version__}"
# Operations that run code of the process at an address or name from the file, or wait for another program.
FOREIGN = (
    "stablehlo.custom_call",
    "stablehlo.infeed",
    "stablehlo.outfeed",
    "stablehlo.send",
    "stablehlo.recv",
)
KNOWN_CALLS = ("Sharding", "shape_assertion")  # that run none
PLATFORMS = ("cpu", "cuda", "tpu")


def write(function: Function, description: Mapping[str, Any]) -> bytes:
    """A function of images as a file, with any number of images."""
    shape = jax.ShapeDtypeStruct(input_shape(description["size"]), np.uint8)
    # A program's locations name the files that it was traced from; they must not leave this machine.
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*")
    try:
        return seal(bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(shape).serialize()))
    finally:
        jax.config.update(name, before)


def open_bytes(data: bytes) -> tuple[Run, bytes]:
    """The function that runs a file, which holds no description.

    Raises:
        UserError: it is damaged, or holds calls of other code.
    """
    try:
        exported = jax.export.deserialize(bytearray(data))
        if calls := find_foreign(exported):
            raise UserError(f"calls {files.shorten(calls[0])}, which no file of export does: it is not run")
        call = jax.jit(exported.call)
        call.lower(jax.ShapeDtypeStruct(_example_shape(exported), np.uint8))
    except UserError:
        raise
    except Exception as error:  # of flatbuffers and of MLIR, classes of all kinds
        reason = files.shorten((str(error).splitlines() or [type(error).__name__])[0], 150)
        raise UserError(f"is not a StableHLO file of jax.export, or a damaged one: {reason}") from None
    return lambda images: np.asarray(call(images)), b"{}"


def find_foreign(exported: jax.export.Exported) -> list[str]:
    """The calls of a program that would run other code than XLA's own, found before anything is compiled."""
    found = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        target = ""
        if "call_target_name" in operation.attributes:
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
        if operation.name in FOREIGN and target not in KNOWN_CALLS:
            found.append(target or operation.name)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context() as context:
        context.attach_diagnostic_handler(lambda _: True)  # which MLIR would print
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        module.operation.walk(visit)
    return found


def _example_shape(exported: jax.export.Exported) -> tuple[int, ...]:
    """A shape that the program takes: symbols become 1 (images) and 64 (pixels)."""
    (aval,) = exported.in_avals
    return tuple(
        extent if isinstance(extent, int) else (1, 64, 64, 3)[axis] for axis, extent in enumerate(aval.shape)
    )
