"""The network put together: backbone, decode head, segmenter."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import FrozenConfigDict

from topformer_jax.models.area import WHOLE, ImageArea
from topformer_jax.models.injection import INJECTIONS
from topformer_jax.models.layers import Conv, ConvModule, Dropout, DTypePolicy
from topformer_jax.models.token_pyramid import TokenPyramid
from topformer_jax.models.transformer import Transformer
from topformer_jax.models.variants import Variant
from topformer_jax.ops.resample import Matrices, adaptive_avg_pool, resize

Images = Array | np.ndarray
STRIDES = (4, 8, 16, 32)  # of the tokens
SEMANTICS_STRIDE = 64  # of the transformer in the segmenter


class PyramidPool(nnx.Module):
    """Pools the tokens of all scales to one size and concatenates their channels.

    The size is that of the coarsest scale divided by `stride`, rounded up.
    """

    def __init__(self, stride: int, policy: DTypePolicy):
        self.stride = stride
        self.policy = policy

    def __call__(
        self, tokens: list[Float[Array, "n _h _w _c"]], area: ImageArea = WHOLE
    ) -> Float[Array, "n h w c"]:
        _, h, w, _ = tokens[-1].shape
        size = ((h - 1) // self.stride + 1, (w - 1) // self.stride + 1)
        pooled = [
            adaptive_avg_pool(
                x,
                size,
                matrices=area.matrices_between(stride, STRIDES[-1] * self.stride),
                method=self.policy.conv_impl,
                precision=self.policy.matmul_precision,
            )
            for stride, x in zip(STRIDES, tokens, strict=True)
        ]
        return jnp.concatenate(pooled, axis=-1)


class Backbone(nnx.Module):
    """Token pyramid, pooling and transformer: what segmenter and classifier share.

    `pool_stride` is the stride of the pooling after the coarsest scale (officially `c2t_stride`): 2 in the segmenter,
    whose transformer thus runs at stride 64, and 1 in the classifier. `depths` are the transformer's blocks.
    """

    def __init__(
        self,
        variant: Variant,
        pool_stride: int,
        *,
        depths: int,
        drop_path_rate: float,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.policy = policy
        self.channels = variant.channels
        self.tpm = TokenPyramid(variant.blocks, variant.taps, policy=policy, rng=rng)
        self.ppa = PyramidPool(pool_stride, policy)
        self.trans = Transformer(
            sum(self.channels), variant.heads, depths, drop_path_rate=drop_path_rate, policy=policy, rng=rng
        )

    def extract_features(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None, area: ImageArea = WHOLE
    ) -> tuple[list[Float[Array, "n _h _w _c"]], Float[Array, "n _h _w c"]]:
        """The tokens of each scale, finest first, and the transformer's output for all scales, joined on channels.

        Args:
            images: normalised.
            rngs: for drop path, in training only.
            area: of the images on canvases; only with `pool_stride` 2.

        Raises:
            ValueError: the images are not floats `[n, h, w, 3]`.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.shape}: expected [n, h, w, 3]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images are {images.dtype}: expected normalized floats, see topformer_jax.normalize"
            )
        with jax.named_scope("tpm"):
            tokens = self.tpm(jnp.asarray(images).astype(self.policy.dtype), area)
        with jax.named_scope("ppa"):
            pooled = self.ppa(tokens, area)
        with jax.named_scope("trans"):
            return tokens, self.trans(pooled, rngs, area.size_at(SEMANTICS_STRIDE))


def _no_injection(local: Array, semantics: Array, matrices: Matrices | None = None) -> Array:
    """Fills slot 0 of `SIM`: the tokens of stride 4 get no injection."""
    return local


