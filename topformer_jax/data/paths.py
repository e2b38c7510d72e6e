"""Paths that may be in buckets, and their errors in one line."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

import fsspec
from etils import epath

from topformer_jax.errors import UserError


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket, such as gs://name/folder."""
    return "://" in os.fspath(path)


def as_path(text: str) -> epath.Path:
    """A folder or file, in a bucket or not.

    Raises:
        UserError: it is in a bucket that this installation cannot open.
    """
    protocol = text.partition("://")[0] if is_bucket(text) else ""
    try:
        path = epath.Path(text).expanduser()
    except KeyError:
        raise UserError(
            f"{text} cannot be opened: there is no {protocol}://, Cloud Storage is gs://"
        ) from None
    if not protocol:
        return path
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        if protocol == "gs":
            raise UserError(
                f"{text} needs gcsfs: pip install 'topformer_jax[gcs]' (in a clone: pip install -e '.[gcs]')"
            ) from None
        raise UserError(f"{text} cannot be opened: {first_line(error)}") from None
    # It logs a traceback with each error that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return path


@contextlib.contextmanager
def report_errors(path: str | os.PathLike, deed: str, advice: str = "") -> Iterator[None]:
    """Turns what goes wrong into a UserError of one line: `path` cannot be `deed`: why; `advice`.

    The libraries of buckets raise errors of many types; of a local disk all are OSErrors.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or is_bucket(path)):
            raise
        ending = f"; {advice}" if advice else ""
        if is_bucket(path) and isinstance(error, FileNotFoundError):
            error = FileNotFoundError("it or its bucket does not exist")
        raise UserError(f"{os.fspath(path)} cannot be {deed}: {first_line(error)}{ending}") from None


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a local file so that readers see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason.strip().split("\n")[0] or type(error).__name__
