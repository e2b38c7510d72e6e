"""The tiled losses against the plain formulations and against PyTorch: values and gradients."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

from benchmarks import traffic
from tests.parity import distance, to_nchw, to_nhwc
from tests.reference.loss import plain_cross_entropy
from topformer_jax.ops import IGNORE_LABEL, tile_sums
from topformer_jax.ops.loss import PixelLoss, channel_divergence, upsampled_cross_entropy
from topformer_jax.ops.overlap import upsampled_dice, upsampled_jaccard, upsampled_lovasz
from topformer_jax.ops.tile_sums import ACCELERATOR, CPU, GPU, Tiling

SIDE = st.integers(1, 9)
TILINGS = (
    CPU,
    ACCELERATOR,
    CPU._replace(height=3, width=5, images=1),
    ACCELERATOR._replace(height=3, width=5, images=2),
    GPU,
    GPU._replace(height=3, width=5, together=20),
)


def inputs(seed: int, n: int, cells: Any, pixels: Any, classes: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (n, *pixels)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.2] = IGNORE_LABEL
    return rng.normal(size=(n, *cells, classes)) * 4, labels


def _program(function: Any, **options: Any) -> Any:
    """A compiled function that returns the gradient of three times the loss, and the sums."""

    def scaled(logits: Any, labels: Any) -> tuple[Any, Any]:
        sums = function(logits, labels, **options)
        return 3 * sums.loss, sums

    return jax.jit(jax.grad(scaled, has_aux=True))


def _sums_and_gradient(function: Any, logits: Any, labels: Any, **options: Any) -> tuple[Any, Any]:
    """The sums, and the gradient of three times the loss."""
    gradient, sums = _program(function, **options)(logits, jnp.asarray(labels))
    return sums, gradient


@contextlib.contextmanager
def on_cpu(tiling: Tiling) -> Iterator[None]:
    """Uses this tiling on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_sums, "CPU", tiling)
        yield


@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 6),
    cells=st.tuples(SIDE, SIDE),
    pixels=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    classes=st.integers(1, 7),
    tiling=st.sampled_from(TILINGS),
    devices=st.integers(1, 3),
)
@pytest.mark.usefixtures("x64")
def test_the_tiled_loss_is_the_plain_one(
    seed: int, n: int, cells: Any, pixels: Any, classes: int, tiling: Tiling, devices: int
) -> None:
    logits, labels = inputs(seed, n, cells, pixels, classes)
    with on_cpu(tiling):
        ours, our_gradient = _sums_and_gradient(upsampled_cross_entropy, jnp.asarray(logits), labels, devices=devices)
    plain, gradient = _sums_and_gradient(plain_cross_entropy, jnp.asarray(logits), labels)
    assert abs(float(ours.loss - plain.loss)) <= 1e-12 * max(float(plain.loss), 1)
    assert int(ours.correct) == int(plain.correct)
    assert int(ours.valid) == int(plain.valid) == int((labels != IGNORE_LABEL).sum())
    assert np.abs(our_gradient - gradient).max() <= 1e-12 * max(np.abs(gradient).max(), 1)


PIXEL_LOSSES = {
    "class weights": PixelLoss(class_weight=(0.5, 2.0, 0.0, 1.0, 3.0)),
    "hard pixels": PixelLoss(ohem_threshold=0.4),
    "soft distillation": PixelLoss(distillation_weight=0.7, temperature=3.0),
    "sharp distillation": PixelLoss(distillation_weight=0.7, temperature=0.5),
    "everything": PixelLoss((0.5, 2.0, 0.0, 1.0, 3.0), 0.1, 0.6, 0.7, 2.0),
}


