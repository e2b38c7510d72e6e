"""TopFormer-T on ADE20K at 448 x 448: 150 classes.

python -m topformer_jax.train --config configs/topformer_t_ade448.py

Published: 32.5 (batch 16), 33.4 (batch 32) mIoU, single scale. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.ade20k("tiny", size=448)
