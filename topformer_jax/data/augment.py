"""Augmentation of a batch on the device: flip, photometric distortion, normalisation.

Each step gives the bytes of the official pipeline, which runs OpenCV on uint8 images on the host. The random draws
for an example depend only on the seed, its epoch and its index in the data set, and examples do not interact. So a
batch may be sharded over any number of devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int32, UInt8

from topformer_jax.data.batch import IGNORE_LABEL, Batch

MEAN = np.array((123.675, 116.28, 103.53), np.float32)  # ImageNet's, of red, green, blue in 0..255
STD = np.array((58.395, 57.12, 57.375), np.float32)
Planes = tuple[Array, ...]  # red, green, blue, or hue, saturation, value


def normalize(
    images: UInt8[Array, "n h w 3"] | UInt8[np.ndarray, "n h w 3"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "n h w 3"]:
    """Computes `(images - MEAN) / STD` in at least float32, then casts to `dtype`.

    >>> normalize(np.full((1, 2, 2, 3), 255, np.uint8)).shape
    (1, 2, 2, 3)
    """
    wide = np.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)
    return ((jnp.asarray(images).astype(wide) - MEAN.astype(wide)) / STD.astype(wide)).astype(dtype)


def augment(
    batch: Batch,
    seed: int | Array,
    *,
    flip: float = 0.5,
    photometric: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "n h w 3"], Int32[Array, "n h w"]]:
    """Flips, distorts and normalises a batch of JAX arrays for training.

    Args:
        seed: of the run. An example's random key is `fold_in(fold_in(key(seed), epoch), index)`.
        flip: the probability of a horizontal flip.
        photometric: whether to distort colours, each step with probability 1/2: brightness by -32..32,
            contrast by 0.5..1.5 (before or after the next two, with equal probability), saturation by 0.5..1.5,
            hue by -18..17 of 180.

    Returns normalised images of `dtype`, 0 in the padding, and labels, IGNORE_LABEL there.
    """
    root = jax.random.key(seed)

    def augment_example(
        image: Array, label: Array, size: Array, index: Array, epoch: Array
    ) -> tuple[Array, Array, Array]:
        flip_key, colour_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(root, epoch), index))
        rows, columns = (jnp.arange(side, dtype=jnp.int32) for side in label.shape)
        inside = (rows[:, None] < size[0]) & (columns < size[1])
        pixels = _pack(_split_channels(image))
        if photometric:
            pixels = _pack(_distort(_unpack(pixels), colour_key))
        # Officially the flip comes first. The result is the same, but XLA's CPU code is five times slower then.
        flipped = jax.random.bernoulli(flip_key, jnp.float32(flip))
        pixels, label = (jnp.where(flipped, _flip_unpadded(x, size[1]), x) for x in (pixels, label))
        return _to_image(pixels), label, inside

    arrays: Any = (batch["image"], batch["label"], batch["size"], batch["index"], batch["epoch"])
    with jax.named_scope("augment"):
        images, labels, inside = jax.vmap(augment_example)(*arrays)
        images = jnp.where(inside[..., None], normalize(images, dtype), jnp.zeros((), dtype))
        return images, jnp.where(inside, labels.astype(jnp.int32), IGNORE_LABEL)


def _split_channels(image: Array) -> Planes:
    """Red, green and blue as whole float32 numbers 0..255, which all steps compute with."""
    return tuple(image[..., c].astype(jnp.float32) for c in range(3))


def _pack(planes: Planes) -> Array:
    """Each pixel as one uint32: XLA computes the three channels of a pixel in one loop."""
    red, green, blue = (plane.astype(jnp.uint32) for plane in planes)
    return red | (green << 8) | (blue << 16)


def _unpack(pixels: Array) -> Planes:
    return tuple(((pixels >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16))


def _to_image(pixels: Array) -> Array:
    """A uint8 image of packed pixels. For a stack of planes, XLA on CPUs would compute all steps three times."""
    return ((pixels[..., None] >> jnp.asarray((0, 8, 16), jnp.uint32)) & 255).astype(jnp.uint8)


def brightness(planes: Planes, delta: ArrayLike) -> Planes:
    """Adds `delta` (in levels of 0..255), clips, truncates."""
    delta = jnp.asarray(delta, jnp.float32)
    return tuple(_truncate(plane + delta) for plane in planes)


def contrast(planes: Planes, factor: ArrayLike) -> Planes:
    """Multiplies by `factor`, clips, truncates."""
    factor = jnp.asarray(factor, jnp.float32)
    return tuple(_truncate(plane * factor) for plane in planes)


def saturation(planes: Planes, factor: ArrayLike) -> Planes:
    """Multiplies the saturation by `factor`, through 8-bit HSV and back."""
    angle, share, value = _to_hsv(planes)
    return _from_hsv(angle, _truncate(share * jnp.asarray(factor, jnp.float32)), value)


def hue(planes: Planes, delta: ArrayLike) -> Planes:
    """Turns the hue by `delta`, a whole number of OpenCV's 180 steps in -180..180, through 8-bit HSV and back."""
    angle, share, value = _to_hsv(planes)
    angle = angle + jnp.asarray(delta).astype(jnp.float32)
    angle = jnp.where(angle < 0, angle + 180, jnp.where(angle >= 180, angle - 180, angle))
    return _from_hsv(angle, share, value)


