"""How many pixels of each class the labels hold, and class weights from these counts."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int, Int64
from ml_collections import ConfigDict

from topformer_jax.data import loader
from topformer_jax.data.batch import Source
from topformer_jax.runtime.errors import UserError

COUNTED_AT_ONCE = 1 << 20  # pixels; np.bincount takes eight bytes for each


def count_pixels(
    source: Source, config: ConfigDict, indices: Sequence[int]
) -> Iterator[Int64[np.ndarray, " classes"]]:
    """Counts the pixels of each class in the labels of some examples, in order, by threads.

    >>> from topformer_jax import config
    >>> from topformer_jax.data import sources
    >>> settings = config.shapes()
    >>> (pixels,) = count_pixels(sources.open_source(settings, "train"), settings, [0])
    >>> pixels.shape, int(pixels.sum()) == 160 * 160
    ((10,), True)

    Raises:
        UserError: a label cannot be read; with `data.skip_unreadable` its counts are 0.
    """
    classes = config.model.num_classes

    def count(index: int) -> np.ndarray:
        try:
            label = loader.decode_label(source[index], config)
        except UserError:
            if not config.data.skip_unreadable:
                raise
            return np.zeros(classes, np.int64)
        parts = np.array_split(label.reshape(-1), 1 + label.size // COUNTED_AT_ONCE)
        return np.sum([np.bincount(part, minlength=256)[:classes] for part in parts], 0)

    return loader.map_in_threads(count, indices)


def weigh_classes(
    weighting: str, pixels: Int[np.ndarray, "labels classes"]
) -> Float64[np.ndarray, " classes"]:
    """The class weights of a name in `loss.class_weight`, scaled to a mean of 1 over the labelled pixels.

    With the share p of a class, of the labelled pixels, before the scaling:

        balanced: 1 / (number of classes * p), as scikit-learn; its mean is 1
        enet: 1 / log(1.02 + p) (Paszke et al. 2016)
        median_frequency: median(f) / f, with f the share of the labelled pixels of the labels that hold the class
            (Eigen and Fergus 2015)

    A class without pixels has weight 0, and does not count in the number of classes or the median.

    Args:
        weighting: the name.
        pixels: of each class in each label; not all 0.

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
