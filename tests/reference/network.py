"""TopFormer in plain PyTorch: what the parity tests compare the JAX model with, and the benchmarks run beside it.

Written from the specification of the network (Zhang et al., "TopFormer: Token Pyramid Transformer for
Mobile Semantic Segmentation", CVPR 2022). Submodules carry the official names, so official checkpoints load
strictly. It is for reading, not for speed. Tensors are NCHW, float32 or float64; images are normalised RGB.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Variant = dict[str, Any]
VARIANTS: dict[str, Variant] = {  # rows of blocks: kernel, expansion, channels, stride; taps count from 0
    "tiny": {"blocks": [(3, 1, 16, 1), (3, 4, 16, 2), (3, 3, 16, 1), (5, 3, 32, 2), (5, 3, 32, 1),
                        (3, 3, 64, 2), (3, 3, 64, 1), (5, 6, 96, 2), (5, 6, 96, 1)],
             "channels": [16, 32, 64, 96], "width": 128, "heads": 4, "taps": [2, 4, 6, 8]},
    "small": {"blocks": [(3, 1, 16, 1), (3, 4, 24, 2), (3, 3, 24, 1), (5, 3, 48, 2), (5, 3, 48, 1),
                         (3, 3, 96, 2), (3, 3, 96, 1), (5, 6, 128, 2), (5, 6, 128, 1), (3, 6, 128, 1)],
              "channels": [24, 48, 96, 128], "width": 192, "heads": 6, "taps": [2, 4, 6, 9]},
    "base": {"blocks": [(3, 1, 16, 1), (3, 4, 32, 2), (3, 3, 32, 1), (5, 3, 64, 2), (5, 3, 64, 1),
                        (3, 3, 128, 2), (3, 3, 128, 1), (5, 6, 160, 2), (5, 6, 160, 1), (3, 6, 160, 1)],
             "channels": [32, 64, 128, 160], "width": 256, "heads": 8, "taps": [2, 4, 6, 9]},
}  # fmt: skip
# The official code's spelling of the setting `model.injection`, where it is another.
OFFICIAL_NAMES = {"multi_sum": "muli_sum", "multi_sum_cbr": "muli_sum_cbr"}
STEM_CHANNELS, KEY_CHANNELS, VALUE_CHANNELS, MLP_RATIO = 16, 16, 32, 2


def named(**modules: nn.Module) -> nn.Sequential:
    """The modules one after the other, under the given names."""
    return nn.Sequential(OrderedDict(modules))


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1,
            name: str = "c") -> nn.Sequential:  # fmt: skip
    """A convolution without bias, called `c` in tpm and trans and `conv` elsewhere, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return named(**{name: conv, "bn": nn.BatchNorm2d(outputs)})


def resize(inputs: Tensor, like: Tensor) -> Tensor:
    """Bilinear resize to the height and width of `like`, half-pixel centres, no antialias."""
    return F.interpolate(inputs, size=like.shape[-2:], mode="bilinear", align_corners=False)


def hsigmoid(inputs: Tensor) -> Tensor:
    """`relu6(x + 3) / 6`, spelled out: the gradient of `F.hardsigmoid` has 1 / 6 in float32 only."""
    return F.relu6(inputs + 3) / 6


