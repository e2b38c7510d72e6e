"""Writes: in threads, by two hosts at once, and into a bucket whose answers are lost."""

import pathlib

import pytest

from tests import machines
from tests.bucket import Bucket, bucket, storage
from tests.machines import run_at_once
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

__all__ = ["bucket", "storage"]


class Vanishing(pathlib.PosixPath):
    """A file that somebody deletes after the question whether it exists."""

    def exists(self, **options: bool) -> bool:
        found = super().exists(**options)
        self.unlink(missing_ok=True)
        return found


def test_a_file_that_vanishes_before_it_is_read(tmp_path: pathlib.Path) -> None:
    path = Vanishing(tmp_path / "run.lock")
    path.write_text("x")
    assert files.read_existing(path) is None
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*run.lock"):
        files.read_existing(pathlib.Path(path))


def fail() -> None:
    raise UserError("the disk is full")


def test_all_are_done_at_the_end(tmp_path: pathlib.Path) -> None:
    with files.WriteQueue() as writes:
        for number in range(3 * files.WRITERS):
            writes.add(lambda path=tmp_path / str(number): files.write_file(path, "x"))  # type: ignore[misc]
    assert len(list(tmp_path.iterdir())) == 3 * files.WRITERS


def test_an_error_ends_the_writes() -> None:
    """An earlier write's error is raised when more are added; an error of the caller comes first."""
    added = []

    def add_many(error: type[BaseException] | None) -> None:
        with files.WriteQueue() as writes:
            for number in range(10 * files.WRITERS):
                writes.add(fail)
                added.append(number)
                if error is not None:
                    raise error

    with pytest.raises(UserError, match="the disk is full"):
        add_many(None)
    assert len(added) == files.WRITERS
    with pytest.raises(KeyboardInterrupt):
        add_many(KeyboardInterrupt)


WRITER = """
import os, pathlib, sys
from topformer_jax.runtime import files
path, content = pathlib.Path(sys.argv[1]), sys.argv[2] * 300_000
assert os.getpid() == 1
print("ready")
input()
for _ in range(100):
    files.write_file(path, content)
    assert len(path.read_text().strip("a")) in (0, 300_000)
"""


def test_two_hosts_write_one_file(tmp_path: pathlib.Path) -> None:
    """Both are process 1, on a disk that they share: each content is one host's, and whole."""
    hosts = [machines.make_host(tmp_path / name) for name in ("first", "second")]
    path = tmp_path / "shared/file"
    run_at_once([machines.start(WRITER, host, path, letter) for host, letter in zip(hosts, "ab", strict=True)])
    assert path.read_text() in ("a" * 300_000, "b" * 300_000)
    assert list(path.parent.iterdir()) == [path]


PROBER = """
import os, sys
from topformer_jax.runtime import files
folder = files.as_path(sys.argv[1])
folder.exists()  # the first request takes longer
assert os.getpid() == 1
print("ready")
input()
files.make_folder(folder)
"""


def test_two_hosts_share_a_bucket(bucket: Bucket, tmp_path: pathlib.Path) -> None:
    """Both try at once whether they can write there; both files are there before either is deleted."""
    hosts = [machines.make_host(tmp_path / name) for name in ("first", "second")]
    started = [machines.start(PROBER, host, f"{bucket}/run") for host in hosts]
    bucket.set_faults(delay=1.0, match="POST")
    run_at_once(started)
    assert sum(line.startswith("DELETE") for line in bucket.set_faults()) == 2
    assert not (bucket / "run").exists() or not list((bucket / "run").iterdir())
