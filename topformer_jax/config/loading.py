"""`load`: a recipe's name, a config file or a config becomes a checked config; what a resumed run may change."""

import ast
import difflib
import os
import pathlib
import re
import runpy
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from topformer_jax.config.recipes import base_config
from topformer_jax.config.settings import LONGEST_SIDE, SETTINGS, as_typed
from topformer_jax.runtime.errors import UserError
from topformer_jax.runtime.files import shorten

_PACKAGE = pathlib.Path(__file__).parents[1]
PATHS = ("data.root", "data.cache", "init_from", "distillation.config", "distillation.checkpoint")
# A wheel holds the recipes inside the package, a clone beside it.
RECIPES = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
TRANSFORMER_STRIDE = 64  # of the segmenter: pixels of the image for each pixel of its smallest map

# Settings that a resumed run cannot change: its state would not fit, or its labels would mean other classes.
REFUSED = {
    *("task", "data.reduce_zero_label", "optimizer.name", "optimizer.freeze"),
    *("model.variant", "model.num_classes", "model.depths"),
    *("model.injection", "model.head_channels", "model.depthwise_head"),
}
# Settings that change neither what the model learns nor its scores.
SILENT = {
    *("name", "log_every", "checkpoint_every", "evaluate_every", "upload_every", "max_to_keep"),
    *("data.num_workers", "data.prefetch", "data.cache", "mesh.fsdp", "mesh.slices"),
    *("evaluation.per_device_batch_size", "data.class_names"),  # class names have a check of their own
}
SEGMENTATION_ONLY = (
    *("loss.class_weight", "loss.ohem_threshold", "loss.dice_weight", "loss.jaccard_weight"),
    *("loss.lovasz_weight", "distillation.config"),
    *("data.aspect_range", "data.rotation", "data.balance", "data.mix", "evaluation.boundary_pixels"),
)
# A resumed run reads its checkpoint instead.
WITHOUT_EFFECT = {"init_from", "init_part"}


