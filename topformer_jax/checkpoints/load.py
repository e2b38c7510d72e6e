"""Loads a checkpoint into a model, strictly: each tensor has one place, each place its tensor, all are finite.

    path -> the reader of its format -> names matched -> part chosen -> checked -> the model's variables

A reader puts the keys that lead to a state dict before its names, with "/": `state_dict/module.backbone...`. Wrappers
put prefixes before names; averages, teachers, profilers, losses and auxiliary heads add tensors.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from topformer_jax import models
from topformer_jax.checkpoints import orbax_store, safetensors_format, torch_format
from topformer_jax.checkpoints.origin import set_origin
from topformer_jax.runtime import files, processes
from topformer_jax.runtime.errors import UserError

Model = TypeVar("Model", models.Segmenter, models.Classifier, models.Segmenter | models.Classifier)
Tensors = dict[str, np.ndarray]
Metadata = dict[str, Any]
Shape = tuple[int, ...]
CLASS_LAYERS = ("decode_head.conv_seg.", "head.l.")  # the layers whose shape depends on the number of classes
PARTS = {"token_pyramid": ("tpm.",), "backbone": ("tpm.", "trans.")}  # by the prefixes of their weights
# Names of the same modules in older checkpoints, and the names in the model.
ALIASES = {
    "patch_embed": "tpm",
    "fuse_blocks": "SIM",
    "to_feat1": "local_embedding",
    "to_feat2": "global_embedding",
    "fuse2": "global_act",
}
# What DistributedDataParallel, torch.compile, Fabric, FSDP and activation checkpointing put anywhere into a name.
WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Keys under which files keep their tensors, the usual ones first.
STATE_DICT_KEYS = (
    *("state_dict", "model", "model_state_dict", "model_state"),
    *("net", "network", "params", "weights", "module"),
)
AVERAGE = re.compile(r"(?:^|[._/])(?:ema|swa|averaged?)(?:[._/]|$)", re.IGNORECASE)
# Words in the names of tensors that the network does not need: of a profiler, an average, a loss, another network.
SURPLUS = re.compile(
    r"(?:^|[._])(?:total_ops|total_params|n_averaged|steps|ema|swa|averaged?|auxiliary|aux|criterion|loss|losses"
    r"|teacher|student)(?:[._]|$)"
)


# The modules of the formats. Each has `read(path)`, which returns tensors in this package's layout under the names of
# the file, and metadata (`meta`, and `config` if it is known); `write(path, tensors, metadata)`; and `file_shape`,
# which gives the shape of a tensor as the file has it, for messages.
FILE_FORMATS: dict[str, ModuleType] = {
    ".pth": torch_format,
    ".pt": torch_format,
    ".safetensors": safetensors_format,
}


def load_model(
    config: ConfigDict, checkpoint: str | os.PathLike[str] | None = None, *, part: str = "all"
) -> models.Segmenter | models.Classifier:
    """Builds the model of a config and loads a checkpoint into it. The model is in inference mode.

    The checkpoint sets its `classes`, `palette` and `checkpoint_config` if `part` is "all".

    Args:
        config: all settings; they are the model's `config` too.
        checkpoint: a `.pth` or `.safetensors` file, a checkpoint folder or a step of it, or the work directory of a
            training run. Without one the weights are drawn from `config.seed`.
        part: what to take from the checkpoint: "all"; "all_but_classes", which leaves the last layer fresh;
            "backbone", from an ImageNet classifier, which leaves injections and head fresh.

    Raises:
        UserError: the config is wrong, the checkpoint cannot be read, or they do not fit.

    >>> from topformer_jax import config
    >>> model = load_model(config.ade20k("tiny"))
    >>> model(np.zeros((1, 64, 96, 3), np.float32)).shape
    (1, 8, 12, 150)
    """
    return _load_weights(models.build(config), checkpoint, part)


def load_segmenter(
    config: ConfigDict, checkpoint: str | os.PathLike[str] | None = None, *, part: str = "all"
) -> models.Segmenter:
    """`load_model` for commands that need a segmenter; a UserError if the config is a classifier's."""
    return _load_weights(models.build_segmenter(config), checkpoint, part)


def _load_weights(model: Model, checkpoint: str | os.PathLike[str] | None, part: str) -> Model:
    metadata: Metadata = {}
    if checkpoint is not None:
        tensors, metadata = read_checkpoint(checkpoint, model, part)
        load_state_dict(model, tensors)
    # If a part is fresh, names and settings are those of another model.
    set_origin(model, metadata if part == "all" else {}, checkpoint)
    model.eval()
    return model


