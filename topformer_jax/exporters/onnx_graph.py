"""A traced JAX program as an ONNX graph: `translate` has a rule for each primitive that the network uses.

The network's feature maps are `[n, h, w, c]`, and ONNX's convolutions take `[n, c, h, w]`. A value therefore knows
the order in which its axes are stored, and is transposed only where an operation needs another order: a network has
as few transposes as one that was written for ONNX. onnxruntime adds biases and activations to convolutions itself.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core
from onnx import TensorProto, helper, numpy_helper

OPSET = 18  # of 2023: onnxruntime 1.15 and newer, in browsers too
IR_VERSION = 8  # of the same time
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
# The primitives that call a program, and the parameter that holds it.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
Shape = tuple[Any, ...]  # numbers, or JAX's expressions of symbols


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of the traced program.

    Attributes:
        shape: in the program's order of axes.
        dtype: a name of `ELEMENT_TYPES`.
        order: of the axes as they are stored: the i-th stored axis is the program's axis `order[i]`.
        name: in the graph; empty for a constant.
        constant: its stored values.
        unit_axes: the program's axes that are stored with extent 1 and broadcast to `shape`.
    """

    shape: Shape
    dtype: str
    order: tuple[int, ...]
    name: str = ""
    constant: np.ndarray | None = None
    unit_axes: frozenset[int] = frozenset()

    def whole_constant(self) -> np.ndarray:
        """A constant's values in the program's order of axes, broadcast to its shape."""
        assert self.constant is not None
        return np.broadcast_to(self.constant.transpose(np.argsort(self.order)), self.shape)

    def is_unit(self, axis: int) -> bool:
        """Whether an axis is stored with extent 1."""
        return not self.shape or self.shape[axis] == 1 or axis in self.unit_axes


Rule = Callable[..., Value | list[Value]]  # of the graph, the equation and its operands


