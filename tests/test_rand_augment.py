"""RandAugment's operations against Pillow's, and its draws against what timm documents."""

import collections
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL import ImageEnhance, ImageOps

from topformer_jax.data import shapes
from topformer_jax.data.classification import rand_augment as ours

FILL = (124, 116, 104)
Picture = PIL.Image.Image
Oracle = Callable[[Picture, Any], Picture]


def _affine(image: Picture, *matrix: float) -> Picture:
    return image.transform(
        image.size, PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _solarize_add(image: Picture, addend: int) -> Picture:
    return image.point([min(255, i + addend) if i < 128 else i for i in range(256)] * 3)


def _enhance(kind: type) -> Oracle:
    return lambda image, factor: kind(image).enhance(factor)


# How Pillow does it, and arguments: the recipe's, and smaller ones.
EXACT: dict[str, tuple[Oracle, tuple[float, ...]]] = {
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), (0,)),
    "equalize": (lambda image, _: ImageOps.equalize(image), (0,)),
    "invert": (lambda image, _: ImageOps.invert(image), (0,)),
    "posterize": (ImageOps.posterize, (1, 3, 4)),
    "solarize": (ImageOps.solarize, (0, 230, 256)),
    "solarize_add": (_solarize_add, (0, 99, 110)),
    "color": (_enhance(ImageEnhance.Color), (0.1, 0.77, 1.72)),
    "contrast": (_enhance(ImageEnhance.Contrast), (0.1, 0.77, 1.72)),
    "brightness": (_enhance(ImageEnhance.Brightness), (0.1, 0.77, 1.72)),
    "sharpness": (_enhance(ImageEnhance.Sharpness), (0.1, 0.77, 1.72)),
}
GEOMETRIC: dict[str, tuple[Oracle, tuple[float, ...]]] = {
    "rotate": (
        lambda image, turn: image.rotate(turn, PIL.Image.Resampling.BILINEAR, fillcolor=FILL),
        (27.3, -13.0),
    ),
    "shear_x": (lambda image, factor: _affine(image, 1, factor, 0, 0, 1, 0), (0.27, -0.11)),
    "shear_y": (lambda image, factor: _affine(image, 1, 0, 0, factor, 1, 0), (0.27, -0.11)),
    "translate_x": (lambda image, share: _affine(image, 1, 0, share * image.width, 0, 1, 0), (0.405, -0.1)),
    "translate_y": (lambda image, share: _affine(image, 1, 0, 0, 0, 1, share * image.height), (0.405, -0.1)),
}
PICTURES = {
    "scene": shapes.draw("train", 3, 160)[0],
    "dark": (shapes.draw("train", 4, 160)[0] // 3 + 20).astype(np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8),
    "grey": np.full((32, 48, 3), 77, np.uint8),
    "two values": np.random.default_rng(1).choice(np.array([3, 200], np.uint8), (40, 40, 3)),
}


@pytest.mark.parametrize("name", ours.OPERATIONS)
def test_pillows_pixels(name: str) -> None:
    """Its bytes; in geometry the same pixels come from outside, and one in ten may be one level off, by rounding."""
    theirs, arguments = (EXACT | GEOMETRIC)[name]
    for image in PICTURES.values():
        for argument in arguments:
            expected = np.asarray(theirs(PIL.Image.fromarray(image), argument)).astype(int)
            difference = np.abs(ours.OPERATIONS[name][0](image, argument).astype(int) - expected)
            assert difference.max() <= (name in GEOMETRIC), argument
            assert (difference > 0).mean() < 0.1, argument


def test_arguments() -> None:
    """Those of timm, from a level and a sign."""
    expected: dict[str, tuple[float, float]] = {
        **{"rotate": (0.9, 27.0), "shear_y": (0.9, 0.27), "translate_x": (1.0, 0.45), "color": (0.9, 1.72)},
        **{
            "brightness": (0.0, 0.1),
            "posterize": (0.9, 3),
            "solarize": (0.9, 230),
            "solarize_add": (0.9, 99),
        },
    }
    for name, (level, value) in expected.items():
        argument = ours.OPERATIONS[name][1]
        assert argument(level, 1) == pytest.approx(value)
        assert argument(level, -1) == pytest.approx(-value if name in GEOMETRIC else value)


def test_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation an image on average, every one as often, magnitudes of 9 +- 0.5 cut at 10, both signs."""
    calls: list[tuple[str, float]] = []

    def recorder(name: str) -> tuple[Callable, Callable]:
        def record(image: np.ndarray, argument: float) -> np.ndarray:
            calls.append((name, argument))
            return image

        return record, lambda level, sign: level * sign

    monkeypatch.setattr(ours, "OPERATIONS", {name: recorder(name) for name in ours.OPERATIONS})
    image, count = np.zeros((2, 2, 3), np.uint8), 4000
    for seed in range(count):
        ours.rand_augment(image, magnitude=9, std=0.5, rng=np.random.default_rng(seed))
    assert abs(len(calls) / count - 1) < 0.04
    counts = collections.Counter(name for name, _ in calls)
    assert min(counts.values()) > 0.75 * count / 15
    levels = np.array([level for _, level in calls])
    assert abs((levels > 0).mean() - 0.5) < 0.03
    # The mean and the share at the cut of a normal distribution that is cut two deviations above its mean.
    at_the_cut = 0.5 * math.erfc(2 / math.sqrt(2))
    assert abs((np.abs(levels) == 1).mean() - at_the_cut) < 0.01
    assert abs(np.abs(levels).mean() - 0.9) < 0.003
