"""What every command's main() shares: a parser that knows --config, and errors of one line."""

import argparse
import ctypes
import errno
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax import logs
from topformer_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that also takes `--config FILE` and `--config.KEY=VALUE` overrides."""

    def __init__(self, description: str | None, *, config_required: bool = True):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog="Any setting of the config can be changed: --config.KEY=VALUE (topformer_jax/config.py).",
        )
        self.add_argument(
            "--config",
            metavar="FILE",
            required=config_required,
            help="a recipe, e.g. configs/topformer_b_ade.py",
        )

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ConfigDict | None]:
        """The arguments, and the config with its overrides (None where none was asked for)."""
        rest, overrides = _split_overrides(sys.argv[1:] if argv is None else argv)
        args = self.parse_args(rest)
        if args.config is None:
            if overrides:
                raise UserError(f"--config.{next(iter(overrides))} needs --config FILE to change")
            return args, None
        return args, config_lib.load(args.config, overrides)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between them, as a flag's value.

    Raises:
        UserError: something else stands there.
    """
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{flag} cannot be {text!r}: expected numbers with commas between them") from None


def run(main: Callable[[], None]) -> None:
    """Runs a command's main(): a user's mistake ends it with one line and status 2, an interrupt with 130.

    Compiled programs are kept on disk, for the next command to find, unless the environment says where or not, and
    freed memory is kept by the process.
    """
    try:
        _keep_compiled_programs()
        keep_freed_memory()
        logs.silence_orbax_threads()
        main()
    except UserError as error:
        print(*error.details, f"error: {error.line}", sep="\n", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE):
            raise
        print(
            f"error: cannot write {error.filename or 'what the command prints'}: {error.strerror}",
            file=sys.stderr,
        )
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python writes the rest to as it ends
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _keep_compiled_programs() -> None:
    import jax

    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    for name, value in (
        ("jax_compilation_cache_dir", str(cache / "topformer_jax")),
        ("jax_persistent_cache_min_compile_time_secs", 0.5),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next allocation; where the environment sets it up, nothing changes.

    A program's temporary memory comes and goes with every call. By default glibc gives blocks of that size back to
    the kernel, which hands them out anew a zeroed page at a time: 143,000 page faults in a training step of Tiny,
    a quarter of its time on a CPU (4 x 512 x 512).
    """
    if platform.libc_ver()[0] != "glibc" or {"GLIBC_TUNABLES", *_MALLOC} & os.environ.keys():
        return
    libc = ctypes.CDLL(None)
    for number, value in _MALLOC.values():
        libc.mallopt(number, value)


# mallopt's parameters (malloc.h) by the names of their environment variables: never trim, never mmap, and one arena
# for all threads, since the others cannot grow to such sizes.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": (-1, -1), "MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_ARENA_MAX": (-8, 1)}


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the arguments."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE")
            value = following
        overrides[key] = value
    return rest, overrides
