"""A file in its own runtime against the model, before it gets its name."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import cv2
import jax
import numpy as np
from jaxtyping import Array, Shaped, UInt8

from topformer_jax import models
from topformer_jax.data import shapes
from topformer_jax.errors import UserError
from topformer_jax.exporters.exported import Exported
from topformer_jax.exporters.network import make_function

Model = models.Segmenter | models.Classifier
# The largest differences of a file's labels (a share of them) and of its other outputs (by the largest value). Fewer
# bits change both: there the limits find a file that is broken, not one that has lost a little.
LIMITS = {"float32": (1e-4, 1e-5), "float16": (0.2, 0.1), "int8": (1.0, 1.0)}
TIES = 3  # labels that may differ however few there are
# A network of random weights makes much of rounding. Where the same model with other sums differs from itself
# already, a file may differ this many times as much, up to a bound.
ROUNDINGS, MOST_ROUNDING = 10, (0.02, 0.1)
ANY_SIZES = ((256, 256), (181, 250))  # that a file for any size is tried at


def verify(exported: Exported, model: Model, same_model: Model) -> str:
    """Compares a file with the model on a picture and on noise, 1 and 2 images at once, at two sizes if it can.

    Args:
        exported: of a file.
        model: in float32, with its layers as they are evaluated.
        same_model: of the same weights, with other operations.

    Returns:
        What was found, in one line.

    Raises:
        UserError: the file differs from the model by more than its precision explains.
    """
    description = exported.description
    is_labels = description["output"] == "labels"
    reference, same = (
        jax.jit(make_function(form, description["output"], description["stride"], fold=False))
        for form in (model, same_model)
    )
    limits = LIMITS[description["precision"]]
    sizes = [tuple(description["size"])] if description["size"] else list(ANY_SIZES)
    worst, same_worst = 0.0, 0.0
    for size in sizes:
        for images in _test_images(size):
            found, expected = exported(images), np.asarray(reference(images))
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise UserError(
                    f"the exported file gives {found.dtype} {found.shape} where the model gives "
                    f"{expected.dtype} {expected.shape}: please report this"
                )
            difference = _difference(found, expected, is_labels)
            limit = max(limits[0], TIES / found.size) if is_labels else limits[1]
            if not difference <= limit:
                rounding = _difference(np.asarray(same(images)), expected, is_labels)
                limit = max(limit, min(ROUNDINGS * rounding, MOST_ROUNDING[0 if is_labels else 1]))
                same_worst = max(same_worst, rounding)
            if not difference <= limit:  # nan too
                raise UserError(
                    f"the exported file differs from the model: {difference:.1e} {_measure(is_labels)}, expected at "
                    f"most {limit:.0e}; nothing was written"
                )
            worst = max(worst, difference)
    tried = ", ".join(f"{height}x{width}" for height, width in sizes)
    found_worst = f"compared in its runtime at {tried}, 1 and 2 images: {worst:.1e} {_measure(is_labels)}"
    if same_worst:
        found_worst += f" (the model's own, with another order of sums: {same_worst:.1e})"
    return found_worst


def _measure(is_labels: bool) -> str:
    return "of the labels differ" if is_labels else "largest difference, by the largest value"


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
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def _test_images(size: tuple[int, ...]) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    """One image, a drawn scene; then two, the scene mirrored and noise."""
    height, width = size
    scene = cv2.resize(shapes.draw("validation", 0, max(size))[0], (width, height))
    yield scene[None]
    noise = np.random.default_rng(0).integers(0, 256, scene.shape).astype(np.uint8)
    yield np.stack([scene[:, ::-1], noise])


def checksum(tensors: Mapping[str, np.ndarray | Array]) -> str:
    """SHA-256 of tensors by name: the same weights have the same one, in whatever file they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = np.ascontiguousarray(tensor)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