def _flip_unpadded(x: Array, width: Array) -> Array:
    """Reverses the first `width` columns; the columns after them are padding and stay so."""
    return jnp.roll(x[:, ::-1], width - x.shape[1], axis=1)


def _distort(planes: Planes, key: Array) -> Planes:
    keys = jax.random.split(key, 9)
    coins = [jax.random.bernoulli(k, jnp.float32(0.5)) for k in keys[:5]]
    delta = jax.random.uniform(keys[5], (), jnp.float32, -32, 32)
    gain = jnp.where(coins[1], jax.random.uniform(keys[6], (), jnp.float32, 0.5, 1.5), 1.0)
    factor = jax.random.uniform(keys[7], (), jnp.float32, 0.5, 1.5)
    turn = jax.random.randint(keys[8], (), -18, 18, jnp.int32)
    early = coins[2]
    # Brightness +0 and contrast x1 change no byte, so the coin chooses the amount.
    planes = brightness(planes, jnp.where(coins[0], delta, 0.0))
    planes = _stop_fusion(contrast(planes, jnp.where(early, gain, 1.0)))
    # A round trip through 8-bit HSV changes bytes even then, so the coin chooses whether the step runs.
    planes = _stop_fusion(_choose(coins[3], saturation(planes, factor), planes))
    planes = _stop_fusion(_choose(coins[4], hue(planes, turn), planes))
    return contrast(planes, jnp.where(early, 1.0, gain))


def _stop_fusion(planes: Planes) -> Planes:
    """The same planes. XLA for TPUs would otherwise fuse all steps into one kernel, which takes minutes."""

    def separate(*planes: Array) -> Planes:
        return _unpack(lax.optimization_barrier(_pack(planes)))

    return lax.platform_dependent(*planes, tpu=separate, default=lambda *planes: planes)


def _choose(coin: Array, if_true: Planes, if_false: Planes) -> Planes:
    return tuple(jnp.where(coin, *pair) for pair in zip(if_true, if_false, strict=True))


def _truncate(x: Array) -> Array:
    return jnp.floor(jnp.clip(x, 0, 255))


def _to_hsv(planes: Planes) -> Planes:
    """Hue 0..179, saturation and value 0..255, as whole float32 numbers: OpenCV's RGB2HSV.

    OpenCV works in 12-bit fixed point, with tables of the rounded quotients below. All sums and products are whole
    numbers under 2**24, and so exact on any device; no quotient is near enough to a half for its last bits to matter.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    per_value = jnp.floor(255 * 4096 / jnp.maximum(value, 1) + 0.5)
    saturation = jnp.floor((chroma * per_value + 2048) / 4096)
    per_chroma = jnp.floor(30 * 4096 / jnp.maximum(chroma, 1) + 0.5)
    angle = jnp.where(
        value == red,
        green - blue,
        jnp.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    hue = jnp.floor((angle * per_chroma + 2048) / 4096)
    return jnp.where(hue < 0, hue + 180, hue), saturation, value


def _from_hsv(hue: Array, saturation: Array, value: Array) -> Planes:
    """Red, green and blue from hue 0..179, saturation and value 0..255: OpenCV's HSV2RGB.

    The reference's bytes are those of OpenCV's vector code on x86 with fused multiply-add: float32, truncated at
    the end. (Its scalar code, for the last `width % 32` pixels of a row, rounds instead.) A truncated result depends
    on the last bit of every product, so the code spells out the roundings: fusion cannot change them.
    """
    turns = _product(hue, 8947849, 28)  # hue * float32(6 / 180)
    sector = jnp.floor(turns)
    fraction = turns - sector
    fraction = jnp.where((sector == 0) | (sector == 2) | (sector == 4), 1 - fraction, fraction)
    share = _product(saturation, 8421505, 31)  # saturation * float32(1 / 255)
    level = _product(value, 8421505, 31)
    low = jnp.floor(level * (1 - share) * 255)
    middle = jnp.floor(level * _one_minus_product(share, fraction) * 255)

    def channel(first: int) -> Array:
        """A channel at `sector`: red starts at 0; green and blue take the same six values, 2 and 4 sectors later."""
        place = sector + first
        place = jnp.where(place < 6, place, place - 6)
        at_value, at_low = (place == 0) | (place == 5), (place == 2) | (place == 3)
        return jnp.where(at_value, value, jnp.where(at_low, low, middle))

    return channel(0), channel(4), channel(2)


def _product(x: Array, mantissa: int, exponent: int) -> Array:
    """Whole `x` in 0..255 times `mantissa / 2**exponent`, rounded once: in the cast from an exact integer."""
    return (x.astype(jnp.uint32) * jnp.uint32(mantissa)).astype(jnp.float32) * np.float32(2.0**-exponent)


def _one_minus_product(x: Array, y: Array) -> Array:
    """`1 - x y` for x, y in 0..1, rounded once as a fused multiply-add does."""
    product = x * y
    x_high, y_high = _high_half(x), _high_half(y)
    x_low, y_low = x - x_high, y - y_high
    # The rounding error of the product; the four products of halves are exact (Dekker 1971).
    lost = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    difference = 1 - product
    return difference + (((1 - difference) - product) - lost)


def _high_half(x: Array) -> Array:
    """The upper 12 of float32's 24 bits."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    return lax.bitcast_convert_type(bits, jnp.float32)
