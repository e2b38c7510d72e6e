"""TopFormer-S on ImageNet by AdamW and a cosine of 300 epochs, with mixup and label smoothing.

python -m topformer_jax.train --config configs/topformer_s_imagenet_adamw.py --config.data.root=DIR

Published: nothing; the recipe is not the authors'. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.imagenet("small", optimizer="adamw")
