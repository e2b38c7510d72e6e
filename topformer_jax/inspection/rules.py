"""What is wrong or suspicious in a data set: rules over the contents of `contents.py`.

A problem stops a training, or makes it learn nonsense. A warning and a note do not. Each text says what was seen,
what it probably means, and what to change.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from topformer_jax import config as config_lib
from topformer_jax.data import codecs
from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import SPLITS
from topformer_jax.data.sources import list_names
from topformer_jax.data.transforms import fit_size
from topformer_jax.inspection.contents import OUT_OF_RANGE, Contents, SplitContents

ZERO_LABEL_IS_VOID = ("ade20k", "context59")  # in the label files of these data sets, which hold no 255
CITYSCAPES_CLASSES, LARGEST_CITYSCAPES_ID = 19, 33
# The soft share of a label's borders is at most 0.08 in clean sets (CamVid, shapes), 0.3 or more after a resize.
SOFT_SHARE = 0.2
MIN_BORDERS = 20  # in a label, for a share of them to say anything
SOFT_LABELS = 0.1  # of the labels with borders: fewer are no sign of a resize
RARE = 0.001  # of the labelled pixels
UNEVEN = 20  # times as many images in the largest class as in the smallest one

Level = Literal["problem", "warning", "note"]


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    rule: str
    text: str


Rule = Callable[[Contents], Iterator[Finding]]


def find(contents: Contents) -> list[Finding]:
    """All findings. Wrong values hide what follows from them, such as classes that do not occur."""
    findings = [finding for rule in FILE_RULES for finding in rule(contents)]
    if contents.is_classification and not contents.splits["train"].is_whole:
        return findings  # the first examples are of the first classes
    explained = [] if contents.is_classification else explain_values(contents)
    return findings + (explained or [finding for rule in CLASS_RULES for finding in rule(contents)])


def explain_values(contents: Contents) -> list[Finding]:
    """What the first rule finds that explains the values in the labels of both splits."""
    return next((found for rule in VALUE_RULES if (found := list(rule(contents)))), [])


# Files


def split_files(contents: Contents) -> Iterator[Finding]:
    """Splits that are missing, and files in them that are not read, not unique, or rotated unseen."""
    for split in contents.splits.values():
        is_empty = not (split.refusal or split.available or split.unlabelled)
        is_raw = "labelIds.png" in split.unlabelled
        first: dict[bytes, str] = {}
        pairs = [(e.image, first.setdefault(e.digest, e.image)) for e in split.examples if e.digest]
        copies = [f"{name} = {other}" for name, other in pairs if name != other]
        unused = " without an image: not read; add the images, or remove the labels"
        unread = " not read: save pictures as JPEG or PNG, a classifier's directly in the folder of a class"
        turned = [example.image for example in split.examples if example.is_turned]
        advice = " turned or mirrored by the EXIF orientation: make sure that the labels are too"
        texts: tuple[tuple[Level, str, str], ...] = (
            ("problem", "missing-split", split.refusal),
            ("problem", "missing-split", "no examples: build it again" if is_empty else ""),
            ("problem", "raw-cityscapes-ids" if is_raw else "image-without-label", split.unlabelled),
            ("warning", "label-without-image", list_names(split.unused, "label", unused)),
            ("warning", "unread-files", list_names(split.unread, "file", unread)),
            ("warning", "duplicates", list_names(copies, "copy", " of an image: remove all but one")),
            ("warning", "turned-images", list_names(turned, "image", advice)),
            ("note", "label-names", split.pairing),
        )
        yield from (Finding(level, rule, f"{split.name}: {text}") for level, rule, text in texts if text)


def damaged_files(contents: Contents) -> Iterator[Finding]:
    """Files that the loader refuses: empty, cut off, damaged, not an image, masks of colours, sizes that differ."""
    for split in contents.splits.values():
        names: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for fault in (fault for example in split.examples for fault in example.faults):
            names[fault.rule, fault.words].append(fault.name)
        # Only training skips them, and it stops if there are no others.
        is_intact = any(not example.faults for example in split.examples)
        survives = contents.config.data.skip_unreadable and split.name == "train" and is_intact
        for (rule, words), (first, *others) in names.items():
            more = f" (and {list_names(others, 'other')})" if others else ""
            name = "" if rule == "unreadable-file" else f"{first} "
            yield Finding("warning" if survives else "problem", rule, f"{split.name}: {name}{words}{more}")


def copies_between_the_splits(contents: Contents) -> Iterator[Finding]:
    """Images of validation that are trained on: the scores tell less than they seem to."""
    train, validation = (contents.splits[name].examples for name in SPLITS)
    trained = {each.digest: each.image for each in reversed(train) if each.digest}
    pairs = [f"{each.image} = {trained[each.digest]}" for each in validation if each.digest in trained]
    if pairs:
        text = list_names(pairs, "image", " in both splits: scores will be too high; remove one of each")
        yield Finding("warning", "duplicates-between-splits", text)


def dark_images(contents: Contents) -> Iterator[Finding]:
    """Images of 16 bits, of which none uses the highest ones, such as a camera's 12 bits that were not scaled."""
    deep = [each for split in contents.splits.values() for each in split.examples if each.depth]
    if words := codecs.describe_depth(max((each.depth for each in deep), default=0)):
        text = list_names([each.image for each in deep], "image", f" of {words}")
        yield Finding("problem", "dark-images", text)


