"""The layers of the network: convolution, BatchNorm, blocks of the two, activations, dropout; images on canvases.

Attribute names are the keys of the official checkpoints (`c`, `bn`, `weight`, ...), so the path of a parameter is its
official name. Feature maps are `[n, h, w, c]`, kernels `[k, k, in / groups, out]`. Constructors draw initial weights
from a numpy generator `rng` in the order of construction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32
from numpy.random import Generator

from topformer_jax.ops import at_least_float32
from topformer_jax.ops.convolution import conv
from topformer_jax.ops.resample import Matrices, bilinear_matrix, pooling_matrix

Model = TypeVar("Model", bound=nnx.Module)
# The positions of a layer's input that lie inside the images, not in the padding; None: all. 1x1 layers need none.
Mask = Bool[Array, "n _h _w 1"] | None


@dataclasses.dataclass(frozen=True)
class DTypePolicy:
    """The dtypes, the precision and the form of the operations; all layers of a model share one policy.

    Attributes:
        dtype: of activations, and of the weights in each operation.
        precision: `precision=` of float32 and float64 products. "highest" is full float32: no TF32 on GPUs, no
            bfloat16 passes on TPUs.
        conv_impl: the setting `model.conv_impl`.

    >>> policy = DTypePolicy(dtype=jnp.bfloat16)
    >>> policy.accum_dtype, policy.matmul_precision
    (dtype('float32'), None)
    """

    dtype: DTypeLike = jnp.float32
    precision: str | None = "highest"
    conv_impl: str = "auto"

    @property
    def accum_dtype(self) -> np.dtype:
        """The dtype of parameters, BatchNorm statistics, softmax and logits: `dtype`, but at least float32."""
        return at_least_float32(self.dtype)

    @property
    def accum_policy(self) -> "DTypePolicy":
        """This policy with activations in `accum_dtype`, for the layers that compute the logits."""
        return dataclasses.replace(self, dtype=self.accum_dtype)

    @property
    def matmul_precision(self) -> str | None:
        """`precision`, or None for bfloat16, whose products have one precision only."""
        return self.precision if jnp.dtype(self.dtype) == self.accum_dtype else None

    @property
    def form(self) -> dict[str, Any]:
        """`method` and `precision` of the functions in `ops.convolution` and `ops.resample`."""
        return {"method": self.conv_impl, "precision": self.matmul_precision}

    def init_param(self, values: np.ndarray) -> Array:
        """A parameter's initial values as a JAX array."""
        # From numpy by device_put: jax.random and jnp.asarray would compile a program for each new shape.
        return jax.device_put(values.astype(self.accum_dtype), may_alias=False)


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
    """Rounds channels to the nearest multiple of `divisor`, or up if that loses over 10 % (`_make_divisible`).

    >>> [make_divisible(channels) for channels in (1, 19, 48, 92)]
    [8, 24, 48, 96]
    """
    rounded = max(divisor, (channels + divisor // 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def sequential(layers: Iterable[Any], x: Array, mask: Mask = None) -> Array:
    """Applies modules and functions in order; `mask`: see `Conv`."""
    for layer in layers:
        x = layer(x, mask) if isinstance(layer, ConvBN) else layer(x)
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
        rng: Generator,
    ):
        self.stride = stride
        self.groups = groups
        self.policy = policy
        std = math.sqrt(2 / (kernel * kernel * outputs / groups)) if std is None else std
        shape = (kernel, kernel, inputs // groups, outputs)
        self.weight = nnx.Param(policy.init_param(std * rng.standard_normal(shape)))
        self.bias = nnx.Param(policy.init_param(np.zeros(outputs))) if bias else None

    def __call__(self, x: Float[Array, "n h w inputs"], mask: Mask = None) -> Float[Array, "n height width outputs"]:
        """The convolution of feature maps, or of the images on them where there is a mask."""
        policy = self.policy
        weight = self.weight[...].astype(policy.dtype)
        if len(weight) > 1 and mask is not None:  # zeros outside of the images
            x = jnp.where(mask, x, jnp.zeros((), x.dtype))
        x = conv(x, weight, self.stride, groups=self.groups, **policy.form)
        return x if self.bias is None else x + self.bias[...].astype(policy.dtype)


class BatchNorm(nnx.Module):
    """PyTorch's BatchNorm (`torch.nn.BatchNorm2d`) over all axes except the last: eps 1e-5.

    Training normalises with the mean and the biased variance of the global batch (SyncBN), and the running
    statistics become `(1 - momentum) * running + momentum * batch` with the *unbiased* variance, all in
    `policy.accum_dtype`. `models.build` sets `momentum` from `model.bn_momentum`.

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
        # No computation uses it; the official checkpoints have it.
        self.num_batches_tracked = nnx.BatchStat(jax.device_put(np.zeros((), np.int32)))

    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        accum_dtype = self.policy.accum_dtype
        values = x.astype(accum_dtype)
        if self.use_running_average:
            mean, variance = (each[...].astype(accum_dtype) for each in (self.running_mean, self.running_var))
        else:
            # Flattened to [pixels, channels]: XLA's CPU backend then fuses the centring and the squaring into the
            # variance's reduction. Over four axes it writes the centred values to memory first.
            flat = values.reshape(-1, x.shape[-1])
            mean = flat.mean(0)
            variance = jnp.square(flat - mean).mean(0)
            self._update_running(mean, variance, len(flat))
        scale = self.weight[...].astype(accum_dtype) * lax.rsqrt(variance + self.eps)
        shift = self.bias[...].astype(accum_dtype) - mean * scale
        return (values * scale + shift).astype(self.policy.dtype)

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
    """Convolution without bias, then BatchNorm (None once folded). Keys `c` and `bn`, as in the official backbone."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        policy: DTypePolicy,
        rng: Generator,
    ):
        self.c = Conv(inputs, outputs, kernel, stride, groups, policy=policy, rng=rng)
        self.bn: BatchNorm | None = BatchNorm(outputs, policy=policy)

    def __call__(self, x: Float[Array, "n h w inputs"], mask: Mask = None) -> Float[Array, "n height width outputs"]:
        x = self.c(x, mask)
        return x if self.bn is None else self.bn(x)


class ConvModule(nnx.Module):
    """1x1 convolution, BatchNorm or bias, activation: mmcv's `ConvModule`, with its keys `conv` and `bn`."""

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
        rng: Generator,
    ):
        self.conv = Conv(inputs, outputs, groups=groups, bias=not norm, std=std, policy=policy, rng=rng)
        self.bn = BatchNorm(outputs, policy=policy) if norm else None
        self.activation = activation

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n h w outputs"]:
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return x if self.activation is None else self.activation(x)


