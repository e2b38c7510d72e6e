"""The processes of one run: how they find each other, agree, and end when one of them is gone."""

import atexit
import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax._src.clusters import cloud_tpu_cluster
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from topformer_jax.runtime import sharding
from topformer_jax.runtime.errors import UserError

HEARTBEAT_SECONDS = 60  # a process that has not answered for so long is taken for dead, and the others end


def say(line: str) -> None:
    """Prints a line, on the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def start_processes(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of this run, if flags or the environment say that there are any.

    Raises:
        UserError: only some of the flags are given, or the others cannot be reached.
    """
    flags = (coordinator, processes, process_id)
    if any(flag is not None for flag in flags):
        if any(flag is None for flag in flags):
            raise UserError("--coordinator, --processes and --process-id go together: give all three")
        try:
            _initialize(coordinator, processes, process_id)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot join {coordinator} as process {process_id}: {error}") from None
    elif _knows_others():
        _initialize()


def _knows_others() -> bool:
    """Whether SLURM, Kubernetes or Google's TPU machines say that this process has others beside it.

    A TPU machine knows of the others in its slice, and of other slices, from its metadata server alone.
    """
    machine = cloud_tpu_cluster.GceTpuCluster
    return (
        int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
        or (machine.is_env_present() and machine.get_process_count() > 1)
    )


def _initialize(coordinator: str | None = None, count: int | None = None, number: int | None = None) -> None:
    global _preemption
    jax.distributed.initialize(coordinator, count, number, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    state = distributed.global_state
    _preemption, state.preemption_sync_manager = state.preemption_sync_manager, None
    atexit.register(setattr, state, "preemption_sync_manager", _preemption)  # JAX shuts it down


def wait_for_preemption(stopped: threading.Event) -> bool:
    """Returns when one of the processes was asked to end: True, or False where JAX does not tell, or once `stopped`.

    JAX agrees on it in the background; `reached_preemption_sync_point` says only at which step it has. It is asked
    once a second: a thread that waited inside of JAX would crash the process when Python ends.
    """
    client: Any = distributed.global_state.client
    while client is not None and not stopped.wait(1):
        try:
            client.key_value_try_get("RECEIVED_PREEMPTION_NOTICE")
            return True
        except jax.errors.JaxRuntimeError:  # not yet, or there is no answer now
            continue
    return False


def do_all_agree(question: str, answer: bool, stopped: threading.Event) -> bool:
    """Whether every process answers yes; each must be asked once. False, too, once `stopped`.

    A thread may ask while the main thread computes or compiles: the answers go through JAX's coordination service,
    not through the devices.
    """
    client: Any = distributed.global_state.client
    if client is None:
        return answer
    client.key_value_set(f"{question}/{jax.process_index()}", str(answer))
    while not stopped.is_set():
        try:
            answers = [value for _, value in client.key_value_dir_get(f"{question}/")]
        except jax.errors.JaxRuntimeError:  # the first process has its answers, and is gone
            return answer
        if str(False) in answers or len(answers) == jax.process_count():
            return str(False) not in answers
        stopped.wait(0.1)
    return False


def has_reached_stop(moment: int) -> bool:
    """Whether all processes end at this moment, since one was asked to; each asks at the same moments, counted up.

    JAX agrees on a moment that none has reached. Its counter is this run's only: Orbax would count its steps by it.
    """
    return _preemption.reached_sync_point(moment)


_preemption: Any = None  # JAX's; not where Orbax finds it
_exiting = threading.Event()  # this process is about to end together with the others
_before_exit: list[Callable[[], object]] = []


def call_before_exit(function: Callable[[], object]) -> None:
    """Has `hard_exit` call a function, which must not wait for other processes."""
    _before_exit.append(function)


def hard_exit(status: int) -> NoReturn:
    """Ends this process at once, without waiting for the others: they are waiting for it and see that it is gone."""
    # The last one first: a work directory stays this run's until its writes have ended.
    for function in (*reversed(_before_exit), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            function()
    os._exit(status)


def hard_exit_all(status: int, report: Callable[[], object], stopped: threading.Event) -> None:
    """`hard_exit` where all processes have agreed to; returns only once `stopped`.

    Each waits until all have answered: one that ended earlier would look dead to the others.
    """
    _exiting.set()
    if do_all_agree("exiting", True, stopped):
        with contextlib.suppress(Exception):
            report()
        if jax.process_count() > 1 and jax.process_index() == 0:
            time.sleep(2)  # it serves the others
        hard_exit(status)


def wait_if_exiting() -> None:
    """Does not return where another thread is about to end this process: see `hard_exit_all`."""
    if _exiting.is_set():
        threading.Event().wait()


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone."""
    words = (
        "Gloo",
        "NCCL",
        "Connection reset",
        "Connection closed",
        "Socket closed",
        "UNAVAILABLE",
        "heartbeat",
    )
    return jax.process_count() > 1 and any(word in str(error) for word in words)


def report_lost_connection() -> None:
    """Says that another process is gone; where JAX's coordination service notices it first, it says so itself."""
    line = "another process of this run ended or stopped answering; see its output, and start the same command again"
    print(f"error: {line} on every host", file=sys.stderr, flush=True)


def count_equal(text: str) -> int:
    """How many processes have the text that this one has; all processes must call it in the same order."""
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return int((gather_processes(own) == own).all(1).sum())


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """The sum of every process's array; all processes must call it in the same order."""
    return gather_processes(array).sum(0, dtype=array.dtype)


def gather_processes(array: np.ndarray | np.generic) -> np.ndarray:
    """Every process's array, stacked along a new first axis; all processes must call it in the same order.

    The arrays travel as bytes, since JAX would cut 64-bit numbers down to 32 bits.
    """
    if jax.process_count() == 1:
        return np.asarray(array)[None]
    data = np.frombuffer(array.tobytes(), np.uint8)[None]
    mesh = Mesh(np.array(jax.devices()).reshape(jax.process_count(), -1), ("processes", "devices"))
    rows = NamedSharding(mesh, P("processes"))
    with jax.transfer_guard("allow"):  # the bytes travel through the devices
        gathered = sharding.to_host(jax.make_array_from_process_local_data(rows, data))
    return np.ascontiguousarray(gathered).view(array.dtype).reshape(len(gathered), *array.shape)
