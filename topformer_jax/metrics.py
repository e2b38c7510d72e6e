"""Scores of a segmentation: counts are integers, summed over everything, and divided once."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

VOID = 255


class Scores(NamedTuple):
    """mmsegmentation's scores; a class that neither a label nor a prediction holds is nan and left out.

    `iou` and `accuracy` are per class; `miou` and `macc` their means, `aacc` the share of correct pixels.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    miou: float
    macc: float
    aacc: float


def confusion_matrix(
    labels: UInt8[np.ndarray, "h w"], predictions: Int[np.ndarray, "h w"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Pixel counts, a row a label, a column a prediction; pixels whose label is void are dropped."""
    valid = labels != VOID
    pairs = labels[valid].astype(np.int64) * classes + predictions[valid]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


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
