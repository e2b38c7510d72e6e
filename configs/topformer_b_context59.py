"""TopFormer-B on PASCAL Context without background: 59 classes, 480 x 480.

python -m topformer_jax.train --config configs/topformer_b_context59.py

Published: none known. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.pascal_context("base", classes=59)
