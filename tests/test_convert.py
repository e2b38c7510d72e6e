"""The convert command: in both directions without loss, and without running what a file asks to run."""

import argparse
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.parity import same_states
from tests.reference import network as reference
from topformer_jax import checkpoints, config, load, models
from topformer_jax.checkpoints import torch_format
from topformer_jax.data.catalog import CATALOG

Find = Callable[[str], pathlib.Path]
ADE = {variant: f"configs/topformer_{variant[0]}_ade.py" for variant in ("tiny", "small", "base")}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, in the project's folder."""
    return subprocess.run(
        [sys.executable, "-m", "topformer_jax.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize("name", ["tiny", "small", "base", "tiny_init", "classification_tiny"])
def test_golden_round_trip_through_the_command(golden: Find, tmp_path: pathlib.Path, name: str) -> None:
    source = golden(f"checkpoints/{name}.pth")
    recipe = "configs/topformer_t_imagenet.py" if "class" in name else ADE[name.split("_")[0]]
    there = command("--config", recipe, "--checkpoint", source, "--output", tmp_path / "orbax")
    assert there.returncode == 0, there.stderr
    back = command("--checkpoint", tmp_path / "orbax", "--output", tmp_path / "back.pth")
    assert back.returncode == 0, back.stderr
    with torch.serialization.safe_globals([argparse.Namespace]):
        original = torch.load(source, weights_only=True)
    states = original.get("state_dict_ema", original["state_dict"])
    written = torch.load(tmp_path / "back.pth", weights_only=True)
    assert same_states(written["state_dict"], states)
    if "class" in name:
        return
    assert written["meta"]["iter"] == original["meta"]["iter"]
    assert written["meta"]["CLASSES"] == list(CATALOG["ade20k"].classes)
    assert len(written["meta"]["PALETTE"]) == 150
    network = reference.Segmenter(name.split("_")[0])
    network.load_state_dict(written["state_dict"], strict=True)


def test_classifier_as_a_start(pth: Callable, tmp_path: pathlib.Path) -> None:
    network = reference.Classifier("tiny", 11)
    reference.randomize(network, seed=0)
    source = pth({"state_dict_ema": network.state_dict(), "state_dict": {}, "args": argparse.Namespace(lr=1)})
    refused = command("--config", ADE["tiny"], "--checkpoint", source, "--output", tmp_path / "out")
    assert refused.returncode == 2
    assert "--init-from-classifier" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    flags = ("--output", tmp_path / "out", "--init-from-classifier")
    done = command("--config", ADE["tiny"], "--checkpoint", source, *flags)
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[1:-1]}
    taken = {"backbone.tpm", "backbone.trans"}
    assert {name for name, origin in table.items() if origin == str(source)} == taken
    fresh = {"backbone.SIM", "decode_head.conv_seg", "decode_head.linear_fuse"}
    assert {name for name, origin in table.items() if origin == "fresh"} == fresh
    model = load(config.ade20k("tiny"), tmp_path / "out")
    tensors = models.named_variables(model)
    for name, tensor in network.state_dict().items():
        if not name.startswith("head."):
            mine = torch_format.to_torch(np.asarray(tensors[f"backbone.{name}"].get_value()))
            np.testing.assert_array_equal(mine, tensor.numpy())
    again = models.named_variables(models.build(config.ade20k("tiny")))
    name = "backbone.SIM.1.global_act.conv.weight"
    np.testing.assert_array_equal(tensors[name].get_value(), again[name].get_value())


def test_new_head(pth: Callable, states: dict[str, torch.Tensor], tmp_path: pathlib.Path) -> None:
    source = pth({"meta": {"iter": 7, "CLASSES": ["a"]}, "state_dict": states})
    recipe = "configs/topformer_t_context60.py"
    done = command("--config", recipe, "--checkpoint", source, "--output", tmp_path / "out", "--new-head")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("fresh")] == [
        "decode_head.conv_seg"
    ]
    tensors, metadata = checkpoints.read_model(tmp_path / "out")
    assert tensors["decode_head.conv_seg.weight"].shape == (1, 1, 128, 60)
    name = "decode_head.linear_fuse.conv.weight"
    np.testing.assert_array_equal(torch_format.to_torch(tensors[name]), states[name].numpy())
    # Its iteration and its classes were another model's; the new ones are those of the data set.
    assert set(metadata["meta"]) == {"CLASSES", "PALETTE"}
    assert metadata["meta"]["CLASSES"] == list(CATALOG["context60"].classes)


