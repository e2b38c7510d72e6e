"""From a picture to labels, and from many to scores: what training and the commands share."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from topformer_jax import models
from topformer_jax.data.augment import normalise
from topformer_jax.data.transforms import test_image
from topformer_jax.metrics import confusion_matrix
from topformer_jax.ops import at_least_float32
from topformer_jax.ops.resample import resize

Predict = Callable[[UInt8[np.ndarray, "h w 3"]], Int[np.ndarray, "h w"]]


def predictor(config: ConfigDict, tensors: Mapping[str, np.ndarray]) -> Predict:
    """A function from an RGB picture of any size to its labels, on this process's first device.

    As officially: the picture is fitted into `evaluation.scale`, brought up to multiples of `evaluation.align`,
    and the logits are resized twice in a row, to the network's input and to the picture. A program is
    compiled for every new pair of sizes.
    """
    model = models.build(config)
    model.eval()
    graphdef, _ = nnx.split(model)
    device = jax.local_devices()[0]
    values = jax.device_put(dict(tensors), device)

    @functools.partial(jax.jit, static_argnums=2)
    def labels(values: Any, image: jax.Array, size: tuple[int, int]) -> jax.Array:
        images = normalise(image[None], at_least_float32(models.DTYPES[config.model.dtype]))
        logits = models.with_tensors(graphdef, values)(images)
        precision = config.model.precision
        logits = resize(logits, (image.shape[0], image.shape[1]), precision=precision)
        return jnp.argmax(resize(logits, size, precision=precision)[0], -1)

    def predict(image: np.ndarray) -> np.ndarray:
        fitted = test_image(image, scale=config.evaluation.scale, align=config.evaluation.align)
        return np.asarray(labels(values, jax.device_put(fitted, device), image.shape[:2]))

    return predict


def evaluate(
    predict: Predict,
    examples: Iterable[tuple[int, str, np.ndarray, np.ndarray]],
    classes: int,
    *,
    each: Callable[[int, np.ndarray, np.ndarray, np.ndarray], None] = lambda *_: None,
) -> Int[np.ndarray, "classes classes"]:
    """The confusion matrix of all processes' examples together; every example counts once.

    Args:
        predict: from an image to labels.
        examples: this process's share: index, name, image, label.
        classes: their number.
        each: called with every index, image, label and prediction.
    """
    confusion = np.zeros((classes, classes), np.int64)
    for index, _, image, label in examples:
        prediction = predict(image)
        confusion += confusion_matrix(label, prediction, classes)
        each(index, image, label, prediction)
    if jax.process_count() == 1:
        return confusion
    # Pixel counts outgrow 32 bits: two halves travel.
    halves = np.stack([confusion >> 31, confusion & (2**31 - 1)]).astype(np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(halves)).astype(np.int64).sum(0)
    return (gathered[0] << 31) + gathered[1]
