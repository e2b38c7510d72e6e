"""Copies of array_record shards on a local disk: each is copied once by one process of the host, the others wait."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import fsspec

from topformer_jax.data import records
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

THREADS = 8  # shards copied at once
PIECE = 16 << 20  # bytes that one request asks for
MEGABYTE = 1_000_000
ADVICE = "; --config.data.cache=DIR names another folder"
ABANDONED_SECONDS = 3600.0  # without a write into it, what another host copies is given up
WAIT = 0.5  # seconds between looks at what another process has copied


class Progress(Protocol):
    """Shows how much is copied, as logs.Progress does."""

    def update(self, done: int) -> None: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...


MakeProgress = Callable[[int, str], Progress]  # of the total, and of what the numbers count


class NullProgress(contextlib.nullcontext[Any]):
    """Shows nothing."""

    def __init__(self, total: int, unit: str):
        super().__init__(self)

    def update(self, done: int) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its size in bytes, and its MD5 sum in hexadecimal, "" if nothing tells it."""

    name: str
    size: int
    md5: str


def copy_split(
    source: files.Path, dataset: str, split: str, cache: str, make_progress: MakeProgress = NullProgress
) -> str:
    """Copies one split's shards to a local disk, if they are not there, and returns their folder.

    The folder's name holds a digest of the source's path, dataset_info.json and checksums.json, so that versions of
    a data set are never mixed. A shard gets its name when it is whole and its checksum right; a copy that was
    interrupted goes on with the others.

    Raises:
        UserError: the disk is too small, the source cannot be read or a copy differs from its checksum.
    """
    if files.is_in_bucket(cache):
        raise UserError(
            f"data.cache={cache} is a bucket: give a folder on a local disk, --config.data.cache=DIR"
        )
    info, features = (files.read_bytes(source / name) for name in (records.INFO, records.FEATURES))
    with files.report_errors("read", source):
        has_sums = (source / records.CHECKSUMS).exists()
    sums = files.read_bytes(source / records.CHECKSUMS) if has_sums else b""
    digest = hashlib.sha256(b"\n".join([os.fspath(source).encode(), info, sums])).hexdigest()
    base = pathlib.Path(cache).expanduser()
    folder = base / f"{dataset}-{digest[:16]}"
    shards = _describe(source, records.list_shards(info, split, source), sums)
    if all(_is_there(folder, shard) for shard in shards) and (folder / records.INFO).exists():
        return str(folder)
    with files.report_errors("write", base, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, shards, make_progress):
            missing = [shard for shard in shards if not _is_there(folder, shard)]
            _delete_leftovers(folder)
            _check_space(folder, missing, f"{dataset}'s {split} shards")
            _copy(source, folder, shards, missing, make_progress)
            if sizes := records.read_label_sizes(source):
                files.write_file(folder / records.LABEL_SIZES, sizes, ADVICE)
            files.write_file(folder / records.FEATURES, features, ADVICE)
            files.write_file(folder / records.INFO, info, ADVICE)
    return str(folder)


def _describe(source: files.Path, names: list[str], sums: bytes) -> list[Shard]:
    """Sizes and checksums: those that preparation/packing.py wrote, else what the bucket or the disk says."""
    if sums:
        where = f"{os.fspath(source)}/{records.CHECKSUMS}"
        known = files.read_json(sums, records.Checksums, where, records.AGAIN).shards
        if missing := [name for name in names if name not in known]:
            raise UserError(f"{where} does not name {missing[0]}{records.AGAIN}")
        return [Shard(name, known[name].size, known[name].md5) for name in names]
    with files.report_errors("read", source), concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda name: _look_up(source / name), names))


def _look_up(path: files.Path) -> Shard:
    """Asks for a file's size and, of Cloud Storage, its checksum."""
    system, inside = fsspec.core.url_to_fs(os.fspath(path))
    facts = system.info(inside)
    return Shard(path.name, facts["size"], read_md5(facts))


def read_md5(facts: dict[str, Any]) -> str:
    """The MD5 sum, in hexadecimal, of what Cloud Storage says of a file; "" if it says none."""
    import base64

    return base64.b64decode(facts.get("md5Hash", "")).hex()


