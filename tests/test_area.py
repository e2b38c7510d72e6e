"""Images on canvases that are larger: the network's logits are those of each image alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.parity import distance, model_from, settings_for, to_nchw, to_nhwc
from tests.reference import network as reference
from topformer_jax import models
from topformer_jax.models.layers import WHOLE, ImageArea, make_image_area
from topformer_jax.ops.resample import adaptive_avg_pool, resize

CANVAS = (192, 256)
SIZES = [(192, 256), (161, 131), (97, 255), (64, 33), (1, 1)]


def _stack(areas: list[ImageArea]) -> ImageArea:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *areas)


def _on_canvas(images: list[np.ndarray], canvas: tuple[int, int]) -> np.ndarray:
    """Images at the top left of a canvas; the rest holds values that must not matter."""
    batch = np.random.default_rng(9).normal(size=(len(images), *canvas, 3)).astype(images[0].dtype)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return batch


def _masked_logits(model: models.Segmenter, images: list[np.ndarray], canvas: tuple[int, int]) -> list[np.ndarray]:
    """The logits of images of any sizes from one batch of a canvas."""
    areas = _stack([make_image_area(image.shape[:2], canvas, str(images[0].dtype)) for image in images])
    graphdef, state = nnx.split(model)
    program = jax.jit(lambda state, batch, area: nnx.merge(graphdef, state)(batch, area=area))
    logits = np.asarray(program(state, _on_canvas(images, canvas), areas))
    cells = [[-(-side // 8) for side in image.shape[:2]] for image in images]
    return [found[:height, :width] for found, (height, width) in zip(logits, cells, strict=True)]


@pytest.mark.parametrize(
    ("variant", "injection"),
    [
        ("tiny", "multi_sum"),
        ("tiny", "fuse_multi"),
        pytest.param("small", "multi_sum_cbr", marks=pytest.mark.slow),
        pytest.param("base", "none", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("x64")
def test_images_of_many_sizes_share_a_batch(variant: str, injection: str) -> None:
    """Against PyTorch's network on each image alone, in float64."""
    network = reference.Segmenter(variant, 7, reference.OFFICIAL_NAMES.get(injection, injection), False)
    reference.randomize(network, seed=0)
    settings = settings_for(
        variant,
        model__injection=injection,
        model__num_classes=7,
        model__depthwise_head=False,
        model__dtype="float64",
    )
    model = model_from(network, settings)
    network.double().eval()
    assert isinstance(model, models.Segmenter)
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(*size, 3)) for size in SIZES]
    found = _masked_logits(model, images, CANVAS)
    errors = []
    for image, logits in zip(images, found, strict=True):
        with torch.no_grad():
            theirs = to_nhwc(network(to_nchw(image[None])))[0]
        errors.append(distance(logits, theirs))
    print(variant, injection, [f"{error:.1e}" for error in errors])
    assert max(errors) <= 1e-11


def test_matrices_as_data_resize_each_image() -> None:
    rng = np.random.default_rng(0)
    canvas, sizes = (128, 192), [(128, 192), (100, 70), (65, 129)]
    areas = _stack([make_image_area(size, canvas, "float32") for size in sizes])
    for (before, after), operation in (((8, 64), adaptive_avg_pool), ((64, 16), resize)):
        maps = rng.normal(size=(3, canvas[0] // before, canvas[1] // before, 5)).astype(np.float32)
        target = (canvas[0] // after, canvas[1] // after)
        found = operation(jnp.asarray(maps), target, matrices=areas.matrices_between(before, after))
        for row, size in enumerate(sizes):
            (h, w), (height, width) = ([-(-side // stride) for side in size] for stride in (before, after))
            alone = operation(jnp.asarray(maps[row : row + 1, :h, :w]), (height, width))
            assert distance(found[row, :height, :width], alone[0]) <= 1e-6
            assert not np.any(found[row, height:])
            assert not np.any(found[row, :, width:])


def test_smaller_canvases_take_the_corner() -> None:
    large, small = (make_image_area((60, 90), canvas, "float32") for canvas in ((256, 320), (64, 128)))
    cornered = large.on_canvas((64, 128))
    for key, matrices in small.matrices.items():
        for ours, expected in zip(cornered.matrices[key], matrices, strict=True):
            assert np.array_equal(ours, expected)
    assert dataclasses.astuple(WHOLE.on_canvas((64, 128))) == dataclasses.astuple(WHOLE)
