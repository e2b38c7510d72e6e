"""Several processes: a signal to one ends all at one step, a dead one ends the others; how they find each other."""

import http.server
import json
import pathlib
import random
import re
import signal
import subprocess
import threading
import time
from typing import Any, ClassVar

import pytest

from tests.commands import LONGEST, arguments, finish, is_error, launch_pair, start, start_pair, wait_for
from topformer_jax.checkpoints import CheckpointStore
from topformer_jax.runtime import processes
from topformer_jax.runtime.errors import UserError

# Nothing is logged, saved or scored before the end: only the signal asks for it.
CHANGES: dict[str, Any] = {
    "schedule.steps": 100_000,
    "log_every": 100_000,
    "checkpoint_every": 100_000,
    "evaluate_every": 100_000,
}
# Our line, or that of JAX's coordination service where it notices first.
LOST = re.compile("another process of this run ended or stopped answering|another task died")


def test_a_signal_to_one_ends_both_at_one_step(tmp_path: pathlib.Path) -> None:
    """The stop waits for no log step, and the newest checkpoint is of the step that it names."""
    pair = start_pair(tmp_path, CHANGES, "--profile", "1:2", devices=1)
    wait_for(pair, lambda: bool(list(tmp_path.glob("profile/**/*.xplane.pb"))))  # its file says that they train
    pair[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    outputs = finish(pair)
    print(f"SIGTERM to process 1: both ended after {time.monotonic() - began:.1f} s")
    assert [process.returncode for process in pair] == [128 + signal.SIGTERM] * 2, outputs
    assert not any(is_error(err) for _, err in outputs), outputs
    store = CheckpointStore(tmp_path / "checkpoints", 1)
    step = store.latest
    store.close()
    assert step is not None
    assert f"stopped at step {step} and saved; the same command resumes from here" in outputs[0][0]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == step


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_dead_process_ends_the_other(tmp_path: pathlib.Path, number: int) -> None:
    pair = start_pair(tmp_path, CHANGES | {"log_every": 1}, devices=1)
    wait_for(pair, lambda: count_steps(tmp_path) >= 3)
    pair[number].kill()
    began = time.monotonic()
    outputs = finish(pair)
    print(f"SIGKILL to process {number}: the other ended after {time.monotonic() - began:.1f} s")
    other = pair[1 - number]
    assert other.returncode not in (0, None)
    assert LOST.search(outputs[1 - number][1]), outputs


def test_devices_that_do_not_start_are_one_line(tmp_path: pathlib.Path) -> None:
    pair = launch_pair("train", *arguments(tmp_path, CHANGES), platform="nowhere")
    outputs = finish(pair)
    for process, (_, err) in zip(pair, outputs, strict=True):
        assert process.returncode == 2, outputs
        # JAX's C++ code may print first that the other process has ended.
        assert re.fullmatch(r"error: JAX does not start on .*", err.splitlines()[-1]), err
        assert "Traceback" not in err


def count_steps(workdir: pathlib.Path) -> int:
    log = workdir / "metrics.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


@pytest.mark.slow
def test_no_signal_is_lost_while_steps_are_saved(tmp_path: pathlib.Path) -> None:
    """At any moment between two saves, in runs whose steps are counted otherwise than the moments of a start."""
    changes = CHANGES | {"checkpoint_every": 1, "log_every": 1}
    dice = random.Random(0)
    for _ in range(8):
        steps = count_steps(tmp_path) + 3
        pair = start_pair(tmp_path, changes, devices=1)
        wait_for(pair, lambda steps=steps: count_steps(tmp_path) >= steps)  # type: ignore[misc]
        time.sleep(dice.uniform(0, 0.5))
        dice.choice(pair).send_signal(signal.SIGTERM)
        outputs = finish(pair)
        assert [process.returncode for process in pair] == [128 + signal.SIGTERM] * 2, outputs


def catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the process has a handler for a signal."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_nobody_waits_for_a_compilation(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal before the first step ends the run at once, whatever the main thread does."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    process = start(tmp_path, CHANGES)
    while process.poll() is None and not catches(process, signal.SIGTERM):
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LONGEST)
    assert process.returncode == 128 + signal.SIGTERM
    assert not is_error(err), err
    assert out.endswith("stopped before a step was computed; start the same command again\n")
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("signalled", [[1], pytest.param([0, 1], marks=pytest.mark.slow)])
def test_two_processes_leave_a_compilation_together(
    tmp_path: pathlib.Path, signalled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither takes the other for dead, and both say the same."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    pair = start_pair(tmp_path, CHANGES, devices=1)
    while all(process.poll() is None for process in pair) and not list(tmp_path.glob("configs/*.json")):
        time.sleep(0.01)
    time.sleep(0.5)
    for number in signalled:
        pair[number].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=LONGEST) for process in pair]
    assert [process.returncode for process in pair] == [128 + signal.SIGTERM] * 2, outputs
    assert not any(is_error(err) for _, err in outputs), outputs
    assert outputs[0][0].endswith("stopped before a step was computed; start the same command again\n")
    assert not (tmp_path / "run.lock").exists()


class _Metadata(http.server.BaseHTTPRequestHandler):
    """The part of a TPU machine's metadata server that says who is in its slice."""

    values: ClassVar = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:b:10.0.0.1,c:d:10.0.0.2",
        "tpu-env": "",
    }

    def do_GET(self) -> None:
        value = self.values.get(self.path.rpartition("/")[2])
        self.send_response(404 if value is None else 200)
        self.end_headers()
        self.wfile.write((value or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("hosts", "expected"), [("a:b:10.0.0.1,c:d:10.0.0.2", True), ("a:b:10.0.0.1", False)])
def test_a_tpu_machine_asks_for_its_slice(monkeypatch: pytest.MonkeyPatch, hosts: str, expected: bool) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setitem(_Metadata.values, "worker-network-endpoints", hosts)
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    try:
        assert processes._knows_others() == expected
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("coordinator", "count", "message"),
    [("127.0.0.1:1", None, "--process-id go together"), ("127.0.0.1", 2, "expected HOST:PORT")],
)
def test_half_an_address_is_refused(coordinator: str, count: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        processes.start_processes(coordinator, count, count and 0)
