"""The export command, files in predict and evaluate, and what they say about mistakes."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import cv2
import jax.numpy as jnp
import numpy as np
import onnx
import PIL.Image
import pytest
from flax import nnx

import topformer_jax
from tests.commands import LONGEST, command, refused_command as refused
from topformer_jax import checkpoints, config, convert, evaluate, export, models, predict
from topformer_jax.data.catalog import CATALOG
from topformer_jax.exporters import exported, network, verification
from topformer_jax.runtime import cli
from topformer_jax.runtime.errors import UserError

SETTINGS = {"data.shapes.validation": 3, "data.shapes.size": 64, "evaluation.scale": "(96,96)"}
FLAGS = ["--config", "topformer_t_shapes", *(f"--config.{key}={value}" for key, value in SETTINGS.items())]


def run_command(name: str, *words: object) -> None:
    """A command in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", f"topformer_jax.{name}", *map(str, words)], check=True, timeout=LONGEST
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint folder of random weights."""
    folder = tmp_path_factory.mktemp("weights") / "shapes"
    settings = config.shapes()
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    # A last layer with a clear winner at most pixels.
    tensors["decode_head.conv_seg.weight"] = tensors["decode_head.conv_seg.weight"] * 30
    checkpoints.save_model(folder, tensors, {"config": json.loads(settings.to_json()), "meta": {}})
    return folder


@pytest.fixture(scope="module")
def files(weights: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with logits.onnx for any size, and for 64x64 labels.tflite and small.tflite, of logits."""
    folder = tmp_path_factory.mktemp("files")
    start = [*FLAGS, "--checkpoint", weights]
    said = command(export.main, *start, "--output", folder / "logits.onnx", "--size", "any", "--logits")
    assert "compared in its runtime at 256x256, 181x250, 1 and 2 images" in said
    command(export.main, *start, "--output", folder / "labels.tflite", "--size", "64x64")
    command(export.main, *start, "--output", folder / "small.tflite", "--size", "64x64", "--logits")
    assert sorted(path.name for path in folder.iterdir()) == ["labels.tflite", "logits.onnx", "small.tflite"]
    return folder


def test_a_file_in_python(files: pathlib.Path, weights: pathlib.Path) -> None:
    file = topformer_jax.exported(files / "labels.tflite")
    labels = file(np.zeros((2, 64, 64, 3), np.uint8))
    assert labels.shape == (2, 64, 64)
    facts = file.description
    assert (facts["output"], facts["size"], facts["stride"]) == ("labels", [64, 64], 1)
    assert len(facts["classes"]) == len(facts["palette"]) == 10
    assert facts["config"]["name"] == "topformer_t_shapes"
    assert facts["checkpoint"]["name"] == weights.name
    assert len(facts["checkpoint"]["sha256"]) == 64


