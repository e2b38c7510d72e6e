"""The rules of segmentation data sets (see `rules.py`), over what `labels.py` has counted."""

from collections.abc import Iterator

import numpy as np

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.transforms import fit_size
from topformer_jax.inspection import rules
from topformer_jax.inspection.facts import SHOWN_NAMES, Names
from topformer_jax.inspection.labels import BEYOND, LabelInspection, LabelSplit
from topformer_jax.inspection.rules import Finding, Level, list_classes

ZERO_LABEL_IS_VOID = ("ade20k", "context59")  # in the label files of these data sets, and 255 is in none
CITYSCAPES_CLASSES, LARGEST_CITYSCAPES_ID = 19, 33
RAMPED_LABELS = 0.1  # of the labels with borders: fewer are no sign of a resize
RARE = 0.001  # of the labelled pixels


def find(inspection: LabelInspection) -> list[Finding]:
    """All findings; what follows from wrong values, such as classes that do not occur, is not among them."""
    findings = [finding for rule in FILE_RULES for finding in rule(inspection)]
    values = next((found for rule in VALUE_RULES if (found := list(rule(inspection)))), [])
    return findings + (values or [finding for rule in CLASS_RULES for finding in rule(inspection)])


def find_in_sample(inspection: LabelInspection) -> list[Finding]:
    """What some labels of each split tell: no class at all, which their values may explain, or one class."""
    unlabelled = list(unlabelled_split(inspection))
    values = (found for rule in VALUE_RULES if (found := list(rule(inspection))))
    return next(values, unlabelled) if unlabelled else list(one_class(inspection))


# Files


def image_without_label(inspection: LabelInspection) -> Iterator[Finding]:
    """Images without a label: training refuses the folder. Files *_labelIds.png there are Cityscapes' raw labels."""
    for split in inspection.splits.values():
        if not split.listing or not split.listing.unlabelled:
            continue
        raw = [path for path in sorted(split.listing.label_files) if path.endswith("labelIds.png")]
        if raw:
            names = Names(len(raw), raw[:SHOWN_NAMES])
            text = (
                f"{split.name}: {split.listing.unlabelled}; raw ids, not classes, are in {names.of('file')}"
            )
            yield Finding("problem", "raw-cityscapes-ids", text)
        else:
            yield Finding("problem", "image-without-label", f"{split.name}: {split.listing.unlabelled}")


def label_without_image(inspection: LabelInspection) -> Iterator[Finding]:
    """Labels that no image belongs to: not read, but perhaps their images are missing or have other names."""
    for split in inspection.splits.values():
        unused = split.listing.unused if split.listing else ()
        # Where images lack labels too, the names do not match: one thing to mend.
        if unused and split.listing and not split.listing.unlabelled:
            names = Names(len(unused), list(unused[:SHOWN_NAMES])).of("label")
            text = f"{split.name}: {names} without an image: not read; add the images, or remove the labels"
            yield Finding("warning", "label-without-image", text)


def unread_files(inspection: LabelInspection) -> Iterator[Finding]:
    """Files beside a user's own images that are not read, such as HEIC or video."""
    for split in inspection.splits.values():
        unread = split.listing.unread if split.listing and inspection.config.data.dataset == "custom" else ()
        if unread:
            names = Names(len(unread), list(unread[:SHOWN_NAMES])).of("file")
            text = f"{split.name}: {names} among the images not read: save pictures as JPEG or PNG"
            yield Finding("warning", "unread-files", text)


def label_names(inspection: LabelInspection) -> Iterator[Finding]:
    """Labels with an ending that their images do not have."""
    for split in inspection.splits.values():
        if split.listing and split.listing.pairs.pairing:
            yield Finding("note", "label-names", f"{split.name}: {split.listing.pairs.pairing}")


# Values of labels, of both splits. The first rule that finds something explains the values.


def label_palettes(inspection: LabelInspection) -> Iterator[Finding]:
    """A value in several colours: some programs number the colours of each picture anew."""
    for value in range(BEYOND):
        seen: dict[bytes, str] = {}
        for split in inspection.splits.values():
            seen = split.colours.get(value, {}) | seen
        if len(seen) > 1:
            (first, name), (second, other) = sorted(seen.items(), key=lambda item: item[1])[:2]
            text = (
                f"{value} is #{first.hex()} in the palette of {name}, #{second.hex()} in that of {other}: write "
                "class numbers, or masks of colours for prepare custom --from colours"
            )
            yield Finding("problem", "label-palettes", text)
            return


