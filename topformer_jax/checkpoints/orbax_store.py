"""Checkpoint folders (Orbax): one folder per step, of a model or of a training run.

Each step holds `model`, a flat dictionary of tensors by official name in this package's layout, and metadata:
`config` (its settings) and `meta` (what an mmcv file says about itself: epoch, iteration, classes). Training adds
`optimizer` and, with `ema_decay`, `average`, which readers of the model get instead of `model`. A step is written
once and never changed: the run's log holds its score. The entry `crc32` of the metadata has a checksum of each array
that the first process holds as a whole: neither OCDBT's files nor zstd's blocks have one.
"""

import contextlib
import dataclasses
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import msgspec
import numpy as np
from orbax.checkpoint import v1 as ocp

from topformer_jax.runtime import files, processes
from topformer_jax.runtime.errors import UserError

NO_SPACE = "no space is left on the disk"
EXIT_SECONDS = 10.0  # a process that has to end waits so long for a write in flight


class _Groups(msgspec.Struct):  # of settings that readers look into
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}


class Metadata(msgspec.Struct):
    """The types of the entries in a checkpoint's metadata; other entries are its writer's."""

    meta: dict[str, Any] = {}
    config: _Groups = msgspec.field(default_factory=_Groups)
    crc32: dict[str, int] = {}  # of the bytes of each array, by its tree and its path


def checksums(trees: Mapping[str, Any]) -> dict[str, int]:
    """The CRC-32 of each array that this process holds as a whole."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(trees)):
        if getattr(leaf, "is_fully_replicated", True) or leaf.is_fully_addressable:
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = checksum(np.asarray(leaf))
    return found


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def check_sums(found: Mapping[str, int], stored: Mapping[str, int], where: object) -> None:
    """Raises a UserError if a checksum differs from the stored one, if any: a disk or a copy has changed bits."""
    wrong = [name for name, value in found.items() if stored.get(name, value) != value]
    if wrong:
        raise UserError(
            f"{where} is damaged: {len(wrong)} of {len(found)} arrays differ from what was written, {wrong[0][:80]} "
            "for one: copy it again, or use another checkpoint"
        )


def save_model(
    directory: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes a model as step 0 of a checkpoint folder, whole or not at all.

    Raises:
        UserError: the step exists, or the folder cannot be written.
    """
    directory = _absolute(directory)
    # Try to write first: Orbax would retry for minutes in the background before it reports an error.
    files.make_folder(directory)
    trees = {"model": dict(tensors)}
    metadata = {**metadata, "crc32": checksums(trees)}
    with files.report_errors("write a checkpoint into", directory):
        if (directory / "0").exists():
            raise UserError(f"{directory} already holds a checkpoint of step 0: name another folder")
        with _checkpointer(directory) as checkpointer:
            checkpointer.save_checkpointables(0, trees, custom_metadata=metadata)


