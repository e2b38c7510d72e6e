"""A `gcloud` for tests/cloud.py: flags as in Google's reference, slices and hosts as folders, preemptions.

It takes the commands that scripts/tpu_pod.sh and docs/pods.md use, refuses flags that the reference does not list,
and writes each call into $CLOUD/calls. A host is a home folder in $CLOUD/hosts, in which ssh really runs its command.
Further files there say what happens: preempt_at holds the number of the ssh call at which the slice is lost, its
processes with it, or the name of a file: the slice is then lost at the first call that finds that. The fake then
makes the file preempted. stockouts holds how many creations fail for lack of capacity, of those not queued;
stockouts_later, how many after the preemption.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from typing import Any, NoReturn

CLOUD = pathlib.Path(os.environ["CLOUD"])
HOSTS = {"v5litepod-8": 1, "v5litepod-16": 4, "v5litepod-256": 64}  # VMs of a slice
RUNTIMES = ("v2-alpha-tpuv5-lite", "v2-alpha-tpuv5", "v2-alpha-tpuv6e", "tpu-ubuntu2204-base")
QUEUE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]  # states, one a look

# By command: the number of positional words (None: one or more) and the flags of its page in the gcloud reference, as
# "=flag" with a value, "flag" without, a "!" before what is required.
WIDE = "=account =billing-project =configuration =format help =impersonate-service-account quiet =verbosity =project"
RESERVED = "=reservation-host-folder =reservation-host-organization =reservation-host-project"
CREATE = (
    "async =boot-disk =data-disk =description internal-ips =labels =metadata =metadata-from-file =network =range "
    "reserved =scopes =service-account shielded-secure-boot spot =subnetwork =tags !=zone =accelerator-type "
    "=topology =type"
)
SSH = (
    "dry-run force-key-file-overwrite plain =ssh-key-file =strict-host-key-checking =worker =zone internal-ip "
    "=ssh-key-expiration =ssh-key-expire-after"
)
SHELL, COPY = "=ssh-flag =command =output-directory", "compress recurse =scp-flag"
QUEUED = "=batch-size =node tunnel-through-iap"
COMMANDS: dict[str, tuple[int | None, str]] = {
    "compute tpus tpu-vm create": (1, f"{CREATE} !=version preemptible =queue-count"),
    "compute tpus tpu-vm describe": (1, "!=zone"),
    "compute tpus tpu-vm delete": (1, "!=zone async"),
    "compute tpus tpu-vm ssh": (1, f"{SSH} {SHELL}"),
    "compute tpus tpu-vm scp": (None, f"{SSH} {COPY}"),
    "compute tpus queued-resources create": (
        1,
        f"{CREATE} !=runtime-version =node-id =node-count =node-prefix guaranteed =valid-after-duration "
        f"=valid-after-time =valid-until-duration =valid-until-time {RESERVED}",
    ),
    "compute tpus queued-resources describe": (1, "!=zone"),
    "compute tpus queued-resources list": (0, "!=zone =filter =limit =page-size =sort-by uri"),
    "compute tpus queued-resources delete": (1, "!=zone async force"),
    "compute tpus queued-resources ssh": (1, f"{SSH} {SHELL} {QUEUED}"),
    "compute tpus queued-resources scp": (None, f"{SSH} {COPY} {QUEUED}"),
    "compute tpus accelerator-types list": (0, "!=zone =filter =limit =page-size =sort-by uri"),
    "auth application-default login": (0, "no-browser no-launch-browser =client-id-file =scopes"),
    "config set": (2, "installation"),
    "services enable": (None, "async"),
    "projects describe": (1, ""),
    "projects create": (1, "enable-cloud-apis =folder =labels =name =organization set-as-default =tags"),
    "storage buckets create": (
        None,
        "=default-storage-class =location =placement public-access-prevention =retention-period "
        "=soft-delete-duration uniform-bucket-level-access enable-autoclass enable-hierarchical-namespace",
    ),
    "storage buckets add-iam-policy-binding": (1, "!=member !=role =condition =condition-from-file"),
    "storage ls": (None, "all-versions buckets etag full json long recursive readable-sizes"),
    "storage cp": (None, "recursive no-clobber gzip-local-all continue-on-error do-not-decompress"),
    "container clusters create": (
        1,
        "=zone =region =location =node-locations =num-nodes =machine-type =release-channel =scopes =workload-pool "
        "=cluster-version spot",
    ),
    "container clusters get-credentials": (1, "=zone =region =location internal-ip dns-endpoint"),
    "container node-pools create": (
        1,
        "!=cluster =zone =region =location =node-locations =num-nodes =machine-type =tpu-topology =scopes spot "
        "=service-account =placement-type =reservation =reservation-affinity",
    ),
}


def fail(line: str, status: int = 1) -> NoReturn:
    print(f"ERROR: (gcloud) {line}", file=sys.stderr)
    sys.exit(status)


def parse(argv: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, its positional words and its flags; exits with status 2 where gcloud would."""
    command = next((c for c in COMMANDS if argv[: len(c.split())] == c.split()), None)
    if command is None:
        fail(f"Invalid choice: {' '.join(argv)}", 2)
    count, text = COMMANDS[command]
    known = {word.strip("!="): word for word in f"{text} {WIDE}".split()}
    positional, flags = [], {}
    words = iter(argv[len(command.split()) :])
    for word in words:
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in known:
            fail(f"unrecognized arguments: {word}", 2)
        if "=" in known[name]:
            value = value if equals else next(words, "")
            if not value:
                fail(f"argument --{name}: expected one argument", 2)
        elif equals:
            fail(f"argument --{name}: ignored explicit argument {value!r}", 2)
        flags[name] = value
    if len(positional) != count and (count is not None or not positional):
        fail(f"{command} takes {count} words: {positional}", 2)
    missing = [name for name, word in known.items() if word.startswith("!") and name not in flags]
    if missing:
        fail(f"argument --{missing[0]}: Must be specified.", 2)
    return command, positional, flags


