"""TopFormer-S on ADE20K: 150 classes, 512 x 512.

python -m topformer_jax.train --config configs/topformer_s_ade.py

Published: 36.5 (batch 16), 37.0 (batch 32) mIoU, single scale. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.ade20k("small")
