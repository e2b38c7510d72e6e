"""The ImageNet classifier: the backbone with the head of the published classification checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import FrozenConfigDict

from topformer_jax.models.layers import BatchNorm, Dropout, DTypePolicy
from topformer_jax.models.topformer import Backbone, Images
from topformer_jax.models.variants import Variant


class Linear(nnx.Module):
    """A fully connected layer; initial weights are normal(0, 0.01), the bias is 0."""

    def __init__(self, inputs: int, outputs: int, *, policy: DTypePolicy, rng: np.random.Generator):
        self.policy = policy
        self.weight = nnx.Param(policy.init_param(0.01 * rng.standard_normal((inputs, outputs))))
        self.bias = nnx.Param(policy.init_param(np.zeros(outputs)))

    def __call__(self, x: Float[Array, "n inputs"]) -> Float[Array, "n outputs"]:
        policy = self.policy
        weight, bias = (parameter[...].astype(policy.dtype) for parameter in (self.weight, self.bias))
        return jnp.matmul(x, weight, precision=policy.matmul_precision) + bias


class ClassifierHead(nnx.Module):
    """BatchNorm, dropout, and a linear layer, with the official keys `bn` and `l`; all in `policy.accum_dtype`."""

    def __init__(
        self,
        features: int,
        num_classes: int,
        dropout_ratio: float,
        *,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.bn = BatchNorm(features, policy=policy.accum_policy)
        self.dropout = Dropout(dropout_ratio, broadcast_dims=())
        self.l = Linear(features, num_classes, policy=policy.accum_policy, rng=rng)

    def __call__(self, x: Float[Array, "n c"], rngs: nnx.Rngs | None) -> Float[Array, "n classes"]:
        # After BatchNorm, which would otherwise learn the variance of values that dropout has scaled.
        return self.l(self.dropout(self.bn(x), rngs))


class Classifier(Backbone):
    """The backbone with pooling stride 1 and without injections; mean over all positions; `ClassifierHead`.

    Takes normalised RGB images and returns logits in float32 or wider. `topformer_jax.load` and `models.build` make
    one from a config, and set `config` to it.
    """

    # All settings that the model was built from. Static: a part of the graph definition.
    config: FrozenConfigDict
    # As a segmenter's; a classifier's classes have no colours.
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    checkpoint_config: FrozenConfigDict | None = None

    def __init__(
        self,
        variant: Variant,
        num_classes: int,
        *,
        depths: int = 4,
        drop_path_rate: float = 0.1,
        dropout_ratio: float = 0.0,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        super().__init__(variant, 1, depths=depths, drop_path_rate=drop_path_rate, policy=policy, rng=rng)
        self.head = ClassifierHead(sum(self.channels), num_classes, dropout_ratio, policy=policy, rng=rng)

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "n classes"]:
        _, semantics = self.extract_features(images, rngs)
        with jax.named_scope("head"):
            return self.head(semantics.astype(self.policy.accum_dtype).mean((1, 2)), rngs)
