"""The device's augmentation against OpenCV, byte for byte, and what its draws may depend on."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from topformer_jax.data import augment as module
from topformer_jax.data.augment import MEAN, STD, augment, brightness, contrast, hue, normalize, saturation

Find = Callable[[str], pathlib.Path]
Batch = dict[str, np.ndarray]


def test_golden_photometric(golden: Find) -> None:
    steps: dict[str, Callable[[jax.Array], jax.Array]] = {
        "brightness+20.5": lambda x: brightness(x, 20.5),
        "brightness-31.7": lambda x: brightness(x, -31.7),
        "contrast*0.7": lambda x: contrast(x, 0.7),
        "contrast*1.43": lambda x: contrast(x, 1.43),
        "saturation*1.31": lambda x: saturation(x, 1.31),
        "saturation*0.55": lambda x: saturation(x, 0.55),
        "hue-18": lambda x: hue(x, -18),
        "hue+7": lambda x: hue(x, 7),
        "hue+17": lambda x: hue(x, 17),
        "hsv": lambda x: jnp.stack(module._to_hsv(module._split_channels(x)), -1).astype(jnp.uint8),
        "chain_brightness-12.25_saturation*1.2_hue-9_contrast*1.15": lambda x: contrast(
            hue(saturation(brightness(x, -12.25), 1.2), -9), 1.15
        ),
    }
    with np.load(golden("preprocess.npz")) as file:
        names = {key.removeprefix("photometric/") for key in file if key.startswith("photometric/")}
        assert names == set(steps)
        image = jnp.asarray(file["image_rgb"])
        for name, step in steps.items():
            theirs = file[f"photometric/{name}"]
            for ours in (step(image), *([jax.jit(step)(image)] if "chain" in name else [])):
                np.testing.assert_array_equal(np.asarray(ours), theirs, err_msg=name)


def _hsv_mismatches(rgb: np.ndarray) -> int:
    ours = np.asarray(_forward(jnp.asarray(rgb)))
    return int((ours != cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)).sum())


def _rgb_mismatches(hsv: np.ndarray) -> int:
    theirs = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return int((np.asarray(_backward(jnp.asarray(hsv))) != theirs).sum())


_forward = jax.jit(lambda x: module._to_image(module._pack(module._to_hsv(module._split_channels(x)))))
_backward = jax.jit(lambda x: module._to_image(module._pack(module._from_hsv(*module._split_channels(x)))))


def test_every_colour_as_opencv() -> None:
    second, third = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    for first in range(256):
        colours = np.stack([np.full_like(second, first), second, third], axis=-1)
        assert _hsv_mismatches(colours) == 0
        assert first >= 180 or _rgb_mismatches(colours) == 0


def test_rounds_once_whatever_the_compiler_fuses() -> None:
    """Operation by operation nothing can be fused; the result must still be the fused one."""
    rng = np.random.default_rng(1)
    x, y = (rng.integers(1, 2**24, 20000) / np.float32(2**24) for _ in range(2))
    x, y = x.astype(np.float32), y.astype(np.float32)
    exact = (1 - x.astype(np.longdouble) * y).astype(np.float32)
    with jax.disable_jit():
        ours = np.asarray(module._one_minus_product(jnp.asarray(x), jnp.asarray(y)))
    np.testing.assert_array_equal(ours, exact)
    assert (np.float32(1) - x * y != exact).mean() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalize(x64: None, dtype: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    ours = normalize(jnp.asarray(images), dtype)
    assert ours.dtype == dtype
    exact = (images - np.float64(MEAN)) / np.float64(STD)
    np.testing.assert_allclose(ours, exact, rtol={"float32": 1e-6, "float64": 1e-15}[dtype], atol=0)
    np.testing.assert_array_equal(normalize(images, dtype), ours)


def test_normalize_rounds_bfloat16_once() -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    theirs = normalize(jnp.asarray(images)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(normalize(jnp.asarray(images), jnp.bfloat16), theirs)


def _batch(n: int, height: int = 24, width: int = 40, seed: int = 0) -> Batch:
    """Examples as `random_resize_crop` makes them: padded with 0 and 255 to the right and below."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    labels = rng.integers(0, 150, (n, height, width), dtype=np.uint8)
    sizes = np.stack([rng.integers(1, side + 1, n) for side in (height, width)], axis=1).astype(np.int32)
    sizes[0] = height, width
    for image, label, (h, w) in zip(images, labels, sizes, strict=True):
        image[h:], image[:, w:], label[h:], label[:, w:] = 0, 0, 255, 255
    index, epoch = np.arange(n, dtype=np.int32) + 1000, np.full(n, 3, np.int32)
    return {"image": images, "label": labels, "size": sizes, "index": index, "epoch": epoch}


