"""The parts of a training run, and what its loop calls: restore, monitor, profile, evaluate, save, stop."""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from topformer_jax import checkpoints, config as config_lib, models
from topformer_jax.data import class_balance, loader, sources
from topformer_jax.data.batch import Batch
from topformer_jax.data.catalog import DataSet
from topformer_jax.inference.evaluation import (
    ExampleResult,
    evaluate_classifier,
    evaluate_split,
    score_split,
)
from topformer_jax.inference.metrics import compute_scores
from topformer_jax.runtime import errors, files, logs, processes, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training.run_folder import RunFolder
from topformer_jax.training.shutdown import GracefulShutdown
from topformer_jax.training.step import STATISTICS, TrainState, frozen_names
from topformer_jax.visualize import drawing

SCORES = {"segmentation": "miou", "classification": "top1"}  # by which the best checkpoint is chosen
GRID_ROWS = 6  # validation images in the grid that each evaluation writes
STEPS_IN_FLIGHT = 2  # handed to the devices before the host waits for the first of them
POLL_SECONDS = 0.01  # between looks at the devices while the next batch is not there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The parts that stay the same during a run."""

    config: ConfigDict
    folder: RunFolder
    mesh: Mesh
    model: models.Segmenter | models.Classifier
    data_set: DataSet
    train_source: sources.Source
    class_draws: class_balance.ClassDraws | None
    validation_source: sources.Source
    store: checkpoints.CheckpointStore
    log: logs.RunLog
    shutdown: GracefulShutdown


def load_initial_model(config: ConfigDict) -> models.Segmenter | models.Classifier:
    """The network with its initial weights: random ones, or those of `config.init_from`."""
    model = checkpoints.load_model(config, config.init_from or None, part=config.init_part)
    if config.init_from:
        processes.say(checkpoints.describe_origin(model, config.init_part, config.init_from))
    return model


def refuse_untrained(config: ConfigDict, names: Collection[str]) -> None:
    """Raises a UserError if a new run would keep tensors, of a model's names, as they were drawn."""
    fresh = checkpoints.fresh_names(names, config.init_part) if config.init_from else set(names)
    if frozen := frozen_names(config, fresh):
        bn_frozen = config_lib.as_typed(config.model.bn_frozen)
        raise UserError(
            f"optimizer.freeze={config.optimizer.freeze}, model.bn_frozen={bn_frozen}: {len(frozen)} tensors would "
            f"stay untrained, {min(frozen)} for one; set init_from to weights that have them (init_part is "
            f"{config.init_part})"
        )


def load_teacher(config: ConfigDict) -> models.Segmenter | None:
    """The network to distil from, with the dtypes of this run; None without distillation."""
    if not config.distillation.config:
        return None
    same = {f"model.{key}": config.model[key] for key in ("dtype", "precision", "conv_impl")}
    teacher = config_lib.load(config.distillation.config, same)
    if teacher.model.num_classes != config.model.num_classes:
        raise UserError(
            f"the teacher {config.distillation.config} has {teacher.model.num_classes} classes, this run "
            f"{config.model.num_classes}: distillation needs the same ones"
        )
    return checkpoints.load_segmenter(teacher, config.distillation.checkpoint)


def find_class_draws(
    config: ConfigDict, data_set: DataSet, pixels: Int[np.ndarray, "labels classes"] | None
) -> class_balance.ClassDraws | None:
    """The training examples that hold each class, if some are drawn for a class; prints what was counted.

    Raises:
        UserError: no label holds a class.
    """
    if not loader.needs_class_draws(config):
        return None
    assert pixels is not None
    draws = class_balance.group_by_class(pixels)
    counts = [len(indices) for indices in draws.holders]
    rarest = data_set.classes[draws.classes[int(np.argmin(counts))]]
    processes.say(
        f"examples are drawn for the {len(counts)} of {len(data_set.classes)} classes that occur in {len(pixels):,} "
        f"training labels; {rarest} occurs in the fewest labels, {min(counts):,}"
    )
    return draws


def open_store(config: ConfigDict, folder: RunFolder) -> checkpoints.CheckpointStore:
    """The checkpoints of a run; its log may hold scores that the file of scores lacks."""

    def read_log() -> dict[int, float]:
        name, records = SCORES[config.task], logs.read_records(folder.path / "metrics.jsonl")
        return {record["step"]: record[name] for record in records if isinstance(record.get(name), float)}

    return checkpoints.CheckpointStore(folder.path / "checkpoints", config.max_to_keep, read_log)


