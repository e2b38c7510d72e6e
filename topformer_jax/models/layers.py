"""The layers that the network is built from: convolution, BatchNorm, blocks of the two, activations, dropout.

Attribute names are the keys of the official checkpoints (`c`, `bn`, `weight`, `running_mean`, ...), so the path of
a parameter in the model is its official name. Feature maps are `[n, h, w, c]`, kernels `[k, k, in / groups, out]`.
`model.train()` and `model.eval()` of flax switch BatchNorm and dropout between training and inference.
Constructors take a numpy generator `rng` and draw their initial weights from it in the order of construction.
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
from jaxtyping import Array, Float, Int32

from topformer_jax.models.area import zero_outside
from topformer_jax.ops import at_least_float32
from topformer_jax.ops.depthwise import depthwise_conv, library_conv
from topformer_jax.ops.pointwise import pointwise_conv


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
    """The dtypes, the precision and the depthwise implementation of a model; all its layers share one policy.

    Attributes:
        dtype: of activations, and of the weights in each operation.
        param_dtype: that parameters and BatchNorm statistics are stored in.
        precision: `precision=` of convolutions and matrix products of float32 or float64. "highest" is full
            float32: no TF32 on GPUs, no bfloat16 passes on TPUs.
        conv_impl: `method` of `ops.depthwise.depthwise_conv`, of `ops.pointwise.pointwise_conv`, and of the
            functions in `ops.resample`.

    >>> policy = DTypePolicy(dtype=jnp.bfloat16)
    >>> policy.accum_dtype, policy.matmul_precision
    (dtype('float32'), None)
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    precision: str | None = "highest"
    conv_impl: str = "auto"

    @property
    def accum_dtype(self) -> np.dtype:
        """The dtype of BatchNorm statistics, softmax and logits: `dtype`, but at least float32."""
        return at_least_float32(self.dtype)

    @property
    def accum_policy(self) -> "DTypePolicy":
        """This policy with activations in `accum_dtype`: that of the layers which compute the logits."""
        return dataclasses.replace(self, dtype=self.accum_dtype)

    @property
    def matmul_precision(self) -> str | None:
        """`precision`, or None for bfloat16, whose products have one precision only."""
        return self.precision if jnp.dtype(self.dtype) == self.accum_dtype else None

    def init_param(self, values: np.ndarray) -> Array:
        """A parameter's initial values as a JAX array of `param_dtype`.

        Numpy draws them, because JAX would compile a program for each new shape; `jnp.asarray` does that too.
        """
        return jax.device_put(values.astype(np.dtype(self.param_dtype)), may_alias=False)


@jax.custom_jvp
def relu6(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`min(max(x, 0), 6)`. As in PyTorch the gradient at exactly 0 and 6 is 0, and NaN stays NaN.

    >>> relu6(jnp.array([-1.0, 2.0, 7.0])).tolist()
    [0.0, 2.0, 6.0]
    """
    return lax.clamp(jnp.zeros((), x.dtype), x, jnp.full((), 6, x.dtype))


@relu6.defjvp
def _relu6_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    return relu6(x), jnp.where((x <= 0) | (x >= 6), jnp.zeros((), x.dtype), tangent)


def hsigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The hard sigmoid `relu6(x + 3) / 6`.

    >>> hsigmoid(jnp.array([-3.0, 0.0, 3.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return relu6(x + 3) / 6


def make_divisible(channels: int, divisor: int = 8) -> int:
    """Rounds a channel count to the nearest multiple of `divisor`, or to the next one up if it would lose over 10 %.

    The rule of MobileNet and of the official code (`_make_divisible`).

    >>> [make_divisible(channels) for channels in (1, 19, 48, 92)]
    [8, 24, 48, 96]
    """
    rounded = max(divisor, (channels + divisor // 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def sequential(layers: Iterable[Any], x: Array, size: Int32[Array, "n 2"] | None = None) -> Array:
    """Applies modules and functions in order, as `torch.nn.Sequential` does.

    The layers stay a plain `nnx.List`, so that their indices are those in the checkpoint's keys. `size`: see `Conv`.
    """
    for layer in layers:
        x = layer(x, size) if isinstance(layer, ConvBN) else layer(x)
    return x


class Conv(nnx.Module):
    """A convolution with PyTorch's padding: `kernel // 2` zeros on every side (not TensorFlow's SAME).

    Args:
        inputs, outputs: channels.
        kernel: height and width of the kernel, odd.
        stride, groups: as in `torch.nn.Conv2d`.
        bias: whether there is one; it starts at 0.
        std: standard deviation of the initial weights; None: sqrt(2 / (k * k * outputs / groups)).
        policy: see `DTypePolicy`.
        rng: draws the initial weights.
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
        self.weight = nnx.Param(policy.init_param(std * rng.standard_normal(shape)))
        self.bias = nnx.Param(policy.init_param(np.zeros(outputs))) if bias else None

    def __call__(
        self, x: Float[Array, "n h w inputs"], size: Int32[Array, "n 2"] | None = None
    ) -> Float[Array, "n height width outputs"]:
        """The convolution of feature maps, or of an image at the top left of each: `size` is its (height, width)."""
        policy = self.policy
        weight = self.weight[...].astype(policy.dtype)
        kernel, _, group_inputs, outputs = weight.shape
        if kernel > 1:
            x = zero_outside(x, size)
        precision = policy.matmul_precision
        if kernel == 1 and self.stride == 1 and self.groups == 1:
            x = pointwise_conv(x, weight[0, 0], method=policy.conv_impl, precision=precision)
        elif group_inputs == 1 and self.groups == outputs:
            x = depthwise_conv(x, weight, self.stride, method=policy.conv_impl, precision=precision)
        else:
            x = library_conv(x, weight, stride=self.stride, groups=self.groups, precision=precision)
        return x if self.bias is None else x + self.bias[...].astype(policy.dtype)