def interpolated_labels(inspection: LabelInspection) -> Iterator[Finding]:
    """Classes that change over single pixels of the values between them (`ramps.py`), at borders of many pairs.

    A resize with interpolation, or a lossy format on the way, invents classes along each border. One thin class
    between others, such as an outline, has one value only and is none of this.
    """
    splits = inspection.splits.values()
    names = sum((split.ramped for split in splits), Names())
    bordered = sum(split.bordered for split in splits)
    pairs = set().union(*(split.ramp_pairs for split in splits))
    between = set().union(*(split.ramp_values for split in splits))
    if names.count and names.count >= RAMPED_LABELS * bordered and len(pairs) >= 3 and len(between) >= 2:
        text = (
            f"single pixels of the values in between where classes meet, in {names.of('label')} of {bordered}: "
            "resized with interpolation, or saved as JPEG; make them again with nearest neighbour"
        )
        yield Finding("problem", "interpolated-labels", text)


def raw_cityscapes_ids(inspection: LabelInspection) -> Iterator[Finding]:
    """Values up to 33 in labels of 19 classes: Cityscapes' own ids, of which 19 are classes, in another order."""
    beyond = _beyond(inspection)
    if (
        inspection.config.model.num_classes == CITYSCAPES_CLASSES
        and len(beyond) >= 3
        and beyond[-1] <= LARGEST_CITYSCAPES_ID
    ):
        text = (
            f"{beyond[0]} to {beyond[-1]} in {_wrong(inspection).of('label')}, where the classes are 0 to 18: raw "
            "Cityscapes ids; use the *_labelTrainIds.png files, which csCreateTrainIdLabelImgs makes"
        )
        yield Finding("problem", "raw-cityscapes-ids", text)


def zero_label_reduced_twice(inspection: LabelInspection) -> Iterator[Finding]:
    """254 in labels: void (255) reduced again. Or reduction of labels that hold 255 and 0, but not the last value.

    Files that need the reduction hold 1 to the number of classes, and 0 for void.
    """
    config, beyond, pixels = inspection.config, _beyond(inspection), _pixels(inspection)
    classes = config.model.num_classes
    if beyond == [254]:
        text = (
            f"254 in {_wrong(inspection).of('label')}, which is void reduced once more: zero-label reduction was "
            "applied twice; make the labels again from the originals"
        )
        yield Finding("problem", "zero-label-reduced-twice", text)
    elif (
        config.data.reduce_zero_label
        and not beyond
        and pixels[IGNORE_LABEL]
        and pixels[0]
        and not pixels[classes]
    ):
        level: Level = "problem" if config.data.dataset in ZERO_LABEL_IS_VOID else "warning"
        splits = inspection.splits.values()
        names = sum((split.holders.get(IGNORE_LABEL, Names()) for split in splits), Names())
        text = (
            f"255 in {names.of('label')}, and {classes}, the last class with reduction, in none: they seem to be "
            "reduced already; --config.data.reduce_zero_label=false"
        )
        yield Finding(level, "zero-label-reduced-twice", text)


def zero_label_not_reduced(inspection: LabelInspection) -> Iterator[Finding]:
    """Labels that count from 1: the value after the last class and no other; or ADE20K's own, which hold no 255."""
    config, beyond, pixels = inspection.config, _beyond(inspection), _pixels(inspection)
    classes = config.model.num_classes
    if config.data.reduce_zero_label:
        return
    if beyond == [classes]:
        void = " and 0 is void" if pixels[0] else ""
        other = f"; or there is a class more: --config.model.num_classes={classes + 1}" if pixels[0] else ""
        text = (
            f"{classes} in {_wrong(inspection).of('label')}, where the classes are 0 to {classes - 1}: perhaps they "
            f"count from 1{void}: --config.data.reduce_zero_label=true{other}"
        )
        yield Finding("problem", "zero-label-not-reduced", text)
    elif config.data.dataset in ZERO_LABEL_IS_VOID and not beyond and pixels.any() and not pixels[255]:
        text = (
            f"labels of {config.data.dataset} without any 255 count from 1, and 0 is void: "
            "--config.data.reduce_zero_label=true"
        )
        yield Finding("problem", "zero-label-not-reduced", text)


