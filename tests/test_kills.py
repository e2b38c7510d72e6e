"""Trainings of one or two processes, killed at random moments, end with the weights of an undisturbed one.

TOPFORMER_KILLS=25 pytest --all -n0 -s tests/test_kills.py kills 150 trainings.
"""

import functools
import os
import pathlib
import random
import subprocess
import time
from typing import Any

import pytest

from tests.bucket import Bucket, bucket, storage
from tests.commands import FOLDER, LONGEST, finish, free_port, outcome, start, start_pair
from tests.test_lost_steps import Watcher, list_bucket, list_disk
from tests.test_processes import LOST

__all__ = ["bucket", "storage"]

KILLS = int(os.environ.get("TOPFORMER_KILLS", "3"))


def have_met(number: int) -> bool:
    """Whether both processes are connected to a port; before that, one waits five minutes for the other."""
    rows = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{number:04X}") and row[3] == "01" for row in rows) >= 2


def kill(pair: list[subprocess.Popen[str]], victims: list[int]) -> None:
    """Kills some of the processes; the other one ends by itself."""
    for number in victims:
        pair[number].kill()
    outputs = finish(pair)
    for survivor in {*range(len(pair))} - {*victims}:
        # The last step may have been behind it.
        assert LOST.search(outputs[survivor][1]) or pair[survivor].returncode == 0, outputs[survivor]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shapes", "folder"])
@pytest.mark.parametrize(("place", "count", "workers"), [("disk", 1, 2), ("disk", 2, 2), ("bucket", 2, 0)])
def test_kills(
    place: str,
    count: int,
    workers: int,
    source: str,
    bucket: Bucket,
    tmp_path: pathlib.Path,
    drawn: pathlib.Path,
) -> None:
    """A watcher sees no moment at which a complete checkpoint is missing."""
    dice = random.Random(f"{place} {source} {count}")
    changes: dict[str, Any] = {
        "schedule.steps": 40,
        "checkpoint_every": 1,
        "evaluate_every": 10,
        "data.num_workers": workers,
        "upload_every": 1,
        **(FOLDER | {"data.root": drawn} if source == "folder" else {}),
    }

    def begin(workdir: Any, port: int | None = None) -> list[subprocess.Popen[str]]:
        return [start(workdir, changes)] if count == 1 else start_pair(workdir, changes, port=port)

    def kill_until_it_ends(workdir: Any, most: int) -> int:
        """Kills a run at random moments until it ends; returns the number of kills."""
        kills = 0
        while True:
            meeting = free_port()
            pair = begin(workdir, meeting)
            moment = time.monotonic() + (dice.uniform(0, latest) if kills < most else LONGEST)
            while time.monotonic() < moment and None in [process.poll() for process in pair]:
                time.sleep(0.02)
            if pair[0].poll() is not None:
                outputs = finish(pair)
                assert [process.returncode for process in pair] == [0] * count, outputs
                return kills
            some = ([0], [1], [0, 1]) if count == 2 and have_met(meeting) else (range(count),)
            kill(pair, [*dice.choice(some)])
            kills += 1

    began = time.monotonic()
    outputs = finish(begin(tmp_path / "undisturbed"))
    latest = time.monotonic() - began  # seconds after the start
    assert "done: " in outputs[0][0], outputs
    expected = outcome(tmp_path / "undisturbed")
    look, kills, runs = list_bucket if place == "bucket" else list_disk, 0, 0
    while kills < KILLS or not runs:
        workdir: Any = (bucket.root if place == "bucket" else tmp_path) / f"run{runs}"
        with Watcher(functools.partial(look, workdir), 3) as watcher:
            kills += kill_until_it_ends(workdir, KILLS - kills)
            watcher.wait_for_looks()
        assert watcher.losses == []
        assert outcome(workdir) == expected
        runs += 1
    print(f"\n{place}, {source}, {count} processes: {kills} kills, {runs} runs with the same weights and logs")
