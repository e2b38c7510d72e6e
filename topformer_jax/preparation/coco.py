"""JSON files of COCO: instances (polygons and run lengths), and panoptic ones, also in Mapillary's folders."""

import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated

import msgspec

from topformer_jax.data.batch import IGNORE_LABEL
from topformer_jax.preparation import labels, own
from topformer_jax.preparation.archives import Archive, Member, hold, open_archive
from topformer_jax.preparation.own import Annotations, Pair
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

BACKGROUNDS = ("background", "_background_", "__background__")  # categories of what nothing covers
Identity = int | str
Table = Mapping[Identity | None, int]  # the label of each category; that of None is for what nothing covers
Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Picture(msgspec.Struct):
    """A row of "images"."""

    id: Identity
    file_name: str
    height: Side | None = None
    width: Side | None = None


class Category(msgspec.Struct):
    """A row of "categories"."""

    id: Identity
    name: str
    supercategory: str | None = None


class Runs(msgspec.Struct):
    """A mask as run lengths, column after column; a text is compressed."""

    size: tuple[Side, Side]  # height, width
    counts: str | list[Annotated[int, msgspec.Meta(ge=0)]]


class Segment(msgspec.Struct):
    """A part of a panoptic mask."""

    id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
    category_id: Identity


class Annotation(msgspec.Struct):
    """A row of "annotations": an instance, whose outline is decoded when it is drawn, or all segments of a mask."""

    image_id: Identity
    category_id: Identity | None = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    bbox: list[float] | None = None  # x, y, width, height
    iscrowd: int | bool | None = None
    file_name: str | None = None
    segments_info: list[Segment] | None = None

    @property
    def has_outline(self) -> bool:
        return bytes(self.segmentation) not in (b"null", b"[]")


class Outline(msgspec.Struct):
    """What an instance draws."""

    segmentation: list[list[float]] | Runs | None


class File(msgspec.Struct):
    """A file of COCO."""

    images: list[Picture] | None = None
    categories: list[Category] = []
    annotations: list[Annotation] | None = None

    @property
    def kind(self) -> str:
        """What the file has; a file of instances without any annotation is of pictures of background."""
        if any(row.segments_info is not None for row in self.annotations or ()):
            return "panoptic segments"
        if self.images is None or self.annotations is None:
            return ""
        is_empty = self.categories and not self.annotations
        has_any = is_empty or any(row.has_outline or row.bbox for row in self.annotations)
        return "polygons, run lengths or boxes" if has_any else ""


def read(source: Archive, background: str) -> Annotations:
    """Finds the annotation files, panoptic ones before those of instances, and the pictures that they name."""
    annotations = Annotations(source)
    contents = {name: file for name, file in annotations.read_json(File, "images") if file.images is not None}
    kinds = {file.kind for file in contents.values()} - {""}
    if not kinds:
        raise UserError(
            f"{source.path} holds no .json of COCO with panoptic segments, polygons or run lengths "
            f"({own.describe(source)})"
        )
    kind = min(kinds)  # panoptic before polygons
    others = [source[name] for name, file in contents.items() if file.kind != kind]
    annotations.leave_out(f"files without {kind}", others, own.FILES)
    contents = {name: file for name, file in contents.items() if file.kind == kind}
    categories, where = _find_categories(annotations, contents), ", ".join(contents)[:80]
    masks = dict[str, str]()  # the folder of each panoptic file's masks
    if kind.startswith("panoptic"):
        # COCO's own rule: pixels without a segment are void.
        classes, numbers, empty = own.number_classes(categories, background or own.VOID, where)
        masks = {name: _mask_folder(annotations, name) for name in contents}
    else:
        if not any(row.has_outline for file in contents.values() for row in file.annotations or ()):
            raise UserError(f"{where} has no polygons or run lengths: boxes say no pixel's class")
        labels.require_pycocotools()
        classes, numbers, empty = own.number_classes(categories, background, where, BACKGROUNDS)
        annotations.notes.append("overlapping regions are drawn by their area, the largest first")
    annotations.classes = classes
    table: dict[Identity | None, int] = {None: empty}
    table.update(numbers.items())
    names = {_mask_name(masks[name], row) for name in masks for row in contents[name].annotations or ()}
    index = own.index_ends(name for name in source.members if name not in names)
    for name, file in contents.items():
        listed = _list_pictures(annotations, name, file, index)
        if masks:
            _add_panoptic(annotations, name, masks[name], listed, table)
        else:
            _add_instances(annotations, name, listed, table)
    return annotations


def _find_categories(annotations: Annotations, contents: Mapping[str, File]) -> dict[Identity, str]:
    """Returns the categories' names in the order of their numbers, without Roboflow's name of the group."""
    used = {row.category_id for file in contents.values() for row in file.annotations or ()}
    categories: dict[Identity, str] | None = None
    for name, file in contents.items():
        where = annotations.source[name].where
        groups = {row.supercategory for row in file.categories}
        these: dict[Identity, str] = {}
        for row in sorted(file.categories, key=lambda row: (isinstance(row.id, str), row.id)):
            if row.id in these:
                raise UserError(f"{where} has two categories of id {files.shorten(row.id, 40)}: renumber one")
            if row.id == 0 and row.supercategory == "none" and row.name in groups and row.id not in used:
                note = f"no class: category {files.shorten(row.name)}, which names the group of the others"
                annotations.notes += [note] if note not in annotations.notes else []
            else:
                these[row.id] = row.name
        if categories not in (None, these):
            raise UserError(f"{where} has other categories than {next(iter(contents))}: make them equal")
        categories = these
    return categories or {}


