"""TopFormer-T on CamVid from scratch: 11 classes, 367 training images of 480 x 360.

python -m topformer_jax.train --config configs/topformer_t_camvid.py --config.data.root=DIR

No published score. Measured here: 65.6 on validation, 68.9 at three sizes and flipped (docs/camvid.md).
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.camvid("tiny")
