"""The export command, files in predict and evaluate, and what they say about mistakes."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
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
from tests.commands import command, refused_command as refused
from topformer_jax import checkpoints, config, convert, evaluate, export, models, predict
from topformer_jax.data.catalog import CATALOG
from topformer_jax.exporters import exported, network, verification
from topformer_jax.runtime import cli
from topformer_jax.runtime.errors import UserError

SETTINGS = {"data.shapes.validation": 3, "data.shapes.size": 64, "evaluation.scale": "(96,96)"}
FLAGS = ["--config", "topformer_t_shapes", *(f"--config.{key}={value}" for key, value in SETTINGS.items())]


@pytest.fixture(scope="module")
def files(shapes_weights: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with logits.onnx for any size, and for 64x64 labels.tflite and small.tflite, of logits."""
    folder = tmp_path_factory.mktemp("files")
    start = [*FLAGS, "--checkpoint", shapes_weights]
    said = command(export.main, *start, "--output", folder / "logits.onnx", "--size", "any", "--logits")
    assert "compared in its runtime at 256x256, 181x250, 1 and 2 images" in said
    command(export.main, *start, "--output", folder / "labels.tflite", "--size", "64x64")
    command(export.main, *start, "--output", folder / "small.tflite", "--size", "64x64", "--logits")
    assert sorted(path.name for path in folder.iterdir()) == ["labels.tflite", "logits.onnx", "small.tflite"]
    return folder


def test_a_file_in_python(files: pathlib.Path, shapes_weights: pathlib.Path) -> None:
    file = topformer_jax.exported(files / "labels.tflite")
    labels = file(np.zeros((2, 64, 64, 3), np.uint8))
    assert labels.shape == (2, 64, 64)
    facts = file.description
    assert (facts["output"], facts["size"], facts["stride"]) == ("labels", [64, 64], 1)
    assert len(facts["classes"]) == len(facts["palette"]) == 10
    assert facts["config"]["name"] == "topformer_t_shapes"
    assert facts["checkpoint"]["name"] == shapes_weights.name
    assert len(facts["checkpoint"]["sha256"]) == 64


