"""The backbone with its ImageNet head: what the published classification checkpoints hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import FrozenConfigDict

from topformer_jax.models.layers import BatchNorm, DTypePolicy
from topformer_jax.models.topformer import Backbone, Images, Variant


class Linear(nnx.Module):
    """A matrix product and a bias, started from normal(0, 0.01) and 0."""

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: np.random.Generator):
        self.policy = policy
        self.weight = nnx.Param(policy.array(0.01 * rng.standard_normal((inputs, outputs))))
        self.bias = nnx.Param(policy.array(np.zeros(outputs)))

    def __call__(self, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
        policy = self.policy
        weight, bias = (parameter[...].astype(policy.dtype) for parameter in (self.weight, self.bias))
        return jnp.matmul(x, weight, precision=policy.product_precision) + bias


class ClassifierHead(nnx.Module):
    """BatchNorm, then a linear layer (`bn` and `l`), in at least float32."""

    def __init__(self, features: int, num_classes: int, *, policy: DTypePolicy, rng: np.random.Generator):
        wide = dataclasses.replace(policy, dtype=policy.wide)
        self.bn = BatchNorm(features, policy=wide)
        self.l = Linear(features, num_classes, policy=wide, rng=rng)

    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n classes"]:
        return self.l(self.bn(x))


class Classifier(Backbone):
    """Transformer output averaged over all pixels, BatchNorm, linear: no injection, pooling stride 1."""

    config: FrozenConfigDict

    def __init__(
        self,
        variant: Variant,
        num_classes: int,
        *,
        drop_path_rate: float = 0.1,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        super().__init__(variant, 1, drop_path_rate, policy=policy, rng=rng)
        self.head = ClassifierHead(sum(self.channels), num_classes, policy=policy, rng=rng)

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "n classes"]:
        _, semantics = self.tokens(images, rngs)
        with jax.named_scope("head"):
            return self.head(semantics.astype(self.policy.wide).mean((1, 2)))
