"""The table of settings: each one's default, meaning with its unit, and legal values.

`base_config`, the checks of `load`, `--help-config` and docs/settings.md come from it.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Legal numbers from `low` to `high`; an open end does not belong to them."""

    low: int | float
    high: int | float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: int | float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        if self.open_low or self.open_high:
            low = f"more than {self.low:,}" if self.open_low else f"{self.low:,} or more"
            return f"{low} and {'less than' if self.open_high else 'at most'} {self.high:,}"
        return f"{self.low:,} to {self.high:,}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table.

    The default gives the type: a tuple of two takes two values, any other tuple any number of them, and None stands
    for "no value" beside the whole numbers in `legal`. One of `names` may stand for the numbers of a tuple.
    """

    default: Any
    meaning: str
    legal: Range | tuple[str, ...] | None = None
    names: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The legal values in words."""
        if isinstance(self.legal, tuple):
            separator = " or " if len(self.legal) == 2 else ", "
            return ("" if len(self.legal) == 2 else "one of ") + separator.join(self.legal)
        if isinstance(self.default, bool):
            return "true or false"
        if self.legal is None:
            return "names" if isinstance(self.default, tuple) else "text"
        each = "each " if isinstance(self.default, tuple) else ""
        words = ("none",) if self.default is None else self.names
        return ", or ".join((f"{each}{self.legal}", *words))


COUNT = Range(1, 10**9)
PROBABILITY = Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)
PIXELS = Range(1, 16_384)
RATIO = Range(0, 100, open_low=True)
# Pixels of the longest side that an image is resized to; a square one of that size takes 3 GB.
LONGEST_SIDE = 32_768
WEIGHTINGS = ("balanced", "enet", "median_frequency")  # see data.class_balance.weigh_classes
DATASETS = (
    *("ade20k", "cityscapes", "context59", "context60", "cocostuff10k", "cocostuff164k", "voc2012", "camvid"),
    *("imagenet", "shapes", "custom"),
)

