"""The parts of a training run, and what its loop calls: restore, monitor, profile, evaluate, save, stop."""

import contextlib
import dataclasses
import json
import math
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
from topformer_jax.data.batch import Batch, Labels
from topformer_jax.data.catalog import DataSet
from topformer_jax.inference.evaluation import LoadedExample, evaluate_classifier, evaluate_split, score_split
from topformer_jax.runtime import errors, files, logs, processes, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training.run_folder import RunFolder
from topformer_jax.training.shutdown import GracefulShutdown
from topformer_jax.training.step import STATISTICS, TrainState, frozen_names
from topformer_jax.visualize import drawing

SCORES = {"segmentation": "miou", "classification": "top1"}  # by which the best checkpoint is chosen
GRID_ROWS = 6  # validation images in the grid that each evaluation writes
STEPS_IN_FLIGHT = 2  # handed to the devices before the host waits for the first of them
POLL_SECONDS = 0.01  # between checks of the devices while the loop waits for a batch


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
    """Raises a UserError if a new run would freeze tensors, of a model's names, that have random weights."""
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
    """The training examples that hold each class, if some are drawn for one; a UserError if no label holds one."""
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


def open_store(
    config: ConfigDict, folder: RunFolder, records: Sequence[Mapping[str, Any]]
) -> checkpoints.CheckpointStore:
    """The checkpoints of a run, with their scores from the records of its log."""
    name = SCORES[config.task]
    scores = {record["step"]: record[name] for record in records if isinstance(record.get(name), float)}
    return checkpoints.CheckpointStore(folder.path / "checkpoints", config.max_to_keep, scores)


