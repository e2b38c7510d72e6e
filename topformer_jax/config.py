"""Every setting with its unit and default, and the recipes that the files in configs/ call.

A config is a locked `ml_collections.ConfigDict`. Commands take `--config FILE` and any number of
`--config.KEY=VALUE`; `load` takes the same as a dictionary. An unknown key is refused.
"""

import ast
import difflib
import math
import pathlib
import runpy
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from topformer_jax.errors import UserError


def base_config() -> ConfigDict:
    """All settings, with the values that most of the official recipes share."""
    config = ConfigDict()
    config.name = ""  # of the recipe; names the work directory
    config.task = "segmentation"  # or "classification"
    config.seed = 0  # of weights, shuffling and augmentation

    config.model = model = ConfigDict()
    model.variant = "tiny"  # tiny, small, base
    model.num_classes = 150
    model.injection = "multi_sum"  # multi_sum, multi_sum_cbr, fuse_sum, fuse_multi
    model.head_channels = config_dict.placeholder(
        int
    )  # channels of injections and head; None: the variant's own
    model.depthwise_head = False  # fuse the head's maps with one weight a channel
    model.drop_path_rate = 0.1  # probability at the last block, 0 at the first
    model.dropout_ratio = 0.1  # probability that a sample loses a channel before the classifier
    model.dtype = "float32"  # of activations: float32, bfloat16, float64
    model.param_dtype = "float32"  # of parameters and BatchNorm statistics: float32, float64
    model.precision = "highest"  # of float32 products: highest (full float32), high, default (TF32, bfloat16)
    model.depthwise_impl = "auto"  # auto, shifted, library: ops/depthwise.py, ops/stem.py

    config.data = data = ConfigDict()
    data.dataset = "ade20k"
    data.source = "folder"  # folder, array_record (scripts/build_dataset.py), shapes (synthetic)
    data.root = ""  # the folder as mmsegmentation lays it out, or what build_dataset.py wrote
    data.class_names = ()  # of data.dataset="custom", in label order; empty: the lines of <root>/classes.txt
    data.reduce_zero_label = False  # label 0 becomes void (255), all others go down by one
    data.crop_size = (512, 512)  # pixels, (height, width)
    data.scale = (2048, 512)  # pixels, (long, short) side that a training image is fitted into
    data.ratio_range = (0.5, 2.0)  # the range of the factor on `scale`
    data.cat_max_ratio = 0.75  # a crop is redrawn while one class has this share of it or more
    data.flip_prob = 0.5  # probability of a horizontal flip
    data.photometric_distortion = True  # brightness, contrast, saturation and hue, each with probability 0.5
    data.skip_unreadable = False  # train on the next example instead of stopping, and count it
    data.num_workers = 4  # processes that make batches, on each host; 0: threads of the training process
    data.prefetch = 4  # batches made ahead, over all workers, or by as many threads (at most one a core)
    data.shapes = ConfigDict()
    data.shapes.train = 2048  # examples
    data.shapes.validation = 64  # examples
    data.shapes.size = 160  # pixels, mean height and width

    config.batch_size = 16  # images a step, over all devices
    config.grad_accum_steps = (
        1  # micro-batches that a step's batch is computed in; BatchNorm sees a micro-batch
    )
    config.ignore_void_in_mean = (
        False  # True divides the loss by the labelled pixels; False, officially, by all
    )
    config.ema_decay = 0.0  # decay of the averaged weights, e.g. 0.9999; 0: off

    config.optimizer = optimizer = ConfigDict()
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.01  # decoupled, times the learning rate
    optimizer.no_decay_norm = False  # leave BatchNorm's scales and biases out of the decay
    optimizer.head_lr_mult = 10.0  # of the learning rate of decode_head
    optimizer.clip_norm = 0.0  # of the gradient of all parameters together; 0: off

    config.schedule = schedule = ConfigDict()
    schedule.steps = 160_000
    schedule.lr = 1.2e-4  # before the head's multiplier
    schedule.min_lr = 0.0  # that the decay ends at
    schedule.power = 1.0  # of the polynomial decay
    schedule.warmup_steps = 1500
    schedule.warmup_ratio = 1e-6  # of the learning rate at step 0

    config.init_from = ""  # a .pth file or a checkpoint folder to start from
    config.init_part = "all"  # of it: all, all_but_classes (another number of classes), backbone

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices that share a batch; -1: all that fsdp leaves
    mesh.fsdp = 1  # devices that share parameters and optimizer state (and the batch too)

    config.log_every = 50  # steps
    config.checkpoint_every = 2000  # steps
    config.max_to_keep = 3  # the newest ones; the best one is kept too
    config.evaluate_every = 16_000  # steps

    config.evaluation = evaluation = ConfigDict()
    evaluation.scale = (2048, 512)  # pixels, (long, short) side that an image is fitted into
    evaluation.size_divisor = 1  # resize again, up to multiples of this many pixels
    evaluation.img_ratios = (1.0,)  # factors on `scale`; the softmaxes of several are averaged
    evaluation.flip = False  # average with the mirrored image's
    evaluation.mode = "whole"  # or "slide": windows of `crop`, `stride` apart, averaged where they overlap
    evaluation.crop_size = (512, 512)  # pixels, (height, width)
    evaluation.stride = (341, 341)  # pixels, (down, across)
    evaluation.per_device_batch_size = 0  # images that a device computes at once; 0: 1 on a CPU, 8 elsewhere
    return config


