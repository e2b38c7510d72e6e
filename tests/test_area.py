"""Images on canvases that are larger: the network's logits are those of each image alone."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from tests.parity import distance, model_from, settings_for, to_nchw, to_nhwc
from tests.reference import network as reference
from topformer_jax import models
from topformer_jax.models.layers import make_image_area

CANVAS = (192, 256)
SIZES = [(192, 256), (161, 131), (97, 255), (64, 33), (1, 1)]


def _on_canvas(images: list[np.ndarray], canvas: tuple[int, int]) -> np.ndarray:
    """Images at the top left of a canvas; the rest holds values that must not matter."""
    batch = np.random.default_rng(9).normal(size=(len(images), *canvas, 3)).astype(images[0].dtype)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return batch


def _masked_logits(model: models.Segmenter, images: list[np.ndarray], canvas: tuple[int, int]) -> list[np.ndarray]:
    """The logits of images of any sizes from one batch of a canvas."""
    each = [make_image_area(image.shape[:2], canvas, str(images[0].dtype)) for image in images]
    areas = jax.tree.map(lambda *arrays: np.stack(arrays), *each)
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
