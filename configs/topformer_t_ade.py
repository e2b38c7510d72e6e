"""TopFormer-T on ADE20K: 150 classes, 512 x 512.

python -m topformer_jax.train --config configs/topformer_t_ade.py

Published: 33.6 (batch 16), 34.6 (batch 32) mIoU, single scale. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.ade20k("tiny")
