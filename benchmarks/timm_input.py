"""A classifier's training example as timm makes it: by Pillow and torchvision, a normalised float32 tensor."""

import io
from collections.abc import Callable
from typing import Any

import torch
from ml_collections import ConfigDict
from PIL import Image

from topformer_jax.data.classification.images import RAND_AUGMENT_STD
from topformer_jax.data.sources import Example
from topformer_jax.runtime.errors import UserError


def make_transform(config: ConfigDict) -> Callable[[Example], Any]:
    """timm's training transform with the config's settings.

    Raises:
        UserError: timm is not installed.
    """
    try:
        from timm.data import create_transform
    except ImportError as error:
        raise UserError(f"timm does not work here ({error}): pip install timm, or leave --peer out") from None
    data = config.data
    torch.set_num_threads(1)
    transform = create_transform(
        tuple(data.crop_size),
        is_training=True,
        scale=data.crop_area,
        hflip=data.flip_prob,
        color_jitter=None,
        auto_augment=f"rand-m{data.rand_augment:.0f}-mstd{RAND_AUGMENT_STD}" if data.rand_augment else None,
        interpolation="bilinear",
        re_prob=data.erasing_prob,
        re_mode="pixel",
    )

    def make_example(example: Example) -> Any:
        assert isinstance(example.image, bytes)
        return transform(Image.open(io.BytesIO(example.image)).convert("RGB"))

    return make_example
