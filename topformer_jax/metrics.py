"""Scores of a segmentation: counts are integers, sum_over_processes over everything, and divided once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int32, UInt8


class Scores(NamedTuple):
    """mmsegmentation's scores; a class that neither a label nor a prediction holds is nan and left out.

    `iou` and `accuracy` are per class; `miou` and `macc` their means, `aacc` the share of correct pixels.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    miou: float
    macc: float
    aacc: float


def confusion_counts(
    labels: UInt8[Array, "*size"], predictions: Int[Array, "*size"], classes: int
) -> Int32[Array, " pairs"]:
    """How many pixels have each pair of label and prediction, `classes` squared of them, the label first.

    A label that is no class (void is 255) does not count. On the device: a scatter of ones, or on a TPU, which does
    not scatter well, a product of two indicators, exact in float32 up to 2**24 pixels.
    """
    labels, predictions = labels.ravel().astype(jnp.int32), predictions.ravel()

    def scattered(labels: Array, predictions: Array) -> Array:
        pairs = jnp.where(labels < classes, labels * classes + predictions, classes**2)
        return jnp.zeros(classes**2 + 1, jnp.int32).at[pairs].add(1)[:-1]

    def multiplied(labels: Array, predictions: Array) -> Array:
        one, two = (jax.nn.one_hot(x, classes, dtype=jnp.bfloat16) for x in (labels, predictions))
        product = jnp.matmul(one.T, two, preferred_element_type=jnp.float32)
        return product.astype(jnp.int32).ravel()

    return lax.platform_dependent(labels, predictions, tpu=multiplied, default=scattered)


def scores(confusion: Int[np.ndarray, "classes classes"]) -> Scores:
    """The scores of a confusion matrix."""
    correct = np.diag(confusion).astype(np.float64)
    labelled, predicted = confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = correct / (labelled + predicted - correct)
        accuracy = correct / labelled
        total = correct.sum() / confusion.sum()

    def mean(values: np.ndarray) -> float:
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    return Scores(iou, accuracy, mean(iou), mean(accuracy), float(total))
