"""What a checkpoint says about itself beside its tensors, and how a command's config or data set differ from it.

`meta["CLASSES"]` and `meta["PALETTE"]` of its metadata, mmcv's names, are the names and colours of its classes;
`config` holds the settings that it was made with.
"""

import shlex
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from ml_collections import ConfigDict, FrozenConfigDict

from topformer_jax import config as config_lib, models
from topformer_jax.data import sources
from topformer_jax.data.catalog import CATALOG, Colour, DataSet, custom, is_name, name_classes
from topformer_jax.runtime import processes
from topformer_jax.runtime.errors import UserError

# The settings that change a score, by task.
SCORED_BY = {
    "segmentation": (
        *("evaluation.scale", "evaluation.size_divisor", "evaluation.img_ratios", "evaluation.flip"),
        *("evaluation.mode", "evaluation.crop_size", "evaluation.stride"),
    ),
    "classification": ("evaluation.crop_pct", "data.crop_size"),
}
WINDOWS = ("evaluation.crop_size", "evaluation.stride")  # only in mode "slide"


@runtime_checkable
class Weights(Protocol):
    """A loaded model or an exported file: `classes` and `palette` are empty if nobody named them."""

    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    checkpoint_config: FrozenConfigDict | None


def set_origin(model: models.Segmenter | models.Classifier, metadata: Mapping[str, Any], source: object) -> None:
    """Sets `classes`, `palette` and `checkpoint_config` of a model from a checkpoint's metadata."""
    named = read_names(metadata, model.config, source)
    if named is not None:
        model.classes, model.palette = named.classes, named.palette
    model.checkpoint_config = complete_config(metadata)


def read_names(metadata: Mapping[str, Any], config: ConfigDict, source: object) -> DataSet | None:
    """Names and colours of a checkpoint's classes: its own, else those of the config that need no file, else None.

    Prints and leaves out names or colours that cannot belong to the model.
    """
    data, count = config.data, config.model.num_classes
    is_segmenter = config.task == "segmentation"
    meta = metadata.get("meta") or {}
    classes: Any = meta.get("CLASSES")
    palette: Any = meta.get("PALETTE")
    left_out = ""
    if classes and not (_is_list(classes) and all(map(is_name, classes))):
        classes, left_out = None, "meta.CLASSES, which is no list of names"
    elif classes and len(classes) != count:
        classes, left_out = None, f"meta.CLASSES, {len(classes)} names for {count} classes"
    elif palette and not (_is_list(palette, count) and all(map(_is_colour, palette))):
        palette, left_out = None, f"meta.PALETTE, which is not {count} colours [red, green, blue]"
    if left_out:
        processes.say(f"left out of {source}: {left_out}")
    if classes:
        named = name_classes(data.dataset, classes, [tuple(colour) for colour in palette or ()])
        return named if is_segmenter else DataSet(named.classes, ())
    known = custom(data.class_names) if data.dataset == "custom" else CATALOG.get(data.dataset)
    return known if is_segmenter and known is not None and len(known.classes) == count else None


def complete_config(metadata: Mapping[str, Any]) -> FrozenConfigDict | None:
    """The settings that a checkpoint was made with; settings that are newer have their defaults.

    None if its metadata holds none, or those of another project.
    """
    stored = metadata.get("config")
    if not isinstance(stored, Mapping) or not isinstance(stored.get("evaluation"), Mapping):
        return None
    try:
        return FrozenConfigDict(config_lib.complete(stored))
    except UserError:
        return None


def print_differences(
    weights: Weights,
    config: ConfigDict,
    *,
    also: Collection[str] = (),
    given: Collection[str] = (),
    are_kept: bool = False,
) -> None:
    """Prints one line for other class names, and one for other settings, than those of a checkpoint.

    Args:
        weights: the model or the exported file.
        config: the command's.
        also: settings that matter to the command beside those that change a score.
        given: settings that flags of the command have changed on purpose.
        are_kept: whether the checkpoint's settings are used instead of the command's.
    """
    if line := sources.compare_classes(config, weights.classes):
        processes.say(line)
    stored = weights.checkpoint_config
    if stored is None:
        return
    flags, ours = [], []
    for key in dict.fromkeys((*SCORED_BY[config.task], *also)):
        group, name = key.split(".")
        is_used = key not in given and (key not in WINDOWS or stored.evaluation.mode == "slide")
        if is_used and stored[group][name] != config[group][name]:
            flags.append(f"--config.{key}={shlex.quote(config_lib.as_typed(stored[group][name]))}")
            ours.append(config_lib.as_typed(config[group][name]))
    if flags:
        end = "the output keeps them, and not" if are_kept else "this command uses"
        processes.say(f"the checkpoint was trained and scored with {' '.join(flags)}; {end} {', '.join(ours)}")


def check_label_rules(weights: Weights, config: ConfigDict) -> None:
    """Checks that labels are read as in the training of a checkpoint; prints a difference of another data set.

    Two custom data sets are the same one if they have the same classes.

    Raises:
        UserError: `data.reduce_zero_label` differs, which shifts every label by one.
    """
    stored = weights.checkpoint_config
    if stored is None or stored.data.reduce_zero_label == config.data.reduce_zero_label:
        return
    theirs, ours = (config_lib.as_typed(each.data.reduce_zero_label) for each in (stored, config))
    text = f"the checkpoint was trained with data.reduce_zero_label={theirs}, and this command's is {ours}"
    is_same = stored.data.dataset == config.data.dataset
    if is_same and not (config.data.dataset == "custom" and sources.compare_classes(config, weights.classes)):
        flag = f"--config.data.reduce_zero_label={theirs}"
        raise UserError(f"{text}, which shifts every label by one: give {flag}")
    processes.say(f"{text}: this is right only if the two data sets number their labels differently")


def _is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and length in (None, len(value))


def _is_colour(value: Any) -> bool:
    return _is_list(value, 3) and all(type(part) is int and 0 <= part <= 255 for part in value)
