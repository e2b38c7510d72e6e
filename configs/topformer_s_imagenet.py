"""TopFormer-S on ImageNet: the backbone's classifier, 1000 classes, 224 x 224; the published 600 epochs.

python -m topformer_jax.train --config configs/topformer_s_imagenet.py --config.data.root=DIR

Published: 72.3 top-1. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.imagenet("small")
