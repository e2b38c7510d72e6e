"""Writes files by threads, each whole or not at all; a later run makes what is missing."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from topformer_jax.data.loader import map_in_threads
from topformer_jax.preparation.archives import Member
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError
from topformer_jax.runtime.logs import Progress

MANIFEST = "manifest.json"  # what was made from which archives: counts and a checksum per split
LISTING = "files.tsv"  # a line for each file that is complete: SHA-256, bytes, split, kind, path
PARTIAL = ".partial"  # the folder of files that are being written
ADVICE = "; the same command goes on from here"

Convert = Callable[[bytes, str], bytes]  # of a file's bytes and its name in errors


@dataclasses.dataclass(frozen=True, slots=True)
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


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A line of the listing: a file that is complete."""

    sha256: str
    size: int
    split: str
    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.sha256}\t{self.size}\t{self.split}\t{self.kind}\t{self.path}\n"


def write(tasks: list[Task], output: pathlib.Path, origin: dict[str, Any], *, verify: bool) -> dict[str, Any]:
    """Makes the files that are not there yet, and writes manifest and listing.

    `origin` is what they are made from, for the manifest. With `verify`, files whose checksum differs are made again.

    Returns the manifest's splits: images, labels, bytes and SHA-256 of each. Raises UserError if a file cannot be
    made or written, two would have one name, or the folder was made from something else.
    """
    _check_paths(tasks)
    _claim(output, origin)
    with _open_listing(output) as listing:
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
        known = {record.path: record for record in _read_listing(output)}

        def make(task: Task) -> Record:
            record = known.get(task.path)
            if record and _is_whole(output, record, verify):
                return dataclasses.replace(record, split=task.split, kind=task.kind)
            return make_file(output, task)

        total, done = sum(task.source.size for task in tasks), 0
        records = []
        with Progress(total >> 20, "MB", active=total >= 1 << 20) as progress:
            for task, record in zip(tasks, map_in_threads(make, tasks), strict=True):
                listing.write(str(record))
                listing.flush()
                records.append(record)
                done += task.source.size
                progress.update(done >> 20)
        records.sort(key=lambda record: record.path)
        files.write_file(output / LISTING, "".join(map(str, records)), ADVICE)
        shutil.rmtree(output / PARTIAL, ignore_errors=True)
    splits = _summarize(records)
    _write_manifest(output, {**origin, "splits": splits})
    return splits


def make_file(output: pathlib.Path, task: Task) -> Record:
    """Makes and writes a file, which appears under its name when it is whole."""
    content = task.make()
    temporary, path = files.temporary_path(output / PARTIAL / "file"), output / task.path
    with files.report_errors("write", path, ADVICE):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    return Record(hashlib.sha256(content).hexdigest(), len(content), task.split, task.kind, task.path)


def _check_paths(tasks: Iterable[Task]) -> None:
    """Raises UserError if two tasks would write one file, or one a file outside."""
    paths: set[str] = set()
    for task in tasks:
        if task.path in paths:
            raise UserError(f"two files would become {task.path}: rename one of them")
        files.require_inside(task.path, "--source")
        paths.add(task.path)


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


def _summarize(records: list[Record]) -> dict[str, Any]:
    """Counts images, labels and bytes of each split, with one SHA-256 of all checksums and paths."""
    splits: dict[str, Any] = {}
    for name in sorted({record.split for record in records if record.kind != "list"}):
        mine = [record for record in records if record.split == name and record.kind != "list"]
        kinds = [record.kind for record in mine]
        lines = "".join(f"{record.sha256}  {record.path}\n" for record in mine)
        splits[name] = {
            "images": kinds.count("image"),
            "labels": kinds.count("label"),
            "bytes": sum(record.size for record in mine),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        }
    return splits
