"""Rare classes: weights in the loss, examples that are drawn for a class, and parts of crops that are pasted."""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float64, Int

from topformer_jax.data.transforms import CroppedExample, count_classes
from topformer_jax.runtime.errors import UserError


class ClassDraws(NamedTuple):
    """Which examples hold each class that occurs, and how likely each is drawn."""

    classes: Int[np.ndarray, " present"]
    rarity: Float64[np.ndarray, " present"]  # 1 / sqrt(pixels), scaled to a sum of 1
    # For each of the classes, the indices of examples in order, and their shares of its pixels.
    holders: tuple[Int[np.ndarray, " examples"], ...]
    shares: tuple[Float64[np.ndarray, " examples"], ...]

    def draw(self, rng: np.random.Generator, *, by_rarity: bool = False) -> tuple[int, int]:
        """Draws a class, then one of its pixels; returns (class, index of the example that holds the pixel).

        Each class is equally likely, as in class-balanced sampling (Kang et al. 2020,
        https://arxiv.org/abs/1910.09217). With `by_rarity`, its probability is proportional to 1 / sqrt(its pixels)
        (Mahajan et al. 2018, https://arxiv.org/abs/1805.00932).
        """
        place = int(rng.choice(len(self.classes), p=self.rarity if by_rarity else None))
        return int(self.classes[place]), int(rng.choice(self.holders[place], p=self.shares[place]))


def group_by_class(pixels: Int[np.ndarray, "labels classes"]) -> ClassDraws:
    """The examples by class, from the pixels of each class in each label; a UserError if there are no pixels.

    >>> draws = group_by_class(np.array([[90, 0, 4], [10, 0, 0]]))
    >>> draws.classes.tolist(), draws.rarity.round(2).tolist()
    ([0, 2], [0.17, 0.83])
    >>> [indices.tolist() for indices in draws.holders], [shares.tolist() for shares in draws.shares]
    ([[0, 1], [0]], [[0.9, 0.1], [1.0]])
    """
    total = pixels.sum(0, dtype=np.int64)
    classes = np.flatnonzero(total)
    if not len(classes):
        raise UserError("no training label has a pixel of a class, so no example can be drawn for one: run check")
    rarity = 1 / np.sqrt(total[classes])
    holders = tuple(np.flatnonzero(pixels[:, each]) for each in classes)
    shares = tuple(pixels[indices, each] / total[each] for each, indices in zip(classes, holders, strict=True))
    return ClassDraws(classes, rarity / rarity.sum(), holders, shares)


def mix(
    crop: CroppedExample, other: CroppedExample, method: str, pasted: int | None, rng: np.random.Generator
) -> None:
    """Pastes part of another crop, its pixels and their labels, onto `crop` in place, where neither is padded.

    "cutmix" pastes a box with the crop's aspect ratio anywhere, whose area is uniform in 0..1, cut off at the edges
    (Yun et al. 2019, https://arxiv.org/abs/1905.04899); "classmix" half of the other crop's classes, rounded down
    (Olsson et al. 2021, https://arxiv.org/abs/2007.07936); "paste" the class `pasted` (after Ghiasi et al. 2021,
    https://arxiv.org/abs/2012.07177, for labels without instances).
    """
    height, width = np.minimum(crop["size"], other["size"])
    label = other["label"][:height, :width]
    if method == "cutmix":
        chosen = np.zeros((height, width), np.uint8)
        half = np.sqrt(rng.random()) / 2
        y, x = rng.random(2)
        rows, columns = (
            slice(max(round((middle - half) * side), 0), round((middle + half) * side))
            for middle, side in ((y, height), (x, width))
        )
        chosen[rows, columns] = 1
    else:
        classes = np.array([pasted])
        if method == "classmix":
            present = np.flatnonzero(count_classes(label))
            classes = rng.choice(present, len(present) // 2, replace=False)
        chosen = cv2.LUT(label, np.isin(np.arange(256), classes).astype(np.uint8))
    for name in ("image", "label"):
        cv2.copyTo(other[name][:height, :width], chosen, crop[name][:height, :width])


def weigh_classes(weighting: str, pixels: Int[np.ndarray, "labels classes"]) -> Float64[np.ndarray, " classes"]:
    """The class weights of a name in `loss.class_weight`, scaled to a mean of 1 over the labelled pixels.

    With the share p of a class, of the labelled pixels, before the scaling:

        balanced: 1 / (number of classes * p), as scikit-learn; its mean is 1
        enet: 1 / log(1.02 + p) (Paszke et al. 2016)
        median_frequency: median(f) / f, with f the share of the labelled pixels of the labels that hold the class
            (Eigen and Fergus 2015)

    A class without pixels has weight 0, and does not count in the number of classes or the median.

    >>> weigh_classes("balanced", np.array([[10, 30, 0], [0, 60, 0]])).round(3).tolist()
    [5.0, 0.556, 0.0]
    """
    total = pixels.sum(0)
    occurs, share = total > 0, total / total.sum()
    with np.errstate(divide="ignore", invalid="ignore"):  # of classes without pixels
        if weighting == "balanced":
            weights = 1 / (occurs.sum() * share)
        elif weighting == "enet":
            weights = 1 / np.log(1.02 + share)
        else:
            frequency = total / (pixels.sum(1) @ (pixels > 0))
            weights = np.median(frequency[occurs]) / frequency
    weights = np.where(occurs, weights, 0)
    return weights / (share @ weights)
