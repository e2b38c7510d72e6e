"""COCO-Stuff 10k and 164k: 171 classes of 182 ids, as mmsegmentation numbers them."""

from functools import partial

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.preparation import labels
from topformer_jax.preparation.archives import Archive
from topformer_jax.preparation.writer import Plan, Task, plan_of

# Ids from 1 (COCO-Stuff's labels.txt) that no pixel has: street sign, hat, shoe, eye glasses, plate, mirror, window,
# desk, door, blender, hair brush. The other 171 are the classes, in this order.
_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
_CLASS_IDS = [number for number in range(1, 183) if number not in _UNUSED]


def plan_10k(archive: Archive) -> Plan:
    """COCO-Stuff 10k: labels 1 to 171; 0 is void (`data.reduce_zero_label`)."""
    table = dict.fromkeys(range(183), 0) | {number: label for label, number in enumerate(_CLASS_IDS, 1)}
    convert = partial(labels.map_matrix, "S", table)
    tasks = []
    for split, word in (("train", "train"), ("validation", "test")):
        for name in sorted(archive.lines(f"imageLists/{word}.txt")):
            image, label = f"images/{word}2014/{name}.jpg", f"annotations/{word}2014/{name}_labelTrainIds.png"
            tasks.append(Task(image, split, "image", archive[f"images/{name}.jpg"]))
            tasks.append(Task(label, split, "label", archive[f"annotations/{name}.mat"], convert))
    return plan_of(tasks)


def plan_164k(train: Archive, validation: Archive, maps: Archive) -> Plan:
    """COCO-Stuff 164k: the maps hold ids less one, 255 for void; labels 0 to 170."""
    table = dict.fromkeys((*range(182), IGNORE_LABEL), IGNORE_LABEL)
    table |= {number - 1: label for label, number in enumerate(_CLASS_IDS)}
    convert = partial(labels.map_values, table)
    tasks = []
    for split, word, images in (("train", "train2017", train), ("validation", "val2017", validation)):
        for name in images.names(f"{word}/", ".jpg"):
            image, label = f"images/{word}/{name}.jpg", f"annotations/{word}/{name}_labelTrainIds.png"
            tasks.append(Task(image, split, "image", images[f"{word}/{name}.jpg"]))
            tasks.append(Task(label, split, "label", maps[f"{word}/{name}.png"], convert))
    return plan_of(tasks)