def check_values(command: str, flags: dict[str, str]) -> None:
    """Refuses values that the service would refuse, and flags that exclude each other."""
    if not re.fullmatch(r"[a-z]+-[a-z]+\d-[a-z]", flags.get("zone", "us-west4-a")):
        fail(f"there is no zone {flags['zone']}", 2)
    if flags.get("version", flags.get("runtime-version", RUNTIMES[0])) not in RUNTIMES:
        fail("INVALID_ARGUMENT: the runtime version does not exist", 2)
    if command.endswith(" create") and "accelerator-type" in flags and flags["accelerator-type"] not in HOSTS:
        fail("INVALID_ARGUMENT: the accelerator type does not exist", 2)
    if command == "compute tpus queued-resources create":
        if ("node-id" in flags) == ("node-count" in flags):
            fail("Exactly one of (--node-id | --node-count : --node-prefix) must be specified.", 2)
        if "node-count" in flags and int(flags["node-count"]) < 2:
            fail("INVALID_ARGUMENT: the node count of a multislice request must be at least 2", 2)
    for name in ("worker", "node"):
        if not re.fullmatch(r"all|\d+", flags.get(name, "0")):
            fail(f"--{name} cannot be {flags[name]}", 2)
    if flags.get("worker") == "all" and command.endswith(" ssh") and "command" not in flags:
        fail("Cannot ssh into multiple workers without --command", 2)


def read(name: str, default: Any) -> Any:
    file = CLOUD / name
    return json.loads(file.read_text()) if file.exists() else default


def write(name: str, value: Any) -> None:
    (CLOUD / name).write_text(json.dumps(value))


def homes(node: str) -> list[pathlib.Path]:
    folders = (CLOUD / "hosts" / node).glob("*")
    return sorted(folders, key=lambda folder: int(folder.name))


def remove_hosts(node: str) -> None:
    """What a machine that is switched off leaves behind: nothing."""
    for home in homes(node):
        pid = home / "topformer_run/pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        shutil.rmtree(home)


def preempt(slices: dict[str, Any]) -> None:
    for entry in slices.values():
        # A request shows it later than its nodes.
        entry["states"] = ["ACTIVE", "SUSPENDED"] if entry["queued"] else ["PREEMPTED"]
        entry["lost"] = True
        for node in entry["nodes"]:
            remove_hosts(node)
    write("slices", slices)
    write("preempted", True)
    write("stockouts", read("stockouts_later", 0))