# Values of labels, of both splits together


def label_palettes(contents: Contents) -> Iterator[Finding]:
    """A value in several colours: some programs number the colours of each picture separately."""
    seen: dict[int, tuple[bytes, str]] = {}
    for label in contents.labels:
        for value in label.pixels:
            colour = label.palette[3 * value : 3 * value + 3]
            if colour and seen.setdefault(value, (colour, label.label))[0] != colour:
                first, name = seen[value]
                text = (
                    f"{value} is #{first.hex()} in the palette of {name}, #{colour.hex()} in that of {label.label}: "
                    "write class numbers, or masks of colours for prepare custom --from colours"
                )
                yield Finding("problem", "label-palettes", text)
                return


def interpolated_labels(contents: Contents) -> Iterator[Finding]:
    """Soft borders between many pairs of classes: a resize with interpolation, or a lossy format, invents classes.

    One thin class between others, such as an outline, has one value only and is none of this.
    """
    counts = [(each, each.borders.soft, each.borders.soft + each.borders.hard) for each in contents.labels]
    bordered = [row for row in counts if row[2] >= MIN_BORDERS]
    soft = [label for label, count, total in bordered if count >= SOFT_SHARE * total]
    pairs = set().union(*(each.borders.pairs for each in soft))
    between = set().union(*(each.borders.between for each in soft))
    if soft and len(soft) >= SOFT_LABELS * len(bordered) and len(pairs) >= 3 and len(between) >= 2:
        names = list_names([each.label for each in soft], "label")
        text = (
            f"where classes meet, {names} of {len(bordered)} have pixels of values in between: they were resized "
            "with interpolation or saved as JPEG; make them again with nearest neighbour"
        )
        yield Finding("problem", "interpolated-labels", text)


def wrong_values(contents: Contents) -> Iterator[Finding]:
    """Values that are neither a class nor void: the loader stops at them."""
    wrong, classes, pixels = contents.wrong_values, contents.config.model.num_classes, contents.pixels
    if not wrong:
        return
    first = int(contents.config.data.reduce_zero_label)
    largest = max(label.largest for label in contents.labels)
    is_cityscapes = classes == CITYSCAPES_CLASSES and len(wrong) >= 3 and wrong[-1] <= LARGEST_CITYSCAPES_ID
    ids = "raw Cityscapes ids; use the *_labelTrainIds.png files, which csCreateTrainIdLabelImgs makes"
    reduced = "void (255) that was reduced twice, to 254; make the labels again from the originals"
    from_one = "perhaps they count from 1: --config.data.reduce_zero_label=true"
    if pixels[0]:
        from_one += f", which makes 0 void; or add a class: --config.model.num_classes={classes + 1}"
    deep = "values of 16 bits are no class numbers: write 0, 1, ... and 255 for void"
    grey = "if they are grey levels of a mask of colours, write the classes' numbers instead"
    explanations = (  # the first one that holds is given
        (is_cityscapes, "raw-cityscapes-ids", ids),
        (wrong == [254], "zero-label-reduced-twice", reduced),
        (wrong == [classes] and not first, "zero-label-not-reduced", from_one),
        (largest > IGNORE_LABEL, "values-beyond-classes", deep),
        (len(wrong) >= 2 and largest > 2 * classes, "values-beyond-classes", grey),
        (True, "values-beyond-classes", "check data.dataset, model.num_classes and data.reduce_zero_label"),
    )
    rule, advice = next((rule, advice) for holds, rule, advice in explanations if holds)
    numbers = [f"up to {largest}" if value == OUT_OF_RANGE else str(value) for value in wrong]
    if len(numbers) > 5:
        numbers[4:-1] = ["..."]
    count, names = sum(pixels[value] for value in wrong), list_names(contents.labels_with(*wrong), "label")
    text = (
        f"{', '.join(numbers)} in {names}, {count:,} of {pixels.total():,} pixels, where the classes are {first} to "
        f"{classes - 1 + first} and void is 255: {advice}"
    )
    yield Finding("problem", rule, text)


