"""TopFormer-S on Cityscapes: 19 classes, 512 x 1024.

python -m topformer_jax.train --config configs/topformer_s_cityscapes.py

Published: none by the authors, who have no recipe for it either (this is the one of Tiny). Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.cityscapes("small")
