"""RandAugment on the host: the operations of timm's `rand-m9-mstd0.5`, on uint8 RGB images, in OpenCV and NumPy.

Cubuk et al. 2020, https://arxiv.org/abs/1909.13719. Each operation gives Pillow's bytes; rotations, shears and
translations may differ by one level. They run on the host: under `vmap`, a device would compute all fifteen
operations twice for every image.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float32

from topformer_jax.data.batch import Image

LAYERS, PROBABILITY = 2, 0.5  # operations that are drawn for an image, and how often each is applied
LARGEST = 10  # magnitude
FILL = (124, 116, 104)  # of what comes from outside the image: ImageNet's mean
GREY = (19595, 38470, 7471)  # Pillow's weights of red, green and blue, in 1 / 65536
LEVELS = np.arange(256)
Number = int | float
Operation = Callable[[Image, Number], Image]
Argument = Callable[[float, int], Number]
Matrix = tuple[Number, Number, Number, Number, Number, Number]


def rand_augment(image: Image, *, magnitude: Number, std: Number, rng: np.random.Generator) -> Image:
    """Applies each of two random operations with probability 0.5.

    Args:
        image: uint8 `[h, w, 3]`.
        magnitude: mean of the operations' magnitude, in 0..10.
        std: its standard deviation; a drawn magnitude is cut to 0..10.
        rng: the source of all draws.
    """
    operations = list(OPERATIONS.values())
    for number in rng.integers(0, len(operations), LAYERS):
        if rng.random() >= PROBABILITY:
            continue
        level = min(max(rng.normal(magnitude, std), 0.0), LARGEST) / LARGEST
        sign = 1 if rng.random() < 0.5 else -1
        operation, argument = operations[number]
        image = operation(image, argument(level, sign))
    return image


def autocontrast(image: Image, _: Number) -> Image:
    """Stretches each channel so that its smallest value becomes 0 and its largest 255."""
    tables = []
    for counts in _histograms(image):
        low, high = np.flatnonzero(counts)[[0, -1]]
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        tables.append(np.clip(np.trunc(LEVELS * scale + offset), 0, 255))
    return _look_up(image, np.stack(tables, 1))


def equalize(image: Image, _: Number) -> Image:
    """Spreads each channel's values so that its histogram becomes flat."""
    tables = []
    for counts in _histograms(image):
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.cumsum(counts) - counts
        tables.append(np.minimum((step // 2 + below) // step, 255) if step else LEVELS)
    return _look_up(image, np.stack(tables, 1))


def contrast(image: Image, factor: Number) -> Image:
    """Multiplies each value's distance to the mean grey."""
    grey = _grey(image)
    mean = int(float(grey.sum(dtype=np.float64)) / grey.size + 0.5)
    return _look_up(image, _blend(np.float32(mean), LEVELS.astype(np.float32), factor))


def color(image: Image, factor: Number) -> Image:
    """Multiplies each value's distance to its pixel's grey."""
    return _blend(_grey(image)[..., None], image.astype(np.float32), factor)


def sharpness(image: Image, factor: Number) -> Image:
    """Multiplies each value's distance to the smoothed image's; the pixels at the border stay as they are."""
    total = cv2.boxFilter(image, cv2.CV_16U, (3, 3), normalize=False) + image * np.uint16(4)
    smooth = cv2.convertScaleAbs(
        total, alpha=1 / 13
    )  # rounds; a thirteenth of a whole number is never a half
    result = _blend(smooth.astype(np.float32), image.astype(np.float32), factor)
    result[[0, -1]], result[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return result


def rotate(image: Image, degrees: Number) -> Image:
    """Turns the image counter-clockwise about its centre."""
    height, width = image.shape[:2]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across = width / 2 - cosine * width / 2 + sine * height / 2
    down = height / 2 - sine * width / 2 - cosine * height / 2
    return _transform(image, (cosine, -sine, across, sine, cosine, down))


def _histograms(image: Image) -> list[np.ndarray]:
    """How often each value occurs in red, green and blue."""
    return [
        cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(int) for channel in range(3)
    ]


def _look_up(image: Image, table: np.ndarray) -> Image:
    """Replaces each value by its entry in a table `[256]`, or in one of each channel `[256, 3]`."""
    return cv2.LUT(image, table.astype(np.uint8).reshape(256, 1, -1))


def _grey(image: Image) -> Float32[np.ndarray, "h w"]:
    """The brightness in whole numbers; all sums are below 2**24, and so exact in float32."""
    total = cv2.transform(image.astype(np.float32), np.array([GREY], np.float32))
    return np.floor((total + 32768) * np.float32(1 / 65536))


def _blend(start: np.ndarray | np.float32, end: np.ndarray, factor: Number) -> np.ndarray:
    """`start + factor * (end - start)` in float32, truncated to uint8."""
    result = end - start
    result *= np.float32(factor)
    result += start
    return np.clip(result, 0, 255, out=result).astype(np.uint8)


def _transform(image: Image, matrix: Matrix) -> Image:
    """Fetches each pixel (x, y) from (a x + b y + c, d x + e y + f), bilinearly, with FILL from outside.

    Positions are those of pixels' centres, (0.5, 0.5) for the first. Pillow truncates where OpenCV rounds, so the
    pixels are interpolated in 1 / 256.
    """
    a, b, c, d, e, f = matrix
    size, inverse = (image.shape[1], image.shape[0]), cv2.WARP_INVERSE_MAP
    between_corners = np.array([[a, b, a / 2 + b / 2 + c - 0.5], [d, e, d / 2 + e / 2 + f - 0.5]])
    wide = image.astype(np.uint16) << 8
    warped: np.ndarray = cv2.warpAffine(
        wide, between_corners, size, flags=inverse | cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    everywhere = np.ones(image.shape[:2], np.uint8)
    inside = cv2.warpAffine(everywhere, between_corners, size, flags=inverse | cv2.INTER_NEAREST)
    return cv2.copyTo((warped >> 8).astype(np.uint8), inside, np.full_like(image, FILL))


def _signed(largest: Number) -> Argument:
    return lambda level, sign: sign * level * largest


def _enhance(level: float, _: int) -> float:
    return level * 1.8 + 0.1


# By name: the operation, and its argument from the level in 0..1 and a random sign. timm's list without "increasing".
OPERATIONS: dict[str, tuple[Operation, Argument]] = {
    "autocontrast": (autocontrast, lambda level, _: 0),
    "equalize": (equalize, lambda level, _: 0),
    "invert": (lambda image, _: 255 - image, lambda level, _: 0),
    "rotate": (rotate, _signed(30)),
    "posterize": (
        lambda image, bits: _look_up(image, LEVELS & ~(2 ** (8 - int(bits)) - 1)),
        lambda level, _: int(level * 4),
    ),
    "solarize": (
        lambda image, threshold: _look_up(image, np.where(threshold > LEVELS, LEVELS, 255 - LEVELS)),
        lambda level, _: min(256, int(level * 256)),
    ),
    "solarize_add": (
        lambda image, addend: _look_up(
            image, np.where(LEVELS < 128, np.minimum(LEVELS + int(addend), 255), LEVELS)
        ),
        lambda level, _: min(128, int(level * 110)),
    ),
    "color": (color, _enhance),
    "contrast": (contrast, _enhance),
    "brightness": (
        lambda image, factor: _look_up(image, _blend(np.float32(0), LEVELS.astype(np.float32), factor)),
        _enhance,
    ),
    "sharpness": (sharpness, _enhance),
    "shear_x": (lambda image, factor: _transform(image, (1, factor, 0, 0, 1, 0)), _signed(0.3)),
    "shear_y": (lambda image, factor: _transform(image, (1, 0, 0, factor, 1, 0)), _signed(0.3)),
    "translate_x": (
        lambda image, share: _transform(image, (1, 0, share * image.shape[1], 0, 1, 0)),
        _signed(0.45),
    ),
    "translate_y": (
        lambda image, share: _transform(image, (1, 0, 0, 0, 1, share * image.shape[0])),
        _signed(0.45),
    ),
}
