"""How many training examples per second come from files on one core, here and in mmsegmentation's pipeline?

  python -m benchmarks.input --config configs/topformer_t_ade.py

On generated JPEG and PNG files. Flip, colours and normalisation are the device's work in ours, and the host's in the
other. Multiply by the cores: `data.num_workers` processes decode independently.
"""

import argparse
import functools
import io

import cv2
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import runner, samples
from benchmarks.runner import OURS, Report
from topformer_jax.data import loader
from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.batch import IGNORE_LABEL, Example
from topformer_jax.runtime import cli

TRIES = 10  # crops that are tested
Pair = tuple[np.ndarray, np.ndarray]


def make_example(example: Example, config: ConfigDict, rng: np.random.Generator) -> Pair:
    """A training example as mmsegmentation makes it, step by step on the host, from JPEG and PNG bytes.

    Returns:
        A random crop: the normalised image, float32 `[3, h, w]`, and its label, int64 `[h, w]`.
    """
    data = config.data
    assert isinstance(example.image, bytes)
    assert isinstance(example.label, bytes)
    image = np.asarray(cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_COLOR))  # BGR
    label = np.array(Image.open(io.BytesIO(example.label)))
    if data.reduce_zero_label:
        label[label == 0] = IGNORE_LABEL
        label = label - 1
        label[label == IGNORE_LABEL - 1] = IGNORE_LABEL
    image, label = resize_and_crop(image, label, config, rng)
    if rng.random() < data.flip_prob:
        image, label = np.flip(image, 1), np.flip(label, 1)
    if data.photometric_distortion:
        image = distort(image, rng)
    image = np.ascontiguousarray(image).astype(np.float32)
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, image)
    cv2.subtract(image, MEAN.reshape(1, -1).astype(np.float64), image)
    cv2.multiply(image, 1 / STD.reshape(1, -1).astype(np.float64), image)
    down, across = data.crop_size[0] - image.shape[0], data.crop_size[1] - image.shape[1]
    image = cv2.copyMakeBorder(image, 0, down, 0, across, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    label = np.pad(label, ((0, down), (0, across)), constant_values=IGNORE_LABEL)
    return np.ascontiguousarray(image.transpose(2, 0, 1)), label.astype(np.int64)


def resize_and_crop(image: np.ndarray, label: np.ndarray, config: ConfigDict, rng: np.random.Generator) -> Pair:
    """Resizes both by a random ratio; crops them at random, again while one class has too large a share."""
    data = config.data
    ratio = rng.uniform(*data.ratio_range)
    long, short = int(max(data.scale) * ratio), int(min(data.scale) * ratio)
    height, width = label.shape
    factor = min(long / max(height, width), short / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    for _ in range(TRIES + 1):
        margins = [max(side - crop, 0) for side, crop in zip(label.shape, data.crop_size, strict=True)]
        top, left = (int(rng.integers(0, margin + 1)) for margin in margins)
        box = slice(top, top + data.crop_size[0]), slice(left, left + data.crop_size[1])
        labels, counts = np.unique(label[box], return_counts=True)
        counts = counts[labels != IGNORE_LABEL]
        if len(counts) > 1 and counts.max() / counts.sum() < data.cat_max_ratio:
            break
    return image[box], label[box]


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast (before or after the colours), saturation and hue, each with probability 0.5."""
    use_brightness, use_contrast, contrast_first, use_saturation, use_hue = rng.random(5) < 0.5
    if use_brightness:
        image = _scale_levels(image, 1.0, rng.uniform(-32, 32))
    if use_contrast and contrast_first:
        image = _scale_levels(image, rng.uniform(0.5, 1.5))
    if use_saturation:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = _scale_levels(hsv[:, :, 1], rng.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if use_hue:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + int(rng.integers(-18, 18))) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if use_contrast and not contrast_first:
        image = _scale_levels(image, rng.uniform(0.5, 1.5))
    return image


def _scale_levels(image: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """Each generated example once, by ours and officially."""
    rng = np.random.default_rng(config.seed)
    cv2.setNumThreads(1)
    with samples.written_files(args.images, config) as source:

        def ours() -> None:
            for index in range(len(source)):
                loader.crop_example(source[index], config, index, epoch=0)

        def official() -> None:
            for index in range(len(source)):
                make_example(source[index], config, rng)

        programs = {OURS: runner.start(OURS, ours), "official": runner.start("official", official)}
        rows = runner.compare("one core", programs, args.repeats, images=args.images)
    size = " x ".join(map(str, samples.SIZE))
    return Report(f"input: {size} JPEG and PNG to crops of {config.data.crop_size}, {config.name}", rows)


main = functools.partial(runner.run, __doc__, measure, images=(32, "generated files"))
if __name__ == "__main__":
    cli.run(main)
