"""The training step against the official training trace, and against itself on other devices."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from benchmarks import traffic
from tests.parity import distance, summed_bytes
from tests.reference.loss import plain_cross_entropy, plain_dice, plain_jaccard, plain_lovasz
from topformer_jax import config, load
from topformer_jax.checkpoints.torch_format import to_torch
from topformer_jax.data import augment
from topformer_jax.data.batch import Batch
from topformer_jax.ops.loss import PixelLoss, channel_divergence
from topformer_jax.runtime import sharding
from topformer_jax.training.step import TrainState, init_training

Find = Callable[[str], pathlib.Path]


def _settings(dtype: str = "float32", **changes: Any) -> ConfigDict:
    """The trace's recipe: Tiny, no drops, no augmentation."""
    base = {
        "batch_size": 4,
        "model.dtype": dtype,
        "model.drop_path_rate": 0.0,
        "model.dropout_ratio": 0.0,
        "data.flip_prob": 0.0,
        "data.photometric_distortion": False,
        "schedule.lr": 2e-5,
        "schedule.steps": 40,
        "schedule.warmup_steps": 5,
    }
    return config.load(config.ade20k("tiny"), base | {k.replace("__", "."): v for k, v in changes.items()})


def _batch(images: np.ndarray, labels: np.ndarray) -> Batch:
    n = len(images)
    return {
        "image": images,
        "label": labels,
        "size": np.tile(np.array(images.shape[1:3], np.int32), (n, 1)),
        "index": np.arange(n, dtype=np.int32),
        "epoch": np.zeros(n, np.int32),
    }


