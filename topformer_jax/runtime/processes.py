"""The processes of one run: they find each other, agree, and end if one of them is gone."""

import atexit
import contextlib
import hashlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental import multihost_utils

from topformer_jax.runtime.errors import UserError

HEARTBEAT_SECONDS = 60  # a process that does not answer for so long counts as dead, and the others end


def say(line: str) -> None:
    """Prints a line on the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def start_processes(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of this run, if flags or the environment announce any.

    Raises:
        UserError: only some of the flags are given, the others cannot be reached, or JAX does not start.
    """
    flags = (coordinator, processes, process_id)
    if any(flag is not None for flag in flags):
        if coordinator is None or processes is None or process_id is None:
            raise UserError("--coordinator, --processes and --process-id go together: give all three")
        if not re.fullmatch(r".+:\d{1,5}", coordinator):
            raise UserError(f"--coordinator is {coordinator!r}: expected HOST:PORT")
        try:
            _initialize(coordinator, processes, process_id)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot join {coordinator} as process {process_id}: {error}") from None
    elif _knows_others():
        _initialize()
    else:
        return
    try:
        jax.devices()
    except RuntimeError as error:
        host = socket.gethostname()
        name = f"; can this machine resolve its own name, {host}?" if "gloo" in str(error) else ""
        raise UserError(f"JAX does not start on {host}: {error}{name}") from None


def is_one_of_several() -> bool:
    """Whether this process has joined others; unlike `jax.process_count`, it needs no devices."""
    return distributed.global_state.num_processes > 1


def _knows_others() -> bool:
    """Whether SLURM, Kubernetes or the metadata server of a TPU machine announces other processes."""
    machine = cloud_tpu_cluster.GceTpuCluster
    return (
        int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or (machine.is_env_present() and machine.get_process_count() > 1)
    )


def _initialize(coordinator: str | None = None, count: int | None = None, number: int | None = None) -> None:
    global preemption
    jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    state = distributed.global_state
    preemption, state.preemption_sync_manager = state.preemption_sync_manager, None
    atexit.register(setattr, state, "preemption_sync_manager", preemption)  # JAX shuts it down


preemption: Any = None  # JAX's; not where Orbax finds it, which would count its own steps with it
exiting = threading.Event()  # set when this process is about to end together with the others
_before_exit: list[Callable[[], object]] = []


def call_before_exit(function: Callable[[], object]) -> None:
    """Registers a function that `hard_exit` calls; it must not wait for other processes."""
    _before_exit.append(function)


def hard_exit(status: int) -> NoReturn:
    """Ends this process at once, without waiting for the others, which notice that it is gone."""
    # The last function comes first: the lease of a work directory ends after the writes into it.
    for function in (*reversed(_before_exit), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            function()
    os._exit(status)


def wait_if_exiting() -> None:
    """Does not return if another thread is about to end this process."""
    if exiting.is_set():
        threading.Event().wait()


def report_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone, which it prints; JAX's service may do so too."""
    words = "Gloo|NCCL|Connection reset|Connection closed|Socket closed|UNAVAILABLE|heartbeat"
    is_lost = re.search(words, str(error)) is not None
    line = "another process of this run ended or stopped answering; see its output, and start the same command again"
    if is_lost:
        print(f"error: {line} on every host", file=sys.stderr, flush=True)
    return is_lost


def count_equal(text: str) -> int:
    """The number of processes with the same text as this one; all processes must call it in the same order."""
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return int((gather_processes(own) == own).all(1).sum())


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all processes; all processes must call it in the same order."""
    return gather_processes(array).sum(0, dtype=array.dtype)


def gather_processes(array: np.ndarray | np.generic) -> np.ndarray:
    """Stacks the arrays of all processes along a new first axis; all processes must call it in the same order.

    The arrays travel as bytes, since JAX would truncate 64-bit numbers to 32 bits.
    """
    data = np.frombuffer(array.tobytes(), np.uint8)
    with jax.transfer_guard("allow"):  # the bytes travel through the devices
        gathered = multihost_utils.process_allgather(data)
    return np.ascontiguousarray(gathered).view(array.dtype).reshape(len(gathered), *array.shape)
