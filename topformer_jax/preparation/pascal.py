"""PASCAL Context and PASCAL VOC 2012 with the Semantic Boundaries Dataset (SBD)."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated

import msgspec

from topformer_jax.preparation import labels
from topformer_jax.preparation.archives import Archive
from topformer_jax.preparation.writer import Convert, Plan, Task, plan_of
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

# The 59 classes' numbers among PASCAL Context's 459 labels (labels.txt), in the order of the classes.
_CONTEXT_IDS = """
2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187 189 207 220 232
258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420 424 427 440 445 454 458
"""
_CONTEXT_CLASSES = {number: label for label, number in enumerate(map(int, _CONTEXT_IDS.split()), 1)}
_CONTEXT_SPLITS = {"train": "train", "validation": "val"}


class _Picture(msgspec.Struct):
    image_id: int
    file_name: str
    phase: str
    height: Annotated[int, msgspec.Meta(ge=1, le=1 << 15)]
    width: Annotated[int, msgspec.Meta(ge=1, le=1 << 15)]


class _Runs(msgspec.Struct):
    counts: str | list[int]


class _Mask(msgspec.Struct):
    image_id: int
    category_id: int
    segmentation: _Runs


class _Detail(msgspec.Struct):
    """The annotations of PASCAL in Detail."""

    images: list[_Picture]
    annos_segmentation: list[_Mask]


def plan_context(voc: Archive, annotations: Archive) -> Plan:
    """PASCAL Context from trainval_merged.json: the labels and lists that mmsegmentation's converter makes."""
    (member,) = annotations.members.values()
    content = files.read_json(member.read(), _Detail, member.where)
    pictures = {row.image_id: row for row in content.images if row.phase in _CONTEXT_SPLITS.values()}
    masks: dict[int, list[tuple[int, str | list[int]]]] = {}
    for mask in content.annos_segmentation:
        if mask.image_id in pictures:
            label = _context_class(mask.category_id, member.where)
            masks.setdefault(mask.image_id, []).append((label, mask.segmentation.counts))
    tasks, lists = [], {}
    for split, word in _CONTEXT_SPLITS.items():
        mine = {row.file_name.removesuffix(".jpg"): row for row in pictures.values() if row.phase == word}
        lists[word] = sorted(mine)
        for name in lists[word]:
            size = mine[name].height, mine[name].width
            convert = partial(labels.draw_runs, size, masks.get(mine[name].image_id, []))
            tasks += _context_pair(voc, split, name, b"", convert, f"{name} in {member.where}")
    return plan_of(tasks + _make_lists("SegmentationContext", lists))


def plan_context_of_matrices(voc: Archive, matrices: Archive) -> Plan:
    """PASCAL Context from trainval.tar.gz, which holds 459 labels; VOC 2010's own lists divide it."""
    table = dict.fromkeys(range(460), 0) | _CONTEXT_CLASSES
    convert = partial(labels.map_matrix, "LabelMap", table)
    lists = {word: sorted(voc.lines(f"ImageSets/Main/{word}.txt")) for word in _CONTEXT_SPLITS.values()}
    splits = {name: split for split, word in _CONTEXT_SPLITS.items() for name in lists[word]}

    def list_tasks() -> Iterator[Task]:
        yield from _make_lists("SegmentationContext", lists)
        for path, data in matrices.read_all([f"trainval/{name}.mat" for name in splits]):
            name = path.removeprefix("trainval/").removesuffix(".mat")
            yield from _context_pair(voc, splits[name], name, data, convert, matrices[path].where)

    size = sum(voc[f"JPEGImages/{name}.jpg"].size + matrices[f"trainval/{name}.mat"].size for name in splits)
    return Plan(list_tasks(), size)


def plan_voc2012(voc: Archive, sbd: Archive) -> Plan:
    """PASCAL VOC 2012 and SBD: "trainaug" is all of both but VOC's validation images.

    VOC's own label is taken where there is one: it has void borders, SBD's has not.
    """
    original = {word: voc.lines(f"ImageSets/Segmentation/{word}.txt") for word in ("train", "val")}
    extra = {name for word in ("train", "val") for name in sbd.lines(f"dataset/{word}.txt")}
    extra -= {*original["train"], *original["val"]}
    lists = {
        "train": sorted(original["train"]),
        "trainaug": sorted({*original["train"], *extra}),
        "aug": sorted(extra),
        "val": sorted(original["val"]),
    }
    tasks = _make_lists("Segmentation", lists)
    for split, word in (("train", "trainaug"), ("validation", "val")):
        tasks += [
            Task(path, split, "image", voc[path])
            for name in lists[word]
            for path in [f"JPEGImages/{name}.jpg"]
        ]
    for split, word in (("train", "train"), ("validation", "val")):
        for name in lists[word]:
            source = voc[f"SegmentationClass/{name}.png"]
            tasks.append(Task(f"SegmentationClassAug/{name}.png", split, "label", source))

    def list_tasks() -> Iterator[Task]:
        yield from tasks
        for path, data in sbd.read_all([f"dataset/cls/{name}.mat" for name in lists["aug"]]):
            name = path.removeprefix("dataset/cls/").removesuffix(".mat")
            label, where = f"SegmentationClassAug/{name}.png", sbd[path].where
            yield Task(label, "train", "label", data, labels.read_boundaries_benchmark, where)

    return Plan(
        list_tasks(), plan_of(tasks).size + sum(sbd[f"dataset/cls/{name}.mat"].size for name in extra)
    )


def _context_pair(
    voc: Archive, split: str, name: str, data: bytes, convert: Convert, where: str
) -> list[Task]:
    path = f"JPEGImages/{name}.jpg"
    return [
        Task(path, split, "image", voc[path]),
        Task(f"SegmentationClassContext/{name}.png", split, "label", data, convert, where),
    ]


def _context_class(number: int, where: str) -> int:
    if number not in _CONTEXT_CLASSES:
        raise UserError(f"{where} holds category {number}, which is none of PASCAL Context's 59 classes")
    return _CONTEXT_CLASSES[number]


def _make_lists(folder: str, lists: Mapping[str, list[str]]) -> list[Task]:
    """The files that list the names of the splits."""
    return [
        Task(f"ImageSets/{folder}/{word}.txt", "", "list", "".join(f"{name}\n" for name in names).encode())
        for word, names in lists.items()
    ]
