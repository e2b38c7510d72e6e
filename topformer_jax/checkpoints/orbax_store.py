"""Checkpoint folders (Orbax): one folder a step, of a model alone or of a training run.

Each step holds `model`, a flat dictionary of tensors by official name in this package's layout, and metadata:
`config` (the settings it belongs to) and `meta` (what an mmcv file says about itself: epoch, iteration, classes).
Training adds `average` (the averaged tensors, with `ema_decay`) and `optimizer`. Where there is an average, it is
what a reader of the model gets.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from topformer_jax import files
from topformer_jax.errors import UserError

NO_SPACE = "no space is left on the disk"


def save_model(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    *,
    step: int = 0,
) -> None:
    """Writes a model as one step of a checkpoint folder. Atomic: a temporary folder, then rename.

    Args:
        directory: the folder; it is made where it does not exist.
        tensors: by official name, in this package's layout.
        metadata: what JSON can hold: `config` and `meta`.
        step: which must not exist in the folder.

    Raises:
        UserError: the step exists, or the folder cannot be written.
    """
    directory = _absolute(directory)
    # Try to write first: Orbax would retry for minutes in the background before it reports an error.
    files.make_folder(directory)
    with files.report_errors("write a checkpoint into", directory):
        if (directory / str(step)).exists():
            raise UserError(f"{directory} already holds a checkpoint of step {step}: name another folder")
        with _checkpointer(directory) as checkpointer:
            checkpointer.save_checkpointables(step, {"model": dict(tensors)}, custom_metadata=dict(metadata))


def read_model(directory: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the metadata of a checkpoint folder's newest step, or of one step.

    Args:
        directory: a checkpoint folder, one of its step folders, or a training run's work directory.

    Raises:
        UserError: the folder does not exist, holds no checkpoint, or is damaged.
    """
    directory = _absolute(directory)
    with files.report_errors("read", directory):
        if not directory.is_dir():
            raise UserError(f"there is no checkpoint folder {directory}")
        if (directory / "checkpoints").is_dir():  # a training run's work directory
            directory = directory / "checkpoints"
        is_step = (directory / "_CHECKPOINT_METADATA").exists() and directory.name.isdigit()
    try:
        with _checkpointer(directory.parent if is_step else directory) as checkpointer:
            steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
            step = int(directory.name) if is_step else max(steps, default=None)
            if step not in steps:
                raise UserError(
                    f"{directory} holds no checkpoint: expected step folders written by this project"
                )
            stored = checkpointer.checkpointables_metadata(step)
            part = "average" if "average" in stored.metadata else "model"
            shapes = stored.metadata[part]
            if shapes is None:
                raise UserError(f"{directory} is damaged: the tensors of step {step} cannot be read")
            like = {name: np.zeros(tensor.shape, tensor.dtype) for name, tensor in shapes.items()}
            tensors = checkpointer.load_checkpointables(step, {part: like})[part]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {directory}: {files.explain(error)}") from None
    except Exception as error:  # Orbax has no common class for what a damaged checkpoint raises
        raise UserError(
            f"{directory} is damaged, or not a checkpoint of this project: {_reason(error)}"
        ) from error
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}, stored.custom_metadata or {}


