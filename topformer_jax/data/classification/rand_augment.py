"""RandAugment on the host: the operations of timm's `rand-m9-mstd0.5`, as timm computes them with Pillow.

Cubuk et al. 2020, https://arxiv.org/abs/1909.13719. They run on the host: under `vmap`, a device would compute all
fifteen operations twice for every image.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image as pillow, ImageEnhance, ImageOps

from topformer_jax.data.batch import Image

LAYERS, PROBABILITY = 2, 0.5  # operations that are drawn for an image, and how often each is applied
LARGEST = 10  # magnitude
FILL = (124, 116, 104)  # of what comes from outside the image: ImageNet's mean
Operation = Callable[[pillow.Image, Any], pillow.Image]
Argument = Callable[[float, int], int | float]


def rand_augment(image: Image, *, magnitude: int | float, std: int | float, rng: np.random.Generator) -> Image:
    """Applies each of two random operations with probability 0.5.

    The operations' magnitudes are normal with this mean and standard deviation, cut to 0..10.
    """
    picture = pillow.fromarray(image)
    for number in rng.integers(0, len(OPERATIONS), LAYERS):
        if rng.random() >= PROBABILITY:
            continue
        level = min(max(rng.normal(magnitude, std), 0.0), LARGEST) / LARGEST
        sign = 1 if rng.random() < 0.5 else -1
        operation, argument = list(OPERATIONS.values())[number]
        picture = operation(picture, argument(level, sign))
    return np.array(picture)


def _transform(picture: pillow.Image, *matrix: int | float) -> pillow.Image:
    """Fetches each pixel (x, y) from (a x + b y + c, d x + e y + f), bilinearly."""
    bilinear = pillow.Resampling.BILINEAR
    return picture.transform(picture.size, pillow.Transform.AFFINE, matrix, bilinear, fillcolor=FILL)


def _enhancer(kind: type) -> tuple[Operation, Argument]:
    return lambda picture, factor: kind(picture).enhance(factor), lambda level, _: level * 1.8 + 0.1


def _signed(largest: int | float) -> Argument:
    return lambda level, sign: sign * level * largest


# By name: the operation, and its argument from the level in 0..1 and a random sign. timm's list without "increasing".
OPERATIONS: dict[str, tuple[Operation, Argument]] = {
    "autocontrast": (lambda picture, _: ImageOps.autocontrast(picture), lambda *_: 0),
    "equalize": (lambda picture, _: ImageOps.equalize(picture), lambda *_: 0),
    "invert": (lambda picture, _: ImageOps.invert(picture), lambda *_: 0),
    "rotate": (lambda p, degrees: p.rotate(degrees, pillow.Resampling.BILINEAR, fillcolor=FILL), _signed(30)),
    "posterize": (ImageOps.posterize, lambda level, _: int(level * 4)),
    "solarize": (ImageOps.solarize, lambda level, _: min(256, int(level * 256))),
    "solarize_add": (
        lambda picture, addend: picture.point([min(255, v + addend) if v < 128 else v for v in range(256)] * 3),
        lambda level, _: min(128, int(level * 110)),
    ),
    "color": _enhancer(ImageEnhance.Color),
    "contrast": _enhancer(ImageEnhance.Contrast),
    "brightness": _enhancer(ImageEnhance.Brightness),
    "sharpness": _enhancer(ImageEnhance.Sharpness),
    "shear_x": (lambda picture, factor: _transform(picture, 1, factor, 0, 0, 1, 0), _signed(0.3)),
    "shear_y": (lambda picture, factor: _transform(picture, 1, 0, 0, factor, 1, 0), _signed(0.3)),
    "translate_x": (lambda p, share: _transform(p, 1, 0, share * p.width, 0, 1, 0), _signed(0.45)),
    "translate_y": (lambda p, share: _transform(p, 1, 0, 0, 0, 1, share * p.height), _signed(0.45)),
}
