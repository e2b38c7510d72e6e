"""Flip, random erasing and mixup of a batch, and the loss, against published formulas in NumPy and PyTorch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from benchmarks import traffic
from topformer_jax import config
from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.batch import Batch
from topformer_jax.data.classification import augment as class_augment
from topformer_jax.ops.loss import class_cross_entropy
from topformer_jax.runtime import sharding

SIDE = 32


def _batch(count: int) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8),
        "label": rng.integers(0, 9, count).astype(np.int32),
        "size": np.full((count, 2), SIDE, np.int32),
        "index": np.arange(count, dtype=np.int32) * 7,
        "epoch": np.arange(count, dtype=np.int32) // 3,
    }


def _settings(**changes: float) -> ConfigDict:
    base = {"data.flip_prob": 0.0, "data.erasing_prob": 0.0, "data.mixup_alpha": 0.0}
    return config.load(config.imagenet("tiny"), base | {f"data.{key}": value for key, value in changes.items()})


@functools.cache
def _compiled(**changes: float) -> Callable:
    return jax.jit(functools.partial(class_augment.augment_classes, config=_settings(**changes)))


def _augment(batch: Batch, **changes: float) -> tuple[np.ndarray, class_augment.MixedClasses]:
    return jax.device_get(_compiled(**changes)(batch))


ALL = {"flip_prob": 0.5, "erasing_prob": 0.5, "mixup_alpha": 0.4}


def test_flips() -> None:
    batch = _batch(200)
    plain, classes = _augment(batch)
    np.testing.assert_allclose(plain, (batch["image"] - MEAN) / STD, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(classes.first, batch["label"])
    assert (classes.share == 1).all()
    flipped, _ = _augment(batch, flip_prob=0.5)
    same, turned = (plain == flipped).all((1, 2, 3)), (plain[:, :, ::-1] == flipped).all((1, 2, 3))
    assert (same ^ turned).all()
    assert 0.4 < turned.mean() < 0.6


def test_erasing() -> None:
    """Rectangles of timm's areas and aspect ratios, as often as asked, filled with standard normal noise."""
    count, side = 1000, 48
    image = jnp.full((side, side, 3), 100.0)
    keys = jax.random.split(jax.random.key(0), 2 * count).reshape(2, count)
    erase = jax.jit(jax.vmap(lambda key, noise: class_augment.erase(image, key, noise, 0.2)))
    results = np.asarray(erase(*keys))
    changed = (results != 100).all(-1)
    assert ((results != 100).any(-1) == changed).all()
    hit = changed.any((1, 2))
    assert abs(hit.mean() - 0.2) < 0.03
    heights, widths = changed.any(2).sum(1)[hit], changed.any(1).sum(1)[hit]
    np.testing.assert_array_equal(changed.sum((1, 2))[hit], heights * widths)  # full rectangles
    share = heights * widths / side**2
    assert share.min() > 0.016  # 0.02 but for the rounding of the sides
    assert share.max() < 1 / 3 + 0.02
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.015
    logs = np.log(heights / widths)
    assert abs(logs.mean()) < 0.1
    assert 0.95 * np.log(1 / 0.3) < np.abs(logs).max() < 1.1 * np.log(1 / 0.3)
    noise = results[hit][changed[hit]]
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    tops = np.array([np.flatnonzero(rows)[0] for rows in changed[hit].any(2)])
    assert abs((tops / (side - heights + 1e-9)).mean() - 0.5) < 0.05


def test_mixup() -> None:
    """Images and targets of the paper's formula, and shares whose moments are those of Beta(0.2, 0.2)."""
    batch = _batch(2000)
    plain, _ = _augment(batch)
    images, classes = _augment(batch, mixup_alpha=0.2)
    share = np.asarray(classes.share)
    partner = np.arange(2000) ^ 1
    np.testing.assert_array_equal(classes.first, batch["label"])
    np.testing.assert_array_equal(classes.second, np.asarray(batch["label"])[partner])
    weight = share[:, None, None, None]
    expected = weight * np.asarray(plain) + (1 - weight) * np.asarray(plain)[partner]
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)
    assert abs(share.mean() - 0.5) < 0.03
    assert share.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.1)


def test_a_mesh_gives_the_same_and_sends_no_image() -> None:
    batch = _batch(16)
    layout = sharding.batch_sharding(sharding.make_inference_mesh(jax.devices()))
    placed = jax.device_put(batch, layout)
    function = functools.partial(class_augment.augment_classes, config=_settings(**ALL))
    program = jax.jit(function, out_shardings=layout).lower(placed).compile()
    jax.tree.map(np.testing.assert_array_equal, program(placed), _augment(batch, **ALL))
    text = program.as_text()
    assert text is not None
    # Beta is drawn by rejection: the loop ends when all devices are done.
    assert traffic.sent_by_kind(text) == {"all-reduce": 4}


def test_draws_depend_only_on_seed_epoch_and_index() -> None:
    batch = _batch(16)
    images, _ = _augment(batch, **ALL)
    moved: Batch = jax.tree.map(lambda values: np.roll(values, 2, 0), batch)  # pairs stay neighbours
    np.testing.assert_array_equal(_augment(moved, **ALL)[0], np.roll(images, 2, 0))
    for name in ("epoch", "index"):
        other: Batch = batch | {name: batch[name] + 1}  # type: ignore[assignment]
        assert (_augment(other, **ALL)[0] != images).any((1, 2, 3)).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_against_pytorch(x64: None, smoothing: float) -> None:
    """Value and gradient of torch's cross-entropy with mixed targets and label smoothing."""
    rng = np.random.default_rng(0)
    logits, first, second = rng.normal(size=(12, 7)) * 4, rng.integers(0, 7, 12), rng.integers(0, 7, 12)
    share = rng.random(12)

    def ours(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = class_cross_entropy(
            logits, jnp.asarray(first), jnp.asarray(second), jnp.asarray(share), smoothing=smoothing
        )
        assert sums.valid.dtype == sums.correct.dtype
        return sums.loss, sums.correct

    (loss, correct), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(logits))
    theirs = torch.tensor(logits, requires_grad=True)
    targets = torch.zeros(12, 7, dtype=torch.float64)
    for row in range(12):
        targets[row, first[row]] += share[row]
        targets[row, second[row]] += 1 - share[row]
    expected = torch.nn.functional.cross_entropy(theirs, targets, label_smoothing=smoothing, reduction="sum")
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    assert theirs.grad is not None
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-9, atol=1e-12)
    larger = np.where(share >= 0.5, first, second)
    assert int(correct) == (logits.argmax(1) == larger).sum()
