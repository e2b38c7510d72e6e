"""Commands with tiny settings, in a process of their own or in this one, and what they say of mistakes."""

import contextlib
import io
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest

from topformer_jax import checkpoints, train
from topformer_jax.runtime import cli, logs

ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 1800.0  # seconds that a test waits for anything: for what hangs, not for what is slow
TINY = {  # all runs share the compiled programs
    "batch_size": 8,
    "model.depths": 1,
    "data.crop_size": "(64,64)",
    "data.shapes.train": 12,
    "data.shapes.validation": 3,
    "data.shapes.size": 72,
    "data.scale": "(72,72)",
    "evaluation.scale": "(72,72)",
    "log_every": 1,
    "checkpoint_every": 2,
    "evaluate_every": 100,
    "schedule.steps": 6,
    "schedule.warmup_steps": 2,
}
Workdir = pathlib.Path | Any  # or a path in a bucket
FOLDER = {"data.source": "folder", "data.dataset": "custom"}


def arguments(workdir: Workdir, changes: dict[str, Any]) -> list[str]:
    """The command's, for the synthetic shapes with tiny settings and some changes to them."""
    length = {"schedule.steps"} if "schedule.epochs" in changes else set()
    settings = {key: value for key, value in (TINY | changes).items() if key not in length}
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["--config", "configs/topformer_t_shapes.py", "--workdir", str(workdir), *words]


def launch(module: str, *words: object, devices: int = 8, platform: str = "cpu") -> subprocess.Popen[str]:
    """A command of the package in a process of its own; it finds what the tests have compiled."""
    return subprocess.Popen(
        [sys.executable, "-m", f"topformer_jax.{module}", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platform, "JAX_NUM_CPU_DEVICES": str(devices)},
    )


def launch_pair(
    module: str, *words: object, port: int | None = None, devices: int = 4, platform: str = "cpu"
) -> list[subprocess.Popen[str]]:
    """Two processes of one command, which meet at a port."""
    words = (*words, "--coordinator", f"127.0.0.1:{port or free_port()}", "--processes", 2, "--process-id")
    return [launch(module, *words, number, devices=devices, platform=platform) for number in range(2)]


def start(workdir: Workdir, changes: dict[str, Any], *flags: str) -> subprocess.Popen[str]:
    """A training in a process of its own."""
    return launch("train", *arguments(workdir, changes), *flags)


def command(main: Callable[[], None], *words: object) -> str:
    """What a command prints, in this process."""
    out = io.StringIO()
    with mock.patch.object(sys, "argv", ["command", *map(str, words)]), contextlib.redirect_stdout(out):
        main()
    return out.getvalue()


def run_here(workdir: Workdir, changes: dict[str, Any], *flags: str) -> str:
    """What a training prints, in this process."""
    with contextlib.chdir(ROOT):
        return command(train.main, *arguments(workdir, changes), *flags)


@contextlib.contextmanager
def stop_after(step: int) -> Iterator[None]:
    """The training in this process gets SIGTERM after it has logged a step, and ends with it."""
    log_step = logs.RunLog.log_step

    def log_and_stop(log: logs.RunLog, at: int, values: Any) -> None:
        log_step(log, at, values)
        if at == step:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)  # a thread sees the signal

    with mock.patch.object(logs.RunLog, "log_step", log_and_stop), pytest.raises(SystemExit) as end:
        yield
    assert end.value.code == 128 + signal.SIGTERM


def refused_command(main: Callable[[], None], *words: object) -> str:
    """The line that a command ends with, in this process."""
    err = io.StringIO()
    argv = mock.patch.object(sys, "argv", ["command", *map(str, words)])
    with argv, contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2
    return only_line(err.getvalue().splitlines()[-1])


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_pair(
    workdir: Workdir, changes: dict[str, Any], *flags: str, port: int | None = None, devices: int = 4
) -> list[subprocess.Popen[str]]:
    """Two processes of one training, with this many devices each."""
    return launch_pair("train", *arguments(workdir, changes), *flags, port=port, devices=devices)


def losses(workdir: Workdir) -> dict[int, float]:
    """All losses of a run's log, each step once, whatever was computed twice."""
    records = [record for record in logs.read_records(workdir / "metrics.jsonl") if "loss" in record]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records)
    return found


def outcome(workdir: Workdir) -> tuple[dict[str, bytes], dict[int, float]]:
    """The weights of a run's last checkpoint, bit for bit, and all its losses."""
    tensors, _ = checkpoints.read_model(workdir)
    return {name: np.asarray(value).tobytes() for name, value in tensors.items()}, losses(workdir)


def comes_to_pass(processes: Sequence[subprocess.Popen[Any]], holds: Callable[[], bool]) -> bool:
    """Returns True when something holds, False if one of the processes ends before it does.

    It waits as long as they live: how long a thing takes depends on the machine and on what else that does.
    """
    deadline = time.monotonic() + LONGEST
    while not holds():
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            return holds()
        time.sleep(0.01)
    return True


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What each of them has printed when all have ended; a test that is interrupted leaves none behind."""
    try:
        return [process.communicate(timeout=LONGEST) for process in processes]
    finally:
        for process in processes:
            process.kill()


def is_error(err: str) -> bool:
    """Whether a process complains; on a slow machine, XLA says that it compiles slowly."""
    return re.search("^error|^Traceback", err, re.MULTILINE) is not None


def wait_for(processes: Sequence[subprocess.Popen[str]], holds: Callable[[], bool]) -> None:
    """Returns when something holds; fails, and ends the processes, if one of them ends before it does."""
    if not comes_to_pass(processes, holds):
        for process in processes:
            process.kill()
        pytest.fail(f"it did not come to pass: {[process.communicate() for process in processes]}")


def only_line(err: str) -> str:
    """The one line, printed for those who run this with -s."""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    print(f"\n{err.strip()}")
    return err


def run(workdir: Workdir, changes: dict[str, Any], *, status: int = 0) -> tuple[str, str]:
    """The command in a process of its own; workers that outlived it would hold the pipes open."""
    process = start(workdir, changes)
    ((out, err),) = finish([process])
    assert process.returncode == status, out + err
    return out, err


def refused_run(workdir: Workdir, changes: dict[str, Any]) -> str:
    return only_line(run(workdir, changes, status=2)[1])


def refused(*words: str) -> str:
    """The command in this process, for what it refuses before there is anything to compile."""
    with contextlib.chdir(ROOT):
        return refused_command(train.main, *words)


def refused_here(workdir: Workdir, changes: dict[str, Any]) -> str:
    """`refused` with the settings of `refused_run`."""
    return refused(*arguments(workdir, changes))