@pytest.mark.parametrize(
    ("name", "tiling"),
    [*((name, TILINGS[2]) for name in PIXEL_LOSSES), *(("everything", TILINGS[i]) for i in (3, 5))],
)
@pytest.mark.usefixtures("x64")
def test_losses_of_pixels_are_the_plain_ones(name: str, tiling: Tiling) -> None:
    pixel_loss = PIXEL_LOSSES[name]
    logits, labels = inputs(3, 3, (5, 6), (37, 45), 5)
    teacher = jnp.asarray(inputs(4, 3, (5, 6), (1, 1), 5)[0]) if pixel_loss.distillation_weight else None
    arguments = jnp.asarray(logits), labels
    options: dict[str, Any] = {"pixel_loss": pixel_loss, "teacher": teacher}
    with on_cpu(tiling):
        ours, gradient = _sums_and_gradient(upsampled_cross_entropy, *arguments, **options)
    plain, plain_gradient = _sums_and_gradient(plain_cross_entropy, *arguments, **options)
    default, _ = _sums_and_gradient(plain_cross_entropy, *arguments)
    assert abs(float(ours.loss) / float(plain.loss) - 1) <= 1e-12
    assert distance(gradient, plain_gradient) <= 1e-12
    assert (int(ours.correct), int(ours.valid)) == (int(plain.correct), int(plain.valid))
    assert abs(float(default.loss) / float(plain.loss) - 1) > 1e-3  # the option does something


@pytest.mark.usefixtures("x64")
def test_losses_of_pixels_against_pytorch() -> None:
    """Class weights, smoothing, and Hinton's loss of PyTorch's `kl_div` at the labelled pixels."""
    logits, labels = inputs(5, 2, (5, 6), (37, 45), 5)
    teacher = inputs(7, 2, (5, 6), (1, 1), 5)[0]
    weights = (0.5, 2.0, 0.0, 1.0, 3.0)
    pixel_loss = PixelLoss(weights, label_smoothing=0.2, distillation_weight=0.7, temperature=3.0)
    options = {"teacher": jnp.asarray(teacher), "pixel_loss": pixel_loss}
    ours, gradient = _sums_and_gradient(upsampled_cross_entropy, jnp.asarray(logits), labels, **options)
    tensor = to_nchw(logits).requires_grad_()
    student, goal = (
        torch.nn.functional.interpolate(x, labels.shape[1:], mode="bilinear", align_corners=False)
        for x in (tensor, to_nchw(teacher))
    )
    target = torch.from_numpy(labels).long()
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(student / 3, 1), torch.softmax(goal / 3, 1), reduction="none"
    ).sum(1)
    loss = torch.nn.functional.cross_entropy(
        student,
        target,
        weight=torch.tensor(weights, dtype=torch.float64),
        ignore_index=IGNORE_LABEL,
        reduction="none",
        label_smoothing=0.2,
    ).sum()
    loss = loss + 0.7 * 9 * divergence[target != IGNORE_LABEL].sum()
    (3 * loss).backward()
    assert tensor.grad is not None
    assert abs(float(ours.loss) / loss.item() - 1) <= 1e-12
    assert distance(gradient, to_nhwc(tensor.grad)) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_channel_divergence_against_pytorch() -> None:
    """The formula of mmrazor's ChannelWiseDivergence for each image."""
    logits, teacher = (inputs(seed, 2, (5, 6), (1, 1), 4)[0] for seed in (9, 10))
    factors = np.array((2.0, -0.5))

    def total(logits: Any) -> Any:
        losses = channel_divergence(logits, jnp.asarray(teacher), temperature=3.0)
        return jnp.sum(losses * factors), losses

    gradient, ours = jax.grad(total, has_aux=True)(jnp.asarray(logits))
    tensor = to_nchw(logits).requires_grad_()
    student, goal = (x.reshape(8, 30) / 3 for x in (tensor, to_nchw(teacher)))
    divergence = torch.softmax(goal, 1) * (torch.log_softmax(goal, 1) - torch.log_softmax(student, 1))
    losses = divergence.reshape(2, -1).sum(1) * 9 / 4
    (losses * torch.from_numpy(factors)).sum().backward()
    assert tensor.grad is not None
    assert distance(ours, losses.detach().numpy()) <= 1e-12
    assert distance(gradient, to_nhwc(tensor.grad)) <= 1e-12


