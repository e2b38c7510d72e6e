"""An ONNX graph while it is written: values with lazy transposes, nodes, constants.

The network's feature maps are `[n, h, w, c]`, and ONNX's convolutions take `[n, c, h, w]`. So a value knows in which
order its axes are stored, and is transposed where an operation needs another order only: a whole network has as few
transposes as one that was written for ONNX.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
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
        unit_axes: of the program, stored with extent 1 and to be broadcast to `shape`.
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


def constant(array: Any) -> Value:
    """A constant of the program."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype.name, tuple(range(array.ndim)), constant=array)


class Graph:
    """Nodes and constants, in order. Equal constants and equal nodes are written once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, Shape, bytes], str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._known: dict[Any, list[str]] = {}
        self._symbols: dict[str, tuple[str, int]] = {}

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node and returns its output's name; of several outputs a list."""
        key = (op, inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._known:
            names = [f"{op}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
            self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
            self._known[key] = names
        names = self._known[key]
        return names[0] if outputs == 1 else names

    def constant_name(self, array: Any) -> str:
        """The name of a constant tensor."""
        array = np.asarray(array, order="C")  # not ascontiguousarray, which makes rows of scalars
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def add_input(self, name: str, shape: Shape, dtype: str) -> Value:
        """An input; the symbols in its shape become known to `dimension`."""
        for axis, extent in enumerate(shape):
            if not isinstance(extent, int):
                self._symbols.setdefault(str(extent), (name, axis))
        return Value(shape, dtype, tuple(range(len(shape))), name)

    def dimension(self, extent: Any) -> str:
        """The name of a 1-element int64 tensor: a number or an expression of the inputs' symbols."""
        if isinstance(extent, int | np.integer):
            return self.constant_name(np.array([extent], np.int64))
        found = extent._evaluate({symbol: _Extent(self, self._symbol(symbol)) for symbol in self._symbols})
        return str(found.name)

    def _symbol(self, symbol: str) -> str:
        name, axis = self._symbols[symbol]
        shape = self.add("Shape", name)
        return str(self.add("Gather", shape, self.constant_name(np.array([axis], np.int64)), axis=0))

    def shape_name(self, shape: Sequence[Any]) -> str:
        """The name of an int64 tensor with this shape, for Reshape, Expand and Resize."""
        if all(isinstance(extent, int) for extent in shape):
            return self.constant_name(np.array(shape, np.int64))
        return str(self.add("Concat", *map(self.dimension, shape), axis=0))

    def stored(self, value: Value, order: Sequence[int] | None = None, broadcast: bool = True) -> str:
        """The name of a value's tensor in an order of axes (the program's own if None), broadcast to its shape."""
        order = tuple(range(len(value.shape))) if order is None else tuple(order)
        permutation = [value.order.index(axis) for axis in order]
        is_same = permutation == sorted(permutation)
        if value.constant is not None:
            name = self.constant_name(value.constant.transpose(permutation))
        else:
            name = value.name if is_same else self.add("Transpose", value.name, perm=permutation)
        if broadcast and value.unit_axes:
            name = self.add("Expand", name, self.shape_name([value.shape[axis] for axis in order]))
        return name

    def model(self, inputs: Sequence[Value], outputs: Sequence[tuple[str, Value]]) -> onnx.ModelProto:
        """The whole model; each output is stored in the program's order of axes under a name."""
        names = [self.stored(value) for _, value in outputs]
        for (name, _), stored in zip(outputs, names, strict=True):
            self.nodes.append(helper.make_node("Identity", [stored], [name]))
        infos = [_describe_values(values) for values in ([(value.name, value) for value in inputs], outputs)]
        nodes = _used_nodes(self.nodes, {name for name, _ in outputs})
        read = {name for node in nodes for name in node.input}
        tensors = [tensor for tensor in self._initializers if tensor.name in read]
        graph = helper.make_graph(nodes, "topformer", infos[0], infos[1], tensors)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _used_nodes(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    used = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            used.append(node)
            wanted |= set(node.input)
    return used[::-1]


def _describe_values(values: Sequence[tuple[str, Value]]) -> list[onnx.ValueInfoProto]:
    """Names, types and shapes of inputs or outputs; symbols are written by name."""
    return [
        helper.make_tensor_value_info(
            name,
            ELEMENT_TYPES[value.dtype],
            [extent if isinstance(extent, int) else str(extent).replace(" ", "") for extent in value.shape],
        )
        for name, value in values
    ]


class _Extent:
    """A number that the graph computes from its inputs' shapes: what JAX's shape expressions are evaluated with."""

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
