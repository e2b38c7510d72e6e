"""RandAugment's operations and their arguments as timm has them, and its draws."""

import collections
import math
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
from PIL import ImageEnhance, ImageOps

from topformer_jax.data import shapes
from topformer_jax.data.classification import rand_augment as ours

FILL = (124, 116, 104)
BILINEAR = PIL.Image.Resampling.BILINEAR
PICTURE = PIL.Image.fromarray(shapes.draw("train", 3, 160)[0])


def affine(*matrix: float) -> PIL.Image.Image:
    affine = PIL.Image.Transform.AFFINE
    return PICTURE.transform(PICTURE.size, affine, matrix, BILINEAR, fillcolor=FILL)


# timm's rand_augment_ops at magnitude 9 of 10: the argument for the sign 1, and what Pillow makes of it.
EXPECTED: dict[str, tuple[float, Callable[[], PIL.Image.Image]]] = {
    "autocontrast": (0, lambda: ImageOps.autocontrast(PICTURE)),
    "equalize": (0, lambda: ImageOps.equalize(PICTURE)),
    "invert": (0, lambda: ImageOps.invert(PICTURE)),
    "rotate": (27.0, lambda: PICTURE.rotate(27.0, BILINEAR, fillcolor=FILL)),
    "posterize": (3, lambda: ImageOps.posterize(PICTURE, 3)),
    "solarize": (230, lambda: ImageOps.solarize(PICTURE, 230)),
    "solarize_add": (99, lambda: PICTURE.point([min(255, v + 99 * (v < 128)) for v in range(256)] * 3)),
    "color": (1.72, lambda: ImageEnhance.Color(PICTURE).enhance(1.72)),
    "contrast": (1.72, lambda: ImageEnhance.Contrast(PICTURE).enhance(1.72)),
    "brightness": (1.72, lambda: ImageEnhance.Brightness(PICTURE).enhance(1.72)),
    "sharpness": (1.72, lambda: ImageEnhance.Sharpness(PICTURE).enhance(1.72)),
    "shear_x": (0.27, lambda: affine(1, 0.27, 0, 0, 1, 0)),
    "shear_y": (0.27, lambda: affine(1, 0, 0, 0.27, 1, 0)),
    "translate_x": (0.405, lambda: affine(1, 0, 0.405 * PICTURE.width, 0, 1, 0)),
    "translate_y": (0.405, lambda: affine(1, 0, 0, 0, 1, 0.405 * PICTURE.height)),
}
SIGNED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


@pytest.mark.parametrize("name", EXPECTED)
def test_operations(name: str) -> None:
    operation, argument = ours.OPERATIONS[name]
    value, expected = EXPECTED[name]
    assert argument(0.9, 1) == pytest.approx(value)
    assert argument(0.9, -1) == pytest.approx(-value if name in SIGNED else value)
    np.testing.assert_array_equal(operation(PICTURE, argument(0.9, 1)), expected())


def test_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation an image on average, every one as often, magnitudes of 9 +- 0.5 cut at 10, both signs."""
    assert ours.OPERATIONS.keys() == EXPECTED.keys()
    calls: list[tuple[str, float]] = []

    def recorder(name: str) -> tuple[Callable, Callable]:
        def record(image: PIL.Image.Image, argument: float) -> PIL.Image.Image:
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