def ade20k(variant: str, *, size: int = 512) -> ConfigDict:
    """ADE20K, 150 classes: 160k steps of batch 16 on `size` x `size` crops."""
    config = _recipe("ade", variant, 150, "ade20k", "data/ade/ADEChallengeData2016")
    if size != 512:
        config.name += str(size)
    config.data.reduce_zero_label = True
    config.data.crop_size = (size, size)
    config.data.scale = config.evaluation.scale = (2048, size)
    config.evaluation.size_divisor = 32
    config.schedule.lr = 3e-4 if variant == "tiny" else 1.2e-4
    return config.lock()


def cityscapes(variant: str) -> ConfigDict:
    """Cityscapes, 19 classes: batch 8 on 512 x 1024 crops; Tiny and Small 160k steps, Base 80k.

    The official Base has heads 128 wide and fits its training images into 512 x 512; no head is depthwise.
    """
    config = _recipe("cityscapes", variant, 19, "cityscapes", "data/cityscapes")
    config.model.depthwise_head = False
    config.data.crop_size = (512, 1024)
    config.data.scale = config.evaluation.scale = (1024, 512)
    config.batch_size = 8
    config.schedule.lr = 3e-4
    if variant == "base":
        config.model.head_channels = 128
        config.data.scale = (512, 512)
        config.schedule.steps = 80_000
    return config.lock()


def pascal_context(variant: str, *, classes: int) -> ConfigDict:
    """PASCAL Context, 60 classes, or 59 (background is void): 80k steps of batch 16 on 480 x 480 crops."""
    config = _recipe(f"context{classes}", variant, classes, f"context{classes}", "data/VOCdevkit/VOC2010")
    config.data.reduce_zero_label = classes == 59
    config.data.crop_size = (480, 480)
    config.data.scale = config.evaluation.scale = (520, 520)
    config.schedule.steps = 80_000
    return config.lock()


def coco_stuff10k(variant: str) -> ConfigDict:
    """COCO-Stuff 10k, 171 classes: 80k steps of batch 16 on 512 x 512 crops."""
    config = _recipe("cocostuff10k", variant, 171, "cocostuff10k", "data/coco_stuff10k")
    config.data.reduce_zero_label = True
    config.schedule.steps = 80_000
    return config.lock()


def imagenet(variant: str) -> ConfigDict:
    """The ImageNet classifier, 1000 classes at 224 x 224, to convert and to run.

    Its training settings are not the published ones: training knows segmentation alone so far.
    """
    config = _recipe("imagenet", variant, 1000, "imagenet", "data/imagenet")
    config.task = "classification"
    config.data.crop_size = (224, 224)
    return config.lock()


def shapes() -> ConfigDict:
    """TopFormer-T on the synthetic shapes (data/shapes.py): shows the whole thing in minutes, without data."""
    config = _recipe("shapes", "tiny", 10, "shapes", "")
    config.data.source = "shapes"
    config.data.num_workers = 0
    config.data.crop_size = (128, 128)
    config.data.scale = config.evaluation.scale = (176, 160)  # every image's own size
    config.data.ratio_range = (0.75, 1.25)
    # A short run from fresh weights: no regularisation, and one high learning rate for all.
    config.data.photometric_distortion = False
    config.model.drop_path_rate = config.model.dropout_ratio = 0.0
    config.optimizer.head_lr_mult = 1.0
    config.schedule.lr = 3e-3
    config.schedule.warmup_steps = 100
    config.schedule.steps = 2000
    config.log_every = 20
    config.checkpoint_every = config.evaluate_every = 500
    return config.lock()


def _recipe(name: str, variant: str, classes: int, dataset: str, root: str) -> ConfigDict:
    config = base_config()
    config.name = f"topformer_{variant[0]}_{name}"
    config.model.variant = variant
    config.model.num_classes = classes
    config.model.depthwise_head = variant == "tiny"
    config.data.dataset = dataset
    config.data.root = root
    return config


