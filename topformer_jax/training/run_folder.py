"""The folder of a training run: one run at a time; a folder in a bucket is written locally and uploaded."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from typing import IO

import jax
import msgspec

from topformer_jax.runtime import cli, files, processes
from topformer_jax.runtime.errors import UserError

RENEW_SECONDS = 15.0
UPLOAD_SECONDS = 120.0  # for the last upload, which is repeated
EXPIRED_SECONDS = 60.0  # a run that has not renewed its lease for so long has crashed
LEASE = "run.lock"


class Record(msgspec.Struct):
    """The content of run.lock: the process that uses the folder."""

    run: str
    host: str
    pid: int
    boot: str = ""
    lock: str = ""  # device and inode of the locked file: containers of one machine may not see each other's
    renewals: int = 0


class RunFolder:
    """The place for everything that a run writes except checkpoints; a context manager.

    Files in a bucket cannot grow. For a bucket the files go into a folder `local`, and changed ones are uploaded
    every `upload_every` seconds, at each checkpoint and at the end; a failing network makes them late.
    """

    def __init__(self, path: files.Path, upload_every: int):
        self.path = path
        self.local: pathlib.Path = path
        self._interval = upload_every
        self._lease: Lease | None = None
        self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._is_late = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Makes the folder, and takes its `Lease` on the first process."""
        is_remote = files.is_in_bucket(self.path)
        files.make_folder(self.path if is_remote else self.path / "checkpoints", "another --workdir")
        if jax.process_index() == 0:
            self._lease = Lease(self.path)
        if is_remote:
            self.local = pathlib.Path(tempfile.mkdtemp(prefix="topformer_jax-"))
            self._thread = threading.Thread(target=self._upload_loop, daemon=True)
            self._thread.start()
        for part in ("predictions", "tensorboard"):
            files.make_folder(self.local / part, "another --workdir")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(UPLOAD_SECONDS if kind is None else 0.0)

    def upload(self) -> bool:
        """Uploads changed files, and returns whether all arrived; prints the first failure."""
        if self._thread is None:
            return True
        with self._lock:
            try:
                for file in sorted(self.local.rglob("*")):
                    self._upload_file(file)
            except Exception as error:
                if not self._is_late:
                    reason = files.explain(error)
                    print(f"late: cannot write into {self.path}: {reason}; trying again", flush=True)
                self._is_late = True
                return False
            self._is_late = False
            return True

    def _upload_file(self, file: pathlib.Path) -> None:
        if not file.is_file() or file.name.endswith(".tmp"):
            return
        status = file.stat()
        version = status.st_mtime_ns, status.st_size
        if self._uploaded.get(file) != version:
            (self.path / file.relative_to(self.local).as_posix()).write_bytes(file.read_bytes())
            self._uploaded[file] = version

    def _upload_loop(self) -> None:
        while not self._stopped.wait(self._interval):
            self.upload()

    def close(self, seconds: float) -> None:
        """Uploads the rest within so many seconds, deletes the local folder, and releases the run's folder.

        Raises:
            UserError: an upload failed; names the local folder.
        """
        try:
            if self._thread is not None:
                self._stopped.set()
                self._thread.join()
                self._upload_rest(time.monotonic() + seconds)
        finally:
            if self._lease is not None:
                self._lease.release()

    def _upload_rest(self, deadline: float) -> None:
        while not self.upload():
            if time.monotonic() >= deadline:
                raise UserError(f"cannot write into {self.path}: its newest files are in {self.local}: copy them")
            time.sleep(5)
        shutil.rmtree(self.local, ignore_errors=True)


class Lease:
    """Reserves a work directory for one run; after a crash a successor takes it over.

    The kernel locks a file until the process ends. Other machines, containers and users may not see this lock: the
    run also renews a file in the folder.

    Raises:
        UserError: another run uses the folder, or the lease cannot be written.
    """

    def __init__(
        self,
        folder: files.Path,
        renew_seconds: float = RENEW_SECONDS,
        expired_seconds: float = EXPIRED_SECONDS,
    ):
        self._folder, self._file = folder, folder / LEASE
        self._renew_seconds, self._expired_seconds = renew_seconds, expired_seconds
        self._record = Record(uuid.uuid4().hex, socket.gethostname(), os.getpid(), files.read_boot_id())
        self._lock: IO[str] | None = None
        self._wait_until_free()
        files.write_file(self._file, msgspec.json.encode(self._record))
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew_loop, daemon=True)
        self._thread.start()
        processes.call_before_exit(self.release)

    def _read(self) -> Record | None:
        """The record in the file, or None."""
        advice = "; if no run uses the folder, delete it"
        data = files.read_existing(self._file, advice)
        return None if data is None else files.read_json(data, Record, self._file, advice)

    def _wait_until_free(self) -> None:
        """Returns once no other run uses the folder; a UserError if one does."""
        other = self._read()
        who = f"process {other.pid} on {other.host}" if other else "another run"
        in_use = UserError(f"{self._folder} is in use by {who}: give another --workdir, or end that run")
        try:
            self._lock = _lock_folder(self._folder)
        except BlockingIOError:
            raise in_use from None
        own = self._record
        if self._lock:
            status = os.fstat(self._lock.fileno())
            own.lock = f"{status.st_dev}:{status.st_ino}"
        if other is None or (own.lock and own.boot and (other.boot, other.lock) == (own.boot, own.lock)):
            return
        expired = self._expired_seconds
        print(f"{self._folder} was used by {who}: waiting {expired:.0f} s to see whether it still is", flush=True)
        deadline = time.monotonic() + expired
        while (now := self._read()) == other and time.monotonic() < deadline:
            time.sleep(min(self._renew_seconds, expired) / 3)
        if now not in (other, None):
            self._unlock()
            raise in_use

    def _renew_loop(self) -> None:
        pause = 1.0  # the first look is for a run that started at the same moment
        while not self._released.wait(pause):
            pause = self._renew_seconds
            with contextlib.suppress(UserError):  # the next attempt may succeed
                self._renew()

    def _renew(self) -> None:
        found = self._read()
        if found is not None and found.run != self._record.run:
            self._released.set()
            who = f"process {found.pid} on {found.host}"
            print(f"error: {self._folder} was taken over by {who}: this run ends", file=sys.stderr)
            processes.hard_exit(2)
        self._record.renewals += 1
        if not self._released.is_set():
            files.write_file(self._file, msgspec.json.encode(self._record))

    def release(self) -> None:
        """Frees the folder for the next run."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join(5)  # it may be waiting for a network
        with contextlib.suppress(Exception):  # it expires, or is a successor's by now
            if (found := self._read()) and found.run == self._record.run:
                self._file.unlink()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()


def _lock_folder(folder: files.Path) -> IO[str] | None:
    """Locks a file until it is closed, in the folder or, for a bucket, in this machine's cache; None if it cannot.

    Raises:
        BlockingIOError: another process has locked it.
    """
    with contextlib.suppress(PermissionError, UserError, RuntimeError):  # another user's file, or no home
        if files.is_in_bucket(folder):
            files.make_private(cli.cache_folder())
            path = cli.cache_folder() / f"{hashlib.sha256(os.fspath(folder).encode()).hexdigest()}.lock"
        else:
            path = folder / ".lock"
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            file.close()
            if isinstance(error, BlockingIOError):
                raise
    return None
