"""PyTorch's side of the benchmarks: each question is a function that makes the call to time.

`benchmarks.runner` starts a process for each variant, which asks `start`.
"""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks import runner
from tests.reference.network import OFFICIAL_NAMES, Classifier, Segmenter
from topformer_jax.data import loader, sources, transforms
from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.loader import count_cores
from topformer_jax.exporters import exported
from topformer_jax.training.step import MOMENTUM, RMS_DECAY

Call = Callable[[], Any]
Arrays = Mapping[str, np.ndarray]
LARGEST_RESULT = 100_000  # numbers: larger results are not sent


class Variant:
    """Arrays, networks and functions as a variant has them; bfloat16 is by autocast."""

    def __init__(self, name: str, device: str, config: ConfigDict):
        self.config = config
        self.device = torch.device(device)
        self.layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
        self.compile = torch.compile if "compile" in name else lambda function: function
        torch.set_num_threads(count_cores())
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = config.model.precision != "highest"
        torch.backends.cuda.matmul.allow_tf32 = config.model.precision != "highest"

    def images(self, images: np.ndarray) -> Tensor:
        """NHWC numbers as an NCHW tensor in the variant's layout."""
        tensor = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=self.layout)

    def labels(self, labels: np.ndarray) -> Tensor:
        """Labels as PyTorch takes them: int64."""
        return torch.from_numpy(labels.astype(np.int64)).to(self.device)

    def network(self, weights: Arrays) -> Any:
        """The config's network with these weights, which are in PyTorch's layout."""
        model = self.config.model
        injection = OFFICIAL_NAMES.get(model.injection, model.injection)
        network: Any
        if self.config.task == "classification":
            network = Classifier(model.variant, model.num_classes, model.drop_path_rate, model.depths)
        else:
            network = Segmenter(
                *(model.variant, model.num_classes, injection, model.depthwise_head, model.head_channels),
                *(model.drop_path_rate, model.dropout_ratio, model.depths),
            )
        network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        return network.to(self.device, memory_format=self.layout)

    def logits(self, network: Any, images: Tensor) -> Tensor:
        """The network's float32 logits, in the config's dtype until there."""
        half = self.config.model.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return network(images).float()

    def normalize(self, images: Tensor) -> Tensor:
        """Levels of 0..255 as the network takes them."""
        mean, std = (torch.from_numpy(row)[:, None, None].to(self.device) for row in (MEAN, STD))
        return (images.float() - mean) / std

    def wait(self, _: object = None) -> None:
        """Waits until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_optimizer(config: ConfigDict, network: Any) -> torch.optim.Optimizer:
    """AdamW in two groups for a segmenter, RMSprop for a classifier, as the recipe says."""
    settings, rate = config.optimizer, config.schedule.lr
    if config.task == "classification":
        return torch.optim.RMSprop(
            network.parameters(),
            lr=0.0,  # its mean square starts at 0, not at 1: the recipe's rate would make all weights infinite
            alpha=RMS_DECAY,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            momentum=MOMENTUM,
        )
    return torch.optim.AdamW(
        [
            {"params": network.backbone.parameters(), "lr": rate},
            {"params": network.decode_head.parameters(), "lr": rate * settings.head_lr_mult},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def train_step(variant: Variant, weights: Arrays, batch: Arrays) -> Call:
    """Forward, backward and optimizer on a batch that is normalised already."""
    network = variant.network(weights).train()
    images, labels = variant.normalize(variant.images(batch["image"])), variant.labels(batch["label"])
    optimizer = make_optimizer(variant.config, network)
    function = F.cross_entropy if variant.config.task == "classification" else cross_entropy
    loss_of = variant.compile(lambda: function(variant.logits(network, images), labels))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()

    return step


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The official loss: logits resized to the labels, the sum divided by all pixels, void ones too."""
    logits = resize(logits, labels)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="none").mean()


def loss(variant: Variant, logits: np.ndarray, labels: np.ndarray) -> Call:
    """The loss of logits `[n, h, w, classes]`, and its gradient."""
    inputs, target = variant.images(logits).requires_grad_(), variant.labels(labels)
    function = variant.compile(cross_entropy)
    return lambda: torch.autograd.grad(function(inputs, target), inputs)