def zero_label(contents: Contents) -> Iterator[Finding]:
    """Labels with 255, 0 and not the last value that are reduced, or ADE20K's own, without 255, that are not."""
    data, pixels, classes = contents.config.data, contents.pixels, contents.config.model.num_classes
    needs_reduction = data.dataset in ZERO_LABEL_IS_VOID
    if data.reduce_zero_label and pixels[IGNORE_LABEL] and pixels[0] and not pixels[classes]:
        names = list_names(contents.labels_with(255), "label")
        text = (
            f"255 in {names}, and {classes}, the last class before reduction, in none: they seem to be reduced "
            "already; --config.data.reduce_zero_label=false"
        )
        yield Finding("problem" if needs_reduction else "warning", "zero-label-reduced-twice", text)
    elif needs_reduction and not data.reduce_zero_label and pixels and not pixels[IGNORE_LABEL]:
        text = f"labels of {data.dataset} without any 255 count from 1, and 0 is void"
        yield Finding("problem", "zero-label-not-reduced", f"{text}: --config.data.reduce_zero_label=true")


# Classes


def label_kinds(contents: Contents) -> Iterator[Finding]:
    """Labels of several kinds in a user's own set: a number may mean another class in some of them."""
    first: dict[str, str] = {}
    for label in contents.labels:
        first.setdefault(label.kind, label.label)
    if len(first) > 1 and contents.config.data.dataset == "custom":
        shown = "; ".join(f"{kind}: {name}" for kind, name in list(first.items())[:3])
        text = f"labels of {len(first)} kinds ({shown}): make sure that each number is the same class in all"
        yield Finding("warning", "label-kinds", text)


def void_labels(contents: Contents) -> Iterator[Finding]:
    """Labels without a pixel of any class: nothing is learned from them. If all are such, the scores are nan."""
    for split in contents.splits.values():
        void = [each.label for each in split.labels if contents.class_of.keys().isdisjoint(each.pixels)]
        if void and len(void) < len(split.labels):
            text = f"{list_names(void, 'label')} of {len(split.labels)}: label them, or remove them"
            yield Finding("warning", "void-labels", f"{split.name}: no class, only void, in {text}")
        elif void:
            values = " and ".join(map(str, sorted(split.pixels)))
            advice = "255 is void: write the numbers of the classes instead"
            if contents.config.data.reduce_zero_label and split.pixels[0]:
                way_out = "--config.data.reduce_zero_label=false"
                advice = f"0 is void by data.reduce_zero_label: for a class, {way_out}"
            text = f"no pixel of any class, only {values}, in {_count_labels(split, 'label')}: {advice}"
            yield Finding("problem", "void-labels", f"{split.name}: {text}")


def one_class(contents: Contents) -> Iterator[Finding]:
    """One class everywhere in train: the network learns to predict it always. With 255, often a mask of 0 and 255."""
    train = contents.splits["train"]
    present = np.flatnonzero(contents.per_class(train.pixels)).tolist()
    if len(present) != 1:
        return
    noun, advice = "label", "check the labels"
    if contents.is_classification:
        noun, advice = "image", "add images of the others"
    elif present == [0] and any(train.pixels[value] for value in contents.void):
        advice = "if 255 is meant as a class, write its number instead"
    count = _count_labels(train, noun)
    text = f"train: {contents.data_set.classes[present[0]]} is the only class in {count}: {advice}"
    yield Finding("problem", "one-class", text)


