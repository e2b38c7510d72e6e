"""Checkpoints on disk (Orbax), and the strict fit of named tensors to a model.

A checkpoint folder holds one folder a step; each step holds `model`, a flat dictionary of tensors by official
name in our layout, and metadata: `config` (the settings it belongs to) and `meta` (what an mmcv file tells
of itself: epoch, iteration, classes, ...).
"""

import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from topformer_jax.errors import UserError
from topformer_jax.models import tensors as model_tensors

Shape = tuple[int, ...]


def save_model(
    directory: str | pathlib.Path, step: int, tensors: Mapping[str, np.ndarray], metadata: dict[str, Any]
) -> None:
    """Writes one step into a checkpoint folder; a step that is there already is an error.

    Orbax writes into a temporary folder and renames it, so that a crash leaves no half checkpoint.
    """
    directory = pathlib.Path(directory).absolute()
    if (directory / str(step)).exists():
        raise UserError(f"{directory} already holds a checkpoint of step {step}: name another folder")
    try:
        with _checkpointer(directory) as checkpointer:
            checkpointer.save_checkpointables(step, {"model": dict(tensors)}, custom_metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot write a checkpoint into {directory}: {error.strerror or error}") from None


def read_model(directory: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the metadata of a checkpoint folder's newest step, or of the step folder named.

    Raises:
        UserError: the folder does not exist or holds no checkpoint.
    """
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise UserError(f"there is no checkpoint {directory}: expected a .pth file or an Orbax folder")
    root, step = (directory.parent, int(directory.name)) if directory.name.isdigit() else (directory, None)
    with _checkpointer(root) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        step = step if step is not None else max(steps, default=None)
        if step not in steps:
            raise UserError(f"{directory} holds no checkpoint: expected step folders written by this project")
        try:
            stored = checkpointer.checkpointables_metadata(step)
            shapes = stored.metadata["model"]
            wanted = {name: np.zeros(tensor.shape, tensor.dtype) for name, tensor in shapes.items()}
            loaded = checkpointer.load_checkpointables(step, {"model": wanted})
        except Exception as error:  # Orbax has no common class for what a damaged checkpoint raises
            reason = str(error).splitlines()[0]
            raise UserError(f"{root / str(step)} is damaged or of another kind: {reason}") from error
    return {
        name: np.asarray(tensor) for name, tensor in loaded["model"].items()
    }, stored.custom_metadata or {}


def require_fit(
    found: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    source: str,
    *,
    fresh: Iterable[str] = (),
    hint: Callable[[], str] = lambda: "give the config that this checkpoint was made with",
) -> None:
    """Checks that every tensor has exactly one place and every place its tensor, or names all that do not.

    Args:
        found: names and shapes of what was read.
        wanted: names and shapes of what the model has.
        source: what was read, for the message.
        fresh: names that need no tensor and take none.
        hint: what to do about a misfit; called only if there is one.

    Raises:
        UserError: something is missing, left over or of another shape.
    """
    wanted = {name: shape for name, shape in wanted.items() if name not in set(fresh)}
    missing = [name for name in wanted if name not in found]
    left_over = [name for name in found if name not in wanted]
    misshapen = [name for name in wanted if name in found and found[name] != wanted[name]]
    if not (missing or left_over or misshapen):
        return
    details = [f"  missing    {name}  config {_shape(wanted[name])}" for name in missing]
    details += [f"  left over  {name}  file {_shape(found[name])}" for name in left_over]
    details += [
        f"  misshapen  {name}  file {_shape(found[name])}, config {_shape(wanted[name])}"
        for name in misshapen
    ]
    raise UserError(
        f"{source} does not fit the config: {len(missing)} tensors are missing, {len(left_over)} are left over, "
        f"{len(misshapen)} have another shape; {hint()}",
        details,
    )


def assign(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts tensors into a model's places of the same name; the caller has checked that they fit."""
    places = model_tensors(model)
    for name, tensor in tensors.items():
        places[name].set_value(jnp.asarray(tensor.astype(places[name].dtype, copy=False)))


def _checkpointer(directory: pathlib.Path) -> ocp.training.Checkpointer:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every folder it opens
    return ocp.training.Checkpointer(directory)


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