def _is_there(folder: pathlib.Path, shard: Shard) -> bool:
    path = folder / shard.name
    return path.exists() and path.stat().st_size == shard.size


def _bytes_there(folder: pathlib.Path, shards: list[Shard]) -> int:
    total = sum(shard.size for shard in shards if _is_there(folder, shard))
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@contextlib.contextmanager
def _lock(folder: pathlib.Path, shards: list[Shard], make_progress: MakeProgress) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process; shows what another one copies meanwhile."""
    with (folder / ".lock").open("w") as file:
        with contextlib.ExitStack() as stack:
            progress: Progress | None = None
            while not _try_lock(file.fileno()):
                if progress is None:
                    total = sum(shard.size for shard in shards)
                    unit = f"MB, copied to {folder} by another process"
                    progress = stack.enter_context(make_progress(-(-total // MEGABYTE), unit))
                progress.update(_bytes_there(folder, shards) // MEGABYTE)
                time.sleep(WAIT)
        yield


def _delete_leftovers(folder: pathlib.Path) -> None:
    """Deletes what killed copies left: this host's, since it holds the lock, and what other hosts have given up.

    On some shared disks a lock holds for its own host only.
    """
    lock = folder / ".lock"
    lock.touch()
    now = lock.stat().st_mtime  # by the disk's own clock
    for left in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if f".{_name_host()}." in left.name or now - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


def _name_host() -> str:
    """This machine's name in those of unfinished files: all containers on it share its locks."""
    return files.read_boot_id() or socket.gethostname()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_space(folder: pathlib.Path, missing: list[Shard], what: str) -> None:
    needed, free = sum(shard.size for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} is too small: {what} need {needed / MEGABYTE:,.1f} MB more, {free / MEGABYTE:,.1f} MB "
            "are free; --config.data.cache=DIR names another disk"
        )


def _copy(
    source: files.Path,
    folder: pathlib.Path,
    shards: list[Shard],
    missing: list[Shard],
    make_progress: MakeProgress,
) -> None:
    """Copies the missing shards by threads; the first error ends them all."""
    if not missing:
        return
    total = sum(shard.size for shard in shards)
    copied = total - sum(shard.size for shard in missing)
    stop, lock = threading.Event(), threading.Lock()

    def count(piece: int) -> bool:
        nonlocal copied
        with lock:
            copied += piece
        return stop.is_set()

    with (
        make_progress(-(-total // MEGABYTE), f"MB copied from {os.fspath(source)}") as progress,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        futures = [pool.submit(_copy_shard, source / shard.name, folder, shard, count) for shard in missing]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_EXCEPTION)
                for future in done:
                    future.result()
                progress.update(copied // MEGABYTE if waiting else -(-total // MEGABYTE))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _copy_shard(path: files.Path, folder: pathlib.Path, shard: Shard, count: Callable[[int], bool]) -> None:
    """Copies one file, a piece a request; it gets its name when it is whole and right."""
    temporary = files.temporary_path(folder / f"{shard.name}.{_name_host()}")
    found, done = hashlib.md5(usedforsecurity=False), 0
    try:
        with temporary.open("wb") as file:
            while done < shard.size:
                piece = _read_piece(path, done, min(done + PIECE, shard.size))
                if not piece:
                    break
                file.write(piece)
                found.update(piece)
                done += len(piece)
                if count(len(piece)):
                    return
            file.flush()
            os.fsync(file.fileno())
        if done != shard.size or (shard.md5 and found.hexdigest() != shard.md5):
            raise UserError(
                f"{os.fspath(path)} is not what it was when it was written ({done} bytes, MD5 {found.hexdigest()}; "
                f"expected {shard.size}, {shard.md5 or 'any'}): copy it or build it again "
                "(python -m topformer_jax.prepare)"
            )
        temporary.replace(folder / shard.name)
    finally:
        temporary.unlink(missing_ok=True)


def _read_piece(path: files.Path, start: int, end: int) -> bytes:
    with files.report_errors("read", path, "; the same command goes on with the missing shards"):
        system, inside = fsspec.core.url_to_fs(os.fspath(path))
        return bytes(system.cat_file(inside, start=start, end=end))