class BatchNorm(nnx.Module):
    """PyTorch's BatchNorm (`torch.nn.BatchNorm2d`) over all axes but the last: eps 1e-5, momentum 0.1.

    In training the batch is normalised with its mean and its biased variance, and the running statistics become
    `0.9 * running + 0.1 * batch` with the batch's *unbiased* variance. The statistics are those of the global batch
    (SyncBN): under `jit` a mean over a sharded axis spans all devices. They are computed in `policy.accum_dtype`.

    Raises:
        ValueError: in training, where a channel has a single value.
    """

    momentum = 0.1
    eps = 1e-5

    def __init__(self, features: int, *, policy: DTypePolicy):
        self.policy = policy
        self.use_running_average = False
        self.weight = nnx.Param(policy.init_param(np.ones(features)))
        self.bias = nnx.Param(policy.init_param(np.zeros(features)))
        self.running_mean = nnx.BatchStat(policy.init_param(np.zeros(features)))
        self.running_var = nnx.BatchStat(policy.init_param(np.ones(features)))
        # Not used in any computation; it is here because the official checkpoints have it.
        self.num_batches_tracked = nnx.BatchStat(jax.device_put(np.zeros((), np.int32)))

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        accum_dtype = self.policy.accum_dtype
        values = x.astype(accum_dtype)
        if self.use_running_average:
            mean, variance = (
                self.running_mean[...].astype(accum_dtype),
                self.running_var[...].astype(accum_dtype),
            )
        else:
            # Flattened to [pixels, channels]: XLA's CPU backend then fuses the centring and the squaring into the
            # variance's reduction. Over four axes it writes the centred values to memory first.
            flat = values.reshape(-1, x.shape[-1])
            mean = flat.mean(0)
            variance = jnp.square(flat - mean).mean(0)
            self._update_running(mean, variance, len(flat))
        scale = self.weight[...].astype(accum_dtype) * lax.rsqrt(variance + self.eps)
        return (values * scale + (self.bias[...].astype(accum_dtype) - mean * scale)).astype(
            self.policy.dtype
        )

    def _update_running(self, mean: Array, variance: Array, count: int) -> None:
        """Updates the running statistics from a batch of `count` values a channel."""
        # The unbiased variance of a single value is undefined; PyTorch raises too.
        if count < 2:
            raise ValueError("BatchNorm in training mode needs more than one value a channel")
        unbiased = variance * (count / (count - 1))
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            batch = lax.stop_gradient(batch).astype(running.dtype)
            # `set_value`, not `running[...] =`: flax compares the shardings of the two there, 10 ms each under jit.
            running.set_value((1 - self.momentum) * running[...] + self.momentum * batch)
        self.num_batches_tracked.set_value(self.num_batches_tracked[...] + 1)


class ConvBN(nnx.Module):
    """Convolution without bias, then BatchNorm. Keys `c` and `bn`, as in the official backbone.

    `folding.fold_batch_norms` makes the BatchNorm a part of the convolution, and `bn` None.
    """

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
        self.bn: BatchNorm | None = BatchNorm(outputs, policy=policy)

    def __call__(
        self, x: Float[Array, "n h w inputs"], size: Int32[Array, "n 2"] | None = None
    ) -> Float[Array, "n height width outputs"]:
        x = self.c(x, size)
        return x if self.bn is None else self.bn(x)


class ConvModule(nnx.Module):
    """1x1 convolution, BatchNorm, activation: mmcv's `ConvModule`, with its keys `conv` and `bn`.

    Without `norm` the convolution has a bias instead.
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


class Dropout(nnx.Module):
    """Dropout that can drop whole channels or whole samples; the identity in inference.

    In training a value becomes 0 with probability `rate`, and otherwise `x / (1 - rate)`. `broadcast_dims` are the
    axes of `[n, h, w, c]` that share one draw: (1, 2) drops whole channels of a sample (torch's `Dropout2d`),
    (1, 2, 3) whole samples (drop path). The draw depends only on the call's key, `rngs.dropout()`, and on the
    position in the batch.

    Raises:
        ValueError: in training with a rate above 0, where the call has no `rngs`.
    """

    def __init__(self, rate: float, broadcast_dims: tuple[int, ...]):
        self.rate = rate
        self.broadcast_dims = broadcast_dims
        self.deterministic = False

    def __call__(self, x: Float[Array, "..."], rngs: nnx.Rngs | None) -> Float[Array, "..."]:
        if self.deterministic or self.rate == 0:
            return x
        if rngs is None:
            raise ValueError("dropout in training mode needs rngs=nnx.Rngs(dropout=key)")
        shape = [1 if axis in self.broadcast_dims else extent for axis, extent in enumerate(x.shape)]
        keep = jax.random.bernoulli(rngs.dropout(), 1 - self.rate, shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))
