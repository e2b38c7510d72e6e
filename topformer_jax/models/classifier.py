"""The backbone with its ImageNet head: what the published classification checkpoints hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from topformer_jax.models.layers import BatchNorm, Numerics
from topformer_jax.models.topformer import Backbone, Images, Variant


class Linear(nnx.Module):
    """A matrix product and a bias, started from normal(0, 0.01) and 0."""

    def __init__(self, inputs: int, outputs: int, *, numerics: Numerics, rng: np.random.Generator):
        self.numerics = numerics
        self.weight = nnx.Param(numerics.array(0.01 * rng.standard_normal((inputs, outputs))))
        self.bias = nnx.Param(numerics.array(np.zeros(outputs)))

    def __call__(self, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
        numerics = self.numerics
        weight, bias = (parameter[...].astype(numerics.dtype) for parameter in (self.weight, self.bias))
        return jnp.matmul(x, weight, precision=numerics.product_precision) + bias


class ClassifierHead(nnx.Module):
    """BatchNorm, then a linear layer (`bn` and `l`), in at least float32."""

    def __init__(self, features: int, classes: int, *, numerics: Numerics, rng: np.random.Generator):
        wide = dataclasses.replace(numerics, dtype=numerics.wide)
        self.bn = BatchNorm(features, numerics=wide)
        self.l = Linear(features, classes, numerics=wide, rng=rng)

    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n classes"]:
        return self.l(self.bn(x))


class Classifier(Backbone):
    """Transformer output averaged over all pixels, BatchNorm, linear: no injection, pooling stride 1."""

    def __init__(
        self,
        variant: Variant,
        classes: int,
        *,
        drop_path: float = 0.1,
        numerics: Numerics,
        rng: np.random.Generator,
    ):
        super().__init__(variant, 1, drop_path, numerics=numerics, rng=rng)
        self.head = ClassifierHead(sum(self.channels), classes, numerics=numerics, rng=rng)

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "n classes"]:
        _, semantics = self.tokens(images, rngs)
        with jax.named_scope("head"):
            return self.head(semantics.astype(self.numerics.wide).mean((1, 2)))
