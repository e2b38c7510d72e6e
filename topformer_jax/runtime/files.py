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
import time
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

RETRY_SECONDS = 120.0  # for which a request to a bucket is repeated while the network or the server fails
WRITERS = 16  # threads of a WriteQueue, and how many writes it holds
MOST_BYTES = 1 << 30  # of a file that is read as a whole; lists of a million pictures have less
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no character of a name
_unfinished: list[Path] = []  # files that are of no use yet
Result = TypeVar("Result")


def as_path(text: str | os.PathLike[str]) -> Path:
    """A path from what a user wrote: a bucket's, such as gs://BUCKET/FOLDER, or a local one, where ~ is the home.

    >>> as_path("runs/b").name
    'b'

    Raises:
        UserError: what reads such buckets is not installed, or is unknown.
    """
    text = os.fspath(text)
    if not is_in_bucket(text):
        return pathlib.Path(os.path.expanduser(text))
    import fsspec  # these take a tenth of a second, and gcsfs half of one
    from etils import epath

    protocol = text.partition("://")[0]
    # gcsfs would ask a server of its own for each bucket's kind, and log each repeated request.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        path: Path = epath.Path(text)
        fsspec.get_filesystem_class(protocol)
    except KeyError:
        raise UserError(
            f"{text} is in no known storage: expected gs://BUCKET/FOLDER, or a local path"
        ) from None
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


def absolute(path: Path) -> Path:
    """The path from the root: Orbax refuses relative ones."""
    return path if is_in_bucket(path) else path.absolute()


def make_folder(path: Path, alternative: str = "another folder") -> None:
    """Creates a folder and its parents; a UserError, which suggests to name `alternative`, if it is not writable."""
    with report_errors("write into", path, f"; name {alternative}"):
        if is_in_bucket(path):
            probe = temporary_path(path / "probe")
            retry(lambda: probe.write_bytes(b""))
            retry(lambda: probe.unlink(missing_ok=True))  # a repeated request finds what the first one did
        else:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()


def make_private(path: pathlib.Path) -> None:
    """Creates a folder of files that are executed; a UserError if anybody but this user may write into it."""
    with report_errors("write into", path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"others may write into {path}: delete it, and it is made anew for you alone")


def refuse_existing(path: Path) -> None:
    """Raises a UserError where a file is there already, or nobody can tell."""
    with report_errors("write", path):
        if retry(path.exists):
            raise UserError(f"{path} is there already: name another file")


def temporary_path(path: Path) -> Path:
    """A hidden name beside a file, for its content until it is whole: another one at each call, on any host.

    A process id is no such name: in containers it is 1 on every host. What a killed process leaves is hidden, is
    never read or uploaded, and ends with `.tmp`.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def read_boot_id() -> str:
    """The random name of a kernel since it started, which its containers share; "" if it has none, as on macOS."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def write_file(path: Path, content: str | bytes, advice: str = "") -> None:
    """Writes a file atomically (temporary file, then rename) and creates missing folders.

    Readers see the old content or the new, never a part; a failed write, a UserError, leaves no file behind. An
    object in a bucket appears whole by itself. What UTF-8 cannot hold, of a file's name say, is escaped.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if is_in_bucket(path):
        with report_errors("write", path, advice):
            retry(lambda: path.write_bytes(data))
        return
    temporary = temporary_path(path)
    with report_errors("write", path, advice), unfinished(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """A file that is deleted where the block fails, or Ctrl-C ends the command in it."""
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
    """What a command does before it ends at once."""
    for path in list(_unfinished):
        with contextlib.suppress(Exception):
            path.unlink()


class WriteQueue:
    """Writes many files by threads, since a bucket answers late; the end of the context waits for all of them."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(WRITERS)
        self._waiting: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def add(self, write: Callable[[], None]) -> None:
        """Has a thread call `write`, and waits while too many others are due; raises what an earlier one raised."""
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
    """Turns what a file system raises into a UserError: "cannot ACTION PATH: the reason", and the advice."""
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
    if _code(error) in (401, 403) or "Forbidden" in text or "does not have" in text:
        return f"this account has no permission ({text})"
    if is_transient(error):
        return f"no connection to the bucket ({text})"
    return text


