"""TopFormer-S on CamVid from scratch: 11 classes, 367 training images of 480 x 360.

python -m topformer_jax.train --config configs/topformer_s_camvid.py --config.data.root=DIR

No published score. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.camvid("small")
