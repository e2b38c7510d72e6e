"""No moment of a run has fewer complete checkpoints than the one before: a watcher polls the folder, and kills.

TOPFORMER_KILLS=25 pytest --all -n0 -s tests/test_lost_steps.py kills 200 trainings; it prints what it has seen.
"""

import json
import os
import pathlib
import random
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.bucket import Bucket, bucket, storage
from tests.commands import comes_to_pass, run_here, start, start_pair
from tests.test_processes import CHANGES as LONG

__all__ = ["bucket", "storage"]

KILLS = int(os.environ.get("TOPFORMER_KILLS", "3"))  # of each place, number of processes and max_to_keep
CHANGES = LONG | {"checkpoint_every": 1, "evaluate_every": 1, "log_every": 1, "upload_every": 1}
Listing = tuple[dict[int, int], set[str]]  # files of each complete step; the names of unfinished ones


def list_disk(workdir: pathlib.Path) -> Listing:
    """Orbax commits a step by renaming its folder."""
    complete, unfinished = {}, set()
    names = os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
    for name in names:
        if name.isdigit():
            files = [file for _, _, found in os.walk(workdir / "checkpoints" / name) for file in found]
            complete[int(name)] = len(files)
        elif "orbax-checkpoint-tmp" in name:
            unfinished.add(name)
    return {step: count for step, count in complete.items() if count}, unfinished


def list_bucket(workdir: Any) -> Listing:
    """Orbax commits a step by an object of its own, `commit_success.txt`."""
    name, _, prefix = f"{workdir}/checkpoints/".removeprefix("gs://").partition("/")
    server = os.environ["STORAGE_EMULATOR_HOST"]
    query = urllib.parse.urlencode({"prefix": prefix, "fields": "items(name)"})
    with urllib.request.urlopen(f"{server}/storage/v1/b/{name}/o?{query}") as answer:
        objects = [item["name"].removeprefix(prefix) for item in json.load(answer).get("items", ())]
    files: dict[str, int] = {}
    for path in objects:
        files[path.partition("/")[0]] = files.get(path.partition("/")[0], 0) + 1
    complete = {step for step in files if step.isdigit() and f"{step}/commit_success.txt" in objects}
    return {int(step): files[step] for step in complete}, {s for s in files if s.isdigit()} - complete


class Watcher:
    """Looks at the complete steps of a run again and again, in a thread.

    A step may go only when newer ones are complete: the newest step never becomes an older one, and `keep` steps stay
    once there were as many. A step that has fewer files than at first is not complete.

    Attributes:
        moments: the number of looks.
        losses: what was wrong, each time that it began.
        whole: the complete steps at the last look.
        newest: the newest step that was ever complete, 0 before.
        seen: all steps that were ever complete.
        begun: the names of all unfinished steps that were seen.
    """

    def __init__(self, look: Callable[[], Listing], keep: int):
        self.moments, self.newest = 0, 0
        self.losses: list[str] = []
        self.whole: set[int] = set()
        self.seen: set[int] = set()
        self.begun: set[str] = set()
        self._look, self._keep = look, keep
        self._files: dict[int, int] = {}
        self._most = 0
        self._is_losing = False
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def wait_for_looks(self) -> None:
        """Returns when what is there now has been judged: a look is judged after the next one."""
        seen = self.moments
        while self._thread.is_alive() and self.moments < seen + 3:
            time.sleep(0.01)

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(0.001):
                self._note(*self._look())
        except Exception as error:
            self._error = error

    def _note(self, files: dict[int, int], unfinished: set[str]) -> None:
        self._files = {step: max(self._files.get(step, 0), count) for step, count in files.items()}
        new = files.keys() - self.seen
        self.seen |= new
        self._judge(self.whole | new)  # a step that was committed during the last look could be missing in it
        self.whole = {step for step, count in files.items() if count == self._files[step]}
        self.begun |= unfinished
        self.moments += 1

    def _judge(self, steps: set[int]) -> None:
        newest = max(steps, default=0)
        is_losing = newest < self.newest or len(steps) < min(self._keep, self._most)
        if is_losing and not self._is_losing:
            self.losses.append(f"{sorted(steps)} after step {self.newest} was complete")
        self._is_losing = is_losing
        self.newest, self._most = max(newest, self.newest), max(len(steps), self._most)


