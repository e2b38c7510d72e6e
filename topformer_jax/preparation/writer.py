"""Writes the files of a plan, each whole or not at all, by several processes; a later run makes what is missing."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from topformer_jax.data.loader import end_with_parent
from topformer_jax.preparation.archives import Member
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError
from topformer_jax.runtime.logs import Progress

MANIFEST = "manifest.json"  # what was made from which archives: counts and a checksum per split
LISTING = "files.tsv"  # a line for each file that is complete: SHA-256, bytes, split, kind, path
PARTIAL = ".partial"  # the folder of files that are being written
ADVICE = "; the same command goes on from here"
_CHUNK_FILES, _CHUNK_BYTES = 32, 16 << 20  # that a process gets at once

Convert = Callable[[bytes, str], bytes]  # of a file's bytes and its name in errors


@dataclasses.dataclass(frozen=True)
class Task:
    """One file to make."""

    path: str  # below the output folder, with "/"
    split: str  # train, validation, or another that the data set has; "" for a list
    kind: str  # image, label or list
    source: Member
    convert: Convert | None = None  # None: the bytes stay as they are

    def make(self) -> bytes:
        """Returns the file's bytes; raises UserError if the source is damaged or not what it should be."""
        data = self.source.read()
        return self.convert(data, self.source.where) if self.convert else data


