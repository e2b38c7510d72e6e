"""A folder that stands for Google's cloud, in which scripts/tpu_pod.sh runs against tests/fake_gcloud.py."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.commands import LONGEST, ROOT

SCRIPT = str(ROOT / "scripts/tpu_pod.sh")
TRAIN = ["python", "-m", "topformer_jax.train", "--config", "topformer_t_shapes", "--workdir", "gs://b/it's"]
PROGRAMS = {
    "gcloud": f'exec {shlex.quote(sys.executable)} -ES {shlex.quote(str(ROOT / "tests/fake_gcloud.py"))} "$@"',
    "sudo": 'echo "sudo $*" >>"$HOME/installed"',
    # Python 3.10, as on Google's images: without uv there is no environment.
    "python3": """case "$*" in
        "-c "*) exit 1 ;;
        "-m pip install"*) touch "$HOME/uv" ;;
        "-m uv venv"*)
            [ -e "$HOME/uv" ] || exit 1
            mkdir -p .venv/bin && echo 'PATH="$PWD/.venv/bin:$PATH"' >.venv/bin/activate
            cp "$CLOUD/bin/host_python" .venv/bin/python ;;
        *) exit 1 ;;
        esac
        echo "python3 $*" >>"$HOME/installed" """,
    # What the environment on a host runs as python: pip, or the training that a test has written.
    "host_python": """case "$*" in
        "-m pip "*) echo "python $*" >>"$HOME/installed" ;;
        *) echo "training: $*"; echo "$PWD" >>"$HOME/starts"; exec bash "$CLOUD/train" "$@" ;;
        esac""",
}
# A run that goes on until SIGTERM, and then saves.
LONG = "trap 'kill $!; echo saved; exit 143' TERM; echo step 1; sleep 1000 & wait"
UNTIL_PREEMPTED = f'if [ ! -e "$CLOUD/preempted" ]; then {LONG}; fi'


def write_program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


class Cloud:
    """A folder that stands for Google's cloud, and calls of scripts/tpu_pod.sh in it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        for name, text in PROGRAMS.items():
            write_program(folder / "bin" / name, text)
        (folder / "train").write_text("exit 0")
        self.environment = os.environ | {
            "CLOUD": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "TPU": "top",
            "ZONE": "us-west4-a",
            "ACCELERATOR_TYPE": "v5litepod-8",
            "POLL_SECONDS": "0",
        }

    def bash(self, *words: str, cwd: str | pathlib.Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": LONGEST}
        return subprocess.run(["bash", *words], cwd=cwd, env=self.environment | settings, **options)

    def fail(self, *words: str, **settings: str) -> tuple[int, str]:
        """The status and the last line of stderr."""
        done = self.bash(SCRIPT, *words, **settings)
        return done.returncode, done.stderr.strip().splitlines()[-1]

    def ok(self, *words: str, **settings: str) -> str:
        done = self.bash(SCRIPT, *words, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def calls(self, action: str = "") -> list[str]:
        """The gcloud commands of an action so far."""
        file = self.folder / "calls"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [" ".join(words) for words in lines if action in words or not action]

    def homes(self) -> list[pathlib.Path]:
        return sorted((self.folder / "hosts").glob("*/*"))

    def clean(self) -> None:
        """Ends what still runs on the hosts."""
        (self.folder / "preempt_at").unlink(missing_ok=True)
        for slices in json.loads((self.folder / "slices").read_text()) if (self.folder / "slices").exists() else ():
            self.bash(SCRIPT, "delete", "--tpu", slices)


def write_clone(folder: pathlib.Path) -> None:
    """Writes a clone that is small to copy: the launchers, and files that git ignores, has lost or does not know."""
    (folder / "scripts").mkdir(parents=True)
    for name in ("tpu_pod.sh", "_tpu_slice.sh", "_tpu_host.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    (folder / "runs").mkdir()
    for name, text in {
        "pyproject.toml": "[project]",
        ".gitignore": "runs/",
        "runs/big": "",
        "gone.py": "",
    }.items():
        (folder / name).write_text(f"{text}\n")
    for words in ("init -q", "add -A"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True)
    (folder / "new file.py").write_text("")
    (folder / "gone.py").unlink()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST
    while not holds():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.01)
