"""A user's own annotations: labelme files, COCO panoptic files, masks in colours; they become a custom data set.

Pictures in a folder named train or val (training, validation) belong to that split; without such folders a hash of
the name divides them, so that a picture stays in its split when others are added.
"""

import base64
import hashlib
import pathlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.data.catalog import CUSTOM_LAYOUT
from topformer_jax.data.codecs import JPEG, decode_image, read_image_size
from topformer_jax.errors import UserError
from topformer_jax.preparation import labels
from topformer_jax.preparation.archives import Archive, Member
from topformer_jax.preparation.writer import Convert, Plan, Task, plan_of

CLASSES = "classes.txt"
VOID = "void"  # the name, in a list of colours, of what is no class
_SPLITS = {"train": "train", "training": "train", "val": "validation", "validation": "validation"}
_SPLIT_FOLDER = re.compile(rf"(?:panoptic_)?({'|'.join(_SPLITS)})\d*")  # train, val2017, panoptic_val2017
_FOLDERS = {"train": "train", "validation": "val"}


def plan_labelme(source: Archive, validation: float, background: str) -> Plan:
    """Files of labelme, each beside its picture or with it inside. classes.txt may give the order of the classes."""
    contents = {
        name: labels.read_json(source[name].read(), source[name].where)
        for name in source.members
        if name.endswith(".json")
    }
    found = set()
    for name, content in contents.items():
        with labels.expect_fields(source[name].where):
            found |= {shape["label"] for shape in content["shapes"]}
    names = _list_classes(source, found, background)
    classes = {name: label for label, name in enumerate(names)}
    tasks = []
    for name, content in contents.items():
        member, stem = source[name], name.removesuffix(".json")
        with labels.expect_fields(member.where):
            picture = content["imagePath"].replace("\\", "/").rpartition("/")[2]
            beside = str(pathlib.PurePosixPath(name).with_name(picture))
            image: Member | bytes
            if beside in source.members:
                image = source[beside]
            elif content.get("imageData"):
                image = base64.b64decode(content["imageData"])
            else:
                raise UserError(f"{member.where} is of {picture}, which is not beside it: copy it there")
            size = _read_size(image, member.where)
        draw = partial(labels.draw_labelme, classes, classes.get(background, IGNORE_LABEL), size)
        tasks += _make_pair(stem, image, member, draw, _find_split(stem, validation), member.where)
    return _make_plan(source, tasks, names)


def plan_coco(source: Archive, validation: float, background: str) -> Plan:
    """Panoptic files of COCO: panoptic_NAME.json beside a folder panoptic_NAME of masks; pictures anywhere below."""
    descriptions = [name for name in source.members if pathlib.PurePosixPath(name).match("*panoptic*.json")]
    pictures = {pathlib.PurePosixPath(name).name: name for name in source.members if "panoptic" not in name}
    names: list[str] = []
    tasks = []
    for description in sorted(descriptions):
        where = source[description].where
        content = labels.read_json(source[description].read(), where)
        with labels.expect_fields(where):
            categories = {
                row["id"]: row["name"] for row in sorted(content["categories"], key=lambda row: row["id"])
            }
            these = _list_classes(source, list(categories.values()), background)
            if names not in ([], these):
                raise UserError(
                    f"{where} has other categories than {descriptions[0]}: give all files the same"
                )
            names = these
            files = {row["id"]: row["file_name"] for row in content["images"]}
            classes = {number: names.index(name) for number, name in categories.items()}
            empty = names.index(background) if background else IGNORE_LABEL
            for row in content["annotations"]:
                file = pathlib.PurePosixPath(files[row["image_id"]]).name
                if file not in pictures:
                    raise UserError(f"{where} names {file}, which is not below {source.path}: copy it there")
                mask = source[f"{description.removesuffix('.json')}/{row['file_name']}"]
                segments = {
                    segment["id"]: classes[segment["category_id"]] for segment in row["segments_info"]
                }
                stem = file.rpartition(".")[0]
                split = _find_split(f"{description.removesuffix('.json')}/{stem}", None)
                split = split or _find_split(pictures[file], None) or _find_split(stem, validation)
                convert = partial(labels.map_segments, segments, empty)
                tasks += _make_pair(stem, source[pictures[file]], mask, convert, split)
    return _make_plan(source, tasks, names)


