"""The function that an exported file computes: pictures in, labels (or logits, probabilities, scores) out.

It runs the model's own modules with BatchNorms folded and each layer as one operation, so that a new block or
injection needs nothing here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, UInt8

from topformer_jax import models
from topformer_jax.data.augment import normalize
from topformer_jax.models.layers import fold_batch_norms
from topformer_jax.ops.resample import axis_matrix_of, bilinear_matrix, resize

Function = Callable[[UInt8[Array, "n h w 3"]], Array]


def input_shape(size: Sequence[int] | None) -> tuple[Any, ...]:
    """The shape of a file's input: any number of images, of one size or, if None, of any."""
    n, h, w = jax.export.symbolic_shape("n, h, w")
    return (n, *((h, w) if size is None else size), 3)


def make_function(
    model: models.Segmenter | models.Classifier,
    output: str,
    stride: int = 1,
    *,
    conv_impl: str = "single_op",
    fold: bool = True,
    by_rows: bool = False,
) -> Function:
    """The function of images, uint8 `[n, h, w, 3]`, RGB, that a file computes.

    Args:
        model: in inference mode, float32.
        output: "labels", uint8 `[n, h, w]`; "probabilities", float32 `[n, h, w, classes]`; "logits", at stride 8;
            "scores" of a classifier, `[n, classes]`.
        stride: of labels and probabilities: 2 is for half of the height and width, rounded up.
        conv_impl: the setting `model.conv_impl` to compute with: "auto" is for evaluation.
        fold: whether BatchNorms become part of the convolutions; files are compared with a model without folding.
        by_rows: whether labels are found one row at a time; XLA is slow with all at once.
    """
    network: Any = fold_batch_norms(model) if fold else nnx.clone(model)
    for _, module in nnx.iter_modules(network):
        if hasattr(module, "policy"):
            module.policy = dataclasses.replace(module.policy, conv_impl=conv_impl)

    def compute(images: UInt8[Array, "n h w 3"]) -> Array:
        logits = network(normalize(images))
        if output in ("logits", "scores"):
            return logits
        size = tuple((side - 1) // stride + 1 for side in images.shape[1:3])
        if output == "labels" and by_rows:
            return _labels_by_rows(logits, size)
        if output == "labels":
            return label_pixels(logits, size=size)
        return jax.nn.softmax(enlarge(logits, size=size), axis=-1)

    return compute


# Exporters find the next two by name, and may write operations of their own for them.
@functools.partial(jax.jit, static_argnames="size")
def enlarge(logits: Float[Array, "n h w classes"], size: Any) -> Float[Array, "n height width classes"]:
    """The resize of the logits."""
    return resize(logits, size, method="single_op")


@functools.partial(jax.jit, static_argnames="size")
def label_pixels(logits: Float[Array, "n h w classes"], size: Any) -> UInt8[Array, "n height width"]:
    """The largest class of each pixel of enlarged logits."""
    return jnp.argmax(enlarge(logits, size=size), axis=-1).astype(jnp.uint8)


def _labels_by_rows(logits: Float[Array, "n h w classes"], size: Any) -> UInt8[Array, "n height width"]:
    height, width = size
    rows = jnp.asarray(axis_matrix_of(bilinear_matrix, logits.shape[1], height))
    columns = jnp.asarray(axis_matrix_of(bilinear_matrix, logits.shape[2], width))

    def label_row(weights: Float[Array, " h"]) -> UInt8[Array, "n width"]:
        row = lax.dot_general(logits, weights, (((1,), (0,)), ((), ())), "highest")  # [n, w, classes]
        values = lax.dot_general(row, columns, (((1,), (1,)), ((), ())), "highest")  # [n, classes, width]
        return jnp.argmax(values, axis=1).astype(jnp.uint8)

    return jnp.moveaxis(lax.map(label_row, rows), 0, 1)