def values_beyond_the_classes(inspection: LabelInspection) -> Iterator[Finding]:
    """Values that are neither a class nor 255: the loader stops at them."""
    config, beyond, pixels = inspection.config, _beyond(inspection), _pixels(inspection)
    if not beyond:
        return
    largest = max(split.largest for split in inspection.splits.values())
    classes, first = config.model.num_classes, int(config.data.reduce_zero_label)
    count = int(pixels[beyond].sum())
    if largest > IGNORE_LABEL:
        advice = "values of 16 bits are no class numbers: write 0, 1, ... and 255 for void"
    elif len(beyond) >= 2 and largest > 2 * classes:
        advice = "if they are grey levels of a mask of colours, write the classes' numbers instead"
    else:
        advice = "check data.dataset, model.num_classes and data.reduce_zero_label"
    text = (
        f"{_describe_values(beyond, largest)} in {_wrong(inspection).of('label')}, {count:,} of "
        f"{pixels.sum():,} pixels, where the classes are {first} to {classes - 1 + first} and void is 255: {advice}"
    )
    yield Finding("problem", "values-beyond-classes", text)


# Classes


def label_kinds(inspection: LabelInspection) -> Iterator[Finding]:
    """Labels of several kinds in a user's own set: a number may mean another class in some of them."""
    splits = list(inspection.splits.values())
    first = {kind: names.first[0] for split in splits[::-1] for kind, names in split.kinds.items()}
    if len(first) > 1 and inspection.config.data.dataset == "custom":
        shown = "; ".join(f"{kind}: {name}" for kind, name in list(first.items())[:3])
        text = f"labels of {len(first)} kinds ({shown}): make sure that each number is the same class in all"
        yield Finding("warning", "label-kinds", text)


def unlabelled_split(inspection: LabelInspection) -> Iterator[Finding]:
    """No pixel of any class in a split: its loss is of nothing, its scores are nan."""
    for split in inspection.splits.values():
        if not split.labels or inspection.class_pixels(split.name).any():
            continue
        values = " and ".join(map(str, np.flatnonzero(split.pixels)))
        if inspection.config.data.reduce_zero_label and split.pixels[0]:
            advice = (
                "data.reduce_zero_label makes 0 void: if it is a class, --config.data.reduce_zero_label=false"
            )
        else:
            advice = "255 is void: write the numbers of the classes instead"
        text = f"{split.name}: no pixel of any class, only {values}, in {_count_labels(split)}: {advice}"
        yield Finding("problem", "void-labels", text)


def void_labels(inspection: LabelInspection) -> Iterator[Finding]:
    """Labels that are void everywhere, beside others: nothing is learned from them."""
    for split in inspection.splits.values():
        names = split.void
        if 0 < names.count < split.labels:
            text = f"{split.name}: no class, only void, in {names.of('label')} of {split.labels}: "
            yield Finding("warning", "void-labels", text + "label them, or remove them")


def one_class(inspection: LabelInspection) -> Iterator[Finding]:
    """One class everywhere in train: the network learns to answer it. With 255, often a mask of 0 and 255."""
    present = np.flatnonzero(inspection.class_pixels("train")).tolist()
    if len(present) != 1:
        return
    mask = inspection.void_pixels("train") > 0 and present == [0]
    advice = "if 255 is meant as a class, write its number instead" if mask else "check the labels"
    name, count = inspection.data_set.classes[present[0]], _count_labels(inspection.splits["train"])
    yield Finding("problem", "one-class", f"train: {name} is the only class in {count}: {advice}")


