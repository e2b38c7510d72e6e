"""The training input as mmsegmentation does it, one step after the other on the host: the peer of data/.

NumPy, OpenCV and PIL alone. Images are BGR until they are normalised, as there.
"""

import io

import cv2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.sources import Source

IGNORE_LABEL = 255
TRIES = 10  # crops that are tested


class Pipeline:
    """Makes the training example at an index of a source: decode, resize, crop, flip, colours, normalise, pad."""

    def __init__(self, source: Source, config: ConfigDict):
        self._source = source
        self._data = config.data
        self._rng = np.random.default_rng(config.seed)

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 `[3, h, w]`, normalised, and label int64 `[h, w]`, both of the crop's size."""
        data, rng = self._data, self._rng
        example = self._source[index]
        assert isinstance(example.image, bytes)
        assert isinstance(example.label, bytes)
        image = np.asarray(cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_COLOR))
        label = np.array(Image.open(io.BytesIO(example.label)))
        if data.reduce_zero_label:
            label = reduced(label)
        image, label = resized(image, label, data.scale, rng.uniform(*data.ratio_range))
        image, label = cropped(image, label, data.crop_size, data.cat_max_ratio, rng)
        if rng.random() < data.flip_prob:
            image, label = np.flip(image, 1), np.flip(label, 1)
        if data.photometric_distortion:
            image = distorted(image, rng)
        image = normalised(image)
        down, across = data.crop_size[0] - image.shape[0], data.crop_size[1] - image.shape[1]
        image = cv2.copyMakeBorder(image, 0, down, 0, across, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        label = np.pad(label, ((0, down), (0, across)), constant_values=IGNORE_LABEL)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), label.astype(np.int64)


def reduced(label: np.ndarray) -> np.ndarray:
    """Label 0 becomes void, all others go down by one."""
    label[label == 0] = IGNORE_LABEL
    label = label - 1
    label[label == IGNORE_LABEL - 1] = IGNORE_LABEL
    return label


def resized(
    image: np.ndarray, label: np.ndarray, scale: tuple[int, int], ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """Both, the whole of them, fitted into `ratio` times a long and a short side."""
    long, short = int(max(scale) * ratio), int(min(scale) * ratio)
    height, width = image.shape[:2]
    factor = min(long / max(height, width), short / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    return (
        cv2.resize(image, size, interpolation=cv2.INTER_LINEAR),
        cv2.resize(label, size, interpolation=cv2.INTER_NEAREST),
    )


def cropped(
    image: np.ndarray, label: np.ndarray, crop: tuple[int, int], share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of both, drawn again while one class has `share` of it."""

    def draw() -> tuple[slice, slice]:
        top, left = (int(rng.integers(0, max(label.shape[axis] - crop[axis], 0) + 1)) for axis in (0, 1))
        return slice(top, top + crop[0]), slice(left, left + crop[1])

    box = draw()
    if share < 1:
        for _ in range(TRIES):
            labels, counts = np.unique(label[box], return_counts=True)
            counts = counts[labels != IGNORE_LABEL]
            if len(counts) > 1 and counts.max() / counts.sum() < share:
                break
            box = draw()
    return image[box], label[box]


def distorted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast (before or after the colours), saturation and hue, each with probability 0.5."""

    def often() -> bool:
        return bool(rng.random() < 0.5)

    if often():
        image = _levels(image, 1.0, rng.uniform(-32, 32))
    contrast_first = often()
    if contrast_first and often():
        image = _levels(image, rng.uniform(0.5, 1.5), 0.0)
    if often():
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = _levels(hsv[:, :, 1], rng.uniform(0.5, 1.5), 0.0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if often():
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + int(rng.integers(-18, 18))) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not contrast_first and often():
        image = _levels(image, rng.uniform(0.5, 1.5), 0.0)
    return image


def _levels(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def normalised(image: np.ndarray) -> np.ndarray:
    """float32 RGB, less the mean, over the standard deviation."""
    image = np.ascontiguousarray(image).astype(np.float32)
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, image)
    cv2.subtract(image, MEAN.reshape(1, -1).astype(np.float64), image)
    cv2.multiply(image, 1 / STD.reshape(1, -1).astype(np.float64), image)
    return image
