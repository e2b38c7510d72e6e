"""A traced JAX program as an ONNX graph: one rule for each of JAX's primitives that the network uses.

A new layer of known primitives needs nothing here; one of an unknown primitive is an error that names it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from topformer_jax.exporters.onnx_graph import ELEMENT_TYPES, Graph, Value, constant

Rule = Callable[[Graph, list[Value], Any], list[Value]]
RULES: dict[str, Rule] = {}
# Primitives that call a program, and the parameter that holds it.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def translate(
    graph: Graph, program: core.ClosedJaxpr, inputs: Sequence[Value], overrides: Mapping[str, Rule]
) -> list[Value]:
    """Writes a program's operations into a graph.

    Args:
        graph: is extended.
        program: from `jax.make_jaxpr`.
        inputs: of the program.
        overrides: rules for its jitted functions by name, instead of their contents.

    Returns:
        The program's outputs.

    Raises:
        NotImplementedError: there is no rule for one of its primitives.
    """
    jaxpr = program.jaxpr
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {var: constant(value) for var, value in zip(jaxpr.constvars, program.consts, strict=True)}

    def read(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            aval: Any = atom.aval
            return constant(np.asarray(atom.val, aval.dtype))
        return values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        values |= zip(
            equation.outvars, _translate_equation(graph, equation, operands, overrides), strict=True
        )
    return [read(atom) for atom in jaxpr.outvars]


def _translate_equation(
    graph: Graph, equation: Any, operands: list[Value], overrides: Mapping[str, Rule]
) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    if params.get("name") in overrides:
        return overrides[params["name"]](graph, operands, equation)
    if name in CALLS:
        inner = params[CALLS[name]]
        return translate(graph, inner, operands, overrides)
    if name != "broadcast_in_dim" and all(value.constant is not None for value in operands) and operands:
        arrays = [value.whole_constant() for value in operands]
        found = equation.primitive.bind(*map(jnp.asarray, arrays), **params)
        return [constant(array) for array in (found if equation.primitive.multiple_results else [found])]
    if name not in RULES:
        raise NotImplementedError(f"there is no ONNX rule for JAX's {name}: add one to onnx_rules.py")
    return RULES[name](graph, operands, equation)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _output(equation: Any, name: str, order: Sequence[int] | None = None, **fields: Any) -> list[Value]:
    """The single output of an equation, stored under a name."""
    aval = equation.outvars[0].aval
    order = tuple(range(len(aval.shape))) if order is None else tuple(order)
    return [Value(tuple(aval.shape), aval.dtype.name, order, name, **fields)]


def _is_unit(value: Value, axis: int) -> bool:
    """Whether an axis is stored with extent 1."""
    return not value.shape or value.shape[axis] == 1 or axis in value.unit_axes


def _elementwise(op: str) -> Rule:
    def apply(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
        # The order of the largest operand; constants take any.
        first = max(
            operands, key=lambda value: (len(value.shape), value.constant is None, -len(value.unit_axes))
        )
        names = [
            graph.stored(value, first.order if value.shape else (), broadcast=False) for value in operands
        ]
        unit_axes = frozenset(
            axis
            for axis, extent in enumerate(equation.outvars[0].aval.shape)
            if extent != 1 and all(_is_unit(value, axis) for value in operands)
        )
        return _output(equation, graph.add(op, *names), first.order, unit_axes=unit_axes)

    return apply


for _primitive, _op in {
    "sub": "Sub", "mul": "Mul", "div": "Div", "min": "Min", "pow": "Pow",
    "exp": "Exp", "log": "Log", "neg": "Neg", "sqrt": "Sqrt", "tanh": "Tanh", "logistic": "Sigmoid",
    "floor": "Floor", "abs": "Abs", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "and": "And", "or": "Or", "not": "Not",
}.items():  # fmt: skip
    RULES[_primitive] = _elementwise(_op)


@rule("add", "add_any")
def _add(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    left, right = operands
    bias, other = (right, left) if right.constant is not None else (left, right)
    node = next((node for node in reversed(graph.nodes) if other.name in node.output), None)
    if (
        node is not None
        and node.op_type == "Conv"
        and len(node.input) == 2
        and bias.constant is not None
        and len(bias.shape) > 2
        and other.order[1] == len(bias.shape) - 1  # channels are last in the program
        and bias.constant.size == other.shape[-1]
        and all(_is_unit(bias, axis) for axis in range(len(bias.shape) - 1))
    ):
        # A bias of the channels is the convolution's own. Another use of it without the bias stays as it is.
        attributes: Any = {item.name: list(item.ints) or item.i for item in node.attribute}
        name = graph.add("Conv", *node.input, graph.constant_name(bias.constant.reshape(-1)), **attributes)
        return _output(equation, name, other.order)
    return _elementwise("Add")(graph, operands, equation)


@rule("max")
def _max(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    for value, other in (operands, operands[::-1]):
        if other.constant is not None and not other.constant.any() and not value.unit_axes:
            return _output(equation, graph.add("Relu", value.name), value.order)
    return _elementwise("Max")(graph, operands, equation)


@rule("clamp")
def _clamp(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    low, value, high = operands
    names = value.name, *(graph.stored(limit) for limit in (low, high))
    return _output(equation, graph.add("Clip", *names), value.order, unit_axes=value.unit_axes)


@rule("select_n")
def _select(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    which, if_false, if_true = operands
    return _elementwise("Where")(graph, [which, if_true, if_false], equation)


@rule("stop_gradient", "copy", "optimization_barrier")
def _same(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    return operands


@rule("convert_element_type")
def _cast(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    (value,) = operands
    dtype = equation.outvars[0].aval.dtype.name
    if dtype == value.dtype:
        return operands
    name = graph.add("Cast", value.name, to=ELEMENT_TYPES[dtype])
    return _output(equation, name, value.order, unit_axes=value.unit_axes)


@rule("conv_general_dilated")
def _convolution(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    params = equation.params
    numbers = params["dimension_numbers"]
    assert set(params["lhs_dilation"]) == {1}
    assert params["batch_group_count"] == 1
    images, kernel = operands
    before, after = zip(*params["padding"], strict=True)
    name = graph.add(
        "Conv",
        graph.stored(images, numbers.lhs_spec),
        graph.stored(kernel, numbers.rhs_spec),
        strides=list(params["window_strides"]),
        pads=[*before, *after],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return _output(equation, name, numbers.out_spec)


@rule("dot_general")
def _dot_general(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    (left_over, right_over), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = operands
    if len(right.shape) == 2 and not left_batch and len(left_over) == 1:
        return _matrix_product(graph, left, right, left_over[0], right_over[0], equation)
    free = [
        [axis for axis in range(len(value.shape)) if axis not in (*over, *batch)]
        for value, over, batch in ((left, left_over, left_batch), (right, right_over, right_batch))
    ]
    if len(free[0]) == 1 and len(free[1]) == 1 and len(left_over) == 1:
        names = (
            graph.stored(left, (*left_batch, *free[0], *left_over)),
            graph.stored(right, (*right_batch, *right_over, *free[1])),
        )
        return _output(equation, graph.add("MatMul", *names))
    raise NotImplementedError(f"there is no ONNX rule for this product: {equation}")


def _matrix_product(
    graph: Graph, value: Value, matrix: Value, axis: int, over: int, equation: Any
) -> list[Value]:
    """The product of one axis with a matrix; the axis stays where it is stored."""
    *_, above, last = value.order
    if axis == above and len(value.order) > 2:
        name = graph.add("MatMul", graph.stored(matrix, (1 - over, over)), graph.stored(value, value.order))
        order = value.order
    else:
        order = (*(other for other in value.order if other != axis), axis)
        name = graph.add("MatMul", graph.stored(value, order), graph.stored(matrix, (over, 1 - over)))
    # The program puts the new axis last.
    moved = [len(order) - 1 if other == axis else other - (other > axis) for other in order]
    return _output(equation, name, moved)


@rule("reduce_max", "reduce_sum", "reduce_min", "reduce_prod")
def _reduce(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    (value,) = operands
    axes = equation.params["axes"]
    op = "Reduce" + equation.primitive.name.removeprefix("reduce_").capitalize()
    stored = graph.constant_name(np.array([value.order.index(axis) for axis in axes], np.int64))
    name = graph.add(op, graph.stored(value, value.order), stored, keepdims=0)
    return _output(equation, name, _without(value.order, axes))


def _without(order: Sequence[int], axes: Sequence[int]) -> list[int]:
    """The order of the axes that are left, renumbered."""
    left = [axis for axis in order if axis not in axes]
    return [sorted(left).index(axis) for axis in left]


@rule("argmax")
def _argmax(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    (value,), (axis,) = operands, equation.params["axes"]
    stored = value.order.index(axis)
    name = graph.add("ArgMax", graph.stored(value, value.order), axis=stored, keepdims=0)
    name = graph.add("Cast", name, to=ELEMENT_TYPES[equation.outvars[0].aval.dtype.name])
    return _output(equation, name, _without(value.order, [axis]))


@rule("broadcast_in_dim")
def _broadcast(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    value, positions = operands[0], equation.params["broadcast_dimensions"]
    shape = tuple(equation.outvars[0].aval.shape)
    rank = len(shape)
    unit_axes = {axis for axis in range(rank) if axis not in positions and shape[axis] != 1}
    for axis, position in enumerate(positions):
        if axis in value.unit_axes or (value.shape[axis] == 1 and shape[position] != 1):
            unit_axes.add(position)
    new = [axis for axis in range(rank) if axis not in positions]
    # New axes come first in memory, which keeps the order of the others.
    order = (*new, *(positions[axis] for axis in value.order))
    if value.constant is not None:
        stored = value.constant.reshape([1] * len(new) + list(value.constant.shape))
        return [Value(shape, value.dtype, order, "", stored, frozenset(unit_axes))]
    name = value.name
    if new:
        name = graph.add("Unsqueeze", name, graph.constant_name(np.arange(len(new), dtype=np.int64)))
    return _output(equation, name, order, unit_axes=frozenset(unit_axes))


@rule("reshape")
def _reshape(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    shape = tuple(equation.outvars[0].aval.shape)
    symbolic = [axis for axis, extent in enumerate(shape) if not isinstance(extent, int)]
    if len(symbolic) == 1:  # the one that is left over
        shape = tuple(-1 if axis in symbolic else extent for axis, extent in enumerate(shape))
    return _output(equation, graph.add("Reshape", graph.stored(operands[0]), graph.shape_name(shape)))


@rule("transpose")
def _transpose(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    (value,), permutation = operands, equation.params["permutation"]
    order = [permutation.index(axis) for axis in value.order]
    unit_axes = frozenset(permutation.index(axis) for axis in value.unit_axes)
    return _output(equation, value.name, order, unit_axes=unit_axes)


@rule("squeeze")
def _squeeze(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    (value,), axes = operands, equation.params["dimensions"]
    stored = graph.constant_name(np.array([value.order.index(axis) for axis in axes], np.int64))
    name = graph.add("Squeeze", graph.stored(value, value.order), stored)
    return _output(equation, name, _without(value.order, axes))


@rule("concatenate")
def _concatenate(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    order = operands[0].order
    axis = order.index(equation.params["dimension"])
    names = [graph.stored(value, order) for value in operands]
    return _output(equation, graph.add("Concat", *names, axis=axis), order)


@rule("split")
def _split(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    (value,), params = operands, equation.params
    sizes = graph.constant_name(np.array(params["sizes"], np.int64))
    axis = value.order.index(params["axis"])
    names = graph.add(
        "Split", graph.stored(value, value.order), sizes, outputs=len(params["sizes"]), axis=axis
    )
    return [
        Value(tuple(var.aval.shape), value.dtype, value.order, name)
        for var, name in zip(equation.outvars, names, strict=True)
    ]


@rule("iota")
def _iota(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    params = equation.params
    (extent,) = params["shape"]
    if isinstance(extent, int):
        return [constant(np.arange(extent, dtype=params["dtype"]))]
    zero, one = (graph.constant_name(np.array(number, np.int64)) for number in (0, 1))
    limit = graph.add("Squeeze", graph.dimension(extent))
    name = graph.add(
        "Cast", graph.add("Range", zero, limit, one), to=ELEMENT_TYPES[np.dtype(params["dtype"]).name]
    )
    return _output(equation, name)


@rule("dim_as_value")
def _dim_as_value(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    name = graph.add("Squeeze", graph.dimension(equation.params["dim"]))
    return _output(equation, graph.add("Cast", name, to=ELEMENT_TYPES[equation.outvars[0].aval.dtype.name]))
