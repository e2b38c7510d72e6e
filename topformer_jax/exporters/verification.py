"""Runs an exported file in its own runtime and compares it with the model, before the file gets its name."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import cv2
import jax
import numpy as np
from jaxtyping import Array, UInt8

from topformer_jax import models
from topformer_jax.data import shapes
from topformer_jax.exporters.exported import Exported
from topformer_jax.exporters.network import make_function
from topformer_jax.runtime.errors import UserError

Model = models.Segmenter | models.Classifier
# The share of the labels that may differ from the model's, and the difference of other outputs by their spread. A
# dead layer changes 0.5 % of the labels, and logits by 5 %. Quantization changes as much, so
# `litert_file.compare_layers` finds dead layers in int8 files.
LIMITS = {"float32": (1e-4, 1e-4), "float16": (0.1, 0.3), "int8": (0.5, math.inf)}
TIES = 3  # labels that may always differ
# A network of random weights amplifies rounding. If another order of sums changes the model's own outputs, a file may
# differ from the model this many times as much, up to a bound.
ROUNDINGS, MOST_ROUNDING = 10, (2e-3, 1e-2)
LEAST_SPREAD = 0.1  # of a layer's values over pixels, by that of float32
MOST_COMMON = 0.99  # of the labels: if more are of one class, a broken file's may be too
ANY_SIZES = ((256, 256), (181, 250))  # of the images that a file for any size is tried with
ADVICE = {
    "float32": "please report this",
    "float16": "use --precision float32",
    "int8": "give more --images, keep parts with --keep-float, or use --precision float16",
}


class Comparison:
    """The differences between the outputs of a file and of the model, over some batches.

    Attributes:
        shares: the share of equal labels in each batch; for logits and scores, the label is the largest one's class.
        num_labels: the number of labels compared.
        most_common: the share of the commonest label; 0 if the output is not labels.
        difference: for other outputs, the root mean square of the differences, divided by the standard deviation of
            the values over pixels, per class (for scores: over classes).

    Raises:
        UserError: the shapes or dtypes differ.
    """

    def __init__(self, output: str, found: Iterable[np.ndarray], expected: Sequence[np.ndarray]):
        self.output = output
        self.shares: list[float] = []
        self.num_labels = 0
        counts, error, spread = np.zeros(256, np.int64), 0.0, 0.0
        for ours, theirs in zip(found, expected, strict=True):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise UserError(
                    f"the exported file gives {ours.dtype} {ours.shape} where the model gives "
                    f"{theirs.dtype} {theirs.shape}: please report this"
                )
            labels = ours, theirs
            if output == "labels":
                counts += np.bincount(theirs.ravel(), minlength=256)
            else:
                labels = ours.argmax(-1), theirs.argmax(-1)
                axes = -1 if output == "scores" else tuple(range(theirs.ndim - 1))
                error += float(np.square(ours.astype(np.float64) - theirs).sum())
                spread += float(np.square(theirs - theirs.mean(axes, np.float64, keepdims=True)).sum())
            self.shares.append(float((labels[0] == labels[1]).mean()))
            self.num_labels += labels[0].size
        self.most_common = float(counts.max() / self.num_labels)
        ratio = error / max(spread, np.finfo(np.float64).tiny)
        self.difference = None if output == "labels" else math.sqrt(ratio)

    def describe(self, limits: Sequence[float]) -> str:
        """The shares and the difference in words, with what may differ."""
        words = [f"{np.mean(self.shares):.2%} of the labels equal the model's"]
        if limits[0] < 1:
            words[0] += f" (limit {1 - limits[0]:.2%}), {min(self.shares):.2%} at worst"
        if self.difference is not None:
            limit = f" (limit {100 * limits[1]:.2g} %)" if math.isfinite(limits[1]) else ""
            words.append(f"the {self.output} differ by {100 * self.difference:.2g} % of their spread{limit}")
        return "; ".join(words)

    def is_within(self, limits: Sequence[float]) -> bool:
        """Whether no more differs than may; a nan is more."""
        return 1 - float(np.mean(self.shares)) <= limits[0] and (
            self.difference is None or self.difference <= limits[1]
        )


def verify(
    exported: Exported,
    model: Model,
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]] = (),
    make_logits: Callable[[], Exported] | None = None,
) -> str:
    """Compares a file with a float32 model on pictures and, except for int8, on drawn ones, 1 and 2 at once.

    Args:
        exported: the file.
        model: the model that the file was made from.
        pictures: for int8 at least one, since its ranges are not for noise.
        make_logits: makes a file of logits in the same way; it is compared if nearly all labels are of one class.

    Returns:
        The result, a line for each file.

    Raises:
        UserError: the file differs from the model by more than its precision explains.
    """
    facts = exported.description
    output, precision = facts["output"], facts["precision"]
    sizes = [tuple(facts["size"])] if facts["size"] else list(ANY_SIZES)
    drawn = [] if precision == "int8" else map(draw_images, sizes)
    batches = [part for images in drawn for part in (images[:1], images[1:])]
    batches += [picture[None] for picture in pictures]

    def run(conv_impl: str) -> list[np.ndarray]:
        function = jax.jit(make_function(model, output, facts["stride"], conv_impl=conv_impl, fold=False))
        return [np.asarray(function(images)) for images in batches]

    expected = run("auto")
    found = Comparison(output, map(exported, batches), expected)
    limits = list(LIMITS[precision])
    if output == "labels":
        limits[0] = max(limits[0], TIES / found.num_labels)
    elif precision == "float32":
        limits[0] = 1.0  # the other limit is stricter, and untrained networks have ties
    if precision == "float32" and not found.is_within(limits):
        rounding = Comparison(output, run("single_op"), expected)
        differences = 1 - float(np.mean(rounding.shares)), rounding.difference or 0.0
        for number, (difference, most) in enumerate(zip(differences, MOST_ROUNDING, strict=True)):
            limits[number] = max(limits[number], min(ROUNDINGS * difference, most))
    said = found.describe(limits)
    if not found.is_within(limits):
        raise UserError(f"the exported file differs from the model: {said}; nothing was written: {ADVICE[precision]}")
    tried = ", ".join(f"{height}x{width}" for height, width in sizes)
    counts = "" if precision == "int8" else ", 1 and 2 images"
    counts += f", {len(pictures)} pictures" if pictures else ""
    said = f"compared in its runtime at {tried}{counts}: {said}"
    if found.most_common > MOST_COMMON and make_logits is not None:
        logits = verify(make_logits(), model, pictures)
        said += f"\nnearly all of these labels are of one class, which hides errors; a file of logits is {logits}"
    return said


def check_layer(share: float, name: str, precision: str) -> None:
    """Raises a UserError if a layer is dead: its values' spread is too small a share of that in float32."""
    if not share >= LEAST_SPREAD:
        raise UserError(
            f"{precision} makes {name} constant: its values vary by {share:.0%} of what they do in float32 (limit "
            f"{LEAST_SPREAD:.0%}); nothing was written: {ADVICE[precision]}"
        )


def draw_images(size: Sequence[int]) -> UInt8[np.ndarray, "3 h w 3"]:
    """A drawn scene, its mirror image, and noise."""
    height, width = size
    scene = cv2.resize(shapes.draw("validation", 0, max(size))[0], (width, height))
    noise = np.random.default_rng(0).integers(0, 256, scene.shape).astype(np.uint8)
    return np.stack([scene, scene[:, ::-1], noise])


def checksum(tensors: Mapping[str, np.ndarray | Array]) -> str:
    """SHA-256 of tensors by name; it does not depend on the file that holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = np.ascontiguousarray(tensor)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