def check_changes(
    store: checkpoints.CheckpointStore, step: int, config: ConfigDict, data_set: DataSet
) -> tuple[DataSet, list[str]]:
    """Compares a checkpoint with the config and the data of this start; a UserError if the run cannot go on.

    Returns the data set with the checkpoint's names and colours of the classes, and a line for each difference.
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


def record_start(config: ConfigDict, folder: RunFolder, start: int) -> None:
    """Stores the settings of this start."""
    text = config.to_json(indent=2)
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for name in ("config.json", f"configs/{start:07}-{moment}.json"):
        files.write_file(folder.local / name, text)


def print_banner(run: Run, state: TrainState, changes: Sequence[str]) -> None:
    """Prints the facts of the run, one per line, and what changed since the last start."""
    config, pictures = run.config, len(run.train_source)
    steps, start = config.schedule.steps, int(state.step)
    axes = " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    device, distillation = jax.devices()[0].device_kind, config.distillation
    tensors = state.params | state.stats
    frozen = frozen_names(config, tensors)
    sizes = {name: x.size for name, x in tensors.items() if not name.endswith(STATISTICS)}
    total, still = sum(sizes.values()), sum(size for name, size in sizes.items() if name in frozen)
    norms = sum(name.endswith(STATISTICS[0]) for name in frozen)
    rows = {
        "config": f"{config.name}, TopFormer {config.model.variant}, {config.model.num_classes} classes, "
        f"{total:,} parameters, {config.model.dtype}",
        "data": f"{config.data.dataset} ({config.data.source}), {pictures} training and "
        f"{len(run.validation_source)} validation examples",
        "length": f"{steps * config.batch_size / pictures:.1f} epochs of {pictures} pictures = {steps} steps of "
        f"{config.batch_size} images, crops {config.data.crop_size}",
        "devices": f"{jax.device_count()} x {device} in {jax.process_count()} processes, mesh {axes}",
        "writing to": run.folder.path,
        "starting": f"from checkpoint {start}" if start else f"from {config.init_from or 'random weights'}",
        "frozen": frozen and f"{still:,} of {total:,} parameters, statistics of {norms} BatchNorms",
        "teacher": distillation.config and f"{distillation.config}, {distillation.checkpoint}",
    }
    lines = [f"{name:<10}  {value}" for name, value in rows.items() if value]
    lines += [f"changed since step {start}: {change}" for change in changes]
    run.log.print_line("\n".join(lines))


def open_batches(run: Run, start: int) -> loader.DeviceBatches:
    """The batches after a step, on the devices."""
    places: Any = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    places["processes_on_host"] = processes.count_equal(loader.name_shared_memory())
    batches = loader.training_batches(
        run.train_source, run.config, start_step=start, class_draws=run.class_draws, **places
    )
    return loader.DeviceBatches(batches, sharding.batch_sharding(run.mesh))


class Monitor:
    """Keeps the metrics of each step on the device, and logs their means on log steps.

    Attributes:
        data_wait_seconds: the time in which the devices waited for a batch, since the last log line.
    """

    def __init__(self, run: Run, batches: loader.DeviceBatches):
        self._run = run
        self._batches = batches
        self._pending: list[Mapping[str, Any]] = []  # per-step metrics not yet fetched to host
        self._first_loss: Any = None  # an array; mypy does not know its is_ready()
        self._reported_unreadable: set[int] = set()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts the time of the next log line."""
        self._start, self.data_wait_seconds = time.perf_counter(), 0.0

    def next_batch(self) -> Batch:
        """The next batch; counts the time in which the devices have nothing to compute."""
        idle_since = None
        while not self._batches.wait(POLL_SECONDS):
            if idle_since is None and (not self._pending or self._pending[-1]["loss"].is_ready()):
                idle_since = time.perf_counter()
        self.data_wait_seconds += 0.0 if idle_since is None else time.perf_counter() - idle_since
        return next(self._batches)

    def add(self, step_metrics: Mapping[str, jax.Array]) -> None:
        """Adds the metrics of a step; waits until few are left to compute, so that a signal is answered soon."""
        self._pending.append(step_metrics)
        if self._first_loss is None:
            self._first_loss = step_metrics["loss"]
        if len(self._pending) > STEPS_IN_FLIGHT:
            self._pending[-1 - STEPS_IN_FLIGHT]["loss"].block_until_ready()

    def has_computed(self) -> bool:
        """Whether this process has computed a step."""
        return self._first_loss is not None and self._first_loss.is_ready()

    def fetch(self, step: int) -> list[Mapping[str, Any]]:
        """The new metrics of the steps up to `step`; a UserError if one is not finite."""
        fetched, self._pending = jax.device_get(self._pending), []
        for at, values in enumerate(fetched, step - len(fetched) + 1):
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(value := float(values[name])):
                    advice = f"lower schedule.lr, or set optimizer.clip_norm; {self._run.store.describe_newest()}"
                    raise UserError(f"the {name.replace('_', ' ')} is {value} at step {at}: {advice}")
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
            "data_wait": min(self.data_wait_seconds / elapsed, 1.0),
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
    """A `jax.profiler` trace of some steps in a run's folder: call it around every step, and `close` at the end."""

    def __init__(self, steps: range, folder: RunFolder):
        self._steps, self._folder = steps, folder
        self._is_tracing = False

    def before(self, step: int) -> None:
        """Starts the trace before the first chosen step, or a later one if a run resumes among them."""
        if step in self._steps and not self._is_tracing:
            jax.profiler.start_trace(str(self._folder.local / "profile"))
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
                raise UserError(f"cannot write the profile into {self._folder.local}: {error}") from None
            processes.say(f"wrote the profile into {self._folder.path / 'profile'}")


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
    """Saves the state of a step if the `with` block raises a UserError, so that no step is computed twice."""
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
    run.folder.upload()
    run.store.add_score(step, scores[SCORES[run.config.task]])


def _score_segmenter(
    run: Run, tensors: Mapping[str, Any], step: int, on_progress: Callable[..., None]
) -> dict[str, float]:
    """The scores of a segmenter; writes a grid of predictions."""
    palette = run.data_set.palette
    rows: list[list[np.ndarray]] = []

    def add_to_grid(example: LoadedExample, predict: Callable[[], Labels]) -> None:
        if len(rows) < GRID_ROWS and run.log.active:
            labels = example.label, predict()
            rows.append([example.image, *(drawing.colorize(each, palette) for each in labels)])

    assert isinstance(run.model, models.Segmenter)
    hooks: Any = {"on_example": add_to_grid, "on_progress": on_progress}
    result = evaluate_split(run.model, run.validation_source, run.mesh, tensors=tensors, **hooks)
    if rows:
        grid = drawing.image_grid(rows, titles=("image", "label", "prediction"))
        drawing.write_image(run.folder.local / "predictions" / f"{step:07}.png", grid)
    scores, boundary = score_split(result, run.config, "validation")
    found = {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc}
    return found | ({} if boundary is None else {"boundary_miou": boundary.miou})


def _score_classifier(
    run: Run, tensors: Mapping[str, Any], _: int, on_progress: Callable[..., None]
) -> dict[str, float]:
    assert isinstance(run.model, models.Classifier)
    options: Any = {"tensors": tensors, "on_progress": on_progress}
    result = evaluate_classifier(run.model, run.validation_source, run.mesh, **options)
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
