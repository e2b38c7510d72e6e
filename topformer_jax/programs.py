"""Compiled programs kept on disk, so that a command's next start neither traces, lowers nor compiles them.

JAX's own persistent cache saves the compilation alone: its key is the lowered program, for which a training step is
traced and lowered first. Here a program is found by what it is made from (see `KeptProgram`). A file holds what
`jax.experimental.serialize_executable` gives, after a checksum. Because that is a pickle, files are read only from a
folder that belongs to the user and that nobody else may write. Whatever is wrong with a file, it is as if it were
not there.

Commands keep programs (`keep_in`); in other processes a `KeptProgram` is the jitted function that it wraps. So it is
with several processes, where JAX is not to cache, and under a transformation.
"""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import pickle
import platform
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

MAGIC = b"topformer_jax program 1\n"
SUFFIX = ".program"
UNUSED_DAYS = 30  # after which a file is deleted, when another one is written
MAX_BYTES = 2**29  # of all files; the ones not used for longest go first
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Of the environment and of JAX's settings: what XLA, its backends and their libraries read, and what cannot matter.
VARIABLES = ("XLA_", "LIBTPU_", "TPU_", "CUDA_", "CUDNN_", "NVIDIA_", "TF_", "ROCM_", "HIP_", "OMP_")
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_collections", "builtins", "collections", "functools")
IRRELEVANT_SETTINGS = ("jax_compilation_cache", "jax_persistent_cache", "jax_transfer_guard", "jax_log")

_folder: pathlib.Path | None = None


def keep_in(folder: pathlib.Path | None) -> None:
    """From now on this process keeps its programs in a folder, which is made when it is needed; None: nowhere."""
    global _folder
    _folder = folder


class KeptProgram:
    """`jax.jit` of a function, whose executables are kept on disk, one for each signature of its arguments.

    A file is found by the source files of this package, the versions of JAX and what it computes with, the devices
    and the processor, JAX's settings, XLA's flags, `made_from` and the arguments' shapes, dtypes and layouts. Where
    one of these changed but the lowered program did not, the executable is found by that.

    Args:
        function: what to compile.
        made_from: what the function closes over; different ones need different `repr`s. If code from elsewhere than
            this package and its libraries is in it, of which nobody knows when it changes, nothing is kept.
        mesh: the devices that the program runs on.
        options: of `jax.jit`, all but static arguments.
    """

    def __init__(self, function: Callable[..., Any], made_from: object, mesh: Mesh, **options: Any):
        self._jitted: Any = jax.jit(function, **options)
        self.lower = self._jitted.lower
        self._options = options.get("compiler_options")  # which the lowered program does not show
        self._made_from = made_from
        self._code = _list_code(made_from)
        self._devices = list(mesh.devices.flat)
        self._mesh = mesh
        self._executables: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        if _folder is None or self._code is None or not _is_possible():
            return self._jitted(*args)
        leaves, tree = jax.tree.flatten(args)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._jitted(*args)
        signature = tree, tuple(map(_describe, leaves))
        if signature not in self._executables:
            self._executables[signature] = self._load_or_compile(args, signature)
        return self._executables[signature](*args)

    def _load_or_compile(self, args: Any, signature: Any) -> Any:
        """An executable for arguments like these, from disk or else compiled and written there."""
        folder = _open_folder()
        if folder is None:
            return self._jitted
        place = _environment(), self._options, self._mesh, [device.id for device in self._devices], signature
        source_path = folder / (_digest(_sources(), self._made_from, self._code, place) + SUFFIX)
        if executable := self._load(source_path):
            return executable
        lowered = self._jitted.lower(*args)
        lowered_path = folder / (_digest(lowered.as_text(), lowered.out_tree, place) + SUFFIX)
        if executable := self._load(lowered_path):
            with contextlib.suppress(OSError):  # another process may have deleted it since
                _write(source_path, lowered_path.read_bytes())
            return executable
        executable = _compile_anew(lowered)
        try:
            content = pickle.dumps(serialize_executable.serialize(executable))
        except Exception:  # not every backend can serialize every program
            return executable
        data = zlib.compress(content, 1)
        for path in (lowered_path, source_path):
            _write(path, MAGIC + hashlib.sha256(data).digest() + data)
        _delete_old(folder)
        return executable

    def _load(self, path: pathlib.Path) -> Any:
        """The executable of a file, or None if there is none that is whole and that this JAX can load."""
        try:
            with path.open("rb") as file:
                if not _is_private(os.fstat(file.fileno())):
                    return None
                checksum, data = _split(file.read())
            if hashlib.sha256(data).digest() != checksum:
                return None
            program, inputs, results = pickle.loads(zlib.decompress(data))
            executable = serialize_executable.deserialize_and_load(
                program, inputs, results, execution_devices=self._devices
            )
        except Exception:  # of many kinds; it is compiled then
            return None
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(path)
        return executable