def create(name: str, flags: dict[str, str], queued: bool) -> None:
    slices = read("slices", {})
    if name in slices:
        fail(f"ALREADY_EXISTS: Resource '{name}' already exists")
    if not queued and read("stockouts", 0) > 0:
        write("stockouts", read("stockouts", 0) - 1)
        fail('There is no more capacity in the zone "us-west4-a"')
    count = int(flags.get("node-count", "0"))
    nodes = [f"{flags['node-prefix']}-{i}" for i in range(count)] or [flags.get("node-id", name)]
    for node in nodes:
        for worker in range(HOSTS[flags["accelerator-type"]]):
            (CLOUD / "hosts" / node / str(worker)).mkdir(parents=True)
    slices[name] = {"queued": queued, "nodes": nodes, "states": QUEUE if queued else ["READY"]}
    write("slices", slices)


def find(name: str, queued: bool) -> dict[str, Any]:
    """The slice of a name; a node of a queued request is found by its own name as well."""
    for key, entry in read("slices", {}).items():
        if (key == name and entry["queued"] == queued) or (not queued and name in entry["nodes"]):
            return entry
    fail(f"NOT_FOUND: Resource 'projects/p/locations/us-west4-a/{name}' was not found")


def describe(name: str, flags: dict[str, str], queued: bool) -> None:
    entry = find(name, queued)
    states = entry["states"]
    form = flags.get("format")
    if form != ("value(state.state)" if queued else "value(state)"):
        fail(f"nothing is printed in the format {form}")
    node_state = "PREEMPTED" if "lost" in entry else "READY"
    print(states[0] if queued or states[0] not in ("ACTIVE", "SUSPENDED") else node_state)
    if queued and len(states) > 1:
        slices = read("slices", {})
        slices[name]["states"] = states[1:]
        write("slices", slices)


def delete(name: str, flags: dict[str, str], queued: bool) -> None:
    entry, slices = find(name, queued), read("slices", {})
    if queued and "force" not in flags and entry["states"][0] not in ("ACCEPTED", "FAILED", "SUSPENDED"):
        fail("FAILED_PRECONDITION: the queued resource has nodes")
    for node in entry["nodes"]:
        remove_hosts(node)
    del slices[name]
    write("slices", slices)


def chosen_homes(name: str, flags: dict[str, str], queued: bool) -> list[pathlib.Path]:
    """The hosts that --node and --worker name."""
    entry = find(name, queued)
    if "lost" in entry or entry["states"][0] not in ("READY", "ACTIVE"):
        fail(f"{name} is {entry['states'][0]}")
    nodes = entry["nodes"]
    if queued:
        nodes = nodes if flags.get("node", "0") == "all" else [nodes[int(flags.get("node", "0"))]]
    chosen = [homes(node) for node in nodes]
    if flags.get("worker", "0") != "all":
        chosen = [[folders[int(flags.get("worker", "0"))]] for folders in chosen]
    return [home for folders in chosen for home in folders]


def ssh(name: str, flags: dict[str, str], queued: bool) -> None:
    write("ssh_calls", read("ssh_calls", 0) + 1)
    when = read("preempt_at", 0)
    if when == read("ssh_calls", 0) or (
        isinstance(when, str) and os.path.exists(when) and not read("preempted", False)
    ):
        preempt(read("slices", {}))
        fail("Could not SSH into the instance.", 255)
    statuses = [
        subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=os.environ | {"HOME": str(home)}).returncode
        for home in chosen_homes(name, flags, queued)
    ]
    sys.exit(max(statuses))


def scp(words: list[str], flags: dict[str, str], queued: bool) -> None:
    name, _, place = words[-1].partition(":")
    for home in chosen_homes(name, flags, queued):
        for file in words[:-1]:
            shutil.copy(file, home / place)


def main() -> None:
    """One call."""
    with (CLOUD / "calls").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    command, words, flags = parse(sys.argv[1:])
    check_values(command, flags)
    queued, action = "queued-resources" in command, command.split()[-1]
    if command == "projects describe":
        print("123456789")
    elif command.startswith(("compute tpus tpu-vm", "compute tpus queued-resources")) and action != "list":
        if action == "scp":
            scp(words, flags, queued)
        else:
            {"create": create, "describe": describe, "delete": delete, "ssh": ssh}[action](words[0], flags, queued)


if __name__ == "__main__":
    main()
