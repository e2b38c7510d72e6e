"""All settings with their defaults, and the recipes that the files in configs/ call; each is a locked config."""

from ml_collections import ConfigDict, config_dict

from topformer_jax.config.settings import SETTINGS

IMAGENET_IMAGES = 1_281_167  # of the training split


def base_config() -> ConfigDict:
    """All settings with the defaults of the table: the values that most of the official recipes share."""
    config = ConfigDict()
    for key, setting in SETTINGS.items():
        *groups, name = key.split(".")
        place = config
        for group in groups:
            if group not in place:
                place[group] = ConfigDict()
            place = place[group]
        if setting.default is None:
            place[name] = config_dict.placeholder(int)
        elif setting.names:
            place[name] = config_dict.FieldReference(setting.default, field_type=object)  # a tuple or a name
        else:
            place[name] = setting.default
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


def imagenet(variant: str, *, optimizer: str = "rmsprop_tf") -> ConfigDict:
    """The ImageNet classifier, 1000 classes at 224 x 224, batch 1024.

    RMSprop is the published recipe, 600 epochs, without label smoothing and mixup, which it leaves open. `"adamw"` is
    a cosine of 300 epochs like DeiT's.
    """
    config = _recipe("imagenet", variant, 1000, "imagenet", "data/imagenet")
    config.task = "classification"
    config.batch_size = 1024
    config.ema_decay = 0.9999
    config.model.dropout_ratio = 0.2
    config.data.crop_size = (224, 224)
    config.data.rand_augment = 9.0
    config.data.erasing_prob = 0.2
    config.optimizer.no_decay_norm = True
    config.optimizer.name = optimizer
    epoch = IMAGENET_IMAGES // config.batch_size
    if optimizer == "rmsprop_tf":
        config.optimizer.eps = 1e-3
        config.optimizer.weight_decay = 2e-5
        config.schedule.policy = "step"
        config.schedule.lr = 0.064
        config.schedule.decay_steps = int(2.4 * epoch)
        config.schedule.steps, config.schedule.warmup_steps = 600 * epoch, 10 * epoch
    else:
        config.name += "_adamw"
        config.optimizer.weight_decay = 0.05
        config.loss.label_smoothing = 0.1
        config.data.mixup_alpha = 0.2
        config.schedule.policy = "cosine"
        config.schedule.lr, config.schedule.min_lr = 1e-3, 1e-5
        config.schedule.steps, config.schedule.warmup_steps = 300 * epoch, 5 * epoch
    config.schedule.warmup_ratio = 1e-6 / config.schedule.lr
    config.checkpoint_every, config.evaluate_every = epoch, 5 * epoch
    return config.lock()


# log(1.02 + a class's share of the labelled training pixels) ** -0.75, scaled to a mean of 1 over the pixels.
CAMVID_WEIGHTS = (0.89, 0.73, 3.41, 0.6, 1.91, 1.24, 3.26, 3.29, 1.66, 3.75, 4.18)


def camvid(variant: str) -> ConfigDict:
    """CamVid, 11 classes, 480 x 360 images, from random weights: 10,000 steps of batch 4, 109 epochs."""
    config = _recipe("camvid", variant, 11, "camvid", "data/camvid")
    config.batch_size = 4  # with so few images, many small steps learn more than half as many large ones
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.ignore_void_in_mean = True
    config.loss.class_weight = CAMVID_WEIGHTS
    config.model.drop_path_rate = 0.0
    config.data.crop_size = (360, 480)
    config.data.scale = config.evaluation.scale = (480, 360)
    config.data.ratio_range = (0.75, 2.0)
    config.data.cat_max_ratio = 1.0
    config.optimizer.head_lr_mult = 1.0
    config.optimizer.weight_decay = 0.02
    config.schedule.lr = 3e-3
    config.schedule.warmup_steps = 150
    config.schedule.steps = 10_000
    config.log_every = 100
    config.checkpoint_every = config.evaluate_every = 2000
    return config.lock()


def camvid_fine_tune(variant: str, *, init_from: str) -> ConfigDict:
    """CamVid from ADE20K weights: 5,000 steps of batch 4, 54 epochs, images at twice their size."""
    config = camvid(variant).unlock()
    config.name += "_finetune"
    config.init_from, config.init_part = init_from, "all_but_classes"
    config.loss.jaccard_weight = 1.0
    config.data.crop_size = (480, 640)
    config.data.scale = config.evaluation.scale = (960, 720)
    config.data.ratio_range = (0.6, 1.7)
    config.data.mix = "paste"
    config.schedule.lr = 1e-3
    config.schedule.warmup_steps = 100
    config.schedule.steps = 5000
    config.checkpoint_every = config.evaluate_every = 1000
    return config.lock()


def fine_tune(variant: str, *, classes: int, root: str, init_from: str) -> ConfigDict:
    """50 to 5,000 pictures of your own, from ADE20K weights: 50 epochs of batch 4 on 512 x 512 crops.

    >>> settings = fine_tune("tiny", classes=3, root="data/streets", init_from="TopFormer-T.pth")
    >>> settings.schedule.epochs, settings.schedule.lr
    (50, 0.001)
    """
    config = _recipe("finetune", variant, classes, "custom", root)
    config.init_from, config.init_part = init_from, "all_but_classes"
    config.batch_size = 4
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.ignore_void_in_mean = True
    config.loss.class_weight = "enet"
    config.loss.jaccard_weight = 1.0
    config.model.drop_path_rate = 0.0
    config.optimizer.head_lr_mult = 1.0  # the head, too, is trained already, except for its last layer
    config.schedule.lr = 1e-3
    config.schedule.warmup_steps = 100
    config.schedule.epochs = 50
    config.evaluate_every = 0
    config.log_every, config.checkpoint_every = 20, 500
    return config.lock()


def shapes() -> ConfigDict:
    """TopFormer-T on the synthetic shapes (data/shapes.py): shows the whole thing in minutes, without data."""
    config = _recipe("shapes", "tiny", 10, "shapes", "")
    config.data.source = "shapes"
    config.data.num_workers = 0
    config.data.crop_size = (128, 128)
    config.data.scale = config.evaluation.scale = (176, 160)  # every image's own size
    config.data.ratio_range = (0.75, 1.25)
    # A short run from random weights: no regularisation, and one high learning rate for all.
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
