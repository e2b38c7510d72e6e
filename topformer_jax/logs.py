"""What a run tells: a banner, a progress bar or plain lines, JSON lines, TensorBoard, curves, pictures."""

import contextlib
import io
import json
import logging
import math
import pathlib
import socket
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from topformer_jax import files
from topformer_jax.errors import UserError

PLAIN_SECONDS = 10  # between lines where there is no terminal


def banner(rows: Mapping[str, object]) -> None:
    """Prints what a run is about to do, a line a fact."""
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()), flush=True)


def silence_orbax_threads() -> None:
    """Keeps what Orbax's threads print out of a command's output, which is one line for an error.

    When a checkpoint is damaged or the disk is full, each of Orbax's threads logs a traceback of its own (absl),
    leaves futures and coroutines behind that asyncio reports when they are collected, and calls back into an event
    loop that is closed by then: up to a thousand lines, some of them long after the error was raised. They come from
    other threads and from the garbage collector, so that nothing around the call could catch them; hence these
    settings of the process, for commands alone. Reading and writing without errors prints nothing.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_unless_loop_is_closed


def _report_unless_loop_is_closed(unraisable: Any) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


class RunLog:
    """The log of one training run; on all but the first process of several it does nothing.

    Writes `metrics.jsonl` and TensorBoard files into the work directory, and to the screen a progress bar on a
    terminal, plain lines elsewhere. A run that goes on at `start` drops what an earlier one logged after it.
    """

    def __init__(self, workdir: pathlib.Path, start: int, steps: int, *, active: bool):
        self.active = active
        self.steps = steps
        self._path = workdir / "metrics.jsonl"
        self._started, self._start = time.monotonic(), start
        if not active:
            return
        kept = [record for record in read_records(self._path) if record["step"] <= start]
        files.write(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._board = _Board(workdir / "tensorboard", start + 1)
        self._bar = tqdm(
            total=steps, initial=start, unit="step", disable=not sys.stderr.isatty(), leave=False
        )

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a step of training, and how long the rest will take."""
        if not self.active:
            return
        self._record(step, "train", values)
        each = (time.monotonic() - self._started) / (step - self._start)
        line = (
            f"step {step}/{self.steps}  loss {values['loss']:.4f}  pixels {values['pixel_accuracy']:.1%}  "
            f"lr {values['learning_rate']:.2e}  {values['images_per_second']:.1f} images/s  "
            f"waiting {values['data_wait']:.0%}  left {_duration(each * (self.steps - step))}"
        )
        if values["skipped"]:
            line += f"  skipped {values['skipped']:.0f} unreadable"
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.n = step
            self._bar.set_description_str(line.split("  ", 1)[1])

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Logs an evaluation's scores."""
        if not self.active:
            return
        self._record(step, "evaluation", values)
        self.say(
            f"step {step}/{self.steps}  " + "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        )

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self.active:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Ends the bar and the files."""
        if self.active:
            self._bar.close()
            self._board.close()

    def _record(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from None
        self._board.add({f"{kind}/{name}": value for name, value in values.items()}, step)


class _Board:
    """TensorBoard's file. tensorboardX's own writer is a thread; once that has met a full disk, all wait forever."""

    def __init__(self, folder: pathlib.Path, step: int):
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder = folder
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with self._writing():
            folder.mkdir(exist_ok=True)
            self._file = (folder / name).open("wb")
        self._write({"file_version": "brain.Event:2"}, 0)
        # TensorBoard forgets what an earlier file says of this step and later ones.
        self._write({"session_log": SessionLog(status=SessionLog.START)}, step)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Writes what is finite of the values: tensorboardX warns of the rest."""
        from tensorboardX import summary
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [summary.scalar(name, value) for name, value in values.items() if math.isfinite(value)]
        self._write({"summary": Summary(value=[scalar.value[0] for scalar in scalars])}, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been told
            self._file.close()

    def _write(self, content: Mapping[str, Any], step: int) -> None:
        """Writes an event as a TFRecord: its length and itself, each with a checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        with self._writing():
            event = Event(wall_time=time.time(), step=step, **content).SerializeToString()
            for part in (struct.pack("<Q", len(event)), event):
                self._file.write(part + struct.pack("<I", masked_crc32c(part)))
            self._file.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write into {self._folder}: {error.strerror or error}") from None


class Progress:
    """How far a command is: a bar on a terminal, elsewhere a line now and then; `with` ends it."""

    def __init__(self, total: int, unit: str, *, active: bool = True):
        self._active = active
        self._total, self._unit = total, unit
        self._told = 0.0
        self._bar = tqdm(total=total, unit=unit, disable=not active or not sys.stderr.isatty(), leave=False)

    def update(self, done: int, compiling: str = "") -> None:
        """Shows how many are done, and what is being compiled, if anything is."""
        note = f"compiling for {compiling}" if compiling else ""
        self._bar.n = done
        self._bar.set_postfix_str(note)
        due = note or done == self._total or time.monotonic() - self._told >= PLAIN_SECONDS
        if self._active and self._bar.disable and due:
            print(f"{done}/{self._total} {self._unit}  {note}".rstrip(), flush=True)
            self._told = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.write(text, file=sys.stdout)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line that was cut off by a crash is left out.

    Raises:
        UserError: it is there, but cannot be read.
    """
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; move it away") from None
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and {"step", "kind"} <= record.keys()]


def save_curves(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws loss, pixel accuracy, learning rate and mIoU over the steps.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        ("train", "loss"),
        ("train", "pixel_accuracy"),
        ("evaluation", "miou"),
        ("train", "learning_rate"),
    ]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, name) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        points = [(record["step"], record[name]) for record in records if record["kind"] == kind]
        axes.plot(
            *zip(*points, strict=True) if points else ([], []), marker="o" if kind == "evaluation" else ""
        )
        axes.set_title(f"{kind}: {name.replace('_', ' ')}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    files.write(path, picture.getvalue())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
