"""Converts checkpoints between PyTorch files and Orbax folders, in both directions and without loss.

  python -m topformer_jax.convert --config configs/topformer_b_ade.py --checkpoint FILE.pth --output DIR
  python -m topformer_jax.convert --checkpoint DIR --output FILE.pth
  python -m topformer_jax.convert --config configs/topformer_b_ade.py --summary

The first reads an official (mmcv or timm) file into a folder that every command here takes; the second
writes a file that the official code loads. Every tensor must find its place and every place its tensor;
--init-from-classifier and --new-head are the only exceptions, and what they leave fresh is listed.
"""

import argparse
import os
import pathlib
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from topformer_jax import checkpoint as checkpoint_lib
from topformer_jax import cli, models
from topformer_jax.data.catalog import CATALOG
from topformer_jax.errors import UserError
from topformer_jax.models.summary import summary
from topformer_jax.version import __version__

# The whole conversion: names are equal, and axes are permuted by rank. OIHW -> HWIO, OI -> IO.
AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
# Older checkpoints' names of the same modules.
ALIASES = {
    "patch_embed": "tpm",
    "fuse_blocks": "SIM",
    "to_feat1": "local_embedding",
    "to_feat2": "global_embedding",
    "fuse2": "global_act",
}
# The layers whose shape is the number of classes.
CLASS_LAYERS = ("decode_head.conv_seg.", "head.l.")
PARTS = ("all", "all_but_classes", "backbone")
TORCH_SUFFIXES = (".pth", ".pt")


def from_torch(tensor: np.ndarray) -> np.ndarray:
    """A tensor in PyTorch's layout in ours: kernels `[k, k, in / groups, out]`, matrices `[in, out]`."""
    tensor = tensor.transpose(AXES.get(tensor.ndim, range(tensor.ndim)))
    if tensor.dtype != np.int64:
        return tensor
    if tensor.size and tensor.max() > np.iinfo(np.int32).max:
        raise UserError(f"a counter of {tensor.max()} batches does not fit into 32 bits")
    return tensor.astype(np.int32)