def test_no_step_goes_while_it_is_scored(tmp_path: pathlib.Path) -> None:
    """Saved before the first evaluation of the process, and not written again for the score."""
    changes = {"model.depths": 1, "checkpoint_every": 100, "evaluate_every": 3, "max_to_keep": 1}
    with Watcher(lambda: list_disk(tmp_path / "run"), 1) as watcher:
        run_here(tmp_path / "run", changes)
        watcher.wait_for_looks()
    print(f"\n{watcher.moments} moments watched: {watcher.losses or 'no step lost'}")
    assert 6 in watcher.whole
    assert watcher.losses == []


class Start:
    """The processes of one start of the training, and what the first one prints."""

    def __init__(self, workdir: Any, keep: int, processes: int):
        changes = CHANGES | {"max_to_keep": keep}
        self.processes = start_pair(workdir, changes) if processes == 2 else [start(workdir, changes)]
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(stream,), daemon=True)
            for number, process in enumerate(self.processes)
            for stream, lines in (
                (process.stdout, self.lines if number == 0 else []),
                (process.stderr, self.errors),
            )
        ]
        for reader in self._readers:
            reader.start()

    def resumed_from(self) -> str:
        """The step, 0 for fresh weights; empty if it ends before it has said so."""
        said = re.compile(r"starting +from (?:checkpoint (\d+)|fresh weights)")
        comes_to_pass(self.processes, lambda: any(map(said.match, self.lines)))
        return next((found[1] or "0" for found in map(said.match, self.lines) if found), "")

    def scores(self) -> dict[int, float]:
        """The scores of the steps that have been evaluated."""
        found = [re.search(r"step (\d+)/\d+  miou (\S+)", line) for line in self.lines]
        return {int(each[1]): float(each[2]) for each in found if each}

    def kill(self, seconds: float) -> None:
        """Kills the processes one after the other, and reads the rest of what they say."""
        for process in self.processes:
            process.kill()
            time.sleep(seconds)
        for reader in self._readers:
            reader.join()
        for process in self.processes:
            process.communicate()


def wait_for_moment(kind: int, begun: Start, watcher: Watcher, dice: random.Random) -> None:
    """Until the first score, the first unfinished step or some score after that; or until a step is missing."""
    lost, unfinished = len(watcher.losses), set(watcher.begun)
    scored = dice.randint(2, 4)
    reached: Callable[[], bool] = [
        lambda: bool(begun.scores()),
        lambda: bool(watcher.begun - unfinished),
        lambda: len(begun.scores()) >= scored,
    ][kind]
    comes_to_pass(begun.processes, lambda: len(watcher.losses) > lost or reached())
    time.sleep(dice.choice([0.0, dice.uniform(0, 0.5)]))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_kills_lose_no_step(
    place: str, processes: int, keep: int, bucket: Bucket, tmp_path: pathlib.Path
) -> None:
    workdir: Any = (bucket.root if place == "bucket" else tmp_path) / "run"
    look = list_bucket if place == "bucket" else list_disk
    dice = random.Random(f"{place} {processes} {keep}")
    lost: list[str] = []
    scores: dict[int, float] = {}
    with Watcher(lambda: look(workdir), keep) as watcher:
        for number in range(KILLS + 1):
            newest = watcher.newest
            begun = Start(workdir, keep, processes)
            resumed = begun.resumed_from()
            if resumed and number < KILLS:
                wait_for_moment(number % 3, begun, watcher, dice)
            begun.kill(dice.choice([0.0, dice.uniform(0, 0.2)]))
            watcher.wait_for_looks()
            if resumed != str(newest):
                lost.append(f"{newest} was complete, it resumes from {resumed or begun.errors}")
            if not resumed:
                break
            scores |= begun.scores()
            # A score is printed while its step is still written: a step that never was complete cannot be lost.
            scored = {step: score for step, score in scores.items() if step in watcher.seen}
            best = {step for step, score in scored.items() if score == max(scored.values())}
            if best and not best & watcher.whole:
                lost.append(f"step {best} had the best score, {sorted(watcher.whole)} are left")
    print(
        f"\n{place}, {processes} processes, max_to_keep {keep}: {watcher.moments} moments watched, {number} kills, "
        f"up to step {watcher.newest}; steps were missing {len(watcher.losses)} times, restarts lost {len(lost)}"
    )
    assert (watcher.losses, lost) == ([], [])