@dataclasses.dataclass(frozen=True)
class Plan:
    """All files to make."""

    tasks: Iterable[Task]
    size: int  # bytes that are read for them


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of the listing: a file that is complete."""

    sha256: str
    size: int
    split: str
    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.sha256}\t{self.size}\t{self.split}\t{self.kind}\t{self.path}\n"


def plan_of(tasks: list[Task]) -> Plan:
    """A plan of tasks that are all known."""
    return Plan(tasks, sum(task.source.size for task in tasks))


def write(plan: Plan, output: pathlib.Path, origin: dict[str, Any], *, workers: int, verify: bool) -> dict[str, Any]:
    """Makes the files that are not there yet, and writes manifest and listing.

    `origin` is what they are made from, for the manifest. `workers` are extra processes; 0: only this one. With
    `verify`, files whose checksum differs are made again.

    Returns the manifest's splits: images, labels, bytes and SHA-256 of each. Raises UserError if a file cannot be
    made or written, or the folder was made from something else.
    """
    _claim(output, origin)
    with _open_listing(output) as listing, _start(workers) as pool:
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
        records = {record.path: record for record in _read_listing(output)}
        made: dict[str, Record] = {}
        done = 0

        def find(task: Task) -> Record | None:
            record = records.get(task.path)
            return record if record and _is_whole(output, record, verify) else None

        with Progress(plan.size >> 20, "MB", active=plan.size >= 1 << 20) as progress:
            for chunk, size in _make_chunks(plan.tasks, output, find, pool, 2 * workers):
                listing.write("".join(map(str, chunk)))
                listing.flush()
                made.update({record.path: record for record in chunk})
                done += size
                progress.update(done >> 20)
        splits = _summarize(made.values())
        files.write_file(output / LISTING, "".join(str(made[path]) for path in sorted(made)), ADVICE)
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    _write_manifest(output, {**origin, "splits": splits})
    return splits


def _make_chunks(
    tasks: Iterable[Task],
    output: pathlib.Path,
    find: Callable[[Task], Record | None],
    pool: concurrent.futures.Executor | None,
    most: int,
) -> Iterator[tuple[list[Record], int]]:
    """Makes the files that `find` lacks; yields the records of a chunk and the bytes that were read for it.

    At most `most` chunks wait for the pool.
    """
    waiting: dict[concurrent.futures.Future[list[Record]], tuple[list[Record], int]] = {}

    def collect() -> Iterator[tuple[list[Record], int]]:
        for future in concurrent.futures.wait(waiting, return_when="FIRST_COMPLETED").done:
            known, size = waiting.pop(future)
            yield known + future.result(), size

    for chunk in _chunks(tasks):
        known, missing = list[Record](), list[Task]()
        for task in chunk:
            if record := find(task):
                known.append(dataclasses.replace(record, split=task.split, kind=task.kind))
            else:
                missing.append(task)
        size = sum(task.source.size for task in chunk)
        if pool and missing:
            waiting[pool.submit(make_files, output, missing)] = known, size
            while len(waiting) > most:
                yield from collect()
        else:
            yield known + make_files(output, missing), size
    while waiting:
        yield from collect()


def make_files(output: pathlib.Path, tasks: list[Task]) -> list[Record]:
    """Makes and writes files; each appears under its name when it is whole."""
    records = []
    for task in tasks:
        content = task.make()
        temporary, path = files.temporary_path(output / PARTIAL / "file"), output / task.path
        with files.report_errors("write", path, ADVICE):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        digest = hashlib.sha256(content).hexdigest()
        records.append(Record(digest, len(content), task.split, task.kind, task.path))
    return records


def _claim(output: pathlib.Path, origin: dict[str, Any]) -> None:
    path, advice = output / MANIFEST, "; remove the folder, or name another --output"
    with files.report_errors("write into", output):
        output.mkdir(parents=True, exist_ok=True)
        strangers = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    if not path.exists():
        if strangers:
            raise UserError(f"{output} is not empty and was not made by this command: name another --output")
        _write_manifest(output, origin)
        return
    former = files.read_json(files.read_bytes(path, advice), dict[str, Any], path, advice)
    former.pop("splits", None)
    if former != origin:
        changed = ", ".join(key for key in origin if former.get(key) != origin[key])
        raise UserError(f"{output} was made of something else (other {changed}): remove it, or name another --output")


def _write_manifest(output: pathlib.Path, manifest: dict[str, Any]) -> None:
    files.write_file(output / MANIFEST, json.dumps(manifest, indent=1) + "\n", ADVICE)


@contextlib.contextmanager
def _open_listing(output: pathlib.Path) -> Iterator[Any]:
    """Opens the listing to append to it; raises UserError if another process has it."""
    with (
        files.report_errors("write", output / LISTING),
        (output / LISTING).open("a+", errors="replace") as listing,
    ):
        try:
            fcntl.flock(listing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process writes into {output}: wait for it") from None
        # A line that a kill cut off would run into the next one.
        listing.seek(0)
        if not f"\n{listing.read()}".endswith("\n"):
            listing.write("\n")
        yield listing


def _read_listing(output: pathlib.Path) -> Iterator[Record]:
    for line in (output / LISTING).read_text(errors="replace").splitlines():
        fields = line.split("\t")
        if len(fields) == 5 and fields[1].isdecimal() and len(fields[1]) < 16 and len(fields[0]) == 64:
            yield Record(fields[0], int(fields[1]), *fields[2:])


def _is_whole(output: pathlib.Path, record: Record, verify: bool) -> bool:
    path = output / record.path
    try:
        if path.stat().st_size != record.size:
            return False
        return not verify or hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256
    except OSError:
        return False


def _chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Yields some tasks at a time; raises UserError if two would write one file, or one a file outside."""
    chunk: list[Task] = []
    paths: set[str] = set()
    for task in tasks:
        if task.path in paths:
            raise UserError(f"two files would become {task.path}: rename one of them")
        files.require_inside(task.path, "--source")
        paths.add(task.path)
        chunk.append(task)
        if len(chunk) == _CHUNK_FILES or sum(task.source.size for task in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    yield chunk


class WorkerPool(concurrent.futures.ProcessPoolExecutor):
    """Processes that never get a Ctrl-C, from their first moment on: they inherit a blocked signal.

    The parent gets a KeyboardInterrupt: a command that ended at once would leave semaphores behind.
    """

    def submit(self, *args: Any, **options: Any) -> concurrent.futures.Future[Any]:
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        # Another thread may still receive the signal. Half-way through a start, an exception would lose the process.
        interrupts: list[int] = []
        handler = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        try:
            return super().submit(*args, **options)
        finally:
            signal.signal(signal.SIGINT, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            if interrupts:
                raise KeyboardInterrupt


@contextlib.contextmanager
def _start(workers: int) -> Iterator[concurrent.futures.Executor | None]:
    """Starts a pool of processes, None for 0; an error or an interrupt drops the work that has not begun."""
    if workers == 0:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = WorkerPool(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _summarize(records: Iterable[Record]) -> dict[str, Any]:
    """Counts images, labels and bytes of each split, with one SHA-256 of all checksums and paths."""
    splits: dict[str, Any] = {}
    made = sorted((record for record in records if record.kind != "list"), key=lambda record: record.path)
    for name in sorted({record.split for record in made}):
        mine = [record for record in made if record.split == name]
        kinds = [record.kind for record in mine]
        lines = "".join(f"{record.sha256}  {record.path}\n" for record in mine)
        splits[name] = {
            "images": kinds.count("image"),
            "labels": kinds.count("label"),
            "bytes": sum(record.size for record in mine),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        }
    return splits
