"""The convert command: converts in both directions without loss, and names what it refuses."""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.commands import ROOT, command, refused_command as refused
from tests.parity import same_states
from tests.reference import network as reference
from topformer_jax import checkpoints, config, convert, load, models
from topformer_jax.checkpoints import torch_format
from topformer_jax.data.catalog import CATALOG

Find = Callable[[str], pathlib.Path]
ADE = {variant: f"topformer_{variant[0]}_ade" for variant in ("tiny", "small", "base")}
TINY = ADE["tiny"]


@pytest.mark.parametrize("name", ["base", "tiny_init", "classification_tiny"])
def test_golden_round_trip_through_the_command(golden: Find, tmp_path: pathlib.Path, name: str) -> None:
    source = golden(f"checkpoints/{name}.pth")
    recipe = "topformer_t_imagenet" if "class" in name else ADE[name.split("_")[0]]
    command(convert.main, "--config", recipe, "--checkpoint", source, "--output", tmp_path / "orbax")
    command(convert.main, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "back.pth")
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
    words = ["--config", ADE["tiny"], "--checkpoint", source, "--output", tmp_path / "out"]
    assert "--init-from-classifier" in refused(convert.main, *words)
    assert not (tmp_path / "out").exists()
    assert command(convert.main, *words, "--init-from-classifier").startswith(
        f"{source}: state_dict_ema.* taken, the averages (321 tensors)\nfrom {source}: backbone.tpm, backbone.trans; "
        "random: backbone.SIM, decode_head.conv_seg, decode_head.linear_fuse\n"
    )
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
    words = ["--config", "topformer_t_context60", "--checkpoint", source, "--output", tmp_path / "out"]
    assert "; random: decode_head.conv_seg\n" in command(convert.main, *words, "--new-head")
    tensors, metadata = checkpoints.read_model(tmp_path / "out")
    assert tensors["decode_head.conv_seg.weight"].shape == (1, 1, 128, 60)
    name = "decode_head.linear_fuse.conv.weight"
    np.testing.assert_array_equal(torch_format.to_torch(tensors[name]), states[name].numpy())
    # Its iteration and its classes were another model's; the new ones are those of the data set.
    assert set(metadata["meta"]) == {"CLASSES", "PALETTE"}
    assert metadata["meta"]["CLASSES"] == list(CATALOG["context60"].classes)


def test_without_torch(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"needs PyTorch to be read")
    words = ["--config", ADE["tiny"], "--checkpoint", tmp_path / "x.pth", "--output", tmp_path / "out"]
    with mock.patch.dict(sys.modules, {"torch": None}):
        assert "pip install 'topformer_jax[convert]'" in refused(convert.main, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--checkpoint no.pth --config {TINY} --output {{tmp}}/o", "no checkpoint no.pth"),
        (f"--checkpoint {{tmp}} --config {TINY} --output {{tmp}}/o", "holds no checkpoint"),
        (f"--checkpoint {{tmp}}/junk.pth --config {TINY} --output {{tmp}}/o", "or a damaged one"),
        (f"--checkpoint {{tmp}}/cut.pth --config {TINY} --output {{tmp}}/o", "or a damaged one"),
        (f"--checkpoint {{tmp}}/list.pth --config {TINY} --output {{tmp}}/o", "holds a list"),
        (f"--checkpoint {{tmp}}/odd.pth --config {TINY} --output {{tmp}}/o", "no state dict"),
        (f"--checkpoint {{tmp}}/keys.pth --config {TINY} --output {{tmp}}/o", "no state dict"),
        (f"--checkpoint {{tmp}}/complex --config {TINY} --output {{tmp}}/o", "dense real numbers"),
        ("--checkpoint {tmp}/junk.pth --output {tmp}/o", "needs --config FILE"),
        ("--checkpoint x --output o.onnx", "o.onnx: expected FILE.pth, FILE.pt, FILE.safetensors, or"),
        ("--checkpoint {tmp}/x.safetensors --output {tmp}/o", "needs --config FILE"),
        (f"--checkpoint {{tmp}}/junk.pth --config {TINY} --output ''", "needs --checkpoint PATH"),
        (f"--summary --config {TINY} --size 0x32", "at least 1x1"),
        (f"--config {TINY}", "needs --checkpoint PATH and --output PATH"),
        ("--summary", "--summary needs --config FILE"),
        (f"--summary --config {TINY} --size big", "expected HEIGHTxWIDTH"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    (tmp_path / "junk.pth").write_bytes(b"no checkpoint at all")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
    torch.save([1, 2], tmp_path / "list.pth")
    safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors")
    torch.save({"state_dict": {3: torch.zeros(1)}}, tmp_path / "keys.pth")
    torch.save({"state_dict": {"a": torch.zeros(1, dtype=torch.complex64)}}, tmp_path / "complex")
    torch.save({"epoch": 3, "net": {"a": [torch.zeros(1)]}}, tmp_path / "odd.pth")
    monkeypatch.chdir(ROOT)
    assert message in refused(convert.main, *shlex.split(words.format(tmp=tmp_path)))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("variant", "parameters", "giga"),
    [("tiny", 1_389_654, 0.6), ("small", 3_034_662, 1.2), ("base", 5_062_646, 1.8)],
)
def test_summary_counts_what_the_paper_counts(variant: str, parameters: int, giga: float) -> None:
    """Table 1 of the paper: 1.4 / 3.1 / 5.1 M parameters, 0.6 / 1.2 / 1.8 G multiply-adds at 512 x 512."""
    said = command(convert.main, "--config", ADE[variant], "--summary", "--size", "512x512")
    total = said.splitlines()[-1].replace(",", "").split()
    assert int(total[1]) == parameters
    assert abs(float(total[2]) / 1000 - giga) < 0.1
