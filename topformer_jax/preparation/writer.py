"""Writes what a plan lists: each file whole or not at all, by several processes, going on where a run was stopped."""

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

MANIFEST = "manifest.json"  # what was made of which archives: counts and a checksum a split
LISTING = "files.tsv"  # a line for each file that is complete: SHA-256, bytes, split, kind, path
PARTIAL = ".partial"  # the folder of files that are being written
ADVICE = "; the same command goes on from here"
_CHUNK_FILES, _CHUNK_BYTES = 32, 16 << 20  # that a process gets at once

Convert = Callable[[bytes, str], bytes]  # of a file's bytes and its name, for errors


@dataclasses.dataclass(frozen=True)
class Task:
    """One file to make."""

    path: str  # below the output folder, with "/"
    split: str  # train, validation, or another that the data set has; "" for a list
    kind: str  # image, label or list
    source: Member | bytes
    convert: Convert | None = None  # None: the bytes stay as they are
    where: str = ""  # of bytes: the file that they are of

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.size

    def make(self) -> bytes:
        """The file's bytes; a UserError where what it is made of is damaged, or not what it should be."""
        data = self.source if isinstance(self.source, bytes) else self.source.read()
        if self.convert is None:
            return data
        return self.convert(data, self.where if isinstance(self.source, bytes) else self.source.where)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made."""

    tasks: Iterable[Task]
    size: int  # bytes that are read for them


@dataclasses.dataclass(frozen=True)
class Record:
    """A file that is complete: a line of the listing."""

    sha256: str
    size: int
    split: str
    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.sha256}\t{self.size}\t{self.split}\t{self.kind}\t{self.path}\n"


def plan_of(tasks: list[Task]) -> Plan:
    """A plan whose tasks are known."""
    return Plan(tasks, sum(task.size for task in tasks))


def write(
    plan: Plan, output: pathlib.Path, origin: dict[str, Any], *, workers: int, verify: bool
) -> dict[str, Any]:
    """Makes the files that are not there yet, and writes manifest and listing.

    By `workers` processes, 0 for this one alone; `verify` also makes again what has another checksum.

    Returns:
        The manifest's splits: images, labels, bytes and SHA-256 of each.

    Raises:
        UserError: a file cannot be made or written, or the folder was made of something else than `origin`.
    """
    _claim(output, origin)
    with _open_listing(output) as listing, _start(workers) as pool:
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
        records = {record.path: record for record in _read_listing(output)}
        made: dict[str, Record] = {}
        done = 0
        with Progress(plan.size >> 20, "MB", active=plan.size >= 1 << 20) as progress:

            def collect(chunk: list[Record], size: int) -> None:
                nonlocal done
                listing.write("".join(map(str, chunk)))
                listing.flush()
                made.update({record.path: record for record in chunk})
                if done >> 20 != (done := done + size) >> 20:
                    progress.update(done >> 20)

            waiting: dict[concurrent.futures.Future[list[Record]], int] = {}
            for chunk in _chunks(plan.tasks):
                missing = []
                for task in chunk:
                    record = records.get(task.path)
                    if record and _is_whole(output, record, verify):
                        made[task.path] = dataclasses.replace(record, split=task.split, kind=task.kind)
                    else:
                        missing.append(task)
                size = sum(task.size for task in chunk)
                if not pool or not missing:
                    collect(make_files(output, missing), size)
                    continue
                waiting[pool.submit(make_files, output, missing)] = size
                while len(waiting) > 2 * workers:
                    for future in concurrent.futures.wait(waiting, return_when="FIRST_COMPLETED").done:
                        collect(future.result(), waiting.pop(future))
            for future in concurrent.futures.as_completed(list(waiting)):
                collect(future.result(), waiting[future])
            progress.update(plan.size >> 20)
        splits = _summarize(made.values())
        files.write_file(output / LISTING, "".join(str(made[path]) for path in sorted(made)), ADVICE)
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    _write_manifest(output, {**origin, "splits": splits})
    return splits


def make_files(output: pathlib.Path, tasks: list[Task]) -> list[Record]:
    """Makes and writes the files of some tasks: each appears under its name when it is whole."""
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


def is_made_of(folder: pathlib.Path, origin: dict[str, Any]) -> bool:
    """Whether a folder's manifest says that all of it was made of `origin`."""
    manifest = _read_manifest(folder)
    return "splits" in manifest and {key: manifest[key] for key in manifest if key != "splits"} == origin


