"""The device's augmentation against OpenCV, byte for byte, and what its draws may depend on."""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from topformer_jax.data import augment as module
from topformer_jax.data.augment import MEAN, STD, augment, normalize

Find = Callable[[str], pathlib.Path]
Batch = dict[str, np.ndarray]


def _on_image(step: Callable) -> Callable[[jax.Array], jax.Array]:
    """A step on an image, that computes with planes."""
    return jax.jit(lambda image: module._to_image(module._pack(step(module._split_channels(image)))))


_forward = _on_image(module._to_hsv)
_backward = _on_image(lambda planes: module._from_hsv(*planes))


def test_golden_photometric(golden: Find) -> None:
    """The names say what was done, such as brightness+20.5, hsv, chain_brightness-12.25_saturation*1.2."""
    with np.load(golden("preprocess.npz")) as file:
        image = jnp.asarray(file["image_rgb"])
        names = [key for key in file if key.startswith("photometric/")]
        assert len(names) == 11
        for name in names:
            steps = re.findall(r"(brightness|contrast|saturation|hue)([*+-]?)([*+-]?[\d.]+)", name)

            def apply(planes: module.Planes, steps: list = steps) -> module.Planes:
                for step, sign, number in steps:
                    planes = getattr(module, step)(planes, float(number) * (-1 if sign == "-" else 1))
                return planes

            found = _on_image(apply if steps else module._to_hsv)(image)
            np.testing.assert_array_equal(np.asarray(found), file[name], err_msg=name)


def test_every_colour_as_opencv() -> None:
    second, third = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    for first in range(256):
        colours = np.stack([np.full_like(second, first), second, third], axis=-1)
        np.testing.assert_array_equal(_forward(jnp.asarray(colours)), cv2.cvtColor(colours, cv2.COLOR_RGB2HSV))
        if first < 180:
            np.testing.assert_array_equal(_backward(jnp.asarray(colours)), cv2.cvtColor(colours, cv2.COLOR_HSV2RGB))


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
    rounded = normalize(jnp.asarray(images)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(normalize(images, jnp.bfloat16), rounded)  # it is rounded once


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
    batch = _batch(4)
    images, labels = _run(batch, flip=1.0, photometric=False)
    for i, (h, w) in enumerate(batch["size"]):
        np.testing.assert_array_equal(_bytes(images[i])[:h, :w], batch["image"][i, :h, :w][:, ::-1])
        np.testing.assert_array_equal(labels[i, :h, :w], batch["label"][i, :h, :w][:, ::-1])
        for padding in (images[i, h:], images[i, :, w:], labels[i, h:] - 255, labels[i, :, w:] - 255):
            assert not padding.any()


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


def test_flips_are_as_likely_as_not() -> None:
    batch = _batch(1000, 1, 2)
    batch["label"], batch["size"][:] = np.tile(np.array([[1, 2]], np.uint8), (1000, 1, 1)), (1, 2)
    _, labels = _run(batch, photometric=False)
    assert abs((labels[:, 0, 0] == 2).mean() - 0.5) < 0.05


def test_draws_depend_only_on_seed_epoch_and_index() -> None:
    batch = _batch(4)
    images, labels = _run(batch)
    found = _run({name: array[::-1] for name, array in batch.items()})
    np.testing.assert_array_equal(found[0][::-1], images)
    np.testing.assert_array_equal(found[1][::-1], labels)
    for change in ({}, {"epoch": batch["epoch"] + 1}, {"index": batch["index"] + 4}):
        other, _ = _run(batch | change, seed=0 if change else 1)
        assert (other != images).any(axis=(1, 2, 3)).all()


def test_sharded_over_devices_it_is_the_same_and_nothing_is_sent() -> None:
    batch = _batch(4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    placed = {name: jax.device_put(array, sharding) for name, array in batch.items()}
    step = jax.jit(lambda batch: augment(batch, 0)).lower(placed).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in str(step.as_text())
    found = step(placed)
    assert found[0].sharding.is_equivalent_to(sharding, 4)
    for ours, theirs in zip(found, _run(batch), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_dtype_changes_no_draw(x64: None) -> None:
    batch = _batch(4)
    images, labels = _run(batch, dtype=jnp.float64)
    assert images.dtype == np.float64
    with jax.enable_x64(False):
        theirs = _run(batch)
    np.testing.assert_array_equal(labels, theirs[1])
    np.testing.assert_allclose(images, theirs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("platform", "cuts"), [("cpu", 0), ("tpu", 3)])
def test_the_colour_steps_are_cut_apart_on_a_tpu(platform: str, cuts: int) -> None:
    """Where they are cut the planes are packed into bytes and unpacked, which every whole number 0..255 survives."""
    planes = tuple(jnp.arange(256, dtype=jnp.float32) for _ in range(3))
    for plane, back in zip(planes, module._unpack(module._pack(planes)), strict=True):
        np.testing.assert_array_equal(plane, back)
    traced = jax.jit(module._distort).trace(planes, jax.random.key(0))
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == cuts
