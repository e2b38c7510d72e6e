"""TopFormer-T on PASCAL Context without background: 59 classes, 480 x 480.

python -m topformer_jax.train --config configs/topformer_t_context59.py

Published: 40.4 mIoU (by others). Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.pascal_context("tiny", classes=59)
