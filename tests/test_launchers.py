"""The launchers: TPU slices against a fake gcloud whose hosts run the scripts in earnest, and SLURM."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cloud import LONG, SCRIPT, TRAIN, UNTIL_PREEMPTED, Cloud, wait_until, write_clone
from tests.commands import LONGEST, ROOT
from tests.test_docs import SMALL


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "cloud")
    yield made
    made.clean()


@pytest.fixture
def code(tmp_path: pathlib.Path) -> str:
    write_clone(tmp_path / "code")
    return str(tmp_path / "code")


# ---- creation and deletion


VM = "gcloud compute tpus tpu-vm create top --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite"
QUEUED = "gcloud compute tpus queued-resources create top"
TYPE = "--accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite"
END = "--quiet --zone=us-west4-a"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], f"{VM} {END}"),
        (["--spot", "--on-demand"], f"{VM} {END}"),
        (["--spot"], f"{VM} --spot {END}"),
        (["--runtime-version=v2-alpha-tpuv6e"], f"{VM} {END}".replace("tpuv5-lite", "tpuv6e")),
        (["--project", "mine"], f"{VM} {END} --project=mine"),
        (["--queued"], f"{QUEUED} --node-id=top {TYPE} {END}"),
        (["--queued", "--spot"], f"{QUEUED} --node-id=top {TYPE} --spot {END}"),
        (["--slices", "2"], f"{QUEUED} --node-count=2 --node-prefix=top {TYPE} {END}"),
    ],
)
def test_a_dry_run_prints_a_line_that_gcloud_takes(cloud: Cloud, words: list[str], line: str) -> None:
    assert cloud.ok("create", "--dry-run", *words) == f"{line}\n"
    assert not cloud.calls()
    assert cloud.bash("-c", line).returncode == 0


@pytest.mark.parametrize("words", [[], ["--queued"], ["--slices=2"]])
def test_a_slice_is_created_seen_and_deleted(cloud: Cloud, words: list[str]) -> None:
    states = re.findall(r"top is (\w+)", cloud.ok("create", *words))
    assert states == (["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"] if words else ["READY"])
    assert cloud.calls("create")[0] == cloud.ok("create", "--dry-run", *words).strip().removeprefix("gcloud ")
    hosts = len(cloud.homes())
    assert hosts == (2 if "--slices=2" in words else 1)
    assert cloud.ok("status", *words) == f"top: {states[-1]}\n" + "run: none\n" * hosts
    cloud.ok("delete")
    assert not cloud.homes()
    assert cloud.ok("status") == "top: MISSING\n"
    assert "there is no top in us-west4-a" in cloud.ok("delete")


def test_further_flags_go_to_gcloud_which_checks_them(cloud: Cloud) -> None:
    cloud.ok("create", CREATE_FLAGS="--reserved --network=mine")
    assert "--reserved --network=mine" in cloud.calls("create")[0]
    status, line = cloud.fail("create", "--tpu", "other", CREATE_FLAGS="--netwrok=mine")
    assert status == 1
    assert line == "error: the slice was not created, see above; with --queued a request waits for capacity"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["crate"], "there is no action crate: create, setup, run, watch, status, logs, stop or delete"),
        (["run"], "there is no command to run"),
        (["create", "python"], "create takes no command: python"),
        (["create", "--sopt"], "there is no option --sopt: see bash scripts/tpu_pod.sh --help"),
        (["create", "--tpu"], "--tpu has no value"),
        (["create", "--tpu="], "the slice has no name: give --tpu NAME, or set TPU"),
        (["status", "--zone="], "there is no zone: give --zone ZONE, or set ZONE"),
        (["create", "--slices", "two"], "--slices cannot be 'two': expected a number from 1"),
        (["setup", "--folder", "a b"], "--folder cannot be 'a b': expected letters, digits and _./-"),
        (["create", "--accelerator-type="], "there is no type: give --accelerator-type TYPE, such as v5litepod-8"),
        (["create", "--accelerator-type=v9-8"], "no runtime version is known for v9-8: give --runtime-version"),
        (["setup", "--code", "/tmp"], "/tmp has no pyproject.toml: give --code the folder of a clone, or a git URL"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(cloud: Cloud, words: list[str], line: str) -> None:
    done = cloud.bash(SCRIPT, *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")
    assert not cloud.calls()


def test_help_needs_no_settings(cloud: Cloud) -> None:
    done = cloud.bash(SCRIPT, "--help", TPU="", ZONE="")
    assert (done.returncode, done.stderr) == (0, "")
    for action in ("create", "setup", "run", "watch", "status", "logs", "stop", "delete"):
        assert f"\n  {action} " in done.stdout


# ---- code and runs on hosts


def test_the_folder_in_front_of_me_goes_to_every_host(cloud: Cloud, code: str) -> None:
    cloud.ok("create", "--accelerator-type=v5litepod-16")
    cloud.ok("setup", "--code", code)
    assert len(cloud.homes()) == 4
    for home in cloud.homes():
        files = {file.name for file in (home / "topformer_jax").iterdir()}
        assert files == {"pyproject.toml", ".gitignore", "scripts", "new file.py", ".venv"}
        assert (home / "installed").read_text().splitlines() == [
            "sudo -n sh -c echo always >/sys/kernel/mm/transparent_hugepage/enabled",
            "python3 -m pip install --quiet --user uv",
            "python3 -m uv venv --quiet --seed --python 3.12 .venv",
            "python -m pip install --quiet --editable .[gcs] jax[tpu]",
        ]
    cloud.ok("setup", "--code", code)  # again: the environment is there
    assert (cloud.homes()[0] / "installed").read_text().count("uv venv") == 1


def test_hosts_clone_a_git_url(cloud: Cloud, code: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "-qam", "first"], cwd=code, check=True)
    cloud.ok("create")
    for _ in range(2):  # the second one pulls
        cloud.ok("setup", "--code", f"file://{code}")
    assert (cloud.homes()[0] / "topformer_jax/.git").is_dir()


def test_a_run_goes_on_in_the_background_until_it_is_stopped(cloud: Cloud, code: str) -> None:
    slices = ["--slices", "2"]
    (cloud.folder / "train").write_text(LONG)
    cloud.ok("create", *slices)
    assert "error: " not in cloud.ok("setup", "--code", code, *slices)
    assert cloud.ok("status", *slices).count("run: none") == 2
    cloud.ok("run", *slices, *TRAIN)
    wait_until(lambda: cloud.ok("logs", *slices, "--worker=all").count("step 1") == 2)
    status = cloud.ok("status", *slices)
    assert status.startswith("top: ACTIVE\n")
    assert status.count("run: running") == 2
    assert f"training: {' '.join(TRAIN[1:])}" in cloud.ok("logs", *slices)  # the words arrive as they were

    refused, line = cloud.fail("run", *slices, *TRAIN)
    assert refused != 0
    assert line.startswith("error: a run is going on already on ")
    assert cloud.ok("stop", *slices).count("the run has ended with status 143") == 2
    assert cloud.ok("logs", *slices).endswith("saved\n")
    assert cloud.ok("status", *slices).count("run: stopped") == 2
    assert cloud.ok("stop", *slices).count("no run is going on") == 2

    cloud.ok("run", *slices, *TRAIN)  # goes on
    assert cloud.ok("status", *slices).count("run: running") == 2


def test_a_host_that_is_shut_down_lets_the_run_save(cloud: Cloud, code: str) -> None:
    (cloud.folder / "train").write_text(LONG)
    cloud.ok("create")
    cloud.ok("setup", "--code", code)
    cloud.ok("run", *TRAIN)
    wait_until(lambda: "step 1" in cloud.ok("logs"))
    pid = int((cloud.homes()[0] / "topformer_run/pid").read_text())
    os.killpg(os.getpgid(pid), signal.SIGTERM)  # as a shutdown: to the training and to what waits for it
    wait_until(lambda: "run: 143" in cloud.ok("status"))
    assert cloud.ok("logs").endswith("saved\n")


def test_a_run_needs_an_installation(cloud: Cloud) -> None:
    cloud.ok("create")
    assert cloud.fail("run", *TRAIN)[0] != 0


# ---- watch


@pytest.mark.parametrize("words", [["--spot"], ["--slices=2", "--spot"]])
def test_watch_starts_anew_after_a_preemption(cloud: Cloud, code: str, words: list[str]) -> None:
    (cloud.folder / "train").write_text(UNTIL_PREEMPTED)
    (cloud.folder / "preempt_at").write_text("5")  # after a look, install, start and a look
    done = cloud.bash(SCRIPT, "watch", *words, "--code", code, *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.sub(r"^[-\d]+ [:\d]+ ", "", done.stdout, flags=re.MULTILINE).splitlines()
    assert [line for line in said if not re.search("WAITING|PROVISIONING", line)] == [
        "creating top",
        "installing on the hosts of top",
        "the run has started",
        "the hosts of top do not answer",
        "top is PREEMPTED: deleting it, to create it anew",
        "creating top",
        "installing on the hosts of top",
        "the run has started",
        "the run is done",
    ]
    assert len(cloud.calls("create")) == 2
    assert len(cloud.calls("delete")) == 1
    assert all("--spot" in call for call in cloud.calls("create"))
    for home in cloud.homes():
        assert (home / "starts").read_text().count("\n") == 1


@pytest.mark.slow
def test_watch_brings_a_real_training_through_a_preemption(cloud: Cloud, code: str, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    (cloud.folder / "train").write_text(f'PYTHONPATH={ROOT} exec {sys.executable} "$@"')
    (cloud.folder / "preempt_at").write_text(json.dumps(str(workdir / "checkpoints/20")))
    settings = SMALL | {"schedule.steps": 60, "checkpoint_every": 20, "evaluate_every": 60, "log_every": 10}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    train = [
        "python",
        "-m",
        "topformer_jax.train",
        "--config",
        "topformer_t_shapes",
        "--workdir",
        str(workdir),
    ]
    said = cloud.ok(
        "watch", "--spot", "--code", code, *train, *overrides, POLL_SECONDS="0.3", CUDA_VISIBLE_DEVICES=""
    )
    assert (cloud.folder / "preempted").exists()
    assert said.endswith("the run is done\n")
    assert len(cloud.calls("create")) == 2
    assert re.search(r"from checkpoint (20|40)\n", cloud.ok("logs"))
    assert '"step": 60' in (workdir / "metrics.jsonl").read_text()


def test_watch_waits_out_a_lack_of_capacity_only_after_a_preemption(cloud: Cloud, code: str) -> None:
    (cloud.folder / "train").write_text(UNTIL_PREEMPTED)
    (cloud.folder / "stockouts").write_text("1")
    status, line = cloud.fail("watch", "--spot", *TRAIN)  # somebody looks on who can decide for the queue
    assert status == 1
    assert line == "error: the slice was not created, see above; with --queued a request waits for capacity"
    (cloud.folder / "preempt_at").write_text("5")
    (cloud.folder / "stockouts_later").write_text("2")
    assert cloud.ok("watch", "--spot", "--code", code, *TRAIN).count("creating top") == 4
    assert len(cloud.calls("create")) == 5


@pytest.mark.parametrize(
    ("ends", "starts", "status", "line"),
    [
        ("exit 2", 1, 2, "the run ended with a mistake (status 2): bash scripts/tpu_pod.sh logs"),
        ("exit 7", 3, 7, "the run has crashed 3 times, at last with status 7: bash scripts/tpu_pod.sh logs"),
        ('[ $(wc -l <"$HOME/starts") -gt 3 ] || exit 143', 4, 0, ""),  # SIGTERM of a maintenance, say
    ],
)
def test_watch_starts_again_what_may_end_otherwise(
    cloud: Cloud, code: str, ends: str, starts: int, status: int, line: str
) -> None:
    (cloud.folder / "train").write_text(ends)
    done = cloud.bash(SCRIPT, "watch", "--code", code, *TRAIN)
    assert done.returncode == status
    assert done.stderr == (f"error: {line}\n" if line else "")
    assert (cloud.homes()[0] / "starts").read_text().count("\n") == starts
    assert len(cloud.calls("create")) == 1


def test_watch_joins_a_run_and_ends_when_it_is_stopped(cloud: Cloud, code: str) -> None:
    (cloud.folder / "train").write_text(LONG)
    cloud.ok("create")
    cloud.ok("setup", "--code", code)
    cloud.ok("run", *TRAIN)
    before = len(cloud.calls())
    words = ["bash", SCRIPT, "watch", "--code", code, *TRAIN]
    with subprocess.Popen(words, env=cloud.environment, stdout=subprocess.PIPE, text=True) as watch:
        wait_until(lambda: len(cloud.calls()) > before + 3)
        cloud.ok("stop")
        assert watch.communicate(timeout=LONGEST)[0].endswith("the run was stopped\n")
    assert watch.returncode == 143
    assert (cloud.homes()[0] / "starts").read_text().count("\n") == 1
    assert "installing" not in cloud.ok("logs")


def test_watch_prints_what_it_would_do(cloud: Cloud) -> None:
    lines = cloud.ok("watch", "--dry-run", "--slices=2", "--spot", *TRAIN).splitlines()
    assert not cloud.calls()
    commands = [shlex.split(line)[3:5] for line in lines if not line.startswith("#")]
    assert [action for _, action in commands] == ["describe"] * 2 + ["create", "scp"] + ["ssh"] * 3 + ["delete"]
    # As printed, gcloud takes them.
    cloud.ok("create", "--slices=2")
    for line in lines:
        if " delete " in line or " describe top '--format=value(state.state)'" in line:
            assert cloud.bash("-c", line).returncode == 0


# ---- SLURM


def test_slurm_signals_the_steps_in_time() -> None:
    text = (ROOT / "scripts/slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert options["signal"] == "TERM@120"  # without "B:", so that it reaches the training and not this shell alone
    assert {"requeue", "open-mode"} <= options.keys()