def load(source: str | os.PathLike[str] | ConfigDict, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Reads a config, changes settings, checks all of them, and returns a new, locked config.

    Args:
        source: the path of a config file (a Python file with `get_config()`), the name of a recipe, or a config.
        overrides: values by dotted key, as Python values or as text: "0.1", "(512, 512)", "true".
            `schedule.steps` sets `schedule.epochs` to 0.

    Raises UserError if there is no such file, recipe or setting, a value is not legal, or `overrides` has both
    `schedule.steps` and `schedule.epochs`.
    """
    config = source if isinstance(source, ConfigDict) else _read(_find(source))
    overrides = dict(overrides or {})
    if "schedule.steps" in overrides and parse("schedule.epochs", overrides.setdefault("schedule.epochs", 0)):
        raise UserError(
            f"schedule.steps={overrides['schedule.steps']} and schedule.epochs={overrides['schedule.epochs']} both "
            "set the length of a training: give one of them"
        )
    values = flatten(config.to_dict()) | overrides
    for key in values:
        if key not in SETTINGS:
            raise _unknown(key)
    if missing := [key for key in SETTINGS if key not in values]:
        raise UserError(
            f"the config has no {missing[0]}: start from a recipe, e.g. topformer_jax.config.ade20k('tiny')"
        )
    return _check(values)


def resolve_schedule(config: ConfigDict, examples: int) -> ConfigDict:
    """A config whose lengths are steps, for this number of training examples: the last epoch is a whole one.

    >>> settings = load("topformer_t_camvid", {"schedule.epochs": 5, "evaluate_every": 0})
    >>> resolved = resolve_schedule(settings, examples=367)
    >>> resolved.batch_size, resolved.schedule.steps, resolved.schedule.epochs, resolved.evaluate_every
    (4, 459, 0, 46)
    """
    epochs, steps = config.schedule.epochs, config.schedule.steps
    if epochs:
        steps = -(-epochs * examples // config.batch_size)
    setting = SETTINGS["schedule.steps"]
    if setting.legal is not None and steps not in setting.legal:
        raise UserError(
            f"schedule.epochs is {epochs:,}, which is {steps:,} steps for {examples:,} training examples: expected "
            f"{setting.expected} steps"
        )
    return load(config, {"schedule.steps": steps, "evaluate_every": config.evaluate_every or -(-steps // 10)})


def explain_warmup(schedule: ConfigDict) -> str:
    """One line if a run ends before its warm-up does; "" if not."""
    steps, warmup = schedule.steps, schedule.warmup_steps
    if warmup < steps:
        return ""
    return (
        f"all {steps} steps are warm-up (schedule.warmup_steps={warmup}), and the learning rate stays below "
        f"schedule.lr: set schedule.warmup_steps to about {max(1, steps // 10)}"
    )


def complete(values: Mapping[str, Any]) -> ConfigDict:
    """A config from nested values that another version stored: new settings get their defaults, unknown ones go.

    >>> complete({"evaluation": {"scale": [480, 360]}}).evaluation.scale
    (480, 360)
    """
    known = {key: value for key, value in flatten(values).items() if key in SETTINGS}
    return _check(flatten(base_config().to_dict()) | known)


def compare_configs(stored: Mapping[str, Any], config: ConfigDict, source: object) -> list[str]:
    """Compares the config of a run's checkpoint with that of its next start.

    Returns a line for each setting that changed and now applies, such as "batch_size: 16 -> 32". Raises UserError if
    one changed that the run cannot change.
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
    end = dict.fromkeys(WITHOUT_EFFECT, " (without effect: the run goes on from its checkpoint)")
    return [
        f"{key}: {shorten(as_typed(before[key]))} -> {shorten(as_typed(now[key]))}{end.get(key, '')}"
        for key in changed
        if key not in SILENT
    ]


def hide_paths(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's nested values without paths on this machine, for a file that is given away.

    >>> hide_paths({"seed": 0, "data": {"root": "/home/me/ade"}})
    {'seed': 0, 'data': {'root': ''}}
    """
    hidden: dict[str, Any] = {}
    for key, value in values.items():
        is_path, is_group = f"{prefix}{key}" in PATHS, isinstance(value, dict)
        hidden[key] = "" if is_path else hide_paths(value, f"{prefix}{key}.") if is_group else value
    return hidden


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def recipe_names() -> list[str]:
    """The names that `load` and `--config` take: those of the files in configs/."""
    return sorted(path.stem for path in RECIPES.glob("*.py"))


def _find(source: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(source)
    if os.path.isfile(path):
        return path
    names = recipe_names()
    if str(path) in names:
        return RECIPES / f"{path}.py"
    files = [other.name for other in path.parent.glob("*.py")] if len(path.parts) > 1 else []
    if near := difflib.get_close_matches(path.name, files, 1):
        hint = f"did you mean {path.parent / near[0]}?"
    elif near := difflib.get_close_matches(path.stem, names, 1):
        hint = f"did you mean the recipe {near[0]}?"
    else:
        hint = f"give the path of a config file, or the name of a recipe in {RECIPES}"
    raise UserError(f"there is no config file or recipe {path}: {hint}")


def _read(path: pathlib.Path) -> ConfigDict:
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # any that the file raises, SystemExit too
        raise UserError(_explain(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} is not a config file: it must define get_config() that returns a ConfigDict")
    return config


def _explain(path: pathlib.Path, error: BaseException) -> str:
    """One line on what went wrong in a config file, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f"{path}, line {line}" if line else str(path)
    # A locked ConfigDict's error lists all its other settings; the name stands first in quotes.
    inner = error.args[0] if isinstance(error, AttributeError) and error.args else None
    text = str(inner.args[0]) if isinstance(inner, KeyError) and inner.args else ""
    if quoted := re.search("[\"'](.+?)[\"']", text):
        return f"{place}: {_unknown(quoted[1])}"
    reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error).split("\n")[0]
    return f"{place}: {type(error).__name__}" + (f": {reason[:200]}" if reason else "")


def _unknown(key: str) -> UserError:
    """The error for a setting that does not exist; `key` may lack the group."""
    near = difflib.get_close_matches(key, SETTINGS, 1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "--help-config of any command lists all of them"
    return UserError(f"there is no setting {key}: {hint}")


def parse(key: str, value: Any) -> Any:
    """A legal value of a setting, from text ("0.1", "(512, 512)", "true") or from a Python value."""
    default = SETTINGS[key].default
    if isinstance(value, str) and value in SETTINGS[key].names:
        return value
    if isinstance(value, str) and not isinstance(default, str):
        words = {"true": True, "false": False, "none": None}
        try:
            value = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
            raise _wrong_type(key, value) from None
    if value is None and default is None:
        return None
    if not isinstance(default, tuple):
        return _parse_one(key, value, int if default is None else type(default), value)
    if not isinstance(value, (list, tuple)) or (default and not value) or len(default) == 2 != len(value):
        raise _wrong_type(key, value)
    return tuple(_parse_one(key, part, _part_type(key), value) for part in value)


def _parse_one(key: str, value: Any, kind: type, whole: Any) -> Any:
    """A value of a setting, or one of the values of its tuple `whole`, as the setting's type."""
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or isinstance(value, bool) != (kind is bool):
        raise _wrong_type(key, whole)
    setting = SETTINGS[key]
    if setting.legal is not None and value not in setting.legal:
        near = difflib.get_close_matches(value, setting.legal, 1) if isinstance(setting.legal, tuple) else []
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{key} is {_show(whole)}: {hint}expected {setting.expected}")
    return kind(value)


def _part_type(key: str) -> type:
    """The type of each value of a tuple; one that is empty by default holds numbers if it has a range."""
    setting = SETTINGS[key]
    return type(setting.default[0]) if setting.default else str if setting.legal is None else float


def _show(value: Any) -> str:
    """The start of a value's repr."""
    try:
        return shorten(repr(value))
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return "a number of thousands of digits"


def _wrong_type(key: str, value: Any) -> UserError:
    default = SETTINGS[key].default
    example = default
    if default == ():
        example = ("name", "name") if _part_type(key) is str else (1.0, 2.5)
    kind = "a number or none" if default is None else f"a value like {example!r} ({type(default).__name__})"
    kind = " or ".join((kind, *SETTINGS[key].names))
    return UserError(f"{key} cannot be {_show(value)}: expected {kind}")


def _check(values: Mapping[str, Any]) -> ConfigDict:
    """A locked config of the values of all settings, by dotted key; raises a UserError if one is not legal."""
    values = {key: parse(key, value) for key, value in values.items()}
    _check_together(values)
    config = base_config()
    config.update_from_flattened_dict(values)
    return config.lock()


def _check_together(values: Mapping[str, Any]) -> None:
    """Raises a UserError if settings, by dotted key, do not go together."""
    is_classification = values["task"] == "classification"
    classes, weights = values["model.num_classes"], values["loss.class_weight"]
    if not is_classification and classes > 255:
        expected = "expected 1 to 255 in segmentation, whose labels are bytes with 255 for void"
        raise UserError(f"model.num_classes is {classes}: {expected}")
    if values["name"] in (".", "..") or set(values["name"]) & set("/\\"):
        raise UserError(f"name is {shorten(values['name'])!r}: expected the name of a folder, which goes into runs/")
    if isinstance(weights, tuple) and len(weights) not in (0, classes):
        raise UserError(f"loss.class_weight has {len(weights)} numbers: expected one for each of {classes} classes")
    for key in SEGMENTATION_ONLY:
        if is_classification and values[key] != SETTINGS[key].default:
            raise UserError(f"{key} is {_show(values[key])}: it is for task=segmentation only")
    if bool(values["distillation.config"]) != bool(values["distillation.checkpoint"]):
        raise UserError(
            "distillation needs both distillation.config, the teacher's recipe, and distillation.checkpoint"
        )
    for key in ("distillation.channel_weight", "distillation.jaccard_weight"):
        if values[key] and not values["distillation.config"]:
            raise UserError(f"{key} is {values[key]}: it needs a teacher, distillation.config and .checkpoint")
    for key in ("data.ratio_range", "data.aspect_range", "data.crop_area"):
        low, high = values[key]
        if low > high or high == 0:
            raise UserError(f"{key} is {(low, high)}: expected the smaller number first, and one above 0")
    rows = values["batch_size"] // values["grad_accum_steps"]
    if is_classification and values["data.mixup_alpha"] and rows % 2:
        raise UserError(
            f"data.mixup_alpha mixes pairs, and a micro-batch has {rows} images: set batch_size to an even multiple "
            "of grad_accum_steps, or data.mixup_alpha=0"
        )
    _check_sizes(values)


def _check_sizes(values: Mapping[str, Any]) -> None:
    """Raises a UserError if sizes leave BatchNorm a single value, or make an image too large or too small."""
    is_classification = values["task"] == "classification"
    crop = max(values["data.crop_size"])
    # The smallest map of such a micro-batch is one pixel of one image.
    is_single = values["batch_size"] == values["grad_accum_steps"] and not values["model.bn_frozen"]
    if is_single and (is_classification or crop <= TRANSFORMER_STRIDE):
        way_out = "" if is_classification else f", or data.crop_size larger than {TRANSFORMER_STRIDE}"
        raise UserError(
            f"batch_size is {values['batch_size']}, grad_accum_steps {values['grad_accum_steps']}: BatchNorm needs "
            "more than one value a channel, and a micro-batch of one image is one pixel in the last layers; set "
            f"batch_size to at least twice grad_accum_steps{way_out}"
        )
    for ratios, scale in (("data.ratio_range", "data.scale"), ("evaluation.img_ratios", "evaluation.scale")):
        longest = max(values[ratios]) * max(values[scale])
        if longest > LONGEST_SIDE:
            raise UserError(
                f"{ratios} is {values[ratios]}: with {scale}={values[scale]} an image's long side would be "
                f"{longest:,.0f} pixels, at most {LONGEST_SIDE:,} are possible"
            )