class TopFormer(Backbone):
    """The backbone with a semantics injection at strides 8, 16 and 32 (not at 4).

    Returns:
        The three injected feature maps, finest first, with `head_channels` channels each.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        injection: str,
        head_channels: int,
        depths: int,
        drop_path_rate: float,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        super().__init__(variant, 2, depths=depths, drop_path_rate=drop_path_rate, policy=policy, rng=rng)
        injected: list[Callable[..., Array]] = [
            INJECTIONS[injection](channels, head_channels, policy=policy, rng=rng)
            for channels in self.channels[1:]
        ]
        # As officially, slot 0 has no weights: the tokens of stride 4 are an input of the transformer only.
        self.SIM = nnx.List([_no_injection, *injected])

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None, area: ImageArea = WHOLE
    ) -> list[Float[Array, "n _h _w head_channels"]]:
        tokens, semantics = self.extract_features(images, rngs, area)
        offsets = [sum(self.channels[: index + 1]) for index in range(len(self.channels) - 1)]
        semantics_of_scale = jnp.split(semantics, offsets, axis=-1)
        with jax.named_scope("SIM"):
            return [
                self.SIM[index](
                    tokens[index],
                    semantics_of_scale[index],
                    area.matrices_between(SEMANTICS_STRIDE, STRIDES[index]),
                )
                for index in range(1, len(tokens))
            ]


class DecodeHead(nnx.Module):
    """The head: sum of the feature maps at the finest one's size, 1x1 conv-BN-ReLU, dropout, 1x1 conv to classes.

    Args:
        head_channels: channels of the feature maps.
        num_classes: channels of the logits.
        depthwise: the first convolution has one weight a channel (officially `is_dw`, of the Tiny configs).
        dropout_ratio: probability that a channel of a sample is dropped (`Dropout2d`).
        policy: see `DTypePolicy`; the logits are in `policy.accum_dtype`.
        rng: draws the initial weights.
    """

    def __init__(
        self,
        head_channels: int,
        num_classes: int,
        *,
        depthwise: bool,
        dropout_ratio: float,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.policy = policy
        # mmcv initialises this layer with the fan-out of a full convolution, also where it is depthwise.
        self.linear_fuse = ConvModule(
            head_channels,
            head_channels,
            head_channels if depthwise else 1,
            activation=jax.nn.relu,
            std=math.sqrt(2 / head_channels),
            policy=policy,
            rng=rng,
        )
        self.dropout = Dropout(dropout_ratio, broadcast_dims=(1, 2))
        self.conv_seg = Conv(
            head_channels, num_classes, bias=True, std=0.01, policy=policy.accum_policy, rng=rng
        )

    def __call__(
        self,
        feature_maps: list[Float[Array, "n _h _w c"]],
        rngs: nnx.Rngs | None = None,
        area: ImageArea = WHOLE,
    ) -> Float[Array, "n h w classes"]:
        finest, *others = feature_maps
        _, h, w, _ = finest.shape
        _, finest_stride, *strides = STRIDES
        method, precision = self.policy.conv_impl, self.policy.matmul_precision
        x = finest
        for stride, other in zip(strides, others, strict=True):
            matrices = area.matrices_between(stride, finest_stride)
            x = x + resize(other, (h, w), matrices=matrices, method=method, precision=precision)
        x = self.dropout(self.linear_fuse(x), rngs)
        return self.conv_seg(x.astype(self.policy.accum_dtype))


class Segmenter(nnx.Module):
    """The whole network: normalised RGB images to logits at stride 8, in float32 or wider.

    `topformer_jax.load` and `models.build` make one from a config, and set `config` to it.

    Args:
        variant: a value of `VARIANTS`.
        num_classes: channels of the logits.
        injection: a key of `INJECTIONS`.
        head_channels: of injections and head; None: the variant's own.
        depthwise_head: `depthwise` of `DecodeHead`.
        depths: transformer blocks.
        drop_path_rate: in training, of the last transformer block; the first has 0.
        dropout_ratio: in training, of the head's channels.
        policy: see `DTypePolicy`.
        rng: draws the initial weights.
    """

    # All settings that the model was built from, those of evaluation too. Static: a part of the graph definition.
    config: FrozenConfigDict
    # Names of the classes in label order, their colours, and the settings that the checkpoint was made with, as far
    # as `topformer_jax.load` finds them. Static too.
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    checkpoint_config: FrozenConfigDict | None = None

    def __init__(
        self,
        variant: Variant,
        num_classes: int,
        *,
        injection: str = "multi_sum",
        head_channels: int | None = None,
        depthwise_head: bool = False,
        depths: int = 4,
        drop_path_rate: float = 0.1,
        dropout_ratio: float = 0.1,
        policy: DTypePolicy,
        rng: np.random.Generator,
    ):
        self.num_classes, self.policy = num_classes, policy
        head_channels = variant.head_channels if head_channels is None else head_channels
        self.backbone = TopFormer(
            variant,
            injection=injection,
            head_channels=head_channels,
            depths=depths,
            drop_path_rate=drop_path_rate,
            policy=policy,
            rng=rng,
        )
        self.decode_head = DecodeHead(
            head_channels,
            num_classes,
            depthwise=depthwise_head,
            dropout_ratio=dropout_ratio,
            policy=policy,
            rng=rng,
        )

    def __call__(
        self, images: Float[Images, "n h w 3"], rngs: nnx.Rngs | None = None, area: ImageArea = WHOLE
    ) -> Float[Array, "n h8 w8 classes"]:
        """The logits; those of images on larger canvases are at the top left, what is around them means nothing."""
        feature_maps = self.backbone(images, rngs, area)
        with jax.named_scope("decode_head"):
            return self.decode_head(feature_maps, rngs, area)
