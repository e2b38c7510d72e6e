"""PyTorch files (.pth): reads what mmcv, timm or a plain `torch.save` wrote, writes what the official code loads.

PyTorch's weights-only unpickler asks for each class and function that a file names. It gets a stand-in, never the
real one, so that nothing which the file names is imported or run. numpy's own unpickling trusts its input; numbers
of numpy are therefore read here.

PyTorch is imported when a file is read or written.
"""

import argparse
import contextlib
import io
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from topformer_jax.runtime import files, processes
from topformer_jax.runtime.errors import UserError, need_packages

Shape = tuple[int, ...]
MOST_CLASSES = 200  # a file that names more is refused: each costs a reading
MODULES = ("backbone", "decode_head")  # a file may keep each in a dictionary of its own
# The whole layout conversion: names are equal, and axes are permuted by rank. OIHW -> HWIO, OI -> IO.
AXES: dict[int, Shape] = {4: (2, 3, 1, 0), 2: (1, 0)}
INVERSE_AXES: dict[int, Shape] = {
    rank: tuple(axes.index(axis) for axis in range(rank)) for rank, axes in AXES.items()
}


def from_torch(tensor: np.ndarray) -> np.ndarray:
    """Brings a tensor from PyTorch's layout into this package's.

    Convolution kernels `[out, in / groups, k, k]` become `[k, k, in / groups, out]`, matrices `[out, in]` become
    `[in, out]`, int64 becomes int32; all else is unchanged.

        >>> from_torch(np.zeros((16, 3, 5, 5))).shape
        (5, 5, 3, 16)

    Raises:
        UserError: an integer does not fit into 32 bits.
    """
    tensor = tensor.transpose(AXES.get(tensor.ndim, range(tensor.ndim)))
    if tensor.dtype != np.int64:
        return tensor
    if tensor.size and tensor.max() > np.iinfo(np.int32).max:
        raise UserError(f"a counter of {tensor.max()} batches does not fit into 32 bits")
    return tensor.astype(np.int32)


