"""scripts/slurm.sh under a real SLURM: what ends a training of two processes, and what is queued again.

`pytest --all -n0 -s tests/test_slurm.py` as root, where SLURM is installed: apt-get install slurm-wlm munge.
"""

import os
import pathlib
import re
import signal
import sys
import time

import pytest

from tests.cloud import write_program
from tests.commands import arguments, finish, outcome, start_pair
from tests.slurm import Job, Slurm, daemons, slurm
from tests.test_processes import CHANGES, LOST

__all__ = ["daemons", "slurm"]

LONG = CHANGES | {"log_every": 1}  # nothing is saved or scored before the end: only a signal asks for it


def resumed_from(job: Job) -> list[int]:
    """The step that each start of the job began at, 0 for random weights."""
    return [int(step or 0) for step in re.findall(r"starting +from (?:checkpoint (\d+)|random)", job.output)]


def stopped_at(job: Job) -> int:
    """The only step that it was stopped at and has saved."""
    (step,) = re.findall(r"^stopped at step (\d+) and saved", job.output, re.MULTILINE)
    return int(step)


def report(event: str, job: Job) -> None:
    lines = [line for line in job.output.splitlines() if re.match("starting|stopped|done|srun|slurm|error", line)]
    print(f"\n---- {event}: {job.state}, {job.restarts} restarts, exit {job.field('ExitCode')}")
    print("\n".join(lines))


def make_environment(folder: pathlib.Path, text: str) -> dict[str, str]:
    """The variables with which scripts/slurm.sh finds a program of this text for its `python`."""
    write_program(folder / "bin/python", text)
    (folder / "bin/activate").write_text(f"PATH={folder}/bin:$PATH\n")
    return {"VENV": str(folder)}


def test_what_is_queued_again(slurm: Slurm, tmp_path: pathlib.Path) -> None:
    """What SIGTERM has ended, unless it was scancel's; programs that take no time stand for the training."""
    until_signalled = "trap 'kill $!; exit 143' TERM; echo ready; sleep 100000 & wait"
    programs = {
        "signalled": until_signalled,
        "cancelled": until_signalled,
        "wrong": "exit 2",
        "done": "exit 0",
    }
    jobs = {
        name: slurm.train("--x", environment=make_environment(tmp_path / name, text))
        for name, text in programs.items()
    }
    signalled, cancelled = jobs["signalled"], jobs["cancelled"]
    signalled.wait_until(lambda: signalled.output.count("ready") == 2)
    signalled.cancel("--signal=TERM")
    cancelled.wait_until(lambda: cancelled.output.count("ready") == 2)
    cancelled.cancel()
    for job in jobs.values():
        job.wait_until_over()
    found = {name: (job.state, job.restarts) for name, job in jobs.items()}
    assert found == {
        "signalled": ("PENDING", 1),
        "cancelled": ("CANCELLED", 0),
        "wrong": ("FAILED", 0),
        "done": ("COMPLETED", 0),
    }
    assert jobs["wrong"].field("ExitCode") == "2:0"


@pytest.mark.slow
def test_the_time_limit_queues_it_again(slurm: Slurm, tmp_path: pathlib.Path) -> None:
    job = slurm.train(*arguments(tmp_path / "run", LONG))
    job.wait_until(lambda: "step 3/" in job.output)
    job.reach_time_limit()
    job.start_again()
    job.wait_until(lambda: len(resumed_from(job)) == 2)
    report("time limit", job)
    assert resumed_from(job) == [0, stopped_at(job)]
    assert "error: " not in re.sub(r"(srun|slurmstepd\S*): error: ", "", job.output)


@pytest.mark.slow
def test_a_preempted_job_ends_as_one_that_never_was(slurm: Slurm, tmp_path: pathlib.Path) -> None:
    """Another partition's job takes its place; then it goes on, to the same weights and losses."""
    changes = {"schedule.steps": 40, "checkpoint_every": 1}
    outputs = finish(start_pair(tmp_path / "whole", changes))
    assert "done: " in outputs[0][0], outputs
    job = slurm.train(*arguments(tmp_path / "run", changes))
    job.wait_until(lambda: "step 3/" in job.output)
    other = slurm.submit("--partition=high", "--gpus-per-node=8", "--wrap=true")
    job.start_again()
    other.wait_until_over()
    job.wait_until_over()
    assert job.state == "COMPLETED", job.output
    report("preemption", job)
    assert resumed_from(job) == [0, stopped_at(job)]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 4, 6])
def test_a_signal_while_one_task_compiles(slurm: Slurm, tmp_path: pathlib.Path, seconds: int) -> None:
    """One task finds its programs in a cache, the other has to compile them: they end for one reason.

    As SLURM does at a time limit, but at once. Whether a step was computed by then is the machine's affair.
    """
    cache = f"[ $SLURM_PROCID = 0 ] || export JAX_COMPILATION_CACHE_DIR={tmp_path}/cache"
    environment = make_environment(tmp_path, f'{cache}; exec {sys.executable} "$@"')
    job = slurm.train(*arguments(tmp_path / "run", LONG), environment=environment)
    job.wait_until(lambda: bool(resumed_from(job)))
    time.sleep(seconds)
    job.cancel("--signal=TERM")
    job.start_again()
    report(f"SIGTERM {seconds} s after the start", job)
    assert not LOST.search(job.output)
    assert len(re.findall("^stopped ", job.output, re.MULTILINE)) == 1


@pytest.mark.slow
def test_scancel_saves(slurm: Slurm, tmp_path: pathlib.Path) -> None:
    """A few steps after the signal, where a step takes a second or more and the next one that is logged is far."""
    changes = LONG | {"log_every": 20, "data.crop_size": "(256,256)", "data.shapes.size": 256}
    job = slurm.train(*arguments(tmp_path / "run", changes))
    job.wait_until(lambda: "step 20/" in job.output)
    began = time.monotonic()
    job.cancel()
    job.wait_until_over()
    report(f"scancel after step 20, {time.monotonic() - began:.0f} s", job)
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert 20 < stopped_at(job) < 35


@pytest.mark.slow
def test_a_killed_task_ends_the_job(slurm: Slurm, tmp_path: pathlib.Path) -> None:
    job = slurm.train(*arguments(tmp_path / "run", LONG))
    job.wait_until(lambda: "step 3/" in job.output)
    os.kill(job.processes[1], signal.SIGKILL)
    job.wait_until_over()
    report("a task was killed", job)
    assert (job.state, job.field("ExitCode"), job.restarts) == ("FAILED", "137:0", 0)
