"""BatchNorm as a part of the convolution before it: the same network for inference, with half of its layers.

At inference a BatchNorm multiplies each channel by a number and adds another. Both go into the convolution's weight
and bias, computed in float64. The modules stay the same ones, so that a new block or injection needs nothing here.
"""

from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from topformer_jax.models.layers import BatchNorm, Conv, ConvBN, ConvModule

Model = TypeVar("Model", bound=nnx.Module)


def fold_batch_norms(model: Model) -> Model:
    """A copy of a model, or of a part of one, without the BatchNorms that follow a convolution; for inference alone.

    Args:
        model: stays as it is.

    Raises:
        ValueError: it is in training mode.

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
    """Gives a convolution the weight and the bias that compute the BatchNorm after it as well."""
    if not norm.use_running_average:
        raise ValueError("BatchNorms can be folded in inference mode only: call model.eval() first")
    weight, shift, mean, variance = (
        np.asarray(value[...], np.float64)
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    assert conv.bias is None, "the convolution before a BatchNorm has no bias"
    scale = weight / np.sqrt(variance + norm.eps)
    dtype = conv.weight[...].dtype
    conv.bias = nnx.data(nnx.Param(jax.device_put((shift - mean * scale).astype(dtype))))
    kernel = np.asarray(conv.weight[...], np.float64)
    conv.weight = nnx.Param(jax.device_put((kernel * scale).astype(dtype)))
