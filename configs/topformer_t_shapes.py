"""TopFormer-T on synthetic shapes: 10 classes, drawn on the fly, nothing to download.

python -m topformer_jax.train --config configs/topformer_t_shapes.py

No published score. Measured here: unmeasured.
"""

from ml_collections import ConfigDict

from topformer_jax import config


def get_config() -> ConfigDict:
    return config.shapes()
