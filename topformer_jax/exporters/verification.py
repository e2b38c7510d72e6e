"""A file in its own runtime against the model, before it gets its name."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import cv2
import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from topformer_jax import models
from topformer_jax.data import shapes
from topformer_jax.errors import UserError
from topformer_jax.exporters.exported import Exported
from topformer_jax.exporters.network import make_function

Model = models.Segmenter | models.Classifier
MOST_RELATIVE = 1e-5  # difference of logits, probabilities and scores, by the largest of them
MOST_LABELS = 1e-4  # share of labels that differ, at ties of two classes
ROUNDINGS = 10  # times the difference that the order of sums makes
ANY_SIZES = ((256, 256), (181, 250))  # that a file for any size is tried at


def verify(exported: Exported, model: Model, same_model: Model) -> str:
    """Compares a file with the model on a picture and on noise, 1 and 2 images at once, at two sizes if it can.

    Args:
        exported: of a file.
        model: as `topformer_jax.load` returns it.
        same_model: with the same weights and other operations. Where these two differ already, because a network of
            random weights makes much of rounding, the file may differ ten times as much.

    Returns:
        What was found, in one line.

    Raises:
        UserError: a float32 file differs from the model.
    """
    description = exported.description
    is_labels = description["output"] == "labels"
    reference, same = (
        jax.jit(make_function(form, description["output"], description["stride"], fold=False))
        for form in (model, same_model)
    )
    limit = MOST_LABELS if is_labels else MOST_RELATIVE
    worst, rounding = 0.0, 0.0
    sizes = [tuple(description["size"])] if description["size"] else list(ANY_SIZES)
    for size in sizes:
        for images in _test_images(size):
            found, expected = exported(images), np.asarray(reference(images))
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise UserError(
                    f"the exported file gives {found.dtype} {found.shape} where the model gives "
                    f"{expected.dtype} {expected.shape}: please report this"
                )
            worst = max(worst, _difference(found, expected, is_labels))
            if worst > limit and description["precision"] == "float32":
                rounding = max(rounding, _difference(np.asarray(same(images)), expected, is_labels))
    limit = max(limit, ROUNDINGS * rounding)
    measure = "of the labels differ" if is_labels else "largest difference, by the largest value"
    if not worst <= limit and description["precision"] == "float32":
        raise UserError(
            f"the exported file differs from the model: {worst:.1e} {measure}, expected at most {limit:.0e}; "
            "nothing was written"
        )
    tried = ", ".join(f"{height}x{width}" for height, width in sizes)
    return f"verified in its runtime at {tried}, 1 and 2 images: {worst:.1e} {measure}"


def compare_labels(
    exported: Exported, model: Model, images: Sequence[UInt8[np.ndarray, "h w 3"]]
) -> tuple[float, float]:
    """The share of labels that a file has in common with the model: the mean over images, and the worst one.

    A file of logits is compared by the largest one of each cell.
    """
    description = exported.description
    reference = jax.jit(make_function(model, description["output"], description["stride"], fold=False))
    shares = []
    for image in images:
        outputs = exported(image[None]), np.asarray(reference(image[None]))
        labels = outputs if description["output"] == "labels" else [values.argmax(-1) for values in outputs]
        shares.append(float((labels[0] == labels[1]).mean()))
    return float(np.mean(shares)), min(shares)


def _difference(
    found: Shaped[np.ndarray, "..."], expected: Shaped[np.ndarray, "..."], is_labels: bool
) -> float:
    if is_labels:
        return float((found != expected).mean())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _test_images(size: tuple[int, ...]) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    """One image, a drawn scene; then two, the scene mirrored and noise."""
    height, width = size
    scene = cv2.resize(shapes.draw("validation", 0, max(size))[0], (width, height))
    yield scene[None]
    noise = np.random.default_rng(0).integers(0, 256, scene.shape).astype(np.uint8)
    yield np.stack([scene[:, ::-1], noise])


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of tensors by name: the same weights have the same one, in whatever file they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = np.ascontiguousarray(tensor)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