def _random_batch(n: int, size: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, size // 8, size // 8, 3), dtype=np.uint8)
    images = coarse.repeat(8, 1).repeat(8, 2)
    labels = (images[..., 0] // 26).astype(np.uint8)
    labels[:, :8] = 255
    return _batch(images, labels)


def _mesh(devices: int, fsdp: int = 1) -> jax.sharding.Mesh:
    settings = _settings(batch_size=8, mesh__fsdp=fsdp)
    return sharding.make_train_mesh(settings, jax.devices()[:devices])


@pytest.mark.parametrize(("dtype", "devices", "limit"), [("float64", 4, 1e-7), ("float32", 1, 2e-3)])
def test_golden_trace(golden: Find, dtype: str, devices: int, limit: float) -> None:
    """Loss and learning rate of 20 steps, then every weight and statistic, in float64 on four devices too."""
    noise = json.loads(golden("train_trace/trace.json").read_text())
    assert noise["steps"] == 20
    mesh = _mesh(devices)
    with jax.enable_x64(dtype == "float64"), np.load(golden("train_trace/trace.npz")) as trace:
        settings = _settings(dtype)
        state, train_step = init_training(settings, mesh, load(settings, golden("checkpoints/tiny_init.pth")))
        worst = {"loss": 0.0, "lr": 0.0}
        for index in range(20):
            state, metrics = train_step(state, _batch(trace["images"][index % 2], trace["labels"][index % 2]))
            if index == 0 and dtype == "float64":
                moments = {name: np.array(moment) for name, moment in state.optimizer[1].mu.items()}
                _check_gradients(moments, trace)
            for mine, theirs in (("loss", "loss"), ("learning_rate", "lr")):
                error = abs(float(metrics[mine]) / trace[theirs][index] - 1)
                worst[theirs] = max(worst[theirs], error)
        tensors = {k: to_torch(np.asarray(v)) for k, v in (state.params | state.stats).items()}
        final = {name: trace[f"final/{name}"] for name in tensors}
    errors = {name: distance(tensors[name], final[name]) for name in final if np.abs(final[name]).max() > 1e-8}
    print(f"trace in {dtype}: {worst}, final tensors {max(errors.values()):.1e} ({len(errors)} of {len(final)})")
    assert worst["lr"] <= 1e-7
    assert worst["loss"] <= limit
    assert len(errors) > 300
    if dtype == "float64":
        assert max(errors.values()) <= 1e-6  # they are stored in float32
        for name in set(final) - set(errors):  # zero in exact arithmetic: noise, and no more than that
            assert np.abs(tensors[name]).max() <= 1e-8, name


def _check_gradients(moments: dict[str, np.ndarray], trace: Any) -> None:
    """Every gradient of the first step, read off Adam's first moment."""
    errors = {}
    for name, moment in moments.items():
        theirs = trace[f"grad0/{name}"]
        mine = to_torch(moment) / (1 - 0.9)
        if np.abs(theirs).max() > 1e-8:
            errors[name] = distance(mine, theirs)
        else:
            assert np.abs(mine).max() <= 1e-8, name
    print(f"gradients of step 0: {max(errors.values()):.1e} ({len(errors)} of {len(moments)} are not noise)")
    assert len(errors) > 100
    assert max(errors.values()) <= 1e-6


def _run(
    settings: ConfigDict, mesh: jax.sharding.Mesh, steps: int = 3
) -> tuple[TrainState, list[float], Callable[[], str]]:
    """The state after some steps, their losses, and what gives the text of the compiled program."""
    state, train_step = init_training(settings, mesh)
    losses, name = [], "decode_head.conv_seg.weight"
    for step in range(steps):
        batch = _random_batch(settings.batch_size, 64, step)
        old = np.array(state.average[name])  # its memory is the step's
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        expected = decay * old + (1 - decay) * np.asarray(state.params[name])
        np.testing.assert_allclose(np.asarray(state.average[name]), expected, rtol=1e-12)
        assert set(state.average) == set(state.params) | set(state.stats)
    return state, losses, lambda: train_step.lower(state, batch).compile().as_text()  # type: ignore[attr-defined]


LOSSES: dict[str, Any] = {
    "model__depths": 1,
    "loss__class_weight": tuple(1 + 0.01 * i for i in range(150)),
    "loss__label_smoothing": 0.1,
    "loss__ohem_threshold": 0.9,
    "loss__dice_weight": 0.5,
    "loss__jaccard_weight": 0.4,
    "loss__lovasz_weight": 0.3,
    "distillation__weight": 0.7,
    "distillation__temperature": 2.0,
}
TEACHER: dict[str, Any] = {
    "distillation__config": "the teacher",
    "distillation__checkpoint": "is an argument",
    "distillation__jaccard_weight": 0.2,
    "distillation__channel_weight": 0.6,
}


def _everything_on() -> ConfigDict:
    return _settings(
        "float64",
        batch_size=8,
        data__flip_prob=0.5,
        data__photometric_distortion=True,
        model__drop_path_rate=0.3,
        model__dropout_ratio=0.3,
        ema_decay=0.2,
        ema_warmup=True,
        **LOSSES,
    )


@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_eight_devices_equal_one_with_everything_on(x64: None, fsdp: int) -> None:
    """Augmentation, drop path, dropout, averages, losses: all draws and BatchNorm see the global batch."""
    settings = _everything_on()
    one, losses, _ = _run(settings, _mesh(1))
    many, other, text = _run(settings, _mesh(8, fsdp))
    _check_collectives(text(), many, settings, fsdp)
    np.testing.assert_allclose(other, losses, rtol=1e-9)
    for name, value in one.average.items():
        np.testing.assert_allclose(np.asarray(many.average[name]), np.asarray(value), rtol=1e-5, atol=1e-7)
    weight = many.params["backbone.trans.transformer_blocks.0.mlp.fc1.c.weight"]
    assert len({str(shard.index) for shard in weight.addressable_shards}) == fsdp


def _check_collectives(text: str, state: TrainState, settings: ConfigDict, fsdp: int) -> None:
    """Devices send each other gradients and sums, and parameters inside a group of `fsdp`; no feature maps."""
    sent = traffic.sent_by_kind(text)
    if fsdp == 1:
        # On a CPU each loop over tiles also asks for the extremes of the logits: one loop of the cross-entropy, two
        # of Dice and of Jaccard. Each loss of images has a mean, and Lovász-softmax asks for the largest number of
        # classes in a label. Counts of pixels are int64 here.
        loops, means = 5, 3
        assert sent == {"all-reduce": summed_bytes(state, settings) + (2 * loops + means) * 8 + 4}
        return
    divided = [value for value in state.params.values() if not value.is_fully_replicated]
    assert set(sent) <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert sent["all-gather"] == sum(value.nbytes for value in divided)


def test_micro_batches_and_means(x64: None) -> None:
    """Two micro-batches add up to the whole batch; the loss's mean is over all pixels or the labelled ones.

    With one image twice in the batch, interleaved so that both micro-batches hold the same, BatchNorm sees the same.
    """
    batch = _random_batch(2, 256)  # 4 x 4 tokens: BatchNorm over fewer values blows rounding up
    batch = jax.tree.map(lambda values: np.repeat(values, 2, axis=0), batch)
    share = float((batch["label"] != 255).mean())
    results = []
    for count, is_over_labelled in ((1, False), (2, True)):
        factor = share if is_over_labelled else 1
        images = (
            "loss__dice_weight",
            "loss__jaccard_weight",
            "loss__lovasz_weight",
        )  # their means are over images
        options = LOSSES | {name: LOSSES[name] / factor for name in images}
        settings = _settings("float64", grad_accum_steps=count, ignore_void_in_mean=is_over_labelled, **options)
        state, train_step = init_training(settings, _mesh(1))
        state, metrics = train_step(state, batch)
        results.append((float(metrics["loss"]) * factor, float(metrics["gradient_norm"]) * factor))
        assert int(state.stats["backbone.tpm.stem.0.bn.num_batches_tracked"]) == count
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    assert share == pytest.approx(31 / 32)


def test_the_loss_is_the_textbooks_of_the_networks_outputs(x64: None) -> None:
    """With all options and a teacher, on eight devices."""
    settings = _settings("float64", batch_size=8, **LOSSES, **TEACHER)
    teacher = load(config.load(settings, {"seed": 7}))
    batch, model = _random_batch(8, 64), load(settings)
    state, train_step = init_training(settings, _mesh(8), model, teacher)
    found = float(train_step(state, batch)[1]["loss"])

    images = augment.normalize(batch["image"], jnp.float64)
    labels = jnp.asarray(batch["label"], jnp.int32)
    model = load(settings)
    model.train()
    pixel_loss = PixelLoss(tuple(settings.loss.class_weight), 0.1, 0.9, 0.7, 2.0)
    apply = nnx.jit(lambda model, images: model(images))
    logits = apply(model, images)
    goal = apply(teacher, images)
    sums = plain_cross_entropy(logits, labels, goal, pixel_loss=pixel_loss)
    expected = sums.loss / labels.size + sum(
        weight * jnp.mean(losses)
        for weight, losses in (
            (0.5, plain_dice(logits, labels)),
            (0.4, plain_jaccard(logits, labels)),
            (0.3, plain_lovasz(logits, labels)),
            (0.2, plain_jaccard(logits, labels, goal)),
            (0.6, channel_divergence(logits, goal)),
        )
    )
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_bfloat16_trains() -> None:
    state, train_step = init_training(_settings("bfloat16", schedule__lr=1e-3, model__depths=1), _mesh(1))
    losses = []
    for _ in range(8):
        state, metrics = train_step(state, _random_batch(4, 64))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert all(value.dtype == jnp.float32 for value in state.params.values())