def to_torch(tensor: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`: a contiguous copy in PyTorch's layout, int32 as int64.

    >>> to_torch(np.zeros((5, 5, 3, 16))).shape
    (16, 3, 5, 5)
    """
    tensor = tensor.transpose(INVERSE_AXES.get(tensor.ndim, range(tensor.ndim)))
    return np.array(tensor, np.int64 if tensor.dtype == np.int32 else tensor.dtype, order="C")


def file_shape(shape: Shape) -> Shape:
    """The shape of `to_torch`'s result."""
    return tuple(shape[axis] for axis in INVERSE_AXES.get(len(shape), range(len(shape))))


def read(path: files.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the tensors of a PyTorch file, and `{"meta": ...}`; runs none of the file's code.

    Tensors have this package's layout, 16-bit floats are float32. The keys of the dictionaries that hold them stand
    before their names, with "/". Those of an optimizer are left out.

    Raises:
        UserError: PyTorch is not installed, or the file is not a checkpoint that can be read safely.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}: expected a dictionary of tensors; "
            "save the model's state_dict() with torch.save"
        )
    torch = _import_torch()
    tensors = {name: from_torch(_to_numpy(name, x, torch)) for name, x in _find_tensors(content, torch)}
    if not tensors:
        items = list(content.items())[:6]
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in items) or "nothing"
        raise UserError(
            f"{path} holds no state dict: expected tensors under state_dict, model or another key, "
            f"or nothing but tensors; found {found}"
        )
    meta = content.get("meta")
    return tensors, {"meta": json_part(meta) if isinstance(meta, dict) else {}}


def write(path: files.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes an mmcv file, `{"meta": metadata["meta"], "state_dict": ...}`, whole or not at all."""
    torch = _import_torch()
    files.refuse_existing(path)
    states = {name: torch.from_numpy(to_torch(tensor)) for name, tensor in tensors.items()}
    content = io.BytesIO()
    torch.save({"meta": dict(metadata.get("meta", {})), "state_dict": states}, content)
    files.write_file(path, content.getvalue())


def _load(path: files.Path) -> Any:
    """Returns the content of a file: tensors, plain containers, and stand-ins for all else."""
    torch = _import_torch()
    content = files.read_bytes(path, most=1 << 36)
    _check_sums(content, path)
    known = dict(KNOWN)
    while True:
        allowed = [(stand_in, name) for name, stand_in in known.items()]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
                loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            break
        except Exception as error:  # the unpickler has no common class for what a damaged file raises
            if not (isinstance(error, pickle.UnpicklingError) and add_stand_in(known, str(error))):
                raise UserError(f"{path} {_explain(error, content)}") from None
    if unknown := list(known)[len(KNOWN) :]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        processes.say(f"{path}: left out objects that are no tensors, of {', '.join(unknown[:3])}{more}")
    return loaded


def _explain(error: Exception, content: bytes) -> str:
    """Why the unpickler refuses a file."""
    text = str(error) or type(error).__name__
    if "TorchScript" in text:
        return "is a TorchScript archive, a program: save the model's state_dict() with torch.save"
    if asked := re.search(r"GLOBAL (\S+)", text):
        return (
            f"is refused: it asks for {asked[1]}, and only tensors and plain containers are read; if you trust the "
            "file, save only its state dict with torch.save"
        )
    if isinstance(error, pickle.UnpicklingError):
        hint = "; or torch.save it again with the default pickle_protocol" * content.startswith(b"PK")
        return f"is not a PyTorch checkpoint, or a damaged one{hint}"
    return f"is not a PyTorch checkpoint, or a damaged one: {text.splitlines()[0].split('. ')[0][:120]}"


def _find_tensors(content: dict[Any, Any], torch: ModuleType, place: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and the arrays of numbers in nested dictionaries, without an optimizer's."""
    for key, part in content.items():
        if not isinstance(key, str):
            continue
        if torch.is_tensor(part) or (isinstance(part, Array) and part.holds_real_numbers):
            yield place + key, part
        elif isinstance(part, dict) and key != "meta" and "optim" not in key and place.count("/") < 3:
            yield from _find_tensors(part, torch, f"{place}{key}{'.' if key in MODULES else '/'}")


def _to_numpy(name: str, tensor: Any, torch: ModuleType) -> np.ndarray:
    """A tensor without loss: 16-bit floats as float32, all integers as int64."""
    if isinstance(tensor, Array):
        assert tensor.values is not None  # see `_find_tensors`
        tensor = torch.from_numpy(tensor.values.copy())
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        raise UserError(f"{name} is a {tensor.dtype} tensor of layout {tensor.layout}: expected dense real numbers")
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.to(torch.int64).numpy()
    return (tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)).numpy()


def json_part(value: Any) -> Any:
    """The part of a metadata that JSON can hold; other values become null, as NaN does."""
    if isinstance(value, Array):
        return None if value.values is None else json_part(value.values.tolist())
    if isinstance(value, dict):
        return {str(key): json_part(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_part(item) for item in value]
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if isinstance(value, str | int | float | bool | None) and is_finite else None


def _import_torch() -> ModuleType:
    with need_packages("reading and writing .pth files needs PyTorch", "convert"):
        import torch
    return torch


def _check_sums(content: bytes, path: files.Path) -> None:
    """Raises a UserError if the bytes of a zip archive differ from their checksums, which PyTorch ignores."""
    if not content.startswith(b"PK"):
        return
    damaged = None
    with contextlib.suppress(Exception):  # PyTorch says why it is no archive of its own
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
    if damaged:
        name = files.shorten(damaged)
        raise UserError(f"{path} is damaged: {name} in it differs from what was written; copy it again")


# Stand-ins


class StandIn:
    """An object of an unknown class: it takes whatever its pickle gives to it, and keeps nothing.

    `container` is what the unpickler makes instead if the class turns out to be a kind of dict or list.
    """

    container: type | None = None

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls) if cls.container is None else cls.container()

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass


class Dtype:
    """numpy's dtype, as far as numbers, booleans and strings need it."""

    def __init__(self, code: str, *_: Any):
        self._dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self._dtype = self._dtype.newbyteorder(state[1])

    def read(self, data: Any) -> np.ndarray | None:
        """An array `[n]` of the values in some bytes; None for dates, objects and records."""
        readable = isinstance(data, bytes) and self._dtype.kind in "biufcU" and self._dtype.itemsize
        return np.frombuffer(data, self._dtype) if readable else None


class Array:
    """numpy's array: `values` are None if they are no numbers, booleans or strings."""

    def __init__(self, *_: Any):
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        values = dtype.read(data)
        self.values = None if values is None else values.reshape(shape, order="F" if is_fortran else "C")

    @property
    def holds_real_numbers(self) -> bool:
        """Whether it can be a tensor."""
        return self.values is not None and self.values.dtype.kind in "biuf"


def read_scalar(dtype: Dtype, data: Any = None) -> Any:
    """numpy's scalar as a Python value."""
    values = dtype.read(data)
    return None if values is None else values[0].item()


def find_attribute(*_: Any) -> type[StandIn]:
    """Stands in for getattr: the attributes of a class, such as a class inside another."""
    return StandIn


# By the names in a file: numpy 1 has `core` where numpy 2 has `_core`. timm keeps its arguments in a Namespace.
KNOWN: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "builtins.getattr": find_attribute,
    "builtins.object": StandIn,
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
} | {
    f"numpy.{core}.multiarray.{name}": stand_in
    for core in ("core", "_core")
    for name, stand_in in (("_reconstruct", Array), ("scalar", read_scalar))
}


def add_stand_in(stand_ins: dict[str, Any], message: str) -> bool:
    """Adds what an unpickler lacks, by the message of its error; returns whether to try again."""
    if asked := re.search(r"Unsupported global: GLOBAL (\S+)", message):
        name = asked[1] if "." in asked[1] else f"builtins.{asked[1]}"
        is_new = name not in stand_ins and len(stand_ins) < MOST_CLASSES
        stand_ins.setdefault(name, type(name, (StandIn,), {}))
        return is_new
    for name, stand_in in stand_ins.items():
        if name not in KNOWN and repr(stand_in) in message and stand_in.container is None:
            stand_in.container = OrderedDict if "SETITEM" in message else list
            return True
    return False
