"""TopFormer-T on CamVid from fresh weights: 11 classes, 367 training images of 480 x 360.

python -m topformer_jax.train --config configs/topformer_t_camvid.py --config.data.root=DIR

No published score. Measured here: 59.3 on validation at step 4,000 of schedule.steps=5000.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.camvid("tiny")
