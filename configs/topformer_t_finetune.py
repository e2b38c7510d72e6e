"""TopFormer-T on your own pictures, from its ADE20K weights (docs/own_pictures.md).

python -m topformer_jax.train --config configs/topformer_t_finetune.py --config.data.root=DIR \
    --config.model.num_classes=N --config.init_from=TopFormer-T.pth

No published score. Measured here: 62.5 on CamVid with 60 training pictures (docs/camvid.md).
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.fine_tune("tiny", classes=2, root="data/own", init_from="TopFormer-T.pth")