def remove(folder: pathlib.Path, origin: dict[str, Any]) -> None:
    """Deletes what `write` made of `origin` in a folder: the files that its listing names, and empty folders."""
    if not is_made_of(folder, origin):
        return
    parents = {folder}
    for record in _read_listing(folder):
        files.require_inside(record.path, str(folder / LISTING))
        path = folder / record.path
        if path.resolve().is_relative_to(folder.resolve()) and _is_whole(folder, record, False):
            path.unlink()
        parents.update(parent for parent in path.parents if parent.is_relative_to(folder))
    for name in (LISTING, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
        with contextlib.suppress(OSError):  # something else is in it
            parent.rmdir()


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """What manifest.json of a folder says; empty where there is none."""
    path, advice = folder / MANIFEST, "; remove the folder, or name another --output"
    if not path.exists():
        return {}
    return files.read_json(files.read_bytes(path, advice), dict[str, Any], path, advice)


def _claim(output: pathlib.Path, origin: dict[str, Any]) -> None:
    """Marks a folder as made of `origin`."""
    with files.report_errors("write into", output):
        output.mkdir(parents=True, exist_ok=True)
        manifest = _read_manifest(output)
        strangers = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    if manifest:
        former = {key: value for key, value in manifest.items() if key != "splits"}
        if former != origin:
            changed = ", ".join(key for key in origin if former.get(key) != origin[key])
            raise UserError(
                f"{output} was made of something else (other {changed}): remove it, or name another --output"
            )
    elif strangers:
        raise UserError(f"{output} is not empty and was not made by this command: name another --output")
    else:
        _write_manifest(output, origin)


def _write_manifest(output: pathlib.Path, manifest: dict[str, Any]) -> None:
    files.write_file(output / MANIFEST, json.dumps(manifest, indent=1) + "\n", ADVICE)


@contextlib.contextmanager
def _open_listing(output: pathlib.Path) -> Iterator[Any]:
    """The listing, to append to; a second process that wants it is refused."""
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
    """Whether a file that was made is there: by its size, or by its checksum."""
    path = output / record.path
    try:
        if path.stat().st_size != record.size:
            return False
        return not verify or hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256
    except OSError:
        return False


def _chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """The tasks, some at a time; a UserError where two would write one file, or one a file outside of the folder."""
    chunk: list[Task] = []
    paths: set[str] = set()
    for task in tasks:
        if task.path in paths:
            raise UserError(f"two files would become {task.path}: rename one of them")
        files.require_inside(task.path, "--source")
        paths.add(task.path)
        chunk.append(task)
        if len(chunk) == _CHUNK_FILES or sum(task.size for task in chunk) >= _CHUNK_BYTES:
            yield chunk
            chunk = []
    yield chunk


class WorkerPool(concurrent.futures.ProcessPoolExecutor):
    """Processes that never get a Ctrl-C, from their first moment on: they inherit a blocked signal.

    The parent gets a KeyboardInterrupt: a command that ended at once would leave semaphores behind.
    """

    def submit(self, *args: Any, **options: Any) -> concurrent.futures.Future[Any]:
        """Starts a process if one is missing, and gives it a task."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def _start(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor | None]:
    """A pool of processes, or None for 0; an error or an interrupt drops what they have not begun."""
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
    """Runs first in a worker process: Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _summarize(records: Iterable[Record]) -> dict[str, Any]:
    """For each split: how many images and labels, their bytes, and one SHA-256 of all checksums and paths."""
    splits: dict[str, Any] = {}
    made = sorted((record for record in records if record.kind != "list"), key=lambda record: record.path)
    for name in sorted({record.split for record in made}):
        mine = [record for record in made if record.split == name]
        lines = "".join(f"{record.sha256}  {record.path}\n" for record in mine)
        splits[name] = {
            f"{kind}s": sum(record.kind == kind for record in mine) for kind in ("image", "label")
        }
        splits[name]["bytes"] = sum(record.size for record in mine)
        splits[name]["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    return splits