def to_torch(tensor: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`."""
    tensor = tensor.transpose(np.argsort(AXES.get(tensor.ndim, range(tensor.ndim))))
    return np.array(tensor, np.int64 if tensor.dtype == np.int32 else tensor.dtype, order="C")


def fresh_names(names: Iterable[str], part: str) -> set[str]:
    """The names of a model's tensors that a start from `part` of a checkpoint leaves fresh."""
    if part == "backbone":
        return {name for name in names if not name.startswith(("backbone.tpm.", "backbone.trans."))}
    return {name for name in names if part == "all_but_classes" and name.startswith(CLASS_LAYERS)}


def read(
    path: str | os.PathLike[str], model: nnx.Module, config: ConfigDict, part: str = "all"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a `.pth` file or a checkpoint folder that fits a model exactly.

    Args:
        path: the file, or the folder.
        model: whose names and shapes are wanted, and whose values are taken where the start is fresh.
        config: the model's settings, for the advice when it does not fit.
        part: what to take: "all"; "all_but_classes", leaving the last layer fresh; "backbone", from an ImageNet
            classifier, leaving injections and head fresh.

    Returns:
        All of the model's tensors by official name in our layout, and the checkpoint's `meta`.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    if part not in PARTS:
        raise UserError(f"init_part is {part!r}: expected one of {', '.join(PARTS)}")
    if part == "backbone" and config.task != "segmentation":
        raise UserError(
            "only a segmenter can start from a classifier's backbone; the config is a classifier's"
        )
    path = pathlib.Path(path)
    places = models.named_variables(model)
    fresh = fresh_names(places, part)
    wanted = {name: np.empty(variable.shape) for name, variable in places.items() if name not in fresh}
    is_file = not path.is_dir()
    if is_file:
        found, meta = read_pth(path)
        found = rename(found, places)
        wanted = {name: to_torch(tensor) for name, tensor in wanted.items()}  # told as the file has them
    else:
        found, metadata = checkpoint_lib.read_model(path)
        meta = metadata.get("meta", {})
        stored = metadata.get("config", {}).get("model", {}).get("injection", config.model.injection)
        if part != "backbone" and stored != config.model.injection:
            raise UserError(
                f"{path} has injection {stored}, the config {config.model.injection}"
            )  # same shapes
    unread = ("head.",) if part == "backbone" else ()
    found = {name: t for name, t in found.items() if name not in fresh and not name.startswith(unread)}
    checkpoint_lib.check_state_dict(
        {name: tensor.shape for name, tensor in found.items()},
        {name: tensor.shape for name, tensor in wanted.items()},
        str(path),
        hint=lambda: _advice(found, config),
    )
    if is_file:
        found = {name: from_torch(tensor) for name, tensor in found.items()}
    return found | {name: np.asarray(places[name].get_value()) for name in fresh}, meta


def read_pth(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a PyTorch file under their own names, and its `meta`; runs none of the file's code."""
    torch = _import_torch()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its arguments in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: expected a .pth file or an Orbax folder") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise UserError(f"{path} is no PyTorch checkpoint, or a damaged one") from None
        raise UserError(
            f"{path} is refused: it asks for {asked[1]}, and only tensors and plain containers are read; "
            "save the state dict alone with torch.save, where you trust the file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no PyTorch checkpoint, or a damaged one: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a dictionary of tensors")
    key = next((key for key in ("state_dict_ema", "state_dict", "model") if key in content), None)
    states = content if key is None else content[key]
    if (
        not isinstance(states, dict)
        or not states
        or not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in states.items())
    ):
        known = ", ".join(map(str, list(content)[:8]))
        raise UserError(
            f"{path} holds no state dict: expected tensors under state_dict_ema, state_dict or model, or nothing "
            f"but tensors; found {known}"
        )
    meta = content.get("meta") if key is not None else None
    tensors = {name: _numpy(name, tensor, torch) for name, tensor in states.items()}
    return tensors, _plain(meta) if isinstance(meta, dict) else {}


def write_pth(path: pathlib.Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes an mmcv file, `{"meta": ..., "state_dict": ...}`, whole or not at all."""
    torch = _import_torch()
    if path.exists():
        raise UserError(f"{path} is there already: name another file")
    states = {name: torch.from_numpy(to_torch(tensor)) for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = pathlib.Path(folder, path.name)
            torch.save({"meta": dict(meta), "state_dict": states}, part)
            part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def rename(found: Mapping[str, np.ndarray], wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """Brings a file's names to the model's: without `module.`, with or without `backbone.`, without old aliases.

    A name that has no place keeps its spelling, so that the caller can name it.
    """
    places = set(wanted)
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in found.items():
        plain = name.removeprefix("module.")
        # `fuse2` is an old name of `global_act`, and a present one in the other two injections: try it as it is.
        spellings = (plain, ".".join(ALIASES.get(part, part) for part in plain.split(".")))
        candidates = [
            candidate
            for spelling in spellings
            for candidate in (spelling, f"backbone.{spelling}", spelling.removeprefix("backbone."))
        ]
        place = next((candidate for candidate in candidates if candidate in places), plain)
        if place in renamed:
            raise UserError(f"two tensors of the file are {place}: {name} is the second")
        renamed[place] = tensor
    return renamed


def main() -> None:
    """The command."""
    parser = cli.Parser(__doc__, config_required=False)
    parser.add_argument("--checkpoint", metavar="PATH", help="a .pth file or an Orbax folder to read")
    parser.add_argument("--output", metavar="PATH", help="FILE.pth or a folder to write")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--init-from-classifier",
        action="store_true",
        help="read the backbone from an ImageNet checkpoint; injections and head start fresh",
    )
    start.add_argument(
        "--new-head", action="store_true", help="start the last layer fresh, for another number of classes"
    )
    parser.add_argument("--summary", action="store_true", help="print parameters and multiply-adds and stop")
    parser.add_argument(
        "--size",
        metavar="HxW",
        default=None,
        help="of --summary's image, pixels (default: the config's crop)",
    )
    args, config = parser.parse()
    if args.summary:
        if config is None:
            raise UserError("--summary needs --config FILE")
        size = _size(args.size) if args.size else tuple(config.data.crop_size)
        print(f"TopFormer {config.model.variant}, {config.model.num_classes} classes, {size[0]} x {size[1]}")
        print(cli.table(summary(config, size)))
        return
    if not args.checkpoint or not args.output:
        raise UserError("convert needs --checkpoint PATH and --output PATH (or --config FILE --summary)")
    source = pathlib.Path(args.checkpoint)
    part = "backbone" if args.init_from_classifier else "all_but_classes" if args.new_head else "all"
    if config is None:
        if not source.is_dir() or part != "all":
            raise UserError(f"reading {source} needs --config FILE: the model that its tensors must fit")
        tensors, metadata = checkpoint_lib.read_model(source)
    else:
        model = models.build(config)
        tensors, meta = read(source, model, config, part)
        print(origin_table(model, part, source))
        # Iteration and classes are another model's where a part of it is fresh.
        metadata = {"config": config.to_dict(), "meta": meta if part == "all" else {}}
    if pathlib.Path(args.output).suffix.lower() in TORCH_SUFFIXES:
        write_pth(pathlib.Path(args.output), tensors, _mmcv_meta(metadata))
    else:
        checkpoint_lib.save_model(args.output, 0, tensors, metadata)
    print(f"wrote {args.output}: {len(tensors)} tensors")


def origin_table(model: nnx.Module, part: str, source: object) -> str:
    """Which of a model's boxes were taken from a checkpoint and which start fresh."""
    places = models.named_variables(model)
    fresh = fresh_names(places, part)
    tensors: Counter[tuple[str, bool]] = Counter()
    parameters: Counter[tuple[str, bool]] = Counter()
    for name, variable in places.items():
        row = (".".join(name.split(".")[:2]), name in fresh)
        tensors[row] += 1
        parameters[row] += variable.size if isinstance(variable, nnx.Param) else 0
    lines = [f"{'module':<26}{'tensors':>8}{'parameters':>13}  from"]
    for (box, is_fresh), count in tensors.items():
        origin = "fresh" if is_fresh else source
        lines.append(f"{box:<26}{count:>8}{parameters[box, is_fresh]:>13,}  {origin}")
    return "\n".join(lines)


def _mmcv_meta(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the official code reads of a checkpoint beside its tensors: classes, palette, iteration."""
    meta = {"epoch": 0, "iter": 0, "topformer_jax": __version__, **metadata.get("meta", {})}
    data_set = CATALOG.get(metadata.get("config", {}).get("data", {}).get("dataset", ""))
    classes = metadata.get("config", {}).get("model", {}).get("num_classes")
    if data_set is not None and len(data_set.classes) == classes and not meta.get("CLASSES"):
        meta["CLASSES"] = list(data_set.classes)
        meta["PALETTE"] = [list(colour) for colour in data_set.palette]
    return meta


def _advice(found: Mapping[str, np.ndarray], config: ConfigDict) -> str:
    """What most likely went wrong when a checkpoint does not fit, from the shapes that give it away."""
    query = next((t for name, t in found.items() if name.endswith("blocks.0.attn.to_q.c.weight")), None)
    for name, variant in models.VARIANTS.items():
        # The layout is either's: 1 x 1 kernels have two axes that are not 1.
        if query is not None and sum(variant.channels) in query.shape and name != config.model.variant:
            return (
                f"it is of variant {name}, the config of {config.model.variant}: use a config of that variant"
            )
    if config.task == "segmentation" and "head.l.weight" in found:
        return "it is an ImageNet classifier's: use an imagenet config, or --init-from-classifier"
    if config.task == "classification" and "decode_head.conv_seg.weight" in found:
        return "it is a segmenter's: use the config of its data set"
    if any(
        name.startswith(CLASS_LAYERS) and config.model.num_classes not in t.shape for name, t in found.items()
    ):
        return (
            f"it has not the config's {config.model.num_classes} classes: use its own config, or --new-head"
        )
    return "use the config that it was made with"


def _numpy(name: str, tensor: Any, torch: ModuleType) -> np.ndarray:
    """A tensor without loss: 16-bit floats as float32, all integers as int64."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        raise UserError(
            f"{name} is a {tensor.dtype} tensor of layout {tensor.layout}: expected dense real numbers"
        )
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.to(torch.int64).numpy()
    return (tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)).numpy()


def _plain(value: Any) -> Any:
    """The part of a `meta` that JSON can hold; what it cannot is left out."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else None


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH, e.g. 512x512")
    size = int(match[1]), int(match[2])
    if min(size) < 1:
        raise UserError(f"--size {text}: expected at least 1x1")
    return size


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _import_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            "reading and writing .pth files needs PyTorch, which is not installed: "
            "pip install 'topformer_jax[convert]' (from a clone: pip install -e '.[convert]')"
        ) from None
    return torch


if __name__ == "__main__":
    cli.run(main)
