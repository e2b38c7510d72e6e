"""PyTorch files (.pth): what mmcv, timm or a plain `torch.save` wrote, and mmcv files that the official code loads.

PyTorch is imported when a file is read or written, and by nothing else here.
"""

import contextlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from topformer_jax import files
from topformer_jax.checkpoints import stand_ins
from topformer_jax.checkpoints.names import is_averaged, say
from topformer_jax.errors import UserError

Shape = tuple[int, ...]
SUFFIXES = (".pth", ".pt")
# The whole layout conversion: names are equal, and axes are permuted by rank. OIHW -> HWIO, OI -> IO.
AXES: dict[int, Shape] = {4: (2, 3, 1, 0), 2: (1, 0)}
INVERSE_AXES: dict[int, Shape] = {
    rank: tuple(axes.index(axis) for axis in range(rank)) for rank, axes in AXES.items()
}
# Where a file keeps its tensors, the usual places first.
STATE_DICT_KEYS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "params",
    "weights",
    "module",
)


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
    """The tensors of a PyTorch file under its own names, and `{"meta": ...}`; runs none of the file's code.

    Tensors come in this package's layout, 16-bit floats as float32. Of the averaged and the plain tensors of a
    training run, the averaged ones are read; which, is printed where there is a choice.

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
    states = dict(_find_states(content, torch))
    key = _choose_states(states, content, path)
    meta = content.get("meta") if key else None
    tensors = {name: from_torch(_to_numpy(name, tensor, torch)) for name, tensor in states[key].items()}
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
        say(f"{path}: left out what is no tensor, of {', '.join(unknown[:3])}{more}")
    return loaded


def _find_states(
    content: dict[Any, Any], torch: ModuleType, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The dictionaries of nothing but tensors in a file with the keys that lead to them, without an optimizer's."""
    if content and all(
        isinstance(name, str) and (torch.is_tensor(tensor) or isinstance(tensor, stand_ins.Array))
        for name, tensor in content.items()
    ):
        yield keys, content
        return
    for key, part in content.items():
        if (
            isinstance(key, str)
            and isinstance(part, dict)
            and key != "meta"
            and "optim" not in key
            and len(keys) < 3
        ):
            yield from _find_states(part, torch, (*keys, key))


def _choose_states(
    states: Mapping[tuple[str, ...], Mapping[str, Any]], content: Mapping[Any, Any], path: files.Path
) -> tuple[str, ...]:
    """The keys of the tensors that are read; says which, where others could be meant.

    Complete averages come first, then the usual places, then the only ones of their number.
    """
    averages = {keys for keys in states if any(map(is_averaged, keys))}
    swapped = ("ema_state_dict",)
    # mmengine's EMAHook swaps the two when it saves, and counts its steps in the second.
    if "steps" in states.get(swapped, ()):
        averages = averages - {swapped} | ({("state_dict",)} & states.keys())
    plain = [keys for keys in states if keys not in averages and (keys != swapped or len(states) == 1)]
    usual = [keys for keys in plain if not keys or keys[-1] in STATE_DICT_KEYS]
    ranks = {keys: (len(keys), STATE_DICT_KEYS.index(keys[-1]) if keys else 0) for keys in usual}
    best = [keys for keys in usual if ranks[keys] == min(ranks.values())]
    candidates = best or plain or averages
    most = max((len(states[keys]) for keys in candidates), default=0)
    complete = {keys: 4 * len(states[keys]) >= 3 * most for keys in states}
    chosen = [keys for keys in averages if complete[keys]] or best or [k for k in plain if complete[k]]
    if not chosen:
        found = (
            ", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:6])
            or "nothing"
        )
        raise UserError(
            f"{path} holds no state dict: expected tensors under {', '.join(STATE_DICT_KEYS[:2])} or another key, "
            f"or nothing but tensors; found {found}"
        )
    described = {keys: f"{'.'.join(keys)} ({len(states[keys])})" for keys in states}
    if len(chosen) > 1:
        several = ", ".join(described[keys] for keys in chosen[:4])
        raise UserError(
            f"{path} holds {len(chosen)} state dicts, {several}: torch.save one of them to a file of its own"
        )
    (keys,) = chosen
    others = [
        described[other] for other in states if other != keys and (complete[other] or other in averages)
    ]
    if others or (keys and keys not in (("state_dict",), ("model",))):
        left_out = f"; left out: {', '.join(others[:4])}" + (", ..." if len(others) > 4 else "")
        kind = ", the averages" if keys in averages else ""
        say(f"{path}: tensors of {described[keys]} taken{kind}{left_out if others else ''}")
    return keys


def _to_numpy(name: str, tensor: Any, torch: ModuleType) -> np.ndarray:
    """A tensor without loss: 16-bit floats as float32, all integers as int64."""
    if isinstance(tensor, stand_ins.Array):
        if tensor.values is None or tensor.values.dtype.kind not in "biuf":
            raise UserError(f"{name} is an array of no real numbers: expected dense real numbers")
        tensor = torch.from_numpy(tensor.values.copy())
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
    if isinstance(value, stand_ins.Array):
        return None if value.values is None else value.values.tolist()
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