def logits(variant: Variant, weights: Arrays, images: np.ndarray) -> Call:
    """The logits of images `[n, h, w, 3]`."""
    network, placed = variant.network(weights).eval(), variant.images(images)
    forward = variant.compile(lambda: variant.logits(network, variant.normalize(placed)))
    return torch.no_grad()(lambda: forward())


def labels(variant: Variant, weights: Arrays, images: np.ndarray) -> Call:
    """The labels of images `[n, h, w, 3]`, of their size."""
    network, placed = variant.network(weights).eval(), variant.images(images)
    forward = variant.compile(lambda: predict(variant.logits(network, variant.normalize(placed)), placed, placed))
    return torch.no_grad()(lambda: forward())


def exported_file(variant: Variant, suffix: str, data: bytes, images: np.ndarray) -> Call:
    """The output of one of our exported files for images."""
    file = exported.open_bytes("the file", data, exported.import_format(pathlib.Path(f"file{suffix}")))
    return lambda: file(images)


def onnx_logits(variant: Variant, weights: Arrays, images: np.ndarray, to_labels: bool = False) -> Call:
    """The logits of images from PyTorch's own ONNX export of the network, in onnxruntime."""
    import onnxruntime

    network, placed = variant.network(weights).eval(), variant.images(images)

    class Module(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            found: Tensor = network(variant.normalize(pixels))
            return resize(found, pixels).argmax(1) if to_labels else found

    program = torch.onnx.export(Module(), (placed,), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feed = {session.get_inputs()[0].name: placed.numpy()}
    return lambda: session.run(None, feed)


def onnx_labels(variant: Variant, weights: Arrays, images: np.ndarray) -> Call:
    """The labels of images, likewise."""
    return onnx_logits(variant, weights, images, to_labels=True)


def evaluate(variant: Variant, weights: Arrays, source: sources.Source) -> Call:
    """The confusion matrix of a source, an image at a time, as officially; files are read ahead as by ours."""
    network, config = variant.network(weights).eval(), variant.config
    classes, settings = config.model.num_classes, config.evaluation

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = loader.decode_example(source[index], config)
        return transforms.eval_image(image, scale=settings.scale, size_divisor=settings.size_divisor), label

    @torch.no_grad()
    def run() -> Tensor:
        counts = torch.zeros(classes**2, dtype=torch.int64, device=variant.device)
        for image, label in loader.map_in_threads(read, range(len(source))):
            inputs, truth = variant.images(image[None]), variant.labels(label[None])
            found = predict(variant.logits(network, variant.normalize(inputs)), inputs, truth)
            valid = truth != IGNORE_LABEL
            counts += torch.bincount(truth[valid] * classes + found[valid], minlength=classes**2)
        return counts.reshape(classes, classes)

    return run


def predict(logits: Tensor, inputs: Tensor, image: Tensor) -> Tensor:
    """As officially: resized to the network's input, then to the image; softmax; argmax."""
    return resize(resize(logits, inputs), image).softmax(1).argmax(1)


def resize(tensor: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another tensor."""
    return F.interpolate(tensor, size=like.shape[-2:], mode="bilinear", align_corners=False)


def peak_memory(device: str) -> int | None:
    """The most memory that this process has had, in bytes."""
    status = pathlib.Path("/proc/self/status")
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else None


def start(
    question: str, name: str, device: str, config: ConfigDict, arguments: tuple[Any, ...]
) -> tuple[Callable[[int], float], tuple[float, int | None, np.ndarray | None]]:
    """Makes a question's program and calls it twice.

    Returns:
        The program's timer; the seconds of the first call, the memory in bytes and the result if it is small.
    """
    variant, before = Variant(name, device, config), peak_memory(device)
    call = globals()[question](variant, *arguments)
    began = time.perf_counter()
    value = call()
    variant.wait()
    seconds = time.perf_counter() - began
    is_small = isinstance(value, Tensor) and value.numel() <= LARGEST_RESULT
    result = value.cpu().numpy() if is_small else None
    del value
    run = runner.make_timer(call, variant.wait)
    run(1)
    after = peak_memory(device)
    return run, (seconds, None if before is None or after is None else after - before, result)
