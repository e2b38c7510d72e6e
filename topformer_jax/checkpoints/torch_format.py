"""PyTorch files (.pth): what mmcv, timm or a plain `torch.save` wrote, and mmcv files that the official code loads.

PyTorch is imported when a file is read or written, and by nothing else here.
"""

import contextlib
import io
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from topformer_jax.checkpoints import stand_ins
from topformer_jax.checkpoints.names import STATE_DICT_KEYS
from topformer_jax.runtime import files, processes
from topformer_jax.runtime.errors import UserError

Shape = tuple[int, ...]
SUFFIXES = (".pth", ".pt")
# The whole layout conversion: names are equal, and axes are permuted by rank. OIHW -> HWIO, OI -> IO.
AXES: dict[int, Shape] = {4: (2, 3, 1, 0), 2: (1, 0)}
INVERSE_AXES: dict[int, Shape] = {
    rank: tuple(axes.index(axis) for axis in range(rank)) for rank, axes in AXES.items()
}


def from_torch(tensor: np.ndarray) -> np.ndarray:
    """A tensor in PyTorch's layout, brought into this package's.

    Convolution kernels `[out, in / groups, k, k]` become `[k, k, in / groups, out]`, matrices `[out, in]` become
    `[in, out]`, int64 becomes int32; all else stays as it is.

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


def torch_shape(shape: Shape) -> Shape:
    """What `to_torch` makes of a shape."""
    return tuple(shape[axis] for axis in INVERSE_AXES.get(len(shape), range(len(shape))))


def read_pth(path: files.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a PyTorch file, and `{"meta": ...}`; runs none of the file's code.

    Tensors come in this package's layout, 16-bit floats as float32; the keys of the dictionaries that they are in
    stand before their names, with "/". An optimizer's are left out.

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
    tensors = {
        name: from_torch(_to_numpy(name, tensor, torch)) for name, tensor in _find_tensors(content, torch)
    }
    if not tensors:
        items = list(content.items())[:6]
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in items) or "nothing"
        raise UserError(
            f"{path} holds no state dict: expected tensors under {', '.join(STATE_DICT_KEYS[:2])} or another key, "
            f"or nothing but tensors; found {found}"
        )
    meta = content.get("meta")
    return tensors, {"meta": json_part(meta) if isinstance(meta, dict) else {}}


def write_pth(path: files.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes an mmcv file, `{"meta": metadata["meta"], "state_dict": ...}`, whole or not at all.

    Raises:
        UserError: PyTorch is not installed, the file exists, or it cannot be written.
    """
    torch = _import_torch()
    files.refuse_existing(path)
    states = {name: torch.from_numpy(to_torch(tensor)) for name, tensor in tensors.items()}
    content = io.BytesIO()
    torch.save({"meta": dict(metadata.get("meta", {})), "state_dict": states}, content)
    files.write_file(path, content.getvalue())


def _load(path: files.Path) -> Any:
    """What a file holds: tensors, plain containers, and stand-ins for all else."""
    torch = _import_torch()
    content = files.read_bytes(path, most=1 << 36)
    _check_sums(content, path)
    known = dict(stand_ins.KNOWN)
    while True:
        allowed = [(stand_in, name) for name, stand_in in known.items()]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
                loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:
            if stand_ins.add_stand_in(known, str(error)):
                continue
            asked = re.search(r"GLOBAL (\S+)", str(error))
            if asked is None:
                hint = "; or torch.save it again with the default pickle_protocol" * content.startswith(b"PK")
                raise UserError(f"{path} is not a PyTorch checkpoint, or a damaged one{hint}") from None
            raise UserError(
                f"{path} is refused: it asks for {asked[1]}, and only tensors and plain containers are read; "
                "save the state dict alone with torch.save, where you trust the file"
            ) from None
        except Exception as error:  # the unpickler has no common class for what a damaged file raises
            if "TorchScript" in str(error):
                raise UserError(
                    f"{path} is a TorchScript archive, a program: save the model's state_dict() with torch.save"
                ) from None
            reason = (str(error) or type(error).__name__).split("\n")[0].split(". ")[0][:120]
            raise UserError(f"{path} is not a PyTorch checkpoint, or a damaged one: {reason}") from None
    if unknown := list(known)[len(stand_ins.KNOWN) :]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        processes.say(f"{path}: left out what is no tensor, of {', '.join(unknown[:3])}{more}")
    return loaded


def _find_tensors(content: dict[Any, Any], torch: ModuleType, place: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and the arrays of numbers in nested dictionaries, without an optimizer's."""
    for key, part in content.items():
        if not isinstance(key, str):
            continue
        if torch.is_tensor(part) or (isinstance(part, stand_ins.Array) and part.holds_real_numbers):
            yield place + key, part
        elif isinstance(part, dict) and key != "meta" and "optim" not in key and place.count("/") < 3:
            yield from _find_tensors(part, torch, f"{place}{key}/")


def _to_numpy(name: str, tensor: Any, torch: ModuleType) -> np.ndarray:
    """A tensor without loss: 16-bit floats as float32, all integers as int64."""
    if isinstance(tensor, stand_ins.Array):
        assert tensor.values is not None  # see `_find_tensors`
        tensor = torch.from_numpy(tensor.values.copy())
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        raise UserError(
            f"{name} is a {tensor.dtype} tensor of layout {tensor.layout}: expected dense real numbers"
        )
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.to(torch.int64).numpy()
    return (tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)).numpy()


def json_part(value: Any) -> Any:
    """The part of a metadata that JSON can hold; other values become null, as NaN does."""
    if isinstance(value, stand_ins.Array):
        return None if value.values is None else json_part(value.values.tolist())
    if isinstance(value, dict):
        return {str(key): json_part(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_part(item) for item in value]
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if isinstance(value, str | int | float | bool | None) and is_finite else None


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            "reading and writing .pth files needs PyTorch, which is not installed: "
            "pip install 'topformer_jax[convert]' (from a clone: pip install -e '.[convert]')"
        ) from None
    return torch


def _check_sums(content: bytes, path: files.Path) -> None:
    """Raises a UserError where the bytes of a zip archive differ from their checksums, which PyTorch ignores."""
    if not content.startswith(b"PK"):
        return
    damaged = None
    with contextlib.suppress(Exception):  # PyTorch says why it is no archive of its own
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
    if damaged:
        raise UserError(
            f"{path} is damaged: {files.shorten(damaged)} in it is not as it was written; copy it again"
        )