def read_checkpoint(
    path: str | os.PathLike[str], model: models.Segmenter | models.Classifier, part: str = "all"
) -> tuple[Tensors, Metadata]:
    """Reads a checkpoint of any format that fits a model exactly; for `part` see `load_model`.

    Returns:
        All tensors of the model by official name in this package's layout, those that `part` leaves fresh from the
        model, and the metadata of the checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, does not fit, or holds NaN or infinity.
    """
    config = model.config
    if part == "backbone" and config.task != "segmentation":
        raise UserError("only a segmenter can start from a classifier's backbone; the config is a classifier's")
    path = files.as_path(path)
    module = find_format(path)
    tensors, metadata = module.read(path)
    variables = models.named_variables(model)
    shapes = {name: variable.shape for name, variable in variables.items()}
    tensors = match_names(tensors, shapes, str(path))
    fresh = fresh_names(variables, part)
    skipped = ("head.",) if part == "backbone" else ()  # of the classifier
    tensors = {name: x for name, x in tensors.items() if name not in fresh and not name.startswith(skipped)}
    injection = metadata.get("config", {}).get("model", {}).get("injection", config.model.injection)
    if part != "backbone" and injection != config.model.injection:  # two have the same names and shapes
        raise UserError(f"{path} has injection {injection}, the config {config.model.injection}")
    expected = {name: shape for name, shape in shapes.items() if name not in fresh}
    tensors |= _missing_counters(tensors, expected, str(path))
    _check_state_dict(tensors, expected, module.file_shape, str(path), config)
    check_finite(tensors, str(path))
    tensors |= {name: np.asarray(variables[name].get_value()) for name in fresh}
    return tensors, metadata


def write_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes a checkpoint in the format of the path's suffix, or a folder if the suffix is none of `FILE_FORMATS`.

    Raises:
        UserError: it exists, or cannot be written.
    """
    target = files.as_path(path)
    FILE_FORMATS.get(target.suffix.lower(), orbax_store).write(target, tensors, metadata)


def find_format(path: files.Path) -> ModuleType:
    """The module that reads an existing checkpoint; PyTorch files have suffixes of all kinds."""
    with files.report_errors("read", path):
        exists, is_folder = path.exists(), path.is_dir()
    if not exists:
        suffixes = " or ".join(FILE_FORMATS)
        raise UserError(f"there is no checkpoint {path}: expected a {suffixes} file, or a checkpoint folder")
    return orbax_store if is_folder else FILE_FORMATS.get(path.suffix.lower(), torch_format)


def fresh_names(names: Iterable[str], part: str) -> set[str]:
    """The names of a model's tensors outside a part: a start from that part of a checkpoint leaves them fresh.

    Parts are those of `init_part`, and "token_pyramid".
    """
    if part in PARTS:
        return {name for name in names if not name.removeprefix("backbone.").startswith(PARTS[part])}
    return {name for name in names if part == "all_but_classes" and name.startswith(CLASS_LAYERS)}


def load_state_dict(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Assigns tensors to a model's variables of the same name, in the variables' dtypes, without a check."""
    variables = models.named_variables(model)
    for name, tensor in tensors.items():
        values = tensor.astype(variables[name].dtype, copy=False)
        # Not `jnp.asarray`, which compiles a program for each new shape.
        variables[name].set_value(jax.device_put(values, may_alias=False))


def describe_origin(model: nnx.Module, part: str, source: object) -> str:
    """Says which modules of a model come from `part` of a checkpoint, and which have random weights."""
    names = models.named_variables(model)
    fresh = fresh_names(names, part)

    def list_modules(names: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))

    taken, new = (list_modules(name for name in names if (name in fresh) == each) for each in (False, True))
    return f"from {source}: {taken}" + (f"; random: {new}" if new else "")


# Names


