"""Reports of commands: a progress bar or plain lines, JSON lines, TensorBoard events, curves."""

import contextlib
import datetime
import io
import logging
import math
import os
import pathlib
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from tqdm import tqdm

from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

PRINT_INTERVAL = 10  # seconds between lines of progress where there is no terminal


def silence_orbax_threads() -> None:
    """Silences Orbax's threads, so that an error is one line.

    When a checkpoint is damaged or the disk is full, they log tracebacks (absl), leave futures behind that asyncio
    reports, and call into a closed event loop: up to a thousand lines.
    """

    def report(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            sys.__unraisablehook__(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = report


def discard_output() -> None:
    """Redirects standard output to /dev/null: the rest of its buffer would fail again when Python flushes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class RunLog:
    """The log of one training run; without `active`, as on all processes except the first, it does nothing.

    Appends to `metrics.jsonl` (one JSON object per line: `step`, `kind`, values), writes TensorBoard events, shows a
    progress bar on a terminal, plain lines elsewhere. Of the records of earlier starts, a run resumed at `start`
    keeps those up to this step. Every method raises a UserError if a file cannot be written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        steps: int,
        earlier: Sequence[Mapping[str, Any]] = (),
        *,
        active: bool,
    ):
        self.active = active
        self.steps = steps
        self._path = workdir / "metrics.jsonl"
        self._start, self._start_time = start, time.monotonic()
        if not active:
            return
        kept = [record for record in earlier if record["step"] <= start]
        files.write_file(self._path, b"".join(map(_encode_line, kept)))
        self._events = _EventWriter(workdir / "tensorboard", start + 1)
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=hidden, leave=False)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics of a training step, from 1 on, and the estimated time left.

        `values` has loss, pixel_accuracy (for a classifier accuracy), learning_rate, images_per_second, data_wait
        (the share of time in which the devices waited for data) and skipped (the number of unreadable examples).
        """
        if not self.active:
            return
        self._record(step, "train", values)
        word, key = ("pixels", "pixel_accuracy") if "pixel_accuracy" in values else ("correct", "accuracy")
        seconds_per_step = (time.monotonic() - self._start_time) / (step - self._start)
        left = datetime.timedelta(seconds=round(seconds_per_step * (self.steps - step)))
        line = (
            f"step {step}/{self.steps}  loss {values['loss']:.4f}  {word} {values[key]:.1%}  "
            f"lr {values['learning_rate']:.2e}  {values['images_per_second']:.1f} images/s  "
            f"waiting {values['data_wait']:.0%}  left {left}"
        )
        if values["skipped"]:
            line += f"  skipped {values['skipped']:.0f} unreadable"
        if self._bar.disable:
            self.print_line(line)
        else:
            self._bar.n = step
            self._bar.set_description_str(line.split("  ", 1)[1])

    def log_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the scores of an evaluation after a step."""
        if not self.active:
            return
        self._record(step, "evaluation", values)
        scores = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.print_line(f"step {step}/{self.steps}  {scores}")

    def print_line(self, text: str) -> None:
        """Prints a line above the progress bar; a reader that is gone, such as `tee` after Ctrl-C, is no error."""
        if self.active:
            try:
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:
                discard_output()

    def close(self) -> None:
        """Closes the progress bar and the event file."""
        if self.active:
            self._bar.close()
            self._events.close()

    def _record(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        with files.report_errors("write", self._path), self._path.open("ab") as file:
            file.write(_encode_line({"step": step, "kind": kind, **values}))
        self._events.write_scalars({f"{kind}/{name}": value for name, value in values.items()}, step)


class _EventWriter:
    """Writes TensorBoard's event file. tensorboardX's SummaryWriter would wait forever on a full disk."""

    def __init__(self, folder: pathlib.Path, step: int):
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with files.report_errors("write", self._path):
            folder.mkdir(exist_ok=True)
            self._writer = RecordWriter(str(self._path))
        self._write_event({"file_version": "brain.Event:2"}, 0)
        # At a session's start TensorBoard discards this step and later ones of earlier files.
        self._write_event({"session_log": SessionLog(status=SessionLog.START)}, step)

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes the finite values; TensorBoard cannot plot the others."""
        from tensorboardX.proto.summary_pb2 import Summary

        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._write_event({"summary": Summary(value=scalars)}, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a failed write was reported when it happened
            self._writer.close()

    def _write_event(self, content: Mapping[str, Any], step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with files.report_errors("write", self._path):
            self._writer.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
            self._writer.flush()


class _Escaped:
    """A text stream that escapes control characters and what its encoding cannot hold."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text; keeps line breaks, tabulators and the carriage returns of a bar."""
        shown = re.sub(
            r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text
        )
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)


