"""Trains a segmenter: from pictures to checkpoints, on whatever devices there are.

  python -m topformer_jax.train --config configs/topformer_b_ade.py --config.data.root=DIR

Everything goes into the work directory, runs/<config name> by default. The same command goes on where an
interrupted run stopped; Ctrl-C and SIGTERM save before they end it. On several machines, start the same
command on each: TPU pods and SLURM are recognised, elsewhere give --coordinator, --processes, --process-id.
"""

import contextlib
import json
import math
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from topformer_jax import checkpoint as checkpoint_lib
from topformer_jax import cli, files, logs, metrics, models, pictures, sharding
from topformer_jax.data import loader, sources
from topformer_jax.errors import UserError
from topformer_jax.evaluate import ExampleResult, evaluate
from topformer_jax.step import TrainState, create

PICTURES = 6  # rows of the picture grid


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains until `schedule.steps`, from where the work directory's newest checkpoint stands.

    Raises:
        UserError: the data, the devices, the work directory or a checkpoint do not fit the config; the loss
            became NaN.
    """
    # ---- data
    data_set = sources.data_set(config)
    train_source = sources.open_source(config, "train")
    validation_source = sources.open_source(config, "validation")

    # ---- state
    mesh = sharding.make_mesh(config)
    first = jax.process_index() == 0
    model = models.build_segmenter(config)
    if config.init_from:
        from topformer_jax import convert

        tensors, _ = convert.read(config.init_from, model, config, config.init_part)
        checkpoint_lib.load_state_dict(model, tensors)
        if first:
            print(convert.origin_table(model, config.init_part, config.init_from))
    state, train_step = create(config, mesh, model)
    for folder in ("checkpoints", "pictures", "tensorboard"):
        files.make_folder(workdir / folder, "another --workdir")
    checkpoints = checkpoint_lib.Checkpoints(workdir / "checkpoints", config.max_to_keep)
    start = checkpoints.latest or 0
    if start:
        state = _restored(checkpoints, start, state, config)
    if first:
        files.write(workdir / "config.json", config.to_json(indent=2))

    # ---- banner
    steps = config.schedule.steps
    if first:
        device = jax.devices()[0]
        epochs = steps * config.batch_size / len(train_source)
        logs.banner(
            {
                "config": f"{config.name}, TopFormer {config.model.variant}, {config.model.num_classes} classes, "
                f"{sum(x.size for x in state.params.values()):,} parameters, {config.model.dtype}",
                "data": f"{config.data.dataset} ({config.data.source}), {len(train_source)} training and "
                f"{len(validation_source)} validation examples",
                "steps": f"{steps} of {config.batch_size} images, {epochs:.1f} epochs, crops {config.data.crop_size}",
                "devices": f"{jax.device_count()} x {device.device_kind} in {jax.process_count()} processes, mesh "
                + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
                "writing to": workdir,
                "starting": f"from checkpoint {start}"
                if start
                else f"from {config.init_from or 'fresh weights'}",
            }
        )
    log = logs.RunLog(workdir, start, steps, active=first)
    stop = _Stop()
    batches = loader.to_device(
        loader.training_batches(
            train_source,
            config,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        sharding.batch_sharding(mesh),
    )

    def scored(step: int) -> float | None:
        """The mIoU of the state as it is; None if a signal cut the evaluation short."""
        return _evaluate(
            config, model, mesh, state, validation_source, data_set.palette, workdir, step, log, stop
        )

    @contextlib.contextmanager
    def kept(step: int) -> Iterator[None]:
        """Saves the state of a step if what comes after it fails, so that nothing need be computed again."""
        try:
            yield
        except UserError as error:
            if step == 0 or jax.process_count() > 1:  # the other processes don't know of it
                raise
            _refuse_nan(jax.device_get(recent), step, checkpoints)
            checkpoints.wait()
            if step != checkpoints.latest:
                _save(checkpoints, step, state, config, None)
                checkpoints.wait()
            line = f"{error.line}; step {step} is saved: the same command goes on from there"
            raise UserError(line, error.details) from None

    def end_if(stopping: int, step: int) -> None:
        if stopping:
            checkpoints.wait()
            log.say(f"stopped at step {step} and saved; the same command goes on from here")
            raise SystemExit(128 + stopping)

    # ---- the loop
    # What steps told, still on the device: fetched together when there is something to say.
    recent: list[Mapping[str, jax.Array]] = []
    told: set[int] = set()  # the unreadable examples that were named
    began, waited = time.perf_counter(), 0.0
    try:
        if start and _evaluating(start, config) and not checkpoints.scored(start):
            # A signal came before this step was evaluated.
            with kept(start):
                miou = scored(start)
            if miou is not None:
                _save(checkpoints, start, state, config, miou)
            end_if(stop.agreed(), start)
        for step in range(start + 1, steps + 1):
            with kept(step - 1):
                batch = next(batches)
            state, values = train_step(state, batch)
            recent.append(values)
            evaluating = _evaluating(step, config)
            looking = evaluating or step % config.log_every == 0 or step % config.checkpoint_every == 0
            if not (looking or stop.asked_here()):
                continue

            fetched = jax.device_get(recent)
            recent = []
            _refuse_nan(fetched, step, checkpoints)
            elapsed, now_waited = time.perf_counter() - began, batches.data_wait_seconds
            means = {key: float(np.mean([values[key] for values in fetched])) for key in fetched[0]}
            means |= {
                "learning_rate": float(fetched[-1]["learning_rate"]),
                "images_per_second": len(fetched) * config.batch_size / elapsed,
                "data_wait": min((now_waited - waited) / elapsed, 1.0),
            }
            log.train(step, means | {"skipped": batches.skipped})
            for index in sorted(batches.unreadable - told) if first else ():
                log.say(f"skipped: {loader.explain_unreadable(train_source, index, config)}")
            told = batches.unreadable

            stopping = stop.agreed()
            miou = None
            if evaluating and not stopping:
                with kept(step):
                    miou = scored(step)
                stopping = stop.agreed()
            if evaluating or stopping or step % config.checkpoint_every == 0:
                _save(checkpoints, step, state, config, miou)
            end_if(stopping, step)
            began, waited = time.perf_counter(), batches.data_wait_seconds
    finally:
        batches.close()
        log.close()
        try:
            checkpoints.close()
        finally:
            stop.restore()

    # ---- the end
    if first:
        logs.save_curves(logs.read_records(workdir / "metrics.jsonl"), workdir / "curves.png")
        best = checkpoints.best()
        print(f"done: curves in {workdir / 'curves.png'}, pictures in {workdir / 'pictures'}")
        if best:
            print(f"best: mIoU {best[1]:.4f} at step {best[0]}, {workdir / 'checkpoints' / str(best[0])}")


def _evaluating(step: int, config: ConfigDict) -> bool:
    return step == config.schedule.steps or step % config.evaluate_every == 0


def _restored(
    checkpoints: checkpoint_lib.Checkpoints, step: int, state: TrainState, config: ConfigDict
) -> TrainState:
    """The state of a checkpoint, laid out as the given one."""
    stored = checkpoints.config(step)
    if stored.get("model") != json.loads(config.to_json())["model"]:
        raise UserError(
            f"{checkpoints.directory} holds a run of another model; name another --workdir, or remove this one"
        )
    if config.ema_decay and not stored.get("ema_decay"):
        raise UserError(
            f"{checkpoints.directory} holds a run without averages; set --config.ema_decay=0 or another --workdir"
        )
    trees = checkpoints.restore(step, _trees(state))
    model, average = trees["model"], trees["average"]
    return TrainState(
        jax.device_put(np.int32(step), state.step.sharding),
        {name: model[name] for name in state.params},
        {name: model[name] for name in state.stats},
        trees["optimizer"],
        average,
    )


def _trees(state: TrainState) -> dict[str, Any]:
    """A state as a checkpoint's parts."""
    return {"model": state.params | state.stats, "optimizer": state.optimizer, "average": state.average}


