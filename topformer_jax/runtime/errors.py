"""The exception for a user's mistake, and errors of other libraries that mean one."""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Sequence

# What lowers the memory that a command needs.
LESS_MEMORY = {
    "train": "lower batch_size or data.crop_size, or raise grad_accum_steps (smaller micro-batches)",
    "evaluate": "set evaluation.per_device_batch_size=1, or lower evaluation.scale",
    "predict": "lower evaluation.scale, or segment smaller pictures",
}
# The messages of XLA for CPUs, GPUs and TPUs, NumPy, OpenCV, PyTorch and C++.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out.of.memory|insufficient memory|(unable|failed|can.?t) (to )?allocate|bad_alloc",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"(?:allocat\w+|reserve|request for|Used) ([\d.]+) ?([KMGTP]?)i?(?:B|bytes)?\b")


class UserError(ValueError):
    """A mistake that the user can fix, described in one line: what was read, what was expected, what to do.

    `details` are further lines, such as tensors that do not fit; a command prints them before the line.
    """

    def __init__(self, line: str, details: Sequence[str] = ()):
        super().__init__("\n".join([line, *details]))
        self.line = line
        self.details = list(details)


def explain_out_of_memory(error: BaseException, command: str) -> str | None:
    """Returns the line for an error of exhausted memory, of the host or of a device; None for other errors.

    >>> error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")
    >>> explain_out_of_memory(error, "predict")
    'out of memory, 8.00 GiB were requested: lower evaluation.scale, or segment smaller pictures'
    """
    text = str(error)
    is_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if isinstance(error, UserError) or not (is_memory or _OUT_OF_MEMORY.search(text)):
        return None
    amount = ""
    if found := _AMOUNT.search(text):
        size = float(found[1].rstrip(".")) * 1024 ** " KMGTP".index(found[2] or " ")
        amount = f", {size / 2**30:,.2f} GiB were requested"
    return f"out of memory{amount}: {LESS_MEMORY.get(command, 'use smaller inputs, or a machine with more memory')}"


@contextlib.contextmanager
def report_out_of_memory(command: str, describe_state: Callable[[], str] = str) -> Iterator[None]:
    """Turns an error of exhausted memory into a UserError, whose line ends with `describe_state()`."""
    try:
        yield
    except Exception as error:
        line = explain_out_of_memory(error, command)
        if line is None:
            raise
        raise UserError("; ".join(filter(None, [line, describe_state()]))) from None


@contextlib.contextmanager
def need_packages(what: str, extra: str = "export") -> Iterator[None]:
    """Turns a failed import into a UserError: what needs which packages, and how to install them."""
    try:
        yield
    except ImportError as error:
        install = f"pip install 'topformer_jax[{extra}]' (from a clone: pip install -e '.[{extra}]')"
        raise UserError(f"{what}: {error}; {install}") from None