# fmt: off
GROUPS: dict[str, dict[str, Setting]] = {
    "Run": {
        "name": Setting("", "name of the recipe; the work directory is runs/<name>"),
        "task": Setting("segmentation", "what the model predicts", ("segmentation", "classification")),
        "seed": Setting(0, "seed for initial weights, shuffling, augmentation and dropout", Range(0, 2**32 - 1)),
        "batch_size": Setting(16, "images per step, over all devices", Range(1, 65_536)),
        "grad_accum_steps": Setting(1, "micro-batches per step; BatchNorm sees one at a time", Range(1, 65_536)),
        "ignore_void_in_mean": Setting(
            False, "true: average the loss over labelled pixels; false: over all pixels, as the official code"),
        "ema_decay": Setting(0.0, "decay of the averaged weights per step, e.g. 0.9999; 0: no averages", BELOW_ONE),
        "ema_warmup": Setting(False, "true: ema_decay is at most (1 + step) / (10 + step), for short runs"),
        "init_from": Setting("", "checkpoint to start from, a file or a folder; empty: random weights"),
        "init_part": Setting("all", "weights to read from init_from; all_but_classes is for other classes",
            ("all", "all_but_classes", "backbone")),
        "log_every": Setting(50, "steps between log lines", COUNT),
        "checkpoint_every": Setting(2000, "steps between checkpoints", COUNT),
        "upload_every": Setting(
            60, "seconds between uploads of logs and pictures to a work directory in a bucket", Range(1, 86_400)),
        "max_to_keep": Setting(3, "newest checkpoints to keep, besides the best one", Range(1, 10_000)),
        "evaluate_every": Setting(16_000, "steps between evaluations; 0: ten evaluations in a run", Range(0, 10**9)),
    },
    "Model": {
        "model.variant": Setting("tiny", "size of the network", ("tiny", "small", "base")),
        "model.num_classes": Setting(
            150, "number of classes; at most 255 in segmentation, because labels are bytes", Range(1, 100_000)),
        "model.injection": Setting("multi_sum",
            "how semantics are injected into the tokens (officially muli_sum, muli_sum_cbr, ...); none: no injection",
            ("multi_sum", "multi_sum_cbr", "fuse_sum", "fuse_multi", "none")),
        "model.head_channels": Setting(
            None, "channels of the injections and the head; none: the variant's", Range(1, 4096)),
        "model.depthwise_head": Setting(False, "true: the head fuses its maps with a depthwise convolution"),
        "model.depths": Setting(4, "number of transformer blocks", Range(1, 64)),
        "model.drop_path_rate": Setting(0.1,
            "probability of stochastic depth in the last block; it rises linearly from 0 in the first", BELOW_ONE),
        "model.dropout_ratio": Setting(0.1, "probability of dropping a channel before the last layer", BELOW_ONE),
        "model.bn_momentum": Setting(
            0.1, "weight of a batch in BatchNorm's running statistics, as in PyTorch", PROBABILITY),
        "model.bn_frozen": Setting(
            False, "true: training normalises with BatchNorm's running statistics, and does not change them"),
        "model.dtype": Setting("float32",
            "dtype of activations; BatchNorm, softmax, logits and parameters use at least float32",
            ("float32", "bfloat16", "float64")),
        "model.precision": Setting("highest",
            "precision of float32 products; highest: full float32 on every backend; default: fastest on the backend",
            ("highest", "high", "default")),
        "model.conv_impl": Setting("auto",
            "how convolutions, resizes and pooling are computed; auto: fastest on the device; single_op: one plain "
            "operation per layer, as exporters need", ("auto", "single_op")),
    },
    "Data": {
        "data.dataset": Setting("ade20k", "the data set; custom: your own", DATASETS),
        "data.source": Setting("folder",
            "image and label files, the records of prepare --format array_record, or images drawn on the fly",
            ("folder", "array_record", "shapes")),
        "data.root": Setting("",
            "folder of the data set, as for mmsegmentation or torchvision; for array_record also a bucket"),
        "data.cache": Setting("",
            "folder on each host's disk that array_record shards are copied to first; empty: no copy"),
        "data.class_names": Setting(
            (), "classes of a custom data set, in label order; empty: the lines of <root>/classes.txt"),
        "data.train_split": Setting(
            "", "name of the folder or list to train on, e.g. trainval; empty: the data set's own"),
        "data.validation_split": Setting(
            "", "name of the folder or list to score, e.g. test; empty: the data set's own"),
        "data.reduce_zero_label": Setting(False, "true: label 0 becomes void (255), and all others decrease by one"),
        "data.crop_size": Setting(
            (512, 512), "pixels (height, width) of a training crop, or of a classifier's input", PIXELS),
        "data.scale": Setting(
            (2048, 512), "pixels (long, short side) that a training image is resized to fit into", PIXELS),
        "data.ratio_range": Setting((0.5, 2.0), "range of the random factor for data.scale", RATIO),
        "data.cat_max_ratio": Setting(0.75,
            "redraw a crop, at most 10 times, if one class has this share of its labelled pixels; 1: never",
            PROBABILITY),
        "data.aspect_range": Setting(
            (1.0, 1.0), "range of a random factor on width / height that keeps the area; (1,1): off", Range(0.25, 4)),
        "data.rotation": Setting(0.0,
            "largest random rotation in degrees; what comes from outside the image is void; 0: off",
            Range(0, 180)),
        "data.flip_prob": Setting(0.5, "probability of a horizontal flip", PROBABILITY),
        "data.photometric_distortion": Setting(
            True, "true: change brightness, contrast, saturation and hue, each with probability 0.5"),
        "data.blur_prob": Setting(0.0, "probability of a Gaussian blur of 0.1 to 2 pixels on the crop", PROBABILITY),
        "data.jpeg_prob": Setting(
            0.0, "probability of a JPEG compression of the crop, quality 30 to 95", PROBABILITY),
        "data.balance": Setting(0.0,
            "share of examples chosen by class, each class equally often; the crop holds the class; 0: off",
            PROBABILITY),
        "data.mix": Setting("none",
            "part of another example to paste; cutmix: a box; classmix: half of its classes; paste: a rare class",
            ("none", "cutmix", "classmix", "paste")),
        "data.mix_prob": Setting(0.5, "probability of data.mix for an example", PROBABILITY),
        "data.crop_area": Setting(
            (0.08, 1.0), "classifiers: range of the share of the image in a random crop", PROBABILITY),
        "data.rand_augment": Setting(
            0.0, "classifiers: magnitude of RandAugment (published: 9); 0: off", Range(0, 10)),
        "data.erasing_prob": Setting(0.0,
            "classifiers: probability of replacing a rectangle with noise", PROBABILITY),
        "data.mixup_alpha": Setting(
            0.0, "classifiers: mix pairs of images with a share from Beta(a, a); 0: off", Range(0, 100)),
        "data.skip_unreadable": Setting(
            False, "true: replace a damaged example with the next one and count it; false: stop"),
        "data.num_workers": Setting(
            4, "processes per host that make batches; 0: threads of the training process", Range(0, 512)),
        "data.prefetch": Setting(
            4, "batches that each host prepares ahead; without workers, one thread per batch", Range(0, 1024)),
        "data.shapes.train": Setting(2048, "training examples of the synthetic shapes", Range(1, 10**7)),
        "data.shapes.validation": Setting(64, "validation examples of the synthetic shapes", Range(1, 10**6)),
        "data.shapes.size": Setting(160, "mean height and width of their images, in pixels", Range(16, 4096)),
    },
    "Loss": {
        "loss.class_weight": Setting(
            (),
            "one factor per class for the loss of its pixels; empty: all 1; a name: from the pixels of all training "
            "labels, with a mean of 1 over these pixels", Range(0, 10**6), WEIGHTINGS),
        "loss.label_smoothing": Setting(0.0, "share of the target spread over all classes", BELOW_ONE),
        "loss.ohem_threshold": Setting(
            0.0, "ignore pixels whose true class has this probability or more, e.g. 0.7; 0: use all", PROBABILITY),
        "loss.dice_weight": Setting(
            0.0, "factor of a Dice loss that is added for each image; 0: off", Range(0, 10**6)),
        "loss.jaccard_weight": Setting(
            0.0, "factor of a Jaccard metric loss (JML) that is added for each image; 0: off", Range(0, 10**6)),
        "loss.lovasz_weight": Setting(
            0.0, "factor of the Lovász-softmax loss of each image, which is added; it sorts the pixels for each "
            "class of an image, which is slow on a CPU; 0: off", Range(0, 10**6)),
    },
    "Distillation": {
        "distillation.config": Setting("", "recipe or config file of the teacher; empty: no distillation"),
        "distillation.checkpoint": Setting("", "checkpoint of the teacher, a file or a folder"),
        "distillation.weight": Setting(
            1.0, "weight of temperature**2 * KL(teacher, student), added at each labelled pixel", Range(0, 10**6)),
        "distillation.temperature": Setting(
            1.0, "divisor of both networks' logits before the softmax", Range(0, 1000, open_low=True)),
        "distillation.channel_weight": Setting(
            0.0, "factor of the channel-wise distillation (CWD) of the logits that is added, e.g. 3; 0: off",
            Range(0, 10**6)),
        "distillation.channel_temperature": Setting(
            4.0, "divisor of both networks' logits in the channel-wise distillation", Range(0, 1000, open_low=True)),
        "distillation.jaccard_weight": Setting(
            0.0, "factor of a Jaccard metric loss with the teacher's probabilities that is added; 0: off",
            Range(0, 10**6)),
    },
    "Optimizer": {
        "optimizer.name": Setting("adamw", "optimizer; rmsprop_tf: TensorFlow's form of RMSprop, for ImageNet",
            ("adamw", "rmsprop_tf")),
        "optimizer.beta1": Setting(0.9, "decay of AdamW's mean gradient", BELOW_ONE),
        "optimizer.beta2": Setting(0.999, "decay of AdamW's mean squared gradient", BELOW_ONE),
        "optimizer.eps": Setting(1e-8, "added to AdamW's denominator, or inside the root of RMSprop's", PROBABILITY),
        "optimizer.weight_decay": Setting(
            0.01, "AdamW: decoupled, times the learning rate; RMSprop: added to the gradient", Range(0, 1000)),
        "optimizer.no_decay_norm": Setting(False, "true: no weight decay for BatchNorm's scales and for biases"),
        "optimizer.head_lr_mult": Setting(10.0, "factor for decode_head's learning rate", Range(0, 10**6)),
        "optimizer.freeze": Setting("none",
            "part of the network that is not trained, BatchNorm statistics included; names as in init_part",
            ("none", "token_pyramid", "backbone", "all_but_classes")),
        "optimizer.clip_norm": Setting(0.0, "maximum global norm of the gradient; 0: no limit", Range(0, 10**9)),
    },
    "Schedule": {
        "schedule.steps": Setting(160_000, "number of training steps, if schedule.epochs is 0", COUNT),
        "schedule.epochs": Setting(0,
            "passes over the training pictures, instead of schedule.steps; a flag for that sets this to 0",
            Range(0, 10**6)),
        "schedule.lr": Setting(1.2e-4, "highest learning rate of the backbone", Range(0, 1e30)),
        "schedule.base_batch_size": Setting(0,
            "batch size that schedule.lr is for; with another batch_size, it is scaled linearly; 0: no scaling",
            Range(0, 65_536)),
        "schedule.min_lr": Setting(0.0, "final learning rate of poly and cosine", Range(0, 1e30)),
        "schedule.policy": Setting("poly", "decay of the learning rate; the official code uses poly", ("poly", "step",
            "cosine")),
        "schedule.power": Setting(1.0, "exponent of poly; 1: linear", Range(0, 100)),
        "schedule.decay_steps": Setting(3002, "steps between decays (policy=step)", COUNT),
        "schedule.decay_rate": Setting(0.973, "factor of each decay (policy=step)", PROBABILITY),
        "schedule.warmup_steps": Setting(1500, "steps of linear warm-up", Range(0, 10**9)),
        "schedule.warmup_ratio": Setting(1e-6, "factor for the learning rate at step 0", PROBABILITY),
    },
    "Devices": {
        "mesh.fsdp": Setting(
            1, "devices of a slice that share parameters, optimizer state and the batch", Range(1, 10**6)),
        "mesh.slices": Setting(0, "number of TPU slices; 0: read from the devices", Range(0, 10**4)),
    },
    "Evaluation": {
        "evaluation.scale": Setting(
            (2048, 512), "pixels (long, short side) that an image is resized to fit into", PIXELS),
        "evaluation.crop_pct": Setting(
            0.875, "classifiers: the centre crop by the short side of the resized image; 0.875: 224 of 256 pixels",
            Range(0.25, 1)),
        "evaluation.size_divisor": Setting(1,
            "the resized height and width are rounded up to multiples of this many pixels; 32 for ADE20K", Range(1,
            1024)),
        "evaluation.img_ratios": Setting(
            (1.0,), "factors for evaluation.scale; the probabilities at all scales are averaged", RATIO),
        "evaluation.flip": Setting(False, "true: average with the probabilities of the flipped image"),
        "evaluation.mode": Setting(
            "whole", "the whole image, or windows whose logits are averaged where they overlap", ("whole", "slide")),
        "evaluation.crop_size": Setting((512, 512), "pixels (height, width) of a window (mode=slide)", PIXELS),
        "evaluation.stride": Setting((341, 341), "pixels (down, across) between windows (mode=slide)", PIXELS),
        "evaluation.boundary_pixels": Setting(0,
            "also score the pixels at most this far from another label, e.g. 3; 0: off", Range(0, 256)),
        "evaluation.max_canvases": Setting(4,
            "maximum number of compiled input shapes per ratio; smaller images are padded. More shapes mean less "
            "padding and longer compilation", Range(1, 64)),
        "evaluation.per_device_batch_size": Setting(0,
            "images per device and call; 0: 1 on a CPU, 8 elsewhere (classifiers: 16 and 128)", Range(0, 4096)),
    },
}
# fmt: on
SETTINGS: dict[str, Setting] = {key: row for group in GROUPS.values() for key, row in group.items()}


