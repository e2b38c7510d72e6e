"""No moment of a run has fewer complete checkpoints than the one before: a watcher polls the folder.

tests/test_kills.py watches killed runs too.
"""

import json
import os
import pathlib
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from tests.commands import run_here

Listing = dict[int, int]  # how many files each complete step has


def list_disk(workdir: pathlib.Path) -> Listing:
    """Orbax commits a step by renaming its folder."""
    complete = {}
    names = os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
    for name in names:
        if name.isdigit():
            files = [file for _, _, found in os.walk(workdir / "checkpoints" / name) for file in found]
            complete[int(name)] = len(files)
    return {step: count for step, count in complete.items() if count}


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
    return {int(step): files[step] for step in complete}


class Watcher:
    """Looks at the complete steps of a run again and again, in a thread.

    A step may go only when newer ones are complete: the newest step never becomes an older one, and `keep` steps stay
    once there were as many. A step that has fewer files than at first is not complete.

    Attributes:
        moments: the number of looks.
        losses: what was wrong, each time that it began.
        whole: the complete steps at the last look.
        newest: the newest step that was ever complete, 0 before.
    """

    def __init__(self, look: Callable[[], Listing], keep: int):
        self.moments, self.newest = 0, 0
        self.losses: list[str] = []
        self.whole: set[int] = set()
        self._seen: set[int] = set()
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
                self._note(self._look())
        except Exception as error:
            self._error = error

    def _note(self, files: Listing) -> None:
        self._files = {step: max(self._files.get(step, 0), count) for step, count in files.items()}
        new = files.keys() - self._seen
        self._seen |= new
        self._judge(self.whole | new)  # a step that was committed during the last look could be missing in it
        self.whole = {step for step, count in files.items() if count == self._files[step]}
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
    changes = {"checkpoint_every": 100, "evaluate_every": 3, "max_to_keep": 1}
    with Watcher(lambda: list_disk(tmp_path / "run"), 1) as watcher:
        run_here(tmp_path / "run", changes)
        watcher.wait_for_looks()
    print(f"\n{watcher.moments} moments watched: {watcher.losses or 'no step lost'}")
    assert 6 in watcher.whole
    assert watcher.losses == []