def read_model(directory: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the tensors and the metadata of a step, or of the newest step of a checkpoint folder or a run.

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
                raise UserError(f"{directory} holds no checkpoint: expected step folders written by this project")
            stored = checkpointer.checkpointables_metadata(step)
            part = "average" if "average" in stored.metadata else "model"
            shapes = stored.metadata[part]
            if shapes is None:
                raise UserError(f"{directory} is damaged: the tensors of step {step} cannot be read")
            like = {name: np.zeros(tensor.shape, tensor.dtype) for name, tensor in shapes.items()}
            metadata, sums = _split_metadata(stored, directory)
            loaded = checkpointer.load_checkpointables(step, {part: like})
            check_sums(checksums(loaded), sums, directory if is_step else directory / str(step))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {directory}: {files.explain(error)}") from None
    except Exception as error:  # Orbax has no common class for what a damaged checkpoint raises
        raise UserError(f"{directory} is damaged, or not a checkpoint of this project: {_reason(error)}") from error
    return {name: np.asarray(tensor) for name, tensor in loaded[part].items()}, metadata


def _split_metadata(stored: Any, where: object) -> tuple[dict[str, Any], dict[str, int]]:
    """The metadata of a step, and the checksums of its arrays; a UserError if types are not those of `Metadata`."""
    custom = stored.custom_metadata or {}
    sums = files.convert(custom, Metadata, f"the metadata of {where}").crc32
    return {key: value for key, value in custom.items() if key != "crc32"}, sums


class CheckpointStore:
    """The checkpoints of a training run: the newest `max_to_keep` and the best one, written in the background.

    Every process of a run makes one on the same folder and calls the same methods in the same order. An older step
    is deleted when its successor is complete. Methods raise a UserError if the folder cannot be read or written.
    `scores` are those of earlier starts, 0 to 1, by step; those of steps after the newest one are left out.
    """

    def __init__(self, directory: files.Path, max_to_keep: int, scores: Mapping[int, float] = {}):
        self.directory = directory
        self._newest_started = 0
        self._metadata: dict[int, tuple[dict[str, Any], dict[str, int]]] = {}
        self._scores: dict[int, float] = {}
        self._unscored: set[int] = set()
        try:
            self._checkpointer = _checkpointer(directory, _NewestAndBest(max_to_keep, self._scores, self._unscored))
        except Exception as error:
            raise UserError(
                f"cannot read the checkpoints in {directory}: {_reason(error)}; if one is damaged, move it away"
            ) from None
        newest = self.latest or 0
        self._scores |= {step: score for step, score in scores.items() if step <= newest}
        # An old step is there because it was the best one.
        older = {checkpoint.step for checkpoint in self._checkpointer.checkpoints} - {newest}
        older -= set(sorted(older, reverse=True)[: max_to_keep - 1])
        if older and not older & self._scores.keys():
            self._unscored |= older
            processes.say(f"the log has no scores of steps {sorted(older)} in {directory}: they stay")

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step; it may still be being written."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def describe_newest(self) -> str:
        """The newest step, for the line of an error."""
        newest = self.latest
        return "no step is saved yet" if newest is None else f"the newest saved step is {newest}"

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score (0 to 1) of the best checkpoint that was evaluated."""
        step = _find_best([checkpoint.step for checkpoint in self._checkpointer.checkpoints], self._scores)
        return None if step is None else (step, self._scores[step])

    def is_evaluated(self, step: int) -> bool:
        """Whether a step has a score."""
        return step in self._scores

    def save(self, step: int, trees: Mapping[str, Any], metadata: dict[str, Any]) -> None:
        """Starts to write one step, if it has not; the arrays are copied before this returns, so they may be donated.

        `trees` are `model`, `optimizer` and `average`; empty ones are skipped. `metadata` is of values for JSON.
        """
        if step == self._newest_started:
            return
        self._newest_started = step
        trees = _non_empty(trees)
        with self._report_write_error():
            metadata = metadata | {"crc32": checksums(trees)}
            self._checkpointer.save_checkpointables_async(step, trees, force=True, custom_metadata=metadata)

    def add_score(self, step: int, score: float) -> None:
        """Notes the score of a saved step, 0 to 1; the step of the highest score stays."""
        self._scores[step] = score

    def read_metadata(self, step: int) -> dict[str, Any]:
        """The `config` and `meta` of a saved step."""
        with self._report_read_error(step):
            metadata, _ = self._read_step(step)
            if not metadata.get("config"):
                raise ValueError("its metadata holds no config")
        return {"meta": {}, **metadata}

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the trees of a step, with the structure, dtypes and shardings of the arrays in `like`."""

        described = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _non_empty(like)
        )
        with self._report_read_error(step):
            _, sums = self._read_step(step)
            loaded = self._checkpointer.load_checkpointables(step, described)
            check_sums(checksums(loaded), sums, "it")
            return {**like, **loaded}

    def _read_step(self, step: int) -> tuple[dict[str, Any], dict[str, int]]:
        """`_split_metadata` of a step, which is read once."""
        if step not in self._metadata:
            self._metadata[step] = _split_metadata(self._checkpointer.checkpointables_metadata(step), step)
        return self._metadata[step]

    def wait(self) -> None:
        """Waits until all that `save` started is written."""
        with self._report_write_error():
            self._checkpointer.wait()

    def wait_before_exit(self) -> None:
        """Waits at most `EXIT_SECONDS` for a write in flight: if another process is gone, the write never ends."""

        def finish() -> None:
            with contextlib.suppress(Exception):  # the process ends in any case
                self._checkpointer.wait()

        writing = threading.Thread(target=finish, daemon=True)
        writing.start()
        writing.join(EXIT_SECONDS)

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
            instead = "start again" if older is None else f"resume from step {older}"
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
            if jax.process_count() == 1:
                self._checkpointer.reload()  # Orbax forgets older steps when a write starts
            raise UserError(
                f"cannot write a checkpoint into {self.directory}: {reason}; {self.describe_newest()}; fix it and "
                "start the same command again"
            ) from None


@dataclasses.dataclass(frozen=True)
class _NewestAndBest:
    """Orbax's preservation policy of a run; it is asked before a step is deleted."""

    count: int
    scores: Mapping[int, float]
    unscored: Set[int]  # old steps that may be the best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Which checkpoints stay, from the oldest to the newest one."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.count :], _find_best(steps, self.scores), *self.unscored}
        return [step in kept for step in steps]


def _find_best(steps: Sequence[int], scores: Mapping[int, float]) -> int | None:
    """The step of the highest score, the newest one of several; None if no step has a score."""
    evaluated = [(scores[step], step) for step in steps if step in scores]
    return max(evaluated)[1] if evaluated else None


def _absolute(directory: str | os.PathLike[str]) -> files.Path:
    """Orbax refuses relative paths."""
    path = files.as_path(directory)
    return path if files.is_in_bucket(path) else path.absolute()


def _checkpointer(directory: files.Path, preservation_policy: Any | None = None) -> ocp.training.Checkpointer:
    """A reader of a folder; with a preservation policy a writer, which also removes what a crash left."""
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


read, write = read_model, save_model  # as the other formats call them


def file_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor as the folder has it: this package's."""
    return shape
