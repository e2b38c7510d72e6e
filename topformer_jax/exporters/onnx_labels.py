"""How ONNX files for processors enlarge logits and find labels.

Every pixel lies in a cell: four neighbouring logits of each class, whose average by the pixel's weights is the
class's score there. A class whose largest corner is below the smallest corner of another one has a lower score at
every pixel of the cell. A class for which that holds in every cell of all images is nowhere the label and is left out
before anything is enlarged. Where none can be left out, all stay. The labels are those of all classes, but for ties
by rounding; of logits with NaN or infinities they are arbitrary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from topformer_jax.exporters.onnx_graph import ELEMENT_TYPES, Graph, Value

STORED = (0, 3, 1, 2)  # classes before height and width, as convolutions give them


def resize(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    """The rule of `network.enlarge`: ONNX's own resize, with classes last."""
    shape = tuple(equation.outvars[0].aval.shape)
    name = _resize(graph, graph.stored(operands[0]), graph.shape_name(shape))
    return [Value(shape, operands[0].dtype, (0, 1, 2, 3), name)]


def label_pixels(graph: Graph, operands: list[Value], equation: Any) -> list[Value]:
    """The rule of `network.label_pixels`: the largest class of each pixel, among those that can be it."""
    (logits,), result = operands, equation.outvars[0].aval
    kept = _possible_classes(graph, graph.stored(logits, STORED))
    picked = graph.add("Gather", graph.stored(logits, STORED), kept, axis=1)
    size = graph.add("Concat", graph.shape_name(result.shape), graph.add("Shape", kept), axis=0)
    values = _resize(graph, graph.add("Transpose", picked, perm=(0, 2, 3, 1)), size)
    found = graph.add("ArgMax", values, axis=3, keepdims=0)
    labels = graph.add("Cast", kept, to=ELEMENT_TYPES[result.dtype.name])
    name = graph.add("Gather", labels, found, axis=0)
    return [Value(tuple(result.shape), result.dtype.name, (0, 1, 2), name)]


def _resize(graph: Graph, name: str, size: str) -> str:
    # WebGPU computes Resize of these axes wrongly and says nothing, so its files do without this module.
    how = "half_pixel"
    return str(graph.add("Resize", name, "", "", size, mode="linear", coordinate_transformation_mode=how))


def _possible_classes(graph: Graph, logits: str) -> str:
    """The classes, int64 `[possible]`, of logits `[n, classes, h, w]` that may be some pixel's label."""

    def largest(name: str, axes: Sequence[int], keepdims: int = 0) -> str:
        return str(
            graph.add("ReduceMax", name, graph.constant_name(np.array(axes, np.int64)), keepdims=keepdims)
        )

    def largest_corner(name: str) -> str:  # of each cell; those at the border have two corners or one
        return str(graph.add("MaxPool", name, kernel_shape=(2, 2), pads=(1, 1, 1, 1)))

    smallest_corner = graph.add("Neg", largest_corner(graph.add("Neg", logits)))
    surely_reached = largest(smallest_corner, [1], keepdims=1)
    lead = largest(
        graph.add("Sub", largest_corner(logits), surely_reached), [0, 2, 3]
    )  # of each class, at its best
    # NaN and infinities may leave no class that leads, and a label there must be: those that are behind least stay.
    bound = graph.add("Min", largest(lead, [0]), graph.constant_name(np.float32(0)))
    stays = graph.add("Not", graph.add("Less", lead, bound))
    return str(
        graph.add("Squeeze", graph.add("NonZero", stays), graph.constant_name(np.array([0], np.int64)))
    )


# By the names of the functions of `network` that they stand for.
RULES = {"enlarge": resize, "label_pixels": label_pixels}