def make_divisible(value: int, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, at least `divisor` and never more than 10 % below `value`."""
    rounded = max(divisor, (value + divisor // 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def drop_path(inputs: Tensor, rate: float) -> Tensor:
    """Zeroes whole samples of a residual branch, and scales the others up to keep the mean."""
    keep = torch.full((len(inputs), 1, 1, 1), 1 - rate, dtype=inputs.dtype, device=inputs.device)
    return inputs * torch.bernoulli(keep) / keep


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise convolution, pointwise projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = make_divisible(expansion * inputs)
        layers: list[nn.Module] = [conv_bn(inputs, hidden), nn.ReLU()] if expansion != 1 else []
        layers += [conv_bn(hidden, hidden, kernel, stride, groups=hidden), nn.ReLU()]
        self.conv = nn.Sequential(*layers, conv_bn(hidden, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.conv(inputs) if self.residual else self.conv(inputs)


class TokenPyramid(nn.Module):
    """The convolutional trunk; returns its maps at strides 4, 8, 16 and 32."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.tapped = [f"layer{index + 1}" for index in variant["taps"]]
        self.stem = nn.Sequential(conv_bn(3, STEM_CHANNELS, 3, 2), nn.ReLU())
        channels = STEM_CHANNELS
        for index, (kernel, expansion, outputs, stride) in enumerate(variant["blocks"]):
            block = InvertedResidual(channels, outputs, kernel, expansion, stride)
            self.add_module(f"layer{index + 1}", block)
            channels = outputs

    def forward(self, features: Tensor) -> list[Tensor]:
        maps = []
        for name, layer in self.named_children():
            features = layer(features)
            if name in self.tapped:
                maps.append(features)
        return maps


def pyramid_pool(maps: list[Tensor], stride: int) -> Tensor:
    """Averages every map down to the last one's size, over `stride`, and concatenates on channels."""
    height, width = maps[-1].shape[-2:]
    size = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    return torch.cat([F.adaptive_avg_pool2d(features, size) for features in maps], dim=1)


class Attention(nn.Module):
    """Multi-head attention over all positions, without a scale factor."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = conv_bn(channels, heads * KEY_CHANNELS)
        self.to_k = conv_bn(channels, heads * KEY_CHANNELS)
        self.to_v = conv_bn(channels, heads * VALUE_CHANNELS)
        self.proj = nn.Sequential(nn.ReLU6(), conv_bn(heads * VALUE_CHANNELS, channels))

    def forward(self, inputs: Tensor) -> Tensor:
        projected = (self.to_q(inputs), self.to_k(inputs), self.to_v(inputs))
        query, key, value = (tensor.unflatten(1, (self.heads, -1)).flatten(3) for tensor in projected)
        weights = (query.transpose(2, 3) @ key).softmax(dim=3)  # batch, heads, query positions, key positions
        mixed = value @ weights.transpose(2, 3)
        return self.proj(mixed.flatten(1, 2).unflatten(2, inputs.shape[2:]))


class TransformerBlock(nn.Module):
    """Attention and MLP, each with a residual that is dropped per sample while training."""

    def __init__(self, channels: int, heads: int, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.attn = Attention(channels, heads)
        hidden = MLP_RATIO * channels
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        fc1, fc2 = conv_bn(channels, hidden), conv_bn(hidden, channels)
        self.mlp = named(fc1=fc1, dwconv=depthwise, act=nn.ReLU6(), fc2=fc2)

    def forward(self, features: Tensor) -> Tensor:
        for branch in (self.attn, self.mlp):
            update = branch(features)
            features = features + (drop_path(update, self.drop_rate) if self.training else update)
        return features


class Injection(nn.Module):
    """Injects the global semantics into a local map; `kind` is an official name, or none."""

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.activation = nn.ReLU() if kind == "muli_sum_cbr" else nn.Identity()
        if kind.startswith("fuse"):
            self.fuse1 = conv_bn(inputs, outputs, name="conv")
            self.fuse2 = conv_bn(inputs, outputs, name="conv")
        else:
            self.local_embedding = conv_bn(inputs, outputs, name="conv")
        if kind.startswith("muli"):
            self.global_embedding = conv_bn(inputs, outputs, name="conv")
            biased = named(conv=nn.Conv2d(inputs, outputs, 1))
            self.global_act = biased if kind == "muli_sum_cbr" else conv_bn(inputs, outputs, name="conv")

    def forward(self, local: Tensor, semantics: Tensor) -> Tensor:
        if self.kind == "fuse_sum":
            return self.fuse1(local) + resize(self.fuse2(semantics), local)
        if self.kind == "fuse_multi":
            return self.fuse1(local) * resize(hsigmoid(self.fuse2(semantics)), local)
        if self.kind == "none":
            return self.local_embedding(local)
        gate = resize(hsigmoid(self.global_act(semantics)), local)
        features = resize(self.activation(self.global_embedding(semantics)), local)
        return self.activation(self.local_embedding(local)) * gate + features


class Backbone(nn.Module):
    """Token pyramid, pooling and transformer, and in the segmenter the injections (`SIM`)."""

    def __init__(self, variant: Variant, pool_stride: int, drop_path: float, depths: int = 4) -> None:
        super().__init__()
        self.pool_stride = pool_stride
        self.tpm = TokenPyramid(variant)
        rates = [drop_path * (index / max(depths - 1, 1)) for index in range(depths)]
        blocks = [TransformerBlock(sum(variant["channels"]), variant["heads"], rate) for rate in rates]
        self.trans = named(transformer_blocks=nn.Sequential(*blocks))

    def features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The maps of the pyramid, and the transformer's output for all of them, joined on channels."""
        maps = self.tpm(images)
        return maps, self.trans(pyramid_pool(maps, self.pool_stride))


class Segmenter(nn.Module):
    """The segmentation network: images (n, 3, h, w) -> logits (n, classes, h / 8, w / 8), rounded up."""

    def __init__(self, variant: str | Variant = "tiny", classes: int = 150, injection: str = "muli_sum",
                 depthwise_head: bool | None = None, width: int | None = None,
                 drop_path: float = 0.1, dropout: float = 0.1, depths: int = 4) -> None:  # fmt: skip
        super().__init__()
        sizes = VARIANTS[variant] if isinstance(variant, str) else variant
        width = sizes["width"] if width is None else width
        depthwise = variant == "tiny" if depthwise_head is None else depthwise_head
        self.channels = sizes["channels"]
        self.backbone = Backbone(sizes, pool_stride=2, drop_path=drop_path, depths=depths)
        injections = [Injection(injection, channels, width) for channels in self.channels[1:]]
        self.backbone.SIM = nn.ModuleList([nn.Identity(), *injections])
        fuse = conv_bn(width, width, groups=width if depthwise else 1, name="conv")
        drop, conv_seg = nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1)
        self.decode_head = named(linear_fuse=fuse, act=nn.ReLU(), dropout=drop, conv_seg=conv_seg)

    def forward(self, images: Tensor) -> Tensor:
        maps, semantics = self.backbone.features(images)
        parts = semantics.split(self.channels, dim=1)
        injections: Any = self.backbone.SIM
        finest, middle, coarsest = (injections[index](maps[index], parts[index]) for index in (1, 2, 3))
        return self.decode_head(finest + resize(middle, finest) + resize(coarsest, finest))


class Classifier(Backbone):
    """The ImageNet network: images (n, 3, h, w) -> logits (n, classes)."""

    def __init__(self, variant: str | Variant = "tiny", classes: int = 1000, drop_path: float = 0.1,
                 depths: int = 4) -> None:  # fmt: skip
        sizes = VARIANTS[variant] if isinstance(variant, str) else variant
        super().__init__(sizes, pool_stride=1, drop_path=drop_path, depths=depths)
        channels = sum(sizes["channels"])
        self.head = named(bn=nn.BatchNorm1d(channels), l=nn.Linear(channels, classes))

    def forward(self, images: Tensor) -> Tensor:
        _, semantics = self.features(images)
        return self.head(semantics.mean(dim=(2, 3)))


def randomize(module: nn.Module, seed: int) -> None:
    """Gives every parameter and BatchNorm statistic a seeded value that shows when it is misplaced.

    Weights have fan-in scale: at the official fan-out scale, with statistics that fit no data, activations
    grow until attention is one-hot and blind to its scale. For float64, call `module.double()` afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0, layer.weight[0].numel() ** -0.5, generator)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator)
    for name, tensor in module.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, 0, 0.2, generator)
        elif name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5, generator)
