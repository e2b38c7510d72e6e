"""The folder of a run: kept for one run, its files in a bucket as they grow."""

import json
import os
import pathlib
import re

import pytest

from tests import cloud, machines
from tests.bucket import Bucket, bucket, storage
from tests.commands import LONGEST, only_line, refused_here
from topformer_jax.runtime import files, logs
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import run_folder
from topformer_jax.training.run_folder import LEASE, Lease, RunFolder

__all__ = ["bucket", "storage"]


def test_a_crashed_run_leaves_the_folder(tmp_path: pathlib.Path) -> None:
    """The kernel keeps a dead process until its parent asks for its status, which some containers' first never do."""
    with machines.start_here(HOLDER, tmp_path) as process:
        assert machines.read_line(process) == "there"
        process.kill()
        place = pathlib.Path(f"/proc/{process.pid}")
        cloud.wait_until(
            lambda: len([*(place / "task").iterdir()]) == 1 and "State:\tZ" in (place / "status").read_text()
        )
        assert json.loads((tmp_path / LEASE).read_text())["pid"] == process.pid
        Lease(tmp_path).release()


HOLDER = """
import pathlib, sys, time
from topformer_jax.training.run_folder import Lease
Lease(pathlib.Path(sys.argv[1]), renew_seconds=0.2)
print("there")
time.sleep(1000)
"""


def write_lease_of_another_machine(folder: files.Path, boot: str = "another") -> dict:
    record = {"run": "other", "host": "elsewhere", "boot": boot, "pid": 1, "renewals": 3}
    files.write_file(folder / LEASE, json.dumps(record))
    return record


@pytest.mark.parametrize(("boot", "has_lock"), [("another", True), ("", True), ("own", True), ("own", False)])
def test_a_lease_expires_where_the_kernel_does_not_tell(
    tmp_path: pathlib.Path,
    boot: str,
    has_lock: bool,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On another machine or macOS, whose kernels have no names, for another mount's lock, and without a lock."""
    write_lease_of_another_machine(tmp_path, boot)
    monkeypatch.setattr(files, "read_boot_id", lambda: boot and "own")
    if not has_lock:
        monkeypatch.setattr(run_folder, "_lock_folder", lambda _: None)
    Lease(tmp_path, expired_seconds=0.2).release()
    assert "was used by process 1 on elsewhere: waiting 0 s" in capsys.readouterr().out


def test_a_renewed_lease_is_respected(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = write_lease_of_another_machine(tmp_path)

    def renew(_: float) -> None:
        files.write_file(tmp_path / LEASE, json.dumps(record | {"renewals": 4}))

    monkeypatch.setattr(run_folder.time, "sleep", renew)
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere"):
        Lease(tmp_path, expired_seconds=60.0)


def test_who_was_taken_over_ends(tmp_path: pathlib.Path) -> None:
    process = machines.start_here(HOLDER, tmp_path)
    assert machines.read_line(process) == "there"
    write_lease_of_another_machine(tmp_path)
    _, err = process.communicate(timeout=LONGEST)
    assert process.returncode == 2
    assert "was taken over by process 1 on elsewhere: this run ends" in only_line(err)
    assert json.loads((tmp_path / LEASE).read_text())["run"] == "other"


def test_logs_grow_in_the_bucket(bucket: Bucket) -> None:
    with RunFolder(bucket / "run", 3600) as folder:
        folder.open()
        assert folder.local != folder.path
        log = logs.RunLog(folder.local, 0, 10, active=True)
        log.log_evaluation(1, {"miou": 0.5})
        assert folder.upload()
        assert len((bucket / "run/metrics.jsonl").read_text().splitlines()) == 1
        log.log_evaluation(2, {"miou": 0.6})
        log.close()
        bucket.set_faults()
        assert folder.upload()
        assert folder.upload()
        # What has changed: metrics.jsonl, and TensorBoard's events; a request begins an upload, another one is it.
        sent = [line for line in bucket.set_faults() if line.startswith("POST")]
        assert len(sent) == 4
        assert len(list((bucket / "run/tensorboard").iterdir())) == 1
    assert not folder.local.exists()
    assert [name.name for name in (bucket / "run").iterdir() if name.name == LEASE] == []

    with RunFolder(bucket / "run", 3600) as folder:
        folder.open()
        records = logs.read_records(bucket / "run/metrics.jsonl")
        logs.RunLog(folder.local, 1, 10, records, active=True).close()
    assert [record["step"] for record in logs.read_records(bucket / "run/metrics.jsonl")] == [1]
    assert len(list((bucket / "run/tensorboard").iterdir())) == 2


def test_a_network_that_fails_makes_files_late(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with RunFolder(bucket / "run", 3600) as folder:
        folder.open()
        (folder.local / "picture.png").write_bytes(b"1")
        bucket.set_faults(fail=1000, status=400)
        assert not folder.upload()
        assert not folder.upload()
        assert capsys.readouterr().out.count("late: cannot write into gs://") == 1
        bucket.set_faults()
        assert folder.upload()
        assert (bucket / "run/picture.png").read_bytes() == b"1"
        (folder.local / "picture.png").write_bytes(b"22")
        bucket.set_faults(fail=1000, status=400)
        with pytest.raises(UserError, match=r"its newest files are in /.*: copy them"):
            folder.close(0.0)
        assert (folder.local / "picture.png").read_bytes() == b"22"
        bucket.set_faults()


@pytest.mark.parametrize(
    ("path", "faults", "expected"),
    [
        ("gs://no-such-bucket/run", {}, "there is no such bucket or object"),
        ("run", {"fail": 1000, "status": 403}, "this account has no permission"),
        ("run", {"fail": 1000, "status": 503}, "no connection to the bucket"),
    ],
)
def test_a_bucket_that_cannot_be_written(bucket: Bucket, path: str, faults: dict, expected: str) -> None:
    target = files.as_path(path) if "://" in path else bucket / path
    bucket.set_faults(**faults)
    with pytest.raises(UserError, match=f"cannot write into {target}: .*{expected}.*; name another --workdir"):
        RunFolder(target, 60).open()


def test_a_storage_that_is_unknown() -> None:
    with pytest.raises(UserError, match="nowhere://x is in no known storage: expected gs://BUCKET/FOLDER"):
        files.as_path("nowhere://x")


def test_a_request_is_repeated_while_the_server_fails(bucket: Bucket) -> None:
    bucket.set_faults(fail=2, status=503)
    files.write_file(bucket / "file", "text")
    assert (bucket / "file").read_text() == "text"


def test_a_second_run_is_refused(tmp_path: pathlib.Path) -> None:
    lease = Lease(tmp_path)
    line = refused_here(tmp_path, {})
    assert re.search(rf"is in use by process {os.getpid()} on .*: give another --workdir", line)
    lease.release()
    assert not (tmp_path / LEASE).exists()
    lease = Lease(tmp_path)
    write_lease_of_another_machine(tmp_path)  # which took over while this one slept
    lease.release()
    assert json.loads((tmp_path / LEASE).read_text())["run"] == "other"
