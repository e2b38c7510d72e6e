"""A SLURM for tests: its own daemons on this machine, one node of 32 cores and 8 GPUs that are files.

Import `slurm` (and `daemons`, which it needs) into a test file to use it as a fixture. Where SLURM is not installed,
the test is skipped.
"""

import os
import pathlib
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.commands import LONGEST, ROOT, free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
# A job of `high` takes the place of one of `low`, which is queued again. Elsewhere KillWait is 30 and GraceTime less:
# a slow machine has time to save here, and tests count steps.
SETTINGS = """
ClusterName=tests
SlurmctldHost={host}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=300
MailProg=/bin/true
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 Gres=gpu:8
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=300 State=UP
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""


class Slurm:
    """The daemons, in a folder, and jobs of scripts/slurm.sh."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "VENV": str(folder),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts the daemons, and returns when the node takes jobs."""
        host = socket.gethostname().partition(".")[0]
        for part in ("state", "spool", "bin"):
            (self.folder / part).mkdir()
        for number in range(8):
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        gpus = [f"NodeName={host} Name=gpu File={self.folder}/gpu{number}\n" for number in range(8)]
        (self.folder / "gres.conf").write_text("".join(gpus))
        ports = {"controller_port": free_port(), "node_port": free_port()}
        (self.folder / "slurm.conf").write_text(SETTINGS.format(host=host, folder=self.folder, **ports))
        (self.folder / "bin/activate").write_text(f"PATH={pathlib.Path(sys.executable).parent}:$PATH\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        names = {name: f"{self.folder}/munge.{name}" for name in ("socket", "key", "pid", "log", "seed")}
        files = [f"--{name}-file={names[name]}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--force", "--foreground", f"--socket={names['socket']}", *files)
        self.wait_until(lambda: pathlib.Path(names["socket"]).exists())
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D")
        self.wait_until(lambda: "idle" in self._call("sinfo", "--noheader", "--format=%t"))

    def _start(self, program: str, *words: str) -> None:
        with open(self.folder / f"{program}.out", "wb") as out:
            path = shutil.which(program, path=PATH)
            assert path
            self._daemons.append(
                subprocess.Popen([path, *words], env=self.environment, stdout=out, stderr=subprocess.STDOUT)
            )

    def end_jobs(self) -> None:
        """Kills all jobs, also those that wait."""
        self._call("scancel", "--user=root", "--signal=KILL", "--full")
        self._call("scancel", "--user=root")
        self.wait_until(lambda: not self._call("squeue", "--noheader").strip())

    def close(self) -> None:
        """Ends the daemons."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait()

    def _call(self, program: str, *words: str) -> str:
        done = subprocess.run([program, *words], capture_output=True, text=True, env=self.environment, check=False)
        return done.stdout + done.stderr

    def wait_until(self, holds: Callable[[], bool], *jobs: "Job") -> None:
        """Returns when something holds; fails if a daemon ends or one of the jobs does before."""
        deadline = time.monotonic() + LONGEST
        while not holds():
            gone = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            ended = [job for job in jobs if job.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")]
            if gone or ended or time.monotonic() > deadline:
                if not gone and holds():
                    return
                said = [f"{job.describe()}\n{job.output}" for job in jobs]
                pytest.fail("\n".join(["it did not come to pass", *map(str, gone), *said]))
            time.sleep(0.1)

    def submit(self, *words: str, environment: dict[str, str] | None = None) -> "Job":
        """Queues a job: options of sbatch, then the script and its words."""
        output = self.folder / f"job{len(list(self.folder.glob('job*')))}.out"
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={output}", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self.environment | (environment or {}),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        output.touch()
        return Job(self, int(done.stdout), output)

    def train(self, *words: str, environment: dict[str, str] | None = None) -> "Job":
        """Queues scripts/slurm.sh for two processes, with the words of the training."""
        options = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=600")
        return self.submit(*options, "scripts/slurm.sh", *words, environment=environment)


class Job:
    """A job, and what it has printed."""

    def __init__(self, slurm: Slurm, number: int, output: pathlib.Path):
        self.number = number
        self._slurm, self._output = slurm, output

    def describe(self) -> str:
        return self._slurm._call("scontrol", "show", "job", str(self.number))

    def field(self, name: str) -> str:
        """What SLURM says of it."""
        found = re.search(rf"\b{name}=(\S*)", self.describe())
        assert found, self.describe()
        return found[1]

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        """How often it was queued again."""
        return int(self.field("Restarts"))

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def processes(self) -> list[int]:
        """The process ids of its tasks, by their numbers."""
        rows = [row.split() for row in self._slurm._call("scontrol", "listpids", str(self.number)).splitlines()]
        tasks = {row[4]: int(row[0]) for row in rows if row and row[2].isdigit() and row[4].isdigit()}
        return [tasks[number] for number in sorted(tasks)]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Returns when something holds; fails if the job ends before."""
        self._slurm.wait_until(holds, self)

    def wait_until_over(self) -> None:
        """Returns when it has ended, or has been queued again."""
        ended = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")

        def is_over() -> bool:
            return self.state in ended or (self.restarts > 0 and self.state == "PENDING")

        # SLURM calls a job completed for a moment while it queues it again.
        self._slurm.wait_until(is_over)
        time.sleep(1)
        self._slurm.wait_until(is_over)

    def update(self, **fields: str) -> None:
        words = [f"{name}={value}" for name, value in fields.items()]
        answer = self._slurm._call("scontrol", "update", f"jobid={self.number}", *words)
        assert not answer, answer

    def reach_time_limit(self) -> None:
        """Has its time end in less than the two minutes before which it is signalled."""
        hours, minutes, _ = self.field("RunTime").rpartition("-")[2].split(":")
        self.update(TimeLimit=str(int(hours) * 60 + int(minutes) + 2))

    def start_again(self) -> None:
        """Waits until it runs once more, as soon as its last start has left the node: SLURM waits for two minutes."""
        self.wait_until_over()
        assert self.state == "PENDING", f"{self.describe()}\n{self.output}"
        steps = rf"slurmstepd: \[{self.number}\."
        self.wait_until(lambda: subprocess.run(["pgrep", "-f", steps], capture_output=True).returncode != 0)
        self.update(StartTime="now", TimeLimit="600")
        self.wait_until(lambda: self.state == "RUNNING")

    def cancel(self, *words: str) -> None:
        assert not self._slurm._call("scancel", *words, str(self.number))


PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The daemons of a SLURM, for the tests of a file."""
    missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root here")
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def slurm(daemons: Slurm) -> Iterator[Slurm]:
    """A SLURM without jobs."""
    yield daemons
    daemons.end_jobs()