def check_changes(
    store: checkpoints.CheckpointStore, step: int, config: ConfigDict, data_set: DataSet
) -> tuple[DataSet, list[str]]:
    """Compares a checkpoint with the config and the data of this start.

    Returns:
        The data set with the checkpoint's names and colours of the classes, and a line for each difference.

    Raises:
        UserError: the run cannot go on with such a change.
    """
    metadata = store.read_metadata(step)
    source = store.directory / str(step)
    changes = config_lib.compare_configs(metadata["config"], config, source)
    own = checkpoints.read_names(metadata, config, source)
    if own is None:
        return data_set, changes
    if config.task == "classification":
        sources.check_class_folders(config, own.classes)
    line = sources.compare_classes(config, own.classes)
    data_set = dataclasses.replace(data_set, classes=own.classes, palette=own.palette)
    return data_set, changes + ([line] if line else [])


def restore_state(store: checkpoints.CheckpointStore, step: int, state: TrainState) -> TrainState:
    """The state of a checkpoint, laid out on the devices as the given one."""
    trees = store.restore(step, _to_trees(state))
    return TrainState(
        jax.device_put(np.int32(step), state.step.sharding),
        {name: trees["model"][name] for name in state.params},
        {name: trees["model"][name] for name in state.stats},
        trees["optimizer"],
        trees["average"],
    )


def _to_trees(state: TrainState) -> dict[str, Any]:
    """A state as the parts of a checkpoint."""
    return {"model": state.params | state.stats, "optimizer": state.optimizer, "average": state.average}


def record_start(config: ConfigDict, folder: RunFolder, start: int, changes: Sequence[str]) -> None:
    """Prints what changed since the last start, stores the settings of this one, and fetches an earlier log."""
    for change in changes:
        print(f"changed since step {start}: {change}")
    text = config.to_json(indent=2)
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for name in ("config.json", f"configs/{start:07}-{moment}.json"):
        files.write_file(folder.local / name, text)
    folder.fetch("metrics.jsonl")


def print_banner(
    config: ConfigDict,
    folder: RunFolder,
    mesh: Mesh,
    state: TrainState,
    splits: tuple[sources.Source, sources.Source],
) -> None:
    """Prints the facts of the run, one per line."""
    steps, start = config.schedule.steps, int(state.step)
    epochs = steps * config.batch_size / len(splits[0])
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    device, distillation = jax.devices()[0].device_kind, config.distillation
    tensors = state.params | state.stats
    frozen = frozen_names(config, tensors)
    sizes = {name: x.size for name, x in tensors.items() if not name.endswith(STATISTICS)}
    total, still = sum(sizes.values()), sum(size for name, size in sizes.items() if name in frozen)
    norms = sum(name.endswith(STATISTICS[0]) for name in frozen)
    rows = {
        "config": f"{config.name}, TopFormer {config.model.variant}, {config.model.num_classes} classes, "
        f"{total:,} parameters, {config.model.dtype}",
        "data": f"{config.data.dataset} ({config.data.source}), {len(splits[0])} training and {len(splits[1])} "
        "validation examples",
        "length": f"{epochs:.1f} epochs of {len(splits[0])} pictures = {steps} steps of {config.batch_size} images, "
        f"crops {config.data.crop_size}",
        "devices": f"{jax.device_count()} x {device} in {jax.process_count()} processes, mesh {axes}",
        "writing to": folder.path,
        "starting": f"from checkpoint {start}" if start else f"from {config.init_from or 'random weights'}",
        "frozen": frozen and f"{still:,} of {total:,} parameters, statistics of {norms} BatchNorms",
        "teacher": distillation.config and f"{distillation.config}, {distillation.checkpoint}",
    }
    for name, value in rows.items():
        if value:
            print(f"{name:<10}  {value}", flush=True)


def open_batches(run: Run, start: int) -> loader.DeviceBatches:
    """The batches after a step, on the devices."""
    batches = loader.training_batches(
        run.train_source,
        run.config,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        processes_on_host=processes.count_equal(loader.name_shared_memory()),
        class_draws=run.class_draws,
    )
    return loader.DeviceBatches(batches, sharding.batch_sharding(run.mesh))


def limit_steps_in_flight(metrics: Sequence[Mapping[str, jax.Array]]) -> None:
    """Waits until at most `STEPS_IN_FLIGHT` steps are left to compute, so that a signal is answered soon."""
    if len(metrics) > STEPS_IN_FLIGHT:
        metrics[-1 - STEPS_IN_FLIGHT]["loss"].block_until_ready()


def wait_for_batch(batches: loader.DeviceBatches, metrics: Sequence[Mapping[str, Any]]) -> float:
    """Waits for the next batch; returns the seconds in which the devices had nothing to compute."""
    idle_since = None
    while not batches.wait(POLL_SECONDS):
        if idle_since is None and (not metrics or metrics[-1]["loss"].is_ready()):
            idle_since = time.perf_counter()
    return 0.0 if idle_since is None else time.perf_counter() - idle_since