@contextlib.contextmanager
def escape_output() -> Iterator[None]:
    """Prints everything through `_Escaped`: names of files and classes may hold anything."""
    with contextlib.redirect_stdout(_Escaped(sys.stdout)), contextlib.redirect_stderr(_Escaped(sys.stderr)):
        yield


class Progress:
    """Shows the progress over `total` items: a bar on a terminal, elsewhere a line every 10 seconds.

    A context manager. `unit` names the items, in the plural; without `active` nothing is shown.
    """

    def __init__(self, total: int, unit: str, *, active: bool = True):
        self._active = active
        self._total, self._unit = total, unit
        self._last_printed = 0.0
        self._bar = tqdm(total=total, unit=unit, disable=not active or not sys.stderr.isatty(), leave=False)

    def update(self, done: int, compiling: str = "") -> None:
        """Shows the number of items done, and the input sizes that are being compiled, if any."""
        note = f"compiling for {compiling}" if compiling else ""
        self._bar.n = done
        self._bar.set_postfix_str(note)
        due = note or done == self._total or time.monotonic() - self._last_printed >= PRINT_INTERVAL
        if self._active and self._bar.disable and due:
            print(f"{done}/{self._total} {self._unit}  {note}".rstrip(), flush=True)
            self._last_printed = time.monotonic()

    def print_line(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text, file=sys.stdout)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class _Head(msgspec.Struct):
    """The fields of every record of a metrics.jsonl."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    kind: Literal["train", "evaluation"]


def _encode_line(record: Mapping[str, Any]) -> bytes:
    """Encodes one line, with the blanks of `json.dumps`: scripts search for '"step": 40'."""
    return msgspec.json.format(msgspec.json.encode(record), indent=0) + b"\n"


def read_records(path: files.Path, say: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """Reads the records of a `metrics.jsonl`; none if there is no file, a UserError if it cannot be read.

    Damaged lines are left out, which `say` prints, except for the last one, which a crash may have cut off.
    """
    records, damaged = [], []
    lines = (files.read_existing(path, "; move it away") or b"").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            files.read_json(line, _Head, path)
            records.append(files.read_json(line, dict[str, int | float | str | None], path))
        except UserError:
            damaged += [number] if line.endswith(b"\n") else []
    if damaged:
        say(f"left out of {path}: {len(damaged)} damaged lines, line {damaged[0]} is the first")
    return records


def save_curves(records: Sequence[Mapping[str, Any]], path: files.Path) -> None:
    """Plots loss, accuracy, the main score and learning rate over the steps into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    is_classifier = any("accuracy" in record for record in records)
    accuracy, score = ("accuracy", "top1") if is_classifier else ("pixel_accuracy", "miou")
    panels = [("train", "loss"), ("train", accuracy), ("evaluation", score), ("train", "learning_rate")]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, name) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        of_kind = [r for r in records if r["kind"] == kind and isinstance(r.get(name), int | float)]
        steps, values = [r["step"] for r in of_kind], [r[name] for r in of_kind]
        axes.plot(steps, values, marker="o" if kind == "evaluation" else "")
        axes.set_title(f"{kind}: {name.replace('_', ' ')}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    files.write_file(path, image.getvalue())
