"""Checkpoints on disk (Orbax), and the strict fit of named tensors to a model.

A checkpoint folder holds one folder a step; each step holds `model`, a flat dictionary of tensors by official
name in our layout, and metadata: `config` (the settings it belongs to) and `meta` (what an mmcv file tells
of itself: epoch, iteration, classes, ...). Training adds `average` (the averaged tensors, where they are on)
and `optimizer`; whoever reads a model gets the averaged one where there is one.
"""

import contextlib
import logging
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from topformer_jax.errors import UserError
from topformer_jax.models import named_variables

Shape = tuple[int, ...]
_NO_SPACE = "no space is left on the disk"


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
        # Orbax would try for minutes, in the background, before it says that it cannot write.
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=directory).cleanup()
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
    if (directory / "checkpoints").is_dir():  # a training run's work directory
        directory = directory / "checkpoints"
    is_step = (directory / "_CHECKPOINT_METADATA").exists() and directory.name.isdigit()
    root = directory.parent if is_step else directory
    try:
        with _checkpointer(root) as checkpointer:
            steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
            step = int(directory.name) if is_step else max(steps, default=None)
            if step not in steps:
                raise UserError(
                    f"{directory} holds no checkpoint: expected step folders written by this project"
                )
            stored = checkpointer.checkpointables_metadata(step)
            part = "average" if "average" in stored.metadata else "model"
            shapes = stored.metadata[part]
            wanted = {name: np.zeros(tensor.shape, tensor.dtype) for name, tensor in shapes.items()}
            loaded = checkpointer.load_checkpointables(step, {part: wanted})
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror or error}") from None
    except Exception as error:  # Orbax has no common class for what a damaged checkpoint raises
        raise UserError(
            f"{directory} is damaged, or no checkpoint of this project: {_reason(error)}"
        ) from error
    return {name: np.asarray(tensor) for name, tensor in loaded[part].items()}, stored.custom_metadata or {}


def check_state_dict(
    found: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    source: str,
    *,
    hint: Callable[[], str] = lambda: "give the config that this checkpoint was made with",
) -> None:
    """Checks that every tensor has exactly one place and every place its tensor, or names all that do not.

    Args:
        found: names and shapes of what was read.
        wanted: names and shapes of what the model has.
        source: what was read, for the message.
        hint: what to do about a misfit; called only if there is one.

    Raises:
        UserError: something is missing, left over or of another shape.
    """
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


def load_state_dict(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts tensors into a model's places of the same name; the caller has checked that they fit."""
    places = named_variables(model)
    for name, tensor in tensors.items():
        places[name].set_value(jnp.asarray(tensor.astype(places[name].dtype, copy=False)))


def _checkpointer(directory: pathlib.Path, preservation: Any = None) -> ocp.training.Checkpointer:
    # Orbax tells of every folder it opens, and of an error in each of its threads before it raises it.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _untold
    return ocp.training.Checkpointer(
        directory.absolute(),
        preservation_policy=preservation,
        cleanup_tmp_directories=preservation is not None,
    )


def _untold(unraisable: Any) -> None:
    """Leaves out that the threads of an Orbax that has given up have nobody left to tell."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _reason(error: BaseException) -> str:
    """What an error began with, in a line; Orbax's own words can be pages."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return f"{line[:200]}..." if len(line) > 200 else line


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


class Checkpoints:
    """The checkpoints of a training run: the newest ones and the best one, written in the background.

    Every process of a run makes one on the same folder and calls the same methods in the same order.
    """

    def __init__(self, directory: pathlib.Path, kept: int):
        self.directory = directory
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["miou"], n=1, keep_checkpoints_without_metrics=False
        )
        policy = policies.AnyPreservationPolicy([policies.LatestN(kept), best])
        try:
            self._checkpointer = _checkpointer(directory, policy)
        except Exception as error:
            raise UserError(
                f"cannot read the checkpoints in {directory}: {_reason(error)}; if one is damaged, move it away"
            ) from None

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def best(self) -> tuple[int, float] | None:
        """Step and mIoU of the best checkpoint that was evaluated."""
        found = [(c.metrics["miou"], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return (max(found)[1], max(found)[0]) if found else None

    def scored(self, step: int) -> bool:
        """Whether a checkpoint holds the mIoU of its evaluation."""
        return any(c.step == step and bool(c.metrics) for c in self._checkpointer.checkpoints)

    def save(
        self, step: int, trees: Mapping[str, Any], metadata: dict[str, Any], miou: float | None = None
    ) -> None:
        """Starts to write one step; the arrays are copied before this returns, so they may be donated."""
        metrics = None if miou is None else {"miou": miou}
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step, _filled(trees), force=True, overwrite=True, metrics=metrics, custom_metadata=metadata
            )

    def config(self, step: int) -> dict[str, Any]:
        """The settings of the run that wrote a step."""
        with self._reading(step):
            stored = self._checkpointer.checkpointables_metadata(step)
            if not (stored.custom_metadata or {}).get("config"):
                raise ValueError("its metadata holds no config")
        return stored.custom_metadata["config"]

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """One step's trees, with the dtypes and the layout on devices of the ones given."""

        def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        wanted = jax.tree.map(abstract, _filled(like))
        with self._reading(step):
            return {**like, **self._checkpointer.load_checkpointables(step, wanted)}

    def wait(self) -> None:
        """Returns when what was started is written."""
        with self._writing():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        with self._writing():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Tells in one line what cannot be read, and what there is instead."""
        try:
            yield
        except Exception as error:  # Orbax has no common class for what a damaged checkpoint raises
            older = max((c.step for c in self._checkpointer.checkpoints if c.step < step), default=None)
            instead = "start anew" if older is None else f"go on from step {older}"
            raise UserError(
                f"cannot read {self.directory / str(step)}: {_reason(error)}; if it is damaged, move it away to "
                f"{instead}"
            ) from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells in one line what went wrong in the background; Orbax raises it at the next call."""
        try:
            yield
        except Exception as error:  # Orbax has no common class for what a full disk raises
            reason = _NO_SPACE if "No space left" in str(error) else _reason(error)
            newest = self.latest
            kept = "none is saved yet" if newest is None else f"the newest whole one is of step {newest}"
            raise UserError(
                f"cannot write a checkpoint into {self.directory}: {reason}; {kept}; mend it and start the same "
                "command again"
            ) from None


def _filled(trees: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
