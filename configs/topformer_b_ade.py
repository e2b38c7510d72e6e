"""TopFormer-B on ADE20K: 150 classes, 512 x 512.

python -m topformer_jax.train --config configs/topformer_b_ade.py

Published: 38.3 (batch 16), 39.2 (batch 32) mIoU, single scale. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.ade20k("base")
