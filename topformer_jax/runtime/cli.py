"""What every command shares: a parser with --config, errors of one line, JAX's cache of compiled programs."""

import argparse
import ctypes
import errno
import gc
import os
import pathlib
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.config.settings import as_text
from topformer_jax.runtime import files, logs
from topformer_jax.runtime.errors import UserError, explain_out_of_memory

LONGEST_LINE = 300  # characters of an error


class Parser(argparse.ArgumentParser):
    """An argparse parser that also takes `--config FILE`, `--config.KEY=VALUE` and `--help-config`."""

    def __init__(self, description: str | None, *, config_required: bool = True):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog="--config.KEY=VALUE changes a setting of the config; --help-config lists all of them.",
        )
        self.add_argument(
            "--config",
            metavar="FILE",
            required=config_required,
            help="a config file, or the name of a recipe, e.g. topformer_b_ade",
        )
        self.add_argument("--help-config", action=_HelpConfig, nargs=0, help="list all settings and exit")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ConfigDict | None]:
        """The arguments, and the config with its overrides; None without --config.

        Raises:
            UserError: the config or one of the overrides is wrong.
        """
        rest, overrides = _split_overrides(sys.argv[1:] if argv is None else argv)
        args = self.parse_args(rest)
        if args.config is None:
            if overrides:
                raise UserError(f"--config.{next(iter(overrides))} needs --config FILE: the config that it changes")
            return args, None
        return args, config_lib.load(args.config, overrides)


def answer_help(module: str, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Prints the help and exits if the module named `module` is run with a help flag.

    A command calls it before it imports JAX, which takes a second.
    """
    flags = [word for word in sys.argv[1:] if word in ("-h", "--help", "--help-config")]
    if module != "__main__" or not flags:
        return
    try:
        make_parser().parse_args(flags[:1])
    except BrokenPipeError:  # of `--help-config | head`
        logs.discard_output()
        sys.exit(2)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that start one of several processes by hand."""
    group = parser.add_argument_group("several machines (TPU pods and SLURM need none of these)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")


def add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that label images with a checkpoint or an exported file."""
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--checkpoint", metavar="PATH", help="a file, a checkpoint folder or a work directory")
    add("--exported", metavar="FILE", help="a file of topformer_jax.export, run in its runtime")
    text = "with --exported: resize every image to the fixed size of FILE, whatever its shape"
    parser.add_argument("--stretch", action="store_true", help=text)


class _HelpConfig(argparse.Action):
    """Prints the table of settings and exits, before argparse looks for required arguments."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(as_text())
        parser.exit()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows of text: the first column is flush left, the others flush right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([name.ljust(first), *map(str.rjust, cells, widths)] for name, *cells in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """Parses a flag's value "0.5,1,1.5"; a UserError if it is not numbers separated by commas."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{flag} cannot be {text!r}: expected numbers separated by commas") from None


def size(flag: str, text: str) -> tuple[int, int]:
    """Parses a flag's value "512x1024" into (height, width); a UserError if it is no size."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and len(text) < 20):
        raise UserError(f"{flag} {text}: expected HEIGHTxWIDTH, e.g. 512x512")
    if min(int(height), int(width)) < 1:
        raise UserError(f"{flag} {text}: expected at least 1x1")
    return int(height), int(width)


def run(main: Callable[[], None]) -> None:
    """Runs a command's main(): a user's mistake ends it with one line and status 2, an interrupt with status 130.

    Escapes control characters in its output. JAX's persistent cache of compiled programs is ~/.cache/topformer_jax,
    unless the environment sets another.
    """
    gc.enable()  # see topformer_jax/__init__.py
    with logs.escape_output():
        try:
            _set_compilation_cache()
            keep_freed_memory()
            logs.silence_orbax_threads()
            main()
        except (Exception, KeyboardInterrupt) as error:
            abort_run_on_error(type(error), error)
            status = _report(error)
            if status is None:
                raise
            sys.exit(status)


def abort_run_on_error(_: object, error: BaseException | None, *rest: object) -> None:
    """Ends a failed process at once if there are several, since each would wait for the others; an `__exit__`."""
    from topformer_jax.runtime import processes

    if error is None or isinstance(error, SystemExit) or not processes.is_one_of_several():
        return
    processes.wait_if_exiting()  # the others may have left a moment earlier
    if processes.report_lost_connection(error):
        processes.hard_exit(1)
    status = _report(error)
    if status is None:
        traceback.print_exception(error)
    processes.hard_exit(status or 1)


def _report(error: BaseException) -> int | None:
    """Prints the line of an error that a user can fix, and returns the exit status; None for other errors."""
    if shortage := explain_out_of_memory(error, pathlib.Path(sys.argv[0]).stem):
        error = UserError(shortage)
    match error:
        case UserError():
            lines = (files.shorten(line, LONGEST_LINE) for line in (*error.details, f"error: {error.line}"))
            print(*lines, sep="\n", file=sys.stderr)
            return 2
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EPIPE):
            what = error.filename or "what the command prints"
            print(f"error: cannot write {what}: {error.strerror}", file=sys.stderr)
            logs.discard_output()
            return 2
        case KeyboardInterrupt():
            print("interrupted", file=sys.stderr)
            return 130
    return None


def cache_folder() -> pathlib.Path:
    """The folder of files that can be made or fetched again: ~/.cache/topformer_jax, or below XDG_CACHE_HOME."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "topformer_jax"


def _set_compilation_cache() -> None:
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            files.make_private(cache_folder())
            jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
        except (UserError, RuntimeError) as error:  # such as a missing home
            print(f"note: compiled programs are not kept: {error}", flush=True)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def keep_freed_memory() -> None:
    """Sets glibc's malloc to reuse freed memory if a CPU computes, unless the environment configures malloc.

    By default glibc returns large blocks to the kernel, which zeroes each page when it is used again: 146,000 page
    faults in a training step of Tiny (4 x 512 x 512), a quarter of its time on a CPU; 47,000 with these settings.
    With a GPU or a TPU nothing is set: the threads of a large host would wait for each other in one arena.
    """
    if platform.libc_ver()[0] != "glibc" or {"GLIBC_TUNABLES", *_MALLOC} & os.environ.keys():
        return
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(os.path.exists, _ACCELERATORS)):
        return
    libc = ctypes.CDLL(None)
    for number, value in _MALLOC.values():
        libc.mallopt(number, value)


# Device files of NVIDIA's and AMD's GPUs and of TPUs: JAX must not be used before its processes have met.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")

# mallopt's parameters (malloc.h) by the names of their environment variables: never trim, never mmap, and one arena
# for all threads, because only the main arena can grow to such sizes: one arena per thread gives 145,000 page faults.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": (-1, -1), "MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_ARENA_MAX": (-8, 1)}


# ml_collections.config_flags does not serve: an unknown setting is a traceback of 50 lines, `data.crop_size=512`
# passes as (512,), and "none" cannot be expressed.
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
        if not equals and (value := next(words, "--")).startswith("--"):
            raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE")
        overrides[key] = value
    return rest, overrides
