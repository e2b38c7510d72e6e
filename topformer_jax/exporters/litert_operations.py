"""Resizes and poolings in LiteRT files: its own operations in place of products with matrices.

The products need transposes of whole feature maps, and those of all classes at the size of the labels cost more than
the network.
"""

from collections.abc import Sequence
from typing import Any

# Name, further operands (constants) and attributes, as text.
Operation = tuple[str, list[str], dict[str, str]]


def use_own_operations(module: Any, ir: Any) -> None:
    """Replaces the calls of `library_resize` and `library_pool` in a StableHLO module of one image.

    Args:
        module, ir: the module, and the Python package that it is of.
    """
    calls: list[Any] = []

    def collect(operation: Any) -> Any:
        if operation.operation.name == "func.call":
            calls.append(operation.operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    for call in calls:
        name = str(call.attributes["callee"])
        translate = next((rule for known, rule in RULES.items() if known in name), None)
        shapes = [ir.RankedTensorType(value.type).shape[1:3] for value in (*call.operands, *call.results)]
        found = translate and translate(*shapes)
        if not found:
            continue
        new_name, constants, texts = found
        place = ir.InsertionPoint(call)
        operands = list(call.operands)
        for value in map(ir.Attribute.parse, constants):
            constant = ir.Operation.create(
                "arith.constant", [value.type], attributes={"value": value}, ip=place
            )
            operands.append(constant.results[0])
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


RULES = {"library_resize": _resize, "library_pool": _pool}  # by the names of the functions in `ops.resample`
