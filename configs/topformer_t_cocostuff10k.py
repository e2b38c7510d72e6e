"""TopFormer-T on COCO-Stuff 10k: 171 classes, 512 x 512.

python -m topformer_jax.train --config configs/topformer_t_cocostuff10k.py

Published: 28.3 mIoU (by others). Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.coco_stuff10k("tiny")