class Monitor:
    """Keeps the metrics of each step on the device, and logs their means on log steps."""

    def __init__(self, run: Run, batches: loader.DeviceBatches):
        self._run = run
        self._batches = batches
        self._pending: list[Mapping[str, Any]] = []  # per-step metrics not yet fetched to host
        self._first_loss: Any = None  # an array; mypy does not know its is_ready()
        self._reported_unreadable: set[int] = set()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts the clock for the rates of the next log line."""
        self._start, self._data_wait_seconds = time.perf_counter(), 0.0

    def next_batch(self) -> Batch:
        """The next batch; counts the time in which the devices wait for it."""
        self._data_wait_seconds += wait_for_batch(self._batches, self._pending)
        return next(self._batches)

    def add(self, step_metrics: Mapping[str, jax.Array]) -> None:
        """Adds the metrics of a step, and waits for the step `STEPS_IN_FLIGHT` before it."""
        self._pending.append(step_metrics)
        if self._first_loss is None:
            self._first_loss = step_metrics["loss"]
        limit_steps_in_flight(self._pending)

    def has_computed(self) -> bool:
        """Whether this process has computed a step."""
        return self._first_loss is not None and self._first_loss.is_ready()

    def fetch(self, step: int) -> list[Mapping[str, Any]]:
        """The new metrics of the steps up to `step`; a UserError if one is not finite."""
        fetched, self._pending = jax.device_get(self._pending), []
        for at, values in enumerate(fetched, step - len(fetched) + 1):
            bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
            if bad:
                name, value = bad[0].replace("_", " "), float(values[bad[0]])
                raise UserError(
                    f"the {name} is {value} at step {at}: lower schedule.lr, or set optimizer.clip_norm; "
                    f"{self._run.store.describe_newest()}"
                )
        return fetched

    def log(self, step: int) -> None:
        """Logs the means since the last call, the rates, and the unreadable examples."""
        run, batches = self._run, self._batches
        fetched = self.fetch(step)
        elapsed = time.perf_counter() - self._start
        means = {key: float(np.mean([values[key] for values in fetched])) for key in fetched[0]}
        means |= {
            "learning_rate": float(fetched[-1]["learning_rate"]),
            "images_per_second": len(fetched) * run.config.batch_size / elapsed,
            "data_wait": min(self._data_wait_seconds / elapsed, 1.0),
        }
        run.log.log_step(step, means | {"skipped": batches.skipped})
        if run.log.active:
            for index in sorted(batches.unreadable - self._reported_unreadable):
                reason = loader.explain_unreadable(run.train_source, index, run.config)
                run.log.print_line(f"skipped: {reason}")
        self._reported_unreadable = batches.unreadable


def parse_steps(text: str | None) -> range:
    """The steps of `--profile FIRST:LAST`, both included; none for None.

    >>> parse_steps("3:5")
    range(3, 6)

    Raises:
        UserError: the text has another form, or the first step is not from 1 to the last one.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile is {text!r}: expected FIRST:LAST, two steps from 1 on, for example 20:24")
    return range(int(match[1]), int(match[2]) + 1)


class StepProfiler:
    """A `jax.profiler` trace of some steps, for TensorBoard's profile plugin or Perfetto.

    Call `before` and `after` around every step, and `close` at the end.

    Args:
        steps: to trace.
        folder: a local one.
        name: of the folder, as the user knows it.
    """

    def __init__(self, steps: range, folder: pathlib.Path, name: object):
        self._steps = steps
        self._name = name
        self._folder = folder
        self._is_tracing = False

    def before(self, step: int) -> None:
        """Starts the trace before the first chosen step, or a later one if a run resumes among them."""
        if step in self._steps and not self._is_tracing:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace after the last chosen step, once the devices have computed its outputs."""
        if self._is_tracing and step == self._steps[-1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends the trace if one is running."""
        if self._is_tracing:
            self._is_tracing = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:
                raise UserError(f"cannot write the profile into {self._folder}: {error}") from None
            if jax.process_index() == 0:
                print(f"wrote the profile into {self._name}")


def is_log_step(config: ConfigDict, step: int) -> bool:
    """Whether the host waits for the devices and logs after this step; it does before it saves or evaluates."""
    return step % config.log_every == 0 or is_checkpoint_step(config, step)


def is_checkpoint_step(config: ConfigDict, step: int) -> bool:
    """Whether the run saves the state after this step; it does before it evaluates."""
    return step % config.checkpoint_every == 0 or is_evaluation_step(config, step)


def is_evaluation_step(config: ConfigDict, step: int) -> bool:
    """Whether the run scores the validation split after this step."""
    return step == config.schedule.steps or step % config.evaluate_every == 0