@functools.cache
def _compiled(switches: tuple[tuple[str, Any], ...]) -> Callable:
    return jax.jit(lambda batch, seed: augment(batch, seed, **dict(switches)))


def _run(batch: Batch, seed: int = 0, **switches: Any) -> tuple[np.ndarray, np.ndarray]:
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    images, labels = _compiled(tuple(switches.items()))(placed, seed)
    assert labels.dtype == jnp.int32
    return np.asarray(images), np.asarray(labels)


def _bytes(images: np.ndarray) -> np.ndarray:
    """The uint8 images that were normalised."""
    return np.rint(images * STD + MEAN).astype(np.uint8)


def test_flips_what_is_not_padding() -> None:
    batch = _batch(6)
    images, labels = _run(batch, flip=1.0, photometric=False)
    for i, (h, w) in enumerate(batch["size"]):
        np.testing.assert_array_equal(_bytes(images[i])[:h, :w], batch["image"][i, :h, :w][:, ::-1])
        np.testing.assert_array_equal(labels[i, :h, :w], batch["label"][i, :h, :w][:, ::-1])
        for padding in (images[i, h:], images[i, :, w:], labels[i, h:] - 255, labels[i, :, w:] - 255):
            assert not padding.any()


def test_switched_off_it_only_normalises() -> None:
    batch = _batch(6)
    images, labels = _run(batch, flip=0.0, photometric=False)
    inside = (batch["label"] != 255)[..., None]
    np.testing.assert_allclose(images, np.where(inside, (batch["image"] - MEAN) / STD, 0), rtol=1e-6)
    np.testing.assert_array_equal(labels, batch["label"])


def _opencv_distort(image: np.ndarray, steps: list[tuple[str, float]]) -> np.ndarray:
    """The photometric steps by OpenCV and NumPy."""
    for name, value in steps:
        pixels = image.astype(np.float32)
        if name == "brightness":
            image = np.clip(pixels + np.float32(value), 0, 255).astype(np.uint8)
        elif name == "contrast":
            image = np.clip(pixels * np.float32(value), 0, 255).astype(np.uint8)
        else:
            hsv = np.array(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
            if name == "hue":
                hsv[..., 0] = (hsv[..., 0].astype(int) + int(value)) % 180
            else:
                changed = hsv[..., 1].astype(np.float32) * np.float32(value)
                hsv[..., 1] = np.clip(changed, 0, 255).astype(np.uint8)
            image = np.array(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    return image


def test_the_whole_distortion_as_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes each example's draws down and does its steps with OpenCV."""
    drawn: dict[str, list[np.ndarray]] = {"bernoulli": [], "uniform": [], "randint": []}
    for name, values in drawn.items():
        draw = getattr(jax.random, name)

        def noting(*arguments: Any, draw: Callable = draw, values: list = values) -> jax.Array:
            value = draw(*arguments)
            values.append(value)
            return value

        monkeypatch.setattr(jax.random, name, noting)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 256, (8, 64, 3), dtype=np.uint8))
    planes = module._split_channels(image)
    taken: set[tuple[str, ...]] = set()
    distort = jax.jit(lambda key: (module._to_image(module._pack(module._distort(planes, key))), drawn))
    for number in range(64):
        for values in drawn.values():
            values.clear()
        ours, noted = distort(jax.random.key(number))
        lighter, stronger, early, saturated, turned = (bool(coin) for coin in noted["bernoulli"])
        delta, gain, factor = (float(value) for value in noted["uniform"])
        assert -32 <= delta <= 32
        assert 0.5 <= min(gain, factor) <= max(gain, factor) <= 1.5
        assert -18 <= int(noted["randint"][0]) <= 17
        steps = [("brightness", delta)] * lighter + [("contrast", gain)] * (stronger and early)
        steps += [("saturation", factor)] * saturated + [("hue", float(noted["randint"][0]))] * turned
        steps += [("contrast", gain)] * (stronger and not early)
        taken.add(tuple(name for name, _ in steps))
        np.testing.assert_array_equal(np.asarray(ours), _opencv_distort(np.asarray(image), steps))
    assert len(taken) >= 16  # of the 22 orders there are


