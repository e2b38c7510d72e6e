"""Commands with tiny settings, in a process of their own or in this one, and what they say of mistakes."""

import contextlib
import io
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest

from topformer_jax import cli, train

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "batch_size": 4,
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
    settings = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    return ["--config", "configs/topformer_t_shapes.py", "--workdir", str(workdir), *settings]


def start(workdir: Workdir, changes: dict[str, Any], *flags: str, devices: int = 1) -> subprocess.Popen[str]:
    """The command in a process of its own; it finds what the tests have compiled."""
    return subprocess.Popen(
        [sys.executable, "-m", "topformer_jax.train", *arguments(workdir, changes), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
        },
    )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_pair(
    workdir: Workdir, changes: dict[str, Any], *flags: str, port: int | None = None, devices: int = 1
) -> list[subprocess.Popen[str]]:
    """Two processes of one training, which meet at a port."""
    flags = (*flags, "--coordinator", f"127.0.0.1:{port or free_port()}", "--processes", "2", "--process-id")
    return [start(workdir, changes, *flags, str(number), devices=devices) for number in range(2)]


def only_line(err: str) -> str:
    """The one line, printed for those who run this with -s."""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    print(f"\n{err.strip()}")
    return err


def run_check(
    recipe: str, settings: dict[str, Any], output: pathlib.Path, status: int, *flags: str
) -> tuple[str, str]:
    """The command that checks a data set in a process of its own: its stdout and stderr."""
    command = [sys.executable, "-m", "topformer_jax.check", "--config", recipe, "--output", str(output)]
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 300}
    done = subprocess.run([*command, *words, *flags], cwd=ROOT, env=environment, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def run(workdir: Workdir, changes: dict[str, Any], *, status: int = 0) -> tuple[str, str]:
    """The command in a process of its own; workers that outlived it would hold the pipes open."""
    process = start(workdir, changes)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == status, out + err
    return out, err


def refused_run(workdir: Workdir, changes: dict[str, Any]) -> str:
    return only_line(run(workdir, changes, status=2)[1])


def refused(*words: str) -> str:
    """The command in this process, for what it refuses before there is anything to compile."""
    err = io.StringIO()
    with (
        contextlib.chdir(ROOT),
        mock.patch.object(sys, "argv", ["train", *words]),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.run(train.main)
    assert end.value.code == 2
    return only_line(err.getvalue())


def refused_here(workdir: Workdir, changes: dict[str, Any]) -> str:
    """`refused` with the settings of `refused_run`, but for a batch that the devices of the tests divide."""
    return refused(*arguments(workdir, {"batch_size": 8} | changes))
