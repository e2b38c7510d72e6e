"""The peers in PyTorch: training step, inference, loss, evaluation, and a loader; imported when they are asked for.

A variant is words joined by "+": eager (nothing else), channels_last, compile (`torch.compile`). Everything
runs on the kind of device that JAX has, in the config's dtype (bfloat16 by autocast).
"""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import jax
import numpy as np
import torch
import torch.nn.functional as F
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor

from topformer_jax import convert
from topformer_jax.benchmark import measure, plain_loading
from topformer_jax.benchmark.measure import Program
from topformer_jax.benchmark.torch_peer import Segmenter
from topformer_jax.data import loader, sources, transforms
from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.transforms import VOID
from topformer_jax.errors import UserError

WORDS = ("eager", "channels_last", "compile")
# The official spelling of two injections.
INJECTIONS = {"multi_sum": "muli_sum", "multi_sum_cbr": "muli_sum_cbr"}


class Torch:
    """PyTorch on a device, in one variant."""

    def __init__(self, variant: str, config: ConfigDict):
        words = set(variant.split("+"))
        if words - set(WORDS):
            raise UserError(
                f"there is no variant {variant} of PyTorch: join words of {', '.join(WORDS)} by +"
            )
        if config.model.dtype == "float64":
            raise UserError("the peer knows float32 and bfloat16: --config.model.dtype=float32")
        self.name = f"torch {variant}"
        self.device = _device()
        self.half = config.model.dtype == "bfloat16"
        self._layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
        self._compile = "compile" in words
        torch.set_num_threads(measure.cores())
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = config.model.precision != "highest"
            torch.backends.cuda.matmul.allow_tf32 = config.model.precision != "highest"

    def place(self, images: ArrayLike) -> Tensor:
        """NHWC numbers as an NCHW tensor in the variant's layout."""
        tensor = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=self._layout)

    def network(self, config: ConfigDict, tensors: Mapping[str, ArrayLike]) -> Segmenter:
        """The config's network with our weights."""
        model = config.model
        injection = INJECTIONS.get(model.injection, model.injection)
        network: Any = Segmenter(
            *(model.variant, model.classes, injection, model.depthwise_head, model.width),
            *(model.drop_path, model.dropout),
        )
        states = {
            name: torch.from_numpy(convert.to_torch(np.asarray(value))) for name, value in tensors.items()
        }
        network.load_state_dict(states)
        return network.to(self.device, memory_format=self._layout)

    def faster(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled if the variant says so."""
        return torch.compile(function) if self._compile else function

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """The config's dtype for what runs inside."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def normalise(self, images: Tensor) -> Tensor:
        """Levels of 0..255 as the network takes them."""
        mean, std = (torch.from_numpy(row)[:, None, None].to(self.device) for row in (MEAN, STD))
        return (images.float() - mean) / std

    def wait(self, _: object = None) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ready(self, make: Callable[[], Callable[[], Any]]) -> Program:
        """Makes a program and calls it once; on CUDA its memory is the most that was allocated meanwhile."""
        if self.device.type != "cuda":
            return measure.ready(self.name, make(), self.wait)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        program = measure.ready(self.name, make(), self.wait)
        program.wait(program.call())  # what the first call took to choose and to compile is gone
        torch.cuda.reset_peak_memory_stats()
        program.wait(program.call())
        return dataclasses.replace(program, memory=torch.cuda.max_memory_allocated() - before)


def variants(config: ConfigDict, asked: tuple[str, ...], *, one: bool = False) -> list[Torch]:
    """PyTorch in the variants that are asked for, else in those that suit the device."""
    if not asked and _device().type == "cuda":
        asked = ("channels_last",) if one else ("channels_last+compile",)
    asked = asked or (("eager",) if one else ("eager", "channels_last", "channels_last+compile"))
    return [Torch(variant, config) for variant in asked]


def working(
    peers: list[Torch], make: Callable[[Torch], Program | dict[str, Program]]
) -> tuple[dict[str, Any], list[str]]:
    """What `make` returns for each variant, by name, and a note on each one that does not work here."""
    found, notes = {}, []
    for peer in peers:
        try:
            found[peer.name] = make(peer)
        except UserError:
            raise
        except Exception as error:  # a compiler that is not there, a device without the operation
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            notes.append(f"{peer.name} does not work here: {reason[:200]}")
    return found, notes


def train_step(
    peer: Torch, config: ConfigDict, tensors: Mapping[str, ArrayLike], batch: Mapping[str, np.ndarray]
) -> Program:
    """One step on a batch that is normalised already: forward, backward, AdamW in two groups."""

    def make() -> Callable[[], Any]:
        network = peer.network(config, tensors).train()
        images = peer.normalise(peer.place(batch["image"]))
        labels = torch.from_numpy(batch["label"].astype(np.int64)).to(peer.device)
        settings, rate = config.optimizer, config.schedule.learning_rate
        groups = [
            {"params": network.backbone.parameters(), "lr": rate},
            {"params": network.decode_head.parameters(), "lr": rate * settings.head_multiplier},
        ]
        optimizer = torch.optim.AdamW(
            groups,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=peer.device.type == "cuda",
        )

        def forward(images: Tensor, labels: Tensor) -> Tensor:
            with peer.arithmetic():
                logits = network(images)
            return cross_entropy(logits.float(), labels)

        loss_of = peer.faster(forward)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(images, labels)
            loss.backward()
            optimizer.step()
            return loss

        return step

    return peer.ready(make)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The official loss: resized to the labels, divided by all pixels, void ones too."""
    logits = _resize(logits, (labels.shape[1], labels.shape[2]))
    return F.cross_entropy(logits, labels, ignore_index=VOID, reduction="none").mean()


def loss(peer: Torch, logits: ArrayLike, labels: np.ndarray) -> Program:
    """The loss of logits `[n, h, w, classes]` and its gradient."""

    def make() -> Callable[[], Any]:
        inputs = peer.place(logits).requires_grad_()
        target = torch.from_numpy(labels.astype(np.int64)).to(peer.device)
        function = peer.faster(cross_entropy)
        return lambda: torch.autograd.grad(function(inputs, target), inputs)

    return peer.ready(make)


def inference(
    peer: Torch,
    config: ConfigDict,
    tensors: Mapping[str, ArrayLike],
    images: np.ndarray,
    picture: tuple[int, int],
) -> dict[str, Program]:
    """Two programs: from images `[n, h, w, 3]` to "logits", and to "labels" of the picture's size."""
    network = peer.network(config, tensors).eval()

    def logits(images: Tensor) -> Tensor:
        with peer.arithmetic():
            return network(peer.normalise(images)).float()

    def labels(images: Tensor) -> Tensor:
        return _labels(logits(images), (images.shape[2], images.shape[3]), picture)

    def program(function: Callable[..., Any]) -> Program:
        def make() -> Callable[[], Any]:
            placed, fast = peer.place(images), peer.faster(function)
            return torch.no_grad()(lambda: fast(placed))

        return peer.ready(make)

    return {"logits": program(logits), "labels": program(labels)}


def evaluation(
    peer: Torch, config: ConfigDict, tensors: Mapping[str, ArrayLike], source: sources.Source
) -> Callable[[], np.ndarray]:
    """A function that evaluates a source a picture at a time, as officially, and returns the confusion matrix."""
    settings, classes = config.evaluation, config.model.classes
    if settings.mode != "whole" or settings.flip or settings.scales != (1.0,):
        raise UserError("the peer of benchmark evaluate knows the whole picture at one scale, without flip")
    network = peer.network(config, tensors).eval()

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = plain_decoded(source[index], config)
        return transforms.test_image(image, scale=settings.scale, align=settings.align), label

    @torch.no_grad()
    def run() -> np.ndarray:
        counts = torch.zeros(classes**2, dtype=torch.int64, device=peer.device)
        for image, label in loader.in_order(read, range(len(source))):
            with peer.arithmetic():
                logits = network(peer.normalise(peer.place(image[None]))).float()
            found = _labels(logits, (image.shape[0], image.shape[1]), (label.shape[0], label.shape[1]))[0]
            truth = torch.from_numpy(label.astype(np.int64)).to(peer.device)
            valid = truth != VOID
            pairs = truth[valid] * classes + found[valid]
            counts += torch.bincount(pairs, minlength=classes**2)
        return counts.cpu().numpy().reshape(classes, classes)

    return run


def plain_decoded(example: sources.Example, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Image (RGB) and label of an example, by OpenCV and PIL; arrays are taken as they are."""
    image, label = example.image, example.label
    if isinstance(image, bytes):
        image = np.asarray(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB))
    label = np.array(Image.open(io.BytesIO(label))) if isinstance(label, bytes) else label.copy()
    return image, plain_loading.reduced(label) if config.data.zero_label_void else label


def batches(source: sources.Source, config: ConfigDict, workers: int) -> Iterator[Any]:
    """An endless DataLoader of the plain pipeline's training examples."""
    dataset = _Training(plain_loading.Pipeline(source, config))
    return iter(
        torch.utils.data.DataLoader(
            dataset,
            config.batch_size,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=2 if workers else None,
        )
    )


class _Training(torch.utils.data.IterableDataset):
    """Each worker's examples, for ever."""

    def __init__(self, pipeline: plain_loading.Pipeline):
        self._pipeline = pipeline

    def __iter__(self) -> Iterator[Any]:
        cv2.setNumThreads(1)
        for place in itertools.count():
            yield self._pipeline(place % len(self._pipeline))


def _device() -> torch.device:
    """The kind of device that JAX has."""
    backend = jax.default_backend()
    if backend == "cpu":
        return torch.device("cpu")
    if backend == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    raise UserError(f"PyTorch cannot use the device that JAX has here ({backend}): leave --peer torch out")


def _resize(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)


def _labels(logits: Tensor, network: tuple[int, int], picture: tuple[int, int]) -> Tensor:
    """As officially: to the network's input, to the picture, softmax, argmax."""
    return _resize(_resize(logits, network), picture).softmax(1).argmax(1)