def _split(content: bytes) -> tuple[bytes, bytes]:
    """The checksum and the data of a file; empty if it is not of this format."""
    start = len(MAGIC) + hashlib.sha256().digest_size
    return (content[len(MAGIC) : start], content[start:]) if content.startswith(MAGIC) else (b"", b"")


def _compile_anew(lowered: Any) -> Any:
    """Compiles without JAX's cache: an executable that was loaded from there, serialized again, lacks functions."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def _describe(leaf: Any) -> Any:
    """What a compiled program depends on of an argument."""
    return jax.typeof(leaf), getattr(leaf, "sharding", None), getattr(leaf, "committed", None)


def _is_possible() -> bool:
    """Whether this process may keep programs: JAX may cache and compiles, and it is the only process."""
    settings = jax.config.values
    may_cache = settings["jax_enable_compilation_cache"] and not settings["jax_disable_jit"]
    return bool(may_cache) and jax.process_count() == 1


def _open_folder() -> pathlib.Path | None:
    """The folder, made if missing, or None if it cannot be made or others may write into it."""
    assert _folder is not None
    try:
        _folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _folder if _is_private(_folder.stat(follow_symlinks=False)) else None
    except OSError:
        return None


def _is_private(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and nobody else may write it."""
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically; a full disk is no reason to end a command."""
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(SUFFIX, dir=path.parent)  # nobody else may open it
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise


def _delete_old(folder: pathlib.Path) -> None:
    """Deletes files that were not used for long, and more if there are too many."""
    now, total = time.time(), 0
    for modified, size, path in sorted(_list(folder), reverse=True):
        total += size
        if now - modified > UNUSED_DAYS * 86400 or total > MAX_BYTES:
            with contextlib.suppress(OSError):
                path.unlink()


def _list(folder: pathlib.Path) -> Iterator[tuple[float, int, pathlib.Path]]:
    for path in folder.glob(f"*{SUFFIX}"):  # with what an interrupted write left behind
        try:
            status = path.stat()
        except OSError:  # another process deleted it
            continue
        yield status.st_mtime, status.st_size, path


class _CodeFinder(pickle.Pickler):
    """Notes the functions, and the classes of all objects, that a value consists of."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: set[tuple[str, str]] = set()

    def persistent_id(self, value: Any) -> str | None:
        if not hasattr(value, "__qualname__"):
            return None
        self.found.add((value.__module__, value.__qualname__))
        return "code"


def _list_code(value: object) -> list[tuple[str, str]] | None:
    """Module and name of the code in a value; None if some of it is of another origin, or has no name."""
    finder = _CodeFinder()
    try:
        finder.dump(value)
    except Exception:  # of many kinds: it cannot be pickled
        return None
    known = {__package__, *LIBRARIES}
    is_known = all(module.split(".")[0] in known and "<" not in name for module, name in finder.found)
    return sorted(finder.found) if is_known else None


def _digest(*parts: object) -> str:
    """A hash of reprs, without the addresses in them, which differ between processes."""
    text = "\n".join(part if isinstance(part, str) else repr(part) for part in parts)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """A hash of this package's source files."""
    root = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _environment() -> list[object]:
    """What else a program depends on: versions, devices, processor, settings."""
    device = jax.devices()[0]
    settings = sorted((name, str(value)) for name, value in jax.config.values.items())
    return [
        platform.python_version(),
        *map(metadata.version, PACKAGES),
        device.client.platform_version,
        [(device.platform, device.device_kind) for device in jax.devices()],
        _processor(),
        os.cpu_count(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        [setting for setting in settings if not setting[0].startswith(IRRELEVANT_SETTINGS)],
        sorted(item for item in os.environ.items() if item[0].startswith(VARIABLES)),
    ]


@functools.cache
def _processor() -> list[str]:
    """The instructions that the processor knows, where Linux lists them: XLA compiles for them."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("flags", "Features", "model name")
    return [platform.machine(), *sorted({line for line in lines if line.startswith(names)})]