def plan_colours(source: Archive, validation: float) -> Plan:
    """Pictures below images/, masks of their names below masks/, and classes.txt with "name red green blue" lines."""
    colours: dict[labels.Colour, int] = {}
    names: list[str] = []
    for line in source.lines(CLASSES):
        *words, red, green, blue = line.split() if len(line.split()) > 3 else [line, "", "", ""]
        if not all(word.isdecimal() and int(word) < 256 for word in (red, green, blue)):
            raise UserError(
                f"{source[CLASSES].where}: expected NAME RED GREEN BLUE (0 to 255), found {line!r}"
            )
        name = " ".join(words)
        if name != VOID and name not in names:
            names.append(name)
        colours[int(red), int(green), int(blue)] = IGNORE_LABEL if name == VOID else names.index(name)
    masks = {name.rpartition(".")[0]: name for name in source.names("masks/")}
    tasks = []
    for picture in source.names("images/"):
        stem, _, suffix = picture.rpartition(".")
        if f".{suffix.lower()}" not in CUSTOM_LAYOUT.image_suffixes:
            continue
        if stem not in masks:
            raise UserError(f"{source.path}/images/{picture} has no mask masks/{stem}.png")
        convert = partial(labels.map_colours, colours, None)
        mask = source[f"masks/{masks[stem]}"]
        tasks += _make_pair(stem, source[f"images/{picture}"], mask, convert, _find_split(stem, validation))
    return _make_plan(source, tasks, names)


def _list_classes(source: Archive, found: Sequence[str] | set[str], background: str) -> list[str]:
    """The classes: the lines of classes.txt, or those that were found (a set sorted); the background first."""
    if CLASSES in source.members:
        names = source.lines(CLASSES)
    else:
        names = sorted(found) if isinstance(found, set) else list(dict.fromkeys(found))
    return [background, *names] if background and background not in names else names


def _find_split(name: str, validation: float | None) -> str:
    """The split of a picture: by a folder in its name, else by a hash, or "" where there is no share."""
    for part in pathlib.PurePosixPath(name).parts[:-1]:
        if match := _SPLIT_FOLDER.fullmatch(part.lower()):
            return _SPLITS[match[1]]
    if validation is None:
        return ""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "validation" if share < validation else "train"


def _make_pair(
    stem: str, image: Member | bytes, label: Member, convert: Convert, split: str, where: str = ""
) -> list[Task]:
    """The tasks of a picture and its label; a folder that names the split is left out."""
    folders = [
        part for part in pathlib.PurePosixPath(stem).parts[:-1] if not _SPLIT_FOLDER.fullmatch(part.lower())
    ]
    name = "/".join([*folders, pathlib.PurePosixPath(stem).name])
    if isinstance(image, bytes):
        suffix = ".jpg" if image.startswith(JPEG) else ".png"
    else:
        suffix = pathlib.PurePosixPath(image.name).suffix
    if suffix.lower() not in CUSTOM_LAYOUT.image_suffixes:
        raise UserError(
            f"{label.where} is of a picture {suffix}: expected {', '.join(CUSTOM_LAYOUT.image_suffixes)}"
        )
    return [
        Task(f"images/{_FOLDERS[split]}/{name}{suffix}", split, "image", image, None, where),
        Task(f"annotations/{_FOLDERS[split]}/{name}.png", split, "label", label, convert),
    ]


def _make_plan(source: Archive, tasks: list[Task], names: list[str]) -> Plan:
    for split in _FOLDERS:
        if not any(task.split == split for task in tasks):
            raise UserError(
                f"{source.path} gives no picture for {split} (of {len(tasks) // 2}): put pictures into folders named "
                "train and val, or change --validation"
            )
    if not 0 < len(names) <= IGNORE_LABEL:
        raise UserError(f"{source.path} has {len(names)} classes: from 1 to 255 fit into labels")
    classes = "".join(f"{name}\n" for name in names).encode()
    return plan_of([*tasks, Task(CLASSES, "", "list", classes)])


def _read_size(image: Member | bytes, where: str) -> tuple[int, int]:
    """(height, width) of a picture as it is decoded."""
    size: Any = (
        read_image_size(image.path) if isinstance(image, Member) else decode_image(image, where).shape[:2]
    )
    if size is None:
        raise UserError(f"{image.path if isinstance(image, Member) else where} is no picture, or damaged")
    return size
