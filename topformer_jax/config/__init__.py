"""A config: the settings (settings.py), the recipes (recipes.py), and `load`, which reads and checks one.

A config is a locked `ml_collections.ConfigDict`. Commands take `--config FILE_OR_RECIPE` and any number of
`--config.KEY=VALUE`; `load` takes the same as a dictionary.

    >>> from topformer_jax import config
    >>> settings = config.load("topformer_b_ade", {"batch_size": 32})
    >>> settings.name, settings.batch_size, settings.data.crop_size
    ('topformer_b_ade', 32, (512, 512))
"""

from topformer_jax.config.loading import (
    compare_configs as compare_configs,
    complete as complete,
    explain_warmup as explain_warmup,
    hide_paths as hide_paths,
    load as load,
    recipe_names as recipe_names,
    resolve_schedule as resolve_schedule,
)
from topformer_jax.config.recipes import (
    ade20k as ade20k,
    base_config as base_config,
    camvid as camvid,
    camvid_fine_tune as camvid_fine_tune,
    cityscapes as cityscapes,
    coco_stuff10k as coco_stuff10k,
    fine_tune as fine_tune,
    imagenet as imagenet,
    pascal_context as pascal_context,
    shapes as shapes,
)
from topformer_jax.config.settings import as_typed as as_typed