def as_typed(value: Any) -> str:
    """A setting's value as you write it on the command line (a shell needs quotes around a tuple).

    >>> as_typed((480, 360)), as_typed(True), as_typed(None)
    ('(480,360)', 'true', 'none')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(", ", ",") if isinstance(value, tuple) else str(value)


def as_text() -> str:
    """The table for a terminal, for --help-config."""
    lines = ["Every setting with its default; to change one, add --config.KEY=VALUE."]
    for title, group in GROUPS.items():
        lines += ["", title]
        for key, row in group.items():
            lines += [f"  {key}={as_typed(row.default)}", f"      {row.meaning} [{row.expected}]"]
    return "\n".join(lines)


def as_markdown() -> str:
    """The table as docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "This page lists every setting, as does `--help-config` of any command. The defaults are those of",
        "`config.base_config()`; recipes change some of them. To change a setting, add `--config.KEY=VALUE` to a",
        'command, `load(..., **{"KEY": VALUE})` in Python, or an assignment in a config file.',
        "`python -m topformer_jax.config` prints this page.",
    ]
    for title, group in GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| setting | default | legal values | meaning |",
            "|---|---|---|---|",
        ]
        for key, row in group.items():
            default = as_typed(row.default)
            cells = (f"`{key}`", f"`{default}`" if default else "", row.expected, row.meaning)
            lines.append(f"| {' | '.join(cells)} |".replace("<", "&lt;"))
    return "\n".join(lines)
