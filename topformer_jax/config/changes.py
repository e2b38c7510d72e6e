"""What may change between two starts of one run: which settings refuse, are said, or pass without a word."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from topformer_jax.config.listing import as_typed
from topformer_jax.config.loading import complete, flatten
from topformer_jax.runtime.errors import UserError

# The state of a run has no place for them, or its labels would mean something else.
REFUSED = {
    *("task", "data.reduce_zero_label", "optimizer.name", "model.variant", "model.num_classes"),
    *("model.injection", "model.head_channels", "model.depthwise_head", "model.depths", "model.param_dtype"),
}
# They change neither what is learned nor what is scored.
SILENT = {
    *("name", "log_every", "checkpoint_every", "evaluate_every", "upload_every", "max_to_keep"),
    *("data.num_workers", "data.prefetch", "data.cache", "mesh.data", "mesh.fsdp", "mesh.slices"),
    *("evaluation.per_device_batch_size", "data.class_names"),  # names are compared by themselves
}
# A resumed run reads its checkpoint instead.
WITHOUT_EFFECT = {"init_from", "init_part"}


def compare_configs(stored: Mapping[str, Any], config: ConfigDict, source: object) -> list[str]:
    """Compares the settings of a run's checkpoint with those of its next start; one that it lacks had its default.

    Returns:
        A line for each setting that changed and now applies: "batch_size: 16 -> 32".

    Raises:
        UserError: a setting changed that the run cannot change.
    """
    before, now = (flatten(each.to_dict()) for each in (complete(stored), config))
    changed = [key for key in now if before[key] != now[key]]
    for key in changed:
        if key in REFUSED or (key == "ema_decay" and not before[key]):
            own = as_typed(before[key])
            raise UserError(
                f"{source} holds a run with {key}={own}, and the config has {as_typed(now[key])}: set "
                f"--config.{key}={own} to resume it, or start a new run with another --workdir"
            )
    return [
        f"{key}: {_shorten(before[key])} -> {_shorten(now[key])}"
        + (" (without effect: the run goes on from its checkpoint)" if key in WITHOUT_EFFECT else "")
        for key in changed
        if key not in SILENT
    ]


def _shorten(value: object) -> str:
    text = as_typed(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
