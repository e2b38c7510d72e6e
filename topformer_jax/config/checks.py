"""Whether a setting exists and its value is legal, by the table; each mistake is one line."""

import ast
import difflib
from collections.abc import Mapping
from typing import Any

from topformer_jax.config.settings import LONGEST_SIDE, SETTINGS
from topformer_jax.runtime.errors import UserError

TRANSFORMER_STRIDE = 64  # of the segmenter: pixels of the image that a pixel of its smallest map stands for


def unknown(key: str) -> UserError:
    """The error for a setting that does not exist: names the nearest one; `key` may lack the group."""
    near = difflib.get_close_matches(key, SETTINGS, 1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "--help-config of any command lists all of them"
    return UserError(f"there is no setting {key}: {hint}")


def parse(key: str, value: Any) -> Any:
    """A legal value of a setting, from text ("0.1", "(512, 512)", "true") or from a Python value.

    Raises:
        UserError: the value has another type than the setting, or is not legal.
    """
    setting = SETTINGS[key]
    default = setting.default
    if isinstance(value, str) and not isinstance(default, str):
        value = _literal(key, value)
    if value is None and default is None:
        return None
    if not isinstance(default, tuple):
        return _parse_one(key, value, int if default is None else type(default), value)
    if not isinstance(value, (list, tuple)) or (default and not value) or len(default) == 2 != len(value):
        raise _wrong_type(key, value)
    return tuple(_parse_one(key, part, _part_type(key), value) for part in value)


def check_together(values: Mapping[str, Any]) -> None:
    """Checks settings that limit each other, given all of them by dotted key.

    Raises:
        UserError: two of them do not go together.
    """
    if values["task"] == "segmentation" and values["model.num_classes"] > 255:
        raise UserError(
            f"model.num_classes is {values['model.num_classes']}: expected 1 to 255 in segmentation, "
            "whose labels are bytes with 255 for void"
        )
    if values["name"] in (".", "..") or set(values["name"]) & set("/\\"):
        raise UserError(
            f"name is {_show(values['name'])}: expected the name of a folder, which goes into runs/"
        )
    weights, classes = len(values["loss.class_weight"]), values["model.num_classes"]
    if weights not in (0, classes):
        raise UserError(
            f"loss.class_weight has {weights} numbers: expected one for each of {classes} classes"
        )
    alone = ("loss.class_weight", "loss.ohem_threshold", "loss.dice_weight", "distillation.config")
    if values["task"] == "classification" and (used := [key for key in alone if values[key]]):
        raise UserError(f"{used[0]} is {_show(values[used[0]])}: it is for task=segmentation alone")
    if bool(values["distillation.config"]) != bool(values["distillation.checkpoint"]):
        raise UserError(
            "distillation needs both distillation.config, the teacher's recipe, and distillation.checkpoint"
        )
    for key in ("data.ratio_range", "data.crop_area"):
        low, high = values[key]
        if low > high or high == 0:
            raise UserError(f"{key} is {(low, high)}: expected the smaller number first, and one above 0")
    rows = values["batch_size"] // values["grad_accum_steps"]
    if values["task"] == "classification" and values["data.mixup_alpha"] and rows % 2:
        raise UserError(
            f"data.mixup_alpha mixes pairs, and a micro-batch has {rows} images: set batch_size to an even multiple "
            "of grad_accum_steps, or data.mixup_alpha=0"
        )
    _check_batch_norm(values)
    side, crop = values["evaluation.short_side"], max(values["data.crop_size"])
    if values["task"] == "classification" and side < crop:
        raise UserError(
            f"evaluation.short_side is {side}: expected at least {crop}, the longer side of data.crop_size"
        )
    for ratios, scale in (("data.ratio_range", "data.scale"), ("evaluation.img_ratios", "evaluation.scale")):
        longest = max(values[ratios]) * max(values[scale])
        if longest > LONGEST_SIDE:
            raise UserError(
                f"{ratios} is {_show(values[ratios])}: with {scale}={values[scale]} an image's long side would be "
                f"{longest:,.0f} pixels, at most {LONGEST_SIDE:,} are possible"
            )


def _check_batch_norm(values: Mapping[str, Any]) -> None:
    """Refuses micro-batches of one image whose smallest map is one pixel: BatchNorm has one value a channel there."""
    if values["batch_size"] != values["grad_accum_steps"]:
        return
    is_classification = values["task"] == "classification"
    if is_classification or max(values["data.crop_size"]) <= TRANSFORMER_STRIDE:
        way_out = "" if is_classification else f", or data.crop_size larger than {TRANSFORMER_STRIDE}"
        raise UserError(
            f"batch_size is {values['batch_size']}, grad_accum_steps {values['grad_accum_steps']}: BatchNorm needs "
            "more than one value a channel, and a micro-batch of one image is one pixel in the last layers; set "
            f"batch_size to at least twice grad_accum_steps{way_out}"
        )


def _literal(key: str, text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
        raise _wrong_type(key, text) from None


def _parse_one(key: str, value: Any, kind: type, whole: Any) -> Any:
    """A value of a setting, or one of its values in a tuple `whole`, as the type that the setting has."""
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or isinstance(value, bool) != (kind is bool):
        raise _wrong_type(key, whole)
    setting = SETTINGS[key]
    if setting.legal is not None and value not in setting.legal:
        near: list[str] = []
        if isinstance(setting.legal, tuple):
            near = difflib.get_close_matches(value, setting.legal, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{key} is {_show(whole)}: {hint}expected {setting.expected}")
    return kind(value)


def _part_type(key: str) -> type:
    """Of each value of a setting that is a tuple; one that is empty by default holds numbers if it has a range."""
    setting = SETTINGS[key]
    return type(setting.default[0]) if setting.default else str if setting.legal is None else float


def _wrong_type(key: str, value: Any) -> UserError:
    default = SETTINGS[key].default
    example = default
    if default == ():
        example = ("name", "name") if _part_type(key) is str else (1.0, 2.5)
    kind = "a number or none" if default is None else f"a value like {example!r} ({type(default).__name__})"
    return UserError(f"{key} cannot be {_show(value)}: expected {kind}")


def _show(value: Any) -> str:
    """A value in at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text):,} characters)"
