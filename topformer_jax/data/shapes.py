"""A synthetic data set for a run without any download: scenes of textured grounds and overlapping shapes.

A scene depends only on its split and index. Colours are random: a texture (the grounds; balls are shaded, targets
ringed, boards chequered, dice dotted) or an outline (discs and triangles are plain) identifies a class. Uneven light,
blur and noise follow. The classes are `CATALOG["shapes"]`, in the order of the constants.
"""

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import Float32

from topformer_jax.data.batch import Example, Image, Labels

GRADIENT, CLOUDS, STRIPES, BRICKS, DISC, TRIANGLE, BALL, TARGET, BOARD, DICE = range(10)
_FORMATS = [(1, 1), (0.9, 1.1), (1.1, 0.9)]  # height, width; few, as XLA compiles a program for each size
MAX_CACHED_BYTES = 2**28  # of drawn scenes in a process; those of the recipe take 210 MB
_SPLITS = {"train": 0, "validation": 1}

Mask = Labels  # 1 where the shape is


def draw(split: str, index: int, size: int) -> tuple[Image, Labels]:
    """Draws one scene: two or three grounds behind two to four shapes.

    Height and width are `size` pixels, or one a tenth more and the other a tenth less. Returns the image, RGB uint8
    `[h, w, 3]`, and its label, uint8 `[h, w]`.

    >>> image, label = draw("train", 0, 160)
    >>> image.shape, label.shape
    ((160, 160, 3), (160, 160))
    """
    rng = np.random.default_rng([20220405, _SPLITS[split], index])
    height, width = (round(size * factor) for factor in rng.choice(_FORMATS))
    image = np.empty((height, width, 3), np.uint8)
    label = np.empty((height, width), np.uint8)
    grounds = rng.permutation([GRADIENT, CLOUDS, STRIPES, BRICKS])
    for place, kind in enumerate(grounds[: rng.integers(2, 4)].tolist()):
        mask = np.ones((height, width), np.uint8) if place == 0 else _draw_half_plane(rng, height, width)
        cv2.copyTo(_draw_texture(rng, kind, height, width), mask, image)
        label[mask > 0] = kind
    for kind in rng.permutation([DISC, TRIANGLE, BALL, TARGET, BOARD, DICE])[: rng.integers(2, 5)].tolist():
        mask = _draw_shape(rng, kind, height, width, size)
        left, top, across, down = cv2.boundingRect(mask)
        box = slice(top, top + down), slice(left, left + across)
        surface = _draw_texture(rng, kind if kind in (TARGET, BOARD, DICE) else GRADIENT, down, across)
        if kind == BALL:
            surface = _shade(rng, surface)
        cv2.copyTo(surface, mask[box], image[box])
        label[mask > 0] = kind
    return _add_light_and_noise(rng, image), label


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """The scenes of a split, each drawn once, up to `MAX_CACHED_BYTES`; their arrays are read-only.

    A pickled source leaves its scenes behind: each worker process draws its own.
    """

    split: str
    count: int
    size: int  # pixels
    _scenes: dict[int, tuple[Image, Labels]] = dataclasses.field(default_factory=dict, compare=False)

    def __reduce__(self) -> tuple:
        return ShapesSource, (self.split, self.count, self.size)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        scene = self._scenes.get(index)
        if scene is None:
            scene = draw(self.split, index, self.size)
            for array in scene:
                array.flags.writeable = False
            if (len(self._scenes) + 1) * 4 * self.size**2 <= MAX_CACHED_BYTES:
                self._scenes[index] = scene  # two threads may draw the same scene: the result is the same
        name = f"{self.split}_{index:06d}"
        return Example(name, *scene, (f"shapes image {name}", f"shapes label {name}"))

    def label_size(self, index: int) -> tuple[int, int]:
        height, width = np.shape(self[index].label)
        return height, width


def _draw_half_plane(rng: np.random.Generator, height: int, width: int) -> Mask:
    """The pixels on one side of a wavy line across the image."""
    x, y = _pixel_grid(height, width)
    angle, phase = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
    across = (x - width * rng.uniform(0.3, 0.7)) * math.cos(angle)
    across = across + (y - height * rng.uniform(0.3, 0.7)) * math.sin(angle)
    along = y * math.cos(angle) - x * math.sin(angle)
    wave = 0.05 * height * np.sin(along * (rng.uniform(4, 9) / height) + phase)
    return (across > wave).astype(np.uint8)


