"""`load`: a recipe's name, a config file or a config becomes a checked config."""

import difflib
import os
import pathlib
import re
import runpy
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from topformer_jax.config import checks
from topformer_jax.config.recipes import base_config
from topformer_jax.config.settings import SETTINGS
from topformer_jax.runtime.errors import UserError

_PACKAGE = pathlib.Path(__file__).parents[1]
PATHS = ("data.root", "data.cache", "init_from", "distillation.config", "distillation.checkpoint")
# A wheel holds the recipes inside the package, a clone beside it.
RECIPES = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def load(
    source: str | os.PathLike[str] | ConfigDict, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
    """Reads a config, changes settings, and checks all of them.

    Args:
        source: the path of a config file (a Python file with `get_config()`), the name of a recipe, or a config.
        overrides: values by dotted key, as Python values or as text: "0.1", "(512, 512)", "true".

    Returns:
        A new, locked config.

    Raises:
        UserError: there is no such file or recipe, it has no `get_config`, a setting does not exist, or its value is
            not legal.
    """
    config = source if isinstance(source, ConfigDict) else _read(_find(source))
    values = flatten(config.to_dict()) | dict(overrides or {})
    for key in values:
        if key not in SETTINGS:
            raise checks.unknown(key)
    if missing := [key for key in SETTINGS if key not in values]:
        raise UserError(
            f"the config has no {missing[0]}: start from a recipe, e.g. topformer_jax.config.ade20k('tiny')"
        )
    values = {key: checks.parse(key, value) for key, value in values.items()}
    checks.check_together(values)
    checked = base_config()
    checked.update_from_flattened_dict(values)
    return checked.lock()


def complete(values: Mapping[str, Any]) -> ConfigDict:
    """A config of nested values that an earlier version stored: settings added since have their defaults.

    >>> complete({"evaluation": {"scale": [480, 360]}}).evaluation.scale
    (480, 360)

    Raises:
        UserError: a value is not legal.
    """
    return load(base_config(), {key: value for key, value in flatten(values).items() if key in SETTINGS})


def hide_paths(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's nested values without paths on this machine, for a file that is given away.

    >>> hide_paths({"seed": 0, "data": {"root": "/home/me/ade"}})
    {'seed': 0, 'data': {'root': ''}}
    """
    return {
        key: hide_paths(value, f"{prefix}{key}.")
        if isinstance(value, dict)
        else ("" if f"{prefix}{key}" in PATHS else value)
        for key, value in values.items()
    }


def recipe_names() -> list[str]:
    """The names that `load` and `--config` take: those of the files in configs/."""
    return sorted(path.stem for path in RECIPES.glob("*.py"))


def _find(source: str | os.PathLike[str]) -> pathlib.Path:
    """The file that a path or a recipe's name stands for."""
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
    except BaseException as error:  # of the file's own too
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
        return f"{place}: {checks.unknown(quoted[1])}"
    reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error).split("\n")[0]
    return (
        f"{place}: {type(error).__name__}: {reason[:200]}" if reason else f"{place}: {type(error).__name__}"
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
