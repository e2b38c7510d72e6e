"""Conversion in both directions: without loss, without mercy, and without running what a file asks to run."""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import settings_for
from tests.reference import network as reference
from topformer_jax import checkpoint, config, convert, load, models
from topformer_jax.data.catalog import CATALOG
from topformer_jax.errors import UserError

Find = Callable[[str], pathlib.Path]
INJECTIONS = ("multi_sum", "multi_sum_cbr", "fuse_sum", "fuse_multi")
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


@pytest.fixture
def pth(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes a PyTorch file and returns its path."""

    def save(content: Any, name: str = "model.pth") -> pathlib.Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="module")
def states() -> dict[str, torch.Tensor]:
    """The state dict of a random Tiny with 150 classes."""
    network = reference.Segmenter("tiny")
    reference.randomize(network, seed=0)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
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
    assert _same(written["state_dict"], states)
    if "class" in name:
        return
    assert written["meta"]["iter"] == original["meta"]["iter"]
    assert written["meta"]["CLASSES"] == list(CATALOG["ade20k"].classes)
    assert len(written["meta"]["PALETTE"]) == 150
    network = reference.Segmenter(name.split("_")[0])
    network.load_state_dict(written["state_dict"], strict=True)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_round_trip_of_each_injection(tmp_path: pathlib.Path, pth: Callable, injection: str) -> None:
    network = reference.Segmenter("tiny", 7, reference.OFFICIAL_NAMES.get(injection, injection))
    reference.randomize(network, seed=0)
    source = pth({"meta": {"iter": 3}, "state_dict": network.state_dict()})
    settings = settings_for("tiny", model__injection=injection, model__num_classes=7)
    tensors, meta = convert.read(source, models.build(settings), settings)
    checkpoint.save_model(tmp_path / "orbax", 0, tensors, {"config": settings.to_dict(), "meta": meta})
    again, metadata = checkpoint.read_model(tmp_path / "orbax")
    convert.write_pth(tmp_path / "back.pth", again, metadata["meta"])
    written = torch.load(tmp_path / "back.pth", weights_only=True)
    assert _same(written["state_dict"], network.state_dict())
    assert written["meta"] == {"iter": 3}


@pytest.mark.parametrize("wrap", ["module.", "backbone-less", "aliases", "bare"])
def test_spellings_of_names(pth: Callable, states: dict[str, torch.Tensor], wrap: str) -> None:
    """A DataParallel prefix, a missing `backbone.`, the old names, and a dictionary of nothing but tensors."""
    old = {new: name for name, new in convert.ALIASES.items()}
    spelled = {
        "module.": {f"module.{name}": tensor for name, tensor in states.items()},
        "backbone-less": {name.removeprefix("backbone."): tensor for name, tensor in states.items()},
        "aliases": {
            ".".join(old.get(part, part) for part in name.split(".")): tensor
            for name, tensor in states.items()
        },
        "bare": states,
    }[wrap]
    assert wrap == "bare" or set(spelled) != set(states)
    path = pth(spelled if wrap == "bare" else {"state_dict": spelled})
    settings = config.ade20k("tiny")
    tensors, _ = convert.read(path, models.build(settings), settings)
    assert _same({k: torch.from_numpy(convert.to_torch(v)) for k, v in tensors.items()}, states)


def test_fuse2_is_no_alias_where_it_is_a_name(pth: Callable) -> None:
    network = reference.Segmenter("tiny", 7, "fuse_multi")
    settings = settings_for("tiny", model__injection="fuse_multi", model__num_classes=7)
    tensors, _ = convert.read(pth({"state_dict": network.state_dict()}), models.build(settings), settings)
    assert "backbone.SIM.1.fuse2.conv.weight" in tensors


def test_the_averaged_weights_come_first(pth: Callable, states: dict[str, torch.Tensor]) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in states.items()}
    settings = config.ade20k("tiny")
    model = models.build(settings)
    keys = ["state_dict_ema", "state_dict", "model"]
    for index in range(3):
        content = dict.fromkeys(keys[index + 1 :], zeros) | {keys[index]: states}
        tensors, _ = convert.read(pth(content | {"args": argparse.Namespace(lr=1)}), model, settings)
        name = "decode_head.conv_seg.bias"
        np.testing.assert_array_equal(tensors[name], states[name].numpy())


def test_half_precision_files_are_widened(pth: Callable, states: dict[str, torch.Tensor]) -> None:
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in states.items()}
    settings = config.ade20k("tiny")
    tensors, _ = convert.read(pth({"state_dict": half}), models.build(settings), settings)
    name = "decode_head.conv_seg.weight"
    np.testing.assert_array_equal(convert.to_torch(tensors[name]), half[name].float().numpy())


def test_every_misfit_is_named_with_both_shapes(pth: Callable, states: dict[str, torch.Tensor]) -> None:
    broken = dict(states)
    del broken["decode_head.conv_seg.bias"]
    broken["backbone.extra"] = torch.zeros(3, 2)
    broken["backbone.tpm.stem.0.c.weight"] = torch.zeros(16, 3, 5, 5)
    settings = config.ade20k("tiny")
    with pytest.raises(UserError) as error:
        convert.read(pth({"state_dict": broken}), models.build(settings), settings)
    assert error.value.line.startswith(str(pth({"state_dict": broken})))
    assert "1 tensors are missing, 1 are left over, 1 have another shape" in error.value.line
    assert error.value.details == [
        "  missing    decode_head.conv_seg.bias  config 150",
        "  left over  backbone.extra  file 3x2",
        "  misshapen  backbone.tpm.stem.0.c.weight  file 16x3x5x5, config 16x3x3x3",
    ]


def test_an_injection_of_the_same_shapes(tmp_path: pathlib.Path) -> None:
    settings = settings_for("tiny", model__injection="fuse_sum")
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    checkpoint.save_model(tmp_path / "7", 0, tensors, {"config": settings.to_dict()})
    load(settings, tmp_path / "7")
    load(settings, tmp_path / "7" / "0")
    with pytest.raises(UserError, match="has injection fuse_sum, the config fuse_multi"):
        load(settings, tmp_path / "7", **{"model.injection": "fuse_multi"})


def test_parameters_and_no_meta(pth: Callable, states: dict[str, torch.Tensor]) -> None:
    grown = {
        name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in states.items()
    }
    settings = config.ade20k("tiny")
    path = pth({"state_dict": grown, "meta": None}, "weights.bin")
    tensors, meta = convert.read(path, models.build(settings), settings)
    assert meta == {}
    name = "decode_head.conv_seg.bias"
    np.testing.assert_array_equal(tensors[name], states[name].numpy())


def test_a_name_that_comes_twice(pth: Callable, states: dict[str, torch.Tensor]) -> None:
    twice = states | {"module.decode_head.conv_seg.bias": torch.zeros(150)}
    settings = config.ade20k("tiny")
    with pytest.raises(UserError, match=r"two tensors of the file are decode_head\.conv_seg\.bias"):
        convert.read(pth({"state_dict": twice}), models.build(settings), settings)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (config.ade20k("base"), "it is of variant tiny, the config of base"),
        (config.pascal_context("tiny", classes=60), "it has not the config's 60 classes: .* --new-head"),
        (config.imagenet("tiny"), "it is a segmenter's"),
    ],
)
def test_advice_on_a_wrong_checkpoint(pth: Callable, states: dict, settings: Any, advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        convert.read(pth({"state_dict": states}), models.build(settings), settings)


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
            mine = convert.to_torch(np.asarray(tensors[f"backbone.{name}"].get_value()))
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
    tensors, metadata = checkpoint.read_model(tmp_path / "out")
    assert tensors["decode_head.conv_seg.weight"].shape == (1, 1, 128, 60)
    name = "decode_head.linear_fuse.conv.weight"
    np.testing.assert_array_equal(convert.to_torch(tensors[name]), states[name].numpy())
    assert metadata["meta"] == {}  # they were another model's


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
    arguments = ["--config", ADE["tiny"], "--checkpoint", "x.pth", "--output", str(tmp_path / "out")]
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
    torch.save({"epoch": 3, "net": {"a": torch.zeros(1)}}, tmp_path / "odd.pth")
    done = command(*[argument.format(tmp=tmp_path) for argument in arguments])
    print(done.stderr.strip())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_nothing_is_overwritten(tmp_path: pathlib.Path, states: dict[str, torch.Tensor]) -> None:
    tensors = {name: convert.from_torch(tensor.numpy()) for name, tensor in states.items()}
    checkpoint.save_model(tmp_path / "orbax", 0, tensors, {})
    with pytest.raises(UserError, match="already holds a checkpoint of step 0"):
        checkpoint.save_model(tmp_path / "orbax", 0, tensors, {})
    convert.write_pth(tmp_path / "a.pth", tensors, {})
    with pytest.raises(UserError, match="is there already"):
        convert.write_pth(tmp_path / "a.pth", tensors, {})
    assert {path.name for path in tmp_path.iterdir()} == {"orbax", "a.pth"}


def test_a_folder_that_cannot_be_written(tmp_path: pathlib.Path, states: dict[str, torch.Tensor]) -> None:
    (tmp_path / "file").write_text("in the way")
    tensors = {"decode_head.conv_seg.bias": states["decode_head.conv_seg.bias"].numpy()}
    for place in (tmp_path / "file" / "orbax", tmp_path / "file", pathlib.Path("/proc/orbax")):
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.save_model(place, 0, tensors, {})
    with pytest.raises(UserError, match="cannot write"):
        convert.write_pth(tmp_path / "file" / "a.pth", tensors, {})


def test_a_damaged_folder(tmp_path: pathlib.Path, states: dict[str, torch.Tensor]) -> None:
    tensors = {name: convert.from_torch(tensor.numpy()) for name, tensor in states.items()}
    checkpoint.save_model(tmp_path / "orbax", 0, tensors, {})
    for file in (tmp_path / "orbax" / "0" / "model").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            with contextlib.closing(file.open("r+b")) as handle:
                handle.truncate(100)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read_model(tmp_path / "orbax")


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