def _mask_folder(annotations: Annotations, name: str) -> str:
    """Returns the folder of a panoptic file's masks: of the file's name, or the file's own (Mapillary).

    Masks in a .zip of the file's name join the source, as if they were unpacked into that folder.
    """
    members, stem = annotations.source.members, name[: -len(".json")]
    if any(path.startswith(f"{stem}/") for path in members):
        return stem
    packed = members.get(f"{stem}.zip")
    if packed is None or not packed.path:
        return name.rpartition("/")[0]
    annotations.read.add(packed)
    folder = stem.rpartition("/")[2]
    for path, member in open_archive(pathlib.Path(packed.path)).members.items():
        members[f"{stem}/{path.removeprefix(f'{folder}/')}"] = member
    return stem


def _mask_name(folder: str, row: Annotation) -> str:
    return "/".join([*filter(None, [folder]), *own.split_path(row.file_name or "")])


# A picture of a file, with its path, its split and its annotations.
Listed = Iterator[tuple[Picture, str, str, list[Annotation]]]


def _list_pictures(annotations: Annotations, name: str, file: File, index: Mapping[str, list[str]]) -> Listed:
    where = annotations.source[name].where
    split = own.split_of_folders(name) or own.split_of(pathlib.PurePosixPath(name).stem)
    rows: dict[Identity, list[Annotation]] = {}
    for picture in file.images or ():
        if picture.id in rows:
            raise UserError(f"{where} has two images of id {files.shorten(picture.id, 40)}: renumber one")
        rows[picture.id] = []
    for number, row in enumerate(file.annotations or ()):
        if row.image_id not in rows:
            raise UserError(
                f"{where}: annotation {number} is of image {files.shorten(row.image_id, 40)}, which it does not list"
            )
        rows[row.image_id].append(row)
    for picture in file.images or ():
        path = own.find_picture(index, picture.file_name, name, split, where)
        yield picture, path, split, rows[picture.id]


def _add_panoptic(annotations: Annotations, name: str, folder: str, listed: Listed, table: Table) -> None:
    source, where, missing = annotations.source, annotations.source[name].where, []
    for picture, path, split, rows in listed:
        if not rows:
            missing.append(picture.file_name)
        for row in rows:
            mask = _mask_name(folder, row)
            if mask not in source.members:
                raise UserError(f"{where} names the mask {files.shorten(mask)}, which is not there: put it there")
            segments = {part.id: _label(part.category_id, table, where) for part in row.segments_info or ()}
            convert = partial(labels.map_segments, segments, table[None])
            sized = partial(labels.convert_mask, convert, source[path])
            annotations.pairs.append(Pair(path, source[path], source[mask], sized, split))
    if missing:
        annotations.left_out.append((f"without a mask in {files.shorten(name)}", own.PICTURES, missing))


def _add_instances(annotations: Annotations, name: str, listed: Listed, table: Table) -> None:
    counts: Counter[str] = Counter()
    for picture, path, split, rows in listed:
        where = f"{annotations.source[name].where}: {files.shorten(picture.file_name, 80)}"
        _read_regions(rows, table, where, counts)
        counts["pictures without annotations, all background"] += not rows
        convert = partial(_draw, rows, table, picture, annotations.source[path])
        annotations.pairs.append(Pair(path, annotations.source[path], hold(where), convert, split))
    annotations.notes += [f"{text} in {files.shorten(name)}: {count}" for text, count in counts.items() if count]


def _draw(rows: Sequence[Annotation], table: Table, picture: Picture, image: Member, data: bytes, name: str) -> bytes:
    stated = (picture.height, picture.width) if picture.height and picture.width else None
    size = labels.read_size(image, stated, name)
    return labels.draw_regions(table[None], size, _read_regions(rows, table, name, Counter()), name)


def _read_regions(rows: Sequence[Annotation], table: Table, where: str, counts: Counter[str]) -> list[labels.Region]:
    """Returns the regions of a picture's annotations; a box without a mask is void."""
    regions = []
    for row in rows:
        label = _label(row.category_id, table, where)
        data = b'{"segmentation":' + bytes(row.segmentation) + b"}"
        outline = files.read_json(data, Outline, where).segmentation
        if isinstance(outline, Runs):
            regions.append(labels.Region(label, runs=outline.counts, size=outline.size))
        elif polygons := [polygon for polygon in outline or () if len(polygon) > 4]:
            regions.append(labels.Region(label, polygons))
        elif row.bbox and len(row.bbox) == 4 and min(row.bbox[2:]) > 0:
            counts["boxes without a mask, whose pixels are void"] += 1
            regions.append(labels.box_region(IGNORE_LABEL, *row.bbox))
        else:
            counts["annotations without an area, left out"] += 1
        counts["crowds, drawn as their class"] += bool(row.iscrowd)
    return regions


def _label(number: Identity | None, table: Table, where: str) -> int:
    if number is None or number not in table:
        raise UserError(f"{where} has an annotation of category {files.shorten(number, 40)}, which it does not list")
    return table[number]