@pytest.mark.parametrize(
    ("tiling", "loops"),
    [(ACCELERATOR, 1), (ACCELERATOR._replace(images=2), 2), (GPU._replace(together=6), 1)],
)
def test_devices_that_share_the_batch(tiling: Tiling, loops: int) -> None:
    """24 images on 8 devices, in groups of 3 or 1 per device: the plain sums, and nothing else is sent."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, P("data"))
    logits, labels = inputs(2, 24, (5, 7), (39, 45), 6)
    logits = logits.astype(np.float32)
    with on_cpu(tiling):
        plain, gradient = _sums_and_gradient(plain_cross_entropy, jnp.asarray(logits), labels)
        program = _program(upsampled_cross_entropy, devices=8)
        arguments = jax.device_put((logits, labels), place)
        found, sums = program(*arguments)
        text = program.lower(*arguments).compile().as_text()
    assert found.sharding.is_equivalent_to(place, 4)
    assert text.count(" while(") == loops
    assert traffic.sent_bytes(text) == sum(x.nbytes for x in sums)
    assert abs(float(sums.loss) / float(plain.loss) - 1) <= 1e-6
    assert (int(sums.correct), int(sums.valid)) == (int(plain.correct), int(plain.valid))
    assert distance(found, gradient) <= 1e-6


@pytest.mark.parametrize("tiling", [CPU, ACCELERATOR])
def test_float32_against_pytorch(tiling: Tiling) -> None:
    cells = 13, 21
    logits, labels = inputs(0, 2, cells, (8 * cells[0], 8 * cells[1] - 3), 150)
    logits = logits.astype(np.float32)
    tensor = to_nchw(logits).requires_grad_()
    resized = torch.nn.functional.interpolate(tensor, labels.shape[1:], mode="bilinear", align_corners=False)
    target = torch.from_numpy(labels).long()
    loss = torch.nn.functional.cross_entropy(resized, target, ignore_index=IGNORE_LABEL, reduction="sum")
    (3 * loss).backward()
    assert tensor.grad is not None
    for function in (upsampled_cross_entropy, plain_cross_entropy):
        with on_cpu(tiling):
            ours, gradient = _sums_and_gradient(function, jnp.asarray(logits), labels)
        assert abs(float(ours.loss) / loss.item() - 1) <= 1e-6
        assert distance(gradient, to_nhwc(tensor.grad)) <= 1e-6


def test_ignored_labels_only() -> None:
    logits, labels = inputs(1, 2, (4, 4), (32, 32), 5)
    sums, gradient = _sums_and_gradient(
        upsampled_cross_entropy, jnp.asarray(logits, jnp.float32), np.full_like(labels, IGNORE_LABEL)
    )
    assert (float(sums.loss), int(sums.correct), int(sums.valid)) == (0, 0, 0)
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("height", [1000, 3e4])
def test_large_logits_are_exact(height: float) -> None:
    """Where the largest class changes between two cells by so much that `exp` of all others is 0."""
    logits = np.zeros((1, 4, 4, 3), np.float32)
    logits[:, ::2, :, 0] = logits[:, 1::2, :, 1] = height
    logits[:, 1::2, :, 2] = -height
    labels = np.ones((1, 32, 32), np.int32)
    ours, gradient = _sums_and_gradient(upsampled_cross_entropy, jnp.asarray(logits), labels)
    plain, plain_gradient = _sums_and_gradient(plain_cross_entropy, jnp.asarray(logits), labels)
    assert float(ours.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    assert distance(gradient, plain_gradient) <= 1e-6


@pytest.mark.parametrize(
    ("function", "part"),
    [(upsampled_cross_entropy, 30), (upsampled_dice, 30), (upsampled_jaccard, 30), (upsampled_lovasz, 20)],
)
def test_memory_is_a_small_part(function: Any, part: int) -> None:
    """Of 4 images of 150 classes at 512 x 512; PyTorch keeps at least three arrays as large as the resized logits."""
    logits = jax.ShapeDtypeStruct((4, 64, 64, 150), jnp.float32)
    labels = jax.ShapeDtypeStruct((4, 512, 512), jnp.int32)

    def total(logits: Any, labels: Any) -> Any:
        return jax.tree.leaves(jax.tree.map(jnp.sum, function(logits, labels)))[0]

    step = jax.jit(jax.value_and_grad(total))
    memory = step.lower(logits, labels).compile().memory_analysis()
    assert memory is not None
    resized = 4 * 512 * 512 * 150 * 4
    print(f"temporary {memory.temp_size_in_bytes / 1e6:.0f} MB, the resized logits {resized / 1e6:.0f} MB")
    assert memory.temp_size_in_bytes <= 3 * resized / part