def match_names(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], source: str) -> dict[str, np.ndarray]:
    """Brings a file's names to the model's: without prefixes, with or without `backbone.`, without old aliases.

    Unknown names stay, without prefixes. Prints which network of the file is taken and what is left out.

    Raises:
        UserError: two tensors of the file end up with the same name, or two of its networks fit.
    """
    found = {name: _find(name, shapes) for name in tensors}
    if not any(match for _, match in found.values()):
        return {name.rpartition("/")[2]: tensor for name, tensor in tensors.items()}
    chosen, others, is_average = _choose_network(tensors, found, shapes, source)
    matched: dict[str, np.ndarray] = {}
    left_out: list[str] = []
    for name, (prefix, match) in found.items():
        short = name.removeprefix(chosen).rpartition("/")[2]
        is_elsewhere = name.rpartition("/")[0] != chosen.rpartition("/")[0] or prefix in others
        if is_elsewhere or (match is None and SURPLUS.search(short)):
            left_out.append(name)
            continue
        plain = _unwrap(short.split("."))
        plain = _known_as(plain, shapes) or plain
        if plain in matched:
            raise UserError(f"two tensors of {source} are {plain}: {name.rpartition('/')[2]} is one of them")
        matched[plain] = tensors[name]
    said = f"{source}: {_describe(chosen)} taken{', the averages' * is_average} ({len(matched)} tensors)"
    if left_out:
        examples = ", ".join(files.shorten(name.replace("/", ".")) for name in left_out[:2])
        said += f"; {len(left_out)} others left out ({examples}{', ...' * (len(left_out) > 2)})"
    if left_out or chosen not in ("", "state_dict/", "model/"):
        processes.say(said)
    if any(name.startswith(f"{chosen}ema_backbone_") for name in left_out):
        processes.say(
            f"{source}: ema_* are of mmcv's EMAHook; the other tensors are averages if the file was saved at the "
            "end of an epoch, and the trained weights if the run counted iterations"
        )
    return matched


def _find(name: str, known: Mapping[str, Any]) -> tuple[str, str | None]:
    """The keys and the prefix of a file's name, and the model's name for the rest; None for an unknown name."""
    place, slash, rest = name.rpartition("/")
    parts = rest.split(".")
    for start in range(len(parts)):
        if match := _known_as(_unwrap(parts[start:]), known):
            while parts[start] in WRAPPERS:
                start += 1
            return "".join([place, slash, *(f"{part}." for part in parts[:start])]), match
    return place + slash, None


def _unwrap(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if part not in WRAPPERS)


def _known_as(name: str, known: Mapping[str, Any]) -> str | None:
    """The model's name for a file's name."""
    # `fuse2` is an old name of `global_act`, and a present one in the other two injections: try it as it is.
    for spelling in (name, ".".join(ALIASES.get(part, part) for part in name.split("."))):
        for candidate in (spelling, f"backbone.{spelling}", spelling.removeprefix("backbone.")):
            if candidate in known:
                return candidate
    return None


def _choose_network(
    tensors: Mapping[str, np.ndarray],
    found: Mapping[str, tuple[str, str | None]],
    shapes: Mapping[str, Shape],
    source: str,
) -> tuple[str, set[str], bool]:
    """Returns the prefix of the network that is taken, those of other networks, and whether it is an average.

    A network that fits the model's shapes comes before one of another variant, such as a teacher; an average comes
    before its model; then the usual keys come first.
    """
    counts = Counter(prefix for prefix, match in found.values() if match)
    networks = {prefix for prefix, count in counts.items() if 2 * count >= max(counts.values())}
    fitting = Counter(
        prefix for name, (prefix, match) in found.items() if match and tensors[name].shape == shapes[match]
    )
    is_swapped = "ema_state_dict/steps" in tensors  # mmengine's EMAHook swaps the two when it saves

    def rank(prefix: str) -> tuple[bool, bool, int]:
        key = prefix.partition("/")[0] if "/" in prefix else ""
        is_average = key == "state_dict" if is_swapped else bool(AVERAGE.search(prefix))
        place = STATE_DICT_KEYS.index(key) if key in STATE_DICT_KEYS else len(STATE_DICT_KEYS)
        return 2 * fitting[prefix] < counts[prefix], not is_average, place

    first = min(map(rank, networks))
    best = [prefix for prefix in networks if rank(prefix) == first]
    if len(best) > 1:
        several = " and ".join(sorted(f"{_describe(prefix)} ({counts[prefix]})" for prefix in best)[:4])
        raise UserError(
            f"{source} holds {len(best)} networks that fit, {several}: torch.save the state dict of one of them to a "
            "file of its own"
        )
    return best[0], networks - {*best}, not first[1]


def _describe(prefix: str) -> str:
    return f"{prefix.replace('/', '.')}*" if prefix else "names without a prefix"


