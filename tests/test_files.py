"""Writes in threads: all of them are done at the end, and the first error is raised."""

import pathlib

import pytest

from topformer_jax import files
from topformer_jax.errors import UserError


def fail() -> None:
    raise UserError("the disk is full")


def test_all_are_done_at_the_end(tmp_path: pathlib.Path) -> None:
    with files.WriteQueue() as writes:
        for number in range(3 * files.WRITERS):
            writes.add(lambda path=tmp_path / str(number): files.write_file(path, "x"))  # type: ignore[misc]
    assert len(list(tmp_path.iterdir())) == 3 * files.WRITERS


def test_an_error_is_raised_at_the_end() -> None:
    with pytest.raises(UserError, match="the disk is full"), files.WriteQueue() as writes:
        writes.add(fail)


def test_an_error_ends_what_adds_more() -> None:
    added = []

    def add_many() -> None:
        with files.WriteQueue() as writes:
            for number in range(10 * files.WRITERS):
                writes.add(fail)
                added.append(number)

    with pytest.raises(UserError, match="the disk is full"):
        add_many()
    assert len(added) == files.WRITERS


def test_another_error_comes_first() -> None:
    def interrupt() -> None:
        with files.WriteQueue() as writes:
            writes.add(fail)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