def save_checkpoint(run: Run, state: TrainState, step: int) -> None:
    """Starts to save a checkpoint in the background, unless the step is saved already."""
    # mmcv expects an epoch; a run here counts steps only.
    meta = {"epoch": 0, "iter": step, "CLASSES": run.data_set.classes, "PALETTE": run.data_set.palette}
    run.folder.upload()  # the log of what a resumed run will not do again
    run.store.save(step, _to_trees(state), {"config": json.loads(run.config.to_json()), "meta": meta})


@contextlib.contextmanager
def save_on_error(run: Run, state: TrainState, step: int, monitor: Monitor) -> Iterator[None]:
    """Saves the state of a step if its body fails with a UserError, so that no step is computed twice."""
    try:
        yield
    except UserError as error:
        if step == 0 or jax.process_count() > 1:  # the other processes do not know of the error
            raise
        monitor.fetch(step)  # a state whose loss is not finite must not be saved
        run.store.wait()
        if step != run.store.latest:
            save_checkpoint(run, state, step)
            run.store.wait()
        line = f"{error.line}; step {step} is saved: the same command resumes from there"
        raise UserError(line, error.details) from None


def evaluate_and_log(run: Run, state: TrainState, step: int) -> None:
    """Scores the validation split with a saved state and stores the scores, unless a signal comes."""

    def stop_if_requested(*_: object) -> None:
        if run.shutdown.check():
            raise _EvaluationStopped

    evaluate = _score_classifier if run.config.task == "classification" else _score_segmenter
    # Sizes and flags go to the devices with each batch.
    with jax.transfer_guard("allow"), errors.report_out_of_memory("evaluate"):
        tensors = sharding.to_host(state.average or state.params | state.stats)
        try:
            scores = evaluate(run, tensors, step, stop_if_requested)
        except _EvaluationStopped:
            return
    run.log.log_evaluation(step, scores)
    # The file has a score only when the log has it.
    run.store.add_score(step, scores[SCORES[run.config.task]], to_file=run.folder.upload())


def _score_segmenter(
    run: Run, tensors: Mapping[str, Any], step: int, on_progress: Callable[..., None]
) -> dict[str, float]:
    """The scores of a segmenter; writes a grid of predictions."""
    palette = run.data_set.palette
    rows: list[list[np.ndarray]] = []

    def add_to_grid(example: ExampleResult) -> None:
        if len(rows) < GRID_ROWS and run.log.active:
            labels = example.label, example.prediction()
            rows.append([example.image, *(drawing.colorize(each, palette) for each in labels)])

    assert isinstance(run.model, models.Segmenter)
    hooks: Any = {"on_example": add_to_grid, "on_progress": on_progress}
    result = evaluate_split(run.model, run.validation_source, run.mesh, tensors=tensors, **hooks)
    if rows:
        grid = drawing.image_grid(rows, titles=("image", "label", "prediction"))
        drawing.write_image(run.folder.local / "predictions" / f"{step:07}.png", grid)
    scores = score_split(result, run.config, "validation")
    found = {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc}
    if result.boundary is not None:
        found["boundary_miou"] = compute_scores(result.boundary).miou
    return found


def _score_classifier(
    run: Run, tensors: Mapping[str, Any], _: int, on_progress: Callable[..., None]
) -> dict[str, float]:
    assert isinstance(run.model, models.Classifier)
    result = evaluate_classifier(
        run.model, run.validation_source, run.mesh, tensors=tensors, on_progress=on_progress
    )
    return {"top1": result.top(1), "top5": result.top(5)}


class _EvaluationStopped(Exception):
    """A signal came during an evaluation."""


def evaluate_if_missing(run: Run, state: TrainState, step: int) -> None:
    """Evaluates the resumed step, if a signal interrupted its evaluation."""
    if step and is_evaluation_step(run.config, step) and not run.store.is_evaluated(step):
        evaluate_and_log(run, state, step)
        exit_if_stopped(run, step)


def exit_if_stopped(run: Run, step: int) -> None:
    """Ends the process with 128 + the signal's number if there was one, after the saved step is written."""
    if run.shutdown.signal:
        run.store.wait()
        run.log.print_line(f"stopped at step {step} and saved; the same command resumes from here")
        raise SystemExit(128 + run.shutdown.signal)


def print_results(run: Run) -> None:
    """Draws the curves, and prints where the results are."""
    workdir, local = run.folder.path, run.folder.local
    logs.save_curves(logs.read_records(local / "metrics.jsonl"), local / "curves.png")
    grids = f", predictions in {workdir / 'predictions'}" if run.config.task == "segmentation" else ""
    print(f"done: curves in {workdir / 'curves.png'}{grids}")
    best = run.store.best
    if best:
        name = "mIoU" if run.config.task == "segmentation" else "top-1"
        print(f"best: {name} {best[1]:.4f} at step {best[0]}, {workdir / 'checkpoints' / str(best[0])}")
