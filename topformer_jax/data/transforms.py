"""Geometry of one example on the host: resize, rotate, crop, pad. NumPy and OpenCV, uint8 in and out.

Without rotation, every byte equals the official pipeline's (mmsegmentation 0.19 on mmcv 1.4). Flip, colours and
normalisation follow on the device (`augment.py`). All random draws come from the generator that is passed in.
"""

import math
from typing import TypedDict

import cv2
import numpy as np
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict

from topformer_jax.data.batch import IGNORE_LABEL, Image, Labels

BLUR_SIGMA = (0.1, 2.0)  # pixels, as in SimCLR
JPEG_QUALITY = (30, 95)  # of 100
LONGEST_TURNED = 2**15 - 2  # pixels of an image's long side that OpenCV 4 turns
MAX_CROP_TRIES = 10  # crops tested against cat_max_ratio before one is taken untested
Size = tuple[int, int]  # (height, width) in pixels
ResizedImage = UInt8[np.ndarray, "height width 3"]  # an `Image` of another size than its argument's h and w


class CroppedExample(TypedDict):
    """A training example: an image and a label of the crop's size, and the (height, width) that is not padding."""

    image: Image
    label: Labels
    size: Int32[np.ndarray, "2"]


def multiply_scale(scale: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Both sides of `scale` times `ratio`, truncated to whole pixels, at least 1."""
    return max(int(scale[0] * ratio), 1), max(int(scale[1] * ratio), 1)


def fit_size(size: Size, scale: tuple[int, int]) -> Size:
    """The largest (height, width) with the aspect ratio of `size` that fits into a long and a short side.

    `scale` holds the two sides in either order; whether height or width is the longer one does not matter.
    As mmcv's `rescale_size`: `int(side * factor + 0.5)`, here at least 1.

    >>> fit_size((375, 500), (2048, 512))
    (512, 683)
    """
    h, w = size
    factor = min(max(scale) / max(h, w), min(scale) / min(h, w))
    return max(int(h * factor + 0.5), 1), max(int(w * factor + 0.5), 1)


def resize_image(image: Image, size: Size) -> ResizedImage:
    """Resizes to (height, width) with OpenCV's `INTER_LINEAR` on uint8."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def eval_size(size: Size, *, scale: tuple[int, int], size_divisor: int) -> Size:
    """(height, width) of an evaluation's input: fitted into `scale`, then rounded up to multiples of `size_divisor`.

    >>> eval_size((375, 500), scale=(2048, 512), size_divisor=32)
    (512, 704)
    """
    h, w = fit_size(size, scale)
    return -(-h // size_divisor) * size_divisor, -(-w // size_divisor) * size_divisor


def eval_image(image: Image, *, scale: tuple[int, int], size_divisor: int) -> ResizedImage:
    """Resizes an image to `eval_size`; in two steps, each rounded to uint8, as the official pipeline does."""
    size = image.shape[0], image.shape[1]
    fitted = resize_image(image, fit_size(size, scale))
    return resize_image(fitted, eval_size(size, scale=scale, size_divisor=size_divisor))


def random_resize_crop(
    image: Image, label: Labels, data: ConfigDict, rng: np.random.Generator, wanted: int | None = None
) -> CroppedExample:
    """Resizes an image and its label by a random factor and takes a random crop, padded to `crop_size`.

    mmsegmentation's `Resize`, `RandomRotate`, `RandomCrop` and `Pad` in one: only the pixels of the crop are
    computed. A pixel is a mean of four neighbours at most: an image that shrinks aliases, as it does in evaluation.

    Args:
        image: uint8 `[h, w, 3]`, of any size.
        label: uint8 `[h, w]`, IGNORE_LABEL where a pixel belongs to no class.
        data: the settings `data.*`. The first crop is taken if `cat_max_ratio` is 1. Else a crop is accepted if it
            holds more than one class and none has this share of the labelled pixels or more; after `MAX_CROP_TRIES`
            rejected crops, one more is drawn and taken untested. `rotation` turns the resized image about its centre;
            its size stays the same, so that it loses its corners.
        rng: the source of all draws.
        wanted: a class whose share of an accepted crop is at least half of its share of the label; None: any.

    Returns the crop, padded at the bottom and on the right, and outside a turned image: the image with 0, the label
    with IGNORE_LABEL.
    """
    crop_size, cat_max_ratio = data.crop_size, data.cat_max_ratio
    scale = multiply_scale(data.scale, rng.uniform(*data.ratio_range))
    size = fit_size((image.shape[0], image.shape[1]), scale)
    if data.aspect_range != (1, 1):
        stretch = math.exp(rng.uniform(*np.log(data.aspect_range)) / 2)
        size = max(round(size[0] / stretch), 1), max(round(size[1] * stretch), 1)
    degrees = rng.uniform(-data.rotation, data.rotation) if data.rotation else 0.0
    height, width = min(size[0], crop_size[0]), min(size[1], crop_size[1])
    share = 0 if wanted is None else np.mean(label == wanted) / 2
    tries = 0 if cat_max_ratio >= 1 and wanted is None else MAX_CROP_TRIES
    for attempt in range(tries + 1):
        top, left = int(rng.integers(0, size[0] - height + 1)), int(rng.integers(0, size[1] - width + 1))
        box = top, left, height, width
        label_crop = _crop_resized(label, size, degrees, box)
        is_wanted = wanted is None or np.mean(label_crop == wanted) >= share
        if attempt == tries or (is_wanted and (cat_max_ratio >= 1 or _is_varied(label_crop, cat_max_ratio))):
            break
    image_crop = _crop_resized(image, size, degrees, box)
    below, right = crop_size[0] - height, crop_size[1] - width
    return {
        "image": cv2.copyMakeBorder(image_crop, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0),
        "label": cv2.copyMakeBorder(label_crop, 0, below, 0, right, cv2.BORDER_CONSTANT, value=IGNORE_LABEL),
        "size": np.array((height, width), np.int32),
    }


def degrade(image: Image, *, blur_prob: float, jpeg_prob: float, rng: np.random.Generator) -> Image:
    """Blurs an image with one probability, then compresses it as a JPEG with another one, as weak cameras do.

    Gaussian blur has a standard deviation from `BLUR_SIGMA` (SimCLR, Chen et al. 2020, appendix A), the JPEG a
    quality from `JPEG_QUALITY`, both drawn uniformly. With a probability of 0, `rng` is not used.

    >>> image = np.zeros((5, 5, 3), np.uint8)
    >>> image[2, 2] = 255
    >>> degrade(image, blur_prob=1.0, jpeg_prob=0.0, rng=np.random.default_rng(0))[2, :, 0].tolist()
    [1, 28, 107, 28, 1]
    """
    if blur_prob and rng.random() < blur_prob:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(*BLUR_SIGMA))
    if jpeg_prob and rng.random() < jpeg_prob:
        quality = int(rng.integers(*JPEG_QUALITY, endpoint=True))
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality]
        file = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)[1]
        image = np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR_RGB))
    return image


