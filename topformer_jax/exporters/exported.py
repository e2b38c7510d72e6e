"""An exported file in Python: `open_exported` gives a function of images."""

import importlib
import os
import zlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from jaxtyping import Shaped, UInt8

from topformer_jax import config as config_lib
from topformer_jax.data.catalog import CATALOG, DataSet, is_name
from topformer_jax.data.transforms import Size
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError, explain_out_of_memory, need_packages

# By suffix: the module of a format in this package, and the packages that it needs.
FORMATS = {
    ".onnx": ("onnx_file", "onnx and onnxruntime"),
    ".tflite": ("litert_file", "ai-edge-litert"),
    ".stablehlo": ("stablehlo_file", "flatbuffers"),
}
KEY = "topformer_jax"  # of the description in files that have a place for it
# Before the CRC-32 at the end of a file: a row of ONNX's metadata, the comment of LiteRT's archive.
SEAL = b"\x72\x11\x0a\x05crc32\x12\x08"
SEAL_BYTES = len(SEAL) + 8
Run = Callable[[UInt8[np.ndarray, "n h w 3"]], Shaped[np.ndarray, "n ..."]]
Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


class _Description(msgspec.Struct):
    """What every exported file says about itself."""

    output: Literal["labels", "logits", "probabilities", "scores"]
    stride: Positive
    size: tuple[Positive, Positive] | None
    precision: str
    config: dict[str, Any]
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[Byte, Byte, Byte], ...] = ()
    checkpoint: dict[str, str] = {}


class Exported:
    """An exported file as a function: images uint8 `[n, h, w, 3]`, RGB, to the file's output.

    Attributes:
        description: the file's own, what JSON can hold: `output` ("labels", "logits", "probabilities" or "scores"),
            `stride` (of labels and probabilities; of logits 8), `size` ([h, w], or None for any), `classes`,
            `palette`, `mean`, `std`, `precision`, `config`, `checkpoint`, `versions`.
        runtime: the name and version of the runtime.
    """

    def __init__(self, name: str, run: Run, description: Mapping[str, Any], runtime: str = ""):
        self.name, self._run, self.description, self.runtime = name, run, dict(description), runtime

    def __call__(self, images: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "n ..."]:
        """The output for images of one size, uint8 `[n, h, w, 3]`.

        Raises:
            UserError: the array has another shape or dtype, or the file is for images of another size.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            shape = "x".join(map(str, images.shape))
            raise UserError(
                f"{self.name} takes images as uint8 [n, h, w, 3], and got {images.dtype} of shape {shape}"
            )
        self.check_size((images.shape[1], images.shape[2]))
        return self._run(images)

    def check_size(self, found: Size) -> None:
        """Raises a UserError if the file is for images of another (height, width)."""
        size = self.description["size"]
        if size is not None and tuple(size) != found:
            raise UserError(
                f"{self.name} expects {size[0]}x{size[1]}; the resized image is {found[0]}x{found[1]}. "
                "Pass --stretch, or export again with --size"
            )


def open_exported(path: str | os.PathLike[str]) -> Exported:
    """Opens an exported file in its runtime.

    Raises:
        UserError: it does not exist, is damaged or from another tool, or its runtime is not installed.
    """
    target = files.as_path(path)
    module = import_format(target)
    data = files.read_bytes(target, most=1 << 32)
    if module.HOLDS_DESCRIPTION:
        return open_bytes(str(path), data, module)
    beside = description_path(target)
    text = files.read_bytes(beside, "; export writes it beside the file, and they belong together")
    return open_bytes(str(path), data, module, files.read_json(text, dict[str, Any], beside))


def open_bytes(name: str, data: bytes, module: ModuleType, description: Mapping[str, Any] | None = None) -> Exported:
    """`open_exported` for a file's content; `description` is given if the format has no place for it."""
    is_sealed = data[-SEAL_BYTES:-8] == SEAL or description is not None  # MLIR crashes on damaged bytes
    if is_sealed and data != seal(data[:-SEAL_BYTES]):
        raise UserError(
            f"{name} is damaged, or of an earlier version: copy it or export it again (a tool that changes the "
            "file must remove its metadata crc32)"
        )
    try:
        run, text = module.open_bytes(data)
    except UserError as error:
        raise UserError(f"{name} {error.line}") from None
    origin = f"{name} was not written by python -m topformer_jax.export: its description"
    if description is None:
        description = files.read_json(text, dict[str, Any], origin, "")
    facts = files.convert(dict(description), _Description, origin)
    config = config_lib.complete(facts.config)
    _check_names(name, facts, config.data.dataset, config.model.num_classes)

    def checked_run(images: np.ndarray) -> np.ndarray:
        try:
            values = run(images)
        except Exception as error:  # of the runtimes, classes of all kinds
            if explain_out_of_memory(error, ""):
                raise
            raise UserError(f"{name} cannot be run ({files.shorten(error, 120)}): export it again") from None
        _check_output(name, facts.output, config.model.num_classes, values)
        return values

    return Exported(name, checked_run, description, module.RUNTIME)


def seal(data: bytes) -> bytes:
    """A file with the CRC-32 of its bytes at its end; `open_bytes` compares it if it is there."""
    return data + SEAL + b"%08x" % zlib.crc32(data)


def _check_names(name: str, facts: _Description, dataset: str, count: int) -> None:
    known = CATALOG.get(dataset, DataSet((), ()))
    both = ("names", facts.classes, known.classes), ("colours", facts.palette, known.palette)
    for what, found, own in both:
        if found and len(found) != count:
            raise UserError(f"{name} has {len(found)} {what} for the {count} classes of its config: export it again")
        if found != own and sorted(found) == sorted(own):
            raise UserError(f"{name} has the {what} of {dataset} in another order: export it again")
    if strange := [text for text in facts.classes if not is_name(text)]:
        raise UserError(f"{name} names a class {strange[0][:40]!r}, which is no name: export it again")


def _check_output(name: str, output: str, count: int, values: np.ndarray) -> None:
    """Raises a UserError if a file's output is not what its description says, or holds NaN."""
    found = f"{name} gives {output}, {values.dtype} of shape {'x'.join(map(str, values.shape))}"
    is_labels, ndim = output == "labels", {"labels": 3, "scores": 2}.get(output, 4)
    if values.ndim != ndim or (is_labels and values.dtype != np.uint8):
        raise UserError(f"{found}: it is not what its description says; export it again")
    if is_labels and (most := values.max(initial=0)) >= count:
        raise UserError(f"{name} gives the label {most}, and its config has {count} classes: export it again")
    if not is_labels and values.shape[-1] != count:
        raise UserError(f"{found}, and its config has {count} classes: export it again")
    if not np.isfinite(values).all():
        raise UserError(f"{name} gives NaN or infinity: export it again from a checkpoint that is whole")


def description_path(path: files.Path) -> files.Path:
    """The file beside an exported file that describes it, for formats that have no place for it."""
    return path.with_name(f"{path.name}.json")


def import_format(path: files.Path) -> ModuleType:
    """The module of a path's format.

    Raises:
        UserError: the suffix is of no format, or a package that it needs is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{path} is no exported file: expected a name that ends in {', '.join(FORMATS)}")
    name, packages = FORMATS[suffix]
    with need_packages(f"{suffix} files need {packages}"):
        return importlib.import_module(f"topformer_jax.exporters.{name}")
