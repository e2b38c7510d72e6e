"""TopFormer-T on CamVid from its ADE20K weights: 11 classes, 367 training images of 480 x 360.

python -m topformer_jax.train --config configs/topformer_t_camvid_finetune.py --config.data.root=DIR \
    --config.init_from=TopFormer-T.pth

No published score. Measured here: 75.2 on validation, 76.5 at three sizes and flipped (docs/camvid.md).
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.camvid_fine_tune("tiny", init_from="TopFormer-T.pth")
