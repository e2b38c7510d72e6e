"""The layers every box of the figure is made of: convolution, BatchNorm, the two pairs of them, activations.

Attribute names are the official checkpoints' keys (`c`, `bn`, `weight`, `running_mean`, ...), so that a
parameter's path is its official name. Images are `[n, h, w, c]`; kernels are `[k, k, in / groups, out]`.
Whether a module trains or infers is flax's own switch: `model.train()`, `model.eval()`.
Constructors draw initial weights from `rng`, one after the other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from topformer_jax.ops import at_least_float32
from topformer_jax.ops.depthwise import depthwise_conv, library_conv
from topformer_jax.ops.pointwise import pointwise_conv
from topformer_jax.ops.stem import stem_conv

FEW = 4  # input channels, up to which a convolution is done as the stem's


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
    """How a model computes; every layer is handed the same one.

    `dtype` is what activations are computed in and `param_dtype` what parameters and BatchNorm statistics are
    kept in. BatchNorm, softmax and logits are in at least float32 whatever `dtype` is. `precision` is
    that of products of float32 or wider ("highest": full, no TF32 and no bfloat16 passes). `depthwise_impl`
    is the method of `ops.depthwise.depthwise_conv`, and the stem's.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    precision: str | None = "highest"
    depthwise_impl: str = "auto"

    @property
    def wide(self) -> np.dtype:
        """The dtype of BatchNorm, softmax and logits: `dtype`, but at least float32."""
        return at_least_float32(self.dtype)

    @property
    def product_precision(self) -> str | None:
        """`precision` where it has a meaning: bfloat16 operands have but one."""
        return self.precision if jnp.dtype(self.dtype) == self.wide else None

    def array(self, values: np.ndarray) -> Array:
        """A parameter's start. Drawn by numpy, since JAX would compile a program for each new shape."""
        return jnp.asarray(values.astype(np.dtype(self.param_dtype)))


def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`min(max(x, 0), 6)` with PyTorch's gradient, 0 at both corners; NaN stays NaN."""
    zero, six = jnp.zeros((), x.dtype), jnp.full((), 6, x.dtype)
    return jnp.where(x <= zero, zero, jnp.where(x >= six, six, x))


def hsigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`relu6(x + 3) / 6`, a piecewise linear sigmoid."""
    return relu6(x + 3) / 6


def make_divisible(channels: int, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is not more than 10 % below `channels`."""
    rounded = max(divisor, (channels + divisor // 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def sequential(layers: Iterable[Any], x: Array) -> Array:
    """Applies modules and functions one after the other; a list of them keeps the checkpoint's numbering."""
    for layer in layers:
        x = layer(x)
    return x


class Conv(nnx.Module):
    """A convolution with `kernel // 2` zeros around the image, as PyTorch pads (not TensorFlow's SAME).

    Weights start from normal(0, sqrt(2 / (k k out / groups))) unless `std` says otherwise, a bias from 0.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        std: float | None = None,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.stride = stride
        self.groups = groups
        self.policy = policy
        std = math.sqrt(2 / (kernel * kernel * outputs / groups)) if std is None else std
        shape = (kernel, kernel, inputs // groups, outputs)
        self.weight = nnx.Param(policy.array(std * rng.standard_normal(shape)))
        self.bias = nnx.Param(policy.array(np.zeros(outputs))) if bias else None

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n height width outputs"]:
        policy = self.policy
        weight = self.weight[...].astype(policy.dtype)
        kernel, _, fan, outputs = weight.shape
        precision = policy.product_precision
        if kernel == 1 and self.stride == 1 and self.groups == 1:
            x = pointwise_conv(x, weight[0, 0], precision=precision)
        elif fan == 1 and self.groups == outputs:
            x = depthwise_conv(x, weight, self.stride, method=policy.depthwise_impl, precision=precision)
        elif fan <= FEW and self.groups == 1:
            x = stem_conv(x, weight, self.stride, method=policy.depthwise_impl, precision=precision)
        else:
            x = library_conv(x, weight, stride=self.stride, groups=self.groups, precision=precision)
        return x if self.bias is None else x + self.bias[...].astype(policy.dtype)


class BatchNorm(nnx.Module):
    """PyTorch's BatchNorm over all axes but the last: eps 1e-5, momentum 0.1.

    Training normalises with the batch's mean and biased variance and moves the running statistics by a tenth
    of the way to the batch's mean and *unbiased* variance. The batch is the global one: under `jit`, a mean
    over a sharded axis spans the devices (SyncBN). Statistics are computed in at least float32.
    """

    momentum = 0.1
    eps = 1e-5

    def __init__(self, features: int, *, policy: DTypePolicy):
        self.policy = policy
        self.use_running_average = False
        self.weight = nnx.Param(policy.array(np.ones(features)))
        self.bias = nnx.Param(policy.array(np.zeros(features)))
        self.running_mean = nnx.BatchStat(policy.array(np.zeros(features)))
        self.running_var = nnx.BatchStat(policy.array(np.ones(features)))
        # Read by no formula here; kept so that a checkpoint comes out as it went in.
        self.num_batches_tracked = nnx.BatchStat(jnp.asarray(np.zeros((), np.int32)))

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        wide = self.policy.wide
        values = x.astype(wide)
        if self.use_running_average:
            mean, variance = self.running_mean[...].astype(wide), self.running_var[...].astype(wide)
        else:
            # In two axes, as a product leaves them: so XLA's CPU backend centres and squares inside the sum. With
            # four, it writes the centred values down.
            flat = values.reshape(-1, x.shape[-1])
            mean = flat.mean(0)
            variance = jnp.square(flat - mean).mean(0)
            self._track(mean, variance, len(flat))
        scale = self.weight[...].astype(wide) * lax.rsqrt(variance + self.eps)
        return (values * scale + (self.bias[...].astype(wide) - mean * scale)).astype(self.policy.dtype)

    def _track(self, mean: Array, variance: Array, count: int) -> None:
        """Moves the running statistics; `count` is how many values a mean was taken over."""
        # A single value has no unbiased variance: PyTorch raises too.
        if count < 2:
            raise ValueError("BatchNorm in training mode needs more than one value a channel")
        unbiased = variance * (count / (count - 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            batch = lax.stop_gradient(batch).astype(running.dtype)
            # Not by an index: flax would then ask both values where they lie, which under jit takes 10 ms.
            running.set_value((1 - self.momentum) * running[...] + self.momentum * batch)
        self.num_batches_tracked.set_value(self.num_batches_tracked[...] + 1)


class ConvBN(nnx.Module):
    """Convolution without bias -> BatchNorm, with the backbone's key names `c` and `bn`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.c = Conv(inputs, outputs, kernel, stride, groups, policy=policy, rng=rng)
        self.bn = BatchNorm(outputs, policy=policy)

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n height width outputs"]:
        return self.bn(self.c(x))


class ConvModule(nnx.Module):
    """1x1 convolution -> BatchNorm -> activation, with mmcv's key names `conv` and `bn`.

    Without the norm the convolution has a bias.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int = 1,
        *,
        norm: bool = True,
        activation: Callable[[Array], Array] | None = None,
        std: float | None = None,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.conv = Conv(inputs, outputs, groups=groups, bias=not norm, std=std, policy=policy, rng=rng)
        self.bn = BatchNorm(outputs, policy=policy) if norm else None
        self.activation = activation

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n h w outputs"]:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return x if self.activation is None else self.activation(x)


class RandomDrop(nnx.Module):
    """Zeroes with probability `rate` and divides what is kept by `1 - rate`; the identity in inference.

    `shared` are the axes of `[n, h, w, c]` that live or die together: (1, 2, 3) drops a sample's whole
    branch (drop path), (1, 2) a sample's whole channel (`Dropout2d`). The draw comes from the `dropout`
    stream of the call's `rngs`: a function of that key and of the place in the batch alone.
    """

    def __init__(self, rate: float, shared: tuple[int, ...]):
        self.rate = rate
        self.shared = shared
        self.deterministic = False

    def __call__(self, x: Float[Array, "n h w c"], rngs: nnx.Rngs | None) -> Float[Array, "n h w c"]:
        if self.deterministic or self.rate == 0:
            return x
        if rngs is None:
            raise ValueError("dropout in training mode needs rngs=nnx.Rngs(dropout=key)")
        shape = [1 if axis in self.shared else extent for axis, extent in enumerate(x.shape)]
        kept = jax.random.bernoulli(rngs.dropout(), 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))