def test_no_file_names_a_folder_of_this_machine(weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    private = ["--config.data.root=/secret/data", "--config.init_from=/secret/start"]
    private += [f"--config.distillation.{name}=/secret/{name}" for name in ("config", "checkpoint")]
    start = [*FLAGS, *private, "--checkpoint", weights, "--output"]
    command(export.main, *start, tmp_path / "t.tflite", "--size", "64x64", "--logits")
    command(export.main, *start, tmp_path / "t.stablehlo", "--size", "64x64", "--logits")
    command(export.main, *start, tmp_path / "t.onnx", "--size", "64x64", "--logits")
    command(convert.main, *start, tmp_path / "c.safetensors")
    package = str(pathlib.Path(export.__file__).parent).encode()
    assert len(list(tmp_path.iterdir())) == 5  # one beside t.stablehlo
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes(), path
        assert package not in path.read_bytes(), path


def test_stretched_images(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A file of one size, for images of any shape: of labels, and of logits."""
    image = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (70, 50, 3)).astype(np.uint8), (9, 9), 0
    )
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    network = topformer_jax.exported(files / "labels.tflite")
    labels = network(cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR)[None])[0]
    expected = cv2.resize(labels, (50, 70), interpolation=cv2.INTER_NEAREST_EXACT)
    found = []
    for name in ("labels.tflite", "small.tflite"):
        flags = [*FLAGS, "--exported", files / name, "--stretch"]
        command(predict.main, *flags, "--output", tmp_path / name, tmp_path / "a.png")
        found.append(np.asarray(PIL.Image.open(tmp_path / name / "a_mask.png")))
        said = command(evaluate.main, *flags, "--workdir", tmp_path / name)
        assert "mIoU" in said
        assert json.loads((tmp_path / name / "metrics.json").read_text())["devices"].startswith("LiteRT ")
    assert np.array_equal(found[0], expected)
    assert (found[1] != expected).mean() < 1e-3


def test_the_classes_have_the_files_names(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    names = [*(f"class {number}" for number in range(9)), "dice"]
    own = ["--config.data.dataset=custom", f"--config.data.class_names={tuple(names)}"]
    words = [*FLAGS, *own, "--config.evaluation.scale=(64,64)", "--exported", files / "small.tflite"]
    said = command(predict.main, *words, "--probabilities", "--output", tmp_path / "out", tmp_path / "a.png")
    assert said.startswith(
        "data.class_names differs from the checkpoint: label 0 is 'class 0' there, 'gradient' in the checkpoint "
        "(and 8 more); the checkpoint's own names are used\nthe checkpoint was trained and scored with "
        "evaluation.scale=(96, 96); this command uses (64, 64): give --config.evaluation.scale='(96,96)'\n"
    )
    with np.load(tmp_path / "out" / "a_probabilities.npz") as stored:
        assert tuple(stored["classes"]) == CATALOG["shapes"].classes


def test_labels_of_the_size_that_images_have(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Nothing needs to be stretched then."""
    image = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8), (9, 9), 0
    )
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    flags = [*FLAGS, "--exported", files / "labels.tflite", "--config.evaluation.scale=(64,64)"]
    command(predict.main, *flags, "--output", tmp_path / "out", tmp_path / "a.png")
    found = np.asarray(PIL.Image.open(tmp_path / "out" / "a_mask.png"))
    assert np.array_equal(found, topformer_jax.exported(files / "labels.tflite")(image[None])[0])


def test_evaluate_and_predict_give_the_checkpoints_labels(
    weights: pathlib.Path, files: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), cv2.GaussianBlur(image, (9, 9), 0))
    masks, scores = [], []
    for number, origin in enumerate((["--checkpoint", weights], ["--exported", files / "logits.onnx"])):
        out = tmp_path / str(number)
        flags = [*FLAGS, *origin, "--workdir", out, "--save-predictions", out / "labels", "--flip"]
        run_command("evaluate", *flags)
        scores.append(json.loads((out / "metrics.json").read_text()))
        run_command("predict", *FLAGS, *origin, "--output", out, "--probabilities", tmp_path / "a.png")
        masks.append([np.asarray(PIL.Image.open(path)) for path in sorted(out.rglob("*.png"))])
        assert (out / "a_probabilities.npz").exists()
    assert scores[0]["mIoU"] == pytest.approx(scores[1]["mIoU"], abs=1e-3)
    assert scores[1]["checkpoint"].endswith("logits.onnx")
    assert len(masks[0]) == 4
    assert len(np.unique(masks[0][0])) > 1
    assert np.mean([(ours != theirs).mean() for ours, theirs in zip(*masks, strict=True)]) < 1e-3