def load(source: str | pathlib.Path | ConfigDict, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Reads a config file (a Python file with `get_config()`) or copies a config, and changes settings.

    Args:
        source: the file's path, or a config.
        overrides: values by dotted key. Text is read as the setting's type: "0.1", "(512, 512)", "true".

    Raises:
        UserError: there is no such file, it has no `get_config`, or a key or a value's type does not exist.
    """
    config = source if isinstance(source, ConfigDict) else _read(pathlib.Path(source))
    config = config.copy_and_resolve_references().lock()
    keys = _flat_keys(config.to_dict())
    known = _flat_keys(base_config().to_dict())
    optional = {key for key, value in known.items() if value is None}
    for key in [*keys, *(overrides or {})]:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "see topformer_jax/config.py for all of them"
            raise UserError(f"there is no setting {key}: {hint}")
    if missing := sorted(set(known) - set(keys)):
        raise UserError(f"the config has no {missing[0]}: start from a recipe of topformer_jax/config.py")
    for key, value in (overrides or {}).items():
        old = keys[key]
        new = _read_value(key, value, old) if isinstance(value, str) and not isinstance(old, str) else value
        if isinstance(old, tuple) and isinstance(new, list):
            new = tuple(new)
        if new is None and key not in optional:
            raise _wrong_type(key, value, old)
        try:
            config.update_from_flattened_dict({key: new})
        except (TypeError, ValueError):
            raise _wrong_type(key, value, old) from None
    _check(_flat_keys(config.to_dict()), known)
    return config


# What numbers make sense, for each of a tuple. Those of the model are checked where it is built.
_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "1 or more",
        lambda number: number >= 1,
        "batch_size grad_accum_steps log_every checkpoint_every max_to_keep evaluate_every schedule.steps "
        "data.crop_size data.scale data.shapes.train data.shapes.validation "
        "evaluation.scale evaluation.crop_size evaluation.stride evaluation.size_divisor",
    ),
    (
        "0 or more",
        lambda number: number >= 0,
        "data.num_workers data.prefetch data.cat_max_ratio evaluation.per_device_batch_size "
        "optimizer.eps optimizer.weight_decay "
        "optimizer.head_lr_mult optimizer.clip_norm schedule.lr schedule.min_lr "
        "schedule.power schedule.warmup_steps",
    ),
    ("more than 0", lambda number: number > 0, "data.ratio_range evaluation.img_ratios"),
    ("0 to 1", lambda number: 0 <= number <= 1, "data.flip_prob schedule.warmup_ratio"),
    (
        "0 or more and less than 1",
        lambda number: 0 <= number < 1,
        "ema_decay optimizer.beta1 optimizer.beta2",
    ),
    ("0 or more and less than 2**32", lambda number: 0 <= number < 2**32, "seed"),
    ("16 or more", lambda number: number >= 16, "data.shapes.size"),
)
_WORDS = {"evaluation.mode": ("whole", "slide")}


def _check(values: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raises a UserError for a value that makes no sense, whatever the data and the devices are."""
    for key, old in base.items():
        if not isinstance(old, tuple):
            continue
        kinds = (int, float) if old and isinstance(old[0], float) else (int,) if old else (str,)
        right = all(isinstance(part, kinds) and not isinstance(part, bool) for part in values[key])
        if not right or (old and not values[key]) or len(old) == 2 != len(values[key]):
            raise _wrong_type(key, values[key], old or ("name", "name"))
    for expected, sensible, keys in _NUMBERS:
        for key in keys.split():
            parts = values[key] if isinstance(values[key], tuple) else (values[key],)
            if not all(abs(part) < math.inf and sensible(part) for part in parts):
                raise UserError(f"{key} is {values[key]}: expected {expected}")
    if values["data.ratio_range"][0] > values["data.ratio_range"][1]:
        raise UserError(
            f"data.ratio_range is {values['data.ratio_range']}: expected the smaller factor first"
        )
    for key, words in _WORDS.items():
        if values[key] not in words:
            raise UserError(f"{key} is {values[key]!r}: expected {' or '.join(words)}")


def _read(path: pathlib.Path) -> ConfigDict:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a file in configs/"
        raise UserError(f"there is no config file {path}: {hint}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        reason = (str(error) or type(error).__name__).strip("'\"").split("\n")[0].split("\\n")[0]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} is no config file: it must define get_config() that returns a ConfigDict")
    return config


def _flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of all settings that hold a value rather than other settings."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _read_value(key: str, text: str, old: Any) -> Any:
    """Text from a command line as a value of the kind that the setting holds."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise _wrong_type(key, text, old) from None


def _wrong_type(key: str, value: Any, old: Any) -> UserError:
    kind = "a number" if old is None else f"a value like {old!r} ({type(old).__name__})"
    return UserError(f"{key} cannot be {value!r}: expected {kind}")