class _Payload:
    """Runs a command when it is unpickled without care."""

    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_file_that_wants_to_run_code(pth: Callable, states: dict, tmp_path: pathlib.Path) -> None:
    source = pth({"state_dict": states, "meta": _Payload(tmp_path / "was here")})
    refused = command("--config", ADE["tiny"], "--checkpoint", source, "--output", tmp_path / "out")
    assert refused.returncode == 2
    assert "is refused: it asks for posix.mkdir" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "was here").exists()
    assert not (tmp_path / "out").exists()
    torch.load(source, weights_only=False)  # the payload is a real one
    assert (tmp_path / "was here").exists()


def test_without_torch(tmp_path: pathlib.Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from topformer_jax import cli, convert; cli.run(convert.main)"
    source = tmp_path / "x.pth"
    source.write_bytes(b"needs PyTorch to be read")
    arguments = ["--config", ADE["tiny"], "--checkpoint", str(source), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert "pip install 'topformer_jax[convert]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no.pth", "--config", ADE["tiny"], "--output", "{tmp}/o"], "no checkpoint no.pth"),
        (["--checkpoint", "no", "--config", ADE["tiny"], "--output", "{tmp}/o"], "no checkpoint no"),
        (["--checkpoint", "{tmp}", "--config", ADE["tiny"], "--output", "{tmp}/o"], "holds no checkpoint"),
        (
            ["--checkpoint", "{tmp}/junk.pth", "--config", ADE["tiny"], "--output", "{tmp}/o"],
            "or a damaged one",
        ),
        (
            ["--checkpoint", "{tmp}/cut.pth", "--config", ADE["tiny"], "--output", "{tmp}/o"],
            "or a damaged one",
        ),
        (["--checkpoint", "{tmp}/list.pth", "--config", ADE["tiny"], "--output", "{tmp}/o"], "holds a list"),
        (["--checkpoint", "{tmp}/odd.pth", "--config", ADE["tiny"], "--output", "{tmp}/o"], "no state dict"),
        (["--checkpoint", "{tmp}/keys.pth", "--config", ADE["tiny"], "--output", "{tmp}/o"], "no state dict"),
        (
            ["--checkpoint", "{tmp}/complex", "--config", ADE["tiny"], "--output", "{tmp}/o"],
            "dense real numbers",
        ),
        (["--checkpoint", "{tmp}/junk.pth", "--output", "{tmp}/o"], "needs --config FILE"),
        (
            ["--checkpoint", "{tmp}/junk.pth", "--config", ADE["tiny"], "--output", ""],
            "needs --checkpoint PATH",
        ),
        (["--summary", "--config", ADE["tiny"], "--size", "0x32"], "at least 1x1"),
        (["--summary", "--config", "README.md"], "README.md, line "),
        (["--config", ADE["tiny"]], "needs --checkpoint PATH and --output PATH"),
        (["--summary"], "--summary needs --config FILE"),
        (["--summary", "--config", ADE["tiny"], "--size", "big"], "expected HEIGHTxWIDTH"),
        (["--summary", "--config", "configs/topformer_b_ada.py"], "did you mean configs/topformer_b_ade.py"),
        (
            ["--summary", "--config", ADE["tiny"], "--config.modle.classes=3"],
            "did you mean model.num_classes",
        ),
        (["--summary", "--config", ADE["tiny"], "--config.batch_size"], "has no value"),
        (["--summary", "--config.batch_size=3"], "needs --config FILE"),
    ],
)
def test_bad_input_is_one_line(tmp_path: pathlib.Path, arguments: list[str], message: str) -> None:
    (tmp_path / "junk.pth").write_bytes(b"no checkpoint at all")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {3: torch.zeros(1)}}, tmp_path / "keys.pth")
    torch.save({"state_dict": {"a": torch.zeros(1, dtype=torch.complex64)}}, tmp_path / "complex")
    torch.save({"epoch": 3, "net": {"a": [torch.zeros(1)]}}, tmp_path / "odd.pth")
    done = command(*[argument.format(tmp=tmp_path) for argument in arguments])
    print(done.stderr.strip())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_summary_counts_what_the_paper_counts() -> None:
    """Table 1 of the paper: 1.4 / 3.1 / 5.1 M parameters, 0.6 / 1.2 / 1.8 G multiply-adds at 512 x 512."""
    paper = {"tiny": (1_389_654, 0.6), "small": (3_034_662, 1.2), "base": (5_062_646, 1.8)}
    for variant, (parameters, giga) in paper.items():
        done = command("--config", ADE[variant], "--summary", "--size", "512x512")
        assert done.returncode == 0, done.stderr
        total = done.stdout.splitlines()[-1].replace(",", "").split()
        print(done.stdout)
        assert int(total[1]) == parameters
        assert abs(float(total[2]) / 1000 - giga) < 0.1