def _missing_counters(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], source: str
) -> dict[str, np.ndarray]:
    """Zeros for the missing counters of BatchNorms whose statistics are there: some trainers do not keep them."""
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith(".running_var")]
    counters = [f"{norm}num_batches_tracked" for norm in norms]
    missing = [name for name in counters if name in expected and name not in tensors]
    if missing:
        processes.say(f"{source}: {len(missing)} num_batches_tracked are missing, and start at 0")
    return {name: np.zeros(expected[name], np.int32) for name in missing}


# Checks


def _check_state_dict(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Shape],
    as_in_file: Callable[[Shape], Shape],
    source: str,
    config: ConfigDict,
) -> None:
    """Raises a UserError unless names and shapes are exactly the expected ones; its details name one of each kind."""

    def describe(shape: Shape) -> str:
        return "x".join(map(str, as_in_file(shape))) or "scalar"

    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "wrong shape": []}
    for name in dict.fromkeys((*expected, *found)):
        ours, theirs = expected.get(name), found.get(name)
        if ours is not None and theirs is None:
            wrong["missing"].append(f"{name}  config {describe(ours)}")
        elif theirs is not None and ours is None:
            wrong["unexpected"].append(f"{name}  file {describe(theirs)}")
        elif ours is not None and theirs is not None and ours != theirs:
            wrong["wrong shape"].append(f"{name}  file {describe(theirs)}, config {describe(ours)}")
    if not any(wrong.values()):
        return
    details = []
    for kind, lines in wrong.items():
        more = f" (and {len(lines) - 1} more)" if lines[1:] else ""
        details += [f"  {kind:<11}  {lines[0]}{more}"] if lines else []
    missing, unexpected, wrong_shape = map(len, wrong.values())
    raise UserError(
        f"{source} does not fit the config: {missing} tensors missing, {unexpected} unexpected, {wrong_shape} of the "
        f"wrong shape; {_explain_misfit(tensors, expected, config)}",
        details,
    )


def _explain_misfit(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Shape], config: ConfigDict) -> str:
    """Why a checkpoint most likely does not fit, from the shapes that give it away, and what to do."""
    known = {re.sub(r"\.\d+\.", ".N.", name) for name in expected}  # of a block of any number
    unknown = [name for name in tensors if re.sub(r"\.\d+\.", ".N.", name) not in known]
    if 2 * len(unknown) > len(tensors):
        return (
            f"it is of another network (names such as {unknown[0][:60]}): "
            f"{len(tensors) - len(unknown)} of its {len(tensors)} tensors have names of TopFormer's"
        )
    query = next((t for name, t in tensors.items() if name.endswith("blocks.0.attn.to_q.c.weight")), None)
    for name, variant in models.VARIANTS.items():
        if query is not None and sum(variant.channels) in query.shape and name != config.model.variant:
            return f"it is of variant {name}, the config of {config.model.variant}: use a config of that variant"
    if config.task == "segmentation" and "head.l.weight" in tensors:
        return (
            "it is an ImageNet classifier's: use an imagenet config, or start a segmenter from its backbone "
            "(convert --init-from-classifier, train --config.init_part=backbone)"
        )
    if config.task == "classification" and "decode_head.conv_seg.weight" in tensors:
        return "it is a segmenter's: use the config of its data set"
    depths = len({name.partition("transformer_blocks.")[2].partition(".")[0] for name in tensors} - {""})
    if depths not in (0, config.model.depths):
        return f"it has {depths} transformer blocks, the config {config.model.depths}: --config.model.depths={depths}"
    classes = config.model.num_classes
    if any(name.startswith(CLASS_LAYERS) and classes not in t.shape for name, t in tensors.items()):
        return (
            f"it does not have the config's {classes} classes: use its own config, or a new last layer "
            "(convert --new-head, train --config.init_part=all_but_classes)"
        )
    if all(name in tensors and tensors[name].shape == shape for name, shape in expected.items()):
        return "the model has no place for the unexpected tensors: if they are not needed, save the file without them"
    return "use the config that it was made with"


def check_finite(tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Raises a UserError if a tensor holds NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        first = ", ".join(broken[:2]) + ", ..." * (len(broken) > 2)
        raise UserError(
            f"{source} holds NaN or infinity in {len(broken)} of {len(tensors)} tensors ({first}): its training "
            "diverged, or the file is damaged; use an earlier checkpoint, or copy it again"
        )
