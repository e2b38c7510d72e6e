"""ImageNet from end to end on a miniature: train, stop, resume, score, start a segmenter, go back to PyTorch."""

import json
import pathlib
import re
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import traffic
from tests import commands
from tests.parity import summed_bytes
from tests.reference import network as reference
from topformer_jax import browse, checkpoints, config, convert, evaluate, load, models, train
from topformer_jax.data import loader, sources
from topformer_jax.data.augment import normalize
from topformer_jax.data.classification import images as class_images
from topformer_jax.inference.evaluation import compute_ranks, evaluate_classifier
from topformer_jax.preparation import packing
from topformer_jax.runtime import logs, sharding
from topformer_jax.training.step import init_training

CLASSES = 6
SMALL: dict[str, Any] = {
    "model.num_classes": CLASSES,
    "model.depths": 1,
    "batch_size": 16,
    "data.crop_size": "(64,64)",
    "data.rand_augment": 0.0,  # a colour that is inverted shows another class
    "data.erasing_prob": 0.1,
    "data.mixup_alpha": 0.05,
    "model.dropout_ratio": 0.05,
    "model.drop_path_rate": 0.0,
    "loss.label_smoothing": 0.05,
    "ema_decay": 0.5,
    "data.num_workers": 0,
    "log_every": 1,
    "checkpoint_every": 5,
    "evaluate_every": 15,
    "schedule.steps": 30,
    "schedule.warmup_steps": 3,
    "schedule.lr": 0.001,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Noise in six colours, a colour a class."""
    folder, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for word, count in (("train", 6), ("val", 3)):
        for number in range(CLASSES):
            for index in range(count):
                image = rng.integers(0, 60, (70 + 4 * index, 90 - 3 * index, 3))
                image[..., number % 3] += 170
                image[..., (number + 1) % 3] += 170 * (number >= 3)
                path = folder / word / f"n{number:08}" / f"{number}_{index}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(cv2.imencode(".jpg", image.astype(np.uint8))[1].tobytes())
    (folder / "classes.txt").write_text("crane\ncrane\ntench\na\nb\nc\n")  # ImageNet has two cranes
    return folder


def _words(workdir: pathlib.Path, settings: dict[str, Any]) -> list[str]:
    flags = [f"--config.{key}={value}" for key, value in (SMALL | settings).items()]
    return ["--config", "topformer_t_imagenet", "--workdir", str(workdir), *flags]


@pytest.fixture(scope="module")
def trained(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A run from the folders that was never stopped, and its output."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, commands.command(train.main, *_words(workdir, {"data.root": root}))


def test_it_learns_and_says_so(trained: tuple[pathlib.Path, str]) -> None:
    workdir, out = trained
    losses = list(commands.losses(workdir).values())
    assert len(losses) == 30
    print(f"losses: {losses[0]:.2f} ... {losses[-1]:.2f}")
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:3])
    assert "6 classes" in out
    assert "36 training and 18 validation examples" in out
    assert re.search(r"step 30/30  loss .*  correct .*%", out)
    assert "best: top-1" in out
    scored = [r for r in logs.read_records(workdir / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert [record["step"] for record in scored] == [15, 30]
    assert all(0 <= record["top1"] <= record["top5"] <= 1 for record in scored)
    assert (workdir / "curves.png").exists()


def test_a_stopped_run_from_records_is_bitwise_the_one_from_folders(
    trained: tuple[pathlib.Path, str], root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    packing.build("imagenet", str(root), str(tmp_path / "records"))
    packed = {"data.source": "array_record", "data.root": tmp_path / "records"}
    workdir = tmp_path / "run"
    with commands.stop_after(7):
        commands.command(train.main, *_words(workdir, packed | {"data.num_workers": 1}))
    stopped_at = max(commands.losses(workdir))
    assert 7 <= stopped_at < 30
    assert f"from checkpoint {stopped_at}" in commands.command(train.main, *_words(workdir, packed))
    assert commands.outcome(workdir) == commands.outcome(trained[0])


def test_evaluate(trained: tuple[pathlib.Path, str], root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The command gives the score that training logged last."""
    words = _words(tmp_path, {"data.root": root})
    out = commands.command(evaluate.main, "--checkpoint", trained[0], *words)
    logged = [r for r in logs.read_records(trained[0] / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    expected = f"top-1 {100 * logged['top1']:.2f}  top-5 {100 * logged['top5']:.2f}  of 18 images"
    assert expected in out
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (written["top1"], written["top5"], written["images"]) == (logged["top1"], logged["top5"], 18)
    assert list(written["classes"]) == ["crane (0)", "crane (1)", "tench", "a", "b", "c"]
    assert np.mean(list(written["classes"].values())) == pytest.approx(logged["top1"])


@pytest.mark.parametrize("flag", ["--flip", "--slide", "--img-ratios=0.5,1", "--runtime=onnx"])
def test_flags_of_segmentation_are_refused(flag: str, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = _words(tmp_path, {"data.root": root})
    line = commands.refused_command(evaluate.main, "--checkpoint", "x.pth", flag, *words)
    assert "topformer_t_imagenet is a classifier: --exported, --runtime, --stretch, --img-ratios" in line


def test_a_segmenter_starts_from_it(trained: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> None:
    start = {"init_from": trained[0], "init_part": "backbone", "schedule.steps": 2, "model.depths": 1}
    out = commands.run_here(tmp_path, start)
    assert "step 2/2" in out
    assert f"from {trained[0]}: backbone.tpm, backbone.trans; random: backbone.SIM, decode_head.conv_seg" in out
    tensors, _ = checkpoints.read_model(trained[0])
    given = config.load(config.shapes(), {"model.depths": 1})
    model = checkpoints.load_model(given, trained[0], part="backbone")
    found = models.state_dict(model)
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    assert len(backbone) > 150
    for name, tensor in backbone.items():
        np.testing.assert_array_equal(found[f"backbone.{name}"], tensor)


def test_it_goes_back_to_pytorch(trained: tuple[pathlib.Path, str], tmp_path: pathlib.Path) -> None:
    """The official keys load strictly into the PyTorch network, with our logits; and the file loads here again."""
    file = tmp_path / "classifier.pth"
    commands.command(convert.main, "--checkpoint", trained[0], "--output", file)
    states = torch.load(file, weights_only=True)["state_dict"]
    network = reference.Classifier("tiny", CLASSES, depths=1).eval()
    network.load_state_dict(states)
    images = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype(np.float32)
    given = config.load("topformer_t_imagenet", {"model.num_classes": CLASSES, "model.depths": 1})
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    for source in (trained[0], file):
        found = np.asarray(load(given, source)(images))
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_browse(root: pathlib.Path) -> None:
    given = config.load("topformer_t_imagenet", SMALL | {"data.root": str(root)})
    canvas = browse.browse(given, 1, 3)
    assert canvas.shape[0] > 3 * 256
    assert canvas.std() > 20


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eight_devices_train_as_one(x64: None, root: pathlib.Path, steps: int) -> None:
    """With everything on, in float64; devices send each other gradients and sums, and no images."""
    more = {
        "data.root": str(root),
        "batch_size": 16 * steps,
        "grad_accum_steps": steps,
        "model.dtype": "float64",
        "data.rand_augment": 9.0,
        "data.erasing_prob": 0.5,
        "data.mixup_alpha": 0.4,
        "model.dropout_ratio": 0.3,
        "model.drop_path_rate": 0.3,
    }
    given = config.load("topformer_t_imagenet", SMALL | more)
    source = sources.open_source(given, "train")
    batches = loader.training_batches(source, given)
    inputs = [next(batches) for _ in range(3)]
    batches.close()
    results = []
    for count in (1, 8):
        mesh = sharding.make_train_mesh(given, jax.devices()[:count])
        state, train_step = init_training(given, mesh)
        losses = []
        for batch in inputs:
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))
        results.append((losses, state.average))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-9)
    for name, value in results[0][1].items():
        np.testing.assert_allclose(np.asarray(results[1][1][name]), np.asarray(value), rtol=1e-5, atol=1e-7)
    if steps == 1:
        sent = traffic.sent_by_kind(train_step.lower(state, batch).compile().as_text())  # type: ignore[attr-defined]
        assert set(sent) == {"all-reduce"}
        assert sent["all-reduce"] < summed_bytes(state, given) + 64


def test_every_image_counts_once_on_any_mesh(root: pathlib.Path) -> None:
    """18 images in batches of 4 a device: the same ranks on 1, 3 and 8 devices as of each image by itself."""
    more = {"data.root": str(root), "evaluation.per_device_batch_size": 4}
    given = config.load("topformer_t_imagenet", SMALL | more)
    model, source = load(given), sources.open_source(given, "validation")
    assert isinstance(model, models.Classifier)
    results = [
        evaluate_classifier(model, source, sharding.make_inference_mesh(jax.devices()[:count])) for count in (1, 3, 8)
    ]
    for result in results:
        np.testing.assert_array_equal(result.ranks, results[0].ranks)
        np.testing.assert_array_equal(result.labels, np.arange(18) // 3)
    images = np.stack([class_images.make_evaluation_image(source[index], given) for index in range(18)])
    logits = np.asarray(model(normalize(images)))
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = (order == (np.arange(18) // 3)[:, None]).argmax(1)
    np.testing.assert_array_equal(results[0].ranks, expected)
    assert results[0].top(1) == (expected == 0).mean()
    assert results[0].top(5) == (expected < 5).mean()


def test_ranks_of_equal_logits_and_of_none() -> None:
    """Equal logits rank by their numbers, as in a stable sort; what is not a number is never right."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (200, 9)).astype(np.float32)
    labels = rng.integers(0, 9, 200).astype(np.int32)
    expected = (np.argsort(-logits, axis=1, kind="stable") == labels[:, None]).argmax(1)
    np.testing.assert_array_equal(compute_ranks(jnp.asarray(logits), jnp.asarray(labels)), expected)
    broken = compute_ranks(jnp.full((2, 9), jnp.nan), jnp.array([0, 8]))
    assert int(broken.min()) == 9
