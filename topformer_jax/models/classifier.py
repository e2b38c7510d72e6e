"""The ImageNet classifier: the backbone with the head of the published classification checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from numpy.random import Generator

from topformer_jax.models.layers import BatchNorm, Dropout, DTypePolicy
from topformer_jax.models.topformer import Backbone, ConfiguredModel, Images


class Linear(nnx.Module):
    """A fully connected layer; initial weights are normal(0, 0.01), the bias is 0."""

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: Generator):
        self.policy = policy
        self.weight = nnx.Param(policy.init_param(0.01 * rng.standard_normal((inputs, outputs))))
        self.bias = nnx.Param(policy.init_param(np.zeros(outputs)))

    def __call__(self, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
        policy = self.policy
        weight, bias = (parameter[...].astype(policy.dtype) for parameter in (self.weight, self.bias))
        return jnp.matmul(x, weight, precision=policy.matmul_precision) + bias


class ClassifierHead(nnx.Module):
    """BatchNorm, dropout, and a linear layer, with the official keys `bn` and `l`; all in `policy.accum_dtype`."""

    def __init__(self, features: int, settings: ConfigDict, *, policy: DTypePolicy, rng: Generator):
        self.bn = BatchNorm(features, policy=policy.accum_policy)
        self.dropout = Dropout(settings.dropout_ratio, broadcast_dims=())
        self.l = Linear(features, settings.num_classes, policy=policy.accum_policy, rng=rng)

    def __call__(self, x: Float[Array, "n c"], rngs: nnx.Rngs | None) -> Float[Array, "n classes"]:
        # After BatchNorm, which would otherwise learn the variance of values that dropout has scaled.
        return self.l(self.dropout(self.bn(x), rngs))


class Classifier(Backbone, ConfiguredModel):
    """The backbone with pooling stride 1 and without injections; mean over all positions; `ClassifierHead`.

    Takes normalised RGB images and returns logits in float32 or wider. `settings` are `config.model`.
    """

    def __init__(self, settings: ConfigDict, *, policy: DTypePolicy, rng: Generator):
        super().__init__(settings, 1, policy=policy, rng=rng)
        self.head = ClassifierHead(sum(self.channels), settings, policy=policy, rng=rng)

    def __call__(self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None) -> Float[Array, "n classes"]:
        _, semantics = self.extract_features(images, rngs)
        with jax.named_scope("head"):
            return self.head(semantics.astype(self.policy.accum_dtype).mean((1, 2)), rngs)
