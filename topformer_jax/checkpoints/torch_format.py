"""PyTorch files (.pth): what mmcv, timm or a plain `torch.save` wrote, and mmcv files that the official code loads.

PyTorch is imported when a file is read or written, and by nothing else here.
"""

import argparse
import io
import pickle
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from topformer_jax import files
from topformer_jax.errors import UserError

Shape = tuple[int, ...]
SUFFIXES = (".pth", ".pt")
# The whole layout conversion: names are equal, and axes are permuted by rank. OIHW -> HWIO, OI -> IO.
AXES: dict[int, Shape] = {4: (2, 3, 1, 0), 2: (1, 0)}
INVERSE_AXES: dict[int, Shape] = {
    rank: tuple(axes.index(axis) for axis in range(rank)) for rank, axes in AXES.items()
}
# The same modules' names in older checkpoints, and today's.
ALIASES = {
    "patch_embed": "tpm",
    "fuse_blocks": "SIM",
    "to_feat1": "local_embedding",
    "to_feat2": "global_embedding",
    "fuse2": "global_act",
}
# Where a file keeps its tensors, averaged ones first; without any of these keys it holds nothing but tensors.
STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "model")


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


def match_names(tensors: Mapping[str, np.ndarray], model_names: Iterable[str]) -> dict[str, np.ndarray]:
    """Brings a file's names to the model's: without `module.`, with or without `backbone.`, without old aliases.

    A name that the model lacks keeps its spelling, so that the caller can report it.

    Raises:
        UserError: two tensors of the file end up with the same name.
    """
    known = set(model_names)
    matched: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("module.")
        # `fuse2` is an old name of `global_act`, and a present one in the other two injections: try it as it is.
        spellings = (plain, ".".join(ALIASES.get(part, part) for part in plain.split(".")))
        candidates = [
            candidate
            for spelling in spellings
            for candidate in (spelling, f"backbone.{spelling}", spelling.removeprefix("backbone."))
        ]
        match = next((candidate for candidate in candidates if candidate in known), plain)
        if match in matched:
            raise UserError(f"two tensors of the file are {match}: {name} is the second")
        matched[match] = tensor
    return matched


def read_pth(path: files.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a PyTorch file under its own names, and `{"meta": ...}`; runs none of the file's code.

    Tensors come in this package's layout, 16-bit floats as float32. Of the averaged and the plain tensors of a
    training run, the averaged ones are read.

    Raises:
        UserError: PyTorch is not installed, or the file is not a checkpoint that can be read safely.
    """
    content = _load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a dictionary of tensors")
    torch = _import_torch()
    key = next((key for key in STATE_DICT_KEYS if key in content), None)
    states = content if key is None else content[key]
    if (
        not isinstance(states, dict)
        or not states
        or not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in states.items())
    ):
        known = ", ".join(map(str, list(content)[:8]))
        raise UserError(
            f"{path} holds no state dict: expected tensors under {', '.join(STATE_DICT_KEYS[:-1])} or "
            f"{STATE_DICT_KEYS[-1]}, or nothing but tensors; found {known}"
        )
    meta = content.get("meta") if key is not None else None
    tensors = {name: from_torch(_to_numpy(name, tensor, torch)) for name, tensor in states.items()}
    return tensors, {"meta": _json_part(meta) if isinstance(meta, dict) else {}}


def write_pth(path: files.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Writes an mmcv file, `{"meta": metadata["meta"], "state_dict": ...}`, whole or not at all.

    Args:
        path: of the file, which must not exist.
        tensors: by official name, in this package's layout.
        metadata: of which a PyTorch file holds `meta` alone.

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
    """What a file holds, of tensors and plain containers."""
    torch = _import_torch()
    with files.report_errors("read", path):
        content = io.BytesIO(files.retry(path.read_bytes))
    try:
        # timm keeps its arguments in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise UserError(f"{path} is not a PyTorch checkpoint, or a damaged one") from None
        raise UserError(
            f"{path} is refused: it asks for {asked[1]}, and only tensors and plain containers are read; "
            "save the state dict alone with torch.save, where you trust the file"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a PyTorch checkpoint, or a damaged one: {reason}") from None


def _to_numpy(name: str, tensor: Any, torch: ModuleType) -> np.ndarray:
    """A tensor without loss: 16-bit floats as float32, all integers as int64."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        raise UserError(
            f"{name} is a {tensor.dtype} tensor of layout {tensor.layout}: expected dense real numbers"
        )
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.to(torch.int64).numpy()
    return (tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)).numpy()


def _json_part(value: Any) -> Any:
    """The part of a `meta` that JSON can hold; other values become null."""
    if isinstance(value, dict):
        return {str(key): _json_part(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_part(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else None


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            "reading and writing .pth files needs PyTorch, which is not installed: "
            "pip install 'topformer_jax[convert]' (from a clone: pip install -e '.[convert]')"
        ) from None
    return torch
