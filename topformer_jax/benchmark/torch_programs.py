"""What the peers in PyTorch do: training step, inference, loss, evaluation, and a loader.

The programs run in processes of their own, which `peer` starts: a function here makes one of them from `Torch` and
what it works on. Everything runs in the config's dtype (bfloat16 by autocast). The loader runs where it is asked
for, since it has processes of its own.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor

from topformer_jax.benchmark import measure, plain_loading
from topformer_jax.benchmark.measure import Program
from topformer_jax.benchmark.torch_peer import Segmenter
from topformer_jax.checkpoints.torch_format import to_torch
from topformer_jax.data import loader, sources, transforms
from topformer_jax.data.augment import MEAN, STD
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.errors import UserError

SMALL = 1_000_000  # bytes of a result that is worth sending
# The official spelling of two injections.
INJECTIONS = {"multi_sum": "muli_sum", "multi_sum_cbr": "muli_sum_cbr"}


class Torch:
    """PyTorch on a device, in one variant."""

    def __init__(self, variant: str, device: str, config: ConfigDict):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("this PyTorch cannot use the GPU that JAX has here: leave --peer torch out")
        words = variant.split("+")
        self.name = f"torch {variant}"
        self.config = config
        self.device = torch.device(device)
        self._half = config.model.dtype == "bfloat16"
        self._layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
        self._compile = "compile" in words
        self._result: Any = None
        torch.set_num_threads(measure.cores())
        if device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = config.model.precision != "highest"
            torch.backends.cuda.matmul.allow_tf32 = config.model.precision != "highest"

    def place(self, images: ArrayLike) -> Tensor:
        """NHWC numbers as an NCHW tensor in the variant's layout."""
        tensor = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=self._layout)

    def network(self, tensors: Mapping[str, np.ndarray]) -> Segmenter:
        """The config's network with our weights."""
        model = self.config.model
        injection = INJECTIONS.get(model.injection, model.injection)
        network: Any = Segmenter(
            *(model.variant, model.num_classes, injection, model.depthwise_head, model.head_channels),
            *(model.drop_path_rate, model.dropout_ratio),
        )
        states = {name: torch.from_numpy(to_torch(value)) for name, value in tensors.items()}
        network.load_state_dict(states)
        return network.to(self.device, memory_format=self._layout)

    def faster(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled if the variant says so."""
        return torch.compile(function) if self._compile else function

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """The config's dtype for what runs inside."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)

    def normalise(self, images: Tensor) -> Tensor:
        """Levels of 0..255 as the network takes them."""
        mean, std = (torch.from_numpy(row)[:, None, None].to(self.device) for row in (MEAN, STD))
        return (images.float() - mean) / std

    def wait(self, _: object = None) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ready(self, make: Callable[[], Callable[[], Any]]) -> Program:
        """Makes a program and calls it once; its memory is that of the third call (`Program`)."""
        self._result = None
        _give_back()
        before = self._memory()
        function = make()

        def call() -> Any:
            self._result = None  # frees its memory for the next one
            self._result = function()
            return self._result

        program = measure.ready(self.name, call, self.wait)
        program.run(1)  # what the first call took to choose and to compile is gone
        self._memory()
        program.run(1)
        most = self._most()
        memory = None if before is None or most is None else most - before
        return dataclasses.replace(program, memory=memory)

    def result(self) -> np.ndarray | None:
        """What was returned last, where it is one array of at most a megabyte."""
        result = self._result
        if isinstance(result, Tensor) and result.nbytes <= SMALL:
            result = result.detach().cpu().numpy()
        return result if isinstance(result, np.ndarray) and result.nbytes <= SMALL else None

    def _memory(self) -> int | None:
        """Bytes of this process on the device; `_most` counts from here."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        except OSError:
            return None
        return _resident("VmRSS")

    def _most(self) -> int | None:
        """The most bytes of this process on the device since `_memory`."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int | None:
    """A field of Linux's account of this process, in bytes."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return sizes[0] if sizes else None


def _give_back() -> None:
    """Gives what earlier programs have freed back to the kernel, where libc can: it is no part of the next one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def train_step(peer: Torch, tensors: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> Program:
    """One step on a batch that is normalised already: forward, backward, AdamW in two groups."""

    def make() -> Callable[[], Any]:
        network = peer.network(tensors).train()
        images = peer.normalise(peer.place(batch["image"]))
        labels = torch.from_numpy(batch["label"].astype(np.int64)).to(peer.device)
        settings, rate = peer.config.optimizer, peer.config.schedule.lr
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
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="none").mean()


def loss(peer: Torch, logits: np.ndarray, labels: np.ndarray) -> Program:
    """The loss of logits `[n, h, w, classes]` and its gradient."""

    def make() -> Callable[[], Any]:
        inputs = peer.place(logits).requires_grad_()
        target = torch.from_numpy(labels.astype(np.int64)).to(peer.device)
        function = peer.faster(cross_entropy)
        return lambda: torch.autograd.grad(function(inputs, target), inputs)

    return peer.ready(make)


def logits(peer: Torch, tensors: Mapping[str, np.ndarray], images: np.ndarray) -> Program:
    """From images `[n, h, w, 3]` to their logits."""
    return peer.ready(lambda: _inference(peer, tensors, images, lambda logits, size: logits))


def labels(peer: Torch, tensors: Mapping[str, np.ndarray], images: np.ndarray) -> Program:
    """From images `[n, h, w, 3]` to labels of their size."""
    return peer.ready(
        lambda: _inference(peer, tensors, images, lambda logits, size: _labels(logits, size, size))
    )


def _inference(
    peer: Torch,
    tensors: Mapping[str, np.ndarray],
    images: np.ndarray,
    finish: Callable[[Tensor, tuple[int, int]], Tensor],
) -> Callable[[], Tensor]:
    """A function from images that are on the device to what is made of the logits and the images' size."""
    network, placed = peer.network(tensors).eval(), peer.place(images)

    def forward(images: Tensor) -> Tensor:
        with peer.arithmetic():
            logits = network(peer.normalise(images)).float()
        return finish(logits, (images.shape[2], images.shape[3]))

    fast = peer.faster(forward)
    return torch.no_grad()(lambda: fast(placed))


def evaluation(peer: Torch, tensors: Mapping[str, np.ndarray], source: sources.Source) -> Program:
    """The evaluation of a source a picture at a time, as officially; it returns the confusion matrix."""
    config = peer.config
    settings, classes = config.evaluation, config.model.num_classes
    if settings.mode != "whole" or settings.flip or settings.scales != (1.0,):
        raise UserError("the peer of benchmark evaluate knows the whole picture at one scale, without flip")

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = plain_decoded(source[index], config)
        return transforms.eval_image(image, scale=settings.scale, size_divisor=settings.size_divisor), label

    def make() -> Callable[[], np.ndarray]:
        network = peer.network(tensors).eval()

        @torch.no_grad()
        def run() -> np.ndarray:
            counts = torch.zeros(classes**2, dtype=torch.int64, device=peer.device)
            for image, label in loader.map_in_threads(read, range(len(source))):
                with peer.arithmetic():
                    logits = network(peer.normalise(peer.place(image[None]))).float()
                size, picture = (image.shape[0], image.shape[1]), (label.shape[0], label.shape[1])
                found = _labels(logits, size, picture)[0]
                truth = torch.from_numpy(label.astype(np.int64)).to(peer.device)
                valid = truth != IGNORE_LABEL
                pairs = truth[valid] * classes + found[valid]
                counts += torch.bincount(pairs, minlength=classes**2)
            return counts.cpu().numpy().reshape(classes, classes)

        return run

    return peer.ready(make)


def plain_decoded(example: sources.Example, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Image (RGB) and label of an example, by OpenCV and PIL; arrays are taken as they are."""
    image, label = example.image, example.label
    if isinstance(image, bytes):
        image = np.asarray(cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB))
    label = np.array(Image.open(io.BytesIO(label))) if isinstance(label, bytes) else label.copy()
    return image, plain_loading.reduced(label) if config.data.reduce_zero_label else label


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
        if torch.utils.data.get_worker_info() is not None:
            # C++ threads that still run when a worker ends would abort it, and look like a mistake.
            atexit.register(os._exit, 0)
        for place in itertools.count():
            yield self._pipeline(place % len(self._pipeline))


def _resize(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)


def _labels(logits: Tensor, network: tuple[int, int], picture: tuple[int, int]) -> Tensor:
    """As officially: to the network's input, to the picture, softmax, argmax."""
    return _resize(_resize(logits, network), picture).softmax(1).argmax(1)