class Dropout(nnx.Module):
    """In training a value becomes 0 with probability `rate`, else `x / (1 - rate)`; the identity in inference.

    `broadcast_dims` are the axes of `[n, h, w, c]` that share one draw: (1, 2) drops whole channels of a sample
    (torch's `Dropout2d`), (1, 2, 3) whole samples (drop path).

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


def fold_batch_norms(model: Model) -> Model:
    """A copy of a model or a part of one, for inference, whose convolutions include the BatchNorms after them.

    Raises:
        ValueError: the model is in training mode.

    >>> from topformer_jax import config, models
    >>> model = models.build(config.ade20k("tiny"))
    >>> model.eval()
    >>> len(models.state_dict(model)), len(models.state_dict(fold_batch_norms(model)))
    (376, 132)
    """
    folded = nnx.clone(model)
    for _, module in list(nnx.iter_modules(folded)):
        if isinstance(module, ConvBN | ConvModule) and module.bn is not None:
            _fold(module.c if isinstance(module, ConvBN) else module.conv, module.bn)
            module.bn = None
    return folded


def _fold(conv: Conv, norm: BatchNorm) -> None:
    """Includes the BatchNorm after a convolution in its weight and bias, in float64."""
    if not norm.use_running_average:
        raise ValueError("BatchNorms can be folded in inference mode only: call model.eval() first")
    weight, shift, mean, variance = (
        np.asarray(value[...], np.float64) for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    assert conv.bias is None, "the convolution before a BatchNorm has no bias"
    scale = weight / np.sqrt(variance + norm.eps)
    dtype = conv.weight[...].dtype
    conv.bias = nnx.data(nnx.Param(jax.device_put((shift - mean * scale).astype(dtype))))
    kernel = np.asarray(conv.weight[...], np.float64)
    conv.weight = nnx.Param(jax.device_put((kernel * scale).astype(dtype)))


# Images of different sizes on one canvas. The network has one program for each input shape, the canvas. A smaller
# image lies at the top left, and its size is data. The layers compute exactly what they would without the canvas:
# a convolution above 1x1 first sets everything outside to zero, as its own padding; pooling and resizes use the
# matrices of the image's own size, padded with zeros; attention gives no weight to keys outside.

# The resizes inside the segmenter, (stride before, stride after): poolings; then those of injections and head.
RESIZES: dict[tuple[int, int], Callable[[int, int, str], np.ndarray]] = {
    **dict.fromkeys([(4, 64), (8, 64), (16, 64), (32, 64)], pooling_matrix),
    **dict.fromkeys([(64, 8), (64, 16), (64, 32), (16, 8), (32, 8)], bilinear_matrix),
}


class ImageArea(NamedTuple):
    """The sizes of a batch's images on a larger canvas, and their resize matrices; only masked evaluation uses it.

    Attributes:
        size: (height, width) of each image, pixels of the network's input.
        matrices: of the resizes in `RESIZES`, for rows and columns, each `[n, after, before]`.
    """

    size: Int32[np.ndarray | Array, "*n 2"] | None = None
    matrices: Mapping[tuple[int, int], Matrices] = {}

    def mask(self, maps: Float[Array, "n h w c"], stride: int) -> Mask:
        """The positions inside of the images on feature maps of a stride; None for `WHOLE`."""
        if self.size is None:
            return None
        size = jnp.asarray((self.size - 1) // stride + 1)
        rows, columns = (jnp.arange(maps.shape[axis], dtype=size.dtype) < size[:, axis - 1, None] for axis in (1, 2))
        return rows[:, :, None, None] & columns[:, None, :, None]

    def matrices_between(self, before: int, after: int) -> Matrices | None:
        """The matrices of a resize from one stride to another; None for `WHOLE`."""
        return self.matrices.get((before, after))

    def on_canvas(self, canvas: tuple[int, int]) -> "ImageArea":
        """The same images on a smaller canvas: the corners of the matrices."""
        height, width = canvas

        def corner(matrix: Any, side: int, before: int, after: int) -> Any:
            return matrix[..., : _ceil_divide(side, after), : _ceil_divide(side, before)]

        matrices = {
            (before, after): (corner(rows, height, before, after), corner(columns, width, before, after))
            for (before, after), (rows, columns) in self.matrices.items()
        }
        return ImageArea(self.size, matrices)


WHOLE = ImageArea()  # every image fills its canvas: in training, export and unmasked evaluation


def make_image_area(size: tuple[int, int], canvas: tuple[int, int], dtype: str) -> ImageArea:
    """The area of one image of `size` on a canvas, both (height, width) in pixels, without the batch axis."""
    rows, columns = (_axis_matrices(size[axis], canvas[axis], dtype) for axis in (0, 1))
    return ImageArea(np.array(size, np.int32), {key: (rows[key], columns[key]) for key in RESIZES})


@functools.lru_cache(maxsize=512)
def _axis_matrices(pixels: int, canvas: int, dtype: str) -> dict[tuple[int, int], np.ndarray]:
    """The matrices of one axis; cached, since images of a data set share few sizes."""
    matrices = {}
    for (before, after), make in RESIZES.items():
        matrix = np.zeros((_ceil_divide(canvas, after), _ceil_divide(canvas, before)), dtype)
        small = make(_ceil_divide(pixels, before), _ceil_divide(pixels, after), dtype)
        matrix[: small.shape[0], : small.shape[1]] = small
        matrices[before, after] = matrix
    return matrices


def _ceil_divide(pixels: int, stride: int) -> int:
    return -(-pixels // stride)
