"""Scores of a segmentation: pixels are counted as integers over the whole data set, then divided once."""

from typing import NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float64, Int, Int32, UInt8

from topformer_jax.data.batch import IGNORE_LABEL, Labels


class Scores(NamedTuple):
    """mmsegmentation's scores, as shares of 1.

    A class that occurs in no label and no prediction is nan and does not count in the means.
    """

    iou: Float64[np.ndarray, " classes"]
    accuracy: Float64[np.ndarray, " classes"]  # of the class's pixels; nan without such a label
    miou: float  # mean of `iou`
    macc: float  # mean of `accuracy`
    aacc: float  # correct pixels of all labelled pixels


def count_confusions(
    labels: UInt8[Array, "*size"], predictions: Int[Array, "*size"], classes: int
) -> Int32[Array, " pairs"]:
    """Counts the pixels of each pair of label and prediction: a flattened confusion matrix.

    The label's index varies slowest; a label that is no class (void is 255) is not counted. Runs on the device. A TPU
    scatters slowly, so there the counts are a product of one-hot matrices, exact in float32 for fewer than 2**24
    pixels; elsewhere they are a scatter-add.
    """
    labels, predictions = labels.ravel().astype(jnp.int32), predictions.ravel()

    def scatter(labels: Array, predictions: Array) -> Array:
        pairs = jnp.where(labels < classes, labels * classes + predictions, classes**2)
        return jnp.zeros(classes**2 + 1, jnp.int32).at[pairs].add(1)[:-1]

    def multiply(labels: Array, predictions: Array) -> Array:
        one_hot = [jax.nn.one_hot(x, classes, dtype=jnp.bfloat16) for x in (labels, predictions)]
        product = jnp.matmul(one_hot[0].T, one_hot[1], preferred_element_type=jnp.float32)
        return product.astype(jnp.int32).ravel()

    return lax.platform_dependent(labels, predictions, tpu=multiply, default=scatter)


def count_on_host(label: Labels, prediction: Labels, classes: int) -> Int[np.ndarray, "classes classes"]:
    """The confusion matrix of one image in NumPy: the counts of `count_confusions`.

    >>> count_on_host(np.array([[0, 1, 255]], np.uint8), np.array([[1, 1, 1]], np.uint8), 2).tolist()
    [[0, 1], [0, 1]]
    """
    counted = label < classes
    pairs = label[counted].astype(np.int64) * classes + prediction[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def keep_boundary(label: Labels, pixels: int) -> Labels:
    """A label that is IGNORE_LABEL except near its boundaries: the trimap by which DeepLab scores boundaries.

    Kohli et al. 2009; Chen et al. 2015, https://arxiv.org/abs/1412.7062. A pixel stays if the square of
    `2 * pixels + 1` around it, cut off at the edge of the image, holds another value. Void is a value too.

    >>> keep_boundary(np.array([[0, 0, 0, 1, 1, 1]], np.uint8), 1).tolist()
    [[255, 255, 0, 1, 255, 255]]
    """
    square = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    is_near = cv2.dilate(label, square) != cv2.erode(label, square)
    return np.where(is_near, label, np.uint8(IGNORE_LABEL))


def compute_scores(confusion: Int[np.ndarray, "classes classes"]) -> Scores:
    """The scores of a confusion matrix of pixels: a row a label, a column a prediction.

    >>> import numpy as np
    >>> scores = compute_scores(np.array([[6, 2], [0, 2]]))
    >>> scores.iou.tolist(), scores.accuracy.tolist(), scores.miou, scores.aacc
    ([0.75, 0.5], [0.75, 1.0], 0.625, 0.8)
    """
    correct = np.diag(confusion).astype(np.float64)
    labelled, predicted = confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = correct / (labelled + predicted - correct)
        accuracy = correct / labelled
        total = correct.sum() / confusion.sum()

    def mean(values: np.ndarray) -> float:
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    return Scores(iou, accuracy, mean(iou), mean(accuracy), float(total))