def _draw_texture(rng: np.random.Generator, kind: int, height: int, width: int) -> Image:
    """An image of one texture in two colours, whose channels are at least 60 levels apart."""
    low, high = rng.uniform(0, 140, 3), rng.uniform(110, 255, 3)
    high = np.maximum(high, low + 60)
    if rng.random() < 0.5:
        low, high = high, low
    levels = np.clip(255 * _draw_pattern(rng, kind, height, width), 0, 255).astype(np.uint8)
    colours = low + np.linspace(0, 1, 256)[:, None] * (high - low)
    return cv2.LUT(cv2.merge([levels] * 3), colours.astype(np.uint8)[None])


def _draw_pattern(rng: np.random.Generator, kind: int, height: int, width: int) -> Float32[np.ndarray, "h w"]:
    """The share of the second colour in each pixel, 0 to 1."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = _pixel_grid(height, width)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == GRADIENT:
        return 0.5 + along / (2 * math.hypot(height, width)) * rng.uniform(0.5, 1)
    if kind == CLOUDS:
        cell = rng.uniform(5, 9)  # pixels
        coarse = rng.random((int(height / cell) + 2, int(width / cell) + 2), np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    if kind == STRIPES:
        return 0.5 + 0.5 * np.sin(along * (2 * math.pi / rng.uniform(6, 12)))
    if kind == TARGET:
        return 0.5 + 0.5 * np.sin(np.hypot(x, y) * (2 * math.pi / rng.uniform(9, 14)))
    if kind == BOARD:
        field = rng.uniform(8, 12)
        return ((np.floor(along / field) + np.floor(across / field)) % 2).astype(np.float32)
    if kind == DICE:
        pitch = rng.uniform(10, 14)
        distance = np.hypot(along % pitch - pitch / 2, across % pitch - pitch / 2)
        return (distance < 0.3 * pitch).astype(np.float32)
    long, short = rng.uniform(14, 20), rng.uniform(7, 10)
    row = np.floor(across / short)
    joint = (across - row * short < 1.8) | ((along / long + 0.5 * row) % 1 < 1.8 / long)
    return joint.astype(np.float32)


def _draw_shape(rng: np.random.Generator, kind: int, height: int, width: int, size: int) -> Mask:
    """The pixels of a shape whose centre lies in the image."""
    radius = size * rng.uniform(0.17, 0.3) * (1.3 if kind == TRIANGLE else 1)
    middle = rng.uniform(0.1, 0.9, 2) * (width, height)
    mask = np.zeros((height, width), np.uint8)
    if kind in (DISC, BALL, TARGET):
        x, y = (round(value) for value in middle)
        cv2.circle(mask, (x, y), round(radius), 1, cv2.FILLED)
        return mask
    turns = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.linspace(0, 1, 3 if kind == TRIANGLE else 4, False)
    corners = np.stack([np.cos(turns), np.sin(turns)], 1) * radius + middle
    cv2.fillPoly(mask, [np.rint(corners).astype(np.int32)], 1)
    return mask


def _shade(rng: np.random.Generator, surface: Image) -> Image:
    height, width = surface.shape[:2]
    radius = max(height, width) / 2
    angle = rng.uniform(0, 2 * math.pi)
    x, y = _pixel_grid(height, width)
    distance = np.hypot(x / radius - 0.4 * math.cos(angle), y / radius - 0.4 * math.sin(angle))
    return cv2.multiply(surface, cv2.merge([1.5 - 0.8 * distance] * 3), dtype=cv2.CV_8U)


def _add_light_and_noise(rng: np.random.Generator, image: Image) -> Image:
    """Adds uneven light, a little blur, and noise, as a camera does."""
    height, width = image.shape[:2]
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.9))
    angle = rng.uniform(0, 2 * math.pi)
    x, y = _pixel_grid(height, width)
    light = 1 + x * (0.3 * math.cos(angle) / width) + y * (0.3 * math.sin(angle) / height)
    lit = cv2.multiply(image, cv2.merge([light] * 3), dtype=cv2.CV_32F)
    grain = rng.random(image.shape, np.float32) + rng.random(image.shape, np.float32) - 1
    return cv2.add(lit, grain * rng.uniform(8, 30), dtype=cv2.CV_8U)


def _pixel_grid(height: int, width: int) -> tuple[Float32[np.ndarray, "1 w"], Float32[np.ndarray, "h 1"]]:
    """Pixel coordinates (x, y) from the image's centre."""
    x = np.arange(width, dtype=np.float32) - width / 2
    y = np.arange(height, dtype=np.float32) - height / 2
    return x[None], y[:, None]
