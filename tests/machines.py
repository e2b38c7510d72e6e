"""Processes on hosts of their own, where each is process 1, as in pods.

They are namespaces of this kernel, and need the right to make them; a test is skipped where they cannot be made.
"""

import pathlib
import subprocess
import sys
import uuid
from typing import Any

import pytest

from tests.commands import LONGEST, ROOT

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def make_host(folder: pathlib.Path, lock: pathlib.Path | None = None) -> tuple[str, ...]:
    """What makes a host of a new namespace: a boot id of its own, and perhaps locks that do not reach others."""
    folder.mkdir()
    (folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
    (folder / "lock").touch()
    bindings = {folder / "boot_id": BOOT_ID} | ({folder / "lock": lock} if lock else {})
    return tuple(f"mount --bind '{own}' '{place}'" for own, place in bindings.items())


def start(program: str, mounts: tuple[str, ...], *words: Any) -> subprocess.Popen[str]:
    """A Python program on another host, where it is process 1."""
    flags = ["--pid", "--fork", "--kill-child", "--mount-proc"]
    shell = ["sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
    if subprocess.run(["unshare", *flags, *shell, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make namespaces")
    return _start(["unshare", *flags, *shell], program, words)


def start_here(program: str, *words: Any) -> subprocess.Popen[str]:
    """The same on this machine."""
    return _start([], program, words)


def _start(prefix: list[str], program: str, words: tuple[Any, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-u", "-c", program, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints, or all that it says of its end."""
    assert process.stdout
    return process.stdout.readline().strip() or "".join(process.communicate(timeout=LONGEST))


def run_at_once(programs: list[subprocess.Popen[str]]) -> None:
    """Lets programs go on that print "ready" before their input(); fails with what they say if one of them fails."""
    for process in programs:
        assert read_line(process) == "ready"
    for process in programs:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=LONGEST) for process in programs]
    assert [process.returncode for process in programs] == [0] * len(programs), results