class CheckpointStore:
    """The checkpoints of a training run: the newest ones and the best one, written in the background.

    Every process of a run makes one on the same folder and calls the same methods in the same order.

    Args:
        directory: the folder of the steps.
        max_to_keep: how many of the newest steps are kept, beside the one of the best score.
        metric: the name of the score in a checkpoint.

    Attributes:
        newest_started: the step that this process saved last, or 0; it may not be complete yet.

    Raises:
        UserError: by every method: the folder cannot be read or written, with what to do.
    """

    def __init__(self, directory: files.Path, max_to_keep: int, metric: str = "miou"):
        self.directory = directory
        self._metric = metric
        self.newest_started = 0
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[metric], n=1, keep_checkpoints_without_metrics=False
        )
        policy = policies.AnyPreservationPolicy([policies.LatestN(max_to_keep), best])
        try:
            self._checkpointer = _checkpointer(directory, policy)
        except Exception as error:
            raise UserError(
                f"cannot read the checkpoints in {directory}: {_reason(error)}; if one is damaged, move it away"
            ) from None

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score (0 to 1) of the best checkpoint that was evaluated."""
        evaluated = [(c.metrics[self._metric], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return (max(evaluated)[1], max(evaluated)[0]) if evaluated else None

    def is_evaluated(self, step: int) -> bool:
        """Whether the checkpoint of a step holds the score of its evaluation."""
        return any(c.step == step and bool(c.metrics) for c in self._checkpointer.checkpoints)

    def save(
        self, step: int, trees: Mapping[str, Any], metadata: dict[str, Any], score: float | None = None
    ) -> None:
        """Starts to write one step; the arrays are copied before this returns, so they may be donated.

        Args:
            step: an existing checkpoint of it is replaced.
            trees: of arrays, by what they are: `model`, `optimizer`, `average`; empty ones are skipped.
            metadata: what JSON can hold: `config` and `meta`.
            score: of this state's evaluation (0 to 1), where there was one.
        """
        metrics = None if score is None else {self._metric: score}
        if step == self.newest_started:  # Orbax would write both into one folder
            self.wait()
        self.newest_started = step
        with self._report_write_error():
            self._checkpointer.save_checkpointables_async(
                step, _non_empty(trees), force=True, overwrite=True, metrics=metrics, custom_metadata=metadata
            )

    def read_config(self, step: int) -> dict[str, Any]:
        """The settings of the run that wrote a step."""
        with self._report_read_error(step):
            stored = self._checkpointer.checkpointables_metadata(step)
            if not (stored.custom_metadata or {}).get("config"):
                raise ValueError("its metadata holds no config")
        return stored.custom_metadata["config"]

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """One step's trees, with the structure, dtypes and shardings of the arrays in `like`."""

        def describe(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

        described = jax.tree.map(describe, _non_empty(like))
        with self._report_read_error(step):
            return {**like, **self._checkpointer.load_checkpointables(step, described)}

    def wait(self) -> None:
        """Returns when all that `save` started is written."""
        with self._report_write_error():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits for what `save` started, and closes the folder."""
        with self._report_write_error():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _report_read_error(self, step: int) -> Iterator[None]:
        """Turns any error into one line: what cannot be read, and what to do instead."""
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
    def _report_write_error(self) -> Iterator[None]:
        """Turns any error into one line; Orbax raises one of the background at the next call.

        Inside a training loop implicit transfers are disallowed; Orbax may copy arrays and synchronise processes.
        """
        try:
            with jax.transfer_guard("allow"):
                yield
        except Exception as error:  # Orbax has no common class for what a full disk raises
            reason = NO_SPACE if "No space left" in str(error) else _reason(error)
            newest = self.latest
            saved = "none is saved yet" if newest is None else f"the newest complete one is of step {newest}"
            raise UserError(
                f"cannot write a checkpoint into {self.directory}: {reason}; {saved}; fix it and start the same "
                "command again"
            ) from None


def _absolute(directory: str | os.PathLike[str]) -> files.Path:
    """Orbax refuses relative paths."""
    return files.absolute(files.as_path(directory))


def _checkpointer(directory: files.Path, preservation_policy: Any | None = None) -> ocp.training.Checkpointer:
    """A reader of a folder; a writer that also removes what a crash left, with a preservation policy."""
    return ocp.training.Checkpointer(
        _absolute(directory),
        preservation_policy=preservation_policy,
        cleanup_tmp_directories=preservation_policy is not None,
    )


def _reason(error: BaseException) -> str:
    """The first cause of an error, in one line; Orbax's own messages can be pages long."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return f"{line[:200]}..." if len(line) > 200 else line


def _non_empty(trees: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