def test_no_file_names_a_folder_of_this_machine(shapes_weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    private = ["--config.data.root=/secret/data", "--config.init_from=/secret/start"]
    private += [f"--config.distillation.{name}=/secret/{name}" for name in ("config", "checkpoint")]
    start = [*FLAGS, *private, "--checkpoint", shapes_weights, "--output"]
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
    """A file of one size, for images of any shape: of labels, and of logits; images of its size need no flag."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 64, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(noise, (9, 9), 0)
    for name, picture in (("a", image[:, :50]), ("b", image[:64])):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture[..., ::-1])
    network = topformer_jax.exported(files / "labels.tflite")
    labels = network(cv2.resize(image[:, :50], (64, 64), interpolation=cv2.INTER_LINEAR)[None])[0]
    expected = cv2.resize(labels, (50, 70), interpolation=cv2.INTER_NEAREST_EXACT)
    found = {}
    for name in ("labels", "small"):
        flags = [*FLAGS, "--exported", files / f"{name}.tflite", "--stretch"]
        command(predict.main, *flags, "--output", tmp_path / name, tmp_path / "a.png")
        found[name] = np.asarray(PIL.Image.open(tmp_path / name / "a_mask.png"))
    assert np.array_equal(found["labels"], expected)
    assert (found["small"] != expected).mean() < 1e-3
    assert "mIoU" in command(evaluate.main, *flags, "--workdir", tmp_path / "scores")
    facts = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert facts["devices"].startswith("LiteRT ")
    assert facts["evaluation"].endswith("stretched to (64, 64)")
    flags = [*FLAGS, "--exported", files / "labels.tflite", "--config.evaluation.scale=(64,64)"]
    command(predict.main, *flags, "--output", tmp_path / "out", tmp_path / "b.png")
    mask = np.asarray(PIL.Image.open(tmp_path / "out" / "b_mask.png"))
    assert np.array_equal(mask, network(image[None, :64])[0])


def test_the_classes_have_the_files_names(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    names = [*(f"class {number}" for number in range(9)), "dice"]
    own = ["--config.data.dataset=custom", f"--config.data.class_names={tuple(names)}"]
    words = [*FLAGS, *own, "--config.evaluation.scale=(64,64)", "--exported", files / "small.tflite"]
    said = command(predict.main, *words, "--probabilities", "--output", tmp_path / "out", tmp_path / "a.png")
    assert said.startswith(
        "data.class_names differs from the checkpoint: label 0 is 'class 0' there, 'gradient' in the checkpoint "
        "(and 8 more); the checkpoint's own names are used\nthe checkpoint was trained and scored with "
        "--config.evaluation.scale='(96,96)'; this command uses (64,64)\n"
    )
    with np.load(tmp_path / "out" / "a_probabilities.npz") as stored:
        assert tuple(stored["classes"]) == CATALOG["shapes"].classes


def test_evaluate_and_predict_give_the_checkpoints_labels(
    shapes_weights: pathlib.Path, files: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), cv2.GaussianBlur(image, (9, 9), 0))
    masks, scores = [], []
    for number, origin in enumerate((["--checkpoint", shapes_weights], ["--exported", files / "logits.onnx"])):
        out = tmp_path / str(number)
        flags = [*FLAGS, *origin, "--workdir", out, "--save-predictions", out / "labels", "--flip"]
        command(evaluate.main, *flags)
        scores.append(json.loads((out / "metrics.json").read_text()))
        command(predict.main, *FLAGS, *origin, "--output", out, "--probabilities", tmp_path / "a.png")
        masks.append([np.asarray(PIL.Image.open(path)) for path in sorted(out.rglob("*.png"))])
        assert (out / "a_probabilities.npz").exists()
    assert scores[0]["mIoU"] == pytest.approx(scores[1]["mIoU"], abs=1e-3)
    assert scores[1]["checkpoint"].endswith("logits.onnx")
    assert len(masks[0]) == 4
    assert len(np.unique(masks[0][0])) > 1
    assert np.mean([(ours != theirs).mean() for ours, theirs in zip(*masks, strict=True)]) < 1e-3


def test_what_cannot_be_exported(shapes_weights: pathlib.Path, files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    integers = ["--precision", "int8", "--logits", "--size", "64x64"]
    for name, words, line in (
        ("t.pb", [], "expected a name that ends in .onnx, .tflite, .stablehlo"),
        (files / "logits.onnx", [], "is there already: name another file"),
        ("t.onnx", ["--size", "5"], "--size 5: expected HEIGHTxWIDTH"),
        ("t.tflite", ["--size", "any"], "is for images of one size: give --size HxW"),
        ("t.onnx", ["--scale-labels", "1/3"], "--scale-labels is 1/3: expected one of"),
        ("t.onnx", ["--precision", "float16"], "float16 is only for .tflite files"),
        ("t.tflite", ["--keep-float", "stem"], "--keep-float is for --precision int8"),
        ("t.tflite", ["--precision", "int8"], "int8 is for --logits"),
        ("t.tflite", integers, "int8 needs --images DIR"),
        ("t.tflite", [*integers, "--images", tmp_path], "holds no picture"),
        ("t.onnx", ["--config.model.variant=base"], "it is of variant tiny, the config of base"),
        ("t.stablehlo", ["--target", "web"], "--target web is only for .onnx files"),
        ("t.onnx", ["--logits", "--scale-labels", "1/2"], "logits have an eighth of the size"),
        ("t.safetensors", [], "convert writes only the weights"),
        ("file/t.onnx", ["--size", "64x64"], "cannot write"),
    ):
        start = [*FLAGS, "--checkpoint", shapes_weights, "--output", tmp_path / name]
        assert line in refused(export.main, *start, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


DEAD = "backbone.SIM.1.global_act.conv"  # which changes least
SLOW = [
    ("t.onnx", ["--target", "web", "--logits"], DEAD),
    ("t.stablehlo", ["--probabilities"], DEAD),
    ("t.tflite", [], DEAD),
    ("t.tflite", ["--precision", "float16"], DEAD),
    ("t.onnx", [], "backbone.tpm.layer5.conv.1.c"),
    ("t.tflite", [], "backbone.trans.transformer_blocks.3.attn.to_q.c"),
    ("t.tflite", ["--precision", "int8", "--logits"], "decode_head.conv_seg"),
]


@pytest.mark.parametrize(
    ("name", "flags", "layer"),
    [
        ("t.onnx", [], DEAD),
        ("t.tflite", ["--precision", "int8", "--logits"], DEAD),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_dead_layer_is_refused(
    shapes_weights: pathlib.Path,
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

    start = [*FLAGS, "--checkpoint", shapes_weights, "--output", tmp_path / name, "--size", "64x64"]
    with mock.patch.object(network, "make_function", without_layer):
        said = refused(export.main, *start, *flags, "--images", drawn / "images")
    assert "the exported file differs from the model: " in said
    assert "nothing was written" in said
    assert not list(tmp_path.iterdir())


def test_int8(shapes_weights: pathlib.Path, drawn: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(drawn / "images", tmp_path / "pictures")
    (tmp_path / "pictures" / "._hidden.jpg").write_bytes(b"of a Mac")
    start = [*FLAGS, "--checkpoint", shapes_weights, "--size", "64x64", "--logits"]
    start += ["--precision", "int8", "--images", tmp_path / "pictures", "--keep-float", "stem", "decode_head"]
    said = command(export.main, *start, "--output", tmp_path / "t.tflite")
    assert "5 pictures: " in said
    assert "of the labels equal the model's" in said
    facts = topformer_jax.exported(tmp_path / "t.tflite").description
    assert (facts["precision"], facts["keep_float"]) == ("int8", ["stem", "decode_head"])
    (tmp_path / "pictures" / "cut.jpg").write_bytes(b"cut off")
    assert "cut.jpg" in refused(export.main, *start, "--output", tmp_path / "d.tflite")


@pytest.mark.slow
def test_int8_of_a_classifier(drawn: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = config.imagenet("tiny")
    tensors = {name: np.asarray(value) for name, value in models.state_dict(models.build(settings)).items()}
    checkpoints.save_model(tmp_path / "c", tensors, {"config": json.loads(settings.to_json()), "meta": {}})
    start = ["--config", "topformer_t_imagenet", "--checkpoint", tmp_path / "c", "--size", "64x64"]
    integers = ["--precision", "int8", "--images", drawn / "images"]
    assert "5 pictures: " in command(export.main, *start, *integers, "--output", tmp_path / "c.tflite")
    scores = topformer_jax.exported(tmp_path / "c.tflite")(np.zeros((1, 64, 64, 3), np.uint8))
    assert scores.shape == (1, 1000)


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


def test_an_interrupted_export_leaves_nothing(shapes_weights: pathlib.Path, tmp_path: pathlib.Path) -> None:
    flags = [*FLAGS, "--checkpoint", shapes_weights, "--output", tmp_path / "t.stablehlo", "--size", "64x64"]
    with (
        mock.patch.object(verification, "verify", side_effect=KeyboardInterrupt),
        pytest.raises(SystemExit) as end,
    ):
        command(functools.partial(cli.run, export.main), *flags)
    assert end.value.code == 130
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_run(files: pathlib.Path, tmp_path: pathlib.Path) -> None:
    labels, logits, small = files / "labels.tflite", files / "logits.onnx", files / "small.tflite"
    foreign = onnx.load(logits)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for file, words, line in (
        (logits, ["--stretch"], "--stretch is for a file of one size"),
        (small, ["--stretch", "--img-ratios", "0.5,1"], "leave out --img-ratios"),
        (labels, [], "expects 64x64; the resized image is 80x96. Pass --stretch"),
        (labels, ["--flip"], "but several views need logits to average: export --logits"),
        (logits, ["--slide"], "sees whole images"),
        (logits, ["--runtime", "jax"], "--runtime is for --checkpoint"),
        (logits, ["--config.model.num_classes=150"], "has 10 classes, the config 150"),
        (tmp_path / "a.txt", [], "is no exported file"),
        (tmp_path / "none.onnx", [], "cannot read"),
        (tmp_path / "foreign.onnx", [], "was not written by python -m topformer_jax.export"),
    ):
        flags = [*FLAGS, "--exported", file, "--workdir", tmp_path / "out"]
        assert line in refused(evaluate.main, *flags, *words)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    for origin, line in (
        (["--exported", labels], "--probabilities needs logits"),
        (["--exported", small, "--stretch"], "leave out --stretch"),
        (["--exported", logits, "--runtime", "jax"], "--runtime is for --checkpoint"),
        (["--checkpoint", tmp_path, "--stretch"], "--stretch is for --exported"),
    ):
        flags = [*FLAGS, "--config.evaluation.scale=(64,64)", *origin, "--probabilities"]
        assert line in refused(predict.main, *flags, "--output", tmp_path / "out", tmp_path / "a.png")
    with pytest.raises(UserError, match=r"takes images as uint8 .*, and got float32 of shape 1x64x64x3"):
        topformer_jax.exported(labels)(np.zeros((1, 64, 64, 3), np.float32))


def test_a_missing_package_is_one_line(tmp_path: pathlib.Path) -> None:
    for suffix, (module, packages) in exported.FORMATS.items():
        name = f"topformer_jax.exporters.{module}"
        with mock.patch.dict(sys.modules, {name: None}):
            said = refused(evaluate.main, *FLAGS, "--exported", tmp_path / f"a{suffix}")
        assert f"{suffix} files need {packages}: import of" in said
        assert "pip install 'topformer_jax[export]'" in said