def _save(
    checkpoints: checkpoint_lib.Checkpoints,
    step: int,
    state: TrainState,
    config: ConfigDict,
    miou: float | None,
) -> None:
    metadata = {"config": json.loads(config.to_json()), "meta": {"epoch": 0, "iter": step}}
    checkpoints.save(step, _trees(state), metadata, miou)


def _refuse_nan(fetched: list[Mapping[str, Any]], step: int, checkpoints: checkpoint_lib.Checkpoints) -> None:
    """Raises a UserError for a loss that is no number, and for a gradient that makes the next one none."""
    for at, values in enumerate(fetched, step - len(fetched) + 1):
        bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
        if bad:
            newest = checkpoints.latest
            kept = f"the last good checkpoint is of step {newest}" if newest else "no checkpoint is saved yet"
            raise UserError(
                f"the {bad[0].replace('_', ' ')} is {float(values[bad[0]])} at step {at}; {kept}; lower "
                "schedule.lr, or set optimizer.clip_norm"
            )


def _evaluate(
    config: ConfigDict,
    model: models.Segmenter,
    mesh: Mesh,
    state: TrainState,
    source: sources.Source,
    palette: tuple[tuple[int, int, int], ...],
    workdir: pathlib.Path,
    step: int,
    log: logs.RunLog,
    stop: "_Stop",
) -> float | None:
    """Scores the validation split, writes the picture grid, and returns the mIoU; None if a signal came."""
    tensors = sharding.to_host(state.average or state.params | state.stats)
    rows: list[list[np.ndarray]] = []

    def keep(seen: ExampleResult) -> None:
        if len(rows) < PICTURES and log.active:
            rows.append(
                [seen.image, *(pictures.colorize(x, palette) for x in (seen.label, seen.prediction()))]
            )

    def go_on(*_: object) -> None:
        if stop.asked_here():
            raise _CutShort

    try:
        result = evaluate(model, source, config, mesh, tensors=tensors, each=keep, progress=go_on)
    except _CutShort:
        return None
    if rows:
        grid = pictures.grid(rows, titles=("image", "label", "prediction"))
        pictures.write(workdir / "pictures" / f"{step:07}.png", grid)
    scores = metrics.scores(result.confusion)
    log.evaluation(step, {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc})
    return scores.miou


class _CutShort(Exception):
    """A signal came during an evaluation."""


class _Stop:
    """Remembers that SIGTERM or SIGINT asked the run to end; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def asked_here(self) -> bool:
        """Whether to stop at this step already: of several processes none may go ahead of the others."""
        return bool(self._signal) and jax.process_count() == 1

    def agreed(self) -> int:
        """The signal that any process was sent, or 0. Every process must call it at the same step."""
        if jax.process_count() == 1:
            return self._signal
        return int(np.max(multihost_utils.process_allgather(np.int32(self._signal))))

    def restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._old.items():
            signal.signal(number, handler)


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="default: runs/<config name>")
    sharding.add_process_flags(parser)
    args, config = parser.parse()
    assert config is not None  # --config is required
    sharding.start_processes(args.coordinator, args.processes, args.process_id)
    train(config, args.workdir or pathlib.Path("runs") / config.name)


if __name__ == "__main__":
    cli.run(main)