def constant(array: Any) -> Value:
    """A constant of the program."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype.name, tuple(range(array.ndim)), constant=array)


class Graph:
    """Nodes and constants, in order. Equal constants and equal nodes are written once."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, Shape, bytes], str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._known: dict[Any, list[str]] = {}
        self._symbols: dict[str, tuple[str, int]] = {}

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node and returns its output's name, or a list for several outputs."""
        key = (op, inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._known:
            names = [f"{op}_{len(self._nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
            self._nodes.append(helper.make_node(op, list(inputs), names, **attributes))
            self._known[key] = names
        names = self._known[key]
        return names[0] if outputs == 1 else names

    def constant_name(self, array: Any, dtype: Any = None) -> str:
        """The name of a constant tensor."""
        array = np.asarray(array, dtype, order="C")  # not ascontiguousarray, which makes rows of scalars
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def integers(self, values: Any) -> str:
        """The name of a constant of int64, as ONNX takes axes and sizes."""
        return self.constant_name(values, np.int64)

    def add_input(self, name: str, shape: Shape, dtype: str) -> Value:
        """An input; the symbols in its shape become known to `dimension`."""
        for axis, extent in enumerate(shape):
            if not isinstance(extent, int):
                self._symbols.setdefault(str(extent), (name, axis))
        return Value(shape, dtype, tuple(range(len(shape))), name)

    def dimension(self, extent: Any) -> str:
        """The name of a 1-element int64 tensor: a number or an expression of the inputs' symbols."""
        if isinstance(extent, int | np.integer):
            return self.integers([extent])
        found = extent._evaluate({symbol: _Extent(self, self._symbol(symbol)) for symbol in self._symbols})
        return str(found.name)

    def _symbol(self, symbol: str) -> str:
        name, axis = self._symbols[symbol]
        return str(self.add("Gather", self.add("Shape", name), self.integers([axis]), axis=0))

    def shape_name(self, shape: Sequence[Any]) -> str:
        """The name of an int64 tensor with this shape, for Reshape, Expand and Resize."""
        if all(isinstance(extent, int) for extent in shape):
            return self.integers(shape)
        return str(self.add("Concat", *map(self.dimension, shape), axis=0))

    def stored(self, value: Value, order: Sequence[int] | None = None, broadcast: bool = True) -> str:
        """The name of a value's tensor in an order of axes (the program's own if None), broadcast to its shape."""
        order = tuple(range(len(value.shape))) if order is None else tuple(order)
        permutation = [value.order.index(axis) for axis in order]
        if value.constant is not None:
            name = self.constant_name(value.constant.transpose(permutation))
        elif permutation == sorted(permutation):
            name = value.name
        else:
            name = self.add("Transpose", value.name, perm=permutation)
        if broadcast and value.unit_axes:
            name = self.add("Expand", name, self.shape_name([value.shape[axis] for axis in order]))
        return name

    def model(self, inputs: Sequence[Value], outputs: Sequence[tuple[str, Value]]) -> onnx.ModelProto:
        """The whole model; each output is stored in the program's order of axes under a name."""
        for name, value in outputs:
            self._nodes.append(helper.make_node("Identity", [self.stored(value)], [name]))

        def describe(name: str, value: Value) -> onnx.ValueInfoProto:
            shape = [x if isinstance(x, int) else str(x).replace(" ", "") for x in value.shape]
            return helper.make_tensor_value_info(name, ELEMENT_TYPES[value.dtype], shape)

        ends = [describe(value.name, value) for value in inputs], [describe(*each) for each in outputs]
        graph = helper.make_graph(self._nodes, "topformer", *ends, self._initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


class _Extent:
    """A number that the graph computes from its inputs' shapes; JAX's shape expressions are evaluated with it."""

    def __init__(self, graph: Graph, name: str):
        self.graph, self.name = graph, name

    def _apply(self, op: str, other: Any) -> "_Extent":
        name = other.name if isinstance(other, _Extent) else self.graph.dimension(other)
        return _Extent(self.graph, self.graph.add(op, self.name, name))

    def __add__(self, other: Any) -> "_Extent":
        return self._apply("Add", other)

    def __mul__(self, other: Any) -> "_Extent":
        return self._apply("Mul", other)

    __radd__, __rmul__ = __add__, __mul__

    def __divmod__(self, other: Any) -> tuple["_Extent", "_Extent"]:
        """Rounded down, also of negative numbers, where ONNX's Div rounds towards zero."""
        rest = self._apply("Mod", other)
        return (self + rest * -1)._apply("Div", other), rest


def translate(
    graph: Graph, program: core.ClosedJaxpr, inputs: Sequence[Value], overrides: Mapping[str, Rule]
) -> list[Value]:
    """Adds the operations of a program, from `jax.make_jaxpr`, to a graph and returns the program's outputs.

    `overrides` are rules for its jitted functions by name, used instead of their contents.

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
        found = _translate_equation(graph, equation, [read(atom) for atom in equation.invars], overrides)
        values |= zip(equation.outvars, found if isinstance(found, list) else [found], strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _translate_equation(
    graph: Graph, equation: Any, operands: list[Value], overrides: Mapping[str, Rule]
) -> Value | list[Value]:
    name, params = equation.primitive.name, equation.params
    if params.get("name") in overrides:
        return overrides[params["name"]](graph, equation, *operands)
    if name in CALLS:
        return translate(graph, params[CALLS[name]], operands, overrides)
    if name != "broadcast_in_dim" and all(value.constant is not None for value in operands) and operands:
        arrays = [value.whole_constant() for value in operands]
        found = equation.primitive.bind(*map(jnp.asarray, arrays), **params)
        return [constant(array) for array in (found if equation.primitive.multiple_results else [found])]
    if name not in RULES:
        raise NotImplementedError(f"there is no ONNX rule for JAX's {name}: add one to onnx_graph.py")
    return RULES[name](graph, equation, *operands)


def _output(equation: Any, name: str, order: Sequence[int] | None = None, **fields: Any) -> Value:
    """The single output of an equation, stored under a name."""
    aval = equation.outvars[0].aval
    order = tuple(range(len(aval.shape))) if order is None else tuple(order)
    return Value(tuple(aval.shape), aval.dtype.name, order, name, **fields)


def _elementwise(op: str) -> Callable[..., Value]:
    """The rule of an operation on each element; its operands are broadcast."""

    def apply(graph: Graph, equation: Any, *operands: Value) -> Value:
        # The order of the largest operand; constants take any.
        first = max(operands, key=lambda x: (len(x.shape), x.constant is None, -len(x.unit_axes)))
        names = [graph.stored(x, first.order if x.shape else (), broadcast=False) for x in operands]
        wide = [axis for axis, extent in enumerate(equation.outvars[0].aval.shape) if extent != 1]
        unit_axes = frozenset(axis for axis in wide if all(value.is_unit(axis) for value in operands))
        return _output(equation, graph.add(op, *names), first.order, unit_axes=unit_axes)

    return apply


def _max(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    for value, other in ((left, right), (right, left)):
        if other.constant is not None and not other.constant.any() and not value.unit_axes:
            return _output(equation, graph.add("Relu", value.name), value.order)
    return _elementwise("Max")(graph, equation, left, right)


def _clamp(graph: Graph, equation: Any, low: Value, value: Value, high: Value) -> Value:
    name = graph.add("Clip", value.name, graph.stored(low), graph.stored(high))
    return _output(equation, name, value.order, unit_axes=value.unit_axes)


def _select(graph: Graph, equation: Any, which: Value, if_false: Value, if_true: Value) -> Value:
    return _elementwise("Where")(graph, equation, which, if_true, if_false)


def _keep(graph: Graph, equation: Any, value: Value) -> Value:
    return value


def _cast(graph: Graph, equation: Any, value: Value) -> Value:
    dtype = equation.outvars[0].aval.dtype.name
    if dtype == value.dtype:
        return value
    name = graph.add("Cast", value.name, to=ELEMENT_TYPES[dtype])
    return _output(equation, name, value.order, unit_axes=value.unit_axes)


def _convolution(graph: Graph, equation: Any, images: Value, kernel: Value) -> Value:
    params = equation.params
    numbers = params["dimension_numbers"]
    assert set(params["lhs_dilation"]) == {1}
    assert params["batch_group_count"] == 1
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


def _dot_general(graph: Graph, equation: Any, left: Value, right: Value) -> Value:
    (left_over, right_over), (left_batch, right_batch) = equation.params["dimension_numbers"]
    if len(right.shape) == 2 and not left_batch and len(left_over) == 1:
        return _matrix_product(graph, equation, left, right, left_over[0], right_over[0])
    free = [
        [axis for axis in range(len(value.shape)) if axis not in (*over, *batch)]
        for value, over, batch in ((left, left_over, left_batch), (right, right_over, right_batch))
    ]
    if len(free[0]) == 1 and len(free[1]) == 1 and len(left_over) == 1:
        rows = graph.stored(left, (*left_batch, *free[0], *left_over))
        columns = graph.stored(right, (*right_batch, *right_over, *free[1]))
        return _output(equation, graph.add("MatMul", rows, columns))
    raise NotImplementedError(f"there is no ONNX rule for this product: {equation}")


def _matrix_product(graph: Graph, equation: Any, value: Value, matrix: Value, axis: int, over: int) -> Value:
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


def _without_axes(op: str) -> Callable[..., Value]:
    """The rule of an operation that removes axes."""

    def apply(graph: Graph, equation: Any, value: Value) -> Value:
        axes = equation.params["axes" if "axes" in equation.params else "dimensions"]
        places = [value.order.index(axis) for axis in axes]
        name = graph.stored(value, value.order)
        if op == "ArgMax":
            name = graph.add("ArgMax", name, axis=places[0], keepdims=0)
            name = graph.add("Cast", name, to=ELEMENT_TYPES[equation.outvars[0].aval.dtype.name])
        else:
            attributes = {} if op == "Squeeze" else {"keepdims": 0}
            name = graph.add(op, name, graph.integers(places), **attributes)
        left = [axis for axis in value.order if axis not in axes]
        return _output(equation, name, [sorted(left).index(axis) for axis in left])

    return apply


def _broadcast(graph: Graph, equation: Any, value: Value, *_: Value) -> Value:
    positions = equation.params["broadcast_dimensions"]
    shape = tuple(equation.outvars[0].aval.shape)
    new = [axis for axis in range(len(shape)) if axis not in positions]
    unit_axes = {axis for axis in new if shape[axis] != 1}
    for axis, position in enumerate(positions):
        if axis in value.unit_axes or (value.shape[axis] == 1 and shape[position] != 1):
            unit_axes.add(position)
    # New axes come first in memory, which keeps the order of the others.
    order = (*new, *(positions[axis] for axis in value.order))
    if value.constant is not None:
        stored = value.constant.reshape([1] * len(new) + list(value.constant.shape))
        return Value(shape, value.dtype, order, "", stored, frozenset(unit_axes))
    name = graph.add("Unsqueeze", value.name, graph.integers(range(len(new)))) if new else value.name
    return _output(equation, name, order, unit_axes=frozenset(unit_axes))


def _reshape(graph: Graph, equation: Any, value: Value, *_: Value) -> Value:
    shape = tuple(equation.outvars[0].aval.shape)
    symbolic = [axis for axis, extent in enumerate(shape) if not isinstance(extent, int)]
    if len(symbolic) == 1:  # the one that is left over
        shape = tuple(-1 if axis in symbolic else extent for axis, extent in enumerate(shape))
    return _output(equation, graph.add("Reshape", graph.stored(value), graph.shape_name(shape)))


def _transpose(graph: Graph, equation: Any, value: Value) -> Value:
    permutation = equation.params["permutation"]
    order = [permutation.index(axis) for axis in value.order]
    unit_axes = frozenset(permutation.index(axis) for axis in value.unit_axes)
    return _output(equation, value.name, order, unit_axes=unit_axes)


def _concatenate(graph: Graph, equation: Any, *operands: Value) -> Value:
    order = operands[0].order
    names = [graph.stored(value, order) for value in operands]
    axis = order.index(equation.params["dimension"])
    return _output(equation, graph.add("Concat", *names, axis=axis), order)


def _split(graph: Graph, equation: Any, value: Value) -> list[Value]:
    sizes, axis = equation.params["sizes"], value.order.index(equation.params["axis"])
    name = graph.stored(value, value.order)
    names = graph.add("Split", name, graph.integers(sizes), outputs=len(sizes), axis=axis)
    shapes = [tuple(var.aval.shape) for var in equation.outvars]
    return [Value(shape, value.dtype, value.order, name) for shape, name in zip(shapes, names, strict=True)]


def _iota(graph: Graph, equation: Any) -> Value:
    (extent,), dtype = equation.params["shape"], np.dtype(equation.params["dtype"])
    if isinstance(extent, int):
        return constant(np.arange(extent, dtype=dtype))
    zero, one = graph.integers(0), graph.integers(1)
    name = graph.add("Range", zero, graph.add("Squeeze", graph.dimension(extent)), one)
    return _output(equation, graph.add("Cast", name, to=ELEMENT_TYPES[dtype.name]))


def _dim_as_value(graph: Graph, equation: Any) -> Value:
    name = graph.add("Squeeze", graph.dimension(equation.params["dim"]))
    return _output(equation, graph.add("Cast", name, to=ELEMENT_TYPES[equation.outvars[0].aval.dtype.name]))


ELEMENTWISE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "min": "Min", "pow": "Pow",
    "exp": "Exp", "log": "Log", "neg": "Neg", "sqrt": "Sqrt", "tanh": "Tanh", "logistic": "Sigmoid",
    "floor": "Floor", "abs": "Abs", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "and": "And", "or": "Or", "not": "Not",
}  # fmt: skip
# By primitive. A layer of these primitives needs no further rule.
RULES: dict[str, Rule] = {
    **{name: _elementwise(op) for name, op in ELEMENTWISE.items()},
    **{f"reduce_{kind}": _without_axes(f"Reduce{kind.capitalize()}") for kind in ("max", "min", "sum")},
    **dict.fromkeys(("stop_gradient", "copy"), _keep),
    "argmax": _without_axes("ArgMax"),
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _cast,
    "dim_as_value": _dim_as_value,
    "dot_general": _dot_general,
    "iota": _iota,
    "max": _max,
    "reshape": _reshape,
    "select_n": _select,
    "split": _split,
    "squeeze": _without_axes("Squeeze"),
    "transpose": _transpose,
}