def _crop_resized(array: np.ndarray, size: Size, degrees: float, box: tuple[int, int, int, int]) -> np.ndarray:
    """A box (top, left, height, width) of an image or a label that is resized to `size`, and turned anticlockwise."""
    top, left, height, width = box
    is_image, source = array.ndim == 3, array.shape
    if degrees:
        matrix = _map_to_source((source[0], source[1]), size, degrees, (top, left))
        flags = (cv2.INTER_LINEAR if is_image else cv2.INTER_NEAREST) | cv2.WARP_INVERSE_MAP
        outside = 0 if is_image else IGNORE_LABEL
        return cv2.warpAffine(array, matrix, (width, height), flags=flags, borderValue=outside)
    if is_image:
        return _resize_corner(array, size, top + height, left + width)[top:, left:]
    rows = nearest_indices(source[0], size[0])[top : top + height]
    columns = nearest_indices(source[1], size[1])[left : left + width]
    return array.take(rows, axis=0).take(columns, axis=1)


def _map_to_source(source: Size, size: Size, degrees: float, corner: tuple[int, int]) -> np.ndarray:
    """The matrix `[2, 3]` that takes (x, y, 1) of a crop with this (top, left) corner to (x, y) in the source."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    turn = np.array([[cosine, -sine], [sine, cosine]])
    middle = np.array(size[::-1]) / 2
    shrink = np.array(source[::-1]) / size[::-1]
    # Whole numbers are the centres of pixels.
    start = shrink * (turn @ (np.array(corner[::-1]) + 0.5 - middle) + middle) - 0.5
    return np.column_stack([shrink[:, None] * turn, start])


def nearest_indices(size: int, new_size: int) -> np.ndarray:
    """The source index of each pixel when OpenCV's `INTER_NEAREST` resizes `size` pixels to `new_size`."""
    positions = np.floor(np.arange(new_size) * (1 / (new_size / size))).astype(np.intp)
    return np.minimum(positions, size - 1)


def _resize_corner(image: Image, size: Size, bottom: int, right: int) -> ResizedImage:
    """`resize_image(image, size)[:bottom, :right]`, without computing what is below and to the right.

    OpenCV gets the whole image's factors instead of a size, so that its sampling grid stays the same, and a few
    source pixels more than it needs. It is twice as fast at ratio 2.
    """
    down, across = size[0] / image.shape[0], size[1] / image.shape[1]
    source = image[: int(bottom / down) + 3, : int(right / across) + 3]
    part = cv2.resize(source, None, fx=across, fy=down, interpolation=cv2.INTER_LINEAR)
    if part.shape == source.shape:  # OpenCV copies then, whatever the factors
        part = resize_image(image, size)
    return part[:bottom, :right]


def count_classes(label: Labels) -> np.ndarray:
    """The pixels of each class 0..254 in a label, float32, exact up to 2**24 pixels.

    >>> count_classes(np.array([[0, 2, 2, 255]], np.uint8))[:3].tolist()
    [1.0, 0.0, 2.0]
    """
    # Three times as fast as np.bincount.
    return cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()[:IGNORE_LABEL]


def _is_varied(label: Labels, cat_max_ratio: float) -> bool:
    """Whether there is more than one class and none has `cat_max_ratio` or more of the labelled pixels."""
    counts = count_classes(label)
    return bool(np.count_nonzero(counts) > 1) and float(counts.max()) / float(counts.sum()) < cat_max_ratio
