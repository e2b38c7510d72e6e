"""Augmentation of a classifier's batch on the device: flip, normalisation, random erasing, mixup.

As in `augment.py`, an example's draws depend only on the seed, its epoch and its index. Mixup pairs an example with
its neighbour in the batch, which lies on the same device: devices exchange no images.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from topformer_jax.data.augment import normalize
from topformer_jax.data.batch import Batch

ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height by width
TRIES = 10  # rectangles that are drawn; the first one that fits is erased


class MixedClasses(NamedTuple):
    """The classes of a mixed image: `share` of it shows `first`, the rest `second`."""

    first: Int32[Array, " n"]
    second: Int32[Array, " n"]
    share: Float[Array, " n"]


def augment_classes(
    batch: Batch, config: ConfigDict, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "n h w 3"], MixedClasses]:
    """Flips, normalises, erases and mixes a batch of JAX arrays for training; with mixup, an even number of examples.

    `config` gives the probabilities and the seed. An example's random key is `fold_in(fold_in(key(seed), epoch),
    index)`.

    Returns normalised images of `dtype`, and their classes.
    """
    data, root = config.data, jax.random.key(config.seed)

    def augment_example(image: Array, index: Array, epoch: Array) -> tuple[Array, Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(root, epoch), index), 4)
        image = flip(image, keys[0], data.flip_prob)
        image = normalize(image[None], dtype)[0]
        if data.erasing_prob:
            image = erase(image, keys[1], keys[2], data.erasing_prob)
        if not data.mixup_alpha:
            return image, jnp.ones((), dtype)
        alpha = jnp.asarray(data.mixup_alpha, dtype)
        return image, jax.random.beta(keys[3], alpha, alpha, dtype=dtype)

    with jax.named_scope("augment"):
        arrays = (jnp.asarray(batch["image"]), jnp.asarray(batch["index"]), jnp.asarray(batch["epoch"]))
        images, share = jax.vmap(augment_example)(*arrays)
        labels = jnp.asarray(batch["label"])
        if data.mixup_alpha:
            return mix(images, share), MixedClasses(labels, swap_neighbours(labels), share)
        return images, MixedClasses(labels, labels, share)


def flip(image: UInt8[Array, "h w 3"], key: PRNGKeyArray, probability: float) -> UInt8[Array, "h w 3"]:
    """Reverses the columns with a probability."""
    return jnp.where(jax.random.bernoulli(key, jnp.float32(probability)), image[:, ::-1], image)


def erase(
    image: Float[Array, "h w 3"], key: PRNGKeyArray, noise_key: PRNGKeyArray, probability: float
) -> Float[Array, "h w 3"]:
    """Fills a random rectangle of a normalised image with normal noise, with a probability.

    timm's `RandomErasing` with mode "pixel" (Zhong et al. 2017, https://arxiv.org/abs/1708.04896): the area is
    uniform in 0.02..1/3 of the image's, the logarithm of the aspect ratio uniform. The first of ten rectangles that
    is lower and narrower than the image is erased, if there is one.
    """
    height, width = image.shape[:2]
    keys = jax.random.split(key, 5)
    area = jax.random.uniform(keys[0], (TRIES,), jnp.float32, *ERASED_AREA) * height * width
    logs = [float(np.log(bound)) for bound in ERASED_ASPECT]
    aspect = jnp.exp(jax.random.uniform(keys[1], (TRIES,), jnp.float32, *logs))
    downs, acrosses = (jnp.round(jnp.sqrt(side)).astype(jnp.int32) for side in (area * aspect, area / aspect))
    fits = (downs < height) & (acrosses < width)
    first = jnp.argmax(fits)
    down, across = downs[first], acrosses[first]
    top = jax.random.randint(keys[2], (), 0, height - down + 1, jnp.int32)
    left = jax.random.randint(keys[3], (), 0, width - across + 1, jnp.int32)
    erased = jax.random.bernoulli(keys[4], jnp.float32(probability)) & fits[first]
    rows = jnp.arange(height, dtype=jnp.int32)[:, None, None]
    columns = jnp.arange(width, dtype=jnp.int32)[:, None]
    inside = (rows >= top) & (rows < top + down) & (columns >= left) & (columns < left + across)
    noise = jax.random.normal(noise_key, image.shape, image.dtype)
    return jnp.where(inside & erased, noise, image)


def mix(images: Float[Array, "n h w 3"], share: Float[Array, " n"]) -> Float[Array, "n h w 3"]:
    """`share * image + (1 - share) * neighbour` (mixup, Zhang et al. 2018, https://arxiv.org/abs/1710.09412)."""
    share = share[:, None, None, None]
    return share * images + (1 - share) * swap_neighbours(images)


def swap_neighbours(array: Array) -> Array:
    """Swaps rows 0 and 1, 2 and 3, and so on.

    >>> swap_neighbours(jnp.arange(4)).tolist()
    [1, 0, 3, 2]
    """
    pairs = array.reshape(-1, 2, *array.shape[1:])
    return pairs[:, ::-1].reshape(array.shape)
