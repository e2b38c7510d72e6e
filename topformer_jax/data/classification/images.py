"""One example of a classifier on the host: a random crop to train on, or the centre to evaluate. uint8 in and out.

Flip, normalisation, erasing and mixup follow on the device (`augment.py`).
"""

import math
from typing import TypedDict

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Int32
from ml_collections import ConfigDict

from topformer_jax.data import codecs
from topformer_jax.data.batch import Image
from topformer_jax.data.classification.rand_augment import rand_augment
from topformer_jax.data.example import Example
from topformer_jax.data.transforms import Size
from topformer_jax.runtime.errors import UserError

ASPECT = (3 / 4, 4 / 3)  # width by height of a random crop
RAND_AUGMENT_STD = 0.5  # of the magnitude
TRIES = 10  # crops that are drawn before the centre is taken
Box = tuple[int, int, int, int]  # (top, left, height, width) in pixels


class ClassExample(TypedDict):
    """A training example: an image of the crop's size, its class, and that size (height, width)."""

    image: Image
    label: np.int32
    size: Int32[np.ndarray, "2"]


def make_training_example(example: Example, config: ConfigDict, rng: np.random.Generator) -> ClassExample:
    """Decodes a random crop, resizes it bilinearly to `data.crop_size`, and applies RandAugment.

    A JPEG is decoded at a half, a quarter or an eighth where the crop still has the result's size then. So it is
    never shrunk by much more than 2, which bilinear weights do well; what is no JPEG is averaged over areas there.
    Files keep the orientation that they are stored in, as in torchvision.

    Raises:
        UserError: the file is damaged, or its class is none.
    """
    data, where = example.image, example.where[0]
    target = config.data.crop_size
    size = codecs.read_jpeg_size(data)
    if size is None:
        image = codecs.decode_image(data, where, orient=False)
        top, left, height, width = random_box((image.shape[0], image.shape[1]), config.data.crop_area, rng)
    else:
        top, left, height, width = random_box(size, config.data.crop_area, rng)
        reduction = choose_reduction((height, width), target)
        image = codecs.decode_image(data, where, reduction=reduction, orient=False)
        bottom, right = -(-(top + height) // reduction), -(-(left + width) // reduction)
        top, left = top // reduction, left // reduction
        height, width = bottom - top, right - left
    is_small = min(height / target[0], width / target[1]) < 2
    image = cv2.resize(
        image[top : top + height, left : left + width],
        target[::-1],
        interpolation=cv2.INTER_LINEAR if is_small else cv2.INTER_AREA,
    )
    if config.data.rand_augment:
        image = rand_augment(image, magnitude=config.data.rand_augment, std=RAND_AUGMENT_STD, rng=rng)
    return {"image": image, "label": read_label(example, config), "size": np.array(target, np.int32)}


def random_box(size: Size, area: tuple[float, float], rng: np.random.Generator) -> Box:
    """torchvision's `RandomResizedCrop`: a box of a random area and aspect ratio, anywhere in the image.

    Args:
        size: (height, width) of the image.
        area: range of the box's share of it, drawn uniformly; the aspect ratio's logarithm is, too.
        rng: the source of all draws.

    Returns:
        Of ten boxes the first one that fits; else the largest one in the centre whose aspect ratio is allowed.
    """
    height, width = size
    for _ in range(TRIES):
        pixels = rng.uniform(*area) * height * width
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        across, down = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < across <= width and 0 < down <= height:
            top = int(rng.integers(0, height - down + 1))
            return top, int(rng.integers(0, width - across + 1)), down, across
    down = max(min(height, round(width / ASPECT[0])), 1)
    across = max(min(width, round(height * ASPECT[1])), 1)
    return (height - down) // 2, (width - across) // 2, down, across


def choose_reduction(size: Size, target: Size) -> int:
    """The largest of 1, 2, 4 and 8 by which both sides can be divided and stay at least the target's.

    >>> choose_reduction((448, 600), (224, 224)), choose_reduction((447, 2000), (224, 224))
    (2, 1)
    """
    ratio = min(size[0] / target[0], size[1] / target[1])
    return next(each for each in (8, 4, 2, 1) if each <= max(ratio, 1))


def make_evaluation_image(example: Example, config: ConfigDict) -> Image:
    """The centre, `data.crop_size`, of an image whose short side is resized to `evaluation.short_side`.

    The bytes of torchvision's `Resize` (Pillow's bicubic) and `CenterCrop`.

    Raises:
        UserError: the file is damaged.
    """
    image = codecs.decode_image(example.image, example.where[0], orient=False)
    height, width = image.shape[:2]
    down, across = (int(config.evaluation.short_side * side / min(height, width)) for side in (height, width))
    picture = PIL.Image.fromarray(image).resize((across, down), PIL.Image.Resampling.BICUBIC)
    rows, columns = config.data.crop_size
    top, left = round((down - rows) / 2), round((across - columns) / 2)
    return np.array(picture)[top : top + rows, left : left + columns]


def read_label(example: Example, config: ConfigDict) -> np.int32:
    """An example's class.

    Raises:
        UserError: the model has no such class.
    """
    label = int(np.asarray(example.label).item())
    if not 0 <= label < config.model.num_classes:
        raise UserError(
            f"{example.where[1]} is {label}: expected 0 to {config.model.num_classes - 1}; check "
            "model.num_classes"
        )
    return np.int32(label)
