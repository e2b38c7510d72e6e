"""Files and folders, local or in a bucket: paths, atomic writes, and errors of one line."""

import collections
import concurrent.futures
import contextlib
import errno
import logging
import os
import pathlib
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from topformer_jax.runtime.errors import UserError

# A local path, or epath's of a bucket, which has the same methods.
if TYPE_CHECKING:
    Path = pathlib.Path
else:
    Path = os.PathLike

WRITERS = 16  # threads of a WriteQueue, and writes that it holds
MOST_BYTES = 1 << 30  # of a file that is read as a whole; lists of a million pictures are smaller
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no character of a name
_unfinished: list[Path] = []  # files that are not whole yet
Result = TypeVar("Result")


def as_path(text: str | os.PathLike[str]) -> Path:
    """Turns a user's text into a path: in a bucket, such as gs://BUCKET/FOLDER, or a local one, where ~ is the home.

    >>> as_path("runs/b").name
    'b'

    Raises:
        UserError: the package that reads such buckets is not installed, or the storage is unknown.
    """
    text = os.fspath(text)
    if not is_in_bucket(text):
        return pathlib.Path(os.path.expanduser(text))
    import fsspec  # these take a tenth of a second, and gcsfs half of one
    from etils import epath

    protocol = text.partition("://")[0]
    # gcsfs repeats failed requests itself, for half a minute. It would ask another server for each bucket's kind, and
    # log each repetition.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        path: Path = epath.Path(text)
        fsspec.get_filesystem_class(protocol)
    except KeyError:
        raise UserError(f"{text} is in no known storage: expected gs://BUCKET/FOLDER, or a local path") from None
    except ImportError as error:
        if protocol != "gs":
            raise UserError(f"cannot open {text}: {explain(error)}") from None
        raise UserError(
            f"{text} is in Google Cloud Storage, and gcsfs is not installed: pip install "
            "'topformer_jax[gcs]' (from a clone: pip install -e '.[gcs]')"
        ) from None
    return path


def is_in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is not a local one."""
    return "://" in os.fspath(path)


def make_folder(path: Path, alternative: str = "another folder") -> None:
    """Creates a folder and its parents; a UserError, which suggests `alternative`, if it is not writable."""
    with report_errors("write into", path, f"; name {alternative}"):
        if is_in_bucket(path):
            probe = temporary_path(path / "probe")
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)  # a repeated request finds no file
        else:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()


def make_private(path: pathlib.Path) -> None:
    """Creates a folder for programs that are run; a UserError if other users may write into it."""
    with report_errors("write into", path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"others may write into {path}: delete it; it is created again for your user only")


def refuse_existing(path: Path) -> None:
    """Raises a UserError if a file exists."""
    with report_errors("write", path):
        if path.exists():
            raise UserError(f"{path} is there already: name another file")


def temporary_path(path: Path) -> Path:
    """A new hidden name beside a file, for its content until it is whole; it ends with `.tmp`.

    It is random, since the process id is 1 in the containers of several hosts.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def read_boot_id() -> str:
    """The random name of a kernel since its start, which its containers share; "" if it has none, as on macOS."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def write_file(path: Path, content: str | bytes, advice: str = "") -> None:
    """Writes a file atomically (temporary file, then rename) and creates missing folders.

    Readers see the old content or the new, never a part; a failed write, a UserError, leaves no file behind. A
    bucket does this by itself. Characters that UTF-8 cannot hold are escaped.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if is_in_bucket(path):
        with report_errors("write", path, advice):
            path.write_bytes(data)
        return
    temporary = temporary_path(path)
    with report_errors("write", path, advice), unfinished(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Deletes a file if the block fails, or if Ctrl-C ends the command in it."""
    _unfinished.append(path)
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # a bucket has errors of its own
            path.unlink()
        raise
    finally:
        _unfinished.remove(path)


def delete_unfinished() -> None:
    """Deletes the files of all `unfinished` blocks, before a command ends at once."""
    for path in list(_unfinished):
        with contextlib.suppress(Exception):
            path.unlink()


class WriteQueue:
    """Writes many files in threads, since a bucket answers late; the end of the context waits for all of them."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(WRITERS)
        self._waiting: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def add(self, write: Callable[[], None]) -> None:
        """Calls `write` in a thread; waits while too many are due, and raises the error of an earlier one."""
        while len(self._waiting) >= WRITERS:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(write))

    def __enter__(self) -> "WriteQueue":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def report_errors(action: str, path: str | os.PathLike[str], advice: str = "") -> Iterator[None]:
    """Turns errors of a file system into a UserError: "cannot ACTION PATH: the reason", and the advice."""
    expected: Any = Exception if is_in_bucket(path) else OSError
    try:
        yield
    except UserError:
        raise
    except expected as error:
        raise UserError(f"cannot {action} {os.fspath(path)}: {explain(error)}{advice}") from None


