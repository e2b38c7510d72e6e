"""What the benchmarks work on: random images, labels and weights, and generated files."""

import contextlib
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from topformer_jax.checkpoints import torch_format
from topformer_jax.data import shapes, sources
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.transforms import Size

SIZE = (512, 683)  # pixels, (height, width): most of ADE20K's images
# Of ADE20K's images: short sides, and aspect ratios; one image in ten has another ratio, one in five is upright.
SIDES = [256, 300, 375, 480, 512, 512, 512, 768, 960, 1536]
ASPECTS = [4 / 3, 4 / 3, 3 / 2, 1.335, 1]
QUALITY = 75  # of the JPEG files, which then have about 70 kB


def images(count: int, size: tuple[int, int]) -> UInt8[np.ndarray, "n h w 3"]:
    """Random images of squares of 8 pixels."""
    height, width = size
    coarse = np.random.default_rng(0).integers(0, 256, (count, -(-height // 8), -(-width // 8), 3), np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def labels(count: int, size: tuple[int, int], classes: int) -> UInt8[np.ndarray, "n h w"]:
    """Random labels in squares of 8 pixels; one in 16 is void."""
    height, width = size
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, classes, (count, -(-height // 8), -(-width // 8)), np.uint8)
    coarse[rng.random(coarse.shape) < 1 / 16] = IGNORE_LABEL
    return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def batch(config: ConfigDict, count: int = 0) -> dict[str, np.ndarray]:
    """A training batch as data/loader.py makes it, or the first `count` examples of one."""
    count, crop = count or config.batch_size, config.data.crop_size
    classes = config.model.num_classes
    is_map = config.task == "segmentation"
    return {
        "image": images(count, crop),
        "label": labels(count, crop, classes) if is_map else np.arange(count, dtype=np.int32) % classes,
        "size": np.tile(np.array(crop, np.int32), (count, 1)),
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }


@contextlib.contextmanager
def written_files(count: int, config: ConfigDict, sizes: Sequence[Size] = (SIZE,)) -> Iterator[sources.FolderSource]:
    """Synthetic scenes as JPEG files and PNG labels that fit the config, in a temporary folder; sizes take turns."""
    with tempfile.TemporaryDirectory(prefix="topformer_jax.") as folder:
        names = tuple(f"{index:06d}" for index in range(count))
        for index, (name, size) in enumerate(zip(names, itertools.cycle(sizes), strict=False)):
            image, label = shapes.draw("train", index, max(size))
            image = cv2.cvtColor(cv2.resize(image, size[::-1]), cv2.COLOR_RGB2BGR)
            label = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST).astype(int)
            label = (label + 10 * index) % config.model.num_classes  # so that all classes occur
            label += config.data.reduce_zero_label
            path = pathlib.Path(folder, name)
            cv2.imwrite(f"{path}.jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
            Image.fromarray(label.astype(np.uint8)).save(f"{path}.png")
        files = (tuple(f"{name}{suffix}" for name in names) for suffix in (".jpg", ".png"))
        yield sources.FolderSource(folder, names, *files)


def ade20k_sizes(count: int) -> list[Size]:
    """The sizes of so many images distributed about as those of ADE20K."""
    rng = np.random.default_rng(0)
    sizes = []
    for short in rng.choice(SIDES, count).tolist():
        aspect = rng.uniform(1, 2.6) if rng.random() < 0.1 else rng.choice(ASPECTS)
        size = (short, round(short * float(aspect)))
        sizes.append(size[::-1] if rng.random() < 0.2 else size)
    return sizes


def torch_weights(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A model's tensors by name, in PyTorch's layout."""
    return {name: torch_format.to_torch(np.asarray(value)) for name, value in tensors.items()}
