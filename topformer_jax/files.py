"""Writing files whole or not at all."""

import contextlib
import os
import pathlib
import tempfile

from topformer_jax.errors import UserError


def make_folder(path: pathlib.Path, other: str = "another folder") -> None:
    """Makes a folder and those above it; `other` is what the message says to name instead.

    Raises:
        UserError: it cannot be made, or nothing can be written into it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror or error}; name {other}") from None


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file, and the folders above it, under another name first: what has the name is whole.

    Raises:
        UserError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
