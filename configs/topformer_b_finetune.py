"""TopFormer-B on your own pictures, from its ADE20K weights (docs/own_pictures.md).

python -m topformer_jax.train --config configs/topformer_b_finetune.py --config.data.root=DIR \
    --config.model.num_classes=N --config.init_from=TopFormer-B.pth

No published score. Measured here: unmeasured; docs/camvid.md has scores of T.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.fine_tune("base", classes=2, root="data/own", init_from="TopFormer-B.pth")