@pytest.mark.slow
def test_the_official_label_maps(golden: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    start = ["--config", "topformer_t_ade", f"--config.data.root={golden('mini_ade')}"]
    checkpoint, file = golden("checkpoints/tiny.pth"), tmp_path / "t.onnx"
    command(export.main, *start, "--checkpoint", checkpoint, "--output", file, "--logits", "--size", "any")
    flags = [*start, "--exported", file, "--workdir", tmp_path, "--save-predictions", tmp_path / "labels"]
    run_command("evaluate", *flags)
    official = json.loads(golden("eval/single.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text())["mIoU"] == pytest.approx(
        official["metrics"]["mIoU"], abs=1e-4
    )
    pairs = [
        (np.asarray(PIL.Image.open(path)), np.asarray(PIL.Image.open(tmp_path / "labels" / path.name)))
        for path in sorted(golden("eval/single").glob("*.png"))
    ]
    assert len(pairs) == 12
    assert sum((ours != theirs).sum() for theirs, ours in pairs) <= 1e-5 * sum(a.size for a, _ in pairs)


def test_what_cannot_be_exported(weights: pathlib.Path, files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    start = [*FLAGS, "--checkpoint", weights, "--output"]

    def line(*words: object) -> str:
        return refused(export.main, *start, *words)

    assert "expected a name that ends in .onnx, .tflite, .stablehlo" in line(tmp_path / "t.pb")
    assert "is there already: name another file" in line(files / "logits.onnx")
    assert "--size 5: expected HEIGHTxWIDTH" in line(tmp_path / "t.onnx", "--size", "5")
    assert "is for images of one size: give --size HxW" in line(tmp_path / "t.tflite", "--size", "any")
    assert "--scale-labels is 1/3: expected one of" in line(tmp_path / "t.onnx", "--scale-labels", "1/3")
    assert "float16 is for .tflite files alone" in line(tmp_path / "t.onnx", "--precision", "float16")
    assert "--keep-float is for --precision int8" in line(tmp_path / "t.tflite", "--keep-float", "stem")
    assert "int8 is for --logits" in line(tmp_path / "t.tflite", "--precision", "int8")
    integers = ["--precision", "int8", "--logits", "--size", "64x64"]
    assert "int8 needs --images DIR" in line(tmp_path / "t.tflite", *integers)
    assert "holds no picture" in line(tmp_path / "t.tflite", *integers, "--images", tmp_path)
    other = [f"--config.model.variant={variant}" for variant in ["base"]]
    assert "it is of variant tiny, the config of base" in line(tmp_path / "t.onnx", *other)
    assert "--target web is for .onnx files alone" in line(tmp_path / "t.stablehlo", "--target", "web")
    assert "logits are at an eighth" in line(tmp_path / "t.onnx", "--logits", "--scale-labels", "1/2")
    assert "convert writes the weights alone" in line(tmp_path / "t.safetensors")
    (tmp_path / "file").write_text("")
    assert "cannot write" in line(tmp_path / "file" / "t.onnx", "--size", "64x64")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


DEAD = "backbone.SIM.1.global_act.conv"  # which changes least
OTHERS = [
    "backbone.tpm.layer5.conv.1.c",
    "backbone.trans.transformer_blocks.3.attn.to_q.c",
    "decode_head.conv_seg",
]


@pytest.mark.parametrize("layer", [DEAD, *(pytest.param(layer, marks=pytest.mark.slow) for layer in OTHERS)])
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("t.onnx", []),
        ("t.onnx", ["--target", "web", "--logits"]),
        ("t.stablehlo", ["--probabilities"]),
        ("t.tflite", []),
        ("t.tflite", ["--precision", "float16"]),
        ("t.tflite", ["--precision", "int8", "--logits"]),
    ],
)
def test_a_dead_layer_is_refused(
    weights: pathlib.Path,
    drawn: pathlib.Path,
    tmp_path: pathlib.Path,
    name: str,
    flags: list[str],
    layer: str,
) -> None:
    """The file is that of the model without one convolution; at 64x64 all labels are of one class."""
    make_function = network.make_function

    def without_layer(model: Any, *args: Any, **options: Any) -> Any:
        dead = nnx.clone(model)
        variable = models.named_variables(dead)[f"{layer}.weight"]
        variable.set_value(jnp.zeros_like(variable.get_value()))
        return make_function(dead, *args, **options)

    start = [*FLAGS, "--checkpoint", weights, "--output", tmp_path / name, "--size", "64x64"]
    with mock.patch.object(network, "make_function", without_layer):
        said = refused(export.main, *start, *flags, "--images", drawn / "images")
    assert "the exported file differs from the model: " in said
    assert "nothing was written" in said
    assert not list(tmp_path.iterdir())


def test_int8(weights: pathlib.Path, drawn: pathlib.Path, tmp_path: pathlib.Path) -> None:
    flags = [
        *FLAGS,
        "--checkpoint",
        weights,
        "--output",
        tmp_path / "t.tflite",
        "--size",
        "64x64",
        "--logits",
    ]
    integers = ["--precision", "int8", "--images", drawn / "images", "--keep-float", "stem", "decode_head"]
    said = command(export.main, *flags, *integers)
    assert "5 pictures: " in said
    assert "of the labels equal the model's" in said
    facts = topformer_jax.exported(tmp_path / "t.tflite").description
    assert (facts["precision"], facts["keep_float"]) == ("int8", ["stem", "decode_head"])


def test_int8_of_a_classifier(drawn: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = config.imagenet("tiny")
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    checkpoints.save_model(tmp_path / "c", tensors, {"config": json.loads(settings.to_json()), "meta": {}})
    shutil.copytree(drawn / "images", tmp_path / "pictures")
    (tmp_path / "pictures" / "._hidden.jpg").write_bytes(b"of a Mac")
    start = ["--config", "topformer_t_imagenet", "--checkpoint", tmp_path / "c", "--size", "64x64"]
    integers = ["--precision", "int8", "--images", tmp_path / "pictures"]
    said = command(export.main, *start, *integers, "--output", tmp_path / "c.tflite")
    assert "5 pictures: " in said
    scores = topformer_jax.exported(tmp_path / "c.tflite")(np.zeros((1, 64, 64, 3), np.uint8))
    assert scores.shape == (1, 1000)
    (tmp_path / "pictures" / "cut.jpg").write_bytes(b"cut off")
    assert "cut.jpg" in refused(export.main, *start, *integers, "--output", tmp_path / "d.tflite")


def test_ctrl_c_deletes_what_is_unfinished(tmp_path: pathlib.Path) -> None:
    program = """
import os, pathlib, signal, sys
sys.orig_argv, sys.argv = ["python", "-m", "topformer_jax.export"], ["-m"]
import topformer_jax
from topformer_jax.runtime import files
path = pathlib.Path(os.environ["UNFINISHED"])
with files.unfinished(path):
    path.write_text("half")
    print("writing", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
"""
    environment = os.environ | {"UNFINISHED": str(tmp_path / "half")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "writing\n", "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    flags = [*FLAGS, "--checkpoint", weights, "--output", tmp_path / "t.stablehlo", "--size", "64x64"]
    with (
        mock.patch.object(verification, "verify", side_effect=KeyboardInterrupt),
        pytest.raises(SystemExit) as end,
    ):
        command(functools.partial(cli.run, export.main), *flags)
    assert end.value.code == 130
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_run(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def line(file: pathlib.Path, *words: object, main: Any = evaluate.main) -> str:
        output = ["--workdir", tmp_path / "out"] if main is evaluate.main else ["--output", tmp_path / "out"]
        return refused(main, *FLAGS, "--exported", file, *output, *words)

    labels, logits = files / "labels.tflite", files / "logits.onnx"
    assert "--stretch is for a file of one size" in line(logits, "--stretch")
    assert "leave out --img-ratios" in line(files / "small.tflite", "--stretch", "--img-ratios", "0.5,1")
    assert "takes images of 64x64 pixels (height x width), and one has" in line(labels)
    assert "views are averaged before there are any: export --logits" in line(labels, "--flip")
    assert "sees whole images" in line(logits, "--slide")
    assert "has 10 classes, the config 150" in line(logits, "--config.model.num_classes=150")
    assert "is no exported file" in line(tmp_path / "a.txt")
    assert "cannot read" in line(tmp_path / "none.onnx")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    square = "--config.evaluation.scale=(64,64)"
    probabilities = ["--probabilities", square, tmp_path / "a.png"]
    assert "--probabilities needs logits" in line(labels, *probabilities, main=predict.main)
    small = ["--stretch", *probabilities]
    assert "leave out --stretch" in line(files / "small.tflite", *small, main=predict.main)
    assert "--stretch is for --exported" in refused(
        evaluate.main, *FLAGS, "--checkpoint", tmp_path, "--stretch"
    )
    with pytest.raises(UserError, match=r"takes images as uint8 .*, and got float32 of shape 1x64x64x3"):
        topformer_jax.exported(labels)(np.zeros((1, 64, 64, 3), np.float32))
    foreign = onnx.load(logits)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert "was not written by python -m topformer_jax.export" in line(tmp_path / "foreign.onnx")


def test_a_missing_package_is_one_line(tmp_path: pathlib.Path) -> None:
    for suffix, (module, packages) in exported.FORMATS.items():
        name = f"topformer_jax.exporters.{module}"
        with mock.patch.dict(sys.modules, {name: None}):
            said = refused(evaluate.main, *FLAGS, "--exported", tmp_path / f"a{suffix}")
        assert f"{suffix} files need {packages}: import of" in said
        assert "pip install 'topformer_jax[export]'" in said
