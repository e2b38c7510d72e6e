"""scripts/jobset.yaml, and docs/pods.md from its first command to its last, against fakes of what it calls."""

import pathlib
import re
import shutil

import yaml  # type: ignore[import-untyped]

from tests.cloud import UNTIL_PREEMPTED, Cloud, write_clone, write_program
from tests.commands import ROOT
from tests.test_docs import Block, blocks, commands_of, parser_of, split_program
from topformer_jax.runtime.cli import Parser
from topformer_jax.train import make_parser

# ---- GKE

HOST_CHIPS = {"tpu-v5-lite-podslice": 4}


def check_jobset(text: str, slices: int) -> None:
    """Raises if the manifest does not hold together: hosts and chips, one restart for all, the training command."""
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (group,) = manifest["spec"]["replicatedJobs"]
    assert group["replicas"] == slices
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    selector = pod["nodeSelector"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips == HOST_CHIPS[selector["cloud.google.com/gke-tpu-accelerator"]]
    rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * chips == job["completions"] * chips == rows * columns
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"][0]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy asks for

    install, train = container["command"][-1].replace("\\\n", " ").strip().splitlines()
    assert "[gcs]" in install
    assert train.startswith("exec ")  # SIGTERM goes to the training, not to a shell around it
    for entry in container["env"]:
        train = train.replace(f"${entry['name']}", entry["value"])
    _, words = split_program(train)
    args, settings = make_parser().parse(words)
    assert str(args.workdir).endswith("b_ade")
    assert settings is not None
    assert settings.batch_size % (rows * columns * slices) == 0


def test_the_jobset_holds_together() -> None:
    check_jobset((ROOT / "scripts/jobset.yaml").read_text(), 1)


# ---- docs/pods.md

PAGE = ROOT / "docs/pods.md"
OTHERS = {
    "python": 'echo "python $*" >>"$CLOUD/others"',
    "curl": 'echo "curl $*" >>"$CLOUD/others"',
    # Of what is applied from here, a copy for the test.
    "kubectl": """echo "kubectl $*" >>"$CLOUD/others"
        case "$*" in
        "apply -f -") cat >"$CLOUD/second.yaml" ;;
        "apply -f "*) cp "$3" "$CLOUD/first.yaml" ;;
        esac""",
}


def walk_through() -> str:
    """The page's `sh` blocks, which belong together; those marked `bash` stand alone, in tests/test_docs.py."""
    return "".join(block.text for block in blocks(PAGE) if block.language == "sh")


def test_the_walk_through_goes_through(tmp_path: pathlib.Path) -> None:
    cloud, code = Cloud(tmp_path / "cloud"), tmp_path / "code"
    write_clone(code)
    for name, text in OTHERS.items():
        write_program(cloud.folder / "bin" / name, text)
    shutil.copy(ROOT / "scripts/jobset.yaml", code / "scripts")
    (cloud.folder / "train").write_text(UNTIL_PREEMPTED)
    (cloud.folder / "preempt_at").write_text("5")
    done = cloud.bash("-euo", "pipefail", "-c", walk_through(), cwd=code)
    assert done.returncode == 0, done.stdout + done.stderr

    assert (cloud.folder / "preempted").exists()
    created = [call for call in cloud.calls("create") if "tpus" in call]
    assert [("queued" in call, "--spot" in call) for call in created] == [
        (True, True),
        (True, True),
        (False, False),
    ]
    assert done.stdout.count("the run is done") == 1
    assert not cloud.homes()  # nothing is left that costs money
    assert "--member=serviceAccount:123456789-compute@developer.gserviceaccount.com" in str(cloud.calls())
    others = (cloud.folder / "others").read_text()
    assert "--output gs://my-bucket/data\n" in others
    check_jobset((cloud.folder / "first.yaml").read_text(), 1)
    check_jobset((cloud.folder / "second.yaml").read_text(), 2)


def test_its_commands_have_the_flags_and_settings() -> None:
    commands = [command for command in commands_of(Block("bash", walk_through())) if split_program(command)[0]]
    assert len(commands) == 5
    for command in commands:
        program, words = split_program(command.replace("$BUCKET", "my-bucket"))
        parser = parser_of(program)
        if program == "topformer_jax.train":
            assert isinstance(parser, Parser)
            _, settings = parser.parse(words)
            assert settings is not None
            assert settings.batch_size % 8 == 0
            assert settings.schedule.steps * settings.batch_size == 2_560_000
        else:
            parser.parse_args(words)


def test_its_larger_batches_see_as_many_images() -> None:
    rows = re.findall(r"^\| [\d x]+: [^|]*\| (\d+)[^|]*\| ([\d,]+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 3
    assert {int(batch) * int(steps.replace(",", "")) for batch, steps in rows} == {2_560_000}