def test_draws_are_uniform() -> None:
    """Over 1000 examples, a plain image tells of flips and of the steps that were taken."""
    n = 1000
    image = np.broadcast_to(np.array([[[[100, 60, 80]], [[90, 100, 70]]]], np.uint8), (n, 2, 1, 3)).copy()
    image = image.transpose(0, 2, 1, 3)  # two pixels in a row
    batch: Batch = {
        "image": image,
        "label": np.broadcast_to(np.array([[1, 2]], np.uint8), (n, 1, 2)).copy(),
        "size": np.full((n, 2), (1, 2), np.int32),
        "index": np.arange(n, dtype=np.int32),
        "epoch": np.zeros(n, np.int32),
    }
    _, labels = _run(batch)
    flipped = labels[:, 0, 0] == 2
    assert abs(flipped.mean() - 0.5) < 0.05
    images, labels = _run(batch, flip=0.0)
    assert (labels[:, 0] == (1, 2)).all()
    unchanged = (_bytes(images) == image).all(axis=(1, 2, 3))
    assert 0.5**4 - 0.02 < unchanged.mean() < 0.5**4 + 0.04  # and those changed too little to be seen


def test_an_example_does_not_know_its_batch() -> None:
    batch = _batch(4)
    images, labels = _run(batch)
    for i in range(4):
        alone = _run({name: array[i : i + 1] for name, array in batch.items()})
        np.testing.assert_array_equal(alone[0][0], images[i])
        np.testing.assert_array_equal(alone[1][0], labels[i])
    backwards = _run({name: array[::-1] for name, array in batch.items()})
    np.testing.assert_array_equal(backwards[0][::-1], images)


def test_draws_depend_on_seed_epoch_and_index() -> None:
    batch = _batch(4)
    images, _ = _run(batch)
    np.testing.assert_array_equal(_run(batch)[0], images)
    for other in (
        _run(batch, seed=1),
        _run(batch | {"epoch": batch["epoch"] + 1}),
        _run(batch | {"index": batch["index"] + 4}),
    ):
        assert (other[0] != images).any(axis=(1, 2, 3)).all()


def test_sharded_over_devices_it_is_the_same_and_nothing_is_sent() -> None:
    assert len(jax.devices()) == 8
    batch = _batch(16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    placed = {name: jax.device_put(array, sharding) for name, array in batch.items()}
    step = jax.jit(lambda batch: augment(batch, 0)).lower(placed).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in str(step.as_text())
    images, labels = step(placed)
    assert images.sharding.is_equivalent_to(sharding, 4)
    alone = _run(batch)
    np.testing.assert_array_equal(np.asarray(images), alone[0])
    np.testing.assert_array_equal(np.asarray(labels), alone[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64], ids=str)
def test_dtype_changes_no_draw(x64: None, dtype: Any) -> None:
    batch = _batch(4)
    images, labels = _run(batch, dtype=dtype)
    assert images.dtype == dtype
    with jax.enable_x64(False):
        theirs = _run(batch)
    np.testing.assert_array_equal(labels, theirs[1])
    np.testing.assert_allclose(images.astype(np.float64), theirs[0], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("platform", "cuts"), [("cpu", 0), ("tpu", 3)])
def test_the_colour_steps_are_cut_apart_on_a_tpu(platform: str, cuts: int) -> None:
    """Where they are cut the planes are packed into bytes and unpacked, which every whole number 0..255 survives."""
    planes = tuple(jnp.arange(256, dtype=jnp.float32) for _ in range(3))
    for plane, back in zip(planes, module._unpack(module._pack(planes)), strict=True):
        np.testing.assert_array_equal(plane, back)
    traced = jax.jit(module._distort).trace(planes, jax.random.key(0))
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == cuts