def read_bytes(path: Path, advice: str = "", most: int = MOST_BYTES) -> bytes:
    """The bytes of a file that somebody else may have written; a pipe or a device is not waited for.

    Raises:
        UserError: it cannot be read, is no regular file, or has more than `most` bytes; the advice ends its line.
    """
    with report_errors("read", path, advice):
        if is_in_bucket(path):
            return retry(path.read_bytes)
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > most:
                raise UserError(
                    f"cannot read {path}: it has {size:,} bytes, and at most {most:,} are read{advice}"
                )
            return file.read()


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Opens a local file to read; an OSError for a pipe, which would wait for its writer, or a device."""
    file = open(  # noqa: SIM115  the caller's
        path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device", os.fspath(path))
    return file


def read_lines(file: Path) -> list[str]:
    """A text file's non-blank lines, stripped; see `number_lines`."""
    return list(number_lines(file).values())


def number_lines(file: Path | str, data: bytes | None = None) -> dict[int, str]:
    """A text file's non-blank lines, stripped, by their numbers from 1 on; `data` is its content if it is known.

    Raises:
        UserError: it cannot be read, is not UTF-8, or holds control characters or line breaks of another kind.
    """
    try:
        text = (read_bytes(as_path(file), "; expected one name per line") if data is None else data).decode(
            "utf-8-sig"
        )
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8, one name per line") from None
    lines = {}
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if strange := CONTROL.search(line.strip("\t ").replace("\t", " ")):
            raise UserError(
                f"{file}: line {number} holds {strange[0]!r}: expected a name a line, of characters that show"
            )
        if line.strip():
            lines[number] = line.strip()
    return lines


def number_names(file: Path | str, data: bytes | None = None) -> dict[int, str]:
    """`number_lines` of names that are numbered by their places, such as classes: none before the last is blank."""
    lines = number_lines(file, data)
    if gaps := [number for number in range(1, max(lines, default=0)) if number not in lines]:
        raise UserError(
            f"{file}: line {gaps[0]} is blank, and the names after it would move: name it, or delete the line"
        )
    return lines


def read_json(
    data: bytes, kind: Callable[..., Result], where: object, advice: str = ": is it of another tool?"
) -> Result:
    """The content of a JSON file as a typed structure; fields that the structure does not name are skipped.

    Raises:
        UserError: it is no JSON, or a value has another type than `kind`, which msgspec knows; the line names `where`
            and the value's place.
    """
    with _report_type(where, advice):
        found: Result = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=kind)
    return found


def convert(value: object, kind: Callable[..., Result], where: object, advice: str = "") -> Result:
    """`read_json` of what a library has decoded already."""
    with _report_type(where, advice):
        found: Result = msgspec.convert(value, kind)
    return found


@contextlib.contextmanager
def _report_type(where: object, advice: str) -> Iterator[None]:
    try:
        yield
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise UserError(
            f"{where} is not the JSON file that was expected ({shorten(error, 120)}){advice}"
        ) from None


def shorten(text: object, most: int = 60) -> str:
    """A text from a file, as a line of an error shows it: of one line, and of at most so many characters.

    >>> shorten("a\\nb"), shorten("abcdefghijkl", 9)
    ('a?b', 'abc...jkl')
    """
    line = CONTROL.sub("?", str(text))
    half = (most - 3) // 2
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


def require_inside(name: str, where: str) -> None:
    """Raises a UserError where a name that a file gives would lead out of the folder that it belongs into.

    >>> require_inside("train/0001.jpg", "list.txt")
    """
    path = pathlib.PurePosixPath(name.replace("\\", "/"))
    is_outside = path.is_absolute() or ".." in path.parts or pathlib.PureWindowsPath(name).drive
    if is_outside or not path.name or CONTROL.search(name):
        raise UserError(f"{where}: {name[:80]!r} is no name for a file below a folder: rename what it is of")


def is_transient(error: BaseException) -> bool:
    """Whether a request to a bucket may succeed when it is repeated: network and server failed, not the request."""
    if _code(error) in (408, 429, 500, 502, 503, 504):
        return True
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("aiohttp")


def _code(error: BaseException) -> int | None:
    """The status of the HTTP response behind an error."""
    code = str(getattr(error, "code", ""))
    return int(code) if code.isdigit() else None


def retry(request: Callable[[], Result], seconds: float | None = None) -> Result:
    """The result of a request to a bucket, repeated with longer and longer pauses while network or server fail."""
    deadline, pause = time.monotonic() + (RETRY_SECONDS if seconds is None else seconds), 1.0
    while True:
        try:
            return request()
        except Exception as error:
            if not is_transient(error) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause *= 2
