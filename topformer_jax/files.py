"""Files and folders of a command's output: atomic writes, and errors of one line."""

import contextlib
import os
import pathlib
import tempfile

from topformer_jax.errors import UserError


def make_folder(path: pathlib.Path, alternative: str = "another folder") -> None:
    """Creates a folder and its missing parents, and checks that files can be written into it.

    Args:
        path: of the folder.
        alternative: what the error message suggests to name instead.

    Raises:
        UserError: the folder cannot be created or written into.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror or error}; name {alternative}") from None


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file atomically (temporary file, then rename) and creates missing folders.

    Readers see the old content or the new, never a part; a failed write leaves no file behind.

    Raises:
        UserError: writing fails.
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