def absent_classes(contents: Contents) -> Iterator[Finding]:
    """Classes that do not occur: not learned if train lacks them, not measured if validation does."""
    train, validation = (contents.splits[name] for name in SPLITS)
    trained, measured = (contents.per_class(split.pixels) > 0 for split in (train, validation))
    names, noun = np.array(contents.data_set.classes), "image" if contents.is_classification else "pixel"
    if trained.sum() <= 1:  # which is another finding
        return
    if train.is_whole and not trained.all():
        classes = list_names(names[~trained].tolist(), "class", f" of {len(names)}", shown=5)
        advice = "add their images" if contents.is_classification else "check the labels"
        if not (contents.is_classification or trained[0] or contents.config.data.reduce_zero_label):
            advice = "if labels count from 1, --config.data.reduce_zero_label=true"
        text = f"train: no {noun} of {classes}: not learned; {advice}"
        yield Finding("warning", "classes-never-occur", text)
    if validation.is_whole and measured.any() and (trained & ~measured).any():
        classes = list_names(names[trained & ~measured].tolist(), "class", " of train", shown=5)
        text = f"validation: no {noun} of {classes}: the scores say nothing about them"
        yield Finding("warning", "classes-never-occur", text)


def small_images(contents: Contents) -> Iterator[Finding]:
    """Images that are enlarged to fill a crop."""
    data = contents.config.data
    sizes = [example.size for example in contents.splits["train"].examples if example.size]
    small = [size for size in sizes if size[0] < data.crop_size[0] or size[1] < data.crop_size[1]]
    if small and not contents.is_classification:
        factor = max(fit_size(size, data.scale)[0] / size[0] for size in small)
        text = (
            f"train: {len(small)} of {len(sizes)} images are smaller than data.crop_size={data.crop_size}; "
            f"data.scale={data.scale} makes them up to {factor:.2f} times as large"
        )
        yield Finding("note", "small-images", text)


def rare_classes(contents: Contents) -> Iterator[Finding]:
    """Classes with few pixels: learned late, and their IoU varies from run to run."""
    counts, names = contents.per_class(contents.splits["train"].pixels), np.array(contents.data_set.classes)
    rare = names[(counts > 0) & (counts < RARE * counts.sum())].tolist()
    if rare and not contents.is_classification:
        classes = list_names(rare, "class", f" of {len(names)}", shown=5)
        text = f"train: {classes} hold less than {RARE:.1%} of the labelled pixels each"
        yield Finding("note", "rare-classes", text)


def uneven_classes(contents: Contents) -> Iterator[Finding]:
    """Classes with few images beside those with many: learned late, and seldom predicted."""
    train, names = contents.splits["train"], contents.data_set.classes
    if contents.is_classification and train.pixels:
        ordered = train.pixels.most_common()
        (largest, most), (smallest, fewest) = ordered[0], ordered[-1]
        if most > UNEVEN * fewest:
            text = f"train: {names[largest]} has {most:,} images, {names[smallest]} {fewest:,}"
            advice = "classes with few are learned late, and seldom predicted"
            yield Finding("note", "uneven-classes", f"{text}: {advice}")


def training_length(contents: Contents) -> Iterator[Finding]:
    """Epochs as steps, and a warm-up that does not end."""
    epochs, pictures = contents.config.schedule.epochs, contents.splits["train"].available
    if not pictures:
        return
    config = config_lib.resolve_schedule(contents.config, pictures)
    if epochs:
        text = f"{epochs} epochs of {pictures} pictures = {config.schedule.steps} steps of {config.batch_size} images"
        yield Finding("note", "length", text)
    if text := config_lib.explain_warmup(config.schedule):
        yield Finding("warning", "warm-up", text)


def _count_labels(split: SplitContents, noun: str) -> str:
    count, plural = len(split.labels), f"{noun}s"
    if not split.is_whole:
        return f"{count:,} of {split.available:,} {plural}"
    return f"{count:,} {noun if count == 1 else plural}"


FILE_RULES: tuple[Rule, ...] = (
    *(split_files, damaged_files, copies_between_the_splits, dark_images, training_length),
)
# The first rule that finds something explains the values.
VALUE_RULES: tuple[Rule, ...] = (label_palettes, interpolated_labels, wrong_values, zero_label)
CLASS_RULES: tuple[Rule, ...] = (
    *(label_kinds, void_labels, one_class, absent_classes),
    *(small_images, rare_classes, uneven_classes),
)