def explain(error: BaseException) -> str:
    """Why a request failed, in one line."""
    text = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    text = shorten(text, 140)
    if type(error) is FileNotFoundError and error.errno is None:  # as gcsfs raises it
        return "there is no such bucket or object, or this account may not see it"
    if "credentials" in text:
        return "there are no credentials for Google Cloud: gcloud auth application-default login"
    code = str(getattr(error, "code", ""))  # of HTTP
    if code in ("401", "403") or "Forbidden" in text or "does not have" in text:
        return f"this account has no permission ({text})"
    is_network = isinstance(error, ConnectionError | TimeoutError)
    is_network |= type(error).__module__.startswith("aiohttp")
    if is_network or code in ("408", "429") or code.startswith("5"):
        return f"no connection to the bucket ({text})"
    return text


def read_bytes(path: Path, advice: str = "", most: int = MOST_BYTES) -> bytes:
    """Reads a file that somebody else may have written.

    Raises:
        UserError: it cannot be read, is a pipe or a device, or has more than `most` bytes; the advice ends its line.
    """
    with report_errors("read", path, advice):
        if is_in_bucket(path):
            return path.read_bytes()
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise UserError(f"cannot read {path}: it has {size:,} bytes, and at most {most:,} are read{advice}")
            return file.read()


def read_existing(path: Path, advice: str = "") -> bytes | None:
    """`read_bytes`, or None if there is no file."""
    with report_errors("read", path, advice):
        if not path.exists():
            return None
        try:
            return read_bytes(path, advice)
        except UserError:
            if path.exists():
                raise
            return None  # deleted in between


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a local file for reading; an OSError for a pipe, which would wait for its writer, or a device."""
    file = open(  # noqa: SIM115  the caller's
        path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device", os.fspath(path))
    return file


def read_lines(file: Path) -> list[str]:
    """The lines of `number_lines`."""
    return list(number_lines(file).values())


def number_lines(file: Path | str, data: bytes | None = None) -> dict[int, str]:
    """The non-blank lines of a text file, stripped, by their numbers from 1; `data` is its content if it is known.

    Raises:
        UserError: it cannot be read, is not UTF-8, or holds control characters or line breaks of another kind.
    """
    data = read_bytes(as_path(file), "; expected one name per line") if data is None else data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8, one name per line") from None
    lines = {}
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if strange := CONTROL.search(line.strip("\t ").replace("\t", " ")):
            wish = "expected one name per line, of visible characters"
            raise UserError(f"{file}: line {number} holds {strange[0]!r}: {wish}")
        if line.strip():
            lines[number] = line.strip()
    return lines


def number_names(file: Path | str, data: bytes | None = None) -> dict[int, str]:
    """`number_lines` of names whose places are their numbers, such as classes; a UserError for a blank line."""
    lines = number_lines(file, data)
    if gaps := [number for number in range(1, max(lines, default=0)) if number not in lines]:
        raise UserError(
            f"{file}: line {gaps[0]} is blank, and the names after it would move: write a name, or delete the line"
        )
    return lines


def read_json(
    data: bytes, kind: Callable[..., Result], where: object, advice: str = ": was it written by another tool?"
) -> Result:
    """Decodes JSON into a type that msgspec knows; fields that the type does not name are skipped.

    Raises:
        UserError: it is no JSON, or a value has another type; the line names `where` and the value's place.
    """
    with _report_type(where, advice):
        found: Result = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=kind)
    return found


def convert(value: object, kind: Callable[..., Result], where: object, advice: str = "") -> Result:
    """`read_json` for a value that a library has decoded."""
    with _report_type(where, advice):
        found: Result = msgspec.convert(value, kind)
    return found


@contextlib.contextmanager
def _report_type(where: object, advice: str) -> Iterator[None]:
    try:
        yield
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise UserError(f"{where} is not the JSON file that was expected ({shorten(error, 120)}){advice}") from None


def shorten(text: object, most: int = 60) -> str:
    """Shortens a text from a file for an error: to one line of at most `most` characters.

    >>> shorten("a\\nb"), shorten("abcdefghijkl", 9)
    ('a?b', 'abc...jkl')
    """
    line = CONTROL.sub("?", str(text))
    half = (most - 3) // 2
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


def require_inside(name: str, where: str) -> None:
    """Raises a UserError if a name in a file leads out of its folder.

    >>> require_inside("train/0001.jpg", "list.txt")
    """
    path = pathlib.PurePosixPath(name.replace("\\", "/"))
    is_outside = path.is_absolute() or ".." in path.parts or pathlib.PureWindowsPath(name).drive
    if is_outside or not path.name or CONTROL.search(name):
        raise UserError(f"{where}: {name[:80]!r} is no name for a file below a folder: rename the file")
