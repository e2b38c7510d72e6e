"""Worker processes and threads: how many there is a core for, and what processes have in common."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from typing import Any

from topformer_jax.runtime import files


def count_cores() -> int:
    """The cores that this process may use: in a container fewer than the machine has.

    >>> count_cores() > 0
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SHARED_MEMORY = "/dev/shm"


def count_free_shared_memory() -> int | None:
    """The bytes that are free for shared memory, 64 MB in a container of Docker's; None where nobody can tell."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # of other systems than Linux
        return None
    return status.f_bavail * status.f_frsize


def name_shared_memory() -> str:
    """What tells this process's shared memory from that of other hosts and containers."""
    try:
        return f"{files.read_boot_id()} {os.stat(SHARED_MEMORY).st_dev}"
    except OSError:
        return ""


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, whatever it is doing then."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class WorkerPool(concurrent.futures.ProcessPoolExecutor):
    """Processes that Ctrl-C means for their parent alone, from their first moment on: they inherit a blocked signal.

    The parent gets a KeyboardInterrupt, since a command that ended at once would leave semaphores behind.
    """

    def __init__(self, *args: Any, **options: Any):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        super().__init__(*args, **options)

    def submit(self, *args: Any, **options: Any) -> concurrent.futures.Future[Any]:
        """Starts a process where one is missing, and gives it a task."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