def classes_that_never_occur(inspection: LabelInspection) -> Iterator[Finding]:
    """Classes without a pixel: not learned where they are missing in train, not measured in validation."""
    pixels = {name: inspection.class_pixels(name) for name in inspection.splits}
    untrained, unmeasured = rules.find_absent_classes(inspection, pixels)
    if untrained:
        # The labels may count from 1, and the last class be missing by chance.
        from_one = not pixels["train"][0] and not inspection.config.data.reduce_zero_label
        advice = (
            "if labels count from 1, --config.data.reduce_zero_label=true" if from_one else "check the labels"
        )
        count = len(inspection.data_set.classes)
        text = f"train: no pixel of {list_classes(untrained)} of {count}: not learned; {advice}"
        yield Finding("warning", "classes-never-occur", text)
    if unmeasured:
        text = f"validation: no pixel of {list_classes(unmeasured)} of train: mIoU leaves them out unless predicted"
        yield Finding("warning", "classes-never-occur", text)


# Notes


def small_images(inspection: LabelInspection) -> Iterator[Finding]:
    """Images that are enlarged to fill a crop."""
    data = inspection.config.data
    sizes = inspection.splits["train"].sizes
    small = [size for size in sizes if size[0] < data.crop_size[0] or size[1] < data.crop_size[1]]
    if small:
        factor = max(fit_size(size, data.scale)[0] / size[0] for size in small)
        text = (
            f"train: {sum(sizes[size] for size in small)} of {sizes.total()} images are smaller than data.crop_size="
            f"{data.crop_size}; data.scale={data.scale} makes them up to {factor:.2f} times as large"
        )
        yield Finding("note", "small-images", text)


def turned_images(inspection: LabelInspection) -> Iterator[Finding]:
    """Images that their EXIF orientation turns by 180 degrees, mirrors, or that are square: sizes tell nothing."""
    names = sum((split.turned for split in inspection.splits.values()), Names())
    if names.count:
        text = f"{names.of('image')} turned or mirrored by the EXIF orientation: make sure that the labels are too"
        yield Finding("warning", "turned-images", text)


def rare_classes(inspection: LabelInspection) -> Iterator[Finding]:
    """Classes with few pixels: learned late, and their IoU varies from run to run."""
    pixels = inspection.class_pixels("train")
    shares = pixels / max(pixels.sum(), 1)
    rare = [inspection.data_set.classes[label] for label in np.flatnonzero((shares > 0) & (shares < RARE))]
    if rare:
        text = f"train: {list_classes(rare)} of {len(pixels)} hold less than {RARE:.1%} of the labelled pixels each"
        yield Finding("note", "rare-classes", text)


FILE_RULES = (
    rules.missing_split,
    image_without_label,
    label_without_image,
    unread_files,
    label_names,
    rules.damaged_file,
    rules.dark_images,
    rules.copies_within_a_split,
    rules.copies_between_the_splits,
)
VALUE_RULES = (
    label_palettes,
    interpolated_labels,
    raw_cityscapes_ids,
    zero_label_reduced_twice,
    zero_label_not_reduced,
    values_beyond_the_classes,
)
CLASS_RULES = (
    label_kinds,
    unlabelled_split,
    void_labels,
    one_class,
    classes_that_never_occur,
    small_images,
    turned_images,
    rare_classes,
)


def _pixels(inspection: LabelInspection) -> np.ndarray:
    """Pixels of both splits by stored value."""
    return np.sum([split.pixels for split in inspection.splits.values()], axis=0)


def _beyond(inspection: LabelInspection) -> list[int]:
    """The stored values that are neither a class nor void."""
    return np.flatnonzero((_pixels(inspection) > 0) & (inspection.classes < 0)).tolist()


def _wrong(inspection: LabelInspection) -> Names:
    """The labels that hold such values."""
    return sum((split.wrong for split in inspection.splits.values()), Names())


def _count_labels(split: LabelSplit) -> str:
    """How many labels were read, and of how many."""
    if not split.is_whole:
        return f"{split.labels:,} of {split.available:,} labels"
    return "1 label" if split.labels == 1 else f"{split.labels:,} labels"


def _describe_values(values: list[int], largest: int) -> str:
    """The first values and the last one."""
    numbers = [str(value) for value in values if value < BEYOND] + (
        [f"up to {largest}"] if BEYOND in values else []
    )
    return ", ".join(numbers) if len(numbers) <= 5 else f"{', '.join(numbers[:4])}, ..., {numbers[-1]}"
