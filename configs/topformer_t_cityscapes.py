"""TopFormer-T on Cityscapes: 19 classes, 512 x 1024.

python -m topformer_jax.train --config configs/topformer_t_cityscapes.py

Published: none by the authors. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.cityscapes("tiny")
